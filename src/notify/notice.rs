//! What is told: an event, in one sentence for people and in fields for programs.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What a destination may want to be told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Event {
    /// Another version is served, or waits for approval.
    Promotion,
    /// A trial ended without a promotion.
    Refusal,
    /// What was served before is served again.
    Rollback,
    /// A round ended in an error or was given up, or a change of what is served was undone.
    Failure,
    /// Promotions were frozen, or the freeze was lifted.
    Freeze,
}

impl Event {
    /// All events, which a destination gets unless it names fewer.
    pub const ALL: [Event; 5] = [Event::Promotion, Event::Refusal, Event::Rollback, Event::Failure, Event::Freeze];
}

/// One thing that happened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Notice {
    pub event: Event,
    /// When, microseconds since the epoch.
    pub time_us: i64,
    /// The stable name of the endpoint that this daemon stands beside.
    pub endpoint: String,
    /// One sentence for people.
    pub text: String,
    /// The adapter version that it is about.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
    /// The trial or round that it is about.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
}

/// The longest sentence, in characters: a chat server cuts longer ones, and an error may be long.
const MAX_TEXT: usize = 1000;

impl Notice {
    /// Makes a notice; what makes lines or steers terminals is taken out of the sentence.
    pub fn new(event: Event, time_us: i64, endpoint: &str, text: &str) -> Self {
        let plain: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(MAX_TEXT).collect();
        Notice { event, time_us, endpoint: endpoint.to_string(), text: plain, version: None, source: None }
    }

    /// Says which version it is about.
    #[must_use]
    pub fn of(self, version: &str) -> Self {
        Notice { version: Some(version.to_string()), ..self }
    }

    /// Says which trial or round it is about.
    #[must_use]
    pub fn from(self, source: &str) -> Self {
        Notice { source: Some(source.to_string()), ..self }
    }

    /// Returns the body that Slack's incoming webhooks take, and those of Mattermost, Rocket.Chat, Discord (`/slack`) and
    /// others after them. `&`, `<` and `>` are escaped as Slack asks, so that no reason mentions a channel or makes a link.
    pub(super) fn slack(&self) -> serde_json::Value {
        let text = format!("taod, {}: {}", self.endpoint, self.text);
        let text = text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
        serde_json::json!({ "text": text })
    }
}
