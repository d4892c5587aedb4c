//! A token endpoint on loopback: OAuth 2's client credentials for signed tokens, as an identity provider hands them out.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use base64::Engine;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use serde_json::json;

pub(super) const ISSUER: &str = "https://issuer.example";

/// The running endpoint. It lives as long as the test's process.
pub(super) struct Tokens {
    port: u16,
    key: PathBuf,
    granted: Arc<AtomicUsize>,
}

impl Tokens {
    /// Starts it with the key that signs the tokens. It knows one client, `taod` with the secret `right`.
    pub(super) fn start(key: &Path) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let (key, granted) = (key.to_owned(), Arc::new(AtomicUsize::new(0)));
        let tokens = Tokens { port, key: key.clone(), granted: Arc::clone(&granted) };
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                // A client that goes away is none of its business.
                answer(stream, &key, &granted).ok();
            }
        });
        tokens
    }

    pub(super) fn url(&self) -> String {
        format!("http://127.0.0.1:{}/token", self.port)
    }

    /// Returns how many tokens were handed out.
    pub(super) fn granted(&self) -> usize {
        self.granted.load(Ordering::Relaxed)
    }

    /// Returns the public key that the broker checks tokens with, as a JSON Web Key Set.
    pub(super) fn keys(&self) -> String {
        let modulus = openssl(&["rsa", "-noout", "-modulus", "-in", &self.key.display().to_string()], b"");
        let modulus = String::from_utf8(modulus).unwrap();
        let modulus = hex::decode(modulus.trim().strip_prefix("Modulus=").unwrap()).unwrap();
        let key = json!({ "kty": "RSA", "kid": "k", "alg": "RS256", "use": "sig", "e": "AQAB",
            "n": URL_SAFE_NO_PAD.encode(modulus) });
        json!({ "keys": [key] }).to_string()
    }
}

fn answer(stream: TcpStream, key: &Path, granted: &AtomicUsize) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream);
    let (mut length, mut known) = (0, false);
    loop {
        let mut line = String::new();
        reader.read_line(&mut line)?;
        let (name, value) = line.trim().split_once(": ").unwrap_or_default();
        match name.to_ascii_lowercase().as_str() {
            "content-length" => length = value.parse().unwrap(),
            "authorization" => known = value == format!("Basic {}", STANDARD.encode("taod:right")),
            _ => {}
        }
        if line.trim().is_empty() {
            break;
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body)?;
    let body = String::from_utf8_lossy(&body).into_owned();
    let audience = body.split('&').find_map(|field| field.strip_prefix("scope=")).unwrap_or_default();
    let (status, answer) = match known {
        true => ("200 OK", json!({ "access_token": token(key, audience), "token_type": "bearer", "expires_in": 600 })),
        false => ("401 Unauthorized", json!({ "error": "invalid_client", "error_description": "no such client" })),
    };
    granted.fetch_add(usize::from(known), Ordering::Relaxed);
    let answer = answer.to_string();
    let head = format!("HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {}\r\n", answer.len());
    reader.into_inner().write_all(format!("{head}Connection: close\r\n\r\n{answer}").as_bytes())
}

/// Returns a signed token; who asks for a scope gets it as the audience, too, so that a test can choose it.
fn token(key: &Path, audience: &str) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    let claims =
        json!({ "sub": "taod", "iss": ISSUER, "aud": audience, "scope": audience, "iat": now, "exp": now + 600 });
    let part = |text: String| URL_SAFE_NO_PAD.encode(text);
    let signed = format!("{}.{}", part(json!({ "alg": "RS256", "kid": "k" }).to_string()), part(claims.to_string()));
    let signature = openssl(&["dgst", "-sha256", "-sign", &key.display().to_string()], signed.as_bytes());
    format!("{signed}.{}", URL_SAFE_NO_PAD.encode(signature))
}

fn openssl(arguments: &[&str], input: &[u8]) -> Vec<u8> {
    let mut command = Command::new("openssl");
    let mut child = command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(input).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "openssl {arguments:?} failed");
    output.stdout
}
