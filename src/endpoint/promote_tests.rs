//! Promotions over two replicas of `taod serve`, stopped at every step, and against a server that lies.

use std::sync::Arc;

use std::path::PathBuf;
use std::sync::Mutex;

use super::super::fleet::Strangers;
use super::super::server::{Load, Server};
use super::super::vllm::Vllm;
use super::super::{Alias, Kind, Settings, proof};
use super::*;
use crate::record::Message;
use crate::registry::{BASE, Base, Lineage};
use crate::serve::tests::{Fake, logprob};
use proof::{Answered, Tokens};

/// Counts what it is told to record.
#[derive(Default)]
struct Book(Mutex<Vec<String>>);

#[async_trait]
impl Ledger for Book {
    async fn record(&self, intent: &Intent, _proofs: &[Proof]) -> Result<(), String> {
        let mut rows = self.0.lock().unwrap();
        if !rows.contains(&intent.promotion().to_owned()) {
            rows.push(intent.promotion().to_owned());
        }
        Ok(())
    }
}

/// Two replicas, an open intent from the base to a version, and a panel that knows how each model scores.
pub(super) struct Stage {
    servers: [Fake; 2],
    pub(super) fleet: Fleet,
    pub(super) registry: Registry,
    intent: Intent,
    pub(super) to: Target,
    panel: Panel,
    rows: Book,
}

impl Stage {
    pub(super) async fn new(alias: Alias) -> Stage {
        Stage::speaking("v1", alias).await
    }

    /// Sets the stage with an adapter that in truth makes the servers speak with `voice`.
    async fn speaking(voice: &str, alias: Alias) -> Stage {
        let first = Fake::start().await;
        let servers = [Fake::beside(&first).await, first];
        let urls = servers.iter().map(|s| s.url.clone()).collect();
        let settings = Settings { urls, alias, retries: 0, ..Settings::default() };
        let folder = PathBuf::from(servers[1].adapter(voice, 8));
        std::fs::write(folder.join("adapter_model.safetensors"), "weights").unwrap();
        let registry =
            Registry::open(&servers[1].adapters.path().join("registry"), &crate::registry::Settings::default())
                .unwrap();
        let base = Base { name: "tiny".into(), sha256: "b".into() };
        let (tables, offsets, notes) = Default::default();
        let lineage = Lineage { base, round: None, dataset_sha256: None, tables, offsets, notes, created_us: 1 };
        let version = registry.register(&folder, lineage).unwrap().version;
        let intent = registry.override_promote(&version, "tester", "a test", 2).unwrap();
        let fleet = Fleet::new(&settings).unwrap();
        let to = fleet.target(&registry, &version);
        Stage { servers, fleet, registry, intent, to, panel: panel(vec![Who::Base, Who::New]), rows: Book::default() }
    }

    pub(super) fn promotion(&self) -> Promotion<'_> {
        self.promotion_with(&self.rows)
    }

    pub(super) fn promotion_with<'a>(&'a self, ledger: &'a dyn Ledger) -> Promotion<'a> {
        Promotion::new(&self.fleet, &self.registry, &self.intent, &self.panel, ledger)
    }

    pub(super) async fn carry_out(&self) -> Result<Outcome, PromoteError> {
        self.promotion().carry_out().await
    }

    pub(super) async fn recover(&self) -> Result<Outcome, PromoteError> {
        self.promotion().recover().await
    }

    /// Returns what the registry calls current, and whether the intent is still open.
    pub(super) fn book(&self) -> (String, bool) {
        (self.registry.current().unwrap().version, self.registry.intent().unwrap().is_some())
    }

    /// Returns the folder of an adapter that taod knows nothing of.
    pub(super) fn adapter_of_the_operator(&self) -> PathBuf {
        let folder = PathBuf::from(self.servers[1].adapter("theirs", 8));
        std::fs::write(folder.join("adapter_model.safetensors"), "theirs").unwrap();
        folder
    }

    pub(super) fn promoted(&self) -> (String, bool) {
        (self.to.name.clone(), false)
    }

    /// Takes the first `count` steps as a promotion would, and no more: the process was killed.
    pub(super) async fn killed_after(&self, count: usize) {
        let mut promotion = self.promotion();
        for &step in &Step::ORDER[..count] {
            promotion.take(step).await.unwrap();
        }
    }

    pub(super) async fn aliases(&self) -> Vec<Option<String>> {
        let mut all = Vec::new();
        for replica in &self.fleet.replicas {
            all.push(replica.alias("production").await.unwrap());
        }
        all
    }

    async fn adapters(&self) -> usize {
        let mut count = 0;
        for replica in &self.fleet.replicas {
            count += replica.names().await.unwrap().len();
        }
        count
    }
}

fn panel(hypotheses: Vec<Who>) -> Panel {
    let voice = |who| match who {
        Who::Base => "base",
        Who::Incumbent => "v0",
        Who::New => "v1",
    };
    let row = move |who, answer: &Answered| match &answer.tokens {
        Tokens::Ids(ids) => ids.iter().enumerate().map(|(i, &id)| logprob(voice(who), i, id)).collect(),
        Tokens::Pieces(pieces) => {
            let id = |piece: &str| if piece == "<|end|>" { 256 } else { u32::from(piece.as_bytes()[0]) };
            pieces.iter().enumerate().map(|(i, piece)| logprob(voice(who), i, id(piece))).collect()
        }
    };
    Panel {
        prompts: ["how are you", "what is it"].map(|text| vec![Message::text("user", text)]).to_vec(),
        hypotheses,
        likelihood: Arc::new(move |who, answers| Ok(answers.iter().map(|answer| row(who, answer)).collect())),
        settings: proof::Settings::default().of(Kind::Serve),
    }
}

/// What the registry says after a change was undone: the base is current and no intent is open.
pub(super) static ABORTED: std::sync::LazyLock<(String, bool)> = std::sync::LazyLock::new(|| (BASE.to_owned(), false));

pub(super) fn both(target: &str) -> Vec<Option<String>> {
    vec![Some(target.to_owned()); 2]
}

#[tokio::test]
async fn a_promotion_goes_through_all_steps_on_all_replicas() {
    let stage = Stage::new(Alias::Native).await;
    let Outcome::Done { proofs } = stage.carry_out().await.unwrap() else { panic!("undone") };
    assert_eq!(proofs.len(), 2);
    assert!(proofs.iter().all(|p| p.attribution == Attribution::Proven(Who::New) && p.distances[&Who::New] < 1e-6));
    assert_eq!(stage.book(), stage.promoted());
    assert_eq!(stage.aliases().await, both(&stage.to.name));
    assert_eq!(stage.rows.0.lock().unwrap().len(), 1);
}

#[tokio::test]
async fn a_killed_promotion_is_settled_from_every_step() {
    for killed_after in 0..=Step::ORDER.len() {
        let stage = Stage::new(Alias::Native).await;
        stage.killed_after(killed_after).await;
        let moved = killed_after > 3;
        for _ in 0..2 {
            let outcome = stage.recover().await.unwrap();
            assert_eq!(matches!(outcome, Outcome::Done { .. }), moved, "killed after {killed_after} steps");
        }
        assert_eq!(stage.book(), if moved { stage.promoted() } else { ABORTED.clone() });
        assert_eq!(stage.rows.0.lock().unwrap().len(), usize::from(moved), "killed after {killed_after} steps");
        assert_eq!(stage.adapters().await, if moved { 2 } else { 0 });
        assert_eq!(stage.aliases().await, if moved { both(&stage.to.name) } else { vec![None, None] });
    }
}

#[tokio::test]
async fn an_alias_that_moved_on_one_replica_only_moves_on_the_others() {
    let stage = Stage::new(Alias::Native).await;
    stage.killed_after(3).await;
    stage.fleet.replicas[0].move_alias("production", None, &stage.to.name).await.unwrap();
    stage.recover().await.unwrap();
    assert_eq!(stage.aliases().await, both(&stage.to.name));
}

#[tokio::test]
async fn a_server_that_answers_with_the_base_under_the_new_name_is_caught() {
    let stage = Stage::speaking("base", Alias::Native).await;
    let error = stage.carry_out().await.unwrap_err();
    let text = error.to_string();
    assert!(matches!(error, PromoteError::Aborted { step: Step::ProveUnique, .. }), "{text}");
    assert!(text.contains("with the base model, not with the new version"), "{text}");
    assert_eq!(stage.book(), *ABORTED);
    assert_eq!((stage.adapters().await, stage.aliases().await), (0, vec![None, None]));
}

#[tokio::test]
async fn a_server_that_answers_with_something_else_is_caught() {
    let stage = Stage::speaking("stranger", Alias::Native).await;
    let text = stage.carry_out().await.unwrap_err().to_string();
    assert!(text.contains("none of the known models"), "{text}");
    assert_eq!(stage.adapters().await, 0);
}

#[tokio::test]
async fn an_alias_that_someone_else_moved_aborts_the_change() {
    let stage = Stage::new(Alias::Native).await;
    let other = &stage.fleet.replicas[1];
    let folder = stage.to.folder().unwrap().to_owned();
    other.load("theirs", &folder, Load::Fresh).await.unwrap();
    other.move_alias("production", None, "theirs").await.unwrap();
    let error = stage.carry_out().await.unwrap_err();
    assert!(matches!(error, PromoteError::Aborted { step: Step::Alias, .. }), "{error}");
    assert_eq!(stage.aliases().await, [Some("base".to_owned()), Some("theirs".to_owned())]);
    assert_eq!(stage.book(), *ABORTED);
}

#[tokio::test]
async fn a_registry_that_fails_after_the_alias_moved_leaves_the_intent_open() {
    let stage = Stage::new(Alias::Native).await;
    let root = stage.servers[1].adapters.path().join("registry");
    // A folder in the place of the file cannot be replaced by a rename.
    std::fs::create_dir_all(root.join("current.json/x")).unwrap();
    let error = stage.carry_out().await.unwrap_err();
    assert!(matches!(error, PromoteError::Open { step: Step::Current, .. }), "{error}");
    assert_eq!(stage.aliases().await, both(&stage.to.name));
    std::fs::remove_dir_all(root.join("current.json")).unwrap();
    assert!(matches!(stage.recover().await.unwrap(), Outcome::Done { .. }));
    assert_eq!(stage.book(), stage.promoted());
}

/// Returns a client of a server that is not there.
pub(super) fn nobody() -> Box<dyn Server> {
    let settings = Settings { urls: vec!["http://127.0.0.1:1".into()], retries: 0, ..Settings::default() };
    Box::new(Vllm::replicas(&settings).unwrap().remove(0))
}

#[tokio::test]
async fn a_replica_that_is_gone_aborts_the_change_and_is_named() {
    let mut stage = Stage::new(Alias::Native).await;
    stage.fleet.replicas[1] = nobody();
    let error = stage.carry_out().await.unwrap_err();
    assert!(matches!(error, PromoteError::Aborted { step: Step::Load, .. }), "{error}");
    assert!(
        error.to_string().contains("put right when it can be reached again: endpoint http://127.0.0.1:1 "),
        "{error}"
    );
    assert_eq!(stage.book(), *ABORTED);
    let first = &stage.fleet.replicas[0];
    assert_eq!((first.alias("production").await.unwrap(), first.names().await.unwrap()), (None, vec![]));
}

#[tokio::test]
async fn a_replica_that_dies_after_the_alias_moved_elsewhere_is_put_right_when_it_is_back() {
    let mut stage = Stage::new(Alias::Native).await;
    stage.killed_after(4).await;
    let dead = std::mem::replace(&mut stage.fleet.replicas[1], nobody());
    let error = stage.recover().await.unwrap_err();
    assert!(matches!(error, PromoteError::Aborted { .. }), "{error}");
    assert_eq!(stage.book(), *ABORTED);
    let base = stage.fleet.target(&stage.registry, BASE);
    let done = stage.fleet.reconcile(&base, &[], &stage.registry, Strangers::Keep).await;
    assert_eq!((done.changed.len(), done.failed.len()), (0, 1), "{done:?}");
    stage.fleet.replicas[1] = dead;
    let done = stage
        .fleet
        .reconcile(&base, &stage.registry.retired(i64::MAX).unwrap(), &stage.registry, Strangers::Keep)
        .await;
    assert_eq!((done.changed.len(), done.retired.len(), done.failed.len()), (1, 1, 0), "{done:?}");
    assert_eq!((stage.aliases().await, stage.adapters().await), (both("base"), 0));
}

#[tokio::test]
async fn a_rollback_is_the_same_change_backwards() {
    let mut stage = Stage::new(Alias::Native).await;
    stage.carry_out().await.unwrap();
    stage.intent = stage.registry.rollback("worse", 3).unwrap();
    stage.panel.likelihood = {
        let forward = stage.panel.likelihood.clone();
        Arc::new(move |who, answers| forward(if who == Who::Incumbent { Who::New } else { who }, answers))
    };
    stage.panel.hypotheses = vec![Who::Base, Who::Incumbent];
    assert!(matches!(stage.carry_out().await.unwrap(), Outcome::Done { .. }));
    assert_eq!(stage.aliases().await, both("base"));
    assert_eq!(stage.book(), *ABORTED);
    let base = stage.fleet.target(&stage.registry, BASE);
    let retired = stage.registry.retired(0).unwrap();
    assert!(retired.is_empty(), "clients were led away just now");
    stage.fleet.reconcile(&base, &stage.registry.retired(i64::MAX).unwrap(), &stage.registry, Strangers::Keep).await;
    assert_eq!(stage.adapters().await, 0);
}

#[tokio::test]
async fn in_place_the_stable_name_is_loaded_from_the_new_folder() {
    let stage = Stage::new(Alias::Inplace).await;
    stage.carry_out().await.unwrap();
    let folder = stage.to.folder().unwrap();
    assert!(stage.fleet.replicas[1].holds("production", folder).await.unwrap());

    for (killed_after, adapters) in [(3, 0), (4, 4)] {
        let stage = Stage::new(Alias::Inplace).await;
        stage.killed_after(killed_after).await;
        stage.recover().await.unwrap();
        assert_eq!(stage.adapters().await, adapters);
    }
}

#[tokio::test]
async fn clients_that_read_the_name_need_no_alias() {
    let stage = Stage::new(Alias::Clients).await;
    stage.carry_out().await.unwrap();
    assert_eq!((stage.adapters().await, stage.aliases().await), (2, vec![None, None]));
    for (killed_after, adapters) in [(5, 0), (6, 2)] {
        let stage = Stage::new(Alias::Clients).await;
        stage.killed_after(killed_after).await;
        stage.recover().await.unwrap();
        assert_eq!(stage.adapters().await, adapters, "killed after {killed_after}");
    }
}

#[tokio::test]
async fn a_name_that_is_loaded_anew_is_back_after_a_kill_in_its_gap() {
    let mut stage = Stage::new(Alias::Reload).await;
    stage.carry_out().await.unwrap();
    // The next version comes from the same folder's weights under another config.
    let folder = PathBuf::from(stage.servers[1].adapter("v2", 8));
    std::fs::write(folder.join("adapter_model.safetensors"), "weights").unwrap();
    let lineage = stage.registry.manifest(&stage.to.name).unwrap().lineage;
    let next = stage.registry.register(&folder, lineage).unwrap().version;
    stage.intent = stage.registry.override_promote(&next, "tester", "a test", 4).unwrap();
    stage.killed_after(1).await;
    stage.fleet.replicas[0].unload("production").await.unwrap();
    assert_eq!(stage.recover().await.unwrap(), Outcome::Undone);
    for replica in &stage.fleet.replicas {
        assert!(replica.holds("production", stage.to.folder().unwrap()).await.unwrap());
        assert!(!replica.names().await.unwrap().contains(&next));
    }
    assert_eq!(stage.book(), stage.promoted());
}

#[tokio::test]
async fn a_restarted_replica_gets_the_current_version_back() {
    let stage = Stage::new(Alias::Native).await;
    let current = &stage.to;
    let changed = async || stage.fleet.reconcile(current, &[], &stage.registry, Strangers::Keep).await.changed;
    assert_eq!(changed().await.len(), 2);
    assert_eq!(changed().await.len(), 0);
    assert_eq!((stage.adapters().await, stage.aliases().await), (2, both(&stage.to.name)));
    assert_eq!(stage.fleet.prove_served(current, &stage.panel).await.unwrap().len(), 2);
    let second = &stage.fleet.replicas[1];
    second.move_alias("production", Some(&stage.to.name), "base").await.unwrap();
    let error = stage.fleet.prove_served(current, &stage.panel).await.unwrap_err().to_string();
    assert!(error.contains("with the base model, not with the new version"), "{error}");
    assert_eq!(changed().await, [second.url()]);
    assert_eq!(stage.aliases().await, both(&stage.to.name));
}

#[tokio::test]
async fn anothers_version_under_the_stable_name_is_neither_led_away_from_nor_promoted_over() {
    for alias in [Alias::Native, Alias::Inplace] {
        let mut stage = Stage::new(alias).await;
        stage.carry_out().await.unwrap();
        // What another daemon would do at the second server, whose registry made this.
        let (other, folder) = ("taod-0123456789ab", PathBuf::from(stage.servers[1].adapter("taod-0123456789ab", 8)));
        let second = stage.fleet.replicas[1].as_ref();
        match alias {
            Alias::Native => {
                second.load(other, &folder, Load::Fresh).await.unwrap();
                second.move_alias("production", Some(&stage.to.name), other).await.unwrap();
            }
            _ => second.load("production", &folder, Load::InPlace).await.unwrap(),
        }
        let done = stage.fleet.reconcile(&stage.to, &[], &stage.registry, Strangers::Keep).await;
        let failed: Vec<String> = done.failed.iter().map(ToString::to_string).collect();
        assert!(done.changed.is_empty() && failed.len() == 1, "{done:?}");
        assert!(failed[0].contains(other) && failed[0].contains("settle --take-over"), "{failed:?}");
        stage.intent = stage.registry.rollback("worse", 3).unwrap();
        let error = stage.carry_out().await.unwrap_err();
        assert!(matches!(&error, PromoteError::Aborted { step: Step::Load, .. }), "{error}");
        assert!(error.to_string().contains("which this registry never made"), "{error}");
        // An operator's word is above it.
        let done = stage.fleet.reconcile(&stage.to, &[], &stage.registry, Strangers::Overrule).await;
        assert_eq!((done.changed, done.failed.len()), (vec![stage.fleet.replicas[1].url().to_owned()], 0));
    }
}
