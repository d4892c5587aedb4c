//! `taod gate`: the evidence alone, trials in words and checked again, what the gate does over years, and what people
//! decide.

mod explain;
mod people;
mod replay;
mod simulate;

use clap::{Args, Subcommand};

use super::lines::{Input, Output};
use super::{Exit, Global};
use crate::gate;

/// What is asked of the gate.
#[derive(Debug, Subcommand)]
pub enum Command {
    Approve(people::Approve),
    Evidence(Evidence),
    Explain(explain::Explain),
    Freeze(people::Freeze),
    Plan(simulate::Plan),
    Reject(people::Reject),
    Replay(replay::Replay),
    Simulate(simulate::Simulate),
    Thaw(people::Thaw),
}

/// Run the gate's evidence over differences of scores.
///
/// Input lines: {"d": x}, challenger minus incumbent, from -1 to 1. Output lines: {"index", "lambda", "ln_wealth"}.
#[derive(Debug, Args)]
pub struct Evidence {
    #[command(flatten)]
    input: Input,
    /// The smallest gain worth a release; without it gate.margin of the config.
    #[arg(long, value_name = "M")]
    margin: Option<f64>,
}

pub(super) fn run(global: &Global, command: &Command) -> anyhow::Result<Exit> {
    match command {
        Command::Approve(args) => people::approve(global, args),
        Command::Evidence(args) => evidence(global, args),
        Command::Explain(args) => explain::run(global, args),
        Command::Freeze(args) => people::freeze(global, args),
        Command::Plan(args) => simulate::plan(global, args),
        Command::Reject(args) => people::reject(global, args),
        Command::Replay(args) => replay::run(global, args),
        Command::Simulate(args) => simulate::run(global, args),
        Command::Thaw(args) => people::thaw(global, args),
    }
}

fn evidence(global: &Global, args: &Evidence) -> anyhow::Result<Exit> {
    let margin = match args.margin {
        Some(margin) => margin,
        None => global.load()?.config.gate.margin,
    };
    let mut out = Output::stdout();
    gate::evidence_lines(margin, args.input.open()?, out.writer())?;
    out.flush()?;
    Ok(Exit::Done)
}
