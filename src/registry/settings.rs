//! What an operator sets about what may become served.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::manifest::is_prefix;
use crate::signature::PublicKey;

/// Who decides that a version which passed the gate is served.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Promotion {
    /// The gate alone.
    #[default]
    Automatic,
    /// A person, after the gate: `taod gate approve` or `taod gate reject`. Until then the trial stays open and no prompt is
    /// spent.
    Approval,
    /// Nobody: the log is stored, and nothing is trained, judged or promoted.
    Frozen,
}

/// An alarm of a round that can freeze promotions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Alarm {
    /// The prompts are of another population than before (`dataset.population`).
    Population,
    /// A scorer scores its anchors otherwise than before (`rewards.anchors`).
    Anchors,
}

/// Settings of the registry, `[registry]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// Who decides that a version which passed the gate is served: `automatic` (the gate alone), `approval` (a person, by
    /// `taod gate approve`) or `frozen` (nobody: the log is stored, and nothing is trained, judged or promoted).
    pub promotion: Promotion,
    /// Alarms that freeze promotions: `population` (the prompts are others than before) and `anchors` (a scorer scores otherwise
    /// than before). The round that finds one ends, and nothing is trained, judged or promoted until `taod gate thaw`. Empty:
    /// alarms are told and stop nothing.
    pub freeze_on: Vec<Alarm>,
    /// What the names of new versions begin with, before a hyphen and the hash of their content: lower-case letters, digits
    /// and hyphens, 1 to 32. Daemons whose adapters meet at the same servers need one each.
    pub name_prefix: String,
    /// File with the Ed25519 key (PKCS#8, PEM) by which new versions are signed, for its owner alone; empty: they are not
    /// signed. `taod adapters keygen` makes one.
    pub signing_key_file: PathBuf,
    /// Public keys (base64 of 32 bytes) of which one must have signed a version before it is loaded, judged, proven or
    /// served. Empty: signatures are not asked for.
    pub trusted_keys: Vec<String>,
}

impl Default for Settings {
    fn default() -> Self {
        Settings {
            promotion: Promotion::default(),
            freeze_on: Vec::new(),
            name_prefix: "taod".into(),
            signing_key_file: PathBuf::new(),
            trusted_keys: Vec::new(),
        }
    }
}

impl Settings {
    /// Checks the names and keys.
    pub fn validate(&self) -> Result<(), String> {
        if !is_prefix(&self.name_prefix) {
            return Err(format!(
                "name_prefix = {:?}: give 1 to 32 lower-case letters, digits and hyphens, a letter first",
                self.name_prefix
            ));
        }
        PublicKey::parse_all(&self.trusted_keys).map(drop).map_err(|error| format!("trusted_keys: {error}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_keys_that_cannot_be_are_refused() {
        let base = Settings::default();
        assert_eq!(base.validate(), Ok(()));
        for prefix in ["", "Support", "a/b", "-a", &"a".repeat(33)] {
            let refused = Settings { name_prefix: prefix.into(), ..base.clone() }.validate();
            assert!(refused.unwrap_err().starts_with("name_prefix = "), "{prefix}");
        }
        for key in ["", "11qYAYKxCrfVS", "AAAA"] {
            let refused = Settings { trusted_keys: vec![key.into()], ..base.clone() }.validate();
            assert!(refused.unwrap_err().starts_with("trusted_keys: "), "{key}");
        }
    }
}
