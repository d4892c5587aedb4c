use super::*;
use crate::engine::{Model, ScoreItem, logprobs};
use crate::rewards::testing::{items, ok, serve};

/// A tiny model with a context that holds a judge's prompt. It has no sense, but its numbers can be checked.
fn folder() -> &'static std::path::Path {
    static FOLDER: std::sync::OnceLock<tempfile::TempDir> = std::sync::OnceLock::new();
    let made = FOLDER.get_or_init(|| {
        let folder = tempfile::tempdir().unwrap();
        let from = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/models/tiny-llama");
        for file in std::fs::read_dir(from).unwrap() {
            let file = file.unwrap();
            std::fs::copy(file.path(), folder.path().join(file.file_name())).unwrap();
        }
        let config = folder.path().join("config.json");
        let text = std::fs::read_to_string(&config).unwrap();
        let longer = text.replace("\"max_position_embeddings\": 512", "\"max_position_embeddings\": 1500");
        assert_ne!(longer, text);
        std::fs::write(config, longer).unwrap();
        folder
    });
    made.path()
}

fn local(more: &str) -> Settings {
    toml::from_str(&format!("model = '{}'\nrubric = 'right'\n{more}", folder().display())).unwrap()
}

fn refs(items: &[Item]) -> Vec<&Item> {
    items.iter().collect()
}

#[test]
fn a_score_is_the_log_odds_of_yes() {
    let settings = local("");
    let judge = Judge::open("j", &settings, None).unwrap();
    let asked = items(&[("Why?", "So."), ("Why?", "Because it rains."), ("Who?", "")]);
    let scores = judge.score(&refs(&asked)).unwrap();
    let model = Model::load(&settings.model).unwrap();
    for (item, score) in asked.iter().zip(scores) {
        let material = Material { rubric: "right", question: &prompt::question(item), most: 6000 };
        let prompt = model.prompt_ids(&[material.ask_one(&item.response)], None).unwrap();
        let chance = |words: &[&str]| -> f64 {
            let of = |word: &&str| {
                let completion = model.tokenizer().encode(word).unwrap();
                let scored = logprobs(&model, None, &[ScoreItem { prompt: &prompt, completion: &completion }]).unwrap();
                scored[0].iter().map(|l| f64::from(*l)).sum::<f64>().exp()
            };
            words.iter().map(of).sum()
        };
        let expected = (chance(YES_NO.first) / chance(YES_NO.second)).ln();
        assert!((score - expected).abs() < 1e-5, "{score} {expected}");
    }
}

#[test]
fn both_orders_are_asked_so_that_a_preference_turns_with_the_pair() {
    let judge = Judge::open("j", &local("mode = 'pairwise'\nopponents = 16"), None).unwrap();
    let group = items(&[("Why?", "So."), ("Why?", "Because it rains."), ("Why?", "No."), ("Who?", "Me.")]);
    let there = judge.prefer(&[(&group[0], &group[1]), (&group[1], &group[0])]).unwrap();
    assert!((there[0] + there[1]).abs() < 1e-9 && there[0].abs() > 1e-6, "{there:?}");
    let chances = judge.score(&refs(&group)).unwrap();
    assert_eq!(chances[3], 0.5, "an answer without company");
    assert!((chances[..3].iter().sum::<f64>() - 1.5).abs() < 1e-9, "what one wins another loses: {chances:?}");
    assert!(chances.iter().all(|chance| (0.0..=1.0).contains(chance)));
}

#[test]
fn each_answer_meets_the_next_ones_once() {
    assert_eq!(opponents(&[7, 8, 9], 1), [(7, 8), (8, 9), (9, 7)]);
    assert_eq!(opponents(&[7, 8, 9], 16), [(7, 8), (8, 9), (9, 7)]);
    assert_eq!(opponents(&[7, 8], 16), [(7, 8)]);
    assert!(opponents(&[7], 16).is_empty());
}

#[test]
fn material_that_is_too_long_is_shown_in_part() {
    let judge = Judge::open("j", &local(""), None).unwrap();
    let long = "word ".repeat(3000);
    let asked = items(&[(&long, &long)]);
    assert!(judge.score(&refs(&asked)).unwrap()[0].is_finite());
}

#[test]
fn a_server_is_asked_for_one_token_and_its_candidates() {
    let answer = r#"{"choices":[{"logprobs":{"content":[{"top_logprobs":[{"token":"Yes","logprob":-0.5},{"token":"no","logprob":-1.5}]}]}}]}"#;
    let server = serve(&[&ok(answer), &ok(r#"{"choices":[{"message":{"content":"Yes"}}]}"#)]);
    let more = format!("url = '{}'\nversion = '1'\nasking = {{ retries = 0, timeout_s = 5 }}", server.url);
    let settings: Settings = toml::from_str(&format!("model = 'm'\nrubric = 'right'\n{more}")).unwrap();
    settings.validate().unwrap();
    let judge = Judge::open("j", &settings, None).unwrap();
    let asked = items(&[("Why?", "So.")]);
    assert_eq!(judge.score(&refs(&asked)).unwrap(), [1.0]);
    let (line, body) = server.asked.recv().unwrap();
    assert_eq!(line, "POST /v1/chat/completions HTTP/1.1");
    assert_eq!((&body["model"], &body["max_tokens"], &body["logprobs"]), (&json!("m"), &json!(1), &json!(true)));
    assert!(body["messages"][0]["content"].as_str().unwrap().contains("| So."));
    let refused = judge.score(&refs(&asked)).unwrap_err().to_string();
    assert!(refused.contains(&server.url) && refused.contains("no logprobs"), "{refused}");
}

#[test]
fn settings_are_checked_and_decide_the_identity() {
    let refusal = |toml: &str| toml::from_str::<Settings>(toml).unwrap().validate().unwrap_err();
    assert!(refusal("model = 'm'\nrubric = ' '").starts_with("rubric is blank"));
    assert!(refusal("model = ''\nrubric = 'r'").starts_with("model is empty"));
    assert!(refusal("model = 'm'\nrubric = 'r'\nurl = 'http://x'").starts_with("version is empty"));
    assert!(refusal("model = 'm'\nrubric = 'r'\nopponents = 0").starts_with("opponents = 0"));
    let identity = |more: &str| Judge::open("j", &local(more), None).unwrap().identity();
    assert_eq!(identity(""), identity(""));
    assert_ne!(identity(""), identity("max_chars = 100"));
    assert_ne!(identity(""), identity("mode = 'pairwise'"));
}
