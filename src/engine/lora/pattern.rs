//! Values that hold for some modules only, by a pattern of their paths, as PEFT's `rank_pattern` and `alpha_pattern` do.
//!
//! PEFT takes the first key, in the order of the file, for which `(.*\.)?(KEY)$` matches the module's path from its start, such
//! as `model.layers.3.self_attn.q_proj`; so `q_proj` is every layer's, and `layers.3.self_attn.q_proj` one. `$` ends a path.

use std::collections::BTreeMap;
use std::fmt;
use std::marker::PhantomData;

use regex::Regex;
use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Values by pattern, in the order in which they are tried.
#[derive(Debug, Clone, PartialEq)]
pub struct Patterns<T>(Vec<(String, T)>);

impl<T> Default for Patterns<T> {
    fn default() -> Self {
        Patterns(Vec::new())
    }
}

impl<T: Copy> Patterns<T> {
    /// Returns the value of the first pattern that a module's path matches.
    pub fn of(&self, path: &str) -> Option<T> {
        self.0
            .iter()
            .find(|(pattern, _)| compile(pattern).is_ok_and(|regex| regex.is_match(path)))
            .map(|(_, value)| *value)
    }

    /// Returns the first pattern that is no regular expression, with what is wrong with it.
    pub fn broken(&self) -> Option<(&str, String)> {
        self.0.iter().find_map(|(pattern, _)| Some((pattern.as_str(), compile(pattern).err()?)))
    }

    /// Returns the first pattern that none of these paths matches.
    pub fn idle(&self, paths: &[String]) -> Option<&str> {
        let matches = |pattern: &str| compile(pattern).is_ok_and(|regex| paths.iter().any(|path| regex.is_match(path)));
        self.0.iter().map(|(pattern, _)| pattern.as_str()).find(|pattern| !matches(pattern))
    }

    /// Returns all values.
    pub fn values(&self) -> impl Iterator<Item = T> {
        self.0.iter().map(|(_, value)| *value)
    }
}

fn compile(pattern: &str) -> Result<Regex, String> {
    let last_line = |error: regex::Error| error.to_string().lines().last().unwrap_or_default().trim().to_string();
    Regex::new(&format!(r"^(?:.*\.)?(?:{pattern})$")).map_err(last_line)
}

/// Sorted, as PEFT writes them.
impl<T: Copy> From<&BTreeMap<String, T>> for Patterns<T> {
    fn from(values: &BTreeMap<String, T>) -> Self {
        Patterns(values.iter().map(|(pattern, value)| (pattern.clone(), *value)).collect())
    }
}

impl<T: Serialize> Serialize for Patterns<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(pattern, value)| (pattern, value)))
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Patterns<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(InOrder(PhantomData))
    }
}

struct InOrder<T>(PhantomData<T>);

impl<'de, T: Deserialize<'de>> Visitor<'de> for InOrder<T> {
    type Value = Patterns<T>;

    fn expecting(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        formatter.write_str("a map of patterns")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut entries = Vec::new();
        while let Some(entry) = map.next_entry()? {
            entries.push(entry);
        }
        Ok(Patterns(entries))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn patterns(text: &str) -> Patterns<usize> {
        serde_json::from_str(text).unwrap()
    }

    /// The cases of PEFT's `get_pattern_key` (tools/reference/lora_patterns_golden.py).
    #[test]
    fn patterns_match_as_in_peft() {
        #[derive(Deserialize)]
        struct Case {
            pattern: Patterns<usize>,
            path: String,
            value: Option<usize>,
        }
        let golden = format!("{}/tests/golden/lora_patterns.json", env!("CARGO_MANIFEST_DIR"));
        let cases: Vec<Case> = serde_json::from_slice(&std::fs::read(golden).unwrap()).unwrap();
        assert!(cases.len() > 40 && cases.iter().filter(|case| case.value.is_some()).count() > 10);
        for Case { pattern, path, value } in cases {
            assert_eq!(pattern.of(&path), value, "{path} by {pattern:?}");
        }
    }

    #[test]
    fn the_order_is_the_files_and_survives_writing() {
        let text = r#"{"q_proj":1,"layers.1.self_attn.q_proj":2}"#;
        assert_eq!(patterns(text).of("model.layers.1.self_attn.q_proj"), Some(1));
        assert_eq!(serde_json::to_string(&patterns(text)).unwrap(), text);
    }

    #[test]
    fn what_matches_nothing_and_what_is_no_pattern_is_told() {
        let paths = ["model.layers.0.mlp.up_proj".to_string()];
        assert_eq!(patterns(r#"{"up_proj": 1, "v_proj": 2}"#).idle(&paths), Some("v_proj"));
        assert_eq!(patterns(r#"{"up_proj": 1}"#).idle(&paths), None);
        assert_eq!(
            patterns(r#"{"up_proj": 1, "(": 2}"#).broken().map(|(pattern, _)| pattern.to_string()),
            Some("(".into())
        );
    }
}
