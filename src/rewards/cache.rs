//! Scores that cost a forward pass, kept on disk by the hash of what was scored.
//!
//! One append-only file per scorer and identity, so that another model, rubric or version never meets an old score. A
//! scoring that was killed goes on where it was: what was paid for is found again. Records hold hashes and numbers, never
//! text, and each carries a checksum: a record that a crash tore is one score to compute again. When a file is full, its
//! older half is dropped; of scorers that are not used any more the files go, oldest first.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use super::Item;
use crate::durable::{self, FileError};

/// Bytes of a record: the key, the score, the checksum.
const RECORD: usize = 32 + 8 + 8;
/// Files kept, whichever scorers they are of.
const MAX_FILES: usize = 16;

type Key = [u8; 32];

/// The scores of one scorer.
pub(super) struct ScoreCache {
    path: PathBuf,
    scores: HashMap<Key, f64>,
    /// Keys in the order of the file.
    order: Vec<Key>,
    file: File,
    most: usize,
}

impl ScoreCache {
    /// Opens the file of a scorer of this name and identity in `folder`, for at most `most` scores (48 bytes each).
    pub(super) fn open(folder: &Path, name: &str, identity: &str, most: usize) -> Result<Self, FileError> {
        durable::create_folder(folder)?;
        let hash = blake3::hash(identity.as_bytes()).to_hex();
        let path = folder.join(format!("{name}-{}.scores", &hash[..16]));
        let bytes = match std::fs::read(&path) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Vec::new(),
            Err(e) => return Err(FileError::io("cannot read", &path, e)),
        };
        let (mut scores, mut order) = (HashMap::new(), Vec::new());
        for record in bytes.chunks_exact(RECORD) {
            if let Some((key, score)) = read(record)
                && scores.insert(key, score).is_none()
            {
                order.push(key);
            }
        }
        forget_others(folder, &path)?;
        // A torn end is cut off, or all that follows would be out of step.
        if bytes.len() % RECORD != 0 {
            durable::write(&path, &bytes[..bytes.len() - bytes.len() % RECORD])?;
        }
        let file = append_to(&path)?;
        Ok(ScoreCache { path, scores, order, file, most: most.max(2) })
    }

    /// Returns the score of an answer that was scored before.
    pub(super) fn get(&self, key: &Key) -> Option<f64> {
        self.scores.get(key).copied()
    }

    /// Keeps scores, in the file before this returns.
    pub(super) fn add(&mut self, new: &[(Key, f64)]) -> Result<(), FileError> {
        let mut bytes = Vec::with_capacity(new.len() * RECORD);
        for (key, score) in new {
            if self.scores.insert(*key, *score).is_none() {
                self.order.push(*key);
                bytes.extend(record(key, *score));
            }
        }
        if self.order.len() > self.most {
            return self.shrink();
        }
        self.file.write_all(&bytes).map_err(|e| FileError::io("cannot write", &self.path, e))
    }

    /// Drops the older half.
    fn shrink(&mut self) -> Result<(), FileError> {
        let dropped = self.order.len() - self.most / 2;
        for key in self.order.drain(..dropped) {
            self.scores.remove(&key);
        }
        let kept = self.order.iter().filter_map(|key| Some(record(key, *self.scores.get(key)?)));
        durable::write(&self.path, &kept.flatten().collect::<Vec<u8>>())?;
        self.file = append_to(&self.path)?;
        Ok(())
    }
}

/// Returns the hash of all that a scorer sees of an answer.
pub(super) fn key(item: &Item) -> Key {
    let seen = serde_json::json!([item.workload, item.messages, item.response, item.finish_reason]);
    *blake3::hash(seen.to_string().as_bytes()).as_bytes()
}

fn append_to(path: &Path) -> Result<File, FileError> {
    OpenOptions::new().create(true).append(true).open(path).map_err(|e| FileError::io("cannot write", path, e))
}

fn record(key: &Key, score: f64) -> [u8; RECORD] {
    let mut bytes = [0; RECORD];
    bytes[..32].copy_from_slice(key);
    bytes[32..40].copy_from_slice(&score.to_le_bytes());
    let sum = blake3::hash(&bytes[..40]);
    bytes[40..].copy_from_slice(&sum.as_bytes()[..8]);
    bytes
}

fn read(bytes: &[u8]) -> Option<(Key, f64)> {
    let key: Key = bytes.get(..32)?.try_into().ok()?;
    let score = f64::from_le_bytes(bytes.get(32..40)?.try_into().ok()?);
    (record(&key, score) == bytes).then_some((key, score))
}

/// Removes the files that were not written to for the longest time, beyond those that are kept.
fn forget_others(folder: &Path, own: &Path) -> Result<(), FileError> {
    let entries = std::fs::read_dir(folder).map_err(|e| FileError::io("cannot list", folder, e))?;
    let is_scores = |path: &PathBuf| path.extension().is_some_and(|e| e == "scores") && path != own;
    let aged = |path: PathBuf| Some((std::fs::metadata(&path).ok()?.modified().ok()?, path));
    let mut others: Vec<_> = entries.flatten().map(|entry| entry.path()).filter(is_scores).filter_map(aged).collect();
    others.sort();
    let surplus = (others.len() + 1).saturating_sub(MAX_FILES);
    for (_, path) in others.into_iter().take(surplus) {
        std::fs::remove_file(&path).map_err(|e| FileError::io("cannot remove", &path, e))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(folder: &Path, identity: &str, most: usize) -> ScoreCache {
        ScoreCache::open(folder, "judge", identity, most).unwrap()
    }

    fn keys(n: u8) -> Vec<(Key, f64)> {
        (0..n).map(|i| ([i; 32], f64::from(i) / 7.0)).collect()
    }

    #[test]
    fn scores_are_found_again_under_the_same_identity_only() {
        let folder = tempfile::tempdir().unwrap();
        open(folder.path(), "a", 100).add(&keys(5)).unwrap();
        let again = open(folder.path(), "a", 100);
        assert!(keys(5).iter().all(|(key, score)| again.get(key) == Some(*score)));
        assert_eq!(again.get(&[9; 32]), None);
        assert_eq!(open(folder.path(), "b", 100).get(&[1; 32]), None);
    }

    #[test]
    fn a_torn_or_altered_record_is_one_score_less() {
        let folder = tempfile::tempdir().unwrap();
        open(folder.path(), "a", 100).add(&keys(4)).unwrap();
        let path = std::fs::read_dir(folder.path()).unwrap().next().unwrap().unwrap().path();
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[RECORD + 33] ^= 1;
        bytes.truncate(4 * RECORD - 10);
        std::fs::write(&path, bytes).unwrap();
        let mut again = open(folder.path(), "a", 100);
        let found: Vec<bool> = keys(4).iter().map(|(key, _)| again.get(key).is_some()).collect();
        assert_eq!(found, [true, false, true, false]);
        again.add(&keys(4)).unwrap();
        assert!(keys(4).iter().all(|(key, score)| open(folder.path(), "a", 100).get(key) == Some(*score)));
    }

    #[test]
    fn files_stay_within_their_bounds() {
        let folder = tempfile::tempdir().unwrap();
        let mut cache = open(folder.path(), "a", 10);
        keys(40).chunks(3).for_each(|new| cache.add(new).unwrap());
        let size = std::fs::metadata(&cache.path).unwrap().len() as usize;
        assert!((5 * RECORD..=10 * RECORD).contains(&size), "{size}");
        assert!(cache.get(&[39; 32]).is_some() && cache.get(&[0; 32]).is_none());
        (0..40).for_each(|i| drop(open(folder.path(), &i.to_string(), 10)));
        assert!(std::fs::read_dir(folder.path()).unwrap().count() <= MAX_FILES);
    }

    #[test]
    fn a_key_follows_everything_that_is_seen() {
        let item = Item {
            workload: None,
            messages: vec![crate::record::Message::text("user", "q")],
            response: "a".into(),
            finish_reason: crate::record::FinishReason::Stop,
            prompt_ids: None,
            token_ids: None,
            ratings: Vec::new(),
        };
        let others = [
            Item { workload: Some("w".into()), ..item.clone() },
            Item { response: "b".into(), ..item.clone() },
            Item { messages: vec![], ..item.clone() },
            Item { finish_reason: crate::record::FinishReason::Length, ..item.clone() },
        ];
        assert!(others.iter().all(|other| key(other) != key(&item)));
        assert_eq!(key(&Item { token_ids: Some(vec![1]), ..item.clone() }), key(&item));
    }
}
