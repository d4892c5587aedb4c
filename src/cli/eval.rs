//! `taod eval`: two adapters on the same prompts, side by side, with no side effect.

use std::path::PathBuf;

use anyhow::ensure;
use clap::Args;
use serde::{Deserialize, Serialize};

use super::answers::Prompt;
use super::lines::{Input, Output};
use super::{Exit, Global, Screen};
use crate::config::Config;
use crate::engine::{Adapter, BatchLimits, Completion, Group, Model, Policy, SamplingSettings, WeightForm, generate};
use crate::gate::Evidence;
use crate::gate::confidence::bounds;
use crate::progress::Step;
use crate::record::derive_seed;
use crate::rewards::{Item, Rewards};

const CHUNK: usize = 32;
/// The bounds of the gain hold with a probability of 1 minus this, each.
const ALPHA: f64 = 0.05;

/// Compare an adapter with another one, or with the base, on the same prompts. Exit code 0 when it is better, else 2.
///
/// Input lines: {"workload", "messages"}. Both sides answer each prompt with independent draws; the gate's scorers score
/// the answers. Better means that the 95 % lower bound of the mean gain is above 0. Nothing is recorded: this is no trial.
#[derive(Debug, Args)]
pub struct Eval {
    /// A folder in Hugging Face layout, a .gguf file, or a hub id.
    #[arg(long, value_name = "MODEL")]
    model: String,
    /// The adapter that is looked at, a PEFT folder.
    #[arg(long, value_name = "DIR")]
    adapter: PathBuf,
    /// The adapter that it is compared with; without it the base model.
    #[arg(long, value_name = "DIR")]
    against: Option<PathBuf>,
    #[command(flatten)]
    input: Input,
    /// Answers of each side to each prompt; their scores are averaged.
    #[arg(long, default_value_t = 1, value_name = "K", value_parser = clap::value_parser!(u64).range(1..=64))]
    samples: u64,
    /// Most new tokens of one answer.
    #[arg(long, default_value_t = 256, value_name = "N")]
    max_tokens: usize,
    /// Temperature of both sides.
    #[arg(long, default_value_t = 0.7, value_name = "T")]
    temperature: f64,
    /// Changes every draw.
    #[arg(long, default_value_t = 0, value_name = "S")]
    seed: u64,
    /// Print one JSON document.
    #[arg(long)]
    json: bool,
}

#[derive(Deserialize)]
struct WorkloadLine {
    #[serde(default)]
    workload: Option<String>,
    #[serde(flatten)]
    prompt: Prompt,
}

/// What came out.
#[derive(Debug, Serialize)]
struct Report {
    prompts: usize,
    samples: u64,
    /// Mean score of each side, from 0 to 1.
    adapter: f64,
    against: f64,
    gain: f64,
    /// Bounds of the mean gain.
    lower: f64,
    upper: f64,
    /// The evidence that the gate would have had from these prompts at its margin.
    ln_wealth: f64,
    better: bool,
}

impl Report {
    fn new(adapter: &[f64], against: &[f64], samples: u64, margin: f64) -> anyhow::Result<Self> {
        let gains: Vec<f64> = adapter.iter().zip(against).map(|(a, b)| a - b).collect();
        let mut evidence = Evidence::new(margin)?;
        for gain in &gains {
            evidence.step(*gain)?;
        }
        let mean = |scores: &[f64]| scores.iter().sum::<f64>() / scores.len() as f64;
        let gain = bounds(&gains, -1.0, 1.0, ALPHA);
        Ok(Report {
            prompts: gains.len(),
            samples,
            adapter: mean(adapter),
            against: mean(against),
            gain: gain.mean,
            lower: gain.lower,
            upper: gain.upper,
            ln_wealth: evidence.ln_wealth(),
            better: gain.lower > 0.0,
        })
    }

    fn text(&self) -> String {
        format!(
            "{} prompts, {} answers of each side to each\nadapter  {:.3}\nagainst  {:.3}\ngain     {:+.3}  ({:+.3} to {:+.3} \
             at 95 %), ln wealth {:.2}\n{}\n",
            self.prompts,
            self.samples,
            self.adapter,
            self.against,
            self.gain,
            self.lower,
            self.upper,
            self.ln_wealth,
            if self.better { "better" } else { "not shown to be better" },
        )
    }
}

pub(super) fn run(global: &Global, args: &Eval, screen: &Screen) -> anyhow::Result<Exit> {
    let config = global.load()?.config;
    let lines: Vec<WorkloadLine> = args.input.read_all()?;
    let model = Model::load_held(&args.model, config.model.hold)?;
    let adapter = Adapter::load(&args.adapter, &model)?;
    let against = args.against.as_deref().map(|folder| Adapter::load(folder, &model)).transpose()?;
    let answers = 2 * args.samples * lines.len() as u64;
    let mut side = Side {
        args,
        model: &model,
        rewards: rewards(&config, &lines)?,
        step: screen.progress().step("answering", answers, "answers"),
    };
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for (chunk, lines) in lines.chunks(CHUNK).enumerate() {
        ours.extend(side.scores("adapter", Some(&adapter), lines, chunk * CHUNK)?);
        theirs.extend(side.scores("against", against.as_ref(), lines, chunk * CHUNK)?);
    }
    let report = Report::new(&ours, &theirs, args.samples, config.gate.margin)?;
    let mut out = Output::stdout();
    match args.json {
        true => out.line(&report)?,
        false => out.text(&report.text())?,
    }
    out.flush()?;
    Ok(if report.better { Exit::Done } else { Exit::Refused })
}

/// Loads the scorers, and refuses before the long work what they could not score after it.
fn rewards(config: &Config, lines: &[WorkloadLine]) -> anyhow::Result<Rewards> {
    let rewards = Rewards::without_base(&config.rewards, &config.workload)?;
    for (index, line) in lines.iter().enumerate() {
        let workload = line.workload.as_deref();
        ensure!(
            rewards.covers(workload),
            "input {index}: workload {:?} has no rules; add [[workload]] with this name and rules to the config",
            workload.unwrap_or_default()
        );
    }
    Ok(rewards)
}

struct Side<'a> {
    args: &'a Eval,
    model: &'a Model,
    rewards: Rewards,
    step: Step,
}

impl Side<'_> {
    /// Returns the mean score of each prompt's answers; `name` keeps the two sides' draws apart.
    fn scores(
        &mut self,
        name: &str,
        adapter: Option<&Adapter>,
        lines: &[WorkloadLine],
        first: usize,
    ) -> anyhow::Result<Vec<f64>> {
        let Side { args, model, rewards, step } = self;
        let sampling = SamplingSettings {
            temperature: args.temperature,
            top_p: 1.0,
            max_tokens: args.max_tokens,
            ..SamplingSettings::default()
        };
        let group = |(at, line): (usize, &WorkloadLine)| {
            let index = first + at;
            let seed = |sample: u64| derive_seed(args.seed, &["eval", name, &index.to_string(), &sample.to_string()]);
            let seeds = (0..args.samples).map(seed).collect();
            Ok(Group { id: index as u64, prompt: line.prompt.ids(model, index)?, seeds, sampling: sampling.clone() })
        };
        let groups: Vec<Group> = lines.iter().enumerate().map(group).collect::<anyhow::Result<_>>()?;
        let mut on_done = |_: u64, _: usize, _: &Completion| step.advance(1, "");
        let policy = Policy::new(model, adapter, WeightForm::F32)?;
        let answers = generate(&policy, groups, &BatchLimits::default(), &mut on_done)?;
        let items = lines.iter().zip(answers).flat_map(|(line, answers)| answers.into_iter().map(|a| item(line, a)));
        let scored = rewards.gate(&items.collect::<Vec<Item>>())?;
        let mean =
            |scores: &[crate::rewards::Scored]| scores.iter().map(|s| s.total).sum::<f64>() / scores.len() as f64;
        Ok(scored.chunks(args.samples as usize).map(mean).collect())
    }
}

fn item(line: &WorkloadLine, answer: Completion) -> Item {
    Item {
        workload: line.workload.clone(),
        messages: line.prompt.messages.clone(),
        response: answer.text,
        finish_reason: answer.finish_reason,
        prompt_ids: None,
        token_ids: Some(answer.token_ids),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn better_needs_more_than_a_higher_mean() {
        let ours = [1.0, 1.0, 0.0, 1.0];
        let few = Report::new(&ours, &[0.0, 1.0, 0.0, 1.0], 1, 0.005).unwrap();
        assert!(few.gain > 0.0 && !few.better, "{few:?}");
        let many = Report::new(&ours.repeat(50), &[0.0].repeat(200), 1, 0.005).unwrap();
        assert!(many.better && many.lower > 0.0 && many.ln_wealth > 7.0, "{many:?}");
        let same = Report::new(&[0.5; 200], &[0.5; 200], 1, 0.005).unwrap();
        assert!(!same.better, "{same:?}");
    }
}
