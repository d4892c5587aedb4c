//! What must not train, what an operator leaves out, and what a round takes when there is more than enough.

use serde_json::json;

use super::world::*;
use crate::dataset::{Dataset, Match, Settings, Split};
use crate::record::{Message, prompt_hash};
use crate::table::Name;

/// Questions of the training split, so that a test counts what it filters.
fn training(n: usize) -> Vec<Row> {
    let numbers = in_split(Split::Train).into_iter().take(n).enumerate();
    numbers.map(|(at, number)| row(at as i64, &ask(&question(number)))).collect()
}

fn excluded(dataset: &Dataset, reason: &str) -> u64 {
    dataset.manifest.excluded.get(reason).copied().unwrap_or(0)
}

#[test]
fn prompts_with_secrets_are_in_no_split_and_are_counted_by_kind() {
    let key = "AKIAQ3EGRIRBXQJ7W2NA";
    let mut rows = training(40);
    for (at, text) in [format!("why does {key} fail"), "mail bob@example.org".into(), format!("{key} for a@b.example")]
        .iter()
        .enumerate()
    {
        rows.push(row(100 + at as i64, &ask(&format!("{text} {}", question(500 + at)))));
        rows.push(row(200 + at as i64, &ask(&format!("{text} {}", question(500 + at)))));
    }
    let hidden = json!({ "feedback": { "correction": format!("use {key}") } });
    rows[0] = with(rows[0].clone(), hidden);
    let mut world = World::of(&rows);
    let found = world.night();
    assert_eq!((excluded(&found, "secrets"), found.train.len()), (6, 40));
    assert_eq!(found.manifest.masked, [("aws_access_key", 4), ("email", 4)].map(|(k, n)| (k.to_owned(), n)).into());
    for name in ["train.jsonl", "gate.jsonl", "audit.jsonl", "manifest.json"] {
        let text = std::fs::read_to_string(world.out("r1").join(name)).unwrap();
        assert!(!text.contains(key) && !text.contains("bob@example.org"), "{name}");
    }
    world.settings.allow_kinds = vec!["email".into()];
    let found = world.night();
    assert_eq!((excluded(&found, "secrets"), found.manifest.masked.get("email")), (4, None), "one kind is allowed");
}

#[test]
fn a_burst_of_one_user_is_quarantined_named_and_released() {
    let mut rows = training(60);
    for row in &mut rows[..20] {
        row.insert("user_hash".into(), "u-loud".into());
    }
    for row in &mut rows[20..30] {
        row.insert("user_hash".into(), "u-quiet".into());
    }
    let mut world = World::of(&rows);
    world.settings.max_user_hour = 15;
    let found = world.night();
    assert_eq!((excluded(&found, "burst"), found.train.len()), (20, 40));
    let [burst] = found.manifest.quarantine.as_slice() else { panic!("{:?}", found.manifest.quarantine) };
    assert_eq!((burst.user_hash.as_str(), burst.calls), ("u-loud", 20));
    world.settings.released_users = vec!["u-loud".into()];
    let found = world.night();
    assert_eq!((excluded(&found, "burst"), found.train.len(), found.manifest.quarantine.len()), (0, 60, 0));
    world.settings.max_user_prompts = 8;
    let found = world.night();
    assert_eq!((excluded(&found, "user_cap"), found.train.len()), (12 + 2, 46));
}

#[test]
fn the_operators_filter_is_an_expression_over_the_columns() {
    let mut rows = training(30);
    for row in &mut rows[..10] {
        row.insert("model".into(), "llama-3-8b".into());
    }
    rows[0].insert("status".into(), json!(201));
    let mut world = World::of(&rows);
    world.settings.filter = "model like 'llama%' and status = 200 -- only these".into();
    world.settings.validate().unwrap();
    let found = world.night();
    assert_eq!((found.train.len(), excluded(&found, "filter")), (9, 21));
    let refusal = |filter: &str| Settings { filter: filter.into(), ..Settings::default() }.validate().unwrap_err();
    assert!(
        refusal("modle = 'x'").starts_with("filter is no condition over table queries"),
        "{}",
        refusal("modle = 'x'")
    );
    assert!(refusal("event_time > now()").contains("asks for now"));
    for filter in ["status", "1 = 1) or (1 = 1", "select 1", "status = 200; drop table t"] {
        assert!(refusal(filter).contains("filter"), "{filter}: {}", refusal(filter));
    }
}

#[test]
fn workloads_are_told_by_what_the_record_holds() {
    let mut rows = training(30);
    for (at, row) in rows.iter_mut().enumerate() {
        row.insert("workload".into(), json!(null));
        match at % 3 {
            0 => drop(row.insert("extra".into(), json!({ "metadata": { "tags": ["mail"] } }))),
            1 => drop(row.insert("model".into(), "llama-3-8b".into())),
            _ => {}
        }
    }
    let mut world = World::of(&rows);
    world.workloads = vec![
        workload("mail", Match::Tag("mail".into())),
        workload("llama", Match::Model("llama-.*".into())),
        workload("none", Match::Name),
    ];
    let count =
        |dataset: &Dataset, name: &str| dataset.train.iter().filter(|p| p.workload.as_deref() == Some(name)).count();
    let found = world.night();
    assert_eq!((count(&found, "mail"), count(&found, "llama"), excluded(&found, "no_rules")), (10, 10, 10));
    // "You help." is the system prompt of every question.
    let help = hex::encode(<sha2::Sha256 as sha2::Digest>::digest("You help."));
    world.workloads = vec![workload("help", Match::SystemPrompt(help)), workload("rest", Match::Default)];
    assert_eq!(count(&world.night(), "help"), 30);
    world.workloads.remove(0);
    assert_eq!(count(&world.night(), "rest"), 30);
    world.workloads[0].has_rules = false;
    assert_eq!(excluded(&world.night(), "no_rules"), 30);
}

#[test]
fn the_newest_hours_are_kept_for_the_gate() {
    let mut rows = questions(200);
    let later = chrono::DateTime::from_timestamp_micros(1_772_366_400_000_000 + 5 * 3_600_000_000i64);
    for row in &mut rows[100..] {
        row.insert("event_time".into(), json!(later));
    }
    let mut world = World::of(&rows);
    world.settings.forward_hours = 2;
    let found = world.night();
    let newest = found.train.iter().map(|prompt| prompt.event_time_us).max().unwrap();
    let forward: Vec<i64> = found.gate.iter().filter(|p| p.is_forward).map(|p| p.event_time_us).collect();
    assert!(!forward.is_empty() && forward.iter().all(|time| *time > newest));
    assert!(found.gate.iter().any(|prompt| !prompt.is_forward));
    assert!(excluded(&found, "forward") > 50);
}

#[test]
fn a_rare_kind_of_traffic_is_not_drowned() {
    let mut rows = training(200);
    for row in &mut rows[..20] {
        row.insert("tenant".into(), "small".into());
    }
    let mut world = World::of(&rows);
    world.settings.max_train_prompts = 40;
    world.settings.replay_share = 0.0;
    let small = |dataset: &Dataset| dataset.train.iter().filter(|prompt| prompt.tenant.is_some()).count();
    let at = |world: &mut World, balance| {
        world.settings.balance = balance;
        small(&world.night())
    };
    assert_eq!((at(&mut world, 0.0), at(&mut world, 0.5), at(&mut world, 1.0)), (4, 10, 20));
}

#[test]
fn what_earlier_rounds_learnt_decides_what_is_drawn() {
    let rows = training(60);
    let hash = |at: usize| rows[at]["prompt_hash"].as_str().unwrap().to_owned();
    let mut world = World::of(&rows);
    world.settings.max_train_prompts = 40;
    world.settings.replay_share = 0.0;
    let scores = |at: usize, totals: &[f64]| -> Vec<serde_json::Value> {
        let score = |(sample, total): (usize, &f64)| {
            json!({ "purpose": "train", "round": "round-00001", "iteration": 1, "prompt_hash": hash(at), "sample": sample,
                "seed": "1", "text": "", "finish_reason": "stop", "total": total })
        };
        totals.iter().enumerate().map(score).collect()
    };
    let informative = (0..20).flat_map(|at| scores(at, &[0.0, 1.0]));
    let rows: Vec<_> = informative.chain((20..40).flat_map(|at| scores(at, &[0.5, 0.5]))).collect();
    world.block_on(async {
        let mut candidates = world.tables().open_one(Name::Candidates).await.unwrap();
        candidates.append_rows(&rows, &[]).await.unwrap();
    });
    let found = world.night();
    let drawn = [("informative", 20), ("new_cluster", 20)].map(|(name, n)| (name.to_owned(), n));
    assert_eq!(found.manifest.drawn, drawn.into());
    assert!(found.manifest.inputs.tables.contains_key("candidates"));
    world.settings.replay_share = 0.25;
    let found = world.night();
    assert_eq!(found.manifest.drawn.get("replay"), Some(&10));
    let settled = found.train.iter().filter(|prompt| (20..40).any(|at| hash(at) == prompt.prompt_hash)).count();
    assert!(settled > 0, "what taught nothing last time is looked at again now and then");
}

#[test]
fn the_language_is_told() {
    let numbers = in_split(Split::Train);
    let german =
        ask(&format!("Kannst du mir bitte erklären, warum der Himmel am Abend rot ist? {}", question(numbers[0])));
    let found = World::of(&[row(0, &german), row(3, &[Message::text("user", "1 + 1?")])]).night();
    let language = |messages: &[Message]| {
        let hash = prompt_hash(messages, None);
        all(&found).into_iter().find(|p| p.prompt_hash == hash).and_then(|p| p.language.clone())
    };
    assert_eq!(language(&german).as_deref(), Some("deu"));
    assert_eq!(language(&[Message::text("user", "1 + 1?")]), None);
}
