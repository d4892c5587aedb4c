//! Seeded mutations of the fixtures: whatever the bytes, every record ends as rows, dead letters or skips.

use super::producer_tests::{BATCHES, CALLS};
use super::tests::FIXTURES;
use super::{Rules, invariants};
use crate::record::derive_seed;

/// A stream of numbers that depends on its seed alone.
struct Dice(u64);

impl Dice {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 33) as usize) % n.max(1)
    }
}

/// Pieces that have broken parsers before.
const PIECES: [&[u8]; 16] = [
    b"\"",
    b"{",
    b"}",
    b"[",
    b"]",
    b"\n",
    b"\\u0000",
    b"\\ud800",
    b"1e999",
    b"-0",
    b"null",
    b"\xff\xfe",
    b"data: ",
    b"redacted-by-litellm",
    b"99999999999999999999",
    b"true",
];

fn mutate(bytes: &mut Vec<u8>, dice: &mut Dice) {
    let at = dice.below(bytes.len() + 1);
    match dice.below(7) {
        0 if at < bytes.len() => bytes[at] ^= 1 << dice.below(8),
        1 => bytes.truncate(at),
        2 => {
            let piece = PIECES[dice.below(PIECES.len())];
            bytes.splice(at..at, piece.iter().copied());
        }
        3 => {
            let end = (at + dice.below(40)).min(bytes.len());
            bytes.drain(at..end);
        }
        4 => {
            let end = (at + dice.below(80)).min(bytes.len());
            let copy = bytes[at..end].to_vec();
            bytes.splice(at..at, copy);
        }
        5 => swap_value(bytes, dice),
        _ => bytes.splice(at..at, vec![b'['; dice.below(200)]).for_each(drop),
    }
}

/// Puts another kind of value behind one of the colons, so that the JSON mostly stays whole.
fn swap_value(bytes: &mut Vec<u8>, dice: &mut Dice) {
    let colons: Vec<usize> = (0..bytes.len()).filter(|&i| bytes[i] == b':').collect();
    if colons.is_empty() {
        return;
    }
    let at = colons[dice.below(colons.len())] + 1;
    let end = (at..bytes.len()).find(|&i| matches!(bytes[i], b',' | b'}')).unwrap_or(bytes.len());
    let values: [&[u8]; 8] =
        [b"null", b"[]", b"{}", b"-1", b"\"x\"", b"1e300", b"[{\"index\":-5}]", b"\"data: {\\\"choices\\\":[{}]}\""];
    bytes.splice(at..end, values[dice.below(values.len())].iter().copied());
}

fn check(payload: &[u8]) {
    invariants::check(payload, &Rules::default());
}

#[test]
fn no_bytes_break_the_readers() {
    let texts = FIXTURES.into_iter().chain(CALLS.into_iter().chain(BATCHES).map(|(_, text)| text));
    let spans: &[u8] = include_bytes!("../../../tests/fixtures/logs/otlp_spans.pb");
    for (number, fixture) in texts.map(str::as_bytes).chain([spans]).enumerate() {
        let mut dice = Dice(derive_seed(1, &[&number.to_string()]));
        for _ in 0..1000 {
            let mut bytes = fixture.to_vec();
            for _ in 0..=dice.below(5) {
                mutate(&mut bytes, &mut dice);
            }
            check(&bytes);
        }
    }
}

#[test]
fn noise_ends_as_something() {
    let mut dice = Dice(7);
    for length in 0..2000 {
        let bytes: Vec<u8> = (0..length % 97).map(|_| dice.below(256) as u8).collect();
        check(&bytes);
    }
}
