//! No near duplicate of a training prompt is held out: on real prompts, with planted paraphrases.

use std::collections::BTreeMap;

use super::world::*;
use crate::dataset::Split;
use crate::dataset::sketch::shingles;
use crate::dataset::sketch::tests::jaccard;
use crate::record::{Message, derive_seed, prompt_hash};

/// Returns AlpacaEval's 805 instructions, or nothing where `make models` has not fetched them; then says so.
fn alpaca_eval() -> Option<Vec<String>> {
    let cache = std::env::var_os("XDG_CACHE_HOME").map(std::path::PathBuf::from);
    let cache = cache.or_else(|| Some(std::path::PathBuf::from(std::env::var_os("HOME")?).join(".cache")))?;
    let text = std::fs::read(cache.join("taod/models/alpaca_eval_gpt4_baseline.json"));
    let required = std::env::var("TAOD_REQUIRE").is_ok_and(|list| list.split(',').any(|part| part == "models"));
    let Ok(text) = text else {
        assert!(!required, "AlpacaEval's instructions are missing and TAOD_REQUIRE asks for them; run `make models`");
        println!("skipped: AlpacaEval's instructions are not here; run `make models`");
        return None;
    };
    let rows: Vec<serde_json::Value> = serde_json::from_slice(&text).unwrap();
    Some(rows.iter().filter_map(|row| row["instruction"].as_str().map(str::to_owned)).collect())
}

/// Returns IFEval's own 541 prompts where `TAOD_IFEVAL` names its `input_data.jsonl`, which is not fetched by taod.
fn ifeval() -> Option<Vec<String>> {
    let text = std::fs::read_to_string(std::env::var_os("TAOD_IFEVAL")?).unwrap();
    let prompt =
        |line: &str| serde_json::from_str::<serde_json::Value>(line).unwrap()["prompt"].as_str().map(str::to_owned);
    Some(text.lines().filter_map(prompt).collect())
}

/// The demo's constraints as IFEval words them: the same instruction, asked with something else to be kept to.
const CONSTRAINTS: [&str; 6] = [
    "Your answer must not contain any commas.",
    "Your entire response should be in all lowercase letters.",
    "Answer with at least 300 words.",
    "Finish your response with the exact phrase: Is there anything else I can help with?",
    "Wrap your entire response with double quotation marks.",
    "Highlight at least 3 sections of your answer with markdown, i.e. *highlighted section*.",
];

/// Changes a few words, so that the similarity lies somewhere between 0.6 and 1.
fn paraphrase(text: &str, n: u64) -> String {
    let pick = |i: usize| derive_seed(n, &[text, &i.to_string()]);
    let words: Vec<&str> = text.split(' ').collect();
    let changed = words.iter().enumerate().map(|(i, word)| match pick(i) % (12 + 8 * n) {
        0 => format!("{word} really"),
        1 => word.to_uppercase(),
        2 if words.len() > 6 => String::new(),
        _ => (*word).to_owned(),
    });
    changed.collect::<Vec<_>>().join(" ")
}

/// Freezes prompts in three nights and returns the pairs of a Jaccard similarity above 0.8 by brute force: how many
/// there are, how many are in one cluster (or used by none), and how many are in two splits.
fn check(prompts: &[String]) -> (usize, usize, usize) {
    let mut world = World::new();
    world.workloads[0].house_rules.clear();
    for (night, prompts) in prompts.chunks(prompts.len() / 3 + 1).enumerate() {
        let rows: Vec<Row> = prompts
            .iter()
            .enumerate()
            .map(|(i, text)| row((night * 100_000 + i * 3) as i64, &[Message::text("user", text.as_str())]))
            .collect();
        world.add(&rows);
        world.night();
    }
    let decided = world.decided();
    let of = |text: &String| &decided[&prompt_hash(&[Message::text("user", text.as_str())], None)];
    let texts: Vec<(&String, Vec<u32>)> =
        prompts.iter().map(|text| (text, shingles(&crate::dataset::text::normalise(text)))).collect();
    let mut found = (0, 0, 0);
    for (i, (a, left)) in texts.iter().enumerate() {
        for (b, right) in &texts[..i] {
            let (least, most) = (left.len().min(right.len()), left.len().max(right.len()));
            if least as f64 / (most as f64) < 0.8 || jaccard(left, right) <= 0.8 {
                continue;
            }
            let (a, b) = (of(a), of(b));
            let unused = a.split == Split::None || b.split == Split::None;
            found.0 += 1;
            found.1 += usize::from(unused || a.cluster == b.cluster);
            found.2 += usize::from(!unused && a.split != b.split);
        }
    }
    found
}

#[test]
fn no_near_duplicate_crosses_the_splits_on_real_prompts() {
    let Some(instructions) = alpaca_eval() else { return };
    assert_eq!(instructions.len(), 805);
    let constrained = instructions.iter().take(541).enumerate();
    let constrained: Vec<String> =
        constrained.map(|(i, text)| format!("{text} {}", CONSTRAINTS[i % CONSTRAINTS.len()])).collect();
    let mut sets = vec![("AlpacaEval", instructions), ("AlpacaEval under IFEval's constraints", constrained)];
    sets.extend(ifeval().map(|prompts| ("IFEval", prompts)));
    for (name, prompts) in sets {
        let mut all: BTreeMap<u64, String> = BTreeMap::new();
        for text in &prompts {
            for text in [text.clone(), paraphrase(text, 1), paraphrase(text, 2)] {
                all.insert(derive_seed(1, &[&text]), text);
            }
        }
        let all: Vec<String> = all.into_values().collect();
        let (pairs, together, leaks) = check(&all);
        println!("{name}: {} prompts, {pairs} pairs above 0.8, {together} in one cluster, {leaks} leaks", all.len());
        assert!(pairs > 500, "{name}: too few pairs to test with: {pairs}");
        assert_eq!(leaks, 0, "{name}");
        assert!(together as f64 >= 0.95 * pairs as f64, "{name}: {together} of {pairs}");
    }
}
