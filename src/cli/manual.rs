//! Completions for shells, and man pages: made from the definitions of the arguments and of the config's keys, so that
//! neither can tell something else than the program does.

use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::{Args, CommandFactory};
use clap_complete::Shell;
use clap_mangen::Man as Page;
use clap_mangen::roff::{Roff, bold, roman};

use super::{Cli, Exit};
use crate::config::{Config, Key, Loaded};
use crate::durable;

/// Print the completions for a shell; for bash put them into /usr/share/bash-completion/completions/taod.
#[derive(Debug, Args)]
pub struct Completions {
    pub shell: Shell,
}

/// Write the man pages into a folder: one a command, and taod.toml(5) with every key of the config.
#[derive(Debug, Args)]
pub struct Man {
    /// The folder; it is made where it is not there.
    pub dir: PathBuf,
}

pub(super) fn run_completions(args: &Completions) -> anyhow::Result<Exit> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "taod", &mut script);
    std::io::stdout().lock().write_all(&script)?;
    Ok(Exit::Done)
}

pub(super) fn run_man(args: &Man) -> anyhow::Result<Exit> {
    durable::create_folder(&args.dir)?;
    let mut command = Cli::command().disable_help_subcommand(true);
    command.build();
    pages(&command, &args.dir)?;
    // Of the defaults, not of a config that happens to be in use: the page is the same for all.
    write(&args.dir.join("taod.toml.5"), &config_page(&Loaded::from_layers(None, Vec::new())?)?)?;
    Ok(Exit::Done)
}

/// Writes the page of a command and of every visible one below it.
fn pages(command: &clap::Command, folder: &Path) -> anyhow::Result<()> {
    for inner in command.get_subcommands().filter(|inner| !inner.is_hide_set()) {
        pages(inner, folder)?;
    }
    let page = Page::new(command.clone()).source(source()).manual("taod manual");
    let path = folder.join(page.get_filename());
    let mut text = Vec::new();
    page.render(&mut text)?;
    if command.get_name() == "taod" {
        after(&mut text)?;
    }
    write(&path, &text)
}

fn write(path: &Path, text: &[u8]) -> anyhow::Result<()> {
    std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}

fn source() -> String {
    format!("taod {}", env!("CARGO_PKG_VERSION"))
}

/// Adds what holds for all commands.
fn after(page: &mut Vec<u8>) -> std::io::Result<()> {
    let mut roff = Roff::new();
    let terms = |roff: &mut Roff, heading: &str, terms: &[(&str, &str)]| {
        roff.control("SH", [heading]);
        for (term, text) in terms {
            roff.control("TP", []).text([bold(*term)]).text([roman(*text)]);
        }
    };
    let codes = [
        ("0", "Done; promoted, skipped and nothing to do as well."),
        ("1", "Failed."),
        ("2", "Refused by the gate, or no gain was found."),
        ("3", "The trial is still open."),
        ("64", "Bad usage or a bad config."),
    ];
    terms(&mut roff, "EXIT STATUS", &codes);
    let variables = [
        ("TAOD_CONFIG, TAOD_LOG, TAOD_LOG_FORMAT", "As --config, --log and --log-format."),
        ("TAOD__SECTION__KEY", "Wins over the key of this name in the config."),
    ];
    terms(&mut roff, "ENVIRONMENT", &variables);
    let files = [
        ("/etc/taod/taod.toml", "The config that the service reads."),
        ("/var/lib/taod", "What the service makes: tables, rounds, the registry of adapters."),
    ];
    terms(&mut roff, "FILES", &files);
    roff.control("SH", ["SEE ALSO"]).text([bold("taod.toml"), roman("(5)")]);
    roff.to_writer(page)
}

/// Returns the page of the config: each section, each key with what it holds, its default and its meaning.
fn config_page(defaults: &Loaded<Config>) -> anyhow::Result<Vec<u8>> {
    let mut roff = Roff::new();
    roff.control("TH", ["taod.toml", "5", "", &source(), "taod manual"]);
    roff.control("SH", ["NAME"]).text([roman("taod.toml - the config of taod")]);
    roff.control("SH", ["DESCRIPTION"]).text([roman(
        "A file in TOML; it needs only the keys that differ from their defaults, and unknown ones are refused. An \
         environment variable TAOD__SECTION__KEY wins over the file. Secrets never stand in it: a key that ends in _file \
         names the file of one.",
    )]);
    for section in defaults.to_json().as_object().into_iter().flat_map(|sections| sections.keys()) {
        roff.control("SH", [section.to_uppercase().as_str()]);
        for key in defaults.explain(section)? {
            entry(&mut roff, &key);
        }
    }
    roff.control("SH", ["SEE ALSO"]).text([bold("taod"), roman("(1), "), bold("taod-config"), roman("(1)")]);
    let mut text = Vec::new();
    roff.to_writer(&mut text)?;
    Ok(text)
}

fn entry(roff: &mut Roff, key: &Key) {
    let default = key.default.as_ref().map(|value| format!(", default {value}")).unwrap_or_default();
    roff.control("TP", []).text([bold(key.key.as_str()), roman(format!(" ({}{default})", key.holds))]);
    let lines: Vec<String> = key.doc.lines().map(|line| line.trim().to_string()).collect();
    roff.text([roman(lines.join(" "))]);
}
