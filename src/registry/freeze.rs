//! A freeze: an operator's or an audit's word that nothing is promoted until somebody takes it back.
//!
//! It is a file beside `current.json`, so that it holds for the daemon and for every command at once, without a change of
//! the config.

use serde::{Deserialize, Serialize};

use super::{Event, Happened, Registry, RegistryError, disk, history};
use crate::durable;

/// Why nothing is promoted, as `frozen.json` holds it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Freeze {
    pub reason: String,
    pub by: String,
    pub since_us: i64,
}

impl Registry {
    /// Returns the freeze that holds, if one does.
    pub fn frozen(&self) -> Result<Option<Freeze>, RegistryError> {
        match durable::read_json(&self.frozen_path()) {
            Ok(freeze) => Ok(Some(freeze)),
            Err(error) if error.is_not_found() => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Freezes promotions. A freeze that holds already keeps its reason.
    pub fn freeze(&self, reason: &str, by: &str, time_us: i64) -> Result<(), RegistryError> {
        let _lock = self.lock()?;
        if self.frozen()?.is_some() {
            return Ok(());
        }
        let freeze = Freeze { reason: reason.to_string(), by: by.to_string(), since_us: time_us };
        disk::write_json(&self.frozen_path(), &freeze)?;
        let what = Happened::Frozen { reason: reason.to_string(), by: by.to_string() };
        Ok(history::append(&self.history_path(), &Event { time_us, what })?)
    }

    /// Ends the freeze, if one holds.
    pub fn thaw(&self, reason: &str, by: &str, time_us: i64) -> Result<(), RegistryError> {
        let _lock = self.lock()?;
        if self.frozen()?.is_none() {
            return Ok(());
        }
        let what = Happened::Thawed { reason: reason.to_string(), by: by.to_string() };
        history::append(&self.history_path(), &Event { time_us, what })?;
        Ok(disk::remove(&self.frozen_path())?)
    }

    fn frozen_path(&self) -> std::path::PathBuf {
        self.root.join("frozen.json")
    }
}
