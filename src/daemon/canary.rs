//! A version that a part of the clients gets before all do: begun by an operator, kept up by the daemon, and taken away where
//! what it earns is less than what the served version earns with the others.

use anyhow::{Result, bail};

use super::panel::panel;
use super::promotion::{Desk, now_us, open, turn};
use crate::config::Config;
use crate::endpoint::EndpointError;
use crate::endpoint::fleet::{Fleet, Target};
use crate::endpoint::gateway;
use crate::endpoint::proof::Proof;
use crate::engine::Model;
use crate::registry::{Canary, Registry};

/// Gives a version a part of the requests, after proof on every replica. Returns the proofs.
pub async fn begin(
    config: &Config,
    version: &str,
    percent: u8,
    operator: &str,
    reason: &str,
    model: &Model,
) -> Result<Vec<Proof>> {
    let desk = Desk::open(config, model).await?;
    desk.check(version)?;
    let fleet = Fleet::new(&config.endpoint)?;
    if !fleet.gateway.as_ref().is_some_and(gateway::Gateway::has_weights) {
        return Err(EndpointError::NoWeights.into());
    }
    let served = desk.registry.current()?.version;
    let panel = panel(config, &desk.registry, &served, version, desk.model)?;
    let proofs = fleet.load_and_prove(&fleet.target(&desk.registry, version), &panel).await?;
    let canary = desk.registry.begin_canary(version, percent, operator, reason, now_us())?;
    fleet.share(&fleet.target(&desk.registry, &served), Some(&part(&canary))).await?;
    Ok(proofs)
}

/// Takes the canary's part away and returns the version; `None` where there is none. A version that was `judged` and found
/// wanting is barred; another one that is the canary by now is let alone.
pub async fn end(config: &Config, judged: Option<&str>, reason: &str) -> Result<Option<String>> {
    let (registry, _) = open(config)?;
    let _turn = turn(&registry).await?;
    let Some(canary) = registry.canary()? else { return Ok(None) };
    if let Some(judged) = judged.filter(|judged| *judged != canary.version) {
        bail!("{} is the canary by now: {judged} was to be stopped", canary.version);
    }
    let fleet = Fleet::new(&config.endpoint)?;
    // The clients first: what the registry says is put right by `tend`, too, if this is cut short.
    fleet.share(&fleet.target(&registry, &registry.current()?.version), None).await?;
    registry.end_canary(reason, judged.is_some(), now_us())?;
    Ok(Some(canary.version))
}

/// Brings the gateway to what the registry says: a canary with its part, or none.
pub(super) async fn tend(registry: &Registry, fleet: &Fleet, current: &Target) -> Result<()> {
    let canary = registry.canary()?;
    if let Some(canary) = &canary {
        fleet.keep_loaded(&fleet.target(registry, &canary.version)).await?;
    }
    if fleet.gateway.as_ref().is_some_and(gateway::Gateway::has_file) {
        fleet.share(current, canary.as_ref().map(part).as_ref()).await?;
    }
    Ok(())
}

fn part(canary: &Canary) -> gateway::Canary {
    gateway::Canary { name: canary.version.clone(), percent: canary.percent }
}
