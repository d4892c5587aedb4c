use serde::Deserialize;

use super::*;

#[derive(Deserialize)]
struct Case {
    answer: String,
    verdicts: Vec<(Instruction, bool)>,
}

fn name(instruction: &Instruction) -> String {
    serde_json::to_value(instruction).unwrap()["instruction"].as_str().unwrap().to_owned()
}

/// How many of the verdicts differ from the published checker's, by kind, with the reason. All others agree.
const DIFFERENCES: &[(&str, usize, &str)] = &[
    ("change_case:english_capital", 1, "a short text is taken for another language"),
    ("change_case:english_lowercase", 2, "a short text is taken for another language"),
    ("language:response_language", 3, "a short text is taken for another language, by either side"),
    (
        "length_constraints:number_sentences",
        9,
        "Punkt ends a sentence after `i.e.` and goes on after `...`; here it is the reverse",
    ),
];

#[test]
fn the_published_checker_says_the_same() {
    let cases: Vec<Case> = serde_json::from_str(include_str!("../../../../tests/golden/ifeval.json")).unwrap();
    let mut verdicts = 0;
    let mut kinds = std::collections::BTreeSet::new();
    let mut differences: std::collections::BTreeMap<String, Vec<String>> = Default::default();
    for case in &cases {
        for (instruction, expected) in &case.verdicts {
            verdicts += 1;
            kinds.insert(name(instruction));
            if Check::compile(instruction).unwrap().holds(&case.answer) != *expected {
                differences
                    .entry(name(instruction))
                    .or_default()
                    .push(format!("{instruction:?} on {:?}: theirs {expected}", case.answer));
            }
        }
    }
    assert!(cases.len() > 150 && verdicts > 2_500 && kinds.len() == 25, "{verdicts} verdicts of {} kinds", kinds.len());
    let found: Vec<(&str, usize)> = differences.iter().map(|(kind, all)| (kind.as_str(), all.len())).collect();
    let known: Vec<(&str, usize)> = DIFFERENCES.iter().map(|(kind, count, _)| (*kind, *count)).collect();
    assert_eq!(found, known, "{differences:#?}");
}

#[test]
fn arguments_that_cannot_be_used_are_refused_with_the_remedy() {
    let refusal = |toml: &str| Check::compile(&toml::from_str(toml).unwrap()).unwrap_err();
    let cases = [
        ("instruction = 'keywords:existence'\nkeywords = []", "keywords is empty"),
        ("instruction = 'keywords:existence'\nkeywords = ['tea', ' ']", "keywords is blank"),
        ("instruction = 'language:response_language'\nlanguage = 'sw'", "language = \"sw\""),
        (
            "instruction = 'length_constraints:nth_paragraph_first_word'\nnum_paragraphs = 2\nnth_paragraph = 3\nfirst_word = 'x'",
            "nth_paragraph = 3",
        ),
        (
            "instruction = 'keywords:letter_frequency'\nletter = ' '\nlet_relation = 'at least'\nlet_frequency = 1",
            "letter = ' '",
        ),
    ];
    for (toml, part) in cases {
        let message = refusal(toml);
        assert!(message.contains(part), "{toml}: {message}");
    }
    for toml in ["instruction = 'keywords:none'", "instruction = 'punctuation:no_comma'\nword = 'x'"] {
        assert!(toml::from_str::<Instruction>(toml).is_err(), "{toml} is taken");
    }
}

#[test]
fn a_keyword_is_a_text_and_no_pattern() {
    let toml = "instruction = 'keywords:existence'\nkeywords = ['C++', 'a.b']";
    let check = Check::compile(&toml::from_str(toml).unwrap()).unwrap();
    assert!(check.holds("c++ has a.b") && !check.holds("c++ has axb"));
}

#[test]
fn every_cut_of_the_treebank_is_made() {
    for (text, words) in [
        ("DON'T", 2),
        ("I'M", 2),
        ("CANNOT", 2),
        ("WELL-KNOWN", 1),
        ("A,B", 2),
        ("A--B", 2),
        ("A...B", 2),
        ("\"A\" (B)", 2),
        ("R&D", 2),
        ("U.S.A.", 1),
        ("Ab a 7", 0),
        ("A's", 1),
    ] {
        assert_eq!(tokens::capital_words(text), words, "{text}");
    }
}
