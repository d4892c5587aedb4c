//! Promotions over two replicas of `taod serve`, stopped at every step, and against a server that lies.

use std::sync::{Arc, Mutex};

use super::super::proof;
use super::*;
use crate::record::Message;
use crate::serve::tests::{Fake, logprob};
use proof::{Answered, Tokens};

/// The registry as far as a promotion sees it.
#[derive(Clone, Default)]
struct Book(Arc<Mutex<(Vec<Mark>, Option<Mark>)>>);

impl Book {
    fn marks(&self) -> Vec<Mark> {
        self.0.lock().unwrap().0.clone()
    }

    /// Returns the name that the registry would call current.
    fn current(&self, change: &Change) -> String {
        let moved = self.marks().contains(&Mark::Current);
        if moved { change.to.name.clone() } else { change.from.name.clone() }
    }

    fn fail_at(&self, mark: Mark) {
        self.0.lock().unwrap().1 = Some(mark);
    }

    fn marker(&self) -> impl FnMut(Mark, &Change) -> Result<(), String> + Send + use<> {
        let book = self.0.clone();
        move |mark, _| {
            let mut book = book.lock().unwrap();
            if book.1 == Some(mark) {
                return Err("disk full".into());
            }
            book.0.push(mark);
            Ok(())
        }
    }
}

/// Two replicas, a change from the base to `v1`, and a panel that knows how each model scores.
struct Stage {
    servers: [Fake; 2],
    fleet: Fleet,
    change: Change,
    panel: Panel,
    book: Book,
}

impl Stage {
    async fn new(alias: Alias) -> Stage {
        Stage::speaking("v1", alias).await
    }

    /// Sets the stage with an adapter folder `v1` that in truth makes the servers speak with `voice`.
    async fn speaking(voice: &str, alias: Alias) -> Stage {
        let first = Fake::start().await;
        let servers = [Fake::beside(&first).await, first];
        let urls = servers.iter().map(|s| s.url.clone()).collect();
        let settings = Settings { urls, alias, retries: 0, ..Settings::default() };
        let folder = PathBuf::from(servers[0].adapter(voice, 8));
        let base = Target { name: "base".into(), folder: None };
        let to = Target { name: "tao-1".into(), folder: Some(folder) };
        Stage {
            servers,
            fleet: Fleet::new(&settings).unwrap(),
            change: Change { from: base, to },
            panel: panel(vec![Who::Base, Who::New]),
            book: Book::default(),
        }
    }

    async fn carry_out(&self) -> Result<Outcome, PromoteError> {
        Promotion::new(&self.fleet, &self.change, &self.panel, &mut self.book.marker()).carry_out().await
    }

    async fn recover(&self) -> Result<Outcome, PromoteError> {
        let current = self.book.current(&self.change);
        Promotion::new(&self.fleet, &self.change, &self.panel, &mut self.book.marker()).recover(&current).await
    }

    /// Takes the first `count` steps as a promotion would, and no more: the process was killed.
    async fn killed_after(&self, count: usize) {
        let mut marker = self.book.marker();
        let mut promotion = Promotion::new(&self.fleet, &self.change, &self.panel, &mut marker);
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

fn both(target: &str) -> Vec<Option<String>> {
    vec![Some(target.to_owned()); 2]
}

#[tokio::test]
async fn a_promotion_goes_through_all_steps_on_all_replicas() {
    let stage = Stage::new(Alias::Native).await;
    let Outcome::Done { proofs } = stage.carry_out().await.unwrap() else { panic!("undone") };
    assert_eq!(proofs.len(), 2);
    assert!(proofs.iter().all(|p| p.attribution == Attribution::Proven(Who::New) && p.distances[&Who::New] < 1e-6));
    assert_eq!(stage.book.marks(), [Mark::Intent, Mark::Current, Mark::Closed]);
    assert_eq!(stage.aliases().await, both("tao-1"));
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
        let last = if moved { Mark::Closed } else { Mark::Aborted };
        assert_eq!(stage.book.marks().last(), Some(&last));
        assert_eq!(stage.book.marks().contains(&Mark::Current), moved);
        assert_eq!(stage.book.marks().iter().filter(|&&m| m == Mark::Current).count(), usize::from(moved));
        assert_eq!(stage.adapters().await, if moved { 2 } else { 0 });
        assert_eq!(stage.aliases().await, if moved { both("tao-1") } else { vec![None, None] });
    }
}

#[tokio::test]
async fn an_alias_that_moved_on_one_replica_only_moves_on_the_others() {
    let stage = Stage::new(Alias::Native).await;
    stage.killed_after(3).await;
    stage.fleet.replicas[0].move_alias("production", None, "tao-1").await.unwrap();
    stage.recover().await.unwrap();
    assert_eq!(stage.aliases().await, both("tao-1"));
}

#[tokio::test]
async fn a_server_that_answers_with_the_base_under_the_new_name_is_caught() {
    let stage = Stage::speaking("base", Alias::Native).await;
    let error = stage.carry_out().await.unwrap_err();
    let text = error.to_string();
    assert!(matches!(error, PromoteError::Aborted { step: Step::ProveUnique, .. }), "{text}");
    assert!(text.contains("answers for 'tao-1' with the base model, not with the new version"), "{text}");
    assert_eq!(stage.book.marks(), [Mark::Intent, Mark::Aborted]);
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
    let folder = stage.change.to.folder.clone().unwrap();
    other.load("theirs", &folder, Load::Fresh).await.unwrap();
    other.move_alias("production", None, "theirs").await.unwrap();
    let error = stage.carry_out().await.unwrap_err();
    assert!(matches!(error, PromoteError::Aborted { step: Step::Alias, .. }), "{error}");
    assert_eq!(stage.aliases().await, [Some("base".to_owned()), Some("theirs".to_owned())]);
    assert_eq!(stage.book.marks().last(), Some(&Mark::Aborted));
}

#[tokio::test]
async fn a_registry_that_fails_after_the_alias_moved_leaves_the_intent_open() {
    let stage = Stage::new(Alias::Native).await;
    stage.book.fail_at(Mark::Current);
    let error = stage.carry_out().await.unwrap_err();
    assert!(matches!(error, PromoteError::Open { step: Step::Current, .. }), "{error}");
    assert_eq!(stage.aliases().await, both("tao-1"));
    stage.book.0.lock().unwrap().1 = None;
    assert!(matches!(stage.recover().await.unwrap(), Outcome::Done { .. }));

    let stage = Stage::new(Alias::Native).await;
    stage.book.fail_at(Mark::Intent);
    let error = stage.carry_out().await.unwrap_err();
    assert!(matches!(error, PromoteError::Aborted { step: Step::Intent, .. }), "{error}");
    assert_eq!((stage.book.marks(), stage.adapters().await), (vec![], 0));
}

#[tokio::test]
async fn a_replica_that_is_gone_leaves_the_intent_open_and_clients_untouched() {
    let mut stage = Stage::new(Alias::Native).await;
    let settings = Settings { urls: vec!["http://127.0.0.1:1".into()], retries: 0, ..Settings::default() };
    stage.fleet.replicas[1] = Vllm::replicas(&settings).unwrap().remove(0);
    let error = stage.carry_out().await.unwrap_err();
    assert!(matches!(error, PromoteError::Open { step: Step::Load, .. }), "{error}");
    assert_eq!(stage.book.marks(), [Mark::Intent]);
    assert_eq!(stage.fleet.replicas[0].alias("production").await.unwrap(), None);
}

#[tokio::test]
async fn a_rollback_is_the_same_change_backwards() {
    let mut stage = Stage::new(Alias::Native).await;
    stage.carry_out().await.unwrap();
    let (from, to) = (stage.change.to.clone(), stage.change.from.clone());
    stage.change = Change { from: from.clone(), to };
    stage.panel.likelihood = {
        let forward = stage.panel.likelihood.clone();
        Arc::new(move |who, answers| forward(if who == Who::Incumbent { Who::New } else { who }, answers))
    };
    stage.panel.hypotheses = vec![Who::Base, Who::Incumbent];
    assert!(matches!(stage.carry_out().await.unwrap(), Outcome::Done { .. }));
    assert_eq!(stage.aliases().await, both("base"));
    stage.fleet.retire(&from).await.unwrap();
    assert_eq!(stage.adapters().await, 0);
}

#[tokio::test]
async fn in_place_the_stable_name_is_loaded_from_the_new_folder() {
    let stage = Stage::new(Alias::Inplace).await;
    stage.carry_out().await.unwrap();
    let cards = stage.fleet.replicas[1].models().await.unwrap();
    let stable = cards.iter().find(|card| card.id == "production").unwrap();
    assert_eq!(stable.root, stage.change.to.folder.as_ref().map(|f| f.display().to_string()));

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
async fn a_restarted_replica_gets_the_current_version_back() {
    let stage = Stage::new(Alias::Native).await;
    let current = &stage.change.to;
    assert_eq!(stage.fleet.reconcile(current).await.unwrap().len(), 2);
    assert_eq!(stage.fleet.reconcile(current).await.unwrap().len(), 0);
    assert_eq!((stage.adapters().await, stage.aliases().await), (2, both("tao-1")));
    let second = &stage.fleet.replicas[1];
    second.move_alias("production", Some("tao-1"), "base").await.unwrap();
    assert_eq!(stage.fleet.reconcile(current).await.unwrap(), [second.url()]);
    assert_eq!(stage.aliases().await, both("tao-1"));
    assert_eq!(stage.servers.len(), 2);
}
