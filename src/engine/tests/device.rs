//! The engine on a device against transformers, PEFT and the engine's own loops, for every family.
//!
//! `candle-cpu` runs the accelerators' code in every test run. The tests named `gpu_` are the same on a real accelerator, for
//! `make test-gpu`: in f32 to the same kind of bound, in bf16 to what 8 bits of mantissa leave.

use std::sync::Arc;

use super::families::TINY;
use super::mixed::{groups, random};
use super::*;
use crate::engine::device::Place;
use crate::engine::runner::Runner;
use crate::engine::train::fixture::{Golden as Trained, Tiny, lora};
use crate::engine::train::{Activations, Base, DropoutSeeds, GroupTokens, LoraMatrices};

/// The accelerators' code on the processor.
const HERE: Settings = Settings { device: DeviceName::CandleCpu, dtype: Dtype::Auto };

/// Returns the accelerator that this build is for.
fn accelerator(dtype: Dtype) -> Place {
    let device = if cfg!(feature = "metal") { DeviceName::Metal } else { DeviceName::Cuda(0) };
    Settings { device, dtype }.open().unwrap().unwrap()
}

fn here() -> Place {
    HERE.open().unwrap().unwrap()
}

fn load_on(name: &str, place: &Place) -> Model {
    Model::load_at(&fixture(name).display().to_string(), Hold::Stored, Some(place.clone())).unwrap()
}

/// The largest differences from transformers and PEFT: of logits, of log-probs of the base and of an adapter, of divergences.
fn differences(name: &str, place: &Place) -> [f32; 4] {
    let model = load_on(name, place);
    let adapter = Adapter::load(&fixture(&format!("{name}-lora")), &model).unwrap();
    let cases = golden(name);
    let mut off = [0.0f32; 4];
    for case in &cases {
        let logits = logits_after(&model, &case.prompt_ids);
        off[0] = off[0].max(worst(&logits[..case.logits.len()], &case.logits));
    }
    // All in one batch, and each alone.
    let items: Vec<ScoreItem> = cases.iter().map(Case::item).collect();
    let (base, adapted) = (logprobs(&model, None, &items).unwrap(), logprobs(&model, Some(&adapter), &items).unwrap());
    let apart = divergence(&model, Some(&adapter), None, &items).unwrap();
    for (at, case) in cases.iter().enumerate() {
        let alone = logprobs(&model, None, &[case.item()]).unwrap().remove(0);
        off[1] = off[1].max(worst(&base[at], &case.logprobs)).max(worst(&alone, &case.logprobs));
        off[2] = off[2].max(worst(&adapted[at], &case.adapter_logprobs));
        off[3] = off[3].max(worst(&apart[at], &case.divergence));
    }
    println!("{name} on {}: logits, log-probs, adapted, divergences within {off:?}", model.computed_on().unwrap());
    off
}

/// Returns the logits after a prompt that is read in pieces, the last of one token.
fn logits_after(model: &Model, prompt: &[u32]) -> Vec<f32> {
    let runner = Runner::OnDevice(model.device().unwrap().clone());
    let (mut cache, pool) = (Cache::new(runner.shape()), runner.pool(64));
    let cut = prompt.len() - 1;
    let mut hidden = None;
    for tokens in [&prompt[..cut / 2], &prompt[cut / 2..cut], &prompt[cut..]].into_iter().filter(|t| !t.is_empty()) {
        hidden = Some(runner.forward(&mut [Run { cache: &mut cache, tokens, adapter: None }], &pool).unwrap());
    }
    let logits = runner.logits(&hidden.unwrap(), &[0], Vec::new()).unwrap();
    let mut row = vec![0.0; logits.columns()];
    logits.copy_row(0, &mut row);
    row
}

#[test]
fn every_family_matches_transformers_and_peft() {
    for name in TINY {
        let off = differences(name, &here());
        assert!(off.iter().all(|off| *off < 2e-5), "{name}: {off:?}");
    }
}

/// Draws from three policies in one batch, prompts read in pieces and shared.
fn drawn(model: &Model, name: &str, max_sequences: usize) -> Vec<Vec<Completion>> {
    let own = Adapter::load(&fixture(&format!("{name}-lora")), model).unwrap();
    let narrow = random(model, 3, &[Linear::V, Linear::Gate, Linear::Down], 7);
    let adapters = [None, Some(&own), Some(&narrow)];
    let policies = adapters.map(|adapter| Policy::new(model, adapter, WeightForm::F32).unwrap());
    let limits = BatchLimits { max_sequences, max_rows: 20, ..BatchLimits::default() };
    generate_each(groups(&policies), &limits, &mut |_, _, _| {}).unwrap()
}

/// Checks that equal seeds give the tokens that the processor draws, with log-probs within a bound; greedy ones too.
fn expect_draws(name: &str, place: &Place, bound: f32) {
    let (device, here) = (load_on(name, place), load(&fixture(name)));
    for max_sequences in [64, 5] {
        let (ours, theirs) = (drawn(&device, name, max_sequences), drawn(&here, name, max_sequences));
        for (ours, theirs) in ours.iter().flatten().zip(theirs.iter().flatten()) {
            assert_eq!(
                (&ours.token_ids, &ours.text, ours.finish_reason),
                (&theirs.token_ids, &theirs.text, theirs.finish_reason)
            );
            let off =
                worst(&ours.logprobs, &theirs.logprobs).max(worst(&ours.sampler_logprobs, &theirs.sampler_logprobs));
            assert!(off < bound, "{name}: {off}");
        }
    }
    let greedy = |model: &Model, case: &Case| {
        let group =
            Group { id: 1, prompt: case.prompt_ids.clone(), seeds: vec![1], sampling: greedy(case.greedy.len()) };
        generate(&exact(model), vec![group], &BatchLimits::default(), &mut |_, _, _| {}).unwrap()[0][0]
            .token_ids
            .clone()
    };
    golden(name).iter().for_each(|case| assert_eq!(greedy(&device, case), case.greedy, "{name}"));
}

#[test]
fn equal_seeds_draw_the_tokens_that_the_processor_draws() {
    TINY.into_iter().for_each(|name| expect_draws(name, &here(), 2e-5));
}

/// Returns the gradients of two groups under an adapter, kept or made again.
fn gradients(base: &Base, lora: &LoraMatrices, dropout: Option<&DropoutSeeds>) -> Vec<Vec<f32>> {
    let first = GroupTokens { prompt: &[3, 17, 42, 5, 9], completions: vec![&[7, 1, 30, 2], &[11], &[40, 41, 8]] };
    let groups = [first, GroupTokens { prompt: &[20, 33, 4], completions: vec![&[6, 46, 2], &[13, 0]] }];
    let mut gradients = lora.zero_gradients();
    let pass = base.forward_dropping(lora, &groups, dropout).unwrap();
    pass.backward(&Trained::slopes(&groups), &mut gradients).unwrap();
    gradients
}

/// Checks log-probs and gradients of an architecture against PEFT, and of a batch with dropout against the processor's, each to a
/// bound.
fn expect_gradients(kind: Architecture, place: &Place, bound: f32) {
    let (golden, tiny) = (Trained::read(kind.as_str()), Tiny::new(kind));
    let device = tiny.on(place.clone());
    let mut base = Base::placed(&tiny.config, &tiny.weights, Some(&device), WeightForm::F32).unwrap();
    let off = golden.expect_pass_of(&base, bound);
    println!("{kind:?} on {}: log-probs within {:.1e}, gradients within {:.1e} of PEFT", device.place(), off.0, off.1);
    // The base alone, as known log-probs are computed.
    let here = Base::new(&tiny.config, &tiny.weights, WeightForm::F32).unwrap();
    let (ours, theirs) = (base.score(&golden.groups()).unwrap(), here.score(&golden.groups()).unwrap());
    assert!(worst(&ours.logprobs, &theirs.logprobs) < bound && worst(&ours.entropies, &theirs.entropies) < bound);

    let lora = lora(&tiny.config, &LoraSpec { rank: 4, alpha: 8.0, ..LoraSpec::default() });
    let dropout = DropoutSeeds { rate: 0.33, groups: vec![(1, vec![2, 3, 4]), (5, vec![6, 7])] };
    let ours = gradients(&base, &lora, Some(&dropout));
    for (ours, theirs) in ours.iter().zip(gradients(&here, &lora, Some(&dropout))) {
        let norm = theirs.iter().map(|v| v * v).sum::<f32>().sqrt();
        assert!(worst(ours, &theirs) < bound * norm, "{kind:?}: {} of {norm}", worst(ours, &theirs));
    }
    base.activations = Activations::Again;
    let again = gradients(&base, &lora, Some(&dropout));
    for (again, ours) in again.iter().zip(&ours) {
        let norm = ours.iter().map(|v| v * v).sum::<f32>().sqrt();
        assert!(worst(again, ours) <= 1e-3 * bound * norm, "{kind:?}: made again they differ");
    }
}

#[test]
fn gradients_agree_with_peft_and_with_the_processor_s() {
    Architecture::ALL.into_iter().for_each(|kind| expect_gradients(kind, &here(), 1e-4));
}

/// What bf16 does on an accelerator, 16 bits of another kind do here: each place where precisions meet is passed.
#[test]
fn half_precision_stays_within_what_its_mantissa_leaves() {
    expect_mantissa(&Place::half(), 2e-2, 5e-2);
}

/// Checks all but draws to bounds for values and for gradients.
fn expect_mantissa(place: &Place, values: f32, of_gradients: f32) {
    for name in TINY {
        let off = differences(name, place);
        assert!(off.iter().all(|off| *off < values), "{name}: {off:?}");
        let model = load_on(name, place);
        assert!(!exact(&model).is_exact());
        assert!(drawn(&model, name, 5).iter().flatten().all(|answer| answer.logprobs.iter().all(|l| l.is_finite())));
    }
    Architecture::ALL.into_iter().for_each(|kind| expect_gradients(kind, place, of_gradients));
}

#[test]
fn a_setting_that_names_a_device_gives_a_model_on_it() {
    let path = fixture("tiny-llama").display().to_string();
    let model = Model::load_on(&path, Hold::F32, &HERE).unwrap();
    assert_eq!((model.computed_on().as_deref(), model.weights().hold()), (Some("candle-cpu f32"), Hold::Stored));
    let beside = model.load_beside(&fixture("tiny-qwen2").display().to_string()).unwrap();
    assert_eq!(beside.computed_on().as_deref(), Some("candle-cpu f32"));
    let here = Model::load_on(&path, Hold::F32, &Settings::default()).unwrap();
    assert_eq!((here.computed_on(), here.weights().hold()), (None, Hold::F32));
    // Their sequences cannot stand in one batch.
    let mut batcher = Batcher::new(exact(&here), BatchLimits::default()).unwrap();
    assert!(batcher.push_as(&exact(&model), group(0, &[5, 6], 1, 4)).is_err());
    // A page holds what its cells take there: tiny-llama's is as large in f32, since its heads are whole blocks.
    assert_eq!(model.cache_shape().page_bytes(), here.cache_shape().page_bytes());
}

#[test]
fn a_model_on_a_device_refuses_what_would_not_compute() {
    let tiny = Tiny::new(Architecture::Llama);
    let device: Arc<DeviceModel> = tiny.on(here());
    let base = Base::placed(&tiny.config, &tiny.weights, Some(&device), WeightForm::F32).unwrap();
    let long = vec![1u32; 70];
    for (prompt, completion, word) in
        [(&[1u32, 2][..], &[48u32, 1][..], "token id 48"), (&long, &[1, 2], "outside the context")]
    {
        let groups = [GroupTokens { prompt, completions: vec![completion] }];
        let error = base.score(&groups).unwrap_err().to_string();
        assert!(error.contains(word), "{error}");
    }
}

#[test]
#[ignore = "needs an accelerator: make test-gpu"]
fn gpu_f32_agrees_with_transformers_peft_and_the_processor() {
    let place = accelerator(Dtype::F32);
    for name in TINY {
        let off = differences(name, &place);
        assert!(off.iter().all(|off| *off < 1e-3), "{name}: {off:?}");
        expect_draws(name, &place, 1e-3);
    }
    Architecture::ALL.into_iter().for_each(|kind| expect_gradients(kind, &place, 2e-3));
}

#[test]
#[ignore = "needs an accelerator: make test-gpu"]
fn gpu_bf16_stays_within_what_its_mantissa_leaves() {
    expect_mantissa(&accelerator(Dtype::Bf16), 0.1, 0.3);
}
