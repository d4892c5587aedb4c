//! Adapters: what is served, what there is, and where each came from, down to the offsets of the log.

use std::collections::BTreeMap;
use std::fs::File;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use chrono::{DateTime, Utc};
use schemars::JsonSchema;
use serde::Serialize;

use super::{FactError, Facts, time};
use crate::registry::{self, BASE};

/// What is served.
#[derive(Debug, Clone, Serialize, JsonSchema)]
pub(in super::super) struct Current {
    /// The version that the stable name leads to; `base` is the model without an adapter.
    pub(in super::super) version: String,
    /// SHA-256 of its content; null for the base.
    pub(in super::super) sha256: Option<String>,
    /// The promotion that made it so.
    pub(in super::super) promotion: Option<String>,
    /// Since when; null where nothing was promoted yet.
    pub(in super::super) since: Option<DateTime<Utc>>,
    /// The name that clients ask for.
    pub(in super::super) stable_name: String,
    /// A change that is under way: the version it leads to.
    pub(in super::super) changing_to: Option<String>,
    /// Why nothing new is served for now.
    pub(in super::super) frozen: Option<Frozen>,
}

/// A freeze: nothing is trained, judged or promoted until somebody takes it back.
#[derive(Debug, Clone, Serialize, JsonSchema)]
pub(in super::super) struct Frozen {
    pub(in super::super) by: String,
    pub(in super::super) reason: String,
    pub(in super::super) since: DateTime<Utc>,
}

/// One registered adapter.
#[derive(Debug, Clone, Serialize, JsonSchema)]
pub(in super::super) struct Adapter {
    pub(in super::super) version: String,
    pub(in super::super) served: bool,
    /// Why it may never be served again, where that is so.
    pub(in super::super) quarantined: Option<String>,
    pub(in super::super) created: DateTime<Utc>,
    /// SHA-256 over its files.
    pub(in super::super) sha256: String,
    /// SHA-256 of each file.
    pub(in super::super) files: BTreeMap<String, String>,
    pub(in super::super) base: String,
    pub(in super::super) base_sha256: String,
    /// The round that trained it; null for an import.
    pub(in super::super) round: Option<String>,
    pub(in super::super) dataset_sha256: Option<String>,
    /// Version of each table that its dataset was frozen at.
    pub(in super::super) tables: BTreeMap<String, u64>,
    /// What of the log it may have learnt from.
    pub(in super::super) offsets: Vec<Range>,
    pub(in super::super) notes: BTreeMap<String, String>,
}

/// A range of the log, the end excluded.
#[derive(Debug, Clone, Serialize, JsonSchema)]
pub(in super::super) struct Range {
    pub(in super::super) topic: String,
    pub(in super::super) partition: i32,
    pub(in super::super) from: i64,
    pub(in super::super) to: i64,
}

/// A file of an adapter, open and found to be what was registered.
pub(in super::super) struct Content {
    pub(in super::super) file: File,
    pub(in super::super) bytes: u64,
    /// SHA-256 in hex.
    pub(in super::super) sha256: String,
    /// The same in base64.
    pub(in super::super) digest: String,
}

impl Facts {
    /// Returns the version that is served.
    pub(in super::super) fn served_version(&self) -> Result<String, FactError> {
        Ok(self.registry()?.current().map_err(FactError::failed)?.version)
    }

    /// Returns what is served.
    pub(in super::super) fn current(&self) -> Result<Current, FactError> {
        let registry = self.registry()?;
        let current = registry.current().map_err(FactError::failed)?;
        let intent = registry.intent().map_err(FactError::failed)?;
        Ok(Current {
            since: (current.since_us > 0).then(|| time(current.since_us)),
            version: current.version,
            sha256: current.sha256,
            promotion: current.promotion,
            stable_name: self.config_now().endpoint.stable_name.clone(),
            changing_to: intent.map(|intent| intent.to().to_string()),
            frozen: registry.frozen().map_err(FactError::failed)?.map(frozen),
        })
    }

    /// Returns all adapters, the newest first.
    pub(in super::super) fn adapters(&self) -> Result<Vec<Adapter>, FactError> {
        let mut all = self.registry()?.list().map_err(FactError::failed)?;
        all.reverse();
        Ok(all.into_iter().map(document).collect())
    }

    /// Returns one adapter.
    pub(in super::super) fn adapter(&self, version: &str) -> Result<Adapter, FactError> {
        let known = self.adapters()?.into_iter().find(|adapter| adapter.version == version);
        known.ok_or_else(|| match version {
            BASE => FactError::Missing("the base is the model without an adapter; it has no files here".into()),
            _ => FactError::Missing(format!("version {version:?} is not registered")),
        })
    }

    /// Opens a file that an adapter's manifest names, for a server on another host. The adapter is verified first, as before
    /// any load: hashes and, where keys are trusted, the signature.
    pub(in super::super) async fn adapter_file(&self, version: &str, name: &str) -> Result<Content, FactError> {
        // Both are looked up among what is known, so that neither is ever a path of the caller's making.
        let Adapter { version, quarantined, files, .. } = self.adapter(version)?;
        if let Some(reason) = quarantined {
            return Err(FactError::Missing(format!("version {version} is quarantined ({reason}): load another one")));
        }
        let Some((name, sha256)) = files.into_iter().find(|(file, _)| file == name) else {
            return Err(FactError::Missing(format!("version {version} has no file {name:?}")));
        };
        let digest = BASE64_STANDARD.encode(hex::decode(&sha256).map_err(FactError::failed)?);
        let _reading = self.reading().await?;
        let registry = self.registry()?;
        let open = move || {
            let path = registry.path(&version).join(&name);
            // Opened before it is hashed: what takes its place afterwards is not what is sent.
            let file =
                File::open(&path).map_err(|e| FactError::failed(format!("cannot read {}: {e}", path.display())))?;
            registry.verify(&version).map_err(FactError::failed)?;
            let bytes = file.metadata().map_err(FactError::failed)?.len();
            Ok(Content { file, bytes, sha256, digest })
        };
        tokio::task::spawn_blocking(open).await.map_err(FactError::failed)?
    }
}

fn frozen(freeze: registry::Freeze) -> Frozen {
    Frozen { by: freeze.by, reason: freeze.reason, since: time(freeze.since_us) }
}

fn document(listed: registry::Listed) -> Adapter {
    let registry::Manifest { sha256, files, lineage, .. } = listed.manifest;
    let range = |r: registry::OffsetRange| Range { topic: r.topic, partition: r.partition, from: r.from, to: r.to };
    Adapter {
        version: listed.version,
        served: listed.served,
        quarantined: listed.quarantined,
        created: time(lineage.created_us),
        sha256,
        files,
        base: lineage.base.name,
        base_sha256: lineage.base.sha256,
        round: lineage.round,
        dataset_sha256: lineage.dataset_sha256,
        tables: lineage.tables,
        offsets: lineage.offsets.into_iter().map(range).collect(),
        notes: lineage.notes,
    }
}
