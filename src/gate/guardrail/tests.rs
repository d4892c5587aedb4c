use super::super::trial::tests::observation;
use super::length::length;
use super::segments::segments;
use super::*;
use crate::gate::behaviour::Behaviour;
use crate::gate::rows::Kl as Divergence;

/// `n` observations made by `change` from a neutral one.
fn many(n: usize, change: impl Fn(usize, &mut Observation)) -> Vec<Observation> {
    let make = |i: usize| {
        let mut o = observation(&format!("c{i}"), if i.is_multiple_of(3) { 1.0 } else { 0.0 }, 0.0);
        change(i, &mut o);
        o
    };
    (0..n).map(make).collect()
}

fn free() -> BTreeMap<String, LengthBounds> {
    BTreeMap::new()
}

fn default() -> Thresholds {
    Thresholds::default()
}

fn refusing(refuses: bool) -> Option<Behaviour> {
    Some(Behaviour { refused: f64::from(u8::from(refuses)), ..Behaviour::default() })
}

#[test]
fn each_guardrail_passes_fails_and_waits() {
    use Guardrail::*;
    use Outcome::*;
    type Change = fn(usize, &mut Observation);
    let cases: [(&str, Guardrail, usize, Change, Outcome); 29] = [
        ("same length", Length, 300, |_, _| {}, Pass),
        ("twice as long", Length, 300, |_, o| o.new.words = 81.0, Fail),
        ("half as long", Length, 300, |_, o| o.new.words = 20.0, Fail),
        ("at the edge", Length, 300, |i, o| o.new.words = if i % 2 == 0 { 60.0 } else { 42.0 }, NotYet),
        ("few", Length, 49, |_, _| {}, NotYet),
        ("near the base", Kl, 400, |_, _| {}, Pass),
        ("far from the base", Kl, 400, |_, o| o.kl = Divergence::of(&[0.2; 40], 0.2), Fail),
        ("unmeasured", Kl, 400, |i, o| o.kl = o.kl.filter(|_| i < 49), NotYet),
        ("a heavy tail", Kl, 400, |_, o| o.kl.as_mut().unwrap().over = 0.2, Fail),
        ("same quality", Quality, 400, |_, _| {}, Pass),
        ("a little worse", Quality, 400, |i, o| o.new.quality = Some(-1.55 + (i % 2) as f64 * 0.01), NotYet),
        ("much worse", Quality, 400, |_, o| o.new.quality = Some(-1.8), Fail),
        ("empty answers", Quality, 400, |i, o| o.new.quality = o.new.quality.filter(|_| i % 4 > 0), Fail),
        ("no scorer", Quality, 400, |_, o| (o.new.quality, o.incumbent.quality) = (None, None), NotYet),
        ("near the incumbent", KlRound, 400, |_, _| {}, Pass),
        ("far from the incumbent alone", KlRound, 400, |_, o| o.kl_round = Divergence::of(&[0.2; 40], 0.2), Fail),
        ("the incumbent unmeasured", KlRound, 400, |_, o| o.kl_round = None, NotYet),
        ("same cost", Cost, 400, |_, _| {}, Pass),
        ("twice the tokens", Cost, 400, |_, o| o.new.tokens = Some(101.0), Fail),
        ("tokens at the edge", Cost, 400, |i, o| o.new.tokens = Some([52.0, 110.0][i % 2]), NotYet),
        ("uncounted", Cost, 400, |_, o| o.new.tokens = None, NotYet),
        ("same behaviour", Behaviour, 400, |_, _| {}, Pass),
        ("few answers", Behaviour, 60, |_, _| {}, NotYet),
        ("refuses more", Behaviour, 400, |i, o| o.new.behaviour = refusing(i.is_multiple_of(5)), Fail),
        (
            "refuses as often",
            Behaviour,
            400,
            |i, o| {
                o.new.behaviour = refusing(i.is_multiple_of(50));
                o.incumbent.behaviour = refusing((i + 25).is_multiple_of(50));
            },
            NotYet,
        ),
        ("unclassified", Behaviour, 400, |_, o| o.new.behaviour = None, NotYet),
        ("one workload", Segments, 400, |_, _| {}, Pass),
        ("few of a workload", Segments, 199, |_, _| {}, NotYet),
        (
            "one of two is hurt",
            Segments,
            600,
            |i, o| {
                if i % 2 == 0 {
                    o.workload = Some("v".into());
                    (o.new.score, o.incumbent.score) = (0.2, if i % 4 == 0 { 0.6 } else { 0.4 });
                }
            },
            Fail,
        ),
    ];
    for (name, guardrail, n, change, expected) in cases {
        let findings = examine(&many(n, change), &free(), &default());
        let finding = findings.iter().find(|f| f.guardrail == guardrail).unwrap();
        assert_eq!(finding.outcome, expected, "{name}: {finding:?}");
        assert!(!finding.reason.is_empty(), "{name}");
    }
}

#[test]
fn a_gain_that_length_explains_is_none() {
    let padded = |i: usize, o: &mut Observation| {
        let factor = 0.95 + 0.02 * (i % 11) as f64;
        o.new.words = 41.0 * factor - 1.0;
        o.new.score = (0.5 + 2.0 * factor.ln() - 0.05).clamp(0.0, 1.0);
        o.incumbent.score = 0.5;
    };
    let finding = length(&many(300, padded), &free(), &default());
    assert_eq!(finding.outcome, Outcome::Fail, "{finding:?}");
    assert!(finding.reason.contains("equal length") && finding.numbers["intercept"] < 0.0);
}

#[test]
fn where_nothing_is_gained_length_does_not_refuse() {
    let level = |i: usize, o: &mut Observation| o.new.score = o.incumbent.score + [-0.2, 0.1][i % 2];
    let finding = length(&many(300, level), &free(), &default());
    assert_eq!(finding.outcome, Outcome::NotYet, "{finding:?}");
    assert!(finding.reason.contains("no gain (-0.050)"), "{}", finding.reason);
}

#[test]
fn the_rules_bounds_replace_the_ratio() {
    let shorter = many(300, |_, o| o.new.words = 12.0);
    let rules = |bounds| BTreeMap::from([("w".to_string(), bounds)]);
    assert_eq!(length(&shorter, &free(), &default()).outcome, Outcome::Fail);
    let cases = [
        (LengthBounds::default(), Outcome::Pass),
        (LengthBounds { min_words: Some(8.0), max_words: Some(30.0), ..Default::default() }, Outcome::Pass),
        (LengthBounds { min_words: Some(16.0), ..Default::default() }, Outcome::Fail),
        (LengthBounds { min_words: Some(12.1), ..Default::default() }, Outcome::NotYet),
        (LengthBounds { max_chars: Some(160.0), ..Default::default() }, Outcome::Fail),
    ];
    for (bounds, expected) in cases {
        let finding = length(&shorter, &rules(bounds), &default());
        assert_eq!(finding.outcome, expected, "{bounds:?} {finding:?}");
    }
}

#[test]
fn a_small_workload_is_untested_and_holds_nothing_up() {
    let rare = many(500, |i, o| {
        if i % 25 == 0 {
            o.workload = None;
            (o.new.score, o.incumbent.score) = (0.0, 1.0);
        }
    });
    let finding = segments(&rare, &default());
    assert_eq!(finding.outcome, Outcome::Pass, "{finding:?}");
    assert!(finding.reason.contains("unassigned untested (4.0 % of traffic)"), "{}", finding.reason);
}

#[test]
fn holm_steps_down() {
    assert_eq!(holm(&[0.04, 0.01, 0.02], 0.05), [true, true, true]);
    assert_eq!(holm(&[0.04, 0.02, 0.03], 0.05), [false, false, false]);
    assert_eq!(holm(&[0.04, 0.001, 0.03], 0.05), [false, true, false]);
    assert!(holm(&[], 0.05).is_empty());
}

#[test]
fn every_kind_of_segment_can_veto() {
    type Name = fn(usize, &mut Observation);
    let kinds: [(&str, Name); 4] = [
        ("workload-2", |i, o| o.workload = Some(format!("workload-{}", i % 3))),
        ("tenant acme-2", |i, o| o.tenant = Some(format!("acme-{}", i % 3))),
        ("language deu", |i, o| o.language = ["eng", "fra", "deu"].get(i % 3).map(|l| l.to_string())),
        ("long questions", |i, o| o.question_chars = [10.0, 5_000.0, 50_000.0].get(i % 3).copied()),
    ];
    for (name, set) in kinds {
        let hurt = many(900, |i, o| {
            set(i, o);
            let (new, old) = if i % 3 == 2 { (0.2, [0.3, 0.5][i % 2]) } else { (0.6, 0.4) };
            (o.new.score, o.incumbent.score) = (new, old);
        });
        let finding = segments(&hurt, &default());
        assert_eq!(finding.outcome, Outcome::Fail, "{name}: {finding:?}");
        assert!(finding.reason.starts_with(name), "{name}: {}", finding.reason);
    }
    // One tenant, one language: nothing that the whole does not say.
    let one = many(300, |_, o| (o.tenant, o.language) = (Some("acme".into()), Some("eng".into())));
    assert!(!segments(&one, &default()).reason.contains("acme"));
}
