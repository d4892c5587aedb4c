//! Batched sampling: prompts are read once for all their samples, and a sample that ends makes room for the next.

use std::collections::VecDeque;
use std::sync::Arc;

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;

use super::cache::{Cache, Pool, Segment};
use super::decoder::{Decoder, Run};
use super::draw::{Drawn, Said, SamplingSettings, Scratch, draw};
use super::error::EngineError;
use super::low_rank::LoraPack;
use super::model::Model;
use super::policy::Policy;
use super::stop::{StopWatch, first_stop};
use crate::record::FinishReason;

/// The samples of one prompt.
#[derive(Debug, Clone)]
pub struct Group {
    /// Chosen by the caller; comes back in every event.
    pub id: u64,
    pub prompt: Vec<u32>,
    /// One per sample; a sample depends on its seed and on nothing beside it in the batch.
    pub seeds: Vec<u64>,
    pub sampling: SamplingSettings,
}

/// One finished sample. Exactly when `finish_reason` is stop, `token_ids` end with the closing token, or with the one that
/// completed `stop_string`.
#[derive(Debug, Clone, PartialEq)]
pub struct Completion {
    pub token_ids: Vec<u32>,
    /// Log-softmax of the raw logits at temperature 1.
    pub logprobs: Vec<f32>,
    /// Log-probabilities under the distribution drawn from.
    pub sampler_logprobs: Vec<f32>,
    pub finish_reason: FinishReason,
    /// The stop string that ended it.
    pub stop_string: Option<String>,
    /// The text without special tokens, up to the stop string.
    pub text: String,
}

/// What a step of the batch brought.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    Token { group: u64, sample: usize, token: u32, logprob: f32 },
    Done { group: u64, sample: usize, completion: Completion },
}

/// How much is computed at once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BatchLimits {
    /// Sequences that are decoded together.
    pub max_sequences: usize,
    /// Prompt tokens read in one forward pass.
    pub max_rows: usize,
}

impl Default for BatchLimits {
    fn default() -> Self {
        BatchLimits { max_sequences: 64, max_rows: 512 }
    }
}

/// A running batch. Groups are pushed at any time; each step reads waiting prompts and adds a token to every sequence.
///
/// Its sequences may have different adapters: all are multiplied by the same weights, and each is changed by its own adapter,
/// as it would be alone.
pub struct Batcher {
    policy: Policy,
    limits: BatchLimits,
    pool: Pool,
    /// Memory of the last logits.
    room: Vec<f32>,
    /// Groups whose samples have not all started, in order of arrival.
    waiting: VecDeque<Waiting>,
    active: Vec<Active>,
}

struct Waiting {
    group: Group,
    adapter: Option<Arc<LoraPack>>,
    /// Samples started so far.
    started: usize,
    prompt: Option<Prompt>,
}

/// A prompt that has been read: its cache and the logits after it, which every sample's first token is drawn from.
struct Prompt {
    prefix: Arc<Segment>,
    logits: Vec<f32>,
}

struct Active {
    group: u64,
    sample: usize,
    adapter: Option<Arc<LoraPack>>,
    cache: Cache,
    rng: ChaCha8Rng,
    sampling: SamplingSettings,
    said: Option<Said>,
    /// Most new tokens, by the settings and by the context.
    limit: usize,
    watch: Option<StopWatch>,
    stopped: bool,
    drawn: Vec<Drawn>,
}

impl Batcher {
    /// Prepares a batch on the weights of a policy.
    pub fn new(policy: Policy, limits: BatchLimits) -> Result<Self, EngineError> {
        if limits.max_sequences == 0 || limits.max_rows == 0 {
            return Err(EngineError::request("max_sequences and max_rows must be at least 1"));
        }
        let pool = Pool::new(policy.decoder().shape());
        Ok(Batcher { policy, limits, pool, room: Vec::new(), waiting: VecDeque::new(), active: Vec::new() })
    }

    /// Adds a group that is answered by the batch's own policy to those waiting. A group that could not run is refused
    /// here, not later.
    pub fn push(&mut self, group: Group) -> Result<(), EngineError> {
        self.push_as(&self.policy.clone(), group)
    }

    /// Adds a group that is answered by another policy on the same weights.
    pub fn push_as(&mut self, policy: &Policy, group: Group) -> Result<(), EngineError> {
        if !policy.shares_weights(&self.policy) {
            return Err(EngineError::request(
                "its policy has weights of its own, as one of rounded weights with an adapter has; sample it in a batch of its own",
            ));
        }
        group.sampling.check()?;
        check_tokens(self.policy.model(), &group.prompt)?;
        if group.prompt.is_empty() {
            return Err(EngineError::request("the prompt has no tokens; give at least one message"));
        }
        let context = self.policy.model().config().max_positions;
        if group.prompt.len() >= context {
            return Err(EngineError::PromptTooLong { tokens: group.prompt.len(), context });
        }
        if !group.seeds.is_empty() {
            let adapter = policy.adapter().cloned();
            self.waiting.push_back(Waiting { group, adapter, started: 0, prompt: None });
        }
        Ok(())
    }

    /// Returns true when nothing runs and nothing waits.
    pub fn is_empty(&self) -> bool {
        self.active.is_empty() && self.waiting.is_empty()
    }

    /// Returns how many more samples would start at once.
    pub fn free(&self) -> usize {
        let waiting: usize = self.waiting.iter().map(|w| w.group.seeds.len() - w.started).sum();
        self.limits.max_sequences.saturating_sub(self.active.len() + waiting)
    }

    /// Drops all samples of a group without an event.
    pub fn cancel(&mut self, group: u64) {
        self.waiting.retain(|w| w.group.id != group);
        let (gone, kept) = std::mem::take(&mut self.active).into_iter().partition(|a| a.group == group);
        self.active = kept;
        let gone: Vec<Active> = gone;
        gone.into_iter().for_each(|a| self.pool.reclaim(a.cache));
    }

    /// Starts what fits, then adds one token to every running sequence.
    pub fn step(&mut self) -> Result<Vec<Event>, EngineError> {
        let mut events = Vec::new();
        self.decode(&mut events);
        self.read_prompts();
        self.start(&mut events);
        Ok(events)
    }

    /// Reads the prompts of the next groups that have room, as many as fit into one pass and at least one.
    fn read_prompts(&mut self) {
        let mut room = self.limits.max_sequences.saturating_sub(self.active.len());
        let mut rows = self.limits.max_rows;
        let mut chosen = Vec::new();
        for waiting in &mut self.waiting {
            let fits = rows >= waiting.group.prompt.len() || chosen.is_empty();
            if room == 0 || !fits {
                break;
            }
            room = room.saturating_sub(waiting.group.seeds.len() - waiting.started);
            if waiting.prompt.is_none() {
                rows = rows.saturating_sub(waiting.group.prompt.len());
                chosen.push(waiting);
            }
        }
        if chosen.is_empty() {
            return;
        }
        let decoder = self.policy.decoder();
        let mut caches: Vec<Cache> = chosen.iter().map(|_| Cache::new(decoder.shape())).collect();
        let tokens: Vec<&[u32]> = chosen.iter().map(|w| w.group.prompt.as_slice()).collect();
        let mut last: Vec<Vec<f32>> = vec![Vec::new(); chosen.len()];
        let adapter = |i: usize| chosen[i].adapter.as_deref();
        read(decoder, adapter, &mut caches, &tokens, self.limits.max_rows, &mut self.pool, |i, place, row| {
            if place + 1 == tokens[i].len() {
                last[i] = row.to_vec();
            }
        });
        let logits = decoder.logits(&last.concat(), std::mem::take(&mut self.room));
        for (i, (waiting, cache)) in chosen.into_iter().zip(caches).enumerate() {
            let mut row = vec![0.0; logits.columns()];
            logits.copy_row(i, &mut row);
            waiting.prompt = Some(Prompt { prefix: cache.into_prefix(), logits: row });
        }
        self.room = logits.into_room();
    }

    /// Starts samples of groups whose prompt is read, in order, and draws their first token.
    fn start(&mut self, events: &mut Vec<Event>) {
        let first = self.active.len();
        let mut logits: Vec<Arc<Vec<f32>>> = Vec::new();
        while let Some(waiting) = self.waiting.front_mut() {
            let Some(prompt) = &waiting.prompt else { break };
            let room = self.limits.max_sequences - self.active.len();
            let samples = waiting.started..waiting.group.seeds.len().min(waiting.started + room);
            let row = Arc::new(prompt.logits.clone());
            for sample in samples.clone() {
                self.active.push(Active::new(waiting, sample, &prompt.prefix, self.policy.model()));
                logits.push(row.clone());
            }
            waiting.started = samples.end;
            if waiting.started < waiting.group.seeds.len() {
                break;
            }
            self.waiting.pop_front();
        }
        let started = self.active[first..].par_iter_mut().zip(&logits);
        let model = self.policy.model();
        started.for_each_init(Scratch::default, |scratch, (active, logits)| active.draw(logits, model, scratch));
        self.settle(first, events);
        // Side by side, the sequences of one adapter are multiplied together.
        self.active.sort_by_key(|active| active.adapter.as_ref().map_or(0, |adapter| adapter.id()));
    }

    fn decode(&mut self, events: &mut Vec<Event>) {
        if self.active.is_empty() {
            return;
        }
        let last: Vec<[u32; 1]> = self.active.iter().map(|a| [a.drawn.last().map_or(0, |d| d.token)]).collect();
        let runs = self.active.iter_mut().zip(&last);
        let run = |(a, tokens): (&'_ mut Active, &'_ [u32; 1])| Run {
            cache: &mut a.cache,
            tokens,
            adapter: a.adapter.as_deref(),
        };
        let mut runs: Vec<Run> = runs.map(run).collect();
        let decoder = self.policy.decoder();
        let hidden = decoder.forward(&mut runs, &mut self.pool);
        let logits = decoder.logits(&hidden, std::mem::take(&mut self.room));
        let (model, work) = (self.policy.model(), self.active.par_iter_mut().enumerate());
        work.for_each_init(
            || (vec![0.0; logits.columns()], Scratch::default()),
            |(row, scratch), (i, active)| {
                logits.copy_row(i, row);
                active.draw(row, model, scratch);
            },
        );
        self.room = logits.into_room();
        self.settle(0, events);
    }

    /// Reports the newest token of the sequences from `first` on and takes out those that ended.
    fn settle(&mut self, first: usize, events: &mut Vec<Event>) {
        for active in self.active.split_off(first) {
            let (group, sample) = (active.group, active.sample);
            if let Some(Drawn { token, logprob, .. }) = active.drawn.last().copied() {
                events.push(Event::Token { group, sample, token, logprob });
            }
            match active.finish_reason(self.policy.model()) {
                None => self.active.push(active),
                Some(reason) => {
                    let completion = active.completion(reason, self.policy.model());
                    events.push(Event::Done { group, sample, completion });
                    self.pool.reclaim(active.cache);
                }
            }
        }
    }
}

impl Active {
    fn new(waiting: &Waiting, sample: usize, prefix: &Arc<Segment>, model: &Model) -> Self {
        let group = &waiting.group;
        let room = model.config().max_positions - group.prompt.len();
        Active {
            group: group.id,
            sample,
            adapter: waiting.adapter.clone(),
            cache: Cache::after(prefix),
            rng: ChaCha8Rng::seed_from_u64(group.seeds[sample]),
            sampling: group.sampling.clone(),
            said: Said::begin(&group.sampling, &group.prompt),
            limit: group.sampling.max_tokens.min(room),
            watch: StopWatch::begin(&group.sampling.stop),
            stopped: false,
            drawn: Vec::new(),
        }
    }

    fn draw(&mut self, logits: &[f32], model: &Model, scratch: &mut Scratch) {
        let drawn = draw(logits, &self.sampling, self.said.as_ref(), &mut self.rng, scratch);
        if let Some(said) = &mut self.said {
            said.add(drawn.token);
        }
        self.drawn.push(drawn);
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

    fn finish_reason(&self, model: &Model) -> Option<FinishReason> {
        let last = self.drawn.last()?;
        if self.stopped || model.tokenizer().is_end(last.token) {
            Some(FinishReason::Stop)
        } else {
            (self.drawn.len() >= self.limit).then_some(FinishReason::Length)
        }
    }

    fn completion(&self, finish_reason: FinishReason, model: &Model) -> Completion {
        let token_ids = self.token_ids();
        let mut text = model.tokenizer().decode(&token_ids);
        let stop_string = first_stop(&text, &self.sampling.stop).map(|(at, stop)| (at, stop.to_string()));
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

/// Refuses ids that the model has no embedding for.
pub(crate) fn check_tokens(model: &Model, tokens: &[u32]) -> Result<(), EngineError> {
    let vocab = model.config().vocab;
    match tokens.iter().find(|t| **t as usize >= vocab) {
        Some(token) => Err(EngineError::request(format!("token id {token} is outside the vocabulary of {vocab}"))),
        None => Ok(()),
    }
}

/// Reads whole token lists into their caches, `max_rows` a pass, and hands over each row as (list, place, hidden).
pub(crate) fn read<'a>(
    decoder: &Decoder,
    adapter: impl Fn(usize) -> Option<&'a LoraPack>,
    caches: &mut [Cache],
    tokens: &[&[u32]],
    max_rows: usize,
    pool: &mut Pool,
    mut take: impl FnMut(usize, usize, &[f32]),
) {
    let mut places = vec![0; tokens.len()];
    loop {
        let mut room = max_rows;
        let mut runs = Vec::new();
        let mut spans = Vec::new();
        for (i, cache) in caches.iter_mut().enumerate() {
            let piece = (tokens[i].len() - places[i]).min(room);
            if piece > 0 {
                spans.push((i, places[i]..places[i] + piece));
                runs.push(Run { cache, tokens: &tokens[i][places[i]..places[i] + piece], adapter: adapter(i) });
                places[i] += piece;
                room -= piece;
            }
        }
        if runs.is_empty() {
            return;
        }
        let hidden = decoder.forward(&mut runs, pool);
        let places = spans.into_iter().flat_map(|(i, span)| span.map(move |place| (i, place)));
        for ((i, place), row) in places.zip(hidden.chunks_exact(decoder.hidden_size())) {
            take(i, place, row);
        }
    }
}

/// Samples all groups and returns their completions, in the order of the groups and of their seeds.
pub fn generate(
    policy: &Policy,
    groups: Vec<Group>,
    limits: &BatchLimits,
    on_done: &mut dyn FnMut(u64, usize, &Completion),
) -> Result<Vec<Vec<Completion>>, EngineError> {
    generate_each(groups.into_iter().map(|group| (policy.clone(), group)).collect(), limits, on_done)
}

/// Samples groups of several policies on the same weights in one batch, as [`generate`] does those of one.
pub fn generate_each(
    groups: Vec<(Policy, Group)>,
    limits: &BatchLimits,
    on_done: &mut dyn FnMut(u64, usize, &Completion),
) -> Result<Vec<Vec<Completion>>, EngineError> {
    let Some((first, _)) = groups.first() else { return Ok(Vec::new()) };
    let mut batcher = Batcher::new(first.clone(), limits.clone())?;
    let ids: Vec<u64> = groups.iter().map(|(_, group)| group.id).collect();
    let mut completions: Vec<Vec<Option<Completion>>> =
        groups.iter().map(|(_, group)| vec![None; group.seeds.len()]).collect();
    // Inside the batch a group is known by its place, so that ids need not differ.
    for (place, (policy, group)) in groups.into_iter().enumerate() {
        batcher.push_as(&policy, Group { id: place as u64, ..group })?;
    }
    while !batcher.is_empty() {
        for event in batcher.step()? {
            if let Event::Done { group, sample, completion } = event {
                on_done(ids[group as usize], sample, &completion);
                completions[group as usize][sample] = Some(completion);
            }
        }
    }
    Ok(completions.into_iter().map(|samples| samples.into_iter().flatten().collect()).collect())
}
