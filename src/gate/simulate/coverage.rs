//! How often a confidence sequence misses the mean that it should hold at every look.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;
use rayon::prelude::*;
use serde::Serialize;

use super::world::Shape;
use crate::gate::confidence::bounds;
use crate::gate::interval::Rate;
use crate::record::derive_seed;

/// Misses of the lower and of the upper bound, each allowed with a probability of at most 1 - `nominal`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Coverage {
    pub shape: &'static str,
    pub mean: f64,
    pub values: usize,
    pub looks: usize,
    pub nominal: f64,
    pub lower_misses: Rate,
    pub upper_misses: Rate,
}

/// Runs `runs` sequences of `values` differences with mean `mean`, looked at after every `block` of them.
pub fn coverage(shape: Shape, mean: f64, (runs, values, block): (u64, usize, usize), seed: u64) -> Coverage {
    const ALPHA: f64 = 0.05;
    let run = |at: u64| {
        let name = ["coverage", shape.as_str(), &mean.to_string(), &at.to_string()];
        let mut rng = ChaCha8Rng::seed_from_u64(derive_seed(seed, &name));
        let drawn: Vec<f64> = (0..values).map(|_| shape.draw(mean, &mut rng)).collect();
        let looks = (block..=values).step_by(block).map(|n| bounds(&drawn[..n], -1.0, 1.0, ALPHA));
        looks.fold((false, false), |(low, high), b| (low | (b.lower > mean), high | (b.upper < mean)))
    };
    let all: Vec<(bool, bool)> = (0..runs).into_par_iter().map(run).collect();
    let count = |miss: fn(&(bool, bool)) -> bool| all.iter().filter(|run| miss(run)).count() as u64;
    Coverage {
        shape: shape.as_str(),
        mean,
        values,
        looks: values / block,
        nominal: 1.0 - ALPHA,
        lower_misses: Rate::of(count(|run| run.0), runs),
        upper_misses: Rate::of(count(|run| run.1), runs),
    }
}
