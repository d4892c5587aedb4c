//! Promotions over two replicas of `taod serve`, stopped at every step, and against a server that lies.

use std::sync::Arc;

use super::super::proof;
use super::*;
use crate::record::Message;
use crate::registry::{Base, Lineage};
use crate::serve::tests::{Fake, logprob};
use proof::{Answered, Tokens};

/// Two replicas, an open intent from the base to a version, and a panel that knows how each model scores.
struct Stage {
    servers: [Fake; 2],
    fleet: Fleet,
    registry: Registry,
    intent: Intent,
    to: Target,
    panel: Panel,
}

impl Stage {
    async fn new(alias: Alias) -> Stage {
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
        let registry = Registry::open(&servers[1].adapters.path().join("registry")).unwrap();
        let base = Base { name: "tiny".into(), sha256: "b".into() };
        let (tables, offsets, notes) = Default::default();
        let lineage = Lineage { base, round: None, dataset_sha256: None, tables, offsets, notes, created_us: 1 };
        let version = registry.register(&folder, lineage).unwrap().version;
        let intent = registry.override_promote(&version, "tester", "a test", 2).unwrap();
        let fleet = Fleet::new(&settings).unwrap();
        let to = fleet.target(&registry, &version);
        Stage { servers, fleet, registry, intent, to, panel: panel(vec![Who::Base, Who::New]) }
    }

    fn promotion(&self) -> Promotion<'_> {
        Promotion::new(&self.fleet, &self.registry, &self.intent, &self.panel)
    }

    async fn carry_out(&self) -> Result<Outcome, PromoteError> {
        self.promotion().carry_out().await
    }

    async fn recover(&self) -> Result<Outcome, PromoteError> {
        self.promotion().recover().await
    }

    /// Returns what the registry calls current, and whether the intent is still open.
    fn book(&self) -> (String, bool) {
        (self.registry.current().unwrap().version, self.registry.intent().unwrap().is_some())
    }

    fn promoted(&self) -> (String, bool) {
        (self.to.name.clone(), false)
    }

    /// Takes the first `count` steps as a promotion would, and no more: the process was killed.
    async fn killed_after(&self, count: usize) {
        let mut promotion = self.promotion();
        for &step in &Step::ORDER[..count] {
            promotion.take(step).await.unwrap();
        }
    }

    async fn aliases(&self) -> Vec<Option<String>> {
        let mut all = Vec::new();
        for replica in &self.fleet.replicas {
            all.push(replica.alias("production").await.unwrap());
        }
        all
    }

    async fn adapters(&self) -> usize {
        let mut count = 0;
        for replica in &self.fleet.replicas {
            count += replica.models().await.unwrap().len() - 1;
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
        Tokens::Pieces(_) => Vec::new(),
    };
    Panel {
        prompts: ["how are you", "what is it"].map(|text| vec![Message::text("user", text)]).to_vec(),
        hypotheses,
        likelihood: Arc::new(move |who, answers| Ok(answers.iter().map(|answer| row(who, answer)).collect())),
        settings: proof::Settings::default(),
    }
}

/// What the registry says after a change was undone: the base is current and no intent is open.
static ABORTED: std::sync::LazyLock<(String, bool)> = std::sync::LazyLock::new(|| (BASE.to_owned(), false));

fn both(target: &str) -> Vec<Option<String>> {
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
}

#[tokio::test]
async fn a_killed_promotion_is_settled_from_every_step() {
    for killed_after in 0..=Step::ORDER.len() {
        let stage = Stage::new(Alias::Native).await;
        stage.killed_after(killed_after).await;
        let moved = killed_after > 2;
        for _ in 0..2 {
            let outcome = stage.recover().await.unwrap();
            assert_eq!(matches!(outcome, Outcome::Done { .. }), moved, "killed after {killed_after} steps");
        }
        assert_eq!(stage.book(), if moved { stage.promoted() } else { ABORTED.clone() });
        assert_eq!(stage.adapters().await, if moved { 2 } else { 0 });
        assert_eq!(stage.aliases().await, if moved { both(&stage.to.name) } else { vec![None, None] });
    }
}

#[tokio::test]
async fn an_alias_that_moved_on_one_replica_only_moves_on_the_others() {
    let stage = Stage::new(Alias::Native).await;
    stage.killed_after(2).await;
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
    let folder = stage.to.folder.clone().unwrap();
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
    assert!(matches!(error, PromoteError::Open { step: Step::Complete, .. }), "{error}");
    assert_eq!(stage.aliases().await, both(&stage.to.name));
    std::fs::remove_dir_all(root.join("current.json")).unwrap();
    assert!(matches!(stage.recover().await.unwrap(), Outcome::Done { .. }));
    assert_eq!(stage.book(), stage.promoted());
}

#[tokio::test]
async fn a_replica_that_is_gone_leaves_the_intent_open_and_clients_untouched() {
    let mut stage = Stage::new(Alias::Native).await;
    let settings = Settings { urls: vec!["http://127.0.0.1:1".into()], retries: 0, ..Settings::default() };
    stage.fleet.replicas[1] = Vllm::replicas(&settings).unwrap().remove(0);
    let error = stage.carry_out().await.unwrap_err();
    assert!(matches!(error, PromoteError::Open { step: Step::Load, .. }), "{error}");
    assert_eq!(stage.book(), (BASE.to_owned(), true));
    assert_eq!(stage.fleet.replicas[0].alias("production").await.unwrap(), None);
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
    stage.fleet.retire(&stage.to).await.unwrap();
    assert_eq!(stage.adapters().await, 0);
}

#[tokio::test]
async fn in_place_the_stable_name_is_loaded_from_the_new_folder() {
    let stage = Stage::new(Alias::Inplace).await;
    stage.carry_out().await.unwrap();
    let cards = stage.fleet.replicas[1].models().await.unwrap();
    let stable = cards.iter().find(|card| card.id == "production").unwrap();
    assert_eq!(stable.root, stage.to.folder.as_ref().map(|f| f.display().to_string()));

    for (killed_after, adapters) in [(2, 0), (3, 4)] {
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
    for (killed_after, adapters) in [(4, 0), (5, 2)] {
        let stage = Stage::new(Alias::Clients).await;
        stage.killed_after(killed_after).await;
        stage.recover().await.unwrap();
        assert_eq!(stage.adapters().await, adapters, "killed after {killed_after}");
    }
}

#[tokio::test]
async fn a_restarted_replica_gets_the_current_version_back() {
    let stage = Stage::new(Alias::Native).await;
    let current = &stage.to;
    assert_eq!(stage.fleet.reconcile(current).await.unwrap().len(), 2);
    assert_eq!(stage.fleet.reconcile(current).await.unwrap().len(), 0);
    assert_eq!((stage.adapters().await, stage.aliases().await), (2, both(&stage.to.name)));
    let second = &stage.fleet.replicas[1];
    second.move_alias("production", Some(&stage.to.name), "base").await.unwrap();
    assert_eq!(stage.fleet.reconcile(current).await.unwrap(), [second.url()]);
    assert_eq!(stage.aliases().await, both(&stage.to.name));
}
