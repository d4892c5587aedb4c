//! `taod simulate`: the whole loop on a small world in which one knows what is true.
//!
//! Real traffic never says whether a promotion was right. Here effects are planted in what users ask and in what is rewarded (an
//! improvement, a regression, a reward hack, a poisoned group of users, a drift of the traffic, leaked secrets), a tiny
//! model is made from a seed, and four nights pass through the production code: an embedded broker, ingestion, the round's
//! child process with its dataset, sampling, training and gate, and the promotion over HTTP. No difference of scores is made up
//! anywhere. What is checked afterwards is read from the tables and folders that the loop left.

mod model;
mod nights;
mod report;
mod traffic;
mod verify;
mod words;

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rdkafka::ClientConfig;
use rdkafka::producer::{BaseProducer, BaseRecord, Producer};
use tokio::sync::watch;

pub use report::{Report, Row};

use crate::config::Config;
use crate::daemon;
use crate::demo::Endpoint;
use crate::endpoint::vllm::Vllm;
use crate::ingest;
use crate::progress::Progress;
use crate::query_log::embedded::EmbeddedBroker;
use crate::round::child::Launch;
use nights::Night;
use traffic::Traffic;
use verify::Life;

/// Partitions of the embedded topic.
const PARTITIONS: i32 = 2;
/// Longest wait for the embedded broker to take a night's records.
const FLUSH: Duration = Duration::from_secs(30);

/// What a simulation is asked for.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    pub seed: u64,
    /// Honest calls a night.
    pub calls: usize,
}

/// Runs the nights in `root`, which must be empty or absent, and returns what came of each planted effect.
pub async fn run(root: &Path, options: Options, progress: &Progress) -> Result<Report> {
    let started = Instant::now();
    let is_empty = std::fs::read_dir(root).map_or(true, |mut entries| entries.next().is_none());
    ensure!(is_empty, "{} is not empty: remove it, or choose another --dir", root.display());
    std::fs::create_dir_all(root).with_context(|| format!("cannot create {}", root.display()))?;
    let root = root.canonicalize()?;
    let folder = root.join("model");
    model::write(&folder, options.seed)?;
    let mut base = nights::base(&root, &folder, options.seed);
    crate::durable::write(&base.ingest.user_key_file, b"a key of the simulation's users")?;
    let broker = EmbeddedBroker::start(&base.ingest.kafka.topic, PARTITIONS)?;
    base.ingest.kafka.brokers = broker.brokers().to_owned();
    let loaded = daemon::load_model(&base).await?;
    let endpoint = Endpoint::start(&mut base, &loaded).await?;
    for replica in Vllm::replicas(&base.endpoint)? {
        replica.move_alias(&base.endpoint.stable_name, None, &base.endpoint.base_model).await?;
    }
    let mut life = Life::default();
    let mut step = progress.step("simulate nights", Night::ALL.len() as u64, "nights");
    for (at, night) in Night::ALL.into_iter().enumerate() {
        let traffic = traffic::night(at + 1, options.calls, night.topic(), at == 0, options.seed);
        let config = night.config(&base);
        let passed = pass(&config, &traffic, at + 1).await.with_context(|| format!("night {} ({night:?})", at + 1))?;
        life.passed(night, passed, traffic);
        step.advance(1, "");
    }
    drop(step);
    endpoint.stop().await;
    let rows = life.verify(&base).await?;
    Ok(Report { seed: options.seed, rows, seconds: started.elapsed().as_secs_f64() })
}

/// One night: its traffic into the tables, and the round as the scheduler runs it.
async fn pass(config: &Config, traffic: &Traffic, number: usize) -> Result<daemon::Night> {
    produce(config, traffic)?;
    let counters = Arc::new(ingest::Counters::default());
    let tables = config.state.open_tables()?;
    // Held until ingestion is over: a closed channel is a signal to stop.
    let (_go_on, stop) = watch::channel(false);
    ingest::run(&config.ingest, &tables, counters, stop, ingest::Mode::UntilIdle).await?;
    let file = config.state.dir.join(format!("night-{number}.toml"));
    std::fs::write(&file, toml::to_string(config)?)?;
    daemon::night(config, &Launch { config: Some(file), ..Launch::default() }, &|_| ()).await
}

fn produce(config: &Config, traffic: &Traffic) -> Result<()> {
    let kafka = &config.ingest.kafka;
    let producer: BaseProducer = ClientConfig::new().set("bootstrap.servers", &kafka.brokers).create()?;
    for (at, record) in traffic.records.iter().enumerate() {
        let payload = record.to_string();
        let record =
            BaseRecord::<(), [u8]>::to(&kafka.topic).partition(at as i32 % PARTITIONS).payload(payload.as_bytes());
        producer.send(record).map_err(|(error, _)| error)?;
    }
    producer.flush(FLUSH)?;
    if producer.in_flight_count() > 0 {
        bail!("the embedded broker did not take all records within {} s", FLUSH.as_secs());
    }
    Ok(())
}
