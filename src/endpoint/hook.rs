//! Something of the operator's that is told what to load, and a server that is looked at until it has.

use std::path::Path;
use std::time::Duration;

use reqwest::Method;
use serde_json::json;

use super::http::Http;
use super::server::Server;
use super::{EndpointError, Settings};

/// How often a server is looked at.
const LOOK_AGAIN: Duration = Duration::from_millis(500);

/// The address that is posted to; none where the server finds out by itself.
#[derive(Clone)]
pub(super) struct Hook(Option<Http>);

impl Hook {
    pub(super) fn new(settings: &Settings) -> Result<Hook, EndpointError> {
        match settings.hook.is_empty() {
            true => Ok(Hook(None)),
            false => Ok(Hook(Some(Http::with_key(settings, std::slice::from_ref(&settings.hook), None)?.remove(0)))),
        }
    }

    /// Tells that the adapter `name` is to be loaded from `path`, or unloaded (no path), by the server at `server`.
    pub(super) async fn tell(&self, server: &Http, name: &str, path: Option<&str>) -> Result<(), EndpointError> {
        let Hook(Some(hook)) = self else { return Ok(()) };
        let event = if path.is_some() { "load" } else { "unload" };
        let what = format!("the webhook's {event} of '{name}'");
        let body = json!({"event": event, "server": server.url(), "name": name, "path": path});
        let raw = hook.call(Method::POST, "", Some(&body), &what).await?;
        if raw.is_success() { Ok(()) } else { Err(hook.refused(&raw, &what)) }
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
        self.tell(http, name, Some(path)).await?;
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
