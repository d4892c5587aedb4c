//! One simulated year, driven as a round drives its nights: the same trials, blocks, decisions and proof of a promotion.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;

use super::world::{Noise, Truth, observe};
use super::{Law, Years};
use crate::gate::rows::{State, StepRow, TrialRow, UsageRow};
use crate::gate::{Decision, GateError, Opening, Trial, Waiting, verify};
use crate::record::derive_seed;

/// What a year came to.
#[derive(Debug, Clone, PartialEq, Default)]
pub(super) struct Year {
    pub trials: u64,
    pub promotions: u64,
    /// Promotions of challengers whose true gain is not above the margin, does not last, or harms users.
    pub false_promotions: u64,
    /// Promotions whose true mean over the prompts drawn was below 0, or that harm users.
    pub harmful: u64,
    /// Challengers in trial that truly gain 0.03 or more, and those of them that were promoted.
    pub large: u64,
    pub large_promoted: u64,
    /// Nights that each promotion took.
    pub nights: Vec<u32>,
    /// The sum of the true gains of all promotions.
    pub true_gain: f64,
    pub refused: u64,
    pub futile: u64,
    pub expired: u64,
    /// Nights after the last challenger that the year's budget allows.
    pub exhausted: u64,
}

/// A trial with what it stored and what is true of it.
pub(super) struct Running {
    trial: Trial,
    rows: Vec<TrialRow>,
    steps: Vec<StepRow>,
    truth: Truth,
    expected: f64,
}

impl Running {
    /// Opens a trial of a challenger with this truth after `history`.
    pub(super) fn open(
        names: (String, String),
        history: &[TrialRow],
        years: &Years<'_>,
        truth: Truth,
        seed: u64,
    ) -> Result<Running, GateError> {
        let (challenger, incumbent) = names;
        let opening = Opening {
            budget_year: 2026,
            challenger_sha256: challenger.clone(),
            incumbent_sha256: incumbent.clone(),
            challenger,
            incumbent,
            scorer_epoch: String::new(),
            decoding: String::new(),
            lengths: Default::default(),
            suites: Default::default(),
            seed,
        };
        let trial = Trial::open(opening, history, years.settings)?;
        let rows = vec![trial.row(State::Open, "opened", 0)];
        Ok(Running { trial, rows, steps: Vec::new(), truth, expected: 0.0 })
    }

    /// Extends the trial by a night; what is left in `pool` stays fresh.
    pub(super) fn extend(
        &mut self,
        pool: &mut Vec<String>,
        of_year: u32,
        law: &Law,
        noise: Noise,
        rng: &mut ChaCha8Rng,
    ) -> Result<Decision, GateError> {
        if pool.is_empty() && self.trial.nights() == 0 {
            // As in a round: its first night comes with its first prompts.
            return Ok(Decision::Continue(Waiting::Evidence));
        }
        self.rows.push(self.trial.begin_night(std::mem::take(pool), 0, 0)?);
        while let Some(block) = self.trial.next_block() {
            let mut measured = Vec::with_capacity(block.clusters.len());
            for cluster in &block.clusters {
                let when = (self.trial.nights(), of_year);
                let (observation, gain) = observe(cluster, (&self.truth, law.shape), when, noise, rng);
                self.expected += gain;
                measured.push(observation);
            }
            self.steps.extend(self.trial.absorb(measured)?);
            let decision = self.trial.decide();
            if decision.state() != State::Open {
                *pool = self.trial.left_tonight().to_vec();
                return Ok(decision);
            }
        }
        Ok(self.trial.end_night())
    }

    /// Returns the rows of table `trials` so far.
    pub(super) fn into_rows(self) -> Vec<TrialRow> {
        self.rows
    }

    /// Returns the number of nights begun.
    pub(super) fn nights(&self) -> u32 {
        self.trial.nights()
    }

    /// Returns the reservations that a round would have stored block by block.
    fn usage(&self) -> Vec<UsageRow> {
        let row = |step: &StepRow| UsageRow {
            cluster: step.cluster.clone(),
            trial: step.trial.clone(),
            night: step.night,
            step: step.step,
        };
        self.steps.iter().map(row).collect()
    }

    /// Returns the mean of what the differences are expected to be, over the prompts drawn.
    fn true_mean(&self) -> f64 {
        self.expected / self.trial.steps().max(1) as f64
    }
}

/// Runs a year.
pub(super) fn run(years: &Years<'_>, law: &Law, year: u64) -> Result<Year, GateError> {
    let name = format!("{}/{}", law.scenario.as_str(), law.shape.as_str());
    let seed = derive_seed(years.seed, &["year", &name, &year.to_string()]);
    let mut state = Walk {
        years,
        law,
        rng: ChaCha8Rng::seed_from_u64(seed),
        seed,
        history: Vec::new(),
        pool: Vec::new(),
        running: None,
        incumbent: "base".to_string(),
        clusters: 0,
        out: Year::default(),
    };
    for night in 0..years.nights {
        state.night(night)?;
    }
    Ok(state.out)
}

/// A year on its way.
struct Walk<'a> {
    years: &'a Years<'a>,
    law: &'a Law,
    rng: ChaCha8Rng,
    seed: u64,
    /// Table `trials`.
    history: Vec<TrialRow>,
    pool: Vec<String>,
    running: Option<Running>,
    incumbent: String,
    clusters: u64,
    out: Year,
}

impl Walk<'_> {
    /// First the open trial, and where that ended without a promotion a new challenger on what is left of the night.
    fn night(&mut self, night: u32) -> Result<(), GateError> {
        for _ in 0..self.law.scenario.prompts(self.years.prompts, night) {
            self.clusters += 1;
            self.pool.push(format!("{:x}", self.clusters));
        }
        loop {
            let (mut running, is_new) = match self.running.take() {
                Some(running) => (running, false),
                None => match self.next_challenger() {
                    Ok(running) => (running, true),
                    Err(GateError::Exhausted { .. }) => {
                        self.out.exhausted += 1;
                        self.pool.clear();
                        return Ok(());
                    }
                    Err(error) => return Err(error),
                },
            };
            let decision = running.extend(&mut self.pool, night, self.law, self.years.noise(), &mut self.rng)?;
            match decision {
                Decision::Continue(_) => {
                    self.running = Some(running);
                    return Ok(());
                }
                Decision::Promote => return self.promote(running),
                refused => self.close(running, &refused),
            }
            if is_new {
                return Ok(());
            }
        }
    }

    fn next_challenger(&mut self) -> Result<Running, GateError> {
        let truth = self.law.scenario.challenger(self.years.settings.margin, &mut self.rng);
        let challenger = format!("c{}", self.out.trials + 1);
        let running = Running::open((challenger, self.incumbent.clone()), &self.history, self.years, truth, self.seed)?;
        self.out.trials += 1;
        self.out.large += u64::from(truth.is_large(self.years.settings.margin));
        Ok(running)
    }

    /// Promotes as the daemon does: only with the key that the recomputation of all rows gives.
    fn promote(&mut self, mut running: Running) -> Result<(), GateError> {
        let trials: Vec<TrialRow> = self.history.iter().chain(&running.rows).cloned().collect();
        let usage = running.usage();
        let key = verify(running.trial.id(), &trials, &running.steps, &usage, self.years.settings)?;
        let (mean, harms) = (running.true_mean(), running.truth.harms());
        self.out.promotions += 1;
        self.out.false_promotions += u64::from(!running.truth.deserves(self.years.settings.margin));
        self.out.large_promoted += u64::from(running.truth.is_large(self.years.settings.margin));
        self.out.harmful += u64::from(harms || mean < 0.0);
        self.out.true_gain += mean;
        self.out.nights.push(running.nights());
        self.incumbent = key.challenger().to_string();
        running.rows.extend(running.trial.close(&Decision::Promote, 0));
        self.history.append(&mut running.rows);
        Ok(())
    }

    fn close(&mut self, mut running: Running, decision: &Decision) {
        match decision.state() {
            State::Refused => self.out.refused += 1,
            State::Futile => self.out.futile += 1,
            State::Expired => self.out.expired += 1,
            State::Open | State::Promoted | State::Void => {}
        }
        // The row that closes a trial, without what the guardrails said in the end: nothing in a year reads that again, and
        // it would take a third of the time.
        running.rows.push(running.trial.row(decision.state(), "", 0));
        self.history.append(&mut running.rows);
    }
}
