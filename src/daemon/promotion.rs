//! The one place where the gate's key, the registry and the endpoint meet.
//!
//! A promotion, an operator's override and a rollback are the same change of the served version; they differ only in
//! how the registry lets them begin. What a round's child claims is recomputed from the tables first. Whoever makes a
//! change holds the registry's turn, so that an open intent which can be seen with the turn in hand is an interrupted
//! one; each change settles such a one first, and so does [`tend`], which the daemon calls without end.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use async_trait::async_trait;
use chrono::{DateTime, Utc};
use serde::Serialize;
use serde_json::json;

use super::panel::panel;
use super::shadow;
use super::{canary, load_model};
use crate::config::Config;
use crate::durable;
use crate::endpoint::fleet::{Fleet, Reconciled, Strangers};
use crate::endpoint::promote::{Ledger, Outcome as Ended, Promotion};
use crate::endpoint::proof::Proof;
use crate::endpoint::server::Answers;
use crate::endpoint::{Kind as Server, compat};
use crate::engine::{Adapter, Model};
use crate::registry::{Approval, BASE, Base, Intent, Kind, Lineage, Recovery, Registry};
use crate::round::{Paths, Verdict, book};
use crate::table::{Name, Tables};

/// A change of the served version that happened.
#[derive(Debug, Clone, Serialize)]
pub struct Promoted {
    pub from: String,
    pub to: String,
    /// What showed, wherever the stable name is asked, that it is answered by the new version.
    pub proofs: Vec<Proof>,
}

/// How long a change waits for the one before it, or for the look after the endpoint.
const PATIENCE: Duration = Duration::from_secs(60);

impl Promoted {
    /// Returns the proof in words.
    pub fn explain(&self) -> String {
        format!("the stable name answers as {}; {}", self.to, distances(&self.proofs))
    }
}

/// Returns the numbers behind proofs in words.
pub fn distances(proofs: &[Proof]) -> String {
    let distance = |proof: &Proof| -> String {
        let each = proof.distances.iter().map(|(who, d)| format!("{who:?} {d:.4}").to_lowercase());
        let used = proof.prompts_used;
        format!("{} over {used} prompts", each.collect::<Vec<_>>().join(", "))
    };
    let shown: Vec<String> = proofs.iter().map(distance).collect();
    format!("distance in nats a token: {}", shown.join("; "))
}

/// Promotes what a round's verdict claims, after recomputing the claim from the tables.
pub async fn promote(
    config: &Config,
    verdict: &Verdict,
    approval: Option<Approval>,
    model: &Model,
) -> Result<Promoted> {
    let desk = Desk::open(config, model).await?;
    let passed = book::prove(&desk.tables, verdict, &config.gate).await?;
    desk.check(passed.challenger())?;
    let intent = desk.registry.promote(&passed, approval, now_us())?;
    desk.carry_out(&intent).await
}

/// Promotes a registered version on an operator's word, which is recorded.
pub async fn override_promote(
    config: &Config,
    version: &str,
    operator: &str,
    reason: &str,
    model: &Model,
) -> Result<Promoted> {
    let desk = Desk::open(config, model).await?;
    desk.check(version)?;
    let intent = desk.registry.override_promote(version, operator, reason, now_us())?;
    desk.carry_out(&intent).await
}

/// Returns to the version served before and quarantines the present one. `judged` is the version that was found wanting,
/// where one was: another one that is served by now is let alone.
pub async fn rollback(config: &Config, judged: Option<&str>, reason: &str, model: &Model) -> Result<Promoted> {
    let desk = Desk::open(config, model).await?;
    let current = desk.registry.current()?.version;
    if let Some(judged) = judged.filter(|judged| *judged != current) {
        bail!("{current} is served by now: the rollback was about {judged}");
    }
    let intent = desk.registry.rollback(reason, now_us())?;
    desk.carry_out(&intent).await
}

/// Makes the adapter that is in production already the first incumbent. That it is, is proven first.
pub async fn import(config: &Config, folder: &Path, operator: &str, reason: &str, model: &Model) -> Result<Promoted> {
    let desk = Desk::open(config, model).await?;
    let version = desk.register(folder, operator)?;
    desk.check(&version)?;
    let fleet = Fleet::new(&config.endpoint)?;
    let panel = panel(config, &desk.registry, BASE, &version, model)?;
    let shown = fleet.prove_served(&fleet.target(&desk.registry, &version), &panel).await;
    shown.with_context(|| {
        format!("{version} is registered but not shown to be in production: `taod adapters promote` puts it there")
    })?;
    let intent = desk.registry.import(&version, operator, reason, now_us())?;
    desk.carry_out(&intent).await
}

/// Registers an adapter that taod did not train, and returns its version.
pub async fn register(config: &Config, folder: &Path, operator: &str, model: &Model) -> Result<String> {
    let desk = Desk::open(config, model).await?;
    let version = desk.register(folder, operator)?;
    desk.check(&version).map(|()| version)
}

/// Makes the model of the config the new base: it is served bare, the open trial is void, and adapters of the former
/// base are refused from now on.
pub async fn new_base(config: &Config, operator: &str, reason: &str, model: &Model) -> Result<Promoted> {
    let desk = Desk::open(config, model).await?;
    let base = Base { name: model.identity().name.clone(), sha256: model.identity().sha256.clone() };
    let intent = desk.registry.new_base(base, operator, reason, now_us())?;
    desk.carry_out(&intent).await
}

/// What looking after the endpoint came to.
#[derive(Debug, Default)]
pub struct Tended {
    /// The change that had been interrupted, and how it was settled.
    pub settled: Option<(String, Ended)>,
    pub reconciled: Reconciled,
    /// What showed that the served version is behind the stable name; made anew where something had to be put back.
    pub proofs: Option<Vec<Proof>>,
}

/// Settles a change that a crash or a dead replica interrupted, and puts the served version back on every replica that
/// lost it. `None` where another process is changing what is served. `owed` is a proof that something put back calls for;
/// it stays so until the proof succeeds; `strangers` is what becomes of another daemon's version under the stable name.
pub async fn tend(config: &Config, owed: &mut bool, strangers: Strangers) -> Result<Option<Tended>> {
    let (registry, tables) = open(config)?;
    let Some(_turn) = registry.turn()? else { return Ok(None) };
    let mut tended = Tended::default();
    if registry.intent()?.is_some() {
        let model = load_model(config).await?;
        tended.settled = settle(config, &registry, &tables, &model).await?;
    }
    let fleet = Fleet::new(&config.endpoint)?;
    let current = registry.current()?;
    if current.promotion.is_none() && strangers == Strangers::Keep {
        tended.reconciled = fleet.introduce(&registry).await;
        return Ok(Some(tended));
    }
    let version = current.version;
    let current = fleet.target(&registry, &version);
    let retired = registry.retired(now_us().saturating_sub(grace_us(config)))?;
    tended.reconciled = fleet.reconcile(&current, &retired, &registry, strangers).await;
    *owed |= !tended.reconciled.changed.is_empty();
    canary::tend(&registry, &fleet, &current).await?;
    // With a canary, two versions answer to the stable name.
    if *owed && registry.canary()?.is_none() {
        let model = load_model(config).await?;
        let panel = panel(config, &registry, &version, &version, &model)?;
        tended.proofs = Some(fleet.prove_served(&current, &panel).await?);
        *owed = false;
    }
    Ok(Some(tended))
}

/// Settles the open intent, if there is one: forward where the stable name moved, else back.
async fn settle(
    config: &Config,
    registry: &Registry,
    tables: &Tables,
    model: &Model,
) -> Result<Option<(String, Ended)>> {
    let intent = match registry.recover()? {
        Recovery::Clean => return Ok(None),
        Recovery::Moved(intent) | Recovery::Underway(intent) => intent,
    };
    let fleet = Fleet::new(&config.endpoint)?;
    let panel = panel(config, registry, before(&intent), intent.to(), model)?;
    let ended = Promotion::new(&fleet, registry, &intent, &panel, &Rows { config, tables }).recover().await?;
    let how = if matches!(ended, Ended::Done { .. }) { "completed" } else { "undone" };
    tracing::info!(to = intent.to(), "an interrupted promotion was {how}");
    Ok(Some((intent.to().to_string(), ended)))
}

/// Returns the version that may still answer. One of a former base model cannot even be loaded on the new one.
fn before(intent: &Intent) -> &str {
    match intent.why() {
        Kind::NewBase { .. } => BASE,
        _ => intent.from(),
    }
}

pub(super) fn open(config: &Config) -> Result<(Registry, Tables)> {
    let paths = Paths::new(&config.state.dir);
    Ok((Registry::open(&paths.registry(), &config.registry)?, config.state.open_tables()?))
}

fn grace_us(config: &Config) -> i64 {
    i64::try_from(config.endpoint.retire_after_seconds).unwrap_or(i64::MAX).saturating_mul(1_000_000)
}

/// Everything that a change needs, with the turn to make it.
pub(super) struct Desk<'a> {
    pub(super) config: &'a Config,
    pub(super) model: &'a Model,
    pub(super) registry: Registry,
    tables: Tables,
    _turn: File,
}

/// Waits for the turn to change what is served.
pub(super) async fn turn(registry: &Registry) -> Result<File> {
    let until = tokio::time::Instant::now() + PATIENCE;
    loop {
        if let Some(turn) = registry.turn()? {
            return Ok(turn);
        }
        if tokio::time::Instant::now() >= until {
            bail!("another process is changing what is served: try again when it has ended");
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

impl<'a> Desk<'a> {
    /// Takes the turn, and settles what an earlier change left open.
    pub(super) async fn open(config: &'a Config, model: &'a Model) -> Result<Self> {
        let (registry, tables) = open(config)?;
        let turn = turn(&registry).await?;
        settle(config, &registry, &tables, model).await?;
        Ok(Desk { config, model, registry, tables, _turn: turn })
    }

    fn register(&self, folder: &Path, operator: &str) -> Result<String> {
        Adapter::load(folder, self.model)?;
        let identity = self.model.identity();
        let notes = [
            ("imported_by", operator.to_string()),
            ("tokenizer_sha256", identity.tokenizer_sha256.clone()),
            ("template_sha256", identity.template_sha256.clone()),
        ];
        let lineage = Lineage {
            base: Base { name: identity.name.clone(), sha256: identity.sha256.clone() },
            round: None,
            dataset_sha256: None,
            tables: BTreeMap::new(),
            offsets: Vec::new(),
            notes: notes.map(|(key, value)| (key.to_string(), value)).into(),
            created_us: now_us(),
        };
        Ok(self.registry.register(folder, lineage)?.version)
    }

    /// Refuses a version that the base model or the servers cannot take, before anything is called.
    pub(super) fn check(&self, version: &str) -> Result<()> {
        let manifest = self.registry.verify(version)?;
        let bound = compat::Bound::of(&self.config.endpoint);
        let folder = self.registry.path(version);
        compat::check(&folder, &manifest, self.model.identity(), &bound)?;
        self.export(version)
    }

    /// Writes a version in the format of servers that do not read PEFT's.
    fn export(&self, version: &str) -> Result<()> {
        let endpoint = &self.config.endpoint;
        let file = endpoint.publish.folder.join(format!("{version}.gguf"));
        if endpoint.kind != Server::Llamacpp || file.exists() {
            return Ok(());
        }
        durable::create_folder(&endpoint.publish.folder)?;
        let adapter = Adapter::load(&self.registry.path(version), self.model)?;
        Ok(adapter.save_gguf(&file, self.model.config())?)
    }

    async fn carry_out(&self, intent: &Intent) -> Result<Promoted> {
        let prepared = Fleet::new(&self.config.endpoint).map_err(anyhow::Error::from).and_then(|fleet| {
            Ok((fleet, panel(self.config, &self.registry, before(intent), intent.to(), self.model)?))
        });
        let (fleet, panel) = match prepared {
            Ok(prepared) => prepared,
            Err(error) => {
                self.registry.abort(intent, &error.to_string(), now_us())?;
                return Err(error);
            }
        };
        let rows = Rows { config: self.config, tables: &self.tables };
        let outcome = Promotion::new(&fleet, &self.registry, intent, &panel, &rows).carry_out().await?;
        let Ended::Done { proofs } = outcome else { bail!("the change to {} was undone", intent.to()) };
        Ok(Promoted { from: intent.from().to_string(), to: intent.to().to_string(), proofs })
    }
}

/// The table `promotions`, the end of the trial that a promotion came from, and the prompts for its rehearsal.
struct Rows<'a> {
    config: &'a Config,
    tables: &'a Tables,
}

#[async_trait]
impl Ledger for Rows<'_> {
    async fn rehearse(&self, at: &dyn Answers, from: &str, to: &str) -> Result<(), String> {
        shadow::rehearse(self.config, self.tables, at, from, to).await.map_err(|error| format!("{error:#}"))
    }

    async fn record(&self, intent: &Intent, proofs: &[Proof]) -> Result<(), String> {
        self.store(intent, proofs).await.map_err(|error| format!("{error:#}"))
    }
}

impl Rows<'_> {
    async fn store(&self, intent: &Intent, proofs: &[Proof]) -> Result<()> {
        let (action, trial) = match intent.why() {
            Kind::Gated { trial, .. } => ("promote", Some(trial.as_str())),
            Kind::Override { .. } => ("override", None),
            Kind::Rollback { .. } => ("rollback", None),
            Kind::Import { .. } => ("import", None),
            Kind::NewBase { base, .. } => {
                book::void_open(self.tables, &format!("the base model changed to {}", base.name)).await?;
                ("new_base", None)
            }
        };
        if let Some(trial) = trial {
            book::close_promoted(self.tables, trial).await?;
        }
        let row = PromotionRow {
            id: intent.promotion(),
            action,
            time: Utc::now(),
            version: intent.to(),
            previous: intent.from(),
            trial,
            detail: json!({ "proofs": proofs, "why": intent.why() }),
        };
        let app_id = format!("taod/promotions/{}", intent.promotion());
        book::append_once(self.tables, Name::Promotions, &app_id, &[row]).await?;
        Ok(())
    }
}

/// A row of `promotions`.
#[derive(Serialize)]
struct PromotionRow<'a> {
    id: &'a str,
    action: &'a str,
    time: DateTime<Utc>,
    version: &'a str,
    previous: &'a str,
    trial: Option<&'a str>,
    detail: serde_json::Value,
}

pub(super) fn now_us() -> i64 {
    Utc::now().timestamp_micros()
}
