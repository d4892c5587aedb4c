//! What holds for every record, whatever its bytes. Checked by the tests and by the fuzz targets, which have only this.

use std::collections::BTreeMap;

use serde_json::Value;

use super::exclusion::is_masked;
use super::{MAX_ITEMS, Outcome, Rules, canonical_json, read};
use crate::record::{Kind, Query};

/// Most bytes that one outcome may hold beside the text of its record: names of fields, a process's attributes.
const OWN_BYTES: usize = 12 << 10;

/// How many times its size a record's text may become: a control character is six bytes in JSON, and twice where a
/// document holds JSON as text.
const MAX_GROWTH: usize = 12;

/// A bound so small that most rows are over it.
const TIGHT: usize = 64;

/// Reads a record and panics where something does not hold.
pub fn check(payload: &[u8], rules: &Rules) {
    let outcomes = read(payload, &BTreeMap::new(), rules);
    assert!(!outcomes.is_empty(), "nothing became of the record");
    assert!(outcomes.len() <= MAX_ITEMS, "{} outcomes of one record", outcomes.len());
    assert_eq!(outcomes, read(payload, &BTreeMap::new(), rules), "read twice, not the same");
    let mut bytes = 0;
    for (index, outcome) in outcomes.iter().enumerate() {
        bytes += check_line(index, outcome);
        if let Outcome::Row(query) = outcome {
            check_row(query);
        }
    }
    let plain = super::envelope::open(payload).map_or(payload.len(), |plain| plain.len());
    let most = MAX_GROWTH * plain + OWN_BYTES * outcomes.len();
    assert!(bytes <= most, "{} bytes became {bytes}", payload.len());
    check_bound(payload, rules, &outcomes);
}

/// Checks that an outcome's line is JSON again and returns its length.
fn check_line(index: usize, outcome: &Outcome) -> usize {
    let text = canonical_json(index, outcome).to_string();
    match serde_json::from_str::<Value>(&text) {
        Ok(again) => assert_eq!(again["index"], index),
        Err(error) => panic!("a line that cannot be read back ({error}): {text}"),
    }
    text.len()
}

fn check_row(query: &Query) {
    assert_eq!(query.train_ok, query.reason.is_none());
    assert!(query.kind == Kind::Feedback || !query.messages.is_empty());
    assert!(query.sample_weight.is_finite() && query.sample_weight > 0.0);
    assert!(query.duration_ms.is_none_or(f64::is_finite));
    assert!((100..=599).contains(&query.status));
    assert!(query.event_time_us.is_none_or(|t| (946_684_800_000_000..4_102_444_800_000_000).contains(&t)));
    let masked = query.messages.iter().any(|m| is_masked(&m.plain_text()));
    assert!(!masked || query.redacted, "a mask was overlooked");
}

/// Checks that under a tight bound the same items are rows, and small ones.
fn check_bound(payload: &[u8], rules: &Rules, whole: &[Outcome]) {
    let tight = Rules { max_text_bytes: TIGHT, ..rules.clone() };
    let cut = read(payload, &BTreeMap::new(), &tight);
    assert_eq!(cut.len(), whole.len());
    for (cut, whole) in cut.iter().zip(whole) {
        match (cut, whole) {
            (Outcome::Row(cut), Outcome::Row(whole)) => {
                assert!(cut == whole || cut.truncated && !cut.train_ok, "cut without a word");
                assert!(check_line(0, &Outcome::Row(cut.clone())) <= MAX_GROWTH * TIGHT + OWN_BYTES, "not cut");
            }
            (cut, whole) => assert_eq!(cut, whole),
        }
    }
}
