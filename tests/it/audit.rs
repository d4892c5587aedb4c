//! People's labels on the audit split, in the real processes on a tiny random model.

use serde_json::Value;

use crate::harness::night::{Night, calls};
use crate::harness::{Outcome, taod_in};

fn audit(night: &Night, arguments: &[&str]) -> Outcome {
    let config = night.config().display().to_string();
    let all: Vec<&str> = ["audit"].iter().chain(arguments).copied().chain(["--config", config.as_str()]).collect();
    taod_in(&night.state(), &all, &[])
}

/// Returns the lines of a command's output.
fn lines(outcome: Outcome) -> Vec<Value> {
    outcome.code(0).out.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn people_label_blind_and_a_shown_disagreement_freezes_promotions() {
    let night = Night::new(&calls(120));
    audit(&night, &["report"]).refused(&["no audit was sampled yet", "taod audit sample"]);
    night.worker(&[], &[]).code(3);
    let tasks = lines(audit(&night, &["sample", "--prompts", "20"]));
    let held: Vec<String> = night.prompts("audit").into_iter().map(|prompt| prompt.messages[0].plain_text()).collect();
    assert!(tasks.len() >= 10 && tasks.len() <= 20, "{}", tasks.len());
    for task in &tasks {
        let keys: Vec<&String> = task.as_object().unwrap().keys().collect();
        assert_eq!(keys, ["id", "messages", "a", "b"], "who answered and the scores are not told");
        assert!(held.contains(&task["messages"][0]["content"].as_str().unwrap().to_string()));
    }
    audit(&night, &["sample"]).refused(&["no audit prompt is left"]);

    // Everybody prefers what the score finds worse; where it finds both alike, either.
    let stored = std::fs::read_to_string(night.round().join("audit/sample.jsonl")).unwrap();
    let stored: Vec<Value> = stored.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let worse = |pair: &Value| if pair["a"]["total"].as_f64() > pair["b"]["total"].as_f64() { "b" } else { "a" };
    let decided = stored.iter().filter(|pair| pair["a"]["total"] != pair["b"]["total"]).count() as u64;
    let label = |pair: &Value, choice: &str| format!("{{\"id\":{},\"choice\":\"{choice}\"}}", pair["id"]);
    let file = night.state().join("labels.jsonl");
    let input = file.display().to_string();
    let write = |lines: Vec<String>| std::fs::write(&file, lines.join("\n")).unwrap();
    write(vec!["{\"id\":\"round-00001/999\",\"choice\":\"a\"}".into()]);
    audit(&night, &["label", "--input", &input, "--by", "ann"]).refused(&["round-00001/999", "no sampled pair"]);
    write(vec!["{\"id\":\"round-00001/0\",\"choice\":\"c\"}".into()]);
    audit(&night, &["label", "--input", &input, "--by", "ann"]).refused(&["unknown variant `c`"]);
    write(stored.iter().map(|pair| label(pair, "tie")).collect());
    audit(&night, &["label", "--input", &input, "--by", "ann"]).code(0);
    let report: Value = serde_json::from_str(&audit(&night, &["report", "--json"]).code(0).out).unwrap();
    assert_eq!(report["report"]["agreement"]["people_tied"], stored.len(), "{report}");
    // The later word of the same person counts.
    write(stored.iter().map(|pair| label(pair, worse(pair))).collect());
    audit(&night, &["label", "--input", &input, "--by", "ann"]).code(0);
    let said: Value = serde_json::from_str(&audit(&night, &["report", "--json", "--no-freeze"]).code(0).out).unwrap();
    let rate = &said["report"]["agreement"]["rate"];
    assert_eq!((rate["successes"].as_u64(), rate["tries"].as_u64()), (Some(0), Some(decided)), "{said}");
    // 0 of 4 has an upper end of 0.602, 0 of 5 one of 0.522.
    assert!(decided >= 5, "the scores of {decided} pairs differ: too few to show anything");
    let frozen = audit(&night, &["report"]).code(2).out;
    assert!(frozen.contains("ALARM") && frozen.contains("promotions are frozen"), "{frozen}");
    night.worker(&[], &[]).code(0);
    let skipped = std::fs::read_to_string(night.state().join("rounds/round-00002/outcome.json")).unwrap();
    assert!(skipped.contains("frozen by taod audit report"), "{skipped}");
}
