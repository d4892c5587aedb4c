//! Promotions into endpoints that fail: whatever they do, clients keep the old version and the registry says so.

use axum::Router;
use axum::body::Bytes;
use axum::http::{HeaderMap, Method as Verb, StatusCode, Uri};
use serde_json::Value;

use super::super::fleet::Strangers;
use super::super::gateway;
use super::super::server::{Load, Server};
use super::super::vllm::Vllm;
use super::super::{Alias, Settings};
use super::tests::{ABORTED, Stage, both, nobody};
use super::*;

type Respond = fn(path: &str) -> (u16, &'static str, &'static str);

fn at(url: String) -> Box<dyn Server> {
    let settings = Settings {
        urls: vec![url],
        request_timeout_seconds: 1,
        load_timeout_seconds: 1,
        retries: 1,
        ..Settings::default()
    };
    Box::new(Vllm::replicas(&settings).unwrap().remove(0))
}

/// Starts a server that answers every path with what `respond` says.
async fn answering(respond: Respond) -> Box<dyn Server> {
    let handler = async move |uri: Uri| {
        let (status, kind, text) = respond(uri.path());
        (StatusCode::from_u16(status).unwrap(), [("content-type", kind)], text)
    };
    at(serve(Router::new().fallback(handler)).await)
}

async fn serve(router: Router) -> String {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
    url
}

/// Replaces the second replica, promotes, and checks that the change was aborted before clients saw any of it.
async fn aborted(other: Box<dyn Server>, step: Step, says: &str) {
    let mut stage = Stage::new(Alias::Native).await;
    stage.fleet.replicas[0].move_alias("production", None, "base").await.unwrap();
    stage.fleet.replicas[1] = other;
    let error = stage.carry_out().await.unwrap_err();
    assert!(matches!(error, PromoteError::Aborted { step: at, .. } if at == step), "{error}");
    let text = error.to_string();
    assert!(text.contains(says) && !text.contains('\n'), "{text}");
    assert_eq!(stage.book(), *ABORTED);
    let first = &stage.fleet.replicas[0];
    assert_eq!(first.alias("production").await.unwrap().as_deref(), Some("base"));
    assert_eq!(first.names().await.unwrap(), Vec::<String>::new());
}

#[tokio::test]
async fn a_replica_that_answers_500_is_told_by_its_message() {
    let respond: Respond = |_| (500, "application/json", r#"{"error":{"message":"CUDA out of memory"}}"#);
    aborted(answering(respond).await, Step::Load, "answered 500").await;
}

#[tokio::test]
async fn a_replica_that_is_always_busy_is_not_waited_for_without_end() {
    aborted(answering(|_| (429, "application/json", "{}")).await, Step::Load, "answered 429").await;
}

#[tokio::test]
async fn a_replica_behind_a_web_page_is_told_as_such() {
    aborted(answering(|_| (200, "text/html", "<html>log in</html>")).await, Step::Load, "web page").await;
}

#[tokio::test]
async fn a_replica_that_never_answers_is_given_up_in_time() {
    let mute = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", mute.local_addr().unwrap());
    aborted(at(url), Step::Load, "did not answer the load of").await;
}

#[tokio::test]
async fn a_replica_that_says_loaded_but_lists_an_older_adapter_is_caught() {
    let respond: Respond = |path| match path {
        "/v1/models" => (200, "application/json", r#"{"data":[{"id":"base","root":"/m"}]}"#),
        _ => (200, "text/plain", "Success"),
    };
    aborted(answering(respond).await, Step::Load, "nothing of that name").await;
}

#[tokio::test]
async fn a_server_that_restarts_in_the_middle_serves_the_old_version_and_gets_it_back() {
    for alias in [Alias::Native, Alias::Inplace] {
        let stage = Stage::new(alias).await;
        let mut promotion = stage.promotion();
        promotion.take(Step::Load).await.unwrap();
        promotion.take(Step::ProveUnique).await.unwrap();
        // What a restart loses.
        stage.fleet.replicas[1].unload(&stage.to.name).await.unwrap();
        let ended = promotion.go(&[Step::Alias, Step::ProveStable, Step::Current, Step::Record, Step::Close]).await;
        match alias {
            Alias::Native => {
                let error = ended.unwrap_err();
                assert!(matches!(error, PromoteError::Aborted { step: Step::Alias, .. }), "{error}");
                assert_eq!(stage.book(), *ABORTED);
                assert_eq!(stage.aliases().await, [Some("base".to_owned()), None]);
            }
            // The stable name is loaded by itself, so that nothing is lost but the unique name.
            _ => {
                ended.unwrap();
                let done = stage.fleet.reconcile(&stage.to, &[], &stage.registry, Strangers::Keep).await;
                assert_eq!(done.changed, [stage.fleet.replicas[1].url()]);
            }
        }
    }
}

#[tokio::test]
async fn an_endpoint_that_is_down_for_an_hour_is_settled_when_it_is_back() {
    let mut stage = Stage::new(Alias::Native).await;
    stage.killed_after(4).await;
    let alive: Vec<_> = stage.fleet.replicas.drain(..).collect();
    stage.fleet.replicas = vec![nobody(), nobody()];
    // As often as the daemon tries in that time; nothing of it depends on a clock.
    for _ in 0..60 {
        let error = stage.recover().await.unwrap_err();
        assert!(matches!(error, PromoteError::Open { .. }), "{error}");
        assert_eq!(stage.book(), (crate::registry::BASE.to_owned(), true));
    }
    stage.fleet.replicas = alive;
    assert!(matches!(stage.recover().await.unwrap(), Outcome::Done { .. }));
    assert_eq!((stage.book(), stage.aliases().await), (stage.promoted(), both(&stage.to.name)));
}

/// A gateway as LiteLLM is one: it reads its file at each request, gives the request the file's model and passes it on.
async fn litellm(file: std::path::PathBuf) -> String {
    let handler = async move |verb: Verb, uri: Uri, _: HeaderMap, body: Bytes| {
        let read = || -> Option<(String, String)> {
            let config: Value = serde_json::from_slice(&std::fs::read(&file).ok()?).ok()?;
            let params = &config["model_list"][0]["litellm_params"];
            let model = params["model"].as_str()?.strip_prefix("hosted_vllm/")?;
            Some((model.to_owned(), params["api_base"].as_str()?.to_owned()))
        };
        let (Verb::POST, "/v1/chat/completions", Some((model, base))) = (verb, uri.path(), read()) else {
            return (StatusCode::NOT_FOUND, [("content-type", "application/json")], String::from("{}"));
        };
        let mut body: Value = serde_json::from_slice(&body).unwrap();
        assert_eq!(body["model"], "production");
        body["model"] = model.into();
        let answer = reqwest::Client::new().post(format!("{base}/chat/completions")).json(&body).send().await.unwrap();
        let status = StatusCode::from_u16(answer.status().as_u16()).unwrap();
        (status, [("content-type", "application/json")], answer.text().await.unwrap())
    };
    serve(Router::new().fallback(handler)).await
}

#[tokio::test]
async fn a_gateways_file_is_the_alias_and_the_proof_goes_through_the_gateway() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("taod.yaml");
    for killed_after in 0..=Step::ORDER.len() {
        let mut stage = Stage::new(Alias::Native).await;
        std::fs::remove_file(&file).unwrap_or_default();
        let settings = Settings {
            urls: stage.fleet.replicas.iter().map(|replica| replica.url().to_owned()).collect(),
            alias: Alias::Gateway,
            gateway: gateway::Settings { url: litellm(file.clone()).await, file: file.clone(), ..Default::default() },
            ..Settings::default()
        };
        assert_eq!(settings.validate(), Ok(()));
        stage.fleet = Fleet::new(&settings).unwrap();
        assert_eq!(stage.fleet.introduce(&stage.registry).await.changed.len(), 1);
        stage.killed_after(killed_after).await;
        let moved = killed_after > 3;
        assert_eq!(matches!(stage.recover().await.unwrap(), Outcome::Done { .. }), moved, "{killed_after}");
        let leads_to = stage.fleet.gateway.as_ref().unwrap().target().await.unwrap();
        assert_eq!(leads_to.as_deref(), Some(if moved { stage.to.name.as_str() } else { "base" }));
        assert_eq!(stage.book(), if moved { stage.promoted() } else { ABORTED.clone() });
    }
    std::fs::write(&file, "model_list: []\n").unwrap();
    let mut stage = Stage::new(Alias::Native).await;
    let gateway = gateway::Settings { url: "http://127.0.0.1:1".into(), file, ..Default::default() };
    let urls = stage.fleet.replicas.iter().map(|replica| replica.url().to_owned()).collect();
    stage.fleet = Fleet::new(&Settings { urls, alias: Alias::Gateway, gateway, ..Settings::default() }).unwrap();
    let error = stage.carry_out().await.unwrap_err().to_string();
    assert!(error.contains("taod did not write it"), "{error}");
}

#[tokio::test]
async fn what_production_served_before_is_left_alone_until_taod_takes_charge() {
    let stage = Stage::new(Alias::Inplace).await;
    let folder = stage.to.folder().unwrap().to_owned();
    for replica in &stage.fleet.replicas {
        replica.load("production", &folder, Load::Fresh).await.unwrap();
    }
    let done = stage.fleet.introduce(&stage.registry).await;
    assert!(done.changed.is_empty() && done.failed.is_empty(), "{done:?}");
    for replica in &stage.fleet.replicas {
        assert!(replica.holds("production", &folder).await.unwrap());
    }
}

#[tokio::test]
async fn a_change_that_fails_leaves_alone_what_production_served_before_taod_took_charge() {
    for alias in [Alias::Inplace, Alias::Reload] {
        let stage = Stage::new(alias).await;
        let theirs = stage.adapter_of_the_operator();
        for replica in &stage.fleet.replicas {
            replica.load("production", &theirs, Load::Fresh).await.unwrap();
        }
        for killed_after in [0, 2] {
            stage.killed_after(killed_after).await;
        }
        let error = stage.carry_out().await.unwrap_err().to_string();
        assert!(error.contains("an adapter that taod did not load"), "{error}");
        assert_eq!(stage.book(), *ABORTED);
        for replica in &stage.fleet.replicas {
            assert!(replica.holds("production", &theirs).await.unwrap(), "{alias:?}");
            assert_eq!(replica.names().await.unwrap(), ["production"]);
        }
    }
}

/// Finds the new version worse than the old one.
struct Worse;

#[async_trait]
impl Ledger for Worse {
    async fn rehearse(&self, at: &dyn Answers, from: &str, to: &str) -> Result<(), String> {
        Err(format!("{to} was worse than {from} at {}", at.url()))
    }

    async fn record(&self, _intent: &Intent, _proofs: &[Proof]) -> Result<(), String> {
        Err("nothing was to be recorded".into())
    }
}

#[tokio::test]
async fn a_version_that_is_worse_at_its_rehearsal_is_never_seen_by_clients() {
    let stage = Stage::new(Alias::Native).await;
    let promotion = stage.promotion_with(&Worse);
    let error = promotion.carry_out().await.unwrap_err();
    assert!(matches!(error, PromoteError::Aborted { step: Step::Rehearse, .. }), "{error}");
    assert!(error.to_string().contains("was worse than base at http://"), "{error}");
    assert_eq!((stage.book(), stage.aliases().await), (ABORTED.clone(), vec![None, None]));
}
