//! A short form of what `docs/method.md` states, and that the simulator can tell a good gate from a bad one.

use super::*;
use crate::gate::Mode;

/// A gate that decides within as few prompts as these tests have.
fn quick() -> Settings {
    let mut settings = Settings { max_nights: 3, ..Settings::default() };
    settings.guardrails.workload_min_prompts = 60;
    settings.guardrails.workload_tolerance = 0.15;
    settings.guardrails.quality_tolerance = 0.10;
    settings
}

fn run(settings: &Settings, guards: Guards, scenario: Scenario, shape: Shape, count: u64) -> Tally {
    let settings = guards.settings(settings);
    let plan = Years { settings: &settings, guards, years: count, nights: 30, prompts: 200, seed: 1 };
    years(&plan, &Law { scenario, shape }).unwrap()
}

#[test]
fn nulls_are_not_promoted_and_a_gate_without_a_bar_would_be_seen() {
    for scenario in [Scenario::Null, Scenario::Boundary] {
        for shape in Shape::ALL {
            let tally = run(&quick(), Guards::Waved, scenario, shape, 12);
            assert!(tally.trials >= 60 && tally.promotions <= 1, "{tally:?}");
        }
    }
    // One challenger a year at level 0.5: the bar is a wealth of 2.
    let loose = Settings { alpha: 0.5, challengers: 1, ..quick() };
    let tally = run(&loose, Guards::Waved, Scenario::Null, Shape::ThreeValued, 60);
    assert!(tally.false_promotions >= 2, "{tally:?}");
    assert!(tally.exhausted > 0 && tally.trials == 60, "{tally:?}");
}

#[test]
fn a_challenger_that_is_worse_leaves_before_its_nights_are_over_and_a_better_one_is_seldom_dropped() {
    let settings = Settings { max_nights: 7, ..quick() };
    let worse = run(&settings, Guards::Waved, Scenario::Regression, Shape::Continuous, 12);
    // The loss of 0.035 against the margin grows 5 nats by 1,000 prompts, and the bar is 3.9.
    assert!(worse.futile * 3 >= worse.trials && worse.promotions == 0, "{worse:?}");
    let better = run(&settings, Guards::Waved, Scenario::SmallGain, Shape::Continuous, 12);
    // At most 2 % by the mirrored bet; the upper 99.9 % limit of a binomial of 60 at 0.02 is 6.
    assert!(better.trials >= 50 && better.futile <= 6, "{better:?}");
}

#[test]
fn guardrails_refuse_what_the_score_cannot_see() {
    // A gain of 0.026 on average needs a low bar to be seen in 600 prompts. The harm (0.10 on one workload, 0.15 in quality) is
    // larger than what each guardrail lets pass.
    let mut low = Settings { alpha: 0.5, challengers: 10, ..quick() };
    low.guardrails.workload_tolerance = 0.08;
    for scenario in [Scenario::Hacked, Scenario::Segment] {
        let blind = run(&low, Guards::Waved, scenario, Shape::Continuous, 4);
        let seeing = run(&low, Guards::Asked, scenario, Shape::Continuous, 4);
        assert!(blind.false_promotions >= 2, "{blind:?}");
        // A bound of 95 % errs in at most one trial of twenty; these harms are beyond their tolerance, so less often.
        assert!(seeing.promotions * 20 <= seeing.trials, "{seeing:?} where {blind:?}");
        assert!(seeing.refused + seeing.expired > 0, "{seeing:?}");
    }
}

#[test]
fn a_harm_within_the_tolerance_is_no_harm_and_one_at_it_passes_as_rarely_as_the_level_says() {
    let with = |tolerance| {
        let mut settings = Settings { alpha: 0.5, challengers: 10, ..quick() };
        settings.guardrails.workload_tolerance = tolerance;
        run(&settings, Guards::Asked, Scenario::Segment, Shape::Continuous, 12)
    };
    // The second workload loses 0.10. Where 0.15 may be lost, that it loses less is soon shown, and the gain decides.
    let within = with(0.15);
    assert!(within.promotions >= 5, "{within:?}");
    // Where 0.10 may be lost it is the worst null: a bound that ends above it errs, in at most 5 % of trials. The upper 99.9 % limit
    // of a binomial of 120 is 15.
    let at = with(0.10);
    assert!(at.trials >= 100 && at.promotions <= 15, "{at:?}");
}

#[test]
fn a_year_is_the_same_every_time_and_another_under_another_seed() {
    let settings = Guards::Asked.settings(&quick());
    let plan = Years { settings: &settings, guards: Guards::Asked, years: 3, nights: 30, prompts: 100, seed: 1 };
    let law = Law { scenario: Scenario::Mixed, shape: Shape::Continuous };
    let first = years(&plan, &law).unwrap();
    assert_eq!(years(&plan, &law).unwrap(), first);
    assert_ne!(years(&Years { seed: 2, ..plan }, &law).unwrap(), first);
}

#[test]
fn power_grows_with_the_gain_the_prompts_and_the_promotions() {
    let settings = Guards::Waved.settings(&Settings::default());
    let law = Law { scenario: Scenario::SmallGain, shape: Shape::Continuous };
    let of = |gain, prompts, promotions| {
        let plan = Years { settings: &settings, guards: Guards::Waved, years: 60, nights: 0, prompts, seed: 1 };
        power(&plan, &law, gain, promotions).unwrap().promoted.successes
    };
    let small = of(0.05, 100, 0);
    assert!(of(0.005, 100, 0) <= 1 && small < of(0.1, 100, 0) && small < of(0.05, 400, 0) && small < of(0.05, 100, 20));
    let strict = Settings { mode: Mode::Strict, alpha: 0.05, ..settings.clone() };
    let plan = Years { settings: &strict, guards: Guards::Waved, years: 60, nights: 0, prompts: 100, seed: 1 };
    assert!(power(&plan, &law, 0.05, 20).unwrap().promoted.successes < of(0.05, 100, 20));
}

#[test]
fn naive_rules_do_what_the_method_reports() {
    // 365 nights of 1,000 prompts: 148 promotions, 77 of them harmful, by a higher mean on fresh prompts; 14 and 3.7 where a
    // holdout is reused. 17 and 0.9 by p < 0.05.
    let rows = naive(Scenario::Mediocre, 0.005, (100, 365, 1000), 1);
    let near = |seen: f64, stated: f64| (seen - stated).abs() < 0.15 * stated + 1.0;
    let promoted: Vec<f64> = rows.iter().map(|row| row.promotions).collect();
    assert!(near(promoted[0], 148.0) && near(promoted[1], 17.0), "{rows:?}");
    assert!(near(promoted[2], 14.0) && near(promoted[3], 0.9), "{rows:?}");
    assert!(near(rows[0].harmful, 77.0) && near(rows[2].harmful, 3.7), "{rows:?}");
    assert!(rows[2].apparent_gain > rows[2].true_gain, "a reused holdout overstates");
}

#[test]
fn the_bounds_miss_no_more_than_they_may() {
    for shape in Shape::ALL {
        let counted = coverage(shape, 0.0, (200, 320, 32), 1);
        // 10 expected at most; the upper 99.9 % limit of a binomial of 200 at 0.05 is 21.
        assert!(counted.lower_misses.successes <= 21 && counted.upper_misses.successes <= 21, "{counted:?}");
        assert_eq!(counted.looks, 10);
    }
}

#[test]
fn tables_have_as_many_cells_in_every_line() {
    let tally = run(&quick(), Guards::Waved, Scenario::Null, Shape::Continuous, 1);
    let settings = Guards::Waved.settings(&Settings::default());
    let plan = Years { settings: &settings, guards: Guards::Waved, years: 2, nights: 0, prompts: 50, seed: 1 };
    let law = Law { scenario: Scenario::SmallGain, shape: Shape::Skewed };
    let tables = [
        years_table(&[tally]),
        power_table(&[power(&plan, &law, 0.03, 1).unwrap()]),
        naive_table(&naive(Scenario::Null, 0.005, (1, 10, 100), 1)),
        coverage_table(&[coverage(Shape::Skewed, 0.0, (2, 64, 32), 1)]),
    ];
    for table in tables {
        let cells: Vec<usize> = table.lines().map(|line| line.matches(" | ").count()).collect();
        assert!(cells.len() >= 3 && cells.iter().all(|n| *n == cells[0]), "{table}");
    }
}
