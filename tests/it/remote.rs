//! Candidates from another server: a real one, and ones that answer otherwise.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::http::{HeaderMap, StatusCode};
use serde_json::{Value, json};
use taod::candidates::{self, Candidate, CandidateError, Manifest, Settings, Stream, remote};
use taod::dataset::Prompt;
use taod::engine::{Model, ScoreItem, logprobs};
use taod::progress::Progress;
use taod::record::{FinishReason, Message};

use crate::{harness, vllm, vllm_server};

fn model_path() -> String {
    harness::root().join("tests/fixtures/models/tiny-llama").display().to_string()
}

/// `taod serve` on a port of its own.
pub(crate) struct Server {
    process: Child,
    pub(crate) url: String,
}

impl Server {
    pub(crate) fn start() -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_taod"));
        command.args(["serve", "--model", &model_path(), "--listen", "127.0.0.1:0"]);
        let mut process = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let lines = BufReader::new(process.stderr.take().unwrap()).lines();
        let address = |line: String| Some(line.split_once("address=")?.1.split_whitespace().next()?.to_owned());
        let url = lines.map_while(Result::ok).find_map(address).expect("the server says where it serves");
        Server { process, url: format!("http://{url}") }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }
}

fn prompt(text: &str) -> Prompt {
    let message: Message = serde_json::from_value(json!({"role": "user", "content": text})).unwrap();
    serde_json::from_value(json!({
        "prompt_hash": format!("hash of {text}"),
        "cluster": "c",
        "workload": null,
        "tenant": null,
        "messages": [message],
        "tools": null,
        "first_seen": {"topic": "t", "partition": 0, "offset": 0, "record_index": 0},
        "event_time_us": 0,
        "count": 1,
    }))
    .unwrap()
}

fn settings(url: &str) -> Settings {
    let remote = remote::Settings { url: url.to_owned(), model: "tiny-llama".into(), retries: 2, ..Default::default() };
    Settings { samples_per_prompt: 3, max_tokens: 8, chunk_prompts: 2, remote, ..Settings::default() }
}

fn sample(model: &Model, settings: &Settings, out: &Path) -> Result<Manifest, CandidateError> {
    let prompts = ["one", "two words", "a third prompt"].map(prompt);
    let prompts: Vec<&Prompt> = prompts.iter().collect();
    let stream = Stream { seed: 7, name: "train/1", sampler: "base" };
    candidates::sample(model, None, &prompts, (settings, &Default::default()), stream, out, &Progress::silent())
}

#[test]
fn candidates_of_another_server_carry_ids_and_log_probs_that_ours_confirm() {
    let (folder, model) = (tempfile::tempdir().unwrap(), Model::load(&model_path()).unwrap());
    let server = Server::start();
    let (first, second) = (folder.path().join("first"), folder.path().join("second"));
    let manifest = sample(&model, &settings(&server.url), &first).unwrap();
    assert_eq!((manifest.prompts, manifest.candidates, manifest.chunks, manifest.too_long), (3, 9, 2, 0));
    sample(&model, &settings(&server.url), &second).unwrap();
    let (drawn, again) = (candidates::load(&first).unwrap(), candidates::load(&second).unwrap());
    assert_eq!(drawn, again, "seeds decide");
    let of_prompt: Vec<&Vec<u32>> = drawn[..3].iter().map(|candidate| &candidate.token_ids).collect();
    assert!(of_prompt[0] != of_prompt[1] || of_prompt[1] != of_prompt[2], "samples of a prompt differ");

    let items: Vec<ScoreItem> =
        drawn.iter().map(|c| ScoreItem { prompt: &c.prompt_ids, completion: &c.token_ids }).collect();
    for (candidate, ours) in drawn.iter().zip(logprobs(&model, None, &items).unwrap()) {
        assert!(candidate.approximate && candidate.logprobs.len() == candidate.token_ids.len());
        assert_eq!(candidate.sampler_logprobs, candidate.logprobs);
        let near = |(told, ours): (&f32, &f32)| (told - ours).abs() < 1e-4;
        assert!(candidate.logprobs.iter().zip(&ours).all(near), "{:?} {ours:?}", candidate.logprobs);
    }

    // What stands is not asked for again; what is missing is, and says who does not answer.
    std::fs::remove_file(second.join("manifest.json")).unwrap();
    let wrong =
        Settings { remote: remote::Settings { model: "none".into(), ..settings(&server.url).remote }, ..settings("") };
    let error = sample(&model, &wrong, &folder.path().join("third")).unwrap_err().to_string();
    assert!(error.contains("404") && error.contains(&server.url), "{error}");
    let url = server.url.clone();
    drop(server);
    assert_eq!(sample(&model, &settings(&url), &second).unwrap(), manifest);
    std::fs::remove_file(second.join("manifest.json")).unwrap();
    std::fs::remove_file(second.join("chunk-00001.jsonl")).unwrap();
    let error = sample(&model, &settings(&url), &second).unwrap_err().to_string();
    assert!(error.contains(&url) && error.contains("asked 3 times"), "{error}");
}

#[test]
#[ignore = "needs vLLM; run `make test-vllm`"]
fn a_real_vllm_tells_ids_and_log_probs_that_ours_confirm() {
    let (folder, base) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let Some(base) = vllm::smollm2(base.path()) else { return };
    let model = Model::load(&base.display().to_string()).unwrap();
    let vllm = vllm_server::Server::start(vllm_server::Kind::Vllm, &base, folder.path());
    let server = remote::Settings { model: vllm_server::BASE.into(), ..settings(&vllm.url).remote };
    let settings = Settings { max_tokens: 32, remote: server, ..settings("") };
    let manifest = sample(&model, &settings, folder.path()).unwrap();
    let drawn = candidates::load(folder.path()).unwrap();
    let items: Vec<ScoreItem> =
        drawn.iter().map(|c| ScoreItem { prompt: &c.prompt_ids, completion: &c.token_ids }).collect();
    let ours = logprobs(&model, None, &items).unwrap();
    let pairs = drawn.iter().zip(&ours).flat_map(|(candidate, ours)| candidate.logprobs.iter().zip(ours));
    let gaps: Vec<f32> = pairs.map(|(told, ours)| (told - ours).abs()).collect();
    let (mean, most) = (gaps.iter().sum::<f32>() / gaps.len() as f32, gaps.iter().copied().fold(0.0, f32::max));
    println!(
        "{} tokens of {} answers: {mean:.6} nats a token apart, {most:.6} at most",
        gaps.len(),
        manifest.candidates
    );
    assert_eq!(gaps.len() as u64, manifest.tokens, "every token has its log-prob");
    assert!(mean < 1e-3, "{mean}");
}

type Respond = fn(&Value, usize) -> (u16, Value);

/// A server that answers with what `respond` makes of the body and of the number of requests before it.
struct Stub {
    url: String,
    seen: Arc<Mutex<Vec<HeaderMap>>>,
    _runtime: tokio::runtime::Runtime,
}

impl Stub {
    fn start(respond: Respond) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let seen: Arc<Mutex<Vec<HeaderMap>>> = Arc::default();
        let (kept, calls) = (seen.clone(), Arc::new(AtomicUsize::new(0)));
        let handler = async move |headers: HeaderMap, axum::Json(body): axum::Json<Value>| {
            kept.lock().unwrap().push(headers);
            let (status, answer) = respond(&body, calls.fetch_add(1, Ordering::SeqCst));
            (StatusCode::from_u16(status).unwrap(), axum::Json(answer))
        };
        let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        runtime.spawn(async move { axum::serve(listener, Router::new().fallback(handler)).await.unwrap() });
        Stub { url, seen, _runtime: runtime }
    }
}

/// Answers as a server that knows no token ids does.
fn plain(body: &Value) -> Value {
    let choice = json!({"message": {"role": "assistant", "content": "yes"}, "finish_reason": "stop",
        "logprobs": {"content": [{"token": "yes", "logprob": -0.5}]}});
    json!({"choices": vec![choice; body["n"].as_u64().unwrap() as usize]})
}

fn drawn(respond: Respond) -> (Result<Vec<Candidate>, String>, Stub) {
    let (folder, model) = (tempfile::tempdir().unwrap(), Model::load(&model_path()).unwrap());
    let stub = Stub::start(respond);
    let manifest = sample(&model, &settings(&stub.url), folder.path());
    (manifest.map(|_| candidates::load(folder.path()).unwrap()).map_err(|e| e.to_string()), stub)
}

#[test]
fn a_server_without_ids_gives_answers_without_log_probs() {
    let (drawn, stub) = drawn(|body, calls| match calls {
        0 => (503, json!({"error": "busy"})),
        _ => (200, plain(body)),
    });
    let model = Model::load(&model_path()).unwrap();
    let drawn = drawn.unwrap();
    assert_eq!(drawn.len(), 9);
    for candidate in drawn {
        assert_eq!(candidate.token_ids, model.tokenizer().answer_ids("yes", true).unwrap());
        assert_eq!((candidate.logprobs.len(), candidate.finish_reason), (0, FinishReason::Stop));
    }
    let seen = stub.seen.lock().unwrap();
    assert_eq!(seen.len(), 4, "one was asked for again");
    assert!(seen.iter().all(|headers| headers.contains_key("x-taod-internal")));
}

#[test]
fn a_prompt_that_the_server_refuses_is_left_out_and_the_others_are_drawn() {
    let (drawn, _) = drawn(|body, calls| match calls {
        0 => (400, json!({"error": {"message": "This model's maximum context length is 64 tokens."}})),
        _ => (200, plain(body)),
    });
    assert_eq!(drawn.unwrap().len(), 6);
}

#[test]
fn a_server_that_answers_otherwise_is_refused_with_the_reason() {
    let refused = |respond: Respond, words: &str| {
        let error = drawn(respond).0.unwrap_err();
        assert!(error.contains(words), "{error}");
    };
    refused(
        |_, _| (401, json!({"error": {"message": "no key"}})),
        "401 Unauthorized: {\"error\":{\"message\":\"no key\"}}",
    );
    refused(|_, _| (500, json!("down")), "asked 3 times");
    refused(|_, _| (200, json!({"choices": []})), "0 answers where 3 were asked for");
    refused(
        |body, _| {
            let mut answer = plain(body);
            answer["choices"][1]["finish_reason"] = json!("tool_calls");
            (200, answer)
        },
        "ends for tool_calls, not stop or length",
    );
    refused(
        |body, _| {
            let mut answer = plain(body);
            answer["prompt_token_ids"] = json!([1, 2, 3]);
            (200, answer)
        },
        "serve the same tokenizer and chat template",
    );
}
