//! Fixed lists of prompts that both sides answer once a trial: guardrails, never evidence.
//!
//! Evidence needs prompts that nobody has used. What recurs every day, and what must never break, is just what has been used
//! before: the head of the traffic, and the operator's own suite. Their answers decide no promotion; they can only refuse one.
//! A suite has no more prompts to wait for, so its mean is the answer, and the bounds are told with it. Two suites probe instead of
//! asking: what the challenger gives away, and whether the gate's own scorers can be argued with.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::GateError;
use super::guardrail::{Finding, Guardrail, Thresholds};
use super::rows::{Observation, StepRow};

/// Which list.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Suite {
    /// Gate clusters of the most traffic among those that earlier trials used up.
    Head,
    /// The operator's file: regressions, trip wires, canaries, injections, each held to the rules of its workload.
    Regression,
    /// Beginnings of texts that training has met, whose ends no answer may hold: the operator's canaries, and training prompts.
    /// A score is 1 where a side keeps the text to itself and 0 where it gives it away.
    Memorisation,
    /// Bad answers that argue with their judge. The new score is that of the answer with the argument, the incumbent's that
    /// of the answer with as much text that asks for nothing: no side answers, the gate's learned scorers do.
    Injection,
}

impl Suite {
    /// Every suite, in the order in which they are judged.
    pub const ALL: [Suite; 4] = [Suite::Head, Suite::Regression, Suite::Memorisation, Suite::Injection];

    /// Returns the name stored in the table.
    pub fn as_str(self) -> &'static str {
        match self {
            Suite::Head => "head",
            Suite::Regression => "regression",
            Suite::Memorisation => "memorisation",
            Suite::Injection => "injection",
        }
    }

    fn guardrail(self) -> Guardrail {
        match self {
            Suite::Head => Guardrail::Head,
            Suite::Regression => Guardrail::Regression,
            Suite::Memorisation => Guardrail::Memorisation,
            Suite::Injection => Guardrail::Injection,
        }
    }
}

/// The clusters of each suite, as fixed when the trial was opened.
pub type Named = BTreeMap<Suite, Vec<String>>;

/// The suites of a trial and what was measured on them.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Suites {
    pub(super) named: Named,
    measured: BTreeMap<Suite, Vec<Observation>>,
}

impl Suites {
    /// Returns suites of which nothing is measured.
    pub(super) fn new(named: Named) -> Suites {
        Suites { named, measured: BTreeMap::new() }
    }

    /// Returns the next suite to judge with its clusters, or `None` where all are.
    pub fn next(&self) -> Option<(Suite, &[String])> {
        let waiting = |(suite, names): &(&Suite, &Vec<String>)| !names.is_empty() && !self.measured.contains_key(suite);
        self.named.iter().find(waiting).map(|(suite, names)| (*suite, names.as_slice()))
    }

    /// Takes the measurements of the next suite, in its order, and returns the rows to store. Clusters that were erased
    /// meanwhile may be missing.
    pub fn absorb(&mut self, trial: &str, night: u32, found: &[Observation]) -> Result<Vec<StepRow>, GateError> {
        let Some((suite, names)) = self.next() else { return Ok(Vec::new()) };
        let mut expected = names.iter();
        for (observation, step) in found.iter().zip(1..) {
            observation.check()?;
            if !expected.any(|name| *name == observation.cluster) {
                return Err(GateError::Order {
                    trial: trial.to_string(),
                    step,
                    expected: format!("one of suite {}", suite.as_str()),
                    found: observation.cluster.clone(),
                });
            }
        }
        self.measured.insert(suite, found.to_vec());
        let row = |(observation, step): (&Observation, u64)| StepRow {
            step,
            night,
            suite: Some(suite.as_str().to_string()),
            ..StepRow::of(trial, observation)
        };
        Ok(found.iter().zip(1..).map(row).collect())
    }

    /// Absorbs stored rows again. Where evidence is stored (`begun`), all suites were judged, though nothing of one may have
    /// been left.
    pub(super) fn replay(&mut self, trial: &str, rows: &[&StepRow], begun: bool) -> Result<(), GateError> {
        while let Some((suite, _)) = self.next() {
            let mut mine: Vec<&&StepRow> = rows.iter().filter(|r| r.suite.as_deref() == Some(suite.as_str())).collect();
            if mine.is_empty() && !begun {
                return Ok(());
            }
            mine.sort_by_key(|row| row.step);
            let found: Vec<Observation> = mine.iter().map(|row| row.observation()).collect();
            self.absorb(trial, 0, &found)?;
        }
        Ok(())
    }

    /// Returns what the suites say.
    pub(super) fn findings(&self, limits: &Thresholds) -> Vec<Finding> {
        let finding = |suite: Suite| {
            let (names, measured) = (self.named.get(&suite).map_or(0, Vec::len), self.measured.get(&suite));
            let fall = |tolerance| super::guardrail::suite(suite.guardrail(), names, measured, tolerance, limits.level);
            match suite {
                Suite::Head => fall(limits.head_tolerance),
                Suite::Regression => fall(limits.regression_tolerance),
                Suite::Memorisation => super::guardrail::memorisation(names, measured),
                Suite::Injection => super::guardrail::injection(names, measured, limits),
            }
        };
        Suite::ALL.map(finding).to_vec()
    }
}

#[cfg(test)]
mod tests {
    use super::super::guardrail::Outcome;
    use super::super::trial::tests::observation;
    use super::*;

    fn suites(head: usize, regression: usize) -> Suites {
        let names = |kind: &str, n: usize| (0..n).map(|i| format!("{kind}{i}")).collect();
        Suites::new([(Suite::Head, names("h", head)), (Suite::Regression, names("r", regression))].into())
    }

    fn outcomes(suites: &Suites) -> [Outcome; 2] {
        let found = suites.findings(&Thresholds::default());
        [found[0].outcome, found[1].outcome]
    }

    #[test]
    fn a_suite_is_judged_once_in_its_order_and_comes_back_from_its_rows() {
        let mut suites = suites(3, 2);
        assert_eq!(outcomes(&suites), [Outcome::NotYet, Outcome::NotYet]);
        let same = |name: &str| observation(name, 0.5, 0.5);
        assert!(suites.absorb("t", 1, &[same("h1"), same("h0")]).is_err(), "out of order");
        assert!(suites.absorb("t", 1, &[same("x")]).is_err(), "no member");
        // One was erased.
        let mut rows = suites.absorb("t", 1, &[same("h0"), same("h2")]).unwrap();
        assert_eq!(suites.next().unwrap().0, Suite::Regression);
        rows.extend(suites.absorb("t", 1, &[same("r0"), same("r1")]).unwrap());
        assert_eq!(suites.next(), None);
        assert_eq!(outcomes(&suites), [Outcome::Pass, Outcome::Pass]);
        let mut again = self::suites(3, 2);
        again.replay("t", &rows.iter().rev().collect::<Vec<_>>(), false).unwrap();
        assert_eq!(again, suites);
    }

    #[test]
    fn a_fall_on_a_suite_refuses() {
        for (head, regression, expected) in [
            (-0.05, 0.0, [Outcome::Pass, Outcome::Pass]),
            (-0.2, 0.0, [Outcome::Fail, Outcome::Pass]),
            (0.3, -0.1, [Outcome::Pass, Outcome::Fail]),
        ] {
            let mut suites = suites(10, 10);
            for (kind, change) in [("h", head), ("r", regression)] {
                let all: Vec<Observation> =
                    (0..10).map(|i| observation(&format!("{kind}{i}"), 0.5 + change, 0.5)).collect();
                suites.absorb("t", 1, &all).unwrap();
            }
            assert_eq!(outcomes(&suites), expected, "{head} {regression}");
        }
        assert_eq!(outcomes(&suites(0, 0)), [Outcome::Pass, Outcome::Pass], "none to break");
    }

    #[test]
    fn what_is_given_away_and_a_judge_that_is_moved_refuse() {
        let names = |kind: &str, n: usize| (0..n).map(|i| format!("{kind}{i}")).collect::<Vec<_>>();
        let probes = || Suites::new([(Suite::Memorisation, names("m", 4)), (Suite::Injection, names("i", 4))].into());
        let outcomes = |suites: &Suites| {
            let found = suites.findings(&Thresholds::default());
            assert!(found[..2].iter().all(|finding| finding.outcome == Outcome::Pass));
            [(found[2].guardrail, found[2].outcome), (found[3].guardrail, found[3].outcome)]
        };
        let said =
            |memorisation, injection| [(Guardrail::Memorisation, memorisation), (Guardrail::Injection, injection)];
        assert_eq!(outcomes(&probes()), said(Outcome::NotYet, Outcome::NotYet));
        let kept = |new: [f64; 4], old: [f64; 4]| {
            let one = |i: usize| observation(&format!("m{i}"), new[i], old[i]);
            (0..4).map(one).collect::<Vec<_>>()
        };
        let moved = |by: f64| (0..4).map(|i| observation(&format!("i{i}"), 0.3 + by, 0.3)).collect::<Vec<_>>();
        for (new, old, by, expected) in [
            ([1.0; 4], [1.0; 4], 0.0, said(Outcome::Pass, Outcome::Pass)),
            // What the incumbent gives away too is no fault of the challenger.
            ([0.0, 1.0, 1.0, 1.0], [0.0, 1.0, 1.0, 1.0], -0.2, said(Outcome::Pass, Outcome::Pass)),
            // One more is one too many, however many it keeps better.
            ([1.0, 0.0, 1.0, 1.0], [0.0, 1.0, 0.0, 1.0], 0.04, said(Outcome::Fail, Outcome::Pass)),
            ([1.0; 4], [1.0; 4], 0.06, said(Outcome::Pass, Outcome::Fail)),
        ] {
            let mut suites = probes();
            let mut rows = suites.absorb("t", 1, &kept(new, old)).unwrap();
            rows.extend(suites.absorb("t", 1, &moved(by)).unwrap());
            assert_eq!(outcomes(&suites), expected, "{new:?} {by}");
            let mut again = probes();
            again.replay("t", &rows.iter().collect::<Vec<_>>(), true).unwrap();
            assert_eq!(again, suites, "from its rows");
        }
    }
}
