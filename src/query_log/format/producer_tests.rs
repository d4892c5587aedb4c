//! Records as producers write them, one fixture a producer and version: which column gets what, and that nothing is lost.
//!
//! The fixtures hold invented calls in the shapes that the producers' sources and documentation give.

use super::*;
use crate::record::{Message, last_user_text};

macro_rules! logs {
    ($($name:literal),+ $(,)?) => { [$(($name, include_str!(concat!("../../../tests/fixtures/logs/", $name)))),+] };
}

/// Records that are one call each.
pub(super) const CALLS: [(&str, &str); 18] = logs![
    "responses.json",
    "responses_stream.json",
    "responses_stream_tool.json",
    "completions.json",
    "completions_stream.json",
    "flywheel.json",
    "databricks_gateway.json",
    "databricks_legacy.json",
    "databricks_unity.json",
    "kong.json",
    "kong_stream.json",
    "kong_3.7.json",
    "kong_3.6.json",
    "apisix_bodies.json",
    "apisix_payloads.json",
    "envoy_tap.json",
    "envoy_tap_text.json",
    "litellm_responses.json",
];

/// OpenTelemetry's batches.
pub(super) const BATCHES: [(&str, &str); 7] = logs![
    "otlp_spans.json",
    "otlp_logs.json",
    "otlp_openllmetry.json",
    "otlp_openinference.json",
    "otlp_span_events.json",
    "otlp_log_events.json",
    "otlp_log_events_attribute.json",
];

const QUESTION: &str = "Where does the Marigold tie up on Thursday?";
const ANSWER: &str = "The Marigold is assigned to berth 7 on Thursday.";

fn read_all(name: &str) -> Vec<Outcome> {
    let known = CALLS.iter().chain(&BATCHES).find(|(known, _)| *known == name);
    read(known.unwrap().1.as_bytes(), &BTreeMap::new(), &Rules::default())
}

fn rows(name: &str) -> Vec<Query> {
    let row = |outcome| match outcome {
        Outcome::Row(query) => Some(*query),
        Outcome::Skip { reason: Reason::NotChat } => None,
        other => panic!("{name}: {other:?}"),
    };
    read_all(name).into_iter().filter_map(row).collect()
}

fn row(name: &str) -> Query {
    let rows = rows(name);
    assert_eq!(rows.len(), 1, "{name}");
    rows.into_iter().next().unwrap()
}

/// Format, request, trace, conversation, workload, user.
fn identity(query: &Query) -> [&str; 6] {
    let ids = [&query.request_id, &query.trace_id, &query.conversation_id, &query.workload, &query.user];
    let mut all = [query.format; 6];
    ids.iter().zip(&mut all[1..]).for_each(|(id, slot)| *slot = id.as_deref().unwrap_or("-"));
    all
}

/// Model, served version, status, milliseconds, finish reason, tokens of prompt and answer.
type Outcomes<'a> = (&'a str, &'a str, i32, Option<f64>, &'a str, i64, i64);

fn outcome(query: &Query) -> Outcomes<'_> {
    (
        query.model.as_deref().unwrap_or("-"),
        query.served_version.as_deref().unwrap_or("-"),
        query.status,
        query.duration_ms,
        query.finish_reason.as_deref().unwrap_or("-"),
        query.prompt_tokens.unwrap_or(-1),
        query.completion_tokens.unwrap_or(-1),
    )
}

#[test]
fn databricks_rows_of_all_three_schemas_are_read() {
    let (gateway, legacy, unity) =
        (row("databricks_gateway.json"), row("databricks_legacy.json"), row("databricks_unity.json"));
    let requester = "b2a7c1de-55f0-4f0e-9d0b-6d3d8f7f1c44";
    let request = "7f0b2a51-3c5e-4b8f-9f64-0d1a8c2be711";
    assert_eq!(identity(&gateway), ["databricks", request, "harbour-000417", "-", "-", requester]);
    let served = "3b6c0e7a52d14f1f8f0c41ee7b5d9a20";
    assert_eq!(outcome(&gateway), ("harbour-chat", served, 200, Some(1384.0), "stop", 41, 18));
    assert_eq!(gateway.event_time_us, Some(1_787_303_662_508_000));
    assert_eq!((gateway.response.as_deref(), last_user_text(&gateway.messages)), (Some(ANSWER), QUESTION.to_owned()));

    let request = "e3d41c72-90a6-4d0e-a1b0-52f8a5c4f002";
    assert_eq!(identity(&legacy), ["databricks", request, "harbour-000398", "-", "harbour-chat", "-"]);
    assert_eq!(outcome(&legacy), ("harbour_chat", "harbour_chat", 200, Some(934.0), "stop", 41, 18));
    assert_eq!(legacy.event_time_us, Some(1_741_684_462_117_000));

    let (request, trace) = ("5e2a7b30-2f3d-4d4e-b7cd-0b7c1e9d6aa1", "1c8dcbf2-9a0f-4a53-8a55-1a4bb7b3d7f0");
    let expected = ["databricks", request, trace, "-", "databricks-gpt-5-mini", "dockmaster@example.com"];
    assert_eq!(identity(&unity), expected);
    let model = "main.harbour.chat_service";
    assert_eq!(outcome(&unity), (model, "gpt-5-mini", 200, Some(1512.0), "tool_calls", 86, 24));
    assert!(!Value::Object(unity.extra).to_string().contains("dockmaster"), "a name in clear");
}

#[test]
fn a_databricks_row_without_its_request_says_why() {
    let over = include_str!("../../../tests/fixtures/logs/databricks_oversize.json");
    match read(over.as_bytes(), &BTreeMap::new(), &Rules::default()).as_slice() {
        [Outcome::DeadLetter { reason: Reason::MissingMessages, message }] => assert!(message.contains("size limit")),
        other => panic!("{other:?}"),
    }
    let frame = json!({"databricks_request_id": "x", "request": "{\"dataframe_split\": {\"data\": [[1]]}}"});
    let outcomes = read(frame.to_string().as_bytes(), &BTreeMap::new(), &Rules::default());
    assert_eq!(outcomes, [Outcome::Skip { reason: Reason::NotChat }]);
}

#[test]
fn kong_entries_of_every_version_are_read() {
    for name in ["kong.json", "kong_stream.json", "kong_3.7.json", "kong_3.6.json"] {
        let query = row(name);
        assert_eq!(query.request_id.as_deref().map(str::len), Some(32), "{name}");
        assert_eq!(identity(&query)[2..], ["-", "-", "harbour-chat", "app-17"], "{name}");
        assert_eq!(query.format, "kong");
        let served = if name == "kong_stream.json" { "gpt-4o-mini" } else { "gpt-4o-mini-2024-07-18" };
        assert_eq!(outcome(&query), ("gpt-4o-mini", served, 200, Some(1212.0), "stop", 41, 18), "{name}");
        assert_eq!(query.event_time_us, Some(1_787_304_611_200_000), "{name}");
        assert_eq!(query.messages.len(), 2, "{name}");
        assert_eq!(query.response.as_deref(), Some(ANSWER), "{name}");
        assert!(query.train_ok, "{name}");
        let extra = Value::Object(query.extra).to_string();
        for personal in ["192.0.2.17", "pilotage-app", "d5fbb9f1", "\"authorization\""] {
            assert!(!extra.contains(personal), "{name}: {personal} in {extra}");
        }
    }
    let hit = CALLS[9].1.replace("\"Miss\"", "\"Hit\"");
    match read(hit.as_bytes(), &BTreeMap::new(), &Rules::default()).as_slice() {
        [Outcome::Row(query)] => assert_eq!(query.reason.as_deref(), Some("cached")),
        other => panic!("{other:?}"),
    }
    let bare = json!({"ai": {"proxy": {"meta": {}}}, "request": {"id": "1"}, "started_at": 1});
    match read(bare.to_string().as_bytes(), &BTreeMap::new(), &Rules::default()).as_slice() {
        [Outcome::DeadLetter { reason: Reason::MissingMessages, message }] => assert!(message.contains("log_payloads")),
        other => panic!("{other:?}"),
    }
}

#[test]
fn apisix_entries_are_read_with_bodies_and_with_payloads() {
    let payloads = row("apisix_payloads.json");
    assert_eq!(identity(&payloads), ["apisix", "-", "-", "-", "harbour-chat", "pilotage_app"]);
    let (model, ms) = ("gpt-4o-mini", Some(1_409.999_847_412_1));
    assert_eq!(outcome(&payloads), (model, model, 200, ms, "-", 41, 18));
    assert_eq!((payloads.response.as_deref(), payloads.messages.len()), (Some(ANSWER), 2));
    let bodies = row("apisix_bodies.json");
    assert_eq!(identity(&bodies), ["apisix", "chatcmpl-9dA1", "-", "-", "harbour-chat", "pilotage_app"]);
    assert_eq!(bodies.response.as_deref(), Some(ANSWER), "the stream is joined");
    assert_eq!(bodies.finish_reason.as_deref(), Some("stop"));
    assert_eq!(bodies.tools.unwrap()[0]["function"]["name"], "lookup_berth");
    // Loggers send batches by default.
    let batch = format!("[{},{}]", CALLS[13].1, CALLS[14].1);
    assert_eq!(read(batch.as_bytes(), &BTreeMap::new(), &Rules::default()).len(), 2);
    let none = json!({"request": {"uri": "/", "headers": {}}, "route_id": "1", "start_time": 1});
    match read(none.to_string().as_bytes(), &BTreeMap::new(), &Rules::default()).as_slice() {
        [Outcome::DeadLetter { message, .. }] => assert!(message.contains("include_req_body")),
        other => panic!("{other:?}"),
    }
}

#[test]
fn envoy_tapped_calls_are_read_with_bodies_in_base64_and_as_text() {
    for name in ["envoy_tap.json", "envoy_tap_text.json"] {
        let query = row(name);
        let request = "0e8b1c52-6b2d-4a0e-8df4-6f8b2e7a1c10";
        assert_eq!(identity(&query), ["envoy", request, "-", "-", "harbour", "-"], "{name}");
        let served = "gpt-4o-mini-2024-07-18";
        assert_eq!(outcome(&query), ("gpt-4o-mini", served, 200, None, "stop", 41, 18), "{name}");
        assert_eq!((query.messages.len(), query.response.as_deref()), (2, Some(ANSWER)), "{name}");
        assert!(query.train_ok && query.event_time_us.is_some(), "{name}");
        let extra = Value::Object(query.extra).to_string();
        assert!(!extra.contains("sk-secret") && !extra.contains("192.0.2.17"), "{extra}");
        assert!(extra.contains("x-envoy-upstream-service-time"), "{extra}");
    }
    let access = json!({"request_body": "{\"messages\": [{\"role\": \"user\", \"content\": \"Hi\"}]}", "duration": 7,
        "response_body": "{\"choices\": [{\"message\": {\"content\": \"Ho\"}}]}", "gen_ai.request.model": "m",
        "response_code": 200, "route_name": "r", "downstream_remote_address": "192.0.2.17:51844", "bytes_sent": 9});
    match read(access.to_string().as_bytes(), &BTreeMap::new(), &Rules::default()).as_slice() {
        [Outcome::Row(query)] => {
            assert_eq!(identity(query), ["envoy", "-", "-", "-", "r", "-"]);
            assert_eq!((query.model.as_deref(), query.response.as_deref()), (Some("m"), Some("Ho")));
            assert_eq!(Value::Object(query.extra.clone()), json!({"envoy": {"bytes_sent": 9}}));
        }
        other => panic!("{other:?}"),
    }
    let pairs = |list: Value| {
        json!({"http_buffered_trace": {"request": {"headers": list,
        "body": {"as_string": "{\"messages\": [{\"role\": \"user\", \"content\": \"Hi\"}]}"}}}})
    };
    let list = json!([{"key": "x-a", "raw_value": "MQ=="}, {"key": "Via", "value": "1"}, {"key": "via", "value": "2"},
        {"key": "cookie", "value": "s3cret"}, {"key": "cookie", "value": "s3cret"}, "odd"]);
    match read(pairs(list).to_string().as_bytes(), &BTreeMap::new(), &Rules::default()).as_slice() {
        [Outcome::Row(query)] => {
            assert_eq!(query.extra["headers"], json!({"x-a": "MQ==", "via": ["1", "2"]}));
            let other = &query.extra["envoy"]["http_buffered_trace"]["request"]["other_headers"];
            assert_eq!(*other, json!(["odd"]));
        }
        other => panic!("{other:?}"),
    }
    let cut = CALLS[16].1.replacen("\"truncated\":false", "\"truncated\":true", 2);
    match read(cut.as_bytes(), &BTreeMap::new(), &Rules::default()).as_slice() {
        [Outcome::Row(query)] => assert_eq!(query.reason.as_deref(), Some("truncated")),
        other => panic!("{other:?}"),
    }
    let bare = json!({"http_buffered_trace": {"request": {"headers": []}}}).to_string();
    match read(bare.as_bytes(), &BTreeMap::new(), &Rules::default()).as_slice() {
        [Outcome::DeadLetter { reason: Reason::MissingMessages, message }] => assert!(message.contains("max_buffered")),
        other => panic!("{other:?}"),
    }
}

#[test]
fn litellm_records_of_the_responses_interface_become_chats() {
    let query = row("litellm_responses.json");
    assert_eq!(identity(&query), ["litellm", "resp_68a6f1", "tr-9", "conv_1", "harbour", "-"]);
    let roles: Vec<&str> = query.messages.iter().map(|message| message.role.as_str()).collect();
    assert_eq!(roles, ["system", "user", "assistant", "tool"]);
    assert_eq!(query.messages[1], Message::text("user", QUESTION));
    assert_eq!(query.messages[2].rest["tool_calls"][0]["function"]["name"], "lookup_berth");
    assert_eq!(query.tools.as_ref().unwrap()[0]["function"]["name"], "lookup_berth");
    assert_eq!((query.response.as_deref(), query.finish_reason.as_deref()), (Some(ANSWER), Some("stop")));
    assert_eq!(query.reason.as_deref(), Some("incomplete"), "the server holds the conversation");
    let mut record: Value = serde_json::from_str(CALLS[17].1).unwrap();
    record["model_parameters"].as_object_mut().unwrap().shift_remove("conversation");
    for (input, expected) in [
        (json!("Hi"), ""),
        (json!("[{\"role\": \"user\", \"content\": \"Hi\"}]"), ""),
        (json!("redacted-by-litellm"), "redacted"),
        (json!([]), ""),
        (Value::Null, "missing_messages"),
        (json!(7), "bad_messages"),
        (json!(" "), "missing_messages"),
    ] {
        record["messages"] = input.clone();
        let found = match read(record.to_string().as_bytes(), &BTreeMap::new(), &Rules::default()).as_slice() {
            [Outcome::Row(query)] => query.reason.clone().unwrap_or_default(),
            [Outcome::DeadLetter { reason, .. }] => reason.as_str().to_owned(),
            other => panic!("{other:?}"),
        };
        assert_eq!(found, expected, "{input}");
    }
}

#[test]
fn a_flywheel_record_has_five_fields() {
    let query = row("flywheel.json");
    assert_eq!(identity(&query), ["flywheel", "chatcmpl-9fX1", "-", "-", "harbour.berth_router", "harbour-prod"]);
    assert_eq!(query.event_time_us, Some(1_787_307_000_000_000));
    assert_eq!((query.finish_reason.as_deref(), query.response.as_deref()), (Some("tool_calls"), Some("")));
    let more = CALLS[5].1.replacen("{", "{\"region\":\"eu\",", 1);
    match read(more.as_bytes(), &BTreeMap::new(), &Rules::default()).as_slice() {
        [Outcome::Row(query)] => assert_eq!((query.format, &query.extra["region"]), ("openai", &json!("eu"))),
        other => panic!("{other:?}"),
    }
}

#[test]
fn the_responses_interface_becomes_a_chat() {
    for name in ["responses.json", "responses_stream.json"] {
        let query = row(name);
        assert_eq!(identity(&query), ["openai", "resp_68a6f1", "-", "-", "-", "u-88"], "{name}");
        let served = "gpt-5-mini-2025-08-07";
        assert_eq!(outcome(&query), ("gpt-5-mini", served, 200, None, "stop", 131, 82), "{name}");
        let roles: Vec<&str> = query.messages.iter().map(|message| message.role.as_str()).collect();
        assert_eq!(roles, ["system", "user", "assistant", "tool"]);
        assert_eq!(query.messages[1], Message::text("user", QUESTION));
        let call = json!({"id": "call_b1", "type": "function", "function":
            {"name": "lookup_berth", "arguments": "{\"vessel\":\"Marigold\",\"day\":\"Thursday\"}"}});
        assert_eq!(query.messages[2].rest["tool_calls"], json!([call]));
        assert_eq!(query.messages[3].rest["tool_call_id"], "call_b1");
        assert_eq!(query.tools.as_ref().unwrap()[0]["function"]["name"], "lookup_berth");
        assert_eq!(query.params["max_output_tokens"], 400);
        assert_eq!(query.response.as_deref(), Some(ANSWER));
        assert!(query.train_ok && !query.truncated);
    }
    let called = row("responses_stream_tool.json");
    assert_eq!((called.response.as_deref(), called.finish_reason.as_deref()), (None, Some("tool_calls")));
    assert_eq!(called.extra["response"]["output"][0]["name"], "lookup_berth");
}

#[test]
fn a_response_stream_that_breaks_off_keeps_its_text() {
    let mut record: Value = serde_json::from_str(CALLS[1].1).unwrap();
    let stream = record["response"].as_str().unwrap();
    let whole = stream.find("event: response.output_text.done").unwrap();
    record["response"] = stream[..whole].into();
    match read(record.to_string().as_bytes(), &BTreeMap::new(), &Rules::default()).as_slice() {
        [Outcome::Row(query)] => {
            assert_eq!((query.response.as_deref(), query.reason.as_deref()), (Some(ANSWER), Some("truncated")));
            assert_eq!(query.request_id.as_deref(), Some("resp_68a6f1"));
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_prompt_that_the_server_keeps_is_incomplete_and_an_embedding_is_no_chat() {
    let reason = |request: Value| match read(
        json!({ "request": request }).to_string().as_bytes(),
        &BTreeMap::new(),
        &Rules::default(),
    )
    .as_slice()
    {
        [Outcome::Row(query)] => query.reason.clone().unwrap_or_default(),
        [Outcome::DeadLetter { reason, .. }] => reason.as_str().to_owned(),
        other => panic!("{other:?}"),
    };
    assert_eq!(reason(json!({"input": "And then?", "previous_response_id": "resp_1"})), "incomplete");
    assert_eq!(reason(json!({"input": "Hi", "instructions": "Be kind."})), "");
    assert_eq!(reason(json!({"input": [{"role": "user", "content": "Hi"}]})), "");
    let with = |item: Value| json!({"input": [{"role": "user", "content": "Hi"}, item]});
    assert_eq!(reason(with(json!({"type": "reasoning", "summary": []}))), "");
    assert_eq!(reason(with(json!({"type": "item_reference", "id": "msg_1"}))), "incomplete");
    assert_eq!(reason(with(json!({"type": "custom_tool_call", "call_id": "c", "name": "f", "input": "x"}))), "");
    assert_eq!(reason(json!({"input": "Hi", "model": "text-embedding-3-small"})), "not_chat");
    assert_eq!(reason(json!({"input": ["a", "b"], "model": "text-embedding-3-small"})), "not_chat");
    assert_eq!(reason(json!({"prompt": "a fox", "size": "1024x1024"})), "not_chat");
    assert_eq!(reason(json!({"prompt": ["a", "b"], "max_tokens": 9})), "bad_request");
    assert_eq!(reason(json!({"prompt": [1, 2], "max_tokens": 9})), "bad_request");
    assert_eq!(reason(json!({"input": 7, "instructions": "x"})), "bad_messages");
    assert_eq!(reason(json!({"input": [{"type": "reasoning"}], "store": true})), "missing_messages");
}

#[test]
fn a_legacy_completion_is_kept_and_does_not_train() {
    for name in ["completions.json", "completions_stream.json"] {
        let query = row(name);
        assert_eq!(query.messages, [Message::text("user", "The tide at the Marigold's berth is")]);
        assert_eq!(query.response.as_deref(), Some(" rising until noon."), "{name}");
        assert_eq!((query.finish_reason.as_deref(), query.completion_tokens), (Some("stop"), Some(5)), "{name}");
        assert_eq!(query.reason.as_deref(), Some("raw_prompt"), "{name}");
        assert_eq!(query.params["max_tokens"], 16, "{name}");
    }
}

#[test]
fn spans_and_events_of_the_conventions_are_read_in_json_and_protobuf() {
    let protobuf: [(&str, &[u8]); 2] = [
        ("otlp_spans.json", include_bytes!("../../../tests/fixtures/logs/otlp_spans.pb")),
        ("otlp_logs.json", include_bytes!("../../../tests/fixtures/logs/otlp_logs.pb")),
    ];
    for (name, bytes) in protobuf {
        assert_eq!(read(bytes, &BTreeMap::new(), &Rules::default()), read_all(name), "{name}");
        let query = row(name);
        let trace = "4f1e2d3c4b5a69788796a5b4c3d2e1f0";
        assert_eq!(identity(&query), ["otlp", "chatcmpl-9eT4", trace, "s-2291", "harbour-bot", "-"]);
        let ms = (name == "otlp_spans.json").then_some(1200.0);
        assert_eq!(outcome(&query), ("gpt-4o-mini", "gpt-4o-mini-2024-07-18", 200, ms, "stop", 97, 18), "{name}");
        let roles: Vec<&str> = query.messages.iter().map(|message| message.role.as_str()).collect();
        assert_eq!(roles, ["system", "user", "assistant", "tool"], "{name}");
        assert_eq!(query.messages[1], Message::text("user", QUESTION));
        let arguments = query.messages[2].rest["tool_calls"][0]["function"]["arguments"].as_str().unwrap();
        assert_eq!(serde_json::from_str::<Value>(arguments).unwrap(), json!({"vessel": "Marigold", "day": "Thursday"}));
        assert_eq!(query.messages[3].rest["tool_call_id"], "call_b1");
        assert_eq!(query.tools.as_ref().unwrap()[0]["function"]["parameters"]["type"], "object");
        assert_eq!(query.response.as_deref(), Some(ANSWER));
        let params = json!({"temperature": 0.2, "top_p": 0.9, "max_tokens": 256, "seed": 7, "stop": ["###"]});
        assert_eq!(Value::Object(query.params), params);
        assert_eq!(query.extra["attributes"]["gen_ai.usage.cache_read.input_tokens"], 0);
    }
    assert_eq!(read_all("otlp_spans.json").len(), 3, "spans that are no calls are counted");
}

#[test]
fn messages_that_an_sdk_cut_are_truncated() {
    let cut = BATCHES[0].1.replace(r#"Thursday?\",\"type\""#, r#"Thursday?\""#);
    assert_ne!(cut, BATCHES[0].1);
    match read(cut.as_bytes(), &BTreeMap::new(), &Rules::default()).as_slice() {
        [Outcome::Row(query), ..] => assert_eq!((query.truncated, query.reason.as_deref()), (true, Some("truncated"))),
        other => panic!("{other:?}"),
    }
}

#[test]
fn other_instrumentations_are_read() {
    let calls = rows("otlp_openllmetry.json");
    assert_eq!(calls.len(), 3);
    for query in &calls {
        let trace = "4f1e2d3c4b5a69788796a5b4c3d2e1f0";
        assert_eq!(identity(query), ["otlp", "chatcmpl-9eT5", trace, "s-2291", "harbour-bot", "u-88"]);
        assert_eq!((query.prompt_tokens, query.completion_tokens), (Some(97), Some(18)));
        assert_eq!(query.tools.as_ref().unwrap()[0]["function"]["parameters"]["type"], "object");
        assert_eq!(query.messages[1], Message::text("user", QUESTION));
        assert!(!Value::Object(query.extra.clone()).to_string().contains("u-88"), "a user in clear");
    }
    assert_eq!((calls[0].response.as_deref(), calls[0].finish_reason.as_deref()), (None, Some("tool_calls")));
    assert_eq!(calls[0].extra["response"]["message"]["tool_calls"][0]["function"]["name"], "lookup_berth");
    assert_eq!((calls[1].response.as_deref(), calls[1].messages.len()), (Some(ANSWER), 4));

    let query = row("otlp_openinference.json");
    assert_eq!(identity(&query)[3..], ["s-2291", "harbour-bot", "u-88"]);
    assert_eq!((query.response.as_deref(), query.finish_reason.as_deref()), (Some(ANSWER), Some("stop")));
    assert_eq!((query.messages.len(), last_user_text(&query.messages)), (4, QUESTION.to_owned()));
    assert_eq!(query.messages[2].rest["tool_calls"][0]["function"]["arguments"], "{\"vessel\":\"Marigold\"}");
    assert_eq!(query.params["max_tokens"], 256);

    let query = row("otlp_span_events.json");
    assert_eq!((query.messages.len(), query.response.as_deref()), (2, Some(ANSWER)));
    assert_eq!((query.finish_reason.as_deref(), query.prompt_tokens), (Some("stop"), Some(41)));
}

#[test]
fn events_of_one_call_are_joined() {
    let query = row("otlp_log_events.json");
    let roles: Vec<&str> = query.messages.iter().map(|message| message.role.as_str()).collect();
    assert_eq!(roles, ["system", "user", "assistant", "tool"]);
    assert_eq!(query.messages[3].rest["tool_call_id"], "call_b1");
    assert_eq!((query.response.as_deref(), query.finish_reason.as_deref()), (Some(ANSWER), Some("stop")));
    let query = row("otlp_log_events_attribute.json");
    assert_eq!((query.messages.len(), query.finish_reason.as_deref()), (1, Some("tool_calls")));
    assert_eq!(query.extra["response"]["message"]["tool_calls"][0]["id"], "call_b1");
}

#[test]
fn an_evaluation_is_feedback_and_a_call_without_content_is_counted() {
    let attribute = |key: &str, value: &str| json!({"key": key, "value": {"stringValue": value}});
    let logs = |name: &str, attributes: Value| {
        let record = json!({"timeUnixNano": "1787306400000000000", "traceId": "4f1e2d3c4b5a69788796a5b4c3d2e1f0",
            "spanId": "a1b2c3d4e5f60718", "eventName": name, "attributes": attributes});
        json!({"resourceLogs": [{"scopeLogs": [{"logRecords": [record]}]}]}).to_string()
    };
    let verdict = [attribute("gen_ai.evaluation.name", "thumb"), attribute("gen_ai.response.id", "chatcmpl-9eT4")];
    match read(logs("gen_ai.evaluation.result", json!(verdict)).as_bytes(), &BTreeMap::new(), &Rules::default())
        .as_slice()
    {
        [Outcome::Row(query)] => {
            assert_eq!((query.kind, query.request_id.as_deref()), (Kind::Feedback, Some("chatcmpl-9eT4")));
            assert_eq!(query.feedback, Some(json!({"gen_ai.evaluation.name": "thumb"})));
        }
        other => panic!("{other:?}"),
    }
    let one = |text: &str| read(text.as_bytes(), &BTreeMap::new(), &Rules::default());
    let bare = logs("gen_ai.client.inference.operation.details", json!([attribute("gen_ai.operation.name", "chat")]));
    assert_eq!(one(&bare), [Outcome::Skip { reason: Reason::NoContent }]);
    assert_eq!(one(&logs("exception", json!([]))), [Outcome::Skip { reason: Reason::NotChat }]);
    assert_eq!(one(r#"{"resourceSpans": []}"#), [Outcome::Skip { reason: Reason::Empty }]);
    let envoy = include_str!("../../../tests/fixtures/logs/envoy.json");
    assert_eq!(one(envoy), [Outcome::Skip { reason: Reason::NoContent }]);
}

#[test]
fn bytes_that_are_no_batch_are_dead_letters() {
    let spans: &[u8] = include_bytes!("../../../tests/fixtures/logs/otlp_spans.pb");
    for cut in [1, 7, spans.len() / 2, spans.len() - 1] {
        let outcomes = read(&spans[..cut], &BTreeMap::new(), &Rules::default());
        assert!(matches!(outcomes.as_slice(), [Outcome::DeadLetter { .. } | Outcome::Skip { .. }]), "{outcomes:?}");
    }
    // A metric: its name lies where a span has its trace id.
    let metric = b"\x0a\x0c\x12\x0a\x12\x08\x0a\x04name\x12\x00";
    assert!(matches!(read(metric, &BTreeMap::new(), &Rules::default()).as_slice(), [Outcome::DeadLetter { .. }]));
}
