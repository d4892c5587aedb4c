//! Who is told what.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Event;

/// One `[[notifications]]` of the config.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Destination {
    /// Its name in logs and in the file that remembers what it was told: lower-case letters, digits, `_` and `-`.
    pub name: String,
    #[serde(flatten)]
    pub kind: Way,
    /// What it is told, any of "promotion", "refusal", "rollback", "failure" and "freeze".
    #[serde(default = "default_events")]
    pub events: Vec<Event>,
    /// How long one try may take, in seconds. Range 1 to 60.
    #[serde(default = "default_timeout")]
    pub timeout_s: u64,
    /// How often a try that failed is repeated, after 1 second and then twice the pause each time, at most 60. Range 0 to 20.
    #[serde(default = "default_retries")]
    pub retries: u32,
}

/// How it is told.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Way {
    /// By a request to an address.
    Webhook(Webhook),
    /// By a program of one's own.
    Command(Command),
}

/// An address to post to.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Webhook {
    /// File with the address; it is a secret, since whoever knows it can post.
    pub url_file: PathBuf,
    /// What is posted.
    #[serde(default)]
    pub body: Body,
}

/// The JSON that a webhook gets.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Body {
    /// `{"text": sentence}`, as Slack and what is compatible with it take it.
    #[default]
    Slack,
    /// The whole notice, as a command gets it.
    Notice,
}

/// A program to run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Command {
    /// Program and arguments, the program by its absolute path. It reads one line of JSON: `event`, `time_us`, `endpoint`,
    /// `text`, and `version` and `source` (a round or a trial) where there are any.
    pub command: Vec<String>,
}

fn default_events() -> Vec<Event> {
    Event::ALL.to_vec()
}

fn default_timeout() -> u64 {
    10
}

fn default_retries() -> u32 {
    5
}

impl Destination {
    /// Checks every key; the message begins with the key.
    fn validate(&self) -> Result<(), String> {
        let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '_' | '-');
        if self.name.is_empty() || !self.name.chars().all(plain) {
            return Err(format!("name = {:?}: use lower-case letters, digits, _ and -", self.name));
        }
        if self.events.is_empty() {
            return Err("events = []: name at least one, or leave the key out for all".into());
        }
        if !(1..=60).contains(&self.timeout_s) {
            return Err(format!("timeout_s = {}: choose 1 to 60", self.timeout_s));
        }
        if self.retries > 20 {
            return Err(format!("retries = {}: choose 0 to 20", self.retries));
        }
        match &self.kind {
            Way::Webhook(webhook) if webhook.url_file.as_os_str().is_empty() => {
                Err("url_file is empty: name the file that holds the webhook's address".into())
            }
            Way::Command(Command { command }) => match command.first() {
                None => Err("command = []: name a program by its absolute path".into()),
                Some(program) if !program.starts_with('/') => {
                    Err(format!("command begins with {program:?}: name the program by its absolute path"))
                }
                Some(_) => Ok(()),
            },
            Way::Webhook(_) => Ok(()),
        }
    }
}

/// Returns what is wrong with the list, each with its full key.
pub fn problems(list: &[Destination]) -> Vec<String> {
    let mut found = Vec::new();
    for (index, destination) in list.iter().enumerate() {
        if let Err(problem) = destination.validate() {
            found.push(format!("notifications[{index}].{problem}"));
        }
        if list[..index].iter().any(|other| other.name == destination.name) {
            found.push(format!("notifications[{index}].name = {:?} is given twice: rename one", destination.name));
        }
    }
    found
}
