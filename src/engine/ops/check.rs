//! The gradient check of the unit tests: a backward pass against central differences.

use candle_core::{Device, Tensor};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Returns seeded values in [-1, 1).
pub(crate) fn random(seed: u64, count: usize) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..count).map(|_| rng.random_range(-1.0..1.0)).collect()
}

pub(crate) fn random_tensor(seed: u64, shape: &[usize]) -> Tensor {
    tensor(&random(seed, shape.iter().product()), shape)
}

pub(crate) fn tensor(values: &[f32], shape: &[usize]) -> Tensor {
    Tensor::from_slice(values, shape, &Device::Cpu).unwrap()
}

pub(crate) fn assert_close(found: &[f32], expected: &Tensor) {
    let expected: Vec<f32> = expected.flatten_all().unwrap().to_vec1().unwrap();
    assert_eq!(found.len(), expected.len());
    for (i, (a, b)) in found.iter().zip(expected).enumerate() {
        assert!((a - b).abs() < 1e-5, "value {i}: {a}, expected {b}");
    }
}

/// Checks `backward`, from inputs and the gradient of the result to the gradients of the inputs, against `forward`.
pub(crate) fn gradients(
    inputs: &[Vec<f32>],
    forward: impl Fn(&[Vec<f32>]) -> Vec<f32>,
    backward: impl Fn(&[Vec<f32>], &[f32]) -> Vec<Vec<f32>>,
) {
    let weights = random(99, forward(inputs).len());
    let project = |inputs: &[Vec<f32>]| -> f64 {
        forward(inputs).iter().zip(&weights).map(|(v, w)| f64::from(*v) * f64::from(*w)).sum()
    };
    let found = backward(inputs, &weights);
    assert_eq!(found.len(), inputs.len());
    for (which, found) in found.iter().enumerate() {
        assert_eq!(found.len(), inputs[which].len());
        let size = (found.iter().map(|g| g * g).sum::<f32>() / found.len() as f32).sqrt();
        for i in 0..found.len() {
            let at = |step: f32| {
                let mut inputs = inputs.to_vec();
                inputs[which][i] += step;
                project(&inputs)
            };
            // Fourth order, so that a step large against rounding is small against curvature.
            let step = 1e-2;
            let expected = (8.0 * (at(step) - at(-step)) - (at(2.0 * step) - at(-2.0 * step))) / (12.0 * step as f64);
            let error = (f64::from(found[i]) - expected).abs();
            let bound = 2e-3 * (expected.abs() + f64::from(size) + 1e-3);
            assert!(error < bound, "input {which}, element {i}: backward {}, differences {expected}", found[i]);
        }
    }
}
