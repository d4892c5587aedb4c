//! `taod table erase`: a subject's rows leave every table and every round.

use std::collections::BTreeSet;

use clap::{ArgGroup, Args};

use super::{Exit, Global};
use crate::cli::block_on;
use crate::cli::lines::Output;
use crate::erasure::{Erasure, Receipt, Subject};
use crate::round::Paths;

/// Remove a subject's rows from every table and every round, for good; a receipt stays in the state folder.
///
/// Files that held them are deleted at once: readers of older versions of the tables fail. A killed erasure is finished by
/// the same command, or by --resume. What was erased is not stored again, also when the topic is read anew.
#[derive(Debug, Args)]
#[command(group = ArgGroup::new("whose").required(true).args(["user", "request_id", "condition", "resume"]))]
pub struct Erase {
    /// The rows of an end user, named as in the log. Needs ingest.user_key, under which users are stored.
    #[arg(long, value_name = "ID")]
    user: Option<String>,
    /// The rows of these requests.
    #[arg(long, value_name = "ID", num_args = 1..)]
    request_id: Vec<String>,
    /// The rows of `queries` for which a condition holds, in SQL over its columns, such as `tenant = 'acme'`.
    #[arg(long = "where", value_name = "SQL")]
    condition: Option<String>,
    /// Finish what was interrupted.
    #[arg(long)]
    resume: bool,
    /// Only count; change nothing.
    #[arg(long, conflicts_with = "resume")]
    dry_run: bool,
    /// Print the receipts as JSON, one a line.
    #[arg(long)]
    json: bool,
}

impl Erase {
    fn subject(&self) -> Option<Subject> {
        let requests = (!self.request_id.is_empty()).then(|| BTreeSet::from_iter(self.request_id.iter().cloned()));
        let user = self.user.clone().map(Subject::User);
        user.or_else(|| requests.map(Subject::Requests)).or_else(|| self.condition.clone().map(Subject::Where))
    }

    /// Runs it.
    pub(super) fn run(&self, global: &Global) -> anyhow::Result<Exit> {
        let config = global.load()?.config;
        let (tables, paths) = (config.state.open_tables()?, Paths::new(&config.state.dir));
        let erasure = Erasure { tables, paths, user_key: config.ingest.user_key()? };
        let receipts = block_on(async {
            match self.subject() {
                None => erasure.resume().await,
                Some(subject) if self.dry_run => Ok(vec![erasure.dry_run(&subject).await?]),
                Some(subject) => Ok(vec![erasure.run(subject).await?]),
            }
        })??;
        let mut out = Output::stdout();
        for receipt in &receipts {
            match self.json {
                true => out.line(receipt)?,
                false => out.text(&told(receipt, self.dry_run))?,
            }
        }
        out.flush()?;
        Ok(Exit::Done)
    }
}

fn told(receipt: &Receipt, dry_run: bool) -> String {
    let mut text = match dry_run {
        true => "nothing is changed; an erasure would take:\n".to_owned(),
        false => format!("erasure {}:\n", receipt.id),
    };
    for (table, counts) in &receipt.tables {
        text += &format!(
            "  {table}: {} rows; {} files removed, {} deleted that were left over\n",
            counts.rows, counts.files_removed, counts.remains_deleted
        );
    }
    let list = |names: &BTreeSet<String>| names.iter().cloned().collect::<Vec<_>>().join(", ");
    if !receipt.rounds.is_empty() {
        text += &format!("  rounds: {}; {} lines of their files\n", list(&receipt.rounds), receipt.round_lines);
    }
    if let Some(round) = &receipt.stopped_round {
        text += &format!("  {round} was running on these rows and was stopped\n");
    }
    if !receipt.adapters.is_empty() {
        let adapters = list(&receipt.adapters);
        text += &format!("  adapters trained on these rows: {adapters}; `taod adapters quarantine` withdraws them\n");
    }
    if receipt.users_unknown > 0 {
        let n = receipt.users_unknown;
        text += &format!(
            "  {n} rows name no user (stored without ingest.user_key, or the log named none): find them by --where\n"
        );
    }
    text
}
