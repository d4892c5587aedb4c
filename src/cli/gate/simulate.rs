//! `taod gate simulate` and `taod gate plan`: what the configured gate does over years, and how long a gain takes.

use clap::Args;
use serde::Serialize;

use super::super::lines::Output;
use super::super::{Exit, Global, Usage};
use crate::gate::simulate::{self, Coverage, Guards, Law, NaiveRow, Power, Scenario, Shape, Tally, Years};
use crate::gate::{Mode, Settings};

/// Simulate years of nights with challengers whose truth is known, and count what the gate does.
///
/// The nights run on the gate's own code under the settings of the config; only the differences are drawn. The same
/// arguments give the same numbers.
#[derive(Debug, Args)]
pub struct Simulate {
    /// Laws of challengers: null, boundary, small_gain, regression, hacked, drift, segment, seasonal, mixed, mediocre.
    /// Without it all.
    #[arg(long, value_name = "NAME", value_parser = scenario)]
    scenario: Vec<Scenario>,
    /// How the differences fall: continuous, three_valued, skewed.
    #[arg(long, value_name = "NAME", value_parser = shape, default_value = "continuous")]
    shape: Vec<Shape>,
    #[command(flatten)]
    how: How,
    /// Simulated years of each law.
    #[arg(long, default_value_t = 100, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    years: u64,
    /// Nights in a year.
    #[arg(long, default_value_t = simulate::NIGHTS, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=366))]
    nights: u32,
    /// Also run the naive rules: a higher mean and p < 0.05, on fresh prompts and on a reused holdout.
    #[arg(long)]
    naive: bool,
    /// Also count how often the confidence sequences of the guardrails miss.
    #[arg(long)]
    coverage: bool,
}

/// Say how many nights a gain takes to be shown at this traffic, and how likely it is to be shown at all.
#[derive(Debug, Args)]
pub struct Plan {
    /// True mean gains.
    #[arg(long, value_name = "G", default_values_t = [0.01, 0.02, 0.03, 0.05, 0.10])]
    gain: Vec<f64>,
    /// Promotions already made this year; each lowers the bar in mode fdr.
    #[arg(long, default_values_t = [0], value_name = "R")]
    promotions: Vec<u32>,
    /// How the differences fall: continuous, three_valued, skewed.
    #[arg(long, value_name = "NAME", value_parser = shape, default_value = "continuous")]
    shape: Vec<Shape>,
    #[command(flatten)]
    how: How,
    /// Simulated trials of each gain.
    #[arg(long, default_value_t = 500, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    trials: u64,
}

/// What both commands take.
#[derive(Debug, Args)]
struct How {
    /// Fresh gate prompts an ordinary night.
    #[arg(long, value_name = "N", default_values_t = [500])]
    prompts: Vec<u32>,
    /// What the budget bounds: fdr or strict (alpha 0.05); without it gate.mode of the config.
    #[arg(long, value_name = "MODE", value_parser = mode)]
    mode: Option<Mode>,
    /// Decide by the evidence alone, with every guardrail at its loosest.
    #[arg(long)]
    evidence_alone: bool,
    /// Changes every draw.
    #[arg(long, default_value_t = 20_260_101, value_name = "S")]
    seed: u64,
    /// Print one JSON document instead of Markdown tables.
    #[arg(long)]
    json: bool,
}

impl How {
    fn settings(&self, global: &Global) -> anyhow::Result<Settings> {
        let mut settings = global.load()?.config.gate;
        if let Some(mode) = self.mode.filter(|mode| *mode != settings.mode) {
            settings.mode = mode;
            settings.alpha = if mode == Mode::Strict { 0.05 } else { 0.10 };
        }
        if let Some(zero) = self.prompts.iter().find(|n| **n == 0) {
            return Err(Usage(format!("--prompts {zero}: a night needs at least one gate prompt")).into());
        }
        Ok(self.guards().settings(&settings))
    }

    fn guards(&self) -> Guards {
        if self.evidence_alone { Guards::Waved } else { Guards::Asked }
    }

    fn years<'a>(&self, settings: &'a Settings, (years, nights): (u64, u32), prompts: u32) -> Years<'a> {
        Years { settings, guards: self.guards(), years, nights, prompts: prompts as usize, seed: self.seed }
    }
}

#[derive(Serialize)]
struct Report {
    years: Vec<Tally>,
    naive: Vec<NaiveRow>,
    coverage: Vec<Coverage>,
}

pub(super) fn run(global: &Global, args: &Simulate) -> anyhow::Result<Exit> {
    let settings = args.how.settings(global)?;
    let scenarios = if args.scenario.is_empty() { Scenario::ALL.to_vec() } else { args.scenario.clone() };
    let mut report = Report { years: Vec::new(), naive: Vec::new(), coverage: Vec::new() };
    for &prompts in &args.how.prompts {
        let years = args.how.years(&settings, (args.years, args.nights), prompts);
        for &scenario in &scenarios {
            for &shape in &args.shape {
                report.years.push(simulate::years(&years, &Law { scenario, shape })?);
            }
            if args.naive {
                let size = (args.years, args.nights, prompts as usize);
                report.naive.extend(simulate::naive(scenario, settings.margin, size, args.how.seed));
            }
        }
    }
    if args.coverage {
        let size = (args.years, 2000, settings.block_size as usize);
        let each = args.shape.iter().flat_map(|shape| [0.0, settings.margin].map(|mean| (*shape, mean)));
        report.coverage.extend(each.map(|(shape, mean)| simulate::coverage(shape, mean, size, args.how.seed)));
    }
    let mut out = Output::stdout();
    if args.how.json {
        out.line(&report)?;
    } else {
        out.text(&simulate::years_table(&report.years))?;
        if args.naive {
            out.text(&format!("\n{}", simulate::naive_table(&report.naive)))?;
        }
        if args.coverage {
            out.text(&format!("\n{}", simulate::coverage_table(&report.coverage)))?;
        }
    }
    out.flush()?;
    Ok(Exit::Done)
}

pub(super) fn plan(global: &Global, args: &Plan) -> anyhow::Result<Exit> {
    let settings = args.how.settings(global)?;
    if let Some(gain) = args.gain.iter().find(|gain| !(-0.9..=0.9).contains(*gain)) {
        return Err(Usage(format!("--gain {gain}: a mean gain is a difference of scores, from -0.9 to 0.9")).into());
    }
    if let Some(r) = args.promotions.iter().find(|r| **r >= settings.challengers) {
        let most = settings.challengers;
        return Err(
            Usage(format!("--promotions {r}: gate.challengers allows {most} trials a year, one is needed")).into()
        );
    }
    let mut rows: Vec<Power> = Vec::new();
    for &prompts in &args.how.prompts {
        let years = args.how.years(&settings, (args.trials, 0), prompts);
        for &promotions in &args.promotions {
            for &gain in &args.gain {
                for &shape in &args.shape {
                    let law = Law { scenario: Scenario::SmallGain, shape };
                    rows.push(simulate::power(&years, &law, gain, promotions)?);
                }
            }
        }
    }
    let mut out = Output::stdout();
    match args.how.json {
        true => out.line(&rows)?,
        false => out.text(&simulate::power_table(&rows))?,
    }
    out.flush()?;
    Ok(Exit::Done)
}

fn scenario(text: &str) -> Result<Scenario, String> {
    let found = Scenario::ALL.into_iter().find(|s| s.as_str() == text);
    found.ok_or_else(|| format!("one of {}", Scenario::ALL.map(Scenario::as_str).join(", ")))
}

fn shape(text: &str) -> Result<Shape, String> {
    let found = Shape::ALL.into_iter().find(|s| s.as_str() == text);
    found.ok_or_else(|| format!("one of {}", Shape::ALL.map(Shape::as_str).join(", ")))
}

fn mode(text: &str) -> Result<Mode, String> {
    let found = [Mode::Fdr, Mode::Strict].into_iter().find(|m| m.as_str() == text);
    found.ok_or_else(|| "fdr or strict".to_string())
}
