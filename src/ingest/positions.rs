//! How far each partition is, as the tables say, and how far the epoch under way would take it.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use arrow::array::AsArray;
use arrow::datatypes::{Int32Type, Int64Type};

use super::IngestError;
use super::reader::{Known, Letter};
use crate::query_log::kafka::{self, Extent, Start, Topic};
use crate::query_log::{Record, SourceError, TopicPartition};
use crate::table::{Table, TableError, TxnStep};

/// One assigned partition.
#[derive(Debug, Clone)]
pub(super) struct Position {
    /// Next offset by the `queries` table.
    pub(super) stored: i64,
    /// Next offset once the epoch is committed.
    pub(super) next: i64,
    /// True once everything that Kafka held was handed out.
    pub(super) at_end: bool,
    /// Next offset by the `dead_letters` table, which may be ahead of `stored` after a crash, or behind.
    letters: Option<i64>,
    /// Which holding of the partition this is, by either table.
    holding: Holding,
    times: Times,
}

impl Position {
    /// Returns how many offsets are not stored, given the end of the partition; 0 where that is not known yet.
    fn lag(&self, end: Option<&i64>) -> i64 {
        end.map_or(0, |end| (end - self.stored).max(0))
    }
}

/// Time stamps of the last record that was read and of the last that was stored, in milliseconds. They decide nothing.
#[derive(Debug, Clone, Copy, Default)]
struct Times {
    read: Option<i64>,
    stored: Option<i64>,
}

/// The number of a holding in the tables. Every commit asks for it, so that whoever held the partition before can no
/// longer store anything of it: neither a row that its new holder, who reads otherwise, makes a dead letter, nor the
/// reverse. Offsets alone fence one table each, not the two against each other.
#[derive(Debug, Clone, Copy)]
struct Holding {
    queries: i64,
    letters: i64,
}

/// All assigned partitions.
pub(super) struct Positions {
    settings: kafka::Settings,
    held: BTreeMap<TopicPartition, Position>,
}

impl Positions {
    pub(super) fn new(settings: &kafka::Settings) -> Self {
        Positions { settings: settings.clone(), held: BTreeMap::new() }
    }

    /// Gives every partition without a stored offset one: by `start` where nothing of this source was read yet, else its
    /// oldest. Refuses a topic that was made anew.
    ///
    /// A partition or a topic that was added later holds only records from after the first sight, so nothing of it is left
    /// out. The id of each topic is kept beside the offsets: offsets of another topic of the same name mean nothing.
    pub(super) async fn first_sight(&self, queries: &mut Table, topics: &[Topic]) -> Result<(), IngestError> {
        queries.refresh().await?;
        let known = self.check_ids(queries, topics).await?;
        let extents: Vec<&Extent> = topics.iter().flat_map(|topic| &topic.extents).collect();
        let ids: Vec<String> = extents.iter().map(|e| self.settings.app_id(&e.place)).collect();
        let found = queries.txns(&ids).await?;
        let is_new = found.iter().all(Option::is_none);
        let missing = extents.iter().zip(ids).zip(found).filter(|(_, found)| found.is_none());
        let offsets = missing.map(|((extent, app_id), _)| {
            let latest = is_new && self.settings.start == Start::Latest;
            TxnStep { app_id, expect: None, set: if latest { extent.high } else { extent.low } }
        });
        let steps: Vec<TxnStep> = offsets.chain(known).collect();
        match queries.append(&[], &steps).await {
            // Another member saw the topic at the same time; its choice stands.
            Err(TableError::Fenced { .. }) => {
                queries.refresh().await?;
                self.check_ids(queries, topics).await.map(drop)
            }
            other => Ok(other.map(drop)?),
        }
    }

    /// Compares the ids of topics with those that were stored, and returns what stores those seen for the first time.
    async fn check_ids(&self, queries: &mut Table, topics: &[Topic]) -> Result<Vec<TxnStep>, IngestError> {
        let mut steps = Vec::new();
        for topic in topics {
            let Some(id) = topic.id else { continue };
            let app_id = self.settings.topic_id(&topic.name);
            match queries.txn(&app_id).await? {
                None => steps.push(TxnStep { app_id, expect: None, set: id }),
                Some(stored) if stored == id => {}
                Some(_) => return Err(SourceError::Recreated { topic: topic.name.clone() }.into()),
            }
        }
        Ok(steps)
    }

    /// Takes on partitions: reads their offsets and the dead letters that a crash left ahead of them. Refuses one that
    /// [`Positions::first_sight`] has not seen.
    pub(super) async fn assign(
        &mut self,
        partitions: &[TopicPartition],
        queries: &mut Table,
        letters: &mut Table,
    ) -> Result<(BTreeMap<TopicPartition, i64>, Known), IngestError> {
        let ids: Vec<String> = partitions.iter().map(|p| self.settings.app_id(p)).collect();
        // First the partitions are closed to their former holders, then the tables are read: what those stored before is
        // seen, and what they try to store later does not land.
        let in_letters = hold(&ids, letters).await?;
        let in_queries = hold(&ids, queries).await?;
        let stored = queries.txns(&ids).await?;
        let dead = letters.txns(&ids).await?;
        let (mut starts, mut known) = (BTreeMap::new(), Known::new());
        for (i, place) in partitions.iter().enumerate() {
            // Added after this member connected: no offset means anything without the id of its topic.
            let Some(next) = stored[i] else { return Err(IngestError::Unseen { place: place.clone() }) };
            if let Some(decided) = dead[i].filter(|decided| *decided > next) {
                known.insert(place.clone(), dead_within(place, next, decided, letters).await?);
            }
            let holding = Holding { queries: in_queries[i], letters: in_letters[i] };
            let times = Times::default();
            let position = Position { stored: next, next, at_end: false, letters: dead[i], holding, times };
            self.held.insert(place.clone(), position);
            starts.insert(place.clone(), next);
        }
        Ok((starts, known))
    }

    /// Gives partitions up. Their epoch must be committed or dropped before.
    pub(super) fn revoke(&mut self, partitions: &[TopicPartition]) {
        self.held.retain(|partition, _| !partitions.contains(partition));
    }

    /// Takes in a record; false where the epoch must not hold it: the partition is not ours, or it was read before.
    pub(super) fn take(&mut self, record: &Record) -> bool {
        let of_ours = self.held.get_mut(&record.place);
        let Some(position) = of_ours.filter(|position| record.offset >= position.next) else { return false };
        position.next = record.offset + 1;
        position.at_end = false;
        position.times.read = record.time_ms;
        true
    }

    /// Takes in that everything Kafka held was handed out and that `next` follows it.
    pub(super) fn end(&mut self, partition: &TopicPartition, next: Option<i64>) {
        if let Some(position) = self.held.get_mut(partition) {
            position.next = position.next.max(next.unwrap_or(0));
            position.at_end = true;
        }
    }

    /// Returns the steps that store the epoch's rows.
    pub(super) fn steps(&self) -> Vec<TxnStep> {
        let moved = self.held.iter().filter(|(_, position)| position.next > position.stored);
        let steps = |(partition, position): (&TopicPartition, &Position)| {
            let app_id = self.settings.app_id(partition);
            let held = still_held(&app_id, position.holding.queries);
            [held, TxnStep { app_id, expect: Some(position.stored), set: position.next }]
        };
        moved.flat_map(steps).collect()
    }

    /// Returns the steps that store the epoch's dead letters: how far they are decided, which never goes back (an epoch
    /// may be redone by a taod that reads less), and that the partition is still held.
    pub(super) fn letter_steps(&self, letters: &[Letter]) -> Vec<TxnStep> {
        let touched: BTreeSet<TopicPartition> = letters.iter().map(Letter::place).collect();
        let held = touched.iter().filter_map(|partition| Some((partition, self.held.get(partition)?)));
        held.flat_map(|(partition, position)| {
            let app_id = self.settings.app_id(partition);
            let decided = position.letters.unwrap_or(0).max(position.next);
            let held = still_held(&app_id, position.holding.letters);
            [held, TxnStep { app_id, expect: position.letters, set: decided }]
        })
        .collect()
    }

    /// Takes in that these dead letters' steps landed.
    pub(super) fn letters_stored(&mut self, steps: &[TxnStep]) {
        for (partition, position) in &mut self.held {
            let app_id = self.settings.app_id(partition);
            if let Some(step) = steps.iter().find(|step| step.app_id == app_id) {
                position.letters = Some(step.set);
            }
        }
    }

    /// Takes in that the epoch landed and returns the new offsets.
    pub(super) fn stored(&mut self) -> BTreeMap<TopicPartition, i64> {
        for position in self.held.values_mut() {
            position.stored = position.next;
            position.times.stored = position.times.read.or(position.times.stored);
        }
        self.held.iter().map(|(partition, position)| (partition.clone(), position.stored)).collect()
    }

    /// Returns true where every assigned partition is at its end.
    pub(super) fn at_end(&self) -> bool {
        self.held.values().all(|position| position.at_end)
    }

    /// Returns true where something read is not stored yet.
    pub(super) fn moved(&self) -> bool {
        self.held.values().any(|position| position.next > position.stored)
    }

    /// Returns everything in here that decides what happens next, but for the numbers of holdings.
    #[cfg(test)]
    pub(super) fn fingerprint(&self) -> String {
        let of = |(at, p): (&TopicPartition, &Position)| {
            format!("{} {}: {} {} {} {:?}", at.topic, at.partition, p.stored, p.next, p.at_end, p.letters)
        };
        self.held.iter().map(of).collect::<Vec<_>>().join(", ")
    }

    /// Returns the numbers of the holdings: of `queries` and of `dead_letters`, by app id.
    #[cfg(test)]
    pub(super) fn holdings(&self) -> BTreeMap<String, (i64, i64)> {
        let of = |(p, held): (&TopicPartition, &Position)| {
            (holding_id(&self.settings.app_id(p)), (held.holding.queries, held.holding.letters))
        };
        self.held.iter().map(of).collect()
    }

    pub(super) fn len(&self) -> usize {
        self.held.len()
    }

    /// Returns how many records Kafka holds beyond what is stored.
    pub(super) fn lag(&self, ends: &BTreeMap<TopicPartition, i64>) -> i64 {
        self.held.iter().map(|(partition, position)| position.lag(ends.get(partition))).sum()
    }

    /// Returns the time stamp of the newest record that is stored of the partition that is furthest behind in time, in
    /// milliseconds; nothing where none is behind. What lies between is not stored, so its age is the lag in time.
    pub(super) fn behind_since(&self, ends: &BTreeMap<TopicPartition, i64>) -> Option<i64> {
        let behind = self.held.iter().filter(|(partition, position)| position.lag(ends.get(partition)) > 0);
        behind.filter_map(|(_, position)| position.times.stored.or(position.times.read)).min()
    }

    /// Returns the time stamp of the newest record that is stored, in milliseconds.
    pub(super) fn newest(&self) -> Option<i64> {
        self.held.values().filter_map(|position| position.times.stored).max()
    }
}

/// Reads which records of a partition from `stored` up to `decided` are dead letters already. At or past `decided`, the next
/// offset of this generation's letters, stand only those of generations before, which say nothing of what is read now.
async fn dead_within(
    place: &TopicPartition,
    stored: i64,
    decided: i64,
    letters: &Table,
) -> Result<HashSet<(i64, i32)>, TableError> {
    let TopicPartition { topic, partition } = place;
    let topic = topic.replace('\'', "''");
    let batches = letters
        .query(&format!(
            "select \"offset\", record_index from t \
             where topic = '{topic}' and \"partition\" = {partition} \
             and \"offset\" >= {stored} and \"offset\" < {decided}"
        ))
        .await?;
    let mut dead = HashSet::new();
    for batch in &batches {
        let offsets = batch.column(0).as_primitive::<Int64Type>().values().iter().copied();
        dead.extend(offsets.zip(batch.column(1).as_primitive::<Int32Type>().values().iter().copied()));
    }
    Ok(dead)
}

/// Begins a holding of partitions in a table, and returns its numbers.
async fn hold(ids: &[String], table: &mut Table) -> Result<Vec<i64>, TableError> {
    table.refresh().await?;
    let holding_ids: Vec<String> = ids.iter().map(|id| holding_id(id)).collect();
    let former = table.txns(&holding_ids).await?;
    let step = |(app_id, expect): (String, Option<i64>)| TxnStep { app_id, expect, set: expect.unwrap_or(0) + 1 };
    let steps: Vec<TxnStep> = holding_ids.into_iter().zip(former).map(step).collect();
    table.append(&[], &steps).await?;
    Ok(steps.into_iter().map(|step| step.set).collect())
}

/// Returns the step that lands only while a partition's holding is still the newest.
fn still_held(app_id: &str, number: i64) -> TxnStep {
    TxnStep { app_id: holding_id(app_id), expect: Some(number), set: number }
}

fn holding_id(app_id: &str) -> String {
    format!("{app_id}/holding")
}
