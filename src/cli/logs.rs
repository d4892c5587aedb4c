//! Log lines: text for people, JSON for machines, always to standard error.

use std::io::{self, Write};

use clap::ValueEnum;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;

use super::{Global, Screen, Usage};

/// How a log line is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// Starts logging for the whole process.
pub fn start(global: &Global, screen: &Screen) -> anyhow::Result<()> {
    let filter = EnvFilter::try_new(&global.log)
        .map_err(|e| Usage(format!("--log {:?} cannot be read ({e}); write one such as \"info\"", global.log)))?;
    let lines = tracing_subscriber::fmt().with_env_filter(filter).with_writer(Writer(screen.clone()));
    let started = match global.log_format {
        Format::Text => lines.with_target(false).with_ansi(screen.is_terminal()).try_init(),
        Format::Json => lines.json().flatten_event(true).try_init(),
    };
    started.map_err(|e| anyhow::anyhow!("cannot start logging: {e}"))
}

/// Makes a writer for each line.
struct Writer(Screen);

/// Writes a line to standard error, above the progress bars where there are any.
struct Line<'a>(&'a Screen);

impl<'a> MakeWriter<'a> for Writer {
    type Writer = Line<'a>;

    fn make_writer(&'a self) -> Line<'a> {
        Line(&self.0)
    }
}

impl Write for Line<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.above(|| io::stderr().write(bytes))
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}
