//! Reading the tables: batch by batch, never whole.

use std::collections::{BTreeMap, HashMap};

use rayon::prelude::*;

use crate::record::Coordinates;
use crate::table::{Suppressions, Table};

use super::burst::Bursts;
use super::catalogue::{Catalogue, Decision, Facts, NONE, bytes_of, id_of};
use super::census::{About, Census, Place};
use super::columns::{Columns, LIGHT};
use super::feedback::{Joined, Said};
use super::index::{Index, Record};
use super::place::Text;
use super::sketch::{Sketch, WIDTH};
use super::text::Templates;
use super::workload::Workloads;
use super::{DatasetError, Settings, Split, secrets};

/// The reason under which rows are counted that an erasure has yet to take out.
const ERASED: &str = "erased";

/// What is read of every decision.
const CATALOGUE: &str = r#"select prompt_hash, "cluster", "split", "number", twin, chars, fault, masked, "language", has_tools,
    "system", scan from t"#;

/// Offsets between two wanted rows from which they are asked for as two ranges.
const GAP: i64 = 20_000;

/// Most ranges of one question.
const MOST_RANGES: usize = 200;

/// Records that are added to the index at once.
const BATCH: usize = 100_000;

/// Reads every decision ever made. Returns how many numbers were given.
pub(super) async fn catalogue(splits: &Table, rows: usize) -> Result<(Catalogue, u32), DatasetError> {
    let mut catalogue = Catalogue::default();
    // What the log can add at most; memory that is not touched costs nothing.
    catalogue.reserve(rows);
    let mut numbers = 0;
    let mut scan = splits.scan(CATALOGUE).await?;
    while let Some(batch) = scan.next().await? {
        let columns = Columns::of("splits", &batch)?;
        for i in 0..batch.num_rows() {
            // A row that taod has not written decides nothing.
            let hashes = (bytes_of(columns.text("prompt_hash", i)?), bytes_of(columns.text("cluster", i)?));
            let (Some(hash), Some(cluster)) = hashes else { continue };
            let (own, cluster) = (catalogue.entry(hash), catalogue.entry(cluster));
            let twin = columns.optional("twin", i).and_then(bytes_of).map(|twin| catalogue.entry(twin));
            let split = Split::named(columns.text("split", i)?);
            let hash_of = |entry: u32| catalogue.entries[entry as usize].hash;
            let first = match catalogue.entries[own as usize].decision {
                // A prompt with two decisions that differ, which no single writer makes, is used by none.
                Some(known) => Decision {
                    cluster: if hash_of(known.cluster) <= hash_of(cluster) { known.cluster } else { cluster },
                    split: if known.split == split { split } else { Split::None },
                },
                None => Decision { cluster, split },
            };
            catalogue.entries[own as usize].decision = Some(first);
            let Some(number) = columns.optional_number("number", i) else { continue };
            numbers = numbers.max(number as u32 + 1);
            catalogue.entries[own as usize].twin = twin.unwrap_or(own);
            if columns.optional_number("scan", i) == Some(secrets::VERSION) {
                catalogue.keep(own, &facts(&columns, i));
            }
        }
    }
    Ok((catalogue, numbers))
}

fn facts(columns: &Columns, i: usize) -> Facts {
    let text = |name| columns.optional(name, i).map(str::to_owned);
    Facts {
        chars: columns.optional_number("chars", i).unwrap_or(0) as u32,
        fault: text("fault"),
        masked: text("masked"),
        language: text("language"),
        has_tools: columns.flag("has_tools", i).unwrap_or(false),
        system: columns.optional_number("system", i).unwrap_or(0) as u64,
    }
}

/// Brings the index to the state of the table: nothing is to be done where the last round ended well.
pub(super) async fn catch_up(
    index: &mut Index,
    splits: &Table,
    numbers: u32,
    catalogue: &Catalogue,
) -> Result<(), DatasetError> {
    if index.len() > numbers {
        tracing::warn!("the index of prompts is of another table splits and is made anew");
        index.clear()?;
    }
    if index.len() == numbers {
        return Ok(());
    }
    let columns = r#""number", prompt_hash, "split", "context", "text", conversation, "start", tail, sketch"#;
    let sql = format!(r#"select {columns} from t where "number" >= {} order by "number""#, index.len());
    let mut scan = splits.scan(&sql).await?;
    let mut batch: Vec<(Record, bool)> = Vec::new();
    while let Some(rows) = scan.next().await? {
        let columns = Columns::of("splits", &rows)?;
        for i in 0..rows.num_rows() {
            let expected = i64::from(index.len()) + batch.len() as i64;
            let number = columns.number("number", i)?;
            if number != expected {
                let why = format!("holds {number} where {expected} comes next");
                return Err(DatasetError::Column { table: "splits", column: "number".to_owned(), why });
            }
            batch.push(record(&columns, i, catalogue)?);
            if batch.len() == BATCH {
                append(index, &mut batch)?;
            }
        }
    }
    append(index, &mut batch)
}

fn append(index: &mut Index, batch: &mut Vec<(Record, bool)>) -> Result<(), DatasetError> {
    let records: Vec<Record> = batch.iter().map(|(record, _)| *record).collect();
    index.append(&records, |at| batch[at].1)?;
    batch.clear();
    Ok(())
}

fn record(columns: &Columns, i: usize, catalogue: &Catalogue) -> Result<(Record, bool), DatasetError> {
    let hash = |name| Ok::<u64, DatasetError>(columns.number(name, i)? as u64);
    let fault = |why: &str| DatasetError::Column { table: "splits", column: "sketch".to_owned(), why: why.to_owned() };
    let sketch = columns.bytes("sketch", i).and_then(|bytes| <[u8; WIDTH]>::try_from(bytes).ok());
    let prompt = bytes_of(columns.text("prompt_hash", i)?).ok_or_else(|| fault("stands beside no hash"))?;
    let record = Record {
        id: id_of(&prompt),
        context: hash("context")?,
        text: hash("text")?,
        conversation: hash("conversation")?,
        start: hash("start")?,
        tail: hash("tail")?,
        sketch: Sketch(sketch.ok_or_else(|| fault("is no sketch of 256 bytes"))?),
    };
    let decision = catalogue.find(&record.id).and_then(|entry| catalogue.entries[entry as usize].decision);
    Ok((record, decision.is_some_and(|decision| decision.split != Split::None)))
}

/// Reads the lines that are known as templates.
pub(super) async fn templates(table: &Table) -> Result<Templates, DatasetError> {
    let mut templates = Templates::new();
    let mut scan = table.scan(r#"select workload, "line" from t"#).await?;
    while let Some(batch) = scan.next().await? {
        let columns = Columns::of("templates", &batch)?;
        for i in 0..batch.num_rows() {
            let line = columns.number("line", i)? as u64;
            templates.entry(columns.text("workload", i)?.to_owned()).or_default().insert(line);
        }
    }
    Ok(templates)
}

/// Passes over the light columns of all rows.
pub(super) async fn census(
    queries: &Table,
    erased: &Suppressions,
    catalogue: &mut Catalogue,
    workloads: &Workloads,
    settings: &Settings,
) -> Result<(Census, super::feedback::Found, Bursts), DatasetError> {
    let bursts = Bursts::find(queries, settings).await?;
    let about = About { newest_day: newest_day(queries).await?, settings, workloads, bursts: &bursts };
    let mut joined = Joined::new(said(queries, erased).await?);
    let mut census = Census::default();
    let mut scan = queries.scan(&question(workloads, settings)).await?;
    while let Some(batch) = scan.next().await? {
        let columns = Columns::of("queries", &batch)?;
        for i in 0..batch.num_rows() {
            let row = columns.row(i)?;
            if erased.hides_call(row.user_hash, row.request_id) {
                census.rows += 1;
                census.excluded.add(ERASED, 1);
                continue;
            }
            census.add(&row, &about, catalogue, &mut joined);
        }
    }
    let found = joined.finish();
    census.excluded.add("feedback", found.matched);
    census.excluded.add("feedback_unmatched", found.unmatched);
    Ok((census, found, bursts))
}

/// Returns the question for all rows. The filter was checked to be one expression over the columns; what it says of a row
/// where a column is null counts as no.
fn question(workloads: &Workloads, settings: &Settings) -> String {
    let extra = if workloads.read_extra() { ", extra" } else { "" };
    let headers = if workloads.read_headers() { ", headers" } else { "" };
    let wanted = match settings.filter.trim() {
        "" => String::new(),
        filter => format!(", coalesce((\n{filter}\n), false) as is_wanted"),
    };
    format!("select {LIGHT}{extra}{headers}{wanted} from t")
}

async fn newest_day(queries: &Table) -> Result<i32, DatasetError> {
    let mut scan = queries.scan("select max(ingest_date) as newest from t").await?;
    let mut newest = 0;
    while let Some(batch) = scan.next().await? {
        let columns = Columns::of("queries", &batch)?;
        for i in 0..batch.num_rows() {
            newest = newest.max(columns.optional_number("newest", i).unwrap_or(0) as i32);
        }
    }
    Ok(newest)
}

async fn said(queries: &Table, erased: &Suppressions) -> Result<Vec<Said>, DatasetError> {
    let sql = format!("select {LIGHT}, feedback from t where feedback is not null or kind = 'feedback'");
    let mut scan = queries.scan(&sql).await?;
    let mut said = Vec::new();
    while let Some(batch) = scan.next().await? {
        let columns = Columns::of("queries", &batch)?;
        for i in 0..batch.num_rows() {
            let row = columns.row(i)?;
            if !erased.hides_call(row.user_hash, row.request_id) {
                said.push(Said::of(&row, columns.optional("feedback", i).unwrap_or("null")));
            }
        }
    }
    Ok(said)
}

/// Reads the texts of prompts and tells `each` of them, several at once and in no order. Only the files and the row groups
/// in which the rows lie are read.
pub(super) async fn texts<T: Send>(
    queries: &Table,
    wanted: &[u32],
    catalogue: &Catalogue,
    each: impl Fn(u32, Text<'_>) -> T + Sync,
) -> Result<Vec<T>, DatasetError> {
    let mut places: HashMap<Place, u32> = HashMap::with_capacity(wanted.len());
    for &entry in wanted {
        if let Some(rows) = &catalogue.entries[entry as usize].rows {
            places.insert(rows.place, entry);
        }
    }
    if places.is_empty() {
        return Ok(Vec::new());
    }
    let condition = ranges(places.keys(), catalogue);
    let columns = r#"topic, partition, "offset", record_index, messages, tools"#;
    let mut scan = queries.scan(&format!("select {columns} from t where {condition}")).await?;
    let mut found = Vec::with_capacity(places.len());
    while let Some(batch) = scan.next().await? {
        let columns = Columns::of("queries", &batch)?;
        let mut hits: Vec<(u32, usize)> = Vec::new();
        for i in 0..batch.num_rows() {
            let Some(place) = place(&columns, i, catalogue)? else { continue };
            hits.extend(places.get(&place).map(|entry| (*entry, i)));
        }
        let text = |i| Text {
            messages: columns.optional("messages", i).unwrap_or_default(),
            tools: columns.optional("tools", i),
        };
        found.par_extend(hits.into_par_iter().map(|(entry, i)| each(entry, text(i))));
    }
    Ok(found)
}

/// Reads what was answered at some places; those where nothing was are not among them.
pub(super) async fn answers(
    queries: &Table,
    places: impl Iterator<Item = &Coordinates>,
    catalogue: &Catalogue,
) -> Result<HashMap<Coordinates, String>, DatasetError> {
    let known = |at: &Coordinates| {
        let topic = catalogue.words.known(&at.topic)?;
        Some(Place { topic, partition: at.partition, offset: at.offset, record_index: at.record_index })
    };
    let wanted: HashMap<Place, Coordinates> = places.filter_map(|at| Some((known(at)?, at.clone()))).collect();
    let mut found = HashMap::new();
    if wanted.is_empty() {
        return Ok(found);
    }
    let columns = r#"topic, partition, "offset", record_index, response"#;
    let condition = ranges(wanted.keys(), catalogue);
    let mut scan =
        queries.scan(&format!("select {columns} from t where response is not null and ({condition})")).await?;
    while let Some(batch) = scan.next().await? {
        let columns = Columns::of("queries", &batch)?;
        for i in 0..batch.num_rows() {
            let Some(place) = place(&columns, i, catalogue)? else { continue };
            if let Some(at) = wanted.get(&place) {
                found.insert(at.clone(), columns.text("response", i)?.to_owned());
            }
        }
    }
    Ok(found)
}

/// Reads where a row stands; nothing where its topic is one that no prompt is of.
fn place(columns: &Columns, i: usize, catalogue: &Catalogue) -> Result<Option<Place>, DatasetError> {
    let Some(topic) = catalogue.words.known(columns.text("topic", i)?) else { return Ok(None) };
    let (partition, record_index) = (columns.narrow("partition", i)?, columns.narrow("record_index", i)?);
    Ok(Some(Place { topic, partition, offset: columns.number("offset", i)?, record_index }))
}

/// Returns a condition that holds for the rows at some places and for few others.
fn ranges<'a>(places: impl Iterator<Item = &'a Place>, catalogue: &Catalogue) -> String {
    let mut by_partition: BTreeMap<(u32, i32), Vec<i64>> = BTreeMap::new();
    for place in places {
        by_partition.entry((place.topic, place.partition)).or_default().push(place.offset);
    }
    let most = (MOST_RANGES / by_partition.len().max(1)).max(1);
    let mut conditions = Vec::new();
    for ((topic, partition), mut offsets) in by_partition {
        offsets.sort_unstable();
        let mut ranges: Vec<&[i64]> = offsets.chunk_by(|a, b| b - a < GAP).collect();
        if ranges.len() > most {
            ranges = vec![&offsets];
        }
        let topic = catalogue.words.name(topic).unwrap_or_default().replace('\'', "''");
        for range in ranges {
            let (first, last) = (range[0], range[range.len() - 1]);
            conditions.push(format!(
                r#"(topic = '{topic}' and partition = {partition} and "offset" between {first} and {last})"#
            ));
        }
    }
    conditions.join(" or ")
}

/// Returns the entries that have rows, in the order of the log.
pub(super) fn in_order(catalogue: &Catalogue, which: impl Fn(u32) -> bool) -> Vec<u32> {
    let entries = catalogue.entries.iter().enumerate().filter(|(_, entry)| entry.rows.is_some());
    let mut order: Vec<u32> = entries.map(|(at, _)| at as u32).filter(|at| which(*at)).collect();
    let ranks = catalogue.words.ranks();
    order.par_sort_unstable_by_key(|entry| {
        let place = catalogue.entries[*entry as usize].rows.as_ref().map(|rows| rows.place);
        place.map(|p| (ranks.get(p.topic as usize).copied().unwrap_or(NONE), p.partition, p.offset, p.record_index))
    });
    order
}
