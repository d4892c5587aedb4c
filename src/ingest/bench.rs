//! What a row costs between Kafka's client and the store, without either: for profilers and for a comparison of two builds.
//!
//! `TAOD_BENCH_LOG` names a file of records, one a line (`tools/bench/topic.py TEXTS ROWS` prints those of
//! the bench's topic).
//! The last line printed is a hash over every column of every row and dead letter: it must not change with the speed.

use std::fmt::Write;
use std::time::Instant;

use arrow::json::LineDelimitedWriter;
use sha2::{Digest, Sha256};

use super::Settings;
use super::reader::{Known, Reader};
use crate::query_log::{Record, TopicPartition};
use crate::table::{DataFile, Suppressions, schema};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Records of one hand-over by Kafka's thread, as large as the bench's are.
const CHUNK: usize = 640;

fn records() -> Vec<Record> {
    let path = std::env::var("TAOD_BENCH_LOG").expect("TAOD_BENCH_LOG names a file of records");
    let text = std::fs::read(path).unwrap();
    let place = TopicPartition::new("bench", 0);
    let record = |(offset, line): (usize, &[u8])| Record {
        place: place.clone(),
        offset: offset as i64,
        time_ms: Some(1_772_366_400_000),
        key: None,
        headers: Vec::new(),
        payload: Some(line.to_vec()),
    };
    text.split(|&byte| byte == b'\n').filter(|line| !line.is_empty()).enumerate().map(record).collect()
}

fn reader() -> Reader {
    Reader { user_key: Some(vec![7; 32]), ..Settings::default().reader().unwrap() }
}

#[test]
#[ignore = "a measurement: give it TAOD_BENCH_LOG"]
fn bench_rows() {
    let (records, reader, known) = (records(), reader(), Known::new());
    let rounds: usize = std::env::var("TAOD_BENCH_ROUNDS").map_or(3, |rounds| rounds.parse().unwrap());
    for _ in 0..rounds {
        let (mut file, mut read, mut write) = (DataFile::new(&schema::QUERIES).unwrap(), 0.0, 0.0);
        for chunk in records.chunks(CHUNK) {
            let begun = Instant::now();
            let parsed = reader.read(chunk, &known, &Suppressions::default()).unwrap();
            let middle = Instant::now();
            file.write(&parsed.batch).unwrap();
            read += (middle - begun).as_secs_f64();
            write += middle.elapsed().as_secs_f64();
        }
        let each = 1e6 / records.len() as f64;
        println!(
            "{} rows of {} records: read {:.2} us, encode {:.2} us each",
            file.rows(),
            records.len(),
            read * each,
            write * each
        );
    }
    if std::env::var("TAOD_BENCH_HASH").is_ok() {
        println!("hash {}", hash(&records, &reader));
    }
}

/// Returns a hash over all rows and dead letters with the columns that do not depend on the day.
fn hash(records: &[Record], reader: &Reader) -> String {
    let mut hasher = Sha256::new();
    for chunk in records.chunks(CHUNK) {
        let parsed = reader.read(chunk, &Known::new(), &Suppressions::default()).unwrap();
        let date = parsed.batch.schema().index_of("ingest_date").unwrap();
        let others: Vec<usize> = (0..parsed.batch.num_columns()).filter(|&column| column != date).collect();
        let mut text = Vec::new();
        let mut writer = LineDelimitedWriter::new(&mut text);
        writer.write(&parsed.batch.project(&others).unwrap()).unwrap();
        writer.finish().unwrap();
        let mut letters = String::new();
        for letter in &parsed.letters {
            let mut letter = serde_json::to_value(letter).unwrap();
            letter["ingest_date"] = serde_json::Value::Null;
            writeln!(letters, "{letter}").unwrap();
        }
        writeln!(letters, "{:?}", parsed.skipped).unwrap();
        hasher.update(&text);
        hasher.update(letters);
    }
    hex::encode(hasher.finalize())
}
