//! Rotary position embedding: tables of cosines and sines, rotate-half order as in Hugging Face's models.

use candle_core::{Device, Tensor};

use super::config::{ModelConfig, RopeScaling};
use super::error::EngineError;

/// Cosine and sine of every position and frequency, both `[max_positions, head_dim / 2]`, f32.
#[derive(Debug, Clone)]
pub struct Rope {
    pub cos: Tensor,
    pub sin: Tensor,
}

impl Rope {
    /// Computes the tables of a model.
    pub fn new(config: &ModelConfig) -> Result<Self, EngineError> {
        let frequencies = frequencies(config);
        let shape = (config.max_positions, frequencies.len());
        let angles = || (0..config.max_positions).flat_map(|p| frequencies.iter().map(move |f| p as f32 * f));
        let cos: Vec<f32> = angles().map(f32::cos).collect();
        let sin: Vec<f32> = angles().map(f32::sin).collect();
        let device = Device::Cpu;
        Ok(Rope { cos: Tensor::from_vec(cos, shape, &device)?, sin: Tensor::from_vec(sin, shape, &device)? })
    }
}

/// Returns the angle per position of each pair of dimensions, in f32 as transformers computes it.
fn frequencies(config: &ModelConfig) -> Vec<f32> {
    let base = |i: usize| {
        let exponent = (2 * i) as f32 / config.head_dim as f32;
        1.0 / (config.rope_theta as f32).powf(exponent)
    };
    let scaled = |(i, f): (usize, f32)| match &config.rope_scaling {
        RopeScaling::None => f,
        RopeScaling::Linear { factor } => f / *factor as f32,
        RopeScaling::Divisors { divisors } => f / divisors.get(i).copied().unwrap_or(1.0),
        RopeScaling::Llama3 { factor, low, high, original } => {
            llama3(f, *factor as f32, *low as f32, *high as f32, *original as f32)
        }
    };
    (0..config.head_dim / 2).map(base).enumerate().map(scaled).collect()
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
}
