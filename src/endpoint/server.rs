//! What taod asks of a model server, whoever made it: one trait, and one file for each server.
//!
//! Whatever changes a server is read back and is safe to repeat, because a connection may break after the server has
//! acted. A folder is given as taod sees it; a driver translates it where the server sees another one.

use std::path::Path;

use async_trait::async_trait;

use crate::record::Message;

use super::EndpointError;

/// How an adapter takes its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Load {
    /// The name must be new.
    Fresh,
    /// The name may be taken; the new folder replaces the old one.
    InPlace,
}

/// A greedy question whose answer comes with log-probs.
#[derive(Debug, Clone)]
pub struct Question<'a> {
    pub model: &'a str,
    pub messages: &'a [Message],
    pub max_tokens: usize,
}

/// The answer to a [`Question`].
#[derive(Debug, Clone, PartialEq)]
pub struct Reply {
    pub text: String,
    /// `None` where the server does not return ids (older vLLM, other servers).
    pub token_ids: Option<Vec<u32>>,
    /// The tokens as text.
    pub pieces: Vec<String>,
    pub logprobs: Vec<f64>,
    pub finish_reason: Option<String>,
}

/// Whatever answers questions: a replica, or the gateway before all of them.
#[async_trait]
pub trait Answers: Send + Sync {
    /// Returns its address.
    fn url(&self) -> &str;

    /// Asks a question greedily; the answer carries its tokens and their log-probs.
    async fn ask(&self, question: &Question<'_>) -> Result<Reply, EndpointError>;
}

/// One replica of the endpoint.
#[async_trait]
pub trait Server: Answers {
    /// Loads the adapter in `folder` under `name`, and reads back that it is there.
    async fn load(&self, name: &str, folder: &Path, how: Load) -> Result<(), EndpointError>;

    /// Unloads an adapter; one that is not loaded is no error.
    async fn unload(&self, name: &str) -> Result<(), EndpointError>;

    /// Returns the names of the adapters that can be unloaded.
    async fn names(&self) -> Result<Vec<String>, EndpointError>;

    /// Returns true where `name` is loaded from `folder`.
    async fn holds(&self, name: &str, folder: &Path) -> Result<bool, EndpointError>;

    /// Returns the path, as the server sees it, that `name` was loaded from, where it is loaded and the server tells.
    async fn source(&self, _name: &str) -> Result<Option<String>, EndpointError> {
        Ok(None)
    }

    /// Returns what the server's own alias `name` points at, where it has aliases.
    async fn alias(&self, _name: &str) -> Result<Option<String>, EndpointError> {
        Err(EndpointError::NoAliases { url: self.url().to_owned() })
    }

    /// Points the server's own alias at `target` if it points at `expected` (`None`: if it does not exist).
    async fn move_alias(&self, _name: &str, _expected: Option<&str>, _target: &str) -> Result<(), EndpointError> {
        Err(EndpointError::NoAliases { url: self.url().to_owned() })
    }
}
