//! Whether tonight's prompts are of the same population as those of the nights before.
//!
//! A gate's verdict, a frozen calibration and a reward model all speak about the prompts they saw. When traffic changes (a new
//! product, another language, a client that logs otherwise), they go on saying numbers that mean something else. What is
//! compared are counts of the held-out prompts' features: held-out prompts are chosen by a hash and by nothing that a round
//! learns, so they are a fair sample of the traffic. One prompt of a cluster is counted, so that counts are independent.
//!
//! The measure is the population stability index of credit scoring, `sum (p - q) ln(p / q)` over bins, in nats: the symmetric
//! divergence of Kullback and Leibler. Practice calls 0.25 a shift. Under equal populations it is about
//! `(1/n + 1/m) chi-square(bins - 1)` (Yurdakul and Naranjo, Journal of Risk Model Validation 2020), so on few prompts a large index
//! means nothing; an alarm needs both the index and more than chance.

use std::collections::{BTreeMap, BTreeSet};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Prompt;
use crate::record::{derive_seed, last_user_text};

/// Bins of the words.
const WORD_BINS: u64 = 32;
/// The least that a bin is expected to hold on the smaller side; rarer ones are counted together.
const BIN_MIN: f64 = 5.0;
/// The normal quantile of the chance that one feature alarms under equal populations: 1e-4 a night.
const CHANCE_Z: f64 = 3.719_016_485_455_709;
/// The bin of all that is rare.
const RARE: &str = "rare";

/// How the population of the prompts is watched, `[dataset.population]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// Rounds before this one whose prompts tonight's are compared with. 0 = nothing is compared.
    pub rounds: usize,
    /// The population stability index of a feature from which it has shifted, in nats, above 0. Practice: below 0.1 none, from
    /// 0.25 a shift. What chance alone explains is never one.
    pub index: f64,
    /// Clusters on each side below which nothing is said. At least 10.
    pub min_prompts: u64,
}

impl Default for Settings {
    fn default() -> Self {
        Settings { rounds: 7, index: 0.25, min_prompts: 50 }
    }
}

impl Settings {
    /// Checks ranges; the message names the key, the value and what to write instead.
    pub fn validate(&self) -> Result<(), String> {
        if !(self.index > 0.0 && self.index.is_finite()) {
            return Err(format!("population.index is {}: give a number above 0, such as 0.25", self.index));
        }
        if self.min_prompts < 10 {
            return Err(format!("population.min_prompts is {}: give a whole number of at least 10", self.min_prompts));
        }
        Ok(())
    }
}

/// What is counted of a prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Feature {
    Workload,
    Tenant,
    Language,
    /// Characters of the last user turn, by doubling.
    Length,
    /// Messages of the conversation, by doubling.
    Turns,
    Tools,
    /// One word of the last user turn, drawn by a hash, in one of 32 bins: the vocabulary, without any text.
    Words,
}

impl Feature {
    /// Every feature.
    pub const ALL: [Feature; 7] = [
        Feature::Workload,
        Feature::Tenant,
        Feature::Language,
        Feature::Length,
        Feature::Turns,
        Feature::Tools,
        Feature::Words,
    ];

    /// Returns the name in files and metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Feature::Workload => "workload",
            Feature::Tenant => "tenant",
            Feature::Language => "language",
            Feature::Length => "length",
            Feature::Turns => "turns",
            Feature::Tools => "tools",
            Feature::Words => "words",
        }
    }

    fn bin(self, prompt: &Prompt) -> String {
        let doubled = |n: usize| format!("2^{}", (n + 1).ilog2());
        let name = |known: &Option<String>| known.clone().unwrap_or_else(|| "none".to_owned());
        match self {
            Feature::Workload => name(&prompt.workload),
            Feature::Tenant => name(&prompt.tenant),
            Feature::Language => name(&prompt.language),
            Feature::Length => doubled(last_user_text(&prompt.messages).chars().count()),
            Feature::Turns => doubled(prompt.messages.len()),
            Feature::Tools => if prompt.tools.is_some() { "yes" } else { "no" }.to_owned(),
            Feature::Words => word_bin(prompt),
        }
    }
}

/// Draws one of the distinct words of a prompt by a hash of prompt and word, and returns the bin of that word.
fn word_bin(prompt: &Prompt) -> String {
    let text = last_user_text(&prompt.messages).to_lowercase();
    let words: BTreeSet<&str> = text.split(|c: char| !c.is_alphanumeric()).filter(|word| !word.is_empty()).collect();
    let drawn = words.into_iter().min_by_key(|word| derive_seed(0, &["population", &prompt.prompt_hash, word]));
    drawn.map_or("none".to_owned(), |word| (derive_seed(0, &["population", word]) % WORD_BINS).to_string())
}

/// The features of some prompts, counted.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Profile {
    /// Clusters, of each of which one prompt is counted.
    pub prompts: u64,
    pub counts: BTreeMap<Feature, BTreeMap<String, u64>>,
}

impl Profile {
    /// Counts the first prompt of each cluster that was asked after `after_us`.
    pub fn of<'a>(prompts: impl IntoIterator<Item = &'a Prompt>, after_us: i64) -> Profile {
        let mut profile = Profile::default();
        let mut seen: BTreeSet<&str> = BTreeSet::new();
        for prompt in prompts.into_iter().filter(|prompt| prompt.event_time_us > after_us) {
            if !seen.insert(&prompt.cluster) {
                continue;
            }
            profile.prompts += 1;
            for feature in Feature::ALL {
                *profile.counts.entry(feature).or_default().entry(feature.bin(prompt)).or_default() += 1;
            }
        }
        profile
    }

    /// Adds the counts of another profile.
    pub fn add(&mut self, other: &Profile) {
        self.prompts += other.prompts;
        for (feature, bins) in &other.counts {
            let ours = self.counts.entry(*feature).or_default();
            bins.iter().for_each(|(bin, count)| *ours.entry(bin.clone()).or_default() += count);
        }
    }
}

/// How far one feature moved.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Shift {
    pub feature: Feature,
    /// The population stability index, in nats.
    pub index: f64,
    /// What chance alone exceeds once in 10,000 nights.
    pub chance: f64,
    pub bins: usize,
    /// True where the index passes the setting and chance.
    pub alarm: bool,
}

/// Compares tonight's prompts with those before; nothing where either side has too few.
pub fn compare(before: &Profile, tonight: &Profile, settings: &Settings) -> Vec<Shift> {
    if before.prompts.min(tonight.prompts) < settings.min_prompts {
        return Vec::new();
    }
    let empty = BTreeMap::new();
    let shift = |feature: Feature| {
        let of = |profile: &'_ Profile| profile.counts.get(&feature).unwrap_or(&empty).clone();
        let bins = joined(&of(before), &of(tonight));
        let (index, chance) = (stability_index(&bins), chance_bound(&bins));
        Shift { feature, index, chance, bins: bins.len(), alarm: index > settings.index && index > chance }
    };
    Feature::ALL.map(shift).into()
}

/// Returns the counts of both sides in each bin; bins that are rare on both sides are one.
fn joined(before: &BTreeMap<String, u64>, tonight: &BTreeMap<String, u64>) -> Vec<(u64, u64)> {
    let total = |bins: &BTreeMap<String, u64>| bins.values().sum::<u64>();
    let (n, m) = (total(before), total(tonight));
    let share = n.min(m) as f64 / (n + m).max(1) as f64;
    let names: BTreeSet<&String> = before.keys().chain(tonight.keys()).collect();
    let mut bins: BTreeMap<&str, (u64, u64)> = BTreeMap::new();
    for name in names {
        let count = |side: &BTreeMap<String, u64>| side.get(name).copied().unwrap_or_default();
        let (a, b) = (count(before), count(tonight));
        let bin = if (a + b) as f64 * share < BIN_MIN { RARE } else { name.as_str() };
        let entry = bins.entry(bin).or_default();
        *entry = (entry.0 + a, entry.1 + b);
    }
    bins.into_values().collect()
}

/// Returns `sum (p - q) ln(p / q)` with half a count added to each bin, so that an empty one does not make it infinite.
fn stability_index(bins: &[(u64, u64)]) -> f64 {
    let k = bins.len() as f64;
    let (n, m) = bins.iter().fold((0.5 * k, 0.5 * k), |(n, m), (a, b)| (n + *a as f64, m + *b as f64));
    let term = |(a, b): &(u64, u64)| {
        let (p, q) = ((*a as f64 + 0.5) / n, (*b as f64 + 0.5) / m);
        (p - q) * (p / q).ln()
    };
    bins.iter().map(term).sum()
}

/// Returns the index that equal populations exceed with probability 1e-4: the chi-square quantile of Wilson and Hilferty, times
/// `1/n + 1/m`.
fn chance_bound(bins: &[(u64, u64)]) -> f64 {
    let (n, m) = bins.iter().fold((0, 0), |(n, m), (a, b)| (n + a, m + b));
    let freedom = bins.len().saturating_sub(1) as f64;
    if freedom == 0.0 || n == 0 || m == 0 {
        return 0.0;
    }
    let ninth = 2.0 / (9.0 * freedom);
    let quantile = freedom * (1.0 - ninth + CHANCE_Z * ninth.sqrt()).powi(3);
    quantile * (1.0 / n as f64 + 1.0 / m as f64)
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;
    use rand_chacha::ChaCha8Rng;
    use rand_chacha::rand_core::Rng;

    use super::*;
    use crate::record::{Coordinates, Message};

    fn prompt(cluster: usize, text: &str) -> Prompt {
        Prompt {
            prompt_hash: format!("{cluster}-{text}"),
            cluster: cluster.to_string(),
            workload: Some("desk".into()),
            tenant: None,
            messages: vec![Message::text("user", text)],
            tools: None,
            first_seen: Coordinates { topic: "t".into(), partition: 0, offset: 0, record_index: 0 },
            event_time_us: cluster as i64,
            language: None,
            is_forward: false,
            count: 1,
            feedback: Vec::new(),
            sources: Vec::new(),
        }
    }

    #[test]
    fn one_prompt_of_a_cluster_counts_and_old_ones_do_not() {
        let prompts = [prompt(1, "old"), prompt(2, "a b"), prompt(2, "a b c"), prompt(3, &"x".repeat(40))];
        let profile = Profile::of(&prompts, 1);
        assert_eq!(profile.prompts, 2);
        assert_eq!(profile.counts[&Feature::Length], BTreeMap::from([("2^2".into(), 1), ("2^5".into(), 1)]));
        assert_eq!(profile.counts[&Feature::Workload]["desk"], 2);
        let mut sum = profile.clone();
        sum.add(&profile);
        assert_eq!((sum.prompts, sum.counts[&Feature::Tools]["no"]), (4, 4));
    }

    #[test]
    fn the_index_and_its_bound_are_those_of_the_formulas() {
        // numpy: p, q = (a+.5)/(a+.5).sum(), (b+.5)/(b+.5).sum(); ((p-q)*log(p/q)).sum() for a = [50, 30, 20], b = [20, 30, 150].
        assert!((stability_index(&[(50, 20), (30, 30), (20, 150)]) - 1.443_167_276).abs() < 1e-8);
        // scipy: chi2.ppf(1 - 1e-4, 2) = 18.420681, (31) = 68.698; Wilson and Hilferty err by 5 % and 1 %, on the safe side.
        let bound = chance_bound(&[(50, 20), (30, 30), (20, 150)]);
        let exact = 18.420_681 * (1.0 / 100.0 + 1.0 / 200.0);
        assert!((exact..1.05 * exact).contains(&bound), "{bound}");
        assert_eq!((chance_bound(&[(9, 9)]), stability_index(&[(9, 9)])), (0.0, 0.0));
    }

    /// Draws a profile whose words are uniform over some bins, but the first with another share.
    fn drawn(n: u64, (bins, first): (u64, f64), rng: &mut ChaCha8Rng) -> Profile {
        let mut profile = Profile { prompts: n, ..Profile::default() };
        for _ in 0..n {
            let u = (rng.next_u64() >> 11) as f64 / (1u64 << 53) as f64;
            let bin = if u < first { 0 } else { 1 + (rng.next_u64() % (bins - 1)) };
            *profile.counts.entry(Feature::Words).or_default().entry(bin.to_string()).or_default() += 1;
        }
        profile
    }

    #[test]
    fn chance_alone_is_no_shift_and_a_shift_is_one() {
        let mut rng = ChaCha8Rng::seed_from_u64(5);
        let settings = Settings::default();
        let words = |before: &Profile, tonight: &Profile| {
            let shifts = compare(before, tonight, &settings);
            shifts.into_iter().find(|shift| shift.feature == Feature::Words).unwrap()
        };
        let (mut beyond, mut alarms) = (0, 0);
        for _ in 0..2000 {
            let (before, tonight) = (drawn(60, (8, 0.125), &mut rng), drawn(60, (8, 0.125), &mut rng));
            let shift = words(&before, &tonight);
            beyond += usize::from(shift.index > settings.index);
            alarms += usize::from(shift.alarm);
        }
        // 0.2 expected.
        assert!(alarms <= 2, "{alarms} false alarms");
        assert!(beyond > 20, "on few prompts the index alone is passed by chance: {beyond}");
        let before = drawn(400, (32, 1.0 / 32.0), &mut rng);
        let shift = words(&before, &drawn(400, (32, 0.4), &mut rng));
        assert!(shift.alarm && shift.index > 3.0 * shift.chance, "{shift:?}");
        assert!(compare(&before, &drawn(49, (32, 0.9), &mut rng), &settings).is_empty(), "too few to say anything");
    }

    #[test]
    fn the_settings_are_checked() {
        assert!(Settings::default().validate().is_ok());
        assert!(Settings { index: 0.0, ..Settings::default() }.validate().unwrap_err().contains("population.index"));
        assert!(Settings { min_prompts: 3, ..Settings::default() }.validate().unwrap_err().contains("min_prompts"));
    }
}
