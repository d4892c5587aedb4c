//! Answers under a JSON Schema: always of it, and with the log-probs of what they were drawn from.

use serde_json::{Value, json};

use super::*;

fn schema() -> Value {
    json!({
        "type": "object",
        "properties": {
            "kind": {"enum": ["bug", "wish"]},
            "count": {"type": "integer", "minimum": 0, "maximum": 99},
            "who": {"$ref": "#/$defs/name"},
        },
        "required": ["kind", "count", "who"],
        "additionalProperties": false,
        "$defs": {"name": {"type": "string", "maxLength": 6}},
    })
}

fn under(grammar: &Grammar, samples: u64, max_tokens: usize) -> Group {
    let mut group = group(0, &[5, 6, 7], samples, max_tokens);
    group.sampling.grammar = Some(grammar.clone());
    group
}

#[test]
fn every_answer_of_a_random_model_keeps_the_schema() {
    let model = load(&fixture("tiny-llama"));
    let grammar = Grammar::json_schema(&model, &schema()).unwrap();
    let valid = jsonschema::validator_for(&schema()).unwrap();
    let samples = sample(&model, vec![under(&grammar, 12, 300)], 5).remove(0);
    let mut texts = std::collections::BTreeSet::new();
    for sample in &samples {
        assert_eq!(sample.finish_reason, FinishReason::Stop, "{:?}", sample.text);
        let value = serde_json::from_str(&sample.text).unwrap_or_else(|e| panic!("{e}: {:?}", sample.text));
        assert!(valid.is_valid(&value), "{value}");
        assert!(model.tokenizer().is_end(*sample.token_ids.last().unwrap()));
        texts.insert(&sample.text);
    }
    assert!(texts.len() > 6, "{texts:?}");
}

#[test]
fn a_schema_changes_what_is_drawn_from_and_not_what_the_model_would_say() {
    let model = load(&fixture("tiny-llama"));
    let grammar = Grammar::json_schema(&model, &schema()).unwrap();
    let mut asked = under(&grammar, 4, 300);
    asked.sampling.temperature = 1.0;
    asked.sampling.top_p = 1.0;
    let samples = sample(&model, vec![asked.clone()], 64).remove(0);
    let own: Vec<ScoreItem> =
        samples.iter().map(|s| ScoreItem { prompt: &asked.prompt, completion: &s.token_ids }).collect();
    for (sample, own) in samples.iter().zip(logprobs(&model, None, &own).unwrap()) {
        assert!(worst(&sample.logprobs, &own) < 1e-3);
        // Only what the schema forbids was taken away, so every token was likelier than the model thinks.
        assert!(sample.sampler_logprobs.iter().zip(&sample.logprobs).all(|(drawn, own)| *drawn >= own - 1e-4));
        assert!(sample.sampler_logprobs.iter().any(|drawn| *drawn > -1e-6), "somewhere one token alone may follow");
    }
    // One token after another, by another way: the share of the allowed ones.
    let first = |group: Group| sample_one(&model, group);
    let (token, drawn) = first(asked);
    assert_eq!(model.tokenizer().decode(&[token]).trim(), "{");
    assert!(drawn > -3.0, "{drawn}");
}

fn sample_one(model: &Model, group: Group) -> (u32, f32) {
    let first = sample(model, vec![Group { seeds: vec![1], ..group }], 1).remove(0).remove(0);
    (first.token_ids[0], first.sampler_logprobs[0])
}

#[test]
fn a_schema_that_cannot_be_followed_is_refused_in_one_line() {
    let model = load(&fixture("tiny-llama"));
    for (schema, words) in [
        (json!({"type": "nothing"}), "nothing"),
        (json!({"$ref": "https://example.com/person.json"}), "example.com"),
        (json!({"$ref": "#/$defs/none"}), "none"),
        (json!(["a"]), "not an object"),
    ] {
        let error = Grammar::json_schema(&model, &schema).unwrap_err().to_string();
        assert!(error.contains(words) && error.lines().count() == 1, "{error}");
    }
}

#[test]
fn greedy_answers_keep_the_schema_and_seeds_decide_the_others() {
    let model = load(&fixture("tiny-llama"));
    let grammar = Grammar::json_object(&model).unwrap();
    let mut asked = under(&grammar, 1, 40);
    asked.sampling = SamplingSettings { grammar: Some(grammar.clone()), ..greedy(40) };
    assert!(sample(&model, vec![asked], 4)[0][0].text.starts_with('{'));
    let draws = || sample(&model, vec![under(&grammar, 6, 40), group(1, &[9, 8], 3, 20)], 4);
    assert_eq!(draws(), draws());
    let free = sample(&model, vec![group(1, &[9, 8], 3, 20)], 4);
    assert_eq!(draws()[1], free[0], "what others must keep is no matter of theirs");
}
