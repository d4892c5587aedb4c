//! AdamW with moments that can be saved, clipping by the global norm, and the learning rate's schedule.
//!
//! candle's own AdamW hides its moments, without which a resumed run is another run.

use rayon::prelude::*;

const BETA1: f64 = 0.9;
const BETA2: f64 = 0.999;
const EPSILON: f64 = 1e-8;

/// The optimizer's state over a list of parameters in a fixed order.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct AdamW {
    /// Updates so far, over all iterations; the moments' bias correction needs it.
    pub updates: u64,
    /// Running mean of the gradients, one list per parameter.
    pub first: Vec<Vec<f32>>,
    /// Running mean of their squares.
    pub second: Vec<Vec<f32>>,
}

impl AdamW {
    /// Returns the state before the first update of these parameters.
    pub fn new(parameters: &[Vec<f32>]) -> Self {
        let zeros: Vec<Vec<f32>> = parameters.iter().map(|values| vec![0.0; values.len()]).collect();
        AdamW { updates: 0, first: zeros.clone(), second: zeros }
    }

    /// Moves `parameters` one step against `gradients`, as PyTorch's AdamW does.
    pub fn update(
        &mut self,
        parameters: &mut [Vec<f32>],
        gradients: &[Vec<f32>],
        learning_rate: f64,
        weight_decay: f64,
    ) {
        self.updates += 1;
        let t = self.updates as f64;
        let step = (learning_rate / (1.0 - BETA1.powf(t))) as f32;
        let root = (1.0 - BETA2.powf(t)).sqrt() as f32;
        let keep = (1.0 - learning_rate * weight_decay) as f32;
        let (beta1, beta2, epsilon) = (BETA1 as f32, BETA2 as f32, EPSILON as f32);
        let moments = self.first.par_iter_mut().zip(&mut self.second);
        parameters.par_iter_mut().zip(gradients).zip(moments).for_each(|((values, gradient), (first, second))| {
            for (((value, g), m), v) in values.iter_mut().zip(gradient).zip(first).zip(second) {
                *m += (1.0 - beta1) * (g - *m);
                *v = beta2 * *v + (1.0 - beta2) * g * g;
                *value = *value * keep - step * *m / (v.sqrt() / root + epsilon);
            }
        });
    }
}

/// Scales the gradients down to `max_norm` where their global norm is larger, and returns the norm they had.
pub fn clip(gradients: &mut [Vec<f32>], max_norm: f64) -> f64 {
    let square = |g: &Vec<f32>| g.iter().map(|v| *v as f64 * *v as f64).sum::<f64>();
    let squares: Vec<f64> = gradients.par_iter().map(square).collect();
    let norm = squares.iter().sum::<f64>().sqrt();
    let factor = max_norm / (norm + 1e-6);
    if factor < 1.0 {
        gradients.par_iter_mut().for_each(|g| g.iter_mut().for_each(|v| *v *= factor as f32));
    }
    norm
}

/// Returns the learning rate of `step` (from 0) of `total`: up to `peak` over `warmup` steps, then linearly towards 0,
/// which it would reach one step after the last.
pub fn learning_rate(peak: f64, warmup: usize, step: usize, total: usize) -> f64 {
    let warmup = warmup.min(total.saturating_sub(1));
    if step < warmup {
        peak * (step + 1) as f64 / (warmup + 1) as f64
    } else {
        peak * total.saturating_sub(step) as f64 / (total - warmup).max(1) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_update_moves_by_the_learning_rate_against_the_sign() {
        let mut values = vec![vec![1.0, 1.0, 1.0]];
        let mut adam = AdamW::new(&values);
        adam.update(&mut values, &[vec![0.5, -2.0, 0.0]], 0.1, 0.0);
        for (value, expected) in values[0].iter().zip([0.9, 1.1, 1.0]) {
            assert!((value - expected).abs() < 1e-6, "{value} {expected}");
        }
        adam.update(&mut values, &[vec![0.0; 3]], 0.1, 0.5);
        assert!((values[0][2] - 0.95).abs() < 1e-6, "decay acts on the value, not on the gradient");
    }

    #[test]
    fn clipping_keeps_the_direction_and_short_gradients() {
        let mut gradients = vec![vec![3.0], vec![4.0]];
        assert_eq!(clip(&mut gradients, 10.0), 5.0);
        assert_eq!(gradients, [[3.0], [4.0]]);
        assert_eq!(clip(&mut gradients, 1.0), 5.0);
        assert!((gradients[0][0] - 0.6).abs() < 1e-5 && (gradients[1][0] - 0.8).abs() < 1e-5);
    }

    #[test]
    fn the_rate_rises_to_the_peak_and_falls_without_reaching_zero() {
        let rates: Vec<f64> = (0..6).map(|step| learning_rate(1.0, 2, step, 6)).collect();
        assert_eq!(rates, [1.0 / 3.0, 2.0 / 3.0, 1.0, 0.75, 0.5, 0.25]);
        assert_eq!(learning_rate(1.0, 5, 0, 1), 1.0, "a warm-up longer than the run");
        assert_eq!(learning_rate(1.0, 0, 0, 3), 1.0);
    }
}
