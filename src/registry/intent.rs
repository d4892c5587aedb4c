//! A change of what is served, from the intent to the record.
//!
//! The intent is on disk before any endpoint is called, and goes only after the record is. So a restart finds either
//! nothing under way or the one promotion that was, and both ends of it, [`Registry::complete`] and
//! [`Registry::abort`], may be repeated.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::history::{self, Event, Happened};
use super::{BASE, Base, Current, Recovery, Registry, RegistryError, absent_as, disk};
use crate::crash::{self, Point};
use crate::durable;
use crate::gate::Passed;

/// A person's word that what the gate passed may be served.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Approval {
    pub by: String,
    pub reason: String,
}

/// Why what is served changes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Kind {
    /// The challenger passed its trial; where promotions wait for a person, with that person's approval.
    Gated {
        trial: String,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        approval: Option<Approval>,
    },
    /// An operator takes the responsibility.
    Override { operator: String, reason: String },
    /// Back to what was served before; what was served is quarantined.
    Rollback { reason: String },
    /// What was in production before taod came is the first incumbent.
    Import { operator: String, reason: String },
    /// The servers have another base model: it is served bare, and adapters of the former one are refused from now on.
    NewBase { operator: String, reason: String, base: Base },
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Stored {
    promotion: String,
    from: String,
    to: String,
    to_sha256: Option<String>,
    opened_us: i64,
    why: Kind,
}

/// A change under way. Only the registry makes one: from a passed trial, an operator's override, a rollback, or its file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Intent(Stored);

impl Intent {
    /// Returns the id of this change.
    pub fn promotion(&self) -> &str {
        &self.0.promotion
    }

    /// Returns the version served before.
    pub fn from(&self) -> &str {
        &self.0.from
    }

    /// Returns the version to be served.
    pub fn to(&self) -> &str {
        &self.0.to
    }

    /// Returns when it was opened, microseconds since the epoch.
    pub fn opened_us(&self) -> i64 {
        self.0.opened_us
    }

    /// Returns why.
    pub fn why(&self) -> &Kind {
        &self.0.why
    }
}

impl Registry {
    /// Opens the promotion of a challenger that passed its trial: the only gated way.
    pub fn promote(&self, passed: &Passed, approval: Option<Approval>, time_us: i64) -> Result<Intent, RegistryError> {
        let _lock = self.lock()?;
        if let Some(freeze) = self.frozen()? {
            return Err(RegistryError::Frozen { by: freeze.by, reason: freeze.reason });
        }
        let current = self.current()?.version;
        let trial = passed.trial().to_string();
        if current != passed.incumbent() {
            let incumbent = passed.incumbent().to_string();
            return Err(RegistryError::OtherIncumbent { trial, incumbent, current });
        }
        let version = passed.challenger().to_string();
        let registered = self.manifest(&version)?.sha256;
        if registered != passed.challenger_sha256() {
            let tried = passed.challenger_sha256().to_string();
            return Err(RegistryError::OtherWeights { trial, version, tried, registered });
        }
        self.begin(version, Kind::Gated { trial, approval }, time_us)
    }

    /// Opens a promotion that no trial allows, on an operator's word, which is recorded.
    pub fn override_promote(
        &self,
        version: &str,
        operator: &str,
        reason: &str,
        time_us: i64,
    ) -> Result<Intent, RegistryError> {
        let _lock = self.lock()?;
        let why = Kind::Override { operator: operator.to_string(), reason: reason.to_string() };
        self.begin(version.to_string(), why, time_us)
    }

    /// Opens the adoption of a version that clients get already, while taod has never changed what is served.
    pub fn import(&self, version: &str, operator: &str, reason: &str, time_us: i64) -> Result<Intent, RegistryError> {
        let _lock = self.lock()?;
        let current = self.current()?;
        if current.promotion.is_some() {
            return Err(RegistryError::InCharge { current: current.version });
        }
        let why = Kind::Import { operator: operator.to_string(), reason: reason.to_string() };
        self.begin(version.to_string(), why, time_us)
    }

    /// Opens the change to another base model.
    pub fn new_base(&self, base: Base, operator: &str, reason: &str, time_us: i64) -> Result<Intent, RegistryError> {
        let _lock = self.lock()?;
        if self.base()?.is_some_and(|known| known.sha256 == base.sha256) {
            return Err(RegistryError::SameBase(base.name));
        }
        let why = Kind::NewBase { operator: operator.to_string(), reason: reason.to_string(), base };
        self.begin(BASE.to_string(), why, time_us)
    }

    /// Opens the return to what was served before, leaving out what is quarantined by now.
    pub fn rollback(&self, reason: &str, time_us: i64) -> Result<Intent, RegistryError> {
        let _lock = self.lock()?;
        let current = self.current()?.version;
        for version in history::served_before(&self.history()?).into_iter().rev() {
            if version != current && self.is_usable(&version)? {
                return self.begin(version, Kind::Rollback { reason: reason.to_string() }, time_us);
            }
        }
        Err(RegistryError::NothingBefore(current))
    }

    fn is_usable(&self, version: &str) -> Result<bool, RegistryError> {
        match self.manifest(version) {
            _ if version == BASE => Ok(true),
            Err(RegistryError::Unknown(_)) => Ok(false),
            manifest => {
                let manifest = manifest?;
                Ok(self.fits_base(&manifest).is_ok() && self.quarantine_of(&manifest)?.is_none())
            }
        }
    }

    /// Writes the intent, after all that could forbid the change is checked.
    fn begin(&self, to: String, why: Kind, opened_us: i64) -> Result<Intent, RegistryError> {
        if let Some(other) = self.intent()? {
            return Err(RegistryError::Underway(other.to().to_string()));
        }
        let from = self.current()?.version;
        if from == to && !matches!(why, Kind::NewBase { .. }) {
            return Err(RegistryError::AlreadyServed { version: to });
        }
        let to_sha256 = match to.as_str() {
            BASE => None,
            version => {
                let manifest = self.verify(version)?;
                self.fits_base(&manifest)?;
                if let Some(barred) = self.quarantine_of(&manifest)? {
                    return Err(RegistryError::Quarantined { version: to, reason: barred.reason });
                }
                Some(manifest.sha256)
            }
        };
        let count = self.history()?.iter().filter(|event| event.what.promotion().is_some()).count();
        let stored = Stored { promotion: format!("p{:04}-{to}", count + 1), from, to, to_sha256, opened_us, why };
        disk::write_json(&self.intent_path(), &stored)?;
        Ok(Intent(stored))
    }

    /// Returns the promotion under way, if there is one.
    pub fn intent(&self) -> Result<Option<Intent>, RegistryError> {
        Ok(absent_as(durable::read_json(&self.intent_path()).map(|stored| Some(Intent(stored))), None)?)
    }

    /// Moves `current`, records it and closes the intent, in one go.
    pub fn complete(&self, intent: &Intent, time_us: i64) -> Result<(), RegistryError> {
        self.serve(intent, time_us)?;
        self.close(intent)
    }

    /// Moves `current` and records it in the history: called once every replica proved the new version and the alias
    /// moved. The intent stays open until [`Registry::close`], for what is left to do elsewhere.
    pub fn serve(&self, intent: &Intent, time_us: i64) -> Result<(), RegistryError> {
        let _lock = self.lock()?;
        if !self.is_underway(intent)? {
            return Ok(());
        }
        let Stored { promotion, from, to, to_sha256, why, .. } = intent.0.clone();
        if let Kind::Rollback { reason } = &why
            && from != BASE
        {
            self.write_quarantine(&from, reason, time_us)?;
        }
        if let Kind::NewBase { base, .. } = &why {
            disk::write_json(&self.base_path(), base)?;
        }
        if self.current()?.promotion.as_ref() != Some(&promotion) {
            let (version, promotion) = (to.clone(), Some(promotion.clone()));
            let current = Current { version, sha256: to_sha256, promotion, since_us: time_us };
            disk::write_json(&self.root.join("current.json"), &current)?;
            crash::point(Point::DuringPromotion);
        }
        self.note_end(
            match why {
                Kind::Gated { trial, .. } => Happened::Promoted { promotion, from, to, trial },
                Kind::Override { operator, reason } => Happened::Overridden { promotion, from, to, operator, reason },
                Kind::Rollback { reason } => Happened::RolledBack { promotion, from, to, reason },
                Kind::Import { operator, reason } => Happened::Imported { promotion, to, operator, reason },
                Kind::NewBase { operator, reason, base } => {
                    Happened::Rebased { promotion, from, base: base.name, sha256: base.sha256, operator, reason }
                }
            },
            time_us,
        )
    }

    /// Closes an intent whose end is in the history. A canary of another time ends with it.
    pub fn close(&self, intent: &Intent) -> Result<(), RegistryError> {
        let _lock = self.lock()?;
        if !self.is_underway(intent)? {
            return Ok(());
        }
        self.drop_canary(&format!("{} is served", intent.to()), intent.opened_us())?;
        if !self.history()?.iter().any(|event| event.what.promotion() == Some(intent.promotion())) {
            return Err(RegistryError::NotUnderway(intent.to().to_string()));
        }
        Ok(disk::remove(&self.intent_path())?)
    }

    /// Gives a promotion up before `current` moved, and records why.
    pub fn abort(&self, intent: &Intent, reason: &str, time_us: i64) -> Result<(), RegistryError> {
        let _lock = self.lock()?;
        if !self.is_underway(intent)? {
            return Ok(());
        }
        if self.has_moved(intent)? {
            return Err(RegistryError::AlreadyServed { version: intent.to().to_string() });
        }
        let (promotion, to) = (intent.0.promotion.clone(), intent.0.to.clone());
        self.note_end(Happened::Aborted { promotion, to, reason: reason.to_string() }, time_us)?;
        Ok(disk::remove(&self.intent_path())?)
    }

    /// Tells whether the intent still stands; false where it is ended already, an error where another one stands.
    fn is_underway(&self, intent: &Intent) -> Result<bool, RegistryError> {
        match self.intent()? {
            Some(open) if open == *intent => Ok(true),
            None if self.history()?.iter().any(|e| e.what.promotion() == Some(intent.promotion())) => Ok(false),
            _ => Err(RegistryError::NotUnderway(intent.to().to_string())),
        }
    }

    /// Records the end of a promotion once.
    fn note_end(&self, what: Happened, time_us: i64) -> Result<(), RegistryError> {
        let recorded = self.history()?.iter().any(|event| event.what.promotion() == what.promotion());
        if !recorded {
            history::append(&self.history_path(), &Event { time_us, what })?;
        }
        Ok(())
    }

    /// Returns true where `current` is by now what the intent goes to.
    pub fn has_moved(&self, intent: &Intent) -> Result<bool, RegistryError> {
        Ok(self.current()?.promotion.as_deref() == Some(intent.promotion()))
    }

    /// Tells what a restart has to do.
    pub fn recover(&self) -> Result<Recovery, RegistryError> {
        Ok(match self.intent()? {
            None => Recovery::Clean,
            Some(intent) if self.has_moved(&intent)? => Recovery::Moved(intent),
            Some(intent) => Recovery::Underway(intent),
        })
    }

    fn intent_path(&self) -> PathBuf {
        self.root.join("intent.json")
    }
}
