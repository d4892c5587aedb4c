//! The training loop: one pass per step over its parts, one update, one line of the log, a checkpoint now and then.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::time::Instant;

use candle_core::Tensor;

use super::batches::{Chosen, Group, Part, Selection, Step, parts, plan};
use super::checkpoint::{self, Checkpoint, Known, Origin};
use super::losses::{Batch, Loss, Member, drift};
use super::optimizer::{AdamW, clip, learning_rate};
use super::{Mismatch, Outcome, Settings, StepLog, TuneError, known};
use crate::crash;
use crate::engine::train::{Base, DropoutSeeds, GroupTokens, LoraMatrices};
use crate::progress::{self, Ask, Measure, Progress};
use crate::record::derive_seed;

/// A run under way.
pub(super) struct Run<'a> {
    base: Base<'a>,
    settings: &'a Settings,
    loss: Loss,
    selection: &'a Selection<'a>,
    origin: Origin,
    folder: &'a Path,
    steps: Vec<Step>,
    lora: LoraMatrices,
    adam: AdamW,
    seed: u64,
    logs: Vec<StepLog>,
    /// By the index of the chosen sample.
    known: Known,
    mismatch: Option<Mismatch>,
}

/// What the parts of one step add up to.
struct Sums {
    loss: f64,
    drift: f64,
    entropy: f64,
    ratio: f64,
    clipped: usize,
    tokens: usize,
    gradients: Vec<Vec<f32>>,
}

/// Log-probs of samples under the adapter as it is, by the index of the chosen sample.
type Ahead = HashMap<usize, Vec<f32>>;

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
        let (logs, known) = resumed.map_or_else(Default::default, |r| (r.steps, r.known));
        let loss = Loss::new(settings);
        let mismatch = None;
        Ok(Run { base, settings, loss, selection, origin, folder, steps, lora, adam, seed, logs, known, mismatch })
    }

    /// Trains to the end of the plan, leaving a checkpoint of the last step.
    pub(super) fn train(&mut self, progress: &Progress) -> Result<(), TuneError> {
        if self.known.base.is_empty() {
            self.known = known::compute(&self.base, &self.lora, self.selection, self.settings, progress)?;
        }
        self.mismatch = known::compare(self.selection, &self.known, self.settings)?;
        let tokens = |step: &Step| self.chosen(step).map(|sample| sample.completion.len() as u64).sum::<u64>();
        let left = self.steps[self.logs.len().min(self.steps.len())..].iter().map(tokens).sum();
        let mut report = progress.step("tuning", left, "tokens");
        while self.logs.len() < self.steps.len() {
            self.step(&mut report, progress)?;
            if self.logs.len().is_multiple_of(self.settings.checkpoint_steps) || self.logs.len() == self.steps.len() {
                self.save()?;
                crash::at("adapter-checkpoint");
                match progress.asks() {
                    Ask::GoOn => {}
                    Ask::Pause if self.logs.len() == self.steps.len() => {}
                    Ask::Pause => return Err(TuneError::Paused { steps: self.logs.len() }),
                    // What the steps so far have learnt is an adapter like any other: the gate judges it.
                    Ask::Enough => break,
                }
            }
        }
        Ok(())
    }

    fn step(&mut self, report: &mut progress::Step, progress: &Progress) -> Result<(), TuneError> {
        let began = Instant::now();
        let index = self.logs.len();
        let step = self.steps[index].clone();
        let samples = self.chosen(&step).count();
        let mut sums = self.sums(&step)?;
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
            ratio: (sums.ratio / sums.tokens as f64) as f32,
            clipped: (sums.clipped as f64 / sums.tokens as f64) as f32,
            samples,
            tokens: sums.tokens,
        };
        self.check(&log)?;
        self.adam.update(&mut self.lora.values, &sums.gradients, rate, self.settings.weight_decay);
        let speed = log.tokens as f64 / began.elapsed().as_secs_f64();
        let (step, total, loss, kl) = (log.step, self.steps.len(), log.loss, log.kl_sample);
        progress.measured(&self.measure(&log));
        report.advance(log.tokens as u64, format!("step {step}/{total}, loss {loss:.4}, KL {kl:.4}, {speed:.0} tok/s"));
        self.logs.push(log);
        Ok(())
    }

    /// Returns what metrics show of a step.
    fn measure(&self, log: &StepLog) -> Measure {
        Measure::Step {
            tokens: log.tokens as u64,
            samples: log.samples as u64,
            loss: log.loss,
            kl: log.kl_sample,
            entropy: log.entropy,
            ratio: log.ratio,
            clipped: log.clipped,
            grad_norm: log.grad_norm,
            learning_rate: log.learning_rate,
            effective: self.mismatch.map_or(1.0, |mismatch| mismatch.effective),
        }
    }

    /// Runs the forward and backward passes of a step.
    fn sums(&self, step: &Step) -> Result<Sums, TuneError> {
        let gradients = self.lora.zero_gradients();
        let mut sums = Sums { loss: 0.0, drift: 0.0, entropy: 0.0, ratio: 0.0, clipped: 0, tokens: 0, gradients };
        let (samples, tokens) = self.chosen(step).fold((0, 0), |(n, t), sample| (n + 1, t + sample.completion.len()));
        let batch = Batch { samples, tokens, longest: self.selection.longest };
        let parts = parts(self.groups(step), self.settings.batch_tokens);
        let ahead = self.look_ahead(step, &parts)?;
        for part in &parts {
            self.add_part(step, part, &batch, &ahead, &mut sums)?;
        }
        Ok(sums)
    }

    /// Returns the log-probs of groups whose samples stand in several parts, where a loss reads those of siblings.
    fn look_ahead(&self, step: &Step, parts: &[Part]) -> Result<Ahead, TuneError> {
        let mut ahead = Ahead::new();
        if !self.loss.method.reads_siblings() {
            return Ok(ahead);
        }
        let within = |part: &Part, group: &Group| part.samples.iter().filter(|s| group.holds(s.index)).count();
        let is_cut =
            |part: &&Part| self.groups(step).any(|group| (1..group.samples.len()).contains(&within(part, group)));
        for part in parts.iter().filter(is_cut) {
            let dropout = self.dropout(step, part);
            let pass = self.base.forward_dropping(&self.lora, &part.groups, dropout.as_ref())?;
            ahead.extend(part.split(pass.logprobs()).map(|(sample, own)| (sample.index, own.to_vec())));
        }
        Ok(ahead)
    }

    fn add_part(
        &self,
        step: &Step,
        part: &Part,
        batch: &Batch,
        ahead: &Ahead,
        sums: &mut Sums,
    ) -> Result<(), TuneError> {
        let dropout = self.dropout(step, part);
        let pass = self.base.forward_dropping(&self.lora, &part.groups, dropout.as_ref())?;
        let here: HashMap<usize, &[f32]> = part.split(pass.logprobs()).map(|(s, own)| (s.index, own)).collect();
        let mut slopes: HashMap<usize, Vec<f32>> = HashMap::new();
        for group in self.groups(step).filter(|group| group.samples.iter().any(|s| here.contains_key(&s.index))) {
            let policy = |index: usize| here.get(&index).copied().or(ahead.get(&index).map(Vec::as_slice));
            let members: Vec<Member> =
                group.samples.iter().map(|s| self.member(s, policy(s.index).unwrap_or_default())).collect();
            let found = self.loss.slopes(&members, batch);
            // A pair that was cut counts once; of other groups each part counts its own samples.
            if !self.loss.method.reads_siblings()
                || group.samples.first().is_some_and(|first| here.contains_key(&first.index))
            {
                sums.loss += found.value;
                sums.ratio += found.ratio;
                sums.clipped += found.clipped;
            }
            slopes.extend(group.samples.iter().map(|sample| sample.index).zip(found.slopes));
        }
        let slopes: Vec<f32> = part.samples.iter().flat_map(|s| slopes.remove(&s.index).unwrap_or_default()).collect();
        let base: Vec<f32> = part.samples.iter().flat_map(|s| &self.known.base[s.index]).copied().collect();
        sums.drift += drift(pass.logprobs(), &base);
        sums.entropy += pass.entropies().iter().map(|e| f64::from(*e)).sum::<f64>();
        sums.tokens += slopes.len();
        Ok(pass.backward(&slopes, &mut sums.gradients)?)
    }

    /// Returns what this step leaves out of a part. The prompt of a group that was cut meets the same in each of its parts.
    fn dropout(&self, step: &Step, part: &Part) -> Option<DropoutSeeds> {
        let rate = self.lora.spec.dropout as f32;
        if rate == 0.0 {
            return None;
        }
        let now = self.logs.len().to_string();
        let seed = |kind: &str, sample: usize| derive_seed(self.seed, &["dropout", &now, kind, &sample.to_string()]);
        let first =
            |index: usize| self.groups(step).find(|group| group.holds(index)).map_or(index, |g| g.samples[0].index);
        let mut samples = part.samples.iter().map(|sample| sample.index);
        let group = |tokens: &GroupTokens| {
            let own: Vec<usize> = samples.by_ref().take(tokens.completions.len()).collect();
            let prompt = own.first().map_or(0, |sample| seed("prompt", first(*sample)));
            (prompt, own.into_iter().map(|sample| seed("sample", sample)).collect())
        };
        Some(DropoutSeeds { rate, groups: part.groups.iter().map(group).collect() })
    }

    fn member<'m>(&'m self, sample: &'m Chosen, policy: &'m [f32]) -> Member<'m> {
        Member {
            reward: sample.reward,
            policy,
            old: self.known.old.get(sample.index).map_or(&[], Vec::as_slice),
            base: &self.known.base[sample.index],
            sampler: sample.sampler_logprobs,
        }
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

    fn groups(&self, step: &Step) -> impl Iterator<Item = &'a Group<'a>> {
        let selection = self.selection;
        step.groups.clone().into_iter().map(move |index| &selection.groups[index])
    }

    fn chosen(&self, step: &Step) -> impl Iterator<Item = &'a Chosen<'a>> {
        self.groups(step).flat_map(|group| &group.samples)
    }

    fn save(&self) -> Result<(), TuneError> {
        checkpoint::save(self.folder, &self.origin, &self.lora, &self.adam, &self.logs, &self.known)
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
            mismatch: self.mismatch,
            adapter_dir: Default::default(),
        }
    }
}
