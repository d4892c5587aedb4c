//! Answers of the base model from an OpenAI-compatible server (vLLM, SGLang, LiteLLM, `taod serve`), such as one on a GPU.
//!
//! One request asks for all answers to a prompt, so that the server reads the prompt once. Where the server tells token ids
//! (`return_token_ids`), those are trained on and its reading of the prompt is compared with ours: a server with another
//! chat template is refused. Where it does not, the text is tokenised again and the log-probs are unknown, which is
//! enough for likelihood and preferences, and for nothing else. A chunk that was answered is not asked for again.

use std::path::PathBuf;
use std::time::Duration;

use futures::StreamExt;
use reqwest::{Client, StatusCode};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::runtime::Runtime;

use super::{Candidate, CandidateError, Draw, PLAIN, Stream, write_sampling};
use crate::dataset::Prompt;
use crate::engine::{Grammar, Model, first_stop};
use crate::progress::Step;
use crate::query_log::format::exclusion::{INTERNAL_HEADER, INTERNAL_USER};
use crate::record::{FinishReason, derive_seed};
use crate::secret::{self, Secret};

/// A pause before a request is sent again, doubled with each.
const PAUSE: Duration = Duration::from_millis(200);
/// The longest pause is two to this power of the first.
const LONGEST_PAUSE: u32 = 7;
/// The longest piece of a server's message that is repeated in ours, in characters.
const MAX_MESSAGE: usize = 300;

/// A server that samples from the base model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// Address of an OpenAI-compatible server that answers with the base model, such as `http://gpu-1:8000`; empty: this
    /// machine samples. Only the first iteration asks it: later ones sample from their own adapter, here.
    pub url: String,
    /// Name of the base model at that server.
    pub model: String,
    /// File with the server's API key; empty: none.
    pub api_key_file: PathBuf,
    /// Prompts that are asked at the same time. Range 1 to 1024.
    pub concurrency: usize,
    /// How often one request is sent again after a broken connection or a busy answer. Range 0 to 20.
    pub retries: u32,
    /// How long one request may take, in seconds; it answers all samples of a prompt. Range 1 to 86400.
    pub timeout_s: u64,
}

impl Default for Settings {
    fn default() -> Self {
        Settings {
            url: String::new(),
            model: String::new(),
            api_key_file: PathBuf::new(),
            concurrency: 16,
            retries: 5,
            timeout_s: 600,
        }
    }
}

impl Settings {
    /// Returns true where a server is named.
    pub fn is_on(&self) -> bool {
        !self.url.is_empty()
    }

    /// Checks every key; the message names key, value and remedy.
    pub fn validate(&self) -> Result<(), String> {
        if self.is_on() && !self.url.starts_with("http://") && !self.url.starts_with("https://") {
            return Err(format!("url = {:?}: begin it with http:// or https://", self.url));
        }
        if self.is_on() && self.model.is_empty() {
            return Err("model is empty: give the base model's name at remote.url, see its /v1/models".to_owned());
        }
        let ranges = [
            ("concurrency", self.concurrency as u64, 1, 1024),
            ("retries", u64::from(self.retries), 0, 20),
            ("timeout_s", self.timeout_s, 1, 86_400),
        ];
        match ranges.into_iter().find(|(_, value, low, high)| !(low..=high).contains(&value)) {
            Some((key, value, low, high)) => Err(format!("{key} = {value}: choose {low} to {high}")),
            None => Ok(()),
        }
    }
}

/// A client of the server, with a runtime of its own: sampling is called where nothing is async.
pub(super) struct Remote<'a> {
    settings: &'a Settings,
    client: Client,
    key: Option<Secret>,
    runtime: Runtime,
}

impl<'a> Remote<'a> {
    pub(super) fn open(settings: &'a Settings) -> Result<Self, CandidateError> {
        let fail = |what: String| CandidateError::Remote { url: settings.url.clone(), what };
        let key = secret::read("candidates.remote.api_key", Some(&settings.api_key_file));
        let client = Client::builder().timeout(Duration::from_secs(settings.timeout_s)).build();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        Ok(Remote {
            settings,
            client: client.map_err(|e| fail(e.to_string()))?,
            key: key.map_err(|e| fail(e.to_string()))?,
            runtime: runtime.map_err(|e| fail(e.to_string()))?,
        })
    }

    /// Draws answers to each prompt, as [`super::draw()`] does.
    pub(super) fn draw(
        &self,
        model: &Model,
        prompts: &[&Prompt],
        how: &Draw,
        stream: Stream<'_>,
        step: &mut Step,
    ) -> Result<Vec<Vec<Candidate>>, CandidateError> {
        let mut asked = Vec::new();
        for (index, prompt) in prompts.iter().enumerate() {
            let Some(ids) = model.readable_ids(&prompt.messages, prompt.tools.as_ref())? else { continue };
            if ids.len() + how.sampling.max_tokens <= model.config().max_positions {
                let seed = derive_seed(stream.seed, &[stream.name, stream.sampler, &prompt.prompt_hash]);
                // Servers take a seed as a signed number.
                let format = prompt.workload.as_ref().and_then(|workload| how.formats.get(workload));
                asked.push(Asked { index, prompt, ids, format, seed: seed >> 1 });
            }
        }
        let mut drawn: Vec<Vec<Candidate>> = prompts.iter().map(|_| Vec::new()).collect();
        let mut refused = Vec::new();
        self.runtime.block_on(async {
            let answers = futures::stream::iter(&asked).map(async |asked| (asked, self.ask(asked, how).await));
            let mut answers = std::pin::pin!(answers.buffered(self.settings.concurrency));
            while let Some((asked, answer)) = answers.next().await {
                let answers = match answer.and_then(|answer| self.read(&answer, asked, model, how, stream)) {
                    Err(CandidateError::Prompt(what)) => {
                        refused.push(what);
                        continue;
                    }
                    answers => answers?,
                };
                let tokens = answers.iter().map(|candidate| candidate.token_ids.len() as u64).sum();
                step.advance(tokens, "");
                drawn[asked.index] = answers;
            }
            Ok::<(), CandidateError>(())
        })?;
        // One prompt may be at fault; all of them are not.
        match refused.pop() {
            Some(what) if !refused.is_empty() && drawn.iter().all(Vec::is_empty) => return Err(self.fault(what)),
            Some(what) => {
                tracing::warn!(prompts = refused.len() + 1, what, "prompts that the server refuses are left out")
            }
            None => {}
        }
        Ok(drawn)
    }

    /// Sends one request, again after what may pass.
    async fn ask(&self, asked: &Asked<'_>, how: &Draw) -> Result<Value, CandidateError> {
        let mut body = json!({
            "model": self.settings.model,
            "messages": asked.prompt.messages,
            "n": how.samples,
            "seed": asked.seed,
            "logprobs": true,
            "return_token_ids": true,
            "user": INTERNAL_USER,
        });
        write_sampling(&mut body, &how.sampling);
        if let Some(format) = asked.format {
            let schema = json!({"name": "answer", "schema": format.schema(), "strict": true});
            body["response_format"] = json!({"type": "json_schema", "json_schema": schema});
        }
        if let Some(tools) = &asked.prompt.tools {
            body["tools"] = json!(tools);
        }
        let mut tries = 0;
        loop {
            let what = match self.send(&body).await {
                Ok((status, text)) if status.is_success() => {
                    return serde_json::from_str(&text).map_err(|_| self.fault("its answer is not JSON"));
                }
                Ok((status, text)) => {
                    let passes = status == StatusCode::TOO_MANY_REQUESTS || status.is_server_error();
                    let said: String = text.split_whitespace().collect::<Vec<_>>().join(" ");
                    let said: String = said.chars().take(MAX_MESSAGE).collect();
                    if matches!(status.as_u16(), 400 | 413 | 422) {
                        return Err(CandidateError::Prompt(format!("it answers {status}: {said}")));
                    }
                    if !passes {
                        return Err(self.fault(format!("it answers {status}: {said}")));
                    }
                    format!("it answers {status}: {said}")
                }
                Err(error) => error.to_string(),
            };
            if tries == self.settings.retries {
                return Err(self.fault(format!("{what} (asked {} times)", tries + 1)));
            }
            tokio::time::sleep(PAUSE * (1 << tries.min(LONGEST_PAUSE))).await;
            tries += 1;
        }
    }

    async fn send(&self, body: &Value) -> Result<(StatusCode, String), reqwest::Error> {
        let url = format!("{}/v1/chat/completions", self.settings.url.trim_end_matches('/'));
        let mut request = self.client.post(url).header(INTERNAL_HEADER, "1").json(body);
        if let Some(key) = &self.key {
            request = request.bearer_auth(key.expose());
        }
        let response = request.send().await?;
        Ok((response.status(), response.text().await?))
    }

    /// Reads the answers to a prompt.
    fn read(
        &self,
        answer: &Value,
        asked: &Asked,
        model: &Model,
        how: &Draw,
        stream: Stream<'_>,
    ) -> Result<Vec<Candidate>, CandidateError> {
        if ids(&answer["prompt_token_ids"]).is_some_and(|read| read != asked.ids) {
            return Err(self.fault(format!(
                "it reads prompt {} as other tokens than taod: serve the same tokenizer and chat template",
                asked.prompt.prompt_hash
            )));
        }
        let choices = answer["choices"].as_array().map(Vec::as_slice).unwrap_or_default();
        if choices.len() != how.samples {
            return Err(self.fault(format!("it gives {} answers where {} were asked for", choices.len(), how.samples)));
        }
        let is_plain = asked.format.is_none() && how.sampling.is_plain();
        let candidate = |(sample, choice): (usize, &Value)| {
            let Said { text, token_ids, logprobs, finish_reason } = self.said(choice, model, &how.sampling.stop)?;
            Ok(Candidate {
                prompt_hash: asked.prompt.prompt_hash.clone(),
                cluster: asked.prompt.cluster.clone(),
                workload: asked.prompt.workload.clone(),
                sample,
                seed: asked.seed,
                sampler: stream.sampler.to_owned(),
                strategy: PLAIN.to_owned(),
                text,
                prompt_ids: asked.ids.clone(),
                token_ids,
                // Of what it drew from, a server tells nothing but the plain distribution.
                sampler_logprobs: if is_plain { logprobs.clone() } else { Vec::new() },
                logprobs,
                finish_reason,
                approximate: true,
            })
        };
        choices.iter().enumerate().map(candidate).collect()
    }

    fn said(&self, choice: &Value, model: &Model, stop: &[String]) -> Result<Said, CandidateError> {
        let text = choice["message"]["content"].as_str().unwrap_or_default().to_owned();
        let finish_reason = match choice["finish_reason"].as_str() {
            Some("stop") => FinishReason::Stop,
            Some("length") => FinishReason::Length,
            other => {
                let what = format!("an answer of it ends for {}, not stop or length", other.unwrap_or("no reason"));
                return Err(CandidateError::Prompt(what));
            }
        };
        let content = choice["logprobs"]["content"].as_array();
        let logprobs = content.and_then(|list| list.iter().map(|entry| entry["logprob"].as_f64()).collect());
        let logprobs: Option<Vec<f64>> = logprobs;
        let told = ids(&choice["token_ids"]).zip(logprobs).filter(|(ids, logs)| ids.len() == logs.len());
        let tokenizer = model.tokenizer();
        let closes = |ids: &[u32]| {
            let closed = ids.last().is_some_and(|last| tokenizer.is_end(*last));
            closed || first_stop(&tokenizer.decode(ids), stop).is_some()
        };
        let (token_ids, logprobs) = match told {
            Some((ids, logs)) if closes(&ids) == (finish_reason == FinishReason::Stop) => {
                (ids, logs.into_iter().map(|log| log as f32).collect())
            }
            // Without its ids, or without the token that closed the turn, its log-probs belong to no token of ours.
            _ => (tokenizer.answer_ids(&text, finish_reason == FinishReason::Stop)?, Vec::new()),
        };
        Ok(Said { text, token_ids, logprobs, finish_reason })
    }

    fn fault(&self, what: impl Into<String>) -> CandidateError {
        CandidateError::Remote { url: self.settings.url.clone(), what: what.into() }
    }
}

/// A prompt that is asked about.
struct Asked<'a> {
    index: usize,
    prompt: &'a Prompt,
    ids: Vec<u32>,
    format: Option<&'a Grammar>,
    seed: u64,
}

/// One answer.
struct Said {
    text: String,
    token_ids: Vec<u32>,
    logprobs: Vec<f32>,
    finish_reason: FinishReason,
}

fn ids(value: &Value) -> Option<Vec<u32>> {
    value.as_array()?.iter().map(|id| u32::try_from(id.as_u64()?).ok()).collect()
}
