//! `taod dataset`: what a round's frozen dataset holds.

mod export;

use std::path::PathBuf;

use anyhow::Context;
use clap::{Args, Subcommand, ValueEnum};

use super::lines::Output;
use super::{Exit, Global, Usage};
use crate::config::Config;
use crate::dataset::{self, Dataset, synthetic};
use crate::durable;
use crate::round::{self, Paths};

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
            let (dataset, made) = load(&config, which)?;
            let made = synthetic::peek(&made)?;
            match (*json, made) {
                (true, made) => {
                    let mut document = serde_json::to_value(&dataset.manifest)?;
                    document["synthetic"] = serde_json::to_value(made)?;
                    out.text(&format!("{}\n", serde_json::to_string_pretty(&document)?))?;
                }
                (false, made) => {
                    out.text(&dataset::Explained(&dataset.manifest).to_string())?;
                    out.text(&made.map_or(String::new(), |made| synthetic::Explained(&made).to_string()))?;
                }
            }
        }
        Command::Export { which, split, format, out: file } => {
            let (dataset, made) = load(&config, which)?;
            let train = synthetic::extended(&made, &dataset.train)?;
            let prompts = match split {
                Split::Train => train.prompts(),
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

/// Returns a dataset and the folder of what was made for its round.
fn load(config: &Config, which: &Which) -> anyhow::Result<(Dataset, PathBuf)> {
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
    Ok((dataset::load(&folder(&round))?, paths.round(&round).join(round::SYNTHETIC)))
}
