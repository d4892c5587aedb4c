//! Selection: which of the placed prompts a round may take, and what became of the others.
//!
//! Each row ends in exactly one place: as a row of a prompt, or counted under one reason.

use std::collections::{BTreeMap, HashMap, HashSet};

use crate::record::derive_seed;

use super::catalogue::{Catalogue, Entry, NONE, Rows};
use super::draw::{self, Stratum};
use super::history::History;
use super::workload::Workloads;
use super::{Counts, Settings, Split, read};

const HOUR_US: i64 = 3_600_000_000;

/// Most prompts of one kind of traffic that a draw looks at; it bounds its memory.
const MOST_APPLICANTS: usize = 1_000_000;

/// A prompt that was chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Chosen {
    pub(super) entry: u32,
    /// Rows of the log that it stands for.
    pub(super) count: u64,
}

/// The prompts of the three splits, in the order of the log.
#[derive(Debug, Default)]
pub(super) struct Selected {
    pub(super) train: Vec<Chosen>,
    pub(super) gate: Vec<Chosen>,
    pub(super) audit: Vec<Chosen>,
    /// Why training prompts were drawn.
    pub(super) drawn: Counts,
    /// Rows left out for secrets and personal data, by kind; a row with two kinds counts under both.
    pub(super) masked: Counts,
    /// Event time from which traffic is newer than anything that trains.
    pub(super) forward_from_us: i64,
}

/// What a selection is made by.
pub(super) struct Choice<'a> {
    pub(super) catalogue: &'a Catalogue,
    pub(super) workloads: &'a Workloads,
    pub(super) history: &'a History,
    pub(super) settings: &'a Settings,
    pub(super) seed: u64,
}

/// The prompts kept for one split, and which of them stands for a text or a cluster.
struct Kept {
    chosen: Vec<Chosen>,
    by_twin: Vec<u32>,
    by_cluster: Option<Vec<u32>>,
}

impl Kept {
    fn new(entries: usize, one_per_cluster: bool) -> Self {
        let none = || vec![NONE; entries];
        Kept { chosen: Vec::new(), by_twin: none(), by_cluster: one_per_cluster.then(none) }
    }

    /// Keeps a prompt, or returns why another stands for it.
    fn offer(&mut self, entry: u32, twin: u32, cluster: u32, count: u64) -> Option<&'static str> {
        let near = self.by_twin[twin as usize];
        let same = self.by_cluster.as_ref().map_or(NONE, |kept| kept[cluster as usize]);
        let (stands_for_it, reason) = match (near, same) {
            (NONE, NONE) => {
                let at = self.chosen.len() as u32;
                self.by_twin[twin as usize] = at;
                if let Some(kept) = &mut self.by_cluster {
                    kept[cluster as usize] = at;
                }
                self.chosen.push(Chosen { entry, count });
                return None;
            }
            (NONE, same) => (same, "same_cluster"),
            (near, _) => (near, "near_duplicate"),
        };
        self.chosen[stands_for_it as usize].count += count;
        Some(reason)
    }
}

impl Choice<'_> {
    /// Selects a round's prompts. Training keeps all turns of a conversation but no near duplicates; gate and audit keep one
    /// prompt of each cluster.
    pub(super) fn select(&self, excluded: &mut Counts) -> Selected {
        let entries = self.catalogue.entries.len();
        let mut kept = [Kept::new(entries, false), Kept::new(entries, true), Kept::new(entries, true)];
        let mut masked = Counts::default();
        let forward_from_us = self.forward_from();
        for at in read::in_order(self.catalogue, |_| true) {
            let entry = &self.catalogue.entries[at as usize];
            let Some(rows) = entry.rows.as_ref().filter(|rows| rows.usable > 0) else { continue };
            let count = u64::from(rows.usable);
            let Some(decision) = entry.decision else {
                excluded.add("bad_messages", count);
                continue;
            };
            if let Some(reason) = self.reason(at, entry, &mut masked) {
                excluded.add(reason, count);
                continue;
            }
            excluded.add("duplicate", count - 1);
            let part = match decision.split {
                Split::Train if rows.event_time_us >= forward_from_us => {
                    excluded.add("forward", 1);
                    continue;
                }
                Split::Train => 0,
                Split::Gate => 1,
                Split::Audit => 2,
                Split::None => {
                    excluded.add("straddles", 1);
                    continue;
                }
            };
            if let Some(reason) = kept[part].offer(at, entry.twin, decision.cluster, count) {
                excluded.add(reason, 1);
            }
        }
        let [train, gate, audit] = kept.map(|kept| self.capped(kept.chosen, excluded));
        let (train, drawn) = self.drawn(train, excluded);
        let [gate, audit] = [gate, audit].map(|held| self.newest(held, excluded));
        Selected { train, gate, audit, drawn, masked, forward_from_us }
    }

    /// Returns why no row of a prompt may be used, by its text.
    fn reason(&self, at: u32, entry: &Entry, masked: &mut Counts) -> Option<&str> {
        let words = &self.catalogue.words;
        let has_rules = self.catalogue.workload(at, self.workloads).is_some_and(|view| view.has_rules);
        let kinds = words.name(entry.masked).unwrap_or_default().split(',');
        let kinds: Vec<&str> =
            kinds.filter(|k| !k.is_empty() && !self.settings.allow_kinds.iter().any(|a| a == k)).collect();
        if let Some(fault) = words.name(entry.fault) {
            return Some(fault);
        }
        if !kinds.is_empty() {
            let rows = entry.rows.as_ref().map_or(0, |rows| u64::from(rows.usable));
            kinds.iter().for_each(|kind| masked.add(kind, rows));
            return Some("secrets");
        }
        if entry.chars as usize > self.settings.max_prompt_chars {
            Some("too_long")
        } else if !has_rules {
            Some("no_rules")
        } else {
            None
        }
    }

    /// Returns the event time from which traffic is kept from training, so that the gate sees what is newer than it.
    fn forward_from(&self) -> i64 {
        let usable =
            self.catalogue.entries.iter().filter_map(|entry| entry.rows.as_ref().filter(|rows| rows.usable > 0));
        match (self.settings.forward_hours, usable.map(|rows| rows.event_time_us).max()) {
            (0, _) | (_, None) => i64::MAX,
            (hours, Some(newest)) => newest - i64::from(hours) * HOUR_US,
        }
    }

    fn rows(&self, chosen: &Chosen) -> Option<&Rows> {
        self.catalogue.rows(chosen.entry)
    }

    /// Leaves out what one user sent beyond the cap, by lot.
    fn capped(&self, chosen: Vec<Chosen>, excluded: &mut Counts) -> Vec<Chosen> {
        let cap = self.settings.max_user_prompts;
        let user = |chosen: &Chosen| self.rows(chosen).map_or(0, |rows| rows.user);
        let mut counts: HashMap<u64, usize> = HashMap::new();
        if cap > 0 {
            chosen.iter().map(user).filter(|user| *user != 0).for_each(|user| *counts.entry(user).or_default() += 1);
            counts.retain(|_, n| *n > cap);
        }
        let mut by_user: HashMap<u64, Vec<usize>> = HashMap::new();
        for (at, user) in chosen.iter().map(user).enumerate().filter(|(_, user)| counts.contains_key(user)) {
            by_user.entry(user).or_default().push(at);
        }
        let mut out = HashSet::new();
        for mut places in by_user.into_values() {
            places.sort_by_cached_key(|at| self.lot("cap", &chosen[*at]));
            out.extend(places.drain(cap..));
        }
        excluded.add("user_cap", out.len() as u64);
        let kept = chosen.into_iter().enumerate().filter(|(at, _)| !out.contains(at));
        kept.map(|(_, chosen)| chosen).collect()
    }

    fn lot(&self, what: &str, chosen: &Chosen) -> u64 {
        derive_seed(self.seed, &[what, &self.catalogue.hash(chosen.entry)])
    }

    fn drawn(&self, train: Vec<Chosen>, excluded: &mut Counts) -> (Vec<Chosen>, Counts) {
        let offered = train.len();
        let tenants = self.tenants(&train);
        let stratum = |chosen: &Chosen| -> Stratum {
            let entry = &self.catalogue.entries[chosen.entry as usize];
            let (by_row, tenant) = self.rows(chosen).map_or((0, NONE), |rows| (rows.workloads, rows.tenant));
            let workload = self.workloads.place(by_row, entry.system).unwrap_or(usize::MAX);
            (workload, tenants.get(&tenant).copied().unwrap_or(NONE), entry.has_tools)
        };
        let mut sizes: BTreeMap<Stratum, usize> = BTreeMap::new();
        train.iter().for_each(|chosen| *sizes.entry(stratum(chosen)).or_default() += 1);
        // Of a kind with very many prompts so many are looked at, by lot: those that trained are among them by chance only.
        let is_looked_at = |stratum: &Stratum, chosen: &Chosen| {
            let size = sizes.get(stratum).copied().unwrap_or(0);
            size <= MOST_APPLICANTS || self.lot("thin", chosen) / (u64::MAX / size as u64) < MOST_APPLICANTS as u64
        };
        let train = train.into_iter().map(|chosen| (stratum(&chosen), chosen));
        let train = train.filter(|(stratum, chosen)| is_looked_at(stratum, chosen)).collect();
        let (drawn, why) = draw::draw(train, self.catalogue, self.history, self.settings, self.seed);
        excluded.add("over_limit", (offered - drawn.len()) as u64);
        (drawn, why)
    }

    /// Numbers tenants in the order of their names: the numbers of words depend on the order of the rows.
    fn tenants(&self, chosen: &[Chosen]) -> HashMap<u32, u32> {
        let words = chosen.iter().filter_map(|chosen| self.rows(chosen)).map(|rows| rows.tenant);
        let distinct: HashSet<u32> = words.filter(|word| *word != NONE).collect();
        let mut by_name: Vec<(&str, u32)> =
            distinct.into_iter().filter_map(|word| Some((self.catalogue.words.name(word)?, word))).collect();
        by_name.sort_unstable();
        by_name.into_iter().zip(0..).map(|((_, word), rank)| (word, rank)).collect()
    }

    /// Keeps the newest held-out prompts: a gate spends fresh ones, and traffic changes.
    fn newest(&self, chosen: Vec<Chosen>, excluded: &mut Counts) -> Vec<Chosen> {
        let limit = self.settings.max_held_prompts;
        if chosen.len() <= limit {
            return chosen;
        }
        let time = |chosen: &Chosen| self.rows(chosen).map_or(0, |rows| rows.event_time_us);
        let mut newest: Vec<(usize, Chosen)> = chosen.into_iter().enumerate().collect();
        newest.sort_by_key(|(place, chosen)| std::cmp::Reverse((time(chosen), *place)));
        excluded.add("held_over_limit", (newest.len() - limit) as u64);
        newest.truncate(limit);
        newest.sort_unstable_by_key(|(place, _)| *place);
        newest.into_iter().map(|(_, chosen)| chosen).collect()
    }
}
