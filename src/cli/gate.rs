//! `taod gate`: the evidence alone, and a trial in words.

use clap::{Args, Subcommand};

use super::lines::{Input, Output};
use super::{Exit, Global, block_on};
use crate::gate::{self, State, StepRow, Trial, TrialRow, Verdict};
use crate::table::Name;

/// What is asked of the gate.
#[derive(Debug, Subcommand)]
pub enum Command {
    Evidence(Evidence),
    Explain(Explain),
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

/// Say in words how a trial stands or why it ended.
#[derive(Debug, Args)]
pub struct Explain {
    /// The trial; without it the newest.
    trial: Option<String>,
    /// Print one JSON document.
    #[arg(long)]
    json: bool,
}

pub(super) fn run(global: &Global, command: &Command) -> anyhow::Result<Exit> {
    match command {
        Command::Evidence(args) => evidence(global, args),
        Command::Explain(args) => explain(global, args),
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

fn explain(global: &Global, args: &Explain) -> anyhow::Result<Exit> {
    let config = global.load()?.config;
    let verdict = block_on(async {
        let tables = config.state.open_tables()?;
        let rows: Vec<TrialRow> = tables.open_one(Name::Trials).await?.rows(None).await?;
        let steps: Vec<StepRow> = tables.open_one(Name::GateSteps).await?.rows(None).await?;
        verdict(args.trial.as_deref(), &rows, &steps)
    })??;
    let mut out = Output::stdout();
    match args.json {
        true => out.line(&verdict)?,
        false => out.text(&format!("{}\n", gate::explain(&verdict)))?,
    }
    out.flush()?;
    Ok(Exit::Done)
}

/// Recomputes a trial from its stored rows and returns its verdict: the stored one where it ended, else how it stands.
fn verdict(trial: Option<&str>, rows: &[TrialRow], steps: &[StepRow]) -> anyhow::Result<Verdict> {
    let wanted = |row: &&TrialRow| trial.is_none_or(|id| row.facts.trial == id);
    let Some(last) = rows.iter().filter(wanted).max_by_key(|row| (row.time_us, row.steps)) else {
        let known: Vec<&str> = gate::trial::last_rows(rows).iter().map(|row| row.facts.trial.as_str()).collect();
        match trial {
            Some(id) => anyhow::bail!("no trial {id:?}; there are: {}", known.join(", ")),
            None => anyhow::bail!("no trial yet; the first one opens when a round has trained an adapter"),
        }
    };
    let resumed = Trial::resume(&last.facts.trial, rows, steps)?;
    let verdict = Verdict::new(&resumed, &resumed.decide());
    Ok(match last.state {
        State::Open => verdict,
        state => Verdict { state, reason: last.reason.clone(), guardrail: last.guardrail.clone(), ..verdict },
    })
}
