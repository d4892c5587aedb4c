//! What scorers are asked beside totals: by how much one answer is better, and what the learned ones say alone.

use super::{Effort, Item, RewardError, Rewards, Scored, Scorer};

impl Rewards {
    /// Returns by how much the training selection finds the first answer of each pair better. With one defined scorer it is
    /// the difference of its raw scores, else that of the totals.
    pub fn margins(&self, pairs: &[(Item, Item)]) -> Result<Vec<f64>, RewardError> {
        if let [Scorer::Defined(name)] = self.settings.train.as_slice()
            && let Some(loaded) = self.defined.iter().find(|loaded| loaded.name == *name)
        {
            return loaded.margins(pairs);
        }
        let items: Vec<Item> = pairs.iter().flat_map(|(a, b)| [a.clone(), b.clone()]).collect();
        let totals: Vec<f64> = self.train(&items)?.into_iter().map(|scored| scored.total).collect();
        Ok(totals.chunks_exact(2).map(|both| both[0] - both[1]).collect())
    }

    /// Returns true where the gate names a scorer that a text might argue with.
    pub fn can_be_argued_with(&self) -> bool {
        self.settings.gate.iter().any(|scorer| !scorer.is_specification())
    }

    /// Returns what the gate's learned scorers alone make of answers, whatever rules hold.
    pub fn learned(&self, items: &[Item]) -> Result<Vec<Scored>, RewardError> {
        let learned = self.settings.gate.iter().filter(|scorer| !scorer.is_specification());
        self.score(&learned.cloned().collect::<Vec<_>>(), items, Effort::Needed)
    }
}
