use super::*;
use crate::record::FinishReason;

const NEAR: f64 = 1e-12;

fn rule(toml: &str) -> Rule {
    toml::from_str(toml).unwrap_or_else(|error| panic!("{toml}: {error}"))
}

fn answer<'a>(text: &'a str, prompt: &'a str) -> Answer<'a> {
    Answer { text, finish_reason: FinishReason::Stop, prompt }
}

/// Checks the credit that one rule gives to each answer.
fn check(toml: &str, expected: &[(&str, f64)]) {
    let check = rule(toml).compile().unwrap();
    for (text, credit) in expected {
        let found = check.credit(&answer(text, ""));
        assert!((found - credit).abs() < NEAR, "{toml}: {text:?} scored {found}, expected {credit}");
    }
}

fn refusal(toml: &str) -> String {
    rule(toml).compile().unwrap_err()
}

#[test]
fn regex_must_and_must_not_are_opposites() {
    let cases = [("order 66", 1.0), ("no number", 0.0), ("", 0.0)];
    check("kind = 'regex_must'\npattern = '[0-9]+'", &cases);
    check("kind = 'regex_must_not'\npattern = '[0-9]+'", &cases.map(|(text, credit)| (text, 1.0 - credit)));
    check("kind = 'regex_must'\npattern = '^yes$'", &[("  yes\n", 1.0), ("yes.", 0.0)]);
}

#[test]
fn json_parses_and_matches_its_schema() {
    check("kind = 'json'", &[(" {\"a\": 1} ", 1.0), ("3", 1.0), ("{\"a\": 1} ok", 0.0), ("", 0.0), ("{'a': 1}", 0.0)]);
    let schema = r#"
        kind = "json"
        schema = '''{"type": "object", "required": ["topic"], "additionalProperties": false,
                   "properties": {"topic": {"type": "string", "pattern": "^[a-z]{3,}$"}}}'''
    "#;
    check(schema, &[(r#"{"topic": "tea"}"#, 1.0), (r#"{"topic": "te"}"#, 0.5), (r#"{"x": "tea"}"#, 0.5), ("tea", 0.0)]);
}

#[test]
fn json_schema_references_stay_inside() {
    let inside = r##"{"$defs": {"n": {"type": "integer"}}, "$ref": "#/$defs/n"}"##;
    check(&format!("kind = 'json'\nschema = '{inside}'"), &[("3", 1.0), ("\"x\"", 0.5)]);
    for outside in ["https://example.com/a.json", "file:///etc/hostname"] {
        let message = refusal(&format!("kind = 'json'\nschema = '{{\"$ref\": \"{outside}\"}}'"));
        assert!(message.contains(outside) && message.contains("into the schema itself"), "{message}");
    }
}

#[test]
fn a_schema_pattern_cannot_backtrack() {
    let message = refusal(
        r#"kind = "json"
        schema = '{"type": "string", "pattern": "(?=a)a"}'"#,
    );
    assert!(message.contains("(?=a)a"), "{message}");
}

#[test]
fn a_pattern_that_would_backtrack_without_end_ends() {
    let long = format!("{}!", "a".repeat(100_000));
    check("kind = 'regex_must'\npattern = '^(a+)+$'", &[(&long, 0.0), ("aaa", 1.0)]);
}

#[test]
fn length_counts_each_unit_with_both_bounds_included() {
    check(
        "kind = 'length'\nunit = 'characters'\nmax = 4",
        &[("äöü!", 1.0), (" äöü! ", 1.0), ("12345", 0.8), ("", 1.0)],
    );
    check(
        "kind = 'length'\nunit = 'words'\nmin = 2\nmax = 3",
        &[("one", 0.5), ("a - b", 1.0), ("a b c", 1.0), ("a b c d", 0.75)],
    );
    check(
        "kind = 'length'\nunit = 'sentences'\nmin = 2\nmax = 2",
        &[("One. Two.", 1.0), ("One.", 0.5), ("A b. C d. E f. G h.", 0.5)],
    );
    check("kind = 'length'\nunit = 'lines'\nmax = 2", &[("a\n\n \nb\n", 1.0), ("a\nb\nc\nd", 0.5)]);
}

#[test]
fn case_looks_only_at_letters_that_have_one() {
    check("kind = 'case'\ncase = 'lower'", &[("all small, 3 of 日本", 1.0), ("Ab", 0.5), ("123", 1.0), ("ÄÖ", 0.0)]);
    check("kind = 'case'\ncase = 'upper'", &[("ALL BIG", 1.0), ("AbCd", 0.5), ("", 1.0)]);
}

#[test]
fn starts_and_ends_give_the_share_that_is_there() {
    check(
        "kind = 'starts_with'\ntext = 'Answer:'",
        &[("\nAnswer: x", 1.0), ("answer: x", 0.0), ("Answ", 4.0 / 7.0), ("", 0.0)],
    );
    check("kind = 'ends_with'\ntext = 'Bye!'", &[("So, Bye! ", 1.0), ("Bye", 0.0), ("ye!", 0.75), ("Bye! Yes", 0.0)]);
}

#[test]
fn required_words_match_whole_words_and_phrases() {
    let required = "kind = 'required_words'\nwords = ['because', 'for example']";
    check(
        required,
        &[("Because, for  Example.", 1.0), ("because of examples", 0.5), ("becauses for an example", 0.0), ("", 0.0)],
    );
}

#[test]
fn forbidden_words_match_whole_words_and_phrases() {
    let forbidden = "kind = 'forbidden_words'\nwords = ['and', \"don't\"]";
    check(forbidden, &[("sandy band", 1.0), ("this and/or that", 0.5), ("AND I don’t", 1.0 / 3.0), ("", 1.0)]);
}

#[test]
fn bullets_need_a_mark_a_space_and_text() {
    check(
        "kind = 'bullets'\ncount = 3",
        &[
            ("- a\n* b\n  • c", 1.0),
            ("Three:\n- a\n- b\n- c\nDone.", 1.0),
            ("- a\n- \n-b\n- c", 2.0 / 3.0),
            ("- a\n- b\n- c\n- d", 0.75),
            ("1. a\n2. b\n3. c", 0.0),
            ("**a**\n--- b\n- c", 1.0 / 3.0),
        ],
    );
}

#[test]
fn repetition_counts_the_worst_run() {
    let rule = "kind = 'repetition'\nngram = 2\nmax = 1";
    check(rule, &[("a b c a c b", 1.0), ("A b, a b", 0.5), ("a a a a", 1.0 / 3.0), ("a", 1.0), ("", 1.0)]);
}

#[test]
fn language_refuses_only_a_reliable_other_guess() {
    let english =
        "The committee decided that the new library should open on Sundays, because many families asked for it.";
    let german =
        "Der Ausschuss hat entschieden, dass die neue Bücherei sonntags öffnen soll, weil viele Familien das wünschen.";
    check("kind = 'language'\ncode = 'eng'", &[(english, 1.0), (german, 0.0), ("ok", 1.0), ("123", 0.0), ("", 0.0)]);
    check("kind = 'language'\ncode = 'deu'", &[(english, 0.0), (german, 1.0)]);
}

#[test]
fn ended_reads_the_finish_reason() {
    let check = rule("kind = 'ended'").compile().unwrap();
    let mut cut = answer("so", "");
    assert_eq!(check.credit(&cut), 1.0);
    cut.finish_reason = FinishReason::Length;
    assert_eq!(check.credit(&cut), 0.0);
}

#[test]
fn a_copy_of_the_prompt_is_measured_in_runs_of_three_words() {
    let check = rule("kind = 'not_copy_of_prompt'\nmax_overlap = 0.5").compile().unwrap();
    let credit = |text| check.credit(&answer(text, "Name the three largest rivers."));
    assert_eq!(credit("The Nile, the Amazon and the Yangtze."), 1.0);
    assert_eq!(credit("name THE three largest rivers!"), 0.0);
    assert_eq!(credit("name"), 0.0);
    assert_eq!(credit(""), 1.0);
    // Runs: "the three largest", "three largest rivers" of the prompt, "largest rivers are", "rivers are here": 2 of 4.
    assert_eq!(credit("The three largest rivers are here."), 1.0);
    // 3 of 4 copied: (1 - 0.75) / (1 - 0.5).
    assert!((credit("Name the three largest rivers today") - 0.5).abs() < NEAR);
}

#[test]
fn sentences_end_where_a_reader_would_say() {
    for (text, count) in [
        ("One. Two! Three?", 3),
        ("It costs 3.50 at Smith's.com today. Yes.", 2),
        ("Dr. J. Smith of the U.S. army left", 2),
        ("Wait... what?! \"No.\" (Never.)", 4),
        ("1. First item.\n2. Second item", 2),
        ("A heading\nand its text.", 2),
        ("... - !", 0),
        ("これは一つ。これは二つ。", 2),
        ("", 0),
    ] {
        assert_eq!(text::sentences(text), count, "{text:?}");
    }
}

#[test]
fn rules_that_cannot_work_are_refused_with_the_value_and_the_remedy() {
    for (toml, parts) in [
        ("kind = 'regex_must'\npattern = '('", ["\"(\"", "regex crate"]),
        ("kind = 'regex_must'\npattern = '(?=a)'", ["look-around", "(?=a)"]),
        ("kind = 'json'\nschema = '{'", ["not JSON", "write it as"]),
        ("kind = 'json'\nschema = '{\"type\": \"objekt\"}'", ["objekt", "correct it"]),
        ("kind = 'length'\nunit = 'words'", ["neither min nor max", "give at least one"]),
        ("kind = 'length'\nunit = 'words'\nmin = 3\nmax = 2", ["min = 3", "max = 2"]),
        ("kind = 'starts_with'\ntext = ' '", ["\" \"", "give the text"]),
        ("kind = 'forbidden_words'\nwords = []", ["words = []", "at least one word"]),
        ("kind = 'required_words'\nwords = ['a', '--']", ["words[1]", "--"]),
        ("kind = 'repetition'\nngram = 0\nmax = 1", ["ngram = 0", "at least 1"]),
        ("kind = 'language'\ncode = 'en'", ["\"en\"", "three-letter"]),
        ("kind = 'not_copy_of_prompt'\nmax_overlap = 1.0", ["max_overlap = 1", "below 1"]),
    ] {
        let message = refusal(toml);
        assert!(parts.iter().all(|part| message.contains(part)), "{toml}: {message}");
    }
}

#[test]
fn rules_are_hard_by_default_and_know_their_keys() {
    assert!(rule("kind = 'ended'").hard);
    assert!(!rule("kind = 'ended'\nhard = false").hard);
    for toml in
        ["kind = 'ended'\nmax = 3", "kind = 'length'\nunit = 'words'\nmaximum = 3", "kind = 'rhymes'", "hard = true"]
    {
        toml::from_str::<Rule>(toml).expect_err(toml);
    }
    let written = toml::to_string(&rule("kind = 'bullets'\ncount = 3")).unwrap();
    assert_eq!(rule(&written), Rule::hard(Kind::Bullets { count: 3 }), "{written}");
}
