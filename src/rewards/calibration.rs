//! Frozen maps of raw graded scores: what one is worth among the incumbent's answers, or as a chance of a good answer.
//!
//! Scorers have their own scales (a cosine rarely passes 0.8); a mean over raw scores would let the widest scale win. A
//! map turns a score into the share of the incumbent's answers that score lower. It is estimated once, on answers to
//! training prompts, stored with its hash, and never moves while it is in use: another map is another reward. A score
//! without a map stays as it is, which is right for scores made to be read as shares already.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::length::LengthBias;
use super::platt::Platt;
use crate::durable::{self, FileError};

/// Knots that a fitted map keeps: one per percentile and both ends.
const KNOTS: usize = 101;

/// A calibration that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CalibrationError {
    #[error(transparent)]
    File(#[from] FileError),
    #[error("calibration of {score}: {reason}; fit it again")]
    Map { score: String, reason: String },
    #[error("calibration {path} has hash {found} but says {stated}; it was edited: restore it or fit it again")]
    Hash { path: String, found: String, stated: String },
}

/// Maps of scores by name; a score not named is taken as it is.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Calibration {
    maps: BTreeMap<String, Map>,
    /// What length earns, of the scores of which it was measured; their maps were fitted on scores without it.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    lengths: BTreeMap<String, LengthBias>,
}

/// Calibration as stored: the maps and the hash over them.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Stored {
    hash: String,
    maps: BTreeMap<String, Map>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    lengths: BTreeMap<String, LengthBias>,
}

/// What turns a raw score into a share.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
enum Map {
    Quantile(QuantileMap),
    Platt(Platt),
}

impl Map {
    fn apply(&self, raw: f64) -> f64 {
        match self {
            Map::Quantile(map) => map.apply(raw),
            Map::Platt(platt) => platt.apply(raw),
        }
    }

    fn check(&self) -> Result<(), String> {
        match self {
            Map::Quantile(map) => map.check(),
            Map::Platt(platt) => platt.check(),
        }
    }
}

impl Calibration {
    /// Fits one map per score on the raw scores of the incumbent's answers.
    pub fn fit(scores: &BTreeMap<String, Vec<f64>>) -> Result<Self, CalibrationError> {
        let fit = |(name, raw): (&String, &Vec<f64>)| {
            let map = QuantileMap::fit(raw);
            let map = map.map(|map| (name.clone(), Map::Quantile(map)));
            map.map_err(|reason| CalibrationError::Map { score: name.clone(), reason })
        };
        Ok(Calibration { maps: scores.iter().map(fit).collect::<Result<_, _>>()?, ..Self::default() })
    }

    /// Fits one logistic curve per score on the raw scores of labelled answers.
    pub fn fit_platt(scores: &BTreeMap<String, Vec<(f64, bool)>>) -> Result<Self, CalibrationError> {
        let fit = |(name, labelled): (&String, &Vec<(f64, bool)>)| {
            let platt = Platt::fit(labelled).map(|platt| (name.clone(), Map::Platt(platt)));
            platt.map_err(|reason| CalibrationError::Map { score: name.clone(), reason })
        };
        Ok(Calibration { maps: scores.iter().map(fit).collect::<Result<_, _>>()?, ..Self::default() })
    }

    /// Returns the calibration of scores from which these length biases were taken out before.
    pub fn with_lengths(self, lengths: BTreeMap<String, LengthBias>) -> Self {
        Calibration { lengths, ..self }
    }

    /// Yields the names of the scores whose length bias was measured.
    pub fn with_length(&self) -> impl Iterator<Item = &str> {
        self.lengths.keys().map(String::as_str)
    }

    /// Returns what length earns in the score of this name; nothing where it was not measured.
    pub fn length(&self, name: &str) -> Option<&LengthBias> {
        self.lengths.get(name)
    }

    /// Returns how far a curve's chances were off on answers that it had not seen; nothing for a quantile map.
    pub fn expected_error(&self, name: &str) -> Option<f64> {
        match self.maps.get(name) {
            Some(Map::Platt(platt)) => Some(platt.expected_calibration_error),
            _ => None,
        }
    }

    /// Returns what the raw score of this name is worth, in [0, 1]; nothing where there is no map of it.
    pub fn get(&self, name: &str, raw: f64) -> Option<f64> {
        self.maps.get(name).map(|map| map.apply(raw))
    }

    /// Returns the hash over all maps.
    pub fn hash(&self) -> String {
        // A calibration without length biases keeps the hash that it had before there were any.
        let bytes = match self.lengths.is_empty() {
            true => serde_json::to_vec(&self.maps),
            false => serde_json::to_vec(&(&self.maps, &self.lengths)),
        };
        let bytes = bytes.unwrap_or_default();
        blake3::hash(&bytes).to_hex().to_string()
    }

    /// Writes the maps with their hash.
    pub fn save(&self, path: &Path) -> Result<(), CalibrationError> {
        Ok(durable::write_json(
            path,
            &Stored { hash: self.hash(), maps: self.maps.clone(), lengths: self.lengths.clone() },
        )?)
    }

    /// Reads maps and refuses them where they are not those that were written.
    pub fn load(path: &Path) -> Result<Self, CalibrationError> {
        let stored: Stored = durable::read_json(path)?;
        let calibration = Calibration { maps: stored.maps, lengths: stored.lengths };
        for (name, bias) in &calibration.lengths {
            bias.check().map_err(|reason| CalibrationError::Map { score: name.clone(), reason })?;
        }
        for (name, map) in &calibration.maps {
            map.check().map_err(|reason| CalibrationError::Map { score: name.clone(), reason })?;
        }
        let found = calibration.hash();
        if found != stored.hash {
            return Err(CalibrationError::Hash { path: path.display().to_string(), found, stated: stored.hash });
        }
        Ok(calibration)
    }
}

/// An empirical distribution function, kept at evenly spaced quantiles and linear between them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct QuantileMap(Vec<f64>);

impl QuantileMap {
    /// Fits the map, or says why the scores do not make one.
    pub fn fit(raw: &[f64]) -> Result<Self, String> {
        if raw.len() < 2 {
            return Err(format!("{} scores are too few for a map", raw.len()));
        }
        if let Some(bad) = raw.iter().find(|score| !score.is_finite()) {
            return Err(format!("{bad} is no score"));
        }
        let mut sorted = raw.to_vec();
        sorted.sort_by(f64::total_cmp);
        let quantile = |knot: usize| {
            let place = knot as f64 / (KNOTS - 1) as f64 * (sorted.len() - 1) as f64;
            let below = place.floor() as usize;
            let above = (below + 1).min(sorted.len() - 1);
            sorted[below] + (place - below as f64) * (sorted[above] - sorted[below])
        };
        Ok(QuantileMap((0..KNOTS).map(quantile).collect()))
    }

    /// Returns the share of the fitted scores below `raw`, ties counted half.
    pub fn apply(&self, raw: f64) -> f64 {
        (self.rank(raw, |knot| knot < raw) + self.rank(raw, |knot| knot <= raw)) / 2.0
    }

    /// Returns the place of `raw`, in [0, 1], among the knots that stand `before` it.
    fn rank(&self, raw: f64, before: impl Fn(f64) -> bool) -> f64 {
        let last = self.0.len() - 1;
        let above = self.0.partition_point(|&knot| before(knot));
        if above == 0 || above > last {
            return above.min(last) as f64 / last as f64;
        }
        let (low, high) = (self.0[above - 1], self.0[above]);
        let between = if high > low { ((raw - low) / (high - low)).clamp(0.0, 1.0) } else { 0.0 };
        ((above - 1) as f64 + between) / last as f64
    }

    fn check(&self) -> Result<(), String> {
        let ordered = self.0.len() >= 2 && self.0.iter().all(|k| k.is_finite()) && self.0.is_sorted();
        if ordered { Ok(()) } else { Err("its quantiles are not at least two rising numbers".into()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_map_returns_the_share_below() {
        let map = QuantileMap::fit(&[0.0, 0.1, 0.2, 0.3, 0.4]).unwrap();
        for (raw, share) in [(-1.0, 0.0), (0.0, 0.0), (0.1, 0.25), (0.15, 0.375), (0.4, 1.0), (2.0, 1.0)] {
            assert!((map.apply(raw) - share).abs() < 1e-9, "{raw}: {}", map.apply(raw));
        }
    }

    #[test]
    fn ties_stand_in_their_middle_and_order_is_kept() {
        let map = QuantileMap::fit(&[0.2, 0.5, 0.5, 0.5, 0.9]).unwrap();
        assert!((map.apply(0.5) - 0.5).abs() < 1e-9, "{}", map.apply(0.5));
        let values: Vec<f64> = (0..=100).map(|i| map.apply(f64::from(i) / 100.0)).collect();
        assert!(values.is_sorted() && values.iter().all(|v| (0.0..=1.0).contains(v)));
        let flat = QuantileMap::fit(&[0.5, 0.5]).unwrap();
        assert_eq!([flat.apply(0.4), flat.apply(0.5), flat.apply(0.6)], [0.0, 0.5, 1.0]);
    }

    #[test]
    fn scores_that_make_no_map_are_refused() {
        assert!(QuantileMap::fit(&[0.5]).unwrap_err().contains("too few"));
        assert!(QuantileMap::fit(&[0.5, f64::NAN]).unwrap_err().contains("NaN"));
    }

    #[test]
    fn a_curve_is_stored_and_applied_like_a_map() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("calibration.json");
        let labelled: Vec<(f64, bool)> = (0..80).map(|i| (f64::from(i % 40), i % 40 + i % 7 > 20)).collect();
        let calibration = Calibration::fit_platt(&[("judge".to_string(), labelled)].into()).unwrap();
        calibration.save(&path).unwrap();
        let read = Calibration::load(&path).unwrap();
        assert_eq!(read, calibration);
        assert!(read.get("judge", 0.0).unwrap() < 0.3 && read.get("judge", 39.0).unwrap() > 0.7);
        assert!(read.expected_error("judge").unwrap() < 0.3);
        let few = Calibration::fit_platt(&[("judge".to_string(), vec![(1.0, true)])].into()).unwrap_err().to_string();
        assert!(few.contains("calibration of judge") && few.contains("too few"), "{few}");
    }

    #[test]
    fn what_is_stored_comes_back_and_an_edit_is_noticed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("calibration.json");
        let scores = BTreeMap::from([("similarity".to_string(), vec![0.1, 0.33, 0.7])]);
        let calibration = Calibration::fit(&scores).unwrap();
        calibration.save(&path).unwrap();
        assert_eq!(Calibration::load(&path).unwrap(), calibration);
        assert_eq!(calibration.get("other", 0.3), None);

        let edited = std::fs::read_to_string(&path).unwrap().replacen("0.1", "0.05", 1);
        std::fs::write(&path, edited).unwrap();
        let error = Calibration::load(&path).unwrap_err().to_string();
        assert!(error.contains("calibration.json") && error.contains("fit it again"), "{error}");
    }
}
