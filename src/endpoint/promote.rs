//! The one order in which a version comes into production, so that a crash at any point can be settled.
//!
//! ```text
//! intent -> load -> proof by unique name -> alias -> proof by stable name -> current -> close
//! ```
//!
//! Each of the steps is done on all replicas before the next one begins. Until the alias moves, clients see nothing and
//! the change is undone by unloading; once it moved on any replica, every replica has the proven version loaded, so
//! [`Promotion::recover`] goes forward. The registry's `current` and the open intent are the truth. A rollback is the
//! same change in the other direction.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::proof::{Attribution, Panel, Proof, Who, prove};
use super::vllm::{Load, Vllm};
use super::{Alias, EndpointError, Settings};

/// A version as the endpoint knows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Target {
    /// Its unique served name; the base model's name for the base.
    pub name: String,
    /// Its immutable folder, absolute; `None` for the base.
    pub folder: Option<PathBuf>,
}

/// A change of the version that clients get; stored as the intent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Change {
    pub from: Target,
    pub to: Target,
}

/// The replicas of one logical endpoint and how clients find the promoted version.
pub struct Fleet {
    pub replicas: Vec<Vllm>,
    pub alias: Alias,
    pub stable_name: String,
    pub base_model: String,
}

/// A mark that a promotion leaves in the registry. Each must be durable when it returns, and safe to repeat.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mark {
    /// The intent is recorded; nothing has happened yet.
    Intent,
    /// `current` names the new version.
    Current,
    /// The change is complete: the intent is closed.
    Closed,
    /// The change was undone: the intent is closed.
    Aborted,
}

/// Leaves a mark in the registry. The caller binds it to `registry::promote` or `registry::rollback`.
pub type Marker<'a> = dyn FnMut(Mark, &Change) -> Result<(), String> + Send + 'a;

/// One step of a promotion.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Step {
    Intent,
    Load,
    ProveUnique,
    Alias,
    ProveStable,
    Current,
    Close,
}

impl Step {
    /// The order; what comes before `Alias` is invisible to clients.
    pub const ORDER: [Step; 7] =
        [Step::Intent, Step::Load, Step::ProveUnique, Step::Alias, Step::ProveStable, Step::Current, Step::Close];
}

/// How a change, or a recovery, ended.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub enum Outcome {
    /// Clients get the new version; the proofs are those of the stable name, one for each replica.
    Done { proofs: Vec<Proof> },
    /// An interrupted change was undone.
    Undone,
}

/// Why a change did not happen, or is not over.
#[derive(Debug, thiserror::Error)]
pub enum PromoteError {
    #[error("'{to}' was not promoted ({step:?} failed): {reason}; everything was undone, '{from}' is served as before")]
    Aborted { from: String, to: String, step: Step, reason: Trouble },
    #[error("the change to '{to}' stopped half-way ({step:?} failed): {reason}; it is settled by the next start")]
    Open { to: String, step: Step, reason: Trouble },
}

/// What made a step fail.
#[derive(Debug, thiserror::Error)]
pub enum Trouble {
    #[error(transparent)]
    Endpoint(#[from] EndpointError),
    #[error("the registry refused: {0}")]
    Registry(String),
    #[error("endpoint {url} answers for '{name}' with {found}, not with {expected}; distances in nats: {distances}")]
    NotProven { url: String, name: String, expected: &'static str, found: String, distances: String },
}

/// One change on its way.
pub struct Promotion<'a> {
    fleet: &'a Fleet,
    change: &'a Change,
    panel: &'a Panel,
    mark: &'a mut Marker<'a>,
    proofs: Vec<Proof>,
}

impl Fleet {
    /// Returns the replicas that `settings` name.
    pub fn new(settings: &Settings) -> Result<Self, EndpointError> {
        Ok(Fleet {
            replicas: Vllm::replicas(settings)?,
            alias: settings.alias,
            stable_name: settings.stable_name.clone(),
            base_model: settings.base_model.clone(),
        })
    }

    /// Brings every replica to `current`, as after a restart, when runtime adapters and aliases are gone. Only while
    /// no intent is open. Returns the addresses of the replicas that had to be changed.
    pub async fn reconcile(&self, current: &Target) -> Result<Vec<String>, EndpointError> {
        let mut changed = Vec::new();
        for replica in &self.replicas {
            let loaded = current.folder.is_none() || lists(replica, &current.name, &current.folder).await?;
            if loaded && (self.alias == Alias::Clients || self.points_at(replica, current).await?) {
                continue;
            }
            load(replica, current).await?;
            self.point(replica, current).await?;
            changed.push(replica.url().to_owned());
        }
        Ok(changed)
    }

    /// Unloads a version that clients no longer get, on every replica.
    pub async fn retire(&self, old: &Target) -> Result<(), EndpointError> {
        for replica in &self.replicas {
            unload(replica, old).await?;
        }
        Ok(())
    }

    /// Returns true where the stable name leads to `target` on this replica. With `clients` there is none.
    async fn points_at(&self, replica: &Vllm, target: &Target) -> Result<bool, EndpointError> {
        match self.alias {
            Alias::Native => Ok(replica.alias(&self.stable_name).await?.as_ref() == Some(&target.name)),
            Alias::Inplace => lists(replica, &self.stable_name, &target.folder).await,
            Alias::Clients => Ok(false),
        }
    }

    /// Moves the stable name from `from` to `to`. Safe to repeat. A stable name that does not exist yet is created,
    /// but only from the base: else something is there that taod does not know.
    async fn follow(&self, replica: &Vllm, from: &Target, to: &Target) -> Result<(), EndpointError> {
        if self.alias != Alias::Native {
            return self.point(replica, to).await;
        }
        let current = replica.alias(&self.stable_name).await?;
        if current.as_ref() == Some(&to.name) {
            return Ok(());
        }
        let expected = if current.is_none() && from.name == self.base_model { None } else { Some(from.name.as_str()) };
        replica.move_alias(&self.stable_name, expected, &to.name).await
    }

    /// Points the stable name at `target`, whatever it points at now.
    async fn point(&self, replica: &Vllm, target: &Target) -> Result<(), EndpointError> {
        match (self.alias, &target.folder) {
            (Alias::Native, _) => {
                let current = replica.alias(&self.stable_name).await?;
                replica.move_alias(&self.stable_name, current.as_deref(), &target.name).await
            }
            (Alias::Inplace, Some(folder)) => replica.load(&self.stable_name, folder, Load::InPlace).await,
            (Alias::Inplace, None) => replica.unload(&self.stable_name).await,
            (Alias::Clients, _) => Ok(()),
        }
    }
}

/// Returns true where a replica lists `name` from `folder`; for the base (no folder): where it does not list it.
async fn lists(replica: &Vllm, name: &str, folder: &Option<PathBuf>) -> Result<bool, EndpointError> {
    let cards = replica.models().await?;
    let root = cards.into_iter().find(|card| card.id == name).map(|card| card.root.unwrap_or_default());
    Ok(root == folder.as_ref().map(|folder| folder.display().to_string()))
}

async fn load(replica: &Vllm, target: &Target) -> Result<(), EndpointError> {
    match &target.folder {
        Some(folder) => replica.load(&target.name, folder, Load::Fresh).await,
        None => Ok(()),
    }
}

async fn unload(replica: &Vllm, target: &Target) -> Result<(), EndpointError> {
    match target.folder {
        Some(_) => replica.unload(&target.name).await,
        None => Ok(()),
    }
}

impl<'a> Promotion<'a> {
    /// Prepares a change; nothing happens yet. In the panel `Who::New` is what `change.to` is.
    pub fn new(fleet: &'a Fleet, change: &'a Change, panel: &'a Panel, mark: &'a mut Marker<'a>) -> Self {
        Promotion { fleet, change, panel, mark, proofs: Vec::new() }
    }

    /// Makes the change, or undoes all of it.
    pub async fn carry_out(mut self) -> Result<Outcome, PromoteError> {
        self.go(&Step::ORDER).await
    }

    /// Settles a change that was interrupted, given the registry's current version: forward where the stable name or
    /// `current` moved, else back. Safe to repeat.
    pub async fn recover(mut self, current: &str) -> Result<Outcome, PromoteError> {
        if current == self.change.to.name {
            return self.go(&[Step::Load, Step::Alias, Step::ProveStable, Step::Close]).await;
        }
        match self.alias_moved().await {
            Ok(true) => self.go(&Step::ORDER[1..]).await,
            Ok(false) => self.undo().await.map(|()| Outcome::Undone).map_err(|reason| self.open(Step::Load, reason)),
            Err(reason) => Err(self.open(Step::Alias, reason)),
        }
    }

    async fn go(&mut self, steps: &[Step]) -> Result<Outcome, PromoteError> {
        for &step in steps {
            tracing::info!(?step, to = self.change.to.name, "promotion");
            if let Err(reason) = self.take(step).await {
                return Err(self.give_up(step, reason).await);
            }
        }
        Ok(Outcome::Done { proofs: std::mem::take(&mut self.proofs) })
    }

    /// Takes one step on all replicas.
    async fn take(&mut self, step: Step) -> Result<(), Trouble> {
        let (fleet, change) = (self.fleet, self.change);
        match step {
            Step::Intent => self.leave(Mark::Intent),
            Step::Load => {
                for replica in &fleet.replicas {
                    load(replica, &change.to).await?;
                }
                Ok(())
            }
            Step::ProveUnique => self.prove_all(&change.to.name).await,
            Step::Alias => {
                for replica in &fleet.replicas {
                    fleet.follow(replica, &change.from, &change.to).await?;
                }
                Ok(())
            }
            Step::ProveStable => match self.stable_name() {
                Some(name) => self.prove_all(name).await,
                None => Ok(()),
            },
            Step::Current => self.leave(Mark::Current),
            Step::Close => self.leave(Mark::Closed),
        }
    }

    /// Returns the name that clients use, where the servers have one: in place, the base has no second name.
    fn stable_name(&self) -> Option<&'a str> {
        match (self.fleet.alias, &self.change.to.folder) {
            (Alias::Clients, _) | (Alias::Inplace, None) => None,
            _ => Some(&self.fleet.stable_name),
        }
    }

    /// Proves on every replica that `name` is answered by the new version.
    async fn prove_all(&mut self, name: &str) -> Result<(), Trouble> {
        let expected = if self.change.to.folder.is_some() { Who::New } else { Who::Base };
        self.proofs.clear();
        for replica in &self.fleet.replicas {
            let proof = prove(replica, name, self.panel).await?;
            if proof.attribution != Attribution::Proven(expected) {
                return Err(not_proven(replica, name, expected, &proof));
            }
            self.proofs.push(proof);
        }
        Ok(())
    }

    fn leave(&mut self, mark: Mark) -> Result<(), Trouble> {
        (self.mark)(mark, self.change).map_err(Trouble::Registry)
    }

    /// Undoes what was done before a failed step. Once `current` may have been renamed there is no way back.
    async fn give_up(&mut self, step: Step, reason: Trouble) -> PromoteError {
        let undone = match step {
            Step::Intent => Ok(()),
            Step::Current | Step::Close => return self.open(step, reason),
            _ => self.undo().await,
        };
        if let Err(second) = undone {
            tracing::error!(error = %second, "a change could not be undone");
            return self.open(step, reason);
        }
        let (from, to) = (self.change.from.name.clone(), self.change.to.name.clone());
        PromoteError::Aborted { from, to, step, reason }
    }

    fn open(&self, step: Step, reason: Trouble) -> PromoteError {
        PromoteError::Open { to: self.change.to.name.clone(), step, reason }
    }

    /// Moves the stable name back where it moved, unloads the new version, and closes the intent.
    async fn undo(&mut self) -> Result<(), Trouble> {
        let change = self.change;
        for replica in &self.fleet.replicas {
            if self.fleet.points_at(replica, &change.to).await? {
                load(replica, &change.from).await?;
                self.fleet.follow(replica, &change.to, &change.from).await?;
            }
        }
        for replica in &self.fleet.replicas {
            unload(replica, &change.to).await?;
        }
        self.leave(Mark::Aborted)
    }

    async fn alias_moved(&self) -> Result<bool, Trouble> {
        for replica in &self.fleet.replicas {
            if self.fleet.points_at(replica, &self.change.to).await? {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

fn not_proven(replica: &Vllm, name: &str, expected: Who, proof: &Proof) -> Trouble {
    let found = match proof.attribution {
        Attribution::Proven(who) => called(who).to_owned(),
        Attribution::Wrong => "none of the known models".to_owned(),
        Attribution::Inconclusive => {
            let (used, asked) = (proof.prompts_used, proof.prompts_asked);
            format!("something that cannot be told apart ({used} of {asked} prompts discriminate)")
        }
    };
    let distances: Vec<String> = proof.distances.iter().map(|(&who, d)| format!("{} {d:.4}", called(who))).collect();
    Trouble::NotProven {
        url: replica.url().to_owned(),
        name: name.to_owned(),
        expected: called(expected),
        found,
        distances: distances.join(", "),
    }
}

fn called(who: Who) -> &'static str {
    match who {
        Who::Base => "the base model",
        Who::Incumbent => "the incumbent",
        Who::New => "the new version",
    }
}

#[cfg(test)]
#[path = "promote_tests.rs"]
mod tests;
