//! taod's own requests are no traffic: a night with a promotion against an endpoint that logs every call it gets into the topic
//! that taod ingests. Prompts made for training, candidates, a judge's questions, the doctor's, proofs and the rehearsal all go
//! to that endpoint; the next night's dataset gains what clients asked, and nothing else.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use axum::body::Bytes;
use axum::extract::State;
use axum::http::{HeaderMap, Method, StatusCode, Uri};
use rdkafka::ClientConfig;
use rdkafka::message::{Header, OwnedHeaders};
use rdkafka::producer::{BaseRecord, DefaultProducerContext, Producer, ThreadedProducer};
use serde_json::{Value, json};
use taod::registry::Registry;
use taod::table::Name;

use crate::harness::kafka::Kafka;
use crate::harness::night::{Call, GENEROUS, Night, calls, model, promotable};
use crate::harness::site::{Running, port, wait_for};
use crate::harness::taod_in;
use crate::operations::until;

const TOPIC: &str = "live";
/// How a logger of one of the two marks calls itself in its records.
const LOGGERS: [&str; 2] = ["bodies", "headers"];
const CLIENTS: usize = 6;

/// A call as the endpoint got it.
#[derive(Debug, Clone)]
struct Got {
    path: String,
    is_marked: bool,
    body: Value,
}

#[derive(Clone)]
struct Kept {
    server: String,
    client: reqwest::Client,
    producer: Arc<ThreadedProducer<DefaultProducerContext>>,
    got: Arc<Mutex<Vec<Got>>>,
}

/// A proxy in front of the endpoint that logs whatever comes by, twice: one of its loggers writes bodies alone, the other keeps
/// headers and no user. So each mark has to do by itself.
struct Logging {
    url: String,
    kept: Kept,
    runtime: tokio::runtime::Runtime,
}

impl Logging {
    fn start(server: String, brokers: &str) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let producer = ClientConfig::new().set("bootstrap.servers", brokers).create().unwrap();
        let kept =
            Kept { server, client: reqwest::Client::new(), producer: Arc::new(producer), got: Default::default() };
        let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let router = Router::new().fallback(pass).with_state(kept.clone());
        runtime.spawn(async move { axum::serve(listener, router).await.unwrap() });
        Logging { url, kept, runtime }
    }

    /// Returns what came so far, all of it logged.
    fn got(&self) -> Vec<Got> {
        self.kept.producer.flush(Duration::from_secs(60)).unwrap();
        self.kept.got.lock().unwrap().clone()
    }

    /// Asks as clients do.
    fn ask(&self, call: &Call) {
        let body = json!({
            "model": "production", "messages": call.messages(), "max_tokens": 12,
            "metadata": { "workload": call.workload },
        });
        let request = reqwest::Client::new().post(format!("{}/v1/chat/completions", self.url)).json(&body);
        let answer = self.runtime.block_on(async { request.send().await.unwrap() });
        assert!(answer.status().is_success(), "{}", answer.status());
    }
}

async fn pass(
    State(kept): State<Kept>,
    method: Method,
    uri: Uri,
    headers: HeaderMap,
    body: Bytes,
) -> (StatusCode, Bytes) {
    let told: Value = serde_json::from_slice(&body).unwrap_or_default();
    let mut forwarded = told.clone();
    // taod serve tells the chosen token alone: to a judge here that is the one candidate.
    let judged = forwarded.as_object_mut().and_then(|body| body.remove("top_logprobs")).is_some();
    let mut request = kept.client.request(method, format!("{}{}", kept.server, uri.path()));
    for name in ["content-type", "x-taod-internal"] {
        if let Some(value) = headers.get(name) {
            request = request.header(name, value);
        }
    }
    let body = if judged { forwarded.to_string().into() } else { body };
    let answer = request.body(body).send().await.unwrap();
    let (status, mut bytes) = (answer.status(), answer.bytes().await.unwrap());
    if judged && status.is_success() {
        let mut answer: Value = serde_json::from_slice(&bytes).unwrap();
        let token = &mut answer["choices"][0]["logprobs"]["content"][0];
        token["top_logprobs"] = json!([token.clone()]);
        bytes = answer.to_string().into();
    }
    let mark = headers.get("x-taod-internal").map(|value| value.as_bytes().to_vec());
    let answer: Value = serde_json::from_slice(&bytes).unwrap_or_default();
    for logger in LOGGERS {
        log(&kept, logger, &told, &answer, status, mark.as_deref().filter(|_| logger == "headers"));
    }
    let got = Got { path: uri.path().to_owned(), is_marked: mark.is_some(), body: told };
    kept.got.lock().unwrap().push(got);
    (status, bytes)
}

fn log(kept: &Kept, logger: &str, request: &Value, response: &Value, status: StatusCode, mark: Option<&[u8]>) {
    let mut request = request.clone();
    if let Some(body) = request.as_object_mut().filter(|_| logger == "headers") {
        body.remove("user");
    }
    let call = json!({ "logger": logger, "request": request, "response": response, "status": status.as_u16() });
    let (payload, headers) = (call.to_string(), OwnedHeaders::new());
    let headers = match mark {
        Some(value) => headers.insert(Header { key: "x-taod-internal", value: Some(value) }),
        None => headers,
    };
    let record = BaseRecord::<(), str>::to(TOPIC).partition(0).payload(&payload).headers(headers);
    kept.producer.send(record).map_err(|(error, _)| error).unwrap();
}

#[test]
fn a_night_against_an_endpoint_that_logs_every_call_gains_no_prompt_but_those_of_clients() {
    // A real one: the embedded broker keeps 5 MB of a topic, and a night's calls are more.
    let Some(kafka) = Kafka::start(&[]) else { return };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(kafka.create_topic(TOPIC, 1));
    let brokers = kafka.brokers();
    let night = promotable();
    let folder = night.config().parent().unwrap().to_path_buf();
    let served = port();
    let endpoint = Logging::start(format!("http://127.0.0.1:{served}"), &brokers);
    set(&night, &brokers, &endpoint.url, served);
    let start = |arguments: &[&str], log: &Path| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_taod"));
        Running::start(command.args(arguments).arg("--config").arg(night.config()), log)
    };
    let (serve_log, ingest_log) = (folder.join("serve.log"), folder.join("ingest.log"));
    let _serve = start(&["serve", "--model", &roomy(&folder).display().to_string()], &serve_log);
    wait_for(served, &serve_log);
    let _ingest = start(&["ingest"], &ingest_log);

    let config = night.config().display().to_string();
    let run = |arguments: &[&str]| taod_in(&folder, &[arguments, &["--config", &config]].concat(), &GENEROUS);
    let looked = run(&["doctor", "--only", "endpoint", "--load"]);
    assert_eq!(looked.code, 0, "{}{}", looked.out, looked.err);
    run(&["round", "--once"]).code(0);
    let registry = Registry::open(&night.state().join("registry"), &Default::default()).unwrap();
    let version = registry.current().unwrap().version;
    assert_ne!(version, "base", "nothing was promoted: {}", night.json("outcome.json"));
    let asked = endpoint.got();
    every_kind_of_request_came_and_was_marked(&asked, &version);
    let (first, before) = (night.json("dataset/manifest.json"), night.rows(Name::Splits));

    // What clients ask meets the same loggers, and counts.
    let of_clients: Vec<Call> = calls(300 + CLIENTS).split_off(300);
    of_clients.iter().for_each(|call| endpoint.ask(call));
    let chats = |got: &[Got]| got.iter().filter(|got| got.path == "/v1/chat/completions").count();
    let (own, all) = (chats(&asked), chats(&endpoint.got()));
    assert_eq!(all - own, CLIENTS);
    // Each call is logged by the two loggers before the endpoint, and by taod serve itself.
    until("every call in the table", &ingest_log, || (night.rows(Name::Queries).len() == 300 + 3 * all).then_some(()));
    let rows = night.rows(Name::Queries).into_iter().filter(|row| row["topic"] == TOPIC).collect::<Vec<Value>>();
    let mut reasons = BTreeMap::<(String, Option<&str>), usize>::new();
    for row in &rows {
        let reason = row["reason"].as_str();
        assert_eq!(row["train_ok"].as_bool(), Some(reason.is_none()), "{row}");
        *reasons.entry((logger(row), reason)).or_default() += 1;
    }
    for name in ["bodies", "headers", "taod serve"] {
        let of = |reason| reasons.get(&(name.to_owned(), reason)).copied().unwrap_or_default();
        assert_eq!((of(Some("self")), of(None)), (own, CLIENTS), "{name}: {reasons:?}");
    }
    let letters: BTreeSet<String> = night.rows(Name::DeadLetters).iter().map(|row| row["reason"].to_string()).collect();
    assert!(!letters.is_empty(), "loads and unloads are no calls of a model");

    night.kill_at("dataset", &[]);
    let second = night.state().join("rounds/round-00002/dataset");
    let manifest: Value = serde_json::from_slice(&std::fs::read(second.join("manifest.json")).unwrap()).unwrap();
    let (ours, clients) = (3 * own as u64, 3 * CLIENTS as u64);
    assert_eq!(manifest["excluded"]["self"], ours);
    assert_eq!(manifest["rows"].as_u64(), first["rows"].as_u64().map(|rows| rows + ours + clients));
    let hashes = |rows: &[Value]| -> BTreeSet<String> {
        let logged = rows.iter().filter(|row| row["detail"]["sources"].is_null());
        logged.map(|row| row["prompt_hash"].as_str().unwrap().to_owned()).collect()
    };
    let mut expected = hashes(&before);
    let gained = of_clients.iter().map(|call| taod::record::prompt_hash(&call.messages(), None));
    expected.extend(gained);
    assert_eq!(hashes(&night.rows(Name::Splits)), expected);
}

/// Returns the night's model with room for a judge's questions.
fn roomy(folder: &Path) -> PathBuf {
    let copy = folder.join("roomy");
    std::fs::create_dir(&copy).unwrap();
    for entry in std::fs::read_dir(model()).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, copy.join(path.file_name().unwrap())).unwrap();
    }
    let config = std::fs::read_to_string(copy.join("config.json")).unwrap();
    let changed = config.replace("\"max_position_embeddings\": 512", "\"max_position_embeddings\": 4096");
    assert_ne!(changed, config);
    std::fs::write(copy.join("config.json"), changed).unwrap();
    copy
}

/// Writes the rest of the config: the endpoint is asked for everything that can be asked of a server.
fn set(night: &Night, brokers: &str, url: &str, served: u16) {
    let adapters = night.state().join("registry/adapters");
    night.set(&format!(
        "[ingest]\ncommit_interval_s = 1\nend_interval_s = 1\n[ingest.kafka]\nbrokers = \"{brokers}\"\n\
         topic = \"{TOPIC}\"\n[admin]\nlisten = \"127.0.0.1:0\"\n[serve]\naddress = \"127.0.0.1:{served}\"\n\
         base_model = \"base\"\nadapter_root = {adapters:?}\nlog_brokers = \"{brokers}\"\nlog_topic = \"{TOPIC}\"\n\
         [endpoint]\nurls = [\"{url}\"]\n[candidates.remote]\nurl = \"{url}\"\nmodel = \"base\"\n\
         [[rewards.scorers]]\nname = \"asked\"\nkind = \"judge\"\nurl = \"{url}\"\nmodel = \"base\"\nversion = \"1\"\n\
         rubric = \"The answer is short.\"\n\
         [dataset.synthetic]\nbelow = 48\nexamples = 1\nwaves = 1\nmax_tokens = 200\n"
    ));
    let config = std::fs::read_to_string(night.config()).unwrap();
    let judged = config.replace("train = [\"rules\"]", "train = [\"rules\", \"asked\"]");
    assert_ne!(judged, config);
    std::fs::write(night.config(), judged).unwrap();
}

/// Returns who logged a row.
fn logger(row: &Value) -> String {
    let extra = match row["extra"].as_str() {
        Some(text) => serde_json::from_str(text).unwrap(),
        None => row["extra"].clone(),
    };
    extra["logger"].as_str().unwrap_or("taod serve").to_owned()
}

fn every_kind_of_request_came_and_was_marked(asked: &[Got], version: &str) {
    for got in asked {
        assert!(got.is_marked, "{} came without the header: {}", got.path, got.body);
        let user = got.body["user"].as_str();
        assert!(got.path != "/v1/chat/completions" || user == Some("taod-internal"), "{}", got.body);
    }
    let says = |got: &Got, part: &str| got.body["messages"].to_string().contains(part);
    let count = |kind: &dyn Fn(&Got) -> bool| asked.iter().filter(|got| kind(got)).count();
    let kinds: [(&str, usize); 7] = [
        ("the doctor's question", count(&|got| says(got, "Say yes."))),
        ("candidates", count(&|got| got.body["n"] == 8 && says(got, "Compare canary"))),
        ("made prompts", count(&|got| says(got, "Below are messages that people sent"))),
        ("a judge's questions", count(&|got| got.body["top_logprobs"] == 20)),
        ("the new version's answers", count(&|got| got.body["model"] == version)),
        ("the stable name's answers", count(&|got| got.body["model"] == "production")),
        ("loads", count(&|got| got.path == "/v1/load_lora_adapter")),
    ];
    assert!(kinds.iter().all(|(_, count)| *count > 0), "{kinds:?}");
}
