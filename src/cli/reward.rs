//! `taod reward`: reward models of one's own, and how good a scorer is.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use clap::{Args, Subcommand, ValueEnum};
use serde::{Deserialize, Serialize};

use super::lines::{Input, Output};
use super::{Exit, Global, Screen, Usage};
use crate::config::Config;
use crate::engine::Model;
use crate::reward_model::accuracy::{Accuracy, Report};
use crate::reward_model::{self, injections, pairs};
use crate::rewards::calibration::Calibration;
use crate::rewards::length::{LengthBias, Point};
use crate::rewards::rules::text;
use crate::rewards::{Item, Rewards, Scorer, Selection, lines};
use crate::signature::{self, PublicKey, SigningKey};

/// Answers below which a quantile map says more about chance than about a scorer.
const MIN_ANSWERS: usize = 50;

/// The commands below `taod reward`.
#[derive(Debug, Subcommand)]
pub enum Command {
    Train(Train),
    Eval(Eval),
    Calibrate(Calibrate),
    Injections(Injections),
    Sign(Sign),
}

/// Sign a reward model's folder by registry.signing_key_file, for `public_key` of one of [[rewards.scorers]].
///
/// That its files are what they should be is your word. `taod reward train` signs what it makes where there is a key.
#[derive(Debug, Args)]
pub struct Sign {
    /// The folder; nothing in it may change afterwards.
    folder: PathBuf,
}

/// Train a reward model on preference pairs.
///
/// Input lines: {"messages" or "prompt", "chosen", "rejected"}, or {"messages", "response", "reward"}, of which pairs are built;
/// a user's thumb is a reward of 1 or 0. DIR becomes a model for sequence classification that `transformers` loads and that
/// [[rewards.scorers]] of kind "classifier" names. Rank, learning rate, epochs and the like are those of `tuning`; one step takes
/// tuning.batch_samples pairs. Keys of `tuning` that would limit or change training elsewhere and do nothing here (dropout,
/// memory_mib, command, a rounded precision) are refused.
#[derive(Debug, Args)]
pub struct Train {
    /// The model to begin with: a folder in Hugging Face layout, a .gguf file, or a hub id.
    #[arg(long, value_name = "MODEL")]
    model: String,
    #[command(flatten)]
    input: Input,
    /// Where the reward model goes.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Share of the prompts that are held out for the accuracy, above 0 and at most 0.5.
    #[arg(long, default_value_t = 0.1, value_name = "SHARE")]
    held_out: f64,
    /// Most pairs that the scored answers of one prompt make.
    #[arg(long, default_value_t = 4, value_name = "N")]
    pairs_per_prompt: usize,
    /// Scored answers make a pair where their rewards differ by more.
    #[arg(long, default_value_t = 0.0, value_name = "GAP")]
    margin: f64,
    /// Changes the held-out prompts, the order and the adapter's first values.
    #[arg(long, default_value_t = 0, value_name = "S")]
    seed: u64,
    /// Print the report as one JSON document.
    #[arg(long)]
    json: bool,
}

/// Measure how often a scorer puts the better answer first.
///
/// Input lines: {"prompt" or "messages", "chosen", "rejected", "subset"?}, as RewardBench has them.
#[derive(Debug, Args)]
pub struct Eval {
    #[command(flatten)]
    input: Input,
    /// "rules", "similarity", or the name of one of [[rewards.scorers]].
    #[arg(long, value_name = "NAME")]
    scorer: String,
    /// The workload whose rules hold; only for "rules".
    #[arg(long, value_name = "NAME")]
    workload: Option<String>,
    /// Print the report as one JSON document.
    #[arg(long)]
    json: bool,
}

/// Fit what raw scores are worth, for rewards.calibration.
///
/// Input lines: {"workload", "messages", "response", "finish_reason"?, "label"?}. The scorers are those that rewards.train and
/// rewards.gate name. `quantile` needs answers of the model that is served; `platt` needs a label of 1 (good) or 0 on
/// each line and reports the expected calibration error.
#[derive(Debug, Args)]
pub struct Calibrate {
    #[command(flatten)]
    input: Input,
    /// The file for rewards.calibration.
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// What is fitted.
    #[arg(long, value_enum, default_value_t = Fit::Quantile)]
    method: Fit,
    /// Measure within prompts what length earns in each score, and fit on scores without it (rewards.length_corrected). Needs
    /// several answers to a prompt.
    #[arg(long)]
    length: bool,
}

/// What `taod reward calibrate` fits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Fit {
    /// The share of the given answers that score lower.
    Quantile,
    /// The chance that an answer is labelled good.
    Platt,
}

/// Measure how often texts that argue with a scorer turn its verdict.
///
/// Runs the built-in attacks against each of [[rewards.scorers]] and "similarity", with --workload against its rules too, and reports
/// flips beyond those that any text of the same length causes.
#[derive(Debug, Args)]
pub struct Injections {
    /// Only this scorer.
    #[arg(long, value_name = "NAME")]
    scorer: Option<String>,
    /// The workload whose rules hold; only for "rules".
    #[arg(long, value_name = "NAME")]
    workload: Option<String>,
    /// Print one JSON document a scorer.
    #[arg(long)]
    json: bool,
}

pub(super) fn run(global: &Global, command: &Command, screen: &Screen) -> anyhow::Result<Exit> {
    let config = global.load()?.config;
    match command {
        Command::Train(args) => train(&config, args, screen),
        Command::Eval(args) => eval(&config, args),
        Command::Calibrate(args) => calibrate(&config, args),
        Command::Injections(args) => attack(&config, args),
        Command::Sign(args) => {
            let key = sign(&config, &args.folder)?;
            let mut out = Output::stdout();
            out.text(&format!("{} is signed by {key}\n", args.folder.display()))?;
            out.flush()?;
            Ok(Exit::Done)
        }
    }
}

fn sign(config: &Config, folder: &Path) -> anyhow::Result<PublicKey> {
    let file = &config.registry.signing_key_file;
    ensure!(!file.as_os_str().is_empty(), Usage("registry.signing_key_file is empty: name the key to sign by".into()));
    let key = SigningKey::read(file)?;
    signature::sign_folder(folder, &key)?;
    Ok(key.public())
}

fn train(config: &Config, args: &Train, screen: &Screen) -> anyhow::Result<Exit> {
    ensure!(
        args.held_out > 0.0 && args.held_out <= 0.5,
        Usage(format!("--held-out {}: give a share above 0 and at most 0.5", args.held_out))
    );
    let (pairs, counts) = pairs::pairs(args.input.read_all()?, args.pairs_per_prompt, args.margin)?;
    let model = Model::load(&args.model)?;
    let how = (args.held_out, args.seed);
    let card = reward_model::train((&args.model, &model), &pairs, &config.tuning, how, &args.out, &screen.progress())?;
    if !config.registry.signing_key_file.as_os_str().is_empty() {
        sign(config, &args.out)?;
    }
    let mut out = Output::stdout();
    if args.json {
        out.line(&serde_json::json!({ "counts": counts, "card": card }))?;
    } else {
        let trained = &card.trained;
        out.text(&format!(
            "{} pairs of {} lines ({} of equal answers, {} prompts had nothing to teach, {} unusable)\n\
             {} steps on {} pairs, loss {:.3} -> {:.3} (a coin: 0.693)\n{}reward model: {}\n",
            counts.pairs,
            counts.lines,
            counts.equal,
            counts.uninformative,
            trained.unusable,
            trained.steps,
            trained.pairs,
            trained.first_loss,
            trained.last_loss,
            summary(&trained.held_out),
            args.out.display(),
        ))?;
    }
    out.flush()?;
    Ok(Exit::Done)
}

fn eval(config: &Config, args: &Eval) -> anyhow::Result<Exit> {
    let (pairs, _) = pairs::pairs(args.input.read_all()?, 1, 0.0)?;
    let rewards = single(config, &args.scorer)?;
    let report = reward_model::evaluate(&pairs, args.workload.as_deref(), |pairs| rewards.margins(pairs))?;
    let mut out = Output::stdout();
    match args.json {
        true => {
            out.line(&serde_json::json!({ "scorer": args.scorer, "identity": rewards.identity(), "report": report }))?
        }
        false => out.text(&summary(&report))?,
    }
    out.flush()?;
    Ok(Exit::Done)
}

fn summary(report: &Report) -> String {
    let share = |a: &Accuracy| {
        format!(
            "{:.1} % of {} pairs of {} prompts, 95 % interval {:.1} to {:.1}",
            100.0 * a.accuracy,
            a.pairs,
            a.prompts,
            100.0 * a.low,
            100.0 * a.high
        )
    };
    let mut text = format!("better answer first: {}\n", share(&report.overall));
    for (name, subset) in &report.subsets {
        text.push_str(&format!("  {name}: {}\n", share(subset)));
    }
    if let Some(mean) = report.mean_of_subsets {
        text.push_str(&format!("mean of the subsets: {:.1} %\n", 100.0 * mean));
    }
    text.push_str(&format!("the longer answer is better in {}\n", share(&report.longer_is_better)));
    text
}

/// One input line of `taod reward calibrate`.
#[derive(Deserialize)]
struct Labelled {
    #[serde(flatten)]
    line: lines::Line,
    #[serde(default)]
    label: Option<u8>,
}

#[derive(Serialize)]
struct Fitted<'a> {
    score: &'a str,
    answers: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    expected_calibration_error: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    length_bias: Option<&'a LengthBias>,
}

fn calibrate(config: &Config, args: &Calibrate) -> anyhow::Result<Exit> {
    let lines: Vec<Labelled> = args.input.read_all()?;
    let labels: Vec<Option<u8>> = lines.iter().map(|line| line.label).collect();
    if args.method == Fit::Platt
        && let Some(line) = labels.iter().position(|label| !matches!(label, Some(0 | 1)))
    {
        anyhow::bail!("line {line}: label {:?} is neither 0 nor 1; platt needs one on each line", labels[line]);
    }
    // Raw scores do not depend on the calibration in use, which may be the one that is made anew.
    let settings =
        crate::rewards::Settings { calibration: String::new(), length_corrected: Vec::new(), ..config.rewards.clone() };
    let rewards = Rewards::without_base(&settings, &config.workload)?;
    let items: Vec<Item> = lines.into_iter().map(|line| line.line.into()).collect();
    let mut raw: BTreeMap<String, Vec<(f64, bool)>> = BTreeMap::new();
    let mut lengths: BTreeMap<String, LengthBias> = BTreeMap::new();
    for selection in [Selection::Train, Selection::Gate] {
        for (name, mut scores) in rewards.graded_parts(selection, &items)? {
            if args.length {
                let bias = length_bias(&items, &scores).with_context(|| format!("length bias of {name}"))?;
                scores.iter_mut().for_each(|(index, raw)| *raw = bias.correct(*raw, words(&items[*index])));
                lengths.insert(name.clone(), bias);
            }
            let labelled = scores.into_iter().map(|(index, raw)| (raw, labels[index] == Some(1)));
            raw.insert(name, labelled.collect());
        }
    }
    ensure!(!raw.is_empty(), "rewards.train and rewards.gate name no graded score; there is nothing to calibrate");
    let calibration = match args.method {
        Fit::Platt => Calibration::fit_platt(&raw)?,
        Fit::Quantile => {
            let few = raw.iter().find(|(_, scores)| scores.len() < MIN_ANSWERS);
            if let Some((name, scores)) = few {
                anyhow::bail!(
                    "{} answers with the score {name} are too few for a map; give at least {MIN_ANSWERS}",
                    scores.len()
                );
            }
            let plain =
                |(name, scores): (&String, &Vec<(f64, bool)>)| (name.clone(), scores.iter().map(|s| s.0).collect());
            Calibration::fit(&raw.iter().map(plain).collect())?
        }
    };
    let calibration = calibration.with_lengths(lengths);
    calibration.save(&args.out).with_context(|| format!("cannot save {}", args.out.display()))?;
    let mut out = Output::stdout();
    for (score, scores) in &raw {
        let expected_calibration_error = calibration.expected_error(score);
        let length_bias = calibration.length(score);
        out.line(&Fitted { score, answers: scores.len(), expected_calibration_error, length_bias })?;
    }
    out.flush()?;
    Ok(Exit::Done)
}

fn words(item: &Item) -> usize {
    text::words(&item.response).count()
}

fn length_bias(items: &[Item], scores: &[(usize, f64)]) -> anyhow::Result<LengthBias> {
    let mut prompts: BTreeMap<String, usize> = BTreeMap::new();
    let mut points = Vec::with_capacity(scores.len());
    for (index, score) in scores {
        let next = prompts.len();
        let prompt = *prompts.entry(serde_json::to_string(&items[*index].messages)?).or_insert(next);
        points.push(Point { prompt, words: words(&items[*index]), score: *score });
    }
    LengthBias::fit(&points).map_err(anyhow::Error::msg)
}

fn attack(config: &Config, args: &Injections) -> anyhow::Result<Exit> {
    let defined = || config.rewards.scorers.iter().map(|definition| definition.name.clone());
    let names: Vec<String> = match &args.scorer {
        Some(name) => vec![name.clone()],
        None => {
            let rules = args.workload.iter().map(|_| "rules".to_owned());
            ["similarity".to_owned()].into_iter().chain(rules).chain(defined()).collect()
        }
    };
    let mut out = Output::stdout();
    for name in names {
        let rewards = single(config, &name)?;
        let report = injections::run(|pairs| {
            let workload = args.workload.as_deref();
            let pairs: Vec<(Item, Item)> = pairs.iter().map(|pair| reward_model::items(pair, workload)).collect();
            rewards.margins(&pairs)
        })?;
        if args.json {
            out.line(&serde_json::json!({ "scorer": name, "report": report }))?;
            continue;
        }
        let injections::Flips { pairs, right_before, flipped, flipped_by_neutral } = report.overall;
        out.text(&format!(
            "{name}: {} attacks on {pairs} pairs, {right_before} of them right before; flipped {flipped}, by a neutral text \
             {flipped_by_neutral}: {:+.1} % beyond it\n",
            report.attacks,
            100.0 * report.beyond_neutral,
        ))?;
        for (kind, flips) in &report.kinds {
            out.text(&format!(
                "  {kind}: {} of {} flipped, {} by a neutral text\n",
                flips.flipped, flips.right_before, flips.flipped_by_neutral
            ))?;
        }
    }
    out.flush()?;
    Ok(Exit::Done)
}

/// Loads the rewards of a config with one scorer alone.
fn single(config: &Config, name: &str) -> anyhow::Result<Rewards> {
    // Not in the gate too, which refuses what depends on its company: a pairwise judge can be measured all the same.
    let (train, gate) = (vec![Scorer::from(name.to_owned())], vec![Scorer::Rules]);
    let settings = crate::rewards::Settings { train, gate, ..config.rewards.clone() };
    Ok(Rewards::without_base(&settings, &config.workload)?)
}
