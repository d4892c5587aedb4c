//! Prompts that are made: of which logged ones, what is kept of them, and where they stand among all prompts.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use super::world::*;
use crate::dataset::synthetic::{self, Ask, Draft, Drafts, Need};
use crate::dataset::{Dataset, DatasetError, Freezing, Prompt, Split};
use crate::record::prompt_hash;
use crate::table::Name;

/// A night with so many training prompts, and some of the other splits.
fn world(train: usize) -> (World, Dataset) {
    let numbers = in_split(Split::Train).into_iter().take(train);
    let numbers = numbers.chain(in_split(Split::Gate).into_iter().take(10));
    let rows: Vec<Row> = numbers.enumerate().map(|(at, number)| row(at as i64, &ask(&question(number)))).collect();
    let mut world = World::of(&rows);
    world.settings.synthetic.below = 100;
    let dataset = world.night();
    (world, dataset)
}

fn asks(world: &World, dataset: &Dataset, wanted: usize, wave: usize) -> Vec<Ask> {
    let need = [Need { workload: "w".into(), logged: dataset.train.len(), wanted }];
    let how = (&world.settings.synthetic, world.workloads.as_slice());
    synthetic::asks(&dataset.train, |_| true, &need, how, (world.seed, wave)).0
}

fn drafts(asks: &[Ask], answers: &[String]) -> Drafts {
    let drafts = asks.iter().cycle().zip(answers).map(|(ask, answer)| ask.draft(answer, !answer.ends_with('…')));
    Drafts { drafts: drafts.collect(), tokens: 7 }
}

/// Stores drafts of the first round and returns what was made and where it lies.
fn store(
    world: &World,
    dataset: &Dataset,
    written: &Drafts,
    wanted: usize,
) -> (synthetic::Manifest, std::path::PathBuf) {
    let out = world.folder.path().join("made");
    let index = world.folder.path().join("prompts");
    let freezing = Freezing {
        round: "r1",
        settings: &world.settings,
        workloads: &world.workloads,
        seed: world.seed,
        index: &index,
    };
    let needs = [Need { workload: "w".into(), logged: dataset.train.len(), wanted }];
    let made = (written, needs.as_slice(), dataset.manifest.hash.as_str());
    (world.block_on(synthetic::store(&world.tables(), freezing, made, &out)).unwrap(), out)
}

#[test]
fn what_is_wanted_ends_at_the_bound_and_at_the_share() {
    let (_, dataset) = world(12);
    let wanted = |below, share| {
        let settings = synthetic::Settings { below, share, ..Default::default() };
        settings.validate().unwrap();
        synthetic::needs(&dataset.train, &settings, |_| true).first().map_or(0, |need| need.wanted)
    };
    assert_eq!((wanted(0, 0.5), wanted(12, 0.5), wanted(15, 0.5), wanted(100, 0.5)), (0, 0, 3, 12));
    assert_eq!((wanted(100, 0.25), wanted(100, 0.9)), (4, 88));
    let first = dataset.train.prompts()[0].prompt_hash.clone();
    let settings = synthetic::Settings { below: 100, ..Default::default() };
    let needs = synthetic::needs(&dataset.train, &settings, |prompt| prompt.prompt_hash != first);
    assert_eq!((needs[0].logged, needs[0].wanted), (11, 11), "what may not train is no source and no prompt");
    for (key, bad) in [
        ("share", synthetic::Settings { share: 1.0, ..Default::default() }),
        ("examples", synthetic::Settings { examples: 0, ..Default::default() }),
        ("temperature", synthetic::Settings { temperature: 0.0, ..Default::default() }),
    ] {
        assert!(bad.validate().unwrap_err().starts_with(key));
    }
}

#[test]
fn a_question_shows_training_prompts_alone_and_the_seed_decides_which() {
    let (world, dataset) = world(12);
    let ours = asks(&world, &dataset, 30, 1);
    let key = |asks: &[Ask]| asks.iter().map(|ask| ask.sources.clone()).collect::<Vec<_>>();
    assert_eq!(key(&ours), key(&asks(&world, &dataset, 30, 1)));
    assert_ne!(key(&ours), key(&asks(&world, &dataset, 30, 2)), "another wave asks otherwise");
    let train: BTreeSet<&str> = dataset.train.iter().map(|prompt| prompt.prompt_hash.as_str()).collect();
    let held: Vec<String> = dataset.gate.iter().chain(&dataset.audit).map(|p| p.messages[1].plain_text()).collect();
    assert!(!held.is_empty());
    let mut firsts = BTreeSet::new();
    for ask in &ours {
        let distinct: BTreeSet<&String> = ask.sources.iter().collect();
        assert!(distinct.len() == 4 && ask.sources.iter().all(|source| train.contains(source.as_str())));
        let text = ask.prompt.messages[0].plain_text();
        assert!(!text.contains("Reply in JSON."), "house rules are not the model's to write: {text}");
        assert!(held.iter().all(|held| !text.contains(held.lines().next().unwrap())));
        firsts.insert(&ask.sources[0]);
    }
    assert_eq!((firsts.len(), ours.len()), (12, 30), "each prompt has its turn");
}

#[test]
fn a_made_prompt_is_new_stands_with_its_source_and_guards_its_place() {
    let (mut world, dataset) = world(12);
    let (train, gate) = (&dataset.train.prompts()[3], &dataset.gate.prompts()[2]);
    let of = |prompt: &Prompt| format!("{}!", prompt.messages[1].plain_text().lines().next().unwrap());
    // Its own hash would put it before the gate: it stands with its source all the same.
    let asked = asks(&world, &dataset, 1, 1);
    let fresh: Vec<String> = (800..1200).map(question).collect();
    let answers = [
        of(train),
        of(gate),
        fresh[0].clone(),
        format!("{} please", fresh[0]),
        format!("mail bob@example.org {}", fresh[1]),
        format!("{}…", fresh[2]),
        " ".into(),
        fresh[3].clone(),
        fresh[4].clone(),
    ];
    let written = drafts(&asked, &answers);
    let (manifest, out) = store(&world, &dataset, &written, 2);
    let made = &manifest.workloads["w"];
    let dropped: BTreeMap<String, u64> =
        [("near_duplicate", 3), ("secrets", 1), ("cut", 1), ("empty", 1), ("spare", 1)]
            .map(|(n, c)| (n.into(), c))
            .into();
    assert_eq!((&made.dropped, made.made, manifest.prompts, manifest.tokens), (&dropped, 2, 2, 7));

    let split = synthetic::extended(&out, &dataset.train).unwrap();
    let children: Vec<&Prompt> = split.iter().filter(|prompt| prompt.is_synthetic()).collect();
    assert_eq!((split.len(), children.len()), (14, 2));
    let source = dataset.train.iter().find(|p| p.prompt_hash == asked[0].sources[0]).unwrap();
    for (child, text) in children.iter().zip([&fresh[0], &fresh[3]]) {
        assert_eq!(child.messages, ask(text), "with the system prompt and the house rules of its source");
        assert_eq!((&child.cluster, &child.sources, child.count), (&source.cluster, &asked[0].sources, 0));
        let decided = &world.decided()[&child.prompt_hash];
        assert_eq!((decided.split, &decided.cluster), (Split::Train, &source.cluster));
    }
    let shown = synthetic::Explained(&manifest).to_string();
    assert!(shown.contains("2 made of 2 wanted, beside 12 logged") && shown.contains("near_duplicate: 3"), "{shown}");

    // A logged prompt near a child trains, wherever its own hash would have put it.
    let near: Vec<_> = (0..60).map(|i| ask(&format!("{} {i}", fresh[0]))).collect();
    let alone = |messages: &Vec<_>| Split::of(&prompt_hash(messages, None), &world.settings);
    let gated: Vec<_> = near.into_iter().filter(|messages| alone(messages) != Split::Train).take(3).collect();
    assert_eq!(gated.len(), 3);
    world.add(&gated.iter().enumerate().map(|(at, messages)| row(500 + at as i64, messages)).collect::<Vec<_>>());
    let next = world.night();
    assert!(gated.iter().all(|messages| world.split(messages) == Split::Train));
    // A child is no row of the log: the next night knows it and has not got it.
    assert!(all(&next).iter().all(|prompt| !prompt.is_synthetic() && prompt.prompt_hash != children[0].prompt_hash));
}

#[test]
fn a_stage_that_was_interrupted_ends_with_the_same_bytes_and_rows() {
    let (world, dataset) = world(12);
    let fresh: Vec<String> = (800..806).map(question).collect();
    let written = drafts(&asks(&world, &dataset, 6, 1), &fresh);
    let (manifest, out) = store(&world, &dataset, &written, 6);
    let bytes = std::fs::read(out.join("prompts.jsonl")).unwrap();
    let rows = world.decided().len();
    let version = || world.block_on(async { world.tables().open_one(Name::Splits).await.unwrap().version() });
    let before = version();
    // Its rows had landed and its manifest had not.
    std::fs::remove_file(out.join("manifest.json")).unwrap();
    let (again, _) = store(&world, &dataset, &written, 6);
    assert_eq!((&again, version(), world.decided().len()), (&manifest, before, rows));
    assert_eq!(std::fs::read(out.join("prompts.jsonl")).unwrap(), bytes);
    let resumed = world.block_on(synthetic::resume(&world.tables(), "r1", &out)).unwrap();
    assert_eq!(resumed, Some(manifest));
    assert_eq!(world.block_on(synthetic::resume(&world.tables(), "r2", &world.folder.path().join("x"))).unwrap(), None);
}

#[test]
fn children_are_found_by_any_source_and_strays_are_refused() {
    let (world, dataset) = world(12);
    let asked = asks(&world, &dataset, 3, 1);
    let fresh: Vec<String> = (800..803).map(question).collect();
    let (_, out) = store(&world, &dataset, &drafts(&asked, &fresh), 3);
    let split = synthetic::extended(&out, &dataset.train).unwrap();
    for source in dataset.train.iter().map(|prompt| &prompt.prompt_hash) {
        let found = world.block_on(synthetic::children(&world.tables(), &HashSet::from([source.clone()]))).unwrap();
        let expected = split.iter().filter(|prompt| prompt.sources.contains(source));
        assert_eq!(found, expected.map(|prompt| prompt.prompt_hash.clone()).collect());
    }
    let path = out.join("prompts.jsonl");
    let text = std::fs::read_to_string(&path).unwrap();
    let exchange = |old: &str, new: &str| {
        let forged = text.replace(old, new);
        assert_ne!(forged, text, "{old}");
        std::fs::write(&path, forged).unwrap();
    };
    // The manifest made to fit, as by somebody who means it.
    let fit = || {
        let manifest = out.join("manifest.json");
        let mut told: serde_json::Value = crate::durable::read_json(&manifest).unwrap();
        told["sha256"] = crate::durable::sha256_file(&path).unwrap().into();
        crate::durable::write_json(&manifest, &told).unwrap();
    };
    let refused = || {
        let error = synthetic::extended(&out, &dataset.train).unwrap_err();
        assert!(matches!(error, DatasetError::Orphan { .. }), "{error}");
    };
    let stranger = &dataset.gate.prompts()[0];
    exchange(&asked[0].sources[1], &stranger.prompt_hash);
    assert!(matches!(synthetic::extended(&out, &dataset.train), Err(DatasetError::Changed { .. })));
    fit();
    refused();
    // Its sources train, and it stands where the gate's prompts are.
    let child = split.iter().find(|prompt| prompt.is_synthetic()).unwrap();
    let field = |cluster: &str| format!("\"cluster\":\"{cluster}\"");
    exchange(&field(&child.cluster), &field(&stranger.cluster));
    fit();
    refused();
    std::fs::write(&path, &text).unwrap();
    fit();
    assert_eq!(synthetic::extended(&out, &dataset.train).unwrap(), split);
}

#[test]
fn a_draft_is_dropped_where_its_source_no_longer_trains() {
    let (world, dataset) = world(12);
    let asked = asks(&world, &dataset, 1, 1);
    let Draft::Prompt(draft) = asked[0].draft(&question(800), true) else { panic!() };
    let cluster = dataset.gate.prompts()[0].cluster.clone();
    let written = Drafts { drafts: vec![Draft::Prompt(Box::new(Prompt { cluster, ..*draft }))], tokens: 0 };
    let (manifest, _) = store(&world, &dataset, &written, 1);
    assert_eq!(manifest.workloads["w"].dropped, [("not_train".to_owned(), 1)].into());
}
