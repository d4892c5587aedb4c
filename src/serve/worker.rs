//! The engine's thread: the model, the loaded adapters, and the batch that is being decoded.
//!
//! A batch has one adapter (or none). Requests of that adapter join the running batch at any step, unless a request of
//! another adapter waits: then the batch runs empty first, so that nobody waits for more than the requests before it.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender, TryRecvError};

use crate::engine::{
    Adapter, BatchLimits, Batcher, Completion, Event as Step, Group, Model, Policy, SamplingSettings, WeightForm,
};

use super::Settings;
use super::api::Sampled;
use super::emit::{Emitter, Wish};
use super::job::{Command, Event, Job, Refusal, Sampling, rank_too_high, room};

/// Starts the thread; it ends when the last sender is gone and all is answered.
pub(crate) fn start(model: Model, settings: &Settings) -> std::io::Result<Sender<Command>> {
    let (sender, commands) = mpsc::channel();
    let settings = settings.clone();
    std::thread::Builder::new().name("engine".into()).spawn(move || Engine::new(&model, &settings).run(&commands))?;
    Ok(sender)
}

/// An accepted request: its prompt is tokenised and fits.
struct Accepted {
    job: Job,
    adapter: Option<Arc<Adapter>>,
    prompt: Vec<u32>,
    max_tokens: usize,
}

/// A request in the batch.
struct Running {
    emitter: Emitter,
    /// Dropped at the end, which frees the request's place.
    job: Job,
}

/// The batch that is being decoded, and the adapter it has.
struct Batch {
    adapter: Option<Arc<Adapter>>,
    batcher: Batcher,
    running: BTreeMap<u64, Running>,
}

struct Engine<'m> {
    model: &'m Model,
    settings: &'m Settings,
    adapters: HashMap<String, Arc<Adapter>>,
    waiting: VecDeque<Accepted>,
    batch: Option<Batch>,
    next_group: u64,
}

/// The adapter, the prompt's ids and the most new tokens of a job that may begin.
type Admitted = (Option<Arc<Adapter>>, Vec<u32>, usize);

impl<'m> Engine<'m> {
    fn new(model: &'m Model, settings: &'m Settings) -> Self {
        let (adapters, waiting) = Default::default();
        Engine { model, settings, adapters, waiting, batch: None, next_group: 0 }
    }

    fn run(&mut self, commands: &Receiver<Command>) {
        loop {
            let idle = self.waiting.is_empty() && self.batch.as_ref().is_none_or(|b| b.running.is_empty());
            let command = match idle {
                true => commands.recv().map_err(|_| TryRecvError::Disconnected),
                false => commands.try_recv(),
            };
            match command {
                Ok(command) => self.obey(command),
                Err(TryRecvError::Disconnected) if idle => return,
                // Decode only when no command waits, so that requests that came together start together.
                Err(_) => self.advance(),
            }
        }
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Ping { reply } => drop(reply.send(())),
            Command::Answer(job) => self.accept(job),
            Command::Load { name, folder, reply } => {
                let loaded = self.load(&folder).map(|adapter| drop(self.adapters.insert(name, adapter)));
                drop(reply.send(loaded));
            }
            Command::Unload { name } => drop(self.adapters.remove(&name)),
        }
    }

    fn load(&self, folder: &Path) -> Result<Arc<Adapter>, String> {
        let adapter = Adapter::load(folder, self.model).map_err(|e| e.to_string())?;
        match adapter.largest_rank() > self.settings.max_lora_rank {
            true => Err(rank_too_high(adapter.largest_rank(), self.settings.max_lora_rank)),
            false => Ok(Arc::new(adapter)),
        }
    }

    /// Tokenises a request's prompt and puts it in the queue, or refuses it.
    fn accept(&mut self, job: Job) {
        let told = match self.admit(&job) {
            Ok((adapter, prompt, max_tokens)) => {
                let told = job.events.send(Event::Started { prompt_ids: prompt.clone() });
                self.waiting.push_back(Accepted { job, adapter, prompt, max_tokens });
                told
            }
            Err(refusal) => job.events.send(Event::Refused(refusal)),
        };
        if told.is_err() {
            tracing::debug!("a client went away before its request was accepted");
        }
    }

    fn admit(&self, job: &Job) -> Result<Admitted, Refusal> {
        let adapter = match &job.adapter {
            None => None,
            // It was there when the name was resolved, so it was unloaded a moment ago.
            Some(name) => Some(self.adapters.get(name).cloned().ok_or_else(|| unloaded(name))?),
        };
        let prompt = self.model.prompt_ids(&job.messages, job.tools.as_ref());
        let prompt = prompt.map_err(|e| Refusal::Prompt(e.to_string()))?;
        let context = self.model.config().max_positions;
        let max_tokens = room(prompt.len(), job.sampling.max_tokens, self.settings.max_tokens, context)?;
        Ok((adapter, prompt, max_tokens))
    }

    /// Brings waiting requests into the batch and decodes one token of each.
    fn advance(&mut self) {
        if let Err(refusal) = self.fill() {
            // The batch could not even be made: the request at the head is the one it was for.
            if let Some(accepted) = self.waiting.pop_front() {
                drop(accepted.job.events.send(Event::Refused(refusal)));
            }
            return;
        }
        let Some(batch) = &mut self.batch else { return };
        if let Err(error) = batch.step(self.model) {
            tracing::error!(%error, "a decoding step failed");
            batch.refuse_all(&Refusal::Engine(error.to_string()));
            self.batch = None;
        }
    }

    /// Moves the requests that may join from the queue into the batch.
    fn fill(&mut self) -> Result<(), Refusal> {
        let Some(first) = self.waiting.front() else { return Ok(()) };
        let over = self.batch.as_ref().is_none_or(|batch| batch.running.is_empty());
        if over && !self.batch.as_ref().is_some_and(|batch| same(&batch.adapter, &first.adapter)) {
            self.batch = Some(Batch::new(self.model, first.adapter.clone(), self.settings.max_sequences)?);
        }
        let Some(batch) = &mut self.batch else { return Ok(()) };
        if !over && self.waiting.iter().any(|accepted| !same(&accepted.adapter, &batch.adapter)) {
            return Ok(());
        }
        let (joining, staying) = self.waiting.drain(..).partition(|a: &Accepted| same(&a.adapter, &batch.adapter));
        self.waiting = staying;
        let joining: VecDeque<Accepted> = joining;
        for accepted in joining {
            batch.push(self.next_group, accepted);
            self.next_group += 1;
        }
        Ok(())
    }
}

impl Batch {
    fn new(model: &Model, adapter: Option<Arc<Adapter>>, max_sequences: usize) -> Result<Self, Refusal> {
        let limits = BatchLimits { max_sequences, ..BatchLimits::default() };
        let policy = Policy::new(model, adapter.as_deref(), WeightForm::F32);
        let batcher = policy.and_then(|policy| Batcher::new(policy, limits));
        let batcher = batcher.map_err(|e| Refusal::Engine(e.to_string()))?;
        Ok(Batch { adapter, batcher, running: BTreeMap::new() })
    }

    /// Adds a request, unless its client is gone or the engine refuses it.
    fn push(&mut self, id: u64, accepted: Accepted) {
        let Accepted { mut job, prompt, max_tokens, .. } = accepted;
        let stop = std::mem::take(&mut job.sampling.stop);
        let emitter = Emitter::new(job.events.clone(), job.seeds.len(), stop);
        if emitter.is_gone() {
            return;
        }
        let Sampling { temperature, top_p, top_k, min_p, penalties, .. } = job.sampling;
        let sampling = SamplingSettings {
            temperature,
            top_p,
            max_tokens,
            top_k,
            min_p,
            repetition_penalty: penalties.repetition,
            presence_penalty: penalties.presence,
            frequency_penalty: penalties.frequency,
        };
        match self.batcher.push(Group { id, prompt, seeds: job.seeds.clone(), sampling }) {
            Ok(()) => drop(self.running.insert(id, Running { emitter, job })),
            Err(error) => drop(job.events.send(Event::Refused(Refusal::Engine(error.to_string())))),
        }
    }

    /// Decodes one token of each sequence and reports them.
    fn step(&mut self, model: &Model) -> Result<(), crate::engine::EngineError> {
        let gone: Vec<u64> = self.running.iter().filter(|(_, r)| r.emitter.is_gone()).map(|(&id, _)| id).collect();
        gone.into_iter().for_each(|id| self.end(id));
        for step in self.batcher.step()? {
            let (group, wish) = self.report(step, model);
            let over = self.running.get(&group).is_some_and(|r| r.emitter.is_over());
            if over || wish == Some(Wish::Gone) {
                self.end(group);
            }
        }
        Ok(())
    }

    /// Passes on what a step brought; `None` where the request has ended before.
    fn report(&mut self, step: Step, model: &Model) -> (u64, Option<Wish>) {
        let decode = |ids: &[u32]| model.tokenizer().decode(ids);
        match step {
            Step::Token { group, sample, token, logprob } => {
                let sampled = Sampled { id: token, piece: decode(&[token]), logprob };
                let wish = self.running.get_mut(&group).map(|r| r.emitter.token(sample, sampled, &decode));
                (group, wish)
            }
            Step::Done { group, sample, completion: Completion { finish_reason, .. } } => {
                let wish = self.running.get_mut(&group).map(|r| r.emitter.done(sample, finish_reason, &decode));
                (group, wish)
            }
        }
    }

    /// Takes a request out of the batch, finished or not.
    fn end(&mut self, group: u64) {
        self.batcher.cancel(group);
        self.running.remove(&group);
    }

    fn refuse_all(&mut self, refusal: &Refusal) {
        for running in std::mem::take(&mut self.running).into_values() {
            drop(running.job.events.send(Event::Refused(refusal.clone())));
        }
    }
}

/// Returns true where both are the same loaded adapter, or both none. A name loaded again in place is another one.
fn same(a: &Option<Arc<Adapter>>, b: &Option<Arc<Adapter>>) -> bool {
    match (a, b) {
        (Some(a), Some(b)) => Arc::ptr_eq(a, b),
        (None, None) => true,
        _ => false,
    }
}

fn unloaded(name: &str) -> Refusal {
    Refusal::Engine(format!("the adapter '{name}' was unloaded while the request arrived; send it again"))
}

#[cfg(test)]
#[path = "worker_tests.rs"]
mod tests;
