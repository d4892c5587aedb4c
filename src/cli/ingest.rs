//! `taod ingest`: only the ingestion.

use std::sync::Arc;

use clap::Args;

use super::lines::Output;
use super::{Exit, Global, block_on, signals, stores_log};
use crate::daemon;
use crate::ingest::{self, Counters, Mode};

/// Store the query log in the table, every record exactly once, and nothing else.
#[derive(Debug, Args)]
pub struct Ingest {
    /// End once everything in the log is stored. An error is then final; without it everything is retried without end.
    #[arg(long)]
    until_idle: bool,
    /// Serve metrics and health at `admin.listen`, as `taod run` does.
    #[arg(long, conflicts_with = "until_idle")]
    metrics: bool,
    /// Print what was stored as one JSON document.
    #[arg(long)]
    json: bool,
}

pub(super) fn run(global: &Global, args: &Ingest) -> anyhow::Result<Exit> {
    let config = global.load()?.config;
    stores_log(&config)?;
    let mode = if args.until_idle { Mode::UntilIdle } else { Mode::Forever };
    let tables = config.state.open_tables()?;
    let summary = block_on(async {
        let shutdown = signals::shutdown()?;
        if args.metrics {
            return daemon::ingest_only(config, shutdown).await;
        }
        anyhow::Ok(ingest::run(&config.ingest, &tables, Arc::new(Counters::default()), shutdown, mode).await?)
    })??;
    let mut out = Output::stdout();
    match args.json {
        true => out.line(&summary)?,
        false => out.text(&format!(
            "{} records ({} bytes) are {} rows of version {}, in {} commits; dead letters {:?}, skipped {:?}\n",
            summary.records,
            summary.bytes,
            summary.rows,
            summary.version,
            summary.commits,
            summary.dead_letters,
            summary.skipped
        ))?,
    }
    out.flush()?;
    Ok(Exit::Done)
}
