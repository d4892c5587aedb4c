//! Models whose matrices stay as their files have them, against the same models widened.

use candle_core::quantized::GgmlDType;

use super::gguf::{changed, write_gguf};
use super::*;
use crate::engine::train::{Base, GroupTokens, LoraMatrices};

/// Returns the slopes of a sum of log-probs.
fn gradients(model: &Model, groups: &[GroupTokens]) -> Vec<Vec<f32>> {
    let base = Base::new(model.config(), model.weights(), WeightForm::F32).unwrap();
    let mut lora = LoraMatrices::fresh(model.config(), &LoraSpec { rank: 2, ..LoraSpec::default() }, 3);
    // After some training, B is not zero.
    lora.values.iter_mut().skip(1).step_by(2).flatten().enumerate().for_each(|(i, v)| *v = (i % 7) as f32 * 1e-3);
    let mut gradients = lora.zero_gradients();
    let pass = base.forward(&lora, groups).unwrap();
    let slopes = vec![-1.0; pass.logprobs().len()];
    pass.backward(&slopes, &mut gradients).unwrap();
    gradients
}

#[test]
fn a_model_held_as_it_is_stored_gives_what_a_widened_one_gives() {
    let folder = tempfile::tempdir().unwrap();
    let llama = changed("tiny-llama", folder.path(), "\"llama3\"", "\"default\"");
    let path = folder.path().join("tiny.gguf");
    write_gguf(&llama, "llama", GgmlDType::Q8_0, &path);
    for source in [fixture("tiny-llama"), fixture("tiny-phi3"), fixture("tiny-gemma2"), path] {
        let name = source.display().to_string();
        let [wide, stored] = [Hold::F32, Hold::Stored].map(|hold| Model::load_held(&name, hold).unwrap());
        assert_eq!((wide.weights().hold(), stored.weights().hold()), (Hold::F32, Hold::Stored));
        let (prompt, completion): (Vec<u32>, Vec<u32>) = ((10..30).collect(), (40..52).collect());
        let item = ScoreItem { prompt: &prompt, completion: &completion };
        let scored = |model: &Model| logprobs(model, None, &[item]).unwrap();
        assert_eq!(scored(&stored), scored(&wide), "{name}");

        let drawn = |model: &Model| {
            let policy = Policy::new(model, None, WeightForm::F32).unwrap();
            let samples = generate(
                &policy,
                vec![group(1, &prompt, 3, 8)],
                &BatchLimits::default(),
                &mut |_: u64, _: usize, _: &Completion| (),
            );
            samples.unwrap()[0].iter().map(|sample| sample.token_ids.clone()).collect::<Vec<_>>()
        };
        assert_eq!(drawn(&stored), drawn(&wide), "{name}");

        let groups = [GroupTokens { prompt: &prompt, completions: vec![&completion, &completion[3..]] }];
        for (found, expected) in gradients(&stored, &groups).iter().zip(gradients(&wide, &groups)) {
            let norm = expected.iter().map(|v| v * v).sum::<f32>().sqrt();
            assert!(worst(found, &expected) <= 1e-5 * norm.max(1e-3), "{name}: {} of {norm}", worst(found, &expected));
        }
        let bytes = |model: &Model| model.weights().bytes(model.config());
        match name.ends_with(".gguf") {
            true => assert!(bytes(&stored) * 3 < bytes(&wide), "{} of {}", bytes(&stored), bytes(&wide)),
            false => assert!(bytes(&stored) <= bytes(&wide)),
        }
    }
}
