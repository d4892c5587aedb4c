//! `taod eval`: two adapters on the same prompts, side by side, with no side effect.

use std::path::PathBuf;

use anyhow::ensure;
use clap::Args;
use serde::Deserialize;

use super::answers::Prompt;
use super::lines::{Input, Output};
use super::{Exit, Global, Screen};
use crate::config::Config;
use crate::durable;
use crate::engine::{Adapter, BatchLimits, Completion, Group, Model, Policy, SamplingSettings, WeightForm, generate};
use crate::gate::comparison::{Comparison, Pair};
use crate::progress::Step;
use crate::record::derive_seed;
use crate::rewards::{Item, Rewards};

const CHUNK: usize = 32;

/// Compare an adapter with another one, or with the base, on the same prompts. Exit code 0 when it is better, else 2.
///
/// Input lines: {"workload", "messages"} and, for the segments of the report, "tenant" and "language". Both sides answer each
/// prompt with independent draws; the gate's scorers score the answers. Better means that the lower end of the 95 %
/// confidence sequence of the mean gain is above gate.margin. Nothing is recorded: this is no trial.
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
    /// Also write the report as one HTML page.
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
}

/// One line of the input.
#[derive(Deserialize)]
struct WorkloadLine {
    #[serde(default)]
    workload: Option<String>,
    #[serde(default)]
    tenant: Option<String>,
    #[serde(default)]
    language: Option<String>,
    #[serde(flatten)]
    prompt: Prompt,
}

pub(super) fn run(global: &Global, args: &Eval, screen: &Screen) -> anyhow::Result<Exit> {
    let config = global.load()?.config;
    let lines: Vec<WorkloadLine> = args.input.read_all()?;
    let model = Model::load_on(&args.model, config.model.hold, &config.engine)?;
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
    let pair = |((line, adapter), against): ((&WorkloadLine, &f64), &f64)| Pair {
        adapter: *adapter,
        against: *against,
        segments: line.segments(),
    };
    let pairs: Vec<Pair> = lines.iter().zip(&ours).zip(&theirs).map(pair).collect();
    let report = Comparison::new(&pairs, args.samples, config.gate.margin, args.seed)?;
    if let Some(path) = &args.html {
        let against = args.against.as_ref().map_or("the base".to_string(), |folder| folder.display().to_string());
        durable::write(path, report.html(&format!("{} against {against}", args.adapter.display())).as_bytes())?;
    }
    let mut out = Output::stdout();
    match args.json {
        true => out.line(&report)?,
        false => out.text(&report.text())?,
    }
    out.flush()?;
    Ok(if report.all.better { Exit::Done } else { Exit::Refused })
}

impl WorkloadLine {
    /// Returns the segments that the prompt belongs to.
    fn segments(&self) -> Vec<String> {
        let kinds = [("workload", &self.workload), ("tenant", &self.tenant), ("language", &self.language)];
        kinds.iter().filter_map(|(kind, value)| Some(format!("{kind} {}", value.as_ref()?))).collect()
    }
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
        ratings: Vec::new(),
    }
}
