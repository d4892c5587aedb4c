//! Something of the operator's that is told what to load, and a server that is looked at until it has.
//!
//! Where the server is on another host and shares no storage with taod, `endpoint.pull_url` says where the daemon's API is
//! reached from there: the hook is told an address and a hash for each of the adapter's files. The address needs a token of the
//! role `read`, which the hook has of its own; none is ever sent to it.

use std::path::Path;
use std::time::Duration;

use reqwest::Method;
use serde_json::{Value, json};

use super::http::Http;
use super::server::Server;
use super::{EndpointError, Settings};
use crate::registry::Manifest;

/// How often a server is looked at.
const LOOK_AGAIN: Duration = Duration::from_millis(500);

/// The address that is posted to; none where the server finds out by itself.
#[derive(Clone)]
pub(super) struct Hook {
    http: Option<Http>,
    pull: Option<Pull>,
}

/// Where the files of adapters are fetched from.
#[derive(Clone)]
struct Pull {
    base: String,
}

impl Pull {
    fn new(pull_url: &str) -> Option<Pull> {
        (!pull_url.is_empty()).then(|| Pull { base: pull_url.trim_end_matches('/').to_owned() })
    }

    /// Returns name, address and hash of each file of a registered version.
    fn files(&self, folder: &Path) -> Result<Value, EndpointError> {
        let manifest = Manifest::read(folder).map_err(Box::new)?;
        let version = &manifest.version;
        let file = |(name, sha256): (&String, &String)| {
            let url = format!("{}/api/v1/adapters/{version}/files/{name}", self.base);
            json!({"name": name, "url": url, "sha256": sha256})
        };
        Ok(manifest.files.iter().map(file).collect())
    }
}

impl Hook {
    pub(super) fn new(settings: &Settings) -> Result<Hook, EndpointError> {
        let http = match settings.hook.is_empty() {
            true => None,
            false => Some(Http::with_key(settings, std::slice::from_ref(&settings.hook), None)?.remove(0)),
        };
        Ok(Hook { http, pull: Pull::new(&settings.pull_url) })
    }

    /// Tells that the adapter `name` is to be unloaded by the server at `server`.
    pub(super) async fn unload(&self, server: &Http, name: &str) -> Result<(), EndpointError> {
        self.tell("unload", json!({"server": server.url(), "name": name, "path": null})).await
    }

    async fn tell(&self, event: &str, mut body: Value) -> Result<(), EndpointError> {
        let Some(http) = &self.http else { return Ok(()) };
        let what = format!("the webhook's {event} of '{}'", body["name"].as_str().unwrap_or_default());
        body["event"] = event.into();
        let raw = http.call(Method::POST, "", Some(&body), &what).await?;
        if raw.is_success() { Ok(()) } else { Err(http.refused(&raw, &what)) }
    }

    /// Tells it to load the adapter in `folder`, which the server knows as `path`, and looks until the server has it; not at
    /// all where it has it already. A server that cannot be reached meanwhile may be restarting.
    pub(super) async fn load_and_wait(
        &self,
        http: &Http,
        server: &dyn Server,
        name: &str,
        folder: &Path,
        path: &str,
    ) -> Result<(), EndpointError> {
        if server.holds(name, folder).await? {
            return Ok(());
        }
        let mut body = json!({"server": http.url(), "name": name, "path": path});
        if let Some(pull) = &self.pull {
            body["files"] = pull.files(folder)?;
        }
        self.tell("load", body).await?;
        let deadline = tokio::time::Instant::now() + http.load_timeout();
        loop {
            match server.holds(name, folder).await {
                Ok(true) => return Ok(()),
                Ok(false) | Err(_) if tokio::time::Instant::now() < deadline => {}
                Err(error) => return Err(error),
                Ok(false) => {
                    return Err(EndpointError::NotFollowed {
                        url: http.url().to_owned(),
                        name: name.to_owned(),
                        path: path.to_owned(),
                        seconds: http.load_timeout().as_secs(),
                    });
                }
            }
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    }
}
