//! What a reasoning model thinks before it answers: trained on as it stands, not scored.
//!
//! A rule for the answer is none for the thoughts before it, and a text that was cut off in the middle of its thoughts has no answer.
//! Some chat templates open the thoughts themselves, so that an answer may hold the closing tag alone.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The tags around what is thought.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// What opens the thoughts at the start of an answer. An answer that opens them and never closes them counts as empty.
    pub open: String,
    /// What closes them: the answer is what follows its last place. Empty: answers are scored whole.
    pub close: String,
}

impl Default for Settings {
    fn default() -> Self {
        Settings { open: "<think>".into(), close: "</think>".into() }
    }
}

impl Settings {
    /// Returns the answer without what was thought before it.
    pub fn answer<'a>(&self, text: &'a str) -> &'a str {
        if self.close.is_empty() {
            return text;
        }
        match text.rsplit_once(&self.close) {
            Some((_, answer)) => answer.trim_start(),
            None if !self.open.is_empty() && text.trim_start().starts_with(&self.open) => "",
            None => text,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thoughts_are_left_out_and_answers_without_any_stay_as_they_are() {
        let tags = Settings::default();
        for (text, answer) in [
            ("<think>hm {</think>\n\n{\"a\": 1}", "{\"a\": 1}"),
            ("so it is 4</think>4", "4"),
            ("<think>a</think><think>b</think> c", "c"),
            ("  <think>never done", ""),
            ("<think>done</think>", ""),
            ("no thoughts <think> here", "no thoughts <think> here"),
            (" plain ", " plain "),
        ] {
            assert_eq!(tags.answer(text), answer, "{text}");
        }
    }

    #[test]
    fn other_tags_and_none() {
        let tags = Settings { open: "[THINK]".into(), close: "[/THINK]".into() };
        assert_eq!(tags.answer("[THINK]x[/THINK]y"), "y");
        assert_eq!(tags.answer("<think>x</think>y"), "<think>x</think>y");
        assert_eq!(Settings { close: String::new(), ..tags }.answer("[THINK]x[/THINK]y"), "[THINK]x[/THINK]y");
    }
}
