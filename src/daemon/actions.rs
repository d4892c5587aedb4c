//! Carries out what operators ask for on the page, one after the other, by the same functions as the schedule and the command
//! line; nothing here decides.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use anyhow::{Result, bail, ensure};
use chrono::Utc;
use tokio::sync::{mpsc, watch as channel};

use super::{Daemon, lease, load_model, promotion};
use crate::admin::actions::{Action, Actions, Record};
use crate::registry::{Approval, Promotion, Registry};
use crate::round::{Outcome, Paths, book};

/// Carries actions out until `stop` turns true; one under way is finished first.
pub(super) async fn keep(
    daemon: Arc<Daemon>,
    actions: Arc<Actions>,
    mut todo: mpsc::Receiver<Record>,
    owner: lease::Owner,
    mut stop: channel::Receiver<bool>,
) {
    loop {
        let record = tokio::select! {
            Some(record) = todo.recv() => record,
            _ = stop.wait_for(|stop| *stop) => return,
        };
        let outcome = carry_out(&daemon, &owner, &record).await.map_err(|error| format!("{error:#}"));
        match &outcome {
            Ok(words) => tracing::info!(id = record.id, by = record.by, words, "an action is done"),
            Err(error) => tracing::warn!(id = record.id, by = record.by, error, "an action failed"),
        }
        if let Err(error) = actions.end(record, outcome) {
            tracing::error!(%error, "the end of an action could not be recorded");
        }
    }
}

async fn carry_out(daemon: &Daemon, owner: &lease::Owner, record: &Record) -> Result<String> {
    ensure!(owner.holds(), "another daemon owns rounds and promotion now; ask that one");
    let registry = Registry::open(&Paths::new(&daemon.config().state.dir).registry(), &daemon.config().registry)?;
    match &record.action {
        Action::Promote { version } => promote(daemon, &registry, version, record).await,
        Action::Rollback { from } => {
            let reason = format!("{} ({})", record.reason, record.by);
            let config = daemon.config();
            let model = load_model(&config).await?;
            let promoted = promotion::rollback(&config, from.as_deref(), &reason, &model).await?;
            Ok(served(daemon, &promoted))
        }
        Action::Freeze => {
            registry.freeze(&record.reason, &record.by, Utc::now().timestamp_micros())?;
            Ok("nothing is trained, judged or promoted until the freeze is lifted".into())
        }
        Action::Thaw => {
            registry.thaw(&record.reason, &record.by, Utc::now().timestamp_micros())?;
            Ok("what passes its trial is promoted again".into())
        }
        Action::Run => {
            if daemon.in_round.load(Ordering::Acquire) {
                bail!("a round is running already");
            }
            daemon.run_now.notify_one();
            Ok("a round begins".into())
        }
    }
}

/// Promotes by the verdict that is waiting, where there is one for this version; else on the operator's word.
async fn promote(daemon: &Daemon, registry: &Registry, version: &str, record: &Record) -> Result<String> {
    registry.verify(version)?;
    let paths = Paths::new(&daemon.config().state.dir);
    let waiting = book::newest_verdict(&paths)?
        .filter(|verdict| matches!(&verdict.outcome, Outcome::Promote { challenger, .. } if challenger == version));
    let model = load_model(&daemon.config()).await?;
    let promoted = match waiting {
        Some(verdict) => {
            let mode = daemon.config().registry.promotion;
            ensure!(mode != Promotion::Frozen, "registry.promotion is \"frozen\": set it to \"approval\" first");
            let approval = Approval { by: record.by.clone(), reason: record.reason.clone() };
            promotion::promote(&daemon.config(), &verdict, Some(approval), &model).await?
        }
        None => promotion::override_promote(&daemon.config(), version, &record.by, &record.reason, &model).await?,
    };
    Ok(served(daemon, &promoted))
}

fn served(daemon: &Daemon, promoted: &promotion::Promoted) -> String {
    daemon.show(promoted);
    promoted.explain()
}
