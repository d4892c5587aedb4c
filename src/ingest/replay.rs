//! Replay: dead letters that can be read by now become rows, exactly once.
//!
//! A letter stays where it is, as evidence; that it was replayed is proved by its row: `queries` holds one at the letter's
//! own coordinates. Only a replay writes there, and each of its commits moves one counter (app id
//! `taod/<source>/<generation>/replay/<topic>`) by compare-and-set. So what is found in `queries` at the version a commit
//! builds on is all there is: of two replays at once one is fenced off and looks again, and one that is killed between two
//! commits left rows that the next one finds. The ingestion never writes there either: it passes over coordinates that are
//! dead letters, and replay leaves alone what the ingestion may still read, letters at or past the stored offset.
//!
//! A record is read whole, as it is stored. Where it failed as a whole (one letter, of index 0, and no row) everything that
//! it reads as now is stored, be it several rows. Where a part of it failed only the parts that failed are, so that rows
//! stored, or erased, before do not come again. What still cannot be read stays a letter; no second one is written.

use std::collections::{BTreeMap, BTreeSet};

use arrow::array::{AsArray, BooleanArray, RecordBatch};
use arrow::compute::filter_record_batch;
use arrow::datatypes::{Int32Type, Int64Type};
use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::reader::{Known, Reader};
use super::{IngestError, Settings};
use crate::query_log::{Record, TopicPartition};
use crate::table::{ERASURES, Name, Suppressions, Table, TableError, Tables, TxnStep};

/// How often a chunk is looked at again because another replay came first.
const ATTEMPTS: u32 = 20;

/// Records of a chunk at most: each is named where they are asked for.
const CHUNK_RECORDS: usize = 1000;

/// Which letters are replayed.
#[derive(Debug, Clone, Default)]
pub struct Choice {
    /// Only letters with this reason.
    pub reason: Option<String>,
    /// Only letters of records that Kafka stamped at or after this time.
    pub since: Option<DateTime<Utc>>,
    /// Nothing is stored.
    pub dry_run: bool,
}

/// What became of the letters.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize)]
pub struct Replayed {
    /// Letters that were chosen.
    pub letters: u64,
    /// Rows stored, or with a dry run to be stored; a letter may become several.
    pub rows: u64,
    /// Letters whose rows stood in the table already.
    pub before: u64,
    /// Letters that the ingestion has not passed yet, so that they are not replayed now.
    pub unsettled: u64,
    /// Letters that still cannot be read, by reason.
    pub failed: BTreeMap<&'static str, u64>,
    /// Letters that hold no call, by reason.
    pub skipped: BTreeMap<&'static str, u64>,
    pub commits: u64,
}

/// Coordinates and size of a letter.
#[derive(Debug, Clone, Deserialize)]
struct Key {
    topic: String,
    partition: i32,
    offset: i64,
    record_index: i32,
    chosen: bool,
    bytes: u64,
}

/// Letters of neighbouring records of one partition, by offset: the index of each, and whether it was chosen.
type Chunk = BTreeMap<i64, BTreeMap<i32, bool>>;

/// A letter as it is stored; binary columns in hex.
#[derive(Debug, Deserialize)]
struct Stored {
    offset: i64,
    key: Option<String>,
    headers: Option<Value>,
    kafka_time: Option<DateTime<Utc>>,
    payload: String,
}

/// Replays the chosen letters of the configured topic under the current formats and mappings.
pub async fn run(settings: &Settings, tables: &Tables, choice: &Choice) -> Result<Replayed, IngestError> {
    let mut queries = tables.open_one(Name::Queries).await?;
    // Held before the list is read: an erasure that comes later fences this replay.
    queries.hold(ERASURES).await?;
    let mut replay = Replay {
        reader: settings.reader()?,
        settings,
        letters: tables.open_one(Name::DeadLetters).await?,
        queries,
        erased: Suppressions::load(tables).await?,
        dry_run: choice.dry_run,
        done: Replayed::default(),
    };
    let keys = replay.keys(choice).await?;
    replay.done.letters = keys.iter().filter(|key| key.chosen).count() as u64;
    for (place, chunk) in chunks(keys, settings.batch_bytes) {
        replay.chunk(&place, &chunk).await?;
    }
    Ok(replay.done)
}

/// Cuts letters in order into chunks of one partition and of about `limit` bytes or [`CHUNK_RECORDS`], never through a record; those without a
/// chosen letter are left out.
fn chunks(keys: Vec<Key>, limit: u64) -> Vec<(TopicPartition, Chunk)> {
    let (mut chunks, mut size): (Vec<(TopicPartition, Chunk)>, u64) = (Vec::new(), 0);
    for key in keys {
        let goes_on = chunks.last().is_some_and(|(place, chunk)| {
            *place.topic == *key.topic
                && place.partition == key.partition
                && ((size < limit && chunk.len() < CHUNK_RECORDS) || chunk.contains_key(&key.offset))
        });
        if !goes_on {
            chunks.push((TopicPartition::new(&key.topic, key.partition), Chunk::new()));
            size = 0;
        }
        size += key.bytes;
        if let Some((_, chunk)) = chunks.last_mut() {
            chunk.entry(key.offset).or_default().insert(key.record_index, key.chosen);
        }
    }
    for (_, chunk) in &mut chunks {
        chunk.retain(|_, indices| indices.values().any(|chosen| *chosen));
    }
    chunks.retain(|(_, chunk)| !chunk.is_empty());
    chunks
}

struct Replay<'a> {
    settings: &'a Settings,
    reader: Reader,
    letters: Table,
    queries: Table,
    /// What was erased before this replay began.
    erased: Suppressions,
    dry_run: bool,
    done: Replayed,
}

impl Replay<'_> {
    /// Returns the coordinates of all letters of the topics that are read, in order.
    async fn keys(&self, choice: &Choice) -> Result<Vec<Key>, TableError> {
        let mut chosen = vec!["true".to_owned()];
        chosen.extend(choice.reason.iter().map(|reason| format!("reason = {}", text(reason))));
        let since = choice
            .since
            .map(|since| format!("kafka_time >= timestamp '{}'", since.format("%Y-%m-%d %H:%M:%S%.6f+00:00")));
        chosen.extend(since);
        let sql = format!(
            "select topic, \"partition\", \"offset\", record_index, coalesce({}, false) as chosen, \
             octet_length(encode(payload, 'hex')) / 2 as bytes from t \
             order by topic, \"partition\", \"offset\", record_index",
            chosen.join(" and ")
        );
        let mut keys: Vec<Key> = self.letters.select(&sql).await?;
        let reads = self.settings.kafka.chooser();
        keys.retain(|key| reads(&key.topic));
        Ok(keys)
    }

    /// Stores what one chunk reads as now, in one commit.
    async fn chunk(&mut self, place: &TopicPartition, chunk: &Chunk) -> Result<(), IngestError> {
        let counter = self.settings.kafka.replay_id(&place.topic);
        for _ in 0..ATTEMPTS {
            self.queries.refresh().await?;
            let offset = self.queries.txn(&self.settings.kafka.app_id(place)).await?.unwrap_or(0);
            let count = self.queries.txn(&counter).await?;
            let settled: Chunk = chunk.range(..offset).map(|(offset, indices)| (*offset, indices.clone())).collect();
            let mut done = self.done.clone();
            done.unsettled += chosen(chunk) - chosen(&settled);
            let batch = self.read(place, &settled, &mut done).await?;
            let rows = batch.as_ref().map_or(0, RecordBatch::num_rows) as u64;
            done.rows += rows;
            if let Some(batch) = batch.filter(|_| rows > 0 && !self.dry_run) {
                let step = TxnStep { app_id: counter.clone(), expect: count, set: count.unwrap_or(0) + 1 };
                match self.queries.append(&[batch], &[step]).await {
                    Ok(_) => done.commits += 1,
                    Err(TableError::Fenced { app_id, .. }) if app_id == counter => continue,
                    Err(error) => return Err(error.into()),
                }
            }
            self.done = done;
            return Ok(());
        }
        Err(TableError::Conflict { table: self.queries.name().to_owned() }.into())
    }

    /// Reads the records of settled letters and returns the rows that are not in the table yet.
    async fn read(
        &self,
        place: &TopicPartition,
        chunk: &Chunk,
        done: &mut Replayed,
    ) -> Result<Option<RecordBatch>, IngestError> {
        let rows = self.coordinates(place, chunk).await?;
        let is_stored = |offset: i64, index: i32| rows.contains(&(offset, index));
        let mut wanted = Chunk::new();
        for (offset, indices) in chunk {
            let open = indices.iter().filter(|(index, _)| !is_stored(*offset, **index));
            let open: BTreeMap<i32, bool> = open.map(|(index, chosen)| (*index, *chosen)).collect();
            done.before += count(indices) - count(&open);
            if count(&open) > 0 {
                wanted.insert(*offset, open);
            }
        }
        if wanted.is_empty() {
            return Ok(None);
        }
        let records = self.records(place, &wanted).await?;
        let parsed = self.reader.read(&records, &Known::new(), &self.erased)?;
        let failed_whole = |offset: i64| {
            chunk.get(&offset).is_some_and(|indices| indices.len() == 1 && indices.contains_key(&0))
                && rows.range((offset, 0)..=(offset, i32::MAX)).next().is_none()
        };
        let takes = |offset: i64, index: i32| {
            let chosen = wanted.get(&offset).and_then(|indices| indices.get(&index)).is_some_and(|chosen| *chosen);
            chosen || failed_whole(offset)
        };
        for letter in parsed.letters.iter().filter(|letter| takes(letter.offset, letter.record_index)) {
            *done.failed.entry(letter.reason).or_default() += 1;
        }
        for (reason, n) in parsed.skipped {
            *done.skipped.entry(reason).or_default() += n;
        }
        let offsets = parsed.batch.column_by_name("offset").map(|c| c.as_primitive::<Int64Type>().values().to_vec());
        let indices =
            parsed.batch.column_by_name("record_index").map(|c| c.as_primitive::<Int32Type>().values().to_vec());
        let places = offsets.unwrap_or_default().into_iter().zip(indices.unwrap_or_default());
        let mask: BooleanArray = places.map(|(offset, index)| Some(takes(offset, index))).collect();
        let batch = filter_record_batch(&parsed.batch, &mask).map_err(|e| IngestError::Task(e.to_string()))?;
        Ok(Some(batch))
    }

    /// Returns which of the chunk's records have rows, and at which index.
    async fn coordinates(&self, place: &TopicPartition, chunk: &Chunk) -> Result<BTreeSet<(i64, i32)>, TableError> {
        #[derive(Deserialize)]
        struct Place {
            offset: i64,
            record_index: i32,
        }
        let Some(range) = range(place, chunk) else { return Ok(BTreeSet::new()) };
        let sql = format!("select \"offset\", record_index from t where {range}");
        let places: Vec<Place> = self.queries.select(&sql).await?;
        Ok(places.into_iter().map(|place| (place.offset, place.record_index)).collect())
    }

    /// Returns the records of a chunk as they came from Kafka.
    async fn records(&self, place: &TopicPartition, chunk: &Chunk) -> Result<Vec<Record>, IngestError> {
        let Some(range) = range(place, chunk) else { return Ok(Vec::new()) };
        let sql = format!(
            "select \"offset\", key, headers, kafka_time, payload from t where {range} \
             order by \"offset\", record_index"
        );
        let mut stored: Vec<Stored> = self.letters.select(&sql).await?;
        // The first part that failed holds the whole record.
        stored.dedup_by_key(|letter| letter.offset);
        stored.into_iter().map(|letter| letter.record(place)).collect()
    }
}

/// Returns the condition that holds for a chunk's records alone. The bounds are for the files' statistics.
fn range(place: &TopicPartition, chunk: &Chunk) -> Option<String> {
    let (first, last) = (chunk.keys().next()?, chunk.keys().next_back()?);
    let (topic, partition) = (text(&place.topic), place.partition);
    let offsets: Vec<String> = chunk.keys().map(i64::to_string).collect();
    Some(format!(
        "topic = {topic} and \"partition\" = {partition} and \"offset\" >= {first} and \"offset\" <= {last} \
         and \"offset\" in ({})",
        offsets.join(", ")
    ))
}

impl Stored {
    fn record(self, place: &TopicPartition) -> Result<Record, IngestError> {
        let broken = |why: String| IngestError::Letter { offset: self.offset, partition: place.partition, why };
        let bytes = |text: &str| hex::decode(text).map_err(|e| broken(e.to_string()));
        Ok(Record {
            place: place.clone(),
            offset: self.offset,
            time_ms: self.kafka_time.map(|time| time.timestamp_millis()),
            key: self.key.as_deref().map(bytes).transpose()?,
            headers: headers(self.headers.as_ref())
                .ok_or_else(|| broken("its headers are not as taod writes them".into()))?,
            payload: Some(bytes(&self.payload)?),
        })
    }
}

/// Returns headers as they came, from `[name, text or null or {"hex": ...}]` each.
fn headers(stored: Option<&Value>) -> Option<Vec<(String, Option<Vec<u8>>)>> {
    let Some(stored) = stored else { return Some(Vec::new()) };
    let header = |pair: &Value| {
        let name = pair.get(0)?.as_str()?.to_owned();
        let value = match pair.get(1)? {
            Value::Null => None,
            Value::String(text) => Some(text.clone().into_bytes()),
            other => Some(hex::decode(other["hex"].as_str()?).ok()?),
        };
        Some((name, value))
    };
    stored.as_array()?.iter().map(header).collect()
}

fn count(indices: &BTreeMap<i32, bool>) -> u64 {
    indices.values().filter(|chosen| **chosen).count() as u64
}

fn chosen(chunk: &Chunk) -> u64 {
    chunk.values().map(count).sum()
}

/// Returns a text as SQL writes it.
fn text(value: &str) -> String {
    format!("'{}'", value.replace('\'', "''"))
}

#[cfg(test)]
#[path = "replay_tests.rs"]
mod tests;
