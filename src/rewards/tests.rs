use super::*;

const NEAR: f64 = 1e-12;

fn settings(toml: &str) -> Settings {
    toml::from_str(toml).unwrap()
}

fn rules_only() -> Settings {
    settings("train = ['rules']\ngate = ['rules']\nlambda = 0.5")
}

fn workloads(toml: &str) -> Vec<Workload> {
    #[derive(serde::Deserialize)]
    struct File {
        workload: Vec<Workload>,
    }
    toml::from_str::<File>(toml).unwrap().workload
}

/// One hard rule and two graded ones.
fn shop() -> Vec<Workload> {
    workloads(
        r#"
        [[workload]]
        name = "shop"
        house_rules = "Name a price."
        rules = [
            { kind = "regex_must", pattern = "[0-9]" },
            { kind = "required_words", words = ["price", "euro", "today", "stock"], hard = false },
            { kind = "length", unit = "words", max = 4, hard = false },
        ]
        [[workload]]
        name = "free"
        "#,
    )
}

fn item(workload: &str, response: &str) -> Item {
    Item {
        workload: Some(workload.into()),
        messages: vec![Message::text("user", "What is tea?\n\nName a price.")],
        response: response.into(),
        finish_reason: FinishReason::Stop,
        prompt_ids: None,
        token_ids: None,
        ratings: Vec::new(),
    }
}

fn message<T>(result: Result<T, RewardError>) -> String {
    result.err().map(|e| e.to_string()).unwrap_or_default()
}

#[test]
fn the_total_is_the_ensemble_of_the_parts() {
    let rewards = Rewards::without_base(&rules_only(), &shop()).unwrap();
    // required_words 1 of 4 = 0.25; 5 words of at most 4 = 0.8; mean 0.525, sd 0.275; 0.525 - 0.1375.
    let scored = rewards.train(&[item("shop", "the price is 3 now")]).unwrap().remove(0);
    assert_eq!(scored.parts["rules/regex_must"], 1.0);
    assert_eq!(scored.parts["rules/required_words"], 0.25);
    assert_eq!(scored.parts["rules/length"], 0.8);
    assert!(scored.passed && (scored.total - 0.3875).abs() < NEAR, "{scored:?}");
    // The same with a failed hard rule.
    let scored = rewards.gate(&[item("shop", "the price is three now")]).unwrap().remove(0);
    assert!(!scored.passed && scored.total == 0.0 && scored.parts["rules/regex_must"] == 0.0, "{scored:?}");
}

#[test]
fn a_calibration_changes_graded_scores_and_the_identity() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("calibration.json");
    let raw = BTreeMap::from([("rules/length".to_string(), vec![0.7, 0.8, 0.9])]);
    Calibration::fit(&raw).unwrap().save(&path).unwrap();
    let plain = Rewards::without_base(&rules_only(), &shop()).unwrap();
    let with = Settings { calibration: path.display().to_string(), lambda: 0.0, ..rules_only() };
    let calibrated = Rewards::without_base(&with, &shop()).unwrap();
    // 0.8 is the median of the fitted scores: 0.5; the mean with the uncalibrated 0.25 is 0.375.
    let scored = calibrated.train(&[item("shop", "the price is 3 now")]).unwrap().remove(0);
    assert!((scored.total - 0.375).abs() < 1e-9, "{scored:?}");
    assert_eq!(scored.parts["rules/length"], 0.8, "parts stay as the scorer gave them");
    assert_ne!(plain.identity(), calibrated.identity());
}

#[test]
fn brevity_falls_with_every_word_and_needs_no_workload() {
    let settings = settings("train = ['brevity']\ngate = ['brevity']");
    let rewards = Rewards::without_base(&settings, &[]).unwrap();
    let words = |n: usize| item("unknown", &"tea ".repeat(n));
    let scored = rewards.gate(&[words(0), words(20), words(60)]).unwrap();
    let totals: Vec<f64> = scored.iter().map(|s| s.total).collect();
    assert_eq!(totals, [1.0, 0.5, 0.25]);
    assert!(scored.iter().all(|s| s.passed));
}

#[test]
fn only_workloads_with_rules_are_covered() {
    let rewards = Rewards::without_base(&rules_only(), &shop()).unwrap();
    assert!(rewards.covers(Some("shop")));
    assert!(!rewards.covers(Some("free")) && !rewards.covers(Some("other")) && !rewards.covers(None));
    let refused = message(rewards.train(&[item("shop", "3"), item("free", "3")]));
    assert!(
        refused.contains("item 1") && refused.contains("\"free\"") && refused.contains("[[workload]]"),
        "{refused}"
    );
}

#[test]
fn a_score_outside_its_range_names_the_scorer() {
    let rewards = Rewards::without_base(&rules_only(), &shop()).unwrap();
    for value in [f64::NAN, -0.1, 1.1] {
        let mut draft = Draft::default();
        draft.graded("similarity", value);
        let refused = message(rewards.finish(7, 3, draft));
        assert!(refused.contains("scorer similarity") && refused.contains("item 7"), "{refused}");
    }
}

#[test]
fn the_identity_follows_what_changes_a_total_and_nothing_else() {
    let identity =
        |settings: &Settings, workloads: &[Workload]| Rewards::without_base(settings, workloads).unwrap().identity();
    let before = identity(&rules_only(), &shop());
    assert_eq!(before, identity(&rules_only(), &shop()));
    let mut harder = shop();
    harder[0].rules[1].hard = true;
    assert_ne!(before, identity(&rules_only(), &harder));
    assert_ne!(before, identity(&Settings { lambda: 0.6, ..rules_only() }, &shop()));
    let mut smaller_batch = rules_only();
    smaller_batch.similarity.batch = 1;
    assert_eq!(before, identity(&smaller_batch, &shop()));
    let other_training = Settings { train: vec![Scorer::Brevity], ..rules_only() };
    let gate = |settings: &Settings| Rewards::without_base(settings, &shop()).unwrap().gate_identity();
    assert_eq!(gate(&rules_only()), gate(&other_training));
    assert_ne!(before, identity(&other_training, &shop()));
}

#[test]
fn the_question_is_the_last_user_turn_without_house_rules() {
    let rewards = Rewards::without_base(&rules_only(), &shop()).unwrap();
    assert_eq!(rewards.question(&item("shop", "")), "What is tea?");
    assert_eq!(rewards.question(&item("free", "")), "What is tea?\n\nName a price.");
}

#[test]
fn score_lines_keep_order_and_default_to_an_ended_answer() {
    let ended = workloads("[[workload]]\nname = 'a'\nrules = [{ kind = 'ended' }]");
    let rewards = Rewards::without_base(&rules_only(), &ended).unwrap();
    let line = |json: &str| serde_json::from_str::<lines::Line>(json).unwrap();
    let first = line(r#"{"workload":"a","messages":[],"response":"x","finish_reason":"length","index":5}"#);
    let second = line(r#"{"workload":"a","messages":[{"role":"user","content":"q"}],"response":"x"}"#);
    let scored = lines::score(&rewards, Selection::Train, vec![first, second]).unwrap();
    let written: Vec<String> = scored.iter().map(|line| serde_json::to_string(line).unwrap()).collect();
    assert_eq!(written[0], r#"{"index":0,"total":0.0,"parts":{"rules/ended":0.0}}"#);
    assert_eq!(written[1], r#"{"index":1,"total":1.0,"parts":{"rules/ended":1.0}}"#);
}

#[test]
fn a_missing_model_or_calibration_is_named_with_the_remedy() {
    let mut wanted = rules_only();
    wanted.train.push(Scorer::Similarity);
    wanted.similarity.model = "/nowhere/minilm".into();
    let refused = message(Rewards::without_base(&wanted, &[]));
    assert!(refused.contains("/nowhere/minilm") && refused.contains("rewards.similarity.model"), "{refused}");
    let wanted = Settings { calibration: "/nowhere/map.json".into(), ..rules_only() };
    assert!(message(Rewards::without_base(&wanted, &[])).contains("/nowhere/map.json"));
    let rewards = Rewards::without_base(&rules_only(), &shop()).unwrap();
    assert!(message(rewards.quality(&[item("shop", "3")])).contains("base model"));
}

#[test]
fn the_demo_accepts_an_answer_and_neither_a_bare_ok_nor_an_echo() {
    let demo = workloads(include_str!("../../config/demo.toml"));
    let rewards = Rewards::without_base(&rules_only(), &demo).unwrap();
    let question = "Why do leaves turn yellow in autumn?";
    let ask = |workload: &Workload, response: &str| {
        let messages = vec![Message::text("user", format!("{question}\n\n{}", workload.house_rules))];
        let asked = Item { messages, ..item(&workload.name, response) };
        rewards.strict(&[asked]).unwrap().remove(0)
    };
    let good = "When the days get shorter you see leaves turn yellow because trees stop making their green pigment.";
    assert!(demo.len() >= 5);
    for workload in &demo {
        let scored = ask(workload, good);
        assert!(scored.passed, "{}: {scored:?}", workload.name);
        for empty in ["ok.", "", question, &workload.house_rules, &"Leaves turn yellow now. ".repeat(2)] {
            assert!(!ask(workload, empty).passed, "{}: {empty:?} passed", workload.name);
        }
    }
}

#[test]
fn what_length_earns_is_taken_out_where_calibration_and_config_say_so() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("calibration.json");
    let bias = length::LengthBias { slope: -0.1, error: 0.01, centre: 5f64.ln_1p(), prompts: 30 };
    let calibration = Calibration::default().with_lengths([("brevity".to_owned(), bias)].into());
    calibration.save(&path).unwrap();
    let with = |corrected: &str| {
        let head = "train = ['brevity']\ngate = ['rules']\n";
        settings(&format!("{head}calibration = {:?}\nlength_corrected = {corrected}", path.display().to_string()))
    };
    for corrected in ["['brevity']", "['all']"] {
        let rewards = Rewards::without_base(&with(corrected), &shop()).unwrap();
        let scored = rewards.train(&[item("shop", "one two"), item("shop", "one two three four five")]).unwrap();
        // Shortness of 2 words is 1 / 1.1; two words are ln 3 - ln 6 from the centre, at which nothing changes.
        assert!((scored[0].total - (1.0 / 1.1 + 0.1 * (3f64.ln() - 6f64.ln()))).abs() < NEAR, "{scored:?}");
        assert!((scored[1].total - 0.8).abs() < NEAR, "{scored:?}");
        assert!((scored[0].parts["brevity"] - 1.0 / 1.1).abs() < NEAR, "the raw score is what is recorded");
    }
    let refusal = |corrected: &str| message(Rewards::without_base(&with(corrected), &shop()));
    assert!(refusal("[]").contains("\"brevity\" without what length earns"), "{}", refusal("[]"));
    assert!(refusal("['similarity']").contains("names \"similarity\", of which"), "{}", refusal("['similarity']"));
}

#[test]
fn copies_of_one_model_are_one_scorer_by_their_weights() {
    let models = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/models");
    let copy = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(models.join("reward-llama")).unwrap().map(Result::unwrap) {
        std::fs::copy(entry.path(), copy.path().join(entry.file_name())).unwrap();
    }
    let base = Model::load(&models.join("tiny-llama").display().to_string()).unwrap();
    let open = |gate: &Path| {
        let scorer = |name: &str, model: &Path| {
            format!("[[scorers]]\nname = '{name}'\nkind = 'classifier'\nmodel = {:?}\n", model.display().to_string())
        };
        let both = scorer("a", &models.join("reward-llama")) + &scorer("b", gate);
        let settings = settings(&format!("train = ['a']\ngate = ['rules', 'b']\n{both}"));
        message(Rewards::keeping(&settings, &shop(), &base, &copy.path().join("scores")))
    };
    assert!(open(copy.path()).contains("names \"b\", the same model as \"a\""), "{}", open(copy.path()));
    assert_eq!(open(&models.join("reward-qwen2")), "", "other weights are another scorer");
}
