//! Requests of every kind against the real page: whatever comes, it answers or hangs up, tells nobody what they may not
//! know, and goes on answering.

use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{RngExt, SeedableRng};

use super::token::{Role, Tokens};
use super::*;

/// Random requests in one run; every seed is a run of its own.
const REQUESTS: usize = 1500;

/// A request and whether it is one that a stranger on this machine may have answered.
struct Shot {
    bytes: Vec<u8>,
    names_us: bool,
    /// The right token, in the right place.
    known: bool,
}

fn pick<'a>(rng: &mut StdRng, pool: &[&'a str]) -> &'a str {
    pool.choose(rng).unwrap()
}

fn shot(rng: &mut StdRng, token: &str) -> Shot {
    let method =
        pick(rng, &["GET", "GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "TRACE", "CONNECT", "get", "G\u{0}T"]);
    let path = pick(
        rng,
        &[
            "/",
            "/metrics",
            "/healthz",
            "/readyz",
            "/api/v1/status",
            "/api/v1/current",
            "/login",
            "/logout",
            "/static/style.css",
            "/static/../../etc/passwd",
            "//",
            "/%00",
            "/api/v1/%2e%2e/status",
            "/login?to=//evil",
            "http://evil.example/metrics",
            "*",
            "/prompts",
            "/config",
            "/api/v1/config",
            "/api/v1/prompts?round=round-00001",
            "/api/v1/rounds?limit=-1",
            "/api/v1/trials/%27%20or%201=1",
            "/api/v1/actions/freeze",
            "/rounds/..%2f..%2fetc",
            "/\u{fe}\u{ff}",
        ],
    );
    let (host, ours) = *[
        ("localhost", true),
        ("127.0.0.1:9464", true),
        ("[::1]", true),
        ("evil.example", false),
        ("localhost.evil.example", false),
        ("127.0.0.1@evil.example", false),
        ("", false),
        ("\u{7f}", false),
    ]
    .choose(rng)
    .unwrap();
    let (proof, known) = match rng.random_range(0..6) {
        0 => (format!("Authorization: Bearer {token}\r\n"), true),
        1 => (format!("Authorization: Bearer {}\r\n", &token[..token.len() - 1]), false),
        2 => (format!("Authorization: Basic {token}\r\n"), false),
        3 => ("Cookie: taod=00; taod=; __Host-taod=x\r\n".to_string(), false),
        4 => (format!("Cookie: taod={token}\r\n"), false),
        _ => (String::new(), false),
    };
    let (extra, foreign) = *[
        ("", false),
        ("Origin: https://evil.example\r\n", true),
        ("Origin: null\r\n", true),
        ("X-Forwarded-For: 10.0.0.1\r\n", false),
        ("Transfer-Encoding: chunked\r\n", false),
        ("Content-Type: application/x-www-form-urlencoded\r\n", false),
        ("Content-Type: application/json\r\nAccept: text/html\r\n", false),
        ("X: \r\n y\r\n", false),
        ("Upgrade: websocket\r\nConnection: upgrade\r\n", false),
        ("Range: bytes=0-\r\n", false),
        ("Expect: 100-continue\r\n", false),
    ]
    .choose(rng)
    .unwrap();
    let body = pick(
        rng,
        &[
            "",
            "token=",
            "token=x&to=%2F%2Fevil",
            "csrf=1",
            "{}",
            "{\"reason\":null}",
            "5\r\nhello\r\n0\r\n\r\n",
            "\u{0}\u{1}",
        ],
    );
    let length = if rng.random_bool(0.9) { body.len() } else { rng.random_range(0..100) };
    let head = format!(
        "{method} {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\nContent-Length: {length}\r\n{proof}{extra}"
    );
    let mut bytes = format!("{head}\r\n{body}").into_bytes();
    let mut whole = true;
    if rng.random_bool(0.15) {
        let at = rng.random_range(0..bytes.len());
        match rng.random_range(0..3) {
            0 => bytes[at] = rng.random(),
            1 => bytes.truncate(at),
            _ => bytes.insert(at, rng.random()),
        }
        whole = false;
    }
    let absolute = path.starts_with("http");
    Shot { bytes, names_us: !whole || (ours && !absolute && !foreign), known: !whole || known }
}

/// Sends what is left to send, says that no more comes, and reads to the end.
async fn fire(address: SocketAddr, bytes: &[u8]) -> Vec<u8> {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
    drop(stream.write_all(bytes).await);
    drop(stream.shutdown().await);
    let mut answer = Vec::new();
    drop(stream.read_to_end(&mut answer).await);
    answer
}

fn check(shot: &Shot, answer: &[u8], token: &str) {
    let text = String::from_utf8_lossy(answer);
    let request = String::from_utf8_lossy(&shot.bytes);
    let status: u16 = text.split(' ').nth(1).and_then(|code| code.parse().ok()).unwrap_or(0);
    assert!(status == 0 || (200..505).contains(&status), "{request}\n{text}");
    assert!(status < 500, "the page failed over\n{request}\n{text}");
    assert!(shot.names_us || !(200..400).contains(&status), "answered under another name\n{request}\n{text}");
    assert!(!text.contains(token), "told the token\n{request}\n{text}");
    let figures = text.contains("taod_ingest_rows_total") || text.contains("\"obstacles\"");
    let stranger = request.to_ascii_lowercase().contains("x-forwarded-for") && !shot.known;
    assert!(!(figures && stranger), "told figures to a stranger behind a proxy\n{request}\n{text}");
    if (200..400).contains(&status) && status != 304 {
        let head = text.to_ascii_lowercase();
        assert!(head.contains("content-security-policy: default-src 'none'"), "{request}\n{text}");
        assert!(head.contains("x-content-type-options: nosniff"), "{request}\n{text}");
    }
}

#[test]
fn no_request_gets_more_than_it_may_or_stops_the_page() {
    let folder = tempfile::tempdir().unwrap();
    let settings = Settings {
        listen: "127.0.0.1:0".into(),
        token_file: folder.path().join("tokens.json"),
        max_connections: 8,
        ..Settings::default()
    };
    let token = Tokens::at(&settings.token_file).make("anna", Role::Read, chrono::Utc::now()).unwrap();
    super::tests::with_page(&settings, &super::tests::state().1, async |address| {
        let mut rng = StdRng::seed_from_u64(20_260_101);
        let (mut answered, mut served) = (0, 0);
        for _ in 0..REQUESTS {
            let shot = shot(&mut rng, token.expose());
            let answer = fire(address, &shot.bytes).await;
            check(&shot, &answer, token.expose());
            answered += usize::from(answer.starts_with(b"HTTP/1.1 "));
            served += usize::from(answer.starts_with(b"HTTP/1.1 200"));
        }
        // Silence proves nothing: most are answered, and some get what they ask for.
        assert!(answered > REQUESTS * 3 / 4 && served > REQUESTS / 50, "{answered} answered, {served} served");
        let alive = fire(address, b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").await;
        assert!(alive.starts_with(b"HTTP/1.1 200"), "the page stopped answering");
    });
}
