//! What labels say: do the scores prefer what people prefer, and do people prefer what is served.

use std::collections::BTreeMap;
use std::fmt::{self, Display, Formatter};

use serde::Serialize;

use super::{AuditError, Choice, Label, Pair, Settings, labels, pairs, round_of};
use crate::gate::interval::Rate;
use crate::registry::BASE;
use crate::round::Paths;

/// How often the gate's score prefers what people prefer.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Agreement {
    /// Of the pairs on which both decide.
    pub rate: Rate,
    /// Pairs on which people, by majority, find neither better.
    pub people_tied: u64,
    /// Pairs that people decide and the score does not.
    pub score_tied: u64,
}

/// What an audit came to.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    pub round: String,
    pub pairs: u64,
    pub labelled: u64,
    pub people: u64,
    pub agreement: Agreement,
    pub by_workload: BTreeMap<String, Rate>,
    /// How often people prefer the served version to the base, of the pairs that they decide; absent where the base is served.
    pub served_preferred: Option<Rate>,
    /// Why promotions must freeze; absent where nothing bad is shown.
    pub alarm: Option<String>,
}

/// Reports on the audit of a round, by default the newest.
pub fn report(paths: &Paths, round: Option<&str>, settings: &Settings) -> Result<Report, AuditError> {
    let round = round_of(paths, round)?;
    let (pairs, labels) = (pairs(paths, &round)?, labels(paths, &round)?);
    Ok(judge(round, &pairs, &labels, settings))
}

fn judge(round: String, pairs: &[Pair], labels: &[Label], settings: &Settings) -> Report {
    let mut by_id: BTreeMap<&str, Vec<Choice>> = BTreeMap::new();
    labels.iter().for_each(|label| by_id.entry(&label.id).or_default().push(label.choice));
    let mut people: Vec<&str> = labels.iter().map(|label| label.by.as_str()).collect();
    people.sort_unstable();
    people.dedup();
    let (mut agreed, mut decided, mut people_tied, mut score_tied, mut labelled) = (0, 0, 0, 0, 0);
    let (mut served, mut compared) = (0, 0);
    let mut workloads: BTreeMap<String, (u64, u64)> = BTreeMap::new();
    for pair in pairs {
        let Some(choices) = by_id.get(pair.id.as_str()) else { continue };
        labelled += 1;
        let choice = majority(choices);
        let (better, worse) = match choice {
            Choice::A => (&pair.a, &pair.b),
            Choice::B => (&pair.b, &pair.a),
            Choice::Tie => {
                people_tied += 1;
                continue;
            }
        };
        if pair.a.version != pair.b.version {
            compared += 1;
            served += u64::from(better.version != BASE);
        }
        if better.total == worse.total {
            score_tied += 1;
            continue;
        }
        decided += 1;
        let same = u64::from(better.total > worse.total);
        agreed += same;
        let entry = workloads.entry(pair.workload.clone().unwrap_or_default()).or_default();
        *entry = (entry.0 + same, entry.1 + 1);
    }
    let rate = Rate::of(agreed, decided);
    let served_preferred = (compared > 0).then(|| Rate::of(served, compared));
    let alarm = alarm(&rate, served_preferred.as_ref(), settings);
    Report {
        round,
        pairs: pairs.len() as u64,
        labelled,
        people: people.len() as u64,
        agreement: Agreement { rate, people_tied, score_tied },
        by_workload: workloads.into_iter().map(|(name, (same, all))| (name, Rate::of(same, all))).collect(),
        served_preferred,
        alarm,
    }
}

/// Returns what most people chose; as many on either side is a tie.
fn majority(choices: &[Choice]) -> Choice {
    let count = |wanted: Choice| choices.iter().filter(|choice| **choice == wanted).count();
    match count(Choice::A).cmp(&count(Choice::B)) {
        std::cmp::Ordering::Greater => Choice::A,
        std::cmp::Ordering::Less => Choice::B,
        std::cmp::Ordering::Equal => Choice::Tie,
    }
}

fn alarm(agreement: &Rate, served: Option<&Rate>, settings: &Settings) -> Option<String> {
    let least = settings.min_agreement;
    let shown = |rate: &Rate| format!("{:.2} ({:.2} to {:.2})", rate.share(), rate.lower, rate.upper);
    if agreement.upper < least {
        return Some(format!(
            "people and the gate's score agree on {} of the pairs, at least {least}",
            shown(agreement)
        ));
    }
    let served = served.filter(|rate| rate.upper < 0.5)?;
    Some(format!("people prefer what is served to the base on {} of the pairs, less than half", shown(served)))
}

impl Display for Report {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let Report { round, pairs, labelled, people, agreement, by_workload, served_preferred, alarm } = self;
        let shown = |rate: &Rate| {
            format!(
                "{} of {}, {:.2} ({:.2} to {:.2})",
                rate.successes,
                rate.tries,
                rate.share(),
                rate.lower,
                rate.upper
            )
        };
        writeln!(f, "audit of {round}: {labelled} of {pairs} pairs labelled, people: {people}")?;
        writeln!(f, "the gate's score prefers what people prefer: {}", shown(&agreement.rate))?;
        writeln!(
            f,
            "  neither is better to people: {}; to the score: {}",
            agreement.people_tied, agreement.score_tied
        )?;
        for (workload, rate) in by_workload {
            writeln!(f, "  {workload}: {}", shown(rate))?;
        }
        match served_preferred {
            Some(rate) => writeln!(f, "people prefer what is served to the base: {}", shown(rate))?,
            None => writeln!(f, "the base was served, so there was nothing to compare it with")?,
        }
        match alarm {
            Some(alarm) => writeln!(f, "ALARM: {alarm}"),
            None => writeln!(f, "nothing bad is shown"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::Answer;
    use super::*;

    fn pair(at: usize, a: f64, b: f64) -> Pair {
        let answer = |version: &str, total: f64| Answer {
            version: version.into(),
            text: String::new(),
            total,
            parts: BTreeMap::new(),
        };
        Pair {
            id: format!("round-00001/{at}"),
            prompt_hash: at.to_string(),
            workload: Some("w".into()),
            messages: Vec::new(),
            a: answer("taod-00001", a),
            b: answer(BASE, b),
            scorers: "s".into(),
        }
    }

    fn label(at: usize, choice: Choice, by: &str) -> Label {
        Label { id: format!("round-00001/{at}"), choice, by: by.into() }
    }

    #[test]
    fn choices_are_counted_by_majority_and_held_to_the_scores() {
        let pairs = [pair(0, 1.0, 0.0), pair(1, 0.0, 1.0), pair(2, 0.5, 0.5), pair(3, 1.0, 0.0), pair(4, 1.0, 0.0)];
        let labels = [
            label(0, Choice::A, "x"),
            label(1, Choice::A, "x"),
            label(2, Choice::B, "x"),
            label(3, Choice::A, "x"),
            label(3, Choice::B, "y"),
        ];
        let found = judge("r".into(), &pairs, &labels, &Settings::default());
        assert_eq!((found.pairs, found.labelled, found.people), (5, 4, 2));
        assert_eq!(found.agreement.rate, Rate::of(1, 2));
        assert_eq!((found.agreement.people_tied, found.agreement.score_tied), (1, 1));
        assert_eq!(found.served_preferred, Some(Rate::of(2, 3)));
        assert_eq!(found.by_workload["w"], Rate::of(1, 2));
        assert_eq!(found.alarm, None, "two pairs show nothing");
    }

    #[test]
    fn disagreement_that_is_shown_is_an_alarm_and_so_is_a_served_version_that_people_dislike() {
        let pairs: Vec<Pair> = (0..40).map(|at| pair(at, 1.0, 0.0)).collect();
        let told = |good: usize| {
            let choice = |at| if at < good { Choice::A } else { Choice::B };
            let labels: Vec<Label> = (0..40).map(|at| label(at, choice(at), "x")).collect();
            judge("r".into(), &pairs, &labels, &Settings::default())
        };
        // 16 of 40: the upper end of the 95 % interval is 0.567 (R's binom.test), below 0.6; of 20 of 40 it is 0.662.
        let bad = told(16);
        assert!(bad.alarm.as_ref().is_some_and(|alarm| alarm.contains("agree on 0.40 (0.25 to 0.57)")), "{bad:?}");
        assert_eq!(told(20).alarm, None);
        // The scores can be right about what people dislike: then the served version is what is wrong.
        let turned: Vec<Pair> = (0..40).map(|at| pair(at, 0.0, 1.0)).collect();
        let labels: Vec<Label> = (0..40).map(|at| label(at, Choice::B, "x")).collect();
        let disliked = judge("r".into(), &turned, &labels, &Settings::default());
        assert!(disliked.alarm.as_ref().is_some_and(|alarm| alarm.contains("less than half")), "{disliked:?}");
        assert!(disliked.to_string().contains("ALARM"));
    }
}
