//! JSON lines in and out: one result per input, in the order of the input.

use std::fs::File;
use std::io::{self, BufRead, BufReader, BufWriter, Write};
use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::Args;
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Where the input lines come from.
#[derive(Debug, Clone, Args)]
pub(super) struct Input {
    /// File of JSON lines; `-` is standard input.
    #[arg(long, value_name = "FILE")]
    pub input: PathBuf,
}

impl Input {
    /// Returns the lines one by one with their index, counted from 0. Empty lines are passed over and not counted.
    /// A line that is not the JSON expected is an error that names the file and the line.
    pub(super) fn read<T: DeserializeOwned>(&self) -> anyhow::Result<impl Iterator<Item = anyhow::Result<T>> + use<T>> {
        let name = self.name();
        let parse = move |(number, line): (usize, io::Result<String>)| {
            let line = line.with_context(|| format!("cannot read {name}, line {}", number + 1))?;
            match line.trim() {
                "" => Ok(None),
                text => serde_json::from_str(text)
                    .map(Some)
                    .map_err(|e| anyhow::anyhow!("{name}, line {}: {}", number + 1, describe(&e))),
            }
        };
        Ok(self.open()?.lines().enumerate().map(parse).filter_map(Result::transpose))
    }

    /// Returns all lines, or an error where there is none: a command on an empty file is a mistake.
    pub(super) fn read_all<T: DeserializeOwned>(&self) -> anyhow::Result<Vec<T>> {
        let lines: Vec<T> = self.read()?.collect::<anyhow::Result<_>>()?;
        anyhow::ensure!(!lines.is_empty(), "{} holds no line; write one JSON object a line", self.name());
        Ok(lines)
    }

    /// Returns the name for messages.
    pub(super) fn name(&self) -> String {
        if self.is_standard_input() { "standard input".into() } else { self.input.display().to_string() }
    }

    /// Opens the bytes themselves, for commands whose lines need not be JSON.
    pub(super) fn open(&self) -> anyhow::Result<Box<dyn BufRead>> {
        if self.is_standard_input() {
            return Ok(Box::new(BufReader::new(io::stdin())));
        }
        let file = File::open(&self.input).with_context(|| format!("cannot read --input {}", self.name()))?;
        Ok(Box::new(BufReader::new(file)))
    }

    fn is_standard_input(&self) -> bool {
        self.input == Path::new("-")
    }
}

/// Returns serde's message without its own position: the lines are counted here.
fn describe(error: &serde_json::Error) -> String {
    let text = error.to_string();
    text.split(" at line ").next().unwrap_or(&text).to_string()
}

/// Writes JSON lines to standard output.
pub(super) struct Output {
    out: BufWriter<io::StdoutLock<'static>>,
}

impl Output {
    /// Takes standard output.
    pub(super) fn stdout() -> Self {
        Output { out: BufWriter::new(io::stdout().lock()) }
    }

    /// Writes one line.
    pub(super) fn line<T: Serialize>(&mut self, value: &T) -> anyhow::Result<()> {
        serde_json::to_writer(&mut self.out, value).map_err(io::Error::from)?;
        self.out.write_all(b"\n")?;
        Ok(())
    }

    /// Writes text as it is.
    pub(super) fn text(&mut self, text: &str) -> anyhow::Result<()> {
        Ok(self.out.write_all(text.as_bytes())?)
    }

    /// Returns the writer, for a stage that writes lines itself.
    pub(super) fn writer(&mut self) -> &mut impl Write {
        &mut self.out
    }

    /// Hands everything written so far to the reader; errors of a full disk show here.
    pub(super) fn flush(&mut self) -> anyhow::Result<()> {
        Ok(self.out.flush()?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> anyhow::Result<Vec<u32>> {
        let folder = tempfile::tempdir().unwrap();
        let input = Input { input: folder.path().join("in.jsonl") };
        std::fs::write(&input.input, text).unwrap();
        input.read_all()
    }

    #[test]
    fn lines_keep_their_order_and_empty_ones_do_not_count() {
        assert_eq!(read("1\n\n2\r\n  \n3").unwrap(), [1, 2, 3]);
    }

    #[test]
    fn a_bad_line_is_named() {
        let message = read("1\n\n\"x\"\n").unwrap_err().to_string();
        assert!(message.contains("in.jsonl, line 3: invalid type: string \"x\""), "{message}");
        assert!(!message.contains("column"), "{message}");
        assert!(read("\n").unwrap_err().to_string().ends_with("holds no line; write one JSON object a line"));
    }

    #[test]
    fn a_missing_file_is_named() {
        let input = Input { input: "no/such.jsonl".into() };
        let message = format!("{:#}", input.read_all::<u32>().unwrap_err());
        assert!(message.starts_with("cannot read --input no/such.jsonl: "), "{message}");
    }
}
