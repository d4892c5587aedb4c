//! `taod doctor`: what is wrong, and what to do.

use clap::Args;

use super::lines::Output;
use super::{Exit, Global, block_on};
use crate::doctor::{self, Check, Options, State};

/// Check all that taod needs, broker, topic, tables, model, scorers, endpoint, disk, clock and permissions, and say what to do.
/// Exit code 1 where something does not work; warnings alone end with 0.
#[derive(Debug, Args)]
pub struct Doctor {
    /// Only these checks, comma-separated.
    #[arg(long, value_enum, value_delimiter = ',', value_name = "CHECKS")]
    only: Vec<Check>,
    /// Also load an adapter that changes no answer on every replica, ask it one token, and unload it.
    #[arg(long)]
    load: bool,
    /// Print one JSON document.
    #[arg(long)]
    json: bool,
}

pub(super) fn run(global: &Global, args: &Doctor) -> anyhow::Result<Exit> {
    let config = global.load()?.config;
    let options = Options { only: args.only.clone(), load: args.load };
    let report = block_on(doctor::examine(&config, &options))?;
    let mut out = Output::stdout();
    match args.json {
        true => out.line(&report)?,
        false => out.text(&report.explain())?,
    }
    out.flush()?;
    Ok(if report.state == State::Failure { Exit::Failed } else { Exit::Done })
}
