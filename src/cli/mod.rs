//! The command line. Every command works alone on files, so that one stage can be tried without the others.
//!
//! Results go to standard output: JSON lines in the order of the input, or with `--json` one document. Progress and logs
//! go to standard error. An error is one line that names the thing, the value and the remedy. Exit codes: 0 done
//! (promoted and skipped too), 1 failed, 2 refused by the gate, 3 the trial is still open, 64 bad usage or config, 75 paused.
//!
//! One file per family of commands, all of one shape: the arguments, then a `run` that calls the stage.

mod adapters;
mod admin;
mod answers;
mod audit;
mod config;
mod daemon;
mod dataset;
mod doctor;
mod engine;
mod estimate;
mod eval;
mod gate;
mod ingest;
mod lines;
mod logs;
mod manual;
mod progress;
mod records;
mod replay;
mod reward;
mod score;
mod serve;
mod signals;
mod simulate;
mod status;
mod table;
mod tune;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

use crate::config::{Config, ConfigError, Loaded};
use crate::round::child;

pub use logs::start as start_logs;
pub use progress::Screen;

/// Tails an LLM endpoint's query log into a Delta table and re-runs TAO on it: sample, score, tune, gate, promote.
#[derive(Debug, Parser)]
#[command(name = "taod", version, max_term_width = 100, subcommand_required = true, arg_required_else_help = true)]
pub struct Cli {
    #[command(flatten)]
    pub global: Global,
    #[command(subcommand)]
    pub command: Command,
}

/// What every command takes.
#[derive(Debug, Clone, Args)]
pub struct Global {
    /// The config file; without it the defaults and TAOD__SECTION__KEY variables hold.
    #[arg(long, short, global = true, env = "TAOD_CONFIG", value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// What is logged, such as `info` or `warn,taod::ingest=debug`. Text of queries appears at debug and below only.
    #[arg(
        long,
        global = true,
        env = "TAOD_LOG",
        // The tables keep bounds of coordinates and times alone, which each query of another column would be warned of.
        default_value = "info,buoyant_kernel=warn,buoyant_kernel_engine=warn,deltalake_core=warn,\
                         deltalake_core::kernel::snapshot::stats_projection=error",
        value_name = "FILTER"
    )]
    pub log: String,
    /// How log lines are written.
    #[arg(long, global = true, env = "TAOD_LOG_FORMAT", value_enum, default_value_t = logs::Format::Text)]
    pub log_format: logs::Format,
}

impl Global {
    /// Reads the config that this command runs with.
    pub fn load(&self) -> Result<Loaded<Config>, ConfigError> {
        Loaded::read(self.config.as_deref())
    }
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    Run(daemon::Run),
    Demo(daemon::Demo),
    Simulate(simulate::Simulate),
    Serve(serve::Serve),
    Ingest(ingest::Ingest),
    Records(records::Records),
    Replay(replay::Replay),
    Round(daemon::Round),
    #[command(hide = true)]
    RoundWorker(daemon::RoundWorker),
    /// Show or export a frozen dataset.
    #[command(subcommand)]
    Dataset(dataset::Command),
    Generate(engine::Generate),
    Logprobs(engine::Logprobs),
    Score(score::Score),
    /// Train, measure and calibrate what scores answers.
    #[command(subcommand)]
    Reward(reward::Command),
    Tune(tune::Tune),
    Estimate(estimate::Estimate),
    Eval(eval::Eval),
    /// The gate's evidence alone, or a trial in words.
    #[command(subcommand)]
    Gate(gate::Command),
    /// Let people label the locked audit split, and hold the scorers to it.
    #[command(subcommand)]
    Audit(audit::Command),
    /// List, verify, promote or withdraw adapters.
    #[command(subcommand)]
    Adapters(adapters::Command),
    /// Make, list or take away the tokens of the admin page.
    #[command(subcommand)]
    Admin(admin::Command),
    /// Check, show or explain the config.
    #[command(subcommand)]
    Config(config::Command),
    Status(status::Status),
    Doctor(doctor::Doctor),
    /// Check, maintain, correct or erase from the tables.
    #[command(subcommand)]
    Table(table::Command),
    #[command(hide = true)]
    TableWorker(table::Worker),
    #[command(hide = true)]
    Completions(manual::Completions),
    #[command(hide = true)]
    Man(manual::Man),
}

/// How a command ended, other than by an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// What was asked for is done; a promotion and a skipped round are too.
    Done,
    /// The gate refused, or the comparison found no gain.
    Refused,
    /// The trial needs more prompts than there were.
    Open,
    /// Training was given up, which the output says.
    Failed,
    /// The round left off where it was told to; the next start goes on with it.
    Paused,
}

/// Arguments that cannot be used together or on this input. Ends the process with 64.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Usage(pub String);

/// Runs one command.
pub fn run(cli: Cli, screen: &Screen) -> anyhow::Result<Exit> {
    let global = &cli.global;
    match &cli.command {
        Command::Run(args) => daemon::run(global, args),
        Command::Demo(args) => daemon::run_demo(global, args, screen),
        Command::Simulate(args) => simulate::run(args, screen),
        Command::Serve(args) => serve::run(global, args),
        Command::Ingest(args) => ingest::run(global, args),
        Command::Records(args) => records::run(global, args),
        Command::Replay(args) => replay::run(global, args),
        Command::Round(args) => daemon::run_round(global, args),
        Command::RoundWorker(args) => daemon::run_worker(global, args, screen),
        Command::Dataset(command) => dataset::run(global, command),
        Command::Generate(args) => engine::run_generate(args, screen),
        Command::Logprobs(args) => engine::run_logprobs(args, screen),
        Command::Score(args) => score::run(global, args),
        Command::Reward(command) => reward::run(global, command, screen),
        Command::Tune(args) => tune::run(global, args, screen),
        Command::Estimate(args) => estimate::run(global, args),
        Command::Eval(args) => eval::run(global, args, screen),
        Command::Gate(command) => gate::run(global, command),
        Command::Audit(command) => audit::run(global, command, screen),
        Command::Adapters(command) => adapters::run(global, command),
        Command::Admin(command) => admin::run(global, command),
        Command::Config(command) => config::run(global, command),
        Command::Status(args) => status::run(global, args),
        Command::Doctor(args) => doctor::run(global, args),
        Command::Table(command) => table::run(global, command),
        Command::TableWorker(args) => table::run_worker(global, args),
        Command::Completions(args) => manual::run_completions(args),
        Command::Man(args) => manual::run_man(args),
    }
}

/// Refuses a command that changes the log where another daemon keeps it.
fn stores_log(config: &Config) -> Result<(), Usage> {
    match config.state.stores_log() {
        true => Ok(()),
        false => Err(Usage(format!(
            "state.log = {:?}: another daemon keeps the log; run this with that one's config",
            config.state.log
        ))),
    }
}

/// Runs the async part of a command to its end.
fn block_on<T>(work: impl Future<Output = T>) -> std::io::Result<T> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    // What the work has left behind, such as a read from a store that does not answer, ends with the process. A runtime that
    // is taken down waits for it, and Delta's kernel panics where its runtime goes first.
    Ok(std::mem::ManuallyDrop::new(runtime).block_on(work))
}

/// Prints why the arguments cannot be read, or the help that was asked for.
pub fn usage(error: &clap::Error) -> ExitCode {
    // Nothing is left to be done where even the message cannot be written.
    drop(error.print());
    ExitCode::from(if error.use_stderr() { 64 } else { 0 })
}

/// Reports an error, and returns the exit code. The only place where errors become exit codes.
pub fn exit(outcome: anyhow::Result<Exit>) -> ExitCode {
    let error = match outcome {
        Ok(Exit::Done) => return ExitCode::SUCCESS,
        Ok(Exit::Refused) => return ExitCode::from(2),
        Ok(Exit::Open) => return ExitCode::from(3),
        Ok(Exit::Failed) => return ExitCode::from(1),
        Ok(Exit::Paused) => return ExitCode::from(child::PAUSED),
        Err(error) => error,
    };
    if is_closed_pipe(&error) {
        return ExitCode::SUCCESS;
    }
    eprintln!("taod: {}", message(&error));
    ExitCode::from(if is_usage(&error) { 64 } else { 1 })
}

/// Returns the error with its causes on one line. Many errors say their cause themselves; it is not said twice.
fn message(error: &anyhow::Error) -> String {
    let mut text = error.to_string();
    for cause in error.chain().skip(1).map(ToString::to_string) {
        if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text
}

fn is_usage(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| cause.is::<Usage>() || cause.is::<ConfigError>())
}

/// Returns true where the reader of our output went away, as `taod ... | head` does: that is no failure.
fn is_closed_pipe(error: &anyhow::Error) -> bool {
    let closed = |cause: &std::io::Error| cause.kind() == std::io::ErrorKind::BrokenPipe;
    error.chain().any(|cause| cause.downcast_ref().is_some_and(closed))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_arguments_are_consistent() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }

    #[test]
    fn a_cause_is_said_once() {
        let inner = std::io::Error::other("disk full");
        let outer = crate::durable::FileError::io("cannot write", std::path::Path::new("a.json"), inner);
        assert_eq!(message(&outer.into()), "cannot write a.json: disk full");
        assert_eq!(message(&anyhow::anyhow!("disk full").context("cannot write")), "cannot write: disk full");
    }

    #[test]
    fn errors_of_usage_are_told_from_failures_also_below_a_context() {
        let usage = anyhow::Error::new(Usage("x".into())).context("y");
        assert!(is_usage(&usage));
        assert!(is_usage(&ConfigError::Problems(vec![]).into()));
        assert!(!is_usage(&anyhow::anyhow!("x")));
    }
}
