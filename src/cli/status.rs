//! `taod status`: what the running daemon does now.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::Args;
use serde_json::Value;

use super::lines::Output;
use super::{Exit, Global, block_on};
use crate::admin;
use crate::secret::{self, Secret};

/// Ask the running daemon what it does now, through its admin page. Exit code 1 where none answers.
#[derive(Debug, Args)]
pub struct Status {
    /// Print one JSON document.
    #[arg(long)]
    json: bool,
    /// File with a token of the page (role read); on loopback none is needed. The variable TAOD__ADMIN__TOKEN wins.
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
}

pub(super) fn run(global: &Global, args: &Status) -> anyhow::Result<Exit> {
    let page = global.load()?.config.admin;
    let token = secret::read("admin.token", args.token_file.as_deref())?;
    let listen = &page.listen;
    let status: Value = block_on(ask(&page, token.as_ref()))?
        .with_context(|| format!("no taod answers at admin.listen {listen}; start it with `taod run`"))?;
    let mut out = Output::stdout();
    match args.json {
        true => out.line(&status)?,
        false => out.text(&lines(&status, ""))?,
    }
    out.flush()?;
    Ok(Exit::Done)
}

/// Asks the page, which is reached at the address it listens at and, under TLS, by the first name of `admin.hosts`.
async fn ask(page: &admin::Settings, token: Option<&Secret>) -> anyhow::Result<Value> {
    let address = page.address().map_err(anyhow::Error::msg)?;
    let mut client = reqwest::Client::builder().timeout(Duration::from_secs(5)).no_proxy();
    let url = match (page.has_tls(), page.hosts.first()) {
        (false, _) => format!("http://{address}/api/v1/status"),
        (true, name) => {
            // The page's own certificate is trusted for the page: a company's authority need not be in the system's list.
            let pem = std::fs::read(&page.tls_certificate_file).context("cannot read admin.tls_certificate_file")?;
            for certificate in reqwest::Certificate::from_pem_bundle(&pem)? {
                client = client.add_root_certificate(certificate);
            }
            let name = name.cloned().unwrap_or_else(|| address.ip().to_string());
            let ip = if address.ip().is_unspecified() { Ipv4Addr::LOCALHOST.into() } else { address.ip() };
            client = client.resolve(&name, SocketAddr::new(ip, address.port()));
            format!("https://{name}:{}/api/v1/status", address.port())
        }
    };
    let mut request = client.build()?.get(url);
    if let Some(token) = token {
        request = request.bearer_auth(token.expose());
    }
    let answer = request.send().await?;
    if matches!(answer.status().as_u16(), 401 | 403) {
        bail!("the page wants a token with the role read: give --token-file, or set TAOD__ADMIN__TOKEN");
    }
    Ok(answer.error_for_status()?.json().await?)
}

/// Returns a document as one `key: value` line for each value, nested keys joined by dots.
fn lines(value: &Value, path: &str) -> String {
    match value {
        Value::Object(map) => {
            let key = |key: &str| if path.is_empty() { key.to_string() } else { format!("{path}.{key}") };
            map.iter().map(|(name, value)| lines(value, &key(name))).collect()
        }
        Value::Null => format!("{path}: -\n"),
        Value::String(text) => format!("{path}: {text}\n"),
        other => format!("{path}: {other}\n"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_document_is_shown_line_by_line() {
        let value = serde_json::json!({ "round": { "stage": "gate", "done": 0.5 }, "current": null });
        assert_eq!(lines(&value, ""), "round.stage: gate\nround.done: 0.5\ncurrent: -\n");
    }
}
