//! Nothing that a producer wrote is lost: what is in the fixtures, and what a later version may add to them.

use std::collections::BTreeSet;

use super::producer_tests::{BATCHES, CALLS};
use super::tests::FIXTURES;
use super::*;

/// All fixtures that are one document, by name.
fn documents() -> impl Iterator<Item = (String, Value)> {
    let numbered = FIXTURES.into_iter().enumerate().map(|(number, text)| (format!("fixture {number}"), text));
    let named = CALLS.into_iter().chain(BATCHES).map(|(name, text)| (name.to_owned(), text));
    let whole = |(name, text): (String, &str)| Some((name, serde_json::from_str(text).ok()?));
    numbered.chain(named).filter_map(whole).map(|(name, record)| (name, only_calls(record)))
}

/// Takes the spans out of a batch that are no calls: those are counted and not kept.
fn only_calls(mut record: Value) -> Value {
    let is_call = |span: &Value| {
        let batch = json!({"resourceSpans": [{"scopeSpans": [{"spans": [span]}]}]});
        matches!(read_value(&batch).as_slice(), [Outcome::Row(_)])
    };
    for resource in record.get_mut("resourceSpans").and_then(Value::as_array_mut).into_iter().flatten() {
        for scope in resource["scopeSpans"].as_array_mut().into_iter().flatten() {
            scope["spans"].as_array_mut().unwrap().retain(is_call);
        }
        resource["scopeSpans"].as_array_mut().unwrap().retain(|scope| scope["spans"] != json!([]));
    }
    record
}

fn read_value(record: &Value) -> Vec<Outcome> {
    read(record.to_string().as_bytes(), &BTreeMap::new(), &Rules::default())
}

/// Returns all that the rows of a record hold, as one document.
fn kept(record: &Value) -> Value {
    let line = |outcome: &Outcome| match outcome {
        Outcome::Row(query) => json!([canonical_json(0, outcome), query.user]),
        other => panic!("{other:?}"),
    };
    read_value(record).iter().map(line).collect()
}

/// Puts a field that nobody knows into the object of that number, objects in texts counted too. Counts down to it.
fn plant(value: &mut Value, left: &mut Option<usize>) {
    match value {
        Value::Object(map) => {
            if let Some(number) = left.filter(|_| is_open(map)) {
                *left = number.checked_sub(1);
                if left.is_none() {
                    map.insert("planted", "MARK".into());
                }
            }
            for (name, value) in map.iter_mut().filter(|(name, _)| !CLOSED.contains(&name.as_str())) {
                // A text that is an answer or an argument holds what a model wrote.
                if !matches!(name.as_str(), "arguments" | "output") || !value.is_string() {
                    plant(value, left);
                }
            }
        }
        Value::Array(items) => items.iter_mut().for_each(|item| plant(item, left)),
        Value::String(text) => match serde_json::from_str::<Value>(text) {
            Ok(mut inner @ (Value::Object(_) | Value::Array(_))) => {
                plant(&mut inner, left);
                *text = inner.to_string();
            }
            _ if text.contains("data: {") => *text = text.split('\n').map(|line| plant_event(line, left)).collect(),
            _ => {}
        },
        _ => {}
    }
}

/// Events of the Responses API say what comes again with the last.
fn plant_event(line: &str, left: &mut Option<usize>) -> String {
    let event = line.strip_prefix("data: ").and_then(|data| serde_json::from_str::<Value>(data).ok());
    let Some(mut event) = event else { return format!("{line}\n") };
    match event.get("type").and_then(Value::as_str) {
        Some("response.completed") => plant(&mut event["response"], left),
        Some(_) => {}
        None => plant(&mut event, left),
    }
    format!("data: {event}\n")
}

/// Who asked is not kept.
const CLOSED: [&str; 2] = ["consumer", "authenticated_entity"];

/// Returns false for the wrappers of OTLP, which have no fields but their own.
fn is_open(map: &Map) -> bool {
    let wrappers = ["resourceSpans", "scopeSpans", "spans", "resourceLogs", "scopeLogs", "logRecords"];
    let is_pair = map.len() == 2 && map.contains_key("key") && map.contains_key("value");
    let is_any = map.len() == 1 && map.keys().all(|name| name.ends_with("Value") || name == "values");
    !is_pair && !is_any && !wrappers.iter().any(|name| map.contains_key(name))
}

#[test]
fn a_field_that_nobody_knows_is_kept_wherever_it_stands() {
    let (mut places, mut losses) = (0, Vec::new());
    for (name, record) in documents() {
        for number in 0.. {
            let (mut planted, mut left) = (record.clone(), Some(number));
            plant(&mut planted, &mut left);
            if left.is_some() {
                break;
            }
            places += 1;
            if !kept(&planted).to_string().contains("MARK") {
                let at = planted.to_string();
                let from = at.find("MARK").unwrap().saturating_sub(120);
                losses.push(format!("{name}: {}", at[from..].chars().take(160).collect::<String>()));
            }
        }
    }
    assert!(losses.is_empty() && places > 300, "{} of {places}: {losses:#?}", losses.len());
}

/// Collects every leaf of a document, those of JSON texts in it too.
fn leaves(value: &Value, out: &mut BTreeSet<String>) {
    match value {
        // An attribute's name is its place.
        Value::Object(map) => map.iter().filter(|(name, _)| *name != "key").for_each(|(_, value)| leaves(value, out)),
        Value::Array(items) => items.iter().for_each(|value| leaves(value, out)),
        Value::String(text) => match serde_json::from_str::<Value>(text) {
            Ok(inner @ (Value::Object(_) | Value::Array(_))) => leaves(&inner, out),
            _ => drop(out.insert(text.clone())),
        },
        Value::Number(number) => drop(out.insert(number.as_f64().unwrap_or_default().to_string())),
        Value::Bool(_) | Value::Null => {}
    }
}

/// Collects the fields of a name, wherever they are.
fn times(value: &Value, key: &str, out: &mut BTreeSet<String>) {
    match value {
        Value::Object(map) => map.iter().for_each(|(name, value)| match value {
            Value::String(text) if name == key => drop(out.insert(text.clone())),
            value => times(value, key, out),
        }),
        Value::Array(items) => items.iter().for_each(|item| times(item, key, out)),
        _ => {}
    }
}

#[test]
fn nothing_that_a_producer_wrote_is_lost() {
    // Said by the columns in other words, or about people.
    let implied = [
        "chat.completion",
        "text_completion",
        "response",
        "assistant",
        "message",
        "completed",
        "output_text",
        "failure",
        "",
    ];
    let implied =
        implied.into_iter().chain(["input_text", "function_call", "function_call_output", "stop", "Miss", "success"]);
    let implied = implied.chain([
        "text",
        "tool_call",
        "tool_call_response",
        "gen_ai.choice",
        "gen_ai.system.message",
        "gen_ai.user.message",
    ]);
    let implied = implied.chain(["gen_ai.assistant.message", "gen_ai.tool.message"]);
    let implied: BTreeSet<&str> = implied.collect();
    let mut losses = Vec::new();
    // Streams are joined, and Envoy's headers become fields.
    let is_told_otherwise = |record: &Value| {
        let text = record.to_string();
        ["data: {", "http_buffered_trace", "chat.completion.chunk"].iter().any(|sign| text.contains(sign))
    };
    for (name, record) in documents().filter(|(_, record)| !is_told_otherwise(record)) {
        let (mut before, mut after) = (BTreeSet::new(), BTreeSet::new());
        leaves(&record, &mut before);
        leaves(&kept(&record), &mut after);
        let personal = |value: &Value, key: &str| {
            let mut found = BTreeSet::new();
            leaves(value.get(key).unwrap_or(&Value::Null), &mut found);
            found
        };
        for key in ["consumer", "authenticated_entity", "client_ip", "started_at", "start_time", "timestamp_ms"] {
            after.extend(personal(&record, key));
        }
        for key in ["startTimeUnixNano", "endTimeUnixNano", "timeUnixNano", "observedTimeUnixNano"] {
            times(&record, key, &mut after);
        }
        for key in ["request_time", "event_time", "timestamp", "startTime", "endTime", "metadata", "client_id"] {
            after.extend(personal(&record, key));
        }
        let lost: Vec<&String> = before.difference(&after).filter(|leaf| !implied.contains(leaf.as_str())).collect();
        let lost = lost.into_iter().filter(|leaf| *leaf != "REDACTED" && *leaf != "0");
        losses.extend(lost.map(|leaf| format!("{name}: {leaf}")));
    }
    assert!(losses.is_empty(), "{losses:#?}");
}
