//! Production's decoding, and what candidates and it have in common: the bounds of their keys, and how a server is told.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::engine::SamplingSettings;

/// How the endpoint answers its clients; both sides of the gate answer the same way.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Decoding {
    /// Sampling temperature, 0 (greedy) to 2.
    pub temperature: f64,
    /// Nucleus mass kept, in (0, 1].
    pub top_p: f64,
    /// Likeliest tokens kept, before top_p; 0 keeps all.
    pub top_k: usize,
    /// Keeps tokens at least this likely beside the most likely one, in [0, 1] and before the others; 0 keeps all.
    pub min_p: f64,
    /// Makes tokens of the prompt and of the answer less likely, above 0 and at most 2; 1.0 is none.
    pub repetition_penalty: f64,
    /// Most new tokens of one answer, 1 or more.
    pub max_tokens: usize,
    /// Strings that end an answer, as clients send them in `stop`; empty: none.
    pub stop: Vec<String>,
    /// The endpoint's clients ask for JSON (`response_format`) where a workload's rules do (`json`), so that the gate, too, draws
    /// only texts that keep that rule.
    pub follow_json_rules: bool,
}

impl Default for Decoding {
    fn default() -> Self {
        Decoding {
            temperature: 0.7,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            max_tokens: 512,
            stop: Vec::new(),
            follow_json_rules: false,
        }
    }
}

impl Decoding {
    /// Checks every key; the message names key, value and remedy.
    pub fn validate(&self) -> Result<(), String> {
        if !(0.0..=2.0).contains(&self.temperature) {
            return Err(format!("temperature = {}: set a value from 0 to 2", self.temperature));
        }
        check_filters(self.top_p, self.min_p, self.repetition_penalty)?;
        match self.max_tokens {
            0 => Err("max_tokens = 0: set at least 1".to_string()),
            _ => check_stop(&self.stop),
        }
    }

    /// Returns how the engine is to draw.
    pub fn sampling(&self) -> SamplingSettings {
        SamplingSettings {
            temperature: self.temperature,
            top_p: self.top_p,
            top_k: self.top_k,
            min_p: self.min_p,
            repetition_penalty: self.repetition_penalty,
            max_tokens: self.max_tokens,
            stop: self.stop.clone(),
            ..SamplingSettings::default()
        }
    }
}

/// Adds to a chat request what it needs to draw as `sampling` says, under vLLM's names. What OpenAI's API does not know
/// is left out where it changes nothing, because some servers refuse names that they do not know.
pub fn write_sampling(body: &mut Value, sampling: &SamplingSettings) {
    body["temperature"] = json!(sampling.temperature);
    body["top_p"] = json!(sampling.top_p);
    body["max_tokens"] = json!(sampling.max_tokens);
    if !sampling.stop.is_empty() {
        body["stop"] = json!(sampling.stop);
    }
    if sampling.top_k > 0 {
        body["top_k"] = json!(sampling.top_k);
    }
    if sampling.min_p > 0.0 {
        body["min_p"] = json!(sampling.min_p);
    }
    if sampling.repetition_penalty != 1.0 {
        body["repetition_penalty"] = json!(sampling.repetition_penalty);
    }
}

/// Checks what narrows or bends the distribution; the bounds are those of vLLM's API.
pub(super) fn check_filters(top_p: f64, min_p: f64, repetition_penalty: f64) -> Result<(), String> {
    if !(top_p > 0.0 && top_p <= 1.0) {
        return Err(format!("top_p = {top_p}: set a value above 0 and at most 1"));
    }
    if !(0.0..=1.0).contains(&min_p) {
        return Err(format!("min_p = {min_p}: set a value from 0 to 1"));
    }
    match repetition_penalty > 0.0 && repetition_penalty <= 2.0 {
        true => Ok(()),
        false => {
            Err(format!("repetition_penalty = {repetition_penalty}: set a value above 0 and at most 2; 1 is none"))
        }
    }
}

/// Most stop strings, as in OpenAI's API: `taod serve` takes no more in a request.
const MAX_STOP_STRINGS: usize = 4;

pub(super) fn check_stop(stop: &[String]) -> Result<(), String> {
    match stop.len() > MAX_STOP_STRINGS || stop.iter().any(String::is_empty) {
        true => Err(format!("stop = {stop:?}: give at most {MAX_STOP_STRINGS} strings, none of them empty")),
        false => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::super::Settings;
    use super::*;

    #[test]
    fn values_out_of_range_are_refused_by_key_for_candidates_and_for_decoding() {
        for (key, value) in [
            ("top_p", 0.0),
            ("top_p", 1.5),
            ("min_p", -0.1),
            ("min_p", 1.1),
            ("repetition_penalty", 0.0),
            ("repetition_penalty", 2.5),
            ("min_p", f64::NAN),
            ("repetition_penalty", f64::NAN),
        ] {
            let set = |top_p: &mut f64, min_p: &mut f64, penalty: &mut f64| match key {
                "top_p" => *top_p = value,
                "min_p" => *min_p = value,
                _ => *penalty = value,
            };
            let (mut settings, mut decoding) = (Settings::default(), Decoding::default());
            set(&mut settings.top_p, &mut settings.min_p, &mut settings.repetition_penalty);
            set(&mut decoding.top_p, &mut decoding.min_p, &mut decoding.repetition_penalty);
            for problem in [settings.validate().unwrap_err(), decoding.validate().unwrap_err()] {
                assert!(problem.starts_with(&format!("{key} = {value}: set a value")), "{problem}");
            }
        }
    }

    #[test]
    fn what_narrows_or_bends_the_distribution_is_off_policy_and_reaches_the_engine() {
        let plain = Settings::default();
        assert!(plain.off_policy().is_none() && plain.draw().sampling.is_plain());
        for (settings, words) in [
            (Settings { temperature: 0.5, ..plain.clone() }, "candidates.temperature is 0.5, not 1"),
            (Settings { top_p: 0.9, ..plain.clone() }, "candidates.top_p is 0.9, not 1"),
            (Settings { top_k: 20, ..plain.clone() }, "candidates.top_k is 20, not 0"),
            (Settings { min_p: 0.05, ..plain.clone() }, "candidates.min_p is 0.05, not 0"),
            (Settings { repetition_penalty: 1.1, ..plain }, "candidates.repetition_penalty is 1.1, not 1"),
        ] {
            assert_eq!(settings.off_policy().as_deref(), Some(words));
            assert!(!settings.draw().sampling.is_plain(), "{words}");
        }
    }

    #[test]
    fn a_request_names_what_openai_does_not_know_only_where_it_matters() {
        let mut body = json!({"model": "m"});
        write_sampling(&mut body, &Decoding::default().sampling());
        assert_eq!(body, json!({"model": "m", "temperature": 0.7, "top_p": 1.0, "max_tokens": 512}));
        let stop = vec!["###".to_string()];
        let decoding = Decoding { top_k: 20, min_p: 0.05, repetition_penalty: 1.1, stop, ..Decoding::default() };
        write_sampling(&mut body, &decoding.sampling());
        let expected = json!({"model": "m", "temperature": 0.7, "top_p": 1.0, "max_tokens": 512, "stop": ["###"],
            "top_k": 20, "min_p": 0.05, "repetition_penalty": 1.1});
        assert_eq!(body, expected);
    }
}
