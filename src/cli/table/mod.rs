//! `taod table`: the Delta tables in the hands of an operator.

mod maintain;

use clap::Subcommand;

use super::{Exit, Global};

pub(super) use maintain::{Worker, run_worker};

/// What can be done with the tables.
#[derive(Debug, Subcommand)]
pub enum Command {
    Maintain(maintain::Maintain),
}

pub(super) fn run(global: &Global, command: &Command) -> anyhow::Result<Exit> {
    match command {
        Command::Maintain(args) => maintain::run(global, args),
    }
}
