//! From rows of the log to the prompts of three splits: every filter, in order, without I/O.
//!
//! Each row ends in exactly one place: as the row of a prompt, or counted under one reason.

use std::collections::{BTreeMap, HashMap};

use crate::record::{Coordinates, Kind, Message, derive_seed};

use super::cluster::{Candidate, Decision, Placement, place};
use super::feedback::{self, Feedback, Joined};
use super::text::{Boilerplate, Variable};
use super::{AuditSplit, GateSplit, Prompt, Settings, Split, SplitOf, SplitRow, TrainSplit};

/// What a dataset reads of a row of `queries`.
#[derive(Debug, Clone, PartialEq)]
pub struct QueryRow {
    pub coordinates: Coordinates,
    pub kind: Kind,
    /// Day of ingestion, counted from the epoch.
    pub ingest_day: i32,
    pub event_time_us: i64,
    pub request_id: Option<String>,
    pub trace_id: Option<String>,
    pub conversation_id: Option<String>,
    pub workload: Option<String>,
    pub tenant: Option<String>,
    /// JSON of what was said of an answer: in a row of feedback, or beside a call.
    pub feedback: Option<String>,
    pub prompt_hash: String,
    /// Canonical JSON of the messages.
    pub messages: String,
    /// JSON of the tools.
    pub tools: Option<String>,
    pub train_ok: bool,
    pub reason: Option<String>,
    pub redacted: bool,
    pub truncated: bool,
}

/// What a dataset needs to know of a workload whose answers can be scored. Prompts of any other are left out as
/// `no_rules`.
#[derive(Debug, Clone, PartialEq)]
pub struct WorkloadView {
    pub name: String,
    /// Text that every prompt of the workload carries; it is not compared.
    pub house_rules: String,
}

/// What became of the rows.
#[derive(Debug, Clone, PartialEq)]
pub struct Assembled {
    pub train: TrainSplit,
    pub gate: GateSplit,
    pub audit: AuditSplit,
    /// Decisions made now, to be stored before anything uses them.
    pub new_splits: Vec<SplitRow>,
    /// Rows left out, by reason.
    pub excluded: BTreeMap<String, u64>,
    pub rows: u64,
}

/// Assembles a dataset. The result does not depend on the order of `rows` or `known`.
pub fn assemble(
    mut rows: Vec<QueryRow>,
    known: Vec<SplitRow>,
    workloads: &[WorkloadView],
    settings: &Settings,
    round: &str,
    seed: u64,
) -> Assembled {
    rows.sort_by(|a, b| a.coordinates.cmp(&b.coordinates));
    let total = rows.len() as u64;
    let known = decisions(known);
    let mut excluded = Counts::default();
    let groups = group(rows, &known, settings, &mut excluded);
    let candidates = candidates(groups, &known, workloads, settings, &mut excluded);
    let placements = place(&candidates, &known, settings);
    let new_splits = placements.iter().filter(|p| p.is_new).map(|p| split_row(p, &candidates, round)).collect();
    let [train, gate, audit] = select(candidates, &placements, &mut excluded);
    let train = draw(train, settings.max_train_prompts, seed, &mut excluded);
    Assembled {
        train: SplitOf::new(in_order(train)),
        gate: SplitOf::new(in_order(gate)),
        audit: SplitOf::new(in_order(audit)),
        new_splits,
        excluded: excluded.0,
        rows: total,
    }
}

#[derive(Debug, Default)]
struct Counts(BTreeMap<String, u64>);

impl Counts {
    fn add(&mut self, reason: &str, rows: u64) {
        if rows > 0 {
            *self.0.entry(reason.to_owned()).or_default() += rows;
        }
    }
}

/// Returns the stored decisions. A prompt with two that differ, which no single writer makes, is used by none.
fn decisions(known: Vec<SplitRow>) -> BTreeMap<String, Decision> {
    let mut decisions: BTreeMap<String, Decision> = BTreeMap::new();
    for row in known {
        let decision = Decision { cluster: row.cluster, split: row.split };
        let stored = decisions.entry(row.prompt_hash).or_insert_with(|| decision.clone());
        if stored.split != decision.split {
            stored.split = Split::None;
        }
        stored.cluster = stored.cluster.clone().min(decision.cluster);
    }
    decisions
}

/// The rows of one prompt.
struct Group {
    /// Its first row that may be used, or else its first row.
    row: QueryRow,
    usable: u64,
    /// Feedback on the rows that may be used.
    feedback: Vec<Feedback>,
}

/// Counts out rows that may not be used and gathers the others by prompt, in the order of the log. Prompts that have
/// been placed before are kept even where none of their rows may be used: they keep near duplicates in their split.
fn group(
    rows: Vec<QueryRow>,
    known: &BTreeMap<String, Decision>,
    settings: &Settings,
    excluded: &mut Counts,
) -> Vec<Group> {
    let newest = rows.iter().map(|row| row.ingest_day).max().unwrap_or(0);
    let mut joined = Joined::of(&rows);
    let mut places: HashMap<String, usize> = HashMap::new();
    let mut groups: Vec<Group> = Vec::new();
    for row in rows {
        let reason = match row.kind {
            Kind::Feedback if joined.is_matched(&row) => Some("feedback"),
            Kind::Feedback => Some("feedback_unmatched"),
            Kind::Call => reason_of_row(&row, newest, settings),
        };
        if let Some(reason) = reason {
            excluded.add(reason, 1);
            if row.kind != Kind::Call || !known.contains_key(&row.prompt_hash) {
                continue;
            }
        }
        let usable = u64::from(reason.is_none());
        let feedback = if usable > 0 { joined.take(&row) } else { Vec::new() };
        match places.get(&row.prompt_hash) {
            Some(&at) => {
                groups[at].feedback.extend(feedback);
                if groups[at].usable == 0 && usable > 0 {
                    groups[at].row = row;
                }
                groups[at].usable += usable;
            }
            None => {
                places.insert(row.prompt_hash.clone(), groups.len());
                groups.push(Group { row, usable, feedback });
            }
        }
    }
    groups.sort_by(|a, b| a.row.coordinates.cmp(&b.row.coordinates));
    groups
}

/// Returns why a call may not be used, whatever its text.
fn reason_of_row<'a>(row: &'a QueryRow, newest: i32, settings: &Settings) -> Option<&'a str> {
    if !row.train_ok {
        Some(row.reason.as_deref().unwrap_or("not_train_ok"))
    } else if row.redacted {
        Some("redacted")
    } else if row.truncated {
        Some("truncated")
    } else if settings.lookback_days > 0 && i64::from(newest - row.ingest_day) >= i64::from(settings.lookback_days) {
        Some("old")
    } else {
        None
    }
}

/// Reads the prompts and counts out those whose text cannot be used.
fn candidates(
    groups: Vec<Group>,
    known: &BTreeMap<String, Decision>,
    workloads: &[WorkloadView],
    settings: &Settings,
    excluded: &mut Counts,
) -> Vec<Candidate> {
    let mut read: Vec<(Prompt, Option<String>, bool)> = Vec::with_capacity(groups.len());
    for Group { row, usable, feedback } in groups {
        let was_placed = known.contains_key(&row.prompt_hash);
        let conversation = row.conversation_id.clone();
        let Some(prompt) = prompt_of(row, usable, feedback) else {
            excluded.add("bad_messages", usable);
            continue;
        };
        let reason = reason_of_text(&prompt, workloads, settings);
        match reason {
            Some(reason) => excluded.add(reason, usable),
            None => excluded.add("duplicate", usable.saturating_sub(1)),
        }
        if was_placed || reason.is_none() {
            read.push((prompt, conversation, usable > 0 && reason.is_none()));
        }
    }
    let prompts = read.iter().map(|(prompt, ..)| (prompt.workload.as_deref(), prompt.messages.as_slice()));
    let house_rules = workloads.iter().map(|w| (w.name.as_str(), w.house_rules.as_str()));
    let boilerplate = Boilerplate::find(prompts, house_rules, settings);
    let candidate = |(prompt, conversation, usable): (Prompt, Option<String>, bool)| {
        let variable = boilerplate.variable(prompt.workload.as_deref(), &prompt.messages)?;
        Some(Candidate { prompt, conversation, variable, usable })
    };
    read.into_iter().filter_map(candidate).collect()
}

fn prompt_of(row: QueryRow, count: u64, feedback: Vec<Feedback>) -> Option<Prompt> {
    let messages: Vec<Message> = serde_json::from_str(&row.messages).ok()?;
    let tools = row.tools.map(|tools| serde_json::from_str(&tools)).transpose().ok()?;
    Some(Prompt {
        cluster: String::new(),
        prompt_hash: row.prompt_hash,
        workload: row.workload,
        tenant: row.tenant,
        messages,
        tools,
        first_seen: row.coordinates,
        event_time_us: row.event_time_us,
        count,
        feedback: feedback::newest(feedback),
    })
}

/// Returns why a prompt cannot be used.
fn reason_of_text(prompt: &Prompt, workloads: &[WorkloadView], settings: &Settings) -> Option<&'static str> {
    let texts: usize = prompt.messages.iter().map(|message| message.plain_text().chars().count()).sum();
    let tools = prompt.tools.as_ref().map_or(0, |tools| tools.to_string().chars().count());
    let last_user = prompt.messages.iter().rev().find(|message| message.role == "user");
    let has_rules = workloads.iter().any(|w| prompt.workload.as_deref() == Some(w.name.as_str()));
    match last_user {
        _ if prompt.messages.is_empty() => Some("empty"),
        None => Some("no_user_turn"),
        Some(turn) if turn.plain_text().trim().is_empty() => Some("empty"),
        Some(_) if texts + tools > settings.max_prompt_chars => Some("too_long"),
        Some(_) if !has_rules => Some("no_rules"),
        Some(_) => None,
    }
}

fn split_row(placement: &Placement, candidates: &[Candidate], round: &str) -> SplitRow {
    SplitRow {
        prompt_hash: candidates[placement.candidate].prompt.prompt_hash.clone(),
        cluster: placement.decision.cluster.clone(),
        split: placement.decision.split,
        round: round.to_owned(),
    }
}

/// The prompts kept for one split, and which of them stands for a text or a cluster.
#[derive(Default)]
struct Kept {
    prompts: Vec<Prompt>,
    by_text: HashMap<(usize, u64), usize>,
    by_cluster: HashMap<String, usize>,
}

impl Kept {
    /// Keeps a prompt, or returns why another stands for it.
    fn offer(
        &mut self,
        prompt: Prompt,
        variable: &Variable,
        placed: &Placement,
        per_cluster: bool,
    ) -> Option<&'static str> {
        let texts = placed.near.iter().chain([&placed.text]);
        let near = texts.filter_map(|&text| self.by_text.get(&(text, variable.tail))).min().copied();
        let same = self.by_cluster.get(&placed.decision.cluster).copied().filter(|_| per_cluster);
        let (stands_for_it, reason) = match (near, same) {
            (Some(at), _) => (at, "near_duplicate"),
            (None, Some(at)) => (at, "same_cluster"),
            (None, None) => {
                let at = self.prompts.len();
                self.by_text.insert((placed.text, variable.tail), at);
                self.by_cluster.entry(prompt.cluster.clone()).or_insert(at);
                self.prompts.push(prompt);
                return None;
            }
        };
        self.prompts[stands_for_it].count += prompt.count;
        Some(reason)
    }
}

/// Sorts the placed prompts into train, gate and audit. Training keeps all turns of a conversation but no near
/// duplicates; gate and audit keep one prompt of each cluster.
fn select(candidates: Vec<Candidate>, placements: &[Placement], excluded: &mut Counts) -> [Vec<Prompt>; 3] {
    let mut kept = [Kept::default(), Kept::default(), Kept::default()];
    let mut candidates: Vec<Option<Candidate>> = candidates.into_iter().map(Some).collect();
    for placement in placements {
        let Some(candidate) = candidates[placement.candidate].take().filter(|candidate| candidate.usable) else {
            continue;
        };
        let prompt = Prompt { cluster: placement.decision.cluster.clone(), ..candidate.prompt };
        let part = match placement.decision.split {
            Split::Train => 0,
            Split::Gate => 1,
            Split::Audit => 2,
            Split::None => {
                excluded.add("straddles", 1);
                continue;
            }
        };
        if let Some(reason) = kept[part].offer(prompt, &candidate.variable, placement, part > 0) {
            excluded.add(reason, 1);
        }
    }
    kept.map(|kept| kept.prompts)
}

/// Draws at most `limit` prompts with the seed; 0 = all.
fn draw(mut prompts: Vec<Prompt>, limit: usize, seed: u64, excluded: &mut Counts) -> Vec<Prompt> {
    if limit > 0 && prompts.len() > limit {
        prompts.sort_by_cached_key(|prompt| {
            (derive_seed(seed, &["draw", &prompt.prompt_hash]), prompt.prompt_hash.clone())
        });
        excluded.add("over_limit", (prompts.len() - limit) as u64);
        prompts.truncate(limit);
    }
    prompts
}

fn in_order(mut prompts: Vec<Prompt>) -> Vec<Prompt> {
    prompts.sort_by(|a, b| a.first_seen.cmp(&b.first_seen));
    prompts
}
