//! Rotary position embedding: tables of cosines and sines, rotate-half order as in Hugging Face's models.

use candle_core::{Device, Tensor};

use super::config::{ModelConfig, RopeConfig, RopeScaling};
use super::error::EngineError;

/// Cosine and sine of every position and frequency, both `[max_positions, dim / 2]`, f32.
#[derive(Debug, Clone)]
pub struct Rope {
    pub cos: Tensor,
    pub sin: Tensor,
}

impl Rope {
    /// Computes the tables of all rotary embeddings of a model.
    pub fn all(config: &ModelConfig) -> Result<Vec<Self>, EngineError> {
        config.ropes.iter().map(|rope| Self::new(rope, config.max_positions)).collect()
    }

    fn new(rope: &RopeConfig, positions: usize) -> Result<Self, EngineError> {
        let (frequencies, factor) = (frequencies(rope), attention_factor(rope));
        let shape = (positions, frequencies.len());
        let angles = || (0..positions).flat_map(|p| frequencies.iter().map(move |f| p as f32 * f));
        let cos: Vec<f32> = angles().map(|angle| angle.cos() * factor).collect();
        let sin: Vec<f32> = angles().map(|angle| angle.sin() * factor).collect();
        let device = Device::Cpu;
        Ok(Rope { cos: Tensor::from_vec(cos, shape, &device)?, sin: Tensor::from_vec(sin, shape, &device)? })
    }
}

/// Returns the factor on all cosines and sines, by which scores grow squared.
fn attention_factor(rope: &RopeConfig) -> f32 {
    match &rope.scaling {
        RopeScaling::Divisors { attention, .. } | RopeScaling::Yarn { attention, .. } => *attention,
        RopeScaling::None | RopeScaling::Linear { .. } | RopeScaling::Llama3 { .. } => 1.0,
    }
}

/// Returns the angle per position of each pair of dimensions, in f32 as transformers computes it.
fn frequencies(rope: &RopeConfig) -> Vec<f32> {
    let power = |i: usize| (rope.theta as f32).powf((2 * i) as f32 / rope.dim as f32);
    let scaled = |i: usize| match &rope.scaling {
        RopeScaling::None => 1.0 / power(i),
        RopeScaling::Linear { factor } => 1.0 / power(i) / *factor as f32,
        RopeScaling::Divisors { divisors, .. } => 1.0 / (divisors.get(i).copied().unwrap_or(1.0) * power(i)),
        RopeScaling::Llama3 { factor, low, high, original } => {
            llama3(1.0 / power(i), *factor as f32, *low as f32, *high as f32, *original as f32)
        }
        RopeScaling::Yarn { factor, low, high, .. } => yarn(power(i), i, *factor as f32, *low as f32, *high as f32),
    };
    (0..rope.dim / 2).map(scaled).collect()
}

/// Returns the frequency of Llama 3.1: short waves kept, long ones divided, those between blended.
fn llama3(frequency: f32, factor: f32, low: f32, high: f32, original: f32) -> f32 {
    let wave = 2.0 * std::f32::consts::PI / frequency;
    if wave < original / high {
        frequency
    } else if wave > original / low {
        frequency / factor
    } else {
        let smooth = (original / wave - low) / (high - low);
        (1.0 - smooth) * frequency / factor + smooth * frequency
    }
}

/// Returns the frequency of YaRN's i-th pair: kept up to `low`, divided from `high` on, blended between.
fn yarn(power: f32, i: usize, factor: f32, low: f32, high: f32) -> f32 {
    let high = if low == high { high + 0.001 } else { high };
    let divided = ((i as f32 - low) / (high - low)).clamp(0.0, 1.0);
    divided / (factor * power) + (1.0 - divided) / power
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn llama3_keeps_short_waves_divides_long_ones_and_blends_between() {
        let scale = |f| llama3(f, 8.0, 1.0, 4.0, 8192.0);
        assert_eq!(scale(1.0), 1.0);
        assert_eq!(scale(1e-5), 1e-5 / 8.0);
        // Wave length 4096 lies between 2048 and 8192: smooth = (2 - 1) / 3.
        let f = 2.0 * std::f32::consts::PI / 4096.0;
        let expected = f * (2.0 / 3.0 / 8.0 + 1.0 / 3.0);
        assert!((scale(f) - expected).abs() < 1e-9, "{} {expected}", scale(f));
    }

    #[test]
    fn yarn_keeps_the_first_pairs_divides_the_last_and_blends_between() {
        let scale = |i| yarn(100.0, i, 4.0, 2.0, 6.0);
        assert_eq!([scale(0), scale(2), scale(6), scale(9)], [0.01, 0.01, 0.0025, 0.0025]);
        assert!((scale(4) - (0.01 + 0.0025) / 2.0).abs() < 1e-9);
    }
}
