//! The document is what the API answers: every route is asked and its answer held to its own schema.

use std::sync::Arc;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::admin::State;
use crate::admin::actions::{Action, Actions, Progress};
use crate::admin::settings::Settings;
use crate::admin::tests::{ask, on_loopback, state, with_page};
use crate::admin::token::{Role, Tokens};
use crate::durable;
use crate::registry::{Base, Lineage, Registry};
use crate::secret::Secret;

/// A page with a token for each role, a round that is over, and a daemon that takes actions.
struct Scene {
    folder: tempfile::TempDir,
    settings: Settings,
    state: State,
    read: Secret,
    operate: Secret,
    todo: tokio::sync::mpsc::Receiver<crate::admin::actions::Record>,
}

fn scene() -> Scene {
    let (folder, mut state) = state();
    let settings = Settings { token_file: folder.path().join("tokens.json"), ..on_loopback() };
    let tokens = Tokens::at(&settings.token_file);
    let make = |name: &str, role| tokens.make(name, role, chrono::Utc::now()).unwrap();
    let (read, operate) = (make("ruth", Role::Read), make("olga", Role::Operate));
    let (actions, todo) = Actions::new(folder.path());
    state.actions = Arc::new(actions);
    let round = folder.path().join("rounds/round-00001");
    std::fs::create_dir_all(&round).unwrap();
    let base =
        json!({ "name": "m", "architecture": "llama", "sha256": "0", "tokenizer_sha256": "0", "template_sha256": "0" });
    let plan = json!({ "round": "round-00001", "seed": 1, "base": base, "settings_sha256": "0", "threads": 1, "control": null,
        "created_us": 1_700_000_000_000_000_i64, "taod_version": "0.1.0" });
    let stages = json!([{ "stage": "dataset", "rows": 12, "tokens": 0, "seconds": 1.5 }]);
    let outcome = json!({ "round": "round-00001", "outcome": { "result": "skipped", "reason": "too few prompts" }, "stages": stages });
    for (name, value) in [("plan", plan), ("stages", stages.clone()), ("outcome", outcome)] {
        durable::write_json(&round.join(format!("{name}.json")), &value).unwrap();
    }
    Scene { folder, settings, state, read, operate, todo }
}

/// Returns the schema as a validator that knows the document's other schemas.
fn validator(document: &Value, schema: &Value) -> jsonschema::Validator {
    let text = schema.to_string().replace("#/components/schemas/", "#/$defs/");
    let mut whole: Value = serde_json::from_str(&text).unwrap();
    let defs = document["components"]["schemas"].to_string().replace("#/components/schemas/", "#/$defs/");
    whole["$defs"] = serde_json::from_str(&defs).unwrap();
    jsonschema::options().offline().build(&whole).unwrap()
}

/// Returns what each path of the document is asked as, and the status that follows here.
fn asked_as(path: &str) -> (String, u16) {
    let target = path.replace("{round}", "round-00001");
    match path {
        "/api/v1/trials/{trial}" => ("/api/v1/trials/none".into(), 404),
        "/api/v1/adapters/{version}" => ("/api/v1/adapters/none".into(), 404),
        "/api/v1/adapters/{version}/files/{name}" => ("/api/v1/adapters/none/files/none".into(), 404),
        "/api/v1/prompts/{hash}" => ("/api/v1/prompts/none?round=round-00001".into(), 404),
        "/api/v1/prompts" => ("/api/v1/prompts?round=round-00001".into(), 200),
        _ => (target, 200),
    }
}

#[test]
fn every_route_answers_what_the_document_says() {
    let scene = scene();
    with_page(&scene.settings, &scene.state, async |address| {
        let bearer = format!("Bearer {}", scene.operate.expose());
        let get = async |path: &str| ask(address, &format!("GET {path}"), &[("Authorization", &bearer)], "").await;
        let document: Value = serde_json::from_str(&get("/api/v1/openapi.json").await.body).unwrap();
        assert_eq!(document["openapi"], "3.1.0");
        let mut count = 0;
        for (path, operations) in document["paths"].as_object().unwrap() {
            let Some(operation) = operations.get("get") else { continue };
            let (target, status) = asked_as(path);
            let answer = get(&target).await;
            assert_eq!(answer.status, status, "{target}: {}", answer.body);
            let schema = &operation["responses"][status.to_string()]["content"]["application/json"]["schema"];
            let value: Value = serde_json::from_str(&answer.body).unwrap();
            let problems: Vec<String> = validator(&document, schema)
                .iter_errors(&value)
                .map(|e| format!("{e} at {}", e.instance_path()))
                .collect();
            assert!(problems.is_empty(), "{target}: {problems:?} in {value}");
            let bad = if target.contains('?') { "&nonsense=1" } else { "?nonsense=1" };
            let refused = get(&format!("{target}{bad}")).await;
            assert_eq!(refused.status, 400, "{target}{bad}");
            assert!(serde_json::from_str::<Value>(&refused.body).unwrap()["error"].is_string());
            count += 1;
        }
        assert!(count >= 15, "only {count} routes in the document");
        let rounds: Value = serde_json::from_str(&get("/api/v1/rounds").await.body).unwrap();
        assert_eq!(rounds["items"][0]["reason"], "too few prompts");
    });
}

#[test]
fn files_of_an_adapter_are_sent_whole_to_a_role_and_nothing_else_is() {
    let scene = scene();
    let (root, adapter) = (scene.folder.path().join("registry"), scene.folder.path().join("adapter"));
    let weights = "0123456789abcdef".repeat(20_000);
    std::fs::create_dir(&adapter).unwrap();
    std::fs::write(adapter.join("adapter_config.json"), "{}").unwrap();
    std::fs::write(adapter.join("adapter_model.safetensors"), &weights).unwrap();
    let registry = Registry::open(&root, &Default::default()).unwrap();
    let base = Base { name: "m".into(), sha256: "0".into() };
    let (tables, offsets, notes) = Default::default();
    let lineage = Lineage { base, round: None, dataset_sha256: None, tables, offsets, notes, created_us: 1 };
    let manifest = registry.register(&adapter, lineage).unwrap();
    let (version, file) = (manifest.version.as_str(), "adapter_model.safetensors");
    with_page(&scene.settings, &scene.state, async |address| {
        let bearer = format!("Bearer {}", scene.read.expose());
        let get = async |path: &str| {
            let line = format!("GET /api/v1/adapters/{path}");
            ask(address, &line, &[("Authorization", &bearer)], "").await
        };
        let sent = get(&format!("{version}/files/{file}")).await;
        assert!(sent.status == 200 && sent.body == weights, "{} {}", sent.status, sent.body.len());
        let digest = BASE64_STANDARD.encode(Sha256::digest(&weights));
        assert_eq!(sent.header("etag"), Some(format!("\"{}\"", manifest.files[file]).as_str()));
        assert_eq!(sent.header("repr-digest"), Some(format!("sha-256=:{}:", digest.to_lowercase()).as_str()));
        assert_eq!(sent.header("content-type"), Some("application/octet-stream"));
        let line = format!("GET /api/v1/adapters/{version}/files/{file}");
        assert_eq!(ask(address, &line, &[], "").await.status, 401, "also on loopback");
        for path in [
            format!("{version}/files/manifest.json"),
            format!("{version}/files/..%2F..%2F..%2Ftokens.json"),
            format!("{version}/files/%2e%2e"),
            format!("{version}/files/../../{version}/files/{file}"),
            format!("..%2Fadapters%2F{version}/files/{file}"),
            format!("{version}%00/files/{file}"),
            format!("{version}/files/"),
            "base/files/adapter_config.json".into(),
            "taod-0123456789ab/files/adapter_config.json".into(),
        ] {
            let answer = get(&path).await;
            assert!((400..500).contains(&answer.status), "{path}: {} {}", answer.status, answer.body);
        }
        // What is not what was registered is not handed on.
        std::fs::write(root.join("adapters").join(version).join("adapter_config.json"), "[]").unwrap();
        let damaged = get(&format!("{version}/files/{file}")).await;
        assert!(damaged.status == 500 && damaged.body.contains("has SHA-256"), "{}", damaged.body);
    });
}

#[test]
fn actions_need_the_role_and_a_reason_and_are_recorded() {
    let mut scene = scene();
    let why = r#"{"reason":"the holidays"}"#;
    with_page(&scene.settings, &scene.state, async |address| {
        let post = async |path: &str, token: Option<&Secret>, kind: &str, body: &str| {
            let bearer = token.map(|token| format!("Bearer {}", token.expose())).unwrap_or_default();
            let mut headers = vec![("Content-Type", kind)];
            if token.is_some() {
                headers.push(("Authorization", &bearer));
            }
            ask(address, &format!("POST /api/v1/actions/{path}"), &headers, body).await
        };
        let (read, operate, json) = (Some(&scene.read), Some(&scene.operate), "application/json");
        for what in ["promote", "rollback", "freeze", "thaw", "run"] {
            assert_eq!(post(what, None, json, why).await.status, 401, "{what}");
            assert_eq!(post(what, read, json, why).await.status, 403, "{what}");
        }
        for (kind, body, status) in [
            ("text/plain", why, 415),
            ("application/x-www-form-urlencoded", "reason=x", 415),
            (json, "{}", 422),
            (json, r#"{"reason":" "}"#, 422),
            (json, r#"{"reason":"x","more":1}"#, 422),
            (json, "nonsense", 400),
        ] {
            assert_eq!(post("freeze", operate, kind, body).await.status, status, "{kind} {body}");
        }
        let unknown = post("promote", operate, json, r#"{"version":"none","reason":"x"}"#).await;
        assert_eq!(unknown.status, 404, "{}", unknown.body);
        let taken: Value = serde_json::from_str(&post("freeze", operate, json, why).await.body).unwrap();
        assert_eq!((taken["by"].as_str(), taken["state"].as_str()), (Some("olga"), Some("asked")));
    });
    let record = scene.todo.try_recv().unwrap();
    assert_eq!((&record.action, record.reason.as_str()), (&Action::Freeze, "the holidays"));
    assert!(scene.todo.try_recv().is_err(), "a refused action was handed on");
    let kept = scene.state.actions.list(9).unwrap();
    assert_eq!(kept.iter().map(|r| r.state).collect::<Vec<_>>(), [Progress::Asked]);
}
