use super::fixture::{Golden, Tiny, lora};
use super::*;
use crate::engine::{Architecture, LoraSpec, WeightForm};

fn gradients(base: &Base, lora: &LoraMatrices, groups: &[GroupTokens]) -> Vec<Vec<f32>> {
    gradients_dropping(base, lora, groups, None)
}

fn gradients_dropping(
    base: &Base,
    lora: &LoraMatrices,
    groups: &[GroupTokens],
    dropout: Option<&DropoutSeeds>,
) -> Vec<Vec<f32>> {
    let mut gradients = lora.zero_gradients();
    let pass = base.forward_dropping(lora, groups, dropout).unwrap();
    pass.backward(&Golden::slopes(groups), &mut gradients).unwrap();
    gradients
}

/// What leaves a third of the adapter's inputs out.
fn dropout() -> DropoutSeeds {
    DropoutSeeds { rate: 0.33, groups: vec![(1, vec![2, 3, 4]), (5, vec![6, 7])] }
}

#[test]
fn logprobs_and_all_gradients_agree_with_peft() {
    for kind in Architecture::ALL {
        let (golden, tiny) = (Golden::read(kind.as_str()), Tiny::new(kind));
        for form in [WeightForm::F32, WeightForm::Int16] {
            let off = golden.expect_pass(&tiny.config, &tiny.weights, form);
            println!("{kind:?} {form:?}: log-probs within {:.1e}, gradients within {:.1e} of PEFT", off.0, off.1);
        }
        golden.expect_pass_of(&Base::with_copies(&tiny.config, &tiny.weights).unwrap(), 2e-2);
    }
}

/// Two groups of the tiny models' tokens.
fn groups() -> [GroupTokens<'static>; 2] {
    let first = GroupTokens { prompt: &[3, 17, 42, 5, 9], completions: vec![&[7, 1, 30, 2], &[11], &[40, 41, 8]] };
    [first, GroupTokens { prompt: &[20, 33, 4], completions: vec![&[6, 46, 2], &[13, 0]] }]
}

fn spec() -> LoraSpec {
    LoraSpec { rank: 4, alpha: 8.0, ..LoraSpec::default() }
}

#[test]
fn gradients_agree_with_differences_through_the_whole_model() {
    Architecture::ALL.into_iter().for_each(|kind| expect_differences(kind, None));
    // One that fuses projections, whose parts must see the same inputs, and one that does not.
    for kind in [Architecture::Qwen3, Architecture::Phi3] {
        expect_differences(kind, Some(&dropout()));
    }
}

fn expect_differences(kind: Architecture, dropout: Option<&DropoutSeeds>) {
    let tiny = Tiny::new(kind);
    let base = Base::new(&tiny.config, &tiny.weights, WeightForm::F32).unwrap();
    let mut lora = lora(&tiny.config, &spec());
    let groups = groups();
    let found = gradients_dropping(&base, &lora, &groups, dropout);
    let loss = |lora: &LoraMatrices| -> f64 {
        let pass = base.forward_dropping(lora, &groups, dropout).unwrap();
        pass.logprobs().iter().zip(Golden::slopes(&groups)).map(|(l, s)| f64::from(l * s)).sum()
    };
    for (at, gradient) in found.iter().enumerate() {
        // Along the gradient itself the loss rises by its norm.
        let norm = gradient.iter().map(|g| f64::from(g * g)).sum::<f64>().sqrt();
        let values = lora.values[at].clone();
        let mut moved = |step: f64| {
            let step = (step / norm) as f32;
            lora.values[at] = values.iter().zip(gradient).map(|(v, g)| v + step * g).collect();
            loss(&lora)
        };
        let step = 5e-3;
        let rise = (8.0 * (moved(step) - moved(-step)) - (moved(2.0 * step) - moved(-2.0 * step))) / (12.0 * step);
        lora.values[at] = values;
        let key = &lora.matrices[at].key;
        assert!((rise - norm).abs() < 5e-3 * norm + 1e-4, "{kind:?} {key}: differences {rise}, norm {norm}");
    }
}

#[test]
fn dropout_is_a_function_of_its_seeds_and_of_nothing_else() {
    let tiny = Tiny::new(Architecture::Llama);
    let base = Base::new(&tiny.config, &tiny.weights, WeightForm::F32).unwrap();
    let (lora, groups, seeds) = (lora(&tiny.config, &spec()), groups(), dropout());
    let logprobs = |groups: &[GroupTokens], seeds: Option<&DropoutSeeds>| {
        base.forward_dropping(&lora, groups, seeds).unwrap().logprobs().to_vec()
    };
    let all = logprobs(&groups, Some(&seeds));
    assert_eq!(all, logprobs(&groups, Some(&seeds)));
    assert_ne!(all, logprobs(&groups, None));
    // The second group alone meets what it met beside the first.
    let alone = DropoutSeeds { groups: seeds.groups[1..].to_vec(), ..seeds.clone() };
    let (own, all_own) = (logprobs(&groups[1..], Some(&alone)), &all[8..]);
    assert!(own.iter().zip(all_own).all(|(a, b)| (a - b).abs() < 1e-6), "{own:?} {all_own:?}");
    let mut other = seeds.clone();
    other.groups[1].1[1] = 99;
    let moved = logprobs(&groups, Some(&other));
    assert_eq!(moved[..11], all[..11]);
    // The first token of a completion is predicted by the prompt; the second by the completion, whose seed is another one.
    assert!(moved[11] == all[11] && moved[12] != all[12], "{moved:?} {all:?}");
    let error = base.forward_dropping(&lora, &groups[1..], Some(&seeds)).map(drop).unwrap_err();
    assert!(error.to_string().contains("a seed for each prompt"), "{error}");
}

#[test]
fn activations_made_again_give_the_same_gradients_to_the_bit() {
    for kind in Architecture::ALL {
        let tiny = Tiny::new(kind);
        let exact = Base::new(&tiny.config, &tiny.weights, WeightForm::F32);
        for base in [exact, Base::with_copies(&tiny.config, &tiny.weights)] {
            let mut base = base.unwrap();
            let lora = lora(&tiny.config, &spec());
            let mut run = |activations| {
                base.activations = activations;
                gradients_dropping(&base, &lora, &groups(), Some(&dropout()))
            };
            assert_eq!(run(Activations::Kept), run(Activations::Again), "{kind:?}");
        }
    }
}

#[test]
fn sharing_the_prompt_changes_no_gradient() {
    Architecture::ALL.into_iter().for_each(expect_sharing_changes_nothing);
}

fn expect_sharing_changes_nothing(kind: Architecture) {
    let tiny = Tiny::new(kind);
    let base = Base::new(&tiny.config, &tiny.weights, WeightForm::F32).unwrap();
    let lora = lora(&tiny.config, &spec());
    let alone: Vec<GroupTokens> = groups()
        .iter()
        .flat_map(|g| g.completions.iter().map(|c| GroupTokens { prompt: g.prompt, completions: vec![*c] }))
        .collect();
    let (a, b) = (gradients(&base, &lora, &groups()), gradients(&base, &lora, &alone));
    for (matrix, (a, b)) in lora.matrices.iter().zip(a.iter().zip(&b)) {
        let distance = a.iter().zip(b).map(|(a, b)| (a - b) * (a - b)).sum::<f32>().sqrt();
        let norm = a.iter().map(|a| a * a).sum::<f32>().sqrt();
        assert!(distance <= 1e-5 * norm, "{kind:?} {}: {distance} of {norm}", matrix.key);
    }
}

#[test]
fn a_fresh_adapter_changes_nothing_and_equal_seeds_give_equal_matrices() {
    let tiny = Tiny::new(Architecture::Llama);
    let base = Base::new(&tiny.config, &tiny.weights, WeightForm::F32).unwrap();
    let fresh = |seed| LoraMatrices::fresh(&tiny.config, &spec(), seed);
    assert_eq!(base.forward(&fresh(1), &groups()).unwrap().logprobs(), base.score(&groups()).unwrap().logprobs);
    assert_eq!(fresh(1).values, fresh(1).values);
    assert_ne!(fresh(1).values, fresh(2).values);
    let a = &fresh(1).values[0];
    assert!(a.iter().all(|v| v.abs() <= 0.25) && a.iter().any(|v| v.abs() > 0.2), "within 1/sqrt(16)");
}

#[test]
fn tokens_that_cannot_be_scored_are_refused() {
    let tiny = Tiny::new(Architecture::Llama);
    let base = Base::new(&tiny.config, &tiny.weights, WeightForm::F32).unwrap();
    let score = |prompt: &[u32], completion: &[u32]| {
        base.score(&[GroupTokens { prompt, completions: vec![completion] }]).map_err(|e| e.to_string())
    };
    assert!(score(&[1], &[]).unwrap_err().contains("no tokens"));
    assert!(score(&[99], &[1]).unwrap_err().contains("token id 99"));
    assert!(score(&[1], &[99]).unwrap_err().contains("token id 99"));
    assert!(score(&[1; 60], &[2; 6]).unwrap_err().contains("context of 64"));
    assert_eq!(score(&[1; 60], &[2; 5]).unwrap().logprobs.len(), 5);
}
