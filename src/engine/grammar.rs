//! Answers that keep a JSON Schema: which tokens may come next.
//!
//! llguidance turns a schema into a grammar over bytes and walks it together with a tree of the tokenizer's tokens. What may
//! not come next loses its logit before a token is drawn, so the log-prob under the distribution drawn from is told
//! as for any other filter, and the model's own log-prob stays what it is. Schemas are checked when they are compiled;
//! a `$ref` reaches only into the schema itself.

use std::sync::Arc;

use llguidance::api::TopLevelGrammar;
use llguidance::toktrie::{ApproximateTokEnv, TokRxInfo, TokTrie};
use llguidance::{Matcher, ParserFactory};
use serde_json::{Value, json};

use super::error::EngineError;
use super::model::Model;
use super::tokenizer::Tokenizer;

/// White space that an answer may have between two parts: a model that is not sure would fill the context with it.
const WHITE_SPACE: &str = r"[\x20\x0A\x0D\x09]{1,16}";

/// What an answer must be, compiled for one model's tokens. Cloning shares it.
#[derive(Clone)]
pub struct Grammar(Arc<Compiled>);

struct Compiled {
    schema: Value,
    /// At its beginning; each answer walks a copy.
    start: Matcher,
}

impl std::fmt::Debug for Grammar {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Grammar").field(&self.0.schema).finish()
    }
}

impl PartialEq for Grammar {
    fn eq(&self, other: &Self) -> bool {
        self.0.schema == other.0.schema
    }
}

impl Grammar {
    /// Compiles a JSON Schema; what of it cannot be kept token by token is refused by name.
    pub fn json_schema(model: &Model, schema: &Value) -> Result<Self, EngineError> {
        if !schema.is_object() {
            return Err(EngineError::request("the JSON schema is not an object; write it as {\"type\": ...}"));
        }
        let mut bounded = schema.clone();
        bounded["x-guidance"] = json!({ "whitespace_pattern": WHITE_SPACE });
        let parser = model.lexicon()?.0.create_parser(TopLevelGrammar::from_json_schema(bounded));
        let start = Matcher::new(parser);
        match start.get_error() {
            None => Ok(Grammar(Arc::new(Compiled { schema: schema.clone(), start }))),
            Some(problem) => {
                let problem = problem.lines().next().unwrap_or_default();
                Err(EngineError::request(format!("the JSON schema cannot be followed: {problem}; correct it")))
            }
        }
    }

    /// Compiles "any JSON object".
    pub fn json_object(model: &Model) -> Result<Self, EngineError> {
        Self::json_schema(model, &json!({"type": "object"}))
    }

    /// Returns the schema.
    pub fn schema(&self) -> &Value {
        &self.0.schema
    }

    /// Begins an answer.
    pub(crate) fn begin(&self) -> Walk {
        Walk(self.0.start.deep_clone())
    }
}

/// An answer on its way through a grammar.
pub(crate) struct Walk(Matcher);

impl Walk {
    /// Takes away the logits of tokens that may not come next; what may end the answer stays where it is complete.
    pub(crate) fn restrict(&mut self, logits: &mut [f32]) -> Result<(), GivenUp> {
        let allowed = self.0.compute_mask_or_eos().map_err(GivenUp::new)?;
        for (token, logit) in logits.iter_mut().enumerate() {
            if token >= allowed.len() || !allowed.is_allowed(token as u32) {
                *logit = f32::NEG_INFINITY;
            }
        }
        Ok(())
    }

    /// Takes the token that was drawn; past the end of the answer there is nothing to take but the token that closes it.
    pub(crate) fn take(&mut self, token: u32) -> Result<(), GivenUp> {
        if self.0.is_stopped() {
            return Ok(());
        }
        self.0.consume_token(token).map_err(GivenUp::new)
    }
}

/// The grammar went past a limit that keeps a hostile schema from taking all time and memory.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct GivenUp(String);

impl GivenUp {
    fn new(error: impl std::fmt::Display) -> Self {
        GivenUp(error.to_string().lines().next().unwrap_or_default().to_string())
    }
}

/// A tokenizer's tokens as bytes, in a tree.
pub(crate) struct Lexicon(ParserFactory);

impl Lexicon {
    /// Lays a tokenizer out for a model with so many logits.
    pub(crate) fn new(tokenizer: &Tokenizer, vocab: usize) -> Result<Self, EngineError> {
        let words = tokenizer.bytes(vocab)?;
        let ends: Vec<u32> = tokenizer.ends().filter(|id| (*id as usize) < vocab).collect();
        let Some(first) = ends.first() else {
            return Err(EngineError::request("the tokenizer has no token that ends an answer; schemas need one"));
        };
        let trie = TokTrie::from(&TokRxInfo::new(vocab as u32, *first), &words).with_eos_tokens(&ends);
        let factory = ParserFactory::new_simple(&(Arc::new(ApproximateTokEnv::new(trie)) as _));
        let mut factory =
            factory.map_err(|e| EngineError::request(format!("the tokenizer cannot be laid out for schemas: {e}")))?;
        // Its messages would repeat the answer.
        factory.quiet().limits_mut().verbose_errors = false;
        Ok(Lexicon(factory))
    }
}
