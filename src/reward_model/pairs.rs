//! Preference pairs: two answers to one prompt, of which one is better.
//!
//! They come as pairs (the columns of preference sets and of RewardBench), or are built from scored answers: of one
//! prompt's answers each better one makes a pair with each worse one, up to a bound, the widest gaps first. A user's thumb
//! is a score like any other: 1 up, 0 down.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::record::Message;

/// Two answers to a prompt.
#[derive(Debug, Clone, PartialEq)]
pub struct Pair {
    pub messages: Vec<Message>,
    pub chosen: String,
    pub rejected: String,
    /// The kind of pair, by which an evaluation reports too.
    pub subset: Option<String>,
}

/// One input line: a pair, or an answer with its score.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
pub enum Line {
    Pair {
        #[serde(flatten)]
        prompt: Prompt,
        chosen: Said,
        rejected: Said,
        #[serde(default)]
        subset: Option<String>,
    },
    Scored {
        #[serde(flatten)]
        prompt: Prompt,
        response: String,
        /// Of any scale; larger is better.
        #[serde(alias = "total", alias = "feedback")]
        reward: f64,
    },
}

/// What is answered: a conversation, or one question.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
pub enum Prompt {
    Messages {
        messages: Vec<Message>,
    },
    Conversation {
        prompt: Vec<Message>,
    },
    Question {
        prompt: String,
    },
    /// The prompt is the beginning that both answers, given as conversations, have in common.
    Inside {},
}

/// An answer: its text, or the whole conversation that ends with it.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
pub enum Said {
    Text(String),
    Conversation(Vec<Message>),
}

/// Why lines make no pairs.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("line {line}: {reason}")]
pub struct PairError {
    pub line: usize,
    pub reason: String,
}

/// How many lines gave what.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Counts {
    pub lines: usize,
    pub pairs: usize,
    /// Pairs of equal answers, which teach nothing.
    pub equal: usize,
    /// Scored prompts whose answers all have one score, or that have one answer.
    pub uninformative: usize,
}

/// Answers to one prompt, each with its reward.
type ScoredAnswers = Vec<(f64, String)>;

/// Makes pairs of lines, at most `per_prompt` of each prompt's scored answers, whose scores differ by more than `margin`.
pub fn pairs(lines: Vec<Line>, per_prompt: usize, margin: f64) -> Result<(Vec<Pair>, Counts), PairError> {
    let mut counts = Counts { lines: lines.len(), ..Counts::default() };
    let mut found = Vec::new();
    let mut scored: BTreeMap<String, (Vec<Message>, ScoredAnswers)> = BTreeMap::new();
    for (index, line) in lines.into_iter().enumerate() {
        let fail = |reason: &str| PairError { line: index, reason: reason.to_owned() };
        match line {
            Line::Pair { prompt, chosen, rejected, subset } => {
                let (messages, chosen, rejected) = split(prompt, chosen, rejected).map_err(fail)?;
                found.push(Pair { messages, chosen, rejected, subset });
            }
            Line::Scored { prompt, response, reward } => {
                let messages = prompt.messages().ok_or_else(|| fail("it has no prompt; give messages or prompt"))?;
                if !reward.is_finite() {
                    return Err(fail("its reward is not a number"));
                }
                let key = serde_json::to_string(&messages).unwrap_or_default();
                scored.entry(key).or_insert_with(|| (messages, Vec::new())).1.push((reward, response));
            }
        }
    }
    for (messages, answers) in scored.into_values() {
        let built = build(&messages, &answers, per_prompt, margin);
        counts.uninformative += usize::from(built.is_empty());
        found.extend(built);
    }
    let all = found.len();
    found.retain(|pair| pair.chosen != pair.rejected);
    (counts.equal, counts.pairs) = (all - found.len(), found.len());
    Ok((found, counts))
}

/// Pairs better answers with worse ones, the widest gaps first, no answer twice as long as others are left.
fn build(messages: &[Message], answers: &[(f64, String)], most: usize, margin: f64) -> Vec<Pair> {
    let mut order: Vec<&(f64, String)> = answers.iter().collect();
    order.sort_by(|a, b| b.0.total_cmp(&a.0).then_with(|| a.1.cmp(&b.1)));
    let n = order.len();
    let outside_in = (0..n / 2).map(|at| (order[at], order[n - 1 - at]));
    let apart = outside_in.filter(|(better, worse)| better.0 - worse.0 > margin);
    let pair = |(better, worse): (&(f64, String), &(f64, String))| Pair {
        messages: messages.to_vec(),
        chosen: better.1.clone(),
        rejected: worse.1.clone(),
        subset: None,
    };
    apart.take(most).map(pair).collect()
}

impl Prompt {
    fn messages(self) -> Option<Vec<Message>> {
        match self {
            Prompt::Messages { messages } | Prompt::Conversation { prompt: messages } => Some(messages),
            Prompt::Question { prompt } => Some(vec![Message::text("user", prompt)]),
            Prompt::Inside {} => None,
        }
    }
}

type Parts = (Vec<Message>, String, String);

/// Separates prompt and answers, wherever the line has them.
fn split(prompt: Prompt, chosen: Said, rejected: Said) -> Result<Parts, &'static str> {
    let before = |said: &Said| match said {
        Said::Text(_) => None,
        Said::Conversation(turns) => turns.split_last().map(|(_, before)| before.to_vec()).filter(|b| !b.is_empty()),
    };
    let (first, second) = (before(&chosen), before(&rejected));
    if first.is_some() && second.is_some() && first != second {
        return Err("chosen and rejected answer different prompts; give two answers to one");
    }
    let messages = prompt.messages().or(first).ok_or("it has no prompt; give messages or prompt")?;
    if messages.is_empty() {
        return Err("its prompt is empty");
    }
    let last = |said: Said| match said {
        Said::Text(text) => Ok(text),
        Said::Conversation(turns) => turns.last().map(Message::plain_text).ok_or("an answer has no turn"),
    };
    Ok((messages, last(chosen)?, last(rejected)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(lines: &[&str]) -> Result<(Vec<Pair>, Counts), PairError> {
        pairs(lines.iter().map(|line| serde_json::from_str(line).unwrap()).collect(), 2, 0.1)
    }

    #[test]
    fn pairs_are_read_in_the_shapes_that_preference_sets_have() {
        let shapes = [
            r#"{"prompt":"q","chosen":"a","rejected":"b","subset":"easy","id":7}"#,
            r#"{"messages":[{"role":"user","content":"q"}],"chosen":"a","rejected":"b"}"#,
            r#"{"prompt":[{"role":"user","content":"q"}],"chosen":[{"role":"assistant","content":"a"}],"rejected":[{"role":"assistant","content":"b"}]}"#,
            r#"{"chosen":[{"role":"user","content":"q"},{"role":"assistant","content":"a"}],"rejected":[{"role":"user","content":"q"},{"role":"assistant","content":"b"}]}"#,
        ];
        for shape in shapes {
            let (pairs, _) = read(&[shape]).unwrap();
            let Pair { messages, chosen, rejected, .. } = &pairs[0];
            assert_eq!(
                (messages[0].plain_text().as_str(), chosen.as_str(), rejected.as_str()),
                ("q", "a", "b"),
                "{shape}"
            );
        }
        assert_eq!(read(&shapes[..1]).unwrap().0[0].subset.as_deref(), Some("easy"));
    }

    #[test]
    fn lines_that_make_no_pair_are_named() {
        let different = r#"{"chosen":[{"role":"user","content":"q"},{"role":"assistant","content":"a"}],"rejected":[{"role":"user","content":"r"},{"role":"assistant","content":"b"}]}"#;
        let error = read(&[r#"{"prompt":"q","chosen":"a","rejected":"b"}"#, different]).unwrap_err();
        assert_eq!(error.line, 1);
        assert!(error.to_string().contains("different prompts"), "{error}");
        assert!(read(&[r#"{"chosen":"a","rejected":"b"}"#]).unwrap_err().to_string().contains("no prompt"));
    }

    #[test]
    fn scored_answers_are_paired_from_the_outside_in() {
        let line = |prompt: &str, answer: &str, reward: f64| {
            format!(r#"{{"prompt":"{prompt}","response":"{answer}","reward":{reward}}}"#)
        };
        let lines = [
            line("p", "c", 0.5),
            line("p", "a", 0.9),
            line("p", "d", 0.45),
            line("p", "b", 0.8),
            line("p", "e", 0.0),
            line("p", "f", 0.2),
            line("same", "x", 0.5),
            line("same", "y", 0.55),
            line("one", "z", 1.0),
        ];
        let lines: Vec<&str> = lines.iter().map(String::as_str).collect();
        let (pairs, counts) = read(&lines).unwrap();
        let got: Vec<(&str, &str)> = pairs.iter().map(|p| (p.chosen.as_str(), p.rejected.as_str())).collect();
        // The third, c against d, differs by less than the margin, and two is the most.
        assert_eq!(got, [("a", "e"), ("b", "f")]);
        assert_eq!(counts, Counts { lines: 9, pairs: 2, equal: 0, uninformative: 2 });
        let thumbs = [r#"{"prompt":"p","response":"a","feedback":1}"#, r#"{"prompt":"p","response":"b","feedback":0}"#];
        assert_eq!(read(&thumbs).unwrap().0[0].chosen, "a");
        let equal = read(&[r#"{"prompt":"q","chosen":"a","rejected":"a"}"#]).unwrap().1;
        assert_eq!((equal.pairs, equal.equal), (0, 1));
    }
}
