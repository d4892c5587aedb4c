//! The program: arguments, threads, logs, one command, an exit code. Everything else is in the library.

use std::process::ExitCode;

use clap::Parser;
use taod::cli::{self, Cli, Screen};

/// Many small buffers of rows and tensors live and die on many threads; mimalloc returns their memory to the system.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    taod::secret::keep_private();
    // Before all else, while there is one thread: candle reads its number of threads from the environment.
    taod::engine::init_threads(None);
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return cli::usage(&error),
    };
    // Before anything touches the engine: its thread pools read the limit once.
    taod::engine::init_threads(None);
    let screen = Screen::detect();
    let outcome = cli::start_logs(&cli.global, &screen).and_then(|()| cli::run(cli, &screen));
    cli::exit(outcome)
}
