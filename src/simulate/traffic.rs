//! The traffic of one night: what users ask, and what is planted in it.
//!
//! Records have the shape in which a proxy logs calls. Times are fixed: a night is a day of March 2026, so that nothing of a
//! simulation depends on when it runs.

use rand::SeedableRng;
use rand::seq::{IndexedRandom, SliceRandom};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::Rng;
use serde_json::{Value, json};

use super::words::{ANSWER_WORDS, BRAND, OPENINGS, TOPIC_AFTER, TOPIC_BEFORE};
use crate::record::derive_seed;

/// The workload of all calls.
pub(super) const WORKLOAD: &str = "desk";
/// Honest users: each asks a few times a day.
const USERS: usize = 150;
/// Words of a question after its opening, before and after the drift.
const QUESTION_WORDS: [usize; 2] = [9, 20];
/// Members of the poisoned group, and what each asks within one hour.
pub(super) const POISONERS: usize = 4;
pub(super) const POISONED_CALLS: usize = 40;
/// Calls that hold a secret.
pub(super) const LEAKS: usize = 12;

/// What users ask about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Topic {
    Before,
    After,
}

/// One night's records, and what was planted in them.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Traffic {
    pub records: Vec<Value>,
    /// Names of the poisoned group's users.
    pub poisoners: Vec<String>,
    /// The secrets that leaked, as they stand in the text.
    pub secrets: Vec<String>,
}

/// Returns the traffic of a night (from 1): `calls` honest calls on a topic and, where `planted`, the poisoned group and the
/// leaks among them.
pub(super) fn night(number: usize, calls: usize, topic: Topic, planted: bool, seed: u64) -> Traffic {
    let mut rng = ChaCha8Rng::seed_from_u64(derive_seed(seed, &["simulate", "traffic", &number.to_string()]));
    let mut records: Vec<Value> = (0..calls)
        .map(|_| {
            let user = format!("user-{:03}", below(USERS, &mut rng));
            let minute = below(12 * 60, &mut rng);
            call(number, minute, &user, &question(topic, &mut rng), &mut rng)
        })
        .collect();
    let (mut poisoners, mut secrets) = (Vec::new(), Vec::new());
    if planted {
        for member in 0..POISONERS {
            let user = format!("crowd-{member}");
            for _ in 0..POISONED_CALLS {
                let text = format!("{} always name {BRAND}", question(topic, &mut rng));
                let minute = 13 * 60 + below(60, &mut rng);
                records.push(call(number, minute, &user, &text, &mut rng));
            }
            poisoners.push(user);
        }
        for leak in 0..LEAKS {
            let secret = secret(leak, &mut rng);
            let text = format!("{} with key {secret}", question(topic, &mut rng));
            let user = format!("user-{:03}", below(USERS, &mut rng));
            records.push(call(number, 60 + leak, &user, &text, &mut rng));
            secrets.push(secret);
        }
    }
    records.shuffle(&mut rng);
    Traffic { records, poisoners, secrets }
}

fn question(topic: Topic, rng: &mut ChaCha8Rng) -> String {
    let (words, count) = match topic {
        Topic::Before => (&TOPIC_BEFORE, QUESTION_WORDS[0]),
        Topic::After => (&TOPIC_AFTER, QUESTION_WORDS[1]),
    };
    let opening = OPENINGS.choose(rng).copied().unwrap_or_default();
    let chosen: Vec<&str> = words.sample(rng, count).copied().collect();
    format!("{opening} {}", chosen.join(" "))
}

/// Returns a key as one of two issuers makes them.
fn secret(leak: usize, rng: &mut ChaCha8Rng) -> String {
    let mut draw = |alphabet: &[u8], n: usize| -> String {
        (0..n).map(|_| char::from(alphabet[below(alphabet.len(), rng)])).collect()
    };
    match leak % 2 {
        0 => format!("AKIA{}", draw(b"ABCDEFGHIJKLMNOPQRSTUVWXYZ234567", 16)),
        _ => format!("ghp_{}", draw(b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789", 36)),
    }
}

/// Returns the record of one call at a minute of the night's day, with an answer as the model gives them.
fn call(number: usize, minute: usize, user: &str, text: &str, rng: &mut ChaCha8Rng) -> Value {
    let words: Vec<&str> = (0..6 + below(6, rng)).filter_map(|_| ANSWER_WORDS.choose(rng).copied()).collect();
    let id = format!("call-{:016x}", rng.next_u64());
    json!({
        "timestamp": format!("2026-03-{number:02}T{:02}:{:02}:00Z", 6 + minute / 60, minute % 60),
        "request": {
            "model": "production", "messages": [{ "role": "user", "content": text }], "user": user,
            "metadata": { "workload": WORKLOAD },
        },
        "response": {
            "id": id, "object": "chat.completion", "model": "production",
            "choices": [{
                "index": 0, "finish_reason": "stop", "message": { "role": "assistant", "content": words.join(" ") },
            }],
        },
    })
}

fn below(n: usize, rng: &mut ChaCha8Rng) -> usize {
    (rng.next_u64() % n as u64) as usize
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn a_night_is_a_function_of_the_seed_and_holds_what_was_planted() {
        let of = |seed| night(1, 300, Topic::Before, true, seed);
        let traffic = of(7);
        assert_eq!(traffic, of(7));
        assert_ne!(traffic.records, of(8).records);
        assert_eq!(traffic.records.len(), 300 + POISONERS * POISONED_CALLS + LEAKS);
        let texts: Vec<String> =
            traffic.records.iter().map(|r| r["request"]["messages"][0]["content"].to_string()).collect();
        assert_eq!(texts.iter().collect::<BTreeSet<_>>().len(), texts.len(), "no question comes twice");
        assert_eq!(texts.iter().filter(|text| text.contains(BRAND)).count(), POISONERS * POISONED_CALLS);
        assert!(traffic.secrets.iter().all(|secret| texts.iter().any(|text| text.contains(secret.as_str()))));
        let plain = night(2, 300, Topic::After, false, 7);
        assert_eq!((plain.records.len(), plain.poisoners.len(), plain.secrets.len()), (300, 0, 0));
    }
}
