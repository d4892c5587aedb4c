//! OpenTelemetry traces and logs, as a collector's Kafka exporter writes them: JSON or protobuf, many spans a record.
//!
//! A span or event of a model call becomes a row; feedback on one (`gen_ai.evaluation.result`) becomes a feedback row;
//! everything else in a trace is skipped and counted. A call without content is skipped too, under a reason of its own:
//! instrumentations leave content out unless they are told otherwise, and many write it on the event beside the span.

mod content;
mod proto;
mod wire;

use std::collections::BTreeMap;

use crate::json::{Map, Value, json};
use crate::record::{Kind, Message, Query};

use super::chat::http_status;
use super::exclusion::{self, Exclusion};
use super::fields::{Fields, Headers, time};
use super::{Outcome, Reason, Refusal, feedback, parse, shape, too_many_values};
use content::Content;
use wire::{Entry, Event};

/// Operations that are a chat; a text completion has its prompt as one user turn.
const CHATS: [&str; 4] = ["chat", "text_completion", "generate_content", "completion"];

/// The event that carries a whole call.
const DETAILS: &str = "gen_ai.client.inference.operation.details";

/// Decoding parameters: attribute and the name they have in a request.
const PARAMS: [(&str, &str); 10] = [
    ("gen_ai.request.temperature", "temperature"),
    ("gen_ai.request.top_p", "top_p"),
    ("gen_ai.request.top_k", "top_k"),
    ("gen_ai.request.max_tokens", "max_tokens"),
    ("gen_ai.request.seed", "seed"),
    ("gen_ai.request.stop_sequences", "stop"),
    ("gen_ai.request.presence_penalty", "presence_penalty"),
    ("gen_ai.request.frequency_penalty", "frequency_penalty"),
    ("gen_ai.request.choice.count", "n"),
    ("gen_ai.request.stream", "stream"),
];

/// Where the end user is, the most telling first.
const USERS: [&str; 5] =
    ["user.id", "enduser.id", "llm.user", "gen_ai.openai.request.user", "traceloop.association.properties.user_id"];

/// Attributes that are dropped: credentials, and addresses and names of people.
const PERSONAL: [&str; 15] = [
    "http.request.header.authorization",
    "http.request.header.cookie",
    "http.request.header.x-api-key",
    "client.address",
    "net.peer.ip",
    "net.sock.peer.addr",
    "user.email",
    "user.full_name",
    "user.name",
    "user.hash",
    "user.id",
    "enduser.id",
    "llm.user",
    "gen_ai.openai.request.user",
    "traceloop.association.properties.user_id",
];

/// Returns true where an object is a batch of spans or logs.
pub(super) fn is_batch(fields: &Map) -> bool {
    wire::is_batch(fields)
}

/// Reads a JSON batch.
pub(super) fn read(batch: Map, headers: &BTreeMap<String, String>) -> Vec<Outcome> {
    outcomes(wire::from_json(batch), headers)
}

/// Reads a protobuf batch; `None` where the bytes are none.
pub(super) fn read_protobuf(bytes: &[u8], headers: &BTreeMap<String, String>) -> Option<Vec<Outcome>> {
    // Field 1, a message: how every batch begins. JSON after a line break begins so too, and is no such message.
    if bytes.first() != Some(&0x0A) {
        return None;
    }
    if shape::is_protobuf_bomb(bytes) {
        return Some(vec![too_many_values().into()]);
    }
    wire::from_protobuf(bytes).map(|entries| outcomes(entries, headers))
}

fn outcomes(entries: Vec<Entry>, headers: &BTreeMap<String, String>) -> Vec<Outcome> {
    if entries.is_empty() {
        return vec![Outcome::Skip { reason: Reason::Empty }];
    }
    let headers = Headers::new(headers, None);
    let entries = joined(entries);
    entries.into_iter().map(|entry| outcome(entry, &headers).unwrap_or_else(Outcome::from)).collect()
}

fn outcome(mut entry: Entry, headers: &Headers<'_>) -> Result<Outcome, Refusal> {
    let mut attributes = Fields::new(std::mem::take(&mut entry.attributes));
    let name = attributes.text(&["event.name"]).filter(|_| entry.is_log && entry.name.is_empty());
    if let Some(name) = name {
        entry.name = name;
    }
    if entry.is_log && entry.name == "gen_ai.evaluation.result" {
        return evaluation(entry, attributes).map(|query| Outcome::Row(Box::new(query)));
    }
    if !is_call(&entry, &attributes) {
        return Err(Refusal::skip(Reason::NotChat));
    }
    // Of an event some write the fields into its body.
    if entry.is_log
        && let Value::Object(body) = &mut entry.body
    {
        for (name, value) in body.iter_mut().filter(|(name, _)| name.starts_with("gen_ai.")) {
            if !attributes.has(name) {
                attributes.put_rest(name, value.take());
            }
        }
        body.retain(|_, value| !value.is_null());
    }
    let is_cut = content::is_cut(&entry, &attributes);
    let content = Content { is_cut, ..content::take(&mut entry, &mut attributes) };
    if content.messages.is_empty() {
        return Err(match content.answer {
            Some(_) => Refusal::dead(
                Reason::MissingMessages,
                "the span holds an answer and no prompt: capture input messages too, in the same batch",
            ),
            None => Refusal::skip(Reason::NoContent),
        });
    }
    Ok(Outcome::Row(Box::new(call(entry, attributes, content, headers))))
}

/// Returns true where an entry is a call of a chat model.
fn is_call(entry: &Entry, attributes: &Fields) -> bool {
    let says = |name: &str| attributes.get(name).and_then(Value::as_str);
    if entry.is_log {
        return entry.name == DETAILS;
    }
    if let Some(operation) = says("gen_ai.operation.name").or_else(|| says("llm.request.type")) {
        return CHATS.contains(&operation);
    }
    says("openinference.span.kind").is_some_and(|kind| kind == "LLM")
        || ["gen_ai.input.messages", "gen_ai.prompt", "gen_ai.prompt.0.role", "gen_ai.prompt.0.content"]
            .iter()
            .any(|n| attributes.has(n))
        || entry.events.iter().any(|event| event.name == "gen_ai.content.prompt")
}

fn call(mut entry: Entry, mut attributes: Fields, content: Content, headers: &Headers<'_>) -> Query {
    let mut query = feedback::blank(Kind::Call, "otlp");
    let mut resource = Fields::new(entry.resource.for_row());
    let mut found = Vec::new();
    query.event_time_us = entry.start_ns.and_then(|ns| time(&ns.into()));
    let duration = entry.start_ns.zip(entry.end_ns).map(|(start, end)| (end as f64 - start as f64) / 1e6);
    query.duration_ms = duration.filter(|ms| *ms >= 0.0);
    let response_id = attributes.text(&["gen_ai.response.id"]);
    query.request_id = response_id.or_else(|| not_empty(&std::mem::take(&mut entry.span_id)));
    query.trace_id = not_empty(&entry.trace_id);
    query.conversation_id =
        attributes.text(&["gen_ai.conversation.id", "session.id", "traceloop.association.properties.session_id"]);
    query.workload = headers.get("x-workload").map(str::to_owned).or_else(|| workload(&mut attributes, &mut resource));
    query.tenant = attributes.text(&["tenant.id", "tenant"]).or_else(|| resource.text(&["tenant.id", "tenant"]));
    query.user = attributes.text(&USERS);
    query.model = attributes.text(&["gen_ai.request.model", "llm.model_name"]);
    query.served_version = attributes.text(&["gen_ai.response.model"]).or_else(|| query.model.clone());
    query.status = status(&entry, &attributes);
    query.params = params(&mut attributes);
    query.prompt_tokens =
        attributes.integer(&["gen_ai.usage.input_tokens", "gen_ai.usage.prompt_tokens", "llm.token_count.prompt"]);
    query.completion_tokens = attributes.integer(&[
        "gen_ai.usage.output_tokens",
        "gen_ai.usage.completion_tokens",
        "llm.token_count.completion",
    ]);
    if exclusion::takes_opt_out(&mut attributes) || sender_opts_out(&entry) || header_opts_out(&attributes) {
        found.push(Exclusion::OptOut);
    }
    query.truncated = content.is_cut;
    query.messages = content.messages;
    query.tools = content.tools;
    query.finish_reason = content.finish_reason.or_else(|| finish_reason(&mut attributes)).map(plural);
    query.extra = extra(entry, attributes, resource);
    if let Some(answer) = content.answer {
        query.response = Some(answer.plain_text()).filter(|text| !text.is_empty());
        query.extra.extend(rest_of_answer(answer, content.others));
    }
    exclusion::mark(&mut query, headers, found);
    query
}

/// Returns true where the process forbids training on all that it sends; also where that is too much for every row.
fn sender_opts_out(entry: &Entry) -> bool {
    let whole = entry.resource.whole();
    let said = |name: &str| whole.get(name).map(|value| (name.to_owned(), value.clone()));
    exclusion::takes_opt_out(&mut Fields::new(exclusion::OPT_OUTS.into_iter().filter_map(said).collect()))
}

/// Returns true where a header of the request, which instrumentations log as an attribute, forbids training.
fn header_opts_out(attributes: &Fields) -> bool {
    let logged =
        |name: &&str| Some(((**name).to_owned(), attributes.get(&format!("http.request.header.{name}"))?.clone()));
    let logged = Value::Object(exclusion::HEADERS.iter().filter_map(logged).collect());
    let (kafka, names) = (BTreeMap::new(), exclusion::HEADERS);
    let headers = Headers::new(&kafka, Some(&logged));
    names.iter().any(|name| headers.denies(name))
}

fn not_empty(text: &str) -> Option<String> {
    (!text.is_empty()).then(|| text.to_owned())
}

fn workload(attributes: &mut Fields, resource: &mut Fields) -> Option<String> {
    let told = attributes.text(&["workload", "workload.id", "gen_ai.agent.name"]);
    told.or_else(|| resource.text(&["workload", "service.name"]))
}

/// Returns the HTTP status of a call, as far as its span tells; a failure without one counts as 500.
fn status(entry: &Entry, attributes: &Fields) -> i32 {
    let http = ["http.response.status_code", "http.status_code"];
    let told = http.iter().find_map(|name| http_status(attributes.get(name)?));
    let error = attributes.get("error.type").map(|kind| http_status(kind).filter(|code| *code >= 400).unwrap_or(500));
    told.or(error).unwrap_or(if entry.failed { 500 } else { 200 })
}

fn params(attributes: &mut Fields) -> Map {
    let take = |(name, short): &(&str, &str)| Some(((*short).to_owned(), attributes.take(name)?));
    let mut params: Map = PARAMS.iter().filter_map(take).collect();
    let name = "llm.invocation_parameters";
    let more = match attributes.get(name) {
        Some(Value::String(text)) => parse(text.trim().as_bytes()).ok(),
        more => more.cloned(),
    };
    if let Some(Value::Object(more)) = more {
        attributes.take(name);
        params.extend(more);
    }
    params
}

/// Returns a chat's name for a finish reason: the conventions call one of them `tool_call`.
fn plural(reason: String) -> String {
    if reason == "tool_call" { "tool_calls".to_owned() } else { reason }
}

/// Takes the first of the logged finish reasons, a list or JSON text of one.
fn finish_reason(attributes: &mut Fields) -> Option<String> {
    if let Some(reason) = attributes.text(&["llm.finish_reason"]) {
        return Some(reason);
    }
    let name = "gen_ai.response.finish_reasons";
    let reasons = match attributes.get(name)? {
        Value::String(text) => parse(text.trim().as_bytes()).unwrap_or_else(|_| text.as_str().into()),
        reasons => reasons.clone(),
    };
    let reasons = if let Value::Array(reasons) = reasons { reasons } else { vec![reasons] };
    // Those of further answers stay.
    if reasons.len() == 1 && reasons[0].is_string() {
        attributes.take(name);
    }
    reasons.first()?.as_str().map(str::to_owned)
}

/// Returns what no column takes, in the places where OTLP has it; what stands beside the attributes of a span or of a log
/// record goes to a field of that name.
fn extra(entry: Entry, attributes: Fields, resource: Fields) -> Map {
    let allowed = |fields: Map| {
        let mut rest = Fields::new(fields).rest();
        rest.retain(|name, _| !PERSONAL.contains(&name.as_str()));
        rest
    };
    let event = |Event { name, attributes, more }: Event| {
        let mut event = Fields::new(more);
        event.put_rest("name", name);
        event.put_rest("attributes", allowed(attributes));
        event.rest()
    };
    let mut more = Fields::new(entry.more);
    more.put_rest("spanId", not_empty(&entry.span_id));
    let says_something = |event: &Event| !event.attributes.is_empty() || !event.more.is_empty();
    let events: Vec<Value> =
        entry.events.into_iter().filter(says_something).map(|found| Value::Object(event(found))).collect();
    let mut extra = Fields::default();
    extra.put_rest("name", entry.name);
    extra.put_rest("attributes", allowed(attributes.rest()));
    extra.put_rest("resource", allowed(resource.rest()));
    extra.put_rest("scope", entry.scope.for_row());
    extra.put_rest("events", events);
    extra.put_rest("body", entry.body);
    extra.put_rest(if entry.is_log { "log" } else { "span" }, more.rest());
    extra.rest()
}

/// Returns what is left of the answers besides the first one's text, where other formats keep it.
fn rest_of_answer(answer: Message, others: Vec<Value>) -> Map {
    let mut response = Fields::default();
    let mut message = Fields::new(answer.rest);
    if answer.content.is_array() {
        message.put_rest("content", answer.content);
    }
    response.put_rest("message", message.rest());
    response.put_rest("others", others);
    let mut extra = Fields::default();
    extra.put_rest("response", response.rest());
    extra.rest()
}

/// Reads `gen_ai.evaluation.result`: a verdict on an answer, by a person or a program.
fn evaluation(entry: Entry, mut attributes: Fields) -> Result<Query, Refusal> {
    let mut query = feedback::blank(Kind::Feedback, "otlp");
    query.request_id = attributes.text(&["gen_ai.response.id"]);
    query.trace_id = not_empty(&entry.trace_id);
    query.conversation_id = attributes.text(&["gen_ai.conversation.id"]);
    query.tenant = attributes.text(&["tenant.id", "tenant"]);
    query.user = attributes.text(&USERS);
    if query.request_id.is_none() && query.trace_id.is_none() {
        let message = "the evaluation names no call: it has neither gen_ai.response.id nor a trace";
        return Err(Refusal::dead(Reason::MissingRequestId, message));
    }
    query.event_time_us = entry.start_ns.and_then(|ns| time(&ns.into()));
    query.feedback = Some(Value::Object(attributes.rest()));
    let resource = Fields::new(entry.resource.for_row());
    query.extra = extra(entry, Fields::default(), resource);
    query.train_ok = false;
    query.reason = Some("feedback".to_owned());
    Ok(query)
}

/// Joins the events of the conventions before 1.37, one a message and one a choice, into the call they belong to; other
/// entries stay as they are. Events of one call that lie in several records cannot be joined: they are refused.
fn joined(entries: Vec<Entry>) -> Vec<Entry> {
    let mut calls: BTreeMap<(String, String), usize> = BTreeMap::new();
    let mut out: Vec<Entry> = Vec::new();
    for entry in entries {
        let name = entry.attributes.get("event.name").and_then(Value::as_str).unwrap_or(&entry.name).to_owned();
        let Some((list, message)) = old_event(&name, &entry).filter(|_| entry.is_log) else {
            out.push(entry);
            continue;
        };
        let at = *calls.entry((entry.trace_id.clone(), entry.span_id.clone())).or_insert(out.len());
        if at == out.len() {
            out.push(Entry { name: DETAILS.to_owned(), body: Value::Null, ..entry });
            out[at].attributes.shift_remove("event.name");
        } else {
            for (name, value) in entry.attributes.into_iter().filter(|(name, _)| name != "event.name") {
                out[at].attributes.entry(name).or_insert(value);
            }
            for (name, value) in entry.more {
                out[at].more.entry(name).or_insert(value);
            }
        }
        let messages = out[at].attributes.entry(list).or_insert_with(|| json!([]));
        if let Value::Array(messages) = messages {
            messages.push(message);
        }
    }
    out
}

/// Returns the attribute of today's conventions that an old event belongs to, and its message.
fn old_event(name: &str, entry: &Entry) -> Option<(&'static str, Value)> {
    let Value::Object(mut body) = entry.body.clone() else { return None };
    if name == "gen_ai.choice" {
        let reason = body.shift_remove("finish_reason").unwrap_or_default();
        let Some(Value::Object(mut message)) = body.shift_remove("message") else { return None };
        // The conventions put calls beside the message, the Python instrumentation into it.
        if let Some(calls) = body.shift_remove("tool_calls") {
            message.entry("tool_calls").or_insert(calls);
        }
        message.entry("role").or_insert_with(|| "assistant".into());
        message.insert("finish_reason", reason);
        for (name, value) in body.into_iter().filter(|(name, value)| name != "index" || *value != 0) {
            message.entry(name).or_insert(value);
        }
        return Some(("gen_ai.output.messages", Value::Object(message)));
    }
    let role = name.strip_prefix("gen_ai.")?.strip_suffix(".message")?;
    body.entry("role").or_insert_with(|| role.into());
    if let Some(id) = body.shift_remove("id").filter(|_| role == "tool") {
        body.insert("tool_call_id", id);
    }
    Some(("gen_ai.input.messages", Value::Object(body)))
}

#[cfg(test)]
mod tests {
    use super::super::rules::OptOut;
    use super::super::{Rules, read};
    use super::*;

    fn attribute(key: &str, value: &str) -> Value {
        json!({"key": key, "value": {"stringValue": value}})
    }

    /// Reads spans of a chat with these attributes, sent by a process with those.
    fn rows(count: usize, attributes: &[Value], sender: Value, rules: &Rules) -> Vec<Query> {
        let attributes = [&[attribute("gen_ai.operation.name", "chat")], attributes].concat();
        let spans = vec![json!({"traceId": "0", "spanId": "0", "attributes": attributes}); count];
        let batch = json!({"resource": {"attributes": sender}, "scopeSpans": [{"spans": spans}]});
        let batch = json!({"resourceSpans": [batch]}).to_string();
        let outcomes = read(batch.as_bytes(), &BTreeMap::new(), rules);
        let row = |outcome| match outcome {
            Outcome::Row(query) => *query,
            other => panic!("{other:?}"),
        };
        outcomes.into_iter().map(row).collect()
    }

    fn asked() -> Value {
        let messages = json!([{"role": "user", "parts": [{"type": "text", "content": "Hi"}]}]);
        attribute("gen_ai.input.messages", &messages.to_string())
    }

    #[test]
    fn what_a_process_says_of_itself_at_length_is_kept_once_a_batch() {
        let batch = |length: usize| {
            let line = attribute("process.command_line", &"x".repeat(length));
            let sender =
                json!([attribute("a", "b"), line, attribute("service.name", "bot"), attribute("consent", "none")]);
            let opt_outs = vec![OptOut { field: "consent".into(), equals: "none".into() }];
            rows(50, &[asked()], sender, &Rules { opt_outs, ..Rules::default() })
        };
        let is_whole = |query: &Query| query.extra["resource"].get("process.command_line").is_some();
        for length in [1000, 100_000] {
            let batch = batch(length);
            assert_eq!(batch.iter().filter(|query| is_whole(query)).count(), if length == 1000 { 50 } else { 1 });
            assert!(is_whole(&batch[0]));
            assert!(batch.iter().all(|query| query.workload.as_deref() == Some("bot")));
            assert!(batch.iter().all(|query| query.reason.as_deref() == Some("opt_out")), "signs are small");
        }
    }

    #[test]
    fn a_process_may_forbid_training_for_all_that_it_sends() {
        let many = (0..1000).map(|n| attribute(&format!("label.{n}"), "x"));
        let sender: Value = many.chain([attribute("do_not_train", "true")]).collect();
        let rows = rows(3, &[asked()], sender, &Rules::default());
        assert!(rows.iter().all(|query| query.reason.as_deref() == Some("opt_out")));
        let values = json!({"arrayValue": {"values": [{"stringValue": "false"}]}});
        let header = json!({"key": "http.request.header.cf-aig-collect-log-payload", "value": values});
        let refused = self::rows(1, &[asked(), header], json!([]), &Rules::default());
        assert_eq!(refused[0].reason.as_deref(), Some("opt_out"));
    }

    #[test]
    fn odd_shapes_lose_nothing() {
        let one = |attributes: &[Value]| rows(1, attributes, json!([]), &Rules::default()).remove(0);
        let texts = one(&[attribute("gen_ai.input.messages", "[\"Hi\", {\"role\": \"user\", \"content\": \"Ho\"}]")]);
        assert_eq!(texts.messages, [Message::text("user", "Hi"), Message::text("user", "Ho")]);
        let bare = one(&[attribute("gen_ai.prompt", "Hi"), attribute("gen_ai.completion", "{\"content\": \"Ho\"}")]);
        assert_eq!((&bare.messages[0], bare.response.as_deref()), (&Message::text("user", "Hi"), Some("Ho")));
        let messages = json!({"stringValue": "[{\"role\": \"user\", \"content\": \"Hi\"}]"});
        let body = json!({"kvlistValue": {"values": [{"key": "gen_ai.input.messages", "value": messages},
            {"key": "more", "value": {"boolValue": true}}]}});
        let event = json!({"resourceLogs": [{"scopeLogs": [{"logRecords": [{"eventName": DETAILS, "body": body}]}]}]});
        match read(event.to_string().as_bytes(), &BTreeMap::new(), &Rules::default()).as_slice() {
            [Outcome::Row(query)] => {
                assert_eq!(query.extra, Map::from_iter([("name", json!(DETAILS)), ("body", json!({"more": true}))]))
            }
            other => panic!("{other:?}"),
        }
        let flat = [
            attribute("gen_ai.prompt.0", "Hi"),
            attribute("gen_ai.prompt.1.content", "Ho"),
            attribute("gen_ai.tool.definitions", "[{\"name\": \"f\"}]"),
            attribute("gen_ai.response.finish_reasons", "stop"),
            attribute("llm.invocation_parameters", "odd"),
        ];
        let flat = one(&flat);
        assert_eq!(flat.messages, [Message::text("user", "Hi"), Message::text("user", "Ho")]);
        assert_eq!(flat.tools.unwrap()[0]["function"]["name"], "f");
        assert_eq!(flat.finish_reason.as_deref(), Some("stop"));
        assert_eq!(flat.extra["attributes"]["llm.invocation_parameters"], "odd");
    }
}
