//! The training loop: one pass per step over its parts, one update, one line of the log, a checkpoint now and then.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Instant;

use candle_core::Tensor;

use super::batches::{Chosen, Group, Part, Selection, Step, parts, plan};
use super::checkpoint::{self, Checkpoint, Origin};
use super::losses::{drift, factors};
use super::optimizer::{AdamW, clip, learning_rate};
use super::{Outcome, Settings, StepLog, TuneError};
use crate::crash;
use crate::engine::train::{Base, LoraMatrices};
use crate::progress::{self, Progress};
use crate::record::derive_seed;

/// A run under way.
pub(super) struct Run<'a> {
    base: Base<'a>,
    settings: &'a Settings,
    selection: &'a Selection<'a>,
    origin: Origin,
    folder: &'a Path,
    steps: Vec<Step>,
    lora: LoraMatrices,
    adam: AdamW,
    logs: Vec<StepLog>,
    /// Log-probs under the base, by the index of the chosen sample.
    base_logprobs: Vec<Vec<f32>>,
}

/// What the parts of one step add up to.
struct Sums {
    loss: f64,
    drift: f64,
    entropy: f64,
    tokens: usize,
    gradients: Vec<Vec<f32>>,
}

impl<'a> Run<'a> {
    /// Prepares a run: from its own checkpoint, else from that of the iteration before, else from no change.
    #[expect(clippy::too_many_arguments, reason = "the parts of a run, put together in one place")]
    pub(super) fn new(
        base: Base<'a>,
        settings: &'a Settings,
        selection: &'a Selection<'a>,
        origin: Origin,
        folder: &'a Path,
        seed: u64,
        resumed: Option<Checkpoint>,
        start: Option<Checkpoint>,
    ) -> Result<Self, TuneError> {
        let spec = settings.lora();
        let from = resumed.as_ref().or(start.as_ref());
        let lora = match from {
            Some(checkpoint) => LoraMatrices::restored(base.config, &spec, &checkpoint.matrices())?,
            None => LoraMatrices::fresh(base.config, &spec, derive_seed(seed, &["lora"])),
        };
        let adam = match from {
            Some(checkpoint) => checkpoint.optimizer(&lora)?,
            None => AdamW::new(&lora.values),
        };
        let steps = plan(&selection.groups, settings, seed);
        let (logs, base_logprobs) = resumed.map_or_else(Default::default, |r| (r.steps, r.base_logprobs));
        Ok(Run { base, settings, selection, origin, folder, steps, lora, adam, logs, base_logprobs })
    }

    /// Trains to the end of the plan, leaving a checkpoint of the last step.
    pub(super) fn train(&mut self, progress: &Progress) -> Result<(), TuneError> {
        if self.base_logprobs.is_empty() {
            self.base_logprobs = self.score_base(progress)?;
        }
        let tokens = |step: &Step| self.chosen(step).map(|sample| sample.completion.len() as u64).sum::<u64>();
        let left = self.steps[self.logs.len().min(self.steps.len())..].iter().map(tokens).sum();
        let mut report = progress.step("tuning", left, "tokens");
        while self.logs.len() < self.steps.len() {
            self.step(&mut report)?;
            if self.logs.len().is_multiple_of(self.settings.checkpoint_steps) || self.logs.len() == self.steps.len() {
                self.save()?;
                crash::at("adapter-checkpoint");
            }
        }
        Ok(())
    }

    fn step(&mut self, report: &mut progress::Step) -> Result<(), TuneError> {
        let began = Instant::now();
        let index = self.logs.len();
        let step = self.steps[index].clone();
        let samples = self.chosen(&step).count();
        let mut sums = self.sums(&step, samples)?;
        if index == 0 {
            self.check_gradients(&sums.gradients)?;
        }
        let grad_norm = clip(&mut sums.gradients, self.settings.max_grad_norm);
        let rate = learning_rate(self.settings.learning_rate, self.settings.warmup_steps, index, self.steps.len());
        let log = StepLog {
            step: index + 1,
            epoch: step.epoch + 1,
            learning_rate: rate as f32,
            loss: sums.loss as f32,
            grad_norm: grad_norm as f32,
            kl_sample: (sums.drift / sums.tokens as f64) as f32,
            entropy: (sums.entropy / sums.tokens as f64) as f32,
            samples,
            tokens: sums.tokens,
        };
        self.check(&log)?;
        self.adam.update(&mut self.lora.values, &sums.gradients, rate, self.settings.weight_decay);
        let speed = log.tokens as f64 / began.elapsed().as_secs_f64();
        let (step, total, loss, kl) = (log.step, self.steps.len(), log.loss, log.kl_sample);
        report.advance(log.tokens as u64, format!("step {step}/{total}, loss {loss:.4}, KL {kl:.4}, {speed:.0} tok/s"));
        self.logs.push(log);
        Ok(())
    }

    /// Runs the forward and backward passes of a step.
    fn sums(&self, step: &Step, samples: usize) -> Result<Sums, TuneError> {
        let gradients = self.lora.zero_gradients();
        let mut sums = Sums { loss: 0.0, drift: 0.0, entropy: 0.0, tokens: 0, gradients };
        for part in parts(self.groups(step), self.settings.batch_tokens) {
            self.add_part(&part, samples, &mut sums)?;
        }
        Ok(sums)
    }

    fn add_part(&self, part: &Part, samples: usize, sums: &mut Sums) -> Result<(), TuneError> {
        let pass = self.base.forward(&self.lora, &part.groups)?;
        let weights: Vec<(usize, f64)> = part.samples.iter().map(|s| (s.completion.len(), s.weight)).collect();
        let factors = factors(&weights, samples);
        let base: Vec<f32> = part.samples.iter().flat_map(|s| &self.base_logprobs[s.index]).copied().collect();
        sums.loss += pass.logprobs().iter().zip(&factors).map(|(l, f)| f64::from(*l) * f64::from(*f)).sum::<f64>();
        sums.drift += drift(pass.logprobs(), &base);
        sums.entropy += pass.entropies().iter().map(|e| f64::from(*e)).sum::<f64>();
        sums.tokens += factors.len();
        Ok(pass.backward(&factors, &mut sums.gradients)?)
    }

    /// Refuses to go on where a matrix would never train. A's gradient may be zero while B is, but B's may not.
    fn check_gradients(&self, gradients: &[Vec<f32>]) -> Result<(), TuneError> {
        let still = |g: &Vec<f32>| g.iter().all(|v| *v == 0.0);
        let pairs = self.lora.matrices.chunks(2).zip(gradients.chunks(2));
        match pairs
            .filter_map(|(matrices, gradients)| Some((matrices.last()?, gradients.last()?)))
            .find(|(_, g)| still(g))
        {
            Some((matrix, _)) => Err(TuneError::NoGradient { tensor: matrix.key.clone() }),
            None => Ok(()),
        }
    }

    /// Gives up before an update that would spoil the adapter.
    fn check(&self, log: &StepLog) -> Result<(), TuneError> {
        let step = log.step;
        let (loss, norm, entropy) = (f64::from(log.loss), f64::from(log.grad_norm), f64::from(log.entropy));
        for (what, value) in [("the loss", loss), ("the gradient's norm", norm), ("the entropy", entropy)] {
            if !value.is_finite() {
                return Err(TuneError::NotFinite { what, value, step });
            }
        }
        let Settings { max_kl, min_entropy, .. } = *self.settings;
        let drift = f64::from(log.kl_sample);
        let collapsed = |what, value, key, bound| Err(TuneError::Collapsed { what, value, step, key, bound });
        if drift > max_kl {
            return collapsed("the mean divergence from the base", drift, "max_kl", max_kl);
        }
        if entropy < min_entropy {
            return collapsed("the mean entropy", entropy, "min_entropy", min_entropy);
        }
        Ok(())
    }

    /// Returns the log-probs of every chosen sample under the base.
    fn score_base(&self, progress: &Progress) -> Result<Vec<Vec<f32>>, TuneError> {
        let mut scores = vec![Vec::new(); self.selection.samples];
        let unknown = |group: &&Group| group.samples.iter().any(|sample| sample.base_logprobs.is_none());
        let (left, known): (Vec<&Group>, Vec<&Group>) = self.selection.groups.iter().partition(unknown);
        for sample in known.iter().flat_map(|group| &group.samples) {
            scores[sample.index] = sample.base_logprobs.unwrap_or_default().to_vec();
        }
        if left.is_empty() {
            return Ok(scores);
        }
        let samples: usize = left.iter().map(|group| group.samples.len()).sum();
        let mut report = progress.step("base log-probs", samples as u64, "samples");
        for part in parts(left, self.settings.batch_tokens) {
            let found = self.base.score(&part.groups)?;
            let mut rest = &found.logprobs[..];
            for sample in &part.samples {
                let (own, others) = rest.split_at(sample.completion.len());
                scores[sample.index] = own.to_vec();
                rest = others;
            }
            report.advance(part.samples.len() as u64, "");
        }
        Ok(scores)
    }

    fn groups(&self, step: &Step) -> impl Iterator<Item = &'a Group<'a>> {
        let selection = self.selection;
        step.groups.clone().into_iter().map(move |index| &selection.groups[index])
    }

    fn chosen(&self, step: &Step) -> impl Iterator<Item = &'a Chosen<'a>> {
        self.groups(step).flat_map(|group| &group.samples)
    }

    fn save(&self) -> Result<(), TuneError> {
        checkpoint::save(self.folder, &self.origin, &self.lora, &self.adam, &self.logs, &self.base_logprobs)
    }

    pub(super) fn logs(&self) -> &[StepLog] {
        &self.logs
    }

    pub(super) fn tensors(&self) -> Result<BTreeMap<String, Tensor>, TuneError> {
        Ok(self.lora.tensors()?)
    }

    pub(super) fn outcome(&self) -> Outcome {
        let last: Vec<&StepLog> = self.logs.iter().filter(|log| log.epoch == self.settings.epochs).collect();
        let tokens: usize = last.iter().map(|log| log.tokens).sum();
        let drift: f64 = last.iter().map(|log| log.kl_sample as f64 * log.tokens as f64).sum();
        Outcome {
            steps: self.logs.clone(),
            groups_used: self.selection.groups.len(),
            samples_used: self.selection.samples,
            groups_all_equal: self.selection.all_equal,
            groups_none_above: self.selection.none_above,
            tokens: self.logs.iter().map(|log| log.tokens as u64).sum(),
            kl_sample: (drift / tokens.max(1) as f64) as f32,
            adapter_dir: Default::default(),
        }
    }
}
