//! `taod gate replay`: a trial made again from the stored answers.

use clap::Args;

use super::super::lines::Output;
use super::super::{Exit, Global, block_on};
use crate::engine::Model;
use crate::gate::{TrialRow, history};
use crate::rewards::Rewards;
use crate::round::{Paths, book, replay};
use crate::table::Name;

/// Score a trial's stored answers again, recompute its evidence, and compare. Exit code 2 where they differ.
#[derive(Debug, Args)]
pub struct Replay {
    /// The trial; without it the newest.
    trial: Option<String>,
    /// Print one JSON document.
    #[arg(long)]
    json: bool,
}

pub(super) fn run(global: &Global, args: &Replay) -> anyhow::Result<Exit> {
    let config = global.load()?.config;
    let found = block_on(async {
        let (tables, paths) = (config.state.open_tables()?, Paths::new(&config.state.dir));
        let rows: Vec<TrialRow> = book::read(&tables, Name::Trials).await?;
        let newest = history::last_rows(&rows).last().map(|row| row.facts.trial.clone());
        let Some(trial) = args.trial.clone().or(newest) else {
            anyhow::bail!("no trial yet; the first one opens when a round has trained an adapter")
        };
        let load = move || -> anyhow::Result<Rewards> {
            let model = Model::load_on(&config.model.path, config.model.hold, &config.engine)?;
            Ok(Rewards::load(&config.rewards, &config.workload, &model)?)
        };
        let rewards = tokio::task::spawn_blocking(load).await??;
        Ok(replay::replay(&tables, &paths, &trial, &rewards).await?)
    })??;
    let mut out = Output::stdout();
    match args.json {
        true => out.line(&found)?,
        false => out.text(&format!("{}\n", found.explain()))?,
    }
    out.flush()?;
    Ok(if found.agrees() { Exit::Done } else { Exit::Refused })
}
