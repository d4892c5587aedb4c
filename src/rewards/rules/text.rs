//! What a word, a term, a sentence and a line are, for all rules.
//!
//! The definitions are plain on purpose: an operator must be able to count by hand. Languages written without spaces
//! have no words in this sense; measure those in characters.

use std::collections::HashMap;

/// Yields the words: runs without white space that hold at least one letter or digit. `well-known` and `3.5` are one
/// word each, a lone dash is none.
pub fn words(text: &str) -> impl Iterator<Item = &str> {
    text.split_whitespace().filter(|run| run.chars().any(char::is_alphanumeric))
}

/// Yields the lines that are not blank, without white space around them.
pub fn lines(text: &str) -> impl Iterator<Item = &str> {
    text.lines().map(str::trim).filter(|line| !line.is_empty())
}

/// Returns the terms, which is what words are compared by: lower-case runs of letters and digits, an apostrophe inside
/// kept (`don't`). `And/or` is the two terms `and` and `or`.
pub fn terms(text: &str) -> Vec<String> {
    let is_term = |c: char| c.is_alphanumeric() || c == '\'' || c == '’';
    let runs = text.split(|c| !is_term(c)).map(|run| run.trim_matches(['\'', '’']));
    runs.filter(|run| !run.is_empty()).map(|run| run.to_lowercase().replace('’', "'")).collect()
}

/// Returns how many sentences there are. A sentence holds a word and ends at `.`, `!`, `?` or `…` (or a run of them,
/// quotes and brackets after it included) before white space, at a full-width mark, at the end of a line, or at the end
/// of the text. The period of a single letter (`J.`, `U.S.`, `e.g.`) and of a number at the start of a line (`1.`) ends none.
pub fn sentences(text: &str) -> usize {
    lines(text).map(sentences_of_line).sum()
}

fn sentences_of_line(line: &str) -> usize {
    let mut count = 0;
    let mut has_word = false;
    for run in line.split_whitespace() {
        let numbers_a_list_item = !has_word && is_list_number(run);
        has_word |= run.chars().any(char::is_alphanumeric) && !numbers_a_list_item;
        let inner = run.matches(['。', '！', '？']).count();
        if inner > 0 {
            count += inner;
            has_word = !run.ends_with(['。', '！', '？', '」', '』', '”', ')']);
        } else if has_word && ends_sentence(run) {
            count += 1;
            has_word = false;
        }
    }
    count + usize::from(has_word)
}

fn ends_sentence(run: &str) -> bool {
    let bare = run.trim_end_matches(['"', '\'', '”', '’', ')', ']', '»', '*', '_']);
    if bare.ends_with(['!', '?', '…']) || bare.ends_with("..") {
        return true;
    }
    let Some(word) = bare.strip_suffix('.') else { return false };
    let last_letters = word.rsplit(|c: char| !c.is_alphanumeric()).next().unwrap_or_default();
    let mut letters = last_letters.chars();
    !matches!((letters.next(), letters.next()), (Some(only), None) if only.is_alphabetic())
}

fn is_list_number(run: &str) -> bool {
    let number = run.strip_suffix('.').or_else(|| run.strip_suffix(')'));
    number.is_some_and(|digits| !digits.is_empty() && digits.chars().all(|c| c.is_ascii_digit()))
}

/// Returns the text of a bullet point, where the line is one.
pub fn bullet(line: &str) -> Option<&str> {
    let rest = line.trim_start().strip_prefix(['-', '*', '•'])?;
    let text = rest.strip_prefix(char::is_whitespace)?.trim();
    (!text.is_empty()).then_some(text)
}

/// Returns how often the most frequent run of `n` terms occurs; 0 where there are fewer than `n`.
pub fn most_repeated(terms: &[String], n: usize) -> usize {
    let mut counts: HashMap<&[String], usize> = HashMap::new();
    for run in terms.windows(n.max(1)) {
        *counts.entry(run).or_default() += 1;
    }
    counts.into_values().max().unwrap_or(0)
}

/// Returns how often the phrase occurs as whole words; an empty phrase never does.
pub fn occurrences(terms: &[String], phrase: &[String]) -> usize {
    if phrase.is_empty() {
        return 0;
    }
    terms.windows(phrase.len()).filter(|run| *run == phrase).count()
}

/// Returns the share of the answer's runs of `n` terms that also stand in the prompt. An answer shorter than `n` counts
/// as one run.
pub fn overlap(answer: &[String], prompt: &[String], n: usize) -> f64 {
    let n = n.min(answer.len());
    if n == 0 {
        return 0.0;
    }
    let known: std::collections::HashSet<&[String]> = prompt.windows(n).collect();
    let total = answer.len() - n + 1;
    let copied = answer.windows(n).filter(|run| known.contains(run)).count();
    copied as f64 / total as f64
}
