//! The replicas of one logical endpoint, and the stable name that leads clients to the served version.
//!
//! Where the name is moved depends on `endpoint.alias`: on each replica, once at a gateway, or nowhere. [`Fleet::places`]
//! says where, so that a promotion does not have to know.

use std::path::{Path, PathBuf};

use crate::registry::{BASE, Registry, is_version};

use super::directory::Directory;
use super::gateway::{Canary, Gateway};
use super::llamacpp::LlamaCpp;
use super::mistralrs::MistralRs;
use super::promote::{Trouble, prove_as};
use super::proof::{Panel, Proof};
use super::server::{Answers, Load, Server};
use super::sglang::Sglang;
use super::vllm::Vllm;
use super::{Alias, EndpointError, Kind, Settings};

/// A version as the endpoint knows it.
#[derive(Debug, Clone, PartialEq)]
pub struct Target {
    /// Its unique served name; the base model's name for the base.
    pub name: String,
    /// Its immutable folder, absolute, and the registry that answers for what is in it, where it is a registered one; `None`
    /// for the base.
    source: Option<(PathBuf, Option<Registry>)>,
}

impl Target {
    /// Returns the base model, served as `name`.
    pub fn base(name: &str) -> Target {
        Target { name: name.to_owned(), source: None }
    }

    /// Returns an adapter that this process made and no registry knows, such as the doctor's.
    pub fn unregistered(name: String, folder: PathBuf) -> Target {
        Target { name, source: Some((folder, None)) }
    }

    /// Returns its folder, to compare with what a server has; `None` for the base.
    pub fn folder(&self) -> Option<&Path> {
        self.source.as_ref().map(|(folder, _)| folder.as_path())
    }

    /// Returns its folder for a server to load: hashed again and, where that is asked for, found signed.
    pub fn verified(&self) -> Result<Option<&Path>, EndpointError> {
        let Some((folder, registry)) = &self.source else { return Ok(None) };
        if let Some(registry) = registry {
            registry.verify(&self.name).map_err(Box::new)?;
        }
        Ok(Some(folder))
    }
}

/// The replicas of one logical endpoint and how clients find the promoted version.
pub struct Fleet {
    pub replicas: Vec<Box<dyn Server>>,
    pub alias: Alias,
    pub stable_name: String,
    pub base_model: String,
    pub gateway: Option<Gateway>,
}

/// What bringing the replicas to the served version did.
#[derive(Debug, Default)]
pub struct Reconciled {
    /// Addresses that had lost the served version, or led elsewhere, and do not any more.
    pub changed: Vec<String>,
    /// Versions that nobody is led to any more, each unloaded from the server at this address.
    pub retired: Vec<(String, String)>,
    /// Why a replica could not be brought there.
    pub failed: Vec<EndpointError>,
}

/// What becomes of a version that the stable name leads to and this registry never made: another daemon's, which has the same
/// `endpoint.stable_name`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Strangers {
    /// It stays what clients get, and is told as a failure.
    Keep,
    /// The name is led away from it, because an operator said so.
    Overrule,
}

/// One place where the stable name is moved.
#[derive(Clone, Copy)]
pub enum Place<'a> {
    Replica(&'a dyn Server),
    Gateway(&'a Gateway),
}

impl Fleet {
    /// Returns the replicas that `settings` name.
    pub fn new(settings: &Settings) -> Result<Self, EndpointError> {
        let replicas = match settings.kind {
            Kind::Serve | Kind::Vllm => boxed(Vllm::replicas(settings)?),
            Kind::Sglang => boxed(Sglang::replicas(settings)?),
            Kind::Mistralrs => boxed(MistralRs::replicas(settings)?),
            Kind::Llamacpp => boxed(LlamaCpp::replicas(settings)?),
            Kind::Directory | Kind::Webhook => boxed(Directory::replicas(settings)?),
        };
        let gateway = match settings.alias {
            Alias::Gateway => Some(Gateway::new(settings)?),
            _ => None,
        };
        let (stable_name, base_model) = (settings.stable_name.clone(), settings.base_model.clone());
        Ok(Fleet { replicas, alias: settings.alias, stable_name, base_model, gateway })
    }

    /// Returns what a version of the registry is at the endpoint.
    pub fn target(&self, registry: &Registry, version: &str) -> Target {
        match version {
            BASE => Target::base(&self.base_model),
            _ => {
                let folder = registry.path(version);
                let folder = std::path::absolute(&folder).unwrap_or(folder);
                Target { name: version.to_owned(), source: Some((folder, Some(registry.clone()))) }
            }
        }
    }

    /// Returns where the stable name is moved; nowhere, where clients read the unique name.
    pub fn places(&self) -> Vec<Place<'_>> {
        match (self.alias, &self.gateway) {
            (Alias::Clients, _) => Vec::new(),
            (Alias::Gateway, Some(gateway)) => vec![Place::Gateway(gateway)],
            _ => self.replicas.iter().map(|replica| Place::Replica(replica.as_ref())).collect(),
        }
    }

    /// Gives a canary its part of the requests, or takes it away; returns false where it is so already. An error where the
    /// stable name is not a gateway's, or the gateway has no weights.
    pub async fn share(&self, current: &Target, canary: Option<&Canary>) -> Result<bool, EndpointError> {
        match &self.gateway {
            Some(gateway) if gateway.has_weights() => gateway.share(&current.name, canary).await,
            _ if canary.is_none() => Ok(false),
            _ => Err(EndpointError::NoWeights),
        }
    }

    /// Loads a version on every replica and proves it by its unique name, which the panel calls [`Who::New`](super::proof::Who).
    pub async fn load_and_prove(&self, target: &Target, panel: &Panel) -> Result<Vec<Proof>, Trouble> {
        let mut proofs = Vec::new();
        for replica in &self.replicas {
            load(replica.as_ref(), target).await?;
        }
        for replica in &self.replicas {
            proofs.push(prove_as(replica.as_ref(), &target.name, target, panel).await?);
        }
        Ok(proofs)
    }

    /// Creates the stable name where it leads nowhere, and else leaves it alone: for as long as taod has never changed
    /// what is served, whatever the name leads to is somebody's production. Another daemon's version is told as a failure.
    pub async fn introduce(&self, registry: &Registry) -> Reconciled {
        let (base, mut done) = (Target::base(&self.base_model), Reconciled::default());
        for place in self.places() {
            let target = match place {
                Place::Gateway(gateway) => gateway.target().await,
                Place::Replica(replica) if self.alias == Alias::Native => replica.alias(&self.stable_name).await,
                // The base has no second name on such servers; that they answer is worth knowing.
                Place::Replica(replica) => replica.names().await.map(|_| Some(String::new())),
            };
            let created = match target {
                Ok(None) => self.point(place, &base).await.map(|()| true),
                Ok(Some(_)) => self.refuse_stranger(place, registry).await.map(|()| false),
                Err(error) => Err(error),
            };
            match created {
                Ok(true) => done.changed.push(place.url().to_owned()),
                Ok(false) => {}
                Err(error) => done.failed.push(error),
            }
        }
        done
    }

    /// Loads a version where a replica lost it.
    pub async fn keep_loaded(&self, target: &Target) -> Result<(), EndpointError> {
        for replica in &self.replicas {
            put_back(replica.as_ref(), target).await?;
        }
        Ok(())
    }

    /// Brings every replica to `current`, as after a restart, when runtime adapters and aliases are gone, and unloads
    /// the versions among `retired`. Only while no intent is open. What cannot be reached holds up nothing else.
    pub async fn reconcile(
        &self,
        current: &Target,
        retired: &[String],
        registry: &Registry,
        strangers: Strangers,
    ) -> Reconciled {
        let mut done = Reconciled::default();
        for replica in &self.replicas {
            match put_back(replica.as_ref(), current).await {
                Ok(true) => done.changed.push(replica.url().to_owned()),
                Ok(false) => {}
                Err(error) => done.failed.push(error),
            }
        }
        for place in self.places() {
            match self.lead(place, current, registry, strangers).await {
                Ok(true) if !done.changed.iter().any(|url| url == place.url()) => {
                    done.changed.push(place.url().to_owned());
                }
                Ok(_) => {}
                // A replica that is down was told above.
                Err(error) if done.failed.iter().all(|known| known.to_string() != error.to_string()) => {
                    done.failed.push(error);
                }
                Err(_) => {}
            }
        }
        // Who has what is asked of all before anything is unloaded: what is published for all of them is listed by none once
        // the first has let go of it.
        let mut held = Vec::new();
        for replica in &self.replicas {
            held.push((replica.as_ref(), replica.names().await));
        }
        for (replica, names) in held {
            if let Err(error) = self.unload_all((replica, names), current, retired, &mut done.retired).await {
                // Clients have the right version; an old one left in the server's memory is untidy, not wrong.
                tracing::debug!(%error, "an old version could not be unloaded");
            }
        }
        done
    }

    /// Attributes the answers of the stable name, wherever it is asked; an error where they are not those of `current`,
    /// which the panel calls `Who::New`.
    pub async fn prove_served(&self, current: &Target, panel: &Panel) -> Result<Vec<Proof>, Trouble> {
        let Some(name) = self.asked_name(current) else { return Ok(Vec::new()) };
        let mut proofs = Vec::new();
        for place in self.places() {
            proofs.push(prove_as(place.asked(), name, current, panel).await?);
        }
        Ok(proofs)
    }

    /// Unloads those of `retired` that a replica has; not where its stable name could still lead there.
    async fn unload_all(
        &self,
        (replica, names): (&dyn Server, Result<Vec<String>, EndpointError>),
        current: &Target,
        retired: &[String],
        done: &mut Vec<(String, String)>,
    ) -> Result<(), EndpointError> {
        for name in names?.into_iter().filter(|name| retired.contains(name) && *name != current.name) {
            replica.unload(&name).await?;
            done.push((replica.url().to_owned(), name));
        }
        Ok(())
    }

    /// Makes the stable name of one place lead to `target`; returns false where it did already.
    async fn lead(
        &self,
        place: Place<'_>,
        target: &Target,
        registry: &Registry,
        strangers: Strangers,
    ) -> Result<bool, EndpointError> {
        if self.leads_to(place, target).await? {
            return Ok(false);
        }
        if strangers == Strangers::Keep {
            self.refuse_stranger(place, registry).await?;
        }
        self.point(place, target).await.map(|()| true)
    }

    /// Returns the version that the stable name leads to where it is one, and not of this registry. Versions' names come from
    /// their content, so that two registries mean the same by the same name.
    pub async fn stranger(
        &self,
        place: Place<'_>,
        registry: Option<&Registry>,
    ) -> Result<Option<String>, EndpointError> {
        let found = match (place, self.alias) {
            (Place::Gateway(gateway), _) => gateway.target().await?,
            (Place::Replica(replica), Alias::Native) => replica.alias(&self.stable_name).await?,
            // The name is an adapter's own, and its folder has the version's name.
            (Place::Replica(replica), _) => replica
                .source(&self.stable_name)
                .await?
                .and_then(|path| Path::new(&path).file_name().and_then(|name| name.to_str()).map(str::to_owned)),
        };
        let Some(found) = found.filter(|name| is_version(name)) else { return Ok(None) };
        let known = registry.map(|registry| registry.knows(&found)).transpose().map_err(Box::new)?;
        Ok((known != Some(true)).then_some(found))
    }

    /// Refuses a place whose stable name leads to another registry's version.
    pub(super) async fn refuse_stranger(&self, place: Place<'_>, registry: &Registry) -> Result<(), EndpointError> {
        match self.stranger(place, Some(registry)).await? {
            None => Ok(()),
            Some(found) => {
                Err(EndpointError::Stranger { url: place.url().to_owned(), name: self.stable_name.clone(), found })
            }
        }
    }

    /// Returns true where the stable name leads to `target`.
    pub(super) async fn leads_to(&self, place: Place<'_>, target: &Target) -> Result<bool, EndpointError> {
        match (place, self.alias) {
            (Place::Gateway(gateway), _) => Ok(gateway.target().await?.as_ref() == Some(&target.name)),
            (Place::Replica(replica), Alias::Native) => {
                Ok(replica.alias(&self.stable_name).await?.as_ref() == Some(&target.name))
            }
            (Place::Replica(replica), _) => lists(replica, &self.stable_name, target).await,
        }
    }

    /// Returns true where the stable name is nobody's, on servers where it is an adapter's own.
    pub(super) async fn is_nobodys(&self, place: Place<'_>) -> Result<bool, EndpointError> {
        self.leads_to(place, &Target::base(&self.base_model)).await
    }

    /// Moves the stable name from `from` to `to`. Safe to repeat. A name that does not exist yet is created, but only
    /// from the base: else something is there that taod does not know.
    pub(super) async fn follow(&self, place: Place<'_>, from: &Target, to: &Target) -> Result<(), EndpointError> {
        let current = match (place, self.alias) {
            (Place::Gateway(gateway), _) => gateway.target().await?,
            (Place::Replica(replica), Alias::Native) => replica.alias(&self.stable_name).await?,
            (Place::Replica(replica), _) => {
                let ours = self.leads_to(place, from).await? || self.leads_to(place, to).await?;
                if ours || self.is_nobodys(place).await? {
                    return self.point(place, to).await;
                }
                return Err(EndpointError::AliasMoved {
                    url: replica.url().to_owned(),
                    name: self.stable_name.clone(),
                    current: "an adapter that taod did not load".into(),
                    expected: from.name.clone(),
                });
            }
        };
        let expected = match &current {
            None if from.name == self.base_model => None,
            Some(current) if *current == to.name => Some(current.as_str()),
            _ => Some(from.name.as_str()),
        };
        match place {
            Place::Gateway(gateway) => gateway.point(expected, &to.name).await,
            Place::Replica(replica) => replica.move_alias(&self.stable_name, expected, &to.name).await,
        }
    }

    /// Points the stable name at `target`, whatever it points at now.
    pub(super) async fn point(&self, place: Place<'_>, target: &Target) -> Result<(), EndpointError> {
        let name = self.stable_name.as_str();
        match (place, self.alias, target.folder()) {
            (Place::Gateway(gateway), ..) => {
                let current = gateway.target().await?;
                gateway.point(current.as_deref(), &target.name).await
            }
            (Place::Replica(replica), Alias::Native, _) => {
                let current = replica.alias(name).await?;
                replica.move_alias(name, current.as_deref(), &target.name).await
            }
            (Place::Replica(replica), Alias::Reload, Some(folder)) => {
                target.verified()?;
                // Between the two the name is not there: the gap that `reload` costs.
                replica.unload(name).await?;
                replica.load(name, folder, Load::Fresh).await
            }
            (Place::Replica(replica), _, Some(folder)) => {
                target.verified()?;
                replica.load(name, folder, Load::InPlace).await
            }
            (Place::Replica(replica), _, None) => replica.unload(name).await,
        }
    }

    /// Returns the name that clients use and that can be asked, where there is one: in place, the base has no second
    /// name.
    pub(super) fn asked_name(&self, target: &Target) -> Option<&str> {
        match (self.alias, target.folder()) {
            (Alias::Clients, _) | (Alias::Inplace | Alias::Reload, None) => None,
            _ => Some(&self.stable_name),
        }
    }
}

impl<'a> Place<'a> {
    /// Returns the address at which the stable name is asked.
    pub fn url(self) -> &'a str {
        self.asked().url()
    }

    /// Returns whom clients ask.
    pub(super) fn asked(self) -> &'a dyn Answers {
        match self {
            Place::Replica(replica) => replica,
            Place::Gateway(gateway) => gateway.front(),
        }
    }
}

fn boxed<S: Server + 'static>(servers: Vec<S>) -> Vec<Box<dyn Server>> {
    servers.into_iter().map(|server| Box::new(server) as Box<dyn Server>).collect()
}

/// Loads a version where a replica lacks it; returns true where it did.
async fn put_back(replica: &dyn Server, target: &Target) -> Result<bool, EndpointError> {
    let Some(folder) = target.folder() else {
        // That it answers at all is worth knowing.
        replica.names().await?;
        return Ok(false);
    };
    if replica.holds(&target.name, folder).await? {
        return Ok(false);
    }
    load(replica, target).await.map(|()| true)
}

/// Returns true where a replica lists `name` from the target's folder; for the base (no folder): where it does not list it.
async fn lists(replica: &dyn Server, name: &str, target: &Target) -> Result<bool, EndpointError> {
    match target.folder() {
        Some(folder) => replica.holds(name, folder).await,
        None => Ok(!replica.names().await?.iter().any(|listed| listed == name)),
    }
}

/// Loads a version under its unique name.
pub(super) async fn load(replica: &dyn Server, target: &Target) -> Result<(), EndpointError> {
    match target.verified()? {
        Some(folder) => replica.load(&target.name, folder, Load::Fresh).await,
        None => Ok(()),
    }
}

/// Unloads a version's unique name.
pub(super) async fn unload(replica: &dyn Server, target: &Target) -> Result<(), EndpointError> {
    match target.folder() {
        Some(_) => replica.unload(&target.name).await,
        None => Ok(()),
    }
}
