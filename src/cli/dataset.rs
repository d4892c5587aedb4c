//! `taod dataset`: what a round's frozen dataset holds.

use anyhow::Context;
use clap::{Args, Subcommand, ValueEnum};

use super::lines::Output;
use super::{Exit, Global};
use crate::config::Config;
use crate::dataset::{self, Dataset};
use crate::round::Paths;

/// What is asked of a dataset.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Print the manifest: the versions of the tables it was made of, its settings, its counts and its hash.
    Show(Which),
    /// Print the prompts of one split as JSON lines.
    Export {
        #[command(flatten)]
        which: Which,
        /// Which split.
        #[arg(long, value_enum)]
        split: Split,
    },
}

/// Which dataset.
#[derive(Debug, Args)]
pub struct Which {
    /// The round that froze it; without it the newest round that has one.
    #[arg(long, value_name = "ROUND")]
    round: Option<String>,
}

/// The splits.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum Split {
    Train,
    Gate,
    Audit,
}

pub(super) fn run(global: &Global, command: &Command) -> anyhow::Result<Exit> {
    let config = global.load()?.config;
    let mut out = Output::stdout();
    match command {
        Command::Show(which) => {
            let manifest = load(&config, which)?.manifest;
            out.text(&format!("{}\n", serde_json::to_string_pretty(&manifest)?))?;
        }
        Command::Export { which, split } => {
            let dataset = load(&config, which)?;
            let mut prompts = match split {
                Split::Train => dataset.train.iter(),
                Split::Gate => dataset.gate.iter(),
                Split::Audit => dataset.audit.iter(),
            };
            prompts.try_for_each(|prompt| out.line(prompt))?;
        }
    }
    out.flush()?;
    Ok(Exit::Done)
}

fn load(config: &Config, which: &Which) -> anyhow::Result<Dataset> {
    let paths = Paths::new(&config.state.dir);
    let folder = |id: &str| paths.round(id).join("dataset");
    let round = match &which.round {
        Some(id) => id.clone(),
        None => {
            let frozen = |id: &String| folder(id).join("manifest.json").exists();
            paths.round_ids()?.into_iter().rev().find(frozen).with_context(|| {
                format!(
                    "no round below {} has frozen a dataset yet; run `taod round --once`",
                    config.state.dir.display()
                )
            })?
        }
    };
    Ok(dataset::load(&folder(&round))?)
}
