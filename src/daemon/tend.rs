//! Looking after the endpoint while the daemon runs: an interrupted change is settled, and what a restarted server lost
//! is put back, however long that takes.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use chrono::Utc;
use tokio::sync::watch as channel;

use super::promotion::{self, Tended};
use super::{Daemon, lease};
use crate::endpoint::fleet::Strangers;
use crate::endpoint::promote::{Outcome, Trouble};
use crate::metrics::Part;

/// How often the endpoint is looked after.
const EVERY: Duration = Duration::from_secs(60);

/// Looks after the endpoint at once and then without end, while this process owns the lease.
pub(super) async fn keep(daemon: Arc<Daemon>, mut owner: lease::Owner, mut stop: channel::Receiver<bool>) {
    let mut owed = false;
    loop {
        tokio::select! {
            () = owner.gained() => {}
            _ = stop.wait_for(|stop| *stop) => return,
        }
        let config = daemon.config();
        tokio::select! {
            tended = promotion::tend(&config, &mut owed, Strangers::Keep) => daemon.tended(tended),
            // A change that is cut off here is settled by the next start, as after a crash.
            _ = stop.wait_for(|stop| *stop) => return,
        }
        tokio::select! {
            () = tokio::time::sleep(EVERY) => {}
            _ = stop.wait_for(|stop| *stop) => return,
        }
    }
}

impl Daemon {
    /// Tells what looking after the endpoint came to.
    fn tended(&self, result: Result<Option<Tended>>) {
        let m = &self.metrics.endpoint;
        match result {
            Ok(None) => {}
            Ok(Some(tended)) => {
                self.health.ready("promotion");
                if let Some((to, Outcome::Done { .. })) = &tended.settled {
                    m.current.set(to);
                }
                for url in &tended.reconciled.changed {
                    tracing::warn!(url, "the served version was missing and was put back");
                }
                for (url, version) in &tended.reconciled.retired {
                    tracing::info!(url, version, "a version that clients no longer get was unloaded");
                }
                if tended.proofs.is_some() {
                    m.proof.set(1);
                    m.proof_time.set(Utc::now().timestamp() as f64);
                }
                let failed: Vec<String> = tended.reconciled.failed.iter().map(ToString::to_string).collect();
                m.errors.inc_by(failed.len() as u64);
                match failed.is_empty() {
                    true => self.health.ready("endpoint"),
                    false => self.health.not_ready("endpoint", failed.join("; ")),
                }
            }
            Err(error) => {
                m.errors.inc();
                if matches!(error.downcast_ref(), Some(Trouble::NotProven { .. })) {
                    m.proof.set(0);
                }
                self.metrics.daemon.errors.get(Part::Promotion).inc();
                self.health.not_ready("promotion", format!("{error:#}"));
                tracing::error!(error = format!("{error:#}"), "the endpoint could not be looked after; tried again");
            }
        }
    }
}
