//! How numbers and times are written for people.

use chrono::{DateTime, Utc};
use minijinja::{Environment, Value};

/// Adds all filters.
pub(super) fn add(environment: &mut Environment<'_>) {
    environment.add_filter("day", day);
    environment.add_filter("away", |time: Value| away(&time, Utc::now()));
    environment.add_filter("seconds", seconds);
    environment.add_filter("number", number);
    environment
        .add_filter("score", |value: Value| f64::try_from(value).map_or_else(|_| "–".into(), |x| format!("{x:.3}")));
    environment.add_filter("tone", |state: &str| tone(state));
    environment.add_filter("query", |text: &str| super::encode(text));
}

/// Returns a time in UTC to the minute, and a dash where there is none.
fn day(time: &Value) -> String {
    let text = time.as_str().unwrap_or_default();
    text.parse::<DateTime<Utc>>().map_or_else(|_| "–".to_string(), |time| time.format("%Y-%m-%d %H:%M UTC").to_string())
}

/// Returns how far away a time is: `in 5 h`, `3 min ago`.
fn away(time: &Value, now: DateTime<Utc>) -> String {
    let Ok(time) = time.as_str().unwrap_or_default().parse::<DateTime<Utc>>() else { return String::new() };
    let distance = (time - now).num_seconds();
    let (value, unit) = match distance.abs() {
        far if far >= 2 * 86_400 => (far / 86_400, "days"),
        far if far >= 2 * 3_600 => (far / 3_600, "h"),
        far if far >= 120 => (far / 60, "min"),
        near => (near, "s"),
    };
    if distance >= 0 { format!("in {value} {unit}") } else { format!("{value} {unit} ago") }
}

/// Returns a length of time in its two largest units.
fn seconds(value: f64) -> String {
    let whole = value.max(0.0).round() as u64;
    match whole {
        _ if value < 10.0 => format!("{:.1} s", value.max(0.0)),
        0..120 => format!("{whole} s"),
        120..7_200 => format!("{} min {} s", whole / 60, whole % 60),
        7_200..172_800 => format!("{} h {} min", whole / 3_600, whole / 60 % 60),
        _ => format!("{} days {} h", whole / 86_400, whole / 3_600 % 24),
    }
}

/// Returns a whole number with its thousands apart.
fn number(value: i64) -> String {
    let digits = value.unsigned_abs().to_string();
    let groups: Vec<&str> =
        digits.as_bytes().rchunks(3).rev().filter_map(|group| std::str::from_utf8(group).ok()).collect();
    format!("{}{}", if value < 0 { "−" } else { "" }, groups.join(","))
}

/// Returns the class that colours a state.
fn tone(state: &str) -> &'static str {
    match state {
        "promote" | "promoted" | "pass" | "done" => "good",
        "open" | "not yet" | "skipped" | "expired" | "void" | "overridden" | "asked" | "aborted" | "frozen" => "warn",
        "refused" | "failed" | "fail" | "futile" | "rolled_back" | "quarantined" | "erased" => "bad",
        "running" | "registered" | "thawed" => "live",
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_times_are_written_as_people_read_them() {
        assert_eq!([0, 999, 1_000, -1_234_567].map(number), ["0", "999", "1,000", "−1,234,567"]);
        let lengths = [0.04, 9.96, 59.6, 600.0, 7_260.0, 200_000.0].map(seconds);
        assert_eq!(lengths, ["0.0 s", "10.0 s", "60 s", "10 min 0 s", "2 h 1 min", "2 days 7 h"]);
        let now = "2026-01-02T03:04:05Z".parse().unwrap();
        let away = |time: &str| away(&Value::from(time), now);
        assert_eq!((away("2026-01-02T08:10:05Z"), away("2026-01-02T03:00:00Z")), ("in 5 h".into(), "4 min ago".into()));
        assert_eq!(day(&Value::from("2026-01-02T03:04:05.678Z")), "2026-01-02 03:04 UTC");
        assert_eq!((day(&Value::from(())), away("never")), ("–".into(), String::new()));
    }
}
