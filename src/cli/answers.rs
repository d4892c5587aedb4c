//! Prompts and answers as the input lines of several commands give them.

use std::path::PathBuf;

use anyhow::{Context, bail, ensure};
use clap::Args;
use serde::Deserialize;

use crate::engine::{Adapter, Model};
use crate::json::Value;
use crate::record::{FinishReason, Message};

/// A model and what is put on top of it.
#[derive(Debug, Clone, Args)]
pub(super) struct ModelArgs {
    /// A folder in Hugging Face layout, a .gguf file, or a hub id.
    #[arg(long, value_name = "MODEL")]
    pub model: String,
    /// A PEFT folder; without it the model answers as it is.
    #[arg(long, value_name = "DIR")]
    pub adapter: Option<PathBuf>,
}

impl ModelArgs {
    /// Loads both.
    pub(super) fn load(&self) -> anyhow::Result<(Model, Option<Adapter>)> {
        let model = Model::load(&self.model)?;
        let adapter = self.adapter.as_deref().map(|folder| Adapter::load(folder, &model)).transpose()?;
        Ok((model, adapter))
    }
}

/// A prompt; fields that are not named are passed over, so that log rows can be fed in.
#[derive(Debug, Clone, Deserialize)]
pub(super) struct Prompt {
    pub(super) messages: Vec<Message>,
    #[serde(default)]
    pub(super) tools: Option<Value>,
}

impl Prompt {
    /// Returns the token ids that the model is asked with; an error names the line.
    pub(super) fn ids(&self, model: &Model, index: usize) -> anyhow::Result<Vec<u32>> {
        model.prompt_ids(&self.messages, self.tools.as_ref()).with_context(|| format!("input {index}"))
    }
}

/// An answer, by its token ids or by its text. Ids win: text that is tokenised anew need not give the same ids.
#[derive(Debug, Clone, Deserialize)]
pub(super) struct Answer {
    #[serde(default)]
    pub(super) token_ids: Option<Vec<u32>>,
    #[serde(default)]
    pub(super) response: Option<String>,
    #[serde(default)]
    pub(super) finish_reason: Option<FinishReason>,
    /// The stop string that ended it in place of the closing token.
    #[serde(default)]
    pub(super) stop_reason: Option<String>,
}

impl Answer {
    /// Returns the answer's ids; they include the closing token exactly when it ended by itself. An answer that says
    /// nothing of its end did; one that a stop string ended has that in its ids. An error names the line.
    pub(super) fn ids(&self, model: &Model, index: usize) -> anyhow::Result<Vec<u32>> {
        let tokenizer = model.tokenizer();
        let ids = match (&self.token_ids, &self.response) {
            (Some(ids), _) => {
                let ended = self.stop_reason.is_some() || ids.last().is_some_and(|id| tokenizer.is_end(*id));
                check_end(ended, self.finish_reason).with_context(|| format!("input {index}"))?;
                ids.clone()
            }
            (None, Some(text)) => tokenizer
                .answer_ids(text, self.finish_reason != Some(FinishReason::Length))
                .with_context(|| format!("input {index}"))?,
            (None, None) => bail!("input {index} holds neither token_ids nor response; give one of them"),
        };
        ensure!(!ids.is_empty(), "input {index}: the answer has no tokens; leave empty answers out");
        Ok(ids)
    }
}

/// Refuses ids whose end contradicts what is said of it: training on them would teach the wrong end.
fn check_end(closed: bool, said: Option<FinishReason>) -> anyhow::Result<()> {
    match (said, closed) {
        (Some(FinishReason::Stop), false) => {
            bail!("finish_reason is stop, but token_ids lack the closing token; append it, or say length")
        }
        (Some(FinishReason::Length), true) => {
            bail!("finish_reason is length, but token_ids hold the closing token; remove it, or say stop")
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_closing_token_is_there_exactly_when_the_answer_stopped() {
        assert!(check_end(true, Some(FinishReason::Stop)).is_ok());
        assert!(check_end(false, Some(FinishReason::Length)).is_ok());
        assert!(check_end(true, None).is_ok() && check_end(false, None).is_ok());
        assert!(check_end(false, Some(FinishReason::Stop)).unwrap_err().to_string().contains("lack the closing token"));
        assert!(
            check_end(true, Some(FinishReason::Length)).unwrap_err().to_string().contains("hold the closing token")
        );
    }

    #[test]
    fn a_log_row_can_be_fed_in() {
        let line = r#"{"workload": "a", "messages": [{"role": "user", "content": "hi"}], "status": 200}"#;
        assert_eq!(serde_json::from_str::<Prompt>(line).unwrap().messages.len(), 1);
        let line = r#"{"index": 0, "sample": 1, "token_ids": [1, 2], "finish_reason": "stop"}"#;
        let answer: Answer = serde_json::from_str(line).unwrap();
        assert_eq!((answer.token_ids, answer.finish_reason), (Some(vec![1, 2]), Some(FinishReason::Stop)));
    }
}
