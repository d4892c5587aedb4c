//! The gradient check of the unit tests: a backward pass against central differences in f64 sums.

use candle_core::{Device, Result, Tensor, Var};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Returns seeded values in [-1, 1).
pub(crate) fn random(seed: u64, shape: &[usize]) -> Tensor {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let values: Vec<f32> = (0..shape.iter().product()).map(|_| rng.random_range(-1.0..1.0)).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

/// Checks the gradients of `f` with respect to each of `inputs` under a random projection of its result.
pub(crate) fn gradients(inputs: &[Tensor], f: impl Fn(&[Tensor]) -> Result<Tensor>) {
    let vars: Vec<Var> = inputs.iter().map(|t| Var::from_tensor(t).unwrap()).collect();
    let tracked: Vec<Tensor> = vars.iter().map(|v| v.as_tensor().clone()).collect();
    let result = f(&tracked).unwrap();
    let weights = random(99, result.dims());
    let grads = (&result * &weights).unwrap().sum_all().unwrap().backward().unwrap();
    let project = |inputs: &[Tensor]| -> f64 {
        let values = f(inputs).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let weights = weights.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        values.iter().zip(&weights).map(|(v, w)| *v as f64 * *w as f64).sum()
    };
    for (which, (input, var)) in inputs.iter().zip(&vars).enumerate() {
        let found = grads.get(var).expect("a gradient").flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let values = input.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let norm = found.iter().map(|g| g * g).sum::<f32>().sqrt() / (found.len() as f32).sqrt();
        for i in 0..values.len() {
            let at = |step: f32| {
                let mut moved = values.clone();
                moved[i] += step;
                let mut inputs = inputs.to_vec();
                inputs[which] = Tensor::from_vec(moved, input.shape(), &Device::Cpu).unwrap();
                project(&inputs)
            };
            let step = 1e-2;
            // Fourth order, so that a step large against rounding is small against curvature.
            let expected = (8.0 * (at(step) - at(-step)) - (at(2.0 * step) - at(-2.0 * step))) / (12.0 * step as f64);
            let error = (found[i] as f64 - expected).abs();
            let bound = 2e-3 * (expected.abs() + norm as f64 + 1e-3);
            assert!(error < bound, "input {which}, element {i}: backward {}, differences {expected}", found[i]);
        }
    }
}
