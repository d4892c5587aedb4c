//! `taod replay`: dead letters that can be read by now become rows.

use chrono::{DateTime, Utc};
use clap::Args;

use super::lines::Output;
use super::{Exit, Global, block_on, stores_log};
use crate::ingest::replay::{self, Choice};

/// Read dead letters again, under the formats and mappings of now, and store what they hold, exactly once.
///
/// A letter stays as evidence. It may be run again, beside itself and beside the ingestion: a letter whose rows are
/// stored is passed over. Letters that still cannot be read are counted by reason.
#[derive(Debug, Args)]
pub struct Replay {
    /// Only letters with this reason, such as `unknown_format`.
    #[arg(long, value_name = "REASON")]
    reason: Option<String>,
    /// Only letters of records that Kafka stamped at or after this time, such as `2026-01-31T00:00:00Z`.
    #[arg(long, value_name = "TIME")]
    since: Option<DateTime<Utc>>,
    /// Store nothing, only say what would be.
    #[arg(long)]
    dry_run: bool,
    /// Print one JSON document.
    #[arg(long)]
    json: bool,
}

pub(super) fn run(global: &Global, args: &Replay) -> anyhow::Result<Exit> {
    let config = global.load()?.config;
    stores_log(&config)?;
    let tables = config.state.open_tables()?;
    let choice = Choice { reason: args.reason.clone(), since: args.since, dry_run: args.dry_run };
    let done = block_on(replay::run(&config.ingest, &tables, &choice))??;
    let mut out = Output::stdout();
    match args.json {
        true => out.line(&done)?,
        false => out.text(&format!(
            "{} letters: {} rows {} in {} commits; {} letters were stored before, {} wait for the ingestion; \
             still dead {:?}, skipped {:?}\n",
            done.letters,
            done.rows,
            if args.dry_run { "to store" } else { "stored" },
            done.commits,
            done.before,
            done.unsettled,
            done.failed,
            done.skipped
        ))?,
    }
    out.flush()?;
    Ok(Exit::Done)
}
