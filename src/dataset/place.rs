//! Placing: which cluster a new prompt belongs to, and which split it gets.
//!
//! Prompts are placed one after the other in the order of the log, those of earlier rounds first. A prompt joins the cluster
//! of its conversation or of the first prompt near it; with no such neighbour it founds a cluster under its own hash. Where
//! its neighbours are in different splits it is used by none. So a decision never changes, and what is placed tonight is
//! what would have been placed had the rows come night by night.

use std::collections::BTreeSet;

use super::catalogue::{Catalogue, Decision, Facts, NONE, id_of};
use super::index::{Hit, Index, Record, Relation};
use super::sketch::Sketch;
use super::text::{Boilerplate, hash};
use super::workload::{Workloads, system_of};
use super::{DatasetError, Settings, Split, SplitRow, secrets};
use crate::json::Value;
use crate::record::Message;

/// Characters of a turn from which its language is told.
const LANGUAGE_CHARS: usize = 1000;

/// A prompt whose text was read, ready to be placed.
#[derive(Debug, Clone)]
pub(super) struct Prepared {
    pub(super) entry: u32,
    pub(super) record: Record,
    pub(super) facts: Facts,
}

/// The text of a prompt, as its row holds it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Text<'a> {
    pub(super) messages: &'a str,
    pub(super) tools: Option<&'a str>,
}

impl Text<'_> {
    /// Reads the messages and tools; nothing where they are none, which the row's ingestion should have excluded.
    pub(super) fn read(&self) -> Option<(Vec<Message>, Option<Value>)> {
        let messages = serde_json::from_str(self.messages).ok()?;
        Some((messages, self.tools.map(serde_json::from_str).transpose().ok()?))
    }
}

/// Reads what is kept of a prompt's text. `None` where it cannot be read.
pub(super) fn prepare(
    entry: u32,
    text: Text<'_>,
    catalogue: &Catalogue,
    workloads: &Workloads,
    boilerplate: &Boilerplate,
) -> Option<Prepared> {
    let (messages, tools) = text.read()?;
    let known = &catalogue.entries[entry as usize];
    let rows = known.rows.as_ref()?;
    let facts = facts(&messages, tools.as_ref());
    let workload = workloads.find(rows.workloads, facts.system).map(|view| view.name.as_str());
    let record = record(&known.hash, workload, rows.conversation, (&messages, tools.as_ref()), boilerplate);
    Some(Prepared { entry, record, facts })
}

/// Returns what of a prompt's text is compared with others.
pub(super) fn record(
    prompt: &[u8; 32],
    workload: Option<&str>,
    conversation: u64,
    (messages, tools): (&[Message], Option<&Value>),
    boilerplate: &Boilerplate,
) -> Record {
    let variable = boilerplate.variable(workload, messages, tools);
    let turn = variable.as_ref().map_or("", |variable| variable.turn.as_str());
    let named = |of: fn(&super::text::Variable) -> u64| variable.as_ref().map_or(0, of);
    Record {
        id: id_of(prompt),
        context: named(|variable| variable.context),
        text: hash(turn),
        conversation,
        start: named(|variable| variable.start),
        tail: named(|variable| variable.tail),
        sketch: Sketch::of(turn),
    }
}

/// Reads what is kept of a text beside its place.
pub(super) fn facts(messages: &[Message], tools: Option<&Value>) -> Facts {
    let all: Vec<String> = messages.iter().map(Message::plain_text).collect();
    let texts: usize = all.iter().map(|text| text.chars().count()).sum();
    let chars = texts + tools.map_or(0, |tools| tools.to_string().chars().count());
    let mut masked: BTreeSet<&str> = all.iter().flat_map(|text| secrets::kinds(text)).collect();
    for value in messages.iter().flat_map(|message| message.rest.values()) {
        each_text(value, &mut |text| masked.extend(secrets::kinds(text)));
    }
    let last_user = messages.iter().rev().find(|message| message.role == "user");
    let fault = match last_user {
        _ if messages.is_empty() => Some("empty"),
        None => Some("no_user_turn"),
        Some(turn) if turn.plain_text().trim().is_empty() => Some("empty"),
        Some(_) => None,
    };
    Facts {
        chars: u32::try_from(chars).unwrap_or(u32::MAX),
        fault: fault.map(str::to_owned),
        masked: (!masked.is_empty()).then(|| masked.into_iter().collect::<Vec<_>>().join(",")),
        language: last_user.and_then(|turn| language(&turn.plain_text())).map(str::to_owned),
        has_tools: tools.is_some_and(|tools| !tools.is_null()),
        system: system_of(messages),
    }
}

/// Tells `each` every text that a value holds, such as the arguments of a tool call.
fn each_text(value: &Value, each: &mut impl FnMut(&str)) {
    match value {
        Value::String(text) => each(text),
        Value::Array(items) => items.iter().for_each(|item| each_text(item, each)),
        Value::Object(members) => members.values().for_each(|value| each_text(value, each)),
        _ => {}
    }
}

/// Returns the language of a text, as ISO 639-3, where it can be told.
fn language(text: &str) -> Option<&'static str> {
    let end = text.char_indices().nth(LANGUAGE_CHARS).map_or(text.len(), |(end, _)| end);
    whatlang::detect(&text[..end]).filter(whatlang::Info::is_reliable).map(|info| info.lang().code())
}

/// Places a batch, which must be in the order of the log, and returns the rows to be stored, with their records. The index
/// is not changed: the rows must be stored first.
pub(super) fn place(
    batch: Vec<Prepared>,
    index: &Index,
    catalogue: &mut Catalogue,
    settings: &Settings,
    round: &str,
) -> Result<(Vec<SplitRow>, Vec<Record>), DatasetError> {
    let batch = changed(batch, index, catalogue)?;
    let records: Vec<Record> = batch.iter().map(|prepared| prepared.record).collect();
    let found = index.find(&records)?;
    let mut rows = Vec::with_capacity(batch.len());
    for ((at, prepared), hits) in batch.iter().enumerate().zip(found) {
        let neighbours = hits.iter().map(|hit| Ok((entry_of(hit, &batch, index, catalogue)?, hit.relation)));
        let neighbours: Vec<(u32, Relation)> = neighbours.collect::<Result<_, DatasetError>>()?;
        settle(prepared, &neighbours, catalogue, settings);
        rows.push(SplitRow::of(prepared, index.len() + at as u32, catalogue, round));
    }
    Ok((rows, records))
}

/// Leaves out the prompts that the index holds as they are: they were read again only because a template was found.
fn changed(batch: Vec<Prepared>, index: &Index, catalogue: &Catalogue) -> Result<Vec<Prepared>, DatasetError> {
    let is_again = |prepared: &&Prepared| catalogue.entries[prepared.entry as usize].is_indexed;
    let again: Vec<Record> = batch.iter().filter(is_again).map(|prepared| prepared.record).collect();
    if again.is_empty() {
        return Ok(batch);
    }
    let mut same = std::collections::HashSet::new();
    for (record, hits) in again.iter().zip(index.find(&again)?) {
        for hit in hits.iter().filter(|hit| hit.number < index.len()) {
            let known = index.record(hit.number)?;
            if known.id == record.id
                && (known.text, known.context, known.start) == (record.text, record.context, record.start)
            {
                same.insert(record.id);
            }
        }
    }
    Ok(batch.into_iter().filter(|prepared| !same.contains(&prepared.record.id)).collect())
}

fn entry_of(hit: &Hit, batch: &[Prepared], index: &Index, catalogue: &Catalogue) -> Result<u32, DatasetError> {
    Ok(match hit.number.checked_sub(index.len()) {
        Some(own) => batch[own as usize].entry,
        None => catalogue.find(&index.record(hit.number)?.id).unwrap_or(NONE),
    })
}

/// Decides on a prompt by its neighbours, if it was not decided before.
fn settle(prepared: &Prepared, neighbours: &[(u32, Relation)], catalogue: &mut Catalogue, settings: &Settings) {
    let own = prepared.entry;
    let others = neighbours.iter().filter(|(entry, _)| *entry != own && *entry != NONE);
    let decided = others.filter_map(|(entry, relation)| {
        let decision = catalogue.entries[*entry as usize].decision?;
        (decision.split != Split::None).then_some((*entry, *relation, decision))
    });
    let decided: Vec<(u32, Relation, Decision)> = decided.collect();
    let is_new = catalogue.entries[own as usize].decision.is_none();
    let hash = catalogue.hash(own);
    let decision = catalogue.entries[own as usize].decision.unwrap_or_else(|| match decided.split_first() {
        None => Decision { cluster: own, split: Split::of(&hash, settings) },
        Some(((.., first), rest)) if rest.iter().all(|(.., other)| other.split == first.split) => *first,
        Some(_) => Decision { cluster: own, split: Split::None },
    });
    let twin = decided.iter().find(|(_, relation, other)| *relation == Relation::Twin && other.split == decision.split);
    let twin = twin.filter(|_| is_new).map(|(entry, ..)| catalogue.entries[*entry as usize].twin);
    let entry = &mut catalogue.entries[own as usize];
    entry.decision = Some(decision);
    entry.twin = twin.unwrap_or(entry.twin);
    catalogue.keep(own, &prepared.facts);
}
