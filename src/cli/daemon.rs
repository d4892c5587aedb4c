//! `taod run`, `taod round` and `taod demo`: the loop as a whole.

use clap::Args;

use crate::round::Control;

/// Run the daemon: ingest, start rounds on schedule, promote, answer on the admin page.
#[derive(Debug, Args)]
pub struct Run {}

/// Run one round as the scheduler does. Exit code 0 when it promoted or had nothing to do, 2 when the gate refused, 3
/// when the trial is still open.
#[derive(Debug, Args)]
#[group(id = "way", required = true, multiple = false, args = ["once", "resume", "dry_run"])]
pub struct Round {
    /// Go on with the unfinished round, or begin a new one.
    #[arg(long)]
    pub once: bool,
    /// Only go on with the unfinished round; an error where there is none.
    #[arg(long)]
    pub resume: bool,
    /// Say what a round would do now, and do nothing.
    #[arg(long)]
    pub dry_run: bool,
    /// Go on with a round that was begun under another number of threads, other settings or another version.
    #[arg(long)]
    pub allow_drift: bool,
    /// Print one JSON document.
    #[arg(long)]
    pub json: bool,
}

/// The round's child process; the daemon and `taod round` start it.
#[derive(Debug, Args)]
pub struct RoundWorker {
    #[arg(long, value_enum)]
    pub control: Option<Control>,
    #[arg(long)]
    pub resume: bool,
    #[arg(long)]
    pub allow_drift: bool,
}

/// Show the whole loop on embedded parts: a broker, an endpoint with a real model, real traffic, a round, the gate, a
/// promotion. Exit code 0 when the adapter was promoted, 2 when the gate refused.
#[derive(Debug, Args)]
pub struct Demo {
    /// Changes every draw.
    #[arg(long, value_name = "S")]
    pub seed: Option<u64>,
    /// A deliberate fault; each must end in a refusal.
    #[arg(long, value_enum)]
    pub control: Option<Control>,
    /// Print one JSON document at the end.
    #[arg(long)]
    pub json: bool,
}
