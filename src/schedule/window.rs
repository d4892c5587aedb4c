//! The off-peak window: hours of the day in which a round may work.

use std::str::FromStr;

use chrono::{DateTime, Days, NaiveTime, TimeDelta, TimeZone, Utc};
use chrono_tz::Tz;

/// Hours of each day, from a start to an end, which may lie past midnight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Window {
    start: NaiveTime,
    end: NaiveTime,
    zone: Tz,
}

impl Window {
    /// Reads a window such as `22:00-06:00`; nothing of an empty text. An error names the value and the remedy.
    pub(super) fn parse(text: &str, zone: Tz) -> Result<Option<Window>, String> {
        if text.is_empty() {
            return Ok(None);
        }
        let time = |text: &str| NaiveTime::from_str(text.trim()).ok();
        let both = text.split_once('-').and_then(|(start, end)| Some((time(start)?, time(end)?)));
        match both {
            Some((start, end)) if start != end => Ok(Some(Window { start, end, zone })),
            Some(_) => Err(format!("window {text:?} has no length; leave it empty for the whole day")),
            None => Err(format!("window {text:?} cannot be read; write two times of the day such as \"22:00-06:00\"")),
        }
    }

    /// Returns true where a round may work at `now`.
    pub fn is_open(&self, now: DateTime<Utc>) -> bool {
        let local = now.with_timezone(&self.zone).time();
        match self.start < self.end {
            true => self.start <= local && local < self.end,
            false => self.start <= local || local < self.end,
        }
    }

    /// Returns when a round may work: `now` where that is in the window, else its next start.
    pub fn opens(&self, now: DateTime<Utc>) -> DateTime<Utc> {
        if self.is_open(now) { now } else { self.next(self.start, now) }
    }

    /// Returns when the window that is open at `now` closes.
    pub fn closes(&self, now: DateTime<Utc>) -> DateTime<Utc> {
        self.next(self.end, now)
    }

    /// Returns the next moment after `now` at which clocks show `time`; one that daylight saving skips comes with the jump,
    /// one that it repeats at its first.
    fn next(&self, time: NaiveTime, now: DateTime<Utc>) -> DateTime<Utc> {
        let today = now.with_timezone(&self.zone).date_naive();
        let moment = |days: u64| {
            let local = today.checked_add_days(Days::new(days))?.and_time(time);
            let found = self.zone.from_local_datetime(&local).earliest();
            // No zone skips more than this.
            found.or_else(|| self.zone.from_local_datetime(&(local + TimeDelta::hours(1))).earliest())
        };
        let next = (0..3).filter_map(moment).map(|found| found.with_timezone(&Utc)).find(|found| *found > now);
        // A calendar that ends has no next day; nobody waits for it.
        next.unwrap_or(DateTime::<Utc>::MAX_UTC)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn window(text: &str) -> Window {
        Window::parse(text, chrono_tz::Europe::Vienna).unwrap().unwrap()
    }

    fn at(text: &str) -> DateTime<Utc> {
        text.parse().unwrap()
    }

    #[test]
    fn a_window_past_midnight_is_open_on_both_sides_of_it() {
        let nightly = window("22:00-06:00");
        let open = |text: &str| nightly.is_open(at(text));
        assert!(!open("2026-01-10T20:59:59Z") && open("2026-01-10T21:00:00Z"), "22:00 in Vienna is 21:00");
        assert!(open("2026-01-11T04:59:59Z") && !open("2026-01-11T05:00:00Z"));
        assert_eq!(nightly.opens(at("2026-01-10T12:00:00Z")), at("2026-01-10T21:00:00Z"));
        assert_eq!(nightly.opens(at("2026-01-10T23:30:00Z")), at("2026-01-10T23:30:00Z"));
        assert_eq!(nightly.closes(at("2026-01-10T23:30:00Z")), at("2026-01-11T05:00:00Z"));
        assert_eq!(nightly.closes(at("2026-01-11T01:00:00Z")), at("2026-01-11T05:00:00Z"));
        let noon = window("12:00-13:30");
        assert!(noon.is_open(at("2026-01-10T11:00:00Z")) && !noon.is_open(at("2026-01-10T12:30:00Z")));
        assert_eq!(noon.opens(at("2026-01-10T12:30:00Z")), at("2026-01-11T11:00:00Z"));
    }

    #[test]
    fn a_start_that_daylight_saving_skips_comes_with_the_jump_and_one_that_it_repeats_once() {
        // 02:30 does not exist on 2026-03-29 in Vienna, and is there twice on 2026-10-25.
        let early = window("02:30-04:00");
        assert_eq!(early.opens(at("2026-03-29T00:00:00Z")), at("2026-03-29T01:30:00Z"));
        assert_eq!(early.opens(at("2026-10-24T23:00:00Z")), at("2026-10-25T00:30:00Z"));
    }

    #[test]
    fn what_is_no_window_is_refused_with_the_remedy() {
        let error = |text: &str| Window::parse(text, chrono_tz::UTC).unwrap_err();
        assert!(error("22-6").contains("write two times of the day such as \"22:00-06:00\""));
        assert!(error("06:00-06:00").contains("has no length"));
        assert_eq!(Window::parse("", chrono_tz::UTC), Ok(None));
    }
}
