//! What must hold of every training method in the whole loop, on a tiny model.

use super::tests::{Killer, bytes, samples, settings, tiny};
use super::*;
use crate::adapter::losses::Method;
use crate::engine::WeightForm;
use crate::engine::train::GroupTokens;
use crate::engine::train::fixture::Tiny;

/// The samples with the log-probs of the base, from which they are taken to be drawn.
fn told(tiny: &Tiny) -> Vec<Sample> {
    let base = Base::new(&tiny.config, &tiny.weights, WeightForm::F32).unwrap();
    let mut samples = samples();
    for sample in &mut samples {
        let group = GroupTokens { prompt: &sample.prompt, completions: vec![&sample.completion] };
        sample.old_logprobs = Some(base.score(&[group]).unwrap().logprobs);
    }
    samples
}

/// Returns how many nats likelier the best answer of a prompt is than its worst, in the mean over prompts.
fn preference(tiny: &Tiny, samples: &[Sample], out: Option<&Path>) -> f64 {
    let base = Base::new(&tiny.config, &tiny.weights, WeightForm::F32).unwrap();
    let spec = settings().lora();
    let lora = match out {
        None => crate::engine::train::LoraMatrices::fresh(&tiny.config, &spec, 0),
        Some(out) => {
            let matrices = Checkpoint::load(&out.join(CHECKPOINT)).unwrap().matrices();
            crate::engine::train::LoraMatrices::restored(&tiny.config, &spec, &matrices).unwrap()
        }
    };
    let log = |sample: &Sample| -> f64 {
        let group = GroupTokens { prompt: &sample.prompt, completions: vec![&sample.completion] };
        let pass = base.forward(&lora, &[group]).unwrap();
        pass.logprobs().iter().map(|l| f64::from(*l)).sum::<f64>() / sample.completion.len() as f64
    };
    let groups: Vec<&[Sample]> = samples.chunk_by(|a, b| a.group == b.group).collect();
    let margin = |group: &&[Sample]| {
        let by_reward = |a: &&Sample, b: &&Sample| a.reward.total_cmp(&b.reward);
        log(group.iter().max_by(by_reward).unwrap()) - log(group.iter().min_by(by_reward).unwrap())
    };
    groups.iter().map(margin).sum::<f64>() / groups.len() as f64
}

#[test]
fn every_method_makes_better_answers_likelier_than_worse_ones() {
    let (tiny, folder) = (tiny(), tempfile::tempdir().unwrap());
    let samples = told(&tiny);
    let before = preference(&tiny, &samples, None);
    for method in Method::ALL {
        let out = folder.path().join(method.to_string());
        let settings = Settings { method, epochs: 4, max_kl: 1e3, min_reward: 0.1, ..settings() };
        // Plain fine-tuning is given the answers to learn.
        let given: Vec<Sample> = match method {
            Method::Sft => samples.iter().filter(|s| s.reward > 0.7).cloned().collect(),
            _ => samples.clone(),
        };
        let outcome = tiny.tune(&given, None, &settings, &out).unwrap();
        let after = preference(&tiny, &samples, Some(&out));
        assert!(after > before + 0.1, "{method}: {before} -> {after}");
        let mismatch = outcome.mismatch.map(|m| (m.gap < 1e-4, m.effective > 0.999));
        assert_eq!(mismatch, method.is_on_policy().then_some((true, true)), "{method}");
        assert_eq!(outcome.steps[0].clipped, 0.0, "{method}");
        assert!((outcome.steps[0].ratio - 1.0).abs() < 1e-4, "{method}");
    }
}

#[test]
fn a_group_that_is_cut_into_parts_trains_as_one_that_is_not() {
    let (tiny, folder) = (tiny(), tempfile::tempdir().unwrap());
    let samples = told(&tiny);
    for method in [Method::Raft, Method::Grpo, Method::Rloo, Method::Dpo, Method::Oapl] {
        let run = |rows: usize| {
            let out = folder.path().join(format!("{method}-{rows}"));
            let settings = Settings { method, batch_tokens: rows, epochs: 1, max_kl: 1e3, ..settings() };
            tiny.tune(&samples, None, &settings, &out).unwrap().steps
        };
        // Ten rows hold no group of four answers.
        for (cut, whole) in run(10).iter().zip(&run(1000)) {
            let near = |a: f32, b: f32| (a - b).abs() <= 2e-3 * b.abs().max(0.05);
            assert!(near(cut.loss, whole.loss) && near(cut.grad_norm, whole.grad_norm), "{method}: {cut:?} {whole:?}");
            assert!(near(cut.ratio, whole.ratio), "{method}: {cut:?} {whole:?}");
            assert_eq!((cut.tokens, cut.samples), (whole.tokens, whole.samples));
        }
    }
}

#[test]
fn a_killed_run_with_old_log_probs_goes_on_to_the_same_bytes() {
    let (tiny, folder) = (tiny(), tempfile::tempdir().unwrap());
    let samples = told(&tiny);
    let settings = Settings { method: Method::Grpo, ..settings() };
    let (whole, killed) = (folder.path().join("whole"), folder.path().join("killed"));
    tiny.tune(&samples, None, &settings, &whole).unwrap();
    Killer::stop_after(5, |progress| {
        tune_frozen(tiny.frozen(), &samples, None, &settings, 7, &killed, progress).map(drop)
    });
    tiny.tune(&samples, None, &settings, &killed).unwrap();
    assert_eq!(bytes(&whole), bytes(&killed));
}

#[test]
fn a_policy_gradient_asks_for_a_sampler_that_agrees() {
    let (tiny, folder) = (tiny(), tempfile::tempdir().unwrap());
    for method in Method::ALL {
        let settings = Settings { method, max_kl: 1e3, ..settings() };
        let refused = |samples: &[Sample], name: &str| {
            let outcome = tiny.tune(samples, None, &settings, &folder.path().join(format!("{method}-{name}")));
            outcome.err().map(|error| error.to_string())
        };
        // No log-probs at all, and those of a sampler that lay 0.06 nats a token elsewhere.
        let untold = refused(&samples(), "untold");
        let mut strange = told(&tiny);
        strange.iter_mut().flat_map(|s| s.old_logprobs.iter_mut().flatten()).for_each(|log| *log -= 0.06);
        let strange = refused(&strange, "strange");
        match method.is_on_policy() {
            true => {
                let says = |error: Option<String>, word: &str| error.is_some_and(|text| text.contains(word));
                assert!(says(untold, &format!("without which {method} cannot be trusted")), "{method}");
                assert!(says(strange, "0.060 nats a token, past tuning.max_sampler_gap = 0.05"), "{method}");
            }
            false => assert_eq!((untold, strange), (None, None), "{method}"),
        }
    }
}
