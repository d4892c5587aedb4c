//! Properties of whole datasets: every row accounted for, no order dependence, decisions that last, no leak.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::json;

use super::*;
use crate::record::{Kind, derive_seed, prompt_hash};

fn workloads() -> Vec<WorkloadView> {
    vec![WorkloadView { name: "w".into(), house_rules: "Reply in JSON.".into() }]
}

fn row(offset: i64, messages: &[Message]) -> QueryRow {
    QueryRow {
        coordinates: Coordinates { topic: "t".into(), partition: (offset % 3) as i32, offset, record_index: 0 },
        kind: Kind::Call,
        ingest_day: 100,
        event_time_us: 1_772_366_400_000_000 + offset,
        request_id: Some(format!("r-{offset}")),
        trace_id: None,
        conversation_id: None,
        workload: Some("w".into()),
        tenant: None,
        feedback: None,
        prompt_hash: prompt_hash(messages, None),
        messages: serde_json::to_string(messages).unwrap(),
        tools: None,
        train_ok: true,
        reason: None,
        redacted: false,
        truncated: false,
    }
}

fn ask(text: &str) -> Vec<Message> {
    vec![Message::text("system", "You help."), Message::text("user", format!("{text}\nReply in JSON."))]
}

/// A question that shares next to nothing with another number's.
fn question(i: usize) -> String {
    let word = |j: usize| {
        let mut seed = derive_seed(9, &[&i.to_string(), &j.to_string()]);
        let letter = |_| {
            let c = (b'a' + (seed % 26) as u8) as char;
            seed /= 26;
            c
        };
        (0..7).map(letter).collect::<String>()
    };
    (0..8).map(word).collect::<Vec<_>>().join(" ")
}

fn questions(n: usize) -> Vec<QueryRow> {
    (0..n).map(|i| row(i as i64, &ask(&question(i)))).collect()
}

fn run(rows: Vec<QueryRow>, known: Vec<SplitRow>) -> Assembled {
    assemble(rows, known, &workloads(), &Settings::default(), "r1", 1)
}

fn all(assembled: &Assembled) -> Vec<&Prompt> {
    let parts = assembled.train.iter().chain(&assembled.gate).chain(&assembled.audit);
    parts.collect()
}

fn split_of(assembled: &Assembled, messages: &[Message]) -> Split {
    let hash = prompt_hash(messages, None);
    assembled.new_splits.iter().find(|row| row.prompt_hash == hash).expect("a decision").split
}

fn assert_all_rows_accounted(assembled: &Assembled) {
    let excluded: u64 = assembled.excluded.values().sum();
    assert_eq!(assembled.rows, excluded + all(assembled).len() as u64, "{:?}", assembled.excluded);
}

/// Numbers of questions by the split that they get.
fn in_split(split: Split) -> Vec<usize> {
    (0..400).filter(|&i| Split::of(&prompt_hash(&ask(&question(i)), None), &Settings::default()) == split).collect()
}

/// Two questions and a third that is near both.
fn bridge(a: usize, b: usize) -> (Vec<Message>, Vec<Message>, Vec<Message>) {
    let (left, right, shared) = (question(a), question(b), (900..902).map(question).collect::<Vec<_>>().join(" "));
    let half = |text: &str| text.split(' ').take(3).collect::<Vec<_>>().join(" ");
    (
        ask(&format!("{} {shared} {}", half(&left), half(&question(907)))),
        ask(&format!("{} {shared} {}", half(&question(908)), half(&right))),
        ask(&format!("{} {shared} {}", half(&left), half(&right))),
    )
}

#[test]
fn every_excluded_row_has_its_reason() {
    let mut rows = questions(20);
    let with = |offset: i64, change: &dyn Fn(&mut QueryRow)| {
        let mut row = row(offset, &ask(&question(500 + offset as usize)));
        change(&mut row);
        row
    };
    let untrainable = |reason: &'static str| {
        move |row: &mut QueryRow| {
            row.train_ok = false;
            row.reason = Some(reason.into());
        }
    };
    let text =
        |messages: Vec<Message>| move |row: &mut QueryRow| row.messages = serde_json::to_string(&messages).unwrap();
    for (i, reason) in ["self", "redacted", "opt_out", "failed", "cached"].into_iter().enumerate() {
        rows.push(with(100 + i as i64, &untrainable(reason)));
    }
    rows.push(with(110, &|row| row.kind = Kind::Feedback));
    rows.push(with(111, &|row| row.truncated = true));
    rows.push(with(112, &text(ask(&"long ".repeat(8000)))));
    rows.push(with(113, &text(vec![Message::text("user", " \n")])));
    rows.push(with(114, &text(vec![])));
    rows.push(with(115, &text(vec![Message::text("system", "only")])));
    rows.push(with(116, &|row| row.messages = "{".into()));
    rows.push(with(117, &|row| row.workload = Some("bare".into())));
    rows.push(with(118, &|row| row.workload = None));
    rows.push(row(119, &ask(&question(3))));
    rows.push(row(120, &ask(&format!("{}!", question(4)))));
    let found = run(rows, vec![]);
    let expected: BTreeMap<String, u64> = [
        ("self", 1),
        ("redacted", 1),
        ("opt_out", 1),
        ("failed", 1),
        ("cached", 1),
        ("feedback_unmatched", 1),
        ("truncated", 1),
        ("too_long", 1),
        ("empty", 2),
        ("no_user_turn", 1),
        ("bad_messages", 1),
        ("no_rules", 2),
        ("duplicate", 1),
        ("near_duplicate", 1),
    ]
    .map(|(reason, n)| (reason.to_owned(), n))
    .into();
    assert_eq!(found.excluded, expected);
    assert_all_rows_accounted(&found);
    assert_eq!(all(&found).iter().map(|prompt| prompt.count).sum::<u64>(), 22);
}

#[test]
fn the_order_of_the_rows_does_not_matter() {
    let (a, b, both) = bridge(1, 2);
    let mut rows = questions(300);
    rows.extend((0..60).map(|i| row(400 + i, &ask(&format!("{} please", question(i as usize * 3))))));
    rows.extend([row(500, &a), row(501, &b), row(502, &both)]);
    rows.extend((0..20).map(|i| row(600 + i, &ask(&question(i as usize)))));
    let known = run(rows[..150].to_vec(), vec![]).new_splits;
    let straight = run(rows.clone(), known.clone());
    for seed in 0..5u64 {
        let key = |row: &QueryRow| derive_seed(seed, &[&row.coordinates.offset.to_string()]);
        let (mut shuffled, mut shuffled_known) = (rows.clone(), known.clone());
        shuffled.sort_by_key(key);
        shuffled_known.sort_by_key(|row| derive_seed(seed, &[&row.prompt_hash]));
        assert_eq!(run(shuffled, shuffled_known), straight);
    }
    assert_all_rows_accounted(&straight);
}

#[test]
fn splits_follow_the_hash_at_the_boundaries_set() {
    let rows = questions(1000);
    let found = run(rows.clone(), vec![]);
    assert!(found.new_splits.iter().all(|row| row.split == Split::of(&row.cluster, &Settings::default())));
    let share = |n: usize| n as f64 / 1000.0;
    assert!((share(found.train.len()) - 0.80).abs() < 0.04, "{}", found.train.len());
    assert!((share(found.gate.len()) - 0.15).abs() < 0.04, "{}", found.gate.len());
    let settings = Settings { train_below: 28, gate_below: 85, ..Settings::default() };
    let found = assemble(rows, vec![], &workloads(), &settings, "r", 1);
    assert!((share(found.train.len()) - 0.28).abs() < 0.05, "{}", found.train.len());
    // blake3("abc") begins 64 37 b3 ac 38 46 51 33: read little-endian, modulo 100.
    let place = u64::from_le_bytes([0x64, 0x37, 0xb3, 0xac, 0x38, 0x46, 0x51, 0x33]) % 100;
    let at = |train_below: u8, gate_below: u8| {
        Split::of("abc", &Settings { train_below, gate_below, ..Settings::default() })
    };
    assert_eq!(at(place as u8 + 1, 99), Split::Train);
    assert_eq!(at(place as u8, place as u8 + 1), Split::Gate);
    assert_eq!(at(place as u8 - 1, place as u8), Split::Audit);
}

#[test]
fn a_decision_once_made_is_kept() {
    let first = run(questions(200), vec![]);
    let other = Settings { train_below: 10, gate_below: 20, ..Settings::default() };
    let second = assemble(questions(260), first.new_splits.clone(), &workloads(), &other, "r2", 1);
    assert_eq!(second.new_splits.len(), 60);
    assert!(second.new_splits.iter().all(|row| row.round == "r2"));
    let before: BTreeSet<&str> = first.train.iter().map(|p| p.prompt_hash.as_str()).collect();
    let after: BTreeSet<&str> = second.train.iter().map(|p| p.prompt_hash.as_str()).collect();
    assert!(before.is_subset(&after));
}

#[test]
fn near_duplicates_share_a_cluster_also_across_rounds_and_when_their_rows_are_gone() {
    let gate = in_split(Split::Gate)[0];
    let original = ask(&question(gate));
    let twin = ask(&format!("Please, {}", question(gate)));
    let first = run(vec![row(1, &original)], vec![]);
    assert_eq!(first.gate.len(), 1);
    let mut failed = row(1, &original);
    failed.train_ok = false;
    failed.reason = Some("failed".into());
    for old in [row(1, &original), failed] {
        let second = run(vec![old, row(2, &twin)], first.new_splits.clone());
        assert_eq!(second.new_splits.len(), 1);
        assert_eq!(second.new_splits[0].cluster, prompt_hash(&original, None));
        assert_eq!(split_of(&second, &twin), Split::Gate);
        assert_eq!((second.train.len(), second.gate.len()), (0, 1), "one prompt of a gate cluster");
    }
}

#[test]
fn a_prompt_near_two_splits_is_used_by_none() {
    let settings = Settings::default();
    let splits = |(a, b, _): &(Vec<Message>, Vec<Message>, Vec<Message>)| {
        [a, b].map(|m| Split::of(&prompt_hash(m, None), &settings))
    };
    let pairs: Vec<_> = (0..40).map(|i| bridge(2 * i, 2 * i + 1)).collect();
    let apart = pairs.iter().find(|pair| splits(pair) == [Split::Train, Split::Gate]).expect("a pair in two splits");
    // Offsets of one partition, so that the bridge is the last.
    let found = run(vec![row(0, &apart.0), row(3, &apart.1), row(6, &apart.2)], vec![]);
    assert_eq!(found.excluded.get("straddles"), Some(&1));
    assert_eq!(split_of(&found, &apart.2), Split::None);
    assert!(all(&found).iter().all(|prompt| prompt.prompt_hash != prompt_hash(&apart.2, None)));
    let again = run(vec![row(6, &apart.2)], found.new_splits.clone());
    assert!(all(&again).is_empty(), "and that stays so");
    let together = pairs.iter().find(|pair| splits(pair) == [Split::Train, Split::Train]).expect("a pair in one split");
    let found = run(vec![row(0, &together.0), row(3, &together.1), row(6, &together.2)], vec![]);
    assert_eq!((found.excluded.get("straddles"), split_of(&found, &together.2)), (None, Split::Train));
}

#[test]
fn turns_of_one_conversation_share_a_cluster() {
    let turn = |messages: &[Message], more: &[(&str, &str)]| {
        let mut messages = messages.to_vec();
        messages.extend(more.iter().map(|(role, text)| Message::text(*role, *text)));
        messages
    };
    let one = vec![Message::text("user", question(11))];
    let two = turn(&one, &[("assistant", "Well."), ("user", &question(12))]);
    let three = turn(&two, &[("assistant", "Oh."), ("user", &question(13))]);
    let other = vec![Message::text("user", question(14))];
    let found = run(vec![row(0, &three), row(3, &one), row(6, &two), row(9, &other)], vec![]);
    let clusters: BTreeSet<&str> = found.new_splits.iter().map(|row| row.cluster.as_str()).collect();
    assert_eq!(clusters.len(), 2, "word for word, whatever the order: {:?}", found.new_splits);

    let mut rows: Vec<QueryRow> = (0..30).map(|i| row(i, &ask(&question(i as usize)))).collect();
    rows.iter_mut().for_each(|row| row.conversation_id = Some(format!("c{}", row.coordinates.offset % 2)));
    let found = run(rows.clone(), vec![]);
    let clusters: BTreeSet<&str> = found.new_splits.iter().map(|row| row.cluster.as_str()).collect();
    assert_eq!(clusters.len(), 2, "by id");
    rows.iter_mut().for_each(|row| row.tenant = Some(row.coordinates.offset.to_string()));
    let clusters: usize =
        run(rows, vec![]).new_splits.iter().map(|row| row.cluster.clone()).collect::<BTreeSet<_>>().len();
    assert_eq!(clusters, 30, "an id means nothing across tenants");
}

#[test]
fn greetings_do_not_make_one_conversation_of_all() {
    let chat = |i: usize| {
        vec![Message::text("user", "Hi"), Message::text("assistant", "Hello!"), Message::text("user", question(i))]
    };
    let mut rows = vec![row(0, &chat(0)[..1])];
    rows.extend((1..20).map(|i| row(i as i64, &chat(i))));
    let clusters: BTreeSet<String> = run(rows, vec![]).new_splits.into_iter().map(|row| row.cluster).collect();
    assert_eq!(clusters.len(), 20);
}

#[test]
fn steps_of_an_agent_are_one_cluster_and_all_of_them_train() {
    let train = in_split(Split::Train)[0];
    let mut messages = ask(&question(train));
    let first = row(0, &messages);
    let call = json!({"role": "assistant", "content": null, "tool_calls": [{"id": "1"}]});
    messages.push(serde_json::from_value(call).unwrap());
    messages.push(Message::text("tool", "42"));
    let found = run(vec![first, row(3, &messages)], vec![]);
    assert_eq!((found.train.len(), found.train.clusters().len()), (2, 1));
}

#[test]
fn too_many_training_prompts_are_drawn_with_the_seed() {
    let settings = Settings { max_train_prompts: 50, ..Settings::default() };
    let run = |seed| assemble(questions(200), vec![], &workloads(), &settings, "r", seed);
    let (a, b) = (run(1), run(2));
    assert_eq!((a.train.len(), b.train.len()), (50, 50));
    assert_eq!(a, run(1));
    assert_ne!(a.train, b.train);
    assert_eq!((&a.gate, &a.new_splits), (&b.gate, &b.new_splits), "the seed decides nothing else");
    assert_all_rows_accounted(&a);
}

#[test]
fn old_rows_are_left_out_but_still_guard_their_split() {
    let settings = Settings { lookback_days: 7, ..Settings::default() };
    let gate = in_split(Split::Gate)[0];
    let first = run(vec![row(0, &ask(&question(gate)))], vec![]);
    let mut old = row(0, &ask(&question(gate)));
    old.ingest_day = 93;
    let rows = vec![old, row(3, &ask(&format!("Please {}", question(gate))))];
    let found = assemble(rows, first.new_splits, &workloads(), &settings, "r", 1);
    assert_eq!(found.excluded.get("old"), Some(&1));
    assert_eq!((found.train.len(), found.gate.len()), (0, 1));
}

#[test]
fn late_feedback_joins_the_call_that_it_means() {
    let said = |offset: i64, value: &str, names: &dyn Fn(&mut QueryRow)| {
        let mut row = row(offset, &[]);
        (row.kind, row.request_id, row.feedback) = (Kind::Feedback, None, Some(json!(value).to_string()));
        names(&mut row);
        row
    };
    let numbers = in_split(Split::Train);
    let mut rows: Vec<QueryRow> = (0..6).map(|i| row(i as i64, &ask(&question(numbers[i])))).collect();
    for row in &mut rows[3..] {
        (row.trace_id, row.conversation_id) = (Some("trace".into()), Some("talk".into()));
    }
    rows[1].tenant = Some("acme".into());
    rows[2].feedback = Some("{\"thumb\": \"up\"}".into());
    rows.push(said(10, "late", &|row| row.request_id = Some("r-0".into())));
    rows.push(said(11, "again", &|row| row.request_id = Some("r-0".into())));
    rows.push(said(12, "of another tenant", &|row| {
        (row.request_id, row.tenant) = (Some("r-1".into()), Some("other".into()));
    }));
    rows.push(said(13, "by trace", &|row| row.trace_id = Some("trace".into())));
    rows.push(said(14, "in the middle", &|row| {
        row.conversation_id = Some("talk".into());
        row.event_time_us = 1_772_366_400_000_000 + 4;
    }));
    rows.push(said(15, "of no call", &|row| row.request_id = Some("r-99".into())));
    let found = run(rows, vec![]);
    let of = |i: usize| {
        let hash = prompt_hash(&ask(&question(numbers[i])), None);
        let prompts = all(&found);
        let prompt = prompts.into_iter().find(|prompt| prompt.prompt_hash == hash).unwrap();
        prompt.feedback.iter().map(|feedback| feedback.value.clone()).collect::<Vec<_>>()
    };
    assert_eq!(of(0), [json!("late"), json!("again")]);
    assert_eq!((of(1), of(3)), (vec![], vec![]));
    assert_eq!(of(2), [json!({"thumb": "up"})], "beside the call");
    assert_eq!(of(5), [json!("by trace")], "the last call before it");
    assert_eq!(of(4), [json!("in the middle")]);
    assert_eq!((found.excluded["feedback"], found.excluded["feedback_unmatched"]), (4, 2));
    assert_all_rows_accounted(&found);
}

#[test]
fn an_empty_log_is_an_empty_dataset() {
    let folder = tempfile::tempdir().unwrap();
    let found = run(vec![], vec![]);
    assert!(found.train.is_empty() && found.excluded.is_empty());
    let dataset = store(folder.path(), "r", Inputs::default(), found, &Settings::default(), 1).unwrap();
    let why = dataset.manifest.shortfall().unwrap();
    assert!(why.contains("0 training prompts"), "{why}");
}

fn stored(folder: &std::path::Path) -> Dataset {
    let rows = questions(120);
    let inputs = Inputs::of(BTreeMap::from([("queries".into(), 7)]), &rows);
    store(folder, "r1", inputs, run(rows, vec![]), &Settings::default(), 1).unwrap()
}

#[test]
fn a_stored_dataset_is_read_back_and_has_the_same_bytes_each_time() {
    let (a, b) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (dataset, _) = (stored(a.path()), stored(b.path()));
    for name in ["train.jsonl", "gate.jsonl", "audit.jsonl", "manifest.json"] {
        assert_eq!(std::fs::read(a.path().join(name)).unwrap(), std::fs::read(b.path().join(name)).unwrap(), "{name}");
    }
    let read = load(a.path()).unwrap();
    assert_eq!(read.manifest, dataset.manifest);
    assert_eq!((read.train, read.gate, read.audit), (dataset.train, dataset.gate, dataset.audit));
    assert_eq!(read.manifest.inputs.offsets["t/1"], OffsetRange { first: 1, last: 118 });
    assert_eq!(read.manifest.shortfall(), None);
}

#[test]
fn a_planted_gate_prompt_is_in_no_training_file() {
    let folder = tempfile::tempdir().unwrap();
    let canary = format!("{} zzcanaryzz", question(700));
    let hash_in_gate = |text: &str| Split::of(&prompt_hash(&ask(text), None), &Settings::default()) == Split::Gate;
    let text = (0..200).map(|i| format!("{canary} {i}")).find(|text| hash_in_gate(text)).unwrap();
    let mut rows = questions(120);
    rows.push(row(500, &ask(&text)));
    store(folder.path(), "r", Inputs::default(), run(rows, vec![]), &Settings::default(), 1).unwrap();
    let holds = |name: &str| std::fs::read_to_string(folder.path().join(name)).unwrap().contains("zzcanaryzz");
    assert_eq!(["gate.jsonl", "train.jsonl", "audit.jsonl", "manifest.json"].map(holds), [true, false, false, false]);
}

#[test]
fn files_that_were_changed_or_swapped_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let refusal = || load(folder.path()).unwrap_err().to_string();
    stored(folder.path());
    let (train, gate) = (std::fs::read(path("train.jsonl")).unwrap(), std::fs::read(path("gate.jsonl")).unwrap());
    std::fs::write(path("train.jsonl"), &gate).unwrap();
    assert!(refusal().contains("train.jsonl"), "{}", refusal());
    std::fs::write(path("train.jsonl"), &train).unwrap();
    load(folder.path()).unwrap();
    let manifest = std::fs::read_to_string(path("manifest.json")).unwrap();
    std::fs::write(path("manifest.json"), manifest.replace("\"seed\": 1", "\"seed\": 2")).unwrap();
    assert!(refusal().contains("manifest.json"), "{}", refusal());
    std::fs::remove_file(path("manifest.json")).unwrap();
    assert!(refusal().contains("manifest.json"), "{}", refusal());
}

#[test]
fn a_cluster_in_two_splits_is_refused_before_the_manifest_is_written() {
    let folder = tempfile::tempdir().unwrap();
    let mut found = run(questions(120), vec![]);
    let mut audit: Vec<Prompt> = found.audit.iter().cloned().collect();
    audit.push(found.train.iter().next().unwrap().clone());
    found.audit = SplitOf::new(audit);
    let error = store(folder.path(), "r", Inputs::default(), found, &Settings::default(), 1).unwrap_err();
    assert!(matches!(error, DatasetError::Leak { first: "train", second: "audit", .. }), "{error}");
    assert!(!folder.path().join("manifest.json").exists());
}

#[test]
fn settings_out_of_range_name_key_value_and_remedy() {
    Settings::default().validate().unwrap();
    let default = Settings::default;
    for (settings, key) in [
        (Settings { train_below: 0, ..default() }, "train_below is 0"),
        (Settings { gate_below: 80, ..default() }, "gate_below is 80"),
        (Settings { near_duplicate: f64::NAN, ..default() }, "near_duplicate is NaN"),
        (Settings { minhash_bands: 0, ..default() }, "minhash_bands is 0"),
        (Settings { shared_line_min: 1, ..default() }, "shared_line_min is 1"),
        (Settings { max_train_prompts: 5, ..default() }, "max_train_prompts is 5"),
    ] {
        let message = settings.validate().unwrap_err();
        assert!(message.starts_with(key), "{message}");
    }
}
