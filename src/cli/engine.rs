//! `taod generate` and `taod logprobs`: the engine alone.

use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::Args;
use serde::{Deserialize, Serialize};

use super::answers::{Answer, ModelArgs, Prompt};
use super::lines::{Input, Output};
use super::{Exit, Screen};
use crate::engine::{
    BatchLimits, Completion, Grammar, Group, Model, Policy, Precision, SamplingSettings, ScoreItem, generate, logprobs,
};
use crate::record::{FinishReason, derive_seed};

/// Inputs that are worked on together: enough to fill the batch, few enough that results come early.
const CHUNK: usize = 64;

/// Sample answers to prompts.
///
/// Input lines: {"messages": [...]}. Output lines, one for each sample, in the order of the input: {"index", "sample",
/// "text", "token_ids", "logprobs", "sampler_logprobs", "finish_reason"}, and "stop_reason" where a stop string ended it.
#[derive(Debug, Args)]
pub struct Generate {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    input: Input,
    /// Answers to each prompt.
    #[arg(long, default_value_t = 1, value_name = "K", value_parser = clap::value_parser!(u64).range(1..=1024))]
    samples: u64,
    /// Most new tokens of one answer.
    #[arg(long, default_value_t = 256, value_name = "N")]
    max_tokens: usize,
    /// 1 draws from the model's own distribution, 0 takes the likeliest token.
    #[arg(long, default_value_t = 1.0, value_name = "T")]
    temperature: f64,
    /// Part of the probability mass that is kept.
    #[arg(long, default_value_t = 1.0, value_name = "P")]
    top_p: f64,
    /// Likeliest tokens that are kept; 0 keeps all.
    #[arg(long, default_value_t = 0, value_name = "K")]
    top_k: usize,
    /// Keeps tokens at least this likely beside the most likely one; 0 keeps all.
    #[arg(long, default_value_t = 0.0, value_name = "P")]
    min_p: f64,
    /// Makes tokens of the prompt and of the answer less likely; 1 is none.
    #[arg(long, default_value_t = 1.0, value_name = "R")]
    repetition_penalty: f64,
    /// A string that ends an answer; its text stops before it, its token ids hold it. May be given several times.
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,
    /// A JSON Schema that every answer keeps, as a file; --max-tokens may still cut it short.
    #[arg(long, value_name = "FILE")]
    json_schema: Option<PathBuf>,
    /// Memory of keys and values, in MiB.
    #[arg(long, default_value_t = BatchLimits::CACHE_MIB, value_name = "MIB")]
    cache_mib: usize,
    /// Changes every draw.
    #[arg(long, default_value_t = 0, value_name = "S")]
    seed: u64,
    /// Precision of the weights.
    #[arg(long, value_enum, default_value_t = Precision::F32, value_name = "FORM")]
    precision: Precision,
}

#[derive(Serialize)]
struct SampleLine<'a> {
    index: usize,
    sample: usize,
    text: &'a str,
    token_ids: &'a [u32],
    logprobs: &'a [f32],
    sampler_logprobs: &'a [f32],
    finish_reason: FinishReason,
    #[serde(skip_serializing_if = "Option::is_none")]
    stop_reason: Option<&'a str>,
}

pub(super) fn run_generate(args: &Generate, screen: &Screen) -> anyhow::Result<Exit> {
    let prompts: Vec<Prompt> = args.input.read_all()?;
    let (model, adapter) = args.model.load()?;
    let sampling = SamplingSettings {
        temperature: args.temperature,
        top_p: args.top_p,
        top_k: args.top_k,
        min_p: args.min_p,
        repetition_penalty: args.repetition_penalty,
        max_tokens: args.max_tokens,
        stop: args.stop.clone(),
        grammar: args.json_schema.as_deref().map(|path| grammar(path, &model)).transpose()?,
        ..SamplingSettings::default()
    };
    let policy = Policy::new(&model, adapter.as_ref(), args.precision.form())?;
    let limits = BatchLimits { cache_mib: args.cache_mib, ..BatchLimits::default() };
    let mut out = Output::stdout();
    let mut step = screen.progress().step("generating", prompts.len() as u64 * args.samples, "answers");
    for (chunk, prompts) in prompts.chunks(CHUNK).enumerate() {
        let first = chunk * CHUNK;
        let group = |(at, prompt): (usize, &Prompt)| {
            let index = first + at;
            let seed = |sample: u64| derive_seed(args.seed, &["generate", &index.to_string(), &sample.to_string()]);
            let seeds = (0..args.samples).map(seed).collect();
            Ok(Group { id: index as u64, prompt: prompt.ids(&model, index)?, seeds, sampling: sampling.clone() })
        };
        let groups: Vec<Group> = prompts.iter().enumerate().map(group).collect::<anyhow::Result<_>>()?;
        let mut on_done = |_: u64, _: usize, _: &Completion| step.advance(1, "");
        let answers = generate(&policy, groups, &limits, &mut on_done)?;
        for (at, samples) in answers.iter().enumerate() {
            for (sample, completion) in samples.iter().enumerate() {
                out.line(&line(first + at, sample, completion))?;
            }
        }
        out.flush()?;
    }
    Ok(Exit::Done)
}

fn grammar(path: &Path, model: &Model) -> anyhow::Result<Grammar> {
    let text = std::fs::read_to_string(path).with_context(|| format!("--json-schema {}", path.display()))?;
    let schema = serde_json::from_str(&text).with_context(|| format!("{} is not JSON", path.display()))?;
    Grammar::json_schema(model, &schema).with_context(|| path.display().to_string())
}

fn line(index: usize, sample: usize, completion: &Completion) -> SampleLine<'_> {
    SampleLine {
        index,
        sample,
        text: &completion.text,
        token_ids: &completion.token_ids,
        logprobs: &completion.logprobs,
        sampler_logprobs: &completion.sampler_logprobs,
        finish_reason: completion.finish_reason,
        stop_reason: completion.stop_string.as_deref(),
    }
}

/// Compute the log-probs of given answers.
///
/// Input lines: {"messages": [...], "response": "..."} or with "token_ids" and "finish_reason"; ids win over text.
/// Output lines: {"index", "token_ids", "logprobs"}, the log-softmax of the raw logits at temperature 1.
#[derive(Debug, Args)]
pub struct Logprobs {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    input: Input,
}

#[derive(Deserialize)]
struct AnsweredLine {
    #[serde(flatten)]
    prompt: Prompt,
    #[serde(flatten)]
    answer: Answer,
}

#[derive(Serialize)]
struct LogprobsLine<'a> {
    index: usize,
    token_ids: &'a [u32],
    logprobs: &'a [f32],
}

pub(super) fn run_logprobs(args: &Logprobs, screen: &Screen) -> anyhow::Result<Exit> {
    let lines: Vec<AnsweredLine> = args.input.read_all()?;
    let (model, adapter) = args.model.load()?;
    let mut out = Output::stdout();
    let mut step = screen.progress().step("scoring", lines.len() as u64, "answers");
    for (chunk, lines) in lines.chunks(CHUNK).enumerate() {
        let first = chunk * CHUNK;
        let ids = |(at, line): (usize, &AnsweredLine)| {
            Ok((line.prompt.ids(&model, first + at)?, line.answer.ids(&model, first + at)?))
        };
        let ids: Vec<(Vec<u32>, Vec<u32>)> = lines.iter().enumerate().map(ids).collect::<anyhow::Result<_>>()?;
        let items: Vec<ScoreItem<'_>> =
            ids.iter().map(|(prompt, completion)| ScoreItem { prompt, completion }).collect();
        let scored = logprobs(&model, adapter.as_ref(), &items)?;
        for (at, ((_, token_ids), logprobs)) in ids.iter().zip(&scored).enumerate() {
            out.line(&LogprobsLine { index: first + at, token_ids, logprobs })?;
        }
        out.flush()?;
        step.advance(lines.len() as u64, "");
    }
    Ok(Exit::Done)
}
