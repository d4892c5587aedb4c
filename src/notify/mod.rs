//! Telling people what the daemon did: a webhook that chat servers understand, or a program of the operator's own.
//!
//! This module only carries a [`Notice`] to one [`Destination`], within bounds: each try has a time limit, tries have a
//! maximum and a pause between them that doubles. What is worth telling, and to whom it was told already, is the daemon's
//! business; a destination that never answers delays nobody but itself. A notice holds names of versions, rounds and trials,
//! operators' reasons and errors; no text of the log ever enters one.

mod command;
mod notice;
mod settings;
mod webhook;

use std::time::Duration;

pub use notice::{Event, Notice};
pub use settings::{Body, Destination, Way, problems};

use crate::secret::SecretError;

/// The pause after a first failed try; it doubles with each.
const PAUSE: Duration = Duration::from_secs(1);
/// The longest pause, whatever a server asks for.
const MAX_PAUSE: Duration = Duration::from_secs(60);
/// Characters of what a program or a server says that are repeated in our errors.
const MAX_SAID: usize = 200;

/// Why a notice did not arrive. The address of a webhook is a secret and stands in no message.
#[derive(Debug, thiserror::Error)]
pub enum NotifyError {
    #[error(transparent)]
    Secret(#[from] SecretError),
    #[error("{file} holds no address that begins with http:// or https://: write the webhook's whole address into it")]
    Address { file: String },
    #[error("the webhook cannot be reached: {0}")]
    Down(String),
    #[error("the webhook gave no answer within {0} s")]
    Silent(u64),
    #[error("the webhook answers {status}: {said}")]
    Status { status: u16, said: String },
    #[error("{program} cannot be run: {source}")]
    Start { program: String, source: std::io::Error },
    #[error("{program} did not end within {seconds} s and was killed; raise timeout_s or let it do its work later")]
    Slow { program: String, seconds: u64 },
    #[error("{program} ended with {status}: {said}")]
    Ended { program: String, status: std::process::ExitStatus, said: String },
}

/// A failed try.
struct Failure {
    error: NotifyError,
    again: Again,
}

/// Whether another try may help.
enum Again {
    Never,
    /// After the usual pause.
    Soon,
    /// After the pause that the server asks for.
    After(Duration),
}

impl Failure {
    fn last(error: impl Into<NotifyError>) -> Self {
        Failure { error: error.into(), again: Again::Never }
    }

    fn passing(error: NotifyError) -> Self {
        Failure { error, again: Again::Soon }
    }
}

impl Destination {
    /// Brings a notice to the destination. Returns after the last try that its settings allow.
    pub async fn deliver(&self, notice: &Notice) -> Result<(), NotifyError> {
        self.deliver_with(notice, PAUSE).await
    }

    async fn deliver_with(&self, notice: &Notice, first_pause: Duration) -> Result<(), NotifyError> {
        let mut pause = first_pause;
        for retries_left in (0..=self.retries).rev() {
            let failure = match self.attempt(notice).await {
                Ok(()) => return Ok(()),
                Err(failure) => failure,
            };
            let wait = match failure.again {
                Again::Soon => pause,
                Again::After(asked) => asked,
                Again::Never => return Err(failure.error),
            };
            if retries_left == 0 {
                return Err(failure.error);
            }
            tracing::debug!(destination = self.name, error = %failure.error, retries_left, "a notice did not arrive");
            tokio::time::sleep(wait.min(MAX_PAUSE)).await;
            pause = (pause * 2).min(MAX_PAUSE);
        }
        Ok(())
    }

    async fn attempt(&self, notice: &Notice) -> Result<(), Failure> {
        let limit = Duration::from_secs(self.timeout_s);
        match &self.kind {
            Way::Webhook(webhook) => webhook::send(webhook, notice, limit).await,
            Way::Command(command) => command::run(command, notice, limit).await,
        }
    }
}

/// Returns text on one line without control characters, cut to what a message repeats of others.
fn said(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    let plain: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    plain.split_whitespace().collect::<Vec<_>>().join(" ").chars().take(MAX_SAID).collect()
}

#[cfg(test)]
mod tests;
