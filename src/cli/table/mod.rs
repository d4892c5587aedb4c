//! `taod table`: the Delta tables in the hands of an operator.

mod check;
mod erase;
mod maintain;
mod offsets;

use clap::Subcommand;

use super::{Exit, Global};

pub(super) use maintain::{Worker, run_worker};

/// What can be done with the tables.
#[derive(Debug, Subcommand)]
pub enum Command {
    Check(check::Check),
    Maintain(maintain::Maintain),
    Erase(erase::Erase),
    /// Show or correct how far the tables are in the query log.
    #[command(subcommand)]
    Offsets(offsets::Command),
}

pub(super) fn run(global: &Global, command: &Command) -> anyhow::Result<Exit> {
    match command {
        Command::Check(args) => check::run(global, args),
        Command::Maintain(args) => maintain::run(global, args),
        Command::Erase(args) => args.run(global),
        Command::Offsets(command) => offsets::run(global, command),
    }
}
