//! What an operator sets about what may become served.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

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

/// Settings of the registry, `[registry]`.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// Who decides that a version which passed the gate is served: `automatic` (the gate alone), `approval` (a person, by
    /// `taod gate approve`) or `frozen` (nobody: the log is stored, and nothing is trained, judged or promoted).
    pub promotion: Promotion,
}

impl Settings {
    /// Every value is as good as another.
    pub fn validate(&self) -> Result<(), String> {
        Ok(())
    }
}
