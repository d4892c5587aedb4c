//! What an operator sets about tuning.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::losses::Method;
use crate::engine::train::Activations;
use crate::engine::{Linear, LoraSpec, Patterns, Precision};

/// What becomes of activations between the forward and the backward pass.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Keep {
    /// `recompute` where keeping all would not fit into `memory_mib`, or without a limit into what is free; else `keep`.
    #[default]
    Auto,
    /// All that the way back reads.
    Keep,
    /// The input of each layer.
    Recompute,
}

impl Keep {
    /// Returns what becomes of activations on a device, whose free memory is not asked for: `auto` keeps the least.
    pub(super) fn on_device(self) -> Activations {
        match self {
            Keep::Keep => Activations::Kept,
            Keep::Auto | Keep::Recompute => Activations::Again,
        }
    }
}

/// How an adapter is trained from scored samples.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// How often a round samples, scores and trains; each iteration after the first samples from the adapter of the
    /// one before and continues it. At least 1.
    pub iterations: usize,
    /// The loss. Likelihood of good samples: `raft` (the best of each prompt), `rest` (all above `min_reward`), `sft` (all).
    /// Policy gradients: `rloo`, `grpo`, `dr_grpo`, `dapo`, `gspo`. Pairs: `dpo`, `rc_dpo`, `rpo`, `rebel`. Regression on the
    /// optimal advantage: `oapl`, `a_star_po`.
    pub method: Method,
    /// Program and arguments of a trainer of your own, such as `["python", "train.py"]`; empty: taod trains. It is called with two
    /// more arguments, the folder of the dataset and that of the adapter to be made (docs/training.md).
    pub command: Vec<String>,
    /// Strength of the tie to the base or to the sampler: the weight of the divergence (grpo and its kin, rloo), the margin's
    /// scale (dpo and its kin, rebel), the log-ratio's (oapl, a_star_po). 0 = the method's own: 0.05 for rloo, oapl and
    /// a_star_po, 0.1 for pairs, none for the others.
    pub beta: f64,
    /// Temperature of the soft maximum of a prompt's rewards (oapl, a_star_po). 0 = the method's own: 1 and 0.5.
    pub value_beta: f64,
    /// How far below 1 a ratio still counts. 0 = the method's own: 0.2, and 0.0003 for gspo.
    pub clip_low: f64,
    /// How far above 1 a ratio still counts. 0 = the method's own: 0.2, 0.28 for dapo, 0.0004 for gspo.
    pub clip_high: f64,
    /// Policy gradients are refused where the sampler's log-probs differ from the trainer's by more, in nats a token: such
    /// ratios are noise. Above 0.
    pub max_sampler_gap: f64,
    /// Precision of the products with the frozen weights; `int8` is too coarse. The adapter itself is f32.
    pub precision: Precision,
    /// Rank of the LoRA matrices. At least 1, at most the narrowest layer.
    pub rank: usize,
    /// LoRA's alpha: the change is scaled by alpha / rank. Above 0.
    pub alpha: f64,
    /// Scales by alpha / sqrt(rank) instead (rank-stabilised LoRA).
    pub use_rslora: bool,
    /// Linear layers that are adapted: any of q, k, v, o, gate, up, down. Phi-3 keeps q, k and v in one matrix, and gate and
    /// up: name all of one or none.
    pub targets: Vec<Linear>,
    /// Ranks of layers that have another one, by PEFT's patterns of module paths: `"down_proj" = 32` is every layer's,
    /// `"layers.0.self_attn.q_proj" = 4` one. Patterns are regular expressions for the end of a path, tried in alphabetical order.
    pub rank_pattern: BTreeMap<String, usize>,
    /// Alphas of layers that have another one, likewise.
    pub alpha_pattern: BTreeMap<String, f64>,
    /// Share of the adapter's inputs that a step leaves out, others each time (LoRA dropout). In [0, 1); 0 for methods whose
    /// ratios to the sampler it would blur (policy gradients, `oapl`, `rebel`).
    pub dropout: f64,
    /// Learning rate after the warm-up; it then falls linearly to 0. Above 0.
    pub learning_rate: f64,
    /// Optimizer steps of linear warm-up, in each iteration.
    pub warmup_steps: usize,
    /// AdamW's decoupled weight decay. 0 = none.
    pub weight_decay: f64,
    /// Largest global norm of a gradient; longer ones are scaled down to it. Above 0.
    pub max_grad_norm: f64,
    /// Passes over the chosen samples. At least 1.
    pub epochs: usize,
    /// Samples per optimizer step. Samples of one prompt stay together, so a step may hold a few more. At least 1.
    pub batch_samples: usize,
    /// Rows (tokens) that one forward and backward pass holds; a step with more is split, with the same result.
    /// Memory grows by about 0.7 MB per row for a model of 135M parameters. At least 1.
    pub batch_tokens: usize,
    /// What a pass keeps of its activations for the way back: all, or what they can be made from again, to the same bits, in a tenth
    /// of the memory and a third more time.
    pub activations: Keep,
    /// Memory that training may take, in MiB, the model included; what would take more is refused before it starts. 0 = no
    /// limit; what may not fit into the free memory of the machine and the control group is warned of.
    pub memory_mib: u64,
    /// How many of a prompt's samples train, best first (raft), or how many pairs it gives (dpo and its kin). At least 1.
    pub best_per_prompt: usize,
    /// Only samples with a reward above this train (raft, rest), or are the better one of a pair. In [0, 1).
    pub min_reward: f64,
    /// Training is given up when the mean divergence from the base on a step's samples passes this, in nats a token.
    pub max_kl: f64,
    /// Training is given up when the mean entropy on a step's samples falls below this, in nats a token. 0 = never.
    pub min_entropy: f64,
    /// Optimizer steps between two checkpoints, from which a killed run goes on. At least 1.
    pub checkpoint_steps: usize,
}

impl Default for Settings {
    fn default() -> Self {
        Settings {
            iterations: 2,
            method: Method::Raft,
            command: Vec::new(),
            beta: 0.0,
            value_beta: 0.0,
            clip_low: 0.0,
            clip_high: 0.0,
            max_sampler_gap: 0.05,
            precision: Precision::default(),
            rank: 16,
            alpha: 32.0,
            use_rslora: false,
            targets: Linear::ALL.to_vec(),
            rank_pattern: BTreeMap::new(),
            alpha_pattern: BTreeMap::new(),
            dropout: 0.0,
            learning_rate: 2e-4,
            warmup_steps: 5,
            weight_decay: 0.0,
            max_grad_norm: 1.0,
            epochs: 2,
            batch_samples: 8,
            batch_tokens: 1024,
            activations: Keep::Auto,
            memory_mib: 0,
            best_per_prompt: 2,
            min_reward: 0.0,
            max_kl: 3.0,
            min_entropy: 0.01,
            checkpoint_steps: 10,
        }
    }
}

impl Settings {
    /// Returns the shape of the adapter that these settings train.
    pub fn lora(&self) -> LoraSpec {
        let targets = Linear::ALL.into_iter().filter(|linear| self.targets.contains(linear)).collect();
        LoraSpec {
            rank: self.rank,
            alpha: self.alpha,
            targets,
            use_rslora: self.use_rslora,
            rank_pattern: Patterns::from(&self.rank_pattern),
            alpha_pattern: Patterns::from(&self.alpha_pattern),
            dropout: self.dropout,
        }
    }

    /// Refuses values that cannot work, naming the key, the value and the remedy.
    pub fn validate(&self) -> Result<(), String> {
        let counts = [
            ("iterations", self.iterations),
            ("rank", self.rank),
            ("epochs", self.epochs),
            ("batch_samples", self.batch_samples),
            ("batch_tokens", self.batch_tokens),
            ("best_per_prompt", self.best_per_prompt),
            ("checkpoint_steps", self.checkpoint_steps),
        ];
        if let Some((key, _)) = counts.into_iter().find(|(_, value)| *value == 0) {
            return Err(format!("{key} is 0; set it to 1 or more"));
        }
        if self.precision == Precision::Int8 {
            return Err("precision is int8, which is too coarse for gradients; set auto, int16 or f32".into());
        }
        let positive = [
            ("alpha", self.alpha),
            ("learning_rate", self.learning_rate),
            ("max_grad_norm", self.max_grad_norm),
            ("max_kl", self.max_kl),
            ("max_sampler_gap", self.max_sampler_gap),
        ];
        if let Some((key, value)) = positive.into_iter().find(|(_, value)| !value.is_finite() || *value <= 0.0) {
            return Err(format!("{key} is {value}; set it to a number above 0"));
        }
        let not_negative = [
            ("weight_decay", self.weight_decay),
            ("min_entropy", self.min_entropy),
            ("beta", self.beta),
            ("value_beta", self.value_beta),
            ("clip_low", self.clip_low),
            ("clip_high", self.clip_high),
        ];
        if let Some((key, value)) = not_negative.into_iter().find(|(_, value)| !value.is_finite() || *value < 0.0) {
            return Err(format!("{key} is {value}; set it to 0 or more"));
        }
        if !(0.0..1.0).contains(&self.min_reward) {
            return Err(format!(
                "min_reward is {}; rewards lie in [0, 1], so set it from 0 to below 1",
                self.min_reward
            ));
        }
        if self.clip_low >= 1.0 {
            return Err(format!("clip_low is {}; a ratio is never below 0, so set it below 1", self.clip_low));
        }
        if self.targets.is_empty() {
            return Err("targets is empty; name at least one of q, k, v, o, gate, up, down".to_string());
        }
        self.validate_lora()
    }

    fn validate_lora(&self) -> Result<(), String> {
        if let Some((pattern, _)) = self.rank_pattern.iter().find(|(_, rank)| **rank == 0) {
            return Err(format!("rank_pattern {pattern:?} is 0; set it to 1 or more"));
        }
        if let Some((pattern, alpha)) =
            self.alpha_pattern.iter().find(|(_, alpha)| !alpha.is_finite() || **alpha <= 0.0)
        {
            return Err(format!("alpha_pattern {pattern:?} is {alpha}; set it to a number above 0"));
        }
        let lora = self.lora();
        for (key, broken) in
            [("rank_pattern", lora.rank_pattern.broken()), ("alpha_pattern", lora.alpha_pattern.broken())]
        {
            if let Some((pattern, problem)) = broken {
                return Err(format!(
                    "{key} {pattern:?} cannot be read ({problem}); give a path's end, or a regular expression without look-around"
                ));
            }
        }
        if !(0.0..1.0).contains(&self.dropout) {
            return Err(format!("dropout is {}; it is a share, so set it from 0 to below 1", self.dropout));
        }
        if self.dropout > 0.0 && self.method.needs_old() {
            return Err(format!(
                "dropout is {}, which would make the ratios of {} noise; set it to 0, or method to raft or dpo",
                self.dropout, self.method
            ));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_are_valid_and_each_bound_bites() {
        assert_eq!(Settings::default().validate(), Ok(()));
        type Breaking = fn(&mut Settings);
        let broken: [(&str, Breaking); 16] = [
            ("dropout is 1", |s| s.dropout = 1.0),
            ("dropout is 0.1, which would make the ratios of grpo noise", |s| {
                (s.dropout, s.method) = (0.1, Method::Grpo)
            }),
            ("rank_pattern \"q_proj\" is 0", |s| s.rank_pattern = [("q_proj".into(), 0)].into()),
            ("alpha_pattern \"q_proj\" is -1", |s| s.alpha_pattern = [("q_proj".into(), -1.0)].into()),
            ("rank_pattern \"(\" cannot be read", |s| s.rank_pattern = [("(".into(), 1)].into()),
            ("beta is -0.1", |s| s.beta = -0.1),
            ("clip_low is 1", |s| s.clip_low = 1.0),
            ("max_sampler_gap is 0", |s| s.max_sampler_gap = 0.0),
            ("rank is 0", |s| s.rank = 0),
            ("alpha is -1", |s| s.alpha = -1.0),
            ("learning_rate is NaN", |s| s.learning_rate = f64::NAN),
            ("weight_decay is -0.1", |s| s.weight_decay = -0.1),
            ("min_reward is 1", |s| s.min_reward = 1.0),
            ("targets is empty", |s| s.targets.clear()),
            ("epochs is 0", |s| s.epochs = 0),
            ("max_kl is 0", |s| s.max_kl = 0.0),
        ];
        for (start, change) in broken {
            let mut settings = Settings::default();
            change(&mut settings);
            let error = settings.validate().unwrap_err();
            assert!(error.starts_with(start), "{error}");
        }
    }
}
