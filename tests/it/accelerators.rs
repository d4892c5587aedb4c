//! A night on the accelerators' code (`engine.device = "candle-cpu"`): the processor's night up to rounding.

use serde_json::Value;
use taod::table::Name;

use crate::harness::night::{Night, calls};

const CALLS: usize = 90;
const ON: (&str, &str) = ("TAOD__ENGINE__DEVICE", "candle-cpu");

/// Returns the answers of the first sampling, in an order of their own.
fn answers(night: &Night) -> Vec<(String, String)> {
    let rows = night.rows(Name::Candidates).into_iter();
    let first = rows.filter(|row| row["purpose"] == "train" && row["iteration"] == 1);
    let mut answers: Vec<(String, String)> =
        first.map(|row| (format!("{} {}", row["prompt_hash"], row["sample"]), row["token_ids"].to_string())).collect();
    answers.sort();
    answers
}

/// Returns a number of each training step of the first pass.
fn steps(night: &Night, key: &str) -> Vec<f64> {
    let mut rows: Vec<Value> = night.rows(Name::TuningSteps);
    rows.retain(|row| row["iteration"] == 1);
    rows.sort_by_key(|row| row["step"].as_i64());
    rows.iter().map(|row| row[key].as_f64().unwrap()).collect()
}

#[test]
fn a_night_on_a_device_draws_and_trains_what_the_processor_does() {
    let (there, here) = (Night::new(&calls(CALLS)), Night::new(&calls(CALLS)));
    // Rounded weights, which are the default on some processors, are another policy.
    let exact = [("TAOD__CANDIDATES__PRECISION", "f32"), ("TAOD__TUNING__PRECISION", "f32")];
    for (night, more) in [(&there, &[ON][..]), (&here, &exact)] {
        let outcome = night.worker(&[], more);
        assert!([0, 2, 3].contains(&outcome.code), "exit code {}:\n{}", outcome.code, outcome.err);
    }
    let drawn = answers(&there);
    assert!(drawn.len() > 30, "{}", drawn.len());
    assert_eq!(drawn, answers(&here));
    for key in ["loss", "grad_norm", "entropy"] {
        let (there, here) = (steps(&there, key), steps(&here, key));
        assert!(there.len() > 2 && there.len() == here.len());
        let near = |(a, b): (&f64, &f64)| (a - b).abs() < 1e-3 * b.abs().max(1e-3);
        assert!(there.iter().zip(&here).all(near), "{key}: {there:?} {here:?}");
    }
    assert!(!there.rows(Name::GateSteps).is_empty() && there.adapters().len() == 2);
    // The gate's answers were judged by the same engine.
    assert_eq!(there.rows(Name::GateSteps).len(), here.rows(Name::GateSteps).len());
}

#[test]
fn a_round_does_not_change_its_device_on_the_way() {
    let night = Night::new(&calls(CALLS));
    night.kill_at("candidates-1", &[]);
    night.worker(&[], &[ON]).refused(&["settings"]);
}

#[test]
#[cfg(not(feature = "cuda"))]
fn a_program_without_the_feature_says_which_one_it_lacks() {
    let night = Night::new(&calls(CALLS));
    night.worker(&[], &[("TAOD__ENGINE__DEVICE", "cuda")]).refused(&["engine.device", "cuda:0", "cargo feature cuda"]);
}
