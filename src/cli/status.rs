//! `taod status`: what the running daemon does now.

use std::time::Duration;

use anyhow::Context;
use clap::Args;
use serde_json::Value;

use super::lines::Output;
use super::{Exit, Global, block_on};

/// Ask the running daemon what it does now, through its admin page. Exit code 1 where none answers.
#[derive(Debug, Args)]
pub struct Status {
    /// Print one JSON document.
    #[arg(long)]
    json: bool,
}

pub(super) fn run(global: &Global, args: &Status) -> anyhow::Result<Exit> {
    let listen = global.load()?.config.admin.listen;
    let status: Value = block_on(async {
        let client = reqwest::Client::builder().timeout(Duration::from_secs(5)).no_proxy().build()?;
        let answer = client.get(format!("http://{listen}/api/v1/status")).send().await?.error_for_status()?;
        answer.json().await
    })?
    .with_context(|| format!("no taod answers at admin.listen {listen}; start it with `taod run`"))?;
    let mut out = Output::stdout();
    match args.json {
        true => out.line(&status)?,
        false => out.text(&lines(&status, ""))?,
    }
    out.flush()?;
    Ok(Exit::Done)
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
