//! `taod score`: the rewards of given answers.

use clap::{Args, ValueEnum};

use super::lines::{Input, Output};
use super::{Exit, Global};
use crate::rewards::lines::{Line, score};
use crate::rewards::{Rewards, Selection};

/// Score answers by the config's rules and scorers.
///
/// Input lines: {"workload", "messages", "response", "finish_reason"?}. Output lines: {"index", "total", "parts"}.
#[derive(Debug, Args)]
pub struct Score {
    #[command(flatten)]
    input: Input,
    /// Which of the two totals.
    #[arg(long, value_enum, default_value_t = By::Train)]
    by: By,
}

/// Whose scorers make the total.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub(super) enum By {
    /// What training learns from.
    Train,
    /// What the gate compares.
    Gate,
}

pub(super) fn run(global: &Global, args: &Score) -> anyhow::Result<Exit> {
    let config = global.load()?.config;
    let lines: Vec<Line> = args.input.read_all()?;
    let rewards = Rewards::without_base(&config.rewards, &config.workload)?;
    let selection = match args.by {
        By::Train => Selection::Train,
        By::Gate => Selection::Gate,
    };
    let mut out = Output::stdout();
    for line in score(&rewards, selection, lines)? {
        out.line(&line)?;
    }
    out.flush()?;
    Ok(Exit::Done)
}
