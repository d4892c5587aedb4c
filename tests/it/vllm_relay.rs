//! A relay in front of a model server that keeps what taod asks of it.

use std::path::Path;
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::body::Bytes;
use axum::extract::State;
use axum::http::{HeaderMap, Method, StatusCode, Uri};
use serde_json::Value;

/// One request that came by.
#[derive(Debug, Clone)]
pub(crate) struct Seen {
    pub path: String,
    pub body: Value,
    /// SHA-256 of the weights below the body's `lora_path` when it came by.
    pub weights: Option<String>,
}

impl Seen {
    /// Returns the name, the folder and whether it is to replace what has the name, for a load.
    pub(crate) fn load(&self) -> Option<(&str, &str, bool)> {
        let text = |key: &str| self.body[key].as_str().unwrap_or_default();
        let is_load = self.path == "/v1/load_lora_adapter";
        is_load.then(|| (text("lora_name"), text("lora_path"), self.body["load_inplace"] == true))
    }
}

#[derive(Clone, Default)]
struct Kept {
    seen: Arc<Mutex<Vec<Seen>>>,
    server: Arc<Mutex<String>>,
    client: reqwest::Client,
}

/// The relay; it stops when it is dropped.
pub(crate) struct Relay {
    pub url: String,
    kept: Kept,
    _runtime: tokio::runtime::Runtime,
}

impl Relay {
    /// Starts a relay to the server at this address.
    pub(crate) fn start(server: &str) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let kept = Kept::default();
        let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let router = Router::new().fallback(pass).with_state(kept.clone());
        runtime.spawn(async move { axum::serve(listener, router).await.unwrap() });
        let relay = Relay { url, kept, _runtime: runtime };
        relay.lead_to(server);
        relay
    }

    /// Leads to another server from now on: the one before was restarted elsewhere.
    pub(crate) fn lead_to(&self, server: &str) {
        *self.kept.server.lock().unwrap() = server.to_owned();
    }

    /// Returns what came by so far.
    pub(crate) fn seen(&self) -> Vec<Seen> {
        self.kept.seen.lock().unwrap().clone()
    }
}

async fn pass(
    State(kept): State<Kept>,
    method: Method,
    uri: Uri,
    headers: HeaderMap,
    body: Bytes,
) -> (StatusCode, Bytes) {
    let url = format!("{}{}", kept.server.lock().unwrap(), uri.path());
    let told: Value = serde_json::from_slice(&body).unwrap_or_default();
    let weights = told["lora_path"].as_str().map(|path| Path::new(path).join("adapter_model.safetensors"));
    let weights = weights.and_then(|path| taod::durable::sha256_file(&path).ok());
    let mut request = kept.client.request(method, url).body(body);
    for name in ["content-type", "x-taod-internal"] {
        if let Some(value) = headers.get(name) {
            request = request.header(name, value);
        }
    }
    let (status, answer) = match request.send().await {
        Ok(answer) => (answer.status(), answer.bytes().await.unwrap_or_default()),
        Err(error) => (StatusCode::BAD_GATEWAY, error.to_string().into()),
    };
    kept.seen.lock().unwrap().push(Seen { path: uri.path().to_owned(), body: told, weights });
    (status, answer)
}
