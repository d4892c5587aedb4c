//! Late feedback joins its call: thumbs, ratings and corrections that came after the answer, as records of their own.
//!
//! Ingestion keeps no state, so feedback is a row of its own until a dataset is frozen. Here it finds its call: by the
//! call's id, else by its trace, else by its conversation, where it means the last call before it. A dataset is frozen
//! again every night, so feedback that is a week late still reaches its prompt. Where it rates the answer, and the prompt
//! trains, the answer comes with it: the scorer `feedback` learns from the two.

use std::collections::{HashMap, HashSet};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::census::Row;
use super::text::hash;
use crate::record::Coordinates;

/// Most feedback that a prompt carries; the newest counts.
const MAX_PER_PROMPT: usize = 32;

/// What someone said of an answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Feedback {
    pub event_time_us: i64,
    /// As it was logged.
    pub value: Value,
    /// The answer that it rates, for prompts that train.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub response: Option<String>,
}

/// A row with feedback: a record of its own, or a call with something beside it.
#[derive(Debug, Clone)]
pub(super) struct Said {
    names: Names,
    /// True where it stands beside its call.
    is_beside: bool,
    said: Feedback,
}

/// The ids that tie feedback to a call, as hashes.
#[derive(Debug, Clone, Copy)]
struct Names {
    request: Option<u64>,
    trace: Option<u64>,
    conversation: Option<u64>,
    tenant: Option<u64>,
    /// Topic, partition, offset and index.
    place: (u64, i32, i64, i32),
}

/// A call that feedback may mean.
#[derive(Debug, Clone)]
pub(super) struct Call {
    names: Names,
    topic: String,
    event_time_us: i64,
    /// Its prompt, where the call may be used.
    entry: Option<u32>,
}

/// Feedback, and the calls that it may be on.
#[derive(Debug, Default)]
pub(super) struct Joined {
    said: Vec<Said>,
    wanted: HashSet<u64>,
    places: HashSet<(u64, i32, i64, i32)>,
    calls: Vec<Call>,
}

/// What became of the feedback.
#[derive(Debug, Default)]
pub(super) struct Found {
    /// By the entry of the prompt, each with the place of the call that it is on.
    pub(super) by_prompt: HashMap<u32, Vec<(Feedback, Coordinates)>>,
    /// Records of feedback that found a call, and those that did not.
    pub(super) matched: u64,
    pub(super) unmatched: u64,
}

impl Names {
    fn of(row: &Row<'_>) -> Self {
        Names {
            request: row.request_id.map(hash),
            trace: row.trace_id.map(hash),
            conversation: row.conversation_id.map(hash),
            tenant: row.tenant.map(hash),
            place: (hash(row.topic), row.partition, row.offset, row.record_index),
        }
    }

    fn ids(&self) -> impl Iterator<Item = u64> {
        [self.request, self.trace, self.conversation].into_iter().flatten()
    }
}

impl Said {
    /// Reads a row's feedback, given as the text of the column.
    pub(super) fn of(row: &Row<'_>, text: &str) -> Self {
        let value = serde_json::from_str(text).unwrap_or_else(|_| text.into());
        let said = Feedback { event_time_us: row.event_time_us, value, response: None };
        Said { names: Names::of(row), is_beside: row.kind == crate::record::Kind::Call, said }
    }
}

impl Call {
    pub(super) fn of(row: &Row<'_>, entry: Option<u32>) -> Self {
        Call { names: Names::of(row), topic: row.topic.to_owned(), event_time_us: row.event_time_us, entry }
    }

    fn place(&self) -> Coordinates {
        let (_, partition, offset, record_index) = self.names.place;
        Coordinates { topic: self.topic.clone(), partition, offset, record_index }
    }
}

impl Joined {
    /// Takes all feedback; then the calls are asked for.
    pub(super) fn new(said: Vec<Said>) -> Self {
        let late = said.iter().filter(|said| !said.is_beside);
        let wanted = late.flat_map(|said| said.names.ids()).collect();
        let places = said.iter().filter(|said| said.is_beside).map(|said| said.names.place).collect();
        Joined { said, wanted, places, calls: Vec::new() }
    }

    /// Returns true where a call may be one that feedback means. Most logs have little feedback: nearly all calls are not.
    pub(super) fn asks_for(&self, row: &Row<'_>) -> bool {
        if self.said.is_empty() {
            return false;
        }
        let names = Names::of(row);
        names.ids().any(|id| self.wanted.contains(&id)) || self.places.contains(&names.place)
    }

    pub(super) fn add(&mut self, call: Call) {
        self.calls.push(call);
    }

    /// Joins what was said to the calls, whatever order they came in.
    pub(super) fn finish(mut self) -> Found {
        self.calls.sort_by_key(|call| call.names.place);
        self.said.sort_by_key(|said| said.names.place);
        let calls = Calls::of(&self.calls);
        let mut found = Found::default();
        for Said { names, is_beside, said } in self.said {
            let call = if is_beside { calls.by_place.get(&names.place).copied() } else { calls.meant(&names, &said) };
            match call {
                Some(_) if is_beside => {}
                Some(_) => found.matched += 1,
                None if is_beside => {}
                None => found.unmatched += 1,
            }
            if let Some((call, entry)) = call.and_then(|call| Some((call, call.entry?))) {
                found.by_prompt.entry(entry).or_default().push((said, call.place()));
            }
        }
        found
    }
}

impl Feedback {
    /// Returns how good it finds the answer, from 0 to 1; nothing where it does not say, or on a scale that it does not name.
    pub fn rating(&self) -> Option<f64> {
        rating(&self.value)
    }
}

/// Fields that hold a rating, in the order in which they are asked.
const RATINGS: [&str; 12] = [
    "thumb",
    "thumbs",
    "vote",
    "rating",
    "score",
    "like",
    "liked",
    "helpful",
    "sentiment",
    "stars",
    "feedback",
    "value",
];

/// Fields that name the top of a scale beside its rating.
const TOPS: [&str; 4] = ["max", "scale", "out_of", "best"];

fn rating(value: &Value) -> Option<f64> {
    match value {
        Value::Bool(is_good) => Some(if *is_good { 1.0 } else { 0.0 }),
        Value::Number(number) => match number.as_f64()? {
            -1.0 => Some(0.0),
            share if (0.0..=1.0).contains(&share) => Some(share),
            // Four of what?
            _ => None,
        },
        Value::String(word) => match word.trim().to_lowercase().as_str() {
            "up" | "thumbs_up" | "thumb_up" | "thumbsup" | "👍" | "like" | "liked" | "good" | "positive" | "yes" => {
                Some(1.0)
            }
            "down" | "thumbs_down" | "thumb_down" | "thumbsdown" | "👎" | "dislike" | "disliked" | "bad"
            | "negative" | "no" => Some(0.0),
            _ => None,
        },
        Value::Object(fields) => {
            let found = RATINGS.iter().find_map(|name| fields.get(*name))?;
            let top = TOPS.iter().find_map(|name| fields.get(*name)?.as_f64());
            match (found.as_f64(), top) {
                // Stars are counted from one.
                (Some(stars), Some(top)) if top > 1.0 => {
                    Some((stars - 1.0) / (top - 1.0)).filter(|r| (0.0..=1.0).contains(r))
                }
                _ => rating(found),
            }
        }
        _ => None,
    }
}

/// Returns the newest feedback on a prompt, the oldest of it first.
pub(super) fn newest(mut feedback: Vec<(Feedback, Coordinates)>) -> Vec<(Feedback, Coordinates)> {
    feedback.sort_by_key(|(feedback, _)| feedback.event_time_us);
    feedback.split_off(feedback.len().saturating_sub(MAX_PER_PROMPT))
}

/// Calls by what feedback may name.
struct Calls<'a> {
    by_request: HashMap<u64, Vec<&'a Call>>,
    by_trace: HashMap<u64, Vec<&'a Call>>,
    by_conversation: HashMap<u64, Vec<&'a Call>>,
    by_place: HashMap<(u64, i32, i64, i32), &'a Call>,
}

impl<'a> Calls<'a> {
    fn of(calls: &'a [Call]) -> Self {
        let by = |key: fn(&Names) -> Option<u64>| {
            let mut found: HashMap<u64, Vec<&Call>> = HashMap::new();
            for call in calls {
                if let Some(key) = key(&call.names) {
                    found.entry(key).or_default().push(call);
                }
            }
            found
        };
        Calls {
            by_request: by(|names| names.request),
            by_trace: by(|names| names.trace),
            by_conversation: by(|names| names.conversation),
            by_place: calls.iter().map(|call| (call.names.place, call)).collect(),
        }
    }

    /// Returns the call that feedback means. Ids of two tenants never meet.
    fn meant(&self, names: &Names, said: &Feedback) -> Option<&'a Call> {
        let named = [
            (&self.by_request, names.request),
            (&self.by_trace, names.trace),
            (&self.by_conversation, names.conversation),
        ];
        let same_tenant = |call: &Call| match (call.names.tenant, names.tenant) {
            (Some(ours), Some(theirs)) => ours == theirs,
            _ => true,
        };
        // Clocks differ: where no call is older than its feedback, any may be meant.
        let order = |call: &Call| (call.event_time_us <= said.event_time_us, call.event_time_us);
        named.into_iter().find_map(|(calls, id)| {
            let calls = calls.get(&id?)?.iter().copied().filter(|call| same_tenant(call));
            calls.max_by_key(|call| order(call))
        })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_rating_is_read_where_its_scale_is_plain() {
        for (value, expected) in [
            (json!({ "thumb": "up", "comment": "down the road" }), Some(1.0)),
            (json!({ "thumb": "down" }), Some(0.0)),
            (json!("👎"), Some(0.0)),
            (json!(true), Some(1.0)),
            (json!(-1), Some(0.0)),
            (json!(0.25), Some(0.25)),
            (json!({ "rating": 4, "max": 5 }), Some(0.75)),
            (json!({ "stars": 1, "out_of": 5 }), Some(0.0)),
            (json!({ "rating": 9, "max": 5 }), None),
            (json!({ "rating": 4 }), None),
            (json!({ "value": { "liked": false } }), Some(0.0)),
            (json!({ "correction": "It is Paris." }), None),
            (json!("so so"), None),
            (json!(null), None),
        ] {
            assert_eq!(rating(&value), expected, "{value}");
        }
    }
}
