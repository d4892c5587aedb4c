//! Which of several daemons of one endpoint owns rounds, promotion and maintenance: the one with the lease.
//!
//! The others ingest, say so once, and try again; when the owner dies they follow after a term of silence.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch as channel;

use super::Daemon;
use crate::metrics::Part;
use crate::table::lease::{Grant, Lease};
use crate::table::{Name, TableError, Tables};

/// How long an owner that died keeps the others out.
const TERM: Duration = Duration::from_secs(120);
/// How often the owner renews and the others look.
const EVERY: Duration = Duration::from_secs(30);
/// How often a grant is looked at, which ends by the clock as well.
const LOOK_EVERY: Duration = Duration::from_secs(1);
const APP_ID: &str = "taod/lease";

/// Whether this process is the owner now.
#[derive(Clone)]
pub(super) struct Owner(channel::Receiver<Option<Grant>>);

impl Owner {
    /// Returns true while this process may act as the owner.
    pub(super) fn holds(&self) -> bool {
        self.0.borrow().is_some_and(|grant| grant.holds())
    }

    /// Waits until this process is the owner.
    pub(super) async fn gained(&mut self) {
        while !self.holds() {
            if self.0.changed().await.is_err() {
                return std::future::pending().await;
            }
        }
    }

    /// Waits until this process is no longer the owner.
    pub(super) async fn lost(&mut self) {
        while self.holds() {
            // Looks by itself as well: a grant ends by the clock, whether or not its keeper still runs.
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }
}

/// Returns a view of the lease and the channel to [`keep`] it by.
pub(super) fn channel_of() -> (channel::Sender<Option<Grant>>, Owner) {
    let (sender, receiver) = channel::channel(None);
    (sender, Owner(receiver))
}

/// Contends for the lease until `stop`, then gives it up.
pub(super) async fn keep(
    daemon: Arc<Daemon>,
    tables: Tables,
    grants: channel::Sender<Option<Grant>>,
    mut stop: channel::Receiver<bool>,
) {
    let mut lease = None;
    let mut said = None;
    loop {
        let grant = match renew(&tables, &mut lease).await {
            Ok(grant) => {
                if said.replace(grant.is_some()) != Some(grant.is_some()) {
                    say(grant.is_some());
                }
                grant
            }
            Err(error) => {
                daemon.metrics.daemon.errors.get(Part::Lease).inc();
                tracing::warn!(%error, "the lease could not be read or renewed");
                lease.as_ref().and_then(Lease::grant)
            }
        };
        daemon.metrics.daemon.lease.set(i64::from(grant.is_some()));
        grants.send_replace(grant);
        tokio::select! {
            () = tokio::time::sleep(EVERY) => {}
            () = ended(grant) => {}
            _ = stop.wait_for(|stop| *stop) => break,
        }
    }
    // Whoever acted under the grant hears of its end before the next one may begin.
    grants.send_replace(None);
    if let Some(lease) = lease
        && let Err(error) = lease.release().await
    {
        tracing::debug!(%error, "the lease was not given up; the next owner waits for its end");
    }
}

/// Waits until a grant has ended, as it does where the clock jumps, and whoever acted under it has seen that; for ever where
/// there is none.
async fn ended(grant: Option<Grant>) {
    let Some(grant) = grant else { return std::future::pending().await };
    while grant.holds() {
        tokio::time::sleep(LOOK_EVERY).await;
    }
    tokio::time::sleep(3 * LOOK_EVERY).await;
}

fn say(is_owner: bool) {
    match is_owner {
        true => tracing::info!("this daemon owns rounds, promotion and maintenance"),
        false => tracing::warn!("another daemon owns rounds, promotion and maintenance; this one only ingests"),
    }
}

async fn renew(tables: &Tables, lease: &mut Option<Lease>) -> Result<Option<Grant>, TableError> {
    match lease {
        Some(lease) => lease.keep().await,
        None => {
            let table = tables.open_one(Name::Rounds).await?;
            lease.insert(Lease::new(table, APP_ID, TERM)).keep().await
        }
    }
}
