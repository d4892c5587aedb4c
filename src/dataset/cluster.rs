//! Clusters: which prompts belong together, and which split they get.
//!
//! Prompts are placed one after the other, those decided in earlier rounds first. A prompt joins the cluster of its
//! conversation or of the first prompt near it; with no such neighbour it founds a cluster under its own hash. Where its
//! neighbours are in different splits it is used by none. So a decision never changes, and what is placed tonight is
//! what would have been placed had the rows come night by night.

use std::collections::{BTreeMap, HashMap};

use crate::record::prompt_hash;

use super::near::NearIndex;
use super::text::Variable;
use super::{Prompt, Settings, Split};

/// Fewest characters of user turns from which a prompt that goes on word for word counts as the same conversation.
/// Every other conversation begins with "hi" and the same answer to it.
const MIN_SHARED_START: usize = 24;

/// Most earlier calls of a conversation that are looked for, the latest first.
const MAX_STARTS: usize = 32;

/// A distinct prompt of the log.
#[derive(Debug)]
pub(super) struct Candidate {
    pub(super) prompt: Prompt,
    pub(super) conversation: Option<String>,
    pub(super) variable: Variable,
    /// False where it only keeps others away: it was placed once and none of its rows may be used now.
    pub(super) usable: bool,
}

/// Cluster and split of a prompt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Decision {
    pub(super) cluster: String,
    pub(super) split: Split,
}

/// Where a candidate was placed.
#[derive(Debug)]
pub(super) struct Placement {
    /// Its position among the candidates.
    pub(super) candidate: usize,
    pub(super) decision: Decision,
    pub(super) is_new: bool,
    /// Number of its text, and of the texts near it that were there before.
    pub(super) text: usize,
    pub(super) near: Vec<usize>,
}

/// Places all candidates, which must be in the order of the log. Returns them in the order of placing.
pub(super) fn place(
    candidates: &[Candidate],
    known: &BTreeMap<String, Decision>,
    settings: &Settings,
) -> Vec<Placement> {
    let conversations = conversations(candidates);
    let mut index = NearIndex::new(settings);
    let mut by_text: HashMap<usize, Vec<Decision>> = HashMap::new();
    let mut by_conversation: HashMap<usize, Vec<Decision>> = HashMap::new();
    let is_known = |i: &usize| known.contains_key(&candidates[*i].prompt.prompt_hash);
    let (old, new): (Vec<usize>, Vec<usize>) = (0..candidates.len()).partition(is_known);
    let mut placed = Vec::with_capacity(candidates.len());
    for i in old.into_iter().chain(new) {
        let Candidate { prompt, variable, .. } = &candidates[i];
        let (text, near) = index.add(variable.context, &variable.turn);
        let stored = known.get(&prompt.prompt_hash);
        let own_conversation = by_conversation.get(&conversations[i]).into_iter().flatten();
        let neighbours = own_conversation.chain(near.iter().filter_map(|t| by_text.get(t)).flatten());
        let decision = stored.cloned().unwrap_or_else(|| decide(&prompt.prompt_hash, neighbours, settings));
        if decision.split != Split::None {
            add(by_text.entry(text).or_default(), &decision);
            add(by_conversation.entry(conversations[i]).or_default(), &decision);
        }
        placed.push(Placement { candidate: i, decision, is_new: stored.is_none(), text, near });
    }
    placed
}

fn add(decisions: &mut Vec<Decision>, decision: &Decision) {
    if !decisions.contains(decision) {
        decisions.push(decision.clone());
    }
}

fn decide<'a>(hash: &str, mut neighbours: impl Iterator<Item = &'a Decision>, settings: &Settings) -> Decision {
    let Some(first) = neighbours.next() else {
        return Decision { cluster: hash.to_owned(), split: Split::of(hash, settings) };
    };
    match neighbours.all(|other| other.split == first.split) {
        true => first.clone(),
        false => Decision { cluster: hash.to_owned(), split: Split::None },
    }
}

/// Numbers the conversations: prompts with the same conversation id, or of which one goes on where another ended.
fn conversations(candidates: &[Candidate]) -> Vec<usize> {
    let mut parents: Vec<usize> = (0..candidates.len()).collect();
    let mut by_id: HashMap<(Option<&str>, &str), usize> = HashMap::new();
    let by_hash: HashMap<&str, usize> =
        candidates.iter().enumerate().map(|(i, c)| (c.prompt.prompt_hash.as_str(), i)).collect();
    for (i, candidate) in candidates.iter().enumerate() {
        if let Some(id) = &candidate.conversation {
            let first = *by_id.entry((candidate.prompt.tenant.as_deref(), id)).or_insert(i);
            join(&mut parents, first, i);
        }
        if let Some(earlier) = earlier_call(&candidate.prompt, &by_hash, candidates) {
            join(&mut parents, earlier, i);
        }
    }
    (0..parents.len()).map(|i| root(&parents, i)).collect()
}

/// Finds the logged call whose messages a prompt repeats and goes on from: the latest one.
fn earlier_call(prompt: &Prompt, by_hash: &HashMap<&str, usize>, candidates: &[Candidate]) -> Option<usize> {
    let messages = &prompt.messages;
    let starts = (1..messages.len()).rev().filter(|&at| messages[at].role == "assistant").take(MAX_STARTS);
    let found = starts.filter_map(|at| by_hash.get(prompt_hash(&messages[..at], prompt.tools.as_ref()).as_str()));
    found.copied().find(|&earlier| candidates[earlier].variable.length >= MIN_SHARED_START)
}

fn root(parents: &[usize], mut i: usize) -> usize {
    while parents[i] != i {
        i = parents[i];
    }
    i
}

/// Joins two sets under the smaller root; paths stay short because the path of `b` is shortened on the way.
fn join(parents: &mut [usize], a: usize, b: usize) {
    let (a_root, b_root) = (root(parents, a), root(parents, b));
    let top = a_root.min(b_root);
    for mut i in [a, b] {
        while parents[i] != i {
            i = std::mem::replace(&mut parents[i], top);
        }
        parents[i] = top;
    }
}
