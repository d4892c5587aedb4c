//! The whole loop on a world in which one knows what is true, in the real processes.

use serde_json::Value;

use crate::harness::{taod, taod_in};

/// Worlds that are made, and those of them in which one night must be enough to tell the improvement. What must not happen happens
/// in none; but a gate may lawfully need more prompts than a night has (docs/method.md).
const SEEDS: std::ops::RangeInclusive<u32> = 1..=5;
const PROMOTED: usize = 3;

#[test]
fn the_loop_meets_each_planted_effect_as_it_must() {
    let mut promoted = 0;
    for seed in SEEDS {
        let outcome = taod(&["simulate", "--json", "--log", "warn", "--seed", &seed.to_string()]);
        let report: Value = serde_json::from_str(&outcome.out).unwrap_or_else(|_| panic!("{}", outcome.err));
        let rows = report["rows"].as_array().unwrap();
        let expected: Vec<&str> = rows.iter().map(|row| row["expected"].as_str().unwrap()).collect();
        assert_eq!(expected, ["promoted", "refused", "refused", "quarantined", "alarm", "scrubbed"]);
        let holds = |row: &Value| row["holds"] == true;
        assert!(rows[1..].iter().all(holds), "{report:#}");
        assert_eq!(outcome.code, i32::from(!rows.iter().all(holds)), "{report:#}");
        // The hack is refused for what the score does not compute, though its score rises.
        let hack = &rows[2];
        assert!(hack["outcome"].as_str().unwrap().contains("guardrail length fails"), "{hack}");
        assert!(hack["evidence"].as_str().unwrap().starts_with("gain +"), "{hack}");
        // Where it is not promoted its evidence stands all the same, and a guardrail is what could not tell.
        promoted += usize::from(holds(&rows[0]));
        let improvement = rows[0]["outcome"].as_str().unwrap();
        assert!(improvement.starts_with("promoted") || improvement.contains("not told by length"), "{}", rows[0]);
    }
    assert!(promoted >= PROMOTED, "the improvement was promoted in {promoted} worlds");
}

#[test]
fn a_folder_in_use_and_too_few_calls_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("mine"), "x").unwrap();
    taod(&["simulate", "--dir", &folder.path().display().to_string()]).refused(&["is not empty", "--dir"]);
    assert_eq!(taod(&["simulate", "--calls", "20"]).code, 64);
    let set = taod_in(folder.path(), &["simulate"], &[("TAOD__STATE__DIR", "/srv/taod")]).code(64);
    assert!(set.err.contains("TAOD__STATE__DIR is set"), "{}", set.err);
}
