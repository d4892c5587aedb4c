//! The state machine of ingestion: which records are read, and what one commit stores.
//!
//! Records gather in an epoch. Sealing it commits the rows of all partitions together with the offsets they take the
//! partitions to, in one Delta commit; what could not be read goes to `dead_letters` before, under offsets of its own.
//! The ledger knows neither Kafka nor the clock: a source calls it, in production a [`super::session`], and in the model
//! check every order of events that can happen. After an error a ledger is of no more use: nothing of its epoch may be
//! stored, and a new one begins at what the tables hold.

#[cfg(test)]
mod model_check;

use std::collections::BTreeMap;
use std::sync::Arc;

use super::IngestError;
use super::positions::Positions;
use super::reader::{Known, Letter, Parsed, Reader};
use super::worker::Worker;
use crate::crash::{self, Point};
use crate::query_log::kafka::{self, Topic};
use crate::query_log::{Record, TopicPartition};
use crate::table::{DataFile, ERASURES, Name, Suppressions, Table, TableError, Tables, Upkeep, batch_of, schema};

/// What a dead letter takes beside the record's bytes: its place, its reason and its message (about 440 bytes, measured).
const LETTER_BYTES: u64 = 512;

/// What was read and is not stored yet.
#[derive(Default)]
struct Epoch {
    /// The rows, encoded as they come; nothing before the first records.
    file: Option<DataFile>,
    letters: Vec<Letter>,
    skipped: BTreeMap<&'static str, u64>,
    records: u64,
    bytes: u64,
    /// Those of them that are dead letters.
    dead_bytes: u64,
}

/// What one commit stored.
pub(super) struct Sealed {
    pub(super) records: u64,
    pub(super) rows: u64,
    pub(super) bytes: u64,
    pub(super) file_bytes: u64,
    pub(super) version: u64,
    pub(super) letters: BTreeMap<&'static str, u64>,
    pub(super) skipped: BTreeMap<&'static str, u64>,
    /// The next offset of every assigned partition.
    pub(super) offsets: BTreeMap<TopicPartition, i64>,
}

/// The open epoch, and how far the tables are.
pub(super) struct Ledger {
    reader: Arc<Reader>,
    queries: Table,
    letters: Table,
    positions: Positions,
    known: Arc<Known>,
    /// What was erased when this ledger was opened. An erasure that comes later fences both tables.
    erased: Arc<Suppressions>,
    epoch: Epoch,
    worker: Worker,
}

impl Ledger {
    /// Opens the tables. No partition is held yet.
    pub(super) async fn open(
        tables: &Tables,
        settings: &kafka::Settings,
        reader: Arc<Reader>,
    ) -> Result<Self, IngestError> {
        let mut queries = tables.open_one(Name::Queries).await?;
        let mut letters = tables.open_one(Name::DeadLetters).await?;
        // Held before the list is read: whatever is added after that moves what is held.
        queries.hold(ERASURES).await?;
        letters.hold(ERASURES).await?;
        Ok(Ledger {
            reader,
            queries,
            letters,
            positions: Positions::new(settings),
            known: Arc::default(),
            erased: Arc::new(Suppressions::load(tables).await?),
            epoch: Epoch::default(),
            worker: Worker::start()?,
        })
    }

    /// Gives partitions that no one has read yet their first offset.
    pub(super) async fn first_sight(&mut self, topics: &[Topic]) -> Result<(), IngestError> {
        self.positions.first_sight(&mut self.queries, topics).await
    }

    /// Takes on partitions and returns the offset at which each is to be read.
    pub(super) async fn assign(
        &mut self,
        partitions: &[TopicPartition],
    ) -> Result<BTreeMap<TopicPartition, i64>, IngestError> {
        let (starts, known) = self.positions.assign(partitions, &mut self.queries, &mut self.letters).await?;
        Arc::make_mut(&mut self.known).extend(known);
        Ok(starts)
    }

    /// Adds records to the epoch. Those of partitions that are not held, and those read before, are passed over.
    pub(super) async fn read(&mut self, mut records: Vec<Record>) -> Result<(), IngestError> {
        crash::point(Point::AfterPoll);
        records.retain(|record| self.positions.take(record));
        let (reader, known, count) = (Arc::clone(&self.reader), Arc::clone(&self.known), records.len() as u64);
        let erased = Arc::clone(&self.erased);
        let file = self.epoch.file.take();
        let work = self.worker.run(move || {
            let mut file = file.map_or_else(|| DataFile::new(&schema::QUERIES), Ok)?;
            let parsed = reader.read(&records, &known, &erased)?;
            file.write(&parsed.batch)?;
            Ok::<_, TableError>((file, parsed))
        });
        let (file, parsed) = work.await??;
        let Parsed { letters, skipped, bytes, .. } = parsed;
        self.epoch.file = Some(file);
        self.epoch.dead_bytes += letters.iter().map(|letter| letter.payload.len() as u64 / 2).sum::<u64>();
        self.epoch.letters.extend(letters);
        for (reason, n) in skipped {
            *self.epoch.skipped.entry(reason).or_default() += n;
        }
        self.epoch.records += count;
        self.epoch.bytes += bytes;
        Ok(())
    }

    /// Takes in that everything of a partition was handed out. Past the last record there may be control records, which
    /// hold no row but move the offset.
    pub(super) fn end(&mut self, partition: &TopicPartition, next: Option<i64>) {
        self.positions.end(partition, next);
    }

    /// Gives partitions up. Their epoch must be sealed before.
    pub(super) fn revoke(&mut self, partitions: &[TopicPartition]) {
        self.positions.revoke(partitions);
    }

    /// Commits the epoch: its dead letters first, then its rows with the offsets. Returns nothing where nothing moved.
    pub(super) async fn seal(&mut self) -> Result<Option<Sealed>, IngestError> {
        let mut epoch = std::mem::take(&mut self.epoch);
        if epoch.records > 0 {
            crash::point(Point::AfterSeal);
        }
        if !epoch.letters.is_empty() {
            let steps = self.positions.letter_steps(&epoch.letters);
            let batch = batch_of(&schema::DEAD_LETTERS, &epoch.letters)?;
            self.letters.append(&[batch], &steps).await?;
            self.positions.letters_stored(&steps);
            crash::point(Point::BetweenLettersAndRows);
        }
        let steps = self.positions.steps();
        if steps.is_empty() {
            return Ok(None);
        }
        let file = epoch.file.take().map_or_else(|| DataFile::new(&schema::QUERIES), Ok)?;
        let rows = file.rows();
        let file = self.worker.run(move || file.encode()).await??;
        let appended = self.queries.append_file(file, &steps).await?;
        let sealed = epoch.sealed(rows, appended.version, appended.bytes, self.positions.stored());
        tracing::debug!(version = sealed.version, rows = sealed.rows, bytes = sealed.bytes, "epoch stored");
        Ok(Some(sealed))
    }

    /// Returns the upkeep of the tables that is due.
    pub(super) fn upkeep(&mut self) -> Vec<Upkeep> {
        [&mut self.queries, &mut self.letters].into_iter().filter_map(Table::upkeep).collect()
    }

    /// Returns true where every held partition is at its end.
    pub(super) fn at_end(&self) -> bool {
        self.positions.at_end()
    }

    /// Returns true where something read is not stored yet.
    pub(super) fn moved(&self) -> bool {
        self.positions.moved()
    }

    /// Returns the records of the open epoch.
    pub(super) fn records(&self) -> u64 {
        self.epoch.records
    }

    /// Returns the bytes that the open epoch may take by its commit. Rows are held encoded, once; a dead letter as text in
    /// hex, as a column and as a file, four times, and beside its text it takes [`LETTER_BYTES`].
    pub(super) fn held(&self) -> u64 {
        self.epoch.bytes + 3 * self.epoch.dead_bytes + LETTER_BYTES * self.epoch.letters.len() as u64
    }

    /// Returns how many partitions are held.
    pub(super) fn partitions(&self) -> usize {
        self.positions.len()
    }

    /// Returns how many records Kafka holds beyond what is stored.
    pub(super) fn lag(&self, ends: &BTreeMap<TopicPartition, i64>) -> i64 {
        self.positions.lag(ends)
    }

    /// Returns the time stamp after which records are not stored, in milliseconds; nothing where all are.
    pub(super) fn behind_since(&self, ends: &BTreeMap<TopicPartition, i64>) -> Option<i64> {
        self.positions.behind_since(ends)
    }

    /// Returns the time stamp of the newest record that is stored, in milliseconds.
    pub(super) fn newest(&self) -> Option<i64> {
        self.positions.newest()
    }
}

#[cfg(test)]
impl Ledger {
    /// Returns everything in here that decides what it does next.
    fn fingerprint(&self) -> String {
        use std::fmt::Write;

        let mut text =
            format!("{} {} {}", self.positions.fingerprint(), self.queries.fingerprint(), self.letters.fingerprint());
        let mut known: Vec<_> = self.known.iter().flat_map(|(p, at)| at.iter().map(move |at| (p, at))).collect();
        known.sort();
        let letters: Vec<_> = self.epoch.letters.iter().map(|letter| (letter.place(), letter.offset)).collect();
        // Rows are what was read and is no dead letter: positions and letters tell them.
        write!(text, "{known:?} {letters:?} {}", self.epoch.records).unwrap();
        text
    }
}

impl Epoch {
    fn sealed(self, rows: u64, version: u64, file_bytes: u64, offsets: BTreeMap<TopicPartition, i64>) -> Sealed {
        let mut letters: BTreeMap<&'static str, u64> = BTreeMap::new();
        for letter in &self.letters {
            *letters.entry(letter.reason).or_default() += 1;
        }
        let Epoch { skipped, records, bytes, .. } = self;
        Sealed { records, rows, bytes, file_bytes, version, letters, skipped, offsets }
    }
}
