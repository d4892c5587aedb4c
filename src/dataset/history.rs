//! What earlier rounds learnt of a prompt: when it was trained on, and whether its answers still differed in reward.
//!
//! Answers that all score alike teach nothing: their advantages are zero. The variance of a prompt's rewards in its last
//! round tells how much there is left to learn from it.

use std::collections::HashMap;

use crate::table::{Name, Tables};

use super::DatasetError;
use super::catalogue::{bytes_of, id_of};
use super::columns::Columns;

/// Past rewards by prompt.
#[derive(Debug, Default)]
pub(super) struct History {
    by_prompt: HashMap<[u8; 16], Past>,
    /// Version of the table `candidates`, where it is there.
    pub(super) version: Option<u64>,
}

#[derive(Debug)]
struct Past {
    round: String,
    variance: f32,
}

impl History {
    /// Reads the rewards of all rounds.
    pub(super) async fn read(tables: &Tables) -> Result<Self, DatasetError> {
        let Some(candidates) = tables.open_existing(Name::Candidates).await? else { return Ok(History::default()) };
        let mut history = History { version: Some(candidates.version()), ..History::default() };
        let sql = "select prompt_hash, round, max(variance) as variance from \
            (select prompt_hash, round, iteration, var_pop(total) as variance from t \
             where purpose = 'train' and total is not null and round is not null group by prompt_hash, round, iteration) \
            group by prompt_hash, round";
        let mut scan = candidates.scan(sql).await?;
        while let Some(batch) = scan.next().await? {
            let columns = Columns::of("candidates", &batch)?;
            for i in 0..batch.num_rows() {
                let Some(hash) = bytes_of(columns.text("prompt_hash", i)?) else { continue };
                history.add(&hash, columns.text("round", i)?, columns.fraction("variance", i).unwrap_or(0.0));
            }
        }
        Ok(history)
    }

    fn add(&mut self, hash: &[u8; 32], round: &str, variance: f64) {
        let new = Past { round: round.to_owned(), variance: variance as f32 };
        match self.by_prompt.get_mut(&id_of(hash)) {
            Some(past) if past.round < new.round => *past = new,
            Some(_) => {}
            None => drop(self.by_prompt.insert(id_of(hash), new)),
        }
    }

    /// Returns the variance of a prompt's rewards in the last round that trained on it.
    pub(super) fn variance(&self, hash: &[u8; 32]) -> Option<f32> {
        self.by_prompt.get(&id_of(hash)).map(|past| past.variance)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_round_counts() {
        let mut history = History::default();
        for (round, variance) in [("round-00002", 0.25), ("round-00010", 0.0), ("round-00001", 0.5)] {
            history.add(&[7; 32], round, variance);
        }
        assert_eq!((history.variance(&[7; 32]), history.variance(&[8; 32])), (Some(0.0), None));
    }
}
