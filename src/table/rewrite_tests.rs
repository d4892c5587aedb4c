//! What must hold where rows leave a table: the selected ones all go, the others stay once, whoever writes meanwhile.

use std::collections::HashSet;

use serde_json::{Value, json};

use super::*;

async fn open(folder: &std::path::Path, name: Name) -> Table {
    Tables::open(folder).unwrap().open_one(name).await.unwrap()
}

fn letter(offset: i64, day: &str, payload: &str) -> Value {
    json!({ "topic": "t", "partition": 1, "offset": offset, "record_index": 0, "ingest_date": day, "key": null,
            "payload": hex::encode(payload), "reason": "r", "message": "m", "taod_version": "0", "config_hash": "c" })
}

async fn store(table: &mut Table, letters: &[Value]) {
    let batch = batch_of_any(&schema::DEAD_LETTERS, letters).unwrap();
    table.append(&[batch], &[]).await.unwrap();
}

fn marked(needle: &str) -> Selection {
    Selection::Containing { columns: vec!["payload"], needles: vec![needle.into()] }
}

/// Returns offset and payload of all rows at the newest version, in order.
async fn all(folder: &std::path::Path) -> Vec<(i64, String)> {
    let rows: Vec<Value> = open(folder, Name::DeadLetters).await.rows(None).await.unwrap();
    let mut found: Vec<(i64, String)> =
        rows.iter().map(|r| (r["offset"].as_i64().unwrap(), r["payload"].as_str().unwrap().to_owned())).collect();
    found.sort();
    found
}

fn expected(rows: &[(i64, &str)]) -> Vec<(i64, String)> {
    rows.iter().map(|(offset, payload)| (*offset, hex::encode(payload))).collect()
}

fn parquet_files(folder: &std::path::Path) -> usize {
    let entries = std::fs::read_dir(folder.join("dead_letters")).unwrap().flatten();
    entries.filter(|entry| entry.file_name().to_string_lossy().ends_with(".parquet")).count()
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_go_files_without_any_stay_and_the_log_tells_the_truth_of_what_is_left() {
    let folder = tempfile::tempdir().unwrap();
    let mut table = open(folder.path(), Name::DeadLetters).await;
    store(
        &mut table,
        &[letter(1, "2026-01-01", "keep"), letter(2, "2026-01-02", "x mark"), letter(3, "2026-01-03", "c")],
    )
    .await;
    store(&mut table, &[letter(4, "2026-01-04", "mark")]).await;
    store(&mut table, &[letter(5, "2026-01-05", "markedly other")]).await;
    let selection = marked("mark");
    let mut hunt = Hunt::begin(&mut table, &selection, &["offset"]).await.unwrap();
    let found = hunt.next().await.unwrap().unwrap();
    assert_eq!((found.count, found.rows.iter().map(|b| b.num_rows()).sum::<usize>()), (2, 2));
    let taken = hunt.take(found).await.unwrap();
    assert_eq!((taken.rows, taken.version, taken.gone.len(), taken.rewritten), (2, Some(4), 2, 1));
    assert!(hunt.next().await.unwrap().is_none());
    assert_eq!(all(folder.path()).await, expected(&[(1, "keep"), (3, "c"), (5, "markedly other")]));

    let entry = folder.path().join("dead_letters/_delta_log/00000000000000000004.json");
    let entry = std::fs::read_to_string(entry).unwrap();
    assert!(!entry.contains("mark"), "{entry}");
    let lines: Vec<Value> = entry.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let removes: Vec<&Value> = lines.iter().filter_map(|line| line.get("remove")).collect();
    assert!(removes.len() == 2 && removes.iter().all(|remove| remove["dataChange"] == true));
    let add = lines.iter().find_map(|line| line.get("add")).unwrap();
    let stats: Value = serde_json::from_str(add["stats"].as_str().unwrap()).unwrap();
    assert_eq!(stats["numRecords"], 2);
    assert_eq!((&stats["minValues"]["offset"], &stats["maxValues"]["offset"]), (&json!(1), &json!(3)));
    assert_eq!(stats["maxValues"]["ingest_date"], "2026-01-03");

    assert_eq!(parquet_files(folder.path()), 4);
    // They are younger than the erasure, but the log says that they were replaced.
    assert_eq!(table.delete_remains(&selection, long_ago()).await.unwrap(), 2);
    assert_eq!(parquet_files(folder.path()), 2, "only what the table names is left");
}

fn long_ago() -> chrono::DateTime<chrono::Utc> {
    chrono::Utc::now() - chrono::Duration::days(1)
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upload_in_flight_is_left_to_its_writer_and_an_old_one_goes() {
    let folder = tempfile::tempdir().unwrap();
    let mut table = open(folder.path(), Name::DeadLetters).await;
    let batch = batch_of_any(&schema::DEAD_LETTERS, &[letter(1, "2026-01-01", "mark")]).unwrap();
    let upload = write::data_file(table.spec, &[batch]).await.unwrap();
    upload.store(table.name(), &table.log).await.unwrap();
    let staged = folder.path().join("dead_letters/part-00000-0-c000.zstd.parquet#17");
    std::fs::write(&staged, "mark").unwrap();
    let selection = marked("mark");
    assert_eq!(table.delete_remains(&selection, long_ago()).await.unwrap(), 0);
    assert!(parquet_files(folder.path()) == 1 && staged.exists());
    let later = chrono::Utc::now() + chrono::Duration::minutes(1);
    assert_eq!(table.delete_remains(&marked("other"), long_ago()).await.unwrap(), 0);
    assert_eq!(table.delete_remains(&selection, later).await.unwrap(), 2);
    assert!(parquet_files(folder.path()) == 0 && !staged.exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_parquet_file_is_passed_over_and_a_store_that_fails_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let mut table = open(folder.path(), Name::DeadLetters).await;
    let place = folder.path().join("dead_letters");
    std::fs::write(place.join("cut.parquet"), "PAR1 and no more").unwrap();
    assert_eq!(table.delete_remains(&marked("mark"), long_ago()).await.unwrap(), 0);
    let fails =
        |source| TableError::store("cannot read a file of", "t", parquet::errors::ParquetError::External(source));
    let store = |text: &str| deltalake::logstore::object_store::Error::Generic { store: "s3", source: text.into() };
    assert!(!rewrite::is_gone_or_not_parquet(&fails(Box::new(store("503 slow down")))));
    let gone = deltalake::logstore::object_store::Error::NotFound { path: "p".into(), source: "404".into() };
    assert!(rewrite::is_gone_or_not_parquet(&fails(Box::new(gone))));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_got_a_deletion_vector_meanwhile_is_not_rewritten() {
    let folder = tempfile::tempdir().unwrap();
    let mut table = open(folder.path(), Name::DeadLetters).await;
    store(&mut table, &[letter(1, "2026-01-01", "mark"), letter(2, "2026-01-01", "a")]).await;
    let selection = marked("mark");
    let mut hunt = Hunt::begin(&mut table, &selection, &[]).await.unwrap();
    let found = hunt.next().await.unwrap().unwrap();
    hunt.files.values_mut().for_each(|file| file.vector = true);
    let taken = hunt.take(found).await.unwrap();
    assert_eq!((taken.version, taken.gone.len()), (None, 0));
    assert_eq!(parquet_files(folder.path()), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_that_may_only_grow_is_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let mut table = open(folder.path(), Name::DeadLetters).await;
    store(&mut table, &[letter(1, "2026-01-01", "mark")]).await;
    let entry = |version: u64| folder.path().join(format!("dead_letters/_delta_log/{version:020}.json"));
    let first = std::fs::read_to_string(entry(0)).unwrap();
    let metadata = first.lines().find(|line| line.contains("metaData")).unwrap();
    let mut metadata: Value = serde_json::from_str(metadata).unwrap();
    metadata["metaData"]["configuration"]["delta.appendOnly"] = json!("true");
    std::fs::write(entry(2), metadata.to_string()).unwrap();
    let error = Hunt::begin(&mut table, &marked("mark"), &[]).await.err().unwrap().to_string();
    assert!(error.contains("delta.appendOnly") && error.contains("dead_letters"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn appends_in_between_are_no_conflict_and_are_searched_too() {
    let folder = tempfile::tempdir().unwrap();
    let (mut table, mut writer) =
        (open(folder.path(), Name::DeadLetters).await, open(folder.path(), Name::DeadLetters).await);
    store(&mut writer, &[letter(1, "2026-01-01", "mark"), letter(2, "2026-01-01", "a")]).await;
    let selection = marked("mark");
    let mut hunt = Hunt::begin(&mut table, &selection, &[]).await.unwrap();
    let found = hunt.next().await.unwrap().unwrap();
    store(&mut writer, &[letter(3, "2026-01-01", "mark"), letter(4, "2026-01-01", "b")]).await;
    assert_eq!(hunt.take(found).await.unwrap().version, Some(3));
    let late = hunt.next().await.unwrap().unwrap();
    assert_eq!(late.count, 1);
    assert_eq!(hunt.take(late).await.unwrap().rows, 1);
    assert!(hunt.next().await.unwrap().is_none());
    assert_eq!(all(folder.path()).await, expected(&[(2, "a"), (4, "b")]));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_another_writer_replaced_first_is_found_again_in_its_successor() {
    let folder = tempfile::tempdir().unwrap();
    let (mut ours, mut theirs) =
        (open(folder.path(), Name::DeadLetters).await, open(folder.path(), Name::DeadLetters).await);
    store(
        &mut ours,
        &[letter(1, "2026-01-01", "mark"), letter(2, "2026-01-01", "other"), letter(3, "2026-01-01", "c")],
    )
    .await;
    let (mark, other) = (marked("mark"), marked("other"));
    let mut hunt = Hunt::begin(&mut ours, &mark, &[]).await.unwrap();
    let found = hunt.next().await.unwrap().unwrap();
    let mut rival = Hunt::begin(&mut theirs, &other, &[]).await.unwrap();
    let first = rival.next().await.unwrap().unwrap();
    assert!(rival.take(first).await.unwrap().version.is_some());
    assert_eq!(hunt.take(found).await.unwrap().version, None);
    assert_eq!(all(folder.path()).await, expected(&[(1, "mark"), (3, "c")]), "nothing is lost or doubled");
    let again = hunt.next().await.unwrap().unwrap();
    assert!(hunt.take(again).await.unwrap().version.is_some());
    assert!(hunt.next().await.unwrap().is_none());
    assert_eq!(all(folder.path()).await, expected(&[(3, "c")]));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_checked_against_an_older_list_cannot_land() {
    let folder = tempfile::tempdir().unwrap();
    let tables = Tables::open(folder.path()).unwrap();
    let (mut ingest, mut eraser) =
        (open(folder.path(), Name::DeadLetters).await, open(folder.path(), Name::DeadLetters).await);
    ingest.hold(ERASURES).await.unwrap();
    assert!(Suppressions::load(&tables).await.unwrap().is_empty());
    store(&mut ingest, &[letter(1, "2026-01-01", "a")]).await;
    let keys = [Key::request("r-1"), Key::record("t", 1, 2, 0)];
    assert_eq!(Suppressions::add(&tables, keys.into_iter(), "receipt").await.unwrap(), 2);
    assert_eq!(Suppressions::add(&tables, [Key::request("r-1")].into_iter(), "receipt").await.unwrap(), 0);
    let step = TxnStep { app_id: ERASURES.into(), expect: None, set: 1 };
    eraser.append(&[], &[step]).await.unwrap();
    let batch = batch_of_any(&schema::DEAD_LETTERS, &[letter(2, "2026-01-01", "b")]).unwrap();
    let error = ingest.append(&[batch], &[]).await.unwrap_err();
    assert!(matches!(&error, TableError::Fenced { app_id, .. } if app_id == ERASURES), "{error}");
    let list = Suppressions::load(&tables).await.unwrap();
    assert!(list.hides_call(None, Some("r-1")) && list.hides(&Key::record("t", 1, 2, 0)));
    assert!(!list.hides_call(Some("r-1"), Some("r-2")));
    assert_eq!(all(folder.path()).await, expected(&[(1, "a")]));
}

#[tokio::test(flavor = "multi_thread")]
async fn retention_drops_old_files_unread_and_cuts_the_one_that_the_bound_lies_in() {
    let folder = tempfile::tempdir().unwrap();
    let mut table = open(folder.path(), Name::DeadLetters).await;
    store(&mut table, &[letter(1, "2026-01-01", "a"), letter(2, "2026-01-02", "b")]).await;
    let old = std::fs::read_dir(folder.path().join("dead_letters")).unwrap().flatten();
    let old = old.map(|entry| entry.path()).find(|path| path.extension().is_some_and(|e| e == "parquet")).unwrap();
    std::fs::write(old, b"unreadable").unwrap();
    store(&mut table, &[letter(3, "2026-01-05", "c"), letter(4, "2026-01-06", "d")]).await;
    store(&mut table, &[letter(5, "2026-01-09", "e")]).await;
    let now = chrono::DateTime::parse_from_rfc3339("2026-01-16T12:00:00Z").unwrap().timestamp_micros();
    let retention = Retention { dead_letters_days: 10, ..Retention::default() };
    let done = retain(&mut table, &retention, now).await.unwrap();
    assert_eq!(done, Some(Retained { rows: 3, files: 2, rewritten: 1 }));
    assert_eq!(all(folder.path()).await, expected(&[(4, "d"), (5, "e")]));
    assert_eq!(retain(&mut table, &retention, now).await.unwrap(), None);
    assert_eq!(retain(&mut table, &Retention::default(), i64::MAX).await.unwrap(), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_condition_in_sql_selects_over_files_and_null_selects_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let mut table = open(folder.path(), Name::DeadLetters).await;
    store(&mut table, &[letter(1, "2026-01-01", "a"), letter(2, "2026-01-02", "b")]).await;
    let count = async |table: &mut Table, sql: &str| {
        let selection = Selection::parse(&schema::DEAD_LETTERS, sql).unwrap();
        let mut hunt = Hunt::begin(table, &selection, &["topic"]).await.unwrap();
        hunt.next().await.unwrap().map_or(0, |found| found.count)
    };
    assert_eq!(count(&mut table, "\"offset\" > 1 and reason = 'r'").await, 1);
    assert_eq!(count(&mut table, "ingest_date < '2026-01-02'").await, 1);
    assert_eq!(count(&mut table, "headers = 'x' or \"key\" is not null").await, 0);
    assert_eq!(HashSet::from([count(&mut table, "true").await]), HashSet::from([2]));
}

#[test]
fn a_column_that_a_file_lacks_is_null_in_every_row() {
    let letters = [letter(1, "2026-01-01", "a"), letter(2, "2026-01-01", "b")];
    let batch = batch_of_any(&schema::DEAD_LETTERS, &letters).unwrap();
    let kept = batch.project(&[batch.schema().index_of("offset").unwrap()]).unwrap();
    let stats: Value = serde_json::from_str(&write::stats(&schema::DEAD_LETTERS, &[kept])).unwrap();
    assert_eq!((&stats["nullCount"]["offset"], &stats["nullCount"]["kafka_time"]), (&json!(0), &json!(2)));
    assert_eq!((&stats["maxValues"]["offset"], &stats["maxValues"]["kafka_time"]), (&json!(2), &Value::Null));
}
