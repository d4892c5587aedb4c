//! Ingestion: the query log into the tables, every record exactly once.
//!
//! Records gather in an epoch. Sealing it commits the rows of all partitions together with the offsets they take the
//! partitions to, in one Delta commit; what could not be read goes to `dead_letters` before, under offsets of its own.
//! Nothing else is remembered: a session that fails is dropped whole, and the next one asks the tables where to go on.

mod counters;
mod positions;
mod reader;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use arrow::array::RecordBatch;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep_until, timeout};

pub use self::counters::{Counters, Reasons, Summary};
use self::positions::Positions;
use self::reader::{Known, Letter, Parsed, Reader};
use crate::query_log::format::Mapping;
use crate::query_log::kafka::{self, Connection, Consumer};
use crate::query_log::{Event, Record, SourceError};
use crate::secret::{self, SecretError};
use crate::table::{Name, Table, TableError, Tables, batch_of, schema};

/// How the query log is stored.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// Where the log is.
    pub kafka: kafka::Settings,
    /// Bytes of records after which a commit is made. Bounds memory. Range 65536 to 268435456.
    pub batch_bytes: u64,
    /// Longest time between a record's arrival and its commit, in seconds. Range 1 to 3600.
    pub commit_interval_s: u64,
    /// With `--until-idle`: how long all partitions must stay at their ends, in seconds. Range 1 to 3600.
    pub idle_s: u64,
    /// With `--until-idle`: how long to wait for records before the end is reached, in seconds. Range 5 to 3600.
    pub stall_s: u64,
    /// File with the key (16 bytes or more) under which end users are hashed; empty: end users are not stored at all.
    pub user_key_file: PathBuf,
    /// Log formats of your own, tried in their order before the known ones.
    pub mapping: Vec<Mapping>,
}

impl Default for Settings {
    fn default() -> Self {
        Settings {
            kafka: kafka::Settings::default(),
            batch_bytes: 64 << 20,
            commit_interval_s: 30,
            idle_s: 2,
            stall_s: 60,
            user_key_file: PathBuf::new(),
            mapping: Vec::new(),
        }
    }
}

impl Settings {
    /// Checks ranges.
    pub fn validate(&self) -> Result<(), String> {
        self.kafka.validate().map_err(|e| format!("kafka.{e}"))?;
        for (index, mapping) in self.mapping.iter().enumerate() {
            mapping.validate().map_err(|e| format!("mapping[{index}].{e}"))?;
        }
        let ranges = [
            ("batch_bytes", self.batch_bytes, 65_536, 268_435_456),
            ("commit_interval_s", self.commit_interval_s, 1, 3600),
            ("idle_s", self.idle_s, 1, 3600),
            ("stall_s", self.stall_s, 5, 3600),
        ];
        match ranges.into_iter().find(|(_, value, low, high)| !(low..=high).contains(&value)) {
            Some((key, value, low, high)) => Err(format!("{key} is {value}: choose {low} to {high}")),
            None => Ok(()),
        }
    }

    /// Returns what says, in each row, under which settings it was read.
    fn hash(&self) -> String {
        let text = serde_json::to_vec(self).unwrap_or_default();
        hex::encode(&Sha256::digest(&text)[..8])
    }

    fn user_key(&self) -> Result<Option<Vec<u8>>, IngestError> {
        let Some(key) = secret::read("ingest.user_key", Some(&self.user_key_file))? else { return Ok(None) };
        match key.expose().len() {
            16.. => Ok(Some(key.expose().as_bytes().to_vec())),
            bytes => Err(IngestError::ShortUserKey { bytes }),
        }
    }
}

/// When ingestion ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Once everything in the log is stored. An error is final.
    UntilIdle,
    /// When told to. Errors are retried without end.
    Forever,
}

/// Why ingestion ended.
#[derive(Debug, thiserror::Error)]
pub enum IngestError {
    #[error(transparent)]
    Source(#[from] SourceError),
    #[error(transparent)]
    Table(#[from] TableError),
    #[error("ingest.user_key holds {bytes} bytes; make one of 16 or more, such as by `openssl rand -hex 32`")]
    ShortUserKey { bytes: usize },
    #[error(transparent)]
    Secret(#[from] SecretError),
    #[error("the partitions were taken away before what was read of them was stored")]
    Lost,
    #[error("a task of ingestion failed: {0}")]
    Task(String),
}

impl IngestError {
    /// Returns true where nothing is wrong but the place: another member is at work, or a reply was lost.
    fn is_restart(&self) -> bool {
        match self {
            IngestError::Lost => true,
            IngestError::Table(error) => error.is_restart(),
            _ => false,
        }
    }

    /// Returns true where no retry helps.
    fn is_final(&self) -> bool {
        match self {
            IngestError::ShortUserKey { .. } | IngestError::Secret(_) => true,
            IngestError::Source(error) => error.is_settings(),
            IngestError::Table(error) => error.is_foreign(),
            IngestError::Lost | IngestError::Task(_) => false,
        }
    }
}

/// Restarts that `--until-idle` accepts from other members or lost replies before it gives up.
const RESTARTS: u32 = 10;
const BACKOFF: Duration = Duration::from_secs(1);
const LONGEST_BACKOFF: Duration = Duration::from_secs(60);

/// Stores the log until the mode's end or until `shutdown` turns true, and returns what was stored.
pub async fn run(
    settings: &Settings,
    tables: &Tables,
    counters: Arc<Counters>,
    mut shutdown: watch::Receiver<bool>,
    mode: Mode,
) -> Result<Summary, IngestError> {
    let reader = Arc::new(Reader {
        topic: settings.kafka.topic.clone(),
        user_key: settings.user_key()?,
        config_hash: settings.hash(),
        mappings: settings.mapping.clone(),
    });
    let (mut restarts, mut backoff) = (0, BACKOFF);
    loop {
        let begun = Instant::now();
        let error = match session(settings, tables, &reader, &counters, &mut shutdown, mode).await {
            Ok(()) => return Ok(counters.summary()),
            Err(error) => error,
        };
        counters.ready.store(false, Ordering::Relaxed);
        restarts += 1;
        let hopeless = match mode {
            Mode::UntilIdle => !error.is_restart() || restarts > RESTARTS,
            Mode::Forever => error.is_final(),
        };
        if hopeless {
            return Err(error);
        }
        if begun.elapsed() > LONGEST_BACKOFF {
            backoff = BACKOFF;
        }
        tracing::warn!(%error, wait_s = backoff.as_secs(), "ingestion starts again from what the tables hold");
        counters.restarts.fetch_add(1, Ordering::Relaxed);
        if timeout(backoff, told_to_stop(&mut shutdown)).await.is_ok() {
            return Ok(counters.summary());
        }
        backoff = (backoff * 2).min(LONGEST_BACKOFF);
    }
}

/// Runs one membership of the consumer group, from the tables' offsets to its end.
async fn session(
    settings: &Settings,
    tables: &Tables,
    reader: &Arc<Reader>,
    counters: &Arc<Counters>,
    shutdown: &mut watch::Receiver<bool>,
    mode: Mode,
) -> Result<(), IngestError> {
    let kafka = settings.kafka.clone();
    let connection = tokio::task::spawn_blocking(move || Connection::open(&kafka));
    let connection = connection.await.map_err(|e| IngestError::Task(e.to_string()))??;
    let mut queries = tables.open_one(Name::Queries).await?;
    let letters = tables.open_one(Name::DeadLetters).await?;
    let positions = Positions::new(&settings.kafka);
    positions.first_sight(&mut queries, connection.extents()).await?;
    let mut session = Session {
        settings,
        reader: Arc::clone(reader),
        counters: Arc::clone(counters),
        mode,
        source: connection.subscribe()?,
        queries,
        letters,
        positions,
        known: Arc::default(),
        epoch: Epoch::default(),
        upkeep: None,
    };
    let ended = session.run(shutdown).await;
    session.source.close().await;
    if let Some(upkeep) = session.upkeep {
        upkeep.await.map_err(|e| IngestError::Task(e.to_string()))?;
    }
    ended
}

/// What was read and is not stored yet.
#[derive(Default)]
struct Epoch {
    batches: Vec<RecordBatch>,
    letters: Vec<Letter>,
    skipped: BTreeMap<&'static str, u64>,
    records: u64,
    bytes: u64,
    /// When the first of it was read.
    opened: Option<Instant>,
}

struct Session<'a> {
    settings: &'a Settings,
    reader: Arc<Reader>,
    counters: Arc<Counters>,
    mode: Mode,
    source: Consumer,
    queries: Table,
    letters: Table,
    positions: Positions,
    known: Arc<Known>,
    epoch: Epoch,
    upkeep: Option<JoinHandle<()>>,
}

impl Session<'_> {
    /// Follows the source's events until the end of the mode.
    async fn run(&mut self, shutdown: &mut watch::Receiver<bool>) -> Result<(), IngestError> {
        let idle = Duration::from_secs(self.settings.idle_s);
        let stall = Duration::from_secs(self.settings.stall_s);
        let interval = Duration::from_secs(self.settings.commit_interval_s);
        let (mut assigned, mut heard) = (false, Instant::now());
        loop {
            let at_end = assigned && self.positions.at_end();
            if at_end && self.mode == Mode::UntilIdle && self.positions.moved() {
                self.seal().await?;
                heard = Instant::now();
            }
            let seal_at = self.epoch.opened.map(|opened| opened + interval);
            let rest_at = match self.mode {
                Mode::Forever => None,
                Mode::UntilIdle if at_end => Some(heard + idle),
                Mode::UntilIdle => Some(heard + stall),
            };
            let event = tokio::select! {
                biased;
                () = told_to_stop(shutdown) => return self.seal().await,
                event = self.source.recv() => event,
                () = sleep_to(seal_at) => {
                    self.seal().await?;
                    continue;
                }
                () = sleep_to(rest_at) => return if at_end { Ok(()) } else { Err(self.stalled()) },
            };
            match event.ok_or_else(|| self.stalled())? {
                Event::Trouble(cause) => {
                    tracing::warn!(cause, "kafka is in trouble");
                    self.counters.ready.store(false, Ordering::Relaxed);
                }
                event => {
                    // Between a revocation and the next assignment an empty set of partitions is no end of the log.
                    match event {
                        Event::Assigned { .. } => assigned = true,
                        Event::Revoked { .. } => assigned = false,
                        _ => {}
                    }
                    heard = Instant::now();
                    self.take(event).await?;
                    self.report();
                }
            }
        }
    }

    async fn take(&mut self, event: Event) -> Result<(), IngestError> {
        match event {
            Event::Assigned { partitions, reply } => {
                let (starts, known) = self.positions.assign(&partitions, &mut self.queries, &mut self.letters).await?;
                Arc::make_mut(&mut self.known).extend(known);
                // A callback that no longer waits assigns nothing, and says so by an event of its own.
                reply.send(starts).ok();
            }
            Event::Records(records) => self.read(records).await?,
            Event::End { partition, next } => {
                // Past the last record there may be control records, which hold no row but move the offset.
                self.positions.end(partition, next);
                if self.positions.moved() {
                    self.epoch.opened.get_or_insert_with(Instant::now);
                }
            }
            Event::Revoked { partitions, reply } => {
                let deadline = Duration::from_secs(self.settings.kafka.rebalance_timeout_s);
                timeout(deadline, self.seal()).await.map_err(|_| IngestError::Lost)??;
                self.positions.revoke(&partitions);
                reply.send(()).ok();
            }
            Event::Lost => return Err(IngestError::Lost),
            Event::Failed(error) => return Err(error.into()),
            Event::Trouble(_) => {}
        }
        Ok(())
    }

    /// Adds records to the epoch and seals it when it is full.
    async fn read(&mut self, mut records: Vec<Record>) -> Result<(), IngestError> {
        records.retain(|record| self.positions.take(record.partition, record.offset));
        let (reader, known, count) = (Arc::clone(&self.reader), Arc::clone(&self.known), records.len() as u64);
        let parsed = tokio::task::spawn_blocking(move || reader.read(&records, &known)).await;
        let Parsed { batch, letters, skipped, bytes } = parsed.map_err(|e| IngestError::Task(e.to_string()))??;
        self.epoch.opened.get_or_insert_with(Instant::now);
        self.epoch.batches.push(batch);
        self.epoch.letters.extend(letters);
        for (reason, n) in skipped {
            *self.epoch.skipped.entry(reason).or_default() += n;
        }
        self.epoch.records += count;
        self.epoch.bytes += bytes;
        if self.epoch.bytes >= self.settings.batch_bytes { self.seal().await } else { Ok(()) }
    }

    /// Commits the epoch: its dead letters first, then its rows with the offsets. An error leaves nothing to go on with.
    async fn seal(&mut self) -> Result<(), IngestError> {
        let epoch = std::mem::take(&mut self.epoch);
        if !epoch.letters.is_empty() {
            let steps = self.positions.letter_steps(&epoch.letters);
            let batch = batch_of(&schema::DEAD_LETTERS, &epoch.letters)?;
            self.letters.append(&[batch], &steps).await?;
            self.positions.letters_stored(&steps);
        }
        let steps = self.positions.steps();
        if steps.is_empty() {
            return Ok(());
        }
        let appended = self.queries.append(&epoch.batches, &steps).await?;
        let offsets = self.positions.stored();
        self.count(&epoch, appended.version, appended.bytes);
        self.source.advise(&offsets);
        self.keep_up().await
    }

    fn count(&self, epoch: &Epoch, version: u64, file_bytes: u64) {
        let counters = &self.counters;
        let mut dead: BTreeMap<&'static str, u64> = BTreeMap::new();
        for letter in &epoch.letters {
            *dead.entry(letter.reason).or_default() += 1;
        }
        let rows: usize = epoch.batches.iter().map(RecordBatch::num_rows).sum();
        counters.records.fetch_add(epoch.records, Ordering::Relaxed);
        counters.rows.fetch_add(rows as u64, Ordering::Relaxed);
        counters.bytes.fetch_add(epoch.bytes, Ordering::Relaxed);
        counters.file_bytes.fetch_add(file_bytes, Ordering::Relaxed);
        counters.commits.fetch_add(1, Ordering::Relaxed);
        counters.version.store(version, Ordering::Relaxed);
        counters.last_commit_ms.store(chrono::Utc::now().timestamp_millis(), Ordering::Relaxed);
        counters.dead_letters.add(&dead);
        counters.skipped.add(&epoch.skipped);
        tracing::debug!(version, rows, letters = epoch.letters.len(), bytes = epoch.bytes, "epoch stored");
    }

    /// Starts the upkeep that is due, beside ingestion; one at a time.
    async fn keep_up(&mut self) -> Result<(), IngestError> {
        if let Some(upkeep) = self.queries.upkeep() {
            if let Some(before) = self.upkeep.take() {
                before.await.map_err(|e| IngestError::Task(e.to_string()))?;
            }
            self.upkeep = Some(tokio::spawn(async move {
                if let Err(error) = upkeep.run().await {
                    tracing::warn!(%error, "upkeep failed; the next one starts over");
                }
            }));
        }
        Ok(())
    }

    fn report(&self) {
        self.counters.ready.store(true, Ordering::Relaxed);
        self.counters.buffered.store(self.epoch.records, Ordering::Relaxed);
        self.counters.assigned.store(self.positions.len() as i64, Ordering::Relaxed);
        self.counters.lag.store(self.positions.lag(&self.source.ends()), Ordering::Relaxed);
    }

    fn stalled(&self) -> IngestError {
        let kafka = &self.settings.kafka;
        let cause = self.source.cause().unwrap_or_else(|| "nothing".to_owned());
        let (topic, brokers) = (kafka.topic.clone(), kafka.brokers.clone());
        SourceError::Stalled { topic, brokers, seconds: self.settings.stall_s, cause }.into()
    }
}

/// Waits until `shutdown` turns true, or nobody can turn it any more.
async fn told_to_stop(shutdown: &mut watch::Receiver<bool>) {
    shutdown.wait_for(|stop| *stop).await.ok();
}

/// Sleeps until `when`, or for ever.
async fn sleep_to(when: Option<Instant>) {
    match when {
        Some(when) => sleep_until(when).await,
        None => std::future::pending().await,
    }
}
