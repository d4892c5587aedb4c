//! A model by its hub id, from a stand-in that answers as the hub does.

use std::collections::BTreeMap;
use std::process::Command;
use std::sync::Arc;

use axum::Router;
use axum::extract::Path;
use axum::http::{HeaderMap, StatusCode, header};

use crate::harness;

/// Of the two revisions, `v1` is tiny-llama and anything else tiny-qwen2.
const COMMITS: [(&str, &str, &str); 2] = [("v1", "1111aaaa", "tiny-llama"), ("main", "2222bbbb", "tiny-qwen2")];

/// What the hub answers for a file: by revision and name; missing files are 404, one that is ill 500.
struct Hub {
    url: String,
    _runtime: tokio::runtime::Runtime,
}

impl Hub {
    fn start(ill: &'static str) -> Self {
        let files: BTreeMap<(String, String), (&str, Vec<u8>)> = COMMITS
            .iter()
            .flat_map(|(revision, commit, model)| {
                let folder = harness::root().join("tests/fixtures/models").join(model);
                let file = |entry: std::io::Result<std::fs::DirEntry>| {
                    let path = entry.unwrap().path();
                    let name = path.file_name().unwrap().to_string_lossy().into_owned();
                    ((revision.to_string(), name), (*commit, std::fs::read(path).unwrap()))
                };
                std::fs::read_dir(folder).unwrap().map(file).collect::<Vec<_>>()
            })
            .collect();
        let files = Arc::new(files);
        let handler = async move |Path((_, _, revision, name)): Path<(String, String, String, String)>,
                                  asked: HeaderMap| {
            if name == ill {
                return (StatusCode::INTERNAL_SERVER_ERROR, HeaderMap::new(), Vec::new());
            }
            let Some((commit, bytes)) = files.get(&(revision.clone(), name.clone())) else {
                return (StatusCode::NOT_FOUND, HeaderMap::new(), Vec::new());
            };
            let range = asked[header::RANGE].to_str().unwrap().trim_start_matches("bytes=").to_owned();
            let (first, last) = range.split_once('-').unwrap();
            let (first, last): (usize, usize) = (first.parse().unwrap(), last.parse().unwrap());
            let last = last.min(bytes.len() - 1);
            let mut told = HeaderMap::new();
            told.insert("x-repo-commit", commit.parse().unwrap());
            told.insert(header::ETAG, format!("\"{commit}-{name}\"").parse().unwrap());
            let range = format!("bytes {first}-{last}/{}", bytes.len());
            told.insert(header::CONTENT_RANGE, range.parse().unwrap());
            (StatusCode::PARTIAL_CONTENT, told, bytes[first..=last].to_vec())
        };
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let routes =
            Router::new().route("/{organisation}/{name}/resolve/{revision}/{file}", axum::routing::get(handler));
        runtime.spawn(async move { axum::serve(listener, routes).await.unwrap() });
        Hub { url, _runtime: runtime }
    }
}

/// Samples one answer with a model; returns the output, or what was said when it failed.
fn answer(model: &str, hub: &str, home: &std::path::Path) -> Result<String, String> {
    let prompts = home.join("prompts.jsonl");
    std::fs::write(&prompts, "{\"messages\": [{\"role\": \"user\", \"content\": \"hello\"}]}\n").unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_taod"));
    command.args(["generate", "--model", model, "--max-tokens", "8", "--input"]).arg(prompts);
    let output = command.env("HF_ENDPOINT", hub).env("HF_HOME", home.join("hub")).output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    if output.status.success() { Ok(text(output.stdout)) } else { Err(text(output.stderr)) }
}

fn folder(name: &str) -> String {
    harness::root().join("tests/fixtures/models").join(name).display().to_string()
}

#[test]
fn a_revision_is_fetched_once_and_is_what_was_asked_for() {
    let (home, hub) = (tempfile::tempdir().unwrap(), Hub::start(""));
    let local = |name: &str| answer(&folder(name), "", home.path()).unwrap();
    assert_eq!(answer("org/tiny@v1", &hub.url, home.path()).unwrap(), local("tiny-llama"));
    assert_eq!(answer("org/tiny", &hub.url, home.path()).unwrap(), local("tiny-qwen2"));
    drop(hub);
    assert_eq!(answer("org/tiny@v1", "http://127.0.0.1:9", home.path()).unwrap(), local("tiny-llama"));
    assert!(home.path().join("hub/hub/models--org--tiny/snapshots/1111aaaa/model.safetensors").exists());
}

#[test]
fn a_file_that_may_be_absent_is_not_taken_for_absent_when_the_hub_is_ill() {
    let home = tempfile::tempdir().unwrap();
    let hub = Hub::start("generation_config.json");
    let error = answer("org/tiny@v1", &hub.url, home.path()).unwrap_err();
    assert!(error.contains("org/tiny@v1") && error.contains("generation_config.json"), "{error}");
    let error = answer("org/tiny@v9", &hub.url, home.path()).unwrap_err();
    assert!(error.contains("org/tiny@v9") && error.contains("config.json"), "{error}");
}
