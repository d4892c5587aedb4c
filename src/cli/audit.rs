//! `taod audit`: people's labels on the locked audit split, and what they say about the scorers.

use std::io::{BufRead, Write};

use anyhow::ensure;
use clap::{Args, Subcommand};
use serde_json::json;

use super::lines::{Input, Output};
use super::{Exit, Global, Screen, Usage};
use crate::audit::{self, Choice, Label, Pair};
use crate::record::Message;
use crate::registry::Registry;
use crate::round::Paths;

/// The commands below `taod audit`.
#[derive(Debug, Subcommand)]
pub enum Command {
    Sample(Sample),
    Label(LabelArgs),
    Report(ReportArgs),
}

/// Draw audit prompts nobody labelled yet, answered by the served version and by the base.
///
/// Output lines: {"id", "messages", "a", "b"}, in an order that does not tell who answered. They hold text of the log: give them
/// to nobody who may not read it.
#[derive(Debug, Args)]
pub struct Sample {
    /// Prompts, 1 to 10000; fewer where the audit split has fewer.
    #[arg(long, default_value_t = 200, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=10_000))]
    prompts: u32,
}

/// Take people's choices: from a file, or one by one at the terminal.
///
/// Input lines: {"id", "choice": "a", "b" or "tie", "by"?}. A later word of the same person replaces the earlier one.
#[derive(Debug, Args)]
#[command(name = "label")]
pub struct LabelArgs {
    /// File of JSON lines, `-` for standard input; without it each pair is shown and asked for.
    #[arg(long, value_name = "FILE")]
    input: Option<std::path::PathBuf>,
    /// Who chooses, where the lines do not say.
    #[arg(long, value_name = "NAME")]
    by: String,
}

/// Say how often the gate's score prefers what people prefer, and freeze promotions where it is shown to be too seldom.
///
/// Exit code 2 where promotions were frozen; `taod gate thaw` ends it.
#[derive(Debug, Args)]
#[command(name = "report")]
pub struct ReportArgs {
    /// The audit's round; without it the newest.
    round: Option<String>,
    /// Only say it.
    #[arg(long)]
    no_freeze: bool,
    /// Print one JSON document.
    #[arg(long)]
    json: bool,
}

pub(super) fn run(global: &Global, command: &Command, screen: &Screen) -> anyhow::Result<Exit> {
    match command {
        Command::Sample(args) => sample(global, args, screen),
        Command::Label(args) => label(global, args),
        Command::Report(args) => report(global, args),
    }
}

fn sample(global: &Global, args: &Sample, screen: &Screen) -> anyhow::Result<Exit> {
    let sampled = audit::sample(&global.load()?.config, args.prompts as usize, &screen.progress())?;
    let mut out = Output::stdout();
    sampled.pairs.iter().try_for_each(|pair| out.line(&pair.task()))?;
    out.flush()?;
    Ok(Exit::Done)
}

fn label(global: &Global, args: &LabelArgs) -> anyhow::Result<Exit> {
    let paths = Paths::new(&global.load()?.config.state.dir);
    ensure!(!args.by.trim().is_empty(), Usage("--by is blank: say who chooses".into()));
    let labels = match &args.input {
        Some(input) => {
            let mut labels: Vec<Label> = Input { input: input.clone() }.read_all()?;
            labels.iter_mut().filter(|label| label.by.is_empty()).for_each(|label| label.by.clone_from(&args.by));
            labels
        }
        None => ask(audit::unlabelled(&paths, None, &args.by)?, &args.by)?,
    };
    let count = audit::label(&paths, &labels)?;
    let mut out = Output::stdout();
    out.text(&format!(
        "{} labels taken; there are {count} now. `taod audit report` says what follows\n",
        labels.len()
    ))?;
    out.flush()?;
    Ok(Exit::Done)
}

/// Shows each pair at the terminal and asks for the choice; an empty line or the end of input stops.
fn ask(pairs: Vec<Pair>, by: &str) -> anyhow::Result<Vec<Label>> {
    let (mut input, mut screen) = (std::io::stdin().lock(), std::io::stderr());
    let mut labels = Vec::new();
    let left = pairs.len();
    for (at, pair) in pairs.into_iter().enumerate() {
        let prompt: Vec<String> = pair
            .messages
            .iter()
            .map(|message: &Message| format!("{}: {}", message.role, message.plain_text()))
            .collect();
        write!(
            screen,
            "\n--- {} of {left}\n{}\n\n[a] {}\n\n[b] {}\n\na, b, t (tie), or an empty line to stop: ",
            at + 1,
            prompt.join("\n"),
            pair.a.text,
            pair.b.text
        )?;
        let choice = loop {
            screen.flush()?;
            let mut line = String::new();
            let read = input.read_line(&mut line)?;
            match line.trim() {
                "a" => break Choice::A,
                "b" => break Choice::B,
                "t" => break Choice::Tie,
                "" => return Ok(labels),
                _ if read == 0 => return Ok(labels),
                _ => write!(screen, "a, b or t: ")?,
            }
        };
        labels.push(Label { id: pair.id, choice, by: by.to_owned() });
    }
    Ok(labels)
}

fn report(global: &Global, args: &ReportArgs) -> anyhow::Result<Exit> {
    let config = global.load()?.config;
    let paths = Paths::new(&config.state.dir);
    let report = audit::report(&paths, args.round.as_deref(), &config.audit)?;
    let alarm = report.alarm.as_ref().filter(|_| !args.no_freeze);
    if let Some(alarm) = alarm {
        let reason = format!("audit of {}: {alarm}", report.round);
        Registry::open(&paths.registry(), &config.registry)?.freeze(
            &reason,
            "taod audit report",
            chrono::Utc::now().timestamp_micros(),
        )?;
    }
    let mut out = Output::stdout();
    match args.json {
        true => out.line(&json!({ "report": report, "frozen": alarm.is_some() }))?,
        false => {
            out.text(&report.to_string())?;
            if alarm.is_some() {
                out.text("promotions are frozen; `taod gate thaw` ends it\n")?;
            }
        }
    }
    out.flush()?;
    Ok(if alarm.is_some() { Exit::Refused } else { Exit::Done })
}
