use super::super::trial::tests::{Driven, better, observation, opening};
use super::*;
use crate::gate::rows::State;
use crate::gate::{GateError, Opening, Settings};

fn settings() -> Settings {
    let mut settings = Settings { block_size: 16, ..Settings::default() };
    settings.guardrails.workload_min_prompts = 50;
    settings.guardrails.workload_tolerance = 0.1;
    settings.guardrails.kl_mean_max = 0.2;
    settings.guardrails.quality_tolerance = 0.2;
    settings
}

/// Returns a real key, for tests of what it opens: a trial that passed, verified.
pub(crate) fn passed_for(challenger: &str, challenger_sha256: &str, incumbent: &str) -> Passed {
    let driven = passed_by(Opening {
        challenger: challenger.into(),
        challenger_sha256: challenger_sha256.into(),
        incumbent: incumbent.into(),
        ..opening()
    });
    check(&driven).unwrap()
}

fn passed() -> Driven {
    passed_by(opening())
}

fn passed_by(opening: Opening) -> Driven {
    let mut driven = Driven::open(opening, &[], &settings());
    driven.night(10, |c| observation(c, 1.0, 1.0));
    assert_eq!(driven.night(200, better), Decision::Promote);
    driven
}

fn check(driven: &Driven) -> Result<Passed, GateError> {
    verify(driven.trial.id(), &driven.rows, &driven.steps, &driven.usage, &settings())
}

#[test]
fn an_honest_record_opens_the_way() {
    let driven = passed();
    let key = check(&driven).unwrap();
    assert_eq!((key.challenger(), key.incumbent(), key.trial()), ("taod-new", "base", driven.trial.id()));
    let (ln_wealth, bar, steps) = key.evidence();
    assert!(ln_wealth >= bar && steps == driven.trial.steps());
    // The row that closes the trial may be there already or not yet.
    let mut open = passed();
    open.rows.pop();
    assert_eq!(check(&open).unwrap(), key);
}

#[test]
fn a_tampered_record_opens_nothing() {
    type Tamper = fn(&mut Driven);
    let cases: [(&str, Tamper); 17] = [
        ("a better score", |d| d.steps[20].new_score = 0.5),
        ("a better difference", |d| d.steps[20].d = 0.99),
        ("more wealth", |d| d.steps.last_mut().unwrap().ln_wealth += 0.1),
        ("another stake", |d| d.steps[30].lambda *= 1.01),
        ("a step left out", |d| drop(d.steps.remove(12))),
        ("the last block cut", |d| drop(d.steps.pop())),
        ("two steps swapped", |d| {
            let (a, b) = (d.steps[11].step, d.steps[12].step);
            (d.steps[11].step, d.steps[12].step) = (b, a);
        }),
        ("a cluster used twice", |d| d.steps[12].cluster = d.steps[11].cluster.clone()),
        ("a cluster of another trial", |d| {
            let other = UsageRow { trial: "2026-000-x".into(), ..d.usage[3].clone() };
            d.usage.push(other);
        }),
        ("a cluster never reserved", |d| drop(d.usage.remove(3))),
        ("a cluster reserved for another step", |d| d.usage[3].step += 100),
        ("a lower bar", |d| d.rows.iter_mut().for_each(|r| r.facts.alpha *= 2.0)),
        ("a lower bar by promotions", |d| {
            d.rows.iter_mut().for_each(|r| (r.facts.promotions, r.facts.alpha) = (1, 2.0 * r.facts.alpha))
        }),
        ("a larger budget", |d| {
            d.rows.iter_mut().for_each(|r| (r.facts.budget_alpha, r.facts.alpha) = (0.2, 2.0 * r.facts.alpha))
        }),
        ("another order", |d| d.rows[2].record = d.rows[2].record.replacen("n2-c001", "n2-c999", 1)),
        ("another seed", |d| d.rows.iter_mut().for_each(|r| r.facts.order_seed = "1".into())),
        ("a milder guardrail", |d| {
            d.rows.iter_mut().for_each(|r| r.record = r.record.replace("\"kl_mean_max\":0.2", "\"kl_mean_max\":9.0"))
        }),
    ];
    for (name, tamper) in cases {
        let mut driven = passed();
        tamper(&mut driven);
        assert!(check(&driven).is_err(), "{name}");
    }
}

#[test]
fn a_trial_that_did_not_pass_opens_nothing() {
    let mut short = Driven::open(opening(), &[], &settings());
    short.night(20, better);
    assert!(matches!(check(&short), Err(GateError::NotPassed { .. })));
    let mut driven = passed();
    driven.rows.last_mut().unwrap().state = State::Void;
    assert!(matches!(check(&driven), Err(GateError::NotPassed { .. })));
    assert!(matches!(verify("nothing", &driven.rows, &[], &[], &settings()), Err(GateError::NoTrial(_))));
}

#[test]
fn a_second_trial_of_the_same_pair_opens_nothing() {
    let driven = passed();
    let mut rows = driven.rows.clone();
    let mut earlier = driven.rows[0].clone();
    earlier.facts.trial = "2026-000-taod-new".into();
    earlier.facts.number = 0;
    earlier.state = State::Void;
    rows.insert(0, earlier);
    let result = verify(driven.trial.id(), &rows, &driven.steps, &driven.usage, &settings());
    assert!(matches!(result, Err(GateError::AlreadyTried { .. })), "{result:?}");
}

#[test]
fn a_verdict_is_told_in_words_and_codes() {
    let driven = passed();
    let verdict = Verdict::new(&driven.trial, &Decision::Promote);
    assert_eq!((verdict.state, verdict.exit_code()), (State::Promoted, 0));
    let text = explain(&verdict);
    assert!(text.starts_with("taod-new against base is promoted.") && text.contains("needed 1200"), "{text}");
    assert_eq!(text.matches("\n  guardrail ").count(), 11, "{text}");
    let json = serde_json::to_string(&verdict).unwrap();
    assert_eq!(serde_json::from_str::<Verdict>(&json).unwrap().trial, verdict.trial);
    let open = Verdict::new(&driven.trial, &Decision::Continue(Waiting::Evidence));
    let refused = Verdict::new(&driven.trial, &Decision::Futile);
    assert_eq!((open.exit_code(), refused.exit_code()), (3, 2));
}
