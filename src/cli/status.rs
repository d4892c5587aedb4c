//! `taod status`: what the running daemon does now, once or again and again.

use std::io::IsTerminal;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, bail};
use chrono::{DateTime, Utc};
use clap::Args;
use serde_json::{Value, json};

use super::lines::Output;
use super::{Exit, Global, block_on};
use crate::admin;
use crate::secret::{self, Secret};

/// Ask the running daemon what it does now, through its admin page. Exit code 1 where none answers.
#[derive(Debug, Args)]
pub struct Status {
    /// Print one JSON document, with --watch one a line.
    #[arg(long)]
    json: bool,
    /// Ask again and again until interrupted, also while no daemon answers; a terminal shows the latest answer alone.
    #[arg(long)]
    watch: bool,
    /// With --watch: seconds between two questions, 1 or more.
    #[arg(long, value_name = "SECONDS", default_value_t = 2, requires = "watch",
          value_parser = clap::value_parser!(u64).range(1..))]
    every: u64,
    /// File with a token of the page (role read); on loopback none is needed. The variable TAOD__ADMIN__TOKEN wins.
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
}

pub(super) fn run(global: &Global, args: &Status) -> anyhow::Result<Exit> {
    let page = global.load()?.config.admin;
    let token = secret::read("admin.token", args.token_file.as_deref())?;
    let listen = &page.listen;
    let ask = async || {
        ask(&page, token.as_ref())
            .await
            .with_context(|| format!("no taod answers at admin.listen {listen}; start it with `taod run`"))
    };
    let mut out = Output::stdout();
    if args.watch {
        return block_on(watch(args, &mut out, ask))?;
    }
    let status: Value = block_on(ask())??;
    match args.json {
        true => out.line(&status)?,
        false => out.text(&lines(&status, ""))?,
    }
    out.flush()?;
    Ok(Exit::Done)
}

/// Shows answer after answer, each in place of the one before where there is a terminal. Ends when nobody reads any more.
async fn watch(args: &Status, out: &mut Output, ask: impl AsyncFn() -> anyhow::Result<Value>) -> anyhow::Result<Exit> {
    let is_terminal = std::io::stdout().is_terminal() && !args.json;
    let mut every = tokio::time::interval(Duration::from_secs(args.every));
    every.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        every.tick().await;
        let answer = ask().await;
        let at = Utc::now();
        match (answer, args.json) {
            (Ok(status), true) => out.line(&json!({ "at": at, "status": status }))?,
            (Err(error), true) => out.line(&json!({ "at": at, "error": format!("{error:#}") }))?,
            (Ok(status), false) => out.text(&screen(is_terminal, at, &lines(&status, "")))?,
            (Err(error), false) => out.text(&screen(is_terminal, at, &format!("{error:#}\n")))?,
        }
        out.flush()?;
    }
}

/// Returns one answer with its time; on a terminal after what clears the one before.
fn screen(is_terminal: bool, at: DateTime<Utc>, text: &str) -> String {
    let clear = if is_terminal { "\x1b[H\x1b[2J" } else { "" };
    format!("{clear}{}\n{text}\n", at.format("%Y-%m-%d %H:%M:%S UTC"))
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
    fn only_a_terminal_is_cleared_between_two_answers() {
        let at = "2026-01-10T02:00:00Z".parse().unwrap();
        assert_eq!(screen(false, at, "a: 1\n"), "2026-01-10 02:00:00 UTC\na: 1\n\n");
        assert!(screen(true, at, "a: 1\n").starts_with("\x1b[H\x1b[2J2026"));
    }

    #[test]
    fn a_document_is_shown_line_by_line() {
        let value = serde_json::json!({ "round": { "stage": "gate", "done": 0.5 }, "current": null });
        assert_eq!(lines(&value, ""), "round.stage: gate\nround.done: 0.5\ncurrent: -\n");
    }
}
