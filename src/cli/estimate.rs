//! `taod estimate`: the memory of a training run, before anything is loaded.

use std::fmt::Write;

use clap::Args;
use serde_json::json;

use super::lines::Output;
use super::{Exit, Global};
use crate::adapter::{Settings, memory};
use crate::engine::train::Activations;
use crate::engine::{Hold, Model, WeightForm};

/// Tell the memory that training a model would take, for each way to hold its weights and its activations.
///
/// Of a GGUF file or a folder in Hugging Face layout the shape alone is read, so that a folder may lack its weights; a hub id is fetched.
/// Ranks, targets and rows come from the config's section `tuning`.
#[derive(Debug, Args)]
pub struct Estimate {
    /// A folder in Hugging Face layout, a .gguf file, or a hub id; without it model.path of the config.
    #[arg(long, value_name = "MODEL")]
    model: Option<String>,
    /// Tokens of the longest prompt with its answer, where they are more than tuning.batch_tokens.
    #[arg(long, default_value_t = 0, value_name = "N")]
    longest: usize,
    /// Print one JSON document.
    #[arg(long)]
    json: bool,
}

/// One way to train, and what it takes.
struct Way {
    hold: Hold,
    form: WeightForm,
    activations: Activations,
    estimate: memory::Estimate,
}

pub(super) fn run(global: &Global, args: &Estimate) -> anyhow::Result<Exit> {
    let config = global.load()?.config;
    let name = args.model.as_ref().unwrap_or(&config.model.path);
    let (shape, stored) = Model::shape(name)?;
    let weights = memory::weights(&shape);
    // Weights that are not there are stored in 16 bits, as most are published.
    let held = |hold| match hold {
        Hold::F32 => 4 * weights,
        Hold::Stored => stored.unwrap_or(2 * weights),
    };
    let settings: &Settings = &config.tuning;
    let mut ways = Vec::new();
    for (hold, form) in [(Hold::F32, WeightForm::Int16), (Hold::F32, WeightForm::F32), (Hold::Stored, WeightForm::F32)]
    {
        for activations in [Activations::Kept, Activations::Again] {
            let estimate = memory::Estimate::new(&shape, settings, args.longest, form, held(hold));
            ways.push(Way { hold, form, activations, estimate });
        }
    }
    let rows = settings.batch_tokens.max(args.longest);
    let mut out = Output::stdout();
    match args.json {
        true => out.line(&json!({
            "weights": weights, "layers": shape.layers.len(), "rows": rows,
            "ways": ways.iter().map(Way::json).collect::<Vec<_>>(),
        }))?,
        false => out.text(&table(name, weights, shape.layers.len(), rows, &ways)?)?,
    }
    out.flush()?;
    Ok(Exit::Done)
}

impl Way {
    /// Returns how it is set: `model.hold`, `tuning.precision`, `tuning.activations`.
    fn settings(&self) -> [&'static str; 3] {
        let hold = match self.hold {
            Hold::F32 => "f32",
            Hold::Stored => "stored",
        };
        let precision = match self.form {
            WeightForm::F32 => "f32",
            WeightForm::Int16 => "int16",
            WeightForm::Int8 => "int8",
        };
        let activations = match self.activations {
            Activations::Kept => "keep",
            Activations::Again => "recompute",
        };
        [hold, precision, activations]
    }

    /// Returns the bytes of weights, copies, activations, logits, the adapter, and all.
    fn bytes(&self) -> [u64; 6] {
        let [weights, rounded, logits, adapter] = self.estimate.parts();
        let (activations, total) = (self.estimate.activations(self.activations), self.estimate.total(self.activations));
        [weights, rounded, activations, logits, adapter, total]
    }

    fn json(&self) -> serde_json::Value {
        let [hold, precision, activations] = self.settings();
        let [weights, rounded, kept, logits, adapter, total] = self.bytes();
        json!({
            "hold": hold, "precision": precision, "activations": activations,
            "bytes": {
                "weights": weights, "rounded": rounded, "activations": kept, "logits": logits, "adapter": adapter,
                "total": total,
            },
        })
    }
}

fn table(name: &str, weights: u64, layers: usize, rows: usize, ways: &[Way]) -> Result<String, std::fmt::Error> {
    let mut text = String::new();
    let millions = weights as f64 / 1e6;
    writeln!(text, "{name}: {millions:.0} million weights in {layers} layers; a pass of {rows} rows; in MiB")?;
    writeln!(
        text,
        "{:<11} {:<17} {:<19} {:>8} {:>8} {:>12} {:>7} {:>8} {:>7}",
        "model.hold",
        "tuning.precision",
        "tuning.activations",
        "weights",
        "rounded",
        "activations",
        "logits",
        "adapter",
        "in all"
    )?;
    for way in ways {
        let [hold, precision, activations] = way.settings();
        let [weights, rounded, kept, logits, adapter, total] = way.bytes().map(|bytes| bytes >> 20);
        writeln!(
            text,
            "{hold:<11} {precision:<17} {activations:<19} {weights:>8} {rounded:>8} {kept:>12} {logits:>7} {adapter:>8} {total:>7}"
        )?;
    }
    Ok(text)
}
