//! Ingestion: the query log into the tables, every record exactly once.
//!
//! A session is one membership of the consumer group: it turns what the source says and what the clock says into calls of
//! the [`ledger`], which alone decides what is stored and when a record counts as read. A session that fails is dropped
//! whole, and the next one asks the tables where to go on.

#[cfg(test)]
mod bench;
mod counters;
mod filter;
mod ledger;
mod positions;
mod reader;
pub mod replay;
mod retry;
#[cfg(test)]
mod tests;
mod worker;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{Instant, MissedTickBehavior, interval_at, sleep_until, timeout};

pub use self::counters::{Counters, Reasons, Summary};
pub use self::filter::Filter;
use self::ledger::Ledger;
use self::reader::Reader;
pub use self::reader::keyed_hash;
use self::retry::Retry;
use crate::query_log::format::{self, Mapping, OptOut, Rules};
use crate::query_log::kafka::{self, Connection, Consumer};
use crate::query_log::{Event, SourceError, TopicPartition};
use crate::secret::{self, SecretError};
use crate::table::{DataFile, TableError, Tables};

/// How the query log is stored.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// Where the log is.
    pub kafka: kafka::Settings,
    /// Bytes of records after which a commit is made; what cannot be read counts four times, as it is held. Bounds memory.
    /// Range 65536 to 268435456.
    pub batch_bytes: u64,
    /// Longest time between a record's arrival and its commit, in seconds. Range 1 to 3600.
    pub commit_interval_s: u64,
    /// The same where the end of the log is reached: what is asked now is in the table within 5 seconds. A log that never
    /// rests then makes up to 28,800 small files a day, which maintenance joins; where only `taod ingest` runs and nothing
    /// maintains the tables, raise it. Range 1 to 3600.
    pub end_interval_s: u64,
    /// Memory for ingestion, in MiB. The parts that are set apart must fit in: twice `kafka.fetch_mib`, `batch_bytes`, and
    /// what the program, the records being read and the file being written take. Range 256 to 65536.
    pub memory_mib: u64,
    /// With `--until-idle`: how long all partitions must stay at their ends, in seconds. Range 1 to 3600.
    pub idle_s: u64,
    /// With `--until-idle`: how long to wait for records before the end is reached, in seconds. Range 5 to 3600.
    pub stall_s: u64,
    /// File with the key (16 bytes or more) under which end users are hashed; empty: end users are not stored at all.
    pub user_key_file: PathBuf,
    /// Fill the column `language` while ingesting. No stage reads it, it can be told from `messages` at any time, and it
    /// costs four times as much CPU as everything else that is done for a row.
    pub detect_language: bool,
    /// Most text that a row keeps, in bytes; past it the row is cut, marked as truncated and never trains, and `extra`
    /// holds its full size. Of a record that cannot be read at most as many bytes are kept. Range 4096 to 67108864.
    pub max_text_bytes: u64,
    /// Which calls of a log that several endpoints share belong to this one. The others are skipped and counted.
    pub filter: Filter,
    /// Log formats of your own, tried in their order before the known ones.
    pub mapping: Vec<Mapping>,
    /// Signs of your own that a caller forbids training, beside the known ones.
    pub opt_out: Vec<OptOut>,
}

impl Default for Settings {
    fn default() -> Self {
        Settings {
            kafka: kafka::Settings::default(),
            batch_bytes: 64 << 20,
            commit_interval_s: 30,
            end_interval_s: 3,
            memory_mib: 512,
            idle_s: 2,
            stall_s: 60,
            user_key_file: PathBuf::new(),
            detect_language: false,
            max_text_bytes: format::DEFAULT_TEXT_BYTES as u64,
            filter: Filter::default(),
            mapping: Vec::new(),
            opt_out: Vec::new(),
        }
    }
}

impl Settings {
    /// Checks ranges.
    pub fn validate(&self) -> Result<(), String> {
        self.kafka.validate().map_err(|e| format!("kafka.{e}"))?;
        self.filter.compile().map_err(|e| format!("filter.{e}"))?;
        for (index, mapping) in self.mapping.iter().enumerate() {
            mapping.validate().map_err(|e| format!("mapping[{index}].{e}"))?;
        }
        for (index, opt_out) in self.opt_out.iter().enumerate() {
            opt_out.validate().map_err(|e| format!("opt_out[{index}].{e}"))?;
        }
        let ranges = [
            ("max_text_bytes", self.max_text_bytes, 4096, 67_108_864),
            ("batch_bytes", self.batch_bytes, 65_536, 268_435_456),
            ("commit_interval_s", self.commit_interval_s, 1, 3600),
            ("end_interval_s", self.end_interval_s, 1, 3600),
            ("memory_mib", self.memory_mib, 256, 65_536),
            ("idle_s", self.idle_s, 1, 3600),
            ("stall_s", self.stall_s, 5, 3600),
        ];
        if let Some((key, value, low, high)) = ranges.into_iter().find(|(_, v, low, high)| !(low..=high).contains(&v)) {
            return Err(format!("{key} is {value}: choose {low} to {high}"));
        }
        match self.memory_needed() {
            needed if needed > self.memory_mib => Err(format!(
                "memory_mib is {}, but kafka.fetch_mib and batch_bytes need {needed}: raise it or lower them",
                self.memory_mib
            )),
            _ => Ok(()),
        }
    }

    /// Returns the memory that ingestion takes at most under these settings, in MiB.
    fn memory_needed(&self) -> u64 {
        // A fetched batch is kept until its last record is read, so that the queue's own limit is overshot.
        let fetched = 2 * u64::from(self.kafka.fetch_mib);
        // A record being read is its bytes, a tree of values and a row of columns.
        let reading = (4 * kafka::MOST_HANDED_OVER as u64) >> 20;
        // Rows leave encoded; text that no compression makes smaller keeps its size.
        let file = self.batch_bytes.div_ceil(1 << 20) + DataFile::MOST_BUFFERED.div_ceil(1 << 20) as u64;
        PROGRAM_MIB + fetched + reading + file
    }

    /// Returns how records are read.
    pub fn rules(&self) -> Rules {
        Rules {
            mappings: self.mapping.clone(),
            opt_outs: self.opt_out.clone(),
            max_text_bytes: self.max_text_bytes as usize,
        }
    }

    /// Returns what turns records into rows under these settings.
    fn reader(&self) -> Result<Reader, IngestError> {
        Ok(Reader {
            user_key: self.user_key()?,
            config_hash: self.hash(),
            detect_language: self.detect_language,
            rules: self.rules(),
            choice: self.filter.compile().map_err(IngestError::Filter)?,
        })
    }

    /// Returns what says, in each row, under which settings it was read.
    fn hash(&self) -> String {
        let text = serde_json::to_vec(self).unwrap_or_default();
        hex::encode(&Sha256::digest(&text)[..8])
    }

    /// Reads the key under which end users are hashed.
    pub fn user_key(&self) -> Result<Option<Vec<u8>>, IngestError> {
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
    #[error("ingest.filter.{0}: correct it")]
    Filter(String),
    #[error("the partitions were taken away before what was read of them was stored")]
    Lost,
    #[error("partition {} of topic {} came after this member had joined: it is looked at first", place.partition, place.topic)]
    Unseen { place: TopicPartition },
    #[error("the dead letter at partition {partition}, offset {offset} cannot be replayed: {why}")]
    Letter { partition: i32, offset: i64, why: String },
    #[error("a task of ingestion failed: {0}")]
    Task(String),
}

impl IngestError {
    /// Returns true where nothing is wrong but the place: another member is at work, a reply was lost, or a topic has grown.
    fn is_restart(&self) -> bool {
        match self {
            IngestError::Lost | IngestError::Unseen { .. } => true,
            IngestError::Source(SourceError::Late { .. }) => true,
            IngestError::Source(error) => error.is_fenced(),
            IngestError::Table(error) => error.is_restart(),
            _ => false,
        }
    }

    /// Returns true where this member's name in the group is another's.
    fn is_fenced(&self) -> bool {
        matches!(self, IngestError::Source(error) if error.is_fenced())
    }

    /// Returns true where that other holds the name and is not to be driven out.
    fn is_name_held(&self) -> bool {
        matches!(self, IngestError::Source(SourceError::Unreleased { .. }))
    }

    /// Returns true where it does not get better unless someone acts.
    fn needs_hands(&self) -> bool {
        matches!(self, IngestError::Source(error) if error.needs_hands())
    }

    /// Returns true where no retry helps.
    fn is_final(&self) -> bool {
        match self {
            IngestError::ShortUserKey { .. } | IngestError::Secret(_) | IngestError::Filter(_) => true,
            IngestError::Source(error) => error.is_settings(),
            IngestError::Table(error) => error.is_foreign(),
            IngestError::Lost | IngestError::Unseen { .. } | IngestError::Letter { .. } | IngestError::Task(_) => false,
        }
    }
}

/// What the program takes with nothing read: its code, its runtime, the tables' logs.
const PROGRAM_MIB: u64 = 128;

/// How often numbers are counted anew where nothing happens.
const TICK: Duration = Duration::from_secs(5);
/// After how long without a trouble a quiet log counts as readable.
const CALM: Duration = Duration::from_secs(30);

/// Stores the log until the mode's end or until `shutdown` turns true, and returns what was stored.
pub async fn run(
    settings: &Settings,
    tables: &Tables,
    counters: Arc<Counters>,
    mut shutdown: watch::Receiver<bool>,
    mode: Mode,
) -> Result<Summary, IngestError> {
    let reader = Arc::new(settings.reader()?);
    let mut retry = Retry::new(mode);
    loop {
        let begun = Instant::now();
        let ended = session(settings, tables, &reader, &counters, &mut shutdown, mode).await;
        counters.left();
        let error = match ended {
            Ok(()) => return Ok(counters.summary()),
            Err(error) => error,
        };
        let worked = counters.ready.swap(false, Ordering::Relaxed);
        let wait = retry.after(error, begun.elapsed(), worked)?;
        counters.restarts.fetch_add(1, Ordering::Relaxed);
        if timeout(wait, told_to_stop(&mut shutdown)).await.is_ok() {
            return Ok(counters.summary());
        }
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
    // Nothing is held yet: a stop does not wait for a store that does not answer.
    let begun = tokio::select! {
        biased;
        () = told_to_stop(shutdown) => None,
        ledger = begin(settings, tables, reader, &connection) => Some(ledger),
    };
    // Dropped, a connection waits for its client: never on an async thread.
    let join = move || begun.map(|ledger| Ok::<_, IngestError>((ledger?, connection.subscribe()?))).transpose();
    let joined = tokio::task::spawn_blocking(join).await.map_err(|e| IngestError::Task(e.to_string()))??;
    let Some((ledger, source)) = joined else { return Ok(()) };
    let mut session =
        Session { settings, counters: Arc::clone(counters), mode, source, ledger, opened: None, upkeep: None };
    let ended = session.run(shutdown).await;
    session.source.close().await;
    if let Some(upkeep) = session.upkeep {
        upkeep.await.map_err(|e| IngestError::Task(e.to_string()))?;
    }
    ended
}

/// Opens the tables and gives what was never read its first offsets.
async fn begin(
    settings: &Settings,
    tables: &Tables,
    reader: &Arc<Reader>,
    connection: &Connection,
) -> Result<Ledger, IngestError> {
    let mut ledger = Ledger::open(tables, &settings.kafka, Arc::clone(reader)).await?;
    ledger.first_sight(connection.topics()).await?;
    Ok(ledger)
}

/// One membership of the group: the source's events and the clock, turned into calls of the ledger.
struct Session<'a> {
    settings: &'a Settings,
    counters: Arc<Counters>,
    mode: Mode,
    source: Consumer,
    ledger: Ledger,
    /// When the first of the open epoch was read.
    opened: Option<Instant>,
    upkeep: Option<JoinHandle<()>>,
}

impl Session<'_> {
    /// Follows the source's events until the end of the mode.
    async fn run(&mut self, shutdown: &mut watch::Receiver<bool>) -> Result<(), IngestError> {
        let idle = Duration::from_secs(self.settings.idle_s);
        let stall = Duration::from_secs(self.settings.stall_s);
        let behind = Duration::from_secs(self.settings.commit_interval_s);
        let caught_up = Duration::from_secs(self.settings.end_interval_s).min(behind);
        let (mut assigned, mut heard) = (false, Instant::now());
        // Since when nothing was wrong: a quiet log says nothing when a trouble has passed, nor does a group whose partitions
        // all are others'.
        let mut calm = Instant::now();
        let mut tick = interval_at(calm + TICK, TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let at_end = assigned && self.ledger.at_end();
            if at_end && self.mode == Mode::UntilIdle && self.ledger.moved() {
                self.seal().await?;
                heard = Instant::now();
            }
            let seal_at = self.opened.map(|opened| opened + if at_end { caught_up } else { behind });
            let rest_at = match self.mode {
                Mode::Forever => None,
                Mode::UntilIdle if at_end => Some(heard + idle),
                Mode::UntilIdle => Some(heard + stall),
            };
            let event = tokio::select! {
                biased;
                () = told_to_stop(shutdown) => return self.seal().await,
                // Before the events: under a load that never rests there always is one.
                () = sleep_to(seal_at) => {
                    self.seal().await?;
                    self.report();
                    continue;
                }
                event = self.source.recv() => event,
                () = sleep_to(rest_at) => return if at_end { Ok(()) } else { Err(self.stalled()) },
                _ = tick.tick() => {
                    if calm.elapsed() >= CALM {
                        self.counters.ready.store(true, Ordering::Relaxed);
                    }
                    self.report();
                    continue;
                }
            };
            match event.ok_or_else(|| self.stalled())? {
                Event::Trouble(cause) => {
                    tracing::warn!(cause, "kafka is in trouble");
                    self.counters.ready.store(false, Ordering::Relaxed);
                    calm = Instant::now();
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
                    self.counters.ready.store(true, Ordering::Relaxed);
                    self.report();
                }
            }
        }
    }

    async fn take(&mut self, event: Event) -> Result<(), IngestError> {
        match event {
            Event::Assigned { partitions, reply } => {
                let starts = self.ledger.assign(&partitions).await?;
                // A callback that no longer waits assigns nothing, and says so by an event of its own.
                reply.send(starts).ok();
            }
            Event::Records(records) => {
                self.ledger.read(records).await?;
                if self.ledger.held() >= self.settings.batch_bytes {
                    self.seal().await?;
                }
            }
            Event::End { partition, next } => self.ledger.end(&partition, next),
            Event::Revoked { partitions, reply } => {
                let deadline = Duration::from_secs(self.settings.kafka.rebalance_timeout_s);
                timeout(deadline, self.seal()).await.map_err(|_| IngestError::Lost)??;
                self.ledger.revoke(&partitions);
                reply.send(()).ok();
            }
            Event::Lost => return Err(IngestError::Lost),
            Event::Failed(error) => return Err(error.into()),
            Event::Trouble(_) => {}
        }
        if self.ledger.moved() {
            self.opened.get_or_insert_with(Instant::now);
        }
        Ok(())
    }

    /// Stores what was read. An error leaves nothing to go on with.
    async fn seal(&mut self) -> Result<(), IngestError> {
        self.opened = None;
        let begun = Instant::now();
        let sealed = self.ledger.seal().await.inspect_err(|error| self.counters.failed(error))?;
        let Some(sealed) = sealed else { return Ok(()) };
        self.counters.stored(&sealed, begun.elapsed());
        self.source.advise(&sealed.offsets);
        self.keep_up().await
    }

    /// Starts the upkeep that is due, beside ingestion; one at a time.
    async fn keep_up(&mut self) -> Result<(), IngestError> {
        let due = self.ledger.upkeep();
        if due.is_empty() {
            return Ok(());
        }
        if let Some(before) = self.upkeep.take() {
            before.await.map_err(|e| IngestError::Task(e.to_string()))?;
        }
        self.upkeep = Some(tokio::spawn(async move {
            for upkeep in due {
                if let Err(error) = upkeep.run().await {
                    tracing::warn!(%error, "upkeep failed; the next one starts over");
                }
            }
        }));
        Ok(())
    }

    /// Counts how far this member is.
    fn report(&self) {
        self.counters.buffered.store(self.ledger.records(), Ordering::Relaxed);
        self.counters.assigned.store(self.ledger.partitions() as i64, Ordering::Relaxed);
        let ends = self.source.ends();
        self.counters.lag.store(self.ledger.lag(&ends), Ordering::Relaxed);
        self.counters.behind_since_ms.store(self.ledger.behind_since(&ends).unwrap_or_default(), Ordering::Relaxed);
        self.counters.newest_ms.store(self.ledger.newest().unwrap_or_default(), Ordering::Relaxed);
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
