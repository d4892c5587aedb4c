//! `taod gate explain`: how a trial stands or why it ended, in words, and its evidence as a picture.

use std::path::PathBuf;

use anyhow::Context;
use clap::Args;

use super::super::lines::Output;
use super::super::{Exit, Global, block_on};
use crate::durable;
use crate::gate::{self, State, StepRow, Trial, TrialRow, Verdict};
use crate::round::{self, Paths, book};
use crate::table::Name;

/// Say in words how a trial stands or why it ended. Everything is recomputed from the tables.
#[derive(Debug, Args)]
pub struct Explain {
    /// The trial, or a round; without it the newest trial.
    trial: Option<String>,
    /// Also draw the evidence, as an SVG.
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    /// Print one JSON document.
    #[arg(long)]
    json: bool,
}

pub(super) fn run(global: &Global, args: &Explain) -> anyhow::Result<Exit> {
    let config = global.load()?.config;
    let mut out = Output::stdout();
    let mut asked = args.trial.clone();
    if let Some(round) = args.trial.as_deref().filter(|name| name.starts_with("round-")) {
        let verdict = of_round(&Paths::new(&config.state.dir), round)?;
        match verdict.outcome.trial() {
            Some((trial, _)) => asked = Some(trial.to_string()),
            None => {
                match args.json {
                    true => out.line(&verdict)?,
                    false => out.text(&format!(
                        "{round} had no trial: {} ({})\n",
                        verdict.outcome.name(),
                        verdict.outcome.reason()
                    ))?,
                }
                out.flush()?;
                return Ok(Exit::Done);
            }
        }
    }
    let (rows, steps) = block_on(async {
        let tables = config.state.open_tables()?;
        let rows: Vec<TrialRow> = book::read(&tables, Name::Trials).await?;
        let steps: Vec<StepRow> = book::read(&tables, Name::GateSteps).await?;
        anyhow::Ok((rows, steps))
    })??;
    let (trial, verdict) = recompute(asked.as_deref(), &rows, &steps)?;
    if let Some(path) = &args.svg {
        let mut mine: Vec<&StepRow> =
            steps.iter().filter(|step| step.trial == verdict.trial && step.suite.is_none()).collect();
        mine.sort_by_key(|step| step.step);
        let points: Vec<(u32, f64)> = mine.iter().map(|step| (step.night, step.ln_wealth)).collect();
        let picture = gate::picture::evidence(&trial, &points)
            .map_err(|why| anyhow::anyhow!("cannot draw the evidence: {why}"))?;
        durable::write(path, picture.as_bytes())?;
    }
    match args.json {
        true => out.line(&verdict)?,
        false => out.text(&format!("{}\n", gate::explain(&verdict)))?,
    }
    out.flush()?;
    Ok(Exit::Done)
}

fn of_round(paths: &Paths, round: &str) -> anyhow::Result<round::Verdict> {
    let known = paths.round_ids()?;
    if !known.iter().any(|id| id == round) {
        anyhow::bail!("no round {round:?}; the newest is {}", known.last().map_or("none", |id| id));
    }
    book::verdict_of(paths, round)?
        .with_context(|| format!("{round} has not ended: `taod round --resume` goes on with it"))
}

/// Recomputes a trial from its stored rows and returns it with its verdict: the stored one where it ended, else how it
/// stands.
fn recompute(trial: Option<&str>, rows: &[TrialRow], steps: &[StepRow]) -> anyhow::Result<(Trial, Verdict)> {
    let wanted = |row: &&TrialRow| trial.is_none_or(|id| row.facts.trial == id);
    // The newest by its number: clocks are set back.
    let Some(last) = gate::history::last_rows(rows).into_iter().rfind(wanted) else {
        let known: Vec<&str> = gate::history::last_rows(rows).iter().map(|row| row.facts.trial.as_str()).collect();
        match trial {
            Some(id) => anyhow::bail!("no trial {id:?}; there are: {}", known.join(", ")),
            None => anyhow::bail!("no trial yet; the first one opens when a round has trained an adapter"),
        }
    };
    let resumed = Trial::resume(&last.facts.trial, rows, steps)?;
    let verdict = Verdict::new(&resumed, &resumed.decide());
    let verdict = match last.state {
        State::Open => verdict,
        state => Verdict { state, reason: last.reason.clone(), guardrail: last.guardrail.clone(), ..verdict },
    };
    Ok((resumed, verdict))
}
