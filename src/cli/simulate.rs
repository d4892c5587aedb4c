//! `taod simulate`: the whole loop on a world in which one knows what is true.

use std::path::PathBuf;

use anyhow::ensure;
use clap::Args;

use super::lines::Output;
use super::{Exit, Screen, Usage, block_on};
use crate::simulate::{self, Options};

/// Run four nights of the whole loop on a small world with planted effects, and check what it makes of each.
///
/// Planted are an improvement, a regression, a reward hack, a poisoned group of users, a drift of the traffic and leaked secrets. A
/// tiny model is made from the seed; everything else is what production runs: broker, ingestion, sampling, training, gate,
/// promotion. No config is read, and variables TAOD__SECTION__KEY are refused. Exit code 0 when each effect was met as expected, 1 when one was not.
#[derive(Debug, Args)]
pub struct Simulate {
    /// Changes the model, the traffic and every draw.
    #[arg(long, default_value_t = 1, value_name = "S")]
    seed: u64,
    /// Honest calls a night, 300 to 5000: of fewer the gate cannot tell.
    #[arg(long, default_value_t = 400, value_name = "N", value_parser = clap::value_parser!(u32).range(300..=5000))]
    calls: u32,
    /// Where everything goes, an empty folder; without it a temporary one, which is removed.
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// Print one JSON document.
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &Simulate, screen: &Screen) -> anyhow::Result<Exit> {
    // A round is a process that reads them as well, and would then work on another state than the simulation's.
    let set =
        std::env::vars_os().filter_map(|(name, _)| name.into_string().ok()).find(|name| name.starts_with("TAOD__"));
    ensure!(
        set.is_none(),
        Usage(format!("{} is set: unset it, a simulation sets every key itself", set.unwrap_or_default()))
    );
    // Removed when it goes out of scope.
    let temporary = args.dir.is_none().then(tempfile::tempdir).transpose()?;
    let kept = args.dir.clone().or_else(|| Some(temporary.as_ref()?.path().to_owned()));
    let options = Options { seed: args.seed, calls: args.calls as usize };
    let report = block_on(simulate::run(&kept.unwrap_or_default(), options, &screen.progress()))??;
    let mut out = Output::stdout();
    match args.json {
        true => out.line(&report)?,
        false => out.text(&report.to_string())?,
    }
    out.flush()?;
    Ok(if report.holds() { Exit::Done } else { Exit::Failed })
}
