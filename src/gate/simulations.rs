//! What the gate promises, simulated with fixed seeds: few false crossings, enough true ones, and why order matters.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

use super::{Evidence, level::bar, order::permutation};

const MARGIN: f64 = 0.005;
/// The first bar of the year.
const FIRST_BAR: f64 = 0.10 / 120.0;

fn uniform(rng: &mut ChaCha8Rng) -> f64 {
    (rng.next_u64() >> 11) as f64 / (1u64 << 53) as f64
}

/// Pass or fail on both sides, drawn independently: the difference of two coins.
fn pass_or_fail(rng: &mut ChaCha8Rng, new: f64, incumbent: f64) -> f64 {
    f64::from(u8::from(uniform(rng) < new)) - f64::from(u8::from(uniform(rng) < incumbent))
}

/// Returns the step at which the evidence first reaches the bar of `alpha`.
fn crossing(alpha: f64, differences: impl Iterator<Item = f64>) -> Option<u64> {
    let mut evidence = Evidence::new(MARGIN).unwrap();
    for d in differences {
        if evidence.step(d).unwrap().ln_wealth >= bar(alpha) {
            return Some(evidence.len());
        }
    }
    None
}

fn crossings(runs: u64, alpha: f64, length: usize, draw: impl Fn(&mut ChaCha8Rng) -> f64) -> Vec<Option<u64>> {
    let run = |seed| {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        crossing(alpha, (0..length).map(|_| draw(&mut rng)))
    };
    (0..runs).map(run).collect()
}

#[test]
fn equal_sides_seldom_cross() {
    // At level 0.05 instead of 1/1200, so that the error can be seen in 600 runs: at the null's centre and at its edge.
    let centre = crossings(600, 0.05, 600, |rng| pass_or_fail(rng, 0.3, 0.3));
    let edge = crossings(600, 0.05, 600, |rng| pass_or_fail(rng, 0.3 + MARGIN, 0.3));
    for (name, runs) in [("centre", centre), ("edge", edge)] {
        let crossed = runs.iter().flatten().count();
        // 30 expected at most; the upper 99.9 % limit of a binomial of 600 at 0.05 is 48.
        assert!(crossed <= 48, "{name}: {crossed}");
        assert!(crossed >= 1, "{name}: a process that never errs at 0.05 bets too little");
    }
    assert_eq!(crossings(300, FIRST_BAR, 600, |rng| pass_or_fail(rng, 0.3, 0.3)).iter().flatten().count(), 0);
}

#[test]
fn a_real_gain_crosses_in_time() {
    // The medians stated with the method: about 60 prompts for 10 % -> 45 %, about 190 for 9.5 % -> 25 %.
    let cases = [(0.10, 0.45, 45..80), (0.095, 0.25, 150..240)];
    for (incumbent, new, expected) in cases {
        let mut runs = crossings(201, FIRST_BAR, 2000, |rng| pass_or_fail(rng, new, incumbent));
        runs.sort_by_key(|step| step.unwrap_or(u64::MAX));
        let median = runs[100].unwrap_or(u64::MAX);
        assert!(expected.contains(&median), "{incumbent} -> {new}: {median}");
    }
}

#[test]
fn two_workloads_of_opposed_effect_are_safe_only_in_the_seeded_order() {
    // +0.25 on one, -0.25 on the other: no gain at all, 300 prompts each.
    let names: Vec<String> =
        ["gains", "loses"].iter().flat_map(|w| (0..300).map(move |i| format!("{w}-{i}"))).collect();
    let effect = |name: &String, rng: &mut ChaCha8Rng| match name.starts_with("gains") {
        true => pass_or_fail(rng, 0.55, 0.30),
        false => pass_or_fail(rng, 0.30, 0.55),
    };
    let (mut fed_in_turn, mut seeded) = (0, 0);
    for seed in 0..100 {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        fed_in_turn += usize::from(crossing(FIRST_BAR, names.iter().map(|n| effect(n, &mut rng))).is_some());
        let order = permutation(names.clone(), seed);
        seeded += usize::from(crossing(FIRST_BAR, order.iter().map(|n| effect(n, &mut rng))).is_some());
    }
    assert!(fed_in_turn >= 95, "one after the other crosses in {fed_in_turn} of 100");
    assert_eq!(seeded, 0);
}
