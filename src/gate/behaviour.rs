//! Ways of not answering, found in an answer's text: refusing, asking back, saying nothing, repeating, breaking a tool call.
//!
//! The gate compares how often each side does these. A list of phrases misses some refusals and knows few languages, but
//! it is the same list on both sides, and what counts is the difference; the judge of quality sees the rest.

use std::collections::HashMap;

use serde::{Deserialize, Serialize};

/// How an answer may begin that refuses: English, German, French, Spanish, in lower case.
const REFUSALS: [&str; 27] = [
    "i can't",
    "i cannot",
    "i can not",
    "i'm sorry, but",
    "i am sorry, but",
    "sorry, but i",
    "sorry, i can",
    "i'm unable",
    "i am unable",
    "i'm not able to",
    "i am not able to",
    "i won't",
    "i must decline",
    "as an ai",
    "i'm just an ai",
    "i do not have the ability",
    "i don't have the ability",
    "unfortunately, i can",
    "ich kann leider",
    "ich kann nicht",
    "tut mir leid",
    "es tut mir leid",
    "je ne peux pas",
    "je suis désolé",
    "désolé, ",
    "no puedo",
    "lo siento",
];
/// Characters in which a refusal shows itself.
const OPENING: usize = 120;
/// Words of an answer up to which a question at its end is all that it says.
const ASKING_WORDS: usize = 40;
/// How often a run of [`RUN`] words comes before the answer counts as repeating.
const REPEATS: usize = 4;
const RUN: usize = 4;

/// Rates, each from 0 to 1: of one answer 0 or 1, of several their mean.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct Behaviour {
    pub refused: f64,
    pub asked_back: f64,
    pub empty: f64,
    pub repeats: f64,
    pub broken_tool_call: f64,
}

impl Behaviour {
    /// The names of the rates, in the order of [`Behaviour::rates`].
    pub const NAMES: [&'static str; 5] =
        ["refusals", "questions back", "empty answers", "repetition", "broken tool calls"];

    /// Returns what one answer does. `tools` are the names of the functions that the prompt offers.
    pub fn of(answer: &str, tools: &[String]) -> Behaviour {
        let flag = |holds: bool| f64::from(u8::from(holds));
        let text = answer.trim();
        Behaviour {
            refused: flag(refuses(text)),
            asked_back: flag(asks_back(text)),
            empty: flag(!text.chars().any(char::is_alphanumeric)),
            repeats: flag(repeats(text)),
            broken_tool_call: flag(!tools.is_empty() && breaks_call(text, tools)),
        }
    }

    /// Returns the mean over some answers, or `None` where there is none.
    pub fn mean(answers: impl Iterator<Item = Behaviour>) -> Option<Behaviour> {
        let mut sums = [0.0; 5];
        let mut n = 0.0;
        for answer in answers {
            sums.iter_mut().zip(answer.rates()).for_each(|(sum, rate)| *sum += rate);
            n += 1.0;
        }
        (n > 0.0).then(|| Behaviour::from_rates(sums.map(|sum| sum / n)))
    }

    /// Returns the rates in the order of [`Behaviour::NAMES`].
    pub fn rates(&self) -> [f64; 5] {
        [self.refused, self.asked_back, self.empty, self.repeats, self.broken_tool_call]
    }

    /// Returns the behaviour with these rates, in the order of [`Behaviour::NAMES`].
    pub fn from_rates([refused, asked_back, empty, repeats, broken_tool_call]: [f64; 5]) -> Behaviour {
        Behaviour { refused, asked_back, empty, repeats, broken_tool_call }
    }
}

fn refuses(text: &str) -> bool {
    let opening: String = text.chars().take(OPENING).flat_map(char::to_lowercase).collect();
    let opening = opening.replace('\u{2019}', "'");
    REFUSALS.iter().any(|phrase| opening.contains(phrase))
}

/// A short answer that ends by asking.
fn asks_back(text: &str) -> bool {
    text.ends_with(['?', '？']) && text.split_whitespace().count() <= ASKING_WORDS
}

fn repeats(text: &str) -> bool {
    let words: Vec<&str> = text.split_whitespace().collect();
    let mut seen: HashMap<&[&str], usize> = HashMap::new();
    words.windows(RUN).any(|run| {
        let count = seen.entry(run).or_default();
        *count += 1;
        *count >= REPEATS
    })
}

/// Something that begins like a call of a tool and is none that the prompt offers.
fn breaks_call(text: &str, tools: &[String]) -> bool {
    let tagged = text.split_once("<tool_call>").map(|(_, rest)| rest);
    let body = match tagged {
        Some(rest) => rest.split("</tool_call>").next().unwrap_or(rest).trim(),
        None if text.starts_with('{') && text.contains("\"name\"") => text,
        None => return false,
    };
    let Ok(call) = serde_json::from_str::<serde_json::Value>(body) else { return true };
    let name = call.get("name").and_then(|name| name.as_str()).unwrap_or_default();
    !tools.iter().any(|tool| tool == name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_told_from_ways_of_not_answering() {
        let cases = [
            ("Rain forms when water vapour condenses.", [0.0; 5]),
            ("I\u{2019}m sorry, but I can\u{2019}t help with that.", [1.0, 0.0, 0.0, 0.0, 0.0]),
            ("Es tut mir leid, das geht nicht.", [1.0, 0.0, 0.0, 0.0, 0.0]),
            ("Could you tell me which city you mean?", [0.0, 1.0, 0.0, 0.0, 0.0]),
            (" \n ... ", [0.0, 0.0, 1.0, 0.0, 0.0]),
            (&"to be or not ".repeat(4), [0.0, 0.0, 0.0, 1.0, 0.0]),
            (&"to be or not ".repeat(3), [0.0; 5]),
        ];
        for (text, expected) in cases {
            assert_eq!(Behaviour::of(text, &[]).rates(), expected, "{text:?}");
        }
        // A long answer may end in a question, and may quote a refusal late.
        let long = format!("{} I cannot say. Is that enough?", "All sorts of words follow here one by one. ".repeat(6));
        assert_eq!(Behaviour::of(&long, &[]).rates()[..2], [0.0, 0.0]);
    }

    #[test]
    fn a_tool_call_must_parse_and_name_a_tool_that_is_offered() {
        let tools = ["weather".to_string()];
        let broken = |text: &str| Behaviour::of(text, &tools).broken_tool_call == 1.0;
        assert!(!broken(r#"{"name": "weather", "arguments": {"city": "Bern"}}"#));
        assert!(!broken("<tool_call>\n{\"name\": \"weather\", \"arguments\": {}}\n</tool_call>"));
        assert!(broken(r#"{"name": "weather", "arguments": "#));
        assert!(broken(r#"<tool_call>{"name": "news"}</tool_call>"#));
        assert!(!broken("It is sunny in Bern."));
        assert_eq!(Behaviour::of(r#"{"name": 1"#, &[]).broken_tool_call, 0.0, "no tools, no call");
    }

    #[test]
    fn rates_are_means() {
        let mean = Behaviour::mean(["?", "Yes."].iter().map(|text| Behaviour::of(text, &[]))).unwrap();
        assert_eq!((mean.asked_back, mean.empty), (0.5, 0.5));
        assert_eq!(Behaviour::mean(std::iter::empty()), None);
        assert_eq!(Behaviour::from_rates(mean.rates()), mean);
    }
}
