//! Ingestion: the query log into the tables, every record exactly once.
//!
//! A [`session`] is one membership of the consumer group: it turns what the source says and what the clock says into calls of
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
mod session;
#[cfg(test)]
mod tests;
mod worker;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tokio::sync::watch;
use tokio::time::{Instant, timeout};

pub use self::counters::{Counters, Reasons, Summary};
pub use self::filter::Filter;
use self::reader::Reader;
pub use self::reader::keyed_hash;
use self::retry::Retry;
use crate::query_log::format::{self, Mapping, OptOut, Rules};
use crate::query_log::kafka;
use crate::query_log::{SourceError, TopicPartition};
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
        let ended = session::run(settings, tables, &reader, &counters, &mut shutdown, mode).await;
        counters.left();
        let error = match ended {
            Ok(()) => return Ok(counters.summary()),
            Err(error) => error,
        };
        let worked = counters.ready.swap(false, Ordering::Relaxed);
        let wait = retry.after(error, begun.elapsed(), worked)?;
        counters.restarts.fetch_add(1, Ordering::Relaxed);
        if timeout(wait, session::told_to_stop(&mut shutdown)).await.is_ok() {
            return Ok(counters.summary());
        }
    }
}
