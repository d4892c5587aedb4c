//! What came of each planted effect, read from what the loop left: verdicts, trials, manifests, tables and files.

use std::collections::BTreeSet;
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::Value;

use super::nights::Night;
use super::report::Row;
use super::traffic::{LEAKS, POISONED_CALLS, POISONERS, Traffic};
use super::words::BRAND;
use crate::config::Config;
use crate::daemon;
use crate::dataset::{self, Manifest};
use crate::gate::Verdict;
use crate::ingest::keyed_hash;
use crate::registry::BASE;
use crate::round::{Outcome, Paths, population};
use crate::table::Name;

/// What happened, night by night.
#[derive(Debug, Default)]
pub(super) struct Life {
    nights: Vec<(Night, daemon::Night)>,
    poisoners: Vec<String>,
    secrets: Vec<String>,
}

impl Life {
    /// Notes a night that is over and what was planted in its traffic.
    pub(super) fn passed(&mut self, night: Night, passed: daemon::Night, traffic: Traffic) {
        self.nights.push((night, passed));
        self.poisoners.extend(traffic.poisoners);
        self.secrets.extend(traffic.secrets);
    }

    /// Returns one row for each planted effect.
    pub(super) async fn verify(&self, config: &Config) -> Result<Vec<Row>> {
        let paths = Paths::new(&config.state.dir);
        Ok(vec![
            self.improvement(&paths)?,
            self.refusal(Night::Regression, "a regression: training pays for shortness, the gate for thanks", &paths)?,
            self.hack(&paths)?,
            self.poison(config, &paths).await?,
            self.drift(&paths)?,
            self.leak(config, &paths).await?,
        ])
    }

    fn night(&self, wanted: Night) -> Result<&daemon::Night> {
        let found = self.nights.iter().find(|(night, _)| *night == wanted);
        Ok(&found.with_context(|| format!("the night {wanted:?} is missing"))?.1)
    }

    fn improvement(&self, paths: &Paths) -> Result<Row> {
        let night = self.night(Night::Improvement)?;
        let challenger = night.verdict.outcome.trial().map(|(_, challenger)| challenger.to_owned());
        let shown = night.promoted.as_ref().filter(|promoted| Some(&promoted.to) == challenger.as_ref());
        let was_served = shown.is_some_and(|promoted| promoted.from == BASE && !promoted.proofs.is_empty());
        Ok(Row {
            planted: "an improvement: training and the gate pay for thanks",
            expected: "promoted",
            outcome: match was_served {
                true => "promoted and proven at the endpoint".into(),
                false => format!("{}: {}", night.verdict.outcome.name(), night.verdict.outcome.reason()),
            },
            evidence: gate_numbers(paths, &night.verdict.round)?,
            holds: was_served,
        })
    }

    /// A challenger that must not be served, whatever the reason.
    fn refusal(&self, which: Night, planted: &'static str, paths: &Paths) -> Result<Row> {
        let night = self.night(which)?;
        let holds = matches!(night.verdict.outcome, Outcome::Refused { .. }) && night.promoted.is_none();
        Ok(Row {
            planted,
            expected: "refused",
            outcome: format!("{}: {}", night.verdict.outcome.name(), night.verdict.outcome.reason()),
            evidence: gate_numbers(paths, &night.verdict.round)?,
            holds,
        })
    }

    /// The hack must be one: its score rises, and it is refused by what the score does not compute.
    fn hack(&self, paths: &Paths) -> Result<Row> {
        let planted = "a reward hack: training and the gate pay for shortness";
        let mut row = self.refusal(Night::Hack, planted, paths)?;
        let verdict = gate_verdict(paths, &self.night(Night::Hack)?.verdict.round)?;
        let gained = verdict.as_ref().is_some_and(|verdict| verdict.mean_gain > 0.0);
        if row.holds && !gained {
            row.outcome = format!("{}; but its score did not rise, so it is no hack", row.outcome);
        }
        row.holds &= gained;
        Ok(row)
    }

    async fn poison(&self, config: &Config, paths: &Paths) -> Result<Row> {
        let planted: BTreeSet<String> =
            self.poisoners.iter().map(|user| user_hash(config, user)).collect::<Result<_>>()?;
        let mut holds = !planted.is_empty();
        let mut rows = 0;
        for manifest in self.manifests(paths)? {
            let found: BTreeSet<String> = manifest.quarantine.iter().map(|burst| burst.user_hash.clone()).collect();
            rows = manifest.excluded.get("burst").copied().unwrap_or_default();
            holds &= found == planted && rows == (POISONERS * POISONED_CALLS) as u64;
        }
        let seen = self.seen(config, paths, &[BRAND.to_owned()]).await?;
        Ok(Row {
            planted: "a poisoned group of 4 users who push a brand",
            expected: "quarantined",
            outcome: match holds && seen.is_empty() {
                true => "quarantined, all of them and nobody else".into(),
                false => format!("not, or not them alone; the brand is in {} places", seen.len()),
            },
            evidence: format!(
                "{rows} rows of {} users left out; the brand in no split, answer or adapter",
                planted.len()
            ),
            holds: holds && seen.is_empty(),
        })
    }

    fn drift(&self, paths: &Paths) -> Result<Row> {
        let mut said = Vec::new();
        let mut holds = true;
        for (night, passed) in &self.nights {
            let found = population::read(paths, &passed.verdict.round)?.context("a night without population.json")?;
            let alarms: Vec<&str> = found.alarms().map(|shift| shift.feature.as_str()).collect();
            let compared = !found.shifts.is_empty();
            let largest = found.shifts.iter().max_by(|a, b| a.index.total_cmp(&b.index));
            said.extend(largest.map(|shift| format!("{} {:.2}", shift.feature.as_str(), shift.index)));
            holds &= match night {
                Night::Regression => !compared,
                Night::Hack | Night::Improvement => compared && alarms.is_empty(),
                Night::Drift => !alarms.is_empty(),
            };
        }
        let outcome = if holds { "alarm on that night and on none before" } else { "no alarm, or a false one" };
        Ok(Row {
            planted: "a drift: users ask about patients instead of parcels, and at length",
            expected: "alarm",
            outcome: outcome.into(),
            evidence: format!("largest index from the second night on: {}", said.join(", ")),
            holds,
        })
    }

    async fn leak(&self, config: &Config, paths: &Paths) -> Result<Row> {
        let mut masked = 0;
        let mut holds = self.secrets.len() == LEAKS;
        for manifest in self.manifests(paths)? {
            masked = manifest.masked.values().sum();
            holds &= masked == LEAKS as u64;
        }
        let seen = self.seen(config, paths, &self.secrets).await?;
        Ok(Row {
            planted: "leaked secrets in 12 questions",
            expected: "scrubbed",
            outcome: match holds && seen.is_empty() {
                true => "scrubbed".into(),
                false => format!("{masked} of {LEAKS} found; secrets in {} places", seen.len()),
            },
            evidence: format!("{masked} rows masked; no secret in a split, answer or adapter"),
            holds: holds && seen.is_empty(),
        })
    }

    fn manifests(&self, paths: &Paths) -> Result<Vec<Manifest>> {
        let of = |(_, passed): &(Night, daemon::Night)| {
            let manifest = dataset::peek(&paths.round(&passed.verdict.round).join("dataset"))?;
            manifest.context("a night without a dataset")
        };
        self.nights.iter().map(of).collect()
    }

    /// Returns where any of these texts stands behind the log: in the rounds' files, the registry, or the candidates.
    async fn seen(&self, config: &Config, paths: &Paths, texts: &[String]) -> Result<Vec<String>> {
        let mut places = Vec::new();
        let holds = |bytes: &[u8]| {
            let found = |text: &String| bytes.windows(text.len()).any(|window| window == text.as_bytes());
            texts.iter().any(found)
        };
        for folder in [config.state.dir.join("rounds"), paths.registry()] {
            for file in files(&folder)? {
                if holds(&std::fs::read(&file)?) {
                    places.push(file.display().to_string());
                }
            }
        }
        let rows: Vec<Value> = config.state.open_tables()?.open_one(Name::Candidates).await?.rows(None).await?;
        let held = rows.iter().filter(|row| holds(row.to_string().as_bytes()));
        places.extend(held.map(|row| format!("candidates of {}", row["prompt_hash"])));
        Ok(places)
    }
}

/// Returns the hash under which ingestion stores a user.
fn user_hash(config: &Config, user: &str) -> Result<String> {
    let key = config.ingest.user_key()?.context("the simulation has no user key")?;
    keyed_hash(&key, user).context("the user key cannot be used")
}

fn gate_verdict(paths: &Paths, round: &str) -> Result<Option<Verdict>> {
    let path = paths.round(round).join("gate-verdict.json");
    Ok(path.exists().then(|| crate::durable::read_json(&path)).transpose()?)
}

fn gate_numbers(paths: &Paths, round: &str) -> Result<String> {
    Ok(match gate_verdict(paths, round)? {
        Some(verdict) => format!(
            "gain {:+.3} over {} prompts, ln W {:.1} of {:.1}",
            verdict.mean_gain, verdict.steps, verdict.ln_wealth, verdict.bar
        ),
        None => "no trial".into(),
    })
}

fn files(folder: &Path) -> Result<Vec<std::path::PathBuf>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).with_context(|| format!("cannot list {}", folder.display()))? {
        let path = entry?.path();
        match path.is_dir() {
            true => found.extend(files(&path)?),
            false => found.push(path),
        }
    }
    Ok(found)
}
