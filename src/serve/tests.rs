//! The server over HTTP, with a stand-in for the engine's thread: it answers `VOICE: QUESTION`, one byte a token.

use std::collections::HashMap;
use std::sync::mpsc::{self, Receiver};
use std::sync::{Arc, Mutex};

use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::message::{Headers, Message as _};
use serde_json::{Value, json};

use super::*;
use crate::engine::{Completion, first_stop};
use crate::record::{FinishReason, last_user_text};
use api::Sampled;
use emit::{Emitter, Wish};
use job::{Event, Job, Refusal, room};

pub(crate) const CONTEXT: usize = 120;
const END: u32 = 256;

/// A server with the stand-in behind it; it stops when this is dropped.
pub(crate) struct Fake {
    pub(crate) url: String,
    /// Hold this lock to keep the engine from answering.
    pub(crate) busy: Arc<Mutex<()>>,
    stop: Option<oneshot::Sender<()>>,
    serving: Option<tokio::task::JoinHandle<()>>,
    pub(crate) adapters: Arc<tempfile::TempDir>,
}

impl Fake {
    pub(crate) async fn start() -> Fake {
        Fake::with(Settings::default(), CallLog::None).await
    }

    /// Starts a replica that sees the same adapter folders as `other`.
    pub(crate) async fn beside(other: &Fake) -> Fake {
        let settings = Settings { adapter_root: other.adapters.path().to_owned(), ..Settings::default() };
        Fake::over(settings, CallLog::None, other.adapters.clone()).await
    }

    pub(crate) async fn with(mut settings: Settings, log: CallLog) -> Fake {
        let adapters = Arc::new(tempfile::tempdir().unwrap());
        settings.adapter_root = adapters.path().to_owned();
        Fake::over(settings, log, adapters).await
    }

    async fn over(settings: Settings, log: CallLog, adapters: Arc<tempfile::TempDir>) -> Fake {
        let (engine, commands) = mpsc::channel();
        let busy = Arc::new(Mutex::new(()));
        let lock = busy.clone();
        std::thread::spawn(move || engine_thread(&commands, &lock));
        let base = Base { name: "base".into(), root: "/models/base".into(), context: CONTEXT };
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let (stop, stopped) = oneshot::channel::<()>();
        let shutdown = async { stopped.await.unwrap_or_default() };
        let serving =
            tokio::spawn(async move { run(listener, &base, &settings, log, engine, shutdown).await.unwrap() });
        Fake { url, busy, stop: Some(stop), serving: Some(serving), adapters }
    }

    /// Makes an adapter folder whose stand-in speaks with `voice`.
    pub(crate) fn adapter(&self, voice: &str, rank: usize) -> String {
        let folder = self.adapters.path().join(voice);
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(folder.join("adapter_config.json"), json!({"voice": voice, "r": rank}).to_string()).unwrap();
        folder.to_str().unwrap().to_owned()
    }

    pub(crate) async fn call(&self, method: &str, path: &str, body: &Value) -> (u16, String) {
        let method = reqwest::Method::from_bytes(method.as_bytes()).unwrap();
        let request = reqwest::Client::new().request(method, format!("{}{path}", self.url));
        let response = request.json(body).send().await.unwrap();
        (response.status().as_u16(), response.text().await.unwrap())
    }

    pub(crate) async fn chat(&self, extra: Value) -> (u16, Value) {
        let mut body = json!({"messages": [{"role": "user", "content": "hello there"}]});
        body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        let (status, text) = self.call("POST", "/v1/chat/completions", &body).await;
        (status, serde_json::from_str(&text).unwrap_or(Value::String(text)))
    }

    async fn load(&self, name: &str, path: &str) -> (u16, String) {
        self.call("POST", "/v1/load_lora_adapter", &json!({"lora_name": name, "lora_path": path})).await
    }

    pub(crate) async fn stop(mut self) {
        self.stop.take();
        self.serving.take().unwrap().await.unwrap();
    }
}

fn engine_thread(commands: &Receiver<Command>, busy: &Mutex<()>) {
    let mut voices = HashMap::new();
    while let Ok(command) = commands.recv() {
        match command {
            Command::Ping { reply } => reply.send(()).unwrap(),
            Command::Unload { name } => drop(voices.remove(&name)),
            Command::Load { name, folder, reply } => {
                let text = std::fs::read_to_string(folder.join("adapter_config.json")).unwrap();
                let config: Value = serde_json::from_str(&text).unwrap();
                let outcome = match config["r"].as_u64() {
                    Some(rank) if rank > 8 => Err(job::rank_too_high(rank as usize, 8)),
                    _ => {
                        voices.insert(name, config["voice"].as_str().unwrap().to_owned());
                        Ok(())
                    }
                };
                reply.send(outcome).unwrap();
            }
            Command::Answer(job) => {
                let voice = job.adapter.as_ref().map_or("base", |name| &voices[name]).to_owned();
                if last_user_text(&job.messages) == "die" {
                    return;
                }
                let _held = busy.lock().unwrap();
                speak(*job, &voice);
            }
        }
    }
}

/// The stand-in's log-prob of a token: another one for each voice.
pub(crate) fn logprob(voice: &str, position: usize, token: u32) -> f32 {
    let hash = crate::record::derive_seed(u64::from(token), &[voice, &position.to_string()]);
    -((hash % 1000) as f32) / 500.0
}

fn speak(job: Job, voice: &str) {
    let question = last_user_text(&job.messages);
    let prompt_ids: Vec<u32> = question.bytes().map(u32::from).collect();
    let max = match room(prompt_ids.len(), job.sampling.max_tokens, 1000, CONTEXT) {
        Ok(max) => max,
        Err(refusal) => return drop(job.events.send(Event::Refused(refusal))),
    };
    let decode = |ids: &[u32]| {
        let bytes: Vec<u8> = ids.iter().filter(|&&id| id < END).map(|&id| id as u8).collect();
        String::from_utf8_lossy(&bytes).into_owned()
    };
    let mut ids: Vec<u32> = format!("{voice}: {question}").bytes().map(u32::from).chain([END]).collect();
    let mut finish_reason = if ids.len() > max { FinishReason::Length } else { FinishReason::Stop };
    ids.truncate(max);
    let stop = job.sampling.stop.clone();
    let stopped = (1..=ids.len()).find(|n| first_stop(&decode(&ids[..*n]), &stop).is_some());
    if let Some(tokens) = stopped {
        (finish_reason, _) = (FinishReason::Stop, ids.truncate(tokens));
    }
    let mut text = decode(&ids);
    let met = first_stop(&text, &stop).map(|(at, stop)| (at, stop.to_owned()));
    text.truncate(met.as_ref().map_or(text.len(), |(at, _)| *at));
    let done = Completion {
        token_ids: ids.clone(),
        logprobs: Vec::new(),
        sampler_logprobs: Vec::new(),
        finish_reason,
        stop_string: met.map(|(_, stop)| stop),
        text,
    };
    job.events.send(Event::Started { prompt_ids }).unwrap_or_default();
    let mut emitter = Emitter::new(job.events.clone(), job.seeds.len(), stop);
    for sample in 0..job.seeds.len() {
        for (position, &id) in ids.iter().enumerate() {
            let piece = if id == END { "<|end|>".into() } else { decode(&[id]) };
            let token = Sampled { id, piece, logprob: logprob(voice, position, id) };
            if emitter.token(sample, token, &decode) != Wish::GoOn {
                break;
            }
        }
        if question == "break" {
            return drop(job.events.send(Event::Refused(Refusal::Engine("out of memory".into()))));
        }
        emitter.done(sample, done.clone());
    }
}

fn error(body: &str) -> (String, String) {
    let body: Value = serde_json::from_str(body).unwrap();
    let error = &body["error"];
    assert!(error["param"].is_null() || error["param"].is_string());
    (error["type"].as_str().unwrap().to_owned(), error["message"].as_str().unwrap().to_owned())
}

#[tokio::test]
async fn an_answer_has_openais_shape() {
    let fake = Fake::start().await;
    let (status, body) = fake.chat(json!({"n": 2, "logprobs": true, "return_token_ids": true})).await;
    assert_eq!((status, &body["object"], &body["model"]), (200, &json!("chat.completion"), &json!("base")));
    assert_eq!(body["usage"], json!({"prompt_tokens": 11, "completion_tokens": 36, "total_tokens": 47}));
    assert_eq!(body["prompt_token_ids"].as_array().unwrap().len(), 11);
    for (index, choice) in body["choices"].as_array().unwrap().iter().enumerate() {
        assert_eq!(choice["index"], index);
        assert_eq!(choice["message"], json!({"role": "assistant", "content": "base: hello there"}));
        assert_eq!(choice["finish_reason"], "stop");
        let content = choice["logprobs"]["content"].as_array().unwrap();
        assert_eq!((content.len(), choice["token_ids"].as_array().unwrap().len()), (18, 18));
        assert_eq!((&content[0]["token"], &content[0]["bytes"]), (&json!("b"), &json!([98])));
        assert_eq!((content[17]["token"].as_str(), &choice["token_ids"][17]), (Some("<|end|>"), &json!(END)));
        let expected = f64::from(logprob("base", 0, 98));
        assert!((content[0]["logprob"].as_f64().unwrap() - expected).abs() < 1e-6);
    }
    let (_, plain) = fake.chat(json!({"max_tokens": 4})).await;
    let choice = &plain["choices"][0];
    assert_eq!((&choice["message"]["content"], &choice["finish_reason"]), (&json!("base"), &json!("length")));
    assert!(
        choice["logprobs"].is_null() && choice.get("token_ids").is_none() && plain.get("prompt_token_ids").is_none()
    );
}

#[tokio::test]
async fn a_stream_says_the_same_as_the_whole_answer() {
    let fake = Fake::start().await;
    let wish = json!({"stream": true, "n": 2, "stop": "there", "logprobs": true, "return_token_ids": true,
        "stream_options": {"include_usage": true}});
    let (status, body) = fake.chat(wish).await;
    let lines: Vec<&str> = body.as_str().unwrap().lines().filter_map(|line| line.strip_prefix("data: ")).collect();
    assert_eq!((status, lines.last()), (200, Some(&"[DONE]")));
    let chunks: Vec<Value> = lines[..lines.len() - 1].iter().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(chunks[0]["choices"][0]["delta"]["role"], "assistant");
    assert_eq!(chunks.last().unwrap()["usage"]["completion_tokens"], 34);
    let of_first = || chunks.iter().filter(|c| c["choices"][0]["index"] == 0).map(|c| &c["choices"][0]);
    let text: String = of_first().filter_map(|c| c["delta"]["content"].as_str()).collect();
    let tokens: usize = of_first().map(|c| c["token_ids"].as_array().unwrap().len()).sum();
    assert_eq!((text.as_str(), tokens), ("base: hello ", 17));
    let (_, whole) = fake.chat(json!({"stop": ["there"]})).await;
    assert_eq!(whole["choices"][0]["message"]["content"], text.as_str());
    assert_eq!(whole["choices"][0]["finish_reason"], "stop");
    let ends: Vec<&Value> = of_first().map(|c| &c["stop_reason"]).filter(|reason| !reason.is_null()).collect();
    assert_eq!((ends, &whole["choices"][0]["stop_reason"]), (vec![&json!("there")], &json!("there")));
}

#[tokio::test]
async fn a_failure_within_a_stream_is_an_event() {
    let fake = Fake::start().await;
    let question = json!([{"role": "user", "content": "break"}]);
    let (status, body) = fake.chat(json!({"stream": true, "messages": question})).await;
    assert_eq!(status, 200);
    let body = body.as_str().unwrap();
    assert!(body.contains(r#"{"error":{"message":"out of memory""#) && body.trim_end().ends_with("data: [DONE]"));
    let (status, body) = fake.chat(json!({"messages": question})).await;
    assert_eq!((status, &body["error"]["message"]), (500, &json!("out of memory")));
}

/// The table of observed answers in the reference notes on vLLM's adapter API.
#[tokio::test]
async fn adapters_are_loaded_and_refused_in_vllms_words() {
    let fake = Fake::start().await;
    let (v1, wide) = (fake.adapter("v1", 8), fake.adapter("wide", 16));
    let success = |what: &str| (200, format!("Success: LoRA adapter 'v1' {what} successfully."));
    assert_eq!(fake.load("v1", &v1).await, success("added"));

    let nope = fake.adapters.path().join("nope").to_str().unwrap().to_owned();
    let again = "The lora adapter 'v1' has already been loaded. If you want to load the adapter in place, set \
                 'load_inplace' to True.";
    let high =
        "Call to add_lora method failed: Worker failed with error 'LoRA rank 16 is greater than max_lora_rank 8.'";
    let cases = [
        (fake.load("v1", &v1).await, 400, "InvalidUserInput", again.to_owned()),
        (
            fake.load("base", &v1).await,
            400,
            "InvalidUserInput",
            "The lora adapter 'base' conflicts with a served base model.".into(),
        ),
        (
            fake.load("x", "").await,
            400,
            "InvalidUserInput",
            "Both 'lora_name' and 'lora_path' must be provided.".into(),
        ),
        (
            fake.load("x", &nope).await,
            404,
            "NotFoundError",
            format!("Loading lora x failed: No adapter found for {nope}"),
        ),
        (fake.load("wide", &wide).await, 500, "InternalServerError", high.into()),
        (
            fake.call("POST", "/v1/unload_lora_adapter", &json!({"lora_name": "rs"})).await,
            404,
            "NotFoundError",
            "The lora adapter 'rs' cannot be found.".into(),
        ),
    ];
    for ((status, body), expected, kind, message) in cases {
        assert_eq!((status, error(&body)), (expected, (kind.to_owned(), message)));
    }
    let (status, body) = fake.call("POST", "/v1/load_lora_adapter", &json!({"lora_name": "x"})).await;
    assert_eq!((status, error(&body).0.as_str()), (400, "Bad Request"));
    assert!(body.contains("1 validation error: {'type': 'missing', 'loc': 'body.lora_path'"), "{body}");
    let (status, body) = fake.load("x", "/nope").await;
    assert!(status == 404 && error(&body).1.starts_with("Loading lora x failed: No adapter found for /nope"));
    let (status, body) = fake.chat(json!({"model": "rs"})).await;
    assert_eq!(status, 404);
    assert_eq!(body["error"]["message"], "The model `rs` does not exist. Valid aliases: base.");

    // The refused loads left the server as it was; in place, another folder takes the name over.
    assert_eq!(fake.chat(json!({"model": "v1"})).await.1["choices"][0]["message"]["content"], "v1: hello there");
    let v2 = fake.adapter("v2", 8);
    let in_place = json!({"lora_name": "v1", "lora_path": v2, "load_inplace": true, "base_model_name": "ignored"});
    assert_eq!(fake.call("POST", "/v1/load_lora_adapter", &in_place).await, success("added"));
    assert_eq!(fake.chat(json!({"model": "v1"})).await.1["choices"][0]["message"]["content"], "v2: hello there");
    let unloaded = fake.call("POST", "/v1/unload_lora_adapter", &json!({"lora_name": "v1"})).await;
    assert_eq!(unloaded, success("removed"));
    assert_eq!(fake.chat(json!({"model": "v1"})).await.0, 404);
}

#[tokio::test]
async fn models_are_listed_as_vllm_lists_them() {
    let fake = Fake::start().await;
    let v1 = fake.adapter("v1", 8);
    fake.load("one", &v1).await;
    let (_, body) = fake.call("GET", "/v1/models", &Value::Null).await;
    let list: Value = serde_json::from_str(&body).unwrap();
    assert_eq!((&list["data"][0]["id"], &list["data"][0]["parent"]), (&json!("base"), &Value::Null));
    let one = &list["data"][1];
    assert_eq!((&one["id"], &one["root"], &one["parent"]), (&json!("one"), &json!(v1), &json!("base")));
}

#[tokio::test]
async fn the_stable_name_follows_its_alias() {
    let fake = Fake::start().await;
    fake.load("one", &fake.adapter("v1", 8)).await;
    let set = async |body: Value| fake.call("PUT", "/v1/aliases/prod", &body).await;
    assert_eq!(set(json!({"target": "base", "expected": null})).await.0, 200);
    assert_eq!(set(json!({"target": "one", "expected": null})).await.0, 409);
    assert_eq!(set(json!({"target": "two", "expected": "base"})).await.0, 404);
    assert_eq!(set(json!({"target": "one"})).await.0, 400);
    let (status, body) = set(json!({"target": "one", "expected": "base"})).await;
    assert_eq!((status, body.as_str()), (200, r#"{"name":"prod","target":"one","previous":"base"}"#));
    let (_, list) = fake.call("GET", "/v1/aliases", &Value::Null).await;
    assert_eq!(list, r#"{"object":"list","data":[{"name":"prod","target":"one"}]}"#);

    let (_, body) = fake.chat(json!({"model": "prod"})).await;
    assert_eq!((&body["model"], &body["served_version"]), (&json!("prod"), &json!("one")));
    assert_eq!(body["choices"][0]["message"]["content"], "v1: hello there");
    let request = json!({"model": "prod", "messages": [{"role": "user", "content": "hi"}]});
    let client = reqwest::Client::new();
    let response = client.post(format!("{}/v1/chat/completions", fake.url)).json(&request).send().await.unwrap();
    assert_eq!(response.headers()["x-served-version"], "one");
}

#[tokio::test]
async fn requests_that_cannot_be_answered_are_refused_in_the_envelope() {
    let settings = Settings { max_body_bytes: 2000, ..Settings::default() };
    let fake = Fake::with(settings, CallLog::None).await;
    let long = |n: usize| json!([{"role": "user", "content": "x".repeat(n)}]);
    let cases = [
        (fake.chat(json!({"messages": long(CONTEXT)})).await, 400, "maximum context length is 120 tokens"),
        (fake.chat(json!({"max_tokens": 110})).await, 400, "requested 110 output tokens"),
        (fake.chat(json!({"messages": long(3000)})).await, 413, "length limit"),
        (fake.chat(json!({"messages": "hi"})).await, 400, "1 validation error"),
        (fake.chat(json!({"max_tokens": 5000})).await, 400, "max_tokens=5000"),
    ];
    for ((status, body), expected, text) in cases {
        let message = body["error"]["message"].as_str().unwrap();
        assert!(status == expected && message.contains(text), "{status} {body}");
    }
    let (status, body) = fake.call("GET", "/v1/nothing", &Value::Null).await;
    assert_eq!((status, error(&body).0.as_str()), (404, "NotFoundError"));
    assert_eq!(fake.call("GET", "/v1/chat/completions", &Value::Null).await.0, 405);
}

#[tokio::test]
async fn without_a_folder_for_adapters_the_routes_do_not_exist() {
    let fake = Fake::over(Settings::default(), CallLog::None, Arc::new(tempfile::tempdir().unwrap())).await;
    assert_eq!(fake.load("v1", "/x").await.0, 404);
    assert_eq!(fake.call("POST", "/v1/unload_lora_adapter", &json!({"lora_name": "v1"})).await.0, 404);
}

#[tokio::test]
async fn more_requests_than_may_wait_are_refused_and_the_others_answered() {
    let settings = Settings { max_requests: 2, ..Settings::default() };
    let fake = Arc::new(Fake::with(settings, CallLog::None).await);
    let held = fake.busy.clone();
    let (locked, free) = (mpsc::channel(), mpsc::channel::<()>());
    let holder = std::thread::spawn(move || {
        let _held = held.lock().unwrap();
        locked.0.send(()).unwrap();
        free.1.recv().unwrap_or_default();
    });
    locked.1.recv().unwrap();
    let ask = |fake: Arc<Fake>| tokio::spawn(async move { fake.chat(json!({})).await.0 });
    let waiting = [ask(fake.clone()), ask(fake.clone())];
    let mut refused = 0;
    for _ in 0..200 {
        let (status, body) =
            tokio::time::timeout(Duration::from_millis(500), fake.chat(json!({}))).await.unwrap_or((0, Value::Null));
        if status == 429 {
            refused += 1;
            assert_eq!(body["error"]["code"], 429);
            break;
        }
    }
    free.0.send(()).unwrap();
    holder.join().unwrap();
    assert_eq!(refused, 1);
    for task in waiting {
        assert_eq!(task.await.unwrap(), 200);
    }
}

#[tokio::test]
async fn a_request_under_way_is_answered_when_the_server_stops() {
    let mut fake = Fake::start().await;
    let busy = fake.busy.clone();
    let (url, stop, serving) = (fake.url.clone(), fake.stop.take().unwrap(), fake.serving.take().unwrap());
    let (locked, is_locked) = mpsc::channel();
    std::thread::spawn(move || {
        let _held = busy.lock().unwrap();
        locked.send(()).unwrap();
        std::thread::sleep(Duration::from_millis(400));
    });
    is_locked.recv().unwrap();
    let body = json!({"messages": [{"role": "user", "content": "hi"}]});
    let sent = reqwest::Client::new().post(format!("{url}/v1/chat/completions")).json(&body).send();
    let asked = tokio::spawn(sent);
    tokio::time::sleep(Duration::from_millis(150)).await;
    drop(stop);
    assert_eq!(asked.await.unwrap().unwrap().status(), 200);
    serving.await.unwrap();
    assert!(reqwest::get(format!("{url}/health")).await.is_err());
}

#[tokio::test]
async fn health_follows_the_engine() {
    let fake = Fake::start().await;
    assert_eq!(fake.call("GET", "/health", &Value::Null).await.0, 200);
    let (status, _) = fake.chat(json!({"messages": [{"role": "user", "content": "die"}]})).await;
    assert_eq!(status, 500);
    assert_eq!(fake.call("GET", "/health", &Value::Null).await.0, 503);
}

#[tokio::test(flavor = "multi_thread")]
async fn each_call_is_logged_with_what_answered() {
    let cluster = rdkafka::mocking::MockCluster::new(1).unwrap();
    cluster.create_topic("calls", 1, 1).unwrap();
    let brokers = cluster.bootstrap_servers();
    let fake = Fake::with(Settings::default(), CallLog::open(&brokers, "calls").unwrap()).await;
    let client = reqwest::Client::new();
    let url = format!("{}/v1/chat/completions", fake.url);
    let good = json!({"model": "base", "user": "ann", "stream": true, "messages": [{"role": "user", "content": "hi"}]});
    let sent = client.post(&url).json(&good).header("x-taod-train", "no").header("x-workload", "mail");
    sent.send().await.unwrap().text().await.unwrap();
    client.post(&url).body("{not json").send().await.unwrap();
    fake.stop().await;

    let rows = tokio::task::spawn_blocking(move || consume(&brokers, "calls", 2)).await.unwrap();
    let (key, headers, call) = &rows[0];
    assert_eq!((key.as_str(), &call["request"]), (call["response"]["id"].as_str().unwrap(), &good));
    assert_eq!(call["response"]["object"], "chat.completion");
    assert_eq!(call["response"]["choices"][0]["message"]["content"], "base: hi");
    assert_eq!((&call["status"], &call["served_version"]), (&json!(200), &json!("base")));
    assert_eq!((&call["workload_id"], &call["client_id"]), (&json!("mail"), &json!("ann")));
    assert!(call["duration_ms"].as_f64().unwrap() > 0.0 && call["timestamp"].as_str().unwrap().ends_with('Z'));
    assert_eq!(headers, &[("x-taod-train".to_owned(), "no".to_owned()), ("x-workload".to_owned(), "mail".to_owned())]);
    let (_, _, failed) = &rows[1];
    assert_eq!((&failed["status"], &failed["request"]), (&json!(400), &json!("{not json")));
    assert!(failed["served_version"].is_null() && failed["response"]["error"]["code"] == 400);
}

pub(crate) type Row = (String, Vec<(String, String)>, Value);

pub(crate) fn consume(brokers: &str, topic: &str, count: usize) -> Vec<Row> {
    let consumer: BaseConsumer = rdkafka::ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .set("group.id", "test")
        .set("auto.offset.reset", "earliest")
        .create()
        .unwrap();
    consumer.subscribe(&[topic]).unwrap();
    let mut rows = Vec::new();
    let started = std::time::Instant::now();
    while rows.len() < count && started.elapsed() < Duration::from_secs(30) {
        let Some(Ok(message)) = consumer.poll(Duration::from_millis(200)) else { continue };
        let text = |bytes: Option<&[u8]>| String::from_utf8(bytes.unwrap_or_default().to_vec()).unwrap();
        let headers = message
            .headers()
            .map_or(Vec::new(), |all| all.iter().map(|header| (header.key.to_owned(), text(header.value))).collect());
        rows.push((text(message.key()), headers, serde_json::from_slice(message.payload().unwrap()).unwrap()));
    }
    assert_eq!(rows.len(), count);
    rows
}
