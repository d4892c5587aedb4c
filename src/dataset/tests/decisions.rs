//! Which rows count, which prompts belong together, and decisions that last.

use std::collections::BTreeMap;

use serde_json::json;

use super::world::*;
use crate::dataset::{Settings, Split};
use crate::record::{Message, derive_seed, prompt_hash};

#[test]
fn every_excluded_row_has_its_reason() {
    let mut rows = questions(20);
    let other = |offset: i64, columns| with(row(offset, &ask(&question(500 + offset as usize))), columns);
    let text = |offset: i64, messages: Vec<Message>| row(offset, &messages);
    for (i, reason) in ["self", "redacted", "opt_out", "failed", "cached"].into_iter().enumerate() {
        rows.push(other(100 + i as i64, json!({ "train_ok": false, "reason": reason })));
    }
    rows.push(other(110, json!({ "kind": "feedback" })));
    rows.push(other(111, json!({ "truncated": true })));
    rows.push(text(112, ask(&"long ".repeat(8000))));
    rows.push(text(113, vec![Message::text("user", " \n")]));
    rows.push(text(114, vec![]));
    rows.push(text(115, vec![Message::text("system", "only")]));
    rows.push(other(116, json!({ "messages": "no list" })));
    rows.push(other(117, json!({ "workload": "bare" })));
    rows.push(other(118, json!({ "workload": null })));
    rows.push(row(119, &ask(&question(3))));
    rows.push(row(120, &ask(&format!("{}!", question(4)))));
    rows.push(other(121, json!({ "prompt_hash": "of another's making" })));
    let found = World::of(&rows).night();
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
        ("bad_hash", 1),
        ("no_rules", 2),
        ("duplicate", 1),
        ("near_duplicate", 1),
    ]
    .map(|(reason, n)| (reason.to_owned(), n))
    .into();
    assert_eq!(found.manifest.excluded, expected);
    assert_eq!(all(&found).iter().map(|prompt| prompt.count).sum::<u64>(), 22);
}

#[test]
fn the_order_of_the_rows_does_not_matter() {
    let (a, b, both) = bridge(1, 2);
    let mut rows = questions(300);
    rows.extend((0..60).map(|i| row(400 + i, &ask(&format!("{} please", question(i as usize * 3))))));
    rows.extend([row(500, &a), row(501, &b), row(502, &both)]);
    rows.extend((0..20).map(|i| row(600 + i, &ask(&question(i as usize)))));
    let run = |rows: &[Row]| {
        let (first, second): (Vec<Row>, Vec<Row>) =
            rows.iter().cloned().partition(|row| row["offset"].as_i64() < Some(150));
        let mut world = World::of(&first);
        world.night();
        second.chunks(100).for_each(|rows| world.add(rows));
        (world.night(), world.decided())
    };
    let (straight, decided) = run(&rows);
    let key = |row: &Row| derive_seed(7, &[&row["offset"].to_string()]);
    rows.sort_by_key(key);
    let (shuffled, decided_too) = run(&rows);
    assert_eq!(decided, decided_too);
    assert_eq!((&shuffled.train, &shuffled.gate, &shuffled.audit), (&straight.train, &straight.gate, &straight.audit));
    assert_eq!(shuffled.manifest.excluded, straight.manifest.excluded);
}

#[test]
fn splits_follow_the_hash_at_the_boundaries_set() {
    let mut world = World::of(&questions(1000));
    let found = world.night();
    assert!(world.decided().values().all(|row| row.split == Split::of(&row.cluster, &Settings::default())));
    let share = |n: usize| n as f64 / 1000.0;
    assert!((share(found.train.len()) - 0.80).abs() < 0.04, "{}", found.train.len());
    assert!((share(found.gate.len()) - 0.15).abs() < 0.04, "{}", found.gate.len());
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
    let mut world = World::of(&questions(200));
    let first = world.night();
    let before = world.decided();
    world.settings = Settings { train_below: 10, gate_below: 20, ..Settings::default() };
    world.add(&questions(260)[200..]);
    let second = world.night();
    let after = world.decided();
    assert_eq!(after.len(), 260);
    assert!(before.iter().all(|(hash, row)| after[hash] == *row));
    assert_eq!(after.values().filter(|row| row.round == "r2").count(), 60);
    let later: Vec<&str> = second.train.iter().map(|p| p.prompt_hash.as_str()).collect();
    assert!(first.train.iter().all(|p| later.contains(&p.prompt_hash.as_str())));
}

#[test]
fn near_duplicates_share_a_cluster_also_across_rounds_and_when_their_rows_are_gone() {
    let gate = in_split(Split::Gate)[0];
    let original = ask(&question(gate));
    let twin = ask(&format!("Please, {}", question(gate)));
    let failed = with(row(1, &original), json!({ "train_ok": false, "reason": "failed" }));
    for old in [vec![row(1, &original)], vec![failed], vec![]] {
        let mut world = World::of(&[row(1, &original)]);
        assert_eq!(world.night().gate.len(), 1);
        world.replace(&[old, vec![row(2, &twin)]].concat());
        let second = world.night();
        let decided = &world.decided()[&prompt_hash(&twin, None)];
        assert_eq!((decided.cluster.as_str(), decided.split), (prompt_hash(&original, None).as_str(), Split::Gate));
        assert_eq!((second.train.len(), second.gate.len()), (0, 1), "one prompt of a gate cluster");
    }
}

#[test]
fn a_prompt_near_two_splits_is_used_by_none() {
    let splits = |(a, b, _): &(Vec<Message>, Vec<Message>, Vec<Message>)| {
        [a, b].map(|m| Split::of(&prompt_hash(m, None), &Settings::default()))
    };
    let pairs: Vec<_> = (0..40).map(|i| bridge(2 * i, 2 * i + 1)).collect();
    let apart = pairs.iter().find(|pair| splits(pair) == [Split::Train, Split::Gate]).expect("a pair in two splits");
    // Offsets of one partition, so that the bridge is the last.
    let mut world = World::of(&[row(0, &apart.0), row(3, &apart.1), row(6, &apart.2)]);
    // The outer two share 0.57 of their shingles, each of them 0.76 with the bridge.
    world.settings.near_duplicate = 0.65;
    let found = world.night();
    assert_eq!(found.manifest.excluded.get("straddles"), Some(&1));
    assert_eq!(world.split(&apart.2), Split::None);
    assert!(all(&found).iter().all(|prompt| prompt.prompt_hash != prompt_hash(&apart.2, None)));
    world.replace(&[row(6, &apart.2)]);
    assert!(all(&world.night()).is_empty(), "and that stays so");
    let together = pairs.iter().find(|pair| splits(pair) == [Split::Train, Split::Train]).expect("a pair in one split");
    let mut world = World::of(&[row(0, &together.0), row(3, &together.1), row(6, &together.2)]);
    world.settings.near_duplicate = 0.65;
    let found = world.night();
    assert_eq!((found.manifest.excluded.get("straddles"), world.split(&together.2)), (None, Split::Train));
}

fn turn(messages: &[Message], more: &[(&str, &str)]) -> Vec<Message> {
    let mut messages = messages.to_vec();
    messages.extend(more.iter().map(|(role, text)| Message::text(*role, *text)));
    messages
}

#[test]
fn turns_of_one_conversation_share_a_cluster() {
    let one = vec![Message::text("user", question(11))];
    let two = turn(&one, &[("assistant", "Well."), ("user", &question(12))]);
    let three = turn(&two, &[("assistant", "Oh."), ("user", &question(13))]);
    let other = vec![Message::text("user", question(14))];
    let mut world = World::of(&[row(0, &three), row(3, &one), row(6, &two), row(9, &other)]);
    world.night();
    assert_eq!(world.clusters(), 2, "word for word, whatever the order: {:?}", world.decided());
    world.add(&[row(12, &turn(&one, &[("assistant", "Another answer."), ("user", &question(15))]))]);
    world.night();
    assert_eq!(world.clusters(), 2, "also a night later, and where the answer differs");

    let talk = |columns: &dyn Fn(i64) -> serde_json::Value| -> Vec<Row> {
        (0..30).map(|i| with(row(i, &ask(&question(i as usize))), columns(i))).collect()
    };
    let mut world = World::of(&talk(&|i| json!({ "conversation_id": format!("c{}", i % 2) })));
    world.night();
    assert_eq!(world.clusters(), 2, "by id");
    let mut world = World::of(&talk(&|i| json!({ "conversation_id": format!("c{}", i % 2), "tenant": i.to_string() })));
    world.night();
    assert_eq!(world.clusters(), 30, "an id means nothing across tenants");
}

#[test]
fn greetings_do_not_make_one_conversation_of_all() {
    let chat = |i: usize| {
        vec![Message::text("user", "Hi"), Message::text("assistant", "Hello!"), Message::text("user", question(i))]
    };
    let mut rows = vec![row(0, &chat(0)[..1])];
    rows.extend((1..20).map(|i| row(i as i64, &chat(i))));
    let mut world = World::of(&rows);
    world.night();
    assert_eq!(world.clusters(), 20);
}

#[test]
fn steps_of_an_agent_are_one_cluster_and_all_of_them_train() {
    let train = in_split(Split::Train)[0];
    let mut messages = ask(&question(train));
    let first = row(0, &messages);
    let call = json!({"role": "assistant", "content": null, "tool_calls": [{"id": "1"}]});
    messages.push(serde_json::from_value(call).unwrap());
    messages.push(Message::text("tool", "42"));
    let found = World::of(&[first, row(3, &messages)]).night();
    assert_eq!((found.train.len(), found.train.clusters().len()), (2, 1));
}

#[test]
fn a_line_that_becomes_a_template_later_hides_no_near_duplicate() {
    let line = (700..705).map(question).collect::<Vec<_>>().join(" ");
    let carrying = |i: usize| ask(&format!("{line}\n{}", question(i)));
    let gate = (0..400).find(|&i| Split::of(&prompt_hash(&carrying(i), None), &Settings::default()) == Split::Gate);
    let gate = gate.unwrap();
    let mut world = World::of(&[row(0, &carrying(gate))]);
    world.night();
    let others = (0..40).filter(|i| *i != gate).take(30).enumerate();
    world.add(&others.map(|(at, i)| row(3 + 3 * at as i64, &carrying(i))).collect::<Vec<_>>());
    world.night();
    assert!(world.clusters() > 25, "the line is not compared: {}", world.clusters());
    let bare = ask(&format!("please {}", question(gate)));
    world.add(&[row(300, &bare)]);
    world.night();
    assert_eq!(world.decided()[&prompt_hash(&bare, None)].cluster, prompt_hash(&carrying(gate), None));
}

#[test]
fn too_many_training_prompts_are_drawn_with_the_seed() {
    let mut world = World::of(&questions(200));
    world.settings.max_train_prompts = 50;
    let a = world.night();
    let decided = world.decided();
    let again = world.night();
    world.seed = 2;
    let b = world.night();
    assert_eq!((a.train.len(), b.train.len()), (50, 50));
    assert_eq!(a.train, again.train);
    assert_ne!(a.train, b.train);
    assert_eq!((&a.gate, decided), (&b.gate, world.decided()), "the seed decides nothing else");
}

#[test]
fn the_newest_held_out_prompts_are_kept() {
    let mut world = World::of(&questions(300));
    world.settings.max_held_prompts = 10;
    let found = world.night();
    assert_eq!((found.gate.len(), found.audit.len()), (10, 10));
    let times: Vec<i64> = found.gate.iter().map(|prompt| prompt.event_time_us).collect();
    world.settings.max_held_prompts = 1000;
    let mut all: Vec<i64> = world.night().gate.iter().map(|prompt| prompt.event_time_us).collect();
    all.sort_unstable();
    assert!(times.iter().all(|time| all[all.len() - 10..].contains(time)), "{times:?} of {all:?}");
}

#[test]
fn old_rows_are_left_out_but_still_guard_their_split() {
    let gate = in_split(Split::Gate)[0];
    let original = ask(&question(gate));
    let mut world = World::of(&[row(0, &original)]);
    world.settings.lookback_days = 7;
    world.night();
    let old = with(row(0, &original), json!({ "ingest_date": "2026-03-04" }));
    world.replace(&[old, row(3, &ask(&format!("Please {}", question(gate))))]);
    let found = world.night();
    assert_eq!(found.manifest.excluded.get("old"), Some(&1));
    assert_eq!((found.train.len(), found.gate.len()), (0, 1));
}

#[test]
fn late_feedback_joins_the_call_that_it_means() {
    let said = |offset: i64, value: &str, names: serde_json::Value| {
        let bare = json!({ "kind": "feedback", "request_id": null, "feedback": value });
        with(with(row(offset, &[]), bare), names)
    };
    let numbers = in_split(Split::Train);
    let mut rows: Vec<Row> = (0..6).map(|i| row(i as i64, &ask(&question(numbers[i])))).collect();
    for row in &mut rows[3..] {
        row.insert("trace_id".into(), "trace".into());
        row.insert("conversation_id".into(), "talk".into());
    }
    rows[1].insert("tenant".into(), "acme".into());
    rows[2].insert("feedback".into(), json!({ "thumb": "up" }));
    rows.push(said(10, "late", json!({ "request_id": "r-0" })));
    rows.push(said(11, "again", json!({ "request_id": "r-0" })));
    rows.push(said(12, "of another tenant", json!({ "request_id": "r-1", "tenant": "other" })));
    rows.push(said(13, "by trace", json!({ "trace_id": "trace" })));
    let middle = chrono::DateTime::from_timestamp_micros(1_772_366_400_000_000 + 4);
    rows.push(said(14, "in the middle", json!({ "conversation_id": "talk", "event_time": middle })));
    rows.push(said(15, "of no call", json!({ "request_id": "r-99" })));
    let found = World::of(&rows).night();
    let of = |i: usize| {
        let hash = prompt_hash(&ask(&question(numbers[i])), None);
        let prompt = all(&found).into_iter().find(|prompt| prompt.prompt_hash == hash).unwrap();
        prompt.feedback.iter().map(|feedback| feedback.value.clone()).collect::<Vec<_>>()
    };
    assert_eq!(of(0), [json!("late"), json!("again")]);
    assert_eq!((of(1), of(3)), (vec![], vec![]));
    assert_eq!(of(2), [json!({"thumb": "up"})], "beside the call");
    assert_eq!(of(5), [json!("by trace")], "the last call before it");
    assert_eq!(of(4), [json!("in the middle")]);
    assert_eq!((found.manifest.excluded["feedback"], found.manifest.excluded["feedback_unmatched"]), (4, 2));
}

#[test]
fn a_rated_answer_comes_with_its_prompt_where_that_trains() {
    let (train, gate) = (in_split(Split::Train), in_split(Split::Gate));
    let call = |offset: i64, number: usize, response: &str, feedback: serde_json::Value| {
        with(row(offset, &ask(&question(number))), json!({ "response": response, "feedback": feedback }))
    };
    let rows = [
        call(0, train[0], "liked", json!({ "thumb": "up" })),
        call(1, train[0], "said to be long", json!({ "comment": "long" })),
        call(2, train[0], "disliked", json!({ "thumb": "down" })),
        call(3, train[1], "write to bob@example.org", json!({ "thumb": "up" })),
        call(4, gate[0], "before the gate", json!({ "thumb": "up" })),
        call(5, train[2], "rated late", json!(null)),
        with(row(6, &[]), json!({ "kind": "feedback", "request_id": "r-5", "feedback": { "rating": 4, "max": 5 } })),
    ];
    let found = World::of(&rows).night();
    let of = |number: usize| {
        let hash = prompt_hash(&ask(&question(number)), None);
        let prompt = all(&found).into_iter().find(|prompt| prompt.prompt_hash == hash).unwrap();
        let said = prompt.feedback.iter().map(|said| (said.response.as_deref(), said.rating()));
        said.map(|(answer, rating)| (answer.map(str::to_owned), rating)).collect::<Vec<_>>()
    };
    let answer = |text: &str| Some(text.to_owned());
    assert_eq!(of(train[0]), [(answer("liked"), Some(1.0)), (None, None), (answer("disliked"), Some(0.0))]);
    assert_eq!(of(train[1]), [(None, Some(1.0))], "an answer with personal data stays where it is");
    assert_eq!(of(gate[0]), [(None, Some(1.0))], "the gate has no use for it");
    assert_eq!(of(train[2]), [(answer("rated late"), Some(0.75))]);
}

#[test]
fn an_index_that_was_lost_is_made_anew_and_decisions_of_an_older_taod_are_kept() {
    let gate = in_split(Split::Gate)[0];
    let original = ask(&question(gate));
    let twin = |word: &str| ask(&format!("{word} {}", question(gate)));
    let mut world = World::of(&[row(0, &original)]);
    world.night();
    std::fs::remove_dir_all(world.folder.path().join("prompts")).unwrap();
    world.add(&[row(3, &twin("please"))]);
    world.night();
    assert_eq!(world.split(&twin("please")), Split::Gate);

    // An older taod stored four columns; only the decision tells that this is no training prompt.
    let mut world = World::of(&[row(0, &ask(&question(7)))]);
    let decision = json!({ "prompt_hash": prompt_hash(&ask(&question(7)), None), "split": "gate", "round": "old",
        "cluster": prompt_hash(&ask("gone"), None) });
    world.block_on(async {
        let mut splits = world.tables().open_one(crate::table::Name::Splits).await.unwrap();
        splits.append_rows(&[decision], &[]).await.unwrap();
    });
    world.add(&[row(3, &ask(&format!("oh {}", question(7))))]);
    let found = world.night();
    let clusters: Vec<String> = world.decided().into_values().map(|row| row.cluster).collect();
    assert_eq!(clusters, vec![prompt_hash(&ask("gone"), None); 2]);
    assert_eq!((found.train.len(), found.gate.len()), (0, 1));
}
