//! What is asked of the engine's thread, and what it answers.
//!
//! The model and its adapters live on one thread of their own, because a decoding step takes all cores for tens of
//! milliseconds and would starve the connections on an async runtime. The two sides share nothing but these messages.

use std::path::PathBuf;

use tokio::sync::mpsc::UnboundedSender;
use tokio::sync::{OwnedSemaphorePermit, oneshot};

use crate::record::{FinishReason, Message};

use super::api::Sampled;

/// One message to the engine's thread.
pub(crate) enum Command {
    Answer(Box<Job>),
    /// Reads an adapter from `folder` and answers under `name` with it from now on.
    Load {
        name: String,
        folder: PathBuf,
        reply: oneshot::Sender<Result<(), String>>,
    },
    /// Asks whether the thread still takes commands.
    Ping {
        reply: oneshot::Sender<()>,
    },
    /// Forgets an adapter; requests that were accepted under its name are still answered with it.
    Unload {
        name: String,
    },
}

/// One request for an answer.
pub(crate) struct Job {
    /// Name of the adapter to answer with; `None` for the base.
    pub(crate) adapter: Option<String>,
    pub(crate) messages: Vec<Message>,
    pub(crate) tools: Option<crate::json::Value>,
    pub(crate) sampling: Sampling,
    /// One seed for each sample.
    pub(crate) seeds: Vec<u64>,
    /// Holds at most one event per token, so its length is bounded by `max_samples * max_tokens`.
    pub(crate) events: UnboundedSender<Event>,
    /// The place among the requests that may wait; free again when the job is dropped.
    pub(crate) _place: OwnedSemaphorePermit,
}

/// What makes tokens less likely that stand there already.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Penalties {
    /// 1 = off.
    pub(crate) repetition: f64,
    pub(crate) presence: f64,
    pub(crate) frequency: f64,
}

/// Checked decoding parameters.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Sampling {
    pub(crate) temperature: f64,
    pub(crate) top_p: f64,
    /// 0 = off.
    pub(crate) top_k: usize,
    pub(crate) min_p: f64,
    pub(crate) penalties: Penalties,
    /// `None`: as many as the server's bound and the context allow.
    pub(crate) max_tokens: Option<usize>,
    pub(crate) samples: usize,
    pub(crate) stop: Vec<String>,
    pub(crate) format: Format,
}

/// What an answer must be.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Format {
    Text,
    JsonObject,
    /// An instance of this JSON Schema.
    JsonSchema(serde_json::Value),
}

/// What the engine's thread reports of a job.
#[derive(Debug)]
pub(crate) enum Event {
    /// The prompt was accepted and has these ids.
    Started { prompt_ids: Vec<u32> },
    /// A token, and the text that became certain with it.
    Token { sample: usize, token: Sampled, text: String },
    /// A sample is over, by a stop string or otherwise; `text` was held back until now.
    Done { sample: usize, text: String, reason: FinishReason, stop_string: Option<String> },
    /// The job cannot be answered; nothing follows.
    Refused(Refusal),
}

/// Why a job cannot be answered.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Refusal {
    /// Prompt and answer do not fit the model's context.
    TooLong {
        prompt: usize,
        new: usize,
        context: usize,
    },
    /// The chat template refuses the messages.
    Prompt(String),
    /// The schema of the answer cannot be followed.
    Format(String),
    Engine(String),
}

/// Returns how many tokens may be sampled after a prompt, or why the request does not fit the context.
pub(crate) fn room(prompt: usize, asked: Option<usize>, limit: usize, context: usize) -> Result<usize, Refusal> {
    let new = asked.unwrap_or(1);
    if prompt + new > context {
        return Err(Refusal::TooLong { prompt, new, context });
    }
    Ok(asked.unwrap_or_else(|| limit.min(context - prompt)))
}

/// Words the refusal of an adapter whose rank is above the bound, as vLLM does.
pub(crate) fn rank_too_high(rank: usize, limit: usize) -> String {
    format!("LoRA rank {rank} is greater than max_lora_rank {limit}.")
}
