//! A new config for a running daemon (SIGHUP): what can change is taken, what cannot is refused by its key and stays as it was.
//!
//! Sections that decide what a night does are read anew by every night, so they can change between two of them. Sections that
//! this process is built on, its state, its log, its page, its endpoint, hold until it ends. The processes that the daemon
//! starts read the config in force from a file in the state folder, never the operator's file: that may have been edited
//! meanwhile.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result};
use serde_json::Value;
use tokio::sync::{mpsc, watch as channel};

use super::Daemon;
use crate::config::{Config, ConfigError};
use crate::durable;

/// Sections that hold until the daemon ends.
pub const FIXED: [&str; 7] = ["state", "model", "ingest", "endpoint", "serve", "admin", "notifications"];

/// Name of the file in the state folder that holds the config in force.
const IN_FORCE: &str = "config.toml";

/// Reads the operator's config again.
pub type Reread = Box<dyn Fn() -> Result<Config, ConfigError> + Send + Sync>;

/// What a reload does.
#[derive(Debug, Clone, PartialEq)]
pub struct Reloaded {
    pub config: Config,
    /// Keys whose new values are in force.
    pub taken: Vec<String>,
    /// Keys whose new values are not.
    pub refused: Vec<String>,
}

/// Puts the parts of `new` that can change into `now`.
pub fn merge(now: &Config, new: &Config) -> Reloaded {
    let mut changed = Vec::new();
    let value = |config: &Config| serde_json::to_value(config).unwrap_or_default();
    differences("", &value(now), &value(new), &mut changed);
    let is_fixed = |key: &String| FIXED.contains(&key.split('.').next().unwrap_or_default());
    let (refused, taken) = changed.into_iter().partition(is_fixed);
    let held = now.clone();
    let config = Config {
        state: held.state,
        model: held.model,
        ingest: held.ingest,
        endpoint: held.endpoint,
        serve: held.serve,
        admin: held.admin,
        notifications: held.notifications,
        ..new.clone()
    };
    Reloaded { config, taken, refused }
}

/// Collects the keys below `key` whose values differ; a list is one value.
fn differences(key: &str, now: &Value, new: &Value, found: &mut Vec<String>) {
    match (now, new) {
        (Value::Object(now), Value::Object(new)) => {
            let names = now.keys().chain(new.keys().filter(|name| !now.contains_key(*name)));
            for name in names {
                let inner = if key.is_empty() { name.clone() } else { format!("{key}.{name}") };
                let of = |map: &serde_json::Map<String, Value>| map.get(name).cloned().unwrap_or_default();
                differences(&inner, &of(now), &of(new), found);
            }
        }
        (now, new) if now != new => found.push(key.to_owned()),
        _ => {}
    }
}

/// Writes the config in force for the processes that the daemon starts, and returns where.
pub(super) fn write(config: &Config) -> Result<PathBuf> {
    durable::create_folder(&config.state.dir)?;
    // A child runs in the daemon's own folder, but a relative path in a file is better not relied on.
    let path = std::path::absolute(config.state.dir.join(IN_FORCE))?;
    let text = toml::to_string(config).context("the config in force cannot be written as TOML")?;
    durable::write(
        &path,
        format!("# The config in force, written by taod run; changes here do nothing.\n{text}").as_bytes(),
    )?;
    Ok(path)
}

/// Reads the config again whenever it is asked to, until `stop`.
pub(super) async fn keep(
    daemon: Arc<Daemon>,
    mut asked: mpsc::Receiver<()>,
    reread: Reread,
    mut stop: channel::Receiver<bool>,
) {
    loop {
        tokio::select! {
            Some(()) = asked.recv() => {}
            _ = stop.wait_for(|stop| *stop) => return,
        }
        match reread() {
            Ok(new) => daemon.take(&new),
            Err(error) => {
                tracing::error!(error = error.to_string(), "the config was not reloaded; the former one holds")
            }
        }
    }
}

impl Daemon {
    fn take(&self, new: &Config) {
        let Reloaded { config, taken, refused } = merge(&self.config(), new);
        for key in &refused {
            tracing::warn!(key, "cannot change while the daemon runs: restart it for the new value");
        }
        if let Err(error) = write(&config) {
            tracing::error!(error = format!("{error:#}"), "the config was not reloaded; the former one holds");
            return;
        }
        let config = Arc::new(config);
        self.facts.reconfigure(config.clone());
        self.set(config);
        self.reloaded.notify_waiters();
        tracing::info!(taken = taken.join(", "), refused = refused.len(), "the config was reloaded");
    }
}

/// Returns the file that processes of a daemon with this state folder read.
pub fn in_force(state: &Path) -> PathBuf {
    state.join(IN_FORCE)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Loaded;

    fn config(text: &str) -> Config {
        Loaded::from_layers(Some(("taod.toml".into(), text.into())), Vec::new()).unwrap().config
    }

    #[test]
    fn what_can_change_is_taken_and_the_rest_is_named_and_stays() {
        let now = config("[schedule]\ncron = '0 2 * * *'\n[model]\npath = 'a'\n[endpoint.proof]\nmargin = 6.0");
        let new = config(
            "[schedule]\ncron = '0 3 * * *'\n[tuning]\nrank = 8\n[model]\npath = 'b'\n[ingest.kafka]\ntopic = 'other'\n\
             [[workload]]\nname = 'w'",
        );
        let Reloaded { config, mut taken, mut refused } = merge(&now, &new);
        taken.sort();
        refused.sort();
        assert_eq!(taken, ["schedule.cron", "tuning.rank", "workload"]);
        assert_eq!(refused, ["endpoint.proof.margin", "ingest.kafka.topic", "model.path"]);
        assert_eq!((config.schedule.cron.as_str(), config.tuning.rank, config.workload.len()), ("0 3 * * *", 8, 1));
        assert_eq!((&config.model, &config.ingest, &config.endpoint), (&now.model, &now.ingest, &now.endpoint));
        assert_eq!(merge(&now, &now), Reloaded { config: now.clone(), taken: vec![], refused: vec![] });
    }

    #[test]
    fn every_section_either_holds_or_can_change() {
        let value = serde_json::to_value(Config::default()).unwrap();
        assert!(FIXED.iter().all(|section| value.get(section).is_some()), "a section was renamed");
    }

    #[test]
    fn the_file_of_the_config_in_force_says_the_same_config() {
        let folder = tempfile::tempdir().unwrap();
        for path in ["config/default.toml", "config/production.toml", "config/demo.toml"] {
            let text = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).unwrap();
            let mut config = config(&text);
            config.state.dir = folder.path().to_path_buf();
            let written = write(&config).unwrap();
            assert_eq!(written, in_force(folder.path()));
            let text = std::fs::read_to_string(written).unwrap();
            let read = Loaded::from_layers(Some(("in force".into(), text)), Vec::new()).unwrap().config;
            assert_eq!((read.hash(), &read), (config.hash(), &config), "{path}");
        }
    }
}
