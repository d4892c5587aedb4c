//! Training: scored samples in, a LoRA adapter in PEFT's format out.
//!
//! [`tune`] is one iteration of a round: it chooses samples ([`losses`]), packs them into steps ([`batches`]), trains
//! and exports. Everything random derives from the seed and checkpoints hold the optimizer's moments, so a run that was
//! killed and resumed ends with the bytes of an undisturbed one. A run that diverges ends in an error before anything
//! is exported.

pub mod batches;
pub mod checkpoint;
mod command;
mod known;
pub mod losses;
pub mod memory;
pub mod optimizer;
mod program;
pub mod settings;
mod training;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

pub use settings::{Keep, Settings};

use crate::durable::{self, FileError};
use crate::engine::train::Base;
use crate::engine::{
    DeviceModel, EngineError, Model, ModelConfig, ModelIdentity, Module, WeightForm, Weights, save_peft,
};
use crate::progress::Progress;
use checkpoint::{Checkpoint, Origin};
use training::Run;

/// Folder of the PEFT adapter inside a run's folder.
pub const ADAPTER: &str = "adapter";
/// Folder of the checkpoint inside a run's folder.
pub const CHECKPOINT: &str = "checkpoint";
const OUTCOME: &str = "outcome.json";
const STEPS: &str = "steps.jsonl";

/// One scored answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// What its siblings share: all samples of one prompt.
    pub group: String,
    pub prompt: Vec<u32>,
    /// Ids as sampled; the closing token is there exactly when the model closed its turn.
    pub completion: Vec<u32>,
    /// In [0, 1].
    pub reward: f64,
    /// Log-probs of the completion under the policy that it was sampled from.
    pub old_logprobs: Option<Vec<f32>>,
    /// The same under the base, where they are known: the policy it was sampled from was the base. Computed otherwise.
    pub base_logprobs: Option<Vec<f32>>,
}

/// What one optimizer step did. Numbers are f32 because those survive JSON to the bit, and a resumed run writes them
/// again.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StepLog {
    /// From 1.
    pub step: usize,
    /// From 1.
    pub epoch: usize,
    pub learning_rate: f32,
    pub loss: f32,
    /// Global norm of the gradient before it was clipped.
    pub grad_norm: f32,
    /// Mean divergence from the base on the step's tokens ([`losses::drift`]), in nats, before the update.
    pub kl_sample: f32,
    /// Mean entropy of the policy on the step's tokens, in nats, before the update.
    pub entropy: f32,
    /// Mean ratio of the policy to the one that training began from, over the step's tokens; 1 where the method has none.
    pub ratio: f32,
    /// Share of the step's tokens whose ratio was clipped.
    pub clipped: f32,
    pub samples: usize,
    /// Completion tokens.
    pub tokens: usize,
}

/// What a finished run did. Holds no time and no path, so that equal runs write equal bytes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Outcome {
    pub steps: Vec<StepLog>,
    pub groups_used: usize,
    pub samples_used: usize,
    /// Groups that trained nothing: all samples scored the same.
    pub groups_all_equal: usize,
    /// Groups that trained nothing: no sample above `min_reward`.
    pub groups_none_above: usize,
    /// Completion tokens trained on, over all epochs.
    pub tokens: u64,
    /// Mean divergence from the base over the last epoch's tokens, in nats.
    pub kl_sample: f32,
    /// How far sampler and trainer lay apart, where the method asks.
    pub mismatch: Option<Mismatch>,
    /// The PEFT folder.
    #[serde(skip)]
    pub adapter_dir: PathBuf,
}

/// How far the sampler's log-probs lie from those of the policy that it stands for.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Mismatch {
    /// Mean difference, in nats a token.
    pub gap: f32,
    /// Effective sample size under the truncated weights that make up for it, as a share of the samples.
    pub effective: f32,
}

impl Outcome {
    /// Returns how many groups trained nothing.
    pub fn groups_dropped(&self) -> usize {
        self.groups_all_equal + self.groups_none_above
    }
}

/// Why there is no adapter.
#[derive(Debug, thiserror::Error)]
pub enum TuneError {
    #[error("tuning.{0}")]
    Settings(String),
    #[error("training was paused after {steps} steps; it goes on where it left off")]
    Paused { steps: usize },
    #[error(
        "rank {rank} is above the width {width} of {layer}; set tuning.rank, or tuning.rank_pattern for it, to {width} or less"
    )]
    Rank { rank: usize, width: usize, layer: &'static str },
    #[error("sample {index} (group {group}): {problem}; {remedy}")]
    Sample { index: usize, group: String, problem: String, remedy: &'static str },
    #[error("group {group} has a single sample, which has nothing to be better than; sample each prompt twice or more")]
    Alone { group: String },
    #[error(
        "nothing to learn from: of {groups} groups {all_equal} scored all samples the same and {none_above} had no \
         reward above {min_reward}; sample more answers per prompt or lower tuning.min_reward"
    )]
    Nothing { groups: usize, all_equal: usize, none_above: usize, min_reward: f64 },
    #[error("{path} is of another run: {what} is {found} there and {expected} here; {remedy}")]
    OtherRun { path: String, what: &'static str, found: String, expected: String, remedy: &'static str },
    #[error("{path}: {problem}; delete the folder to begin anew")]
    Checkpoint { path: String, problem: String },
    #[error("{tensor} got no gradient, so it would never train; this is a fault of the forward pass for this model")]
    NoGradient { tensor: String },
    /// With the estimate and the remedy.
    #[error("{0}")]
    Memory(String),
    #[error("{what} is {value} at step {step}, so training was given up; lower tuning.learning_rate")]
    NotFinite { what: &'static str, value: f64, step: usize },
    #[error(
        "{what} is {value:.4} nats a token at step {step}, past tuning.{key} = {bound}; lower tuning.learning_rate or \
         tuning.epochs"
    )]
    Collapsed { what: &'static str, value: f64, step: usize, key: &'static str, bound: f64 },
    #[error(
        "the sampler's log-probs differ from the trainer's by {gap:.3} nats a token, past tuning.max_sampler_gap = {bound}: the \
         ratios of {method} would be noise; set tuning.method to raft or dpo, or sample with the weights that are trained"
    )]
    OffPolicy { method: losses::Method, gap: f64, bound: f64 },
    #[error("tuning.command: {what}")]
    Command { what: String },
    #[error(transparent)]
    Engine(#[from] EngineError),
    #[error(transparent)]
    File(#[from] FileError),
}

impl<'a> Frozen<'a> {
    /// Borrows what tuning needs of a loaded model.
    pub fn of(model: &'a Model) -> Self {
        Frozen { config: model.config(), weights: model.weights(), identity: model.identity(), device: model.device() }
    }

    /// Returns the form of the weights that the processor multiplies by; a device has its own.
    fn form(&self, settings: &Settings) -> WeightForm {
        match self.device {
            None => settings.precision.form_of_training(self.weights.hold()),
            Some(_) => WeightForm::F32,
        }
    }

    /// Returns the device and its precision, where that is not the processor.
    fn place(&self) -> Option<String> {
        self.device.map(|device| device.place().to_string())
    }
}

impl TuneError {
    /// Returns true where the samples were usable but none is better than its siblings: an ordinary outcome of a night.
    pub fn is_nothing_to_learn(&self) -> bool {
        matches!(self, TuneError::Nothing { .. })
    }

    /// Returns true where training diverged, collapsed or never could work: the same samples under the same settings would
    /// do so again.
    pub fn is_given_up(&self) -> bool {
        matches!(self, TuneError::NotFinite { .. } | TuneError::Collapsed { .. } | TuneError::OffPolicy { .. })
    }

    /// Returns true where the folder holds a run under other settings, samples or threads.
    pub fn is_other_run(&self) -> bool {
        matches!(self, TuneError::OtherRun { .. })
    }
}

impl From<candle_core::Error> for TuneError {
    fn from(error: candle_core::Error) -> Self {
        TuneError::Engine(error.into())
    }
}

/// The model that is trained on, as far as tuning needs it.
#[derive(Clone, Copy)]
pub struct Frozen<'a> {
    pub config: &'a ModelConfig,
    pub weights: &'a Weights,
    pub identity: &'a ModelIdentity,
    /// The weights where they are multiplied, if that is not the processor.
    pub(crate) device: Option<&'a Arc<DeviceModel>>,
}

/// Trains an adapter on scored samples and writes it to `out/adapter` as a PEFT folder, `out/outcome.json` last.
///
/// `start` is the `out` folder of the iteration before, whose matrices and moments this one continues, or a PEFT folder, whose
/// matrices it does; without it the adapter starts from no change. A run that was killed goes on from `out/checkpoint`; one that is finished returns
/// its outcome at once.
pub fn tune(
    model: &Model,
    samples: &[Sample],
    start: Option<&Path>,
    settings: &Settings,
    seed: u64,
    out: &Path,
    progress: &Progress,
) -> Result<Outcome, TuneError> {
    if !settings.command.is_empty() {
        return command::tune(model, samples, start, settings, seed, out, progress);
    }
    tune_frozen(Frozen::of(model), samples, start, settings, seed, out, progress)
}

/// Does what [`tune`] does, for weights that come without a tokenizer.
pub fn tune_frozen(
    frozen: Frozen,
    samples: &[Sample],
    start: Option<&Path>,
    settings: &Settings,
    seed: u64,
    out: &Path,
    progress: &Progress,
) -> Result<Outcome, TuneError> {
    check(settings, frozen.config)?;
    let selection = batches::select(samples, settings, frozen.config)?;
    let start = start.map(|before| Checkpoint::load_start(before, frozen)).transpose()?;
    let origin = Origin::new(frozen, settings, seed, samples, start.as_ref())?;
    let folder = out.join(CHECKPOINT);
    let resumed = Checkpoint::load_if_there(&folder)?;
    if let Some(resumed) = &resumed {
        resumed.origin.expect(&origin, &folder)?;
        if let Some(outcome) = finished(out)? {
            return Ok(outcome);
        }
    }
    let longest = selection.groups.iter().map(|group| group.prompt.len()).max().unwrap_or_default() + selection.longest;
    let form = frozen.form(settings);
    let activations = match frozen.device {
        // What is free there cannot be asked for; a pass keeps the least.
        Some(_) => settings.activations.on_device(),
        None => {
            let held = frozen.weights.bytes(frozen.config);
            let estimate = memory::Estimate::new(frozen.config, settings, longest, form, held);
            estimate.decide(settings.activations, settings.memory_mib, memory::free())?
        }
    };
    durable::create_folder(&folder)?;
    let device = frozen.place();
    tracing::info!(method = %settings.method, ?form, device, ?activations, "training");
    let mut base = Base::placed(frozen.config, frozen.weights, frozen.device, form)?;
    base.activations = activations;
    let mut run = Run::new(base, settings, &selection, origin, &folder, seed, resumed, start)?;
    run.train(progress)?;
    durable::write_json_lines(&out.join(STEPS), run.logs())?;
    save_peft(&out.join(ADAPTER), frozen.identity, &settings.lora(), &run.tensors()?)?;
    let outcome = run.outcome();
    durable::write_json(&out.join(OUTCOME), &outcome)?;
    Ok(outcome.at(out))
}

impl Outcome {
    fn at(mut self, out: &Path) -> Self {
        self.adapter_dir = out.join(ADAPTER);
        self
    }
}

fn finished(out: &Path) -> Result<Option<Outcome>, TuneError> {
    match durable::read_json::<Outcome>(&out.join(OUTCOME)) {
        Ok(outcome) => Ok(Some(outcome.at(out))),
        Err(error) if error.is_not_found() => Ok(None),
        Err(error) => Err(error.into()),
    }
}

fn check(settings: &Settings, config: &ModelConfig) -> Result<(), TuneError> {
    settings.validate().map_err(TuneError::Settings)?;
    Module::check_targets(config, &settings.targets)?;
    let lora = settings.lora();
    let paths = lora.paths(config);
    for (key, idle) in
        [("rank_pattern", lora.rank_pattern.idle(&paths)), ("alpha_pattern", lora.alpha_pattern.idle(&paths))]
    {
        if let Some(pattern) = idle {
            let example = paths.first().map_or("", String::as_str);
            return Err(TuneError::Settings(format!(
                "{key} {pattern:?} matches no layer that is adapted; give the end of a path such as {example}, or take it out"
            )));
        }
    }
    let modules = Module::targeted(config, &lora.targets);
    for (path, module) in paths.iter().zip(modules.iter().cycle()) {
        let rank = lora.rank_of(path);
        for linear in module.parts {
            let (ins, outs) = linear.shape(config);
            let width = ins.min(outs);
            if rank > width {
                return Err(TuneError::Rank { rank, width, layer: linear.peft_name() });
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod device_tests;
#[cfg(test)]
mod lora_tests;
#[cfg(test)]
mod method_tests;
#[cfg(test)]
mod tests;
