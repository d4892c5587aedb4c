//! The command line as a whole: its help is a golden file, and wrong use ends with 64.

use clap::{Command, CommandFactory};
use taod::cli::Cli;

use crate::harness::{assert_golden, taod};

/// Writes the short help of a command and of all below it.
fn help(command: &mut Command, path: &str, text: &mut String) {
    text.push_str(&format!("=== {path}\n{}\n", command.render_help()));
    for inner in command.get_subcommands_mut().filter(|inner| inner.get_name() != "help") {
        let path = format!("{path} {}", inner.get_name());
        help(inner, &path, text);
    }
}

#[test]
fn the_help_is_the_golden_one() {
    let mut text = String::new();
    // A fixed width: the help must not depend on the terminal of who runs the test.
    let mut command = Cli::command().term_width(100);
    command.build();
    help(&mut command, "taod", &mut text);
    assert_golden("tests/golden/help.txt", &text);
}

#[test]
fn wrong_use_ends_with_64_and_help_with_0() {
    for wrong in
        [&["nonsense"][..], &["config"], &["config", "check", "--nonsense"], &[], &["--log", "=", "config", "check"]]
    {
        let outcome = taod(wrong).code(64);
        assert_eq!(outcome.out, "", "{wrong:?}");
        assert!(!outcome.err.is_empty(), "{wrong:?}");
    }
    for right in [&["--help"][..], &["--version"], &["config", "--help"]] {
        assert!(!taod(right).code(0).out.is_empty(), "{right:?}");
    }
}

#[test]
fn a_reader_that_goes_away_is_no_error() {
    use std::process::{Command, Stdio};
    let mut child = Command::new(env!("CARGO_BIN_EXE_taod"))
        .args(["config", "show"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let outcome = child.wait_with_output().unwrap();
    assert_eq!((outcome.status.code(), String::from_utf8(outcome.stderr).unwrap()), (Some(0), String::new()));
}
