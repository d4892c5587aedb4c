//! Servers that answer well, badly and not at all.

use std::net::TcpListener;

use super::*;
use crate::rewards::testing::{Server, items, ok, respond, serve};

fn settings(url: &str, route: &str, more: &str) -> Settings {
    let base = format!("url = '{url}'\nroute = '{route}'\nversion = '1'\n{more}\n");
    let asking = if more.contains("asking") { "" } else { "asking = { retries = 1, timeout_s = 5 }" };
    toml::from_str(&format!("{base}{asking}")).unwrap()
}

fn score(settings: &Settings, items: &[Item]) -> Result<Vec<f64>, String> {
    let remote = Remote::open("r", settings).unwrap();
    remote.score(&items.iter().collect::<Vec<_>>()).map_err(|e| e.to_string())
}

fn two() -> Vec<Item> {
    items(&[("q1", "a1"), ("q2", "a2")])
}

#[test]
fn every_route_asks_and_reads_in_its_own_way() {
    let data = |entries: &str| ok(&format!("{{\"data\": [{entries}]}}"));
    let cases = [
        (
            "score",
            "",
            "/score",
            data(r#"{"index":1,"score":0.75},{"index":0,"score":0.25}"#),
            json!({ "text_1": ["q1", "q2"], "text_2": ["a1", "a2"], "use_activation": true, "model": "m", "user": "taod-internal", "truncate_prompt_tokens": -1 }),
        ),
        (
            "classify",
            "text = 'Q: {question} A: {answer}'",
            "/v1/classify",
            data(r#"{"index":0,"probs":[0.25]},{"index":1,"probs":[0.75]}"#),
            json!({ "input": ["Q: q1 A: a1", "Q: q2 A: a2"], "use_activation": true, "model": "m", "user": "taod-internal", "truncate_prompt_tokens": -1 }),
        ),
        (
            "sglang_reward",
            "",
            "/classify",
            ok(r#"[{"embedding":[0.25]},{"embedding":[0.75]}]"#),
            json!({ "text": ["q1\n\na1", "q2\n\na2"], "model": "m" }),
        ),
        (
            "tei_predict",
            "",
            "/predict",
            ok(r#"[[{"score":0.25,"label":"x"}],[{"score":0.75,"label":"x"}]]"#),
            json!({ "inputs": [["q1", "a1"], ["q2", "a2"]], "raw_scores": false, "truncate": true, "model": "m" }),
        ),
        (
            "plain",
            "",
            "/",
            ok(r#"{"scores":[0.25,0.75]}"#),
            json!({ "items": [
                { "messages": [{ "role": "user", "content": "q1" }], "response": "a1", "workload": "shop" },
                { "messages": [{ "role": "user", "content": "q2" }], "response": "a2", "workload": "shop" },
            ], "model": "m" }),
        ),
    ];
    for (route, more, path, answer, body) in cases {
        let server = serve(&[&answer]);
        let found = score(&settings(&server.url, route, &format!("model = 'm'\n{more}")), &two());
        assert_eq!(found, Ok(vec![0.25, 0.75]), "{route}");
        let (line, asked) = server.asked.recv().unwrap();
        assert_eq!((line, asked), (format!("POST {path} HTTP/1.1"), body), "{route}");
    }
}

#[test]
fn conversations_go_one_by_one_to_pooling_and_answers_by_question_to_rerank() {
    let server = serve(&[&ok(r#"{"data":[{"index":0,"data":[1.5]}]}"#), &ok(r#"{"data":[{"index":0,"data":-2.5}]}"#)]);
    let logits = "scale = 'logit'\nasking = { concurrency = 1, timeout_s = 5 }";
    assert_eq!(score(&settings(&server.url, "pooling", logits), &two()), Ok(vec![1.5, -2.5]));
    let (_, asked) = server.asked.recv().unwrap();
    let turns = json!([{ "role": "user", "content": "q1" }, { "role": "assistant", "content": "a1" }]);
    assert_eq!(asked["messages"], turns);
    assert_eq!((&asked["add_generation_prompt"], &asked["use_activation"]), (&json!(false), &json!(false)));

    let server =
        serve(&[&ok(r#"[{"index":1,"score":0.9},{"index":0,"score":0.1}]"#), &ok(r#"[{"index":0,"score":0.5}]"#)]);
    let mixed = items(&[("b", "1"), ("c", "2"), ("b", "3")]);
    let one = "asking = { concurrency = 1, timeout_s = 5 }";
    assert_eq!(score(&settings(&server.url, "tei_rerank", one), &mixed), Ok(vec![0.1, 0.5, 0.9]));
    let (_, asked) = server.asked.recv().unwrap();
    assert_eq!((&asked["query"], &asked["texts"]), (&json!("b"), &json!(["1", "3"])));
}

#[test]
fn what_is_no_score_is_refused_with_the_servers_name() {
    let plain = |body: &str| serve(&[&ok(body)]);
    let refused = |server: &Server, more: &str| score(&settings(&server.url, "plain", more), &two()).unwrap_err();
    for (body, part) in [
        (r#"{"scores":[0.1]}"#, "gives 1 scores where 2 were asked for"),
        (r#"{"scores":[0.1,0.2,0.3]}"#, "gives 3 scores where 2 were asked for"),
        (r#"{"detail":"no"}"#, "gives 0 scores where 2 were asked for"),
        (r#"{"scores":[0.1,1.5]}"#, "gives 1.5 as a score, which is not a number in [0, 1]"),
        (r#"{"scores":[0.1,null]}"#, "gives null as a score"),
        (r#"{"scores":[0.1,"0.2"]}"#, "gives \"0.2\" as a score"),
        (r#"{"scores":[0.1,NaN]}"#, "a number that is none (NaN or Infinity)"),
        ("<!doctype html><p>login</p>", "answers with HTML, not with JSON"),
        ("", "answers with nothing, not with JSON"),
        ("ok", "answers with text, not with JSON"),
    ] {
        let server = plain(body);
        let message = refused(&server, "");
        assert!(message.contains(part) && message.contains(&server.url), "{body}: {message}");
    }
    let twice = plain(r#"{"data":[{"index":0,"score":0.1},{"index":0,"score":0.2}]}"#);
    let message = score(&settings(&twice.url, "score", ""), &two()).unwrap_err();
    assert!(message.contains("where 2 were asked for"), "{message}");
    // A logit may be what a share may not, but no more than finite.
    let server = plain(r#"{"scores":[-3.5,12.0]}"#);
    assert_eq!(score(&settings(&server.url, "plain", "scale = 'logit'"), &two()), Ok(vec![-3.5, 12.0]));
}

#[test]
fn a_server_that_is_down_slow_or_unwilling_is_given_up_within_the_budget() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let gone = format!("http://{}", listener.local_addr().unwrap());
    // Nobody accepts: connections wait, and answers never come.
    let slow = score(&settings(&gone, "plain", "asking = { retries = 0, timeout_s = 1 }"), &two()).unwrap_err();
    assert!(slow.contains("gave no answer within 1 s (asked 1 times)"), "{slow}");
    drop(listener);
    let down = score(&settings(&gone, "plain", ""), &two()).unwrap_err();
    assert!(down.contains(&gone) && down.contains("cannot be reached (asked 2 times)"), "{down}");

    let busy = respond("503 Service Unavailable", "loading");
    let server = serve(&[&busy, &ok(r#"{"scores":[0.25,0.75]}"#)]);
    assert_eq!(score(&settings(&server.url, "plain", ""), &two()), Ok(vec![0.25, 0.75]));
    let server = serve(&[&busy]);
    let none = "batch = 1\nasking = { retries = 5, retry_budget = 1, concurrency = 1, timeout_s = 5 }";
    let spent = score(&settings(&server.url, "plain", none), &two()).unwrap_err();
    assert!(spent.contains("503") && spent.contains("asked 2 times") && spent.contains("loading"), "{spent}");
    let server = serve(&[&respond("404 Not Found", "no such route")]);
    let wrong = score(&settings(&server.url, "plain", ""), &two()).unwrap_err();
    assert!(wrong.contains("404") && wrong.contains("asked 1 times"), "{wrong}");
}

#[test]
fn settings_are_checked_and_decide_the_identity() {
    let refusal = |toml: &str| toml::from_str::<Settings>(toml).unwrap().validate().unwrap_err();
    assert!(refusal("url = 'ftp://x'\nroute = 'plain'\nversion = '1'").starts_with("url = \"ftp://x\""));
    assert!(refusal("url = 'http://x'\nroute = 'plain'\nversion = ''").starts_with("version is empty"));
    assert!(refusal("url = 'http://x'\nroute = 'classify'\nversion = '1'\ntext = 'x'").contains("{answer}"));
    let long = "url = 'http://x'\nroute = 'plain'\nversion = '1'\nasking = { timeout_s = 0 }";
    assert_eq!(refusal(long), "asking.timeout_s = 0: choose 1 to 3600");
    let identity = |more: &str| Remote::open("r", &settings("http://x", "plain", more)).unwrap().identity();
    assert_eq!(identity(""), identity("batch = 3"));
    assert_ne!(identity(""), identity("model = 'other'"));
    assert_ne!(identity(""), identity("scale = 'logit'"));
}
