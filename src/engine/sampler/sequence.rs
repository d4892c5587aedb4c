//! One sample in the making.

use std::sync::Arc;

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use super::prompt::{Admitted, adapter_id};
use super::{Completion, Group};
use crate::engine::cache::{BLOCK, Cache, Segment};
use crate::engine::decoder::Run;
use crate::engine::draw::{Drawn, Said, SamplingSettings, Scratch, draw};
use crate::engine::grammar::{Grammar, Walk};
use crate::engine::low_rank::LoraPack;
use crate::engine::model::Model;
use crate::engine::stop::{StopWatch, first_stop};
use crate::record::FinishReason;

/// A sequence of the batch.
pub(super) struct Active {
    pub(super) group: u64,
    pub(super) sample: usize,
    adapter: Option<Arc<LoraPack>>,
    cache: Cache,
    rng: ChaCha8Rng,
    sampling: SamplingSettings,
    said: Option<Said>,
    /// Most new tokens, by the settings and by the context.
    limit: usize,
    watch: Option<StopWatch>,
    stopped: bool,
    walk: Option<Walk>,
    /// Whether its grammar came to its limits.
    given_up: bool,
    drawn: Vec<Drawn>,
    /// Its last token, as the next forward pass takes it.
    last: [u32; 1],
}

/// Returns the most new tokens of a sample, by its settings and by the context.
pub(super) fn most_tokens(group: &Group, model: &Model) -> usize {
    group.sampling.max_tokens.min(model.config().max_positions - group.prompt.len())
}

impl Active {
    /// Begins the next sample of a group whose prompt is read.
    pub(super) fn new(admitted: &Admitted, prefix: &Arc<Segment>, model: &Model) -> Self {
        let (group, sample) = (&admitted.group, admitted.started);
        Active {
            group: group.id,
            sample,
            adapter: admitted.adapter.clone(),
            cache: Cache::after(prefix),
            rng: ChaCha8Rng::seed_from_u64(group.seeds[sample]),
            sampling: group.sampling.clone(),
            said: Said::begin(&group.sampling, &group.prompt),
            limit: most_tokens(group, model),
            watch: StopWatch::begin(&group.sampling.stop),
            stopped: false,
            walk: group.sampling.grammar.as_ref().map(Grammar::begin),
            given_up: false,
            drawn: Vec::new(),
            last: [0],
        }
    }

    /// Returns what tells its adapter from all others, 0 for none.
    pub(super) fn adapter_id(&self) -> u64 {
        adapter_id(&self.adapter)
    }

    /// Returns the pages that it may still take.
    pub(super) fn pages_to_write(&self) -> usize {
        self.limit.div_ceil(BLOCK) - self.cache.own().pages()
    }

    /// Returns its next forward pass.
    pub(super) fn run(&mut self) -> Run<'_> {
        Run { cache: &mut self.cache, tokens: &self.last, adapter: self.adapter.as_deref() }
    }

    pub(super) fn draw(&mut self, logits: &[f32], model: &Model, scratch: &mut Scratch) {
        let drawn = draw(logits, &self.sampling, self.said.as_ref(), self.walk.as_mut(), &mut self.rng, scratch);
        let drawn =
            drawn.and_then(|drawn| self.walk.as_mut().map_or(Ok(()), |walk| walk.take(drawn.token)).map(|()| drawn));
        let drawn = match drawn {
            Ok(drawn) => drawn,
            Err(problem) => {
                tracing::warn!(%problem, "an answer was cut: its JSON schema's grammar came to its limits");
                return self.given_up = true;
            }
        };
        if let Some(said) = &mut self.said {
            said.add(drawn.token);
        }
        self.drawn.push(drawn);
        self.last = [drawn.token];
        let decode = |ids: &[u32]| model.tokenizer().decode(ids);
        let stop = &self.sampling.stop;
        if self.watch.as_mut().is_some_and(|watch| watch.met(drawn.token, stop, &decode)) {
            // What the ids are as a text decides, so that the text can always be told from them.
            self.stopped = first_stop(&decode(&self.token_ids()), stop).is_some();
        }
    }

    fn token_ids(&self) -> Vec<u32> {
        self.drawn.iter().map(|d| d.token).collect()
    }

    /// Returns the token of the last step.
    pub(super) fn newest(&self) -> Option<Drawn> {
        self.drawn.last().copied().filter(|_| !self.given_up)
    }

    /// Returns why it is over, once it is.
    pub(super) fn finish_reason(&self, model: &Model) -> Option<FinishReason> {
        if self.given_up {
            return Some(FinishReason::Length);
        }
        let last = self.drawn.last()?;
        if self.stopped || model.tokenizer().is_end(last.token) {
            Some(FinishReason::Stop)
        } else {
            (self.drawn.len() >= self.limit).then_some(FinishReason::Length)
        }
    }

    /// Returns what was sampled.
    pub(super) fn completion(&self, finish_reason: FinishReason, model: &Model) -> Completion {
        let token_ids = self.token_ids();
        let mut text = model.tokenizer().decode(&token_ids);
        let stop_string = first_stop(&text, &self.sampling.stop).map(|(at, stop)| (at, stop.to_string()));
        let finish_reason = if stop_string.is_some() { FinishReason::Stop } else { finish_reason };
        if let Some((at, _)) = stop_string {
            text.truncate(at);
        }
        Completion {
            token_ids,
            stop_string: stop_string.map(|(_, stop)| stop),
            logprobs: self.drawn.iter().map(|d| d.logprob).collect(),
            sampler_logprobs: self.drawn.iter().map(|d| d.sampler_logprob).collect(),
            finish_reason,
            text,
        }
    }
}
