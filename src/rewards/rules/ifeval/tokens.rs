//! What IFEval's checker takes from other programs: sentences (Punkt), words (the Penn Treebank's rules), languages.
//!
//! Punkt's trained tables are large and only matter where a period ends an abbreviation. Here a short list of
//! abbreviations does, and the next word decides whether the sentence goes on. The words are only needed as far as it
//! changes how many of them are capitals: where the Treebank cuts.

use std::sync::LazyLock;

use regex::Regex;
use whatlang::Lang;

use super::super::LetterCase;

/// Abbreviations after which a sentence goes on unless a word follows that often begins one; without their period. Single
/// letters joined by points (`e.g`, `U.S`) are always some.
const ABBREVIATIONS: &[&str] = &[
    "adm", "apr", "aug", "ave", "bros", "calif", "capt", "cf", "co", "col", "corp", "dec", "dr", "feb", "ft", "gen",
    "gov", "inc", "jan", "jr", "lt", "ltd", "maj", "messrs", "mr", "mrs", "ms", "nov", "oct", "ph.d", "prof", "rep",
    "sen", "sept", "sgt", "sr", "st", "vs",
];

/// Words that begin a sentence where they follow an abbreviation with a capital.
const STARTERS: &[&str] = &[
    "a", "after", "although", "an", "and", "as", "at", "but", "each", "for", "he", "here", "how", "however", "i", "if",
    "in", "it", "its", "moreover", "my", "on", "she", "since", "so", "some", "that", "the", "their", "then", "there",
    "these", "they", "this", "those", "to", "we", "what", "when", "where", "while", "who", "why", "with", "you",
    "your",
];

/// Counts the sentences: a run of `.`, `?` or `!`, with quotation marks and brackets after it, ends one before white space.
/// Line breaks end none.
pub(super) fn sentences(text: &str) -> usize {
    let runs: Vec<&str> = text.split_whitespace().collect();
    let ends = |at: usize| runs.get(at + 1).is_some_and(|next| ends_sentence(runs[at], next));
    if runs.is_empty() { 0 } else { 1 + (0..runs.len()).filter(|at| ends(*at)).count() }
}

fn ends_sentence(run: &str, next: &str) -> bool {
    let closed = run.trim_end_matches(['"', '\'', ')', ']', '}', '”', '’', '»']);
    // A mark alone, as in `1 ?`, belongs to what stands before it.
    if closed.ends_with(['?', '!']) {
        return true;
    }
    let Some(word) = closed.strip_suffix('.') else { return false };
    let next_word: String = next.chars().skip_while(|c| !c.is_alphanumeric()).collect();
    let capital = next_word.starts_with(char::is_uppercase);
    let starter = || {
        let bare = next_word.split(|c: char| !c.is_alphanumeric()).next().unwrap_or_default().to_lowercase();
        capital && STARTERS.contains(&bare.as_str())
    };
    if word.ends_with('.') {
        // Points that trail off: the sentence goes on in small letters.
        return capital;
    }
    let bare = word.trim_start_matches(['(', '[', '"', '\'', '“', '‘', '*']).to_lowercase();
    let last = bare.rsplit('-').next().unwrap_or_default();
    let is_initial = last.chars().count() == 1 && last.chars().all(char::is_alphabetic);
    let is_number = !bare.is_empty() && bare.trim_start_matches('-').chars().all(|c| c.is_ascii_digit());
    if is_initial {
        return starter() && last != "i" || last == "i" && capital;
    }
    if is_number {
        return !next_word.starts_with(char::is_lowercase);
    }
    let is_dotted = bare.contains('.') && bare.split('.').all(|part| part.chars().count() == 1);
    if is_dotted || ABBREVIATIONS.contains(&bare.as_str()) || ABBREVIATIONS.contains(&last) {
        return starter();
    }
    true
}

/// Where the Treebank cuts words apart, in its order, as far as it matters for capitals.
static CUTS: LazyLock<Vec<(Regex, &str)>> = LazyLock::new(|| {
    let cuts = [
        (r#"["“”«»„‟`]"#, " "),
        (r"([:,])([^\d])", " $1 $2"),
        (r"([:,])$", " $1 "),
        (r"\.{2,}", " "),
        (r"[;@#$%&]", " "),
        (r"[?!]", " "),
        (r"[\]\[(){}<>]", " "),
        (r"--+|—", " "),
        (r"(?i)([^' ])('s|'m|'d|'ll|'re|'ve|n't)(\W|$)", "$1 $2 $3"),
        (r"(?i)\b(can)(not)\b", "$1 $2"),
        (r"(?i)\b(gon|wan)(na)\b", "$1 $2"),
        (r"(?i)\b(got)(ta)\b", "$1 $2"),
        (r"(?i)\b(gim|lem)(me)\b", "$1 $2"),
        (r"(?i)\b(d)('ye)\b", "$1 $2"),
        (r"(?i)\b(more)('n)\b", "$1 $2"),
        (r"(?i) ('t)(is|was)\b", " $1 $2"),
    ];
    cuts.into_iter().filter_map(|(pattern, by)| Some((Regex::new(pattern).ok()?, by))).collect()
});

/// Counts the words whose letters are all capitals. `DON'T` is two of them, `WELL-KNOWN` is one.
pub(super) fn capital_words(text: &str) -> usize {
    let mut cut = format!(" {text} ");
    for (pattern, by) in CUTS.iter() {
        cut = pattern.replace_all(&cut, *by).into_owned();
    }
    cut.split_whitespace().filter(|word| is_case(word, LetterCase::Upper)).count()
}

/// A test of a letter.
type Is = fn(char) -> bool;

/// Returns true where some letter has a case and all that do are in this one.
pub(super) fn is_case(text: &str, case: LetterCase) -> bool {
    let (right, wrong): (Is, Is) = match case {
        LetterCase::Upper => (char::is_uppercase, char::is_lowercase),
        LetterCase::Lower => (char::is_lowercase, char::is_uppercase),
    };
    text.chars().any(right) && !text.chars().any(wrong)
}

/// The languages of IFEval that can be told apart here, by their code in ISO 639-1.
const LANGUAGES: &[(&str, Lang)] = &[
    ("ar", Lang::Ara),
    ("bg", Lang::Bul),
    ("bn", Lang::Ben),
    ("de", Lang::Deu),
    ("en", Lang::Eng),
    ("es", Lang::Spa),
    ("fa", Lang::Pes),
    ("fi", Lang::Fin),
    ("fr", Lang::Fra),
    ("gu", Lang::Guj),
    ("he", Lang::Heb),
    ("hi", Lang::Hin),
    ("it", Lang::Ita),
    ("ja", Lang::Jpn),
    ("kn", Lang::Kan),
    ("ko", Lang::Kor),
    ("ml", Lang::Mal),
    ("mr", Lang::Mar),
    ("ne", Lang::Nep),
    ("pa", Lang::Pan),
    ("pl", Lang::Pol),
    ("pt", Lang::Por),
    ("ru", Lang::Rus),
    ("ta", Lang::Tam),
    ("te", Lang::Tel),
    ("th", Lang::Tha),
    ("uk", Lang::Ukr),
    ("ur", Lang::Urd),
    ("vi", Lang::Vie),
];

/// Returns the language of a two-letter code, or says which ones there are.
pub(super) fn language(code: &str) -> Result<Lang, String> {
    let found = LANGUAGES.iter().find(|(known, _)| *known == code);
    found.map(|(_, language)| *language).ok_or_else(|| {
        let known: Vec<&str> = LANGUAGES.iter().map(|(code, _)| *code).collect();
        format!("language = {code:?} is none of those that can be told apart here: {}", known.join(", "))
    })
}
