//! How much longer a trial may take, and whether there are prompts enough for one: told to people, it decides no trial.

use std::collections::BTreeMap;

use super::settings::Settings;
use super::trial::Trial;

/// The days over which the nightly number of new gate prompts is averaged: a week, so that weekends count.
const WEEK: f64 = 7.0;
const DAY_US: f64 = 86_400e6;

/// What a trial still needs if its gain goes on as so far.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Forecast {
    pub prompts: f64,
    pub nights: f64,
}

/// Returns what the evidence still needs, or `None` where nothing speaks for the challenger yet.
pub fn forecast(trial: &Trial) -> Option<Forecast> {
    let growth = trial.growth().filter(|growth| *growth > 0.0)?;
    let prompts = ((trial.bar() - trial.ln_wealth()) / growth).max(0.0).ceil();
    let nightly = trial.steps() as f64 / f64::from(trial.nights().max(1));
    Some(Forecast { prompts, nights: (prompts / nightly.max(1.0)).ceil() })
}

/// Says the forecast of a trial that waits for evidence.
pub(super) fn outlook(trial: &Trial) -> String {
    let left = trial.settings().max_nights.saturating_sub(trial.nights());
    match forecast(trial) {
        None => format!("nothing speaks for it yet, {left} nights are left"),
        Some(Forecast { prompts, nights }) => {
            format!("at this gain about {prompts} more, {nights} nights of this traffic, {left} are left")
        }
    }
}

/// Returns how many of some prompts came in a day of the last week, by the times at which they were first seen.
pub fn nightly(times_us: &[i64]) -> f64 {
    let Some(newest) = times_us.iter().max() else { return 0.0 };
    let age = |time: &i64| (newest - time) as f64 / DAY_US;
    let recent: Vec<f64> = times_us.iter().map(age).filter(|days| *days < WEEK).collect();
    let span = recent.iter().fold(1.0, |span: f64, days| span.max(*days));
    recent.len() as f64 / span
}

/// Returns why the year's next trial could not end in a promotion for want of prompts, or `None` where it could.
///
/// `fresh` gate prompts were never judged and `nightly` more come every night; `left_out` counts the others by reason.
pub fn shortage(fresh: usize, nightly: f64, left_out: &BTreeMap<String, u64>, settings: &Settings) -> Option<String> {
    let needed = f64::from(settings.guardrails.min_prompts);
    let nights = settings.max_nights;
    if fresh as f64 + nightly * f64::from(nights - 1) >= needed {
        return None;
    }
    let others: Vec<String> = left_out.iter().map(|(reason, count)| format!("{count} {reason}")).collect();
    let others = if others.is_empty() { String::new() } else { format!(", besides {}", others.join(", ")) };
    let wait = match nightly > 0.0 {
        true => format!("{} nights of this traffic bring them", ((needed - fresh as f64) / nightly).ceil()),
        false => "no new ones come".to_string(),
    };
    Some(format!(
        "too few gate prompts: {fresh} are fresh{others}, and about {nightly:.1} come a night, but a trial needs at least \
         {needed} within {nights} nights (gate.guardrails.min_prompts); {wait}"
    ))
}

#[cfg(test)]
mod tests {
    use super::super::trial::tests::{Driven, observation, opening, settings};
    use super::*;

    #[test]
    fn a_steady_gain_is_forecast_and_none_is_said_to_be_none() {
        let mut driven = Driven::open(opening(), &[], &settings());
        driven.night(40, |c| observation(c, if c.ends_with(['1', '2', '3', '4']) { 1.0 } else { 0.5 }, 0.5));
        let Forecast { prompts, nights } = forecast(&driven.trial).unwrap();
        // A gain of 0.2 at about 0.25 in spread grows by 0.1 at the most a prompt: some tens are missing.
        assert!((20.0..120.0).contains(&prompts) && nights == (prompts / 40.0).ceil(), "{prompts} {nights}");
        assert!(outlook(&driven.trial).starts_with("at this gain about"), "{}", outlook(&driven.trial));
        let mut flat = Driven::open(opening(), &[], &settings());
        flat.night(40, |c| observation(c, 0.5, 0.5));
        assert_eq!(forecast(&flat.trial), None);
        assert_eq!(outlook(&flat.trial), "nothing speaks for it yet, 2 nights are left");
    }

    #[test]
    fn the_rate_is_that_of_the_last_week() {
        let day = |n: f64| (n * DAY_US) as i64;
        assert_eq!(nightly(&[]), 0.0);
        assert_eq!(nightly(&[5, 5, 5]), 3.0, "one day");
        let week: Vec<i64> = (0..70).map(|i| day(100.0 + f64::from(i) / 10.0)).chain([day(1.0)]).collect();
        assert!((nightly(&week) - 70.0 / 6.9).abs() < 1e-9, "{}", nightly(&week));
    }

    #[test]
    fn a_shortage_says_how_many_nights_bring_enough() {
        let settings = Settings::default();
        let used = BTreeMap::from([("used".to_string(), 90)]);
        assert_eq!(shortage(50, 0.0, &used, &settings), None);
        assert_eq!(shortage(2, 8.0, &used, &settings), None, "six more nights bring 48");
        let message = shortage(2, 7.0, &used, &settings).unwrap();
        let expected = "too few gate prompts: 2 are fresh, besides 90 used, and about 7.0 come a night, but a trial needs at \
                        least 50 within 7 nights (gate.guardrails.min_prompts); 7 nights of this traffic bring them";
        assert_eq!(message, expected);
        assert!(shortage(0, 0.0, &BTreeMap::new(), &settings).unwrap().ends_with("no new ones come"));
    }
}
