//! Drawing: which of the prompts that may train a round takes, when there are more than it can.
//!
//! Places go to strata (workload, tenant, with or without tools), so that a rare kind of traffic is not drowned; in each,
//! prompts of clusters that never trained come first, then new prompts, then those whose answers differed most in reward
//! when last trained on. A share is kept for prompts of earlier rounds, whatever they taught: without it a model forgets.
//! Everything else is decided by the seed.

use std::collections::{BTreeMap, HashSet};

use crate::record::derive_seed;

use super::catalogue::Catalogue;
use super::history::History;
use super::select::Chosen;
use super::{Counts, Settings};

/// Why a prompt was drawn, in the order of preference.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Worth {
    NewCluster,
    New,
    Informative,
    Settled,
}

impl Worth {
    fn name(self) -> &'static str {
        match self {
            Worth::NewCluster => "new_cluster",
            Worth::New => "new",
            Worth::Informative => "informative",
            Worth::Settled => "settled",
        }
    }
}

/// A prompt that may train, with what decides whether it does.
struct Applicant {
    place: usize,
    chosen: Chosen,
    worth: Worth,
    variance: f32,
    lot: u64,
}

/// A kind of traffic: place of the workload in the config, of the tenant's name among all, and whether tools are offered.
pub(super) type Stratum = (usize, u32, bool);

/// Draws a round's training prompts and returns them in their order, with how many were drawn for which reason.
pub(super) fn draw(
    offered: Vec<(Stratum, Chosen)>,
    catalogue: &Catalogue,
    history: &History,
    settings: &Settings,
    seed: u64,
) -> (Vec<Chosen>, Counts) {
    let limit = if settings.max_train_prompts == 0 { offered.len() } else { settings.max_train_prompts };
    let trained = trained_clusters(&offered, catalogue, history);
    let mut strata: BTreeMap<Stratum, Vec<Applicant>> = BTreeMap::new();
    for (place, (stratum, chosen)) in offered.into_iter().enumerate() {
        let entry = &catalogue.entries[chosen.entry as usize];
        let variance = history.variance(&entry.hash);
        let worth = match variance {
            None if entry.decision.is_some_and(|decision| trained.contains(&decision.cluster)) => Worth::New,
            None => Worth::NewCluster,
            Some(variance) if variance > 0.0 => Worth::Informative,
            Some(_) => Worth::Settled,
        };
        let lot = derive_seed(seed, &["draw", &catalogue.hash(chosen.entry)]);
        let applicant = Applicant { place, chosen, worth, variance: variance.unwrap_or(0.0), lot };
        strata.entry(stratum).or_default().push(applicant);
    }
    let sizes: Vec<usize> = strata.values().map(Vec::len).collect();
    let mut drawn: Vec<Applicant> = Vec::new();
    let mut counts = Counts::default();
    for (applicants, places) in strata.into_values().zip(places(&sizes, limit, settings.balance)) {
        drawn.extend(of_stratum(applicants, places, settings.replay_share, &mut counts));
    }
    drawn.sort_unstable_by_key(|applicant| applicant.place);
    (drawn.into_iter().map(|applicant| applicant.chosen).collect(), counts)
}

fn trained_clusters(offered: &[(Stratum, Chosen)], catalogue: &Catalogue, history: &History) -> HashSet<u32> {
    let entries = offered.iter().map(|(_, chosen)| &catalogue.entries[chosen.entry as usize]);
    let trained = entries.filter(|entry| history.variance(&entry.hash).is_some());
    trained.filter_map(|entry| entry.decision.map(|decision| decision.cluster)).collect()
}

/// Draws from one stratum: first the share of replayed prompts, by lot; then the others by their worth.
fn of_stratum(mut applicants: Vec<Applicant>, places: usize, replay: f64, counts: &mut Counts) -> Vec<Applicant> {
    let is_old = |applicant: &Applicant| applicant.worth >= Worth::Informative;
    applicants.sort_unstable_by_key(|applicant| (!is_old(applicant), applicant.lot, applicant.place));
    let old = applicants.iter().filter(|applicant| is_old(applicant)).count();
    let replayed = ((places as f64 * replay).floor() as usize).min(old);
    let mut rest = applicants.split_off(replayed);
    rest.sort_by(|a, b| {
        let by_worth = a.worth.cmp(&b.worth).then(b.variance.total_cmp(&a.variance));
        by_worth.then((a.lot, a.place).cmp(&(b.lot, b.place)))
    });
    rest.truncate(places - replayed);
    counts.add("replay", replayed as u64);
    rest.iter().for_each(|applicant| counts.add(applicant.worth.name(), 1));
    applicants.extend(rest);
    applicants
}

/// Shares places out among strata by `size ^ (1 - balance)`, never more to one than it has; remainders go to the largest
/// fractions.
fn places(sizes: &[usize], limit: usize, balance: f64) -> Vec<usize> {
    let mut given = vec![0usize; sizes.len()];
    let mut left = limit.min(sizes.iter().sum());
    while left > 0 {
        let open: Vec<usize> = (0..sizes.len()).filter(|i| given[*i] < sizes[*i]).collect();
        let weight = |i: usize| (sizes[i] as f64).powf(1.0 - balance);
        let total: f64 = open.iter().map(|i| weight(*i)).sum();
        let share = |i: usize| left as f64 * weight(i) / total;
        let mut shares: Vec<(usize, usize, f64)> =
            open.iter().map(|&i| (i, (share(i).floor() as usize).min(sizes[i] - given[i]), share(i).fract())).collect();
        if shares.iter().all(|(_, whole, _)| *whole == 0) {
            shares.sort_by(|a, b| b.2.total_cmp(&a.2).then(a.0.cmp(&b.0)));
            shares.iter_mut().take(left).for_each(|share| share.1 = 1);
        }
        for (i, whole, _) in shares {
            given[i] += whole;
            left -= whole;
        }
    }
    given
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_follow_the_balance_and_never_exceed_a_stratum() {
        assert_eq!(places(&[900, 90, 10], 100, 0.0), [90, 9, 1]);
        assert_eq!(places(&[900, 90, 10], 90, 1.0), [40, 40, 10]);
        assert_eq!(places(&[900, 100], 40, 0.5), [30, 10]);
        assert_eq!(places(&[3, 3, 3], 4, 0.0).iter().sum::<usize>(), 4);
        assert_eq!(places(&[2, 1], 10, 0.3), [2, 1]);
        assert!(places(&[], 10, 0.3).is_empty());
    }

    #[test]
    fn new_clusters_come_first_and_a_share_is_replayed() {
        let applicant = |place: usize, worth, variance| Applicant {
            place,
            chosen: Chosen { entry: place as u32, count: 1 },
            worth,
            variance,
            lot: derive_seed(1, &[&place.to_string()]),
        };
        let all = || {
            let worths = [Worth::Settled, Worth::Informative, Worth::New, Worth::NewCluster];
            (0..40).map(|i| applicant(i, worths[i / 10], if i / 10 == 1 { i as f32 } else { 0.0 })).collect::<Vec<_>>()
        };
        let mut counts = Counts::default();
        let drawn = of_stratum(all(), 20, 0.1, &mut counts);
        let places: Vec<usize> = drawn.iter().map(|applicant| applicant.place).collect();
        assert_eq!(drawn.len(), 20);
        assert!(places[..2].iter().all(|place| *place < 20), "replayed: {places:?}");
        assert!((30..40).all(|place| places.contains(&place)), "{places:?}");
        assert_eq!(counts.0, [("replay", 2), ("new_cluster", 10), ("new", 8)].map(|(n, c)| (n.to_owned(), c)).into());
        let all_old: Vec<Applicant> = all().into_iter().filter(|applicant| applicant.place < 20).collect();
        let drawn = of_stratum(all_old, 5, 0.0, &mut Counts::default());
        assert_eq!(drawn.iter().map(|a| a.place).collect::<Vec<_>>(), [19, 18, 17, 16, 15], "by variance");
    }
}
