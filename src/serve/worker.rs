//! The engine's thread: the model, the loaded adapters, and the batch that is being decoded.
//!
//! There is one batch. Requests join it at any step and leave it when they are answered, whatever adapter they name:
//! the batcher applies to each sequence its own.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::mpsc::{self, Receiver, Sender, TryRecvError};

use crate::engine::{
    Adapter, BatchLimits, Batcher, EngineError, Event as Step, Grammar, Group, Model, Policy, SamplingSettings,
    WeightForm,
};

use super::Settings;
use super::api::Sampled;
use super::emit::{Emitter, Wish};
use super::job::{Command, Event, Format, Job, Refusal, Sampling, rank_too_high, room};

/// Starts the thread; it ends when the last sender is gone and all is answered.
pub(crate) fn start(model: Model, settings: &Settings) -> std::io::Result<Sender<Command>> {
    let (sender, commands) = mpsc::channel();
    let settings = settings.clone();
    let serve = move || match Engine::new(&model, &settings) {
        Ok(mut engine) => engine.run(&commands),
        // The receiver is dropped, which every sender is told.
        Err(error) => tracing::error!(%error, "the engine cannot start"),
    };
    std::thread::Builder::new().name("engine".into()).spawn(serve)?;
    Ok(sender)
}

/// A request in the batch.
struct Running {
    emitter: Emitter,
    /// Dropped at the end, which frees the request's place.
    job: Job,
}

struct Engine<'m> {
    model: &'m Model,
    settings: &'m Settings,
    base: Policy,
    /// The policy of each loaded adapter. Groups in the batch keep the one that they began with.
    adapters: HashMap<String, Policy>,
    batcher: Batcher,
    running: BTreeMap<u64, Running>,
    next_group: u64,
}

impl<'m> Engine<'m> {
    fn new(model: &'m Model, settings: &'m Settings) -> Result<Self, EngineError> {
        let base = Policy::new(model, None, WeightForm::F32)?;
        let Settings { max_sequences, cache_mib, .. } = *settings;
        let limits = BatchLimits { max_sequences, cache_mib, ..BatchLimits::default() };
        let context = model.config().max_positions;
        if let Err(problem) = limits.check(model, context - 1, 1) {
            tracing::warn!("requests that use the whole context will be refused: {problem}");
        }
        let batcher = Batcher::new(base.clone(), limits)?;
        let (adapters, running) = Default::default();
        Ok(Engine { model, settings, base, adapters, batcher, running, next_group: 0 })
    }

    fn run(&mut self, commands: &Receiver<Command>) {
        loop {
            let idle = self.running.is_empty();
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
            Command::Answer(job) => self.accept(*job),
            Command::Load { name, folder, reply } => {
                let loaded = self.load(&folder).map(|policy| drop(self.adapters.insert(name, policy)));
                drop(reply.send(loaded));
            }
            Command::Unload { name } => drop(self.adapters.remove(&name)),
        }
    }

    fn load(&self, folder: &Path) -> Result<Policy, String> {
        let adapter = Adapter::load(folder, self.model).map_err(|e| e.to_string())?;
        match adapter.largest_rank() > self.settings.max_lora_rank {
            true => Err(rank_too_high(adapter.largest_rank(), self.settings.max_lora_rank)),
            false => Policy::new(self.model, Some(&adapter), WeightForm::F32).map_err(|e| e.to_string()),
        }
    }

    /// Tokenises a request's prompt and brings it into the batch, or refuses it.
    fn accept(&mut self, mut job: Job) {
        let id = self.next_group;
        self.next_group += 1;
        let told = match self.begin(id, &mut job) {
            Ok((prompt_ids, emitter)) => {
                let told = job.events.send(Event::Started { prompt_ids });
                self.running.insert(id, Running { emitter, job });
                told
            }
            Err(refusal) => job.events.send(Event::Refused(refusal)),
        };
        if told.is_err() {
            tracing::debug!("a client went away before its request was accepted");
        }
    }

    /// Brings a request into the batch; returns its prompt's ids and what will tell of its tokens.
    fn begin(&mut self, id: u64, job: &mut Job) -> Result<(Vec<u32>, Emitter), Refusal> {
        let (policy, group) = self.admit(id, job)?;
        let emitter = Emitter::new(job.events.clone(), group.seeds.len(), group.sampling.stop.clone());
        let prompt_ids = group.prompt.clone();
        self.batcher.push_as(&policy, group).map_err(|e| Refusal::Prompt(e.to_string()))?;
        Ok((prompt_ids, emitter))
    }

    /// Returns what is to be sampled for a job, and from which policy.
    fn admit(&self, id: u64, job: &mut Job) -> Result<(Policy, Group), Refusal> {
        let policy = match &job.adapter {
            None => &self.base,
            // It was there when the name was resolved, so it was unloaded a moment ago.
            Some(name) => self.adapters.get(name).ok_or_else(|| unloaded(name))?,
        };
        let prompt = self.model.prompt_ids(&job.messages, job.tools.as_ref());
        let prompt = prompt.map_err(|e| Refusal::Prompt(e.to_string()))?;
        let context = self.model.config().max_positions;
        let max_tokens = room(prompt.len(), job.sampling.max_tokens, self.settings.max_tokens, context)?;
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
            stop: std::mem::take(&mut job.sampling.stop),
            grammar: self.grammar(&job.sampling.format)?,
        };
        Ok((policy.clone(), Group { id, prompt, seeds: job.seeds.clone(), sampling }))
    }

    fn grammar(&self, format: &Format) -> Result<Option<Grammar>, Refusal> {
        let grammar = match format {
            Format::Text => return Ok(None),
            Format::JsonObject => Grammar::json_object(self.model),
            Format::JsonSchema(schema) => Grammar::json_schema(self.model, schema),
        };
        grammar.map(Some).map_err(|e| Refusal::Format(e.to_string()))
    }

    /// Adds a token to each sequence of the batch and reports them.
    fn advance(&mut self) {
        let gone: Vec<u64> = self.running.iter().filter(|(_, r)| r.emitter.is_gone()).map(|(&id, _)| id).collect();
        gone.into_iter().for_each(|id| self.end(id));
        match self.batcher.step() {
            Ok(steps) => steps.into_iter().for_each(|step| self.report(step)),
            Err(error) => {
                tracing::error!(%error, "a decoding step failed");
                self.refuse_all(&Refusal::Engine(error.to_string()));
            }
        }
    }

    /// Passes on what a step brought.
    fn report(&mut self, step: Step) {
        let decode = |ids: &[u32]| self.model.tokenizer().decode(ids);
        let (Step::Token { group, .. } | Step::Done { group, .. }) = step;
        let Some(Running { emitter, .. }) = self.running.get_mut(&group) else { return };
        let wish = match step {
            Step::Token { sample, token, logprob, .. } => {
                emitter.token(sample, Sampled { id: token, piece: decode(&[token]), logprob }, &decode)
            }
            Step::Done { sample, completion, .. } => emitter.done(sample, completion),
        };
        if emitter.is_over() || wish == Wish::Gone {
            self.end(group);
        }
    }

    /// Takes a request out of the batch, finished or not.
    fn end(&mut self, group: u64) {
        self.batcher.cancel(group);
        self.running.remove(&group);
    }

    fn refuse_all(&mut self, refusal: &Refusal) {
        for (group, running) in std::mem::take(&mut self.running) {
            self.batcher.cancel(group);
            drop(running.job.events.send(Event::Refused(refusal.clone())));
        }
    }
}

fn unloaded(name: &str) -> Refusal {
    Refusal::Engine(format!("the adapter '{name}' was unloaded while the request arrived; send it again"))
}

#[cfg(test)]
#[path = "worker_tests.rs"]
mod tests;
