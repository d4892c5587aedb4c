use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use axum::Router;
use axum::http::{HeaderMap, StatusCode};
use serde_json::{Value, json};

use super::settings::{Command, Webhook};
use super::*;

/// A server that answers with one status after the other, the last one for ever, and keeps what it was sent.
struct Chat {
    url: String,
    sent: Arc<Mutex<Vec<Value>>>,
}

async fn chat(statuses: &'static [u16]) -> Chat {
    let sent = Arc::new(Mutex::new(Vec::new()));
    let kept = sent.clone();
    let answer = async move |headers: HeaderMap, body: String| {
        assert_eq!(headers["content-type"], "application/json");
        let mut kept = kept.lock().unwrap();
        let status = statuses[kept.len().min(statuses.len() - 1)];
        kept.push(serde_json::from_str(&body).unwrap());
        let headers = [("retry-after", "0"), ("location", "/elsewhere")];
        (StatusCode::from_u16(status).unwrap(), headers, "what\nthe server\u{1b}[31m says")
    };
    let router = Router::new().fallback(answer);
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/services/T000/hunter2", listener.local_addr().unwrap());
    tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
    Chat { url, sent }
}

fn to(kind: Way, retries: u32) -> Destination {
    Destination { name: "ops".into(), kind, events: Event::ALL.to_vec(), timeout_s: 10, retries }
}

fn webhook(folder: &Path, url: &str, body: Body) -> Way {
    std::fs::write(folder.join("url"), format!("{url}\n")).unwrap();
    Way::Webhook(Webhook { url_file: folder.join("url"), body })
}

fn notice() -> Notice {
    let text = "taod-2 was rolled back to taod-1: <!channel> reward & length fell\n(live)";
    Notice::new(Event::Rollback, 7, "production", text).of("taod-1")
}

/// Without a pause to wait for between tries.
async fn deliver(destination: &Destination) -> Result<(), NotifyError> {
    destination.deliver_with(&notice(), Duration::ZERO).await
}

#[tokio::test]
async fn slack_gets_one_escaped_text_and_others_the_whole_notice() {
    let folder = tempfile::tempdir().unwrap();
    let chat = chat(&[200]).await;
    for body in [Body::Slack, Body::Notice] {
        deliver(&to(webhook(folder.path(), &chat.url, body), 0)).await.unwrap();
    }
    let sent = chat.sent.lock().unwrap();
    let text = "taod, production: taod-2 was rolled back to taod-1: &lt;!channel&gt; reward &amp; length fell (live)";
    assert_eq!(sent[0], json!({ "text": text }));
    assert_eq!(
        (&sent[1]["event"], &sent[1]["version"], &sent[1]["time_us"]),
        (&json!("rollback"), &json!("taod-1"), &json!(7))
    );
    assert_eq!(sent[1].get("source"), None);
}

#[tokio::test]
async fn what_may_pass_is_tried_again_and_what_will_not_is_not() {
    let folder = tempfile::tempdir().unwrap();
    let tries = async |statuses: &'static [u16], retries: u32| {
        let chat = chat(statuses).await;
        let outcome = deliver(&to(webhook(folder.path(), &chat.url, Body::Slack), retries)).await;
        (outcome.map_err(|error| error.to_string()), chat.sent.lock().unwrap().len())
    };
    assert_eq!(tries(&[503, 429, 200], 5).await, (Ok(()), 3));
    let says = |status: u16| Err(format!("the webhook answers {status}: what the server [31m says"));
    assert_eq!(tries(&[500], 2).await, (says(500), 3));
    assert_eq!(tries(&[404], 5).await, (says(404), 1));
    // The address may lead elsewhere, and the notice does not follow.
    assert_eq!(tries(&[302, 200], 5).await, (says(302), 1));
}

#[tokio::test]
async fn an_error_never_tells_the_address() {
    let folder = tempfile::tempdir().unwrap();
    let unused = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let down = to(webhook(folder.path(), &format!("http://{unused}/hunter2"), Body::Slack), 1);
    let error = deliver(&down).await.unwrap_err();
    assert!(matches!(error, NotifyError::Down(_)), "{error:?}");
    assert!(!format!("{error} {error:?}").contains("hunter2"), "{error:?}");
    for wrong in ["hunter2", "file:///hunter2", ""] {
        let error = deliver(&to(webhook(folder.path(), wrong, Body::Slack), 5)).await.unwrap_err();
        assert!(error.to_string().contains(&folder.path().display().to_string()), "{error}");
        assert!(!format!("{error} {error:?}").contains("hunter2"), "{error:?}");
    }
}

#[tokio::test]
async fn a_server_that_is_silent_is_left_when_the_time_is_up() {
    let folder = tempfile::tempdir().unwrap();
    // It takes connections, and never reads or answers.
    let mute = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/", mute.local_addr().unwrap());
    let destination = Destination { timeout_s: 1, ..to(webhook(folder.path(), &url, Body::Slack), 0) };
    assert!(matches!(deliver(&destination).await, Err(NotifyError::Silent(1))));
}

/// Returns a program with this shell script in it.
fn program(folder: &Path, script: &str) -> Way {
    let path = folder.join("program");
    std::fs::write(&path, format!("#!/bin/sh\ncd {}\n{script}\n", folder.display())).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o700)).unwrap();
    Way::Command(Command { command: vec![path.display().to_string(), "argument".into()] })
}

#[tokio::test]
async fn a_program_reads_the_notice_and_nothing_of_our_environment() {
    let folder = tempfile::tempdir().unwrap();
    let way = program(folder.path(), "echo \"$1 ${CARGO_MANIFEST_DIR-none}\" > environment; cat > notice");
    deliver(&to(way, 0)).await.unwrap();
    let read = |name: &str| std::fs::read_to_string(folder.path().join(name)).unwrap();
    assert_eq!(read("environment"), "argument none\n");
    let line = read("notice");
    assert_eq!(line.lines().count(), 1);
    let told: Value = serde_json::from_str(&line).unwrap();
    assert_eq!((&told["event"], &told["endpoint"]), (&json!("rollback"), &json!("production")));
    assert_eq!(told["text"], "taod-2 was rolled back to taod-1: <!channel> reward & length fell (live)");
}

#[tokio::test]
async fn a_program_that_fails_is_run_again_and_repeated_in_part() {
    let folder = tempfile::tempdir().unwrap();
    let way = program(folder.path(), "echo x >> runs; yes wrong | head -c 100000 >&2; exit 3");
    let error = deliver(&to(way, 2)).await.unwrap_err().to_string();
    assert!(error.contains("ended with exit status: 3: wrong wrong") && error.len() < 500, "{error}");
    assert_eq!(std::fs::read_to_string(folder.path().join("runs")).unwrap(), "x\nx\nx\n");
    let missing = Way::Command(Command { command: vec!["/no/such/program".into()] });
    assert!(matches!(deliver(&to(missing, 5)).await, Err(NotifyError::Start { .. })));
}

#[tokio::test]
async fn a_program_that_never_ends_is_killed_with_what_it_started() {
    let folder = tempfile::tempdir().unwrap();
    let way = program(folder.path(), "sleep 1000 & echo $! > child; wait");
    let error = deliver(&Destination { timeout_s: 1, ..to(way, 0) }).await.unwrap_err();
    assert!(matches!(error, NotifyError::Slow { seconds: 1, .. }), "{error}");
    let child = std::fs::read_to_string(folder.path().join("child")).unwrap();
    let stat = Path::new("/proc").join(child.trim()).join("stat");
    // A killed process is gone, or a zombie (Z) until somebody waits for it.
    let runs = || std::fs::read_to_string(&stat).is_ok_and(|stat| !stat.contains(") Z "));
    let began = Instant::now();
    while runs() {
        assert!(began.elapsed() < Duration::from_secs(10), "what the program started outlives it");
        std::thread::yield_now();
    }
}

#[tokio::test]
async fn what_a_program_leaves_running_on_purpose_delays_nothing() {
    let folder = tempfile::tempdir().unwrap();
    // It keeps the pipe of errors open until the folder is gone.
    let way = program(folder.path(), "(while [ -e program ]; do sleep 0.05; done) & exit 0");
    deliver(&to(way, 0)).await.unwrap();
}

#[test]
fn a_wrong_destination_is_told_with_key_value_and_remedy() {
    let parse = |text: &str| -> Vec<String> {
        #[derive(serde::Deserialize)]
        struct List {
            notifications: Vec<Destination>,
        }
        problems(&toml::from_str::<List>(text).unwrap().notifications)
    };
    let webhook = "kind = 'webhook', url_file = '/etc/url'";
    assert_eq!(parse(&format!("notifications = [{{ name = 'ops', {webhook} }}]")), Vec::<String>::new());
    let one = |text: &str| parse(&format!("notifications = [{{ {text} }}]")).join("\n");
    assert!(one("name = 'a/b', kind = 'webhook', url_file = 'u'").starts_with("notifications[0].name = \"a/b\": use"));
    assert!(one("name = 'a', kind = 'webhook', url_file = ''").starts_with("notifications[0].url_file is empty"));
    assert!(one("name = 'a', kind = 'command', command = []").contains("command = []: name a program"));
    assert!(one("name = 'a', kind = 'command', command = ['page']").contains("absolute path"));
    assert!(one(&format!("name = 'a', {webhook}, timeout_s = 61")).contains("timeout_s = 61: choose 1 to 60"));
    assert!(one(&format!("name = 'a', {webhook}, retries = 21")).contains("retries = 21: choose 0 to 20"));
    assert!(one(&format!("name = 'a', {webhook}, events = []")).contains("events = []"));
    let twice = parse(&format!("notifications = [{{ name = 'a', {webhook} }}, {{ name = 'a', {webhook} }}]"));
    assert_eq!(twice, ["notifications[1].name = \"a\" is given twice: rename one"]);
}
