use super::*;
use crate::round::StageReport;

fn plan() -> Plan {
    let base = serde_json::json!({ "name": "m", "architecture": "llama", "sha256": "00", "tokenizer_sha256": "00", "template_sha256": "00" });
    let plan = serde_json::json!({ "round": "round-00007", "seed": 5, "base": base, "settings_sha256": "0", "threads": 1,
        "control": null, "created_us": 1_000_000, "taod_version": "0" });
    serde_json::from_value(plan).unwrap()
}

fn stage(name: &str, seconds: f64, ended_us: i64) -> StageReport {
    StageReport { stage: name.into(), rows: 3, tokens: 11, seconds, ended_us }
}

fn verdict(outcome: Outcome) -> Verdict {
    let stages = vec![stage("dataset", 1.0, 3_000_000), stage("adapter 1", 2.5, 9_000_000), stage("old", 1.0, 0)];
    Verdict { round: "round-00007".into(), outcome, stages }
}

#[test]
fn a_round_is_one_trace_whose_stages_lie_in_it_where_they_were() {
    let open = Outcome::Open { trial: "2026-3".into(), challenger: "taod-1".into(), reason: "too few".into() };
    let spans = spans(&plan(), &verdict(open.clone()));
    let names: Vec<&str> = spans.iter().map(|span| span.name.as_str()).collect();
    // A record of an older version says no time, and is left out.
    assert_eq!(names, ["taod.round", "taod.stage dataset", "taod.stage adapter 1"]);
    assert_eq!((spans[0].start_us, spans[0].end_us), (1_000_000, 9_000_000));
    assert_eq!((spans[2].start_us, spans[2].end_us), (6_500_000, 9_000_000));
    assert!(spans.iter().all(|span| span.trace_id == spans[0].trace_id && span.error.is_none()));
    assert_eq!(spans[0].parent, None);
    assert!(spans[1..].iter().all(|span| span.parent == Some(spans[0].span_id)));
    let ids: std::collections::BTreeSet<_> = spans.iter().map(|span| span.span_id).collect();
    assert_eq!(ids.len(), 3);
    assert!(spans[0].attributes.contains(&("taod.challenger", Attribute::Text("taod-1".into()))));
    assert!(spans[1].attributes.contains(&("taod.stage.tokens", Attribute::Whole(11))));
    assert_eq!(super::spans(&plan(), &verdict(open)), spans, "made again it is the same trace");
}

#[test]
fn a_round_that_failed_says_so() {
    let spans = spans(&plan(), &verdict(Outcome::Failed { reason: "it diverged".into() }));
    assert_eq!(spans[0].error.as_deref(), Some("it diverged"));
    assert_eq!(spans[1].error, None);
}
