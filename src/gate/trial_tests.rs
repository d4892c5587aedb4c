use super::*;
use crate::gate::Guardrail;
use crate::gate::behaviour::Behaviour;
use crate::gate::rows::{Kl, Side, UsageRow};

/// An observation with scores `new` and `incumbent` that every guardrail likes.
pub(in crate::gate) fn observation(cluster: &str, new: f64, incumbent: f64) -> Observation {
    let side = |score| Side {
        score,
        words: 40.0,
        chars: 200.0,
        quality: Some(-1.5),
        similarity: Some(0.5),
        tokens: Some(50.0),
        behaviour: Some(Behaviour::default()),
    };
    let kl = Some(Kl { mean: 0.005, over: 0.0, tokens: 40, forward: None });
    Observation {
        cluster: cluster.to_string(),
        prompt_hash: format!("p-{cluster}"),
        workload: Some("w".to_string()),
        traffic: 1,
        tenant: None,
        language: None,
        question_chars: Some(100.0),
        new: side(new),
        incumbent: side(incumbent),
        kl,
        kl_round: kl,
    }
}

pub(in crate::gate) fn clusters(night: u32, n: usize) -> Vec<String> {
    (0..n).map(|i| format!("n{night}-c{i:03}")).collect()
}

pub(in crate::gate) fn opening() -> Opening {
    Opening {
        budget_year: 2026,
        challenger: "taod-new".into(),
        challenger_sha256: "sha-new".into(),
        incumbent: "base".into(),
        incumbent_sha256: "sha-base".into(),
        scorer_epoch: "scorers".into(),
        decoding: "decoding".into(),
        lengths: BTreeMap::new(),
        suites: Default::default(),
        seed: 1,
    }
}

pub(in crate::gate) fn settings() -> Settings {
    Settings { block_size: 16, max_nights: 3, ..Settings::default() }
}

/// A trial with everything it stored, driven as `round.rs` drives it.
pub(in crate::gate) struct Driven {
    pub(in crate::gate) trial: Trial,
    pub(in crate::gate) rows: Vec<TrialRow>,
    pub(in crate::gate) steps: Vec<StepRow>,
    pub(in crate::gate) usage: Vec<UsageRow>,
}

impl Driven {
    pub(in crate::gate) fn open(opening: Opening, history: &[TrialRow], settings: &Settings) -> Driven {
        let trial = Trial::open(opening, history, settings).unwrap();
        let rows = vec![trial.row(State::Open, "opened", 1)];
        Driven { trial, rows, steps: Vec::new(), usage: Vec::new() }
    }

    /// Runs one night of `n` fresh clusters; `measure` makes the observation of a cluster.
    pub(in crate::gate) fn night(&mut self, n: usize, measure: impl Fn(&str) -> Observation) -> Decision {
        let fresh = clusters(self.trial.nights() + 1, n);
        self.rows.push(self.trial.begin_night(fresh, 0, 2).unwrap());
        while let Some(block) = self.trial.next_block() {
            self.usage.extend(block.usage(self.trial.id()));
            let observations: Vec<Observation> = block.clusters.iter().map(|c| measure(c)).collect();
            self.steps.extend(self.trial.absorb(observations).unwrap());
            let decision = self.trial.decide();
            if decision.state() != State::Open {
                return self.close(decision);
            }
        }
        self.close(self.trial.end_night())
    }

    fn close(&mut self, decision: Decision) -> Decision {
        self.rows.extend(self.trial.close(&decision, 3));
        decision
    }
}

/// Nine wins of ten, by the cluster's name alone.
pub(in crate::gate) fn better(cluster: &str) -> Observation {
    if cluster.ends_with('7') { observation(cluster, 0.0, 1.0) } else { observation(cluster, 1.0, 0.0) }
}

fn worse(cluster: &str) -> Observation {
    if cluster.ends_with('7') { observation(cluster, 1.0, 0.0) } else { observation(cluster, 0.0, 1.0) }
}

fn equal(cluster: &str) -> Observation {
    observation(cluster, 1.0, 1.0)
}

fn better_than(cluster: &str, score: f64) -> Observation {
    observation(cluster, score, 1.0 - score)
}

fn longer(cluster: &str) -> Observation {
    let mut out = better(cluster);
    out.new.words = 200.0;
    out
}

fn unmeasured(cluster: &str) -> Observation {
    Observation { kl: None, ..better(cluster) }
}

/// Guardrails that decide on as few prompts as these tests have.
fn quick() -> Settings {
    let mut settings = settings();
    settings.guardrails.workload_min_prompts = 50;
    settings.guardrails.workload_tolerance = 0.1;
    settings.guardrails.kl_mean_max = 0.2;
    settings.guardrails.quality_tolerance = 0.2;
    settings.guardrails.behaviour_tolerance = 0.1;
    settings
}

#[test]
fn every_way_a_trial_can_end() {
    type Measure = fn(&str) -> Observation;
    let open = |waiting| Decision::Continue(waiting);
    let cases: [(&str, Measure, usize, Vec<Decision>); 6] = [
        ("promoted", better, 200, vec![Decision::Promote]),
        ("no gain", equal, 40, vec![open(Waiting::Evidence), open(Waiting::Evidence), Decision::Expired]),
        ("empty nights", equal, 0, vec![open(Waiting::Evidence), open(Waiting::Evidence), Decision::Expired]),
        (
            "guardrail cannot tell",
            unmeasured,
            100,
            vec![
                open(Waiting::Guardrails(vec![Guardrail::Kl])),
                open(Waiting::Guardrails(vec![Guardrail::Kl])),
                Decision::Expired,
            ],
        ),
        ("worse", worse, 200, vec![Decision::Futile]),
        // Eight losses in a row make 18 of 50, twelve make 95.
        ("worse, on few prompts", worse, 4, vec![open(Waiting::Evidence), open(Waiting::Evidence), Decision::Futile]),
    ];
    for (name, measure, n, expected) in cases {
        let mut driven = Driven::open(opening(), &[], &quick());
        for decision in expected {
            assert_eq!(driven.night(n, measure), decision, "{name}");
        }
    }
    let mut driven = Driven::open(opening(), &[], &Settings { max_nights: 1, ..quick() });
    assert_eq!(driven.night(100, unmeasured), Decision::Expired);
    assert!(driven.rows.last().unwrap().reason.ends_with("nights ended; not told by kl"), "{:?}", driven.rows.last());
    let mut driven = Driven::open(opening(), &[], &quick());
    assert!(matches!(driven.night(100, longer), Decision::Refuse { guardrail: Guardrail::Length, .. }));
    assert_eq!(driven.rows.last().unwrap().guardrail.as_deref(), Some("length"));
    assert_eq!(driven.trial.state(), State::Refused);
    assert!(driven.trial.begin_night(clusters(9, 5), 0, 4).is_err() && driven.trial.next_block().is_none());
}

#[test]
fn a_challenger_that_passes_waits_for_its_nights() {
    let settings = Settings { min_nights: 3, ..quick() };
    let mut driven = Driven::open(opening(), &[], &settings);
    for _ in 0..2 {
        assert_eq!(driven.night(200, better), Decision::Continue(Waiting::Nights));
    }
    let waits = super::super::verdict::reason(&driven.trial, &Decision::Continue(Waiting::Nights));
    assert!(waits.ends_with("it is to be judged on 3 nights (gate.min_nights)"), "{waits}");
    assert_eq!(driven.night(200, better), Decision::Promote);
    assert!(driven.trial.steps() < 600, "the last night ends with the block that decides");
}

#[test]
fn a_trial_whose_evidence_melts_is_futile() {
    let mut driven = Driven::open(opening(), &[], &quick());
    driven.rows.push(driven.trial.begin_night(clusters(1, 400), 0, 2).unwrap());
    while driven.trial.ln_wealth() >= -2.0 {
        let block = driven.trial.next_block().unwrap();
        // Win and loss in turn: each win raises the stake that the next loss takes.
        let in_turn = |(i, c): (usize, &String)| if i % 2 == 0 { better_than(c, 1.0) } else { better_than(c, 0.0) };
        driven.trial.absorb(block.clusters.iter().enumerate().map(in_turn).collect()).unwrap();
    }
    assert!(driven.trial.steps() < 100);
    assert_eq!(driven.trial.decide(), Decision::Continue(Waiting::Evidence), "the night is not over");
    assert_eq!(driven.trial.end_night(), Decision::Futile);
    let row = driven.trial.close(&Decision::Futile, 3).unwrap();
    assert!(row.state == State::Futile && row.reason.contains("hopeless"), "{row:?}");
}

#[test]
fn a_killed_trial_goes_on_where_it_was() {
    let mut whole = Driven::open(opening(), &[], &quick());
    whole.night(40, equal);
    let stored_steps = whole.steps.len();
    assert_eq!(whole.night(200, better), Decision::Promote);
    // After the first block of the second night:
    let steps = &whole.steps[..stored_steps + 16];
    let mut again = Trial::resume(whole.trial.id(), &whole.rows[..3], steps).unwrap();
    assert_eq!((again.nights(), again.steps(), again.state()), (2, 56, State::Open));
    while again.decide() != Decision::Promote {
        let block = again.next_block().unwrap();
        again.absorb(block.clusters.iter().map(|c| better(c)).collect()).unwrap();
    }
    assert_eq!(again.row(State::Promoted, "", 0).ln_wealth, whole.trial.row(State::Promoted, "", 0).ln_wealth);
    assert_eq!(Trial::resume(whole.trial.id(), &whole.rows, &whole.steps).unwrap().state(), State::Promoted);
}

#[test]
fn a_block_is_taken_whole_and_in_order() {
    let mut trial = Trial::open(opening(), &[], &settings()).unwrap();
    trial.begin_night(clusters(1, 40), 0, 2).unwrap();
    let block: Vec<Observation> = trial.next_block().unwrap().clusters.iter().map(|c| equal(c)).collect();
    let mut swapped = block.clone();
    swapped.swap(0, 1);
    for bad in [&block[..15], &swapped[..], &[]] {
        assert!(matches!(trial.absorb(bad.to_vec()), Err(GateError::Order { .. })));
    }
    let mut odd = block.clone();
    odd[3].new.score = f64::NAN;
    assert!(matches!(trial.absorb(odd), Err(GateError::Measurement { .. })));
    assert_eq!(trial.steps(), 0, "a refused block leaves nothing");
    trial.absorb(block.clone()).unwrap();
    assert_eq!(trial.next_block().unwrap().first_step, 17);
    let next = trial.next_block().unwrap().clusters.iter().map(|c| equal(c)).collect();
    trial.absorb(next).unwrap();
    assert_eq!(trial.next_block().unwrap().clusters.len(), 8, "the last block of a night may be short");
    // A cluster judged in this trial never comes back.
    assert!(matches!(trial.begin_night(vec![block[0].cluster.clone()], 0, 3), Err(GateError::Reused { .. })));
}

#[test]
fn an_adapter_is_tried_once_and_numbers_stay_spent() {
    let mut first = Driven::open(opening(), &[], &quick());
    assert!(matches!(Trial::open(opening(), &first.rows, &quick()), Err(GateError::StillOpen(_))));
    first.rows.extend(first.trial.close(&Decision::Void("incumbent".into()), 3));
    let again = |incumbent: &str, challenger: &str| Opening {
        incumbent_sha256: incumbent.into(),
        challenger_sha256: challenger.into(),
        ..opening()
    };
    // Void: the same pair never, the same challenger against another incumbent under the next number.
    assert!(matches!(Trial::open(opening(), &first.rows, &quick()), Err(GateError::AlreadyTried { .. })));
    assert_eq!(Trial::open(again("sha-2", "sha-new"), &first.rows, &quick()).unwrap().facts().number, 2);
    // Dropped: never again, whatever the incumbent.
    let last = first.rows.len() - 1;
    first.rows[last].state = State::Futile;
    assert!(matches!(
        Trial::open(again("sha-2", "sha-new"), &first.rows, &quick()),
        Err(GateError::AlreadyTried { .. })
    ));
    // A promotion lowers the next bar; a new year starts afresh.
    first.rows[last].state = State::Promoted;
    let second = Trial::open(again("sha-new", "sha-3"), &first.rows, &quick()).unwrap();
    assert_eq!((second.facts().number, second.facts().promotions), (2, 1));
    assert!((second.bar().exp() - 600.0).abs() < 1e-6);
    let next_year = Opening { budget_year: 2027, ..again("sha-new", "sha-3") };
    assert_eq!(Trial::open(next_year, &first.rows, &quick()).unwrap().facts().number, 1);
}

#[test]
fn changed_conditions_void_a_trial() {
    let trial = Trial::open(opening(), &[], &settings()).unwrap();
    let now = settings();
    let same =
        Conditions { incumbent_sha256: "sha-base", scorer_epoch: "scorers", decoding: "decoding", settings: &now };
    assert_eq!(trial.void_reason(&same), None);
    let looser = Settings { margin: 0.0, ..settings() };
    for (changed, name) in [
        (Conditions { incumbent_sha256: "x", ..same }, "incumbent"),
        (Conditions { scorer_epoch: "x", ..same }, "scorer"),
        (Conditions { decoding: "x", ..same }, "decoding"),
        (Conditions { settings: &looser, ..same }, "gate settings"),
    ] {
        assert!(trial.void_reason(&changed).unwrap().ends_with(name));
    }
}

#[test]
fn rows_are_flat_and_come_back_the_same() {
    let mut driven = Driven::open(opening(), &[], &quick());
    driven.night(20, better);
    let value = serde_json::to_value(&driven.rows[1]).unwrap();
    let flat = |v: &serde_json::Value| v.as_object().unwrap().values().all(|v| !v.is_object() && !v.is_array());
    assert!(flat(&value) && flat(&serde_json::to_value(&driven.steps[0]).unwrap()));
    assert_eq!(serde_json::from_value::<TrialRow>(value).unwrap(), driven.rows[1]);
    let step = serde_json::to_string(&driven.steps[5]).unwrap();
    assert_eq!(serde_json::from_str::<StepRow>(&step).unwrap(), driven.steps[5]);
}
