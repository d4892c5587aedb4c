//! Freezing: the tables in, a dataset's files out.
//!
//! Decisions about new prompts are stored in `splits` before anything can use them. Every writer of `splits` moves one
//! position by one, so of two that decide at once the second finds out, reads again and follows the first. New prompts are
//! placed in batches, each stored by a commit of its own: what a kill costs is one batch.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use serde::Serialize;

use crate::record::Coordinates;
use crate::table::{Name, Suppressions, Table, Tables, TxnStep, batch_of};

use super::catalogue::Catalogue;
use super::feedback::{self, Found};
use super::history::History;
use super::index::{Index, Record};
use super::manifest::{self, Inputs};
use super::place::{self, Prepared};
use super::select::{Choice, Chosen, Selected};
use super::text::{Boilerplate, Lines, Templates};
use super::workload::{Workloads, system_of};
use super::{
    Assembled, Dataset, DatasetError, Manifest, Prompt, Settings, Split, SplitOf, SplitRow, TrainSplit, WorkloadView,
    load, read, secrets,
};

/// The position that all writers of `splits` move.
const POSITION: &str = "taod/splits";

/// How often a decision that another writer overtook is made again.
pub(super) const ATTEMPTS: usize = 5;

/// Prompts that are placed and stored at once.
const BATCH: usize = 50_000;

/// How many of the newest known prompts are read again to tell what tonight's share with them.
const WINDOW: usize = 20_000;

/// What freezing is told.
#[derive(Debug, Clone, Copy)]
pub struct Freezing<'a> {
    pub round: &'a str,
    pub settings: &'a Settings,
    pub workloads: &'a [WorkloadView],
    pub seed: u64,
    /// Folder of the index of prompts, which is made where there is none.
    pub index: &'a Path,
}

/// Freezes a round's dataset into `out`. Where one is there already, a resumed round gets that one.
pub async fn freeze(tables: &Tables, freezing: Freezing<'_>, out: &Path) -> Result<Dataset, DatasetError> {
    if manifest::exists(out) {
        return load(out);
    }
    for _ in 0..ATTEMPTS {
        match attempt(tables, freezing, Mode::Store).await {
            Ok((inputs, assembled)) => {
                return manifest::store(out, freezing.round, inputs, assembled, freezing.settings, freezing.seed);
            }
            Err(DatasetError::Table(error)) if error.is_restart() => {}
            Err(error) => return Err(error),
        }
    }
    Err(DatasetError::Contended { attempts: ATTEMPTS })
}

/// Whether decisions are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    Store,
    /// They are made as they would be, and forgotten.
    Preview,
}

/// Returns the manifest that a round would freeze now, without its files' hashes, and the prompts that would train. Nothing
/// is decided by it, and what it says holds until the log or the tables grow.
pub async fn preview(tables: &Tables, freezing: Freezing<'_>) -> Result<(Manifest, TrainSplit), DatasetError> {
    let (inputs, assembled) = attempt(tables, freezing, Mode::Preview).await?;
    Ok((manifest::draft(freezing.round, inputs, &assembled, freezing.settings, freezing.seed), assembled.train))
}

async fn attempt(tables: &Tables, freezing: Freezing<'_>, mode: Mode) -> Result<(Inputs, Assembled), DatasetError> {
    let erased = Suppressions::load(tables).await?;
    let queries = tables.open_one(Name::Queries).await?;
    let mut splits = tables.open_one(Name::Splits).await?;
    let mut templates = tables.open_one(Name::Templates).await?;
    let history = History::read(tables).await?;
    let workloads = Workloads::of(freezing.workloads);
    let (mut catalogue, numbers) = read::catalogue(&splits, queries.count().await? as usize).await?;
    let (mut census, said, bursts) =
        read::census(&queries, &erased, &mut catalogue, &workloads, freezing.settings).await?;
    let mut index = Index::open(freezing.index, freezing.settings)?;
    read::catch_up(&mut index, &splits, numbers, &catalogue).await?;
    let mut known = read::templates(&templates).await?;
    let pending = pending(&catalogue);
    if !pending.is_empty() {
        let new = new_templates(&queries, &pending, &known, &catalogue, &workloads, freezing.settings).await?;
        let again = concerned(&catalogue, &workloads, &new);
        for (workload, lines) in &new {
            known.entry(workload.clone()).or_default().extend(lines);
        }
        let house_rules = workloads.iter().map(|w| (w.name.as_str(), w.house_rules.as_str()));
        let boilerplate = Boilerplate::new(known, house_rules);
        let reading = Reading { queries: &queries, workloads: &workloads, boilerplate: &boilerplate };
        // What is not stored is not found by a later batch either: then there is one.
        let size = if mode == Mode::Store { BATCH } else { usize::MAX };
        for (first, batches) in [(true, again.chunks(BATCH)), (false, pending.chunks(size))] {
            for batch in batches {
                let (rows, records) = place_batch(reading, &index, &mut catalogue, batch, freezing).await?;
                if mode == Mode::Store && !rows.is_empty() {
                    let step = next(&mut splits).await?;
                    splits.append(&[batch_of(Name::Splits.spec(), &rows)?], &[step]).await?;
                    index.append(&records, |at| rows[at].split != Split::None)?;
                }
            }
            // Not before: who is killed earlier finds the lines again, and with them the prompts to be read again.
            if first && mode == Mode::Store {
                store_templates(&mut templates, &mut splits, &new, freezing.round).await?;
            }
        }
    }
    let (settings, seed) = (freezing.settings, freezing.seed);
    let choice = Choice { catalogue: &catalogue, workloads: &workloads, history: &history, settings, seed };
    let selected = choice.select(&mut census.excluded);
    let tables = [("queries", &queries), ("splits", &splits), ("templates", &templates)];
    let mut tables: BTreeMap<String, u64> = tables.map(|(name, table)| (name.to_owned(), table.version())).into();
    tables.extend(history.version.map(|version| ("candidates".to_owned(), version)));
    let inputs = Inputs { tables, offsets: std::mem::take(&mut census.offsets) };
    let [train, gate, audit] = prompts(&queries, &catalogue, &workloads, &selected, said).await?;
    let assembled = Assembled {
        train: SplitOf::new(train),
        gate: SplitOf::new(gate),
        audit: SplitOf::new(audit),
        excluded: census.excluded.0,
        rows: census.rows,
        masked: selected.masked.0,
        drawn: selected.drawn.0,
        quarantine: bursts.named(),
    };
    Ok((inputs, assembled))
}

/// Returns the prompts that wait to be placed, in the order of the log: new ones, and those that an older taod decided on
/// without a sketch.
fn pending(catalogue: &Catalogue) -> Vec<u32> {
    read::in_order(catalogue, |at| {
        let entry = &catalogue.entries[at as usize];
        !entry.is_indexed && (entry.decision.is_some() || entry.rows.as_ref().is_some_and(|rows| rows.usable > 0))
    })
}

/// Finds the lines that have become templates: among the new prompts and as many of the newest known ones.
async fn new_templates(
    queries: &Table,
    pending: &[u32],
    known: &Templates,
    catalogue: &Catalogue,
    workloads: &Workloads,
    settings: &Settings,
) -> Result<Templates, DatasetError> {
    let mut lines = Lines::default();
    let time = |at: &u32| catalogue.entries[*at as usize].rows.as_ref().map_or(0, |rows| rows.event_time_us);
    // Ties are broken by the place in the log: the catalogue's numbers follow the order of a scan.
    let indexed = read::in_order(catalogue, |at| catalogue.entries[at as usize].is_indexed);
    let mut window: Vec<(i64, usize, u32)> =
        indexed.into_iter().enumerate().map(|(place, at)| (time(&at), place, at)).collect();
    window.sort_unstable_by(|a, b| b.cmp(a));
    window.truncate(WINDOW);
    let window: Vec<u32> = window.into_iter().map(|(_, _, at)| at).collect();
    for batch in window.chunks(BATCH).chain(pending.chunks(BATCH)) {
        let texts = read::texts(queries, batch, catalogue, |entry, text| Some((entry, text.read()?.0))).await?;
        for (entry, messages) in texts.into_iter().flatten() {
            let by_row = catalogue.rows(entry).map_or(0, |rows| rows.workloads);
            let view = workloads.find(by_row, system_of(&messages));
            lines.add(view.map(|view| view.name.as_str()), &messages);
        }
    }
    let mut found = lines.templates(settings);
    for (workload, lines) in &mut found {
        lines.retain(|line| !known.get(workload).is_some_and(|known| known.contains(line)));
    }
    found.retain(|_, lines| !lines.is_empty());
    Ok(found)
}

/// Returns the known prompts whose text may be compared otherwise once these lines are templates. They keep their
/// decisions and get new sketches, else a new prompt near one of them would not be found.
fn concerned(catalogue: &Catalogue, workloads: &Workloads, new: &Templates) -> Vec<u32> {
    if new.is_empty() {
        return Vec::new();
    }
    read::in_order(catalogue, |at| {
        let workload = catalogue.workload(at, workloads).map_or("", |view| view.name.as_str());
        catalogue.entries[at as usize].is_indexed && new.contains_key(workload)
    })
}

/// A row of the table `templates`.
#[derive(Debug, Serialize)]
struct TemplateRow<'a> {
    workload: &'a str,
    line: i64,
    round: &'a str,
    detail: Option<&'a str>,
}

/// Stores templates. The position of `splits` is moved first: so of two that freeze at once one does all of it.
async fn store_templates(
    table: &mut Table,
    splits: &mut Table,
    new: &Templates,
    round: &str,
) -> Result<(), DatasetError> {
    let row = |workload, line: &u64| TemplateRow { workload, line: *line as i64, round, detail: None };
    let rows: Vec<TemplateRow<'_>> =
        new.iter().flat_map(|(workload, lines)| lines.iter().map(|line| row(workload.as_str(), line))).collect();
    if !rows.is_empty() {
        let step = next(splits).await?;
        splits.append(&[], &[step]).await?;
        table.append(&[batch_of(Name::Templates.spec(), &rows)?], &[]).await?;
    }
    Ok(())
}

/// Returns the step that the next decision makes.
pub(super) async fn next(splits: &mut Table) -> Result<TxnStep, DatasetError> {
    let position = splits.txn(POSITION).await?;
    Ok(TxnStep { app_id: POSITION.to_owned(), expect: position, set: position.unwrap_or(0) + 1 })
}

/// What the text of a prompt is read with.
#[derive(Clone, Copy)]
struct Reading<'a> {
    queries: &'a Table,
    workloads: &'a Workloads,
    boilerplate: &'a Boilerplate,
}

/// Places one batch; its rows must be stored before its records are added to the index.
async fn place_batch(
    reading: Reading<'_>,
    index: &Index,
    catalogue: &mut Catalogue,
    batch: &[u32],
    freezing: Freezing<'_>,
) -> Result<(Vec<SplitRow>, Vec<Record>), DatasetError> {
    let Reading { queries, workloads, boilerplate } = reading;
    let prepare = |entry, text: place::Text<'_>| place::prepare(entry, text, catalogue, workloads, boilerplate);
    let mut prepared: Vec<Prepared> =
        read::texts(queries, batch, catalogue, prepare).await?.into_iter().flatten().collect();
    let order: HashMap<u32, usize> = batch.iter().enumerate().map(|(at, entry)| (*entry, at)).collect();
    prepared.sort_unstable_by_key(|prepared| order.get(&prepared.entry).copied());
    place::place(prepared, index, catalogue, freezing.settings, freezing.round)
}

/// Reads the texts of the chosen prompts.
async fn prompts(
    queries: &Table,
    catalogue: &Catalogue,
    workloads: &Workloads,
    selected: &Selected,
    mut said: Found,
) -> Result<[Vec<Prompt>; 3], DatasetError> {
    let mut parts = [Vec::new(), Vec::new(), Vec::new()];
    // A correction may quote what the prompt itself does not hold.
    let is_clean = |text: &str| secrets::kinds(text).is_empty();
    for said in said.by_prompt.values_mut() {
        said.retain(|(feedback, _)| is_clean(&feedback.value.to_string()));
        *said = feedback::newest(std::mem::take(said));
    }
    let rated = selected.train.iter().filter_map(|chosen| said.by_prompt.get(&chosen.entry)).flatten();
    let rated = rated.filter(|(feedback, _)| feedback.rating().is_some()).map(|(_, place)| place);
    let answers = read::answers(queries, rated, catalogue).await?;
    for (feedback, place) in said.by_prompt.values_mut().flatten() {
        feedback.response = answers.get(&*place).filter(|answer| is_clean(answer)).cloned();
    }
    for (part, chosen) in parts.iter_mut().zip([&selected.train, &selected.gate, &selected.audit]) {
        let wanted: Vec<u32> = chosen.iter().map(|chosen| chosen.entry).collect();
        let texts = read::texts(queries, &wanted, catalogue, |entry, text| (entry, text.read())).await?;
        let mut texts: HashMap<u32, _> = texts.into_iter().collect();
        for Chosen { entry, count } in chosen {
            let feedback = said.by_prompt.remove(entry).unwrap_or_default();
            let feedback = feedback.into_iter().map(|(feedback, _)| feedback).collect();
            // It was read when it was placed, so it can be read again.
            let text = texts.remove(entry).flatten();
            part.extend(text.and_then(|(messages, tools)| {
                let known = &catalogue.entries[*entry as usize];
                let rows = known.rows.as_ref()?;
                let name = |word| catalogue.words.name(word).map(str::to_owned);
                Some(Prompt {
                    prompt_hash: catalogue.hash(*entry),
                    cluster: catalogue.hash(known.decision?.cluster),
                    workload: catalogue.workload(*entry, workloads).map(|view| view.name.clone()),
                    tenant: name(rows.tenant),
                    messages,
                    tools,
                    first_seen: Coordinates {
                        topic: name(rows.place.topic)?,
                        partition: rows.place.partition,
                        offset: rows.place.offset,
                        record_index: rows.place.record_index,
                    },
                    event_time_us: rows.event_time_us,
                    language: name(known.language),
                    is_forward: rows.event_time_us >= selected.forward_from_us,
                    count: *count,
                    feedback,
                    sources: Vec::new(),
                })
            }));
        }
    }
    Ok(parts)
}
