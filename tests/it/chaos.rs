//! The short form of the chaos run, and the proof that its checker can fail. The long form is `make chaos`.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use crate::harness;

/// Returns the Python of the harness, where all its parts are here.
fn python() -> Option<PathBuf> {
    let kafka = Command::new(harness::root().join("tests/kafka/kafka.sh")).arg("have").status();
    let there = kafka.is_ok_and(|status| status.success());
    if !harness::has("kafka", there, "run `tests/kafka/kafka.sh get` (it needs Java 17 and Maven)") {
        return None;
    }
    let python = harness::cache().join("chaos/bin/python");
    harness::has("chaos", python.is_file(), "run `tools/setup.sh test`").then_some(python)
}

fn chaos(python: &Path, work: &Path, more: &[&str]) -> Output {
    let mut command = Command::new(python);
    command.arg(harness::root().join("tests/chaos/main.py"));
    command.args(["--binary", env!("CARGO_BIN_EXE_taod"), "--work"]).arg(work).args(more).output().unwrap()
}

#[test]
fn ingestion_loses_and_doubles_nothing_while_everything_around_it_fails() {
    let Some(python) = python() else { return };
    let folder = tempfile::tempdir().unwrap();
    let more = ["--cycles", "100", "--minutes", "2.5", "--era-cycles", "9", "--seed", "14"];
    let said = chaos(&python, folder.path(), &more);
    let text = String::from_utf8_lossy(&said.stdout);
    assert!(said.status.success(), "{text}\n{}", String::from_utf8_lossy(&said.stderr));
    let cycles: u64 = text.split(" cycles in ").next().and_then(|t| t.rsplit(' ').next()?.parse().ok()).unwrap_or(0);
    assert!(cycles >= 9 && text.contains("**0 violations**"), "{text}");
}

#[test]
fn the_checker_finds_a_wreck() {
    let Some(python) = python() else { return };
    let mut tests = Command::new(&python);
    tests.args(["-m", "unittest", "test_invariants"]).current_dir(harness::root().join("tests/chaos"));
    let said = tests.output().unwrap();
    assert!(said.status.success(), "{}", String::from_utf8_lossy(&said.stderr));
    // And once through everything real: a file added twice by another writer.
    let folder = tempfile::tempdir().unwrap();
    let more = ["--cycles", "4", "--only", "kill", "--sabotage", "duplicate", "--seed", "7"];
    let said = chaos(&python, folder.path(), &more);
    let text = String::from_utf8_lossy(&said.stdout);
    assert_eq!(said.status.code(), Some(1), "{text}");
    assert!(text.contains("VIOLATION: queries at version") && text.contains("stands twice"), "{text}");
}
