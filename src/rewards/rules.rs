//! Rules: exact checks of an answer's form, as an operator writes them under `[[workload.rules]]`.
//!
//! ```toml
//! rules = [
//!     { kind = "length", unit = "words", min = 8 },
//!     { kind = "ends_with", text = "Hope this helps!", hard = false },
//! ]
//! ```
//!
//! A rule reads the answer, its finish reason and, for one kind, the prompt; nothing else, so that no text in a prompt
//! can argue with it. What it is made of is compiled once when the config is loaded; a pattern or a schema that does
//! not compile is refused there, with its place. Words, sentences and lines are defined in [`text`].

mod check;
pub mod text;

#[cfg(test)]
mod tests;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use check::{Answer, Check};

/// One rule of a workload: what is checked, and whether failing it makes the reward 0.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Rule {
    /// A hard rule scores 1 or 0, and 0 makes the whole reward 0. A graded one (`hard = false`) gives partial credit
    /// that joins the mean of the graded scores.
    #[serde(default = "hard")]
    pub hard: bool,
    #[serde(flatten)]
    pub kind: Kind,
}

fn hard() -> bool {
    true
}

impl Rule {
    /// Returns a hard rule.
    pub fn hard(kind: Kind) -> Self {
        Rule { hard: true, kind }
    }

    /// Returns a rule that gives partial credit.
    pub fn graded(kind: Kind) -> Self {
        Rule { hard: false, kind }
    }

    /// Compiles the rule, or says what is wrong with which value and what to write instead.
    pub fn compile(&self) -> Result<Check, String> {
        Check::compile(&self.kind)
    }
}

/// What a rule checks. The answer is always taken without white space around it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Kind {
    /// The answer holds a match of the pattern.
    RegexMust {
        /// A regular expression in the syntax of the `regex` crate (linear time; no look-around, no back references).
        pattern: String,
    },
    /// The answer holds no match of the pattern.
    RegexMustNot {
        /// A regular expression, as in `regex_must`.
        pattern: String,
    },
    /// The whole answer is one JSON value. Partial credit: 0.5 where it parses but the schema refuses it.
    Json {
        /// A JSON Schema, written as JSON text. `$ref` reaches only into the schema itself: nothing is fetched.
        schema: Option<String>,
    },
    /// The answer's length lies between two bounds, both included. Partial credit: the ratio to the bound it missed.
    Length {
        /// What is counted: `characters` (Unicode code points), `words`, `sentences` or `lines` (those not blank).
        unit: Unit,
        /// The least that passes.
        min: Option<usize>,
        /// The most that passes.
        max: Option<usize>,
    },
    /// Every letter that has a case is in this one. Partial credit: the share of letters that are.
    Case {
        /// `lower` or `upper`.
        case: LetterCase,
    },
    /// The answer starts with this text, letter for letter. Partial credit: the share of it that is there.
    StartsWith {
        /// The text; not empty.
        text: String,
    },
    /// The answer ends with this text, letter for letter. Partial credit: the share of it that is there.
    EndsWith {
        /// The text; not empty.
        text: String,
    },
    /// Each of these words or phrases occurs, whatever its case. Partial credit: the share that does.
    RequiredWords {
        /// Words or phrases, matched as whole words.
        words: Vec<String>,
    },
    /// None of these words or phrases occurs, whatever its case. Partial credit: 1 / (1 + occurrences).
    ForbiddenWords {
        /// Words or phrases, matched as whole words.
        words: Vec<String>,
    },
    /// The answer has this many bullet points: lines that start with `-`, `*` or `•`, a space and some text. Partial
    /// credit: the ratio of the smaller to the larger count.
    Bullets {
        /// How many, exactly.
        count: usize,
    },
    /// No run of `ngram` words occurs more than `max` times. Partial credit: `max` / the most occurrences.
    Repetition {
        /// Words in a run; at least 1.
        ngram: usize,
        /// The most often that one run may occur; at least 1.
        max: usize,
    },
    /// The answer is not in another language. A text too short for a reliable guess passes, one without letters fails.
    Language {
        /// Three-letter code of ISO 639-3, such as `eng`.
        code: String,
    },
    /// The model ended the answer by itself (finish reason `stop`), not at the limit of tokens.
    Ended {},
    /// At most this share of the answer's three-word runs also stand in the prompt. Partial credit falls from 1 at the
    /// bound to 0 where the whole answer is copied.
    NotCopyOfPrompt {
        /// The bound, in [0, 1).
        max_overlap: f64,
    },
}

impl Kind {
    /// Returns the name that the config and the scored parts use.
    pub fn name(&self) -> &'static str {
        match self {
            Kind::RegexMust { .. } => "regex_must",
            Kind::RegexMustNot { .. } => "regex_must_not",
            Kind::Json { .. } => "json",
            Kind::Length { .. } => "length",
            Kind::Case { .. } => "case",
            Kind::StartsWith { .. } => "starts_with",
            Kind::EndsWith { .. } => "ends_with",
            Kind::RequiredWords { .. } => "required_words",
            Kind::ForbiddenWords { .. } => "forbidden_words",
            Kind::Bullets { .. } => "bullets",
            Kind::Repetition { .. } => "repetition",
            Kind::Language { .. } => "language",
            Kind::Ended {} => "ended",
            Kind::NotCopyOfPrompt { .. } => "not_copy_of_prompt",
        }
    }
}

/// What a `length` rule counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Unit {
    /// Unicode code points.
    Characters,
    /// Words, see [`text::words`].
    Words,
    /// Sentences, see [`text::sentences`].
    Sentences,
    /// Lines that are not blank.
    Lines,
}

impl Unit {
    /// Returns how many of this unit the text has.
    pub fn count(self, answer: &str) -> usize {
        match self {
            Unit::Characters => answer.trim().chars().count(),
            Unit::Words => text::words(answer).count(),
            Unit::Sentences => text::sentences(answer),
            Unit::Lines => text::lines(answer).count(),
        }
    }
}

/// Which case a `case` rule asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum LetterCase {
    /// Small letters.
    Lower,
    /// Capital letters.
    Upper,
}
