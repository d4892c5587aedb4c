//! `taod dataset`: what a round's frozen dataset holds.

mod export;

use std::path::PathBuf;

use anyhow::Context;
use clap::{Args, Subcommand, ValueEnum};

use super::lines::Output;
use super::{Exit, Global, Usage};
use crate::config::Config;
use crate::dataset::{self, Dataset};
use crate::durable;
use crate::round::Paths;

/// What is asked of a dataset.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Say what it was made of, why rows were left out and where the prompts went.
    Show {
        #[command(flatten)]
        which: Which,
        /// Print the manifest itself, one JSON document.
        #[arg(long)]
        json: bool,
    },
    /// Write the prompts of one split for other tools.
    Export {
        #[command(flatten)]
        which: Which,
        /// Which split.
        #[arg(long, value_enum)]
        split: Split,
        /// In which form.
        #[arg(long, value_enum, default_value_t = Format::Raw)]
        format: Format,
        /// Where to; without it standard output.
        #[arg(long, value_name = "FILE")]
        out: Option<PathBuf>,
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

/// The forms of an export.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// The prompts as taod keeps them, one JSON object a line.
    Raw,
    /// One row a line as `datasets` and TRL read it: `prompt` is a list of messages with role and text.
    Jsonl,
    /// The same rows as a Parquet file.
    Parquet,
}

pub(super) fn run(global: &Global, command: &Command) -> anyhow::Result<Exit> {
    let config = global.load()?.config;
    let mut out = Output::stdout();
    match command {
        Command::Show { which, json } => {
            let manifest = load(&config, which)?.manifest;
            match json {
                true => out.text(&format!("{}\n", serde_json::to_string_pretty(&manifest)?))?,
                false => out.text(&dataset::Explained(&manifest).to_string())?,
            }
        }
        Command::Export { which, split, format, out: file } => {
            let dataset = load(&config, which)?;
            let prompts = match split {
                Split::Train => dataset.train.prompts(),
                Split::Gate => dataset.gate.prompts(),
                Split::Audit => dataset.audit.prompts(),
            };
            match (format, file) {
                (Format::Parquet, None) => {
                    return Err(Usage("a Parquet file is no text: say with --out where it goes".to_owned()).into());
                }
                (_, Some(file)) => durable::write(file, &export::bytes(prompts, *format)?)?,
                (_, None) => out.text(&String::from_utf8_lossy(&export::bytes(prompts, *format)?))?,
            }
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
