//! A power loss takes back nothing that was acknowledged, and leaves no log entry without its files.
//!
//! The real program runs under `strace`; a model of what a disk is certain to keep follows its system calls.

use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use rdkafka::ClientConfig;
use rdkafka::producer::{BaseProducer, BaseRecord, Producer};
use serde_json::{Value, json};
use taod::query_log::embedded::EmbeddedBroker;

use crate::harness;

const TOPIC: &str = "queries";
const CALLS: &str = "trace=openat,open,creat,close,write,writev,pwrite64,fsync,fdatasync,link,linkat,rename,renameat,\
                     renameat2,unlink,unlinkat,mkdir,mkdirat";

/// Returns true where a process can be traced here.
fn can_trace() -> bool {
    let traced = Command::new("strace").args(["-f", "-o", "/dev/null", "true"]).stderr(Stdio::null()).status();
    harness::has("strace", traced.is_ok_and(|s| s.success()), "install strace, and allow ptrace where it is forbidden")
}

fn model(trace: &Path, root: &Path, more: &[&str]) -> Output {
    let script = harness::root().join("tests/tools/power_loss.py");
    Command::new("python3").arg(script).arg(trace).arg(root).args(more).output().unwrap()
}

#[test]
fn a_power_loss_at_any_moment_leaves_whole_commits_only() {
    if !can_trace() {
        return;
    }
    let broker = EmbeddedBroker::start(TOPIC, 2).unwrap();
    let mut config = ClientConfig::new();
    let producer: BaseProducer = config.set("bootstrap.servers", broker.brokers()).create().unwrap();
    // Enough for several commits to both tables.
    for i in 0..400 {
        let text = "word ".repeat(1600);
        let call = json!({ "request": { "messages": [{ "role": "user", "content": text }] }, "response": null });
        let payload = if i % 20 == 7 { format!("no json {text}") } else { call.to_string() };
        let record = BaseRecord::<(), str>::to(TOPIC).partition(i % 2).payload(&payload);
        producer.send(record).map_err(|(error, _)| error).unwrap();
    }
    producer.flush(Duration::from_secs(10)).unwrap();

    let folder = tempfile::tempdir().unwrap();
    let trace = folder.path().join("trace");
    let text = format!(
        "[state]\ndir = {:?}\n[ingest]\nidle_s = 1\nbatch_bytes = 65536\n[ingest.kafka]\nbrokers = \"{}\"\n\
         topic = \"{TOPIC}\"\n",
        folder.path().join("state"),
        broker.brokers(),
    );
    std::fs::write(folder.path().join("taod.toml"), text).unwrap();
    let mut command = Command::new("strace");
    command.args(["-f", "-y", "-s", "4096", "-e", CALLS, "-o"]).arg(&trace).arg(env!("CARGO_BIN_EXE_taod"));
    command.args(["ingest", "--until-idle", "--config"]).arg(folder.path().join("taod.toml"));
    assert!(command.stdin(Stdio::null()).stdout(Stdio::null()).status().unwrap().success());

    let said = model(&trace, folder.path(), &[]);
    assert!(said.status.success(), "{}", String::from_utf8_lossy(&said.stderr));
    let said: Value = serde_json::from_slice(&said.stdout).unwrap();
    assert!(said["entries"].as_i64() > Some(6) && said["checks"].as_i64() > said["entries"].as_i64(), "{said}");
    // The model finds a writer that forgets to sync.
    for forgotten in ["files", "folders"] {
        let said = model(&trace, folder.path(), &["--forget", forgotten]);
        let complaint = String::from_utf8_lossy(&said.stderr).into_owned();
        assert!(!said.status.success() && complaint.contains("_delta_log"), "{forgotten}: {complaint}");
    }
}
