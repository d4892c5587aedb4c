//! The one order in which a version comes into production, so that a crash at any point can be settled.
//!
//! ```text
//! intent -> load -> proof by unique name -> shadow -> alias -> proof by stable name -> current -> row -> intent closed
//! ```
//!
//! The registry opens the intent before any server is called, and only it can: from a passed trial, an operator's
//! override or a rollback. Each further step is done on all replicas before the next one begins. Until the alias
//! moves, clients see nothing and the change is undone by unloading. Once it moved anywhere, every replica has the
//! proven version loaded, so [`Promotion::recover`] goes forward; and once `current` moved there is no way back.
//!
//! A replica that cannot be reached stops a change, but not its undoing: what is left on it is put right by
//! [`Fleet::reconcile`] when it comes back, because `current` says what every replica has to serve.

use async_trait::async_trait;
use serde::Serialize;

use crate::crash::{self, Point};
use crate::registry::{Intent, Kind, Registry, RegistryError};

use super::EndpointError;
use super::fleet::{Fleet, Place, Target, load, unload};
use super::proof::{Attribution, Panel, Proof, Who, prove};
use super::server::Answers;

/// How long a gateway that has not followed yet is left alone before it is asked again.
const ASK_AGAIN: std::time::Duration = std::time::Duration::from_millis(500);

/// What a change needs of those who know prompts and tables.
#[async_trait]
pub trait Ledger: Send + Sync {
    /// Compares the answers of two names at one replica before clients see any of the second; an error stops the change.
    async fn rehearse(&self, _at: &dyn Answers, _from: &str, _to: &str) -> Result<(), String> {
        Ok(())
    }

    /// Records a change that clients have by now. Safe to repeat.
    async fn record(&self, intent: &Intent, proofs: &[Proof]) -> Result<(), String>;
}

/// One step of a promotion whose intent is open.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Step {
    Load,
    ProveUnique,
    /// The version answers what clients asked lately, and nobody but taod sees it.
    Rehearse,
    Alias,
    ProveStable,
    /// `current` is renamed.
    Current,
    /// The row is stored.
    Record,
    /// The intent is closed.
    Close,
}

impl Step {
    /// The order; what comes before `Alias` is invisible to clients.
    pub const ORDER: [Step; 8] = [
        Step::Load,
        Step::ProveUnique,
        Step::Rehearse,
        Step::Alias,
        Step::ProveStable,
        Step::Current,
        Step::Record,
        Step::Close,
    ];
}

/// How a change, or a recovery, ended.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub enum Outcome {
    /// Clients get the new version; the proofs are those of the stable name, one for each place that is asked.
    Done { proofs: Vec<Proof> },
    /// An interrupted change was undone.
    Undone,
}

/// Why a change did not happen, or is not over.
#[derive(Debug, thiserror::Error)]
pub enum PromoteError {
    #[error("'{to}' was not promoted ({step:?} failed): {reason}; '{from}' is served as before{left}")]
    Aborted { from: String, to: String, step: Step, reason: Trouble, left: Left },
    #[error(
        "the change to '{to}' stopped half-way ({step:?} failed): {reason}; the daemon settles it, and so does `taod adapters settle`"
    )]
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
    #[error("before clients saw it, {0}")]
    Rehearsal(String),
    #[error("the change could not be recorded: {0}")]
    Ledger(String),
}

/// The places that an undoing could not reach, each with its reason.
#[derive(Debug, Default)]
pub struct Left(pub Vec<EndpointError>);

impl std::fmt::Display for Left {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.0.is_empty() {
            return Ok(());
        }
        let each: Vec<String> = self.0.iter().map(ToString::to_string).collect();
        write!(f, "; put right when it can be reached again: {}", each.join("; "))
    }
}

/// One change on its way.
pub struct Promotion<'a> {
    fleet: &'a Fleet,
    registry: &'a Registry,
    intent: &'a Intent,
    panel: &'a Panel,
    ledger: &'a dyn Ledger,
    from: Target,
    to: Target,
    proofs: Vec<Proof>,
    /// Whether clients may have been led to the new version by now.
    exposed: bool,
}

impl<'a> Promotion<'a> {
    /// Prepares the change that `intent` opened; nothing happens yet. In the panel `Who::New` is where it goes to,
    /// `Who::Incumbent` where it comes from.
    pub fn new(
        fleet: &'a Fleet,
        registry: &'a Registry,
        intent: &'a Intent,
        panel: &'a Panel,
        ledger: &'a dyn Ledger,
    ) -> Self {
        let (from, to) = (fleet.target(registry, intent.from()), fleet.target(registry, intent.to()));
        Promotion { fleet, registry, intent, panel, ledger, from, to, proofs: Vec::new(), exposed: false }
    }

    /// Makes the change, or undoes all of it.
    pub async fn carry_out(mut self) -> Result<Outcome, PromoteError> {
        crash::point(Point::DuringPromotion);
        self.go(&Step::ORDER).await
    }

    /// Settles a change that was interrupted: forward where `current` or the stable name moved, else back. Safe to
    /// repeat.
    pub async fn recover(mut self) -> Result<Outcome, PromoteError> {
        self.exposed = true;
        if self.moved().map_err(|reason| self.open(Step::Current, reason))? {
            return self
                .go(&[Step::Load, Step::Alias, Step::ProveStable, Step::Current, Step::Record, Step::Close])
                .await;
        }
        if self.alias_moved().await {
            let steps = Step::ORDER.into_iter().filter(|step| *step != Step::Rehearse);
            return self.go(&steps.collect::<Vec<_>>()).await;
        }
        let undone = self.undo("taod stopped before the alias moved").await;
        undone.map(|_| Outcome::Undone).map_err(|reason| self.open(Step::Load, reason))
    }

    async fn go(&mut self, steps: &[Step]) -> Result<Outcome, PromoteError> {
        for &step in steps {
            tracing::info!(?step, to = self.to.name, "promotion");
            if let Err(reason) = self.take(step).await {
                return Err(self.give_up(step, reason).await);
            }
            crash::point(Point::DuringPromotion);
        }
        Ok(Outcome::Done { proofs: std::mem::take(&mut self.proofs) })
    }

    /// Takes one step on all replicas.
    pub(super) async fn take(&mut self, step: Step) -> Result<(), Trouble> {
        let fleet = self.fleet;
        match step {
            Step::Load => {
                self.refuse_strangers().await?;
                for replica in &fleet.replicas {
                    load(replica.as_ref(), &self.to).await?;
                    crash::point(Point::DuringPromotion);
                }
                Ok(())
            }
            Step::ProveUnique => {
                self.proofs.clear();
                for replica in &fleet.replicas {
                    let proof = self.prove(replica.as_ref(), &self.to.name).await?;
                    self.proofs.push(proof);
                }
                Ok(())
            }
            Step::Rehearse => self.rehearse().await,
            Step::Alias => {
                self.exposed = true;
                for place in fleet.places() {
                    match self.takes_what_is_there() {
                        true => fleet.point(place, &self.to).await?,
                        false => fleet.follow(place, &self.from, &self.to).await?,
                    }
                    crash::point(Point::DuringPromotion);
                }
                Ok(())
            }
            Step::ProveStable => self.prove_stable().await,
            Step::Current => Ok(self.registry.serve(self.intent, now())?),
            Step::Record => self.ledger.record(self.intent, &self.proofs).await.map_err(Trouble::Ledger),
            Step::Close => Ok(self.registry.close(self.intent)?),
        }
    }

    /// Lets one replica answer as both versions; it was proven that all are alike.
    async fn rehearse(&self) -> Result<(), Trouble> {
        let is_new = matches!(self.intent.why(), Kind::Gated { .. } | Kind::Override { .. });
        let Some(replica) = self.fleet.replicas.first().filter(|_| is_new) else { return Ok(()) };
        let ended = self.ledger.rehearse(replica.as_ref(), &self.from.name, &self.to.name).await;
        ended.map_err(Trouble::Rehearsal)
    }

    /// Proves wherever clients ask that the stable name is answered by the new version.
    async fn prove_stable(&mut self) -> Result<(), Trouble> {
        let Some(name) = self.fleet.asked_name(&self.to) else { return Ok(()) };
        let mut proofs = Vec::new();
        for place in self.fleet.places() {
            proofs.push(match place {
                Place::Replica(_) => self.prove(place.asked(), name).await?,
                Place::Gateway(gateway) => {
                    let deadline = tokio::time::Instant::now() + gateway.settle();
                    loop {
                        match self.prove(place.asked(), name).await {
                            Err(_) if tokio::time::Instant::now() < deadline => tokio::time::sleep(ASK_AGAIN).await,
                            ended => break ended?,
                        }
                    }
                }
            });
        }
        if !proofs.is_empty() {
            self.proofs = proofs;
        }
        Ok(())
    }

    /// Proves that `name` is answered by the new version.
    async fn prove(&self, server: &dyn Answers, name: &str) -> Result<Proof, Trouble> {
        prove_as(server, name, &self.to, self.panel).await
    }

    /// Undoes what was done before a failed step. Once `current` was renamed there is no way back.
    async fn give_up(&mut self, step: Step, reason: Trouble) -> PromoteError {
        if step >= Step::Current || self.moved().unwrap_or(true) {
            return self.open(step, reason);
        }
        match self.undo(&reason.to_string()).await {
            Ok(left) => {
                let (from, to) = (self.from.name.clone(), self.to.name.clone());
                PromoteError::Aborted { from, to, step, reason, left }
            }
            Err(second) => {
                tracing::error!(error = %second, "a change could not be undone");
                self.open(step, reason)
            }
        }
    }

    fn open(&self, step: Step, reason: Trouble) -> PromoteError {
        PromoteError::Open { to: self.to.name.clone(), step, reason }
    }

    /// Moves the stable name back where it moved, unloads the new version, and closes the intent. What cannot be
    /// reached is left to [`Fleet::reconcile`] and returned; that clients may be led on and no place can be asked is an
    /// error.
    async fn undo(&mut self, reason: &str) -> Result<Left, Trouble> {
        let mut left = Left::default();
        let import = self.is_import();
        // Clients of an import have its weights whether or not the name moved; taking them away would be the change.
        let places = if import { Vec::new() } else { self.fleet.places() };
        for place in &places {
            if let Err(error) = self.move_back(*place).await {
                left.0.push(error);
            }
        }
        if self.exposed && !places.is_empty() && left.0.len() == places.len() {
            return Err(left.0.remove(0).into());
        }
        // A canary goes on being what a part of the clients get.
        let is_canary = self.registry.canary()?.is_some_and(|canary| canary.version == self.intent.to());
        for replica in self.fleet.replicas.iter().filter(|_| !import && !is_canary) {
            if let Err(error) = unload(replica.as_ref(), &self.to).await {
                tracing::debug!(%error, "a version that was not promoted could not be unloaded");
                if left.0.iter().all(|known| known.to_string() != error.to_string()) {
                    left.0.push(error);
                }
            }
        }
        self.registry.abort(self.intent, &format!("{reason}{left}"), now())?;
        Ok(left)
    }

    /// Makes the stable name of one place lead where it led before, if this change moved it.
    async fn move_back(&self, place: Place<'_>) -> Result<(), EndpointError> {
        let fleet = self.fleet;
        let moved = fleet.leads_to(place, &self.to).await?;
        // A name that is loaded anew is gone in between; whoever else moved an alias is not overruled.
        let gone = !moved && fleet.alias.is_loaded() && self.from.folder().is_some() && fleet.is_nobodys(place).await?;
        if !moved && !gone {
            return Ok(());
        }
        if let Place::Replica(replica) = place {
            load(replica, &self.from).await?;
        }
        fleet.follow(place, &self.to, &self.from).await
    }

    /// Refuses to take the stable name from another daemon, before anything is loaded. A place that cannot be asked is told by the
    /// steps that need it.
    async fn refuse_strangers(&self) -> Result<(), EndpointError> {
        if self.takes_what_is_there() {
            return Ok(());
        }
        for place in self.fleet.places() {
            let asked = self.fleet.refuse_stranger(place, self.registry).await;
            if let Err(error @ EndpointError::Stranger { .. }) = asked {
                return Err(error);
            }
        }
        Ok(())
    }

    /// Returns true where the stable name leads to the same weights already, under whatever name they had, or nowhere since the
    /// servers came up with another model.
    fn takes_what_is_there(&self) -> bool {
        matches!(self.intent.why(), Kind::Import { .. } | Kind::NewBase { .. })
    }

    fn is_import(&self) -> bool {
        matches!(self.intent.why(), Kind::Import { .. })
    }

    /// Returns true where `current` is the new version already.
    fn moved(&self) -> Result<bool, Trouble> {
        Ok(self.registry.has_moved(self.intent)?)
    }

    /// Returns true where some place that can be asked leads clients to the new version.
    async fn alias_moved(&self) -> bool {
        for place in self.fleet.places() {
            match self.fleet.leads_to(place, &self.to).await {
                Ok(true) => return true,
                Ok(false) => {}
                Err(error) => tracing::warn!(%error, "it is not known where the stable name leads"),
            }
        }
        false
    }
}

/// Proves that `name` is answered by `target`, which the panel calls [`Who::New`] unless it is the base.
pub(super) async fn prove_as(
    server: &dyn Answers,
    name: &str,
    target: &Target,
    panel: &Panel,
) -> Result<Proof, Trouble> {
    let expected = if target.folder().is_some() { Who::New } else { Who::Base };
    let proof = prove(server, name, panel).await?;
    match proof.attribution == Attribution::Proven(expected) {
        true => Ok(proof),
        false => Err(not_proven(server.url(), name, expected, &proof)),
    }
}

fn now() -> i64 {
    chrono::Utc::now().timestamp_micros()
}

fn not_proven(url: &str, name: &str, expected: Who, proof: &Proof) -> Trouble {
    let found = match proof.attribution {
        Attribution::Proven(who) => called(who).to_owned(),
        Attribution::Wrong => "none of the known models".to_owned(),
        Attribution::Inconclusive => {
            let (used, apart) = (proof.prompts_used, proof.separation.unwrap_or_default());
            format!(
                "something that cannot be told apart (over {used} prompts the models are {apart:.1} standard errors apart)"
            )
        }
    };
    let distances: Vec<String> = proof.distances.iter().map(|(&who, d)| format!("{} {d:.4}", called(who))).collect();
    Trouble::NotProven {
        url: url.to_owned(),
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

#[cfg(test)]
#[path = "fault_tests.rs"]
mod faults;
