//! `taod records`: how the ingestion would read records, with nothing stored.

use std::collections::BTreeMap;
use std::io::BufRead;

use anyhow::Context;
use clap::Args;

use super::lines::{Input, Output};
use super::{Exit, Global};
use crate::query_log::format::{canonical_json, read};

/// Show how raw records would be read; nothing is stored.
///
/// Input lines: one raw record each, in any log format, the config's `[[ingest.mapping]]` first. Output lines:
/// {"index", ...canonical record}, several where a record
/// holds several calls, or {"index", "dead_letter": reason, "message"}, or {"index", "skip": reason}.
#[derive(Debug, Args)]
pub struct Records {
    #[command(flatten)]
    input: Input,
    /// A Kafka header that every record carries, such as `x-workload=support`.
    #[arg(long = "header", value_name = "NAME=VALUE", value_parser = header)]
    headers: Vec<(String, String)>,
}

fn header(text: &str) -> Result<(String, String), String> {
    let pair = text.split_once('=').ok_or_else(|| format!("{text:?} has no =; write NAME=VALUE"))?;
    Ok((pair.0.to_string(), pair.1.to_string()))
}

pub(super) fn run(global: &Global, args: &Records) -> anyhow::Result<Exit> {
    let rules = global.load()?.config.ingest.rules();
    let headers: BTreeMap<String, String> = args.headers.iter().cloned().collect();
    let mut out = Output::stdout();
    // Split at line breaks only: what is between them need not even be text.
    for (index, record) in args.input.open()?.split(b'\n').enumerate() {
        let record = record.with_context(|| format!("cannot read {}, line {}", args.input.name(), index + 1))?;
        for outcome in read(&record, &headers, &rules) {
            out.line(&canonical_json(index, &outcome))?;
        }
    }
    out.flush()?;
    Ok(Exit::Done)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_is_a_name_and_a_value() {
        assert_eq!(header("a=b=c"), Ok(("a".into(), "b=c".into())));
        assert!(header("a").unwrap_err().contains("write NAME=VALUE"));
    }
}
