//! `taod demo`: the whole loop on embedded parts, with the code that production runs.
//!
//! A broker and an endpoint start in this process; real traffic goes to the endpoint over HTTP, which logs it to the
//! broker; from there on everything is what `taod run` does: ingestion, a round in its child process, the promotion over
//! HTTP. Nothing here computes a result: the demo arranges, asks the same audit prompts before and after, and prints.

mod audit;
mod endpoint;
mod report;
mod stats;
mod traffic;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use tokio::sync::watch;

pub use endpoint::Endpoint;
pub use report::Report;

use crate::config::Config;
use crate::daemon::promotion;
use crate::dataset;
use crate::endpoint::vllm::Vllm;
use crate::engine::Model;
use crate::gate::StepRow;
use crate::ingest;
use crate::progress::Progress;
use crate::query_log::embedded::EmbeddedBroker;
use crate::rewards::{Rewards, Scorer};
use crate::round::{self, Control, Outcome, Paths, StageReport, Verdict};
use crate::table::{Name, Tables};

/// Calls under way at the same time; the endpoint batches them.
const CONCURRENCY: usize = 64;
/// Longest instruction taken, in characters: the demo's model is small.
const MAX_INSTRUCTION: usize = 400;

/// What the user asked of the demo.
#[derive(Debug, Clone)]
pub struct Options {
    pub control: Option<Control>,
    /// File of instructions (AlpacaEval's JSON).
    pub prompts: PathBuf,
    /// How many instructions are asked.
    pub calls: usize,
}

/// Runs the demo in `config.state.dir`, which must not hold an earlier one, and returns what it ends with.
pub async fn run(mut config: Config, options: &Options, progress: &Progress) -> Result<Report> {
    let started = Instant::now();
    let root = config.state.dir.clone();
    if root.exists() {
        bail!("{} is there already: remove it, or choose another --dir", root.display());
    }
    std::fs::create_dir_all(&root).with_context(|| format!("cannot create {}", root.display()))?;
    let root = root.canonicalize()?;
    config.state.dir = root.clone();
    // The demo keeps to its folder, whatever the config says of production.
    config.state.tables.clear();
    config.state.store_options.clear();
    let mut stages = Vec::new();

    let broker = EmbeddedBroker::start(&config.ingest.kafka.topic, 4)?;
    config.ingest.kafka.brokers = broker.brokers().to_string();
    if options.control == Some(Control::LengthReward) {
        config.rewards.train = vec![Scorer::Brevity];
        config.rewards.gate = vec![Scorer::Brevity];
    }
    let model = crate::daemon::load_model(&config).await?;
    let endpoint = Endpoint::start(&mut config, &model).await?;
    let config_file = root.join("config.toml");
    std::fs::write(&config_file, toml::to_string(&config)?)?;

    send_traffic(&config, options, &mut stages, progress).await?;
    let counters = Arc::new(ingest::Counters::default());
    let paths = Paths::new(&root);
    let tables = config.state.open_tables()?;
    let began = Instant::now();
    // Held until ingestion is over: a closed channel is a signal to stop.
    let (_go_on, stop) = watch::channel(false);
    ingest::run(&config.ingest, &tables, counters, stop, ingest::Mode::UntilIdle).await?;
    let rows = tables.open_one(Name::Queries).await?.count().await? as i64;
    let dead_letters = tables.open_one(Name::DeadLetters).await?.count().await? as i64;
    stages.push(stage("ingest", (rows + dead_letters) as u64, 0, began));

    let launch =
        round::child::Launch { config: Some(config_file.clone()), control: options.control, ..Default::default() };
    let status = round::child::run(&launch, &|_| ()).await?;
    let Some(verdict) = round::book::newest_verdict(&paths)? else {
        bail!("the round's process ended without a verdict ({status}); its messages stand above");
    };
    stages.extend(verdict.stages.iter().cloned());

    let workloads = config.workload.clone();
    let scorer_model = model.clone();
    let rewards_settings = config.rewards.clone();
    let rewards = Arc::new(
        tokio::task::spawn_blocking(move || Rewards::load(&rewards_settings, &workloads, &scorer_model)).await??,
    );
    let prompts = dataset::load(&paths.round(&verdict.round).join("dataset"))?;
    let audit = audit::Audit::new(&config, prompts.audit.prompts(), rewards);
    let began = Instant::now();
    let before = audit.ask(progress).await?;
    let proof = promote(&config, &verdict, &model).await?;
    let (workloads, examples) = match &proof {
        Some(_) => audit.compare(&before, &audit.ask(progress).await?).await?,
        None => (Vec::new(), Vec::new()),
    };
    stages.push(stage("audit and promotion", before.len() as u64, 0, began));

    let report = Report {
        seed: config.round.seed,
        control: options.control.map(|c| format!("{c:?}")),
        stages,
        rows,
        dead_letters,
        workloads,
        examples,
        evidence: evidence(&tables, &paths, &verdict).await?,
        reason: verdict.outcome.reason().to_string(),
        outcome: verdict.outcome.clone(),
        served: crate::registry::Registry::open(&paths.registry(), &config.registry)?.current()?.version,
        proof,
        training: training(&paths, &verdict, config.tuning.iterations)?,
        paths: report_paths(&paths, &tables, &verdict, &config_file),
        seconds: started.elapsed().as_secs_f64(),
    };
    endpoint.stop().await;
    Ok(report)
}

async fn send_traffic(
    config: &Config,
    options: &Options,
    stages: &mut Vec<StageReport>,
    progress: &Progress,
) -> Result<()> {
    let instructions = traffic::read_instructions(&options.prompts, MAX_INSTRUCTION)?;
    if instructions.len() < options.calls {
        bail!(
            "{} holds {} instructions; --calls {} is too many",
            options.prompts.display(),
            instructions.len(),
            options.calls
        );
    }
    let plan = traffic::plan(instructions, &config.workload, options.calls, config.round.seed);
    for replica in Vllm::replicas(&config.endpoint)? {
        replica.move_alias(&config.endpoint.stable_name, None, &config.endpoint.base_model).await?;
    }
    let began = Instant::now();
    let decoding = &config.decoding;
    let (url, name) = (&config.endpoint.urls[0], &config.endpoint.stable_name);
    let answered =
        traffic::send(url, name, &plan.calls, decoding.max_tokens, decoding.temperature, CONCURRENCY, progress).await?;
    traffic::produce(&config.ingest.kafka.brokers, &config.ingest.kafka.topic, &plan.raw).await?;
    stages.push(stage("traffic", answered as u64, 0, began));
    Ok(())
}

/// Promotes what the round found worth it, exactly as the daemon does, and returns the proof in words.
async fn promote(config: &Config, verdict: &Verdict, model: &Model) -> Result<Option<String>> {
    match &verdict.outcome {
        Outcome::Promote { .. } => Ok(Some(promotion::promote(config, verdict, None, model).await?.explain())),
        _ => Ok(None),
    }
}

async fn evidence(tables: &Tables, paths: &Paths, verdict: &Verdict) -> Result<report::Evidence> {
    let Some((trial, _)) = verdict.outcome.trial() else { return Ok(report::Evidence::default()) };
    let steps: Vec<StepRow> = round::book::read(tables, Name::GateSteps).await?;
    let mut steps: Vec<StepRow> =
        steps.into_iter().filter(|step| step.trial == trial && step.suite.is_none()).collect();
    steps.sort_by_key(|step| step.step);
    let summary: crate::gate::Verdict =
        crate::durable::read_json(&paths.round(&verdict.round).join("gate-verdict.json"))?;
    let n = steps.len().max(1) as f64;
    let mean = steps.iter().map(|s| s.d).sum::<f64>() / n;
    let variance = steps.iter().map(|s| (s.d - mean).powi(2)).sum::<f64>() / (n - 1.0).max(1.0);
    Ok(report::Evidence {
        ln_wealth: steps.iter().map(|s| s.ln_wealth).collect(),
        bar: summary.bar,
        prompts: steps.len(),
        mean_d: mean,
        sd_d: variance.sqrt(),
        guardrails: summary.findings,
    })
}

fn training(paths: &Paths, verdict: &Verdict, iterations: usize) -> Result<report::Training> {
    let mut sum = report::Training::default();
    for pass in 1..=iterations {
        let path = paths.round(&verdict.round).join(format!("pass-{pass}/adapter/outcome.json"));
        if path.exists() {
            let outcome: crate::adapter::Outcome = crate::durable::read_json(&path)?;
            sum.steps += outcome.steps.len();
            sum.kl = f64::from(outcome.kl_sample);
        }
    }
    Ok(sum)
}

fn report_paths(paths: &Paths, tables: &Tables, verdict: &Verdict, config: &Path) -> report::Paths {
    let adapter = verdict.outcome.trial().map(|(_, v)| paths.registry().join("adapters").join(v).display().to_string());
    report::Paths {
        tables: tables.root().to_string(),
        round: paths.round(&verdict.round).display().to_string(),
        adapter,
        config: config.display().to_string(),
    }
}

fn stage(name: &str, rows: u64, tokens: u64, began: Instant) -> StageReport {
    StageReport { stage: name.to_string(), rows, tokens, seconds: began.elapsed().as_secs_f64(), ended_us: 0 }
}
