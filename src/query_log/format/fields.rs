//! Lenient access to a foreign JSON object: fields are taken out one by one, and what is left is kept.
//!
//! Each getter removes the field only where it can be read as what is asked for. So a value of the wrong type or out of
//! range is never lost: it stays in the object and ends in `extra`.

use std::collections::BTreeMap;

use chrono::{DateTime, NaiveDateTime};

use super::{Refusal, parse};
use crate::json::{Map, Name, Value};

/// Fields and headers that are dropped: credentials, and addresses and names of people that are no training data. The
/// end user is kept beside them, for its keyed hash.
pub(super) const PERSONAL: [&str; 18] = [
    "authorization",
    "proxy-authorization",
    "cookie",
    "set-cookie",
    "api-key",
    "api_key",
    "x-api-key",
    "client_ip",
    "requester_ip_address",
    "x-forwarded-for",
    "x-real-ip",
    "user_api_key_hash",
    "user_api_key_user_id",
    "user_api_key_user_email",
    "user_api_key_end_user_id",
    "end_user",
    "user_id",
    "user_email",
];

/// Earliest and latest time that a log can mean, in seconds: the years 2000 to 2099.
const TIMES: std::ops::Range<f64> = 946_684_800.0..4_102_444_800.0;

/// A foreign object whose fields are being taken. What is taken leaves a null behind, which is as good as nothing: moving
/// all later fields up each time would cost more than reading them.
#[derive(Debug, Default)]
pub(super) struct Fields(Map);

impl Fields {
    pub(super) fn new(map: Map) -> Self {
        Fields(map)
    }

    pub(super) fn has(&self, name: &str) -> bool {
        self.0.get(name).is_some_and(|value| !value.is_null())
    }

    pub(super) fn get(&self, name: &str) -> Option<&Value> {
        self.0.get(name)
    }

    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.0.keys().map(Name::as_str)
    }

    /// Takes a field as it is; null counts as absent.
    pub(super) fn take(&mut self, name: &str) -> Option<Value> {
        self.0.get_mut(name).map(std::mem::take).filter(|value| !value.is_null())
    }

    /// Takes the first of several names of one thing that `read` understands.
    fn take_as<T>(&mut self, names: &[&str], read: impl Fn(&Value) -> Option<T>) -> Option<T> {
        names.iter().find_map(|name| {
            let value = self.0.get_mut(name)?;
            let found = read(value)?;
            *value = Value::Null;
            Some(found)
        })
    }

    /// Takes a text that is not blank; a number is taken as its digits.
    pub(super) fn text(&mut self, names: &[&str]) -> Option<String> {
        names.iter().find_map(|name| {
            let value = self.0.get_mut(name)?;
            let found = match value {
                Value::String(text) if !text.trim().is_empty() => std::mem::take(text),
                Value::Number(number) => number.to_string(),
                _ => return None,
            };
            *value = Value::Null;
            Some(found)
        })
    }

    pub(super) fn number(&mut self, names: &[&str]) -> Option<f64> {
        self.take_as(names, number)
    }

    pub(super) fn integer(&mut self, names: &[&str]) -> Option<i64> {
        self.take_as(names, integer)
    }

    pub(super) fn truth(&mut self, names: &[&str]) -> Option<bool> {
        self.take_as(names, truth)
    }

    /// Takes a point in time as microseconds since the epoch.
    pub(super) fn time(&mut self, names: &[&str]) -> Option<i64> {
        self.take_as(names, time)
    }

    /// Takes an object out to take its fields; put it back with [`Fields::put_rest`].
    pub(super) fn object(&mut self, name: &str) -> Fields {
        match self.0.get_mut(name) {
            Some(Value::Object(map)) => Fields(std::mem::take(map)),
            _ => Fields::default(),
        }
    }

    /// Takes an object, or a string that holds one.
    pub(super) fn embedded(&mut self, name: &str) -> Option<Result<Value, Refusal>> {
        match self.take(name)? {
            Value::String(text) => Some(parse(text.trim().as_bytes())),
            value => Some(Ok(value)),
        }
    }

    /// Puts back a field, or what is left of it; nothing where nothing is left.
    pub(super) fn put_rest(&mut self, name: &str, rest: impl Into<Value>) {
        let rest = match rest.into() {
            Value::Object(map) if map.is_empty() => Value::Null,
            Value::Array(items) if items.is_empty() => Value::Null,
            value => value,
        };
        match self.0.get_mut(name) {
            Some(place) if rest.is_null() || !place.is_null() => *place = rest,
            None if rest.is_null() => {}
            // What was taken comes back behind the fields that stayed.
            _ => {
                self.0.shift_remove(name);
                self.0.insert(name.to_owned(), rest);
            }
        }
    }

    /// Takes the fields of these names, for a column that holds an object.
    pub(super) fn subset(&mut self, names: &[&str]) -> Map {
        names.iter().filter_map(|name| Some((*name, self.take(name)?))).collect()
    }

    /// Returns what nobody took, without nulls and without what is [`PERSONAL`].
    pub(super) fn rest(self) -> Map {
        let mut rest = self.0;
        rest.retain(|name, value| !value.is_null() && !is_personal(name));
        rest.values_mut().for_each(drop_personal);
        rest
    }
}

/// The lengths of the names in [`PERSONAL`], a bit each: most names are told by theirs.
const LENGTHS: u64 = {
    let (mut lengths, mut index) = (0, 0);
    while index < PERSONAL.len() {
        lengths |= 1 << PERSONAL[index].len();
        index += 1;
    }
    lengths
};

fn is_personal(name: &str) -> bool {
    let may_be = LENGTHS.checked_shr(name.len() as u32).is_some_and(|lengths| lengths & 1 == 1);
    may_be && PERSONAL.iter().any(|personal| personal.eq_ignore_ascii_case(name))
}

fn drop_personal(value: &mut Value) {
    match value {
        Value::Object(map) => {
            map.retain(|name, _| !is_personal(name));
            map.values_mut().for_each(drop_personal);
        }
        Value::Array(items) => {
            items.retain(|item| !is_personal_pair(item));
            items.iter_mut().for_each(drop_personal);
        }
        _ => {}
    }
}

/// Returns true where an item of a list is a name and a value, as some loggers write headers, and the name is personal.
fn is_personal_pair(item: &Value) -> bool {
    let name = match item {
        Value::Object(map) if map.len() == 2 => map.get("name").or_else(|| map.get("key")),
        Value::Array(pair) if pair.len() == 2 => pair.first(),
        _ => None,
    };
    name.and_then(Value::as_str).is_some_and(is_personal)
}

/// Headers of the Kafka record and of the logged HTTP request, looked up without case.
pub(super) struct Headers<'a>(Vec<(String, &'a str)>);

impl<'a> Headers<'a> {
    pub(super) fn new(kafka: &'a BTreeMap<String, String>, logged: Option<&'a Value>) -> Self {
        let mut headers = Headers(Vec::with_capacity(kafka.len()));
        kafka.iter().for_each(|(name, value)| headers.0.push((name.to_ascii_lowercase(), value)));
        logged.into_iter().for_each(|logged| headers.add(logged));
        headers
    }

    /// Adds logged headers: an object, a value of which may be a list.
    pub(super) fn add(&mut self, logged: &'a Value) {
        for (name, value) in logged.as_object().into_iter().flatten() {
            let values = value.as_array().map_or(std::slice::from_ref(value), Vec::as_slice);
            let texts = values.iter().filter_map(|value| match value {
                Value::Bool(truth) => Some(if *truth { "true" } else { "false" }),
                value => value.as_str(),
            });
            self.0.extend(texts.map(|text| (name.as_str().to_ascii_lowercase(), text)));
        }
    }

    pub(super) fn get(&self, name: &str) -> Option<&'a str> {
        let found = self.0.iter().find(|(key, _)| key == name)?;
        Some(found.1.trim()).filter(|value| !value.is_empty())
    }

    /// Returns true where the header is there and says no, if only once.
    pub(super) fn denies(&self, name: &str) -> bool {
        self.0.iter().any(|(key, value)| key == name && word_truth(value) == Some(false))
    }
}

/// Returns what kind of JSON a value is, for a message that must not show its text.
pub(super) fn kind_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

pub(super) fn number(value: &Value) -> Option<f64> {
    let number = match value {
        Value::Number(number) => number.as_f64(),
        Value::String(text) => text.trim().parse().ok(),
        _ => None,
    };
    number.filter(|n| n.is_finite())
}

pub(super) fn integer(value: &Value) -> Option<i64> {
    // Past 2^53 a float names no single integer.
    let whole = |n: f64| (n.fract() == 0.0 && n.abs() < 9.0e15).then_some(n as i64);
    match value {
        Value::Number(number) => number.as_i64().or_else(|| whole(number.as_f64()?)),
        Value::String(text) => text.trim().parse().ok().or_else(|| whole(text.trim().parse().ok()?)),
        _ => None,
    }
}

pub(super) fn truth(value: &Value) -> Option<bool> {
    match value {
        Value::Bool(truth) => Some(*truth),
        Value::String(word) => word_truth(word),
        Value::Number(number) => match number.as_f64() {
            Some(0.0) => Some(false),
            Some(1.0) => Some(true),
            _ => None,
        },
        _ => None,
    }
}

fn word_truth(word: &str) -> Option<bool> {
    match word.trim().to_ascii_lowercase().as_str() {
        "true" | "1" | "yes" | "on" => Some(true),
        "false" | "0" | "no" | "off" => Some(false),
        _ => None,
    }
}

/// Reads a time: RFC 3339 (UTC where it names no zone), or a number since the epoch in seconds, milli-, micro- or
/// nanoseconds. The unit is the one that puts it into this century; no two do.
pub(super) fn time(value: &Value) -> Option<i64> {
    if let Some(number) = number(value) {
        let unit = [1.0, 1e3, 1e6, 1e9].into_iter().find(|unit| TIMES.contains(&(number / unit)))?;
        // A float of seconds is rounded to microseconds; integers of any unit are exact.
        let exact = integer(value).map(|n| (i128::from(n) * 1_000_000 / unit as i128) as i64);
        return Some(exact.unwrap_or((number / unit * 1e6).round() as i64));
    }
    let text = value.as_str()?.trim();
    let zoned = DateTime::parse_from_rfc3339(text).ok().map(|time| time.timestamp_micros());
    let naive = || {
        let formats = ["%Y-%m-%d %H:%M:%S%.f", "%Y-%m-%dT%H:%M:%S%.f"];
        let time = formats.iter().find_map(|format| NaiveDateTime::parse_from_str(text, format).ok())?;
        Some(time.and_utc().timestamp_micros())
    };
    zoned.or_else(naive).filter(|&micros| TIMES.contains(&(micros as f64 / 1e6)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::json::json;

    #[test]
    fn times_are_read_in_every_unit_and_only_in_this_century() {
        let micros = 1_732_345_678_123_456i64;
        for same in [
            json!(1_732_345_678.123456),
            json!("1732345678.123456"),
            json!(micros),
            json!("2024-11-23T07:07:58.123456Z"),
            json!("2024-11-23T08:07:58.123456+01:00"),
            json!("2024-11-23 07:07:58.123456"),
        ] {
            assert_eq!(time(&same), Some(micros), "{same}");
        }
        assert_eq!(time(&json!(1_732_345_678_123i64)), Some(1_732_345_678_123_000));
        assert_eq!(time(&json!(1_732_345_678_123_456_489i64)), Some(micros));
        for odd in [
            json!("0001-01-01T00:00:00Z"),
            json!("9999-12-31T23:59:59Z"),
            json!(-62_135_596_800i64),
            json!(253_402_300_799i64),
            json!(253_402_300_799_000i64),
            json!(0),
            json!("soon"),
            json!(""),
            json!([1]),
        ] {
            assert_eq!(time(&odd), None, "{odd}");
        }
    }

    #[test]
    fn numbers_may_be_strings_but_not_words() {
        assert_eq!(integer(&json!("12")), Some(12));
        assert_eq!(integer(&json!(12.0)), Some(12));
        assert_eq!(integer(&json!(12.5)), None);
        assert_eq!(integer(&json!(1e300)), None);
        assert_eq!(number(&json!(" 1.5 ")), Some(1.5));
        assert_eq!(number(&json!("NaN")), None);
        assert_eq!(number(&json!("inf")), None);
    }

    #[test]
    fn what_cannot_be_read_stays() {
        let Value::Object(map) = json!({"status": "abc", "time": "9999-01-01T00:00:00Z", "n": null, "cookie": "s"})
        else {
            panic!()
        };
        let mut fields = Fields::new(map);
        assert_eq!(fields.integer(&["status"]), None);
        assert_eq!(fields.time(&["time"]), None);
        assert_eq!(Value::Object(fields.rest()), json!({"status": "abc", "time": "9999-01-01T00:00:00Z"}));
    }

    #[test]
    fn credentials_are_dropped_wherever_headers_are_logged() {
        let logged =
            json!({"a": [{"name": "Cookie", "value": "s"}, {"key": "api-key", "value": "s"}, ["Cookie", "s"]]});
        let kept = json!({"list": [{"name": "cookie", "value": "s", "size": 1}, ["accept", "*/*"], "cookie"]});
        let Value::Object(map) = json!({"logged": logged, "kept": kept}) else { panic!() };
        assert_eq!(Value::Object(Fields::new(map).rest()), json!({"logged": {"a": []}, "kept": kept}));
    }
}
