//! Trials of the gate: the evidence after every prompt, the bar, what the guardrails say.

use std::sync::Arc;

use chrono::{DateTime, Utc};
use schemars::JsonSchema;
use serde::Serialize;

use super::{FactError, Facts, time};
use crate::gate::standing::{standing, trials};
use crate::gate::{self, State, StepRow, TrialRow, history};
use crate::round::book;
use crate::table::Name;

/// One trial in a list.
#[derive(Debug, Clone, Serialize, JsonSchema)]
pub(in super::super) struct Trial {
    pub(in super::super) trial: String,
    /// Which challenger of its year this is, counted from 1.
    pub(in super::super) number: u32,
    /// `open`, `promoted`, `refused`, `futile`, `expired` or `void`.
    pub(in super::super) state: String,
    pub(in super::super) challenger: String,
    pub(in super::super) incumbent: String,
    /// Nights begun.
    pub(in super::super) nights: u32,
    /// Fresh prompts judged.
    pub(in super::super) prompts: u64,
    /// Natural logarithm of the wealth: the evidence.
    pub(in super::super) ln_wealth: f64,
    /// Natural logarithm of the wealth that decides.
    pub(in super::super) bar: f64,
    pub(in super::super) reason: String,
    /// When the newest change of it was stored.
    pub(in super::super) changed: DateTime<Utc>,
}

impl Trial {
    fn judged(&mut self, newest: Option<&StepRow>) {
        if let Some(step) = newest {
            (self.prompts, self.ln_wealth) = (step.step, step.ln_wealth);
        }
    }
}

/// A trial with everything that decided it.
#[derive(Debug, Clone, Serialize, JsonSchema)]
pub(in super::super) struct TrialDetail {
    #[serde(flatten)]
    pub(in super::super) trial: Trial,
    /// Mean of the differences in score, new less incumbent.
    pub(in super::super) mean_gain: f64,
    /// The part of the year's error budget that it was opened with.
    pub(in super::super) level: f64,
    pub(in super::super) guardrails: Vec<Guardrail>,
    pub(in super::super) evidence: Vec<Evidence>,
    /// The verdict in plain words, several lines.
    pub(in super::super) words: String,
}

/// What a guardrail says.
#[derive(Debug, Clone, Serialize, JsonSchema)]
pub(in super::super) struct Guardrail {
    pub(in super::super) guardrail: String,
    /// `pass`, `not yet` or `fail`.
    pub(in super::super) outcome: String,
    pub(in super::super) reason: String,
}

/// One fresh prompt of a trial.
#[derive(Debug, Clone, Serialize, JsonSchema)]
pub(in super::super) struct Evidence {
    /// Counted from 1 over the whole trial.
    pub(in super::super) step: u64,
    pub(in super::super) night: u32,
    pub(in super::super) prompt_hash: String,
    pub(in super::super) workload: Option<String>,
    pub(in super::super) new_score: f64,
    pub(in super::super) incumbent_score: f64,
    /// The stake on this prompt.
    pub(in super::super) lambda: f64,
    /// The evidence after it.
    pub(in super::super) ln_wealth: f64,
}

impl Facts {
    /// Returns the newest trials, the newest first.
    pub(in super::super) async fn trials(&self, limit: usize) -> Result<Vec<Trial>, FactError> {
        let rows = self.trial_rows().await?;
        let mut found: Vec<Trial> = trials(&rows).into_iter().take(limit).map(document).collect();
        if let Some(open) = found.iter_mut().find(|trial| trial.state == State::Open.as_str()) {
            self.bring_up_to_date(open).await?;
        }
        Ok(found)
    }

    /// Returns the open trial as far as it was judged.
    pub(super) async fn open_trial(&self) -> Result<Option<Trial>, FactError> {
        let rows = self.trial_rows().await?;
        let mut open = history::open_trial(&rows).map(document);
        if let Some(open) = &mut open {
            self.bring_up_to_date(open).await?;
        }
        Ok(open)
    }

    /// A trial's own row says how it stood when the night began; what the night judged since stands in its steps.
    async fn bring_up_to_date(&self, open: &mut Trial) -> Result<(), FactError> {
        let steps = self.steps().await?;
        open.judged(
            steps.iter().filter(|step| step.trial == open.trial && step.suite.is_none()).max_by_key(|step| step.step),
        );
        Ok(())
    }

    /// Returns all steps. Every open page asks for them every other second; they are read once for each version of the table.
    async fn steps(&self) -> Result<Arc<Vec<StepRow>>, FactError> {
        let _reading = self.reading().await?;
        let Some(table) = self.tables.open_existing(Name::GateSteps).await.map_err(FactError::failed)? else {
            return Ok(Arc::default());
        };
        let mut read = self.gate_steps.lock().await;
        match &*read {
            Some((version, steps)) if *version == table.version() => Ok(steps.clone()),
            _ => {
                let steps = Arc::new(table.rows(None).await.map_err(FactError::failed)?);
                *read = Some((table.version(), Arc::clone(&steps)));
                Ok(steps)
            }
        }
    }

    pub(super) async fn trial_rows(&self) -> Result<Vec<TrialRow>, FactError> {
        let _reading = self.reading().await?;
        match self.tables.exists(Name::Trials).await.map_err(FactError::failed)? {
            true => book::read(&self.tables, Name::Trials).await.map_err(FactError::failed),
            false => Ok(Vec::new()),
        }
    }

    /// Returns one trial with its evidence.
    pub(in super::super) async fn trial(&self, id: &str) -> Result<TrialDetail, FactError> {
        let rows = self.trial_rows().await?;
        let Some(last) = trials(&rows).into_iter().find(|row| row.facts.trial == id) else {
            return Err(FactError::Missing(format!("there is no trial {id:?}")));
        };
        let all = self.steps().await?;
        let verdict = standing(id, &rows, &all).map_err(FactError::failed)?;
        let mut steps: Vec<StepRow> =
            all.iter().filter(|step| step.trial == id && step.suite.is_none()).cloned().collect();
        steps.sort_by_key(|step| step.step);
        let words = gate::explain(&verdict);
        let said = |finding: gate::Finding| Guardrail {
            guardrail: finding.guardrail.as_str().to_string(),
            outcome: match finding.outcome {
                gate::Outcome::Pass => "pass",
                gate::Outcome::NotYet => "not yet",
                gate::Outcome::Fail => "fail",
            }
            .to_string(),
            reason: finding.reason,
        };
        let mut trial = document(last);
        trial.judged(steps.last());
        Ok(TrialDetail {
            trial,
            mean_gain: verdict.mean_gain,
            level: verdict.alpha,
            guardrails: verdict.findings.into_iter().map(said).collect(),
            evidence: steps.into_iter().map(evidence).collect(),
            words,
        })
    }
}

fn document(row: &TrialRow) -> Trial {
    Trial {
        trial: row.facts.trial.clone(),
        number: row.facts.number,
        state: row.state.as_str().to_string(),
        challenger: row.facts.challenger.clone(),
        incumbent: row.facts.incumbent.clone(),
        nights: row.night,
        prompts: row.steps,
        ln_wealth: row.ln_wealth,
        bar: gate::level::bar(row.facts.alpha),
        reason: row.reason.clone(),
        changed: time(row.time_us),
    }
}

fn evidence(row: StepRow) -> Evidence {
    Evidence {
        step: row.step,
        night: row.night,
        prompt_hash: row.prompt_hash,
        workload: row.workload,
        new_score: row.new_score,
        incumbent_score: row.incumbent_score,
        lambda: row.lambda,
        ln_wealth: row.ln_wealth,
    }
}
