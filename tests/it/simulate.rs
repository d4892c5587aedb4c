//! The whole loop on a world in which one knows what is true, in the real processes.

use serde_json::Value;

use crate::harness::{taod, taod_in};

/// The first seed's world is the same in every run: draws come from the seed, and weights are f32. Of other seeds see docs/method.md.
#[test]
fn the_loop_meets_each_planted_effect_as_it_must() {
    let report: Value = serde_json::from_str(&taod(&["simulate", "--json", "--log", "warn"]).code(0).out).unwrap();
    let rows = report["rows"].as_array().unwrap();
    let expected: Vec<&str> = rows.iter().map(|row| row["expected"].as_str().unwrap()).collect();
    assert_eq!(expected, ["promoted", "refused", "refused", "quarantined", "alarm", "scrubbed"]);
    assert!(rows.iter().all(|row| row["holds"] == true), "{report:#}");
    // The hack is refused for what the score does not compute, though its score rises.
    let hack = &rows[2];
    assert!(hack["outcome"].as_str().unwrap().contains("guardrail length fails"), "{hack}");
    assert!(hack["evidence"].as_str().unwrap().starts_with("gain +"), "{hack}");
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
