//! Erasure: a subject's rows leave every table and every round, and do not come back.
//!
//! The order lets no writer bring a row back and no crash hide one. First the subject goes onto the list of suppressions
//! and the tables that ingestion writes are fenced, so that nothing checked against the old list lands any more. Then the
//! rows leave `queries`, which tells whose prompts they were; with these the dead letters, the rounds (a running one is
//! stopped) and the sampled answers follow. Removed files are deleted at once: an erasure beats time travel, and readers
//! of older versions fail. Every step may be done again, so a killed erasure is finished by running it again.
//!
//! Where several daemons read one log ([`followed`]), the one that keeps it erases there and the others follow.
//!
//! What stays, on purpose: hashes, scores and decisions (`splits`, `gate_usage`, `trials`, `gate_steps`, `promotions`), so
//! that no gate prompt is spent twice; and adapters, which the receipt lists for the operator to judge.

mod followed;
mod receipt;

use std::collections::{BTreeSet, HashSet};

use arrow::array::{Array, ArrayRef, AsArray, RecordBatch};
use arrow::datatypes::{Int32Type, Int64Type};
use chrono::Utc;
use serde::Deserialize;
use sha2::{Digest, Sha256};

pub use self::followed::Followed;
pub use self::receipt::{InTable, Plan, Receipt, Subject};
use crate::crash::{self, Point};
use crate::durable::FileError;
use crate::ingest::keyed_hash;
use crate::registry::{Registry, RegistryError};
use crate::round::{self, Paths, RoundError};
use crate::table::{ERASURES, Found, Hunt, Key, Name, Selection, Suppressions, TableError, Tables, TxnStep};

/// What is kept of each row of `queries` that goes, until the erasure is over.
const TOLD: [&str; 5] = ["topic", "partition", "offset", "record_index", "prompt_hash"];

/// How often the fence is moved again after another erasure moved it at the same time.
const ATTEMPTS: u32 = 20;

/// Why rows could not be erased.
#[derive(Debug, thiserror::Error)]
pub enum EraseError {
    #[error(
        "end users are stored as hashes under ingest.user_key, and there is no key: set the one the rows were written \
         with; rows stored without one name no user, so erase those by --request-id or --where"
    )]
    NoUserKey,
    #[error("table {table} was fenced {attempts} times in a row by other erasures: run this again")]
    Contended { table: String, attempts: u32 },
    #[error(
        "state.log is another daemon's log: erase with that one's config; this daemon follows at its next maintenance, or at \
         once by `taod table erase --resume`"
    )]
    OthersLog,
    #[error("another erasure is running here ({lock} is locked): wait for its end, then run this again")]
    Busy { lock: String },
    #[error("the erasure begun as {plan} cannot be finished: {source}; to give it up remove that file")]
    Unfinished { plan: String, source: Box<EraseError> },
    #[error(transparent)]
    Table(#[from] TableError),
    #[error(transparent)]
    Round(Box<RoundError>),
    #[error(transparent)]
    Registry(#[from] RegistryError),
    #[error(transparent)]
    File(#[from] FileError),
}

impl From<RoundError> for EraseError {
    fn from(error: RoundError) -> Self {
        EraseError::Round(Box::new(error))
    }
}

/// Where rows are erased, and under which key their users are hashed.
pub struct Erasure {
    pub tables: Tables,
    pub paths: Paths,
    pub user_key: Option<Vec<u8>>,
}

impl Erasure {
    /// Counts what an erasure would take; changes nothing.
    pub async fn dry_run(&self, subject: &Subject) -> Result<Receipt, EraseError> {
        let mut receipt = Receipt::begin(subject, self.user_key.as_deref());
        let (mut prompts, mut records) = (HashSet::new(), HashSet::new());
        for name in [Name::Queries, Name::DeadLetters, Name::Candidates] {
            if name == Name::Candidates {
                prompts.extend(round::erase::made(&self.paths, &self.tables, &prompts).await?);
            }
            let Some(selection) = self.selection(name, subject, &prompts, &records)? else { continue };
            if !self.tables.exists(name).await? {
                continue;
            }
            let mut table = self.tables.open_one(name).await?;
            let told: &[&'static str] = if name == Name::Queries { &TOLD } else { &[] };
            let mut hunt = Hunt::begin(&mut table, &selection, told).await?;
            while let Some(found) = hunt.next().await? {
                receipt.of(name).rows += found.count;
                note(&found, &mut prompts, &mut records);
            }
        }
        receipt.rounds = round::erase::find(&self.paths, &prompts)?;
        self.follow(&mut receipt, &prompts).await?;
        Ok(receipt)
    }

    /// Erases a subject's rows, or finishes an erasure of the same subject that was interrupted.
    pub async fn run(&self, subject: Subject) -> Result<Receipt, EraseError> {
        // Before anything is written down: what can never be done must not be taken up again at every maintenance.
        self.validate(&subject).await?;
        let _alone = receipt::lock(&self.paths.erasures())?;
        self.carry_out(subject).await
    }

    /// Refuses what cannot be erased, whatever the rows are.
    async fn validate(&self, subject: &Subject) -> Result<(), EraseError> {
        if !self.tables.keeps(Name::Queries) {
            return Err(EraseError::OthersLog);
        }
        self.keys(subject)?;
        self.selection(Name::Queries, subject, &HashSet::new(), &HashSet::new())?;
        for name in [Name::Queries, Name::DeadLetters, Name::Candidates] {
            if self.tables.exists(name).await? {
                self.tables.open_one(name).await?.refuse_append_only().await?;
            }
        }
        Ok(())
    }

    async fn carry_out(&self, subject: Subject) -> Result<Receipt, EraseError> {
        let mut plan = Plan::begin(&self.paths.erasures(), subject, self.user_key.as_deref())?;
        plan.receipt.users_unknown = self.users_unknown(&plan.subject).await?;
        self.suppress(self.keys(&plan.subject)?, &mut plan).await?;
        crash::point(Point::DuringErasure);
        self.take_from(Name::Queries, &mut plan).await?;
        self.tell_readers(&plan).await?;
        self.take_from(Name::DeadLetters, &mut plan).await?;
        let rounds = round::erase::erase(&self.paths, &self.tables, &plan.prompts, &plan.receipt.id).await?;
        plan.receipt.rounds.extend(rounds.rounds);
        plan.receipt.round_lines += rounds.lines;
        plan.prompts.extend(rounds.made);
        plan.receipt.stopped_round = rounds.stopped.or(plan.receipt.stopped_round.take());
        plan.save()?;
        self.take_from(Name::Candidates, &mut plan).await?;
        for name in [Name::Queries, Name::DeadLetters, Name::Candidates] {
            self.delete_remains(name, &mut plan).await?;
        }
        let prompts = std::mem::take(&mut plan.prompts);
        self.follow(&mut plan.receipt, &prompts).await?;
        plan.prompts = prompts;
        Ok(plan.finish()?)
    }

    /// Finishes every erasure that was interrupted, and follows those of a log that another daemon keeps. One that fails leaves the others their turn; the first failure is
    /// returned at the end.
    pub async fn resume(&self) -> Result<Vec<Receipt>, EraseError> {
        self.follow_keeper().await?;
        let folder = self.paths.erasures();
        if !folder.exists() {
            return Ok(Vec::new());
        }
        let _alone = receipt::lock(&folder)?;
        let (mut receipts, mut failed) = (Vec::new(), None);
        for (plan, subject) in Plan::left(&folder)? {
            match self.carry_out(subject).await {
                Ok(receipt) => receipts.push(receipt),
                Err(source) => {
                    let plan = plan.display().to_string();
                    failed.get_or_insert(EraseError::Unfinished { plan, source: Box::new(source) });
                }
            }
        }
        failed.map_or(Ok(receipts), Err)
    }

    /// Takes the subject's rows out of one table and deletes the files that held them.
    async fn take_from(&self, name: Name, plan: &mut Plan) -> Result<(), EraseError> {
        let selection = self.selection(name, &plan.subject, &plan.prompts, &plan.records)?;
        let Some(selection) = selection else { return Ok(()) };
        if !self.tables.exists(name).await? {
            return Ok(());
        }
        let told = match name {
            Name::Queries => &TOLD[..],
            Name::DeadLetters => &TOLD[..4],
            _ => &[],
        };
        let mut table = self.tables.open_one(name).await?;
        let mut hunt = Hunt::begin(&mut table, &selection, told).await?;
        let mut deleted = Vec::new();
        while let Some(found) = hunt.next().await? {
            if name == Name::Queries {
                // Known before the rows are gone: after a crash nobody could tell whose prompts they were.
                note(&found, &mut plan.prompts, &mut plan.records);
                plan.save()?;
            }
            if name == Name::DeadLetters || matches!(plan.subject, Subject::Where(_)) {
                // These rows have neither user nor request to be known by when they are read again.
                let keys = found.rows.iter().flat_map(places).map(|(topic, p, o, i)| Key::record(&topic, p, o, i));
                let keys: Vec<Key> = keys.collect();
                self.suppress(keys, plan).await?;
            }
            let taken = hunt.take(found).await?;
            let Some(version) = taken.version else { continue };
            let counts = plan.receipt.of(name);
            counts.rows += taken.rows;
            counts.files_removed += taken.gone.len() as u64;
            counts.files_rewritten += taken.rewritten;
            counts.first_version.get_or_insert(version);
            counts.last_version = Some(version);
            plan.save()?;
            deleted.extend(taken.gone);
        }
        drop(hunt);
        Ok(table.delete_files(&deleted).await?)
    }

    /// Deletes files that no longer belong to a table but still hold the subject's rows.
    async fn delete_remains(&self, name: Name, plan: &mut Plan) -> Result<(), EraseError> {
        let selection = self.selection(name, &plan.subject, &plan.prompts, &plan.records)?;
        let Some(selection) = selection else { return Ok(()) };
        if self.tables.exists(name).await? {
            let mut table = self.tables.open_one(name).await?;
            // A minute for clocks that differ.
            let before = plan.receipt.started - chrono::Duration::minutes(1);
            plan.receipt.of(name).remains_deleted += table.delete_remains(&selection, before).await?;
        }
        Ok(())
    }

    /// Puts keys on the list of suppressions, then fences whoever read the list before.
    async fn suppress(&self, keys: Vec<Key>, plan: &mut Plan) -> Result<(), EraseError> {
        plan.receipt.suppressed += Suppressions::add(&self.tables, keys.into_iter(), &plan.receipt.id).await? as u64;
        for name in [Name::Queries, Name::DeadLetters] {
            let mut table = self.tables.open_one(name).await?;
            let mut attempt = 0;
            loop {
                let expect = table.txn(ERASURES).await?;
                let step = TxnStep { app_id: ERASURES.to_owned(), expect, set: expect.unwrap_or(0) + 1 };
                match table.append(&[], &[step]).await {
                    Ok(_) => break,
                    Err(error) if error.is_restart() && attempt < ATTEMPTS => attempt += 1,
                    Err(TableError::Fenced { table, .. }) => {
                        return Err(EraseError::Contended { table, attempts: ATTEMPTS });
                    }
                    Err(error) => return Err(error.into()),
                }
            }
        }
        Ok(())
    }

    fn user_hash(&self, user: &str) -> Result<String, EraseError> {
        self.user_key.as_deref().and_then(|key| keyed_hash(key, user)).ok_or(EraseError::NoUserKey)
    }

    fn keys(&self, subject: &Subject) -> Result<Vec<Key>, EraseError> {
        Ok(match subject {
            Subject::User(user) => vec![Key::user(&self.user_hash(user)?)],
            Subject::Requests(ids) => ids.iter().map(|id| Key::request(id)).collect(),
            Subject::Where(_) => Vec::new(),
        })
    }

    /// Returns which rows of a table are the subject's; nothing where none can be.
    fn selection(
        &self,
        name: Name,
        subject: &Subject,
        prompts: &HashSet<String>,
        records: &HashSet<(String, i32, i64)>,
    ) -> Result<Option<Selection>, EraseError> {
        Ok(match (name, subject) {
            (Name::Queries, Subject::User(user)) => {
                Some(Selection::OneOf { column: "user_hash", values: HashSet::from([self.user_hash(user)?]) })
            }
            (Name::Queries, Subject::Requests(ids)) => {
                Some(Selection::OneOf { column: "request_id", values: ids.iter().cloned().collect() })
            }
            (Name::Queries, Subject::Where(sql)) => Some(Selection::parse(Name::Queries.spec(), sql)?),
            (Name::DeadLetters, _) => {
                // A record that held several calls stands in a dead letter whole.
                let mut any = vec![Selection::Records(records.clone())];
                let needles = subject.needles();
                if !needles.is_empty() {
                    let columns = vec!["key", "headers", "payload", "message"];
                    any.push(Selection::Containing { columns, needles });
                }
                Some(Selection::Any(any))
            }
            (Name::Candidates, _) if !prompts.is_empty() => {
                Some(Selection::OneOf { column: "prompt_hash", values: prompts.clone() })
            }
            _ => None,
        })
    }

    /// Counts the gate prompts concerned and lists the adapters of the rounds concerned.
    async fn follow(&self, receipt: &mut Receipt, prompts: &HashSet<String>) -> Result<(), EraseError> {
        #[derive(Deserialize)]
        struct Split {
            prompt_hash: String,
            cluster: String,
        }
        #[derive(Deserialize)]
        struct Used {
            cluster: String,
        }
        if !prompts.is_empty() && self.tables.exists(Name::Splits).await? && self.tables.exists(Name::GateUsage).await?
        {
            let splits: Vec<Split> = self.tables.open_one(Name::Splits).await?.rows(None).await?;
            let ours = splits.into_iter().filter(|split| prompts.contains(&split.prompt_hash));
            let clusters: HashSet<String> = ours.map(|split| split.cluster).collect();
            let used: Vec<Used> = self.tables.open_one(Name::GateUsage).await?.rows(None).await?;
            receipt.gate_clusters_used = used.iter().filter(|used| clusters.contains(&used.cluster)).count() as u64;
        }
        let registry = Registry::records(&self.paths.registry())?;
        let trained = registry.list()?.into_iter().filter(|listed| {
            listed.manifest.lineage.round.as_ref().is_some_and(|round| receipt.rounds.contains(round))
        });
        receipt.adapters = trained.map(|listed| listed.version).collect::<BTreeSet<_>>();
        Ok(())
    }

    /// Counts rows that name no user: an erasure by user cannot know whether they are the subject's.
    async fn users_unknown(&self, subject: &Subject) -> Result<u64, EraseError> {
        #[derive(Deserialize)]
        struct Count {
            n: u64,
        }
        if !matches!(subject, Subject::User(_)) || !self.tables.exists(Name::Queries).await? {
            return Ok(0);
        }
        let queries = self.tables.open_one(Name::Queries).await?;
        let counts: Vec<Count> = queries.select("select count(*) as n from t where user_hash is null").await?;
        Ok(counts.first().map_or(0, |count| count.n))
    }
}

/// Takes down whose prompts and which records the rows were.
fn note(found: &Found, prompts: &mut HashSet<String>, records: &mut HashSet<(String, i32, i64)>) {
    for batch in &found.rows {
        records.extend(places(batch).into_iter().map(|(topic, partition, offset, _)| (topic, partition, offset)));
        if let Some(hashes) = batch.column_by_name("prompt_hash") {
            prompts.extend(hashes.as_string::<i32>().iter().flatten().map(str::to_owned));
        }
    }
}

/// Returns the coordinates of rows.
fn places(batch: &RecordBatch) -> Vec<(String, i32, i64, i32)> {
    let column = |name: &str| -> Option<&ArrayRef> { batch.column_by_name(name) };
    let (Some(topic), Some(partition), Some(offset), Some(index)) =
        (column("topic"), column("partition"), column("offset"), column("record_index"))
    else {
        return Vec::new();
    };
    let (topic, offset) = (topic.as_string::<i32>(), offset.as_primitive::<Int64Type>());
    let (partition, index) = (partition.as_primitive::<Int32Type>(), index.as_primitive::<Int32Type>());
    (0..topic.len()).map(|i| (topic.value(i).to_owned(), partition.value(i), offset.value(i), index.value(i))).collect()
}

/// Returns the hash of what was asked for, keyed where there is a key, so that it cannot be guessed back; and unlike the
/// hash in the tables, so that a receipt leads to no row.
fn hash_of(text: &str, key: Option<&[u8]>) -> String {
    let text = format!("erasure:{text}");
    let plain = || hex::encode(Sha256::digest(text.as_bytes()));
    key.and_then(|key| keyed_hash(key, &text)).unwrap_or_else(plain)
}

fn now() -> chrono::DateTime<Utc> {
    Utc::now()
}
