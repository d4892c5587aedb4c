//! What a model is asked: a few logged prompts of one workload, and for one more.
//!
//! Only prompts of one user turn in plain text are shown. Those of one question have their system prompt and tools in common,
//! which the new prompt gets as well, and so do the workload's house rules where they stand around the text: the model
//! writes what is asked, not what every prompt carries.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{Draft, Need, Settings};
use crate::dataset::{Prompt, TrainSplit, WorkloadView};
use crate::json::Value;
use crate::record::{Coordinates, Message, derive_seed, prompt_hash};

/// Characters past which a logged prompt is not shown: a few of them must fit a context.
const MOST_CHARS: usize = 2000;

/// How each shown prompt is introduced, before its number.
const HEADING: &str = "Message";

/// One question to the model.
#[derive(Debug, Clone)]
pub struct Ask {
    /// What the model reads; of no workload, so that no rule of one holds for the answer.
    pub prompt: Prompt,
    /// The logged prompts that are shown, the one whose place the child takes first.
    pub sources: Vec<String>,
    frame: Frame,
}

/// A line of the file that says what was asked, by which an erasure finds it.
#[derive(Debug, Serialize, Deserialize)]
pub struct AskLine {
    pub prompt_hash: String,
    pub sources: Vec<String>,
}

/// What a child takes from its first source.
#[derive(Debug, Clone)]
struct Frame {
    parent: Prompt,
    before: String,
    after: String,
}

/// A logged prompt that can be shown.
struct Shown<'a> {
    prompt: &'a Prompt,
    /// Where in the user's turn the text lies that is the prompt's own.
    own: std::ops::Range<usize>,
    turn: &'a str,
}

impl<'a> Shown<'a> {
    fn of(prompt: &'a Prompt, house_rules: &str) -> Option<Self> {
        let (last, before) = prompt.messages.split_last()?;
        let Value::String(turn) = &last.content else { return None };
        let is_plain = last.role == "user" && before.iter().all(|message| message.role == "system");
        let own = own(turn, house_rules);
        let fits = !own.is_empty() && turn[own.clone()].chars().count() <= MOST_CHARS;
        (is_plain && fits).then_some(Shown { prompt, own, turn })
    }

    /// Returns what children of one question must have in common.
    fn context(&self) -> String {
        let system = &self.prompt.messages[..self.prompt.messages.len() - 1];
        prompt_hash(system, self.prompt.tools.as_ref())
    }

    fn text(&self) -> &str {
        &self.turn[self.own.clone()]
    }

    fn frame(&self) -> Frame {
        let (before, after) = (self.turn[..self.own.start].to_owned(), self.turn[self.own.end..].to_owned());
        Frame { parent: self.prompt.clone(), before, after }
    }
}

/// Returns where a turn's own text lies: before or behind the house rules, where they stand at one end.
fn own(turn: &str, house_rules: &str) -> std::ops::Range<usize> {
    let trimmed = |from: usize, to: usize| {
        let part = &turn[from..to];
        let start = from + (part.len() - part.trim_start().len());
        start..start + part.trim().len()
    };
    let rules = house_rules.trim();
    match turn.find(rules).filter(|_| !rules.is_empty()) {
        Some(at) if turn[..at].trim().is_empty() => trimmed(at + rules.len(), turn.len()),
        Some(at) if turn[at + rules.len()..].trim().is_empty() => trimmed(0, at),
        _ => trimmed(0, turn.len()),
    }
}

/// Returns a wave of questions: about as many for each workload as `needs` says are wanted, and never the same one twice. How many
/// answers each needs is returned with them.
pub fn asks(
    train: &TrainSplit,
    usable: impl Fn(&Prompt) -> bool,
    needs: &[Need],
    (settings, views): (&Settings, &[WorkloadView]),
    (seed, wave): (u64, usize),
) -> (Vec<Ask>, usize) {
    let (mut asks, mut samples) = (Vec::new(), 1);
    for need in needs {
        let rules = views.iter().find(|view| view.name == need.workload).map_or("", |view| view.house_rules.as_str());
        let of_workload = train.iter().filter(|p| p.workload.as_deref() == Some(need.workload.as_str()) && usable(p));
        let shown: Vec<Shown<'_>> = of_workload.filter_map(|prompt| Shown::of(prompt, rules)).collect();
        let ours = of_one(&shown, need, settings, (seed, wave));
        if !ours.is_empty() {
            samples = samples.max(need.wanted.div_ceil(ours.len()));
        }
        asks.extend(ours);
    }
    (asks, samples)
}

/// Returns a wave's questions for one workload: each shown prompt is the first of about as many.
fn of_one(shown: &[Shown<'_>], need: &Need, settings: &Settings, (seed, wave): (u64, usize)) -> Vec<Ask> {
    let wave = wave.to_string();
    let lot = |what: &str, number: usize, shown: &Shown<'_>| {
        derive_seed(seed, &["synthetic", &wave, what, &number.to_string(), &shown.prompt.prompt_hash])
    };
    let mut by_context: BTreeMap<String, Vec<&Shown<'_>>> = BTreeMap::new();
    shown.iter().for_each(|shown| by_context.entry(shown.context()).or_default().push(shown));
    let mut firsts: Vec<&Shown<'_>> = shown.iter().collect();
    firsts.sort_by_key(|shown| lot("first", 0, shown));
    let mut asks: BTreeMap<String, (usize, Ask)> = BTreeMap::new();
    for (number, first) in firsts.iter().cycle().take(if firsts.is_empty() { 0 } else { need.wanted }).enumerate() {
        let mut others: Vec<&Shown<'_>> = by_context.get(&first.context()).cloned().unwrap_or_default();
        others.retain(|other| other.prompt.prompt_hash != first.prompt.prompt_hash);
        others.sort_by_key(|other| lot("other", number, other));
        others.truncate(settings.examples - 1);
        let mut shown: Vec<&Shown<'_>> = others;
        shown.insert(0, first);
        let ask = ask(&shown);
        asks.entry(ask.prompt.prompt_hash.clone()).or_insert((number, ask));
    }
    let mut asks: Vec<(usize, Ask)> = asks.into_values().collect();
    asks.sort_by_key(|(number, _)| *number);
    asks.into_iter().map(|(_, ask)| ask).collect()
}

fn ask(shown: &[&Shown<'_>]) -> Ask {
    let mut text =
        "Below are messages that people sent to an assistant. Write one more message of the same kind and length, \
        about something else. Reply with the message alone.\n"
            .to_owned();
    for (shown, number) in shown.iter().zip(1..) {
        text.push_str(&format!("\n{HEADING} {number}:\n{}\n", shown.text()));
    }
    text.push_str(&format!("\n{HEADING} {}:", shown.len() + 1));
    let messages = vec![Message::text("user", text)];
    let first = shown[0].prompt;
    let prompt = Prompt {
        prompt_hash: prompt_hash(&messages, None),
        cluster: first.cluster.clone(),
        workload: None,
        tenant: None,
        messages,
        tools: None,
        first_seen: Coordinates { topic: "synthetic".into(), partition: 0, offset: 0, record_index: 0 },
        event_time_us: first.event_time_us,
        language: None,
        is_forward: false,
        count: 0,
        feedback: Vec::new(),
        sources: Vec::new(),
    };
    let sources = shown.iter().map(|shown| shown.prompt.prompt_hash.clone()).collect();
    Ask { prompt, sources, frame: shown[0].frame() }
}

impl Ask {
    /// Returns the line by which an erasure finds the question.
    pub fn line(&self) -> AskLine {
        AskLine { prompt_hash: self.prompt.prompt_hash.clone(), sources: self.sources.clone() }
    }

    /// Returns the prompt that an answer makes; `is_whole` is false where the answer was cut.
    pub fn draft(&self, answer: &str, is_whole: bool) -> Draft {
        let parent = &self.frame.parent;
        let drop = |reason| Draft::Dropped { workload: parent.workload.clone().unwrap_or_default(), reason };
        let Some(text) = message(answer, is_whole) else { return drop("cut") };
        if text.is_empty() {
            return drop("empty");
        }
        let mut messages = parent.messages.clone();
        if let Some(last) = messages.last_mut() {
            *last = Message::text("user", format!("{}{text}{}", self.frame.before, self.frame.after));
        }
        Draft::Prompt(Box::new(Prompt {
            prompt_hash: prompt_hash(&messages, parent.tools.as_ref()),
            messages,
            language: None,
            count: 0,
            feedback: Vec::new(),
            sources: self.sources.clone(),
            ..parent.clone()
        }))
    }
}

/// Returns the message in an answer: without a heading, quotes around it or further messages behind it. `None` where its end is
/// missing.
fn message(answer: &str, is_whole: bool) -> Option<&str> {
    let is_heading = |line: &str| {
        let rest = line.trim().trim_start_matches(['*', '#', ' ']).strip_prefix(HEADING);
        rest.is_some_and(|rest| rest.trim_start().starts_with(|c: char| c.is_ascii_digit()))
    };
    let mut text = answer.trim();
    let first = text.lines().next().unwrap_or_default();
    if is_heading(first) {
        let behind = first.split_once(':').map_or("", |(_, behind)| behind);
        text = text[first.len() - behind.len()..].trim_start_matches(['*', ' ']).trim_start();
    }
    let mut end = 0;
    let mut is_ended = is_whole;
    for line in text.split_inclusive('\n') {
        if is_heading(line) {
            is_ended = true;
            break;
        }
        end += line.len();
    }
    let text = text[..end].trim();
    let inner = text.strip_prefix('"').and_then(|text| text.strip_suffix('"')).filter(|text| !text.contains('"'));
    is_ended.then(|| inner.unwrap_or(text).trim())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_an_answer_the_message_alone_is_taken() {
        for (answer, message_in_it) in [
            ("How do I prune a pear tree?", "How do I prune a pear tree?"),
            ("\n \"How do I sing?\"\n", "How do I sing?"),
            ("Say \"a\" and \"b\"", "Say \"a\" and \"b\""),
            ("Message 5:\nHow?\n\nMessage 6:\nWhy?", "How?"),
            ("**Message 5:** How?\nAnd when?", "How?\nAnd when?"),
            ("Message in a bottle", "Message in a bottle"),
            ("   ", ""),
        ] {
            assert_eq!(message(answer, true), Some(message_in_it), "{answer:?}");
        }
        assert_eq!(message("How do I", false), None, "cut");
        assert_eq!(message("How?\nMessage 7:\nWhy do", false), Some("How?"), "what is cut is the next one");
    }

    #[test]
    fn house_rules_around_a_text_are_not_the_models_to_write() {
        let found = |turn: &str| turn[own(turn, "Use no digits.")].to_owned();
        assert_eq!(found("Tell me of Rome.\n\nUse no digits.\n"), "Tell me of Rome.");
        assert_eq!(found("Use no digits.  Tell me of Rome. "), "Tell me of Rome.");
        assert_eq!(found("Tell me. Use no digits. Of Rome."), "Tell me. Use no digits. Of Rome.");
        assert_eq!(found("Use no digits."), "");
        assert_eq!(&" a b "[own(" a b ", "")], "a b");
    }
}
