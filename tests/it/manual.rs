//! The man pages and the completions of shells tell all that there is, and the tools that read them take them.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

use clap::CommandFactory;
use taod::cli::Cli;
use taod::config::{Config, Loaded};

use crate::harness::{has, taod, taod_in};

/// Returns the file names of the pages that there must be.
fn names(command: &clap::Command, path: &str, found: &mut BTreeSet<String>) {
    found.insert(format!("{path}.1"));
    for inner in command.get_subcommands().filter(|inner| !inner.is_hide_set() && inner.get_name() != "help") {
        names(inner, &format!("{path}-{}", inner.get_name()), found);
    }
}

fn pages(folder: &Path) -> BTreeSet<String> {
    let entries = std::fs::read_dir(folder).unwrap();
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

#[test]
fn each_command_and_the_config_have_a_page_with_all_there_is() {
    let folder = tempfile::tempdir().unwrap();
    taod_in(folder.path(), &["man", "pages"], &[]).code(0);
    taod_in(folder.path(), &["man", "again/pages"], &[]).code(0);
    let pages_folder = folder.path().join("pages");
    let mut expected = BTreeSet::from(["taod.toml.5".to_string()]);
    names(&Cli::command(), "taod", &mut expected);
    assert_eq!(pages(&pages_folder), expected);
    assert!(expected.contains("taod-adapters-promote.1"), "{expected:?}");
    let read = |name: &str| std::fs::read_to_string(pages_folder.join(name)).unwrap().replace("\\-", "-");
    for name in &expected {
        let page = read(name);
        assert!(page.contains(".SH NAME") && page.contains(".TH "), "{name}: {page}");
        assert_eq!(
            page,
            std::fs::read_to_string(folder.path().join("again/pages").join(name)).unwrap().replace("\\-", "-")
        );
    }
    let round = read("taod-round.1");
    for argument in ["--once", "--resume", "--dry-run", "--price-per-hour"] {
        assert!(round.contains(argument), "{argument} is not in {round}");
    }
    assert!(read("taod.1").contains("EXIT STATUS"));
    let config = read("taod.toml.5");
    let defaults: Loaded<Config> = Loaded::from_layers(None, vec![]).unwrap();
    for key in defaults.explain("gate").unwrap().into_iter().chain(defaults.explain("notifications").unwrap()) {
        assert!(config.contains(&key.key), "{} is not in taod.toml.5", key.key);
    }
}

#[test]
fn the_pages_are_read_without_a_warning() {
    let there =
        Command::new("man").arg("--version").output().is_ok() && Command::new("groff").arg("-v").output().is_ok();
    if !has("man", there, "install Debian's packages man-db and groff") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    taod_in(folder.path(), &["man", "pages"], &[]).code(0);
    for name in pages(&folder.path().join("pages")) {
        let path = folder.path().join("pages").join(&name);
        // A long word that cannot be spread over its line is no fault of the page.
        let output =
            Command::new("groff").args(["-man", "-Tutf8", "-ww", "-Wbreak", "-z"]).arg(&path).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && said.is_empty(), "{name}: {said}");
    }
}

#[test]
fn completions_are_made_for_each_shell_and_bash_completes_by_them() {
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        assert!(taod(&["completions", shell]).code(0).out.contains("taod"), "{shell}");
    }
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("taod"), taod(&["completions", "bash"]).out).unwrap();
    let complete = |words: &[&str]| -> String {
        let (last, list) = (words.last().unwrap(), words.join(" "));
        let script = format!(
            "set -e; . ./taod; COMP_WORDS=({list}); COMP_CWORD={}; _taod taod '{last}' '' ; echo \"${{COMPREPLY[*]}}\"",
            words.len() - 1
        );
        let output = Command::new("bash").args(["-c", &script]).current_dir(folder.path()).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap().trim().to_string()
    };
    assert_eq!(complete(&["taod", "conf"]), "config");
    assert_eq!(complete(&["taod", "round", "--dr"]), "--dry-run");
    assert_eq!(complete(&["taod", "adapters", "roll"]), "rollback");
}
