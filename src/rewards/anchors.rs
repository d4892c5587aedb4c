//! Anchors: a fixed set of answers that every scorer scores anew each night, so that a scorer that changed is seen.
//!
//! A scorer's identity says what it is meant to be: hashes of weights where they lie here, a `version` where a server or a
//! program has them. Behind such a version anything may change: another model, another template, a server that rounds otherwise.
//! Then the same answer gets another score, and a gain measured across that night means nothing.
//!
//! The first scores under an identity are its reference. The statistic is the root mean square of tonight's differences from it in
//! units of the reference's standard deviation, `sqrt(mean (s - r)^2) / sd(r)`: 0.1 says that what came in is a hundredth of the
//! variance by which the scorer tells the anchors apart. It sees a shift, a stretch and a change of order alike.

use std::path::{Path, PathBuf};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Item, RewardError, Rewards, lines};
use crate::durable::{self, FileError};

/// Anchors below which a standard deviation says nothing.
const MIN_ANCHORS: usize = 10;

/// Settings of the anchors, `[rewards.anchors]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// File of answers that every scorer scores anew each night: JSON lines {"workload", "messages", "response",
    /// "finish_reason"?}, at least 10, good ones and bad ones. Empty = none.
    pub file: String,
    /// How far a scorer's scores may move from the first ones under the same identity, in standard deviations over the anchors
    /// (root mean square), above 0. Further is an alarm.
    pub shift: f64,
}

impl Default for Settings {
    fn default() -> Self {
        Settings { file: String::new(), shift: 0.1 }
    }
}

impl Settings {
    /// Checks ranges; the message names the key, the value and the remedy.
    pub fn validate(&self) -> Result<(), String> {
        match self.shift > 0.0 && self.shift.is_finite() {
            true => Ok(()),
            false => Err(format!("shift = {}: give a number above 0, such as 0.1", self.shift)),
        }
    }
}

/// Anchors that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum AnchorError {
    #[error("rewards.anchors.file {path}, line {line}: {reason}")]
    Line { path: String, line: usize, reason: String },
    #[error("rewards.anchors.file {path} holds {found} answers: give at least {MIN_ANCHORS}")]
    Few { path: String, found: usize },
    #[error(
        "rewards.anchors.file {path}, line {line}: workload {workload:?} has no rules; add [[workload]] with this name"
    )]
    NoRules { path: String, line: usize, workload: String },
    #[error(transparent)]
    File(#[from] FileError),
    #[error(transparent)]
    Rewards(#[from] RewardError),
}

/// How one score stands on the anchors.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Standing {
    pub score: String,
    /// Version and identity of the scorer, as in the reward manifest.
    pub stamp: String,
    /// True where tonight's scores are the reference from now on.
    pub is_first: bool,
    /// In standard deviations of the reference.
    pub shift: f64,
    /// The mean difference from the reference, in the score's own unit.
    pub mean_change: f64,
    pub alarm: bool,
}

/// The first scores under an identity.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Reference {
    score: String,
    stamp: String,
    anchors_sha256: String,
    scores: Vec<f64>,
}

/// Scores the anchors anew and compares with the references in the folder; a score without one gets it. Nothing where no file is
/// configured.
pub fn watch(rewards: &Rewards, settings: &Settings, folder: &Path) -> Result<Vec<Standing>, AnchorError> {
    if settings.file.is_empty() {
        return Ok(Vec::new());
    }
    let path = Path::new(&settings.file);
    let items = read(path, rewards)?;
    let anchors_sha256 = durable::sha256_file(path)?;
    durable::create_folder(folder)?;
    let stamps = rewards.stamps();
    let mut standings = Vec::new();
    for (score, scores) in rewards.graded_anew(&items)? {
        let scorer = score.split('/').next().unwrap_or(&score);
        let stamp = stamps.get(scorer).cloned().unwrap_or_default();
        let tonight = Reference { score, stamp, anchors_sha256: anchors_sha256.clone(), scores };
        let place = tonight.place(folder);
        let known: Option<Reference> = match durable::read_json(&place) {
            Err(error) if error.is_not_found() => None,
            read => Some(read?),
        };
        if known.is_none() {
            durable::write_json(&place, &tonight)?;
        }
        standings.push(compare(known.as_ref(), tonight, settings.shift));
    }
    Ok(standings)
}

impl Reference {
    fn place(&self, folder: &Path) -> PathBuf {
        let key = format!("{}\0{}\0{}", self.score, self.stamp, self.anchors_sha256);
        folder.join(format!("{}.json", &blake3::hash(key.as_bytes()).to_hex()[..32]))
    }
}

fn compare(known: Option<&Reference>, tonight: Reference, most: f64) -> Standing {
    let reference = known.map_or(&tonight.scores, |known| &known.scores);
    let n = reference.len().max(1) as f64;
    let mean = reference.iter().sum::<f64>() / n;
    let variance = reference.iter().map(|r| (r - mean).powi(2)).sum::<f64>() / n;
    let differences: Vec<f64> = tonight.scores.iter().zip(reference).map(|(s, r)| s - r).collect();
    let square = differences.iter().map(|d| d * d).sum::<f64>() / n;
    // A scorer that finds all anchors alike has no scale of its own: any change of it is then a large one.
    let shift = if square == 0.0 { 0.0 } else { (square / variance.max(1e-12)).sqrt() };
    Standing {
        is_first: known.is_none(),
        shift,
        mean_change: differences.iter().sum::<f64>() / n,
        alarm: shift > most,
        score: tonight.score,
        stamp: tonight.stamp,
    }
}

fn read(path: &Path, rewards: &Rewards) -> Result<Vec<Item>, AnchorError> {
    let shown = path.display().to_string();
    let text = std::fs::read_to_string(path).map_err(|e| FileError::io("cannot read", path, e))?;
    let mut items: Vec<Item> = Vec::new();
    for (line, text) in text.lines().enumerate().filter(|(_, text)| !text.trim().is_empty()) {
        let fail = |reason: String| AnchorError::Line { path: shown.clone(), line, reason };
        let item: Item = serde_json::from_str::<lines::Line>(text).map_err(|e| fail(e.to_string()))?.into();
        if !rewards.covers(item.workload.as_deref()) {
            let workload = item.workload.unwrap_or_default();
            return Err(AnchorError::NoRules { path: shown, line, workload });
        }
        items.push(item);
    }
    match items.len() {
        found if found < MIN_ANCHORS => Err(AnchorError::Few { path: shown, found }),
        _ => Ok(items),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reference(scores: &[f64]) -> Reference {
        Reference { score: "a".into(), stamp: "1/x".into(), anchors_sha256: "f".into(), scores: scores.to_vec() }
    }

    #[test]
    fn the_shift_is_in_standard_deviations_and_sees_order_too() {
        let first = compare(None, reference(&[0.0, 1.0]), 0.1);
        assert!(first.is_first && first.shift == 0.0 && !first.alarm);
        // sd 0.5; all up by 0.04: 0.08 sd. Exchanged: differences of 1, 2 sd, and a mean of nothing.
        let known = reference(&[0.0, 1.0]);
        let up = compare(Some(&known), reference(&[0.04, 1.04]), 0.1);
        assert!((up.shift - 0.08).abs() < 1e-12 && (up.mean_change - 0.04).abs() < 1e-12 && !up.alarm, "{up:?}");
        let exchanged = compare(Some(&known), reference(&[1.0, 0.0]), 0.1);
        assert!((exchanged.shift - 2.0).abs() < 1e-12 && exchanged.mean_change == 0.0 && exchanged.alarm);
        assert!(compare(Some(&reference(&[0.5, 0.5])), reference(&[0.5, 0.51]), 0.1).alarm);
    }

    /// Writes anchors, and a program that gives each of them the number in its file plus its place.
    fn world(folder: &Path) -> Rewards {
        let line = |k: usize| {
            format!(r#"{{"workload":"w","messages":[{{"role":"user","content":"q{k}"}}],"response":"a{k}"}}"#)
        };
        let lines: Vec<String> = (0..12).map(line).collect();
        std::fs::write(folder.join("anchors.jsonl"), lines.join("\n")).unwrap();
        let settings = format!(
            "train = ['rules', 'p']\ngate = ['rules']\n[[scorers]]\nname = 'p'\nkind = 'command'\nversion = '1'\nscale = 'logit'\n\
             command = ['/bin/sh', '-c', 'i=$(cat {}); while read -r line; do i=$((i+1)); echo \"{{\\\"score\\\": $i}}\"; done']",
            folder.join("start").display()
        );
        let workloads = [toml::from_str("name = 'w'\nrules = [{ kind = 'ended' }]").unwrap()];
        let settings: super::super::Settings = toml::from_str(&settings).unwrap();
        Rewards::open(&settings, &workloads, None, Some(&folder.join("scores"))).unwrap()
    }

    #[test]
    fn a_scorer_that_changed_behind_its_version_is_seen_though_its_scores_are_kept() {
        let folder = tempfile::tempdir().unwrap();
        let at = |start: &str| std::fs::write(folder.path().join("start"), start).unwrap();
        at("0");
        let rewards = world(folder.path());
        let settings =
            Settings { file: folder.path().join("anchors.jsonl").display().to_string(), ..Settings::default() };
        let watch = || watch(&rewards, &settings, &folder.path().join("anchors")).unwrap();
        let first = watch();
        assert!(first.len() == 1 && first[0].is_first && first[0].score == "p", "{first:?}");
        let same = watch();
        assert!(!same[0].is_first && same[0].shift == 0.0 && !same[0].alarm, "{same:?}");
        at("2");
        let moved = watch();
        // 1 to 12: standard deviation sqrt(143 / 12).
        assert!((moved[0].shift - 2.0 / (143.0f64 / 12.0).sqrt()).abs() < 1e-9 && moved[0].alarm, "{moved:?}");
    }

    #[test]
    fn anchors_that_cannot_be_used_are_named() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("start"), "0").unwrap();
        let rewards = world(folder.path());
        let path = folder.path().join("bad.jsonl");
        let refusal = |text: &str| {
            std::fs::write(&path, text).unwrap();
            read(&path, &rewards).unwrap_err().to_string()
        };
        assert!(refusal("").contains("holds 0 answers"));
        assert!(refusal("{}").contains("line 0"));
        let other = r#"{"workload":"x","messages":[],"response":"a"}"#;
        assert!(refusal(other).contains("workload \"x\" has no rules"));
    }
}
