//! `taod config`: is it right, what holds, what does a key mean.

use std::io::Write;

use clap::Subcommand;

use super::{Exit, Global};
use crate::config::{ConfigError, Key};

/// What is asked about the config.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Say whether the config can be used; every problem on a line of its own. Exit code 64 when it cannot.
    Check,
    /// Print the config in use; a comment names the file or variable of each value that is not a default.
    Show {
        /// Print one JSON document.
        #[arg(long)]
        json: bool,
    },
    /// Explain one key (`schedule.cron`) or all keys of a section (`schedule`).
    Explain {
        /// The key or section.
        key: String,
        /// Print one JSON document.
        #[arg(long)]
        json: bool,
    },
}

pub(super) fn run(global: &Global, command: &Command) -> anyhow::Result<Exit> {
    let loaded = global.load()?;
    let mut out = std::io::stdout().lock();
    match command {
        Command::Check => {
            // Some of what a store needs stands in the environment: only opening it tells.
            let refuse = |e| ConfigError::Problems(vec![format!("state.tables: {e}")]);
            loaded.config.state.open_tables().map_err(refuse)?;
            let name = global.config.as_ref().map_or("defaults".into(), |path| path.display().to_string());
            writeln!(out, "{name}: the config is right (hash {})", loaded.config.hash())?;
        }
        Command::Show { json: true } => writeln!(out, "{:#}", loaded.to_json())?,
        Command::Show { json: false } => write!(out, "{}", loaded.show())?,
        Command::Explain { key, json } => {
            let keys = loaded.explain(key)?;
            match json {
                true => writeln!(out, "{}", serde_json::to_string_pretty(&keys)?)?,
                false => keys.iter().try_for_each(|key| explain(&mut out, key))?,
            }
        }
    }
    Ok(Exit::Done)
}

fn explain(out: &mut impl Write, key: &Key) -> std::io::Result<()> {
    let unset = "not set".to_string();
    writeln!(out, "{}", key.key)?;
    for line in key.doc.lines() {
        writeln!(out, "    {line}")?;
    }
    writeln!(out, "    holds: {}", key.holds)?;
    writeln!(out, "    default: {}", key.default.as_ref().unwrap_or(&unset))?;
    if key.value != key.default {
        writeln!(out, "    in use: {} (from {})", key.value.as_ref().unwrap_or(&unset), key.origin)?;
    }
    writeln!(out, "    environment: {}", key.variable)
}
