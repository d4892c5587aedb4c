//! Where a judge's model runs: on taod's engine, or on an OpenAI-compatible server.
//!
//! Either way one forward pass tells how much likelier one word is than another as the first word of the reply. Nothing is
//! sampled, so that a judge has no luck.

use serde_json::{Value, json};

use super::{JudgeError, Settings};
use crate::engine::{EngineError, Model, ScoreItem, logprobs};
use crate::query_log::format::exclusion::INTERNAL_USER;
use crate::record::Message;
use crate::rewards::http::Caller;

/// Tokens of prompts whose keys and values are held at once.
const HELD: usize = 4096;
/// Candidates for the first word that a server is asked for; the most that OpenAI's API gives.
const CANDIDATES: usize = 20;

/// Two words that a judge chooses between, each with the spellings that count as it.
pub(super) struct Choice {
    pub(super) first: &'static [&'static str],
    pub(super) second: &'static [&'static str],
}

pub(super) enum Backend {
    Local(Box<Model>),
    Server { url: String, model: String, caller: Caller },
}

impl Backend {
    pub(super) fn open(name: &str, settings: &Settings, base: Option<&Model>) -> Result<Self, JudgeError> {
        if settings.url.is_empty() {
            let model = base.map_or_else(|| Model::load(&settings.model), |base| base.load_beside(&settings.model))?;
            model.prompt_ids(&[Message::text("user", "?")], None)?;
            return Ok(Backend::Local(Box::new(model)));
        }
        let url = format!("{}/v1/chat/completions", settings.url.trim_end_matches('/'));
        Ok(Backend::Server { url, model: settings.model.clone(), caller: Caller::open(name, &settings.asking)? })
    }

    /// Returns what decides the answers as far as can be known from here.
    pub(super) fn identity(&self, version: &str) -> Value {
        match self {
            Backend::Local(model) => match model.computed_on() {
                None => json!(model.identity()),
                Some(device) => json!([model.identity(), device]),
            },
            Backend::Server { model, .. } => json!([model, version]),
        }
    }

    /// Returns the hash of the weights, where they are here.
    pub(super) fn weights(&self) -> Option<String> {
        match self {
            Backend::Local(model) => Some(model.identity().sha256.clone()),
            Backend::Server { .. } => None,
        }
    }

    /// Returns true where the model here reads the whole prompt.
    pub(super) fn fits(&self, prompt: &Message) -> Result<bool, JudgeError> {
        match self {
            Backend::Local(model) => Ok(self.ids(model, prompt)?.len() + 8 <= model.config().max_positions),
            Backend::Server { .. } => Ok(true),
        }
    }

    /// Returns ln p(first word) - ln p(second word) for each prompt.
    pub(super) fn log_odds(&self, prompts: &[Message], choice: &Choice) -> Result<Vec<f64>, JudgeError> {
        match self {
            Backend::Local(model) => self.local(model, prompts, choice),
            Backend::Server { url, model, caller } => {
                let body = |prompt: &Message| {
                    json!({
                        "model": model, "messages": [prompt], "max_tokens": 1, "temperature": 0.0, "logprobs": true,
                        "top_logprobs": CANDIDATES, "user": INTERNAL_USER,
                    })
                };
                let bodies: Vec<Value> = prompts.iter().map(body).collect();
                let answers = caller.post_all(url, &bodies)?;
                answers.iter().map(|answer| read(url, answer, choice)).collect()
            }
        }
    }

    fn ids(&self, model: &Model, prompt: &Message) -> Result<Vec<u32>, EngineError> {
        let text = Message::text(prompt.role.clone(), model.tokenizer().defuse(&prompt.plain_text()));
        model.prompt_ids(&[text], None)
    }

    fn local(&self, model: &Model, prompts: &[Message], choice: &Choice) -> Result<Vec<f64>, JudgeError> {
        let encode =
            |words: &[&str]| words.iter().map(|word| model.tokenizer().encode(word)).collect::<Result<Vec<_>, _>>();
        let (first, second) = (encode(choice.first)?, encode(choice.second)?);
        let ids: Vec<Vec<u32>> = prompts.iter().map(|prompt| self.ids(model, prompt)).collect::<Result<_, _>>()?;
        let mut odds = Vec::with_capacity(prompts.len());
        let mut rest = ids.as_slice();
        while !rest.is_empty() {
            let held = |n: &usize| rest[..*n].iter().map(Vec::len).sum::<usize>() <= HELD;
            let (batch, tail) = rest.split_at((2..=rest.len()).take_while(held).last().unwrap_or(1));
            rest = tail;
            let words = || first.iter().chain(&second);
            let items: Vec<ScoreItem> = batch
                .iter()
                .flat_map(|prompt| words().map(move |completion| ScoreItem { prompt, completion }))
                .collect();
            let scored = logprobs(model, None, &items)?;
            for words in scored.chunks_exact(first.len() + second.len()) {
                let words: Vec<f64> = words.iter().map(|tokens| tokens.iter().map(|t| f64::from(*t)).sum()).collect();
                let (first, second) = words.split_at(first.len());
                odds.push(log_sum(first) - log_sum(second));
            }
        }
        Ok(odds)
    }
}

/// Reads the odds of a server's first token. A word that is not among the candidates is taken to be as likely as the
/// least of them: no more than that it can be.
fn read(url: &str, answer: &Value, choice: &Choice) -> Result<f64, JudgeError> {
    let listed = answer.pointer("/choices/0/logprobs/content/0/top_logprobs").and_then(Value::as_array);
    let Some(listed) = listed.filter(|listed| !listed.is_empty()) else {
        return Err(JudgeError::NoLogprobs { url: url.to_owned() });
    };
    let candidates: Option<Vec<(&str, f64)>> = listed
        .iter()
        .map(|entry| Some((entry["token"].as_str()?.trim(), entry["logprob"].as_f64().filter(|l| l.is_finite())?)))
        .collect();
    let candidates = candidates.ok_or_else(|| JudgeError::NoLogprobs { url: url.to_owned() })?;
    let least = candidates.iter().map(|(_, logprob)| *logprob).fold(0.0, f64::min);
    let of = |words: &[&str]| {
        let found: Vec<f64> = candidates
            .iter()
            .filter(|(token, _)| words.iter().any(|word| word.trim() == *token))
            .map(|(_, l)| *l)
            .collect();
        if found.is_empty() { least } else { log_sum(&found) }
    };
    Ok(of(choice.first) - of(choice.second))
}

fn log_sum(logprobs: &[f64]) -> f64 {
    let largest = logprobs.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    largest + logprobs.iter().map(|l| (l - largest).exp()).sum::<f64>().ln()
}

#[cfg(test)]
mod tests {
    use super::super::YES_NO;
    use super::*;

    fn answer(candidates: &[(&str, f64)]) -> Value {
        let listed: Vec<Value> = candidates.iter().map(|(t, l)| json!({ "token": t, "logprob": l })).collect();
        json!({ "choices": [{ "logprobs": { "content": [{ "top_logprobs": listed }] } }] })
    }

    #[test]
    fn spellings_of_a_word_count_together_and_an_absent_word_as_the_least() {
        let both = answer(&[("Yes", 0.5f64.ln()), (" yes", 0.25f64.ln()), ("No", 0.125f64.ln()), ("the", 0.1f64.ln())]);
        assert!((read("u", &both, &YES_NO).unwrap() - 6f64.ln()).abs() < 1e-12);
        let one = answer(&[("yes", 0.8f64.ln()), ("the", 0.1f64.ln())]);
        assert!((read("u", &one, &YES_NO).unwrap() - 8f64.ln()).abs() < 1e-12);
        let neither = answer(&[("the", -0.1), ("a", -3.0)]);
        assert_eq!(read("u", &neither, &YES_NO).unwrap(), 0.0);
    }

    #[test]
    fn a_server_that_tells_no_logprobs_is_named() {
        for odd in [json!({ "choices": [{ "message": { "content": "yes" } }] }), answer(&[]), json!([])] {
            let message = read("http://judge", &odd, &YES_NO).unwrap_err().to_string();
            assert!(message.contains("http://judge") && message.contains("logprobs"), "{message}");
        }
    }
}
