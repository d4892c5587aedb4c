//! What of a prompt is compared: its variable text.
//!
//! A system prompt of 2,000 words in front of every question would make all questions near duplicates. So system
//! prompts, a workload's house rules and lines that many of its prompts share are taken out first. Where nothing is left
//! the text counts whole.

use std::collections::{BTreeMap, HashMap, HashSet};

use crate::record::{Message, prompt_hash};

use super::Settings;

/// The text of one prompt as it is compared with others.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Variable {
    /// The last user turn, normalised.
    pub(super) turn: String,
    /// Hash of the user turns before it, 0 where there are none. Prompts with other contexts are no near duplicates:
    /// else every conversation with a "go on" in it would be one cluster. Answers in between are left out, since two
    /// samples of one answer differ.
    pub(super) context: u64,
    /// Characters of all user turns, normalised.
    pub(super) length: usize,
    /// Hash of what follows the last user turn (tool calls and their results), 0 where nothing does: the steps of an
    /// agent belong to one cluster, but none stands for another.
    pub(super) tail: u64,
}

/// Lines and rules that are no part of a question, per workload.
#[derive(Debug, Default)]
pub(super) struct Boilerplate {
    shared: BTreeMap<Option<String>, HashSet<String>>,
    rules: BTreeMap<String, HouseRules>,
}

#[derive(Debug)]
struct HouseRules {
    lines: HashSet<String>,
    whole: String,
}

impl Boilerplate {
    /// Finds the shared lines of `prompts` (workload and messages of each distinct prompt).
    pub(super) fn find<'a>(
        prompts: impl Iterator<Item = (Option<&'a str>, &'a [Message])>,
        house_rules: impl Iterator<Item = (&'a str, &'a str)>,
        settings: &Settings,
    ) -> Self {
        let mut counts: BTreeMap<Option<String>, (usize, HashMap<String, usize>)> = BTreeMap::new();
        for (workload, messages) in prompts {
            let (total, lines) = counts.entry(workload.map(str::to_owned)).or_default();
            *total += 1;
            let turns: Vec<String> = user_turns(messages).collect();
            let distinct: HashSet<String> = turns.iter().flat_map(|turn| turn.lines()).map(normalise).collect();
            for line in distinct.into_iter().filter(|line| !line.is_empty()) {
                *lines.entry(line).or_default() += 1;
            }
        }
        let is_shared = |total: usize, n: usize| {
            n >= settings.shared_line_min && n as f64 > settings.shared_line_share * total as f64
        };
        let keep = |(total, lines): (usize, HashMap<String, usize>)| {
            lines.into_iter().filter(|(_, n)| is_shared(total, *n)).map(|(line, _)| line).collect()
        };
        let shared = counts.into_iter().map(|(workload, lines)| (workload, keep(lines))).collect();
        let rules = house_rules.map(|(name, text)| (name.to_owned(), HouseRules::of(text))).collect();
        Boilerplate { shared, rules }
    }

    /// Returns what of a prompt is compared. `None` where there is no user turn.
    pub(super) fn variable(&self, workload: Option<&str>, messages: &[Message]) -> Option<Variable> {
        let mut turns: Vec<String> = user_turns(messages).map(|turn| self.strip(workload, &turn)).collect();
        let length = turns.iter().map(|turn| turn.chars().count()).sum();
        let turn = turns.pop()?;
        let context = if turns.is_empty() { 0 } else { hash(&turns.join("\n")) };
        Some(Variable { turn, context, length, tail: tail(messages) })
    }

    fn strip(&self, workload: Option<&str>, turn: &str) -> String {
        let shared = self.shared.get(&workload.map(str::to_owned));
        let rules = workload.and_then(|name| self.rules.get(name));
        let is_own = |line: &String| {
            !shared.is_some_and(|lines| lines.contains(line)) && !rules.is_some_and(|r| r.lines.contains(line))
        };
        let without_rules = |text: String| match rules {
            Some(rules) if !rules.whole.is_empty() => normalise(&text.replace(&rules.whole, " ")),
            _ => text,
        };
        let own: Vec<String> = turn.lines().map(normalise).filter(is_own).collect();
        let stripped = without_rules(normalise(&own.join(" ")));
        let or_else = |text: String, other: &dyn Fn() -> String| if text.is_empty() { other() } else { text };
        let stripped = or_else(stripped, &|| without_rules(normalise(turn)));
        or_else(or_else(stripped, &|| normalise(turn)), &|| turn.trim().to_owned())
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

    #[test]
    fn system_prompts_rules_and_templates_are_not_compared() {
        let prompts: Vec<Vec<Message>> = (0..40)
            .map(|i| user(&format!("Use the table below.\nQuestion {i}\nAnswer in lower case, please!")))
            .collect();
        let house = [("w", "Answer in LOWER case, please")];
        let found = Boilerplate::find(
            prompts.iter().map(|p| (Some("w"), p.as_slice())),
            house.into_iter(),
            &Settings::default(),
        );
        assert_eq!(found.variable(Some("w"), &prompts[7]).unwrap().turn, "question 7");
        let inline = user("Question 9. Answer in lower case, please. Thanks");
        assert_eq!(found.variable(Some("w"), &inline).unwrap().turn, "question 9 thanks");
        let only_template = user("Use the table below.");
        assert_eq!(found.variable(Some("w"), &only_template).unwrap().turn, "use the table below");
        assert_eq!(found.variable(Some("w"), &user("?!")).unwrap().turn, "?!");
        assert!(found.variable(Some("w"), &prompts[0][..1]).is_none());
        let elsewhere = found.variable(Some("other"), &prompts[7]).unwrap().turn;
        assert!(elsewhere.contains("table") && elsewhere.contains("please"), "{elsewhere}");
    }

    #[test]
    fn a_few_near_duplicates_are_no_template() {
        let prompts: Vec<Vec<Message>> =
            (0..5).map(|i| user(&format!("A long line that all share\nname {i}"))).collect();
        let found =
            Boilerplate::find(prompts.iter().map(|p| (None, p.as_slice())), std::iter::empty(), &Settings::default());
        assert_eq!(found.variable(None, &prompts[0]).unwrap().turn, "a long line that all share name 0");
    }

    #[test]
    fn earlier_user_turns_are_the_context() {
        let chat = |first: &str, answer: &str| {
            vec![Message::text("user", first), Message::text("assistant", answer), Message::text("user", "Go on")]
        };
        let read = |messages: &[Message]| Boilerplate::default().variable(None, messages).unwrap();
        assert_eq!(read(&chat("A", "x")), read(&chat("a!", "y")));
        assert_ne!(read(&chat("A", "x")).context, read(&chat("B", "x")).context);
        assert_eq!(read(&user("Go on")).context, 0);
    }
}
