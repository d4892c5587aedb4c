//! The server on a real engine, with a tiny random model and its adapter.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::mpsc::UnboundedReceiver;

use super::*;
use crate::engine::{self, ScoreItem};
use crate::record::Message;
use crate::serve::job::Penalties;
use crate::serve::{CallLog, serve};

struct Real {
    url: String,
    client: reqwest::Client,
    adapters: tempfile::TempDir,
}

fn fixture(name: &str) -> PathBuf {
    [env!("CARGO_MANIFEST_DIR"), "tests", "fixtures", "models", name].iter().collect()
}

fn model() -> Model {
    Model::load(fixture("tiny-llama").to_str().unwrap()).unwrap()
}

impl Real {
    /// Serves the tiny model; an adapter folder `good` lies where adapters may be loaded from.
    async fn start(settings: Settings) -> Real {
        let adapters = tempfile::tempdir().unwrap();
        let real = Real { url: String::new(), client: reqwest::Client::new(), adapters };
        real.copy_adapter("good");
        let settings =
            Settings { base_model: "base".into(), adapter_root: real.adapters.path().to_owned(), ..settings };
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        tokio::spawn(async move {
            serve(listener, model(), &settings, CallLog::None, std::future::pending()).await.unwrap();
        });
        Real { url, ..real }
    }

    fn copy_adapter(&self, name: &str) -> PathBuf {
        let folder = self.adapters.path().join(name);
        std::fs::create_dir_all(&folder).unwrap();
        for entry in std::fs::read_dir(fixture("tiny-llama-lora")).unwrap() {
            let path = entry.unwrap().path();
            std::fs::copy(&path, folder.join(path.file_name().unwrap())).unwrap();
        }
        folder
    }

    async fn load(&self, name: &str) -> (u16, String) {
        let path = self.adapters.path().join(name);
        let body = json!({"lora_name": name, "lora_path": path});
        let response = self.client.post(format!("{}/v1/load_lora_adapter", self.url)).json(&body).send();
        let response = response.await.unwrap();
        (response.status().as_u16(), response.text().await.unwrap())
    }

    async fn ask(&self, model: &str, text: &str, extra: Value) -> (u16, Value) {
        let mut body = json!({"model": model, "messages": [{"role": "user", "content": text}], "max_tokens": 12,
            "logprobs": true, "return_token_ids": true});
        body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        let response = self.client.post(format!("{}/v1/chat/completions", self.url)).json(&body).send();
        let response = response.await.unwrap();
        (response.status().as_u16(), response.json().await.unwrap())
    }
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

/// Returns the largest difference between the served log-probs and those of a forward pass over the same tokens.
fn difference(model: &Model, adapter: Option<&Adapter>, body: &Value, choice: &Value) -> f64 {
    let (prompt, completion) = (ids(&body["prompt_token_ids"]), ids(&choice["token_ids"]));
    let items = [ScoreItem { prompt: &prompt, completion: &completion }];
    let local = engine::logprobs(model, adapter, &items).unwrap().remove(0);
    let served = choice["logprobs"]["content"].as_array().unwrap();
    assert_eq!(local.len(), served.len());
    let gap = |(a, b): (&f32, &Value)| (f64::from(*a) - b["logprob"].as_f64().unwrap()).abs();
    local.iter().zip(served).map(gap).fold(0.0, f64::max)
}

#[tokio::test(flavor = "multi_thread")]
async fn each_request_is_answered_by_the_model_it_names() {
    let real = Arc::new(Real::start(Settings::default()).await);
    assert_eq!(real.load("good").await.0, 200);
    let model = model();
    let adapter = Adapter::load(&fixture("tiny-llama-lora"), &model).unwrap();
    let asked = (0..8).map(|i| {
        let real = real.clone();
        let name = if i % 2 == 0 { "base" } else { "good" };
        tokio::spawn(async move { real.ask(name, &format!("question {i}"), json!({"n": 2, "seed": i})).await })
    });
    let (mut other, mut samples_differ) = (0.0f64, false);
    for (i, task) in asked.collect::<Vec<_>>().into_iter().enumerate() {
        let (status, body) = task.await.unwrap();
        assert_eq!(status, 200, "{body}");
        let (right, wrong) = if i % 2 == 0 { (None, Some(&adapter)) } else { (Some(&adapter), None) };
        for choice in body["choices"].as_array().unwrap() {
            assert!(difference(&model, right, &body, choice) < 1e-3);
            other = other.max(difference(&model, wrong, &body, choice));
        }
        let name = if i % 2 == 0 { "base" } else { "good" };
        let alone = real.ask(name, &format!("question {i}"), json!({"n": 2, "seed": i})).await.1;
        for sample in 0..2 {
            assert_eq!(alone["choices"][sample]["token_ids"], body["choices"][sample]["token_ids"], "a seed decides");
        }
        samples_differ |= body["choices"][0]["token_ids"] != body["choices"][1]["token_ids"];
    }
    assert!(other > 1e-2 && samples_differ, "the test's models must differ, by {other}");
}

/// A request of `samples` samples for the base or an adapter, and what comes of it.
fn job(adapter: Option<&str>, samples: usize, max_tokens: usize) -> (Job, UnboundedReceiver<Event>) {
    let (events, received) = tokio::sync::mpsc::unbounded_channel();
    let sampling = Sampling {
        temperature: 1.0,
        top_p: 1.0,
        top_k: 0,
        min_p: 0.0,
        penalties: Penalties { repetition: 1.0, presence: 0.0, frequency: 0.0 },
        max_tokens: Some(max_tokens),
        samples,
        stop: Vec::new(),
        format: Format::Text,
    };
    let place = Arc::new(tokio::sync::Semaphore::new(1)).try_acquire_owned().unwrap();
    let messages = vec![Message::text("user", "who are you?")];
    let (adapter, seeds) = (adapter.map(str::to_owned), (0..samples as u64).collect());
    (Job { adapter, messages, tools: None, sampling, seeds, events, _place: place }, received)
}

/// Returns the tokens that have come of a request.
fn tokens(received: &mut UnboundedReceiver<Event>) -> Vec<u32> {
    let events = std::iter::from_fn(|| received.try_recv().ok());
    events.filter_map(|event| if let Event::Token { token, .. } = event { Some(token.id) } else { None }).collect()
}

#[test]
fn requests_of_different_adapters_are_decoded_in_one_batch_and_join_it_at_any_step() {
    let (model, settings) = (model(), Settings::default());
    let mut engine = Engine::new(&model, &settings).unwrap();
    let adapter = engine.load(&fixture("tiny-llama-lora")).unwrap();
    engine.adapters.insert("good".into(), adapter);
    let alone = |adapter, max_tokens| {
        let mut engine = Engine::new(&model, &settings).unwrap();
        engine.adapters.insert("good".into(), engine.load(&fixture("tiny-llama-lora")).unwrap());
        let (job, mut received) = job(adapter, 1, max_tokens);
        engine.accept(job);
        while !engine.running.is_empty() {
            engine.advance();
        }
        tokens(&mut received)
    };
    let (long, mut of_base) = job(None, 1, 12);
    engine.accept(long);
    engine.advance();
    let (late, mut of_good) = job(Some("good"), 1, 12);
    engine.accept(late);
    engine.advance();
    let (base, good) = (tokens(&mut of_base), tokens(&mut of_good));
    assert_eq!((base.len(), good.len()), (2, 1), "one step gives each request a token");
    // Unloaded, the adapter still answers what was accepted in its name.
    engine.obey(Command::Unload { name: "good".into() });
    while !engine.running.is_empty() {
        engine.advance();
    }
    assert_eq!([base, tokens(&mut of_base)].concat(), alone(None, 12));
    assert_eq!([good, tokens(&mut of_good)].concat(), alone(Some("good"), 12));
    assert_ne!(alone(None, 12), alone(Some("good"), 12));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_keeps_the_format_that_is_asked_for() {
    let real = Real::start(Settings::default()).await;
    let schema = json!({"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"],
        "additionalProperties": false});
    let format = |schema: &Value| json!({"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}});
    let wish = json!({"response_format": format(&schema), "n": 3, "max_tokens": 100, "seed": 3});
    let (status, body) = real.ask("base", "hi", wish).await;
    assert_eq!(status, 200, "{body}");
    for choice in body["choices"].as_array().unwrap() {
        let value: Value = serde_json::from_str(choice["message"]["content"].as_str().unwrap()).unwrap();
        assert!(value["ok"].is_boolean() && value.as_object().unwrap().len() == 1, "{value}");
        assert_eq!(choice["finish_reason"], "stop");
    }
    let (_, body) = real.ask("base", "hi", json!({"response_format": {"type": "json_object"}})).await;
    assert!(body["choices"][0]["message"]["content"].as_str().unwrap().starts_with('{'), "{body}");
    let (status, body) = real.ask("base", "hi", json!({"response_format": format(&json!({"type": "nothing"}))})).await;
    assert_eq!((status, &body["error"]["param"]), (400, &json!("response_format")), "{body}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_does_not_fit_is_refused_and_the_default_fills_the_context() {
    let real = Real::start(Settings::default()).await;
    let context = model().config().max_positions;
    let (status, body) = real.ask("base", &"word ".repeat(context), json!({})).await;
    assert!(status == 400 && body["error"]["message"].as_str().unwrap().contains("maximum context length"), "{body}");
    let (status, body) = real.ask("base", "hi", json!({"max_tokens": null, "temperature": 0})).await;
    let (prompt, choice) = (ids(&body["prompt_token_ids"]).len(), &body["choices"][0]);
    let new = ids(&choice["token_ids"]);
    assert_eq!((status, body["usage"]["completion_tokens"].as_u64()), (200, Some(new.len() as u64)));
    match choice["finish_reason"].as_str() {
        Some("length") => assert_eq!(prompt + new.len(), context),
        _ => assert!(model().tokenizer().is_end(*new.last().unwrap())),
    }
    assert_eq!(model().prompt_ids(&[Message::text("user", "hi")], None).unwrap().len(), prompt);
    let real = Real::start(Settings { cache_mib: 0, ..Settings::default() }).await;
    let (status, body) = real.ask("base", "hi", json!({})).await;
    assert_eq!((status, &body["error"]["param"]), (400, &json!("messages")));
    assert!(body["error"]["message"].as_str().unwrap().contains("more than cache_mib = 0; raise it"), "{body}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_adapter_that_cannot_be_used_is_a_500_and_changes_nothing() {
    let real = Real::start(Settings { max_lora_rank: 1, ..Settings::default() }).await;
    let (status, body) = real.load("good").await;
    assert!(status == 500 && body.contains("is greater than max_lora_rank 1."), "{body}");
    let folder = real.copy_adapter("cut");
    std::fs::write(folder.join("adapter_model.safetensors"), b"short").unwrap();
    let (status, body) = real.load("cut").await;
    assert!(status == 500 && body.contains("Worker failed with error '"), "{body}");
    assert_eq!(real.ask("cut", "hi", json!({})).await.0, 404);
    assert_eq!(real.ask("base", "hi", json!({})).await.0, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_goes_away_frees_its_place() {
    let real = Real::start(Settings { max_requests: 1, ..Settings::default() }).await;
    let body = json!({"model": "base", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 400,
        "n": 16, "stream": true, "temperature": 2.0});
    let response = real.client.post(format!("{}/v1/chat/completions", real.url)).json(&body).send().await.unwrap();
    drop(response);
    let mut last = 0;
    for _ in 0..100 {
        last = real.ask("base", "hi", json!({"max_tokens": 1})).await.0;
        if last == 200 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert_eq!(last, 200);
}
