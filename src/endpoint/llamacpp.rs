//! llama.cpp's server: adapters are GGUF files that are named at its start, and a request or a global scale applies them.
//!
//! A new file comes in by a restart only. So a load waits: taod has written `<publish.folder>/<version>.gguf`, posts to
//! `endpoint.hook`, where something restarts the server with every file of the folder, and looks until the server lists
//! it. The stable name is any name that is no version: it gets the global scales, which one call sets, so that clients
//! are moved at once. That call is no compare-and-set; two daemons must not share a server. And it leaves what the server
//! remembers of prompts as it was, so that the server must remember none (docs/endpoints.md); the proof through the stable name asks
//! as clients do, and finds one that does.

use std::path::{Path, PathBuf};

use async_trait::async_trait;
use reqwest::Method;
use serde_json::{Value, json};

use super::hook::Hook;
use super::http::{Http, INTERNAL_USER};
use super::paths::PathMap;
use super::server::{Answers, Load, Question, Reply, Server};
use super::{EndpointError, Settings};

/// What [`LlamaCpp::alias`] says where more than one adapter is applied, as after a start without
/// `--lora-init-without-apply`.
const MIXED: &str = "several adapters at once";

/// What a server remembers of prompts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Memory {
    /// Every prompt is computed afresh.
    Nothing,
    /// Requests that ask for it (`cache_prompt`) go on from former prompts that are kept in memory (no `--cache-ram 0`).
    OnRequest,
    /// Every request goes on from former prompts (no `--no-cache-prompt`).
    Always,
    /// Its answers do not tell.
    Untold,
}

/// Two prompts that differ from their first word on, each longer than [`REMEMBERED`].
const PROMPTS: [&str; 2] = [
    "Which rivers of France end in the Atlantic, where do their sources lie, and how long is each of them?",
    "Name four planets without a moon or with few, and say for each of them how far it is from the sun.",
];
/// A prompt of which at most so many tokens are computed was remembered; what two prompts have in common, the chat template's
/// beginning, leaves more of it.
const REMEMBERED: u64 = 8;
/// Slots that are looked at; with more, what a slot kept may be taken for what lies beside them.
const MOST_SLOTS: u64 = 16;

/// Finds out what a server remembers, by asking it for one token each of a few prompts: its flags stand nowhere, but each answer
/// tells how many tokens of its prompt were computed.
pub(super) async fn memory(http: &Http, model: &str) -> Result<Memory, EndpointError> {
    let [one, other] = PROMPTS;
    computed(http, model, one, json!({})).await?;
    let again = computed(http, model, one, json!({})).await?;
    // Each slot has a prompt of its own; those that follow take all of them, so that only what is kept beside the slots is left.
    let props = http.json(Method::GET, "/props", None, "GET /props").await?;
    for slot in 0..props["total_slots"].as_u64().unwrap_or(1).min(MOST_SLOTS) {
        computed(http, model, &format!("{slot}. {other}"), json!({})).await?;
    }
    let asked = computed(http, model, one, json!({"cache_prompt": true})).await?;
    let Some((again, asked)) = again.zip(asked) else { return Ok(Memory::Untold) };
    Ok(match (again.computed < again.all, asked.computed <= REMEMBERED) {
        (true, _) => Memory::Always,
        (false, true) => Memory::OnRequest,
        (false, false) => Memory::Nothing,
    })
}

/// How many tokens of a prompt were computed for an answer, of how many.
struct Computed {
    computed: u64,
    all: u64,
}

async fn computed(http: &Http, model: &str, text: &str, more: Value) -> Result<Option<Computed>, EndpointError> {
    let mut body = json!({
        "model": model, "messages": [{"role": "user", "content": text}], "max_tokens": 1, "user": INTERNAL_USER,
    });
    if let (Some(body), Value::Object(more)) = (body.as_object_mut(), more) {
        body.extend(more);
    }
    let answer = http.json(Method::POST, "/v1/chat/completions", Some(&body), "a prompt that is asked twice").await?;
    let told = (answer["timings"]["prompt_n"].as_u64(), answer["usage"]["prompt_tokens"].as_u64());
    Ok(told.0.zip(told.1).map(|(computed, all)| Computed { computed, all }))
}

/// A client of one server.
pub(super) struct LlamaCpp {
    http: Http,
    hook: Hook,
    paths: PathMap,
    folder: PathBuf,
    base_model: String,
    stable_name: String,
}

/// One line of `/lora-adapters`.
#[derive(Debug, PartialEq)]
struct Loaded {
    id: u64,
    path: String,
    scale: f64,
}

impl Loaded {
    /// Returns the version that the file holds.
    fn name(&self) -> Option<&str> {
        Path::new(&self.path).file_stem()?.to_str()
    }
}

impl LlamaCpp {
    /// Returns a client for each of the endpoint's replicas.
    pub(super) fn replicas(settings: &Settings) -> Result<Vec<LlamaCpp>, EndpointError> {
        let hook = Hook::new(settings)?;
        let one = |http: Http| LlamaCpp {
            http,
            hook: hook.clone(),
            paths: PathMap::new(&settings.path_map),
            folder: settings.publish.folder.clone(),
            base_model: settings.base_model.clone(),
            stable_name: settings.stable_name.clone(),
        };
        Ok(Http::of(settings, &settings.urls)?.into_iter().map(one).collect())
    }

    async fn loaded(&self) -> Result<Vec<Loaded>, EndpointError> {
        let what = "GET /lora-adapters";
        let list = self.http.json(Method::GET, "/lora-adapters", None, what).await?;
        let one = |entry: &Value| {
            let (id, path, scale) = (entry["id"].as_u64()?, entry["path"].as_str()?, entry["scale"].as_f64()?);
            Some(Loaded { id, path: path.to_owned(), scale })
        };
        let entries = list.as_array().and_then(|entries| entries.iter().map(one).collect::<Option<Vec<_>>>());
        entries.ok_or_else(|| self.http.unexpected(what, "id, path and scale of each adapter"))
    }

    /// Returns the path by which the server knows a version's file.
    fn file(&self, name: &str) -> String {
        self.paths.seen(&self.folder.join(format!("{name}.gguf")))
    }

    /// Returns one scale for each adapter: 1 for `name`, 0 for the others.
    fn scales(loaded: &[Loaded], name: &str) -> Value {
        let scale = |one: &Loaded| json!({"id": one.id, "scale": if one.name() == Some(name) { 1.0 } else { 0.0 }});
        loaded.iter().map(scale).collect()
    }

    fn applied(&self, loaded: &[Loaded]) -> String {
        let on: Vec<&Loaded> = loaded.iter().filter(|one| one.scale != 0.0).collect();
        match on.as_slice() {
            [] => self.base_model.clone(),
            [one] if one.scale == 1.0 => one.name().unwrap_or(&one.path).to_owned(),
            _ => MIXED.to_owned(),
        }
    }
}

#[async_trait]
impl Answers for LlamaCpp {
    fn url(&self) -> &str {
        self.http.url()
    }

    async fn ask(&self, question: &Question<'_>) -> Result<Reply, EndpointError> {
        if question.model == self.stable_name {
            return self.http.chat(question, json!({})).await;
        }
        let loaded = self.loaded().await?;
        if question.model != self.base_model && !loaded.iter().any(|one| one.name() == Some(question.model)) {
            let (url, what) = (self.http.url().to_owned(), format!("a question to '{}'", question.model));
            let message = "it has no adapter of that name".to_owned();
            return Err(EndpointError::Status { url, what, status: 404, message });
        }
        // An empty list would mean the global scales, so each adapter is named. What the server remembers of a prompt may be
        // another adapter's.
        self.http.chat(question, json!({"lora": Self::scales(&loaded, question.model), "cache_prompt": false})).await
    }
}

#[async_trait]
impl Server for LlamaCpp {
    async fn load(&self, name: &str, folder: &Path, _how: Load) -> Result<(), EndpointError> {
        let before = self.applied(&self.loaded().await?);
        self.hook.load_and_wait(&self.http, self, name, folder, &self.file(name)).await?;
        // A restart forgets the scales; clients would get the base until the change is over.
        let now = self.applied(&self.loaded().await?);
        match now == before || before == MIXED {
            true => Ok(()),
            false => self.move_alias(&self.stable_name, Some(&now), &before).await,
        }
    }

    /// Does nothing: a file that is named at the start stays until the next one, with scale 0.
    async fn unload(&self, _name: &str) -> Result<(), EndpointError> {
        Ok(())
    }

    /// Returns no names: none of them can be unloaded.
    async fn names(&self) -> Result<Vec<String>, EndpointError> {
        self.loaded().await.map(|_| Vec::new())
    }

    async fn holds(&self, name: &str, _folder: &Path) -> Result<bool, EndpointError> {
        let file = self.file(name);
        Ok(self.loaded().await?.iter().any(|one| one.path == file))
    }

    async fn alias(&self, _name: &str) -> Result<Option<String>, EndpointError> {
        Ok(Some(self.applied(&self.loaded().await?)))
    }

    async fn move_alias(&self, name: &str, expected: Option<&str>, target: &str) -> Result<(), EndpointError> {
        let loaded = self.loaded().await?;
        let current = self.applied(&loaded);
        // A name that "does not exist" is one that leads to the base.
        if current != target && current != expected.unwrap_or(&self.base_model) {
            return Err(EndpointError::AliasMoved {
                url: self.http.url().to_owned(),
                name: name.to_owned(),
                current,
                expected: expected.unwrap_or(&self.base_model).to_owned(),
            });
        }
        let what = format!("the scales of '{target}'");
        let raw = self.http.change("/lora-adapters", &Self::scales(&loaded, target), &what).await?;
        if !raw.is_success() {
            return Err(self.http.refused(&raw, &what));
        }
        match self.applied(&self.loaded().await?) {
            now if now == target => Ok(()),
            now => Err(EndpointError::AliasMoved {
                url: self.http.url().to_owned(),
                name: name.to_owned(),
                current: now,
                expected: target.to_owned(),
            }),
        }
    }
}
