//! The order in which a night's clusters are judged: one seeded uniform permutation over all workloads.
//!
//! Order decides validity. With two workloads of opposed effect fed one after the other the evidence crosses every bar
//! under a true null; shuffled it does not. So the order is drawn from a stored seed before the first score, over
//! all workloads at once, and a trial looks only at whole blocks of it.

use rand_chacha::ChaCha20Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

use super::rows::UsageRow;

/// The next clusters to judge, all or none of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Block {
    pub night: u32,
    pub first_step: u64,
    pub clusters: Vec<String>,
}

impl Block {
    /// Returns the rows that reserve the block's clusters for `trial`; they are stored before anything is scored.
    pub fn usage(&self, trial: &str) -> Vec<UsageRow> {
        let row = |(step, cluster): (u64, &String)| UsageRow {
            cluster: cluster.clone(),
            trial: trial.to_string(),
            night: self.night,
            step,
        };
        (self.first_step..).zip(&self.clusters).map(row).collect()
    }
}

/// Returns the clusters in the order of `seed`. The order they came in and repeats do not matter.
pub fn permutation(mut clusters: Vec<String>, seed: u64) -> Vec<String> {
    clusters.sort();
    clusters.dedup();
    // Key and shuffle are written out: a stored seed must mean the same order under every later version of `rand`.
    let mut key = [0u8; 32];
    key[..8].copy_from_slice(&seed.to_le_bytes());
    let mut rng = ChaCha20Rng::from_seed(key);
    for last in (1..clusters.len()).rev() {
        clusters.swap(last, below(&mut rng, last as u64 + 1) as usize);
    }
    clusters
}

/// Returns a uniform number below `bound`, without the bias of a plain remainder.
fn below(rng: &mut ChaCha20Rng, bound: u64) -> u64 {
    let limit = u64::MAX - u64::MAX % bound;
    loop {
        let draw = rng.next_u64();
        if draw < limit {
            return draw % bound;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(n: usize) -> Vec<String> {
        (0..n).map(|i| format!("c{i:03}")).collect()
    }

    #[test]
    fn the_order_depends_on_the_seed_and_the_set_alone() {
        let forward = permutation(names(50), 7);
        let backward = permutation(names(50).into_iter().rev().chain(names(3)).collect(), 7);
        assert_eq!(forward, backward);
        assert_ne!(forward, permutation(names(50), 8));
        assert_ne!(forward, names(50));
    }

    #[test]
    fn the_order_of_a_stored_seed_never_changes() {
        #[derive(serde::Deserialize)]
        struct Golden {
            seed: u64,
            order: Vec<String>,
        }
        let golden: Vec<Golden> = serde_json::from_str(include_str!("../../tests/golden/gate_order.json")).unwrap();
        for Golden { seed, order } in golden {
            assert_eq!(permutation(order.clone(), seed), order, "seed {seed}");
        }
    }

    #[test]
    fn every_place_is_equally_likely() {
        let mut first = [0u32; 5];
        for seed in 0..5000 {
            let order = permutation(names(5), seed);
            first[order[0][1..].parse::<usize>().unwrap()] += 1;
        }
        // Five cells of 1000 with standard deviation 28.
        assert!(first.iter().all(|&count| (880..1120).contains(&count)), "{first:?}");
    }
}
