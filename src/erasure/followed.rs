//! Erasures of a log that several daemons read: its keeper erases there and says whose prompts went; each other daemon takes
//! these prompts out of its own tables and rounds at its next maintenance, or at once by `taod table erase --resume`.
//!
//! What is said is hashes of prompts, which `splits` keeps as well. A daemon remembers by receipt what it has followed, and
//! only after it has: one that is killed follows again.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

use super::{EraseError, Erasure, Plan, now, receipt};
use crate::durable;
use crate::round;
use crate::table::{Hunt, Name, Selection};

/// Name of the file, beside the receipts, that lists the erasures that were followed.
const FOLLOWED: &str = "followed.json";

#[derive(Debug, Serialize, Deserialize)]
struct Told {
    receipt: String,
    prompt_hash: String,
    time: DateTime<Utc>,
}

/// What following one erasure took.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Followed {
    /// The keeper's receipt.
    pub receipt: String,
    /// Rows of `candidates`.
    pub candidates: u64,
    pub rounds: BTreeSet<String>,
    pub round_lines: u64,
    pub stopped_round: Option<String>,
}

impl Erasure {
    /// Says which prompts went, for the daemons that read this log. Safe to repeat.
    pub(super) async fn tell_readers(&self, plan: &Plan) -> Result<(), EraseError> {
        let receipt = &plan.receipt.id;
        let row = |hash: &String| Told { receipt: receipt.clone(), prompt_hash: hash.clone(), time: now() };
        let rows: Vec<Told> = plan.prompts.iter().map(row).collect();
        if rows.is_empty() {
            return Ok(());
        }
        round::book::append_once(&self.tables, Name::ErasedPrompts, &format!("taod/erased/{receipt}"), &rows).await?;
        Ok(())
    }

    /// Follows the erasures of a log that another daemon keeps; nothing where this one keeps it.
    pub async fn follow_keeper(&self) -> Result<Vec<Followed>, EraseError> {
        if self.tables.keeps(Name::Queries) {
            return Ok(Vec::new());
        }
        let Some(table) = self.tables.open_existing(Name::ErasedPrompts).await? else { return Ok(Vec::new()) };
        let folder = self.paths.erasures();
        let _alone = receipt::lock(&folder)?;
        let path = folder.join(FOLLOWED);
        let mut known: BTreeSet<String> = match durable::read_json(&path) {
            Err(error) if error.is_not_found() => BTreeSet::new(),
            read => read?,
        };
        let mut new: BTreeMap<String, HashSet<String>> = BTreeMap::new();
        for told in table.rows::<Told>(None).await?.into_iter().filter(|told| !known.contains(&told.receipt)) {
            new.entry(told.receipt).or_default().insert(told.prompt_hash);
        }
        let mut all = Vec::new();
        for (receipt, prompts) in new {
            all.push(self.take_out(&receipt, prompts).await?);
            known.insert(receipt);
            durable::write_json(&path, &known)?;
        }
        Ok(all)
    }

    async fn take_out(&self, receipt: &str, mut prompts: HashSet<String>) -> Result<Followed, EraseError> {
        let begun = now();
        let done = round::erase::erase(&self.paths, &self.tables, &prompts, receipt).await?;
        // What this daemon made of them goes, too.
        prompts.extend(done.made.iter().cloned());
        let mut candidates = 0;
        if let Some(mut table) = self.tables.open_existing(Name::Candidates).await? {
            let selection = Selection::OneOf { column: "prompt_hash", values: prompts };
            let mut hunt = Hunt::begin(&mut table, &selection, &[]).await?;
            let mut gone = Vec::new();
            while let Some(found) = hunt.next().await? {
                let taken = hunt.take(found).await?;
                candidates += taken.rows;
                gone.extend(taken.gone);
            }
            drop(hunt);
            table.delete_files(&gone).await?;
            // A minute for clocks that differ.
            table.delete_remains(&selection, begun - chrono::Duration::minutes(1)).await?;
        }
        let (rounds, round_lines, stopped_round) = (done.rounds, done.lines, done.stopped);
        tracing::info!(receipt, candidates, round_lines, "followed an erasure of the log");
        Ok(Followed { receipt: receipt.to_owned(), candidates, rounds, round_lines, stopped_round })
    }
}
