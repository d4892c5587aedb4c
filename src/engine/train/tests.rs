use candle_core::{DType, Device, Tensor};

use super::fixture::{Golden, Tiny, lora};
use super::*;
use crate::engine::Architecture;

const KINDS: [Architecture; 3] = [Architecture::Llama, Architecture::Qwen2, Architecture::Qwen3];

/// The loss of the golden files: minus the mean over completions of their mean log-prob.
fn loss(logprobs: &Tensor, groups: &[GroupTokens]) -> Tensor {
    let lengths: Vec<usize> = groups.iter().flat_map(|g| g.completions.iter().map(|c| c.len())).collect();
    let factor = |n: &usize| std::iter::repeat_n(-1.0 / (*n as f32 * lengths.len() as f32), *n);
    let factors: Vec<f32> = lengths.iter().flat_map(factor).collect();
    (logprobs * Tensor::new(factors, &Device::Cpu).unwrap()).unwrap().sum_all().unwrap()
}

#[test]
fn logprobs_and_all_gradients_agree_with_peft() {
    for kind in KINDS {
        let (golden, tiny) = (Golden::read(kind.as_str()), Tiny::new(kind));
        let base = Base::new(&tiny.config, &tiny.weights).unwrap();
        let lora = lora(&tiny.config, &golden.spec());
        let groups = golden.groups();
        let found = base.forward(Some(&lora), &groups).unwrap();
        let logprobs = found.logprobs.to_vec1::<f32>().unwrap();
        assert_eq!(logprobs.len(), golden.logprobs.concat().len());
        for (a, b) in logprobs.iter().zip(golden.logprobs.concat()) {
            assert!((a - b).abs() < 1e-4, "{kind:?}: {a}, PyTorch {b}");
        }
        let loss = loss(&found.logprobs, &groups);
        assert!((loss.to_scalar::<f32>().unwrap() - golden.loss).abs() < 1e-4);
        let gradients = loss.backward().unwrap();
        let vars = lora.vars();
        assert_eq!(vars.len(), golden.gradients.len());
        for (key, var) in vars {
            golden.gradients[&key].expect(&key, gradients.get(var).unwrap(), 1e-3);
        }
    }
}

#[test]
fn sharing_the_prompt_changes_no_gradient() {
    let (golden, tiny) = (Golden::read("llama"), Tiny::new(Architecture::Llama));
    let base = Base::new(&tiny.config, &tiny.weights).unwrap();
    let lora = lora(&tiny.config, &golden.spec());
    let shared = golden.groups();
    let alone: Vec<GroupTokens> = shared
        .iter()
        .flat_map(|g| g.completions.iter().map(|c| GroupTokens { prompt: g.prompt, completions: vec![*c] }))
        .collect();
    let gradients = |groups: &[GroupTokens]| {
        loss(&base.forward(Some(&lora), groups).unwrap().logprobs, groups).backward().unwrap()
    };
    let (a, b) = (gradients(&shared), gradients(&alone));
    for (key, var) in lora.vars() {
        let (a, b) = (a.get(var).unwrap(), b.get(var).unwrap());
        let distance = (a - b).unwrap().sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap().sqrt();
        let norm = a.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap().sqrt();
        assert!(distance <= 1e-5 * norm, "{key}: {distance} of {norm}");
    }
}

#[test]
fn a_fresh_adapter_changes_nothing_and_equal_seeds_give_equal_matrices() {
    let (golden, tiny) = (Golden::read("llama"), Tiny::new(Architecture::Llama));
    let base = Base::new(&tiny.config, &tiny.weights).unwrap();
    let fresh = |seed| LoraVars::fresh(&tiny.config, &golden.spec(), seed).unwrap();
    let groups = golden.groups();
    let with = base.forward(Some(&fresh(1)), &groups).unwrap().logprobs.to_vec1::<f32>().unwrap();
    assert_eq!(with, base.forward(None, &groups).unwrap().logprobs.to_vec1::<f32>().unwrap());
    let values = |seed| -> Vec<Vec<f32>> {
        fresh(seed).vars().iter().map(|(_, v)| v.flatten_all().unwrap().to_vec1().unwrap()).collect()
    };
    assert_eq!(values(1), values(1));
    assert_ne!(values(1), values(2));
    let a = &values(1)[0];
    assert!(a.iter().all(|v| v.abs() <= 0.25) && a.iter().any(|v| v.abs() > 0.2), "within 1/sqrt(16)");
}

#[test]
fn tokens_that_cannot_be_scored_are_refused() {
    let tiny = Tiny::new(Architecture::Llama);
    let base = Base::new(&tiny.config, &tiny.weights).unwrap();
    let error = |prompt: &[u32], completion: &[u32]| {
        let groups = [GroupTokens { prompt, completions: vec![completion] }];
        base.forward(None, &groups).err().unwrap().to_string()
    };
    assert!(error(&[1], &[]).contains("no tokens"));
    assert!(error(&[1; 60], &[2; 6]).contains("context of 64"), "{}", error(&[1; 60], &[2; 6]));
    let groups = [GroupTokens { prompt: &[1; 60], completions: vec![&[2; 5]] }];
    assert_eq!(base.forward(None, &groups).unwrap().logprobs.dtype(), DType::F32);
}
