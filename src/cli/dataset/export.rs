//! A split for other tools: rows whose columns have one type each, as `datasets` and TRL read them.
//!
//! `prompt` is TRL's conversational prompt: a list of `{role, content}` with the text of each message. What a text cannot
//! hold (tool calls, images, tools) stands beside it as JSON, lossless, in `messages` and `tools`.

use std::sync::Arc;

use anyhow::Context;
use arrow::datatypes::{DataType, Field, Schema};
use arrow::json::ReaderBuilder;
use parquet::arrow::ArrowWriter;
use parquet::basic::{Compression, ZstdLevel};
use parquet::file::properties::WriterProperties;
use serde::Serialize;

use super::Format;
use crate::dataset::Prompt;
use crate::record::Message;

#[derive(Serialize)]
struct Row<'a> {
    prompt: Vec<Turn<'a>>,
    prompt_hash: &'a str,
    cluster: &'a str,
    workload: Option<&'a str>,
    tenant: Option<&'a str>,
    language: Option<&'a str>,
    /// True where it was made of logged ones.
    synthetic: bool,
    /// Rows of the log that it stands for.
    rows: u64,
    event_time_us: i64,
    messages: String,
    tools: Option<String>,
}

#[derive(Serialize)]
struct Turn<'a> {
    role: &'a str,
    content: String,
}

impl<'a> Row<'a> {
    fn of(prompt: &'a Prompt) -> anyhow::Result<Self> {
        let turn = |message: &'a Message| Turn { role: &message.role, content: message.plain_text() };
        Ok(Row {
            prompt: prompt.messages.iter().map(turn).collect(),
            prompt_hash: &prompt.prompt_hash,
            cluster: &prompt.cluster,
            workload: prompt.workload.as_deref(),
            tenant: prompt.tenant.as_deref(),
            language: prompt.language.as_deref(),
            synthetic: prompt.is_synthetic(),
            rows: prompt.count,
            event_time_us: prompt.event_time_us,
            messages: serde_json::to_string(&prompt.messages)?,
            tools: prompt.tools.as_ref().map(ToString::to_string),
        })
    }
}

/// Returns the bytes of an export.
pub(super) fn bytes(prompts: &[Prompt], format: Format) -> anyhow::Result<Vec<u8>> {
    let rows = || prompts.iter().map(Row::of).collect::<anyhow::Result<Vec<_>>>();
    match format {
        Format::Raw => lines(prompts),
        Format::Jsonl => lines(&rows()?),
        Format::Parquet => parquet(&rows()?).context("cannot encode the Parquet file"),
    }
}

fn lines<T: Serialize>(rows: &[T]) -> anyhow::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    for row in rows {
        serde_json::to_writer(&mut bytes, row)?;
        bytes.push(b'\n');
    }
    Ok(bytes)
}

fn schema() -> Arc<Schema> {
    let text = |name: &str, nullable| Field::new(name, DataType::Utf8, nullable);
    let turn = Field::new("element", DataType::Struct(vec![text("role", false), text("content", false)].into()), false);
    Arc::new(Schema::new(vec![
        Field::new("prompt", DataType::List(Arc::new(turn)), false),
        text("prompt_hash", false),
        text("cluster", false),
        text("workload", true),
        text("tenant", true),
        text("language", true),
        Field::new("synthetic", DataType::Boolean, false),
        Field::new("rows", DataType::Int64, false),
        Field::new("event_time_us", DataType::Int64, false),
        text("messages", false),
        text("tools", true),
    ]))
}

fn parquet(rows: &[Row<'_>]) -> anyhow::Result<Vec<u8>> {
    let mut decoder = ReaderBuilder::new(schema()).with_batch_size(rows.len().max(1)).build_decoder()?;
    decoder.serialize(rows)?;
    let properties = WriterProperties::builder().set_compression(Compression::ZSTD(ZstdLevel::default())).build();
    let mut bytes = Vec::new();
    let mut writer = ArrowWriter::try_new(&mut bytes, schema(), Some(properties))?;
    if let Some(batch) = decoder.flush()? {
        writer.write(&batch)?;
    }
    writer.close()?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;
    use crate::record::Coordinates;

    fn prompt(i: usize) -> Prompt {
        let mut parts = Message::text("user", "");
        parts.content =
            crate::json::json!([{ "type": "text", "text": format!("Frage {i} \"ü\"") }, { "type": "image_url" }]);
        Prompt {
            prompt_hash: format!("h{i}"),
            cluster: "c".into(),
            workload: (i > 0).then(|| "w".into()),
            tenant: None,
            messages: vec![Message::text("system", "Du hilfst."), parts],
            tools: (i == 1).then(|| crate::json::json!([{ "type": "function" }])),
            first_seen: Coordinates { topic: "t".into(), partition: 0, offset: i as i64, record_index: 0 },
            event_time_us: 1_772_366_400_000_000,
            language: None,
            is_forward: false,
            count: 2,
            feedback: Vec::new(),
            sources: if i == 2 { vec!["h0".into()] } else { Vec::new() },
        }
    }

    #[test]
    fn both_forms_hold_the_same_rows() {
        let prompts: Vec<Prompt> = (0..3).map(prompt).collect();
        let jsonl = String::from_utf8(bytes(&prompts, Format::Jsonl).unwrap()).unwrap();
        let rows: Vec<serde_json::Value> = jsonl.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(rows[0]["prompt"][1], serde_json::json!({ "role": "user", "content": "Frage 0 \"ü\"" }));
        assert_eq!(
            rows.iter().map(|row| row["synthetic"].as_bool()).collect::<Vec<_>>(),
            [Some(false), Some(false), Some(true)]
        );
        assert_eq!(rows[1]["tools"], "[{\"type\":\"function\"}]");
        let parquet = bytes::Bytes::from(bytes(&prompts, Format::Parquet).unwrap());
        let reader = parquet::arrow::arrow_reader::ParquetRecordBatchReader::try_new(parquet, 100).unwrap();
        let mut writer = arrow::json::LineDelimitedWriter::new(Vec::new());
        reader.for_each(|batch| writer.write(&batch.unwrap()).unwrap());
        writer.finish().unwrap();
        let read: Vec<serde_json::Value> = writer
            .into_inner()
            .split(|b| *b == b'\n')
            .filter(|l| !l.is_empty())
            .map(|l| serde_json::from_slice(l).unwrap())
            .collect();
        for (mut ours, theirs) in rows.into_iter().zip(read) {
            // Arrow's writer leaves nulls out.
            ours.as_object_mut().unwrap().retain(|_, value| !value.is_null());
            assert_eq!(ours, theirs);
        }
    }

    /// Loads a file with `datasets` and prints its rows; `prompt` must have the type that TRL calls conversational.
    const LOAD: &str = r#"
import json, sys
from datasets import load_dataset
rows = load_dataset(sys.argv[1], data_files=sys.argv[2], split="train", cache_dir=sys.argv[3])
assert all(set(turn) == {"role", "content"} for row in rows for turn in row["prompt"]), rows[0]
print(json.dumps([row["prompt"] for row in rows]))
"#;

    #[test]
    #[ignore = "needs the package datasets (`tools/setup.sh full`)"]
    fn datasets_loads_both_forms() {
        let cache = std::env::var_os("XDG_CACHE_HOME").map(std::path::PathBuf::from);
        let cache = cache.unwrap_or_else(|| std::path::PathBuf::from(std::env::var_os("HOME").unwrap()).join(".cache"));
        let python = std::env::var_os("TAOD_DATASETS_PYTHON").map(std::path::PathBuf::from);
        let python = python.unwrap_or_else(|| cache.join("taod/datasets/bin/python"));
        let folder = tempfile::tempdir().unwrap();
        let prompts: Vec<Prompt> = (0..3).map(prompt).collect();
        let mut loaded = Vec::new();
        for (format, loader, name) in [(Format::Jsonl, "json", "a.jsonl"), (Format::Parquet, "parquet", "a.parquet")] {
            let path = folder.path().join(name);
            std::fs::write(&path, bytes(&prompts, format).unwrap()).unwrap();
            let run =
                Command::new(&python).args(["-c", LOAD, loader]).arg(&path).arg(folder.path().join(loader)).output();
            let run = run.unwrap_or_else(|e| panic!("{}: {e}; run `tools/setup.sh full`", python.display()));
            assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
            loaded.push(serde_json::from_slice::<serde_json::Value>(&run.stdout).unwrap());
        }
        assert_eq!(loaded[0], loaded[1]);
        assert_eq!(loaded[0][2][1]["content"], "Frage 2 \"ü\"");
    }
}
