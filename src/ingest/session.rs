//! One membership of the consumer group, from the tables' offsets to its end.
//!
//! A session joins the source's events and the clock: what comes first is turned into one call of the [`Ledger`]. It ends
//! whole, with its client and its ledger, and the next one starts from the tables.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{Instant, MissedTickBehavior, interval_at, sleep_until, timeout};

use super::counters::Counters;
use super::ledger::Ledger;
use super::reader::Reader;
use super::{IngestError, Mode, Settings};
use crate::query_log::kafka::{Connection, Consumer};
use crate::query_log::{Event, SourceError};
use crate::table::Tables;

/// How often numbers are counted anew where nothing happens.
const TICK: Duration = Duration::from_secs(5);
/// After how long without a trouble a quiet log counts as readable.
const CALM: Duration = Duration::from_secs(30);

/// Runs one membership of the consumer group, from the tables' offsets to its end.
pub(super) async fn run(
    settings: &Settings,
    tables: &Tables,
    reader: &Arc<Reader>,
    counters: &Arc<Counters>,
    shutdown: &mut watch::Receiver<bool>,
    mode: Mode,
) -> Result<(), IngestError> {
    let kafka = settings.kafka.clone();
    let connection = tokio::task::spawn_blocking(move || Connection::open(&kafka));
    let connection = connection.await.map_err(|e| IngestError::Task(e.to_string()))??;
    // Nothing is held yet: a stop does not wait for a store that does not answer.
    let begun = tokio::select! {
        biased;
        () = told_to_stop(shutdown) => None,
        ledger = begin(settings, tables, reader, &connection) => Some(ledger),
    };
    // Dropped, a connection waits for its client: never on an async thread.
    let join = move || begun.map(|ledger| Ok::<_, IngestError>((ledger?, connection.subscribe()?))).transpose();
    let joined = tokio::task::spawn_blocking(join).await.map_err(|e| IngestError::Task(e.to_string()))??;
    let Some((ledger, source)) = joined else { return Ok(()) };
    let mut session =
        Session { settings, counters: Arc::clone(counters), mode, source, ledger, opened: None, upkeep: None };
    let ended = session.run(shutdown).await;
    session.source.close().await;
    if let Some(upkeep) = session.upkeep {
        upkeep.await.map_err(|e| IngestError::Task(e.to_string()))?;
    }
    ended
}

/// Opens the tables and gives what was never read its first offsets.
async fn begin(
    settings: &Settings,
    tables: &Tables,
    reader: &Arc<Reader>,
    connection: &Connection,
) -> Result<Ledger, IngestError> {
    let mut ledger = Ledger::open(tables, &settings.kafka, Arc::clone(reader)).await?;
    ledger.first_sight(connection.topics()).await?;
    Ok(ledger)
}

/// One membership of the group: the source's events and the clock, turned into calls of the ledger.
struct Session<'a> {
    settings: &'a Settings,
    counters: Arc<Counters>,
    mode: Mode,
    source: Consumer,
    ledger: Ledger,
    /// When the first of the open epoch was read.
    opened: Option<Instant>,
    upkeep: Option<JoinHandle<()>>,
}

impl Session<'_> {
    /// Follows the source's events until the end of the mode.
    async fn run(&mut self, shutdown: &mut watch::Receiver<bool>) -> Result<(), IngestError> {
        let idle = Duration::from_secs(self.settings.idle_s);
        let stall = Duration::from_secs(self.settings.stall_s);
        let behind = Duration::from_secs(self.settings.commit_interval_s);
        let caught_up = Duration::from_secs(self.settings.end_interval_s).min(behind);
        let (mut assigned, mut heard) = (false, Instant::now());
        // Since when nothing was wrong: a quiet log says nothing when a trouble has passed, nor does a group whose partitions
        // all are others'.
        let mut calm = Instant::now();
        let mut tick = interval_at(calm + TICK, TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let at_end = assigned && self.ledger.at_end();
            if at_end && self.mode == Mode::UntilIdle && self.ledger.moved() {
                self.seal().await?;
                heard = Instant::now();
            }
            let seal_at = self.opened.map(|opened| opened + if at_end { caught_up } else { behind });
            let rest_at = match self.mode {
                Mode::Forever => None,
                Mode::UntilIdle if at_end => Some(heard + idle),
                Mode::UntilIdle => Some(heard + stall),
            };
            let event = tokio::select! {
                biased;
                () = told_to_stop(shutdown) => return self.seal().await,
                // Before the events: under a load that never rests there always is one.
                () = sleep_to(seal_at) => {
                    self.seal().await?;
                    self.report();
                    continue;
                }
                event = self.source.recv() => event,
                () = sleep_to(rest_at) => return if at_end { Ok(()) } else { Err(self.stalled()) },
                _ = tick.tick() => {
                    if calm.elapsed() >= CALM {
                        self.counters.ready.store(true, Ordering::Relaxed);
                    }
                    self.report();
                    continue;
                }
            };
            match event.ok_or_else(|| self.stalled())? {
                Event::Trouble(cause) => {
                    tracing::warn!(cause, "kafka is in trouble");
                    self.counters.ready.store(false, Ordering::Relaxed);
                    calm = Instant::now();
                }
                event => {
                    // Between a revocation and the next assignment an empty set of partitions is no end of the log.
                    match event {
                        Event::Assigned { .. } => assigned = true,
                        Event::Revoked { .. } => assigned = false,
                        _ => {}
                    }
                    heard = Instant::now();
                    self.take(event).await?;
                    self.counters.ready.store(true, Ordering::Relaxed);
                    self.report();
                }
            }
        }
    }

    async fn take(&mut self, event: Event) -> Result<(), IngestError> {
        match event {
            Event::Assigned { partitions, reply } => {
                let starts = self.ledger.assign(&partitions).await?;
                // A callback that no longer waits assigns nothing, and says so by an event of its own.
                reply.send(starts).ok();
            }
            Event::Records(records) => {
                self.ledger.read(records).await?;
                if self.ledger.held() >= self.settings.batch_bytes {
                    self.seal().await?;
                }
            }
            Event::End { partition, next } => self.ledger.end(&partition, next),
            Event::Revoked { partitions, reply } => {
                let deadline = Duration::from_secs(self.settings.kafka.rebalance_timeout_s);
                timeout(deadline, self.seal()).await.map_err(|_| IngestError::Lost)??;
                self.ledger.revoke(&partitions);
                reply.send(()).ok();
            }
            Event::Lost => return Err(IngestError::Lost),
            Event::Failed(error) => return Err(error.into()),
            Event::Trouble(_) => {}
        }
        if self.ledger.moved() {
            self.opened.get_or_insert_with(Instant::now);
        }
        Ok(())
    }

    /// Stores what was read. An error leaves nothing to go on with.
    async fn seal(&mut self) -> Result<(), IngestError> {
        self.opened = None;
        let begun = Instant::now();
        let sealed = self.ledger.seal().await.inspect_err(|error| self.counters.failed(error))?;
        let Some(sealed) = sealed else { return Ok(()) };
        self.counters.stored(&sealed, begun.elapsed());
        self.source.advise(&sealed.offsets);
        self.keep_up().await
    }

    /// Starts the upkeep that is due, beside ingestion; one at a time.
    async fn keep_up(&mut self) -> Result<(), IngestError> {
        let due = self.ledger.upkeep();
        if due.is_empty() {
            return Ok(());
        }
        if let Some(before) = self.upkeep.take() {
            before.await.map_err(|e| IngestError::Task(e.to_string()))?;
        }
        self.upkeep = Some(tokio::spawn(async move {
            for upkeep in due {
                if let Err(error) = upkeep.run().await {
                    tracing::warn!(%error, "upkeep failed; the next one starts over");
                }
            }
        }));
        Ok(())
    }

    /// Counts how far this member is.
    fn report(&self) {
        self.counters.buffered.store(self.ledger.records(), Ordering::Relaxed);
        self.counters.assigned.store(self.ledger.partitions() as i64, Ordering::Relaxed);
        let ends = self.source.ends();
        self.counters.lag.store(self.ledger.lag(&ends), Ordering::Relaxed);
        self.counters.behind_since_ms.store(self.ledger.behind_since(&ends).unwrap_or_default(), Ordering::Relaxed);
        self.counters.newest_ms.store(self.ledger.newest().unwrap_or_default(), Ordering::Relaxed);
    }

    fn stalled(&self) -> IngestError {
        let kafka = &self.settings.kafka;
        let cause = self.source.cause().unwrap_or_else(|| "nothing".to_owned());
        let (topic, brokers) = (kafka.topic.clone(), kafka.brokers.clone());
        SourceError::Stalled { topic, brokers, seconds: self.settings.stall_s, cause }.into()
    }
}

/// Waits until `shutdown` turns true, or nobody can turn it any more.
pub(super) async fn told_to_stop(shutdown: &mut watch::Receiver<bool>) {
    shutdown.wait_for(|stop| *stop).await.ok();
}

/// Sleeps until `when`, or for ever.
async fn sleep_to(when: Option<Instant>) {
    match when {
        Some(when) => sleep_until(when).await,
        None => std::future::pending().await,
    }
}
