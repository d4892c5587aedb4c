//! IFEval's 25 kinds of instruction, each as a rule with the names and arguments of its data set.
//!
//! ```toml
//! rules = [{ kind = "ifeval", instruction = "length_constraints:number_words", relation = "at least", num_words = 50 }]
//! ```
//!
//! Eleven of them count something and hold the count to a bound; the rest look at a place or at the whole. What is
//! counted, and how, follows the published checker (Zhou et al. 2023, arXiv:2311.07911) on its strict reading, so that
//! a model tuned on these rules is measured alike elsewhere; `tests/golden/ifeval.json` holds its verdicts. Where ours
//! differ on purpose: keywords are texts, not patterns; JSON is that of RFC 8259 (no `NaN`); languages are told by
//! `whatlang`; sentences and the words of `capital_word_frequency` are found by the short rules in [`tokens`].

mod tokens;

use regex::{Regex, RegexBuilder};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use whatlang::Lang;

/// An instruction of IFEval with its arguments.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "instruction", deny_unknown_fields)]
pub enum Instruction {
    /// Each keyword occurs, whatever its case, also inside a word.
    #[serde(rename = "keywords:existence")]
    Existence { keywords: Vec<String> },
    /// The keyword occurs this often, whatever its case, also inside a word.
    #[serde(rename = "keywords:frequency")]
    Frequency { keyword: String, relation: Relation, frequency: usize },
    /// None of these occurs as a word, whatever its case.
    #[serde(rename = "keywords:forbidden_words")]
    ForbiddenWords { forbidden_words: Vec<String> },
    /// The letter occurs this often, whatever its case.
    #[serde(rename = "keywords:letter_frequency")]
    LetterFrequency { letter: char, let_relation: Relation, let_frequency: usize },
    /// The answer is in this language, a two-letter code of ISO 639-1.
    #[serde(rename = "language:response_language")]
    ResponseLanguage { language: String },
    /// So many sentences.
    #[serde(rename = "length_constraints:number_sentences")]
    NumberSentences { relation: Relation, num_sentences: usize },
    /// Exactly so many paragraphs, parted by `***`.
    #[serde(rename = "length_constraints:number_paragraphs")]
    NumberParagraphs { num_paragraphs: usize },
    /// So many words: runs of letters, digits and underscores.
    #[serde(rename = "length_constraints:number_words")]
    NumberWords { relation: Relation, num_words: usize },
    /// Exactly so many paragraphs, parted by a blank line, and the word that one of them begins with.
    #[serde(rename = "length_constraints:nth_paragraph_first_word")]
    NthParagraphFirstWord { num_paragraphs: usize, nth_paragraph: usize, first_word: String },
    /// At least so many placeholders in square brackets.
    #[serde(rename = "detectable_content:number_placeholders")]
    NumberPlaceholders { num_placeholders: usize },
    /// A postscript, such as `P.S.` or `P.P.S`.
    #[serde(rename = "detectable_content:postscript")]
    Postscript { postscript_marker: String },
    /// Exactly so many bullet points, `*` or `-`.
    #[serde(rename = "detectable_format:number_bullet_lists")]
    NumberBulletLists { num_bullets: usize },
    /// One of "My answer is yes.", "My answer is no." and "My answer is maybe." occurs.
    #[serde(rename = "detectable_format:constrained_response")]
    ConstrainedResponse {},
    /// At least so many parts in `*asterisks*`; those in `**two**` count twice, as in the published checker.
    #[serde(rename = "detectable_format:number_highlighted_sections")]
    NumberHighlightedSections { num_highlights: usize },
    /// At least so many sections, each headed by the word and a number, such as `Section 1`.
    #[serde(rename = "detectable_format:multiple_sections")]
    MultipleSections { section_spliter: String, num_sections: usize },
    /// The answer is JSON, alone or as one block of code.
    #[serde(rename = "detectable_format:json_format")]
    JsonFormat {},
    /// A title in `<<double angular brackets>>`.
    #[serde(rename = "detectable_format:title")]
    Title {},
    /// Two different answers, parted by six asterisks.
    #[serde(rename = "combination:two_responses")]
    TwoResponses {},
    /// The answer begins with this text, whatever its case.
    #[serde(rename = "combination:repeat_prompt")]
    RepeatPrompt { prompt_to_repeat: String },
    /// The answer ends with this phrase, whatever its case; quotation marks around the answer do not count.
    #[serde(rename = "startend:end_checker")]
    EndChecker { end_phrase: String },
    /// The whole answer stands in double quotation marks.
    #[serde(rename = "startend:quotation")]
    Quotation {},
    /// So many words in capitals only.
    #[serde(rename = "change_case:capital_word_frequency")]
    CapitalWordFrequency { capital_relation: Relation, capital_frequency: usize },
    /// English in capitals only.
    #[serde(rename = "change_case:english_capital")]
    EnglishCapital {},
    /// English in small letters only.
    #[serde(rename = "change_case:english_lowercase")]
    EnglishLowercase {},
    /// No comma.
    #[serde(rename = "punctuation:no_comma")]
    NoComma {},
}

/// How a count is held to a number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Relation {
    /// The count is below the number.
    #[serde(rename = "less than")]
    LessThan,
    /// The count is the number or more.
    #[serde(rename = "at least")]
    AtLeast,
}

/// An instruction ready to check.
#[derive(Debug)]
pub enum Check {
    Counted(Counted, Bound),
    /// Every pattern matches.
    All(Vec<Regex>),
    /// No pattern matches.
    None(Vec<Regex>),
    /// One of the texts occurs.
    OneOf(&'static [&'static str]),
    Language(Lang),
    /// Parts that the pattern separates are exactly this many; one that is blank counts only at neither end, inside it fails.
    Paragraphs(Regex, usize),
    FirstWord {
        paragraphs: usize,
        nth: usize,
        word: String,
    },
    Json,
    Title(Regex),
    TwoResponses,
    StartsWith(String),
    EndsWith(String),
    Quotation,
    English(super::LetterCase),
}

/// What is counted.
#[derive(Debug)]
pub enum Counted {
    Matches(Regex),
    Letter(char),
    Sentences,
    CapitalWords,
    Bullets([Regex; 2]),
    Highlights([Regex; 2]),
}

/// What the count must be.
#[derive(Debug, Clone, Copy)]
pub enum Bound {
    LessThan(usize),
    AtLeast(usize),
    Exactly(usize),
}

impl Relation {
    fn bound(self, number: usize) -> Bound {
        match self {
            Relation::LessThan => Bound::LessThan(number),
            Relation::AtLeast => Bound::AtLeast(number),
        }
    }
}

impl Bound {
    fn holds(self, count: usize) -> bool {
        match self {
            Bound::LessThan(number) => count < number,
            Bound::AtLeast(number) => count >= number,
            Bound::Exactly(number) => count == number,
        }
    }
}

/// The answers that `constrained_response` allows.
const CONSTRAINED: &[&str] = &["My answer is yes.", "My answer is no.", "My answer is maybe."];

impl Check {
    /// Compiles an instruction, or says which argument cannot be used and what to write instead.
    pub fn compile(instruction: &Instruction) -> Result<Check, String> {
        use Instruction::*;
        let at_least = |counted: Counted, number: usize| Check::Counted(counted, Bound::AtLeast(number));
        Ok(match instruction {
            Existence { keywords } => Check::All(texts("keywords", keywords, |word| word)?),
            Frequency { keyword, relation, frequency } => {
                Check::Counted(Counted::Matches(text("keyword", keyword)?), relation.bound(*frequency))
            }
            ForbiddenWords { forbidden_words } => {
                Check::None(texts("forbidden_words", forbidden_words, |word| format!(r"\b{word}\b"))?)
            }
            LetterFrequency { letter, let_relation, let_frequency } => {
                Check::Counted(Counted::Letter(lower(*letter)?), let_relation.bound(*let_frequency))
            }
            ResponseLanguage { language } => Check::Language(tokens::language(language)?),
            NumberSentences { relation, num_sentences } => {
                Check::Counted(Counted::Sentences, relation.bound(*num_sentences))
            }
            NumberParagraphs { num_paragraphs } => Check::Paragraphs(pattern(r"\s?\*\*\*\s?")?, *num_paragraphs),
            NumberWords { relation, num_words } => {
                Check::Counted(Counted::Matches(pattern(r"[\p{L}\p{N}_]+")?), relation.bound(*num_words))
            }
            NthParagraphFirstWord { num_paragraphs, nth_paragraph, first_word } => {
                first_word_check(*num_paragraphs, *nth_paragraph, first_word)?
            }
            NumberPlaceholders { num_placeholders } => {
                at_least(Counted::Matches(pattern(r"\[.*?\]")?), *num_placeholders)
            }
            Postscript { postscript_marker } => at_least(Counted::Matches(postscript(postscript_marker)?), 1),
            NumberBulletLists { num_bullets } => {
                let forms = [pattern(r"(?m)^\s*\*[^\*].*$")?, pattern(r"(?m)^\s*-.*$")?];
                Check::Counted(Counted::Bullets(forms), Bound::Exactly(*num_bullets))
            }
            ConstrainedResponse {} => Check::OneOf(CONSTRAINED),
            NumberHighlightedSections { num_highlights } => {
                let forms = [pattern(r"\*[^\n\*]*\*")?, pattern(r"\*\*[^\n\*]*\*\*")?];
                at_least(Counted::Highlights(forms), *num_highlights)
            }
            MultipleSections { section_spliter, num_sections } => {
                let heading = regex::escape(not_blank("section_spliter", section_spliter)?);
                at_least(Counted::Matches(pattern(&format!(r"\s?{heading}\s?\d+\s?"))?), *num_sections)
            }
            JsonFormat {} => Check::Json,
            Title {} => Check::Title(pattern(r"<<[^\n]+>>")?),
            TwoResponses {} => Check::TwoResponses,
            RepeatPrompt { prompt_to_repeat } => {
                Check::StartsWith(not_blank("prompt_to_repeat", prompt_to_repeat)?.to_lowercase())
            }
            EndChecker { end_phrase } => Check::EndsWith(not_blank("end_phrase", end_phrase)?.to_lowercase()),
            Quotation {} => Check::Quotation,
            CapitalWordFrequency { capital_relation, capital_frequency } => {
                Check::Counted(Counted::CapitalWords, capital_relation.bound(*capital_frequency))
            }
            EnglishCapital {} => Check::English(super::LetterCase::Upper),
            EnglishLowercase {} => Check::English(super::LetterCase::Lower),
            NoComma {} => Check::None(vec![pattern(",")?]),
        })
    }

    /// Returns true where the answer follows the instruction. A blank answer follows none.
    pub fn holds(&self, answer: &str) -> bool {
        if answer.trim().is_empty() {
            return false;
        }
        match self {
            Check::Counted(counted, bound) => bound.holds(counted.count(answer)),
            Check::All(patterns) => patterns.iter().all(|pattern| pattern.is_match(answer)),
            Check::None(patterns) => !patterns.iter().any(|pattern| pattern.is_match(answer)),
            Check::OneOf(texts) => texts.iter().any(|text| answer.contains(text)),
            Check::Language(language) => is_language(answer, *language),
            Check::Paragraphs(divider, number) => paragraphs(answer, divider) == Some(*number),
            Check::FirstWord { paragraphs, nth, word } => begins_paragraph(answer, *paragraphs, *nth, word),
            Check::Json => serde_json::from_str::<serde::de::IgnoredAny>(unfenced(answer)).is_ok(),
            Check::Title(pattern) => pattern
                .find_iter(answer)
                .any(|title| !title.as_str().trim_start_matches('<').trim_end_matches('>').trim().is_empty()),
            Check::TwoResponses => two_responses(answer),
            Check::StartsWith(text) => answer.trim().to_lowercase().starts_with(text),
            Check::EndsWith(text) => answer.trim().trim_matches('"').to_lowercase().ends_with(text),
            Check::Quotation => {
                let inner = answer.trim().strip_prefix('"').and_then(|rest| rest.strip_suffix('"'));
                inner.is_some()
            }
            Check::English(case) => tokens::is_case(answer, *case) && is_language(answer, Lang::Eng),
        }
    }
}

impl Counted {
    fn count(&self, answer: &str) -> usize {
        match self {
            Counted::Matches(pattern) => pattern.find_iter(answer).count(),
            Counted::Letter(letter) => answer.to_lowercase().chars().filter(|c| c == letter).count(),
            Counted::Sentences => tokens::sentences(answer),
            Counted::CapitalWords => tokens::capital_words(answer),
            Counted::Bullets(forms) => forms.iter().map(|form| form.find_iter(answer).count()).sum(),
            Counted::Highlights(forms) => {
                let filled = |form: &Regex| {
                    form.find_iter(answer).filter(|part| !part.as_str().trim_matches('*').trim().is_empty()).count()
                };
                forms.iter().map(filled).sum()
            }
        }
    }
}

/// Compiles a pattern of our own; that it compiles is tested.
fn pattern(pattern: &str) -> Result<Regex, String> {
    Regex::new(pattern).map_err(|error| error.to_string())
}

/// Compiles a text to look for, whatever its case.
fn text(name: &str, text: &str) -> Result<Regex, String> {
    folded(&regex::escape(not_blank(name, text)?))
}

fn texts<T: AsRef<str>>(name: &str, all: &[String], wrap: impl Fn(String) -> T) -> Result<Vec<Regex>, String> {
    if all.is_empty() {
        return Err(format!("{name} is empty; give at least one word"));
    }
    all.iter().map(|text| folded(wrap(regex::escape(not_blank(name, text)?)).as_ref())).collect()
}

fn folded(pattern: &str) -> Result<Regex, String> {
    RegexBuilder::new(pattern).case_insensitive(true).build().map_err(|error| error.to_string())
}

fn not_blank<'a>(name: &str, text: &'a str) -> Result<&'a str, String> {
    let text = text.trim();
    if text.is_empty() { Err(format!("{name} is blank; give the text to look for")) } else { Ok(text) }
}

fn lower(letter: char) -> Result<char, String> {
    let mut small = letter.to_lowercase();
    match (small.next(), small.next()) {
        (Some(only), None) if !only.is_whitespace() => Ok(only),
        _ => Err(format!("letter = {letter:?} cannot be counted; give one letter or sign")),
    }
}

fn postscript(marker: &str) -> Result<Regex, String> {
    match not_blank("postscript_marker", marker)? {
        "P.P.S" => pattern(r"(?im)p\.\s?p\.\s?s.*$"),
        "P.S." => pattern(r"(?im)p\.\s?s\..*$"),
        other => folded(&regex::escape(other)),
    }
}

fn first_word_check(paragraphs: usize, nth: usize, word: &str) -> Result<Check, String> {
    if nth == 0 || nth > paragraphs {
        return Err(format!("nth_paragraph = {nth}: give one of the {paragraphs} paragraphs, counted from 1"));
    }
    Ok(Check::FirstWord { paragraphs, nth, word: not_blank("first_word", word)?.to_lowercase() })
}

fn is_language(answer: &str, language: Lang) -> bool {
    // A text in which no language can be told breaks no instruction about it.
    whatlang::detect_lang(answer).is_none_or(|found| found == language)
}

/// Counts the parts between dividers. A blank part at an end is none; one inside breaks the form.
fn paragraphs(answer: &str, divider: &Regex) -> Option<usize> {
    let parts: Vec<bool> = divider.split(answer).map(|part| !part.trim().is_empty()).collect();
    let inner = parts.get(1..parts.len().saturating_sub(1)).unwrap_or_default();
    inner.iter().all(|filled| *filled).then(|| parts.iter().filter(|filled| **filled).count())
}

/// Returns true where there are exactly so many paragraphs and the nth begins with the word. Blank ones are not counted
/// but keep their place, as in the published checker.
fn begins_paragraph(answer: &str, number: usize, nth: usize, word: &str) -> bool {
    let all: Vec<&str> = answer.split("\n\n").collect();
    let filled = all.iter().filter(|paragraph| !paragraph.trim().is_empty()).count();
    let Some(first) = all.get(nth - 1).and_then(|paragraph| paragraph.split_whitespace().next()) else { return false };
    let bare = first.trim_start_matches('\'').trim_start_matches('"');
    let end = bare.find(['.', ',', '?', '!', '\'', '"']).unwrap_or(bare.len());
    filled == number && bare[..end].to_lowercase() == word
}

/// Takes a block of code out of its fence.
fn unfenced(answer: &str) -> &str {
    let mut body = answer.trim();
    for fence in ["```json", "```Json", "```JSON", "```"] {
        body = body.strip_prefix(fence).unwrap_or(body);
    }
    body.strip_suffix("```").unwrap_or(body).trim()
}

fn two_responses(answer: &str) -> bool {
    let parts: Vec<&str> = answer.split("******").map(str::trim).collect();
    let inner = parts.get(1..parts.len().saturating_sub(1)).unwrap_or_default();
    let filled: Vec<&&str> = parts.iter().filter(|part| !part.is_empty()).collect();
    inner.iter().all(|part| !part.is_empty()) && filled.len() == 2 && filled[0] != filled[1]
}

#[cfg(test)]
mod tests;
