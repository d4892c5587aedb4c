//! Posting to an address that is a secret: it is read at each try, so that it can be changed, and is in no error.

use std::time::Duration;

use reqwest::header::RETRY_AFTER;
use reqwest::redirect::Policy;
use reqwest::{Client, StatusCode, Url};

use super::settings::{Body, Webhook};
use super::{Again, Failure, Notice, NotifyError, said};
use crate::secret;

/// Bytes of an answer that are read; the rest is nobody's business.
const MAX_ANSWER: usize = 4096;

pub(super) async fn send(webhook: &Webhook, notice: &Notice, limit: Duration) -> Result<(), Failure> {
    let url = address(webhook).map_err(Failure::last)?;
    // An address that leads elsewhere would carry the notice to where nobody meant it to go.
    let client = Client::builder().timeout(limit).redirect(Policy::none()).build().map_err(|e| broken(e, limit))?;
    let body = match webhook.body {
        Body::Slack => notice.slack(),
        Body::Notice => serde_json::to_value(notice).unwrap_or_default(),
    };
    let mut response = client.post(url).json(&body).send().await.map_err(|e| broken(e, limit))?;
    let status = response.status();
    if status.is_success() {
        return Ok(());
    }
    let asked = response.headers().get(RETRY_AFTER).and_then(|value| value.to_str().ok()?.parse().ok());
    let mut answer = Vec::new();
    while let Some(piece) = response.chunk().await.map_err(|e| broken(e, limit))? {
        answer.extend_from_slice(&piece[..piece.len().min(MAX_ANSWER - answer.len())]);
        if answer.len() == MAX_ANSWER {
            break;
        }
    }
    let again = match asked {
        Some(seconds) => Again::After(Duration::from_secs(seconds)),
        None => Again::Soon,
    };
    let may_pass = status == StatusCode::TOO_MANY_REQUESTS || status.is_server_error();
    let error = NotifyError::Status { status: status.as_u16(), said: said(&answer) };
    Err(Failure { error, again: if may_pass { again } else { Again::Never } })
}

fn address(webhook: &Webhook) -> Result<Url, NotifyError> {
    let wrong = || NotifyError::Address { file: webhook.url_file.display().to_string() };
    let text = secret::read("notifications.url", Some(&webhook.url_file))?.ok_or_else(wrong)?;
    let url = Url::parse(text.expose().trim()).map_err(|_| wrong())?;
    if matches!(url.scheme(), "http" | "https") && url.has_host() { Ok(url) } else { Err(wrong()) }
}

fn broken(error: reqwest::Error, limit: Duration) -> Failure {
    if error.is_timeout() {
        return Failure::passing(NotifyError::Silent(limit.as_secs()));
    }
    // The error as a whole would name the address; its innermost cause, such as "connection refused", does not.
    let error = error.without_url();
    let causes = std::iter::successors(Some(&error as &dyn std::error::Error), |error| error.source());
    Failure::passing(NotifyError::Down(causes.last().map_or_else(String::new, ToString::to_string)))
}
