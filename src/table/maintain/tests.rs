//! What must hold of maintenance: the rows stay, the positions stay, the log holds no text, and writers are not stopped.

use std::time::{Duration, SystemTime};

use serde_json::{Value, json};

use super::*;
use crate::table::{Hunt, Selection, TxnStep, batch_of_any, schema};

fn letter(offset: i64) -> Value {
    json!({ "topic": "t", "partition": 0, "offset": offset, "record_index": 0, "ingest_date": "2026-02-03",
            "kafka_time": 1_700_000_000_000_001i64 + offset, "payload": "00", "reason": "r",
            "message": format!("secret {offset}"), "taod_version": "0", "config_hash": "c" })
}

async fn append(table: &mut Table, offset: i64) {
    let batch = batch_of_any(&schema::DEAD_LETTERS, &[letter(offset)]).unwrap();
    let expect = table.txn("test").await.unwrap();
    table.append(&[batch], &[TxnStep { app_id: "test".into(), expect, set: offset + 1 }]).await.unwrap();
}

/// A table of `files` files of one row each.
async fn table(folder: &std::path::Path, files: i64) -> Table {
    let mut table = Tables::open(folder).unwrap().open_one(Name::DeadLetters).await.unwrap();
    for offset in 0..files {
        append(&mut table, offset).await;
    }
    table
}

fn settings() -> Settings {
    Settings { compact_from_files: 4, ..Settings::default() }
}

fn task(report: &Report, task: Task) -> &Done {
    report.tasks.iter().find(|done| done.task == task).unwrap()
}

fn data_files(folder: &std::path::Path) -> usize {
    let entries = std::fs::read_dir(folder.join("dead_letters")).unwrap();
    entries.filter(|e| e.as_ref().unwrap().file_name().to_string_lossy().ends_with(".parquet")).count()
}

/// Makes a file or a log entry look as old as it would be after `hours`.
fn age(path: &std::path::Path, hours: u64) {
    let file = std::fs::File::options().write(true).open(path).unwrap();
    file.set_modified(SystemTime::now() - Duration::from_secs(hours * 3600)).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn compaction_keeps_rows_and_positions_and_puts_no_text_into_the_log() {
    let folder = tempfile::tempdir().unwrap();
    let mut writer = table(folder.path(), 9).await;
    let tables = Tables::open(folder.path()).unwrap();
    let reports = all(&tables, &settings()).await;
    assert_eq!(reports.len(), 1, "only the table that exists");
    let report = &reports[0];
    assert!(!report.failed(), "{report}");
    assert_eq!((task(report, Task::Compact).outcome.as_str(), task(report, Task::Compact).files), ("done", 9));
    assert_eq!((report.files, report.log_entries), (1, 0));
    // The writer knows nothing of it and goes on.
    append(&mut writer, 9).await;
    let mut again = tables.open_one(Name::DeadLetters).await.unwrap();
    assert_eq!((again.count().await.unwrap(), again.txn("test").await.unwrap()), (10, Some(10)));
    let log = folder.path().join("dead_letters/_delta_log");
    let mut lines = Vec::new();
    for entry in std::fs::read_dir(&log).unwrap() {
        let bytes = std::fs::read(entry.unwrap().path()).unwrap();
        assert!(!bytes.windows(6).any(|w| w == b"secret"));
        lines.extend(
            String::from_utf8_lossy(&bytes).lines().map(str::to_owned).filter(|l| l.contains("numRecords\\\":9")),
        );
    }
    let add = lines.iter().find_map(|l| serde_json::from_str::<Value>(l).ok()).unwrap()["add"].clone();
    assert_eq!(add["dataChange"], false);
    let stats: Value = serde_json::from_str(add["stats"].as_str().unwrap()).unwrap();
    assert_eq!((&stats["minValues"]["offset"], &stats["maxValues"]["offset"]), (&json!(0), &json!(8)));
    let bounded: Vec<&String> = stats["minValues"].as_object().unwrap().keys().collect();
    assert!(bounded.iter().all(|name| schema::DEAD_LETTERS.column(name).unwrap().stats), "{bounded:?}");
    let found = crate::table::check::one(&again.log, again.spec, &|_, _| Vec::new()).await.unwrap();
    assert!(found.is_empty(), "{found:?}");
    // Nothing is left to do.
    let report = one(again, &settings()).await;
    assert_eq!(task(&report, Task::Compact).outcome, Outcome::Idle);
}

#[tokio::test(flavor = "multi_thread")]
async fn appends_and_two_maintenances_at_once_lose_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let mut writer = table(folder.path(), 8).await;
    let tables = Tables::open(folder.path()).unwrap();
    let settings = settings();
    let (_, first, second) = tokio::join!(
        async {
            for offset in 8..30 {
                append(&mut writer, offset).await;
            }
        },
        all(&tables, &settings),
        all(&tables, &settings)
    );
    assert!(!first[0].failed() && !second[0].failed(), "{}\n{}", first[0], second[0]);
    let table = tables.open_one(Name::DeadLetters).await.unwrap();
    let rows = table.query("select count(*) as n, count(distinct \"offset\") as d from t").await.unwrap();
    let mut text = arrow::json::ArrayWriter::new(Vec::new());
    rows.iter().for_each(|batch| text.write(batch).unwrap());
    text.finish().unwrap();
    assert_eq!(String::from_utf8(text.into_inner()).unwrap(), r#"[{"n":30,"d":30}]"#);
}

#[tokio::test(flavor = "multi_thread")]
async fn replaced_files_go_when_they_are_old_and_orphans_when_nothing_names_them() {
    let folder = tempfile::tempdir().unwrap();
    table(folder.path(), 6).await;
    let place = folder.path().join("dead_letters");
    let orphan = |i: u32| place.join(format!("part-00000-0000000{i}-0000-4000-8000-000000000000-c000.zstd.parquet"));
    let foreign = place.join("part-00000-of-someone-else.parquet");
    for path in [&orphan(1), &orphan(2), &foreign] {
        std::fs::write(path, "x").unwrap();
    }
    let tables = Tables::open(folder.path()).unwrap();
    all(&tables, &settings()).await;
    // Old files: an orphan, someone else's file, and all that the log names.
    for entry in std::fs::read_dir(&place).unwrap().map(|e| e.unwrap().path()).filter(|p| *p != orphan(2)) {
        if entry.is_file() {
            age(&entry, 25);
        }
    }
    let report = &all(&tables, &settings()).await[0];
    assert_eq!((task(report, Task::Sweep).outcome.as_str(), task(report, Task::Sweep).files), ("done", 1));
    assert_eq!(task(report, Task::Vacuum).outcome, Outcome::Idle, "the tombstones are young");
    assert!(!orphan(1).exists() && orphan(2).exists() && foreign.exists());
    assert_eq!(data_files(folder.path()), 6 + 1 + 2);
    let table = tables.open_one(Name::DeadLetters).await.unwrap();
    assert_eq!(vacuum::run(&table, 0).await.unwrap().unwrap().files, 6);
    let table = tables.open_one(Name::DeadLetters).await.unwrap();
    assert_eq!((data_files(folder.path()), table.count().await.unwrap()), (1 + 2, 6));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_went_while_another_bin_was_committed_is_a_conflict() {
    let folder = tempfile::tempdir().unwrap();
    let mut ours = table(folder.path(), 8).await;
    let tables = Tables::open(folder.path()).unwrap();
    let mut bins = compact::due(&ours, &settings()).await.unwrap();
    // Two bins of four neighbours each.
    let mut first = bins.pop().unwrap();
    let second = first.split_off(4);
    assert!(bins.is_empty() && second.len() == 4);
    let mut theirs = tables.open_one(Name::DeadLetters).await.unwrap();
    let selection = Selection::Records([("t".to_owned(), 0, 6)].into());
    let mut hunt = Hunt::begin(&mut theirs, &selection, &[]).await.unwrap();
    let found = hunt.next().await.unwrap().unwrap();
    assert!(hunt.take(found).await.unwrap().version.is_some());
    compact::replace(&mut ours, first).await.unwrap();
    let error = compact::replace(&mut ours, second).await.unwrap_err();
    assert!(matches!(error, TableError::Conflict { .. }), "{error}");
    assert_eq!(tables.open_one(Name::DeadLetters).await.unwrap().count().await.unwrap(), 7);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_was_swept_is_a_conflict_and_one_that_is_lost_a_failure() {
    let folder = tempfile::tempdir().unwrap();
    let mut ours = table(folder.path(), 4).await;
    let bin = compact::due(&ours, &settings()).await.unwrap().remove(0);
    let mut theirs = Tables::open(folder.path()).unwrap().open_one(Name::DeadLetters).await.unwrap();
    std::fs::remove_file(folder.path().join("dead_letters").join(&bin[1].path)).unwrap();
    let error = compact::replace(&mut ours, bin.clone()).await.unwrap_err();
    assert!(matches!(error, TableError::Store { .. }), "{error}");
    let removes = [crate::table::log::Remove { path: bin[1].path.clone(), size: bin[1].size }];
    theirs.commit_rewrite(crate::table::log::Rewrite::Erasure, &removes, &[]).await.unwrap();
    let error = compact::replace(&mut ours, bin).await.unwrap_err();
    assert!(matches!(error, TableError::Conflict { .. }), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn by_the_stores_clock_young_log_entries_and_uploads_stay_however_far_ours_runs_ahead() {
    let folder = tempfile::tempdir().unwrap();
    let table = table(folder.path(), 5).await;
    table.upkeep_now().run().await.unwrap();
    let staged = folder.path().join("dead_letters/part-00000-0-c000.zstd.parquet#17");
    std::fs::write(&staged, "half").unwrap();
    let now = table.store_now().await.unwrap();
    assert!((chrono::Utc::now() - now).num_seconds() < 60);
    let left = std::fs::read_dir(folder.path().join("dead_letters")).unwrap().flatten();
    assert!(left.filter(|e| e.file_name().to_string_lossy().contains("clock")).count() == 0);
    assert_eq!(table.clean(now).await.unwrap(), 0);
    assert!(orphans::sweep(&table, now).await.unwrap().is_none() && staged.exists());
    let ahead = now + chrono::Duration::days(3);
    vacuum::refuse_clock_ahead(&table, now).await.unwrap();
    let error = vacuum::refuse_clock_ahead(&table, ahead).await.unwrap_err().to_string();
    assert!(error.contains("ahead of the store's"), "{error}");
    // What the store's own time makes old does go.
    assert_eq!(orphans::sweep(&table, ahead).await.unwrap().unwrap().files, 1);
    assert!(!staged.exists());
    assert_eq!(table.clean(ahead).await.unwrap(), 5);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_with_deletion_vectors_is_left_to_its_engine() {
    let folder = tempfile::tempdir().unwrap();
    let table = table(folder.path(), 5).await;
    let protocol = json!({ "protocol": { "minReaderVersion": 3, "minWriterVersion": 7,
        "readerFeatures": ["deletionVectors"], "writerFeatures": ["deletionVectors"] } });
    let entry = folder.path().join(format!("dead_letters/_delta_log/{:020}.json", table.version() + 1));
    std::fs::write(entry, protocol.to_string()).unwrap();
    let report = one(table, &settings()).await;
    let Outcome::Refused(why) = &task(&report, Task::Compact).outcome else { panic!("{report}") };
    assert!(why.contains("deletion vectors"), "{why}");
    assert_eq!(data_files(folder.path()), 5);
}

#[test]
fn settings_out_of_range_are_named() {
    Settings::default().validate().unwrap();
    let error = Settings { vacuum_after_hours: 48, ..Settings::default() }.validate().unwrap_err();
    assert_eq!(error, "vacuum_after_hours is 48: choose 1 to 36");
}
