//! Tables that ingestion must not write to, or cannot: one line that names the table and the remedy, and nothing changed.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use serde_json::{Value, json};
use taod::query_log::embedded::EmbeddedBroker;

use crate::harness::night::bytes_below;
use crate::harness::{Outcome, cache, has, root, taod_in};

/// Runs an ingestion with the tables below `folder`, against a broker with an empty topic.
fn ingest(folder: &Path, more: &[(&str, &str)]) -> Outcome {
    let broker = EmbeddedBroker::start("llm-queries", 1).unwrap();
    let environment = [&[("TAOD__INGEST__KAFKA__BROKERS", broker.brokers())], more].concat();
    taod_in(folder, &["ingest", "--until-idle"], &environment)
}

/// Writes version 0 of a table `queries`, as its first writer left it.
fn table(folder: &Path, protocol: Value, fields: Value, partitioned_by: &[&str]) -> PathBuf {
    let log = folder.join("var/tables/queries/_delta_log");
    std::fs::create_dir_all(&log).unwrap();
    let schema = json!({ "type": "struct", "fields": fields }).to_string();
    let metadata = json!({ "id": "00000000-0000-4000-8000-000000000000", "format": { "provider": "parquet", "options": {} },
        "schemaString": schema, "partitionColumns": partitioned_by, "configuration": {} });
    let text = format!("{}\n{}\n", json!({ "protocol": protocol }), json!({ "metaData": metadata }));
    std::fs::write(log.join("00000000000000000000.json"), text).unwrap();
    folder.join("var")
}

/// A table's protocol, its columns, what it is partitioned by, and what its refusal says.
type Case = (Value, Value, &'static [&'static str], &'static [&'static str]);

fn field(name: &str, kind: &str) -> Value {
    json!({ "name": name, "type": kind, "nullable": true, "metadata": {} })
}

#[test]
fn a_table_of_someone_else_is_refused_and_left_as_it_is() {
    let old = json!({ "minReaderVersion": 1, "minWriterVersion": 2 });
    let named = json!({ "minReaderVersion": 3, "minWriterVersion": 7, "readerFeatures": ["columnMapping"],
        "writerFeatures": ["columnMapping", "rowTracking"] });
    let theirs = json!([field("id", "long"), field("topic", "string")]);
    let cases: [Case; 4] = [
        (old.clone(), theirs.clone(), &[], &["partition", "state.tables"]),
        (old.clone(), json!([field("topic", "long")]), &[], &["topic", "long", "string"]),
        (old, theirs.clone(), &["topic"], &["partitioned by topic"]),
        (named, theirs, &[], &["columnMapping"]),
    ];
    for (protocol, fields, partitioned_by, parts) in cases {
        let folder = tempfile::tempdir().unwrap();
        let state = table(folder.path(), protocol, fields, partitioned_by);
        let before = bytes_below(&state.join("tables/queries"));
        ingest(folder.path(), &[]).refused(&[&["tables/queries"], parts].concat());
        assert_eq!(bytes_below(&state.join("tables/queries")), before);
    }
}

/// Returns true where a file system can be mounted read-only in a namespace of one's own.
fn can_mount() -> bool {
    let mount = "mount -t tmpfs taod /mnt && mount -o remount,ro /mnt";
    let tried = Command::new("unshare").args(["-rm", "sh", "-c", mount]).output();
    let there = tried.is_ok_and(|output| output.status.success());
    has("small-disks", there, "user namespaces are switched off, so nothing can be mounted read-only")
}

#[test]
fn a_store_that_cannot_be_written_is_named() {
    if !can_mount() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let broker = EmbeddedBroker::start("llm-queries", 1).unwrap();
    let place = folder.path().join("tables");
    std::fs::create_dir(&place).unwrap();
    let script = format!(
        "mount -t tmpfs taod {place} && mount -o remount,ro {place} && exec {taod} ingest --until-idle",
        place = place.display(),
        taod = env!("CARGO_BIN_EXE_taod"),
    );
    let mut command = Command::new("unshare");
    command.args(["-rm", "sh", "-c", &script]).current_dir(folder.path()).stdin(Stdio::null());
    command.env("TAOD__STATE__TABLES", &place).env("TAOD__INGEST__KAFKA__BROKERS", broker.brokers());
    let output = command.output().unwrap();
    let outcome = Outcome {
        code: output.status.code().unwrap_or(-1),
        out: String::from_utf8(output.stdout).unwrap(),
        err: String::from_utf8(output.stderr).unwrap(),
    };
    outcome.refused(&["tables/queries", "Read-only file system"]);
}

/// A SeaweedFS as the chaos harness starts it.
struct Bucket {
    process: Child,
    port: u16,
}

impl Bucket {
    fn start(folder: &Path) -> Option<Self> {
        let python = cache().join("chaos/bin/python");
        if !has("chaos", python.is_file(), "run `tools/setup.sh test`") {
            return None;
        }
        let script = "import pathlib, sys, parts\n\
                      s3 = parts.S3.start(pathlib.Path(sys.argv[1]))\n\
                      print(s3.port, flush=True)\n\
                      sys.stdin.read()\n\
                      s3.close()";
        let mut command = Command::new(python);
        command.args(["-c", script]).arg(folder).current_dir(root().join("tests/chaos"));
        let mut process = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(process.stdout.take().unwrap()).read_line(&mut line).unwrap();
        Some(Bucket { process, port: line.trim().parse().unwrap() })
    }
}

impl Drop for Bucket {
    fn drop(&mut self) {
        // The end of its standard input tells it to go.
        drop(self.process.stdin.take());
        self.process.wait().ok();
    }
}

#[test]
fn a_bucket_that_refuses_the_key_is_named_within_its_time() {
    let folder = tempfile::tempdir().unwrap();
    let Some(bucket) = Bucket::start(folder.path()) else { return };
    let endpoint = format!("http://127.0.0.1:{}", bucket.port);
    let config = format!(
        "[state]\ntables = \"s3://chaos/wrong-key\"\n\
         store_options = {{ endpoint = \"{endpoint}\", region = \"us-east-1\", allow_http = \"true\" }}\n"
    );
    std::fs::write(folder.path().join("taod.toml"), config).unwrap();
    let run = |secret: &str| {
        let broker = EmbeddedBroker::start("llm-queries", 1).unwrap();
        let environment = [
            ("TAOD__INGEST__KAFKA__BROKERS", broker.brokers()),
            ("AWS_ACCESS_KEY_ID", "chaos"),
            ("AWS_SECRET_ACCESS_KEY", secret),
        ];
        taod_in(folder.path(), &["ingest", "--until-idle", "--config", "taod.toml"], &environment)
    };
    run("not the secret").refused(&["s3://chaos/wrong-key/queries", "state.store_options"]);
    run("chaoschaos").code(0);
}
