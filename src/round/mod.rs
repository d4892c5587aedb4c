//! One night, from the tables to a verdict: the only file that names all the stages.
//!
//! This runs in the round's child process (see [`child`]). It holds the round lock, resumes an unfinished round or begins
//! a new one, first extends the open trial and only then trains, and ends by writing an outcome that the daemon
//! verifies before it acts. Stages are plain functions over folders; what is complete is never done twice.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Instant;

use chrono::{DateTime, Utc};
use serde::Serialize;
use serde_json::json;
use sha2::{Digest, Sha256};

mod alarm;
pub mod anchors;
pub mod answers;
pub mod book;
mod brake;
pub mod child;
pub mod drift;
mod dry_run;
pub mod erase;
mod formats;
mod judging;
pub mod live;
mod outcome;
pub mod population;
mod probes;
pub mod replay;
mod rows;
mod state;
mod suites;
mod synthetic;
mod train;
mod trial;
pub mod view;

pub use brake::{Brake, Budget};
pub use dry_run::{Forecast, forecast};
pub use formats::formats;
pub use outcome::{Outcome, StageReport, Verdict};
pub use state::{Control, Paths, Plan};
pub use synthetic::FOLDER as SYNTHETIC;

use crate::adapter::TuneError;
use crate::candidates::CandidateError;
use crate::config::Config;
use crate::crash;
use crate::dataset::{self, DatasetError};
use crate::durable::{self, FileError};
use crate::engine::{self, EngineError, Model};
use crate::gate::GateError;
use crate::layout::{self, LayoutError};
use crate::progress::Progress;
use crate::record::{Message, derive_seed};
use crate::registry::{Base, Lineage, OffsetRange, Promotion, Registry, RegistryError};
use crate::reward_model::RewardModelError;
use crate::rewards::anchors::AnchorError;
use crate::rewards::{RewardError, Rewards, Workload};
use crate::table::{Name, TableError, Tables};
use train::Trained;

/// Why a night ended without a verdict.
#[derive(Debug, thiserror::Error)]
pub enum RoundError {
    #[error("another round is running (it holds {lock}); wait for it, or stop it")]
    Busy { lock: String },
    #[error(
        "{round} was begun under another {what}; finish it under the old one, or accept other bytes with --allow-drift"
    )]
    Drift { round: String, what: String },
    #[error("no unfinished round to resume; start one with `taod round --once`")]
    NothingToResume,
    #[error("cannot run the round's process: {0}")]
    Spawn(std::io::Error),
    #[error("{round} is paused at the end of a piece of work; it goes on where it left off")]
    Paused { round: String },
    #[error(
        "the round's process finished no piece of work for {seconds} s and was ended; the next start resumes the round"
    )]
    Stalled { seconds: u64 },
    #[error("the stored verdict of {round} does not hold: {reason}")]
    Unproven { round: String, reason: String },
    #[error("gate.suite {path}, line {line}: {why}")]
    Suite { path: String, line: usize, why: String },
    #[error("gate.guardrails.canaries {path}, line {line}: {why}")]
    Canary { path: String, line: usize, why: String },
    #[error(transparent)]
    RewardModel(#[from] RewardModelError),
    #[error(
        "trial {trial} was judged by other scorers ({then}) than the config names now ({now}): replay it under the config of \
         then"
    )]
    OtherScorers { trial: String, then: String, now: String },
    #[error(transparent)]
    Layout(#[from] LayoutError),
    #[error(transparent)]
    File(#[from] FileError),
    #[error(transparent)]
    Engine(#[from] EngineError),
    #[error(transparent)]
    Table(#[from] TableError),
    #[error(transparent)]
    Dataset(#[from] DatasetError),
    #[error(transparent)]
    Candidates(#[from] CandidateError),
    #[error(transparent)]
    Anchors(#[from] AnchorError),
    #[error(transparent)]
    Rewards(#[from] RewardError),
    #[error(transparent)]
    Tune(#[from] TuneError),
    #[error(transparent)]
    Gate(#[from] GateError),
    #[error(transparent)]
    Registry(#[from] RegistryError),
}

impl RoundError {
    /// Returns true where a stage left off because it was asked to.
    pub fn is_pause(&self) -> bool {
        matches!(
            self,
            RoundError::Paused { .. }
                | RoundError::Candidates(CandidateError::Paused { .. })
                | RoundError::Tune(TuneError::Paused { .. })
        )
    }
}

/// What the operator asked of a night.
#[derive(Debug, Clone, Default)]
pub struct Options {
    pub control: Option<Control>,
    /// Only go on with an unfinished round.
    pub resume: bool,
    pub allow_drift: bool,
    /// When the round leaves off at the end of its piece of work, to be gone on with later.
    pub until: Option<DateTime<Utc>>,
}

/// Everything the stages of one night share.
struct Night<'a> {
    config: &'a Config,
    plan: Plan,
    allow_drift: bool,
    folder: PathBuf,
    model: &'a Model,
    rewards: &'a Rewards,
    tables: Tables,
    registry: Registry,
    runtime: tokio::runtime::Runtime,
    progress: &'a Progress,
    stages: Vec<StageReport>,
}

/// Runs one night to its verdict. A failure of the round itself is an error and leaves the round to be resumed.
pub fn run(config: &Config, options: &Options, progress: &Progress) -> Result<Verdict, RoundError> {
    let paths = Paths::new(&config.state.dir);
    let _lock = paths.lock()?;
    layout::claim(&config.state.dir)?;
    // Whoever asked for a round by this file has it now.
    drop(std::fs::remove_file(paths.due()));
    let model = Model::load_on(&config.model.path, config.model.hold, &config.engine)?;
    let (rewards_settings, workloads) = (config.rewards.clone(), config.workload.clone());
    let rewards = Rewards::keeping(&rewards_settings, &workloads, &model, &config.state.dir.join("scores"))?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(RoundError::Spawn)?;
    let tables = config.state.open_tables()?;
    let registry = Registry::open(&paths.registry(), &config.registry)?;
    // A model without a template is refused at once; what a log holds is left out prompt by prompt.
    model.prompt_ids(&[Message::text("user", "?")], None)?;
    let (plan, folder) = begin(config, options, &paths, &model, &rewards)?;
    engine::pin_now(plan.created_us);
    let stages = state::read_stages(&folder)?;
    let brake = Brake::open(&folder, Budget::of(&config.round), options.until)?;
    let progress = &progress.also(std::sync::Arc::new(brake));
    let mut night = Night {
        config,
        plan,
        allow_drift: options.allow_drift,
        folder,
        model: &model,
        rewards: &rewards,
        tables,
        registry,
        runtime,
        progress,
        stages,
    };
    match night.pass() {
        Ok(outcome) => night.finish(outcome),
        Err(error) if error.is_pause() => {
            tracing::info!(round = night.plan.round, %error, "paused");
            Err(RoundError::Paused { round: night.plan.round })
        }
        Err(error) => Err(error),
    }
}

/// Returns the unfinished round, or writes the plan of a new one.
fn begin(
    config: &Config,
    options: &Options,
    paths: &Paths,
    model: &Model,
    rewards: &Rewards,
) -> Result<(Plan, PathBuf), RoundError> {
    let unfinished = paths.unfinished()?;
    if options.resume && unfinished.is_none() {
        return Err(RoundError::NothingToResume);
    }
    let round = match &unfinished {
        Some(id) => id.clone(),
        None => paths.next_round()?,
    };
    let folder = paths.round(&round);
    let plan = Plan {
        seed: derive_seed(config.round.seed, &[&round]),
        base: model.identity().clone(),
        settings_sha256: settings_hash(config)?,
        rewards: rewards.identity(),
        threads: crate::engine::threads::used(),
        control: options.control,
        created_us: chrono::Utc::now().timestamp_micros(),
        taod_version: env!("CARGO_PKG_VERSION").to_string(),
        accepted_drift: Vec::new(),
        round,
    };
    if unfinished.is_some() {
        let mut begun = state::read_plan(&folder)?;
        let drift = begun.drift(&plan, options.allow_drift)?;
        let new: Vec<String> = drift.into_iter().filter(|what| !begun.accepted_drift.contains(what)).collect();
        if !new.is_empty() {
            begun.accepted_drift.extend(new);
            durable::write_json(&folder.join(state::PLAN), &begun)?;
        }
        return Ok((begun, folder));
    }
    durable::create_folder(&folder)?;
    durable::write_json(&folder.join(state::PLAN), &plan)?;
    Ok((plan, folder))
}

/// Returns the hash of the settings that decide a round's bytes; where it runs, listens or logs is not among them.
fn settings_hash(config: &Config) -> Result<String, RoundError> {
    let mut deciding = json!({
        "dataset": config.dataset, "candidates": config.candidates, "decoding": config.decoding,
        "rewards": config.rewards, "workload": config.workload, "tuning": config.tuning, "gate": config.gate,
        "hold": config.model.hold, "sampled_as": config.candidates.precision.form(),
    });
    if !config.engine.is_cpu() {
        deciding["engine"] = json!(config.engine);
    }
    // Canonicalisation cannot fail for settings: they are finite numbers and strings.
    let bytes = serde_json_canonicalizer::to_vec(&deciding).unwrap_or_else(|_| deciding.to_string().into_bytes());
    Ok(hex::encode(Sha256::digest(bytes)))
}

/// Returns a dataset's range of offsets (both included) as the registry's (end excluded).
fn offset_range((name, range): (&String, &dataset::OffsetRange)) -> Option<OffsetRange> {
    let (topic, partition) = name.rsplit_once('/')?;
    Some(OffsetRange {
        topic: topic.to_string(),
        partition: partition.parse().ok()?,
        from: range.first,
        to: range.last + 1,
    })
}

impl Night<'_> {
    /// The order of a night: the dataset, the open trial, and only then a new adapter and its trial.
    fn pass(&mut self) -> Result<Outcome, RoundError> {
        self.state("planned", json!({ "seed": self.plan.seed, "control": self.plan.control }))?;
        if let Some(reason) = self.frozen()? {
            return Ok(Outcome::Skipped { reason });
        }
        let dataset = self.freeze()?;
        if let Some(reason) = self.frozen()? {
            return Ok(Outcome::Skipped { reason });
        }
        if let Some(open) = trial::open_one(self)? {
            let outcome = trial::extend(self, open, &dataset)?;
            if !matches!(outcome, Outcome::Refused { .. }) {
                return Ok(outcome);
            }
        }
        let registered = self.folder.join("registered.json");
        let challenger: String = match durable::read_json(&registered) {
            Ok(version) => version,
            Err(error) if error.is_not_found() => {
                if let Some(reason) = trial::budget_spent(self)? {
                    return Ok(Outcome::Skipped { reason });
                }
                if let Some(reason) = trial::too_few_prompts(self, &dataset)? {
                    return Ok(Outcome::Skipped { reason });
                }
                match train::train(self, &dataset)? {
                    Trained::Nothing { reason } => return Ok(Outcome::Skipped { reason }),
                    Trained::GivenUp { reason } => return Ok(Outcome::Failed { reason }),
                    Trained::Adapter(folder) => {
                        let version = self.registry.register(&folder, self.lineage(&dataset))?.version;
                        crash::at("registering");
                        durable::write_json(&registered, &version)?;
                        version
                    }
                }
            }
            Err(error) => return Err(error.into()),
        };
        crash::at("registered");
        self.state("registered", json!({ "version": challenger }))?;
        match trial::open(self, &challenger, &dataset) {
            // A second trial of the same weights would be a second chance; the night ends here, and the next one trains.
            // And where another daemon has opened one meanwhile, there is one to finish first.
            Err(RoundError::Gate(
                error @ (GateError::AlreadyTried { .. } | GateError::StillOpen(_) | GateError::Exhausted { .. }),
            )) => Ok(Outcome::Skipped { reason: error.to_string() }),
            opened => trial::extend(self, opened?, &dataset),
        }
    }

    /// Returns why nothing may be promoted, so that no prompt and no hour is spent on what could not be.
    fn frozen(&self) -> Result<Option<String>, RoundError> {
        if self.config.registry.promotion == Promotion::Frozen {
            return Ok(Some(
                "registry.promotion is \"frozen\": the log is stored, and nothing is trained or judged".into(),
            ));
        }
        let freeze = self.registry.frozen()?;
        Ok(freeze.map(|f| RegistryError::Frozen { by: f.by, reason: f.reason }.to_string()))
    }

    fn freeze(&mut self) -> Result<dataset::Dataset, RoundError> {
        let out = self.folder.join("dataset");
        let started = Instant::now();
        let dataset = if out.join("manifest.json").exists() {
            dataset::load(&out)?
        } else {
            let views: Vec<_> = self.config.workload.iter().map(Workload::view).collect();
            let freezing = dataset::Freezing {
                round: &self.plan.round,
                settings: &self.config.dataset,
                workloads: &views,
                seed: self.plan.seed,
                index: &Paths::new(&self.config.state.dir).prompts(),
            };
            self.runtime.block_on(dataset::freeze(&self.tables, freezing, &out))?
        };
        let rows = dataset.train.prompts().len() + dataset.gate.prompts().len() + dataset.audit.prompts().len();
        self.report(StageReport::new("dataset".to_string(), rows as u64, 0, started))?;
        crash::at("dataset");
        let population = population::watch(self, &dataset)?;
        let shifts: BTreeMap<&str, f64> = population.alarms().map(|s| (s.feature.as_str(), s.index)).collect();
        let anchors = anchors::watch(self)?;
        alarm::heed(self, &population, &anchors)?;
        self.state(
            "dataset",
            json!({ "manifest": dataset.manifest, "population_shifts": shifts, "anchors": anchors }),
        )?;
        Ok(dataset)
    }

    fn lineage(&self, dataset: &dataset::Dataset) -> Lineage {
        let base = Base { name: self.plan.base.name.clone(), sha256: self.plan.base.sha256.clone() };
        let made = dataset::synthetic::peek(&self.folder.join(SYNTHETIC)).ok().flatten();
        let notes = [
            ("synthetic_sha256", made.map_or("none".to_string(), |made| made.sha256)),
            ("settings_sha256", self.plan.settings_sha256.clone()),
            ("seed", self.plan.seed.to_string()),
            ("control", self.plan.control.map_or("none".to_string(), |c| format!("{c:?}"))),
            ("accepted_drift", self.plan.accepted_drift.join(", ")),
            ("tokenizer_sha256", self.model.identity().tokenizer_sha256.clone()),
            ("template_sha256", self.model.identity().template_sha256.clone()),
        ];
        Lineage {
            base,
            round: Some(self.plan.round.clone()),
            dataset_sha256: Some(dataset.manifest.hash.clone()),
            tables: dataset.manifest.inputs.tables.clone(),
            offsets: dataset.manifest.inputs.offsets.iter().filter_map(offset_range).collect(),
            notes: notes.map(|(key, value)| (key.to_string(), value)).into(),
            created_us: self.plan.created_us,
        }
    }

    fn finish(self, outcome: Outcome) -> Result<Verdict, RoundError> {
        self.state(outcome.name(), json!({ "outcome": outcome, "stages": self.stages }))?;
        let verdict = Verdict { round: self.plan.round.clone(), outcome, stages: self.stages };
        crash::at("decided");
        durable::write_json(&self.folder.join(state::OUTCOME), &verdict)?;
        Ok(verdict)
    }

    /// Keeps what a stage did. A resumed round passes its finished stages again; what they did the first time stands.
    fn report(&mut self, stage: StageReport) -> Result<(), RoundError> {
        if self.stages.iter().any(|known| known.stage == stage.stage) {
            return Ok(());
        }
        tracing::info!(round = %self.plan.round, stage = %stage.stage, rows = stage.rows, tokens = stage.tokens,
            seconds = stage.seconds, "stage done");
        self.stages.push(stage);
        Ok(durable::write_json(&self.folder.join(state::STAGES), &self.stages)?)
    }

    /// Appends one row to `rounds`, once per state, also when the round is resumed.
    fn state(&self, state: &str, detail: serde_json::Value) -> Result<(), RoundError> {
        let app_id = format!("taod/rounds/{}/{state}", self.plan.round);
        let row = rows::RoundRow::new(&self.plan.round, state, self.plan.seed, detail);
        self.append_once(Name::Rounds, &app_id, &[row])
    }

    fn append_once<T: Serialize>(&self, name: Name, app_id: &str, rows: &[T]) -> Result<(), RoundError> {
        self.runtime.block_on(book::append_once(&self.tables, name, app_id, rows))?;
        Ok(())
    }
}
