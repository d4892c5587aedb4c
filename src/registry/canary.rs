//! A version that a part of the clients gets beside the served one, until it is stopped or what is served changes.

use serde::{Deserialize, Serialize};

use super::history::{self, Event, Happened};
use super::{Registry, RegistryError, absent_as, disk};
use crate::durable;

/// A version on trial with some clients.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Canary {
    pub version: String,
    /// Of the requests, 1 to 50.
    pub percent: u8,
    /// Since when, microseconds since the epoch.
    pub since_us: i64,
}

impl Registry {
    /// Returns the canary, where there is one.
    pub fn canary(&self) -> Result<Option<Canary>, RegistryError> {
        Ok(absent_as(durable::read_json(&self.canary_path()).map(Some), None)?)
    }

    /// Records that a version goes to some clients, on an operator's word. Safe to repeat.
    pub fn begin_canary(
        &self,
        version: &str,
        percent: u8,
        operator: &str,
        reason: &str,
        time_us: i64,
    ) -> Result<Canary, RegistryError> {
        let _lock = self.lock()?;
        if !(1..=50).contains(&percent) {
            return Err(RegistryError::Percent(percent));
        }
        if let Some(open) = self.intent()? {
            return Err(RegistryError::Underway(open.to().to_string()));
        }
        if self.current()?.version == version {
            return Err(RegistryError::AlreadyServed { version: version.to_string() });
        }
        if let Some(there) = self.canary()?.filter(|there| there.version != version) {
            return Err(RegistryError::OtherCanary(there.version));
        }
        let manifest = self.verify(version)?;
        self.fits_base(&manifest)?;
        if let Some(barred) = self.quarantine_of(&manifest)? {
            return Err(RegistryError::Quarantined { version: version.to_string(), reason: barred.reason });
        }
        let canary = Canary { version: version.to_string(), percent, since_us: time_us };
        disk::write_json(&self.canary_path(), &canary)?;
        let (version, operator, reason) = (version.to_string(), operator.to_string(), reason.to_string());
        let what = Happened::CanaryBegan { version, percent, operator, reason };
        history::append(&self.history_path(), &Event { time_us, what })?;
        Ok(canary)
    }

    /// Ends the canary, where there is one, and bars its version first where `bar` says so. Returns it.
    pub fn end_canary(&self, reason: &str, bar: bool, time_us: i64) -> Result<Option<Canary>, RegistryError> {
        let _lock = self.lock()?;
        if let Some(canary) = self.canary()?.filter(|_| bar) {
            self.write_quarantine(&canary.version, reason, time_us)?;
        }
        self.drop_canary(reason, time_us)
    }

    pub(super) fn drop_canary(&self, reason: &str, time_us: i64) -> Result<Option<Canary>, RegistryError> {
        let Some(canary) = self.canary()? else { return Ok(None) };
        let what = Happened::CanaryEnded { version: canary.version.clone(), reason: reason.to_string() };
        history::append(&self.history_path(), &Event { time_us, what })?;
        disk::remove(&self.canary_path())?;
        Ok(Some(canary))
    }

    fn canary_path(&self) -> std::path::PathBuf {
        self.root.join("canary.json")
    }
}
