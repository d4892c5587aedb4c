//! One challenger's whole test against one incumbent, night after night, as pure steps.
//!
//! The driver's loop: [`Trial::open`] and store the row; each night [`Trial::begin_night`] and store the row (it holds
//! the order); then for each [`Trial::next_block`] reserve its clusters in `gate_usage`, draw and score answers,
//! [`Trial::absorb`] and store the steps, [`Trial::decide`]. What is stored before it is evaluated cannot be tried again
//! after a crash: [`Trial::resume`] continues the same test from the same rows.

use std::collections::{BTreeMap, HashSet};

use super::GateError;
use super::decision::{Decision, Waiting};
use super::evidence::Evidence;
use super::guardrail::{Finding, Outcome, examine};
use super::history::last_rows;
use super::level::bar;
use super::order::{self, Block};
use super::rows::{Detail, Facts, LengthBounds, Observation, State, StepRow, TrialRow, spent};
use super::settings::Settings;
use super::suite::{Named, Suite, Suites};
use crate::record::derive_seed;

/// Relative difference that storing a number and reading it back may make.
pub(super) const TOLERANCE: f64 = 1e-9;

/// What a trial needs to know when it is opened.
#[derive(Debug, Clone, PartialEq)]
pub struct Opening {
    pub budget_year: i32,
    pub challenger: String,
    pub challenger_sha256: String,
    /// A version, or `base`.
    pub incumbent: String,
    pub incumbent_sha256: String,
    pub scorer_epoch: String,
    pub decoding: String,
    /// Absolute length bounds of the workloads whose rules state them.
    pub lengths: BTreeMap<String, LengthBounds>,
    /// Fixed lists of clusters that are judged besides.
    pub suites: Named,
    /// Root of the order's seed.
    pub seed: u64,
}

/// What must be as it was when the trial was opened, or its evidence means nothing any more.
#[derive(Debug, Clone, Copy)]
pub struct Conditions<'a> {
    pub incumbent_sha256: &'a str,
    pub scorer_epoch: &'a str,
    pub decoding: &'a str,
    pub settings: &'a Settings,
}

/// A trial in memory; its rows are the truth.
#[derive(Debug, Clone, PartialEq)]
pub struct Trial {
    facts: Facts,
    settings: Settings,
    lengths: BTreeMap<String, LengthBounds>,
    order_seed: u64,
    evidence: Evidence,
    /// The bet that the challenger does not gain the margin.
    against: Evidence,
    observations: Vec<Observation>,
    suites: Suites,
    nights: u32,
    /// Logged calls of all gate prompts, as counted on the last night.
    all_traffic: u64,
    /// What is left of tonight's order.
    pending: Vec<String>,
    /// Decided and stored as such: nothing more is absorbed.
    closed: Option<State>,
}

impl Trial {
    /// Opens the next trial of the year, given all rows of table `trials`.
    ///
    /// An adapter is tried once: a second trial of the same weights would be a second chance at the same bar. Only
    /// after a void trial may they meet another incumbent, under a new number and level.
    pub fn open(opening: Opening, history: &[TrialRow], settings: &Settings) -> Result<Trial, GateError> {
        for last in last_rows(history) {
            if last.state == State::Open {
                return Err(GateError::StillOpen(last.facts.trial.clone()));
            }
            let same_challenger = last.facts.challenger_sha256 == opening.challenger_sha256;
            let same_pair = same_challenger && last.facts.incumbent_sha256 == opening.incumbent_sha256;
            if same_pair || (same_challenger && last.state != State::Void) {
                return Err(GateError::AlreadyTried {
                    challenger: opening.challenger,
                    trial: last.facts.trial.clone(),
                    state: last.state.as_str(),
                });
            }
        }
        let spent = spent(history, opening.budget_year, u32::MAX);
        let terms = settings.terms();
        let number = spent.trials + 1;
        let trial = format!("{}-{number:03}-{}", opening.budget_year, opening.challenger);
        let order_seed = derive_seed(opening.seed, &["gate-order", &trial]);
        let facts = Facts {
            number,
            budget_year: opening.budget_year,
            challenger: opening.challenger,
            challenger_sha256: opening.challenger_sha256,
            incumbent: opening.incumbent,
            incumbent_sha256: opening.incumbent_sha256,
            mode: terms.mode,
            budget_alpha: terms.alpha,
            challengers: terms.challengers,
            promotions: spent.promotions,
            alpha: terms.next_level(&spent)?,
            margin: settings.margin,
            scorer_epoch: opening.scorer_epoch,
            decoding: opening.decoding,
            order_seed: format!("{order_seed:016x}"),
            trial,
        };
        Trial::from_facts(facts, settings.clone(), opening.lengths, opening.suites)
    }

    fn from_facts(
        facts: Facts,
        settings: Settings,
        lengths: BTreeMap<String, LengthBounds>,
        suites: Named,
    ) -> Result<Trial, GateError> {
        let order_seed = u64::from_str_radix(&facts.order_seed, 16)
            .map_err(|_| GateError::record(&facts.trial, format!("order seed {:?} is not hex", facts.order_seed)))?;
        Ok(Trial {
            evidence: Evidence::new(facts.margin)?,
            against: Evidence::against(facts.margin)?,
            facts,
            settings,
            lengths,
            order_seed,
            observations: Vec::new(),
            suites: Suites::new(suites),
            nights: 0,
            all_traffic: 0,
            pending: Vec::new(),
            closed: None,
        })
    }

    /// Rebuilds a trial from its rows by doing everything again; a row that differs from its recomputation is an error.
    ///
    /// `rows` and `steps` may hold other trials' rows too.
    pub fn resume(trial: &str, rows: &[TrialRow], steps: &[StepRow]) -> Result<Trial, GateError> {
        let record = |what: String| GateError::record(trial, what);
        let mut rows: Vec<&TrialRow> = rows.iter().filter(|row| row.facts.trial == trial).collect();
        rows.sort_by_key(|row| (row.night, row.state != State::Open));
        let opening = *rows.first().ok_or_else(|| GateError::NoTrial(trial.to_string()))?;
        let first = detail(opening)?;
        let mut out = Trial::from_facts(opening.facts.clone(), first.settings, first.lengths, first.suites)?;
        let (suites, mut steps): (Vec<&StepRow>, Vec<&StepRow>) =
            steps.iter().filter(|step| step.trial == trial).partition(|step| step.suite.is_some());
        steps.sort_by_key(|step| step.step);
        out.suites.replay(trial, &suites, !steps.is_empty())?;
        for row in rows {
            if row.facts != out.facts {
                return Err(record(format!(
                    "its rows of night 0 and {} differ in what was fixed at opening",
                    row.night
                )));
            }
            if row.state != State::Open {
                out.closed = Some(row.state);
            } else if row.night > 0 {
                let Detail { order, traffic, .. } = detail(row)?;
                out.start_night(order.clone(), traffic)?;
                if out.pending != order || row.night != out.nights {
                    return Err(record(format!("the order of night {} is not that of the stored seed", row.night)));
                }
                out.replay(steps.iter().filter(|step| step.night == row.night))?;
            }
        }
        match steps.len() as u64 == out.steps() {
            true => Ok(out),
            false => {
                Err(record(format!("{} steps are stored but only {} belong to a night", steps.len(), out.steps())))
            }
        }
    }

    /// Absorbs one night's stored steps again, block by block, and compares.
    fn replay<'a>(&mut self, steps: impl Iterator<Item = &'a &'a StepRow>) -> Result<(), GateError> {
        let steps: Vec<&StepRow> = steps.copied().collect();
        for stored in steps.chunks(self.settings.block_size as usize) {
            let block: Vec<Observation> = stored.iter().map(|step| step.observation()).collect();
            for (again, stored) in self.absorb(block)?.iter().zip(stored) {
                let close = |a: f64, b: f64| (a - b).abs() <= TOLERANCE * b.abs().max(1.0);
                let same = close(again.d, stored.d)
                    && close(again.lambda, stored.lambda)
                    && close(again.ln_wealth, stored.ln_wealth)
                    && again.step == stored.step;
                if !same {
                    let what = format!("step {} does not follow from its scores and the steps before", stored.step);
                    return Err(GateError::record(&self.facts.trial, what));
                }
            }
        }
        Ok(())
    }

    /// Begins a night with its fresh gate clusters and returns the order in which they will be judged.
    ///
    /// A night without any fresh cluster counts too: a trial must not stay open without end. `all_traffic` are the logged
    /// calls that all gate prompts of the night stand for, judged or not; 0 where they were not counted.
    pub fn begin_night(&mut self, fresh: Vec<String>, all_traffic: u64, time_us: i64) -> Result<TrialRow, GateError> {
        self.must_be_open()?;
        if self.nights >= self.settings.max_nights {
            return Err(GateError::NightsOver { trial: self.facts.trial.clone(), nights: self.nights });
        }
        self.start_night(fresh, all_traffic)?;
        let mut row = self.row(State::Open, format!("night {} begun", self.nights), time_us);
        row.record = self.record(self.pending.clone(), Vec::new());
        Ok(row)
    }

    fn start_night(&mut self, fresh: Vec<String>, all_traffic: u64) -> Result<(), GateError> {
        let used: HashSet<&str> = self.observations.iter().map(|o| o.cluster.as_str()).collect();
        if let Some(cluster) = fresh.iter().find(|cluster| used.contains(cluster.as_str())) {
            return Err(GateError::Reused { cluster: cluster.clone(), trial: self.facts.trial.clone() });
        }
        self.nights += 1;
        self.all_traffic = all_traffic;
        let seed = derive_seed(self.order_seed, &["night", &self.nights.to_string()]);
        self.pending = order::permutation(fresh, seed);
        Ok(())
    }

    /// Returns the next block of tonight's order, or `None` where the night has no more prompts. The last may be short.
    pub fn next_block(&self) -> Option<Block> {
        let size = self.pending.len().min(self.settings.block_size as usize);
        if size == 0 || self.closed.is_some() {
            return None;
        }
        Some(Block { night: self.nights, first_step: self.steps() + 1, clusters: self.pending[..size].to_vec() })
    }

    /// Takes the measurements of the whole next block, in its order, and returns the rows to store.
    pub fn absorb(&mut self, block: Vec<Observation>) -> Result<Vec<StepRow>, GateError> {
        self.must_be_open()?;
        let expected = self.next_block().map(|b| b.clusters).unwrap_or_default();
        for i in 0..expected.len().max(block.len()) {
            let (want, got) = (expected.get(i).map_or("none", |c| c), block.get(i).map_or("none", |o| &o.cluster));
            if want != got {
                return Err(GateError::Order {
                    trial: self.facts.trial.clone(),
                    step: self.steps() + 1 + i as u64,
                    expected: want.to_string(),
                    found: got.to_string(),
                });
            }
        }
        block.iter().try_for_each(Observation::check)?;
        let mut rows = Vec::with_capacity(block.len());
        self.pending.drain(..block.len());
        for observation in block {
            let step = self.evidence.step(observation.d())?;
            self.against.step(-observation.d())?;
            rows.push(StepRow {
                step: self.evidence.len(),
                night: self.nights,
                lambda: step.lambda,
                ln_wealth: step.ln_wealth,
                ..StepRow::of(&self.facts.trial, &observation)
            });
            self.observations.push(observation);
        }
        Ok(rows)
    }

    /// Decides after a block: promotes only where the bar is crossed and every guardrail passes.
    pub fn decide(&self) -> Decision {
        if self.ln_wealth() < self.bar() {
            return Decision::Continue(Waiting::Evidence);
        }
        let findings = self.findings();
        if let Some(failed) = findings.iter().find(|f| f.outcome == Outcome::Fail) {
            return Decision::Refuse { guardrail: failed.guardrail, reason: failed.reason.clone() };
        }
        let unsure = findings.iter().filter(|f| f.outcome == Outcome::NotYet).map(|f| f.guardrail);
        match unsure.collect::<Vec<_>>() {
            unsure if !unsure.is_empty() => Decision::Continue(Waiting::Guardrails(unsure)),
            _ if self.nights < self.settings.min_nights => Decision::Continue(Waiting::Nights),
            _ => Decision::Promote,
        }
    }

    /// Decides at the end of a night, when its prompts are used up: the same, and whether the challenger is dropped.
    ///
    /// Hopeless is one whose evidence melted, or that is shown not to gain the margin. It is looked at here and not after every
    /// block: a good challenger of small gain often dips below on the way (3 % of those that gain 0.03 at 2,000 prompts a night).
    pub fn end_night(&self) -> Decision {
        match self.decide() {
            Decision::Continue(_) if self.has_melted() || self.is_shown_not_to_gain() => Decision::Futile,
            Decision::Continue(_) if self.nights >= self.settings.max_nights => Decision::Expired,
            decision => decision,
        }
    }

    /// Returns true where the evidence, once better, speaks against the challenger.
    pub(super) fn has_melted(&self) -> bool {
        self.ln_wealth() < self.settings.futility
    }

    fn is_shown_not_to_gain(&self) -> bool {
        self.ln_against() >= self.bar_against()
    }

    /// Returns why the trial is void under the conditions of today, or `None` where it stands.
    pub fn void_reason(&self, today: &Conditions) -> Option<String> {
        let changed = [
            ("incumbent", self.facts.incumbent_sha256 != today.incumbent_sha256),
            ("scorer", self.facts.scorer_epoch != today.scorer_epoch),
            ("decoding", self.facts.decoding != today.decoding),
            ("gate settings", self.settings != *today.settings),
        ];
        let names: Vec<&str> = changed.iter().filter(|(_, changed)| *changed).map(|(name, _)| *name).collect();
        (!names.is_empty()).then(|| format!("changed since the trial was opened: {}", names.join(", ")))
    }

    /// Returns the row of the trial's present state: store it after `open`, and again with a decision that closes it.
    pub fn row(&self, state: State, reason: impl Into<String>, time_us: i64) -> TrialRow {
        TrialRow {
            facts: self.facts.clone(),
            state,
            time_us,
            night: self.nights,
            steps: self.steps(),
            ln_wealth: self.ln_wealth(),
            guardrail: None,
            reason: reason.into(),
            record: self.record(Vec::new(), Vec::new()),
        }
    }

    /// Closes the trial and returns its last row; for a decision to continue, the row of a trial that stays open is `None`.
    pub fn close(&mut self, decision: &Decision, time_us: i64) -> Option<TrialRow> {
        let state = decision.state();
        if state == State::Open {
            return None;
        }
        let mut row = self.row(state, super::verdict::reason(self, decision), time_us);
        row.record = self.record(Vec::new(), self.findings());
        if let Decision::Refuse { guardrail, .. } = decision {
            row.guardrail = Some(guardrail.as_str().to_string());
        }
        self.closed = Some(state);
        Some(row)
    }

    fn record(&self, order: Vec<String>, findings: Vec<Finding>) -> String {
        let (settings, lengths) = (self.settings.clone(), self.lengths.clone());
        let suites = if self.nights == 0 { self.suites.named.clone() } else { Named::new() };
        let detail = Detail { settings, lengths, order, traffic: self.all_traffic, suites, findings };
        // Plain numbers, strings and maps with string keys always serialise.
        serde_json::to_string(&detail).unwrap_or_default()
    }

    fn must_be_open(&self) -> Result<(), GateError> {
        match self.closed {
            None => Ok(()),
            Some(state) => Err(GateError::record(&self.facts.trial, format!("it is already {}", state.as_str()))),
        }
    }

    /// Returns what every guardrail says now.
    pub fn findings(&self) -> Vec<Finding> {
        let mut findings = examine(&self.observations, &self.lengths, &self.settings.guardrails);
        findings.extend(self.suites.findings(&self.settings.guardrails));
        findings
    }

    /// Returns the suite that is to be judged next with its clusters, or `None` where all are.
    pub fn next_suite(&self) -> Option<(Suite, &[String])> {
        self.suites.next()
    }

    /// Takes the measurements of the next suite and returns the rows to store.
    pub fn absorb_suite(&mut self, found: &[Observation]) -> Result<Vec<StepRow>, GateError> {
        self.must_be_open()?;
        self.suites.absorb(&self.facts.trial, self.nights, found)
    }

    /// Returns what was fixed at opening.
    pub fn facts(&self) -> &Facts {
        &self.facts
    }

    /// Returns the trial's id.
    pub fn id(&self) -> &str {
        &self.facts.trial
    }

    /// Returns the settings that the trial was opened with.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Returns the state in which the trial was closed, or `Open`.
    pub fn state(&self) -> State {
        self.closed.unwrap_or(State::Open)
    }

    /// Returns everything measured so far, in order.
    pub fn observations(&self) -> &[Observation] {
        &self.observations
    }

    /// Returns the number of clusters judged.
    pub fn steps(&self) -> u64 {
        self.evidence.len()
    }

    /// Returns what is left of tonight's order: fresh still, because nothing of it was reserved.
    pub fn left_tonight(&self) -> &[String] {
        &self.pending
    }

    /// Returns the number of nights begun.
    pub fn nights(&self) -> u32 {
        self.nights
    }

    /// Returns the logarithm of the wealth.
    pub fn ln_wealth(&self) -> f64 {
        self.evidence.ln_wealth()
    }

    /// Returns the logarithm of the wealth of the bet against the challenger.
    pub fn ln_against(&self) -> f64 {
        self.against.ln_wealth()
    }

    /// Returns the bar for that wealth, above which the challenger is dropped.
    pub fn bar_against(&self) -> f64 {
        bar(self.settings.futility_alpha)
    }

    /// Returns the mean difference so far.
    pub fn mean_gain(&self) -> f64 {
        self.evidence.mean_gain()
    }

    /// Returns what a difference adds to the logarithm of the wealth on average, at the present stake; `None` before the first.
    pub(super) fn growth(&self) -> Option<f64> {
        let stake = self.evidence.stake();
        let gains = self.observations.iter().map(|o| (stake * (o.d() - self.facts.margin)).ln_1p());
        (!self.observations.is_empty()).then(|| gains.sum::<f64>() / self.observations.len() as f64)
    }

    /// Returns the share of the gate's traffic that the judged clusters stand for; `None` where nobody counted it.
    pub fn traffic_share(&self) -> Option<f64> {
        let judged: u64 = self.observations.iter().map(|o| o.traffic).sum();
        (self.all_traffic > 0).then(|| judged as f64 / self.all_traffic as f64)
    }

    /// Returns the bar for the logarithm of the wealth.
    pub fn bar(&self) -> f64 {
        bar(self.facts.alpha)
    }
}

fn detail(row: &TrialRow) -> Result<Detail, GateError> {
    serde_json::from_str(&row.record).map_err(|e| {
        GateError::record(&row.facts.trial, format!("the detail of night {} is unreadable: {e}", row.night))
    })
}

#[cfg(test)]
#[path = "trial_tests.rs"]
pub(super) mod tests;
