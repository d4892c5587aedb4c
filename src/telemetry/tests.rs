use std::sync::{Arc, Mutex};

use axum::Router;
use axum::body::Bytes;
use axum::http::{HeaderMap, StatusCode, Uri};

use super::*;

/// What a collector was sent: the path, and the body.
type Sent = Arc<Mutex<Vec<(String, Vec<u8>)>>>;

/// A collector that answers with one status after the other, the last one for ever, and this body.
async fn collector(statuses: &'static [u16], answer: Vec<u8>) -> (Settings, Sent) {
    let sent: Sent = Arc::default();
    let kept = sent.clone();
    let handler = async move |uri: Uri, headers: HeaderMap, body: Bytes| {
        assert_eq!(headers["content-type"], "application/x-protobuf");
        assert_eq!(headers["authorization"], "Bearer hunter2");
        let mut kept = kept.lock().unwrap();
        let status = statuses[kept.len().min(statuses.len() - 1)];
        kept.push((uri.path().to_string(), body.to_vec()));
        (StatusCode::from_u16(status).unwrap(), answer)
    };
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move { axum::serve(listener, Router::new().fallback(handler)).await.unwrap() });
    let folder = tempfile::tempdir().unwrap().keep();
    std::fs::write(folder.join("headers"), "authorization: Bearer hunter2\n\n").unwrap();
    let settings = Settings {
        otlp_endpoint: format!("http://{address}/"),
        headers_file: folder.join("headers"),
        ..Settings::default()
    };
    (settings, sent)
}

fn a_span() -> Span {
    Span {
        trace_id: [1; 16],
        span_id: [2; 8],
        parent: Some([3; 8]),
        name: "taod.stage gate".into(),
        start_us: 1_796_700_000_000_000,
        end_us: 1_796_700_060_000_001,
        attributes: vec![
            ("taod.stage.rows", Attribute::Whole(-7)),
            ("taod.round", Attribute::Text("round-00001".into())),
        ],
        error: Some("it diverged".into()),
    }
}

fn an_event() -> Event {
    Event {
        time_us: 1_796_700_000_000_000,
        name: "gen_ai.evaluation.result",
        trace_id: Some([9; 16]),
        attributes: vec![("gen_ai.evaluation.score.value", Attribute::Number(0.625))],
    }
}

/// Without a pause between tries.
fn impatient(settings: &Settings) -> Exporter<'_> {
    Exporter { first_pause: Duration::ZERO, ..Exporter::new(settings).unwrap() }
}

#[tokio::test]
async fn a_collector_gets_the_bytes_that_opentelemetrys_own_classes_read() {
    let (settings, sent) = collector(&[200], vec![]).await;
    send_spans(&settings, &[a_span()]).await.unwrap();
    send_events(&settings, &[an_event()], 1_796_700_009_000_000).await.unwrap();
    let sent = sent.lock().unwrap();
    assert_eq!(sent.iter().map(|(path, _)| path.as_str()).collect::<Vec<_>>(), ["/v1/traces", "/v1/logs"]);
    // tools/reference/otlp_export.py makes these files from the same values by OpenTelemetry's classes.
    for ((_, body), name) in sent.iter().zip(["otlp_export_traces.pb", "otlp_export_logs.pb"]) {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
        assert_eq!(*body, std::fs::read(path).unwrap(), "{name}");
    }
}

#[tokio::test]
async fn many_are_sent_in_pieces() {
    let (settings, sent) = collector(&[200], vec![]).await;
    send_spans(&settings, &vec![a_span(); BATCH + 1]).await.unwrap();
    let count = |(_, body): &(String, Vec<u8>)| {
        TraceRequest::decode(body.as_slice()).unwrap().resource_spans[0].scope_spans[0].spans.len()
    };
    assert_eq!(sent.lock().unwrap().iter().map(count).collect::<Vec<_>>(), [BATCH, 1]);
}

#[tokio::test]
async fn what_may_pass_is_sent_again_and_what_will_not_is_not() {
    let tries = async |statuses: &'static [u16]| {
        let (settings, sent) = collector(statuses, vec![]).await;
        let outcome = impatient(&settings).post("/v1/traces", &TraceRequest::default()).await;
        (outcome.map_err(|error| error.to_string()), sent.lock().unwrap().len())
    };
    assert_eq!(tries(&[503, 429, 200]).await, (Ok(()), 3));
    let (outcome, count) = tries(&[502]).await;
    assert!(outcome.unwrap_err().contains("answers 502"));
    assert_eq!(count, TRIES as usize);
    let (outcome, count) = tries(&[404]).await;
    assert!(outcome.unwrap_err().contains("answers 404 Not Found: is it a collector's OTLP over HTTP?"));
    assert_eq!(count, 1);
    // OTLP names the codes that may pass, and 500 is none of them.
    assert_eq!(tries(&[500]).await.1, 1);
}

#[tokio::test]
async fn a_collector_that_takes_a_part_is_believed() {
    let partial = proto::Partial { rejected: 3, error_message: "full\n".into() };
    let answer = proto::Response { partial_success: Some(partial) }.encode_to_vec();
    let (settings, sent) = collector(&[200], answer).await;
    let error = impatient(&settings).post("/v1/traces", &TraceRequest::default()).await.unwrap_err();
    assert!(error.to_string().ends_with("did not take 3 of what it was sent: full"), "{error}");
    assert_eq!(sent.lock().unwrap().len(), 1, "a second try would double what it took");
}

#[test]
fn wrong_settings_are_told_and_headers_are_secret() {
    let refuse = |settings: Settings| settings.validate().unwrap_err();
    assert_eq!(Settings::default().validate(), Ok(()));
    assert!(
        refuse(Settings { otlp_endpoint: "collector:4318".into(), ..Settings::default() }).contains("begin it with")
    );
    assert!(refuse(Settings { timeout_s: 0, ..Settings::default() }).starts_with("timeout_s = 0: choose 1 to 60"));
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("headers");
    let with = |text: &str| {
        std::fs::write(&file, text).unwrap();
        headers(&Settings { headers_file: file.clone(), ..Settings::default() })
    };
    let good = with("X-Key: hunter2\n").unwrap();
    assert!(good["x-key"] == "hunter2" && !format!("{good:?}").contains("hunter2"));
    let error = with("x-a: b\nhunter2").unwrap_err().to_string();
    assert!(error.contains("line 2 is no header") && !error.contains("hunter2"), "{error}");
}
