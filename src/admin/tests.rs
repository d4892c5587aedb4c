use std::time::Duration;

use chrono::Utc;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::token::{Role, Tokens};
use super::*;
use crate::config::Config;
use crate::health::Health;
use crate::metrics::Metrics;

/// The state of a daemon that has done nothing yet, in a folder of its own.
pub(super) fn state() -> (tempfile::TempDir, State) {
    let folder = tempfile::tempdir().unwrap();
    let mut config = Config::default();
    config.state.dir = folder.path().to_path_buf();
    let (metrics, health) = (Arc::new(Metrics::new().unwrap()), Arc::new(Health::default()));
    let facts = Arc::new(Facts::new(Arc::new(config), metrics, health).unwrap());
    let actions = Arc::new(Actions::none(folder.path()));
    (folder, State { facts, actions })
}

pub(super) fn on_loopback() -> Settings {
    Settings { listen: "127.0.0.1:0".into(), ..Settings::default() }
}

/// An answer: its status, its head and its body.
pub(super) struct Answer {
    pub(super) status: u16,
    head: String,
    pub(super) body: String,
}

impl Answer {
    fn of(bytes: &[u8]) -> Self {
        let text = String::from_utf8_lossy(bytes).into_owned();
        let (head, body) = text.split_once("\r\n\r\n").unwrap_or((&text, ""));
        let status = head.split(' ').nth(1).and_then(|code| code.parse().ok()).unwrap_or(0);
        Answer { status, head: head.to_ascii_lowercase(), body: body.to_string() }
    }

    pub(super) fn header(&self, name: &str) -> Option<&str> {
        self.head.lines().find_map(|line| line.strip_prefix(&format!("{name}: ")))
    }
}

/// Runs `work` against the page on its own thread.
pub(super) fn with_page<T>(settings: &Settings, state: &State, work: impl AsyncFnOnce(SocketAddr) -> T) -> T {
    let bound = bind(settings).unwrap();
    let address = bound.address().unwrap();
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let page = spawn(bound, state.clone(), async { drop(stopped.await) }).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let result = runtime.block_on(work(address));
    drop(runtime);
    stop.send(()).unwrap();
    page.join().unwrap().unwrap();
    result
}

/// Sends bytes as they are and returns everything that comes back until the connection is closed.
async fn send(address: SocketAddr, bytes: &[u8]) -> Vec<u8> {
    let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
    // The page may close before it has read everything: what it said before that is what counts.
    drop(stream.write_all(bytes).await);
    let mut answer = Vec::new();
    drop(stream.read_to_end(&mut answer).await);
    answer
}

pub(super) async fn ask(address: SocketAddr, line: &str, headers: &[(&str, &str)], body: &str) -> Answer {
    let mut request =
        format!("{line} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {}\r\n", body.len());
    headers.iter().for_each(|(name, value)| request.push_str(&format!("{name}: {value}\r\n")));
    Answer::of(&send(address, format!("{request}\r\n{body}").as_bytes()).await)
}

fn get(state: &State, path: &str) -> (u16, String) {
    with_page(&on_loopback(), state, async |address| {
        let answer = ask(address, &format!("GET {path}"), &[], "").await;
        (answer.status, answer.body)
    })
}

#[test]
fn health_and_readiness_are_two_questions() {
    let (_folder, state) = state();
    state.facts.health.not_ready("broker", "cannot reach 127.0.0.1:9092");
    assert_eq!(get(&state, "/healthz"), (200, "ok\n".into()));
    assert_eq!(get(&state, "/readyz"), (503, "broker: cannot reach 127.0.0.1:9092\n".into()));
    assert!(get(&state, "/metrics").1.contains("\ntaod_daemon_ready_state 0\n"));
    state.facts.health.ready("broker");
    state.facts.health.beat("ingest", Duration::ZERO);
    assert_eq!(get(&state, "/readyz"), (200, "ok\n".into()));
    assert_eq!(get(&state, "/healthz"), (503, "stuck: ingest\n".into()));
    assert!(get(&state, "/metrics").1.contains("\ntaod_daemon_ready_state 1\n"));
}

#[test]
fn probes_have_a_port_of_their_own_that_says_no_reason() {
    // A port that was free a moment ago: probes need one that is known beforehand.
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let settings = Settings { probe_listen: free.to_string(), ..on_loopback() };
    let (_folder, state) = state();
    state.facts.health.not_ready("broker", "cannot reach 10.0.0.7:9092");
    with_page(&settings, &state, async |_| {
        let ready = ask(free, "GET /readyz", &[], "").await;
        assert_eq!((ready.status, ready.body.as_str()), (503, "broker\n"));
        assert_eq!(ask(free, "GET /healthz", &[("Host", "any")], "").await.status, 200);
        assert_eq!(ask(free, "GET /metrics", &[], "").await.status, 404);
    });
}

#[test]
fn every_answer_tells_browsers_what_it_may_not_do() {
    with_page(&on_loopback(), &state().1, async |address| {
        for path in ["/metrics", "/login", "/static/style.css", "/nothing", "/api/v1/current"] {
            let answer = ask(address, &format!("GET {path}"), &[], "").await;
            let policy = answer.header("content-security-policy").unwrap();
            assert!(policy.contains("default-src 'none'") && policy.contains("frame-ancestors 'none'"), "{path}");
            assert!(!policy.contains("unsafe") && !policy.contains("http"), "{path}: {policy}");
            assert_eq!(answer.header("x-content-type-options"), Some("nosniff"), "{path}");
            assert_eq!(answer.header("x-frame-options"), Some("deny"), "{path}");
            assert_eq!(answer.header("cache-control"), Some("no-store"), "{path}");
            assert_eq!(answer.header("access-control-allow-origin"), None, "{path}");
        }
        assert_eq!(ask(address, "GET /metrics", &[("Origin", "https://evil.example")], "").await.status, 403);
    });
}

#[test]
fn a_name_that_leads_here_from_elsewhere_is_refused() {
    with_page(&on_loopback(), &state().1, async |address| {
        for host in ["evil.example", "127.0.0.1.evil.example:80", "localhost.evil", ""] {
            let request = format!("GET /metrics HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n");
            assert_eq!(Answer::of(&send(address, request.as_bytes()).await).status, 403, "{host:?}");
        }
    });
}

#[test]
fn a_token_becomes_a_session_that_ends_with_the_token() {
    let folder = tempfile::tempdir().unwrap();
    let settings = Settings { token_file: folder.path().join("tokens.json"), ..on_loopback() };
    let tokens = Tokens::at(&settings.token_file);
    let token = tokens.make("anna", Role::Operate, Utc::now()).unwrap();
    with_page(&settings, &state().1, async |address| {
        let wrong = ask(address, "POST /login", FORM, "token=taod_wrong").await;
        assert_eq!((wrong.status, wrong.header("set-cookie")), (401, None));
        let form = format!("to=//evil.example&token={}", token.expose());
        let right = ask(address, "POST /login", FORM, &form).await;
        assert_eq!((right.status, right.header("location")), (303, Some("/")));
        let cookie = right.header("set-cookie").unwrap().split(';').next().unwrap().to_string();
        let show = async || ask(address, "GET /login", &[("Cookie", &cookie)], "").await.body;
        let page = show().await;
        assert!(page.contains("anna") && page.contains("operate"), "{page}");
        let csrf = page.split("name=\"csrf\" value=\"").nth(1).unwrap().split('"').next().unwrap().to_string();
        let headers = [FORM[0], ("Cookie", cookie.as_str())];
        assert_eq!(ask(address, "POST /logout", &headers, "csrf=guess").await.status, 403);
        assert!(show().await.contains("anna"), "a forged form ended the session");
        tokens.revoke("anna").unwrap();
        assert!(!show().await.contains("anna"), "the session outlived its token");
        assert_eq!(ask(address, "POST /logout", &headers, &format!("csrf={csrf}")).await.status, 403);
    });
}

const FORM: &[(&str, &str)] = &[("Content-Type", "application/x-www-form-urlencoded")];

#[test]
fn bodies_heads_and_waiting_have_their_limits() {
    let settings = Settings { max_body_bytes: 1024, ..on_loopback() };
    with_page(&settings, &state().1, async |address| {
        let large = format!("token={}", "x".repeat(2000));
        assert_eq!(ask(address, "POST /login", FORM, &large).await.status, 413);
        let long = "x".repeat(20 << 10);
        assert_eq!(ask(address, "GET /login", &[("X-Long", &long)], "").await.status, 431);
        let many: Vec<(String, &str)> = (0..80).map(|i| (format!("X-{i}"), "y")).collect();
        let many: Vec<(&str, &str)> = many.iter().map(|(name, value)| (name.as_str(), *value)).collect();
        assert_eq!(ask(address, "GET /login", &many, "").await.status, 431);
    });
}

#[tokio::test]
async fn a_client_that_sends_no_head_is_cut_off_and_another_takes_its_place() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let head = Duration::from_millis(300);
    let limits = Limits { connections: 1, head, life: LIFE };
    let router = Router::new().route("/", axum::routing::get(async || "ok"));
    let serving = tokio::spawn(connection::serve(listener, None, router, limits, std::future::pending()));
    let started = std::time::Instant::now();
    let mut idle = tokio::net::TcpStream::connect(address).await.unwrap();
    idle.write_all(b"GET / HT").await.unwrap();
    let answer = Answer::of(&send(address, b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").await);
    assert_eq!((answer.status, answer.body.as_str()), (200, "ok"));
    assert!(started.elapsed() >= head, "the second one was let in beside the first");
    serving.abort();
}

#[test]
fn a_taken_port_is_named_with_the_remedy() {
    let first = bind(&on_loopback()).unwrap();
    let listen = first.address().unwrap().to_string();
    let Err(message) = bind(&Settings { listen: listen.clone(), ..Settings::default() }) else { panic!("bound twice") };
    assert!(message.starts_with(&format!("admin.listen {listen}: cannot listen (")), "{message}");
}
