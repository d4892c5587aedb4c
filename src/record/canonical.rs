//! RFC 8785 JSON, written straight into a buffer.
//!
//! Every logged call is hashed and stored in this form, so that it is made for each row. The general implementation
//! sorts the members of an object after it has written them, each into a buffer of its own; a [`Value`] is at hand here,
//! and its keys can be sorted first. Only numbers that need JavaScript's rules for floats go the general way.

use std::cmp::Ordering;

use serde::Serialize;

use super::Message;
use crate::json::{Map, Value};

/// Integers up to here are written by JavaScript, too, digit by digit.
const EXACT: u64 = 1 << 53;

/// Returns the canonical JSON of messages.
pub fn canonical_messages(messages: &[Message]) -> String {
    let mut out = Vec::with_capacity(256);
    list(&mut out, messages, message);
    text_of(out)
}

/// Returns the canonical JSON of a value.
pub(super) fn canonical(json: &Value) -> String {
    let mut out = Vec::new();
    value(&mut out, json);
    text_of(out)
}

fn text_of(out: Vec<u8>) -> String {
    // Everything written is UTF-8: texts, and what serialisers make of values.
    String::from_utf8(out).unwrap_or_else(|e| String::from_utf8_lossy(e.as_bytes()).into_owned())
}

fn value(out: &mut Vec<u8>, json: &Value) {
    match json {
        Value::Array(items) => list(out, items, value),
        Value::Object(map) => object(out, members(map)),
        Value::Number(number) if number.as_i64().is_none_or(|n| n.unsigned_abs() > EXACT) => {
            // Without arbitrary precision every number is an f64's, and none is refused.
            let text = serde_json_canonicalizer::to_vec(number).unwrap_or_else(|_| number.to_string().into_bytes());
            out.extend(text);
        }
        plain => scalar(out, plain),
    }
}

/// Writes a message: its role and content are members like any other.
fn message(out: &mut Vec<u8>, message: &Message) {
    if message.rest.is_empty() {
        out.extend(br#"{"content":"#);
        value(out, &message.content);
        out.extend(br#","role":"#);
        scalar(out, &message.role);
        out.push(b'}');
        return;
    }
    let role = Value::String(message.role.clone());
    let mut members = members(&message.rest);
    for (name, own) in [("role", &role), ("content", &message.content)] {
        // What a format could not read as a role stays in the rest, and stands.
        if !message.rest.contains_key(name) {
            members.push((name, own));
        }
    }
    object(out, members);
}

fn members(map: &Map) -> Vec<(&str, &Value)> {
    map.iter().map(|(name, value)| (name.as_str(), value)).collect()
}

fn object(out: &mut Vec<u8>, mut members: Vec<(&str, &Value)>) {
    members.sort_unstable_by(|(a, _), (b, _)| in_utf16(a, b));
    out.push(b'{');
    for (index, (name, member)) in members.into_iter().enumerate() {
        if index > 0 {
            out.push(b',');
        }
        scalar(out, name);
        out.push(b':');
        value(out, member);
    }
    out.push(b'}');
}

fn list<T>(out: &mut Vec<u8>, items: &[T], write: impl Fn(&mut Vec<u8>, &T)) {
    out.push(b'[');
    for (index, item) in items.iter().enumerate() {
        if index > 0 {
            out.push(b',');
        }
        write(out, item);
    }
    out.push(b']');
}

/// Names sort by UTF-16 code units, which for ASCII are the bytes.
fn in_utf16(a: &str, b: &str) -> Ordering {
    if a.is_ascii() && b.is_ascii() { a.cmp(b) } else { a.encode_utf16().cmp(b.encode_utf16()) }
}

/// Writes what both kinds of JSON write alike.
fn scalar<T: Serialize + ?Sized>(out: &mut Vec<u8>, scalar: &T) {
    // Neither writing into memory nor a text, a truth or an integer can fail.
    serde_json::to_writer(out, scalar).ok();
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::json::json;

    #[test]
    fn it_is_what_the_general_implementation_writes() {
        let rare = "\u{0}\u{1f}\u{7f}\"\\/\u{8}\u{c}\n\r\t ä€\u{fb33}\u{1f600}";
        let odd = json!({
            rare: [null, true, false, 0, -1, 1.5, 1e21, 1e-7, -0.0, 4.50, 9007199254740992i64, 9007199254740993i64,
                i64::MIN, u64::MAX, 1e300],
            "\u{fb33}": 1, "\u{1f600}": 2, "b": {"z": [], "a": {}, "B": ""}, "a": rare, "": 0, "role": 1
        });
        assert_eq!(canonical(&odd), serde_json_canonicalizer::to_string(&odd).unwrap());
        let mut rest = odd.as_object().unwrap().clone();
        rest.shift_remove("role");
        let messages = [
            Message::text("user", rare),
            Message { role: rare.into(), content: Value::Null, rest: Map::new() },
            Message { role: "tool".into(), content: odd, rest },
        ];
        assert_eq!(canonical_messages(&messages), serde_json_canonicalizer::to_string(&messages).unwrap());
    }
}
