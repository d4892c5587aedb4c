//! Ways to put a prompt, beside the plain one, that make better or more different answers to learn from (TAO's first stage).
//!
//! An answer is always learnt as the answer to the prompt as clients send it. One that was drawn after another
//! system prompt, or that had its reasoning cut off, was therefore never a sample of that policy: it has no log-probs, and only
//! losses of likelihood and of pairs may train on it.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::engine::SamplingSettings;
use crate::record::Message;

/// The strategy of answers that are drawn as clients are answered.
pub const PLAIN: &str = "plain";

/// Stands in `system` for the prompt's own system text.
const OWN_SYSTEM: &str = "{system}";

/// A named way to draw more answers to each prompt.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Strategy {
    /// Stands in the column `strategy` of each answer; not "plain".
    pub name: String,
    /// Answers to each prompt, beside those of samples_per_prompt; 1 to 64.
    pub samples: usize,
    /// Sampling temperature in place of candidates.temperature, above 0 and at most 2.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub temperature: Option<f64>,
    /// The system prompt in place of the prompt's own, such as "Think step by step, then write your answer after ANSWER:";
    /// `{system}` in it is the prompt's own text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub system: Option<String>,
    /// What stands before the answer proper, such as `ANSWER:` or `</think>`: the text after its last place is the answer, and one
    /// without it is thrown away.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub answer_after: Option<String>,
}

impl Strategy {
    /// Checks every key; the message names key, value and remedy.
    pub fn validate(&self) -> Result<(), String> {
        let Strategy { name, samples, temperature, system, answer_after } = self;
        if name.is_empty() || name == PLAIN {
            return Err(format!("name = {name:?}: give the strategy a name of its own"));
        }
        if !(1..=64).contains(samples) {
            return Err(format!("samples = {samples}: set 1 to 64 answers a prompt"));
        }
        if let Some(temperature) = temperature.filter(|t| t.is_nan() || *t <= 0.0 || *t > 2.0) {
            return Err(format!("temperature = {temperature}: set a value above 0 and at most 2"));
        }
        if answer_after.as_ref().is_some_and(String::is_empty) {
            return Err("answer_after = \"\": name the text that stands before the answer, or leave the key out".into());
        }
        match (temperature, system, answer_after) {
            (None, None, None) => Err(format!(
                "{name} draws as samples_per_prompt does: set temperature, system or answer_after, or leave it out"
            )),
            _ => Ok(()),
        }
    }

    /// Returns true if answers are samples of the very prompt that is trained, however hot.
    pub fn asks_plainly(&self) -> bool {
        self.system.is_none() && self.answer_after.is_none()
    }

    /// Returns the conversation as the model is asked.
    pub(super) fn messages(&self, messages: &[Message]) -> Vec<Message> {
        let Some(system) = &self.system else { return messages.to_vec() };
        let (own, rest) = match messages.split_first() {
            Some((first, rest)) if first.role == "system" => (first.plain_text(), rest),
            _ => (String::new(), messages),
        };
        let first = Message::text("system", system.replace(OWN_SYSTEM, &own));
        std::iter::once(first).chain(rest.iter().cloned()).collect()
    }

    /// Returns how it draws.
    pub(super) fn sampling(&self, plain: &SamplingSettings) -> SamplingSettings {
        SamplingSettings { temperature: self.temperature.unwrap_or(plain.temperature), ..plain.clone() }
    }

    /// Returns the answer proper, if there is one.
    pub(super) fn answer<'a>(&self, text: &'a str) -> Option<&'a str> {
        let answer = match &self.answer_after {
            Some(mark) => text.rsplit_once(mark.as_str())?.1.trim(),
            None => text,
        };
        (!answer.is_empty()).then_some(answer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn strategy(system: Option<&str>, answer_after: Option<&str>) -> Strategy {
        let owned = |text: Option<&str>| text.map(str::to_string);
        let (system, answer_after) = (owned(system), owned(answer_after));
        Strategy { name: "think".into(), samples: 2, temperature: None, system, answer_after }
    }

    #[test]
    fn a_system_prompt_takes_the_place_of_the_own_one_or_holds_it() {
        let asked = [Message::text("system", "Be brief."), Message::text("user", "Why?")];
        let put = |system: &str, messages: &[Message]| strategy(Some(system), None).messages(messages);
        assert_eq!(put("Think.", &asked), [Message::text("system", "Think."), Message::text("user", "Why?")]);
        assert_eq!(put("{system} Think.", &asked)[0], Message::text("system", "Be brief. Think."));
        assert_eq!(put("Think.", &asked[1..]), [Message::text("system", "Think."), Message::text("user", "Why?")]);
        assert_eq!(strategy(None, Some("x")).messages(&asked), asked);
    }

    #[test]
    fn the_answer_stands_after_the_last_mark() {
        let think = strategy(None, Some("ANSWER:"));
        assert_eq!(think.answer("ANSWER: no. Hm. ANSWER:  yes \n"), Some("yes"));
        assert_eq!((think.answer("no mark"), think.answer("so ANSWER: ")), (None, None));
        assert_eq!(strategy(Some("s"), None).answer(" as it is "), Some(" as it is "));
    }

    #[test]
    fn a_strategy_that_is_none_is_refused() {
        let refused = |strategy: Strategy, words: &str| {
            let problem = strategy.validate().unwrap_err();
            assert!(problem.contains(words), "{problem}");
        };
        let good = strategy(Some("s"), None);
        assert_eq!(good.validate(), Ok(()));
        refused(strategy(None, None), "draws as samples_per_prompt does");
        refused(strategy(None, Some("")), "answer_after = \"\"");
        refused(Strategy { name: PLAIN.into(), ..good.clone() }, "name = \"plain\"");
        refused(Strategy { samples: 0, ..good.clone() }, "samples = 0");
        refused(Strategy { temperature: Some(0.0), ..good.clone() }, "temperature = 0");
        refused(Strategy { temperature: Some(f64::NAN), ..good }, "temperature = NaN");
    }
}
