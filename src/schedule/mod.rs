//! When rounds start: a cron expression in a time zone, enough new prompts, the hours in which they may work, and what becomes
//! of runs that were missed.
//!
//! Pure: the caller passes the time in. A missed run is caught up once, however many were missed: after a week of
//! downtime one round over all that arrived is what is wanted, not seven.

mod window;

use std::str::FromStr;

use chrono::{DateTime, Utc};
use chrono_tz::Tz;
use croner::Cron;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use window::Window;

/// When the daemon starts a round.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// Cron expression with five fields (minute, hour, day of month, month, day of week) in `time_zone`; empty: no time
    /// starts a round.
    pub cron: String,
    /// IANA name of the time zone in which `cron` is read, such as `Europe/Vienna`.
    pub time_zone: String,
    /// A round also starts as soon as this many distinct prompts that may train were asked since the last one began; looked
    /// at every five minutes. 0: by `cron` alone.
    pub new_prompts: u64,
    /// A round also starts once a feature of the prompts since the last one began has this population stability index, in nats,
    /// against the week before it, and more than chance explains (`dataset.population` says what is compared). It is looked at
    /// every half hour. Practice: 0.25. 0: the population starts no round.
    pub drift_index: f64,
    /// Hours that a round must be past before drift starts another one, so that days are compared with days. Range 1 to 8760.
    pub drift_after_hours: u64,
    /// Hours of the day in `time_zone` in which rounds may work, such as `22:00-06:00`; empty: always. A round that is due
    /// waits for them, and one that is under way when they end leaves off after its piece of work and goes on when they come
    /// again. `taod round --once` by hand goes by them only with `--in-window`.
    pub window: String,
    /// Where rounds run: "child" (a process below the daemon's) or "unit" (the daemon leaves `round.due` in `state.dir`, by
    /// which systemd starts `taod-round.service`, a unit with limits of its own).
    pub run_in: RunIn,
    /// Whether a new round may train while a trial is still open. Off: the open trial is extended first, every night.
    pub train_while_open: bool,
}

/// Where rounds run.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum RunIn {
    /// A process below the daemon's, which ends with it.
    #[default]
    Child,
    /// A unit of systemd's, started by a file.
    Unit,
}

impl Default for Settings {
    fn default() -> Self {
        Settings {
            cron: "0 2 * * *".into(),
            time_zone: "UTC".into(),
            new_prompts: 0,
            drift_index: 0.0,
            drift_after_hours: 24,
            window: String::new(),
            run_in: RunIn::Child,
            train_while_open: false,
        }
    }
}

impl Settings {
    /// Checks that the expression and the zone can be read and that a run will ever come.
    pub fn validate(&self) -> Result<(), String> {
        if !(self.drift_index >= 0.0 && self.drift_index.is_finite()) {
            return Err(format!("drift_index = {}: give 0 for none, or an index such as 0.25", self.drift_index));
        }
        if !(1..=8760).contains(&self.drift_after_hours) {
            return Err(format!("drift_after_hours = {}: give 1 to 8760", self.drift_after_hours));
        }
        Schedule::new(self).map(drop)
    }

    /// Returns from when on drift may start a round after the one that began at `last`; `None` where it starts none, because it
    /// is off or there is no round to compare with.
    pub fn drift_from(&self, last: Option<DateTime<Utc>>) -> Option<DateTime<Utc>> {
        let hours = chrono::Duration::hours(i64::try_from(self.drift_after_hours).ok()?);
        last.filter(|_| self.drift_index > 0.0)?.checked_add_signed(hours)
    }
}

/// A schedule that can be asked for its next run.
#[derive(Debug, Clone)]
pub struct Schedule {
    cron: Option<Cron>,
    zone: Tz,
    window: Option<Window>,
}

impl Schedule {
    /// Reads the settings; an error names the key, the value and the remedy.
    pub fn new(settings: &Settings) -> Result<Self, String> {
        let Settings { cron, time_zone, .. } = settings;
        let zone = Tz::from_str(time_zone).map_err(|_| {
            format!("time_zone {time_zone:?} is not an IANA time zone; write one such as \"UTC\" or \"Europe/Vienna\"")
        })?;
        let read = |cron: &str| {
            Cron::from_str(cron).map_err(|e| {
                format!(
                    "cron {cron:?} cannot be read ({}); write five fields such as \"0 2 * * *\"",
                    lower_first(&e.to_string())
                )
            })
        };
        let parsed = (!cron.is_empty()).then(|| read(cron)).transpose()?;
        let schedule = Schedule { cron: parsed, zone, window: Window::parse(&settings.window, zone)? };
        match schedule.next_after(DateTime::UNIX_EPOCH) {
            Some(_) => Ok(schedule),
            None if schedule.cron.is_none() => Ok(schedule),
            None => Err(format!("cron {cron:?} never comes; write a day that exists, such as \"0 2 * * *\"")),
        }
    }

    /// Returns the hours in which rounds may work, where there are such.
    pub fn window(&self) -> Option<&Window> {
        self.window.as_ref()
    }

    /// Returns when a round that is due at `due` may start, `now` at the earliest.
    pub fn start(&self, due: DateTime<Utc>, now: DateTime<Utc>) -> DateTime<Utc> {
        let earliest = due.max(now);
        self.window.map_or(earliest, |window| window.opens(earliest))
    }

    /// Returns the first run strictly after `now`. A local time that daylight saving skips runs at the next one that exists.
    pub fn next_after(&self, now: DateTime<Utc>) -> Option<DateTime<Utc>> {
        let local = now.with_timezone(&self.zone);
        let next = self.cron.as_ref()?.find_next_occurrence(&local, false);
        next.ok().map(|next| next.with_timezone(&Utc))
    }

    /// Returns when the next run starts: the first one after the last start, which lies in the past (so: at once) when
    /// runs were missed. Without a last start nothing was missed, and the first run is the next one after `now`.
    ///
    /// A last start in the future tells that the clock was set back since. Then the next run by the clock is left out where it is
    /// the one that was had already; a start that lies more than one run ahead is a wrong clock's and holds nothing up.
    pub fn due(&self, last_start: Option<DateTime<Utc>>, now: DateTime<Utc>) -> Option<DateTime<Utc>> {
        let Some(last) = last_start else { return self.next_after(now) };
        if last <= now {
            return self.next_after(last);
        }
        let next = self.next_after(now)?;
        match self.next_after(next) {
            Some(following) if (next..following).contains(&last) => Some(following),
            _ => Some(next),
        }
    }
}

fn lower_first(text: &str) -> String {
    let mut letters = text.trim_end_matches('.').chars();
    letters.next().map(|c| c.to_lowercase().chain(letters).collect()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn schedule(cron: &str, zone: &str) -> Schedule {
        Schedule::new(&Settings { cron: cron.into(), time_zone: zone.into(), ..Settings::default() }).unwrap()
    }

    fn at(text: &str) -> DateTime<Utc> {
        text.parse().unwrap()
    }

    #[test]
    fn the_next_run_is_strictly_later_and_in_the_zone() {
        let nightly = schedule("30 2 * * *", "Europe/Vienna");
        assert_eq!(nightly.next_after(at("2026-01-10T01:29:59Z")), Some(at("2026-01-10T01:30:00Z")));
        assert_eq!(nightly.next_after(at("2026-01-10T01:30:00Z")), Some(at("2026-01-11T01:30:00Z")));
        assert_eq!(nightly.next_after(at("2026-07-10T12:00:00Z")), Some(at("2026-07-11T00:30:00Z")));
    }

    #[test]
    fn every_night_has_exactly_one_run_across_both_clock_changes() {
        let nightly = schedule("30 2 * * *", "Europe/Vienna");
        for (from, to) in
            [("2026-03-27T12:00:00Z", "2026-03-31T12:00:00Z"), ("2026-10-23T12:00:00Z", "2026-10-27T12:00:00Z")]
        {
            let mut now = at(from);
            let mut runs = Vec::new();
            while let Some(next) = nightly.next_after(now).filter(|next| *next < at(to)) {
                runs.push(next);
                now = next;
            }
            assert_eq!(runs.len(), 4, "{runs:?}");
        }
    }

    #[test]
    fn missed_runs_are_caught_up_once() {
        let nightly = schedule("0 2 * * *", "UTC");
        let now = at("2026-01-20T12:00:00Z");
        let due = nightly.due(Some(at("2026-01-10T02:00:05Z")), now).unwrap();
        assert!(due <= now, "a week was missed, so a run is due at once, not at {due}");
        assert_eq!(nightly.due(Some(now), now), Some(at("2026-01-21T02:00:00Z")), "and then no second one");
        assert_eq!(nightly.due(None, now), Some(at("2026-01-21T02:00:00Z")), "a new daemon has missed nothing");
        let future = Some(at("2030-01-01T00:00:00Z"));
        assert_eq!(
            nightly.due(future, now),
            Some(at("2026-01-21T02:00:00Z")),
            "a start in the future is a wrong clock"
        );
    }

    #[test]
    fn a_clock_that_is_set_back_brings_no_second_run_of_a_night_that_was_had() {
        let nightly = schedule("0 2 * * *", "UTC");
        let had = Some(at("2026-01-20T02:00:05Z"));
        let due = |now: &str| nightly.due(had, at(now)).unwrap();
        let (same, next) = (at("2026-01-20T02:00:00Z"), at("2026-01-21T02:00:00Z"));
        for now in ["2026-01-20T01:59:59Z", "2026-01-20T01:00:05Z", "2026-01-19T02:10:00Z"] {
            assert_eq!(due(now), next, "at {now} the night of {same} was had");
        }
        assert_eq!(due("2026-01-20T02:00:03Z"), next, "by seconds, within the minute of the night");
        assert_eq!(due("2026-01-19T01:00:00Z"), at("2026-01-19T02:00:00Z"), "two nights ahead: a wrong clock's");
        // A round by hand in the afternoon, and an hour back: the night is still to come.
        assert_eq!(nightly.due(Some(at("2026-01-20T15:00:00Z")), at("2026-01-20T14:00:00Z")), Some(next));
    }

    #[test]
    fn without_a_time_nothing_is_due_and_a_window_puts_off_what_is() {
        let never = schedule("", "UTC");
        assert_eq!(never.due(Some(at("2026-01-10T02:00:05Z")), at("2026-01-20T12:00:00Z")), None);
        let settings = Settings { window: "22:00-06:00".into(), ..Settings::default() };
        let nightly = Schedule::new(&settings).unwrap();
        let (noon, evening) = (at("2026-01-20T12:00:00Z"), at("2026-01-20T22:00:00Z"));
        assert_eq!(nightly.start(at("2026-01-19T02:00:00Z"), noon), evening, "what was missed waits for the window");
        assert_eq!(nightly.start(noon, evening), evening);
    }

    #[test]
    fn bad_settings_name_the_key_the_value_and_the_remedy() {
        let message = |cron: &str, zone: &str| {
            Settings { cron: cron.into(), time_zone: zone.into(), ..Settings::default() }.validate().unwrap_err()
        };
        assert!(message("0 2 * * *", "Vienna").starts_with("time_zone \"Vienna\" is not an IANA time zone; write one"));
        assert!(message("at noon", "UTC").starts_with("cron \"at noon\" cannot be read ("));
        assert!(message("0 2 30 2 *", "UTC").starts_with("cron \"0 2 30 2 *\" never comes"));
        for (settings, key) in [
            (Settings { drift_index: -1.0, ..Settings::default() }, "drift_index = -1"),
            (Settings { drift_after_hours: 0, ..Settings::default() }, "drift_after_hours = 0"),
        ] {
            assert!(settings.validate().unwrap_err().starts_with(key));
        }
    }

    #[test]
    fn drift_waits_for_its_hours_and_for_a_round_to_compare_with() {
        let on = Settings { drift_index: 0.25, ..Settings::default() };
        let last = Some(at("2026-01-10T02:00:00Z"));
        assert_eq!(on.drift_from(last), Some(at("2026-01-11T02:00:00Z")));
        assert_eq!((on.drift_from(None), Settings::default().drift_from(last)), (None, None));
    }
}
