//! Secrets and personal data in prompts: what must not train.
//!
//! A rule is a pattern with a check of what it found: a checksum where there is one (Luhn for cards, ISO 7064 for IBANs),
//! the entropy of the characters where a pattern alone is too wide, and no placeholder. All patterns are tried in one pass;
//! most prompts hold none. A prompt that holds anything is left out whole: a masked prompt asks something else, and a model
//! must not learn to write masks.

mod checks;
mod rules;
#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::sync::LazyLock;

use regex::{Regex, RegexSet};

pub(super) use rules::VERSION;
use rules::{RULES, Rule};

/// The patterns, ready to be used.
static PATTERNS: LazyLock<(RegexSet, Vec<Regex>)> = LazyLock::new(|| {
    let patterns = || RULES.iter().map(|rule| rule.pattern);
    let each = patterns().map(|pattern| Regex::new(pattern).expect("a constant pattern")).collect();
    (RegexSet::new(patterns()).expect("constant patterns"), each)
});

/// Returns the kinds of secrets and personal data that a text holds.
pub(super) fn kinds(text: &str) -> BTreeSet<&'static str> {
    let (all, each) = &*PATTERNS;
    let hit = |at: &usize| is_found(&RULES[*at], &each[*at], text);
    all.matches(text).iter().filter(hit).map(|at| RULES[at].kind).collect()
}

/// Returns true where one of a pattern's matches passes its check. The first group is what is checked.
fn is_found(rule: &Rule, pattern: &Regex, text: &str) -> bool {
    pattern.captures_iter(text).any(|found| {
        let value = found.get(1).or_else(|| found.get(0)).map_or("", |value| value.as_str());
        (rule.check)(value)
    })
}

/// Returns true where `kind` is one that is looked for.
pub(super) fn is_kind(kind: &str) -> bool {
    RULES.iter().any(|rule| rule.kind == kind)
}

/// Yields all kinds.
pub(super) fn all_kinds() -> impl Iterator<Item = &'static str> {
    RULES.iter().map(|rule| rule.kind)
}
