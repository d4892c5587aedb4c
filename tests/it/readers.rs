//! The tables as others read them: python deltalake, DuckDB and Polars must see the rows that we see, all columns, bit for bit.

use std::path::Path;
use std::process::Command;

use arrow::array::{Array, AsArray, RecordBatch};
use arrow::datatypes::{
    DataType, Date32Type, Float32Type, Float64Type, Int32Type, Int64Type, TimestampMicrosecondType,
};
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};
use taod::table::schema::{Column, Kind};
use taod::table::{Name, Table, TableLocation, TableSpec, Tables, TxnStep, maintain};

use crate::harness;

/// Returns a value for a column of row `i`; every kind has its awkward ones.
fn value(column: &Column, i: i64) -> Value {
    if !column.required && i % 3 == 2 {
        return Value::Null;
    }
    match column.kind {
        Kind::Bool => json!(i % 2 == 0),
        Kind::Int => json!(i as i32 - 1),
        Kind::Long => json!(i64::MAX - i),
        Kind::Double => json!(0.1 + i as f64),
        Kind::Time => json!(1_700_000_000_000_001i64 + i),
        Kind::Date => json!(format!("2026-02-{:02}", i + 1)),
        Kind::Word | Kind::Id => json!(format!("{}-{i}", column.name)),
        Kind::Text => json!(format!("\"q\" \\ \n\t\u{0} ü 漢字 🦀 {i}")),
        Kind::Json => json!({ "i": i, "text": "a\nb", "list": [1, null, 0.5] }),
        Kind::Rest => json!({ "more": i }),
        Kind::Ints => json!([i, null, -7]),
        Kind::Floats => json!([0.1f32, null, -1e-30f32]),
        Kind::Bytes => json!(format!("00ff{i:02x}")),
    }
}

/// Encodes one cell as tests/tools/digest.py does.
fn encode(array: &dyn Array, row: usize, out: &mut Vec<u8>) {
    if array.is_null(row) {
        return out.push(b'n');
    }
    let text = match array.data_type() {
        DataType::Boolean => format!("b{}", u8::from(array.as_boolean().value(row))),
        DataType::Int32 => format!("i{}", array.as_primitive::<Int32Type>().value(row)),
        DataType::Int64 => format!("i{}", array.as_primitive::<Int64Type>().value(row)),
        DataType::Float32 => double(f64::from(array.as_primitive::<Float32Type>().value(row))),
        DataType::Float64 => double(array.as_primitive::<Float64Type>().value(row)),
        DataType::Date32 => format!("D{}", array.as_primitive::<Date32Type>().value(row)),
        DataType::Timestamp(..) => format!("t{}", array.as_primitive::<TimestampMicrosecondType>().value(row)),
        DataType::Utf8 => string(array.as_string::<i32>().value(row)),
        DataType::Utf8View => string(array.as_string_view().value(row)),
        DataType::Binary => format!("x{}", hex::encode(array.as_binary::<i32>().value(row))),
        DataType::BinaryView => format!("x{}", hex::encode(array.as_binary_view().value(row))),
        DataType::List(_) => {
            let items = array.as_list::<i32>().value(row);
            let cells: Vec<Vec<u8>> = (0..items.len())
                .map(|i| {
                    let mut cell = Vec::new();
                    encode(items.as_ref(), i, &mut cell);
                    cell
                })
                .collect();
            format!("[{}]", String::from_utf8(cells.join(&b',')).unwrap())
        }
        other => panic!("no encoding for {other}"),
    };
    out.extend_from_slice(text.as_bytes());
}

fn double(value: f64) -> String {
    format!("d{}", hex::encode(value.to_be_bytes()))
}

fn string(text: &str) -> String {
    format!("s{}:{text}", text.len())
}

/// Returns the number of rows and the hash over them, as tests/tools/digest.py computes them.
pub(crate) fn digest(batches: &[RecordBatch]) -> Value {
    let mut lines: Vec<Vec<u8>> = Vec::new();
    for batch in batches {
        for row in 0..batch.num_rows() {
            let mut line = Vec::new();
            for (i, column) in batch.columns().iter().enumerate() {
                if i > 0 {
                    line.push(b'|');
                }
                encode(column.as_ref(), row, &mut line);
            }
            lines.push(line);
        }
    }
    lines.sort();
    let mut whole = Sha256::new();
    for line in &lines {
        whole.update(line);
        whole.update(b"\n");
    }
    json!({ "rows": lines.len(), "sha256": hex::encode(whole.finalize()) })
}

/// Reads tables with the independent readers; one JSON object per table.
pub(crate) fn read(python: &Path, folders: &[String]) -> Vec<Value> {
    let script = harness::root().join("tests/tools/read_tables.py");
    let output = Command::new(python).arg(script).args(folders).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// Compares one table with what the independent readers said of it.
pub(crate) async fn assert_same(table: &Table, said: &Value) {
    let ours = digest(&table.query("select * from t").await.unwrap());
    assert_eq!(said["version"], json!(table.version()), "{}", table.name());
    assert_eq!(said["deltalake"], ours, "python deltalake, {}", table.name());
    assert_eq!(said["duckdb"], ours, "DuckDB, {}", table.name());
    assert_eq!(said["polars"], ours, "Polars, {}", table.name());
}

/// Makes every table below `root`, each of three commits with every kind of value, and returns their folders.
pub(crate) async fn every_table(root: &Path) -> Vec<String> {
    let tables = Tables::open(root).unwrap();
    for name in Name::ALL {
        let mut table = tables.open_one(name).await.unwrap();
        for commit in 0..3 {
            let row = |i| {
                let cells = name.spec().columns.iter().map(|c| (c.name.to_owned(), value(c, i)));
                Value::Object(cells.collect::<Map<_, _>>())
            };
            let rows: Vec<Value> = (commit * 4..commit * 4 + 4).map(row).collect();
            let step = TxnStep { app_id: "test".into(), expect: (commit > 0).then_some(commit), set: commit + 1 };
            table.append_rows(&rows, &[step]).await.unwrap();
            if commit == 1 {
                // The other readers then start from our checkpoint and go on with the log.
                table.maintain().await.unwrap();
            }
        }
    }
    Name::ALL.into_iter().map(|name| root.join(name.spec().name).display().to_string()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn other_readers_read_every_table_as_we_do() {
    let Some(python) = harness::readers() else { return };
    let folder = tempfile::tempdir().unwrap();
    let folders = every_table(folder.path()).await;
    let tables = Tables::open(folder.path()).unwrap();
    for (name, said) in Name::ALL.into_iter().zip(read(&python, &folders)) {
        assert_eq!(said["deltalake"]["rows"], 12);
        assert_same(&tables.open_one(name).await.unwrap(), &said).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_of_an_older_taod_is_read_by_others_after_its_new_column_and_a_compaction() {
    let Some(python) = harness::readers() else { return };
    let folder = tempfile::tempdir().unwrap();
    let place = TableLocation::parse(&folder.path().to_string_lossy(), &Default::default()).unwrap();
    let spec = Name::DeadLetters.spec();
    let columns: Vec<_> = spec.columns.iter().filter(|column| column.name != "headers").copied().collect();
    let older: &'static TableSpec = Box::leak(Box::new(TableSpec { name: spec.name, columns: columns.leak() }));
    let mut expect = None;
    for (spec, commits) in [(older, 0..3), (spec, 3..6)] {
        let mut table = Table::open_or_create(&place, spec).await.unwrap();
        for i in commits {
            let cells = spec.columns.iter().map(|c| (c.name.to_owned(), value(c, i)));
            let row = Value::Object(cells.collect::<Map<_, _>>());
            let step = TxnStep { app_id: "test".into(), expect, set: i };
            table.append_rows(&[row], &[step]).await.unwrap();
            expect = Some(i);
        }
    }
    let path = folder.path().display().to_string();
    for compacted in [false, true] {
        let table = Table::open_or_create(&place, spec).await.unwrap();
        let said = &read(&python, std::slice::from_ref(&path))[0];
        assert_eq!(said["deltalake"]["rows"], 6, "compacted: {compacted}");
        assert_same(&table, said).await;
        let settings = maintain::Settings { compact_from_files: 2, ..maintain::Settings::default() };
        let report = maintain::one(table, &settings).await;
        assert_eq!((report.failed(), report.files), (false, 1), "{report}");
    }
}
