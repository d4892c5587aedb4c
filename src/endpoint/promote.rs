//! The one order in which a version comes into production, so that a crash at any point can be settled.
//!
//! ```text
//! intent -> load -> proof by unique name -> alias -> proof by stable name -> current -> intent closed
//! ```
//!
//! The registry opens the intent before any server is called, and only it can: from a passed trial, an operator's
//! override or a rollback. Each further step is done on all replicas before the next one begins. Until the alias
//! moves, clients see nothing and the change is undone by unloading; once it moved on any replica, every replica has
//! the proven version loaded, so [`Promotion::recover`] goes forward.

use std::path::PathBuf;

use serde::Serialize;

use crate::registry::{BASE, Intent, Registry, RegistryError};

use super::proof::{Attribution, Panel, Proof, Who, prove};
use super::vllm::{Load, Vllm};
use super::{Alias, EndpointError, Settings};

/// A version as the endpoint knows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// Its unique served name; the base model's name for the base.
    pub name: String,
    /// Its immutable folder, absolute; `None` for the base.
    pub folder: Option<PathBuf>,
}

/// The replicas of one logical endpoint and how clients find the promoted version.
pub struct Fleet {
    pub replicas: Vec<Vllm>,
    pub alias: Alias,
    pub stable_name: String,
    pub base_model: String,
}

/// One step of a promotion whose intent is open.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Step {
    Load,
    ProveUnique,
    Alias,
    ProveStable,
    /// `current` is renamed and the intent closed.
    Complete,
}

impl Step {
    /// The order; what comes before `Alias` is invisible to clients.
    pub const ORDER: [Step; 5] = [Step::Load, Step::ProveUnique, Step::Alias, Step::ProveStable, Step::Complete];
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
    #[error(transparent)]
    Registry(#[from] RegistryError),
    #[error("endpoint {url} answers for '{name}' with {found}, not with {expected}; distances in nats: {distances}")]
    NotProven { url: String, name: String, expected: &'static str, found: String, distances: String },
}

/// One change on its way.
pub struct Promotion<'a> {
    fleet: &'a Fleet,
    registry: &'a Registry,
    intent: &'a Intent,
    panel: &'a Panel,
    from: Target,
    to: Target,
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

    /// Returns what a version of the registry is at the endpoint.
    pub fn target(&self, registry: &Registry, version: &str) -> Target {
        match version {
            BASE => Target { name: self.base_model.clone(), folder: None },
            _ => {
                let folder = registry.path(version);
                let folder = std::path::absolute(&folder).unwrap_or(folder);
                Target { name: version.to_owned(), folder: Some(folder) }
            }
        }
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
    /// Prepares the change that `intent` opened; nothing happens yet. In the panel `Who::New` is where it goes to,
    /// `Who::Incumbent` where it comes from.
    pub fn new(fleet: &'a Fleet, registry: &'a Registry, intent: &'a Intent, panel: &'a Panel) -> Self {
        let (from, to) = (fleet.target(registry, intent.from()), fleet.target(registry, intent.to()));
        Promotion { fleet, registry, intent, panel, from, to, proofs: Vec::new() }
    }

    /// Makes the change, or undoes all of it.
    pub async fn carry_out(mut self) -> Result<Outcome, PromoteError> {
        self.go(&Step::ORDER).await
    }

    /// Settles a change that was interrupted: forward where `current` or the stable name moved, else back. Safe to
    /// repeat.
    pub async fn recover(mut self) -> Result<Outcome, PromoteError> {
        let moved = match self.registry.current() {
            Ok(current) if current.version == self.intent.to() => {
                return self.go(&[Step::Load, Step::Alias, Step::ProveStable, Step::Complete]).await;
            }
            Ok(_) => self.alias_moved().await,
            Err(error) => Err(error.into()),
        };
        match moved {
            Ok(true) => self.go(&Step::ORDER).await,
            Ok(false) => {
                let undone = self.undo("taod stopped before the alias moved").await;
                undone.map(|()| Outcome::Undone).map_err(|reason| self.open(Step::Load, reason))
            }
            Err(reason) => Err(self.open(Step::Alias, reason)),
        }
    }

    async fn go(&mut self, steps: &[Step]) -> Result<Outcome, PromoteError> {
        for &step in steps {
            tracing::info!(?step, to = self.to.name, "promotion");
            if let Err(reason) = self.take(step).await {
                return Err(self.give_up(step, reason).await);
            }
        }
        Ok(Outcome::Done { proofs: std::mem::take(&mut self.proofs) })
    }

    /// Takes one step on all replicas.
    async fn take(&mut self, step: Step) -> Result<(), Trouble> {
        let fleet = self.fleet;
        match step {
            Step::Load => {
                for replica in &fleet.replicas {
                    load(replica, &self.to).await?;
                }
                Ok(())
            }
            Step::ProveUnique => self.prove_all(&self.to.name.clone()).await,
            Step::Alias => {
                for replica in &fleet.replicas {
                    fleet.follow(replica, &self.from, &self.to).await?;
                }
                Ok(())
            }
            Step::ProveStable => match self.stable_name() {
                Some(name) => self.prove_all(name).await,
                None => Ok(()),
            },
            Step::Complete => Ok(self.registry.complete(self.intent, now())?),
        }
    }

    /// Returns the name that clients use, where the servers have one: in place, the base has no second name.
    fn stable_name(&self) -> Option<&'a str> {
        match (self.fleet.alias, &self.to.folder) {
            (Alias::Clients, _) | (Alias::Inplace, None) => None,
            _ => Some(&self.fleet.stable_name),
        }
    }

    /// Proves on every replica that `name` is answered by the new version.
    async fn prove_all(&mut self, name: &str) -> Result<(), Trouble> {
        let expected = if self.to.folder.is_some() { Who::New } else { Who::Base };
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

    /// Undoes what was done before a failed step. Once `current` may have been renamed there is no way back.
    async fn give_up(&mut self, step: Step, reason: Trouble) -> PromoteError {
        if step == Step::Complete {
            return self.open(step, reason);
        }
        if let Err(second) = self.undo(&reason.to_string()).await {
            tracing::error!(error = %second, "a change could not be undone");
            return self.open(step, reason);
        }
        PromoteError::Aborted { from: self.from.name.clone(), to: self.to.name.clone(), step, reason }
    }

    fn open(&self, step: Step, reason: Trouble) -> PromoteError {
        PromoteError::Open { to: self.to.name.clone(), step, reason }
    }

    /// Moves the stable name back where it moved, unloads the new version, and closes the intent.
    async fn undo(&mut self, reason: &str) -> Result<(), Trouble> {
        for replica in &self.fleet.replicas {
            if self.fleet.points_at(replica, &self.to).await? {
                load(replica, &self.from).await?;
                self.fleet.follow(replica, &self.to, &self.from).await?;
            }
        }
        for replica in &self.fleet.replicas {
            unload(replica, &self.to).await?;
        }
        Ok(self.registry.abort(self.intent, reason, now())?)
    }

    async fn alias_moved(&self) -> Result<bool, Trouble> {
        for replica in &self.fleet.replicas {
            if self.fleet.points_at(replica, &self.to).await? {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

fn now() -> i64 {
    chrono::Utc::now().timestamp_micros()
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
