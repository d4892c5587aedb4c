//! What can go wrong in the engine. Every message names the thing, its value and the remedy.

use std::path::Path;

/// A model, an adapter or a request that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    #[error(
        "model {model} not found: {problem}; give a folder in Hugging Face layout, a .gguf file or a hub id such as org/name"
    )]
    ModelNotFound { model: String, problem: String },
    #[error("{file}: architecture {found} is not supported; use a model of one of: {supported}")]
    Architecture { file: String, found: String, supported: String },
    #[error("{file}: {problem}; {remedy}")]
    File { file: String, problem: String, remedy: &'static str },
    #[error("{file}: tensor {tensor} {problem}; {remedy}")]
    Tensor { file: String, tensor: String, problem: String, remedy: &'static str },
    #[error("chat template of {model}: {problem}; check the roles and their order in the messages")]
    Template { model: String, problem: String },
    #[error("adapter {adapter}: {problem}; {remedy}")]
    Adapter { adapter: String, problem: String, remedy: &'static str },
    #[error("engine.device = \"{device}\": {problem}; {remedy}")]
    Device { device: String, problem: String, remedy: &'static str },
    #[error("prompt of {tokens} tokens leaves no room in the context of {context}; shorten the messages")]
    PromptTooLong { tokens: usize, context: usize },
    #[error(
        "a prompt of {prompt} tokens and an answer of up to {new} need {needed_mib} MiB of keys and values, more than cache_mib = {cache_mib}; raise it, shorten the prompt or lower max_tokens"
    )]
    CacheTooSmall { prompt: usize, new: usize, needed_mib: u64, cache_mib: usize },
    #[error("request is not usable: {problem}")]
    Request { problem: String },
    #[error("tensor computation failed: {0}")]
    Compute(#[from] candle_core::Error),
}

impl EngineError {
    /// Returns the error for a file that is there but cannot be used as it is.
    pub(crate) fn file(path: &Path, problem: impl ToString, remedy: &'static str) -> Self {
        EngineError::File { file: path.display().to_string(), problem: problem.to_string(), remedy }
    }

    /// Returns the error for one tensor of a file.
    pub(crate) fn tensor(path: &Path, tensor: &str, problem: impl ToString, remedy: &'static str) -> Self {
        let (file, tensor) = (path.display().to_string(), tensor.to_string());
        EngineError::Tensor { file, tensor, problem: problem.to_string(), remedy }
    }

    /// Returns the error for an adapter folder.
    pub(crate) fn adapter(path: &Path, problem: impl ToString, remedy: &'static str) -> Self {
        EngineError::Adapter { adapter: path.display().to_string(), problem: problem.to_string(), remedy }
    }

    /// Returns the error for a request whose values make no sense.
    pub(crate) fn request(problem: impl Into<String>) -> Self {
        EngineError::Request { problem: problem.into() }
    }
}
