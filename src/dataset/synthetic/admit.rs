//! Admission: which of the drafts are new, and their place among all prompts.
//!
//! A draft is compared with everything that is known, of every split, by the same sketches and index as a logged prompt, and
//! looked through for the same secrets. What is kept gets a row in `splits` with its sources in `detail`, under the position
//! that every writer of `splits` moves: a kill leaves either no row or all, and the files that belong to them.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::Path;

use serde::Deserialize;
use serde_json::json;

use super::{Draft, Drafts, MANIFEST, Made, Manifest, Need, PROMPTS};
use crate::crash;
use crate::dataset::catalogue::{Catalogue, Decision, bytes_of, id_of};
use crate::dataset::freeze::{ATTEMPTS, Freezing, next};
use crate::dataset::index::{Index, Record};
use crate::dataset::place::{self, Prepared};
use crate::dataset::text::Boilerplate;
use crate::dataset::workload::Workloads;
use crate::dataset::{DatasetError, Prompt, Split, SplitRow, read};
use crate::durable;
use crate::table::{Name, Table, Tables, TxnStep, batch_of};

/// The manifest as it will be, written before the rows of `splits` are.
const PENDING: &str = "pending.json";

/// What of the drafts is kept.
#[derive(Debug)]
pub struct Admission {
    pub prompts: Vec<Prompt>,
    pub workloads: BTreeMap<String, Made>,
    rows: Vec<SplitRow>,
    records: Vec<Record>,
}

impl Admission {
    /// Returns what is still wanted.
    pub fn missing(&self) -> Vec<Need> {
        let need = |(workload, made): (&String, &Made)| {
            let wanted = (made.wanted - made.made) as usize;
            (wanted > 0).then(|| Need { workload: workload.clone(), logged: made.logged as usize, wanted })
        };
        self.workloads.iter().filter_map(need).collect()
    }
}

/// All that drafts are compared with.
struct Known {
    splits: Table,
    catalogue: Catalogue,
    index: Index,
    boilerplate: Boilerplate,
}

impl Known {
    async fn read(tables: &Tables, freezing: Freezing<'_>, drafts: usize) -> Result<Self, DatasetError> {
        let splits = tables.open_one(Name::Splits).await?;
        let templates = tables.open_one(Name::Templates).await?;
        let workloads = Workloads::of(freezing.workloads);
        let (catalogue, numbers) = read::catalogue(&splits, drafts).await?;
        let mut index = Index::open(freezing.index, freezing.settings)?;
        read::catch_up(&mut index, &splits, numbers, &catalogue).await?;
        let house_rules = workloads.iter().map(|w| (w.name.as_str(), w.house_rules.as_str()));
        let boilerplate = Boilerplate::new(read::templates(&templates).await?, house_rules);
        Ok(Known { splits, catalogue, index, boilerplate })
    }

    /// Returns what is compared of each draft.
    fn prepare(&mut self, drafts: &[&Prompt]) -> Vec<Prepared> {
        let prepare = |prompt: &&Prompt| {
            let hash = bytes_of(&prompt.prompt_hash).unwrap_or_default();
            let text = (prompt.messages.as_slice(), prompt.tools.as_ref());
            let record = place::record(&hash, prompt.workload.as_deref(), 0, text, &self.boilerplate);
            Prepared { entry: 0, record, facts: place::facts(text.0, text.1) }
        };
        drafts.iter().map(prepare).collect()
    }

    /// Returns why a draft is no prompt, by its text and its source.
    fn fault(&self, prompt: &Prompt, prepared: &Prepared, freezing: Freezing<'_>) -> Option<&'static str> {
        let settings = freezing.settings;
        let facts = &prepared.facts;
        let kinds = facts.masked.as_deref().unwrap_or_default().split(',');
        let source = bytes_of(&prompt.cluster).and_then(|hash| self.catalogue.find(&id_of(&hash)));
        let decision = source.and_then(|entry| self.catalogue.entries[entry as usize].decision);
        if facts.fault.is_some() {
            Some("empty")
        } else if { kinds }.any(|kind| !kind.is_empty() && !settings.allow_kinds.iter().any(|a| a == kind)) {
            Some("secrets")
        } else if facts.chars as usize > settings.max_prompt_chars {
            Some("too_long")
        } else if decision.is_none_or(|decision| decision.split != Split::Train) {
            Some("not_train")
        } else {
            None
        }
    }

    /// Makes the row of a draft that is kept.
    fn row(&mut self, prompt: &Prompt, prepared: &mut Prepared, number: u32, round: &str) -> Option<SplitRow> {
        let cluster = self.catalogue.find(&id_of(&bytes_of(&prompt.cluster)?))?;
        let own = self.catalogue.entry(bytes_of(&prompt.prompt_hash)?);
        self.catalogue.entries[own as usize].decision = Some(Decision { cluster, split: Split::Train });
        prepared.entry = own;
        let detail = json!({ "synthetic": { "sources": prompt.sources } }).to_string();
        Some(SplitRow { detail: Some(detail), ..SplitRow::of(prepared, number, &self.catalogue, round) })
    }
}

/// Decides which drafts are kept, in their order and up to what is wanted; stores nothing.
pub async fn admit(
    tables: &Tables,
    freezing: Freezing<'_>,
    drafts: &[Draft],
    needs: &[Need],
) -> Result<Admission, DatasetError> {
    let known = Known::read(tables, freezing, drafts.len()).await?;
    Ok(decide(known, freezing, drafts, needs)?.0)
}

fn decide(
    mut known: Known,
    freezing: Freezing<'_>,
    drafts: &[Draft],
    needs: &[Need],
) -> Result<(Admission, Known), DatasetError> {
    let made = |need: &Need| Made { logged: need.logged as u64, wanted: need.wanted as u64, ..Made::default() };
    let mut workloads: BTreeMap<String, Made> = needs.iter().map(|need| (need.workload.clone(), made(need))).collect();
    let mut drop = |workload: &str, reason: &str| {
        *workloads.entry(workload.to_owned()).or_default().dropped.entry(reason.to_owned()).or_default() += 1;
    };
    let mut written: Vec<&Prompt> = Vec::new();
    for draft in drafts {
        match draft {
            Draft::Prompt(prompt) => written.push(prompt),
            Draft::Dropped { workload, reason } => drop(workload, reason),
        }
    }
    let mut prepared = known.prepare(&written);
    let records: Vec<Record> = prepared.iter().map(|prepared| prepared.record).collect();
    let found = known.index.find(&records)?;
    let first = known.index.len();
    let mut admission =
        Admission { prompts: Vec::new(), workloads: BTreeMap::new(), rows: Vec::new(), records: Vec::new() };
    let mut is_kept = vec![false; written.len()];
    let mut made: HashMap<&str, usize> = HashMap::new();
    for (at, prompt) in written.iter().enumerate() {
        let workload = prompt.workload.as_deref().unwrap_or_default();
        let wanted = needs.iter().find(|need| need.workload == workload).map_or(0, |need| need.wanted);
        // One that was dropped is no reason to drop the next like it.
        let is_near = found[at].iter().any(|hit| hit.number.checked_sub(first).is_none_or(|own| is_kept[own as usize]));
        let is_known = known.catalogue.find(&prepared[at].record.id).is_some();
        if let Some(reason) = known.fault(prompt, &prepared[at], freezing) {
            drop(workload, reason);
        } else if is_near || is_known {
            drop(workload, "near_duplicate");
        } else if made.get(workload).copied().unwrap_or(0) == wanted {
            drop(workload, "spare");
        } else {
            let number = first + admission.rows.len() as u32;
            let Some(row) = known.row(prompt, &mut prepared[at], number, freezing.round) else { continue };
            is_kept[at] = true;
            *made.entry(workload).or_default() += 1;
            admission.rows.push(row);
            admission.records.push(prepared[at].record);
            let language = prepared[at].facts.language.clone();
            admission.prompts.push(Prompt { language, ..(*prompt).clone() });
        }
    }
    for (workload, made) in made {
        workloads.entry(workload.to_owned()).or_default().made = made as u64;
    }
    Ok((Admission { workloads, ..admission }, known))
}

/// The name under which a round's rows are appended to `splits`.
fn name(round: &str) -> String {
    format!("taod/synthetic/{round}")
}

/// Finishes a stage whose rows had landed when it was interrupted; nothing where it is not that far.
pub async fn resume(tables: &Tables, round: &str, out: &Path) -> Result<Option<Manifest>, DatasetError> {
    if let Some(done) = super::peek(out)? {
        return Ok(Some(done));
    }
    let pending: Manifest = match durable::read_json(&out.join(PENDING)) {
        Err(error) if error.is_not_found() => return Ok(None),
        read => read?,
    };
    if tables.open_one(Name::Splits).await?.txn(&name(round)).await?.is_none() {
        return Ok(None);
    }
    durable::write_json(&out.join(MANIFEST), &pending)?;
    Ok(Some(pending))
}

/// Stores what is kept of the drafts: the prompts in `out`, their rows in `splits`, the manifest last.
pub async fn store(
    tables: &Tables,
    freezing: Freezing<'_>,
    (written, needs, dataset): (&Drafts, &[Need], &str),
    out: &Path,
) -> Result<Manifest, DatasetError> {
    durable::create_folder(out)?;
    for _ in 0..ATTEMPTS {
        if let Some(done) = resume(tables, freezing.round, out).await? {
            return Ok(done);
        }
        let known = Known::read(tables, freezing, written.drafts.len()).await?;
        let (admission, mut known) = decide(known, freezing, &written.drafts, needs)?;
        let path = out.join(PROMPTS);
        durable::write_json_lines(&path, &admission.prompts)?;
        let manifest = Manifest {
            round: freezing.round.to_owned(),
            seed: freezing.seed,
            settings: freezing.settings.synthetic.clone(),
            dataset: dataset.to_owned(),
            prompts: admission.prompts.len() as u64,
            tokens: written.tokens,
            workloads: admission.workloads,
            sha256: durable::sha256_file(&path)?,
        };
        durable::write_json(&out.join(PENDING), &manifest)?;
        crash::at("synthetic-pending");
        if !admission.rows.is_empty() {
            let own = TxnStep { app_id: name(freezing.round), expect: None, set: 1 };
            let step = next(&mut known.splits).await?;
            let batch = batch_of(Name::Splits.spec(), &admission.rows)?;
            match known.splits.append(&[batch], &[step, own]).await {
                Err(error) if error.is_restart() => continue,
                landed => drop(landed?),
            }
            crash::at("synthetic-placed");
            known.index.append(&admission.records, |_| true)?;
        }
        durable::write_json(&out.join(MANIFEST), &manifest)?;
        return Ok(manifest);
    }
    Err(DatasetError::Contended { attempts: ATTEMPTS })
}

/// Returns the prompts that were made from any of these, in any round.
pub async fn children(tables: &Tables, prompts: &HashSet<String>) -> Result<HashSet<String>, DatasetError> {
    #[derive(Deserialize)]
    struct Row {
        prompt_hash: String,
        synthetic: Option<Sources>,
    }
    #[derive(Deserialize)]
    struct Sources {
        sources: Vec<String>,
    }
    if prompts.is_empty() || !tables.exists(Name::Splits).await? {
        return Ok(HashSet::new());
    }
    let splits = tables.open_one(Name::Splits).await?;
    let rows: Vec<Row> = splits.select("select prompt_hash, detail from t where detail is not null").await?;
    let is_child = |row: &Row| {
        let sources = row.synthetic.as_ref().map(|synthetic| &synthetic.sources);
        sources.is_some_and(|sources| sources.iter().any(|source| prompts.contains(source)))
    };
    Ok(rows.into_iter().filter(is_child).map(|row| row.prompt_hash).collect())
}
