//! Every config in the repository is right, and the default file is what the types say.

use std::collections::BTreeSet;

use taod::config::{Config, Loaded};
use toml::{Table, Value};

use crate::harness::{assert_golden, files, taod, taod_in, text};

/// Keys that the demo must leave at their defaults: its promotion is to be the real gate's.
const NEVER_IN_DEMO: &[&str] = &["gate.alpha", "gate.margin", "decoding.temperature"];

fn load(path: &str) -> Config {
    Loaded::from_layers(Some((path.into(), text(path))), vec![]).unwrap_or_else(|e| panic!("{e}")).config
}

#[test]
fn every_config_in_the_repository_can_be_used() {
    let configs = files("config", "toml");
    assert!(configs.len() >= 3, "{configs:?}");
    for path in configs {
        load(&path);
    }
}

#[test]
fn the_default_file_is_what_the_types_say() {
    assert_golden("config/default.toml", &Config::default_toml());
    assert_eq!(load("config/default.toml"), Config::default());
}

/// Returns each key of a file with its value, workloads left out: they are the demo's subject, not a changed default.
fn leaves(path: &str, table: &Table, found: &mut Vec<(String, Value)>) {
    for (key, value) in table {
        let key = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
        match value {
            Value::Table(inner) => leaves(&key, inner, found),
            Value::Array(items) if items.first().is_some_and(Value::is_table) => {}
            value => found.push((key, value.clone())),
        }
    }
}

#[test]
fn the_demo_changes_only_keys_that_it_gives_a_reason_for() {
    let (demo, defaults) = (text("config/demo.toml"), text("config/default.toml"));
    let (mut changed, mut known) = (Vec::new(), Vec::new());
    leaves("", &demo.parse().unwrap(), &mut changed);
    leaves("", &defaults.parse().unwrap(), &mut known);
    assert!(!changed.is_empty());
    for (key, value) in &changed {
        assert!(!known.contains(&(key.clone(), value.clone())), "{key} is at its default: leave it out of demo.toml");
        assert!(!NEVER_IN_DEMO.contains(&key.as_str()), "the demo must not change {key}");
    }
    assert_eq!(without_reason(&demo), BTreeSet::new());
}

/// Returns the keys of a file before which no comment stands.
fn without_reason(text: &str) -> BTreeSet<String> {
    let mut before = "";
    let mut missing = BTreeSet::new();
    let mut in_list = false;
    for line in text.lines() {
        if line.starts_with('[') {
            in_list = line.starts_with("[[");
        }
        if let Some((key, _)) = line.split_once(" = ").filter(|(key, _)| !key.starts_with(['#', ' ']) && !in_list)
            && !before.starts_with('#')
        {
            missing.insert(key.to_string());
        }
        before = line;
    }
    missing
}

#[test]
fn a_key_without_a_reason_is_found() {
    let text = "[a]\n# why\nb = 1\nc = 2\n[[w]]\nd = 3\n";
    assert_eq!(without_reason(text), BTreeSet::from(["c".to_string()]));
}

#[test]
fn a_bad_config_ends_with_64_and_one_line_for_each_problem() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("taod.toml"), "[schedul]\ncron = \"0 2 * * *\"\n[admin]\nlisten = 9464\n")
        .unwrap();
    let outcome = taod_in(folder.path(), &["config", "check", "--config", "taod.toml"], &[]).code(64);
    let expected = "taod: taod.toml: admin.listen = 9464 is not a text\n\
                    taod.toml: schedul is not a key; did you mean schedule?\n";
    assert_eq!(outcome.err, expected);
    assert_eq!(outcome.out, "");
    let missing = taod(&["config", "check", "--config", "no.toml"]).code(64);
    assert!(missing.err.starts_with("taod: cannot read the config no.toml: "), "{}", missing.err);
}

#[test]
fn a_location_of_the_tables_that_cannot_be_used_is_told_by_the_check() {
    let folder = tempfile::tempdir().unwrap();
    let check = |tables: &str, options: &str, environment: &[(&str, &str)]| {
        let text = format!("[state]\ntables = \"{tables}\"\nstore_options = {{ {options} }}\n");
        std::fs::write(folder.path().join("taod.toml"), text).unwrap();
        taod_in(folder.path(), &["config", "check", "--config", "taod.toml"], environment)
    };
    check("s3://bucket/folder", "region = \"eu-1\"", &[]).code(0);
    check("az://container", "", &[("AZURE_STORAGE_ACCOUNT_NAME", "a"), ("AZURE_SKIP_SIGNATURE", "true")]).code(0);
    let refused = [
        ("hdfs://host/folder", "", "has the scheme hdfs"),
        ("s3://", "", "names no bucket"),
        ("s3://bucket", "regoin = \"eu-1\"", "regoin"),
        ("s3://bucket", "secret_access_key = \"hunter2\"", "AWS_SECRET_ACCESS_KEY"),
        ("tables", "region = \"eu-1\"", "is a local folder"),
        // Which account is in the environment or nowhere.
        ("az://container", "", "ccount"),
    ];
    for (tables, options, part) in refused {
        let said = check(tables, options, &[]).code(64).err;
        assert!(said.contains("state.tables: ") && said.contains(part) && !said.contains("hunter2"), "{said}");
        assert_eq!(said.lines().count(), 1, "{said}");
    }
}

#[test]
fn a_log_format_of_ones_own_is_checked_and_used() {
    let folder = tempfile::tempdir().unwrap();
    let config = |when: &str| {
        let text = format!(
            "[[ingest.mapping]]\nname = \"ours\"\nwhen = \"{when}\"\n[ingest.mapping.parts]\nmessages = \"/q\"\n"
        );
        std::fs::write(folder.path().join("taod.toml"), text).unwrap();
    };
    std::fs::write(folder.path().join("log.jsonl"), "{\"kind\": 7, \"q\": \"Why?\"}\n").unwrap();
    config("/kind");
    let records = ["records", "--config", "taod.toml", "--input", "log.jsonl"];
    let line: serde_json::Value = serde_json::from_str(&taod_in(folder.path(), &records, &[]).code(0).out).unwrap();
    assert_eq!((&line["format"], &line["messages"][0]["content"]), (&"mapping".into(), &"Why?".into()));
    assert_eq!(line["extra"]["mapping"], "ours");
    config("kind");
    let outcome = taod_in(folder.path(), &["config", "check", "--config", "taod.toml"], &[]).code(64);
    assert!(outcome.err.contains("mapping[0].when is \"kind\": write a JSON pointer"), "{}", outcome.err);
}

#[test]
fn a_secret_of_the_environment_is_in_no_output() {
    let folder = tempfile::tempdir().unwrap();
    // Every key that ends in _file has a secret; each gets a value that must not be seen again.
    let schema = taod(&["config", "explain", "--json", "admin"]).code(0).out;
    assert!(schema.contains("TAOD__ADMIN__LISTEN"));
    let secrets: Vec<(String, String)> = text("config/default.toml")
        .lines()
        .scan(String::new(), |section, line| {
            if let Some(header) = line.strip_prefix('[') {
                *section = header.trim_matches(['[', ']']).to_string();
            }
            let key = line.trim_start_matches("# ").split(' ').next().unwrap_or_default();
            Some(
                key.strip_suffix("_file")
                    .map(|key| format!("TAOD__{section}__{key}").replace('.', "__").to_uppercase()),
            )
        })
        .flatten()
        .chain([String::from("TAOD__REWARDS__MY_JUDGE__API_KEY")])
        .map(|variable| (variable, "hunter2".to_string()))
        .collect();
    let environment: Vec<(&str, &str)> = secrets.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
    for arguments in [
        ["config", "check"].as_slice(),
        &["config", "show"],
        &["config", "show", "--json"],
        &["config", "explain", "state"],
    ] {
        let outcome = taod_in(folder.path(), &[arguments, &["--log", "trace"]].concat(), &environment).code(0);
        assert!(!format!("{}{}", outcome.out, outcome.err).contains("hunter2"), "{arguments:?}");
    }
}

#[test]
fn a_filter_and_a_matcher_that_cannot_be_used_are_told_by_the_check() {
    let folder = tempfile::tempdir().unwrap();
    let check = |filter: &str, matching: &str| {
        let text = format!("[dataset]\nfilter = \"{filter}\"\n[[workload]]\nname = \"w\"\nmatch = {matching}\n");
        std::fs::write(folder.path().join("taod.toml"), text).unwrap();
        taod_in(folder.path(), &["config", "check", "--config", "taod.toml"], &[])
    };
    check("model like 'llama%' and status = 200", "{ tag = 'mail' }").code(0);
    check("", "'default'").code(0);
    let said = check("modle = 'x'", "{ field = { at = 'user', equals = 'x' } }").code(64).err;
    assert!(
        said.contains("dataset.filter is no condition") && said.to_lowercase().contains("did you mean 'model'"),
        "{said}"
    );
    assert!(said.contains("workload \"w\": match: field at is \"user\""), "{said}");
}
