//! A log in real tables, and nights over it.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use crate::dataset::{Dataset, Freezing, Match, Prompt, Settings, Split, WorkloadView, freeze};
use crate::record::{Message, derive_seed, prompt_hash};
use crate::table::{Name, Tables};

/// A row of `queries` as JSON of its columns.
pub(super) type Row = serde_json::Map<String, Value>;

pub(super) struct World {
    pub(super) folder: tempfile::TempDir,
    pub(super) settings: Settings,
    pub(super) workloads: Vec<WorkloadView>,
    pub(super) seed: u64,
    rounds: usize,
    runtime: tokio::runtime::Runtime,
}

/// What was decided of a prompt.
#[derive(Debug, Clone, PartialEq, Eq, serde::Deserialize)]
pub(super) struct Decided {
    pub(super) prompt_hash: String,
    pub(super) cluster: String,
    pub(super) split: Split,
    pub(super) round: String,
}

impl World {
    pub(super) fn new() -> Self {
        World {
            folder: tempfile::tempdir().unwrap(),
            settings: Settings::default(),
            workloads: vec![workload("w", Match::Name)],
            seed: 1,
            rounds: 0,
            runtime: tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap(),
        }
    }

    /// A world whose log has these rows.
    pub(super) fn of(rows: &[Row]) -> Self {
        let world = World::new();
        world.add(rows);
        world
    }

    pub(super) fn tables(&self) -> Tables {
        Tables::open(&self.folder.path().join("tables")).unwrap()
    }

    /// Appends rows to the log.
    pub(super) fn add(&self, rows: &[Row]) {
        let tables = self.tables();
        self.runtime.block_on(async {
            let mut queries = tables.open_one(Name::Queries).await.unwrap();
            queries.append_rows(rows, &[]).await.unwrap();
        });
    }

    /// Puts other rows in place of the whole log; decisions stay.
    pub(super) fn replace(&self, rows: &[Row]) {
        std::fs::remove_dir_all(self.folder.path().join("tables/queries")).unwrap();
        self.add(rows);
    }

    /// Freezes the dataset of the next round, `r1`, `r2` and so on.
    pub(super) fn night(&mut self) -> Dataset {
        self.rounds += 1;
        let round = format!("r{}", self.rounds);
        let freezing = Freezing {
            round: &round,
            settings: &self.settings,
            workloads: &self.workloads,
            seed: self.seed,
            index: &self.folder.path().join("prompts"),
        };
        let dataset = self.runtime.block_on(freeze(&self.tables(), freezing, &self.out(&round))).unwrap();
        assert_all_rows_accounted(&dataset);
        dataset
    }

    pub(super) fn out(&self, round: &str) -> std::path::PathBuf {
        self.folder.path().join("rounds").join(round)
    }

    /// Everything that was decided, by prompt.
    pub(super) fn decided(&self) -> BTreeMap<String, Decided> {
        let rows: Vec<Decided> = self.runtime.block_on(async {
            let splits = self.tables().open_one(Name::Splits).await.unwrap();
            splits.select(r#"select prompt_hash, "cluster", "split", round from t"#).await.unwrap()
        });
        rows.into_iter().map(|row| (row.prompt_hash.clone(), row)).collect()
    }

    pub(super) fn clusters(&self) -> usize {
        let clusters: std::collections::BTreeSet<String> =
            self.decided().into_values().map(|decided| decided.cluster).collect();
        clusters.len()
    }

    pub(super) fn split(&self, messages: &[Message]) -> Split {
        self.decided()[&prompt_hash(messages, None)].split
    }

    /// Runs something that asks the tables.
    pub(super) fn block_on<T>(&self, work: impl Future<Output = T>) -> T {
        self.runtime.block_on(work)
    }
}

fn assert_all_rows_accounted(dataset: &Dataset) {
    let excluded: u64 = dataset.manifest.excluded.values().sum();
    assert_eq!(dataset.manifest.rows, excluded + all(dataset).len() as u64, "{:?}", dataset.manifest.excluded);
}

pub(super) fn workload(name: &str, matching: Match) -> WorkloadView {
    WorkloadView { name: name.into(), matching, house_rules: "Reply in JSON.".into(), has_rules: true }
}

pub(super) fn all(dataset: &Dataset) -> Vec<&Prompt> {
    dataset.train.iter().chain(&dataset.gate).chain(&dataset.audit).collect()
}

/// A call of partition `offset % 3`.
pub(super) fn row(offset: i64, messages: &[Message]) -> Row {
    let value = json!({
        "topic": "t", "partition": offset % 3, "offset": offset, "record_index": 0, "kind": "call",
        "ingest_date": "2026-03-11", "event_time": chrono::DateTime::from_timestamp_micros(1_772_366_400_000_000 + offset),
        "request_id": format!("r-{offset}"), "workload": "w", "status": 200,
        "messages": messages, "params": {}, "prompt_hash": prompt_hash(messages, None),
        "format": "test", "redacted": false, "train_ok": true, "sample_weight": 1.0, "truncated": false,
        "taod_version": "0", "config_hash": "c", "extra": {}
    });
    value.as_object().unwrap().clone()
}

/// The same row with other values in some columns.
pub(super) fn with(mut row: Row, columns: Value) -> Row {
    row.extend(columns.as_object().unwrap().clone());
    row
}

pub(super) fn ask(text: &str) -> Vec<Message> {
    vec![Message::text("system", "You help."), Message::text("user", format!("{text}\nReply in JSON."))]
}

/// A question that shares next to nothing with another number's.
pub(super) fn question(i: usize) -> String {
    let word = |j: usize| {
        let mut seed = derive_seed(9, &[&i.to_string(), &j.to_string()]);
        let letter = |_| {
            let c = (b'a' + (seed % 26) as u8) as char;
            seed /= 26;
            c
        };
        (0..7).map(letter).collect::<String>()
    };
    (0..8).map(word).collect::<Vec<_>>().join(" ")
}

pub(super) fn questions(n: usize) -> Vec<Row> {
    (0..n).map(|i| row(i as i64, &ask(&question(i)))).collect()
}

/// Numbers of questions by the split that they get.
pub(super) fn in_split(split: Split) -> Vec<usize> {
    (0..400).filter(|&i| Split::of(&prompt_hash(&ask(&question(i)), None), &Settings::default()) == split).collect()
}

/// Two questions and a third that is near both.
pub(super) fn bridge(a: usize, b: usize) -> (Vec<Message>, Vec<Message>, Vec<Message>) {
    let (left, right, shared) = (question(a), question(b), (900..902).map(question).collect::<Vec<_>>().join(" "));
    let half = |text: &str| text.split(' ').take(3).collect::<Vec<_>>().join(" ");
    (
        ask(&format!("{} {shared} {}", half(&left), half(&question(907)))),
        ask(&format!("{} {shared} {}", half(&question(908)), half(&right))),
        ask(&format!("{} {shared} {}", half(&left), half(&right))),
    )
}
