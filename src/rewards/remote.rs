//! Scores from a reward server: vLLM, SGLang, text-embeddings-inference, or any program that speaks the plain contract.
//!
//! Which numbers come back depends on the server's model and flags, so the operator says what they are: shares of [0, 1]
//! or logits. The number of scores and each of them is checked; what fails the check fails the scoring, never an answer.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::Item;
use super::http::{Asking, Caller, HttpError, check_url};
use super::scorer::Scale;
use crate::query_log::format::exclusion::INTERNAL_USER;
use crate::record::{Message, last_user_text};

/// A reward server.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// Address of the server without the route, such as `http://gpu-1:8000`; for `plain`, of the route itself.
    pub url: String,
    /// What the server speaks.
    pub route: Route,
    /// Name of the model at the server; empty where it serves one alone.
    #[serde(default)]
    pub model: String,
    /// What the scores are: shares of [0, 1], or logits. Servers that can do both are asked for these.
    #[serde(default)]
    pub scale: Scale,
    /// How `classify` writes a question and an answer as one text; `{question}` and `{answer}` stand for the two.
    #[serde(default = "default_text")]
    pub text: String,
    /// Answers in one request, where the route takes several. Range 1 to 1024.
    #[serde(default = "default_batch")]
    pub batch: usize,
    /// A text that names what the server runs (a model and its revision); another one is another reward. Required, since
    /// a server's weights cannot be hashed from here.
    pub version: String,
    /// How the server is asked.
    #[serde(default)]
    pub asking: Asking,
}

fn default_text() -> String {
    "{question}\n\n{answer}".into()
}

fn default_batch() -> usize {
    16
}

/// A route of a reward server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Route {
    /// vLLM's `/score`: question and answer as a pair, for cross-encoders.
    Score,
    /// vLLM's `/classify` and SGLang's `/v1/classify`: one text (`text`), one label.
    Classify,
    /// vLLM's `/pooling`: the conversation in the model's chat template, as reward models are served.
    Pooling,
    /// SGLang's `/classify` for reward models: one text (`text`), one number.
    SglangReward,
    /// text-embeddings-inference's `/predict`: question and answer as a pair.
    TeiPredict,
    /// text-embeddings-inference's `/rerank`: one question and its answers.
    TeiRerank,
    /// taod's own contract: `{"items": [{"messages", "response", "workload"}]}` is answered by `{"scores": [number, ...]}`.
    Plain,
}

impl Route {
    fn path(self) -> &'static str {
        match self {
            Route::Score => "/score",
            Route::Classify => "/v1/classify",
            Route::Pooling => "/pooling",
            Route::SglangReward => "/classify",
            Route::TeiPredict => "/predict",
            Route::TeiRerank => "/rerank",
            Route::Plain => "",
        }
    }
}

impl Settings {
    /// Checks every key; the message names key, value and remedy.
    pub fn validate(&self) -> Result<(), String> {
        check_url(&self.url)?;
        if self.version.is_empty() {
            return Err("version is empty: name the model and revision that the server runs".into());
        }
        if !(1..=1024).contains(&self.batch) {
            return Err(format!("batch = {}: choose 1 to 1024", self.batch));
        }
        if !self.text.contains("{answer}") {
            return Err(format!("text = {:?}: write {{answer}} where the answer goes", self.text));
        }
        self.asking.validate().map_err(|message| format!("asking.{message}"))
    }
}

/// A reward server that gave no usable scores.
#[derive(Debug, thiserror::Error)]
pub enum RemoteError {
    #[error(transparent)]
    Http(#[from] HttpError),
    #[error("{url} gives {found} scores where {asked} were asked for; is the route right for this server?")]
    Count { url: String, found: usize, asked: usize },
    #[error("{url} gives {value} as a score, which is not {wanted}; check scale, route and the model's labels")]
    Score { url: String, value: String, wanted: &'static str },
}

/// A client of a reward server.
pub(super) struct Remote {
    settings: Settings,
    url: String,
    caller: Caller,
}

/// Answers that one request asks about, by their places, and its body.
struct Request {
    places: Vec<usize>,
    body: Value,
}

impl Remote {
    pub(super) fn open(name: &str, settings: &Settings) -> Result<Self, RemoteError> {
        let url = format!("{}{}", settings.url.trim_end_matches('/'), settings.route.path());
        Ok(Remote { settings: settings.clone(), url, caller: Caller::open(name, &settings.asking)? })
    }

    pub(super) fn scale(&self) -> Scale {
        self.settings.scale
    }

    /// Returns what decides the scores as far as can be known from here.
    pub(super) fn identity(&self) -> String {
        let Settings { route, model, scale, text, version, .. } = &self.settings;
        json!([route, model, scale, text, version]).to_string()
    }

    /// Returns the raw score of each answer.
    pub(super) fn score(&self, items: &[&Item]) -> Result<Vec<f64>, RemoteError> {
        let requests = self.requests(items);
        let (bodies, places): (Vec<Value>, Vec<_>) = requests.into_iter().map(|r| (r.body, r.places)).unzip();
        let answers = self.caller.post_all(&self.url, &bodies)?;
        let mut scores = vec![0.0; items.len()];
        for (places, answer) in places.iter().zip(answers) {
            for (place, score) in places.iter().zip(self.read(&answer, places.len())?) {
                scores[*place] = score;
            }
        }
        Ok(scores)
    }

    fn requests(&self, items: &[&Item]) -> Vec<Request> {
        let batch = match self.settings.route {
            // One conversation a request: the route takes no list of them.
            Route::Pooling => 1,
            Route::TeiRerank => return self.reranks(items),
            _ => self.settings.batch,
        };
        let places: Vec<usize> = (0..items.len()).collect();
        let request = |places: &[usize]| {
            let items: Vec<&Item> = places.iter().map(|place| items[*place]).collect();
            Request { places: places.to_vec(), body: self.body(&items) }
        };
        places.chunks(batch).map(request).collect()
    }

    /// One question and its answers a request.
    fn reranks(&self, items: &[&Item]) -> Vec<Request> {
        let mut by_question: BTreeMap<String, Vec<usize>> = BTreeMap::new();
        for (place, item) in items.iter().enumerate() {
            by_question.entry(last_user_text(&item.messages)).or_default().push(place);
        }
        let request = |(query, places): (&String, &[usize])| {
            let texts: Vec<&str> = places.iter().map(|place| items[*place].response.as_str()).collect();
            let body = json!({ "query": query, "texts": texts, "raw_scores": self.raw(), "truncate": true });
            Request { places: places.to_vec(), body }
        };
        let parts = by_question
            .iter()
            .flat_map(|(query, places)| places.chunks(self.settings.batch).map(move |places| (query, places)));
        parts.map(request).collect()
    }

    fn raw(&self) -> bool {
        self.settings.scale == Scale::Logit
    }

    fn body(&self, items: &[&Item]) -> Value {
        let questions = || items.iter().map(|item| last_user_text(&item.messages)).collect::<Vec<_>>();
        let answers = || items.iter().map(|item| item.response.as_str()).collect::<Vec<_>>();
        let texts = || {
            let text = |item: &&Item| self.text(&last_user_text(&item.messages), &item.response);
            items.iter().map(text).collect::<Vec<_>>()
        };
        let (mut body, openai) = match self.settings.route {
            Route::Score => {
                (json!({ "text_1": questions(), "text_2": answers(), "use_activation": !self.raw() }), true)
            }
            Route::Classify => (json!({ "input": texts(), "use_activation": !self.raw() }), true),
            Route::SglangReward => (json!({ "text": texts() }), false),
            Route::Pooling => {
                let whole = |item: &&Item| {
                    let answer = Message::text("assistant", item.response.clone());
                    [item.messages.as_slice(), &[answer]].concat()
                };
                let messages = items.first().map(whole);
                let how =
                    json!({ "messages": messages, "add_generation_prompt": false, "use_activation": !self.raw() });
                (how, true)
            }
            Route::TeiPredict | Route::TeiRerank => {
                let pairs: Vec<_> = questions().into_iter().zip(answers()).map(|(q, a)| json!([q, a])).collect();
                (json!({ "inputs": pairs, "raw_scores": self.raw(), "truncate": true }), false)
            }
            Route::Plain => {
                let item = |item: &&Item| json!({ "messages": item.messages, "response": item.response, "workload": item.workload });
                (json!({ "items": items.iter().map(item).collect::<Vec<_>>() }), false)
            }
        };
        if openai {
            body["user"] = json!(INTERNAL_USER);
            // As much as the model takes: a text of the log that is longer must not fail a night.
            body["truncate_prompt_tokens"] = json!(-1);
        }
        if !self.settings.model.is_empty() {
            body["model"] = json!(self.settings.model);
        }
        body
    }

    fn text(&self, question: &str, answer: &str) -> String {
        // The answer goes in first, so that a `{answer}` in the question stays what it is.
        let parts: Vec<String> =
            self.settings.text.split("{answer}").map(|part| part.replace("{question}", question)).collect();
        parts.join(answer)
    }

    /// Reads the scores of one answer, in the order that was asked for.
    fn read(&self, answer: &Value, asked: usize) -> Result<Vec<f64>, RemoteError> {
        let list = match self.settings.route {
            Route::Score | Route::Classify | Route::Pooling => &answer["data"],
            Route::Plain => &answer["scores"],
            // SGLang answers one text without a list.
            Route::SglangReward if answer.is_object() => &json!([answer]),
            Route::SglangReward | Route::TeiPredict | Route::TeiRerank => answer,
        };
        let list = list.as_array().map(Vec::as_slice).unwrap_or_default();
        let mut scores: Vec<Option<f64>> = vec![None; asked];
        for (at, entry) in list.iter().enumerate() {
            let place = entry["index"].as_u64().map_or(at, |index| index as usize);
            if let Some(score @ None) = scores.get_mut(place) {
                *score = Some(self.number(entry)?);
            }
        }
        let scores: Option<Vec<f64>> = scores.into_iter().collect();
        match scores {
            Some(scores) if list.len() == asked => Ok(scores),
            _ => Err(RemoteError::Count { url: self.url.clone(), found: list.len(), asked }),
        }
    }

    fn number(&self, entry: &Value) -> Result<f64, RemoteError> {
        let found = match self.settings.route {
            Route::Score | Route::TeiRerank => &entry["score"],
            Route::Classify => only(&entry["probs"]),
            Route::Pooling => only(&entry["data"]),
            Route::SglangReward => only(&entry["embedding"]),
            Route::TeiPredict => &only(entry)["score"],
            Route::Plain => entry,
        };
        let number = found.as_f64().filter(|number| self.settings.scale.holds(*number));
        number.ok_or_else(|| RemoteError::Score {
            url: self.url.clone(),
            value: found.to_string().chars().take(40).collect(),
            wanted: self.settings.scale.wanted(),
        })
    }
}

/// Returns the one item of a list (however deep it lies in lists of one), and anything else as it is.
fn only(value: &Value) -> &Value {
    match value.as_array().map(Vec::as_slice) {
        Some([one]) => only(one),
        _ => value,
    }
}

#[cfg(test)]
mod tests;
