//! Each format on its fixture, field by field, and what must never be read.

use std::collections::BTreeMap;

use super::*;
use crate::json::{Value, json};

pub(super) const FIXTURES: [&str; 10] = [
    include_str!("../../../tests/fixtures/logs/openai_pair.json"),
    include_str!("../../../tests/fixtures/logs/openai_strings.json"),
    include_str!("../../../tests/fixtures/logs/openai_stream.json"),
    include_str!("../../../tests/fixtures/logs/openai_failed.json"),
    include_str!("../../../tests/fixtures/logs/litellm_success.json"),
    include_str!("../../../tests/fixtures/logs/litellm_redacted.json"),
    include_str!("../../../tests/fixtures/logs/litellm_failure.json"),
    include_str!("../../../tests/fixtures/logs/litellm_cached.json"),
    include_str!("../../../tests/fixtures/logs/feedback.json"),
    include_str!("../../../tests/fixtures/logs/mixed.ndjson"),
];

fn read_text(text: &str) -> Vec<Outcome> {
    read(text.as_bytes(), &BTreeMap::new(), &Rules::default())
}

fn row_with(text: &str, headers: &[(&str, &str)]) -> Query {
    let headers = headers.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
    match read(text.as_bytes(), &headers, &Rules::default()).as_slice() {
        [Outcome::Row(query)] => query.as_ref().clone(),
        other => panic!("expected one row: {other:?}"),
    }
}

fn row(text: &str) -> Query {
    row_with(text, &[])
}

fn reasons(text: &str) -> Vec<String> {
    let name = |outcome: &Outcome| match outcome {
        Outcome::Row(query) => query.format.to_owned(),
        Outcome::DeadLetter { reason, .. } => reason.as_str().to_owned(),
        Outcome::Skip { reason } => format!("skip {}", reason.as_str()),
    };
    read_text(text).iter().map(name).collect()
}

/// A raw pair with one user turn and these further fields.
fn pair(more: Value) -> String {
    let mut record = json!({"request": {"messages": [{"role": "user", "content": "Hi"}]}, "response": {"choices": [{"message": {"content": "Ho"}}]}});
    let Value::Object(fields) = more else { panic!() };
    for (name, value) in fields {
        match (record.get_mut(&name), value) {
            (Some(Value::Object(old)), Value::Object(new)) => old.extend(new),
            (_, value) => record[name.as_str()] = value,
        }
    }
    record.to_string()
}

fn reason_of(text: &str) -> Option<String> {
    let query = row(text);
    assert_eq!(query.train_ok, query.reason.is_none(), "{query:?}");
    query.reason
}

#[test]
fn an_openai_pair_fills_every_column_and_loses_nothing() {
    let query = row(FIXTURES[0]);
    assert_eq!(query.format, "openai");
    assert_eq!(query.event_time_us, Some(1_772_366_400_250_000));
    assert_eq!(query.request_id.as_deref(), Some("chatcmpl-1"));
    assert_eq!(query.conversation_id.as_deref(), Some("s-1"));
    assert_eq!((query.workload.as_deref(), query.tenant.as_deref()), (Some("maths"), Some("acme")));
    assert_eq!((query.model.as_deref(), query.served_version.as_deref()), (Some("assistant"), Some("assistant-v3")));
    assert_eq!(query.user.as_deref(), Some("u-17"));
    assert_eq!((query.status, query.duration_ms), (200, Some(412.5)));
    assert_eq!(query.messages.len(), 5);
    assert_eq!(query.messages[2].rest["tool_calls"][0]["function"]["arguments"], "{\"n\": 1}");
    assert_eq!(query.messages[3].rest["tool_call_id"], "c1");
    assert_eq!(crate::record::last_user_text(&query.messages), "Another?");
    assert_eq!(query.tools.as_ref().unwrap()[0]["function"]["name"], "prime");
    assert_eq!(Value::Object(query.params), json!({"temperature": 0.7, "max_tokens": "64"}));
    assert_eq!(query.response.as_deref(), Some("  3 "), "text is kept to the byte");
    assert_eq!(query.finish_reason.as_deref(), Some("stop"));
    assert_eq!((query.prompt_tokens, query.completion_tokens), (Some(21), Some(3)));
    assert!(query.train_ok && !query.redacted && !query.truncated);
    let extra = json!({
        "region": "eu",
        "request": {"metadata": {"build": 7}, "service_tier": "default"},
        "response": {"created": 1772366400, "usage": {"total_tokens": 24}, "system_fingerprint": "fp"},
    });
    assert_eq!(Value::Object(query.extra), extra);
}

#[test]
fn bodies_may_be_strings_and_lack_id_model_and_usage() {
    let query = row(FIXTURES[1]);
    assert_eq!((query.workload.as_deref(), query.user.as_deref()), (Some("mail"), Some("app-2")));
    assert_eq!((query.model.as_deref(), query.served_version.as_deref()), (Some("m"), Some("mail-v7")));
    assert_eq!((query.status, query.duration_ms), (200, Some(12.0)));
    assert_eq!(query.response.as_deref(), Some("Hello."));
    assert_eq!(query.event_time_us, Some(1_772_366_400_250_000));
    assert_eq!((query.request_id, query.finish_reason, query.prompt_tokens), (None, None, None));
    assert_eq!(query.extra, Map::new());
}

#[test]
fn a_stream_is_put_together() {
    let query = row(FIXTURES[2]);
    assert_eq!(query.response.as_deref(), Some("One, two é."));
    assert_eq!(query.finish_reason.as_deref(), Some("stop"));
    assert_eq!((query.prompt_tokens, query.completion_tokens), (Some(5), Some(4)));
    assert_eq!((query.request_id.as_deref(), query.served_version.as_deref()), (Some("chatcmpl-9"), Some("m-v2")));
    let call = &query.extra["response"]["choices"][0]["message"]["tool_calls"][0]["function"];
    assert_eq!(*call, json!({"name": "f", "arguments": "{\"a\":1}"}));
    assert!(!query.truncated && query.train_ok);
}

#[test]
fn a_stream_that_breaks_off_is_truncated() {
    let chunk =
        |text: &str| json!({"object": "chat.completion.chunk", "choices": [{"index": 0, "delta": {"content": text}}]});
    let query = row(&pair(json!({"response": format!("data: {}\n\ndata: {{\"cho", chunk("One"))})));
    assert_eq!((query.response.as_deref(), query.reason.as_deref()), (Some("One"), Some("truncated")));
    assert!(query.truncated && !query.train_ok);
    let mut record: Value = serde_json::from_str(&pair(json!({}))).unwrap();
    let last = json!({"choices": [{"index": 0, "delta": {}, "finish_reason": "length"}]});
    record["response"] = json!([chunk("a"), chunk("b"), last]);
    let query = row(&record.to_string());
    assert_eq!((query.response.as_deref(), query.finish_reason.as_deref()), (Some("ab"), Some("length")));
    assert!(!query.truncated);
}

#[test]
fn an_error_in_a_stream_is_a_failed_call() {
    let stream =
        "data: {\"choices\":[{\"index\":0,\"delta\":{\"content\":\"a\"}}]}\n\ndata: {\"error\":{\"code\":503}}\n\n";
    let query = row(&pair(json!({"response": stream})));
    assert_eq!((query.status, query.reason.as_deref()), (503, Some("failed")));
}

#[test]
fn a_cut_body_is_truncated_and_a_plain_text_is_the_answer() {
    let cut = row(&pair(json!({"response": "{\"choices\": [{\"message\": {\"content\": \"so lo"})));
    assert_eq!((cut.truncated, cut.reason.as_deref(), cut.response), (true, Some("truncated"), None));
    assert!(cut.extra["response"].as_str().unwrap().ends_with("so lo"));
    assert_eq!(row(&pair(json!({"response": "{x} is my answer"}))).response.as_deref(), Some("{x} is my answer"));
    let told = pair(json!({"logging_error_codes": ["MAX_RESPONSE_SIZE_EXCEEDED"]}));
    assert_eq!(reason_of(&told).as_deref(), Some("truncated"));
}

#[test]
fn a_litellm_payload_fills_every_column() {
    let query = row(FIXTURES[4]);
    assert_eq!(query.format, "litellm");
    assert_eq!(query.event_time_us, Some(1_772_366_400_500_000));
    assert_eq!(query.duration_ms, Some(2250.0), "end minus start, not response_time");
    assert_eq!((query.request_id.as_deref(), query.trace_id.as_deref()), (Some("chatcmpl-77"), Some("tr-1")));
    assert_eq!((query.conversation_id.as_deref(), query.tenant.as_deref()), (Some("s-5"), Some("team-9")));
    assert_eq!((query.workload.as_deref(), query.user.as_deref()), (Some("returns"), Some("customer-8")));
    assert_eq!((query.model.as_deref(), query.served_version.as_deref()), (Some("support"), Some("support-v4")));
    assert_eq!((query.status, query.prompt_tokens, query.completion_tokens), (200, Some(20), Some(10)));
    assert_eq!((query.response.as_deref(), query.finish_reason.as_deref()), (Some("On its way."), Some("stop")));
    assert_eq!(Value::Object(query.params.clone()), json!({"temperature": 0.2, "stream": true, "max_tokens": 128}));
    assert_eq!(query.tools.as_ref().unwrap()[0]["function"]["name"], "track");
    assert!(query.train_ok);
    let extra = Value::Object(query.extra).to_string();
    for personal in ["10.1.2.3", "88dc", "owner@example.com", "customer-8"] {
        assert!(!extra.contains(personal), "{personal} in {extra}");
    }
    for kept in ["completionStartTime", "response_time", "model_id", "hidden_params", "faq", "request_tags"] {
        assert!(extra.contains(kept), "{kept} not in {extra}");
    }
}

#[test]
fn litellm_rows_that_must_not_train_say_why() {
    let masked = row(FIXTURES[5]);
    assert_eq!((masked.redacted, masked.reason.as_deref()), (true, Some("redacted")));
    assert_eq!(masked.workload.as_deref(), Some("support"), "the model group stands in");
    let failed = row(FIXTURES[6]);
    assert_eq!((failed.status, failed.reason.as_deref()), (429, Some("failed")));
    let cached = row(FIXTURES[7]);
    assert_eq!((cached.reason.as_deref(), cached.workload.as_deref()), (Some("cached"), Some("billing")));
    assert_eq!(cached.response.as_deref(), Some("Attached."), "both bodies were strings");
    assert_eq!(cached.messages[0].plain_text(), "Invoice?");
}

#[test]
fn litellm_messages_come_in_every_shape() {
    let with = |messages: Value| {
        json!({"id": "1", "call_type": "completion", "startTime": 1.77e9, "messages": messages}).to_string()
    };
    for shape in [
        json!("Hi"),
        json!({"role": "user", "content": "Hi"}),
        json!({"messages": [{"role": "user", "content": "Hi"}]}),
        json!("{\"role\": \"user\", \"content\": \"Hi\"}"),
    ] {
        assert_eq!(row(&with(shape)).messages, [crate::record::Message::text("user", "Hi")]);
    }
    assert_eq!(reasons(&with(Value::Null)), ["missing_messages"]);
    assert_eq!(reasons(&with(json!([]))), ["missing_messages"]);
    assert_eq!(reasons(&with(json!({"prompt": "x"}))), ["bad_messages"]);
    let embedding = json!({"id": "1", "call_type": "aembedding", "startTime": 1.77e9, "messages": "text"});
    assert_eq!(reasons(&embedding.to_string()), ["skip not_chat"]);
    let wrapped =
        json!({"kwargs": 1, "standard_logging_object": serde_json::from_str::<Value>(&with(json!("Hi"))).unwrap()});
    assert_eq!(row(&wrapped.to_string()).extra["kwargs"], 1);
}

#[test]
fn litellm_payloads_come_one_by_one_as_an_array_and_as_lines() {
    let compact = |text: &&str| serde_json::from_str::<Value>(text).unwrap().to_string();
    let payloads: Vec<String> = FIXTURES[4..8].iter().map(compact).collect();
    let alone: Vec<Outcome> = payloads.iter().flat_map(|payload| read_text(payload)).collect();
    assert!(alone.len() == 4 && alone.iter().all(|outcome| matches!(outcome, Outcome::Row(_))));
    assert_eq!(read_text(&format!("[{}]", payloads.join(","))), alone);
    assert_eq!(read_text(&payloads.join("\n")), alone);
}

#[test]
fn litellm_calls_of_every_interface_keep_what_was_asked() {
    let payload = |more: Value| {
        let mut record = json!({"id": "1", "call_type": "acompletion", "startTime": 1.77e9, "messages": "Hi"});
        record.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        record
    };
    let legacy = row(&payload(json!({"call_type": "atext_completion"})).to_string());
    assert_eq!(legacy.reason.as_deref(), Some("raw_prompt"));
    let system = json!({"call_type": "anthropic_messages", "model_parameters": {"system": "Be brief."}});
    let roles: Vec<String> = row(&payload(system).to_string()).messages.into_iter().map(|m| m.role).collect();
    assert_eq!(roles, ["system", "user"]);
    let three = json!({"model_group": "support", "model": "openai/m", "response": {"model": "m-2026", "choices": []}});
    let query = row(&payload(three).to_string());
    assert_eq!((query.model.as_deref(), query.served_version.as_deref()), (Some("support"), Some("m-2026")));
    assert_eq!(query.extra["model"], "openai/m");
    let passed = json!({"metadata": {"requester_custom_headers": {"x-taod-train": "false", "x-workload": "w"}}});
    let query = row(&payload(passed).to_string());
    assert_eq!((query.reason.as_deref(), query.workload.as_deref()), (Some("opt_out"), Some("w")));
    let inner = payload(json!({"custom": "inner", "metadata": {"a": 1}}));
    let wrapped = json!({"standard_logging_object": inner, "custom": "outer", "metadata": {"b": 2}});
    let extra = row(&wrapped.to_string()).extra;
    assert_eq!((&extra["custom"], &extra["kwargs.custom"]), (&json!("inner"), &json!("outer")));
    assert_eq!((&extra["metadata"], &extra["kwargs.metadata"]), (&json!({"a": 1}), &json!({"b": 2})));
}

#[test]
fn every_reason_not_to_train_is_seen_and_the_strongest_counts() {
    let cases = [
        (json!({"status": 500}), "failed"),
        (json!({"status": "404"}), "failed"),
        (json!({"error": {"message": "x"}, "response": null}), "failed"),
        (json!({"cache_hit": "True"}), "cached"),
        (json!({"truncated": true}), "truncated"),
        (json!({"request": {"metadata": {"do_not_train": true}}}), "opt_out"),
        (json!({"request": {"metadata": {"do_not_train": "true"}}}), "opt_out"),
        (json!({"headers": {"cf-aig-collect-log-payload": "false"}}), "opt_out"),
        (json!({"request": {"user": "taod-internal"}}), "self"),
        (json!({"end_user": "taod-internal"}), "self"),
        (json!({"request": {"user": "x", "metadata": {"user": "taod-internal"}}}), "self"),
        (json!({"response": {"choices": [{"message": {"content": "Dear [REDACTED_NAME]"}}]}}), "redacted"),
        (
            json!({"request": {"messages": [{"role": "user", "content": [{"type": "text", "text": "[redacted] x"}]}]}}),
            "redacted",
        ),
        (json!({"request": {"user": "taod-internal", "metadata": {"do_not_train": true}}, "status": 500}), "self"),
        (json!({"request": {"metadata": {"do_not_train": true}}, "status": 500, "cache_hit": true}), "opt_out"),
    ];
    for (more, expected) in cases {
        assert_eq!(reason_of(&pair(more.clone())).as_deref(), Some(expected), "{more}");
    }
    assert_eq!(reason_of(&pair(json!({"request": {"metadata": {"do_not_train": false}}}))), None);
    for (header, value, expected) in [
        ("X-Taod-Train", "false", Some("opt_out")),
        ("x-taod-train", "true", None),
        ("x-taod-internal", "proof", Some("self")),
        ("CF-AIG-Collect-Log-Payload", "False", Some("opt_out")),
    ] {
        assert_eq!(row_with(&pair(json!({})), &[(header, value)]).reason.as_deref(), expected, "{header}: {value}");
        assert_eq!(row_with(FIXTURES[4], &[(header, value)]).reason.as_deref(), expected, "{header}: {value}");
    }
}

#[test]
fn a_header_says_no_in_any_shape_and_once_is_enough() {
    for headers in [
        json!({"cf-aig-collect-log-payload": false}),
        json!({"Cf-Aig-Collect-Log-Payload": ["false"]}),
        json!({"x-taod-train": ["true", "no"]}),
    ] {
        let record = pair(json!({"headers": headers}));
        assert_eq!(reason_of(&record).as_deref(), Some("opt_out"), "{headers}");
        let other = row_with(&record, &[("x-taod-train", "true"), ("cf-aig-collect-log-payload", "true")]);
        assert_eq!(other.reason.as_deref(), Some("opt_out"), "{headers}: the record's own header says yes");
    }
    let both = json!({"request": {"metadata": {"no_train": true, "do_not_train": false}}});
    assert_eq!(reason_of(&pair(both)).as_deref(), Some("opt_out"));
    for mask in ["<REDACTED>", "[REDACTED_EMAIL]", "***redacted***", "__REDACTED__", "redacted-by-litellm"] {
        let text = format!("Dear {mask},");
        assert_eq!(reason_of(&pair(json!({"response": text}))).as_deref(), Some("redacted"), "{mask}");
    }
    assert_eq!(reason_of(&pair(json!({"response": "The report was redacted (redacted_at is set)."}))), None);
}

#[test]
fn the_workload_comes_from_the_request_then_the_logger_then_the_header() {
    let all = json!({"request": {"metadata": {"workload": "a"}}, "workload_id": "b"});
    assert_eq!(row_with(&pair(all), &[("x-workload", "c")]).workload.as_deref(), Some("a"));
    assert_eq!(row_with(&pair(json!({"workload_id": "b"})), &[("x-workload", "c")]).workload.as_deref(), Some("b"));
    assert_eq!(row_with(&pair(json!({})), &[("X-Workload", "c")]).workload.as_deref(), Some("c"));
    assert_eq!(row(&pair(json!({}))).workload, None);
}

#[test]
fn secrets_of_logged_headers_are_dropped() {
    let query = row(&pair(json!({"headers": {"Authorization": "Bearer s3cret", "x-workload": "w", "accept": "*/*"}})));
    assert_eq!(query.workload.as_deref(), Some("w"));
    assert_eq!(query.extra["headers"], json!({"x-workload": "w", "accept": "*/*"}));
}

#[test]
fn feedback_is_kept_for_its_call() {
    let query = row(FIXTURES[8]);
    assert_eq!((query.kind, query.request_id.as_deref()), (Kind::Feedback, Some("chatcmpl-1")));
    assert_eq!(query.feedback, Some(json!({"thumb": "down", "comment": "wrong"})));
    assert_eq!(query.user.as_deref(), Some("u-17"));
    assert!(!query.train_ok);
    assert_eq!(reasons(r#"{"feedback": {"thumb": "up"}}"#), ["missing_request_id"]);
    let inline = row(&pair(json!({"feedback": 1})));
    assert_eq!((inline.kind, inline.feedback), (Kind::Call, Some(json!(1))));
}

#[test]
fn one_record_may_hold_several_calls() {
    assert_eq!(reasons(FIXTURES[9]), ["openai", "not_json", "feedback", "unknown_format", "unknown_format"]);
    let call = pair(json!({}));
    assert_eq!(reasons(&format!("[{call},{call}]")), ["openai", "openai"]);
    assert_eq!(reasons(&format!("{call}\r\n{call}\r\n")), ["openai", "openai"]);
    assert_eq!(reasons(&format!("\u{FEFF}{call}")), ["openai"]);
    let many = format!("[{}]", vec!["{}"; MAX_ITEMS + 1].join(","));
    assert_eq!(reasons(&many), ["too_many_items"]);
    assert_eq!(reasons(&format!("[{}]", vec!["1"; 100].join(","))), ["unknown_format"]);
}

#[test]
fn whatever_is_no_call_says_why() {
    let deep = |levels: usize| format!("{}{}", "[".repeat(levels), "]".repeat(levels));
    let cases = [
        ("".to_owned(), "skip empty"),
        (" \n".to_owned(), "skip empty"),
        ("null".to_owned(), "skip empty"),
        ("[]".to_owned(), "skip empty"),
        ("{".to_owned(), "not_json"),
        ("hello".to_owned(), "not_json"),
        ("7".to_owned(), "unknown_format"),
        ("\"request\"".to_owned(), "unknown_format"),
        ("{}".to_owned(), "unknown_format"),
        (deep(10_000), "too_deep"),
        (deep(MAX_DEPTH + 1), "too_deep"),
        (deep(MAX_DEPTH), "unknown_format"),
        (r#"{"request": {"messages": [{"role": "user", "content": "x"}], "seed": 1e999}}"#.to_owned(), "bad_number"),
        (r#"{"request": {}}"#.to_owned(), "missing_messages"),
        (r#"{"request": {"messages": []}}"#.to_owned(), "missing_messages"),
        (r#"{"request": {"messages": "Hi"}}"#.to_owned(), "bad_messages"),
        (r#"{"request": {"messages": [{"content": "Hi"}]}}"#.to_owned(), "bad_messages"),
        (r#"{"request": {"messages": [null]}}"#.to_owned(), "bad_messages"),
        (r#"{"request": {"input": "Hi"}}"#.to_owned(), "not_chat"),
        (r#"{"request": "not a body"}"#.to_owned(), "bad_request"),
        (r#"{"request": "[1]"}"#.to_owned(), "bad_request"),
        (json!({"request": deep(10_000)}).to_string(), "too_deep"),
    ];
    for (text, expected) in cases {
        assert_eq!(reasons(&text), [expected], "{}", &text[..text.len().min(80)]);
        if let [Outcome::DeadLetter { message, .. }] = read_text(&text).as_slice() {
            assert!(message.contains(": ") && !message.ends_with('.'), "no remedy: {message}");
        }
    }
    let bad = read(b"{\"request\": \"\xff\"}", &BTreeMap::new(), &Rules::default());
    assert!(matches!(bad.as_slice(), [Outcome::DeadLetter { reason: Reason::InvalidUtf8, .. }]), "{bad:?}");
}

#[test]
fn a_poison_item_at_any_position_spoils_no_other() {
    let call = pair(json!({}));
    let deep = format!("{{\"request\": {}}}", "[".repeat(10_000) + &"]".repeat(10_000));
    let poisons = [
        ("{\"request\": ", "not_json"),
        ("null", "skip empty"),
        ("{\"request\": {\"messages\": null}}", "missing_messages"),
        ("{\"request\": {\"messages\": {}}}", "bad_messages"),
        ("{\"request\": 1e999}", "bad_number"),
        ("[]", "skip empty"),
        ("7", "unknown_format"),
        (deep.as_str(), "too_deep"),
    ];
    for (poison, expected) in poisons {
        for at in 0..4 {
            let mut lines = vec![call.as_str(); 3];
            lines.insert(at, poison);
            let mut all = ["openai"; 4];
            all[at] = expected;
            assert_eq!(reasons(&lines.join("\n")), all, "{expected} at line {at}");
            if !matches!(expected, "not_json" | "too_deep" | "bad_number" | "skip empty") {
                assert_eq!(reasons(&format!("[{}]", lines.join(","))), all, "{expected} at item {at}");
            }
        }
    }
    let mut bytes = format!("{call}\n").into_bytes();
    bytes.extend(b"{\"request\": \"\xff\"}\n");
    bytes.extend(call.as_bytes());
    let outcomes = read(&bytes, &BTreeMap::new(), &Rules::default());
    assert!(matches!(&outcomes[1], Outcome::DeadLetter { reason: Reason::InvalidUtf8, .. }), "{outcomes:?}");
    assert!(matches!((&outcomes[0], &outcomes[2]), (Outcome::Row(_), Outcome::Row(_))));
}

#[test]
fn numbers_may_be_texts_and_ten_megabytes_are_read() {
    let numbers = json!({"timestamp": "1772366400.25", "status": "429", "duration_ms": " 12.5 ", "sample_weight": "2",
        "response": {"usage": {"prompt_tokens": "21", "completion_tokens": "3"}}});
    let query = row(&pair(numbers));
    assert_eq!((query.event_time_us, query.status, query.duration_ms), (Some(1_772_366_400_250_000), 429, Some(12.5)));
    assert_eq!((query.sample_weight, query.prompt_tokens, query.completion_tokens), (2.0, Some(21), Some(3)));
    let large = pair(json!({"request": {"messages": [{"role": "user", "content": "x".repeat(10_000_000)}]}}));
    let query = row(&large);
    assert!(query.truncated && query.extra["full_bytes"].as_u64().is_some_and(|bytes| bytes > 10_000_000));
    assert_eq!(query.messages[0].plain_text().len(), DEFAULT_TEXT_BYTES - "user".len());
}

#[test]
fn odd_values_stay_in_extra_and_the_row_lives() {
    let odd =
        json!({"timestamp": "9999-12-31T23:59:59Z", "status": "abc", "duration_ms": -1, "sampling_fraction": 0.25});
    let query = row(&pair(odd));
    assert_eq!((query.event_time_us, query.status, query.duration_ms), (None, 200, None));
    assert_eq!(query.sample_weight, 4.0);
    assert_eq!(query.extra["timestamp"], "9999-12-31T23:59:59Z");
    assert_eq!(query.extra["status"], "abc");
    assert_eq!(row(&pair(json!({"timestamp": "0001-01-01T00:00:00Z"}))).extra["timestamp"], "0001-01-01T00:00:00Z");
}

#[test]
fn of_a_repeated_key_the_last_counts() {
    let query = row(r#"{"request": 1, "request": {"messages": [{"role": "user", "content": "a", "content": "b"}]}}"#);
    assert_eq!(query.messages[0].plain_text(), "b");
}

#[test]
fn lines_of_the_records_command_carry_the_index() {
    let outcomes = read_text(FIXTURES[9]);
    let lines: Vec<Value> = outcomes.iter().map(|outcome| canonical_json(3, outcome)).collect();
    assert!(lines.iter().all(|line| line["index"] == 3));
    assert_eq!(lines[0]["messages"][0]["content"], "One");
    assert_eq!(lines[0]["prompt_hash"].as_str().map(str::len), Some(64));
    assert_eq!(lines[1]["dead_letter"], "not_json");
    assert!(lines[1]["message"].as_str().is_some_and(|m| !m.is_empty()));
    assert_eq!(lines[2]["kind"], "feedback");
    assert_eq!(canonical_json(0, &Outcome::Skip { reason: Reason::Empty }), json!({"index": 0, "skip": "empty"}));
}

#[test]
fn reason_names_are_unique() {
    let names: std::collections::BTreeSet<&str> = Reason::ALL.iter().map(|reason| reason.as_str()).collect();
    assert_eq!(names.len(), Reason::ALL.len());
}
