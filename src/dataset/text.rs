//! What of a prompt is compared: its variable text.
//!
//! A system prompt of 2,000 words in front of every question would make all questions near duplicates. So system
//! prompts, a workload's house rules and lines that many of its prompts share are taken out first. Where nothing is left
//! the text counts whole.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use crate::json::Value;
use crate::record::{Message, prompt_hash};

use super::Settings;

/// Fewest characters of own text in a conversation's user turns from which its beginning tells it from others. Every
/// other conversation begins with "hi" and the same answer to it.
const MIN_START: usize = 24;

/// The text of one prompt as it is compared with others.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Variable {
    /// The last user turn, normalised.
    pub(super) turn: String,
    /// Hash of the user turns before it, 0 where there are none. Prompts with other contexts are no near duplicates:
    /// else every conversation with a "go on" in it would be one cluster. Answers in between are left out, since two
    /// samples of one answer differ.
    pub(super) context: u64,
    /// Hash of what follows the last user turn (tool calls and their results), 0 where nothing does: the steps of an
    /// agent belong to one cluster, but none stands for another.
    pub(super) tail: u64,
    /// Hash of the conversation up to its first answer, 0 where too little was asked by then to tell it from others.
    pub(super) start: u64,
}

/// Lines and rules that are no part of a question, per workload.
#[derive(Debug, Default)]
pub(super) struct Boilerplate {
    templates: Templates,
    rules: BTreeMap<String, HouseRules>,
}

/// Hashes of the lines that are templates, per workload.
pub(super) type Templates = BTreeMap<String, BTreeSet<u64>>;

#[derive(Debug)]
struct HouseRules {
    lines: HashSet<String>,
    whole: String,
}

/// How many prompts carry each line, per workload.
#[derive(Debug, Default)]
pub(super) struct Lines(BTreeMap<String, (usize, HashMap<u64, u32>)>);

/// Most lines that are counted. Past it those seen once are forgotten: a template is seen more often.
const MOST_LINES: usize = 1 << 22;

impl Lines {
    /// Counts the lines of a prompt's user turns.
    pub(super) fn add(&mut self, workload: Option<&str>, messages: &[Message]) {
        if !self.0.contains_key(workload.unwrap_or_default()) {
            self.0.insert(workload.unwrap_or_default().to_owned(), Default::default());
        }
        let Some((total, lines)) = self.0.get_mut(workload.unwrap_or_default()) else { return };
        *total += 1;
        let turns: Vec<String> = user_turns(messages).collect();
        let all = turns.iter().flat_map(|turn| turn.lines()).map(normalise).filter(|line| !line.is_empty());
        let distinct: HashSet<u64> = all.map(|line| hash(&line)).collect();
        for line in distinct {
            *lines.entry(line).or_default() += 1;
        }
        if lines.len() > MOST_LINES {
            lines.retain(|_, n| *n > 1);
        }
    }

    /// Returns the lines that so many prompts of a workload share that they are a template.
    pub(super) fn templates(self, settings: &Settings) -> Templates {
        let is_shared = |total: usize, n: u32| {
            n as usize >= settings.shared_line_min && f64::from(n) > settings.shared_line_share * total as f64
        };
        let keep = |(total, lines): (usize, HashMap<u64, u32>)| {
            lines.into_iter().filter(|(_, n)| is_shared(total, *n)).map(|(line, _)| line).collect()
        };
        self.0.into_iter().map(|(workload, lines)| (workload, keep(lines))).collect()
    }
}

impl Boilerplate {
    pub(super) fn new<'a>(templates: Templates, house_rules: impl Iterator<Item = (&'a str, &'a str)>) -> Self {
        let rules = house_rules.map(|(name, text)| (name.to_owned(), HouseRules::of(text))).collect();
        Boilerplate { templates, rules }
    }

    /// Returns what of a prompt is compared. `None` where there is no user turn.
    pub(super) fn variable(
        &self,
        workload: Option<&str>,
        messages: &[Message],
        tools: Option<&Value>,
    ) -> Option<Variable> {
        let mut turns: Vec<String> = user_turns(messages).map(|turn| self.compared(workload, &turn)).collect();
        let turn = turns.pop()?;
        let context = if turns.is_empty() { 0 } else { hash(&turns.join("\n")) };
        Some(Variable { turn, context, tail: tail(messages), start: self.start(workload, messages, tools) })
    }

    /// Returns the hash of the shortest beginning of a conversation, up to an answer, in which enough was asked.
    fn start(&self, workload: Option<&str>, messages: &[Message], tools: Option<&Value>) -> u64 {
        let mut asked = 0;
        for (at, message) in messages.iter().enumerate() {
            if message.role == "user" {
                asked += self.own(workload, &message.plain_text()).chars().count();
            }
            let is_answered = messages.get(at + 1).is_none_or(|next| next.role == "assistant");
            if asked >= MIN_START && is_answered {
                return hash(&prompt_hash(&messages[..=at], tools));
            }
        }
        0
    }

    /// Returns a turn as it is compared: its own text, or all of it where it has none.
    fn compared(&self, workload: Option<&str>, turn: &str) -> String {
        let or_else = |text: String, other: &dyn Fn() -> String| if text.is_empty() { other() } else { text };
        let own = self.own(workload, turn);
        let whole = || self.without_rules(workload, normalise(turn));
        or_else(or_else(or_else(own, &whole), &|| normalise(turn)), &|| turn.trim().to_owned())
    }

    /// Returns what of a turn is neither template nor house rules, normalised.
    fn own(&self, workload: Option<&str>, turn: &str) -> String {
        let templates = self.templates.get(workload.unwrap_or_default());
        let rules = workload.and_then(|name| self.rules.get(name));
        let is_own = |line: &String| {
            !templates.is_some_and(|lines| lines.contains(&hash(line)))
                && !rules.is_some_and(|r| r.lines.contains(line))
        };
        let own: Vec<String> = turn.lines().map(normalise).filter(is_own).collect();
        self.without_rules(workload, normalise(&own.join(" ")))
    }

    fn without_rules(&self, workload: Option<&str>, text: String) -> String {
        match workload.and_then(|name| self.rules.get(name)) {
            Some(rules) if !rules.whole.is_empty() => normalise(&text.replace(&rules.whole, " ")),
            _ => text,
        }
    }
}

impl HouseRules {
    fn of(text: &str) -> Self {
        let lines = text.lines().map(normalise).filter(|line| !line.is_empty()).collect();
        HouseRules { lines, whole: normalise(text) }
    }
}

fn user_turns(messages: &[Message]) -> impl Iterator<Item = String> {
    messages.iter().filter(|message| message.role == "user").map(Message::plain_text)
}

/// Returns the text in lower case, with white space and punctuation between words made one space.
pub(super) fn normalise(text: &str) -> String {
    let is_gap = |c: char| c.is_whitespace() || c.is_control() || ".,;:!?'\"`’‘“”«»…。、，！？".contains(c);
    let mut out = String::with_capacity(text.len());
    for word in text.split(is_gap).filter(|word| !word.is_empty()) {
        if !out.is_empty() {
            out.push(' ');
        }
        out.extend(word.chars().flat_map(char::to_lowercase));
    }
    out
}

fn tail(messages: &[Message]) -> u64 {
    let after = messages.iter().rposition(|message| message.role == "user").map_or(0, |at| at + 1);
    let rest = &messages[after..];
    if rest.is_empty() { 0 } else { hash(&prompt_hash(rest, None)) }
}

/// Returns the first 8 bytes of a text's BLAKE3 hash.
pub(super) fn hash(text: &str) -> u64 {
    let mut bytes = [0u8; 8];
    bytes.copy_from_slice(&blake3::hash(text.as_bytes()).as_bytes()[..8]);
    u64::from_le_bytes(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn user(text: &str) -> Vec<Message> {
        vec![Message::text("system", "You are a long system prompt."), Message::text("user", text)]
    }

    fn templates(workload: Option<&str>, prompts: &[Vec<Message>]) -> Templates {
        let mut lines = Lines::default();
        prompts.iter().for_each(|prompt| lines.add(workload, prompt));
        lines.templates(&Settings::default())
    }

    #[test]
    fn system_prompts_rules_and_templates_are_not_compared() {
        let prompts: Vec<Vec<Message>> = (0..40)
            .map(|i| user(&format!("Use the table below.\nQuestion {i}\nAnswer in lower case, please!")))
            .collect();
        let house = [("w", "Answer in LOWER case, please")];
        let turn = |found: &Boilerplate, workload, messages: &[Message]| {
            found.variable(Some(workload), messages, None).map(|variable| variable.turn)
        };
        let found = Boilerplate::new(templates(Some("w"), &prompts), house.into_iter());
        assert_eq!(turn(&found, "w", &prompts[7]).unwrap(), "question 7");
        let inline = user("Question 9. Answer in lower case, please. Thanks");
        assert_eq!(turn(&found, "w", &inline).unwrap(), "question 9 thanks");
        let only_template = user("Use the table below.");
        assert_eq!(turn(&found, "w", &only_template).unwrap(), "use the table below");
        assert_eq!(turn(&found, "w", &user("?!")).unwrap(), "?!");
        assert!(turn(&found, "w", &prompts[0][..1]).is_none());
        let elsewhere = turn(&found, "other", &prompts[7]).unwrap();
        assert!(elsewhere.contains("table") && elsewhere.contains("please"), "{elsewhere}");
    }

    #[test]
    fn a_few_near_duplicates_are_no_template() {
        let prompts: Vec<Vec<Message>> =
            (0..5).map(|i| user(&format!("A long line that all share\nname {i}"))).collect();
        let found = Boilerplate::new(templates(None, &prompts), std::iter::empty());
        assert_eq!(found.variable(None, &prompts[0], None).unwrap().turn, "a long line that all share name 0");
    }

    fn chat(first: &str, answer: &str) -> Vec<Message> {
        vec![Message::text("user", first), Message::text("assistant", answer), Message::text("user", "Go on")]
    }

    fn read(messages: &[Message]) -> Variable {
        Boilerplate::default().variable(None, messages, None).unwrap()
    }

    #[test]
    fn earlier_user_turns_are_the_context() {
        assert_eq!(read(&chat("A", "x")), read(&chat("a!", "y")));
        assert_ne!(read(&chat("A", "x")).context, read(&chat("B", "x")).context);
        assert_eq!(read(&user("Go on")).context, 0);
    }

    #[test]
    fn a_conversation_is_known_by_its_first_real_question() {
        let long = "How do I prune an apple tree?";
        let first = read(&chat(long, "x")[..1]).start;
        assert_ne!(first, 0);
        assert_eq!(read(&chat(long, "one answer")).start, first);
        assert_eq!(read(&chat(long, "another")).start, first);
        assert_eq!(read(&chat("Hi", "Hello!")).start, 0, "nothing was asked yet");
        let mut late = chat("Hi", "Hello!");
        late.push(Message::text("assistant", "Where?"));
        late.push(Message::text("user", long));
        let asked = read(&late).start;
        late.push(Message::text("assistant", "So."));
        late.push(Message::text("user", "And then?"));
        assert!(asked != 0 && asked != first);
        assert_eq!(read(&late).start, asked);
    }
}
