//! Whole promotions through the program into servers in vLLM's dialect, and the ways to break a vLLM that taod must never take.
//!
//! Each case runs against `taod serve`, and by `make test-vllm` against a real vLLM on the CPU. The ways to break it were
//! seen on vLLM 0.32: 1. an adapter's folder is deleted or moved, and the engine dies when it reads it again; 2. one that was
//! loaded in place is read again at each request; 3. other weights under the same path meet answers of the old ones in the
//! prefix cache; 4. what is unloaded stays in memory, so that repeated loads fill it; 5. a restart forgets all
//! adapters; 6. a relative path is looked for at a hub.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use taod::config::Loaded;
use taod::endpoint::fleet::Strangers;
use taod::engine::train::LoraMatrices;
use taod::engine::{Adapter, Linear, LoraSpec, Model, ScoreItem, logprobs, save_peft};
use taod::record::Message;
use taod::registry::{self, Lineage, Registry};

use crate::harness;
use crate::harness::night::model as tiny_model;
use crate::vllm_relay::Relay;
use crate::vllm_server::{self, BASE, KEPT, Kind, Server};

const STABLE: &str = "production";
const QUESTION: &str = "Why do cats sleep so much?";

/// A server behind a relay, and a state with registered adapters, none of which is promoted yet.
struct Stage {
    kind: Kind,
    folder: tempfile::TempDir,
    model_path: PathBuf,
    model: Model,
    server: Server,
    relay: Relay,
    versions: Vec<String>,
}

impl Stage {
    /// Sets the stage, where this machine has what it needs.
    fn new(kind: Kind, alias: &str, versions: usize) -> Option<Self> {
        let folder = tempfile::tempdir().unwrap();
        let model_path = match kind {
            Kind::Ours => tiny_model(),
            Kind::Vllm => smollm2(folder.path())?,
        };
        let model = Model::load(&model_path.display().to_string()).unwrap();
        let registry = folder.path().join("state/registry");
        let versions = (0..versions).map(|seed| register(&model, folder.path(), seed)).collect();
        let server = Server::start(kind, &model_path, &registry);
        let relay = Relay::start(&server.url);
        let stage = Stage { kind, folder, model_path, model, server, relay, versions };
        // The state is told by a relative path, as an operator may.
        let config = format!(
            "[state]\ndir = \"state\"\n[model]\npath = {:?}\n\
             [endpoint]\nretire_after_seconds = 0\nkind = \"vllm\"\nurls = [{:?}]\nbase_model = {BASE:?}\nstable_name = {STABLE:?}\n\
             alias = {alias:?}\nretries = 0\n[endpoint.proof]\nprompts = 3\nmax_tokens = 12\n",
            stage.model_path.display().to_string(),
            stage.relay.url,
        );
        std::fs::write(stage.config(), config).unwrap();
        Some(stage)
    }

    fn config(&self) -> PathBuf {
        self.folder.path().join("taod.toml")
    }

    fn registry(&self) -> Registry {
        Registry::open(&self.folder.path().join("state/registry"), &Default::default()).unwrap()
    }

    fn adapters(&self, words: &[&str]) -> harness::Outcome {
        let words = [&["adapters"], words, &["--reason", "a test", "--by", "tester", "--config", "taod.toml"]].concat();
        harness::taod_in(self.folder.path(), &words, &[])
    }

    fn promote(&self, version: usize) -> harness::Outcome {
        self.adapters(&["promote", &self.versions[version]])
    }

    /// Checks that `name` answers with this version, `None` for the base: its log-probs are those that are computed here.
    /// Returns how far they lie apart, in nats a token.
    fn expect(&self, name: &str, version: Option<usize>) -> f32 {
        let (ids, told) = self.server.ask(name, QUESTION).unwrap();
        assert!(ids.len() >= 4 && ids.len() == told.len(), "{ids:?} {told:?}");
        let prompt = self.model.prompt_ids(&[Message::text("user", QUESTION)], None).unwrap();
        let gap = |version: Option<usize>| {
            let path = version.map(|version| self.registry().path(&self.versions[version]));
            let adapter = path.map(|path| Adapter::load(&path, &self.model).unwrap());
            let item = ScoreItem { prompt: &prompt, completion: &ids };
            let ours = logprobs(&self.model, adapter.as_ref(), &[item]).unwrap().remove(0);
            told.iter().zip(&ours).map(|(a, b)| (a - b).abs()).sum::<f32>() / told.len() as f32
        };
        let found = gap(version);
        assert!(found < 1e-3, "{name} answers {found} nats a token from version {version:?}");
        for other in (0..self.versions.len()).map(Some).chain([None]).filter(|other| *other != version) {
            assert!(gap(other) > 0.05, "versions {version:?} and {other:?} cannot be told apart");
        }
        println!("{:?}: {name} answers as version {version:?}, {found:.6} nats a token from here", self.kind);
        found
    }

    /// Kills the server as a crash would, and starts another one in its place.
    fn restart(&mut self) {
        self.server.kill();
        let fresh = Server::start(self.kind, &self.model_path, &self.folder.path().join("state/registry"));
        self.relay.lead_to(&fresh.url);
        self.server = fresh;
    }

    /// Puts back what the server lost, as the daemon does again and again; returns the servers that were changed.
    fn reconcile(&self) -> Vec<String> {
        // The daemon runs in the folder of its config; here its state is told whole.
        let text = std::fs::read_to_string(self.config()).unwrap();
        let state = self.folder.path().join("state");
        let whole = self.folder.path().join("whole.toml");
        std::fs::write(&whole, text.replace("\"state\"", &format!("{:?}", state.display().to_string()))).unwrap();
        let config = Loaded::read(Some(&whole)).unwrap().config;
        let tended = block_on(taod::daemon::promotion::tend(&config, &mut false, Strangers::Keep)).unwrap().unwrap();
        assert!(tended.reconciled.failed.is_empty(), "{:?}", tended.reconciled.failed);
        tended.reconciled.changed
    }

    /// Checks that nothing was done that could break a vLLM, and that the server is well.
    fn expect_no_harm(&self, alias: &str) {
        let mut weights: BTreeMap<String, String> = BTreeMap::new();
        for seen in self.relay.seen() {
            let Some((name, path, in_place)) = seen.load() else { continue };
            assert!(Path::new(path).is_absolute(), "hazard 6: {path} is relative");
            let loaded = seen.weights.clone().unwrap_or_else(|| panic!("{path} was not there when it was loaded"));
            assert!(in_place == (name == STABLE) && (!in_place || alias == "inplace"), "hazard 2: {seen:?}");
            let before = weights.insert(path.to_owned(), loaded.clone());
            assert!(before.is_none_or(|before| before == loaded), "hazard 3: {path} got other weights");
        }
        assert!(!weights.is_empty(), "something was loaded");
        for (path, loaded) in weights {
            let now = taod::durable::sha256_file(&Path::new(&path).join("adapter_model.safetensors"));
            assert_eq!(now.ok(), Some(loaded), "hazard 1: {path} is not what it was when it was loaded");
        }
        // What clients were led away from goes when the endpoint is looked after, at once with no grace.
        self.reconcile();
        let current = self.registry().current().unwrap().version;
        let mut served = vec![BASE.to_owned()];
        if current != registry::BASE {
            served.push(current);
            served.extend((alias == "inplace").then(|| STABLE.to_owned()));
        }
        let (mut names, _) = (self.server.names(), served.sort());
        names.sort();
        assert_eq!(names, served, "hazard 4: what is no longer served is unloaded, and nothing else");
        self.server.ask(BASE, QUESTION).unwrap();
        if self.kind == Kind::Vllm {
            assert_eq!(self.server.call("/health", None).0, 200);
        }
    }
}

fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap().block_on(future)
}

/// Returns SmolLM2 as a folder that vLLM reads, with the very weights of the GGUF.
pub(crate) fn smollm2(folder: &Path) -> Option<PathBuf> {
    let (python, models) = (vllm_server::python()?, harness::models()?);
    let base = folder.join("base");
    let script = harness::root().join("tools/reference/gguf_to_hf.py");
    let mut command = Command::new(python);
    command.arg(script).arg(models.join("SmolLM2-135M-Instruct.Q4_1.gguf")).arg(&base);
    assert!(command.status().unwrap().success());
    Some(base)
}

/// Registers an adapter of all layers whose answers differ much from those of any other seed.
fn register(model: &Model, folder: &Path, seed: usize) -> String {
    let spec = LoraSpec { rank: 4, alpha: 8.0, ..LoraSpec::default() };
    let mut lora = LoraMatrices::fresh(model.config(), &spec, seed as u64);
    for (at, value) in lora.values.iter_mut().skip(1).step_by(2).flatten().enumerate() {
        *value = (((at + seed) * 7919 % 1013) as f32 / 1013.0 - 0.5) * 0.3;
    }
    let peft = folder.join(format!("peft-{seed}"));
    save_peft(&peft, model.identity(), &spec, &lora.tensors().unwrap()).unwrap();
    let base = registry::Base { name: model.identity().name.clone(), sha256: model.identity().sha256.clone() };
    let (tables, offsets, notes) = Default::default();
    let lineage = Lineage { base, round: None, dataset_sha256: None, tables, offsets, notes, created_us: 1 };
    Registry::open(&folder.join("state/registry"), &Default::default())
        .unwrap()
        .register(&peft, lineage)
        .unwrap()
        .version
}

/// A promotion, a second one, a rollback and a refusal, with the name that clients use.
fn the_stable_name_follows_promotions_and_a_rollback(kind: Kind) {
    let Some(stage) = Stage::new(kind, "inplace", 2) else { return };
    // Its answers fill the prefix cache under the stable name.
    let said = stage.promote(0).code(0).out;
    assert!(said.contains(&format!("the stable name answers as {}", stage.versions[0])), "{said}");
    stage.expect(STABLE, Some(0));
    stage.expect_no_harm("inplace");
    stage.promote(1).code(0);
    stage.expect(STABLE, Some(1));
    stage.expect_no_harm("inplace");
    stage.adapters(&["rollback"]).code(0);
    stage.expect(STABLE, Some(0));
    stage.expect_no_harm("inplace");
    let refused = stage.promote(1);
    assert!(refused.code == 1 && refused.err.contains("quarantine"), "{}", refused.err);
    stage.expect(STABLE, Some(0));
    stage.expect_no_harm("inplace");
}

/// More versions than the server keeps in memory, each under its own name: folders are read again after others.
fn many_versions_come_and_go_under_their_own_names(kind: Kind) {
    let versions = KEPT + 2;
    let Some(stage) = Stage::new(kind, "clients", versions) else { return };
    for version in 0..versions {
        stage.promote(version).code(0);
        stage.expect(&stage.versions[version], Some(version));
        stage.expect_no_harm("clients");
    }
    stage.adapters(&["rollback"]).code(0);
    stage.expect(&stage.versions[versions - 2], Some(versions - 2));
    stage.expect_no_harm("clients");
}

/// A crash of the server forgets all adapters; the daemon puts back what is served, once.
fn a_restarted_server_gets_back_what_was_served(kind: Kind) {
    let Some(mut stage) = Stage::new(kind, "inplace", 1) else { return };
    stage.promote(0).code(0);
    stage.restart();
    assert!(stage.server.ask(STABLE, QUESTION).is_err(), "hazard 5: a restart forgets adapters");
    assert_eq!(stage.reconcile(), [stage.relay.url.clone()]);
    stage.expect(STABLE, Some(0));
    let loads = || stage.relay.seen().iter().filter(|seen| seen.load().is_some()).count();
    let before = loads();
    assert!(stage.reconcile().is_empty() && loads() == before, "hazard 4: what is there is not loaded again");
    stage.expect_no_harm("inplace");
}

/// Adapters that the server cannot take: the change is undone, and the server goes on.
fn an_adapter_that_the_server_refuses_changes_nothing(kind: Kind) {
    let Some(stage) = Stage::new(kind, "inplace", 1) else { return };
    stage.promote(0).code(0);
    let spec = LoraSpec { rank: 32, alpha: 8.0, targets: vec![Linear::Q], ..LoraSpec::default() };
    let lora = LoraMatrices::fresh(stage.model.config(), &spec, 1);
    let peft = stage.folder.path().join("wide");
    save_peft(&peft, stage.model.identity(), &spec, &lora.tensors().unwrap()).unwrap();
    let lineage = stage.registry().manifest(&stage.versions[0]).unwrap().lineage;
    let wide = stage.registry().register(&peft, lineage).unwrap().version;
    let refused = stage.adapters(&["promote", &wide]);
    assert_eq!(refused.code, 1);
    assert!(refused.err.contains("LoRA rank 32 is greater than max_lora_rank 16"), "{}", refused.err);
    stage.expect(STABLE, Some(0));
    stage.expect_no_harm("inplace");
    assert_eq!(stage.registry().current().unwrap().version, stage.versions[0]);
}

macro_rules! on_both {
    ($($case:ident => $on_vllm:ident),* $(,)?) => {
        mod on_taod_serve {
            $(#[test]
            fn $case() {
                super::$case(super::Kind::Ours);
            })*
        }
        $(#[test]
        #[ignore = "needs vLLM; run `make test-vllm`"]
        fn $on_vllm() {
            $case(Kind::Vllm);
        })*
    };
}

on_both! {
    the_stable_name_follows_promotions_and_a_rollback => on_vllm_the_stable_name_follows_promotions_and_a_rollback,
    many_versions_come_and_go_under_their_own_names => on_vllm_many_versions_come_and_go_under_their_own_names,
    a_restarted_server_gets_back_what_was_served => on_vllm_a_restarted_server_gets_back_what_was_served,
    an_adapter_that_the_server_refuses_changes_nothing => on_vllm_an_adapter_that_the_server_refuses_changes_nothing,
}
