//! The machinery is tested on a sample of its own, so that these tests do not change with the settings of the stages.

use std::collections::BTreeMap;

use super::*;

/// How the sample trains.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
enum Method {
    /// Best of the samples.
    Raft,
    /// Relative advantages.
    Grpo,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
enum Kind {
    Regex { pattern: String },
    Length { max: u64 },
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
struct Rule {
    /// Whether it must hold.
    #[serde(default)]
    hard: bool,
    #[serde(flatten)]
    kind: Kind,
}

/// The sample's training.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
struct Tuning {
    /// Which loss is used.
    method: Method,
    /// Step size, above 0.
    learning_rate: f64,
    /// Rank of the adapter, from 1.
    rank: u64,
    /// Stop after this many steps; no limit where it is not set.
    steps_max: Option<u64>,
    /// Names of layers.
    targets: Vec<String>,
    /// File with the key of the store.
    key_file: Option<PathBuf>,
    /// Free settings of the broker.
    properties: BTreeMap<String, String>,
}

impl Default for Tuning {
    fn default() -> Self {
        Tuning {
            method: Method::Raft,
            learning_rate: 2e-4,
            rank: 16,
            steps_max: None,
            targets: vec!["q_proj".into()],
            key_file: None,
            properties: BTreeMap::new(),
        }
    }
}

/// A workload of the sample.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Workload {
    /// Its name.
    name: String,
    /// What its answers must hold.
    #[serde(default)]
    rules: Vec<Rule>,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
struct Sample {
    /// Training.
    tuning: Tuning,
    /// One table for each workload.
    workload: Vec<Workload>,
}

fn load(file: &str, environment: &[(&str, &str)]) -> Result<Loaded<Sample>, ConfigError> {
    let environment = environment.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect();
    Loaded::merge(Some(("taod.toml".into(), file.into())), environment)
}

fn problem(file: &str, environment: &[(&str, &str)]) -> String {
    load(file, environment).unwrap_err().to_string()
}

#[test]
fn the_shipped_pair_of_daemons_over_one_log_fits_together() {
    let read = |name: &str| {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("config/shared").join(name);
        let text = std::fs::read_to_string(&path).unwrap();
        Loaded::from_layers(Some((name.into(), text)), Vec::new()).unwrap().config
    };
    let (general, support) = (read("general.toml"), read("support.toml"));
    assert!(general.state.stores_log() && !support.state.stores_log());
    assert_eq!(Path::new(&support.state.log), general.state.dir.join("tables"));
    assert_eq!(general.endpoint.urls, support.endpoint.urls);
    assert_ne!(general.registry.name_prefix, support.registry.name_prefix);
    assert_ne!(general.endpoint.stable_name, support.endpoint.stable_name);
    assert_ne!((&general.state.dir, &general.admin.listen), (&support.state.dir, &support.admin.listen));
}

#[test]
fn a_log_of_another_daemon_asks_for_names_of_ones_own() {
    let refused =
        |text: &str| Loaded::from_layers(Some(("taod.toml".into(), text.into())), Vec::new()).unwrap_err().to_string();
    assert!(refused("[state]\nlog = '/srv/tables'").contains("registry.name_prefix"));
    let own = "[state]\ndir = '/srv'\nlog = '/srv/tables/'\n[registry]\nname_prefix = 'a'";
    assert!(refused(own).contains("is this daemon's own tables"));
}

#[test]
fn the_file_wins_over_the_defaults_and_the_environment_over_the_file() {
    let file = "[tuning]\nrank = 8\nlearning_rate = 1e-3\nproperties = { a = \"b\" }";
    let environment =
        [("TAOD__TUNING__RANK", "4"), ("TAOD__TUNING__METHOD", "grpo"), ("TAOD_CONFIG", "x"), ("HOME", "/")];
    let loaded = load(file, &environment).unwrap();
    let expected = Tuning {
        rank: 4,
        learning_rate: 1e-3,
        method: Method::Grpo,
        properties: BTreeMap::from([("a".to_string(), "b".to_string())]),
        ..Tuning::default()
    };
    assert_eq!(loaded.config.tuning, expected);
    assert_eq!(loaded.layers.origin("tuning.rank"), Origin::Environment("TAOD__TUNING__RANK".into()));
    assert_eq!(loaded.layers.origin("tuning.learning_rate"), Origin::File("taod.toml".into()));
    assert_eq!(loaded.layers.origin("tuning.targets"), Origin::Default);
}

#[test]
fn environment_values_are_read_by_the_type_of_the_key() {
    let environment = [
        ("TAOD__TUNING__TARGETS", r#"["a", "b"]"#),
        ("TAOD__TUNING__STEPS_MAX", "12"),
        ("TAOD__TUNING__LEARNING_RATE", "1"),
        ("TAOD__TUNING__PROPERTIES", r#"{ "fetch.min.bytes" = "1" }"#),
    ];
    let tuning = load("", &environment).unwrap().config.tuning;
    assert_eq!((tuning.targets, tuning.steps_max, tuning.learning_rate), (vec!["a".into(), "b".into()], Some(12), 1.0));
    assert_eq!(tuning.properties["fetch.min.bytes"], "1");
}

#[test]
fn an_unknown_key_is_refused_with_the_nearest_one() {
    assert_eq!(
        problem("[tuning]\nlerning_rate = 1", &[]),
        "taod.toml: tuning.lerning_rate is not a key; did you mean tuning.learning_rate?"
    );
    assert_eq!(problem("[tunning]\nrank = 1", &[]), "taod.toml: tunning is not a key; did you mean tuning?");
    assert_eq!(problem("rank = 1", &[]), "taod.toml: rank is not a key; did you mean tuning.rank?");
    assert_eq!(
        problem("", &[("TAOD__TUNING__RNAK", "1")]),
        "TAOD__TUNING__RNAK: tuning.rnak is not a key; did you mean tuning.rank?"
    );
    let message = problem("[tuning]\nzzz = 1", &[]);
    assert_eq!(message, "taod.toml: tuning.zzz is not a key; `taod config explain tuning` lists those there are");
}

#[test]
fn a_wrong_type_names_the_key_the_value_and_what_it_holds() {
    assert_eq!(problem("[tuning]\nrank = \"8\"", &[]), "taod.toml: tuning.rank = \"8\" is not a whole number from 0");
    assert_eq!(problem("[tuning]\nrank = -1", &[]), "taod.toml: tuning.rank = -1 is not a whole number from 0");
    assert_eq!(problem("[tuning]\ntargets = [1]", &[]), "taod.toml: tuning.targets[0] = 1 is not a text");
    assert_eq!(problem("tuning = 1", &[]), "taod.toml: tuning = 1 is not a table");
    let word = "taod.toml: tuning.method = \"rafd\" is not one of \"raft\", \"grpo\"; did you mean \"raft\"?";
    assert_eq!(problem("[tuning]\nmethod = \"rafd\"", &[]), word);
    let variable = "TAOD__TUNING__RANK: tuning.rank = \"many\" is not a whole number from 0";
    assert_eq!(problem("", &[("TAOD__TUNING__RANK", "many")]), variable);
}

#[test]
fn every_problem_is_reported_at_once() {
    let message = problem("[tuning]\nrank = true\nlerning_rate = 1", &[("TAOD__X__Y", "1")]);
    assert_eq!(message.lines().count(), 3, "{message}");
}

#[test]
fn a_syntax_error_names_the_file_and_the_line() {
    let message = problem("[tuning]\nrank = 1\nmethod = raft\n", &[]);
    assert!(message.starts_with("taod.toml, line 3: "), "{message}");
    assert_eq!(message.lines().count(), 1, "{message}");
}

#[test]
fn tables_of_a_list_are_checked_by_their_tag() {
    let workload = |rule: &str| format!("[[workload]]\nname = \"a\"\n[[workload.rules]]\n{rule}");
    let loaded = load(&workload("kind = \"length\"\nmax = 3\nhard = true"), &[]).unwrap();
    assert_eq!(loaded.config.workload[0].rules, [Rule { hard: true, kind: Kind::Length { max: 3 } }]);
    let message = problem(&workload("kind = \"length\"\nmax = 3\nhrad = true"), &[]);
    assert_eq!(message, "taod.toml: workload[0].rules[0].hrad is not a key; did you mean workload.rules.hard?");
    let message = problem(&workload("kind = \"length\"\npattern = \"x\"\nmax = 1"), &[]);
    assert!(message.starts_with("taod.toml: workload[0].rules[0].pattern is not a key"), "{message}");
    assert_eq!(
        problem(&workload("kind = \"lenght\""), &[]),
        "taod.toml: workload[0].rules[0].kind = \"lenght\": it must be one of regex, length; did you mean \"length\"?"
    );
    let message = problem(&workload("kind = \"length\""), &[]);
    assert_eq!(message, "taod.toml: workload[0].rules[0].max is missing; it holds a whole number from 0");
}

#[test]
fn a_secret_in_the_file_is_refused_without_printing_it_and_one_in_the_environment_is_left_to_its_stage() {
    let message = problem("[tuning]\nkey = \"hunter2\"", &[]);
    assert!(message.contains("set tuning.key_file, or set TAOD__TUNING__KEY"), "{message}");
    assert!(!message.contains("hunter2"), "{message}");
    let loaded = load("", &[("TAOD__TUNING__KEY", "hunter2")]).unwrap();
    assert_eq!(loaded.config, Sample::default());
    let all = format!("{}{}{loaded:?}", loaded.show(), loaded.to_json());
    assert!(!all.contains("hunter2"), "{all}");
}

#[test]
fn what_is_shown_can_be_read_again() {
    let file = "[tuning]\nrank = 8\ntargets = []\nproperties = { \"a.b\" = \"c\\n\\\"\\u007f\" }\n\
                [[workload]]\nname = \"a\"\n[[workload.rules]]\nkind = \"regex\"\npattern = '\\d+'";
    let loaded = load(file, &[("TAOD__TUNING__METHOD", "grpo")]).unwrap();
    let shown = loaded.show();
    assert!(shown.contains("rank = 8  # taod.toml\n"), "{shown}");
    assert!(shown.contains("method = \"grpo\"  # TAOD__TUNING__METHOD\n"), "{shown}");
    assert!(shown.contains("learning_rate = 0.0002\n"), "{shown}");
    assert_eq!(load(&shown, &[]).unwrap().config, loaded.config, "{shown}");
}

#[test]
fn the_default_file_documents_every_key_and_reads_as_the_defaults() {
    let text = render::defaults::<Sample>();
    assert_eq!(load(&text, &[]).unwrap().config, Sample::default(), "{text}");
    let schema = keys::schema::<Sample>();
    for (key, _) in keys::all(&schema).into_iter().filter(|(key, _)| !key.starts_with("workload.rules")) {
        let name = key.rsplit('.').next().unwrap();
        assert!(text.contains(name), "{key} is not in\n{text}");
    }
    for doc in [
        "# Step size, above 0.\nlearning_rate = 0.0002\n",
        "# - \"grpo\": Relative advantages.\n",
        "# steps_max is not set; it holds a whole number from 0.\n",
    ] {
        assert!(text.contains(doc), "{doc} is not in\n{text}");
    }
}

#[test]
fn a_key_is_explained_with_its_doc_its_value_and_its_origin() {
    let loaded = load("[tuning]\nrank = 8", &[]).unwrap();
    let key = loaded.explain("tuning.rank").unwrap().remove(0);
    let shown =
        (key.doc.as_str(), key.default.as_deref(), key.value.as_deref(), key.origin.as_str(), key.variable.as_str());
    assert_eq!(shown, ("Rank of the adapter, from 1.", Some("16"), Some("8"), "taod.toml", "TAOD__TUNING__RANK"));
    assert_eq!(loaded.explain("tuning").unwrap().len(), 7);
    let message = loaded.explain("tuning.rnk").unwrap_err().to_string();
    assert_eq!(message, "tuning.rnk is not a key; did you mean tuning.rank?");
}

#[test]
fn a_section_checks_its_own_values_and_the_layer_is_blamed() {
    let file = ("taod.toml".to_string(), "[schedule]\ntime_zone = \"Vienna\"\n[state]\ndir = \"\"".to_string());
    let message = Loaded::from_layers(Some(file), vec![]).unwrap_err().to_string();
    let lines: Vec<&str> = message.lines().collect();
    assert_eq!(lines.len(), 2, "{message}");
    assert!(lines[0].starts_with("taod.toml: state.dir is empty; "), "{message}");
    assert!(lines[1].starts_with("taod.toml: schedule.time_zone \"Vienna\" is not"), "{message}");
}

#[test]
fn a_method_that_needs_plain_samples_refuses_others() {
    let read = |text: &str| Loaded::from_layers(Some(("taod.toml".into(), text.into())), Vec::new());
    for (method, plain) in [("raft", false), ("dpo", false), ("rest", false), ("grpo", true), ("oapl", true)] {
        let config = format!("[tuning]\nmethod = \"{method}\"\n[candidates]\ntemperature = 0.7\n");
        let refused = read(&config).err().map(|error| error.to_string());
        assert_eq!(refused.is_some(), plain, "{method}");
        assert!(refused.is_none_or(|text| text.contains("tuning.method") && text.contains("temperature is 0.7")));
        let config = config.replace("0.7", "1.0");
        assert!(read(&config).is_ok(), "{method}");
        let coarse = read(&format!("{config}precision = \"int8\"\n"));
        assert_eq!(coarse.is_err(), plain, "{method}");
        let config = format!("{config}[[candidates.strategies]]\nname = \"hot\"\nsamples = 2\ntemperature = 1.3\n");
        let refused = read(&config).err().map(|error| error.to_string());
        assert_eq!(refused.is_some(), plain, "{method}");
        assert!(refused.is_none_or(|text| text.contains("candidates.strategies has \"hot\"")));
    }
}

#[test]
fn a_device_has_a_precision_of_its_own() {
    let read = |text: &str| Loaded::from_layers(Some(("taod.toml".into(), text.into())), Vec::new());
    let refused = |text: &str| read(text).err().map(|error| error.to_string()).unwrap_or_default();
    for section in ["candidates", "tuning"] {
        let config = format!("[engine]\ndevice = \"cuda:1\"\n[{section}]\nprecision = \"int16\"\n");
        let message = refused(&config);
        assert!(message.contains(&format!("{section}.precision rounds")) && message.contains("cuda:1"), "{message}");
        assert!(read(&config.replace("int16", "f32")).is_ok() && read(&config.replace("cuda:1", "cpu")).is_ok());
    }
    let message = refused("[engine]\ndtype = \"bf16\"\n");
    assert!(message.contains("engine.dtype is bf16, in which cpu does not multiply"), "{message}");
    let message = refused("[engine]\ndevice = \"gpu\"\n");
    assert!(message.contains("engine.device is \"gpu\"; set cpu, cuda"), "{message}");
}

#[test]
fn the_hash_changes_with_any_value() {
    let changed =
        Config { state: StateSettings { dir: "other".into(), ..StateSettings::default() }, ..Config::default() };
    assert_ne!(Config::default().hash(), changed.hash());
    assert_eq!(Config::default().hash().len(), 64);
}

#[test]
fn the_gate_must_score_what_training_does_not() {
    let problems = |train: &str, gate: &str| {
        let config: Config = toml::from_str(&format!("[rewards]\ntrain = {train}\ngate = {gate}\n")).unwrap();
        config.problems()
    };
    let shared = problems("['rules', 'similarity']", "['rules', 'similarity']");
    assert_eq!(shared.len(), 1, "{shared:?}");
    assert!(shared[0].starts_with("rewards.gate names \"similarity\", which rewards.train optimises"), "{shared:?}");
    assert_eq!(problems("['rules']", "['rules', 'similarity']"), Vec::<String>::new());
    assert_eq!(problems("['rules', 'similarity']", "['rules']"), Vec::<String>::new(), "rules are the specification");
    // One model under two names is one scorer, whatever rubric each has; another model beside it is another.
    let defined = |train: &str, gate: &str| {
        let judge = |name: &str, model: &str| {
            format!(
                "[[rewards.scorers]]\nname = '{name}'\nkind = 'judge'\nmodel = '{model}'\nrubric = 'It is {name}.'\n"
            )
        };
        let judges = [judge("kind", "models/j.gguf"), judge("right", "models/j.gguf"), judge("other", "models/o.gguf")];
        let config: Config =
            toml::from_str(&format!("[rewards]\ntrain = {train}\ngate = {gate}\n{}", judges.concat())).unwrap();
        config.problems()
    };
    let same = defined("['kind']", "['rules', 'right']");
    assert!(same.len() == 1 && same[0].contains("names \"right\", the same model as \"kind\""), "{same:?}");
    assert_eq!(defined("['kind']", "['right', 'other']"), Vec::<String>::new());
    assert_eq!(defined("['kind']", "['other']"), Vec::<String>::new());
}
