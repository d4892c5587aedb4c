//! The list of what was erased, so that reading the log again does not bring it back.
//!
//! The list holds hashes only: of end users (keyed, as in `queries`), of request ids, and of the coordinates of single
//! records that have neither. Whoever adds to it then moves the position [`ERASURES`] of the tables that ingestion writes,
//! and ingestion holds that position ([`super::Table::hold`]): a row that was checked against an older list cannot land.

use std::collections::HashSet;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::{Name, TableError, Tables};

/// The position that every erasure moves by one.
pub const ERASURES: &str = "taod/erasures";

/// What one entry of the list hides.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Kind {
    User,
    Request,
    Record,
}

/// One entry of the list.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key {
    kind: Kind,
    hash: String,
}

impl Key {
    /// Hides an end user, given as the keyed hash that `queries` holds.
    pub fn user(user_hash: &str) -> Key {
        Key { kind: Kind::User, hash: user_hash.to_owned() }
    }

    /// Hides a request.
    pub fn request(request_id: &str) -> Key {
        Key { kind: Kind::Request, hash: hex::encode(Sha256::digest(request_id.as_bytes())) }
    }

    /// Hides one part of one Kafka record.
    pub fn record(topic: &str, partition: i32, offset: i64, index: i32) -> Key {
        let place = format!("{topic}\n{partition}\n{offset}\n{index}");
        Key { kind: Kind::Record, hash: hex::encode(Sha256::digest(place.as_bytes())) }
    }
}

#[derive(Debug, Serialize, Deserialize)]
struct Row {
    kind: Kind,
    key_hash: String,
    time: DateTime<Utc>,
    receipt: String,
}

/// The list at one moment.
#[derive(Debug, Default)]
pub struct Suppressions {
    keys: HashSet<Key>,
}

impl Suppressions {
    /// Reads the list. Where nothing was ever erased there is no table and nothing is made.
    pub async fn load(tables: &Tables) -> Result<Self, TableError> {
        if !tables.exists(Name::Suppressions).await? {
            return Ok(Suppressions::default());
        }
        let rows: Vec<Row> = tables.open_one(Name::Suppressions).await?.rows(None).await?;
        let keys = rows.into_iter().map(|row| Key { kind: row.kind, hash: row.key_hash }).collect();
        Ok(Suppressions { keys })
    }

    /// Adds those of `keys` that are not on the list and returns how many they were.
    pub async fn add(tables: &Tables, keys: impl Iterator<Item = Key>, receipt: &str) -> Result<usize, TableError> {
        let known = Suppressions::load(tables).await?;
        let new: HashSet<Key> = keys.filter(|key| !known.keys.contains(key)).collect();
        let row = |key: Key| Row { kind: key.kind, key_hash: key.hash, time: Utc::now(), receipt: receipt.to_owned() };
        let rows: Vec<Row> = new.into_iter().map(row).collect();
        if !rows.is_empty() {
            tables.open_one(Name::Suppressions).await?.append_rows(&rows, &[]).await?;
        }
        Ok(rows.len())
    }

    /// Returns true where nothing was ever erased.
    pub fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }

    /// Returns true where the list hides this.
    pub fn hides(&self, key: &Key) -> bool {
        self.keys.contains(key)
    }

    /// Returns true where the list hides the user (given as the keyed hash) or the request.
    pub fn hides_call(&self, user_hash: Option<&str>, request_id: Option<&str>) -> bool {
        !self.is_empty()
            && (user_hash.is_some_and(|user| self.hides(&Key::user(user)))
                || request_id.is_some_and(|id| self.hides(&Key::request(id))))
    }
}
