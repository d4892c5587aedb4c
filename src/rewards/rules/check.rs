//! A rule compiled and ready to score.

use jsonschema::{PatternOptions, Validator};
use regex::Regex;
use serde_json::Value;
use whatlang::Lang;

use super::{Kind, LetterCase, Unit, text};
use crate::record::FinishReason;

/// Runs of this many words are compared by `not_copy_of_prompt`.
const COPY_RUN: usize = 3;

/// What a rule may look at.
#[derive(Debug, Clone, Copy)]
pub struct Answer<'a> {
    /// The answer as generated; rules see it without white space around it.
    pub text: &'a str,
    pub finish_reason: FinishReason,
    /// All texts of the prompt.
    pub prompt: &'a str,
}

/// A compiled rule.
#[derive(Debug)]
pub enum Check {
    RegexMust(Regex),
    RegexMustNot(Regex),
    Json(Option<Box<Validator>>),
    Length { unit: Unit, min: usize, max: usize },
    Case(LetterCase),
    StartsWith(String),
    EndsWith(String),
    RequiredWords(Vec<Vec<String>>),
    ForbiddenWords(Vec<Vec<String>>),
    Bullets(usize),
    Repetition { ngram: usize, max: usize },
    Language(Lang),
    Ended,
    NotCopyOfPrompt { max_overlap: f64 },
}

impl Check {
    /// Compiles a rule, or says what is wrong with which value and what to write instead.
    pub fn compile(kind: &Kind) -> Result<Check, String> {
        Ok(match kind {
            Kind::RegexMust { pattern } => Check::RegexMust(compile_pattern(pattern)?),
            Kind::RegexMustNot { pattern } => Check::RegexMustNot(compile_pattern(pattern)?),
            Kind::Json { schema } => Check::Json(schema.as_deref().map(compile_schema).transpose()?.map(Box::new)),
            Kind::Length { unit, min, max } => {
                let (min, max) = compile_bounds(*min, *max)?;
                Check::Length { unit: *unit, min, max }
            }
            Kind::Case { case } => Check::Case(*case),
            Kind::StartsWith { text } => Check::StartsWith(compile_text(text)?),
            Kind::EndsWith { text } => Check::EndsWith(compile_text(text)?),
            Kind::RequiredWords { words } => Check::RequiredWords(compile_words(words)?),
            Kind::ForbiddenWords { words } => Check::ForbiddenWords(compile_words(words)?),
            Kind::Bullets { count } => Check::Bullets(*count),
            Kind::Repetition { ngram, max } => {
                if *ngram == 0 || *max == 0 {
                    return Err(format!("ngram = {ngram}, max = {max}: both must be at least 1"));
                }
                Check::Repetition { ngram: *ngram, max: *max }
            }
            Kind::Language { code } => Check::Language(compile_language(code)?),
            Kind::Ended {} => Check::Ended,
            Kind::NotCopyOfPrompt { max_overlap } => {
                if !(0.0..1.0).contains(max_overlap) {
                    return Err(format!("max_overlap = {max_overlap}: give a share of at least 0 and below 1"));
                }
                Check::NotCopyOfPrompt { max_overlap: *max_overlap }
            }
        })
    }

    /// Returns the credit in [0, 1]; exactly 1 where, and only where, the rule is met.
    pub fn credit(&self, answer: &Answer) -> f64 {
        let body = answer.text.trim();
        match self {
            Check::RegexMust(pattern) => pass(pattern.is_match(body)),
            Check::RegexMustNot(pattern) => pass(!pattern.is_match(body)),
            Check::Json(schema) => json_credit(body, schema.as_deref()),
            Check::Length { unit, min, max } => length_credit(unit.count(body), *min, *max),
            Check::Case(case) => case_credit(body, *case),
            Check::StartsWith(text) => shared_share(text.chars(), body.chars(), text),
            Check::EndsWith(text) => shared_share(text.chars().rev(), body.chars().rev(), text),
            Check::RequiredWords(phrases) => {
                let terms = text::terms(body);
                let found = phrases.iter().filter(|phrase| text::occurrences(&terms, phrase) > 0).count();
                found as f64 / phrases.len() as f64
            }
            Check::ForbiddenWords(phrases) => {
                let terms = text::terms(body);
                let found: usize = phrases.iter().map(|phrase| text::occurrences(&terms, phrase)).sum();
                1.0 / (1 + found) as f64
            }
            Check::Bullets(count) => {
                let found = text::lines(body).filter(|line| text::bullet(line).is_some()).count();
                length_credit(found, *count, *count)
            }
            Check::Repetition { ngram, max } => length_credit(text::most_repeated(&text::terms(body), *ngram), 0, *max),
            Check::Language(code) => language_credit(body, *code),
            Check::Ended => pass(answer.finish_reason == FinishReason::Stop),
            Check::NotCopyOfPrompt { max_overlap } => {
                let overlap = text::overlap(&text::terms(body), &text::terms(answer.prompt), COPY_RUN);
                if overlap <= *max_overlap { 1.0 } else { (1.0 - overlap) / (1.0 - max_overlap) }
            }
        }
    }
}

fn pass(passed: bool) -> f64 {
    f64::from(u8::from(passed))
}

fn json_credit(body: &str, schema: Option<&Validator>) -> f64 {
    match (serde_json::from_str::<Value>(body), schema) {
        (Err(_), _) => 0.0,
        (Ok(value), Some(schema)) if !schema.is_valid(&value) => 0.5,
        (Ok(_), _) => 1.0,
    }
}

fn length_credit(count: usize, min: usize, max: usize) -> f64 {
    if count < min {
        count as f64 / min as f64
    } else if count > max {
        max as f64 / count as f64
    } else {
        1.0
    }
}

fn case_credit(body: &str, case: LetterCase) -> f64 {
    let lower = body.chars().filter(|c| c.is_lowercase()).count();
    let upper = body.chars().filter(|c| c.is_uppercase()).count();
    let right = match case {
        LetterCase::Lower => lower,
        LetterCase::Upper => upper,
    };
    if lower + upper == 0 { 1.0 } else { right as f64 / (lower + upper) as f64 }
}

/// Returns the share of `text` that stands at the same place in the body, counted from its first character on.
fn shared_share(text: impl Iterator<Item = char>, body: impl Iterator<Item = char>, whole: &str) -> f64 {
    let shared = text.zip(body).take_while(|(a, b)| a == b).count();
    shared as f64 / whole.chars().count() as f64
}

fn language_credit(body: &str, code: Lang) -> f64 {
    match whatlang::detect(body) {
        None => 0.0,
        Some(guess) if guess.lang() != code && guess.is_reliable() => 0.0,
        Some(_) => 1.0,
    }
}

fn compile_pattern(pattern: &str) -> Result<Regex, String> {
    Regex::new(pattern).map_err(|error| {
        let reason = error.to_string();
        let reason = reason.lines().last().unwrap_or_default().trim_start_matches("error: ");
        format!("pattern {pattern:?}: {reason}; write it in the syntax of the regex crate (no look-around)")
    })
}

fn compile_schema(schema: &str) -> Result<Validator, String> {
    let value: Value = serde_json::from_str(schema)
        .map_err(|error| format!("schema {schema:?} is not JSON: {error}; write it as one JSON object"))?;
    // Patterns inside the schema run on the linear-time engine too: the answers they meet are not under our control.
    let options = jsonschema::options().offline().with_pattern_options(PatternOptions::regex());
    options
        .build(&value)
        .map_err(|error| format!("schema {schema:?}: {error}; correct it, with references only into the schema itself"))
}

fn compile_bounds(min: Option<usize>, max: Option<usize>) -> Result<(usize, usize), String> {
    match (min, max) {
        (None, None) => Err("neither min nor max is given; give at least one".into()),
        (Some(min), Some(max)) if min > max => Err(format!("min = {min} is above max = {max}; swap or correct them")),
        _ => Ok((min.unwrap_or(0), max.unwrap_or(usize::MAX))),
    }
}

fn compile_text(text: &str) -> Result<String, String> {
    let trimmed = text.trim();
    if trimmed.is_empty() {
        return Err(format!("text = {text:?} is blank; give the text to look for"));
    }
    Ok(trimmed.to_owned())
}

fn compile_words(words: &[String]) -> Result<Vec<Vec<String>>, String> {
    if words.is_empty() {
        return Err("words = [] is empty; give at least one word".into());
    }
    let phrases: Vec<Vec<String>> = words.iter().map(|word| text::terms(word)).collect();
    match phrases.iter().position(Vec::is_empty) {
        Some(blank) => Err(format!("words[{blank}] = {:?} holds no letter or digit; remove it", words[blank])),
        None => Ok(phrases),
    }
}

fn compile_language(code: &str) -> Result<Lang, String> {
    Lang::from_code(code)
        .ok_or_else(|| format!("code = {code:?} is no language known here; give a three-letter code such as \"eng\""))
}
