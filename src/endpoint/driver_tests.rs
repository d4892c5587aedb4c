//! Drivers of servers that cannot be run here, against stand-ins that keep to those servers' sources or documents.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::body::Bytes;
use axum::http::{StatusCode, Uri};
use serde_json::{Value, json};

use super::directory::Directory;
use super::mistralrs::MistralRs;
use super::server::{Answers, Load, Question, Server};
use super::sglang::Sglang;
use super::*;
use crate::record::Message;
use crate::registry::{Base, Lineage, Registry};

/// Adapters by name, each with its path and a count of loads; and every body that was posted.
#[derive(Default)]
struct State {
    adapters: BTreeMap<String, (String, u64)>,
    loads: u64,
    posted: Vec<(String, Value)>,
}

type Shared = Arc<Mutex<State>>;
type Respond = fn(&mut State, &str, &Value) -> (u16, Value);

async fn stand_in(respond: Respond) -> (String, Shared) {
    let shared = Shared::default();
    let state = shared.clone();
    let handler = async move |uri: Uri, body: Bytes| {
        let body: Value = serde_json::from_slice(&body).unwrap_or(Value::Null);
        let mut state = state.lock().unwrap();
        state.posted.push((uri.path().to_owned(), body.clone()));
        let (status, answer) = respond(&mut state, uri.path(), &body);
        (StatusCode::from_u16(status).unwrap(), axum::Json(answer))
    };
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move { axum::serve(listener, Router::new().fallback(handler)).await.unwrap() });
    (url, shared)
}

fn settings(url: String, kind: Kind, alias: Alias) -> Settings {
    Settings { urls: vec![url], kind, alias, retries: 0, load_timeout_seconds: 1, ..Settings::default() }
}

fn cards(state: &State) -> (u16, Value) {
    let card = |(name, (path, _)): (&String, &(String, u64))| json!({"id": name, "root": path, "parent": "base"});
    let mut cards = vec![json!({"id": "base", "root": "/m"})];
    cards.extend(state.adapters.iter().map(card));
    (200, json!({"data": cards}))
}

fn answer() -> (u16, Value) {
    let content = [json!({"token": "hi", "logprob": -0.5})];
    (
        200,
        json!({"choices": [{"message": {"content": "hi"}, "finish_reason": "stop", "logprobs": {"content": content}}]}),
    )
}

fn sglang(state: &mut State, path: &str, body: &Value) -> (u16, Value) {
    let name = body["lora_name"].as_str().unwrap_or_default().to_owned();
    let failed = |message: String| (400, json!({"success": false, "error_message": message, "loaded_adapters": {}}));
    match path {
        "/v1/models" => cards(state),
        "/load_lora_adapter" if state.adapters.contains_key(&name) => failed(format!("{name} is already loaded.")),
        "/load_lora_adapter" if name == "dora" => failed("DoRA is\nnot supported".into()),
        "/load_lora_adapter" => {
            state.adapters.insert(name, (body["lora_path"].as_str().unwrap().to_owned(), 0));
            (200, json!({"success": true, "error_message": null}))
        }
        "/unload_lora_adapter" if state.adapters.remove(&name).is_some() => (200, json!({"success": true})),
        "/unload_lora_adapter" => failed(format!("{name} is not loaded")),
        "/v1/chat/completions" => answer(),
        _ => (404, json!({"detail": "Not Found"})),
    }
}

#[tokio::test]
async fn sglang_loads_by_its_own_routes_and_is_asked_for_base_and_adapter() {
    let (url, shared) = stand_in(sglang).await;
    let server = Sglang::replicas(&settings(url, Kind::Sglang, Alias::Reload)).unwrap().remove(0);
    let (one, two) = (Path::new("/a/one"), Path::new("/a/two"));
    for _ in 0..2 {
        server.load("v1", one, Load::Fresh).await.unwrap(); // the second finds it there
    }
    assert!(server.holds("v1", one).await.unwrap() && !server.holds("v1", two).await.unwrap());
    let error = server.load("v1", two, Load::Fresh).await.unwrap_err().to_string();
    assert!(error.contains("answered 400 to the load of 'v1': v1 is already loaded."), "{error}");
    let error = server.load("dora", one, Load::Fresh).await.unwrap_err().to_string();
    assert!(error.contains("DoRA is not supported"), "{error}");
    let messages = [Message::text("user", "hi")];
    for (model, asked) in [("base", "base"), ("v1", "base:v1")] {
        let reply = server.ask(&Question { model, messages: &messages, max_tokens: 1 }).await.unwrap();
        assert_eq!((reply.token_ids, reply.pieces), (None, vec!["hi".to_owned()]));
        assert_eq!(shared.lock().unwrap().posted.last().unwrap().1["model"], asked);
    }
    for _ in 0..2 {
        server.unload("v1").await.unwrap();
    }
    assert_eq!(server.names().await.unwrap(), Vec::<String>::new());
}

fn mistralrs(state: &mut State, path: &str, body: &Value) -> (u16, Value) {
    let name = body["lora_name"].as_str().unwrap_or_default().to_owned();
    let told = |name: &str, (source, generation): &(String, u64)| json!({"id": name, "source": source, "generation": format!("{generation:064}")});
    let failed = |status, code: &str| (status, json!({"error": {"message": code, "type": "x", "code": code}}));
    let expected = body["expected_generation"].as_str();
    let there = state.adapters.get(&name).cloned();
    let generation = there.as_ref().map(|(_, generation)| format!("{generation:064}"));
    match (path, &there) {
        ("/v1/lora_adapters", _) => {
            let data: Vec<Value> = state.adapters.iter().map(|(name, one)| told(name, one)).collect();
            (200, json!({"object": "list", "data": data}))
        }
        ("/v1/load_lora_adapter", Some(_)) if body["load_inplace"] != true => {
            failed(409, "lora_adapter_already_loaded")
        }
        ("/v1/load_lora_adapter", Some(_)) if expected != generation.as_deref() => {
            failed(409, "lora_generation_mismatch")
        }
        ("/v1/load_lora_adapter", _) => {
            state.loads += 1;
            let one = (body["lora_path"].as_str().unwrap().to_owned(), state.loads);
            state.adapters.insert(name.clone(), one.clone());
            (200, told(&name, &one))
        }
        ("/v1/unload_lora_adapter", Some(one)) if expected == generation.as_deref() => {
            state.adapters.remove(&name);
            (200, told(&name, one))
        }
        _ => failed(404, "lora_adapter_not_found"),
    }
}

#[tokio::test]
async fn mistral_rs_is_told_which_generation_is_to_be_replaced() {
    let (url, shared) = stand_in(mistralrs).await;
    let server = MistralRs::replicas(&settings(url, Kind::Mistralrs, Alias::Inplace)).unwrap().remove(0);
    let (one, two) = (Path::new("/a/one"), Path::new("/a/two"));
    server.load("stable", one, Load::InPlace).await.unwrap();
    server.load("stable", one, Load::InPlace).await.unwrap();
    assert_eq!(shared.lock().unwrap().loads, 1, "what is there is not loaded again");
    let error = server.load("stable", two, Load::Fresh).await.unwrap_err().to_string();
    assert!(error.contains("lora_adapter_already_loaded"), "{error}");
    server.load("stable", two, Load::InPlace).await.unwrap();
    let posted = shared.lock().unwrap().posted.clone();
    let load = posted.iter().rfind(|(path, _)| path == "/v1/load_lora_adapter").unwrap();
    assert_eq!(load.1["expected_generation"], format!("{:064}", 1));
    for _ in 0..2 {
        server.unload("stable").await.unwrap();
    }
    assert!(!server.holds("stable", two).await.unwrap());
}

/// Lists and answers what lies in the folder that the state's first posted body names, as a watcher of it does.
fn watcher(state: &mut State, path: &str, body: &Value) -> (u16, Value) {
    let folder = state.posted.iter().find_map(|(_, body)| Some(PathBuf::from(body["watch"].as_str()?)));
    let folder = folder.unwrap_or_default();
    let is_adapter = |name: &str| folder.join(name).join("adapter_config.json").is_file();
    match path {
        "/v1/models" => cards(&State::default()),
        "/v1/chat/completions" if is_adapter(body["model"].as_str().unwrap()) => answer(),
        _ => (404, json!({"error": {"message": "The model does not exist."}})),
    }
}

#[tokio::test]
async fn a_folder_is_published_whole_and_stays_when_it_is_retired() {
    let (url, _) = stand_in(watcher).await;
    let folder = tempfile::tempdir().unwrap();
    let (registry, published) = (folder.path().join("registry/taod-1"), folder.path().join("published"));
    std::fs::create_dir_all(&registry).unwrap();
    std::fs::write(registry.join("adapter_config.json"), r#"{"base_model_name_or_path": "trained"}"#).unwrap();
    std::fs::write(registry.join("adapter_model.safetensors"), "weights").unwrap();
    reqwest::Client::new().post(&url).json(&json!({"watch": published})).send().await.unwrap();
    let publish = |how| publish::Settings {
        folder: published.clone(),
        how,
        base_model_path: if how == publish::How::Copy { "/models/served".into() } else { String::new() },
        list: publish::List::Gie,
        list_path: folder.path().join("sidecar.yaml"),
        remove: how == publish::How::Copy,
    };
    for how in [publish::How::Link, publish::How::Copy] {
        let settings = Settings { publish: publish(how), ..settings(url.clone(), Kind::Directory, Alias::Clients) };
        assert_eq!(settings.validate(), Ok(()));
        let server = Directory::replicas(&settings).unwrap().remove(0);
        for _ in 0..2 {
            server.load("taod-1", &registry, Load::Fresh).await.unwrap();
        }
        assert!(server.holds("taod-1", &registry).await.unwrap());
        let place = published.join("taod-1");
        assert_eq!(place.is_symlink(), how == publish::How::Link);
        let config = std::fs::read_to_string(place.join("adapter_config.json")).unwrap();
        assert_eq!(config.contains("/models/served"), how == publish::How::Copy, "{config}");
        let sidecar = || -> Value { crate::durable::read_json(&settings.publish.list_path).unwrap() };
        let wanted = sidecar()["vLLMLoRAConfig"]["ensureExist"]["models"][0].clone();
        assert_eq!(wanted, json!({"id": "taod-1", "source": place, "base-model": "base"}));
        server.unload("taod-1").await.unwrap();
        assert_eq!(sidecar()["vLLMLoRAConfig"]["ensureExist"]["models"], json!([]));
        assert_eq!(place.exists(), how == publish::How::Link, "what a server may read again stays");
        if how == publish::How::Link {
            std::fs::remove_file(&place).unwrap();
        }
        assert!(registry.join("adapter_model.safetensors").exists());
    }
    // A copy that stays when its version is retired is what a rollback comes back to.
    let publish = publish::Settings { remove: false, ..publish(publish::How::Copy) };
    let settings = Settings { publish, ..settings(url.clone(), Kind::Directory, Alias::Clients) };
    let server = Directory::replicas(&settings).unwrap().remove(0);
    for _ in 0..2 {
        server.load("taod-1", &registry, Load::Fresh).await.unwrap();
        server.unload("taod-1").await.unwrap();
        assert!(published.join("taod-1").is_dir());
    }
    // Other weights under the name of a version are never taken for it.
    std::fs::write(published.join("taod-1/adapter_model.safetensors"), "others").unwrap();
    let error = server.load("taod-1", &registry, Load::Fresh).await.unwrap_err().to_string();
    assert!(error.contains("it is there already"), "{error}");
}

#[tokio::test]
async fn a_webhook_is_told_and_a_server_that_does_not_follow_is_named() {
    let (url, shared) = stand_in(watcher).await;
    let settings = Settings { hook: format!("{url}/hook"), ..settings(url.clone(), Kind::Webhook, Alias::Clients) };
    let server = Directory::replicas(&settings).unwrap().remove(0);
    let error = server.load("v1", Path::new("/a/v1"), Load::Fresh).await.unwrap_err().to_string();
    assert!(error.contains("answered 404 to the webhook's load of 'v1'"), "{error}");
    let told = shared.lock().unwrap().posted.iter().rfind(|(path, _)| path == "/hook").unwrap().1.clone();
    assert_eq!(told, json!({"event": "load", "server": url, "name": "v1", "path": "/a/v1"}));
    let settings = Settings { hook: String::new(), ..settings };
    let error = Directory::replicas(&settings).unwrap()[0].load("v1", Path::new("/a/v1"), Load::Fresh).await;
    let error = error.unwrap_err().to_string();
    assert!(error.contains("does not have 'v1' 1 s after /a/v1 was there for it"), "{error}");
}

#[tokio::test]
async fn a_hook_on_another_host_is_told_where_to_fetch_each_file_and_its_hash() {
    let (url, shared) = stand_in(watcher).await;
    let pull_url = "https://taod.example.com:9464/".to_owned();
    let settings =
        Settings { hook: format!("{url}/hook"), pull_url, ..settings(url.clone(), Kind::Webhook, Alias::Clients) };
    assert_eq!(settings.validate(), Ok(()));
    let folder = tempfile::tempdir().unwrap();
    let adapter = folder.path().join("adapter");
    std::fs::create_dir(&adapter).unwrap();
    std::fs::write(adapter.join("adapter_config.json"), "{}").unwrap();
    std::fs::write(adapter.join("adapter_model.safetensors"), "weights").unwrap();
    let registry = Registry::open(&folder.path().join("registry"), &Default::default()).unwrap();
    let manifest = registry.register(&adapter, lineage()).unwrap();
    let server = Directory::replicas(&settings).unwrap().remove(0);
    server.load(&manifest.version, &registry.path(&manifest.version), Load::Fresh).await.unwrap_err();
    let told = shared.lock().unwrap().posted.iter().rfind(|(path, _)| path == "/hook").unwrap().1.clone();
    let at = format!("https://taod.example.com:9464/api/v1/adapters/{}/files", manifest.version);
    let file = |name: &str| json!({"name": name, "url": format!("{at}/{name}"), "sha256": manifest.files[name]});
    assert_eq!(told["files"], json!([file("adapter_config.json"), file("adapter_model.safetensors")]));
    let error = server.load("v1", folder.path(), Load::Fresh).await.unwrap_err().to_string();
    assert!(error.contains("manifest.json"), "{error}");
}

fn lineage() -> Lineage {
    Lineage {
        base: Base { name: "m".into(), sha256: "0".into() },
        round: None,
        dataset_sha256: None,
        tables: BTreeMap::new(),
        offsets: Vec::new(),
        notes: BTreeMap::new(),
        created_us: 1,
    }
}
