//! A look at one replica that changes nothing: whether it answers as a promotion needs it, what its clock says, and what it
//! tells of its limits. For `taod doctor`.

use std::time::{Duration, Instant};

use chrono::{DateTime, TimeDelta, Utc};
use reqwest::Method;

use crate::record::Message;

use super::fleet::Fleet;
use super::http::Http;
pub use super::llamacpp::Memory;
use super::server::{Answers, Question};
use super::{EndpointError, Kind, Settings, llamacpp};

/// A name that no adapter has: to unload it changes nothing and tells whether there is a route for it.
const NOBODY: &str = "taod-doctor-nobody";

/// What one replica's own words tell.
#[derive(Debug, Clone, PartialEq)]
pub struct Words {
    pub url: String,
    /// How far the server's clock is ahead of ours; `None` where it tells no time.
    pub ahead: Option<TimeDelta>,
    /// vLLM's `--max-loras`, where its metrics tell it.
    pub max_loras: Option<u64>,
    /// What llama.cpp remembers of prompts, where it answers any.
    pub memory: Option<Memory>,
}

/// Asks each replica for its clock and its limits, in the order of `endpoint.urls`.
pub async fn words(settings: &Settings) -> Result<Vec<Result<Words, EndpointError>>, EndpointError> {
    let mut all = Vec::new();
    for http in Http::of(settings, &settings.urls)? {
        all.push(words_of(&http, settings).await);
    }
    Ok(all)
}

async fn words_of(http: &Http, settings: &Settings) -> Result<Words, EndpointError> {
    let (asked, timer) = (Utc::now(), Instant::now());
    let raw = http.call(Method::GET, "/v1/models", None, "GET /v1/models").await?;
    let ahead = raw.date.map(|date| ahead(date, asked, timer.elapsed()));
    let max_loras = match settings.kind {
        Kind::Vllm => http.call(Method::GET, "/metrics", None, "GET /metrics").await.ok(),
        _ => None,
    };
    let max_loras = max_loras.filter(|raw| raw.is_success()).and_then(|raw| max_loras_of(&raw.text));
    // A server that does not answer prompts is found by [`answers`].
    let memory = match settings.kind {
        Kind::Llamacpp => llamacpp::memory(http, &settings.base_model).await.ok(),
        _ => None,
    };
    Ok(Words { url: http.url().to_owned(), ahead, max_loras, memory })
}

/// Returns how far a clock is ahead that said `date`, cut to whole seconds, at some moment within `took` after `asked`; 0 where
/// that moment explains it.
fn ahead(date: DateTime<Utc>, asked: DateTime<Utc>, took: Duration) -> TimeDelta {
    let answered = asked + TimeDelta::from_std(took).unwrap_or(TimeDelta::MAX);
    let (earliest, latest) = (date - answered, date + TimeDelta::seconds(1) - asked);
    match (earliest > TimeDelta::zero(), latest < TimeDelta::zero()) {
        (true, _) => earliest,
        (_, true) => latest,
        (false, false) => TimeDelta::zero(),
    }
}

/// Reads `max_lora` out of vLLM's metrics, which tell it once the server has answered something.
fn max_loras_of(metrics: &str) -> Option<u64> {
    let line = metrics.lines().find(|line| line.starts_with("vllm:lora_requests_info{"))?;
    let (_, rest) = line.split_once("max_lora=\"")?;
    rest.split('"').next()?.parse().ok()
}

/// Asks a replica for one token of `model`, with its log-prob: what a proof needs.
pub async fn answers(replica: &dyn Answers, model: &str) -> Result<(), EndpointError> {
    let messages = [Message::text("user", "Say yes.")];
    replica.ask(&Question { model, messages: &messages, max_tokens: 1 }).await.map(drop)
}

/// Tells whether adapters can be loaded and unloaded while the server runs, by unloading one that is not there; nothing for
/// a kind whose driver would not ask the server.
pub async fn routes(fleet: &Fleet, settings: &Settings, replica: usize) -> Option<Result<(), EndpointError>> {
    match settings.kind {
        Kind::Serve | Kind::Vllm => Some(fleet.replicas.get(replica)?.unload(NOBODY).await),
        Kind::Sglang | Kind::Mistralrs | Kind::Llamacpp | Kind::Directory | Kind::Webhook => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_is_off_only_by_what_the_answers_time_does_not_explain() {
        let at = |text: &str| text.parse::<DateTime<Utc>>().unwrap();
        let asked = at("2026-01-10T12:00:00.9Z");
        let ahead = |date: &str, took: u64| ahead(at(date), asked, Duration::from_millis(took)).num_milliseconds();
        assert_eq!(ahead("2026-01-10T12:00:00Z", 10), 0, "cut to whole seconds");
        assert_eq!(ahead("2026-01-10T12:00:05Z", 6000), 0, "it may have answered late");
        assert_eq!(ahead("2026-01-10T12:00:05Z", 100), 4000);
        assert_eq!(ahead("2026-01-10T11:59:00Z", 100), -59_900);
    }

    #[test]
    fn vllms_limit_is_read_from_its_metrics() {
        let metrics = "# TYPE vllm:lora_requests_info gauge\n\
                       vllm:lora_requests_info{max_lora=\"4\",running_lora_adapters=\"\",waiting_lora_adapters=\"\"} 1.7e+09\n";
        assert_eq!(max_loras_of(metrics), Some(4));
        assert_eq!(max_loras_of("vllm:num_requests_running 0\n"), None);
    }
}
