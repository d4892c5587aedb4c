//! Batched sampling: prompts are read once for all their samples, and a sample that ends makes room for the next.
//!
//! Each step is one forward pass over the newest token of every sequence and over pieces of the prompts that are to join
//! them, so that a long prompt neither stops those that run nor makes a peak. A sample is admitted only with room
//! in the cache for all it may become: nothing that has begun is ever thrown out.

mod prompt;
mod sequence;

use std::collections::VecDeque;
use std::sync::Arc;

use rayon::prelude::*;

use self::prompt::{Admitted, Prompt, Queued, adapter_id, pieces};
use self::sequence::{Active, most_tokens};
use super::cache::{BLOCK, Pool};
use super::decoder::Run;
use super::draw::{Drawn, SamplingSettings, Scratch};
use super::error::EngineError;
use super::model::Model;
use super::policy::Policy;
use super::prefixes::Prefixes;
use super::runner::Hidden;
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

/// How much is computed and held at once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BatchLimits {
    /// Sequences that are decoded together.
    pub max_sequences: usize,
    /// Prompt tokens read in one forward pass.
    pub max_rows: usize,
    /// Memory of keys and values, in MiB.
    pub cache_mib: usize,
}

impl BatchLimits {
    /// Memory of keys and values where nothing else is asked for, in MiB.
    pub const CACHE_MIB: usize = 4096;

    /// Refuses a sample that is too large for the cache if it has it to itself. The message tells what it needs.
    pub fn check(&self, model: &Model, prompt: usize, new: usize) -> Result<(), EngineError> {
        let page = model.cache_shape().page_bytes();
        let pages = prompt.div_ceil(BLOCK) + new.div_ceil(BLOCK);
        match pages <= self.pages(page) {
            true => Ok(()),
            false => {
                let needed_mib = (pages as u64 * page).div_ceil(MIB);
                Err(EngineError::CacheTooSmall { prompt, new, needed_mib, cache_mib: self.cache_mib })
            }
        }
    }

    fn pages(&self, bytes: u64) -> usize {
        (self.cache_mib as u64 * MIB / bytes) as usize
    }
}

const MIB: u64 = 1 << 20;

impl Default for BatchLimits {
    fn default() -> Self {
        BatchLimits { max_sequences: 64, max_rows: 512, cache_mib: Self::CACHE_MIB }
    }
}

/// The share of the cache that may hold pages which nobody reads, for prompts to come.
const IDLE_SHARE: usize = 16;

/// A running batch. Groups are pushed at any time; each step reads waiting prompts and adds a token to every sequence.
///
/// Its sequences may have different adapters: all are multiplied by the same weights, and each is changed by its own adapter,
/// as it would be alone.
pub struct Batcher {
    policy: Policy,
    limits: BatchLimits,
    pool: Pool,
    /// Pages that the pool may give out.
    pages: usize,
    prefixes: Prefixes,
    /// Memory of the last logits.
    room: Vec<f32>,
    /// Groups that wait for room, in order of arrival.
    queue: VecDeque<Queued>,
    /// Groups whose samples have not all started, in order of arrival.
    admitted: VecDeque<Admitted>,
    active: Vec<Active>,
    tokens_read: u64,
}

/// Whose tokens a run of a forward pass reads.
enum Owner {
    Sequence,
    /// A prompt, by its place among those admitted.
    Prompt(usize),
}

impl Batcher {
    /// Prepares a batch on the weights of a policy.
    pub fn new(policy: Policy, limits: BatchLimits) -> Result<Self, EngineError> {
        if limits.max_sequences == 0 || limits.max_rows == 0 {
            return Err(EngineError::request("max_sequences and max_rows must be at least 1"));
        }
        let pages = limits.pages(policy.runner().shape().page_bytes());
        let pool = policy.runner().pool(pages);
        let (prefixes, room, queue, admitted, active) = Default::default();
        Ok(Batcher { policy, limits, pool, pages, prefixes, room, queue, admitted, active, tokens_read: 0 })
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
        let model = self.policy.model();
        check_tokens(model, &group.prompt)?;
        if group.prompt.is_empty() {
            return Err(EngineError::request("the prompt has no tokens; give at least one message"));
        }
        let (tokens, context) = (group.prompt.len(), model.config().max_positions);
        if tokens >= context {
            return Err(EngineError::PromptTooLong { tokens, context });
        }
        self.limits.check(model, tokens, most_tokens(&group, model))?;
        if !group.seeds.is_empty() {
            self.queue.push_back(Queued { group, adapter: policy.adapter().cloned() });
        }
        Ok(())
    }

    /// Returns true when nothing runs and nothing waits.
    pub fn is_empty(&self) -> bool {
        self.active.is_empty() && self.admitted.is_empty() && self.queue.is_empty()
    }

    /// Returns how many more sequences would have a place.
    pub fn free(&self) -> usize {
        let waiting: usize = self.queue.iter().map(|queued| queued.group.seeds.len()).sum();
        self.places().saturating_sub(waiting)
    }

    /// Returns the bytes of the keys and values that are held, those of prompts that nobody reads included.
    pub fn cache_bytes(&self) -> u64 {
        self.pool.live() as u64 * self.policy.runner().shape().page_bytes()
    }

    /// Returns how many prompt tokens have been read so far; what prompts have in common counts once.
    pub fn tokens_read(&self) -> u64 {
        self.tokens_read
    }

    /// Drops all samples of a group without an event.
    pub fn cancel(&mut self, group: u64) {
        self.queue.retain(|queued| queued.group.id != group);
        self.admitted.retain(|admitted| admitted.group.id != group);
        self.active.retain(|active| active.group != group);
    }

    /// Samples groups and returns their completions, in the order of the groups and of their seeds. The batch is empty before and
    /// after; only the prompts read are remembered.
    pub fn drain(
        &mut self,
        groups: Vec<(Policy, Group)>,
        on_done: &mut dyn FnMut(u64, usize, &Completion),
    ) -> Result<Vec<Vec<Completion>>, EngineError> {
        let ids: Vec<u64> = groups.iter().map(|(_, group)| group.id).collect();
        let mut completions: Vec<Vec<Option<Completion>>> =
            groups.iter().map(|(_, group)| vec![None; group.seeds.len()]).collect();
        // Inside the batch a group is known by its place, so that ids need not differ.
        for (place, (policy, group)) in groups.into_iter().enumerate() {
            self.push_as(&policy, Group { id: place as u64, ..group })?;
        }
        while !self.is_empty() {
            for event in self.step()? {
                if let Event::Done { group, sample, completion } = event {
                    on_done(ids[group as usize], sample, &completion);
                    completions[group as usize][sample] = Some(completion);
                }
            }
        }
        Ok(completions.into_iter().map(|samples| samples.into_iter().flatten().collect()).collect())
    }

    /// Admits what has room, reads on, adds one token to every running sequence, and starts what has been read.
    pub fn step(&mut self) -> Result<Vec<Event>, EngineError> {
        let mut events = Vec::new();
        self.prefixes.trim(self.pages / IDLE_SHARE);
        self.admit();
        self.forward(&mut events)?;
        self.start(&mut events);
        Ok(events)
    }

    /// Returns the places for sequences that nobody admitted has or waits for.
    fn places(&self) -> usize {
        let unstarted: usize = self.admitted.iter().map(Admitted::left).sum();
        self.limits.max_sequences.saturating_sub(self.active.len() + unstarted)
    }

    /// Admits waiting groups as long as there is a place for a sample and memory for it and its prompt. Samples of a prompt
    /// that has been read come first.
    fn admit(&mut self) {
        if self.admitted.iter().any(|admitted| matches!(admitted.prompt, Prompt::Read(_))) {
            return;
        }
        while self.places() > 0
            && let Some(next) = self.queue.front()
        {
            let pages = next.group.prompt.len().div_ceil(BLOCK) + self.answer_pages(&next.group);
            if !self.make_room(pages) {
                return;
            }
            let queued = self.queue.pop_front();
            let shape = self.policy.runner().shape();
            self.admitted.extend(queued.map(|queued| Admitted::new(queued, shape, &mut self.prefixes)));
        }
    }

    fn answer_pages(&self, group: &Group) -> usize {
        most_tokens(group, self.policy.model()).div_ceil(BLOCK)
    }

    /// Returns the pages that what was admitted may still take.
    fn promised(&self) -> usize {
        let active: usize = self.active.iter().map(Active::pages_to_write).sum();
        let admitted = self.admitted.iter().map(|admitted| {
            let first = if admitted.started == 0 { self.answer_pages(&admitted.group) } else { 0 };
            admitted.pages_to_read() + first
        });
        active + admitted.sum::<usize>()
    }

    /// Returns true if so many more pages can be promised, for which prompts that nobody reads may have to be forgotten.
    fn make_room(&mut self, pages: usize) -> bool {
        let short = (self.pool.live() + self.promised() + pages).saturating_sub(self.pages);
        short == 0 || {
            let idle = self.prefixes.idle();
            self.prefixes.trim(idle.saturating_sub(short)) >= short
        }
    }

    /// Reads the newest token of every sequence and the next pieces of prompts, and draws the sequences' next tokens.
    fn forward(&mut self, events: &mut Vec<Event>) -> Result<(), EngineError> {
        let pieces = pieces(&mut self.admitted, self.limits.max_rows, &mut self.prefixes);
        let sequences = self.active.iter_mut().map(|active| (active.adapter_id(), Owner::Sequence, active.run()));
        let mut runs: Vec<(u64, Owner, Run<'_>)> = sequences.collect();
        for (at, (admitted, piece)) in self.admitted.iter_mut().zip(&pieces).enumerate() {
            if let (Prompt::Reading(reading), 1..) = (&mut admitted.prompt, *piece) {
                let tokens = &admitted.group.prompt[reading.len()..][..*piece];
                let run = Run { cache: &mut reading.cache, tokens, adapter: admitted.adapter.as_deref() };
                runs.push((adapter_id(&admitted.adapter), Owner::Prompt(at), run));
            }
        }
        if runs.is_empty() {
            return Ok(());
        }
        self.tokens_read += pieces.iter().sum::<usize>() as u64;
        // Side by side, the rows of one adapter are multiplied together. Sequences keep their order: they are sorted so.
        runs.sort_by_key(|(adapter, ..)| *adapter);
        let (owners, mut runs): (Vec<Owner>, Vec<Run<'_>>) =
            runs.into_iter().map(|(_, owner, run)| (owner, run)).unzip();
        let hidden = self.policy.runner().forward(&mut runs, &self.pool)?;
        let ends = runs.iter().scan(0, |end, run| {
            *end += run.tokens.len();
            Some(*end)
        });
        let ends: Vec<(Owner, usize)> = owners.into_iter().zip(ends).collect();
        let of_sequences = ends.iter().filter(|(owner, _)| matches!(owner, Owner::Sequence));
        let mut rows: Vec<usize> = of_sequences.map(|(_, end)| end - 1).collect();
        let mut read = Vec::new();
        for (owner, end) in &ends {
            let Owner::Prompt(at) = owner else { continue };
            let Admitted { group, prompt: Prompt::Reading(reading), .. } = &mut self.admitted[*at] else { continue };
            reading.publish(&group.prompt, &mut self.prefixes);
            if reading.len() == group.prompt.len() {
                rows.push(end - 1);
                read.push(*at);
            }
        }
        self.draw(&hidden, &rows, &read, events)
    }

    /// Draws a token for each sequence from the first rows, and keeps the logits of the others for the prompts that were read.
    fn draw(
        &mut self,
        hidden: &Hidden,
        rows: &[usize],
        read: &[usize],
        events: &mut Vec<Event>,
    ) -> Result<(), EngineError> {
        if rows.is_empty() {
            return Ok(());
        }
        let logits = self.policy.runner().logits(hidden, rows, std::mem::take(&mut self.room))?;
        for (place, at) in read.iter().enumerate() {
            let mut row = vec![0.0; logits.columns()];
            logits.copy_row(self.active.len() + place, &mut row);
            self.admitted[*at].finish(row);
        }
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
        Ok(())
    }

    /// Starts samples of groups whose prompt is read, in order, and draws their first token.
    fn start(&mut self, events: &mut Vec<Event>) {
        let first = self.active.len();
        let mut logits: Vec<Arc<Vec<f32>>> = Vec::new();
        for at in 0..self.admitted.len() {
            while self.active.len() < self.limits.max_sequences && self.admitted[at].left() > 0 {
                // Room for the first sample was kept when its group was admitted.
                let pages = self.answer_pages(&self.admitted[at].group);
                if self.admitted[at].started > 0 && !self.make_room(pages) {
                    break;
                }
                let admitted = &mut self.admitted[at];
                let Prompt::Read(read) = &admitted.prompt else { break };
                logits.push(read.logits.clone());
                self.active.push(Active::new(admitted, &read.prefix, self.policy.model()));
                admitted.started += 1;
            }
        }
        self.admitted.retain(|admitted| admitted.left() > 0);
        let started = self.active[first..].par_iter_mut().zip(&logits);
        let model = self.policy.model();
        started.for_each_init(Scratch::default, |scratch, (active, logits)| active.draw(logits, model, scratch));
        self.settle(first, events);
        self.active.sort_by_key(Active::adapter_id);
    }

    /// Reports the newest token of the sequences from `first` on and takes out those that ended.
    fn settle(&mut self, first: usize, events: &mut Vec<Event>) {
        for active in self.active.split_off(first) {
            let (group, sample) = (active.group, active.sample);
            if let Some(Drawn { token, logprob, .. }) = active.newest() {
                events.push(Event::Token { group, sample, token, logprob });
            }
            match active.finish_reason(self.policy.model()) {
                None => self.active.push(active),
                Some(reason) => {
                    let completion = active.completion(reason, self.policy.model());
                    events.push(Event::Done { group, sample, completion });
                }
            }
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
    Batcher::new(first.clone(), limits.clone())?.drain(groups, on_done)
}
