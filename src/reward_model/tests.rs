use std::path::PathBuf;

use candle_core::quantized::GgmlDType;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha20Rng;

use super::*;
use crate::engine::tests::gguf::write_gguf;
use crate::engine::train::{Base, LoraMatrices, TextGroup};
use crate::engine::{LoraSpec, WeightForm};
use crate::record::Message;
use crate::rewards::classifier::Classifier;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/models").join(name)
}

fn load(name: &str) -> (String, Model) {
    let path = fixture(name).display().to_string();
    let model = Model::load(&path).unwrap();
    (path, model)
}

/// Pairs whose better answer names France.
fn taught() -> Vec<Pair> {
    let pair = |i: usize| Pair {
        messages: vec![Message::text("user", format!("Question {i}?"))],
        chosen: format!("{} the capital of France", i * 7 % 10),
        rejected: format!("{} the weight of paper is", i * 3 % 10),
        subset: None,
    };
    (0..80).map(pair).collect()
}

fn settings() -> Settings {
    Settings { rank: 4, epochs: 6, learning_rate: 3e-3, batch_samples: 8, batch_tokens: 300, ..Settings::default() }
}

#[test]
fn gradients_through_the_last_rows_are_those_of_the_numbers() {
    for name in ["tiny-qwen2", "tiny-gemma2"] {
        let (_, model) = load(name);
        let spec = LoraSpec {
            targets: crate::engine::Linear::ALL.to_vec(),
            rank: 2,
            alpha: 4.0,
            use_rslora: false,
            ..LoraSpec::default()
        };
        let mut lora = LoraMatrices::fresh(model.config(), &spec, 3);
        let mut rng = ChaCha20Rng::seed_from_u64(4);
        let mut draw = |n: usize| (0..n).map(|_| rng.random_range(-0.5f32..0.5)).collect::<Vec<f32>>();
        lora.values.iter_mut().for_each(|values| *values = draw(values.len()));
        let base = Base::new(model.config(), model.weights(), WeightForm::F32).unwrap();
        let (prefix, one, two): (Vec<u32>, Vec<u32>, Vec<u32>) = ((5..20).collect(), vec![30, 41, 52], vec![77]);
        let groups = [TextGroup { prefix: &prefix, endings: vec![&one, &two] }];
        let slope = draw(2 * model.config().hidden_size);
        let value = |lora: &LoraMatrices| -> f64 {
            let pass = base.pool(lora, &groups).unwrap();
            pass.hidden().iter().zip(&slope).map(|(h, s)| f64::from(*h) * f64::from(*s)).sum()
        };
        let mut gradients = lora.zero_gradients();
        base.pool(&lora, &groups).unwrap().backward(&slope, &mut gradients).unwrap();
        // Along a random direction over all matrices.
        let direction: Vec<Vec<f32>> = lora.values.iter().map(|values| draw(values.len())).collect();
        let along: f64 =
            gradients.iter().flatten().zip(direction.iter().flatten()).map(|(g, d)| f64::from(g * d)).sum();
        let moved = |by: f32| {
            let mut moved = lora.clone();
            for (values, direction) in moved.values.iter_mut().zip(&direction) {
                values.iter_mut().zip(direction).for_each(|(value, d)| *value += by * d);
            }
            value(&moved)
        };
        let numeric = (moved(1e-3) - moved(-1e-3)) / 2e-3;
        assert!((numeric - along).abs() < 2e-2 * numeric.abs().max(0.1), "{name}: {along}, numeric {numeric}");
    }
}

#[test]
fn a_preference_is_learned_saved_and_read_again_with_the_same_scores() {
    let folder = tempfile::tempdir().unwrap();
    let gguf = folder.path().join("tiny-llama.gguf");
    write_gguf(&load("tiny-llama").1, "llama", GgmlDType::F32, &gguf);
    for name in ["tiny-llama", "tiny-gemma2", gguf.to_str().unwrap()] {
        // A path that is absolute stays what it is.
        let (path, model) = load(name);
        let out = tempfile::tempdir().unwrap();
        let (pairs, settings) = (taught(), settings());
        let card = train((&path, &model), &pairs, &settings, (0.3, 1), out.path(), &Progress::silent()).unwrap();
        let trained = &card.trained;
        assert!(
            (trained.first_loss - std::f64::consts::LN_2).abs() < 1e-9,
            "{name}: before the first step all score 0"
        );
        assert!(trained.last_loss < 0.3, "{name}: {trained:?}");
        assert!(
            trained.held_out.overall.low > 0.6 && trained.held_out.overall.pairs >= MIN_HELD_OUT,
            "{name}: {trained:?}"
        );

        let classifier = Classifier::load(&out.path().display().to_string()).unwrap();
        let score = |pairs: &[(Item, Item)]| {
            let items: Vec<&Item> = pairs.iter().flat_map(|(a, b)| [a, b]).collect();
            Ok(classifier.score(&items).unwrap().chunks_exact(2).map(|both| both[0] - both[1]).collect())
        };
        let out_of_training: Vec<Pair> = held_out(&pairs, 0.3, 1).into_iter().map(|i| pairs[i].clone()).collect();
        let report = evaluate(&out_of_training, None, score).unwrap();
        assert_eq!(report, trained.held_out, "{name}: the saved model is the one that was measured");
        let card: serde_json::Value = durable::read_json(&out.path().join("taod_reward.json")).unwrap();
        assert_eq!(card["base"]["sha256"], model.identity().sha256);
    }
}

#[test]
fn too_few_pairs_are_refused() {
    let (path, model) = load("tiny-llama");
    let out = tempfile::tempdir().unwrap();
    let settings = settings();
    let few = train((&path, &model), &taught()[..20], &settings, (0.1, 1), out.path(), &Progress::silent());
    let message = few.map(|_| ()).unwrap_err().to_string();
    assert!(message.contains("pairs held out are too few; give at least 10"), "{message}");
    assert!(!out.path().join("config.json").exists());
    let wrong = Settings { rank: 0, ..settings };
    let refused = train((&path, &model), &taught(), &wrong, (0.3, 1), out.path(), &Progress::silent());
    assert!(refused.map(|_| ()).unwrap_err().to_string().starts_with("tuning.rank"));
}

#[test]
fn keys_that_would_do_nothing_are_refused() {
    let (path, model) = load("tiny-llama");
    let folder = tempfile::tempdir().unwrap();
    for (key, settings) in [
        ("tuning.dropout", Settings { dropout: 0.1, ..settings() }),
        ("tuning.memory_mib", Settings { memory_mib: 1000, ..settings() }),
        ("tuning.command", Settings { command: vec!["trainer".into()], ..settings() }),
        ("tuning.precision", Settings { precision: crate::engine::Precision::Int16, ..settings() }),
    ] {
        let silent = crate::progress::Progress::silent();
        let refused = train((&path, &model), &taught(), &settings, (0.2, 1), folder.path(), &silent);
        let message = refused.err().unwrap().to_string();
        assert!(message.starts_with(key) && message.contains("without it"), "{message}");
    }
}
