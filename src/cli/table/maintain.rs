//! `taod table maintain`: compaction, vacuum and checkpoints, by hand.

use clap::Args;

use super::{Exit, Global};
use crate::cli::block_on;
use crate::cli::lines::Output;
use crate::daemon::maintenance::{self, Maintained};
use crate::erasure::{EraseError, Erasure};
use crate::round::{Paths, child};
use crate::table::maintain;

/// Remove rows past their retention, compact small files, remove what no version needs, and write checkpoints, in a child
/// process with a memory limit. An erasure that was interrupted is finished first. Safe while the daemon runs. Exit code 1 when a task failed.
#[derive(Debug, Args)]
pub struct Maintain {
    /// Print one JSON document.
    #[arg(long)]
    json: bool,
}

/// The child process of maintenance; the daemon and `taod table maintain` start it.
#[derive(Debug, Args)]
pub struct Worker {}

pub(super) fn run(global: &Global, args: &Maintain) -> anyhow::Result<Exit> {
    global.load()?;
    let done = block_on(maintenance::in_child(global.config.as_deref()))??;
    let mut out = Output::stdout();
    match args.json {
        true => out.line(&done.reports)?,
        false => done.reports.iter().try_for_each(|report| out.text(&report.to_string()))?,
    }
    out.flush()?;
    Ok(if done.failed() { Exit::Failed } else { Exit::Done })
}

pub(in crate::cli) fn run_worker(global: &Global, _: &Worker) -> anyhow::Result<Exit> {
    child::end_with_parent();
    child::give_way();
    let config = global.load()?.config;
    maintenance::limit_memory(&config.maintenance)?;
    let (tables, paths) = (config.state.open_tables()?, Paths::new(&config.state.dir));
    let erasure = Erasure { tables: tables.clone(), paths, user_key: config.ingest.user_key()? };
    let done = block_on(async {
        let erasure = match erasure.resume().await {
            Ok(_) => None,
            Err(error @ EraseError::Busy { .. }) => {
                tracing::info!(%error, "interrupted erasures are left to the one that runs");
                None
            }
            Err(error) => {
                tracing::error!(%error, "an interrupted erasure could not be finished; the tables are maintained all the same");
                Some(error.to_string())
            }
        };
        Maintained { erasure, reports: maintain::all(&tables, &config.maintenance).await }
    })?;
    let mut out = Output::stdout();
    out.line(&done)?;
    out.flush()?;
    Ok(Exit::Done)
}
