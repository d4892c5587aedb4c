//! The driver against `taod serve`, and against servers that fail or lie.

use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::body::Bytes;
use axum::http::{HeaderMap, Method as Verb, StatusCode, Uri};

use super::*;
use crate::record::Message;
use crate::serve::tests::{CONTEXT, Fake};

/// What a stub saw of its requests.
#[derive(Clone, Default)]
struct Seen(Arc<Mutex<Vec<(String, HeaderMap, Value)>>>);

impl Seen {
    fn paths(&self) -> Vec<String> {
        self.0.lock().unwrap().iter().map(|(path, _, _)| path.clone()).collect()
    }
}

type Respond = fn(path: &str, calls: usize) -> (u16, &'static str, &'static str);

/// Starts a server that answers with what `respond` makes of the path and of the number of requests so far.
async fn stub(respond: Respond) -> (String, Seen) {
    let seen = Seen::default();
    let kept = seen.clone();
    let handler = async move |verb: Verb, uri: Uri, headers: HeaderMap, body: Bytes| {
        let calls = {
            let mut all = kept.0.lock().unwrap();
            all.push((format!("{verb} {}", uri.path()), headers, serde_json::from_slice(&body).unwrap_or_default()));
            all.len()
        };
        let (status, kind, text) = respond(uri.path(), calls);
        (StatusCode::from_u16(status).unwrap(), [("content-type", kind)], text)
    };
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move { axum::serve(listener, Router::new().fallback(handler)).await.unwrap() });
    (url, seen)
}

fn client(url: &str) -> Vllm {
    let settings =
        Settings { urls: vec![url.to_owned()], request_timeout_seconds: 1, retries: 2, ..Settings::default() };
    Vllm::replicas(&settings).unwrap().remove(0)
}

async fn failed_load(respond: Respond) -> (String, Seen) {
    let (url, seen) = stub(respond).await;
    let error = client(&url).load("v1", &PathBuf::from("/a/v1"), Load::Fresh).await.unwrap_err().to_string();
    assert!(!error.contains('\n') && error.contains(&url), "{error}");
    (error, seen)
}

#[tokio::test]
async fn adapters_go_in_and_out_of_our_own_server() {
    let fake = Fake::start().await;
    let server = client(&fake.url);
    let folder = PathBuf::from(fake.adapter("v1", 8));
    for _ in 0..2 {
        server.load("one", &folder, Load::Fresh).await.unwrap(); // the second finds it there
    }
    let other = PathBuf::from(fake.adapter("v2", 8));
    let error = server.load("one", &other, Load::Fresh).await.unwrap_err();
    assert!(matches!(error, EndpointError::ReadBack { .. }), "{error}");
    server.load("one", &other, Load::InPlace).await.unwrap();
    let error = server.load("two", &fake.adapters.path().join("none"), Load::Fresh).await.unwrap_err();
    assert!(matches!(error, EndpointError::Status { status: 404, .. }), "{error}");
    let error = server.load("two", &PathBuf::from(fake.adapter("wide", 16)), Load::Fresh).await.unwrap_err();
    assert!(error.to_string().contains("LoRA rank 16 is greater than max_lora_rank 8."), "{error}");
    for _ in 0..2 {
        server.unload("one").await.unwrap();
    }
    assert_eq!(server.models().await.unwrap().len(), 1);
}

#[tokio::test]
async fn an_answer_carries_ids_and_logprobs() {
    let fake = Fake::start().await;
    let messages = [Message::text("user", "hi")];
    let reply = client(&fake.url).ask(&Question { model: "base", messages: &messages, max_tokens: 50 }).await.unwrap();
    assert_eq!((reply.text.as_str(), reply.finish_reason.as_deref()), ("base: hi", Some("stop")));
    assert_eq!((reply.logprobs.len(), reply.token_ids.map(|ids| ids[0])), (9, Some(98)));
    assert_eq!(reply.pieces[0], "b");
    let long = [Message::text("user", "x".repeat(CONTEXT))];
    let error = client(&fake.url).ask(&Question { model: "base", messages: &long, max_tokens: 5 }).await.unwrap_err();
    assert!(error.to_string().contains("maximum context length"), "{error}");
}

#[tokio::test]
async fn an_alias_is_moved_only_from_what_is_expected() {
    let fake = Fake::start().await;
    let server = client(&fake.url);
    server.load("one", &PathBuf::from(fake.adapter("v1", 8)), Load::Fresh).await.unwrap();
    server.move_alias("prod", None, "base").await.unwrap();
    server.move_alias("prod", Some("base"), "one").await.unwrap();
    server.move_alias("prod", Some("base"), "one").await.unwrap(); // a repeated move has already happened
    let error = server.move_alias("prod", Some("two"), "base").await.unwrap_err();
    assert!(matches!(error, EndpointError::AliasMoved { .. }), "{error}");
    assert_eq!(server.alias("prod").await.unwrap().as_deref(), Some("one"));
}

#[tokio::test]
async fn a_failed_load_is_final_and_told_in_one_line() {
    let (error, seen) = failed_load(|_, _| (500, "application/json", r#"{"error":{"message":"bad\n  rank"}}"#)).await;
    assert!(error.contains("answered 500 to the load of 'v1': bad rank"), "{error}");
    assert_eq!(seen.paths().len(), 1, "a load that failed in the engine must not be repeated");
}

#[tokio::test]
async fn a_busy_server_is_asked_again_but_not_for_ever() {
    let (url, seen) = stub(|_, calls| match calls {
        1 | 2 => (503, "text/plain", "busy"),
        _ => (200, "application/json", r#"{"data":[]}"#),
    })
    .await;
    assert_eq!(client(&url).models().await.unwrap(), []);
    assert_eq!(seen.paths().len(), 3);
    let (url, seen) = stub(|_, _| (429, "text/plain", "busy")).await;
    assert!(matches!(client(&url).models().await, Err(EndpointError::Status { status: 429, .. })));
    assert_eq!(seen.paths().len(), 3);
}

#[tokio::test]
async fn what_is_no_model_server_is_called_so() {
    let (error, _) = failed_load(|_, _| (200, "text/html; charset=utf-8", "<html>hello</html>")).await;
    assert!(error.contains("web page (status 200)"), "{error}");
    let (error, _) = failed_load(|_, _| (502, "text/plain", "<!doctype html>")).await;
    assert!(error.contains("web page (status 502)"), "{error}");
    let (error, _) = failed_load(|_, _| (404, "application/json", r#"{"detail":"Not Found"}"#)).await;
    assert!(error.contains("VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"), "{error}");
    let (error, _) = failed_load(|_, _| (200, "application/json", r#"{"models":[]}"#)).await;
    assert!(error.contains("without data; is it an OpenAI-compatible server?"), "{error}");
}

#[tokio::test]
async fn a_load_that_is_not_listed_is_not_believed() {
    let (error, _) = failed_load(|path, _| match path {
        "/v1/models" => (200, "application/json", r#"{"data":[{"id":"base","root":"/m"},{"id":"v1","root":"/old"}]}"#),
        _ => (200, "text/plain", "Success"),
    })
    .await;
    assert!(error.contains("load 'v1' from /a/v1 but lists it with root /old"), "{error}");
}

#[tokio::test]
async fn a_server_that_is_not_there_or_says_nothing_is_named() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let count = Arc::new(Mutex::new(0));
    let counted = count.clone();
    let hangs_up = tokio::spawn(async move {
        while let Ok((connection, _)) = listener.accept().await {
            *counted.lock().unwrap() += 1;
            drop(connection);
        }
    });
    let error = client(&url).models().await.unwrap_err();
    assert!(matches!(error, EndpointError::Unreachable { .. }), "{error}");
    assert_eq!(*count.lock().unwrap(), 3, "once and two retries");
    hangs_up.abort();
    drop(hangs_up.await);
    let error = client(&url).models().await.unwrap_err().to_string();
    assert!(error.contains(&url) && error.contains("refused"), "{error}");

    let mute = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", mute.local_addr().unwrap());
    let error = client(&url).models().await.unwrap_err();
    assert!(matches!(error, EndpointError::Silent { .. }), "{error}");
}

#[tokio::test]
async fn each_request_is_marked_as_our_own_and_carries_the_key() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("key");
    std::fs::write(&file, "secret\n").unwrap();
    let (url, seen) = stub(|_, _| (200, "application/json", "{}")).await;
    let settings = Settings { urls: vec![url], api_key_file: file, ..Settings::default() };
    let server = Vllm::replicas(&settings).unwrap().remove(0);
    let messages = [Message::text("user", "hi")];
    let error = server.ask(&Question { model: "m", messages: &messages, max_tokens: 1 }).await.unwrap_err();
    assert!(!error.to_string().contains("secret"));
    let (_, headers, body) = seen.0.lock().unwrap().remove(0);
    assert_eq!(
        (&headers["x-taod-internal"], &headers["authorization"]),
        (&"1".parse().unwrap(), &"Bearer secret".parse().unwrap())
    );
    assert_eq!(
        (&body["user"], &body["temperature"], &body["model"]),
        (&json!("taod-internal"), &json!(0.0), &json!("m"))
    );
    let missing = Settings { api_key_file: folder.path().join("none"), ..Settings::default() };
    assert!(matches!(Vllm::replicas(&missing), Err(EndpointError::Key(_))));
}
