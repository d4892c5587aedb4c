//! How far each partition is, as the tables say, and how far the epoch under way would take it.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use arrow::array::AsArray;
use arrow::datatypes::{Int32Type, Int64Type};

use super::reader::{Known, Letter};
use crate::query_log::kafka::{self, Extent, Start};
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
    held: BTreeMap<i32, Position>,
}

impl Positions {
    pub(super) fn new(settings: &kafka::Settings) -> Self {
        Positions { settings: settings.clone(), held: BTreeMap::new() }
    }

    /// Gives every partition without a stored offset one: by `start` where the whole topic is new, else its oldest.
    ///
    /// A partition that was added later holds only records from after the first sight, so nothing of it is left out.
    pub(super) async fn first_sight(&self, queries: &mut Table, extents: &[Extent]) -> Result<(), TableError> {
        queries.refresh().await?;
        let ids: Vec<String> = extents.iter().map(|e| self.settings.app_id(e.partition)).collect();
        let found = queries.txns(&ids).await?;
        let is_new = found.iter().all(Option::is_none);
        let missing = extents.iter().zip(ids).zip(found).filter(|(_, found)| found.is_none());
        let steps: Vec<TxnStep> = missing
            .map(|((extent, app_id), _)| {
                let latest = is_new && self.settings.start == Start::Latest;
                TxnStep { app_id, expect: None, set: if latest { extent.high } else { extent.low } }
            })
            .collect();
        match queries.append(&[], &steps).await {
            // Another member saw the topic at the same time; its choice stands.
            Err(TableError::Fenced { .. }) => queries.refresh().await,
            other => other.map(|_| ()),
        }
    }

    /// Takes on partitions: reads their offsets and the dead letters that a crash left ahead of them.
    pub(super) async fn assign(
        &mut self,
        partitions: &[i32],
        queries: &mut Table,
        letters: &mut Table,
    ) -> Result<(BTreeMap<i32, i64>, Known), TableError> {
        let ids: Vec<String> = partitions.iter().map(|p| self.settings.app_id(*p)).collect();
        // First the partitions are closed to their former holders, then the tables are read: what those stored before is
        // seen, and what they try to store later does not land.
        let in_letters = hold(&ids, letters).await?;
        let in_queries = hold(&ids, queries).await?;
        let stored = queries.txns(&ids).await?;
        let dead = letters.txns(&ids).await?;
        let (mut starts, mut known) = (BTreeMap::new(), Known::new());
        for (i, (&partition, app_id)) in partitions.iter().zip(ids).enumerate() {
            if stored[i].is_none() {
                // Added to the topic after this member connected: it begins at its beginning.
                queries.append(&[], &[TxnStep { app_id, expect: None, set: 0 }]).await?;
            }
            let next = stored[i].unwrap_or(0);
            if dead[i].is_some_and(|dead| dead > next) {
                known.insert(partition, self.dead_from(partition, next, letters).await?);
            }
            let holding = Holding { queries: in_queries[i], letters: in_letters[i] };
            let position = Position { stored: next, next, at_end: false, letters: dead[i], holding };
            self.held.insert(partition, position);
            starts.insert(partition, next);
        }
        Ok((starts, known))
    }

    /// Reads which records at or after `stored` are dead letters already.
    async fn dead_from(&self, partition: i32, stored: i64, letters: &Table) -> Result<HashSet<(i64, i32)>, TableError> {
        let topic = self.settings.topic.replace('\'', "''");
        let batches = letters
            .query(&format!(
                "select \"offset\", record_index from t \
                 where topic = '{topic}' and \"partition\" = {partition} and \"offset\" >= {stored}"
            ))
            .await?;
        let mut dead = HashSet::new();
        for batch in &batches {
            let offsets = batch.column(0).as_primitive::<Int64Type>().values().iter().copied();
            dead.extend(offsets.zip(batch.column(1).as_primitive::<Int32Type>().values().iter().copied()));
        }
        Ok(dead)
    }

    /// Gives partitions up. Their epoch must be committed or dropped before.
    pub(super) fn revoke(&mut self, partitions: &[i32]) {
        self.held.retain(|partition, _| !partitions.contains(partition));
    }

    /// Takes in a record; false where the epoch must not hold it: the partition is not ours, or it was read before.
    pub(super) fn take(&mut self, partition: i32, offset: i64) -> bool {
        let Some(position) = self.held.get_mut(&partition).filter(|position| offset >= position.next) else {
            return false;
        };
        position.next = offset + 1;
        position.at_end = false;
        true
    }

    /// Takes in that everything Kafka held was handed out and that `next` follows it.
    pub(super) fn end(&mut self, partition: i32, next: Option<i64>) {
        if let Some(position) = self.held.get_mut(&partition) {
            position.next = position.next.max(next.unwrap_or(0));
            position.at_end = true;
        }
    }

    /// Returns the steps that store the epoch's rows.
    pub(super) fn steps(&self) -> Vec<TxnStep> {
        let moved = self.held.iter().filter(|(_, position)| position.next > position.stored);
        let steps = |(partition, position): (&i32, &Position)| {
            let app_id = self.settings.app_id(*partition);
            let held = still_held(&app_id, position.holding.queries);
            [held, TxnStep { app_id, expect: Some(position.stored), set: position.next }]
        };
        moved.flat_map(steps).collect()
    }

    /// Returns the steps that store the epoch's dead letters: how far they are decided, which never goes back (an epoch
    /// may be redone by a taod that reads less), and that the partition is still held.
    pub(super) fn letter_steps(&self, letters: &[Letter]) -> Vec<TxnStep> {
        let touched: BTreeSet<i32> = letters.iter().map(|letter| letter.partition).collect();
        let held = touched.iter().filter_map(|partition| Some((partition, self.held.get(partition)?)));
        held.flat_map(|(partition, position)| {
            let app_id = self.settings.app_id(*partition);
            let decided = position.letters.unwrap_or(0).max(position.next);
            let held = still_held(&app_id, position.holding.letters);
            [held, TxnStep { app_id, expect: position.letters, set: decided }]
        })
        .collect()
    }

    /// Takes in that these dead letters' steps landed.
    pub(super) fn letters_stored(&mut self, steps: &[TxnStep]) {
        for (partition, position) in &mut self.held {
            let app_id = self.settings.app_id(*partition);
            if let Some(step) = steps.iter().find(|step| step.app_id == app_id) {
                position.letters = Some(step.set);
            }
        }
    }

    /// Takes in that the epoch landed and returns the new offsets.
    pub(super) fn stored(&mut self) -> BTreeMap<i32, i64> {
        for position in self.held.values_mut() {
            position.stored = position.next;
        }
        self.held.iter().map(|(partition, position)| (*partition, position.stored)).collect()
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
        let of = |(partition, p): (&i32, &Position)| {
            format!("{partition}: {} {} {} {:?}", p.stored, p.next, p.at_end, p.letters)
        };
        self.held.iter().map(of).collect::<Vec<_>>().join(", ")
    }

    /// Returns the numbers of the holdings: of `queries` and of `dead_letters`, by app id.
    #[cfg(test)]
    pub(super) fn holdings(&self) -> BTreeMap<String, (i64, i64)> {
        let of = |(p, held): (&i32, &Position)| {
            (holding_id(&self.settings.app_id(*p)), (held.holding.queries, held.holding.letters))
        };
        self.held.iter().map(of).collect()
    }

    pub(super) fn len(&self) -> usize {
        self.held.len()
    }

    /// Returns how many records Kafka holds beyond what is stored.
    pub(super) fn lag(&self, ends: &BTreeMap<i32, i64>) -> i64 {
        let behind = |(partition, position): (&i32, &Position)| {
            ends.get(partition).map_or(0, |end| (end - position.stored).max(0))
        };
        self.held.iter().map(behind).sum()
    }
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
