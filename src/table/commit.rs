//! The commit path: one conditional write per append, whatever the size of the table.
//!
//! A [`Table`] knows one version and the positions (`txn` actions) it has been asked about. An append holds only while
//! every position stands where its [`TxnStep`] expects it, at the very version the commit builds on. Where the reply to
//! a write is an error or is lost, the log decides: the entry is read back, and a commit that carries our own bytes has
//! landed, whatever was answered. A position that another writer moved fences the append off.

use std::collections::HashMap;
use std::time::{Duration, SystemTime};

use arrow::array::RecordBatch;
use bytes::Bytes;
use deltalake::kernel::Snapshot;
use deltalake::kernel::transaction::TransactionError;
use deltalake::logstore::object_store::ObjectStoreExt;
use deltalake::logstore::{CommitOrBytes, LogStoreRef, commit_uri_from_version};
use serde::Serialize;
use serde_json::Value;
use uuid::Uuid;

use super::log::{self, Add, Line, Remove, Rewrite, Txn};
use super::schema::TableSpec;
use super::write::{self, EncodedFile};
use super::{TableError, TableLocation, evolve, location, positions, rows};
use crate::crash::{self, Point};

/// How often a log entry is written or read back again before a commit is given up as unsettled.
const ATTEMPTS: u32 = 6;
/// A pause before an entry is written again, doubled with each; tests, where stores are in memory, do not wait.
const PAUSE: Duration = Duration::from_millis(if cfg!(test) { 0 } else { 50 });
/// After this long without contact the table is opened anew: log entries may have been cleaned up meanwhile, and a
/// version number that looks free because its entry is gone must never be written.
const STALE: Duration = Duration::from_secs(3600);

/// An upload this old is no longer committed; the sweep of orphans leaves twice as long.
const UPLOAD_HOURS: i64 = 12;

/// One Delta table at one version.
pub struct Table {
    pub(super) spec: &'static TableSpec,
    pub(super) log: LogStoreRef,
    pub(super) version: u64,
    name: String,
    /// All positions at this version, once one was asked for.
    positions: Option<HashMap<String, i64>>,
    /// Positions that this table's commits do not move, but only hold while they stand where they stood.
    held: Vec<(String, Option<i64>)>,
    seen: SystemTime,
    /// Whether another daemon keeps it, so that nothing here may change it.
    read_only: bool,
    /// The version at which upkeep was last looked for.
    pub(super) upkept: u64,
}

/// One step of one position: `app_id` goes from `expect` (`None`: not there yet) to `set`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TxnStep {
    pub app_id: String,
    pub expect: Option<i64>,
    pub set: i64,
}

/// An append that landed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Appended {
    /// The version of the table that holds it.
    pub version: u64,
    /// Bytes of the data file; 0 where only positions moved.
    pub bytes: u64,
}

impl Table {
    /// Opens the table at `location`, creating it where there is none.
    pub async fn open_or_create(location: &TableLocation, spec: &'static TableSpec) -> Result<Table, TableError> {
        let log = location.log_store()?;
        let name = location.to_string();
        let exists = log.is_delta_table_location().await.map_err(|e| TableError::store("cannot look for", &name, e))?;
        if !exists {
            create(&log, &name, spec).await?;
        }
        match Table::attach(log.clone(), spec).await {
            // Perhaps it is only older than this taod.
            Err(TableError::Schema { .. }) => {
                evolve::add_columns(&log, &name, spec).await?;
                Table::attach(log, spec).await
            }
            other => other,
        }
    }

    /// Opens the table of a log at its newest version, as it is.
    pub(super) async fn attach(log: LogStoreRef, spec: &'static TableSpec) -> Result<Table, TableError> {
        let (name, seen) = (location::display(log.root_url()), SystemTime::UNIX_EPOCH);
        let (positions, held) = (None, Vec::new());
        let mut table = Table { spec, log, version: 0, name, positions, held, seen, read_only: false, upkept: 0 };
        table.reopen().await?;
        table.upkept = table.version;
        Ok(table)
    }

    /// Opens the table at `location`, or returns nothing where there is none.
    pub async fn open_existing(
        location: &TableLocation,
        spec: &'static TableSpec,
    ) -> Result<Option<Table>, TableError> {
        let log = location.log_store()?;
        let name = location.to_string();
        let exists = log.is_delta_table_location().await.map_err(|e| TableError::store("cannot look for", &name, e))?;
        match exists {
            true => Table::open_or_create(location, spec).await.map(Some),
            false => Ok(None),
        }
    }

    /// Makes it one that can only be read.
    pub(super) fn for_reading(self) -> Table {
        Table { read_only: true, ..self }
    }

    /// Refuses a change of a table that another daemon keeps.
    pub(super) fn refuse_read_only(&self) -> Result<(), TableError> {
        match self.read_only {
            false => Ok(()),
            true => Err(TableError::Refused {
                table: self.name.clone(),
                why: "another daemon keeps it (state.log) and this one only reads it: do this there".to_owned(),
            }),
        }
    }

    /// Returns the version that reads see and the next append builds on.
    pub fn version(&self) -> u64 {
        self.version
    }

    /// Returns where the table lies, for messages.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Moves to the newest version.
    pub async fn refresh(&mut self) -> Result<(), TableError> {
        if self.is_stale() {
            return self.reopen().await;
        }
        self.read_on(&[]).await
    }

    /// Returns the position of `app_id` at this version.
    pub async fn txn(&mut self, app_id: &str) -> Result<Option<i64>, TableError> {
        Ok(self.txns(&[app_id.to_owned()]).await?[0])
    }

    /// Returns the positions of `app_ids` at this version, in order.
    pub async fn txns(&mut self, app_ids: &[String]) -> Result<Vec<Option<i64>>, TableError> {
        if self.positions.is_none() {
            self.positions = Some(positions::read(&self.log, self.version, &self.name).await?);
        }
        let position = |id: &String| self.positions.as_ref()?.get(id).copied();
        Ok(app_ids.iter().map(position).collect())
    }

    /// Makes every later commit of this table fail as fenced once `app_id` has moved from where it stands now.
    ///
    /// This is how a list that rows are checked against (what was erased) is bound to them: whoever changes the list
    /// moves the position after it, and from then on no row that was checked against the old list can land.
    pub async fn hold(&mut self, app_id: &str) -> Result<(), TableError> {
        let position = self.txn(app_id).await?;
        self.held.push((app_id.to_owned(), position));
        Ok(())
    }

    /// Appends rows and moves positions in one commit: all of it lands, once, or none.
    pub async fn append(&mut self, batches: &[RecordBatch], txns: &[TxnStep]) -> Result<Appended, TableError> {
        let file = write::data_file(self.spec, batches).await?;
        self.append_file(file, txns).await
    }

    /// Appends the rows of a file and moves positions in one commit: all of it lands, once, or none.
    pub async fn append_file(&mut self, file: EncodedFile, txns: &[TxnStep]) -> Result<Appended, TableError> {
        if file.rows() == 0 && txns.is_empty() {
            return Ok(Appended { version: self.version, bytes: 0 });
        }
        self.check(txns).await?;
        let adds = match file.rows() {
            0 => Vec::new(),
            _ => vec![file.store(&self.name, &self.log).await?],
        };
        let bytes = adds.iter().map(|add| add.size).sum();
        match self.commit(&adds, txns, None).await {
            Ok(version) => Ok(Appended { version, bytes }),
            Err(error) => {
                if matches!(error, TableError::Fenced { .. }) {
                    write::remove_files(&self.log, &adds).await;
                }
                Err(error)
            }
        }
    }

    /// Appends rows of a small table. A field without a column of its own goes into the table's `detail`.
    pub async fn append_rows<T: Serialize>(&mut self, rows: &[T], txns: &[TxnStep]) -> Result<Appended, TableError> {
        let batch = rows::to_batch(&self.name, self.spec, rows)?;
        self.append(&[batch], txns).await
    }

    /// Moves positions without rows, and says in the commit's info why.
    pub async fn move_positions(&mut self, txns: &[TxnStep], note: &Value) -> Result<u64, TableError> {
        self.commit(&[], txns, Some(note)).await
    }

    /// Commits an append.
    async fn commit(&mut self, adds: &[Add], steps: &[TxnStep], note: Option<&Value>) -> Result<u64, TableError> {
        let id = Uuid::new_v4();
        let txns: Vec<Txn> = steps.iter().map(|step| Txn { app_id: step.app_id.clone(), version: step.set }).collect();
        self.refuse_overdue(adds)?;
        let bytes = log::append(id, self.version, adds, &txns, note, now_ms());
        self.write(id, bytes, steps, &[]).await
    }

    /// Commits files in the place of others. It fails as [`TableError::Conflict`] where another writer took out one of
    /// those first; appends that land in between are no conflict.
    pub(super) async fn commit_rewrite(
        &mut self,
        rewrite: Rewrite,
        removes: &[Remove],
        adds: &[Add],
    ) -> Result<u64, TableError> {
        self.refuse_odd_names(removes.iter().map(|remove| remove.path.as_str()))?;
        let id = Uuid::new_v4();
        self.refuse_overdue(adds)?;
        let bytes = log::rewrite(id, self.version, rewrite, removes, adds, now_ms());
        self.write(id, bytes, &[], removes).await
    }

    /// Refuses files whose name in the log is another than in the store: a `Remove` of ours would not meet its `Add`.
    pub(super) fn refuse_odd_names<'a>(&self, mut paths: impl Iterator<Item = &'a str>) -> Result<(), TableError> {
        let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_./=".contains(c);
        match paths.find(|path| !path.chars().all(is_plain)) {
            None => Ok(()),
            Some(odd) => {
                let why = format!("the file {odd:?} has a name that is escaped in the log; rewrite it elsewhere");
                Err(TableError::Refused { table: self.name.clone(), why })
            }
        }
    }

    /// Writes the log entry, past the commits of other writers and past lost replies.
    async fn write(
        &mut self,
        id: Uuid,
        bytes: Bytes,
        steps: &[TxnStep],
        removes: &[Remove],
    ) -> Result<u64, TableError> {
        self.refuse_read_only()?;
        if self.is_stale() {
            // An opening passes over the commits in between, which may have taken out the same files.
            if !removes.is_empty() {
                return Err(TableError::Conflict { table: self.name.clone() });
            }
            self.reopen().await?;
        }
        let mut trouble = 0;
        loop {
            self.check(steps).await?;
            let version = self.version + 1;
            let written = self.log.write_commit_entry(version, CommitOrBytes::LogBytes(bytes.clone()), id).await;
            let why = match written {
                Ok(()) => {
                    crash::point(Point::AfterPut);
                    return self.landed(version, &bytes);
                }
                Err(TransactionError::VersionAlreadyExists(_)) => "the store says that the entry exists".to_owned(),
                Err(error) => error.to_string(),
            };
            match self.read_entry(version).await {
                Ok(Some(found)) if found == bytes => return self.landed(version, &bytes),
                Ok(Some(found)) => {
                    self.take_in(version, &found, removes)?;
                    // Others are at work: to read past all of them costs less than to lose a write to each. Our own
                    // entry is not among them: it was never written above one that another writer took.
                    if let Err(error) = self.read_on(removes).await {
                        if matches!(error, TableError::Conflict { .. }) {
                            return Err(error);
                        }
                        tracing::warn!(table = self.name, %error, "cannot read on in the log; the next write tells more");
                    }
                    continue;
                }
                Ok(None) => tracing::warn!(table = self.name, version, why, "a commit did not land; writing it again"),
                Err(error) => tracing::warn!(table = self.name, version, why, %error, "a commit cannot be read back"),
            }
            trouble += 1;
            if trouble == ATTEMPTS {
                return Err(TableError::Unsettled { table: self.name.clone(), version, why });
            }
            tokio::time::sleep(PAUSE * (1 << trouble)).await;
        }
    }

    /// Takes in the commits of others up to the newest, as [`Table::take_in`] does.
    async fn read_on(&mut self, removes: &[Remove]) -> Result<(), TableError> {
        while let Some(found) = self.read_entry(self.version + 1).await? {
            self.take_in(self.version + 1, &found, removes)?;
        }
        self.seen = SystemTime::now();
        Ok(())
    }

    /// Takes in another's commit; a conflict where it took out one of the files that ours would take out.
    fn take_in(&mut self, version: u64, found: &[u8], removes: &[Remove]) -> Result<(), TableError> {
        self.apply(version, found)?;
        if removes.is_empty() {
            return Ok(());
        }
        let gone = log::parse(&self.name, version, found)?.into_iter().filter_map(|line| line.remove);
        match gone.into_iter().any(|gone| removes.iter().any(|ours| ours.path == gone.path)) {
            true => Err(TableError::Conflict { table: self.name.clone() }),
            false => Ok(()),
        }
    }

    /// Refuses files so old that the sweep of orphans may be about to take them (the process slept, or the clock jumped).
    fn refuse_overdue(&self, adds: &[Add]) -> Result<(), TableError> {
        let oldest = adds.iter().map(|add| (now_ms() - add.modification_time) / 3_600_000).max();
        match oldest.filter(|hours| *hours >= UPLOAD_HOURS) {
            Some(hours) => Err(TableError::Overdue { table: self.name.clone(), hours }),
            None => Ok(()),
        }
    }

    fn landed(&mut self, version: u64, bytes: &Bytes) -> Result<u64, TableError> {
        self.apply(version, bytes)?;
        self.seen = SystemTime::now();
        Ok(version)
    }

    /// Refuses the steps unless every position stands where it is expected, at this version.
    async fn check(&mut self, steps: &[TxnStep]) -> Result<(), TableError> {
        let table = self.name.clone();
        let fenced = |app_id: &str, expected, found| TableError::Fenced {
            table: table.clone(),
            app_id: app_id.to_owned(),
            expected,
            found,
        };
        let held: Vec<String> = self.held.iter().map(|(id, _)| id.clone()).collect();
        let found = self.txns(&held).await?;
        if let Some(((id, expected), found)) = self.held.iter().zip(found).find(|((_, was), is)| was != is) {
            return Err(fenced(id, *expected, found));
        }
        let ids: Vec<String> = steps.iter().map(|step| step.app_id.clone()).collect();
        let found = self.txns(&ids).await?;
        match steps.iter().zip(found).find(|(step, found)| step.expect != *found) {
            None => Ok(()),
            Some((step, found)) => Err(fenced(&step.app_id, step.expect, found)),
        }
    }

    /// Takes in a commit that stands in the log, ours or another's.
    fn apply(&mut self, version: u64, bytes: &[u8]) -> Result<(), TableError> {
        for Line { txn, protocol, meta_data, .. } in log::parse(&self.name, version, bytes)? {
            if let Some(protocol) = protocol {
                protocol.check(&self.name)?;
            }
            if let Some(metadata) = meta_data {
                metadata.check(&self.name, self.spec)?;
            }
            if let (Some(positions), Some(txn)) = (&mut self.positions, txn) {
                positions.insert(txn.app_id, txn.version);
            }
        }
        self.version = version;
        Ok(())
    }

    /// Loads the newest version from the log, trusting nothing remembered.
    async fn reopen(&mut self) -> Result<(), TableError> {
        let fail = |e| TableError::store("cannot open", &self.name, e);
        let snapshot = Snapshot::try_new(self.log.as_ref(), None).await.map_err(fail)?;
        let retell = |e| TableError::Log { table: self.name.clone(), version: snapshot.version(), source: e };
        let protocol = serde_json::to_value(snapshot.protocol()).map_err(retell)?;
        let metadata = serde_json::to_value(snapshot.metadata()).map_err(retell)?;
        serde_json::from_value::<log::Protocol>(protocol).map_err(retell)?.check(&self.name)?;
        serde_json::from_value::<log::Metadata>(metadata).map_err(retell)?.check(&self.name, self.spec)?;
        self.version = snapshot.version();
        self.positions = None;
        self.seen = SystemTime::now();
        Ok(())
    }

    pub(super) async fn read_entry(&self, version: u64) -> Result<Option<Bytes>, TableError> {
        let entry = self.log.read_commit_entry(version).await;
        entry.map_err(|e| TableError::store("cannot read the log of", &self.name, e))
    }

    fn is_stale(&self) -> bool {
        // A clock that went backwards counts as stale, too.
        SystemTime::now().duration_since(self.seen).map_or(true, |age| age > STALE)
    }
}

#[cfg(test)]
impl Table {
    /// Returns what this table believes, for the model check of ingestion. Its version decides nothing
    /// more, and holdings count up without end: only whether they are the newest matters.
    pub(crate) fn fingerprint(&self) -> String {
        let positions: std::collections::BTreeMap<_, _> =
            self.positions.iter().flatten().filter(|(id, _)| !id.ends_with("/holding")).collect();
        format!("{positions:?}")
    }
}

/// Writes version 0. Losing the race to another creator is fine: its table is checked when it is opened.
///
/// Winning it is put to the proof: everything rests on a store that refuses to create what exists, and one that takes such a
/// request and overwrites would lose commits in silence.
async fn create(log: &LogStoreRef, name: &str, spec: &TableSpec) -> Result<(), TableError> {
    let id = Uuid::new_v4();
    let entry = CommitOrBytes::LogBytes(log::create(id, spec, now_ms()));
    let fail = |error| TableError::store("cannot create", name, error);
    match log.write_commit_entry(0, entry.clone(), id).await {
        Ok(()) => {}
        Err(TransactionError::VersionAlreadyExists(_)) => return Ok(()),
        Err(error) => return Err(fail(error)),
    }
    match log.write_commit_entry(0, entry, id).await {
        Ok(()) => {
            // So that the next start puts it to the proof again.
            log.object_store(None).delete(&commit_uri_from_version(Some(0))).await.map_err(|e| fail(e.into()))?;
            Err(TableError::Overwrites { table: name.to_owned() })
        }
        Err(TransactionError::VersionAlreadyExists(_)) => Ok(()),
        Err(error) => Err(fail(error)),
    }
}

pub(super) fn now_ms() -> i64 {
    chrono::Utc::now().timestamp_millis()
}
