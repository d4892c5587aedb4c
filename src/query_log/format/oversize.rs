//! Rows that are too large: kept up to a bound, marked as truncated, with their full size on record.
//!
//! A broker takes records of many megabytes, and a prompt of that size is a document that was pasted by mistake or a file
//! in base64. Such a call is kept as far as the bound goes, so that it is counted and can be found by its ids, and does
//! not train. Its messages come first, then the answer; `extra` is cut before anything else is.

use crate::json::{Map, Value};
use crate::record::{Message, Query};

use super::exclusion::{self, Exclusion};

/// The field of `extra` that holds the full size of a row that was cut, in bytes of text.
pub const FULL_BYTES: &str = "full_bytes";

/// What a value that is no text counts for.
const FLAT: usize = 8;

/// Cuts a row that holds more than `limit` bytes of text and marks it.
pub(super) fn cut(query: &mut Query, limit: usize) {
    let full = size(query);
    if full <= limit {
        return;
    }
    let mut left = limit;
    columns(query).into_iter().flatten().for_each(|text| cut_text(text, &mut left));
    cut_messages(&mut query.messages, &mut left);
    query.response.iter_mut().for_each(|text| cut_text(text, &mut left));
    query.tools.iter_mut().chain(&mut query.feedback).for_each(|value| cut_value(value, &mut left));
    cut_map(&mut query.params, &mut left);
    cut_map(&mut query.extra, &mut left);
    query.extra.insert(FULL_BYTES.to_owned(), full.into());
    query.truncated = true;
    exclusion::add(query, Exclusion::Truncated);
}

/// Returns the short texts of a row. Each is a name or an id, which need not be short where the record is odd.
fn columns(query: &mut Query) -> [Option<&mut String>; 8] {
    [
        query.request_id.as_mut(),
        query.trace_id.as_mut(),
        query.conversation_id.as_mut(),
        query.workload.as_mut(),
        query.tenant.as_mut(),
        query.model.as_mut(),
        query.served_version.as_mut(),
        query.finish_reason.as_mut(),
    ]
}

/// Returns how much text a row holds, in bytes.
fn size(query: &Query) -> usize {
    let short = [
        &query.request_id,
        &query.trace_id,
        &query.conversation_id,
        &query.workload,
        &query.tenant,
        &query.model,
        &query.served_version,
        &query.finish_reason,
        &query.response,
    ];
    let short: usize = short.into_iter().flatten().map(String::len).sum();
    let messages = query.messages.iter().map(|m| m.role.len() + size_of(&m.content) + size_of_map(&m.rest));
    let values = query.tools.iter().chain(&query.feedback).map(size_of);
    short + messages.chain(values).sum::<usize>() + size_of_map(&query.params) + size_of_map(&query.extra)
}

fn size_of(value: &Value) -> usize {
    match value {
        Value::String(text) => text.len(),
        Value::Array(items) => items.iter().map(|item| size_of(item) + FLAT).sum(),
        Value::Object(map) => size_of_map(map),
        _ => FLAT,
    }
}

fn size_of_map(map: &Map) -> usize {
    map.iter().map(|(name, value)| name.len() + size_of(value) + FLAT).sum()
}

/// Takes `bytes` from what is left; false where they do not fit.
fn take(bytes: usize, left: &mut usize) -> bool {
    let fits = bytes <= *left;
    *left = left.saturating_sub(bytes);
    fits
}

fn cut_text(text: &mut String, left: &mut usize) {
    let whole = text.len() <= *left;
    text.truncate(text.floor_char_boundary(*left));
    *left = if whole { *left - text.len() } else { 0 };
}

/// Cuts messages; the first always stays, so that a call is one.
fn cut_messages(messages: &mut Vec<Message>, left: &mut usize) {
    let mut kept = 0;
    for message in messages.iter_mut() {
        if kept > 0 && *left == 0 {
            break;
        }
        cut_text(&mut message.role, left);
        cut_value(&mut message.content, left);
        cut_map(&mut message.rest, left);
        kept += 1;
    }
    messages.truncate(kept);
}

fn cut_value(value: &mut Value, left: &mut usize) {
    match value {
        Value::String(text) => cut_text(text, left),
        Value::Array(items) => {
            let mut kept = 0;
            for item in items.iter_mut() {
                if !take(FLAT, left) {
                    break;
                }
                cut_value(item, left);
                kept += 1;
            }
            items.truncate(kept);
        }
        Value::Object(map) => cut_map(map, left),
        _ => *left = left.saturating_sub(FLAT),
    }
}

fn cut_map(map: &mut Map, left: &mut usize) {
    map.retain(|name, value| {
        let fits = take(name.len() + FLAT, left);
        if fits {
            cut_value(value, left);
        }
        fits
    });
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use crate::json::json;

    use super::super::{Outcome, Rules, canonical_json, read};
    use super::*;

    /// Reads a record that is one row, under a bound.
    fn row(record: &Value, max_text_bytes: usize) -> Query {
        let rules = Rules { max_text_bytes, ..Rules::default() };
        match read(record.to_string().as_bytes(), &BTreeMap::new(), &rules).as_slice() {
            [Outcome::Row(query)] => query.as_ref().clone(),
            other => panic!("{other:?}"),
        }
    }

    fn call(prompt: &str, answer: &str, more: Value) -> Value {
        let messages = json!([{"role": "system", "content": "Be brief."}, {"role": "user", "content": prompt},
            {"role": "user", "content": [{"type": "text", "text": "Why?"}]}]);
        json!({"request_id": "r-1", "request": {"messages": messages}, "response": answer, "more": more})
    }

    #[test]
    fn a_row_within_the_bound_is_left_alone() {
        let record = call("Hi", "Ho", json!([1, null, {"a": "b"}]));
        let whole = row(&record, usize::MAX);
        assert_eq!(row(&record, size(&whole)), whole);
        assert!(whole.train_ok && !whole.truncated);
        let cut = row(&record, size(&whole) - 1);
        assert_eq!((cut.truncated, cut.reason.as_deref()), (true, Some("truncated")));
        assert_eq!((&cut.messages, &cut.response), (&whole.messages, &whole.response), "extra is cut first");
        assert_eq!(cut.extra[FULL_BYTES], size(&whole));
    }

    #[test]
    fn a_row_past_the_bound_keeps_that_much_and_says_how_large_it_was() {
        let (prompt, answer) = ("é".repeat(10_000), "a".repeat(5_000));
        let record = call(&prompt, &answer, json!({"list": vec![7; 9_000], "k".repeat(4_000): 1}));
        let full = size(&row(&record, usize::MAX));
        for limit in [0, 1, 20, 100, 1_001, 15_000, 20_050, 26_000, 60_000, full - 1] {
            let cut = row(&record, limit);
            // The note on the size, and a last number that only began within the bound.
            let note = FULL_BYTES.len() + 3 * FLAT;
            assert!(size(&cut) <= limit + note, "{limit}: {}", size(&cut));
            assert!(size(&cut) + 5_000 > limit, "{limit}: only {} are kept", size(&cut));
            assert_eq!((cut.truncated, cut.train_ok, cut.extra[FULL_BYTES].as_u64()), (true, false, Some(full as u64)));
            assert!(!cut.messages.is_empty());
            let line = canonical_json(0, &Outcome::Row(Box::new(cut))).to_string();
            assert!(serde_json::from_str::<Value>(&line).is_ok());
        }
        let cut = row(&record, 1_001);
        assert_eq!((cut.request_id.as_deref(), cut.messages.len()), (Some("r-1"), 2));
        assert!(prompt.starts_with(cut.messages[1].content.as_str().unwrap()), "whole characters only");
        assert_eq!(cut.response.as_deref(), Some(""));
    }

    #[test]
    fn a_stronger_reason_and_the_kind_of_feedback_stay() {
        let mut record = call(&"x".repeat(500), "", json!({}));
        record["cache_hit"] = true.into();
        assert_eq!(row(&record, 100).reason.as_deref(), Some("cached"));
        let feedback = row(&json!({"request_id": "r-1", "feedback": {"comment": "x".repeat(500)}}), 100);
        assert_eq!((feedback.truncated, feedback.reason.as_deref()), (true, Some("feedback")));
        assert_eq!(feedback.extra[FULL_BYTES], 500 + 3 + "comment".len() + FLAT);
    }
}
