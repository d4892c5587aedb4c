//! `taod tune`: an adapter from scored samples.

use std::path::PathBuf;

use anyhow::ensure;
use clap::Args;
use serde::Deserialize;

use super::answers::{Answer, Prompt};
use super::lines::{Input, Output};
use super::{Exit, Global, Screen};
use crate::adapter::{self, Sample};
use crate::engine::Model;

/// Train an adapter on scored samples.
///
/// Input lines: {"group", "messages", "token_ids", "finish_reason", "reward", "logprobs"?}, or "response" for the ids; the
/// samples of one prompt share their group. DIR/adapter becomes a PEFT folder. A run that was killed goes on where it
/// was when it is started again with the same input.
#[derive(Debug, Args)]
pub struct Tune {
    /// A folder in Hugging Face layout, a .gguf file, or a hub id.
    #[arg(long, value_name = "MODEL")]
    model: String,
    #[command(flatten)]
    input: Input,
    /// Where the checkpoint, the log of steps and the adapter go.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// The `--out` of an earlier run on the same model: its adapter is continued, with its optimizer. Or the folder of any PEFT
    /// adapter of the model, with the LoRA settings of the config. Without it a fresh adapter is trained.
    #[arg(long, value_name = "DIR")]
    start: Option<PathBuf>,
    /// Changes the order of the samples and the adapter's first values.
    #[arg(long, default_value_t = 0, value_name = "S")]
    seed: u64,
    /// Print the whole outcome as one JSON document.
    #[arg(long)]
    json: bool,
}

#[derive(Deserialize)]
struct ScoredLine {
    /// A number or a text.
    group: serde_json::Value,
    #[serde(flatten)]
    prompt: Prompt,
    #[serde(flatten)]
    answer: Answer,
    reward: f64,
    #[serde(default)]
    logprobs: Option<Vec<f32>>,
}

impl ScoredLine {
    fn sample(self, model: &Model, index: usize) -> anyhow::Result<Sample> {
        let has_ids = self.answer.token_ids.is_some();
        ensure!(
            has_ids || self.logprobs.is_none(),
            "input {index} holds logprobs beside a text; text that is tokenised anew may have other tokens: give token_ids"
        );
        let completion = self.answer.ids(model, index)?;
        if let Some(logprobs) = &self.logprobs {
            let (given, tokens) = (logprobs.len(), completion.len());
            ensure!(given == tokens, "input {index} has {given} logprobs for {tokens} token_ids; give one for each");
        }
        let group = self.group.as_str().map_or_else(|| self.group.to_string(), str::to_string);
        let prompt = self.prompt.ids(model, index)?;
        Ok(Sample { group, prompt, completion, reward: self.reward, old_logprobs: self.logprobs, base_logprobs: None })
    }
}

pub(super) fn run(global: &Global, args: &Tune, screen: &Screen) -> anyhow::Result<Exit> {
    let config = global.load()?.config;
    let lines: Vec<ScoredLine> = args.input.read_all()?;
    let model = Model::load_on(&args.model, config.model.hold, &config.engine)?;
    let sample = |(index, line): (usize, ScoredLine)| line.sample(&model, index);
    let samples: Vec<Sample> = lines.into_iter().enumerate().map(sample).collect::<anyhow::Result<_>>()?;
    let (start, progress) = (args.start.as_deref(), screen.progress());
    let outcome = adapter::tune(&model, &samples, start, &config.tuning, args.seed, &args.out, &progress)?;
    let mut out = Output::stdout();
    match args.json {
        true => out.line(&outcome)?,
        false => out.text(&summary(&outcome))?,
    }
    out.flush()?;
    Ok(Exit::Done)
}

fn summary(outcome: &adapter::Outcome) -> String {
    let losses = outcome.steps.first().zip(outcome.steps.last());
    let losses = losses.map_or(String::new(), |(first, last)| format!(", loss {:.3} -> {:.3}", first.loss, last.loss));
    format!(
        "{} steps on {} samples of {} groups ({} groups had nothing to teach){losses}, KL {:.3} nats a token\nadapter: {}\n",
        outcome.steps.len(),
        outcome.samples_used,
        outcome.groups_used,
        outcome.groups_dropped(),
        outcome.kl_sample,
        outcome.adapter_dir.display(),
    )
}
