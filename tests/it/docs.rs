//! Command lines that the documents show are command lines that the program takes.

use clap::Parser;
use clap::error::ErrorKind;
use taod::cli::Cli;

use crate::harness::{files, root, taod_in, text};

/// Returns the documents: those at the top and those under docs/.
fn documents() -> Vec<String> {
    let top = ["README.md", "CONTRIBUTING.md", "ARCHITECTURE.md", "CHANGELOG.md"];
    let top = top.iter().filter(|path| root().join(path).exists()).map(|path| path.to_string());
    top.chain(files("docs", "md")).chain(files("systemd", "md")).chain(files("dashboards", "md")).collect()
}

/// Returns each `taod ...` of a document: a line of a code block, or a piece of code in a sentence.
fn command_lines(document: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut in_block = false;
    for line in document.lines() {
        if line.trim_start().starts_with("```") {
            in_block = !in_block;
        } else if in_block {
            let line = line.trim().trim_start_matches("$ ");
            let line = line.split(" #").next().unwrap_or(line).split(" | ").next().unwrap_or(line);
            found.extend(line.starts_with("taod ").then(|| line.trim().to_string()));
        } else {
            let code = line.split('`').skip(1).step_by(2).filter(|code| code.starts_with("taod "));
            found.extend(code.map(str::to_string));
        }
    }
    found
}

/// Returns why the program would not take a command line. A sentence may leave out arguments: it names the command.
fn refusal(line: &str) -> Option<String> {
    let words = line.split_whitespace().map(|word| word.trim_matches(['\'', '"']));
    let error = Cli::try_parse_from(words).err()?;
    match error.kind() {
        ErrorKind::MissingRequiredArgument
        | ErrorKind::DisplayHelp
        | ErrorKind::DisplayVersion
        | ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => None,
        _ => Some(format!("{line}: {error}")),
    }
}

#[test]
fn every_command_line_of_the_documents_is_taken() {
    let lines: Vec<(String, String)> = documents()
        .into_iter()
        .flat_map(|path| command_lines(&text(&path)).into_iter().map(move |line| (path.clone(), line)))
        .collect();
    assert!(lines.len() >= 5, "{lines:?}");
    let wrong: Vec<String> =
        lines.iter().filter_map(|(path, line)| refusal(line).map(|why| format!("{path}: {why}"))).collect();
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

/// Returns the pieces of config in a document.
fn configs(document: &str) -> Vec<String> {
    let blocks = document.split("```toml\n").skip(1);
    blocks.filter_map(|rest| rest.split("```").next()).map(str::to_string).collect()
}

#[test]
fn every_config_of_the_documents_can_be_used() {
    let configs: Vec<(String, String)> = documents()
        .into_iter()
        .flat_map(|path| configs(&text(&path)).into_iter().map(move |config| (path.clone(), config)))
        .collect();
    assert!(!configs.is_empty());
    for (path, config) in configs {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("taod.toml"), &config).unwrap();
        let outcome = taod_in(folder.path(), &["config", "check", "--config", "taod.toml"], &[]);
        assert_eq!(outcome.code, 0, "{path}:\n{config}\n{}", outcome.err);
    }
}

#[test]
fn command_lines_are_found_in_blocks_and_in_sentences() {
    let document = "Run `taod config check`, not `cargo`.\n```sh\n$ taod config show --json | jq .  # all\ncargo x\n```\n`taod nonsense`";
    assert_eq!(command_lines(document), ["taod config check", "taod config show --json", "taod nonsense"]);
    assert!(refusal("taod nonsense").is_some());
    assert!(refusal("taod config show --jsn").is_some());
    assert!(refusal("taod config explain").is_none());
}

#[test]
fn the_units_of_systemd_run_commands_that_exist() {
    let mut count = 0;
    for path in files("systemd", "service") {
        for line in text(&path).lines().filter_map(|line| line.strip_prefix("ExecStart=")) {
            let words = line.split_whitespace().skip(1).collect::<Vec<_>>().join(" ");
            assert_eq!(refusal(&format!("taod {words}")), None, "{path}");
            count += 1;
        }
    }
    assert!(count > 0);
}
