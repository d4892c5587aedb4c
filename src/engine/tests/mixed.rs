//! One batch of several adapters: every sequence is what it is alone.

use std::collections::BTreeMap;

use candle_core::Tensor;

use super::families::TINY;
use super::*;

/// Returns an adapter with random matrices of some rank on some layers.
pub(super) fn random(model: &Model, rank: usize, targets: &[Linear], seed: u32) -> Adapter {
    let spec = LoraSpec {
        rank,
        alpha: 2.0 * rank as f64,
        targets: targets.to_vec(),
        use_rslora: false,
        ..LoraSpec::default()
    };
    let mut tensors = BTreeMap::new();
    for layer in 0..model.config().layers.len() {
        for module in Module::targeted(model.config(), targets) {
            for factor in [Factor::A, Factor::B] {
                let [rows, columns] = module.shape(model.config(), factor, rank);
                let seed = seed + (layer * 100 + tensors.len()) as u32;
                let values = crate::engine::matmul::tests::numbers(rows * columns, seed);
                let values = Tensor::from_vec(values, (rows, columns), &candle_core::Device::Cpu).unwrap();
                tensors.insert(module.peft_key(layer, factor), (values * 0.3).unwrap());
            }
        }
    }
    Adapter::from_tensors("random", model, &spec, &tensors).unwrap()
}

/// Groups of three policies in turn, so that their sequences begin and end among each other.
pub(super) fn groups(policies: &[Policy; 3]) -> Vec<(Policy, Group)> {
    let prompt = |i: u32| (3 + i..8 + 7 * i).collect::<Vec<u32>>();
    (0..7u32).map(|i| (policies[i as usize % 3].clone(), group(u64::from(i), &prompt(i), 3, 9 + i as usize))).collect()
}

#[test]
fn sequences_of_different_adapters_in_one_batch_are_what_they_are_alone() {
    for name in TINY {
        let model = load(&fixture(name));
        let own = Adapter::load(&fixture(&format!("{name}-lora")), &model).unwrap();
        let narrow = random(&model, 3, &[Linear::V, Linear::Gate, Linear::Down], 7);
        let adapters = [None, Some(&own), Some(&narrow)];
        let policies = adapters.map(|adapter| Policy::new(&model, adapter, WeightForm::F32).unwrap());
        let alone: Vec<Vec<Completion>> = groups(&policies)
            .into_iter()
            .map(|(policy, group)| generate(&policy, vec![group], &BatchLimits::default(), &mut |_, _, _| {}).unwrap())
            .map(|mut completions| completions.remove(0))
            .collect();
        for max_sequences in [64, 5] {
            let limits = BatchLimits { max_sequences, max_rows: 20, ..BatchLimits::default() };
            let mixed = generate_each(groups(&policies), &limits, &mut |_, _, _| {}).unwrap();
            assert_eq!(mixed, alone, "{name}");
        }
        // The test could not fail if the adapters changed nothing, or the same.
        let draws = |policy: &Policy| {
            generate(policy, vec![group(0, &[5, 6, 7], 4, 20)], &BatchLimits::default(), &mut |_, _, _| {}).unwrap()
        };
        let [base, first, second] = policies.each_ref().map(draws);
        assert!(base != first && first != second && base != second, "{name}");
    }
}

#[test]
fn rows_know_their_adapter_wherever_they_stand() {
    let model = load(&fixture("tiny-llama"));
    let pack = |seed| Policy::new(&model, Some(&random(&model, 2, &[Linear::Q], seed)), WeightForm::F32).unwrap();
    let (a, b) = (pack(1), pack(2));
    let run = |policy: Option<&Policy>, tokens| {
        let decoder = model.decoder().unwrap();
        let (mut cache, pool) = (Cache::new(decoder.shape()), Pool::new(decoder.shape()));
        let adapter = policy.and_then(|policy| policy.adapter().map(|pack| &**pack));
        decoder.forward(&mut [Run { cache: &mut cache, tokens, adapter }], &pool)
    };
    let order = [Some(&a), None, Some(&b), Some(&a), Some(&b), None];
    let tokens: Vec<Vec<u32>> = (1..7u32).map(|n| (5..5 + n).collect()).collect();
    let alone: Vec<f32> = order.iter().zip(&tokens).flat_map(|(policy, tokens)| run(*policy, tokens)).collect();
    let decoder = model.decoder().unwrap();
    let pool = Pool::new(decoder.shape());
    let mut caches: Vec<Cache> = order.iter().map(|_| Cache::new(decoder.shape())).collect();
    let runs = caches.iter_mut().zip(&tokens).zip(order);
    let mut runs: Vec<Run> = runs
        .map(|((cache, tokens), policy)| Run { cache, tokens, adapter: policy.and_then(|p| p.adapter().map(|a| &**a)) })
        .collect();
    assert_eq!(decoder.forward(&mut runs, &pool), alone);
}

#[test]
fn a_policy_with_weights_of_its_own_is_refused_in_another_s_batch() {
    let model = load(&fixture("tiny-llama"));
    let adapter = random(&model, 2, &[Linear::Q], 1);
    let rounded = Policy::new(&model, Some(&adapter), WeightForm::Int16).unwrap();
    let mut batcher = Batcher::new(exact(&model), BatchLimits::default()).unwrap();
    let error = batcher.push_as(&rounded, group(0, &[5, 6], 1, 4)).unwrap_err().to_string();
    assert!(error.contains("sample it in a batch of its own"), "{error}");
}
