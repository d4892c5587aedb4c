use std::sync::{Arc, Mutex};

use axum::Router;
use axum::body::Bytes;

use super::*;

fn evaluation(time_us: i64, id: &str, score: f64) -> Evaluation {
    let trace_id = Some("0123456789abcdef0123456789abcdef".to_string());
    Evaluation { time_us, response_id: Some(id.into()), trace_id, score, passed: score > 0.5 }
}

/// Returns whether these bytes hold that text: strings stand in protobuf as they are.
fn holds(body: &[u8], text: &str) -> bool {
    body.windows(text.len()).any(|window| window == text.as_bytes())
}

#[tokio::test]
async fn each_scored_call_is_told_once_with_its_ids() {
    let sent: Arc<Mutex<Vec<Vec<u8>>>> = Arc::default();
    let kept = sent.clone();
    let router = Router::new()
        .route("/v1/logs", axum::routing::post(async move |body: Bytes| kept.lock().unwrap().push(body.to_vec())));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let folder = tempfile::tempdir().unwrap();
    let mut config = Config::default();
    config.state.dir = folder.path().into();
    let two = [evaluation(5, "chatcmpl-1", 0.25), evaluation(7, "chatcmpl-2", 1.0)];
    send(&config, &two).await.unwrap();
    assert!(!folder.path().join("evaluations.json").exists(), "without an endpoint nothing is done");

    config.telemetry.otlp_endpoint = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
    send(&config, &two).await.unwrap();
    send(&config, &two).await.unwrap();
    send(&config, &[two[1].clone(), evaluation(8, "chatcmpl-3", 0.0)]).await.unwrap();
    let bodies = sent.lock().unwrap().clone();
    assert_eq!(bodies.len(), 2);
    for part in
        ["gen_ai.evaluation.result", "gen_ai.evaluation.score.value", "gen_ai.response.id", "chatcmpl-1", "chatcmpl-2"]
    {
        assert!(holds(&bodies[0], part), "{part}");
    }
    assert!(bodies[0].windows(8).any(|window| window == 0.25_f64.to_le_bytes()), "the score");
    assert!(bodies[0].windows(16).any(|window| window == hex::decode("0123456789abcdef0123456789abcdef").unwrap()));
    assert!(holds(&bodies[1], "chatcmpl-3") && !holds(&bodies[1], "chatcmpl-2"), "what was told is not told again");

    config.telemetry.evaluations = false;
    send(&config, &[evaluation(9, "chatcmpl-4", 0.0)]).await.unwrap();
    assert_eq!(sent.lock().unwrap().len(), 2);
}

#[tokio::test]
async fn what_could_not_be_sent_is_sent_with_the_next() {
    let folder = tempfile::tempdir().unwrap();
    let mut config = Config::default();
    config.state.dir = folder.path().into();
    config.telemetry.headers_file = folder.path().join("missing");
    config.telemetry.otlp_endpoint = "http://127.0.0.1:9".into();
    send(&config, &[evaluation(5, "a", 1.0)]).await.unwrap_err();
    assert_eq!(read(&folder.path().join("evaluations.json")).unwrap().evaluated_us, 0);
}
