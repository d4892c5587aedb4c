//! Every family against transformers and PEFT, and the engine's own ways of computing one thing against each other.

use super::gguf::changed;
use super::*;
use crate::engine::train::{Base, GroupTokens};

/// Windows of Mistral, Gemma 2 and Gemma 3 are 9 positions, of Phi-3 40, all shorter than the longest prompt.
pub(super) const TINY: [&str; 9] = [
    "tiny-llama",
    "tiny-qwen2",
    "tiny-qwen3",
    "tiny-mistral",
    "tiny-smollm3",
    "tiny-olmo2",
    "tiny-phi3",
    "tiny-gemma2",
    "tiny-gemma3",
];

#[test]
fn tiny_models_of_every_architecture_match_transformers_and_peft() {
    for name in TINY {
        let model = load(&fixture(name));
        let (logits, logprobs_off) = compare(&model, name);
        assert!(logits < 1e-4 && logprobs_off < 1e-4, "{name}: {logits} {logprobs_off}");
        expect_adapted(name, &model, &fixture(&format!("{name}-lora")));
    }
}

fn expect_adapted(name: &str, model: &Model, adapter: &Path) {
    let adapter = Adapter::load(adapter, model).unwrap();
    let cases = golden(name);
    let items: Vec<ScoreItem> = cases.iter().map(Case::item).collect();
    let scored = logprobs(model, Some(&adapter), &items).unwrap();
    let apart = divergence(model, Some(&adapter), None, &items).unwrap();
    let mut off = (0.0f32, 0.0f32);
    for ((case, scored), apart) in cases.iter().zip(scored).zip(apart) {
        off.0 = off.0.max(worst(&scored, &case.adapter_logprobs));
        off.1 = off.1.max(worst(&apart, &case.divergence));
        assert!(case.divergence.iter().any(|d| *d > 0.01), "the adapter changes too little to test anything");
    }
    assert!(off.0 < 1e-4 && off.1 < 1e-4, "{name} with adapter: {off:?}");
    println!("{name}: with an adapter log-probs within {:.1e}, divergences within {:.1e} of PEFT", off.0, off.1);
}

#[test]
fn a_qwen_that_slides_and_one_that_is_stretched_match_transformers() {
    let folder = tempfile::tempdir().unwrap();
    let on =
        "\"use_sliding_window\": true, \"sliding_window\": 9, \"max_window_layers\": 1, \"layer_types\": null, \"x\"";
    let text = std::fs::read_to_string(fixture("tiny-qwen2").join("config.json")).unwrap();
    let from: String = text.lines().find(|line| line.contains("vocab_size")).unwrap().trim_end_matches(',').into();
    // The last of equal keys counts, and this one is the last.
    let model = changed("tiny-qwen2", folder.path(), &from, &format!("{from}, {on}: 0"));
    let windows: Vec<_> = model.config().layers.iter().map(|layer| layer.window).collect();
    assert_eq!(windows, [None, Some(9)]);
    let (logits, logprobs) = compare(&model, "tiny-qwen2-sliding");
    assert!(logits < 1e-4 && logprobs < 1e-4, "{logits} {logprobs}");

    let folder = tempfile::tempdir().unwrap();
    let yarn = "\"rope_type\": \"yarn\", \"factor\": 4.0, \"original_max_position_embeddings\": 64";
    let model = changed("tiny-qwen3", folder.path(), "\"rope_type\": \"default\"", yarn);
    let (logits, logprobs) = compare(&model, "tiny-qwen3-yarn");
    assert!(logits < 1e-4 && logprobs < 1e-4, "{logits} {logprobs}");
}

/// The forward pass of training knows nothing of caches, pages and batches.
#[test]
fn sampling_and_training_compute_the_same_logprobs() {
    for name in TINY {
        let model = load(&fixture(name));
        let cases = golden(name);
        let items: Vec<ScoreItem> = cases.iter().map(Case::item).collect();
        let scored = logprobs(&model, None, &items).unwrap().concat();
        let groups: Vec<GroupTokens> =
            items.iter().map(|i| GroupTokens { prompt: i.prompt, completions: vec![i.completion] }).collect();
        let trained = Base::new(model.config(), model.weights(), WeightForm::F32).unwrap().score(&groups).unwrap();
        let off = worst(&trained.logprobs, &scored);
        assert!(off < 1e-4, "{name}: {off}");
    }
}

#[test]
fn sampled_logprobs_are_those_of_scoring_the_same_ids() {
    for name in TINY {
        let model = load(&fixture(name));
        let adapter = Adapter::load(&fixture(&format!("{name}-lora")), &model).unwrap();
        // Longer than two pages and than the windows, so that samples look back into the middle of a shared page.
        let prompt: Vec<u32> = (10..55).collect();
        let limits = BatchLimits::default();
        let mut done = 0;
        let mut count = |id: u64, _: usize, _: &Completion| done += usize::from(id == 7);
        let policy = Policy::new(&model, Some(&adapter), WeightForm::F32).unwrap();
        let samples = generate(&policy, vec![group(7, &prompt, 5, 40)], &limits, &mut count).unwrap();
        assert_eq!(done, 5);
        let items: Vec<ScoreItem> =
            samples[0].iter().map(|s| ScoreItem { prompt: &prompt, completion: &s.token_ids }).collect();
        for (sample, scored) in samples[0].iter().zip(logprobs(&model, Some(&adapter), &items).unwrap()) {
            assert!(worst(&sample.logprobs, &scored) < 1e-5, "{name}");
            assert!(sample.sampler_logprobs.len() == scored.len());
        }
    }
}

#[test]
fn a_row_sees_its_window_and_nothing_before_it() {
    // One layer that slides: what lies a window back cannot reach the next token.
    let folder = tempfile::tempdir().unwrap();
    let model = changed("tiny-mistral", folder.path(), "\"num_hidden_layers\": 2", "\"num_hidden_layers\": 1");
    let window = model.config().layers[0].window.unwrap();
    let score = |prompt: &[u32]| logprobs(&model, None, &[ScoreItem { prompt, completion: &[7] }]).unwrap()[0][0];
    let prompt: Vec<u32> = (10..60).collect();
    let with = |place: usize| {
        let mut prompt = prompt.clone();
        prompt[place] = 9;
        prompt
    };
    assert_eq!(score(&with(prompt.len() - window - 1)), score(&prompt));
    assert_ne!(score(&with(prompt.len() - window)), score(&prompt));
}

#[test]
fn an_adapter_of_fused_projections_is_saved_as_peft_names_them() {
    let model = load(&fixture("tiny-phi3"));
    let spec = LoraSpec { rank: 3, alpha: 6.0, ..LoraSpec::default() };
    let lora = train::LoraMatrices::fresh(model.config(), &spec, 5);
    let folder = tempfile::tempdir().unwrap();
    save_peft(folder.path(), model.identity(), &spec, &lora.tensors().unwrap()).unwrap();
    let config = std::fs::read_to_string(folder.path().join("adapter_config.json")).unwrap();
    let config: serde_json::Value = serde_json::from_str(&config).unwrap();
    assert_eq!(config["target_modules"], serde_json::json!(["o_proj", "down_proj", "qkv_proj", "gate_up_proj"]));
    let read = Adapter::load(folder.path(), &model).unwrap();
    assert_eq!(read.spec, spec);
    let dims = |linear: Linear| read.get(1, linear).map(|pair| pair.b.dims().to_vec()).unwrap();
    assert_eq!([dims(Linear::Q), dims(Linear::V), dims(Linear::Up)], [[64, 3], [32, 3], [96, 3]]);
    // Another family's adapter is refused by the tensor that does not fit.
    let error = Adapter::load(&fixture("tiny-mistral-lora"), &model).unwrap_err().to_string();
    assert!(error.contains("tensors fit the model"), "{error}");
    let error = Module::check_targets(model.config(), &[Linear::Q, Linear::V]).unwrap_err().to_string();
    assert!(error.contains("k_proj is no target, but phi3 keeps q_proj, k_proj, v_proj in one matrix"), "{error}");
}
