use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::*;

fn state() -> State {
    State {
        metrics: Arc::new(Metrics::new().unwrap()),
        health: Arc::new(Health::default()),
        status: Arc::new(|| json!({ "round": null })),
        current: Arc::new(|| Value::Null),
    }
}

/// Returns status code and body of `GET path`, over a real socket to the page on its own thread.
fn get(state: &State, path: &str, host: &str) -> (u16, String) {
    let listener = bind(&Settings { listen: "127.0.0.1:0".into() }).unwrap();
    let address = listener.local_addr().unwrap();
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let page = spawn(listener, state.clone(), async { drop(stopped.await) }).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let answer = runtime.block_on(async {
        let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    });
    stop.send(()).unwrap();
    page.join().unwrap().unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_string())
}

#[test]
fn health_and_readiness_are_two_questions() {
    let state = state();
    state.health.not_ready("broker", "cannot reach 127.0.0.1:9092");
    assert_eq!(get(&state, "/healthz", "localhost"), (200, "ok\n".into()));
    assert_eq!(get(&state, "/readyz", "localhost"), (503, "broker: cannot reach 127.0.0.1:9092\n".into()));
    assert!(get(&state, "/metrics", "localhost").1.contains("\ntaod_daemon_ready_state 0\n"));
    state.health.ready("broker");
    state.health.beat("ingest", Duration::ZERO);
    assert_eq!(get(&state, "/readyz", "localhost"), (200, "ok\n".into()));
    assert_eq!(get(&state, "/healthz", "localhost"), (503, "stuck: ingest\n".into()));
    assert!(get(&state, "/metrics", "localhost").1.contains("\ntaod_daemon_ready_state 1\n"));
}

#[test]
fn the_api_answers_json() {
    let mut state = state();
    assert_eq!(get(&state, "/api/v1/status", "[::1]:80"), (200, r#"{"round":null}"#.into()));
    assert_eq!(get(&state, "/api/v1/current", "127.0.0.1").0, 404);
    state.current = Arc::new(|| json!({ "version": "v1" }));
    assert_eq!(get(&state, "/api/v1/current", "127.0.0.1"), (200, r#"{"version":"v1"}"#.into()));
}

#[test]
fn a_foreign_host_name_is_refused() {
    for host in ["evil.example", "127.0.0.1.evil.example:80", "localhost.evil", ""] {
        assert_eq!(get(&state(), "/metrics", host).0, 403, "{host}");
    }
}

#[test]
fn only_loopback_addresses_are_taken() {
    let refuse = |listen: &str| Settings { listen: listen.into() }.validate().unwrap_err();
    assert!(refuse("0.0.0.0:9464").ends_with("write 127.0.0.1:9464 and put a proxy that asks for one in front"));
    assert!(refuse("[::]:1").contains("can be reached from other machines"));
    assert!(refuse("localhost").contains("is not an address with a port"));
    assert_eq!(Settings { listen: "[::1]:0".into() }.validate(), Ok(()));
    assert_eq!(Settings::default().validate(), Ok(()));
}

#[test]
fn a_taken_port_is_named_with_the_remedy() {
    let first = bind(&Settings { listen: "127.0.0.1:0".into() }).unwrap();
    let listen = first.local_addr().unwrap().to_string();
    let message = bind(&Settings { listen: listen.clone() }).unwrap_err();
    assert!(message.starts_with(&format!("admin.listen {listen}: cannot listen (")), "{message}");
}
