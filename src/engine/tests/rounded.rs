//! Sampling with rounded weights: near the model that training sees, on every family, and the same in any batch.

use super::families::TINY;
use super::*;

/// The forms, and how far their log-probs may lie from f32's in the mean. These random models have large logits: real ones
/// come closer.
const FORMS: [(WeightForm, f32); 2] = [(WeightForm::Int16, 0.002), (WeightForm::Int8, 0.08)];

fn draw(policy: &Policy, max_sequences: usize) -> Vec<Completion> {
    let groups = vec![group(7, &(10..55).collect::<Vec<_>>(), 6, 40), group(8, &[9, 8, 7], 3, 12)];
    let limits = BatchLimits { max_sequences, ..BatchLimits::default() };
    generate(policy, groups, &limits, &mut |_, _, _| {}).unwrap().concat()
}

/// Returns the mean distance of the first group's log-probs from the model's own in f32.
fn gap(model: &Model, adapter: Option<&Adapter>, drawn: &[Completion]) -> f32 {
    let prompt: Vec<u32> = (10..55).collect();
    let drawn = &drawn[..6];
    let items: Vec<ScoreItem> = drawn.iter().map(|s| ScoreItem { prompt: &prompt, completion: &s.token_ids }).collect();
    let exact = logprobs(model, adapter, &items).unwrap().concat();
    let told: Vec<f32> = drawn.iter().flat_map(|s| s.logprobs.clone()).collect();
    assert!(told.len() > 40);
    exact.iter().zip(&told).map(|(e, t)| (e - t).abs()).sum::<f32>() / told.len() as f32
}

#[test]
fn the_logprobs_told_are_near_those_of_f32_in_every_family() {
    for name in TINY {
        let model = load(&fixture(name));
        for (form, bound) in FORMS {
            let off = gap(&model, None, &draw(&Policy::new(&model, None, form).unwrap(), 64));
            assert!(off > 0.0 && off < bound, "{name}, {form:?}: {off}");
        }
    }
}

#[test]
fn an_adapter_is_part_of_what_is_rounded() {
    for name in TINY {
        let model = load(&fixture(name));
        let adapter = Adapter::load(&fixture(&format!("{name}-lora")), &model).unwrap();
        for (form, bound) in FORMS {
            let drawn = draw(&Policy::new(&model, Some(&adapter), form).unwrap(), 64);
            let (own, other) = (gap(&model, Some(&adapter), &drawn), gap(&model, None, &drawn));
            assert!(
                own < bound && other > 2.0 * own,
                "{name}, {form:?}: {own} from the adapter's, {other} from the base's"
            );
        }
    }
}

#[test]
fn a_sample_is_the_same_in_any_batch() {
    let model = load(&fixture("tiny-llama"));
    for (form, _) in FORMS {
        let policy = Policy::new(&model, None, form).unwrap();
        assert_eq!(draw(&policy, 64), draw(&policy, 2));
        assert_eq!(policy.form(), form);
    }
}
