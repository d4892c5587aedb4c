//! A set-up that is sound, and then each thing wrecked alone: the doctor names that thing, and no other.

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::body::Bytes;
use axum::http::{HeaderMap, HeaderValue, StatusCode, Uri};
use chrono::{TimeDelta, Utc};
use serde_json::{Value, json};

use super::*;
use crate::endpoint::{Alias, Kind};
use crate::engine::{Adapter, LoraSpec, Model, save_peft};
use crate::query_log::embedded::EmbeddedBroker;
use crate::registry::{Base, Lineage, Registry};
use crate::rewards::{Scorer, Workload};
use crate::round::Paths;
use crate::table::{Name, Table, TxnStep, schema};

/// What is wrong with the server that stands in for vLLM.
#[derive(Debug, Clone, Default)]
struct Wrong {
    no_routes: bool,
    refuses_loads: bool,
    max_loras: Option<u64>,
    /// Seconds that its clock is ahead.
    ahead: i64,
    base: Option<&'static str>,
}

/// Adapters by name, and every name that was ever loaded.
#[derive(Default)]
struct Loaded {
    now: BTreeMap<String, String>,
    ever: Vec<String>,
}

/// A server that keeps to vLLM's answers as docs/endpoints.md lists them.
async fn vllm(wrong: Wrong) -> (String, Arc<Mutex<Loaded>>) {
    let loaded = Arc::new(Mutex::new(Loaded::default()));
    let state = loaded.clone();
    let handler = async move |uri: Uri, body: Bytes| {
        let body: Value = serde_json::from_slice(&body).unwrap_or(Value::Null);
        let (status, answer) = respond(&wrong, &mut state.lock().unwrap(), uri.path(), &body);
        let date = (Utc::now() + TimeDelta::seconds(wrong.ahead)).format("%a, %d %b %Y %H:%M:%S GMT").to_string();
        let headers = HeaderMap::from_iter([(axum::http::header::DATE, HeaderValue::from_str(&date).unwrap())]);
        (StatusCode::from_u16(status).unwrap(), headers, answer)
    };
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move { axum::serve(listener, Router::new().fallback(handler)).await.unwrap() });
    (url, loaded)
}

fn respond(wrong: &Wrong, loaded: &mut Loaded, path: &str, body: &Value) -> (u16, String) {
    let (base, name) = (wrong.base.unwrap_or("base"), body["lora_name"].as_str().unwrap_or_default().to_owned());
    let no_route = || (404, json!({"detail": "Not Found"}).to_string());
    let refused = |status, why: String| (status, json!({"error": {"message": why}}).to_string());
    match path {
        "/v1/models" => {
            let mut cards = vec![json!({"id": base, "root": "/m"})];
            cards.extend(loaded.now.iter().map(|(name, path)| json!({"id": name, "root": path, "parent": base})));
            (200, json!({ "data": cards }).to_string())
        }
        "/metrics" => match wrong.max_loras {
            Some(max) => {
                (200, format!("vllm:lora_requests_info{{max_lora=\"{max}\",running_lora_adapters=\"\"}} 1.0\n"))
            }
            None => (200, "vllm:num_requests_running 0\n".into()),
        },
        "/v1/load_lora_adapter" | "/v1/unload_lora_adapter" if wrong.no_routes => no_route(),
        "/v1/load_lora_adapter" if wrong.refuses_loads => refused(500, "No such file or directory".into()),
        "/v1/load_lora_adapter" => {
            loaded.ever.push(name.clone());
            loaded.now.insert(name, body["lora_path"].as_str().unwrap().to_owned());
            (200, "\"Success\"".into())
        }
        "/v1/unload_lora_adapter" => match loaded.now.remove(&name) {
            Some(_) => (200, "\"Success\"".into()),
            None => refused(404, format!("The lora adapter '{name}' cannot be found.")),
        },
        "/v1/chat/completions" if body["model"] == base || loaded.now.contains_key(body["model"].as_str().unwrap()) => {
            let content = [json!({"token": "yes", "logprob": -0.5})];
            let choice =
                json!({"message": {"content": "yes"}, "finish_reason": "stop", "logprobs": {"content": content}});
            (200, json!({"choices": [choice]}).to_string())
        }
        "/v1/chat/completions" => refused(404, format!("The model `{}` does not exist.", body["model"])),
        _ => no_route(),
    }
}

/// A config with everything it names there and right; it goes with the value.
struct Setup {
    folder: tempfile::TempDir,
    config: Config,
    loaded: Arc<Mutex<Loaded>>,
    _broker: EmbeddedBroker,
}

impl Setup {
    async fn new(wrong: Wrong) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let broker = EmbeddedBroker::start("calls", 2).unwrap();
        let (url, loaded) = vllm(wrong).await;
        let mut config = Config::default();
        config.state.dir = folder.path().join("state");
        std::fs::create_dir(&config.state.dir).unwrap();
        set_mode(&config.state.dir, 0o750);
        config.ingest.kafka.brokers = broker.brokers().to_owned();
        config.ingest.kafka.topic = "calls".into();
        config.ingest.kafka.connect_timeout_s = 5;
        config.model.path = model().display().to_string();
        (config.endpoint.kind, config.endpoint.alias) = (Kind::Vllm, Alias::Inplace);
        (config.endpoint.urls, config.endpoint.retries) = (vec![url], 0);
        (config.rewards.train, config.rewards.gate) = (vec![Scorer::Rules], vec![Scorer::Rules]);
        config.tuning.rank = 4;
        config.workload = vec![workload("rules = [{ kind = 'length', unit = 'words', max = 50 }]")];
        Setup { folder, config, loaded, _broker: broker }
    }

    /// Returns what the checks find that is not ok.
    async fn wrong(&self, checks: &[Check]) -> Vec<Finding> {
        let report = examine(&self.config, &Options { only: checks.to_vec(), load: false }).await;
        report.findings.into_iter().filter(|finding| finding.state != State::Ok).collect()
    }

    /// Checks that `check` alone finds exactly one thing wrong, which says `part` and what to do.
    async fn finds(&self, check: Check, state: State, part: &str) {
        let wrong = self.wrong(&[check]).await;
        let [finding] = wrong.as_slice() else { panic!("{wrong:?}") };
        assert_eq!((finding.check, finding.state), (check, state), "{finding:?}");
        assert!(finding.says.contains(part), "{finding:?}");
        assert!(finding.remedy.as_ref().is_some_and(|remedy| !remedy.is_empty()), "{finding:?}");
    }
}

fn model() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/models/tiny-llama")
}

fn workload(rest: &str) -> Workload {
    toml::from_str(&format!("name = 'chat'\n{rest}")).unwrap()
}

fn set_mode(path: &Path, mode: u32) {
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
}

/// Every check whose outcome the machine that runs the test does not decide.
const OURS: [Check; 9] = [
    Check::State,
    Check::Secrets,
    Check::Broker,
    Check::Topic,
    Check::Tables,
    Check::Model,
    Check::Scorers,
    Check::Endpoint,
    Check::Clock,
];

#[tokio::test(flavor = "multi_thread")]
async fn a_sound_set_up_is_found_sound_and_only_what_is_asked_for_is_looked_at() {
    let setup = Setup::new(Wrong { max_loras: Some(2), ..Wrong::default() }).await;
    let report = examine(&setup.config, &Options { only: OURS.to_vec(), load: false }).await;
    assert_eq!(report.state, State::Ok, "{}", report.explain());
    let found: std::collections::BTreeSet<Check> = report.findings.iter().map(|finding| finding.check).collect();
    assert_eq!(found.into_iter().collect::<Vec<_>>(), OURS, "every check has its line");
    assert!(setup.loaded.lock().unwrap().ever.is_empty(), "nothing was loaded");
    assert_eq!(std::fs::read_dir(&setup.config.state.dir).unwrap().count(), 0, "nothing is left behind");
    let one = examine(&setup.config, &Options { only: vec![Check::Disk], load: false }).await;
    assert!(!one.findings.is_empty() && one.findings.iter().all(|finding| finding.check == Check::Disk), "{one:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_state_folder_that_cannot_serve_is_told_with_the_cure() {
    let mut setup = Setup::new(Wrong::default()).await;
    set_mode(&setup.config.state.dir, 0o755);
    setup.finds(Check::State, State::Warning, "open to every user (mode 755)").await;
    set_mode(&setup.config.state.dir, 0o700);
    if super::place::user() == 0 {
        let stray = setup.config.state.dir.join("rounds");
        std::fs::create_dir(&stray).unwrap();
        std::os::unix::fs::chown(&stray, Some(12345), None).unwrap();
        setup.finds(Check::State, State::Failure, "belong to user 12345, not to 0").await;
    }
    setup.config.state.dir = setup.folder.path().join("file");
    std::fs::write(&setup.config.state.dir, "").unwrap();
    setup.finds(Check::State, State::Failure, "is no folder").await;
    setup.config.state.dir = "/proc/self/ns/taod".into();
    setup.finds(Check::State, State::Failure, "cannot be made in /proc/self/ns").await;
    setup.config.state.dir = setup.folder.path().join("new");
    assert_eq!(setup.wrong(&[Check::State]).await, [], "a first start makes its folder");
    setup.config.state.dir = "/proc/self/ns".into();
    let wrong = setup.wrong(&[Check::State]).await;
    assert!(wrong[0].says.contains("cannot be written to"), "{wrong:?}");
}

#[test]
fn a_full_disk_is_told_before_it_is_one() {
    let state = |bytes, names| place::judge("state.dir", Path::new("/"), Ok(place::Room { bytes, names })).state;
    assert_eq!(state(100 << 30, u64::MAX), State::Ok);
    assert_eq!(state(5 << 30, u64::MAX), State::Warning);
    assert_eq!(state(100 << 20, u64::MAX), State::Failure);
    assert_eq!(state(100 << 30, 30), State::Failure, "no file can be made without a name");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_secret_that_is_missing_or_open_is_told_and_its_text_is_not() {
    let mut setup = Setup::new(Wrong::default()).await;
    let path = setup.folder.path().join("key");
    setup.config.endpoint.api_key_file = path.clone();
    setup.finds(Check::Secrets, State::Failure, "endpoint.api_key_file: cannot read").await;
    std::fs::write(&path, "hunter2").unwrap();
    set_mode(&path, 0o644);
    setup.finds(Check::Secrets, State::Warning, "every user can read").await;
    assert!(!setup.wrong(&[Check::Secrets]).await[0].says.contains("hunter2"));
    set_mode(&path, 0o640);
    setup.config.ingest.kafka.secret_files.insert("sasl.password".into(), "/no/such".into());
    setup.finds(Check::Secrets, State::Failure, "ingest.kafka.secret_files.sasl.password").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broker_that_is_down_and_a_topic_that_is_not_there_are_two_things() {
    let mut setup = Setup::new(Wrong::default()).await;
    setup.config.ingest.kafka.topic = "typo".into();
    setup.finds(Check::Topic, State::Failure, "topic typo does not exist").await;
    assert_eq!(setup.wrong(&[Check::Broker]).await, []);
    setup.config.ingest.kafka.brokers = "127.0.0.1:1".into();
    setup.config.ingest.kafka.connect_timeout_s = 1;
    setup.finds(Check::Broker, State::Failure, "cannot reach kafka at 127.0.0.1:1").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_that_is_not_the_stored_one_is_told_by_its_offsets() {
    let setup = Setup::new(Wrong::default()).await;
    let kafka = &setup.config.ingest.kafka;
    let place = crate::query_log::TopicPartition::new("calls", 1);
    let mut queries = setup.config.state.open_tables().unwrap().open_one(Name::Queries).await.unwrap();
    let step = TxnStep { app_id: kafka.app_id(&place), expect: None, set: 40 };
    queries.append(&[], &[step]).await.unwrap();
    setup.finds(Check::Topic, State::Failure, "partition 1 (next 40, kafka holds 0 to 0)").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn tables_of_somebody_else_and_a_place_that_takes_no_file_are_told() {
    let mut setup = Setup::new(Wrong::default()).await;
    let tables = setup.config.state.open_tables().unwrap();
    Table::open_or_create(&tables.root().join("queries"), &schema::ROUNDS).await.unwrap();
    setup.finds(Check::Tables, State::Failure, "does not fit taod's schema").await;
    setup.config.state.tables = "/proc/self/ns".into();
    setup.finds(Check::Tables, State::Failure, "cannot write beside table").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_of_an_earlier_taod_is_told_and_left_as_it_is() {
    let setup = Setup::new(Wrong::default()).await;
    let tables = setup.config.state.open_tables().unwrap();
    tables.open_one(Name::GateUsage).await.unwrap();
    let log = setup.config.state.dir.join("tables/gate_usage/_delta_log/00000000000000000000.json");
    let text = std::fs::read_to_string(&log).unwrap();
    let column = r#"{\"name\":\"time\",\"type\":\"timestamp\",\"nullable\":true,\"metadata\":{}}"#;
    let older: String = text.replace(&format!(",{column}"), "").replace(&format!("{column},"), "");
    assert_ne!(older, text, "the column is not written as the test thinks: {text}");
    std::fs::write(&log, &older).unwrap();
    setup.finds(Check::Tables, State::Warning, "gate_usage lacks time").await;
    assert_eq!(std::fs::read_dir(log.parent().unwrap()).unwrap().count(), 1, "no column was added");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_that_is_missing_or_another_one_is_told() {
    let mut setup = Setup::new(Wrong::default()).await;
    register(&setup, "0".repeat(64));
    setup.finds(Check::Model, State::Failure, "the registry's adapters are of").await;
    setup.config.model.path = setup.folder.path().join("nothing").display().to_string();
    setup.finds(Check::Model, State::Failure, "nothing").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_scorer_that_fails_is_told_by_name_and_the_others_still_count() {
    let mut setup = Setup::new(Wrong::default()).await;
    let broken = toml::from_str("name = 'broken'\nkind = 'command'\ncommand = ['/bin/sh', '-c', 'exit 3']").unwrap();
    setup.config.rewards.scorers = vec![broken];
    setup.config.rewards.train = vec![Scorer::Rules, Scorer::Defined("broken".into())];
    setup.finds(Check::Scorers, State::Failure, "broken").await;
    setup.config.rewards.train = vec![Scorer::Similarity];
    setup.config.rewards.similarity.model = setup.folder.path().join("nothing");
    setup.finds(Check::Scorers, State::Failure, "rewards.similarity.model").await;
    setup.config.workload = vec![workload("")];
    setup.finds(Check::Scorers, State::Failure, "no workload has rules").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_wrong_with_a_server_is_told_by_what_it_answers() {
    let find = async |wrong: Wrong, check, state, part: &str| Setup::new(wrong).await.finds(check, state, part).await;
    let sound = Wrong::default;
    find(Wrong { no_routes: true, ..sound() }, Check::Endpoint, State::Failure, "VLLM_ALLOW_RUNTIME_LORA_UPDATING")
        .await;
    find(
        Wrong { base: Some("llama"), ..sound() },
        Check::Endpoint,
        State::Failure,
        "The model `\"base\"` does not exist",
    )
    .await;
    find(Wrong { max_loras: Some(1), ..sound() }, Check::Endpoint, State::Warning, "--max-loras 1").await;
    find(Wrong { ahead: 20, ..sound() }, Check::Clock, State::Warning, "s behind http").await;
    find(Wrong { ahead: -90, ..sound() }, Check::Clock, State::Failure, "s ahead of http").await;
    let mut setup = Setup::new(sound()).await;
    setup.config.endpoint.urls.push("http://127.0.0.1:1".into());
    setup.finds(Check::Endpoint, State::Failure, "endpoint http://127.0.0.1:1 cannot be reached").await;
    setup.config.endpoint.api_key_file = "/no/such".into();
    setup.finds(Check::Endpoint, State::Failure, "endpoint.api_key_file: cannot read /no/such").await;
}

/// Registers a zero adapter of the model, noted as trained on a base of this hash, and returns its version.
fn register(setup: &Setup, base_sha256: String) -> String {
    let model = Model::load(&setup.config.model.path).unwrap();
    let spec = LoraSpec { rank: 2, ..LoraSpec::default() };
    let folder = setup.folder.path().join("adapter");
    let tensors = Adapter::zero(&model, &spec).unwrap().tensors(model.config()).unwrap();
    save_peft(&folder, model.identity(), &spec, &tensors).unwrap();
    let registry = Registry::open(&Paths::new(&setup.config.state.dir).registry(), &setup.config.registry).unwrap();
    let base = Base { name: "tiny".into(), sha256: base_sha256 };
    let notes = BTreeMap::new();
    let lineage = Lineage {
        base,
        round: None,
        dataset_sha256: None,
        tables: BTreeMap::new(),
        offsets: Vec::new(),
        notes,
        created_us: 1,
    };
    registry.register(&folder, lineage).unwrap().version
}

#[tokio::test(flavor = "multi_thread")]
async fn a_served_version_that_a_replica_lost_or_the_disk_damaged_is_told() {
    let setup = Setup::new(Wrong::default()).await;
    let identity = Model::load(&setup.config.model.path).unwrap().identity().clone();
    let version = register(&setup, identity.sha256);
    let registry = Registry::open(&Paths::new(&setup.config.state.dir).registry(), &setup.config.registry).unwrap();
    let intent = registry.override_promote(&version, "ada", "test", 1).unwrap();
    registry.complete(&intent, 2).unwrap();
    let lost = format!("does not have {version}, which clients should get");
    // The folder of the registry is private here, which a server of another user is told of besides.
    let wrong = setup.wrong(&[Check::Endpoint]).await;
    assert!(wrong.iter().any(|finding| finding.state == State::Warning && finding.says.contains(&lost)), "{wrong:?}");
    let path = std::path::absolute(registry.path(&version)).unwrap();
    setup.loaded.lock().unwrap().now.insert(version.clone(), path.display().to_string());
    let wrong = setup.wrong(&[Check::Endpoint]).await;
    assert!(!wrong.iter().any(|finding| finding.says.contains(&lost)), "{wrong:?}");
    std::fs::write(path.join("adapter_model.safetensors"), "damaged").unwrap();
    let wrong = setup.wrong(&[Check::Endpoint]).await;
    assert!(wrong.iter().any(|finding| finding.says.contains("has SHA-256")), "{wrong:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_load_is_proved_on_request_and_leaves_the_folder_that_a_server_may_read_again() {
    let options = Options { only: vec![Check::Endpoint], load: true };
    let setup = Setup::new(Wrong::default()).await;
    let report = examine(&setup.config, &options).await;
    assert_eq!(report.state, State::Ok, "{}", report.explain());
    let Loaded { now, ever } = std::mem::take(&mut *setup.loaded.lock().unwrap());
    let [name] = ever.as_slice() else { panic!("{ever:?}") };
    assert!(now.is_empty() && name.starts_with("taod-doctor-r4-"), "{name}");
    let registry = Registry::open(&Paths::new(&setup.config.state.dir).registry(), &setup.config.registry).unwrap();
    assert!(registry.path(name).join("adapter_model.safetensors").is_file());
    assert_eq!(registry.list().unwrap().len(), 0, "it is no version");

    let setup = Setup::new(Wrong { refuses_loads: true, ..Wrong::default() }).await;
    let report = examine(&setup.config, &options).await;
    let said = report.explain();
    assert!(report.state == State::Failure && said.contains("No such file or directory"), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_that_cannot_sign_what_would_count_here_is_told() {
    let mut setup = Setup::new(Wrong::default()).await;
    let [own, other] = ["own", "other"].map(|name| {
        let path = setup.folder.path().join(name);
        (crate::signature::SigningKey::generate(&path).unwrap().to_string(), path)
    });
    setup.config.registry.trusted_keys = vec![own.0];
    setup.finds(Check::Secrets, State::Warning, "names no key to make them").await;
    setup.config.registry.signing_key_file = other.1;
    setup.finds(Check::Secrets, State::Failure, &format!("does not hold {}", other.0)).await;
    set_mode(&own.1, 0o640);
    setup.config.registry.signing_key_file = own.1.clone();
    setup.finds(Check::Secrets, State::Failure, "mode 640").await;
    set_mode(&own.1, 0o600);
    assert_eq!(setup.wrong(&[Check::Secrets]).await, []);
}

/// What a stand-in for llama.cpp remembers: the prompt of its one slot, and with `--cache-ram` those before it.
#[derive(Clone, Copy)]
struct Flags {
    no_cache_prompt: bool,
    cache_ram: bool,
    /// Whether answers tell how many tokens of the prompt were computed.
    tells: bool,
}

/// A server that computes and counts prompts as llama.cpp's does: measured on xllamacpp 2026.10.11549.
async fn llama_cpp(flags: Flags) -> String {
    let kept = Arc::new(Mutex::new((String::new(), Vec::<String>::new())));
    let handler = async move |uri: Uri, body: Bytes| {
        let body: Value = serde_json::from_slice(&body).unwrap_or(Value::Null);
        let (slot, memory) = &mut *kept.lock().unwrap();
        if uri.path() != "/v1/chat/completions" {
            return axum::Json(if uri.path() == "/lora-adapters" {
                json!([])
            } else {
                json!({"data": [{"id": "base"}]})
            });
        }
        let text = body["messages"][0]["content"].as_str().unwrap().to_owned();
        let goes_on = body["cache_prompt"].as_bool().unwrap_or(!flags.no_cache_prompt);
        let is_known = *slot == text || flags.cache_ram && memory.contains(&text);
        // The chat template's beginning is the same in all.
        let computed = match goes_on && !slot.is_empty() {
            true if is_known => 1,
            true => 56,
            false => 80,
        };
        memory.push(std::mem::replace(slot, text));
        let content = [json!({"token": "yes", "logprob": -0.5})];
        let choice = json!({"message": {"content": "yes"}, "finish_reason": "stop", "logprobs": {"content": content}});
        let timings = if flags.tells { json!({"prompt_n": computed, "cache_n": 80 - computed}) } else { Value::Null };
        axum::Json(json!({"choices": [choice], "timings": timings, "usage": {"prompt_tokens": 80}}))
    };
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move { axum::serve(listener, Router::new().fallback(handler)).await.unwrap() });
    url
}

#[tokio::test(flavor = "multi_thread")]
async fn a_llama_cpp_that_remembers_prompts_is_told_by_what_it_computes_again() {
    let mut setup = Setup::new(Wrong::default()).await;
    (setup.config.endpoint.kind, setup.config.endpoint.alias) = (Kind::Llamacpp, Alias::Native);
    let sound = Flags { no_cache_prompt: true, cache_ram: false, tells: true };
    for (flags, finding) in [
        (sound, None),
        (Flags { no_cache_prompt: false, ..sound }, Some((State::Failure, "also under another adapter"))),
        (Flags { no_cache_prompt: false, cache_ram: true, ..sound }, Some((State::Failure, "would not be proven"))),
        (Flags { cache_ram: true, ..sound }, Some((State::Warning, "a client that asks with `cache_prompt`"))),
        (Flags { tells: false, ..sound }, Some((State::Warning, "does not tell how many tokens"))),
    ] {
        setup.config.endpoint.urls = vec![llama_cpp(flags).await];
        match finding {
            Some((state, part)) => setup.finds(Check::Endpoint, state, part).await,
            None => assert_eq!(setup.wrong(&[Check::Endpoint]).await, []),
        }
    }
}
