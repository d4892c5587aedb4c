//! The files of a dataset: read back, refused where they were changed, and never a leak.

use std::collections::BTreeMap;

use super::world::*;
use crate::dataset::*;
use crate::record::prompt_hash;

#[test]
fn an_empty_log_is_an_empty_dataset() {
    let mut world = World::new();
    let dataset = world.night();
    assert!(dataset.train.is_empty() && dataset.manifest.excluded.is_empty());
    let why = dataset.manifest.shortfall(0).unwrap();
    assert!(why.contains("0 training prompts"), "{why}");
}

fn stored(rows: &[Row]) -> (World, Dataset) {
    let mut world = World::of(rows);
    let dataset = world.night();
    (world, dataset)
}

#[test]
fn a_stored_dataset_is_read_back_and_has_the_same_bytes_each_time() {
    let ((a, dataset), (b, _)) = (stored(&questions(120)), stored(&questions(120)));
    for name in ["train.jsonl", "gate.jsonl", "audit.jsonl", "manifest.json"] {
        let read = |world: &World| std::fs::read(world.out("r1").join(name)).unwrap();
        assert_eq!(read(&a), read(&b), "{name}");
    }
    let read = load(&a.out("r1")).unwrap();
    assert_eq!(read.manifest, dataset.manifest);
    assert_eq!((read.train, read.gate, read.audit), (dataset.train, dataset.gate, dataset.audit));
    assert_eq!(read.manifest.inputs.offsets["t/1"], OffsetRange { first: 1, last: 118 });
    assert_eq!(read.manifest.shortfall(0), None);
}

#[test]
fn a_planted_gate_prompt_is_in_no_training_file() {
    let canary = format!("{} zzcanaryzz", question(700));
    let hash_in_gate = |text: &str| Split::of(&prompt_hash(&ask(text), None), &Settings::default()) == Split::Gate;
    let text = (0..200).map(|i| format!("{canary} {i}")).find(|text| hash_in_gate(text)).unwrap();
    let mut rows = questions(120);
    rows.push(row(500, &ask(&text)));
    let (world, _) = stored(&rows);
    let holds = |name: &str| std::fs::read_to_string(world.out("r1").join(name)).unwrap().contains("zzcanaryzz");
    assert_eq!(["gate.jsonl", "train.jsonl", "audit.jsonl", "manifest.json"].map(holds), [true, false, false, false]);
}

#[test]
fn files_that_were_changed_or_swapped_are_refused() {
    let (world, _) = stored(&questions(120));
    let path = |name: &str| world.out("r1").join(name);
    let refusal = || load(&world.out("r1")).unwrap_err().to_string();
    let (train, gate) = (std::fs::read(path("train.jsonl")).unwrap(), std::fs::read(path("gate.jsonl")).unwrap());
    std::fs::write(path("train.jsonl"), &gate).unwrap();
    assert!(refusal().contains("train.jsonl"), "{}", refusal());
    std::fs::write(path("train.jsonl"), &train).unwrap();
    load(&world.out("r1")).unwrap();
    let manifest = std::fs::read_to_string(path("manifest.json")).unwrap();
    std::fs::write(path("manifest.json"), manifest.replace("\"seed\": 1", "\"seed\": 2")).unwrap();
    assert!(refusal().contains("manifest.json"), "{}", refusal());
    std::fs::remove_file(path("manifest.json")).unwrap();
    assert!(refusal().contains("manifest.json"), "{}", refusal());
}

#[test]
fn a_manifest_of_an_older_taod_is_read() {
    let (world, dataset) = stored(&questions(120));
    let path = world.out("r1").join("manifest.json");
    let mut json: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let older = json.as_object_mut().unwrap();
    for field in ["masked", "drawn", "quarantine"] {
        older.shift_remove(field).unwrap();
    }
    older["settings"].as_object_mut().unwrap().shift_remove("balance").unwrap();
    older["hash"] = "".into();
    let hash = hex::encode(<sha2::Sha256 as sha2::Digest>::digest(serde_json::to_vec(&older).unwrap()));
    older["hash"] = hash.into();
    std::fs::write(&path, serde_json::to_vec_pretty(&json).unwrap()).unwrap();
    assert_eq!(load(&world.out("r1")).unwrap().train, dataset.train);
}

#[test]
fn a_cluster_in_two_splits_is_refused_before_the_manifest_is_written() {
    let folder = tempfile::tempdir().unwrap();
    let (_world, found) = stored(&questions(120));
    let mut audit: Vec<Prompt> = found.audit.iter().cloned().collect();
    audit.push(found.train.iter().next().unwrap().clone());
    let audit = SplitOf::new(audit);
    let found = Assembled {
        train: found.train,
        gate: found.gate,
        audit,
        excluded: BTreeMap::new(),
        rows: 120,
        masked: BTreeMap::new(),
        drawn: BTreeMap::new(),
        quarantine: Vec::new(),
    };
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
        (Settings { minhash_bands: 70, ..default() }, "minhash_rows is 4, with 70 bands"),
        (Settings { shared_line_min: 1, ..default() }, "shared_line_min is 1"),
        (Settings { max_train_prompts: 5, ..default() }, "max_train_prompts is 5"),
    ] {
        let message = settings.validate().unwrap_err();
        assert!(message.starts_with(key), "{message}");
    }
}
