//! The small world of the model check, and what must hold in it.
//!
//! Time stands still and nothing runs beside anything else: what is concurrent in production is here an order of steps.
//! A commit that takes long is a future that is held at a gate of its store and let go on later.

use std::collections::{BTreeMap, BTreeSet};
use std::pin::Pin;
use std::sync::Arc;

use arrow::array::AsArray;
use arrow::datatypes::{Int32Type, Int64Type};
use deltalake::Path;
use deltalake::logstore::object_store::ObjectStoreExt;
use deltalake::logstore::object_store::memory::InMemory;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use serde_json::{Value, json};
use url::Url;

use super::store::{Fault, Gated};
use crate::ingest::IngestError;
use crate::ingest::filter::Choice;
use crate::ingest::ledger::Ledger;
use crate::ingest::reader::Reader;
use crate::query_log::format::{Mapping, Rules};
use crate::query_log::kafka::{self, Extent, Topic};
use crate::query_log::{Record, TopicPartition};
use crate::table::{TableLocation, Tables};

const TOPIC: &str = "queries";
const MEMBERS: usize = 2;

/// One step of the world. The first number is the member's, the second the partition's.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Action {
    /// A member begins: it opens the tables and joins.
    Start(usize),
    /// The group gives a free partition to a member.
    Assign(usize, i32),
    /// A member reads the next record of a partition.
    Read(usize, i32),
    /// A member hears that there is no further record.
    End(usize, i32),
    /// A member commits, while its store does this to one of the log entries.
    Seal(usize, Fault),
    /// A member that was held in a commit goes on.
    Resume(usize),
    /// A partition is taken from a member in order: it may store what it read before.
    Revoke(usize, i32),
    /// The group gives a member up without the member knowing.
    Expire(usize),
    /// A member is gone, wherever it was.
    Kill(usize),
}

impl Action {
    /// Returns true where nothing goes wrong in this step.
    pub(super) fn is_quiet(&self) -> bool {
        match self {
            Action::Start(_) | Action::Assign(..) | Action::Read(..) | Action::End(..) | Action::Resume(_) => true,
            Action::Seal(_, fault) => *fault == Fault::None,
            Action::Revoke(..) | Action::Expire(_) | Action::Kill(_) => false,
        }
    }
}

type Commit = Pin<Box<dyn Future<Output = (Box<Ledger>, Result<(), IngestError>)>>>;

/// What a member is doing.
enum State {
    Down,
    Up(Box<Ledger>),
    /// In the middle of a commit, with its holdings, where it is and what it knew when that began.
    Held(Commit, BTreeMap<String, (i64, i64)>, String),
}

struct Member {
    state: State,
    store: Arc<Gated>,
    tables: Tables,
    /// The next offset that the source would hand out, by partition. A member that was expired has it still.
    source: BTreeMap<i32, i64>,
}

/// Partition and offset of a record.
type Place = (i32, i64);

/// What the tables were found to hold, and how far they were read.
#[derive(Default)]
struct Found {
    versions: BTreeMap<&'static str, u64>,
    rows: BTreeSet<Place>,
    letters: BTreeSet<Place>,
    /// Positions by table and app id.
    txns: BTreeMap<(&'static str, String), i64>,
}

pub(super) struct World {
    records: BTreeMap<i32, Vec<Record>>,
    store: Arc<InMemory>,
    members: Vec<Member>,
    owners: BTreeMap<i32, Option<usize>>,
    found: Found,
}

impl World {
    pub(super) fn new(partitions: i32) -> Self {
        let store = Arc::new(InMemory::new());
        let member = |_| {
            let gated = Arc::new(Gated::new(Arc::clone(&store)));
            let url = Url::parse("memory:///tables/").unwrap();
            let tables = Tables::at(TableLocation::with_store(url, gated.clone()));
            Member { state: State::Down, store: gated, tables, source: BTreeMap::new() }
        };
        World {
            records: (0..partitions).map(|p| (p, records(p))).collect(),
            members: (0..MEMBERS).map(member).collect(),
            owners: (0..partitions).map(|p| (p, None)).collect(),
            found: Found::default(),
            store,
        }
    }

    /// Returns every step that can be taken now.
    pub(super) fn enabled(&self) -> Vec<Action> {
        let mut actions = Vec::new();
        for (m, member) in self.members.iter().enumerate() {
            match &member.state {
                State::Down => {
                    actions.push(Action::Start(m));
                    continue;
                }
                State::Held(..) => actions.push(Action::Resume(m)),
                State::Up(ledger) => self.enabled_up(m, ledger, &mut actions),
            }
            actions.push(Action::Kill(m));
            if self.owners.values().any(|owner| *owner == Some(m)) {
                actions.push(Action::Expire(m));
            }
        }
        actions
    }

    fn enabled_up(&self, m: usize, ledger: &Ledger, actions: &mut Vec<Action>) {
        let source = &self.members[m].source;
        for (&p, owner) in &self.owners {
            match owner {
                None if !source.contains_key(&p) => actions.push(Action::Assign(m, p)),
                Some(owner) if *owner == m => actions.push(Action::Revoke(m, p)),
                _ => {}
            }
            let Some(&next) = source.get(&p) else { continue };
            match self.next_record(p, next) {
                Some(_) => actions.push(Action::Read(m, p)),
                None if next < self.end(p) => actions.push(Action::End(m, p)),
                None => {}
            }
        }
        if ledger.moved() {
            let entries = if ledger.epoch.letters.is_empty() { 1 } else { 2 };
            actions.extend(Fault::all(entries).into_iter().map(|fault| Action::Seal(m, fault)));
        }
    }

    fn next_record(&self, partition: i32, from: i64) -> Option<&Record> {
        self.records[&partition].iter().find(|record| record.offset >= from)
    }

    /// Returns the offset after everything of a partition, a control record included.
    fn end(&self, partition: i32) -> i64 {
        self.records[&partition].last().map_or(0, |record| record.offset + 2)
    }

    pub(super) async fn step(&mut self, action: &Action) {
        match action {
            Action::Start(m) => self.start(*m).await,
            Action::Assign(m, p) => self.assign(*m, *p).await,
            Action::Read(m, p) => self.read(*m, *p).await,
            Action::End(m, p) => {
                let end = self.end(*p);
                self.members[*m].source.insert(*p, end);
                if let State::Up(ledger) = &mut self.members[*m].state {
                    ledger.end(&place(*p), Some(end));
                }
            }
            Action::Seal(m, fault) => {
                self.members[*m].store.plan(*fault);
                self.seal(*m).await;
            }
            Action::Resume(m) => {
                let member = &mut self.members[*m];
                let State::Held(commit, ..) = std::mem::replace(&mut member.state, State::Down) else { return };
                member.store.open();
                let ended = commit.await;
                self.sealed(*m, ended);
            }
            Action::Revoke(m, p) => {
                self.seal(*m).await;
                if let State::Up(ledger) = &mut self.members[*m].state {
                    ledger.revoke(&[place(*p)]);
                    self.members[*m].source.remove(p);
                    self.owners.insert(*p, None);
                }
            }
            Action::Expire(m) => self.release(*m),
            Action::Kill(m) => self.kill(*m),
        }
    }

    async fn start(&mut self, m: usize) {
        let extent = |&p: &i32| Extent { place: place(p), low: 0, high: self.end(p) };
        let extents: Vec<Extent> = self.records.keys().map(extent).collect();
        let topic = Topic { name: TOPIC.to_owned(), id: Some(7), extents };
        let member = &mut self.members[m];
        member.store.plan(Fault::None);
        let mut ledger = Ledger::open(&member.tables, &settings(), reader(m)).await.unwrap();
        ledger.first_sight(&[topic]).await.unwrap();
        member.state = State::Up(Box::new(ledger));
    }

    async fn assign(&mut self, m: usize, p: i32) {
        let State::Up(ledger) = &mut self.members[m].state else { return };
        match ledger.assign(&[place(p)]).await {
            Ok(starts) => {
                self.members[m].source.extend(starts.into_iter().map(|(place, next)| (place.partition, next)));
                self.owners.insert(p, Some(m));
            }
            Err(_) => self.kill(m),
        }
    }

    async fn read(&mut self, m: usize, p: i32) {
        let next = self.members[m].source[&p];
        let Some(record) = self.next_record(p, next).cloned() else { return };
        self.members[m].source.insert(p, record.offset + 1);
        let State::Up(ledger) = &mut self.members[m].state else { return };
        ledger.read(vec![record]).await.unwrap();
    }

    async fn seal(&mut self, m: usize) {
        let State::Up(mut ledger) = std::mem::replace(&mut self.members[m].state, State::Down) else { return };
        let (holdings, knew) = (ledger.positions.holdings(), ledger.fingerprint());
        let store = Arc::clone(&self.members[m].store);
        let mut commit: Commit = Box::pin(async move {
            let ended = ledger.seal().await.map(drop);
            (ledger, ended)
        });
        tokio::select! {
            biased;
            ended = &mut commit => self.sealed(m, ended),
            at = store.held() => self.members[m].state = State::Held(commit, holdings, format!("{at:?}: {knew}")),
        }
    }

    /// Takes in how a commit ended: a session whose commit failed is dropped whole.
    fn sealed(&mut self, m: usize, (ledger, ended): (Box<Ledger>, Result<(), IngestError>)) {
        match ended {
            Ok(()) => self.members[m].state = State::Up(ledger),
            Err(_) => self.kill(m),
        }
    }

    fn kill(&mut self, m: usize) {
        self.release(m);
        self.members[m].state = State::Down;
        self.members[m].source.clear();
    }

    fn release(&mut self, m: usize) {
        self.owners.values_mut().filter(|owner| **owner == Some(m)).for_each(|owner| *owner = None);
    }

    /// Leaves one member alone with everything, and checks that each record then stands where it belongs.
    pub(super) async fn recover(&mut self) -> Result<(), String> {
        (0..MEMBERS).for_each(|m| self.kill(m));
        self.start(0).await;
        let partitions: Vec<i32> = self.owners.keys().copied().collect();
        for &p in &partitions {
            self.assign(0, p).await;
            while self.next_record(p, self.members[0].source[&p]).is_some() {
                self.read(0, p).await;
            }
            self.step(&Action::End(0, p)).await;
        }
        self.seal(0).await;
        self.check().await?;
        for p in partitions {
            let stored = self.found.stored(p);
            if stored != self.end(p) {
                return Err(format!("partition {p} is at {stored}, not at its end {}", self.end(p)));
            }
        }
        Ok(())
    }

    /// Checks every version of the tables that was not checked yet.
    pub(super) async fn check(&mut self) -> Result<(), String> {
        for table in ["dead_letters", "queries"] {
            loop {
                let version = self.found.versions.get(table).map_or(0, |version| version + 1);
                let path = format!("tables/{table}/_delta_log/{version:020}.json");
                let Ok(entry) = self.store.get(&Path::from(path)).await else { break };
                let entry = entry.bytes().await.map_err(|e| e.to_string())?;
                let told = |e: String| format!("{table} at version {version}: {e}");
                for line in serde_json::Deserializer::from_slice(&entry).into_iter::<Value>() {
                    let line = line.map_err(|e| e.to_string())?;
                    self.found.take(table, &line, &self.store).await.map_err(told)?;
                }
                self.found.versions.insert(table, version);
                self.hold().map_err(told)?;
            }
        }
        Ok(())
    }

    /// Checks what must hold of all versions: a record is a row or a dead letter and never both; below the stored offset
    /// none is missing; at and after it no row is there yet.
    fn hold(&self) -> Result<(), String> {
        let found = &self.found;
        if let Some(both) = found.rows.intersection(&found.letters).next() {
            return Err(format!("{both:?} is a row and a dead letter"));
        }
        for record in self.records.values().flatten() {
            let partition = record.place.partition;
            let (place, next) = ((partition, record.offset), found.stored(partition));
            if record.offset < next && !found.rows.contains(&place) && !found.letters.contains(&place) {
                return Err(format!("{place:?} is missing below {next}"));
            }
            if record.offset >= next && found.rows.contains(&place) {
                return Err(format!("{place:?} is a row at or after {next}"));
            }
        }
        Ok(())
    }

    /// Returns everything that decides what can happen next.
    pub(super) fn fingerprint(&self) -> String {
        let member = |member: &Member| match &member.state {
            State::Down => "down".to_owned(),
            State::Up(ledger) => {
                let newest = self.found.are_newest(&ledger.positions.holdings());
                format!("up {:?} {newest:?} {}", member.source, ledger.fingerprint())
            }
            State::Held(_, holdings, knew) => {
                format!("held {:?} {:?} {knew}", member.source, self.found.are_newest(holdings))
            }
        };
        let members: Vec<String> = self.members.iter().map(member).collect();
        let found = &self.found;
        let txns: Vec<_> = found.txns.iter().filter(|((_, id), _)| !id.ends_with("/holding")).collect();
        format!("{:?} {:?} {:?} {txns:?} {members:?}", self.owners, found.rows, found.letters)
    }
}

impl Found {
    /// Takes in one action of a table's log.
    async fn take(&mut self, table: &'static str, line: &Value, store: &InMemory) -> Result<(), String> {
        if let (Some(id), Some(next)) = (line["txn"]["appId"].as_str(), line["txn"]["version"].as_i64()) {
            let before = self.txns.insert((table, id.to_owned()), next);
            if before.is_some_and(|before| before > next) {
                return Err(format!("{id} went back from {before:?} to {next}"));
            }
        }
        let Some(path) = line["add"]["path"].as_str() else { return Ok(()) };
        let held = if table == "queries" { &mut self.rows } else { &mut self.letters };
        match places(store, &format!("tables/{table}/{path}")).await.into_iter().find(|place| !held.insert(*place)) {
            Some(place) => Err(format!("{place:?} is there twice")),
            None => Ok(()),
        }
    }

    /// Returns which of a member's holdings are the newest of their partition.
    fn are_newest(&self, holdings: &BTreeMap<String, (i64, i64)>) -> Vec<[bool; 2]> {
        let newest = |table, id: &String| self.txns.get(&(table, id.clone())).copied();
        let is_newest = |(id, (queries, letters)): (&String, &(i64, i64))| {
            [newest("queries", id) == Some(*queries), newest("dead_letters", id) == Some(*letters)]
        };
        holdings.iter().map(is_newest).collect()
    }

    /// Returns the next offset of a partition by the table of rows.
    fn stored(&self, partition: i32) -> i64 {
        self.txns.get(&("queries", settings().app_id(&place(partition)))).copied().unwrap_or(0)
    }
}

/// Returns the log of a partition: a call, something that only the second member reads, a gap as transactions leave it,
/// something that nobody reads, and a gap at the end.
fn records(partition: i32) -> Vec<Record> {
    let record = |offset: i64, payload: &str| Record {
        place: place(partition),
        offset,
        time_ms: Some(1_700_000_000_000),
        key: None,
        headers: Vec::new(),
        payload: Some(payload.as_bytes().to_vec()),
    };
    vec![
        record(0, r#"{"request":{"messages":[{"role":"user","content":"hi"}]}}"#),
        record(1, r#"{"question":"hi"}"#),
        record(3, "not json"),
    ]
}

fn place(partition: i32) -> TopicPartition {
    TopicPartition::new(TOPIC, partition)
}

fn settings() -> kafka::Settings {
    kafka::Settings { topic: TOPIC.into(), ..kafka::Settings::default() }
}

/// Returns the reader of a member: they do not read the same, as before and after a change of the config.
fn reader(member: usize) -> Arc<Reader> {
    let own = json!({ "name": "own", "when": "/question", "parts": { "messages": "/question" } });
    let own: Mapping = serde_json::from_value(own).unwrap();
    let rules = Rules { mappings: if member == 0 { Vec::new() } else { vec![own] }, ..Rules::default() };
    let choice = Choice::default();
    Arc::new(Reader { user_key: None, config_hash: "c".into(), rules, choice, detect_language: false })
}

/// Returns the coordinates of the rows in a data file.
async fn places(store: &InMemory, path: &str) -> Vec<Place> {
    let bytes = store.get(&Path::from(path)).await.unwrap().bytes().await.unwrap();
    let reader = ParquetRecordBatchReaderBuilder::try_new(bytes).unwrap().build().unwrap();
    let of_batch = |batch: arrow::array::RecordBatch| {
        let partitions = batch.column_by_name("partition").unwrap().as_primitive::<Int32Type>().values().to_vec();
        let offsets = batch.column_by_name("offset").unwrap().as_primitive::<Int64Type>().values().to_vec();
        partitions.into_iter().zip(offsets)
    };
    reader.flat_map(|batch| of_batch(batch.unwrap())).collect()
}
