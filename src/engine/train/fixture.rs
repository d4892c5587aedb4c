//! Tiny models for tests, with the weights of `tools/reference/training_golden.py`.

use std::collections::BTreeMap;
use std::sync::Arc;

use candle_core::{Device, Tensor};
use serde::Deserialize;

use super::{Base, GroupTokens, LoraMatrices};
use crate::engine::device::Place;
use crate::engine::{
    Architecture, DeviceModel, Factor, LayerKind, LayerWeights, LoraSpec, ModelConfig, ModelIdentity, Module, Norms,
    Patterns, Rope, RopeConfig, RopeScaling, Scores, WeightForm, Weights,
};

/// Returns values in `offset` +- `scale`, a function of the tensor's number and the element's index alone.
pub(crate) fn hashed(number: usize, shape: &[usize], scale: f64, offset: f64) -> Tensor {
    let value = |i: usize| {
        let mut x = (i as u64).wrapping_add(number as u64 * 0x9E37_79B1) as u32;
        for (shift, factor) in [(16, 0x85EB_CA6B_u32), (13, 0xC2B2_AE35)] {
            x = (x ^ (x >> shift)).wrapping_mul(factor);
        }
        x ^= x >> 16;
        (offset + scale * (x as f64 / 2f64.powi(31) - 1.0)) as f32
    };
    let values: Vec<f32> = (0..shape.iter().product()).map(value).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

/// A model small enough to train in a test.
pub(crate) struct Tiny {
    pub(crate) config: ModelConfig,
    pub(crate) weights: Weights,
    pub(crate) identity: ModelIdentity,
}

impl Tiny {
    /// Returns its weights on a device.
    pub(crate) fn on(&self, place: Place) -> Arc<DeviceModel> {
        Arc::new(DeviceModel::new(&self.config, &self.weights, &Rope::all(&self.config).unwrap(), place).unwrap())
    }

    /// Returns the tiny model of an architecture.
    pub(crate) fn new(architecture: Architecture) -> Self {
        let config = config(architecture);
        let identity = ModelIdentity {
            name: "tiny".to_string(),
            architecture: architecture.as_str().to_string(),
            sha256: "0".repeat(64),
            tokenizer_sha256: String::new(),
            template_sha256: String::new(),
        };
        Tiny { weights: weights(&config), config, identity }
    }
}

/// A sliding window that is shorter than a prompt and a completion together.
const WINDOW: usize = 4;

fn config(architecture: Architecture) -> ModelConfig {
    use Architecture::{Gemma2, Gemma3, Mistral, Olmo2, Phi3, Qwen2, SmolLm3};
    let rope = |theta, dim, scaling| RopeConfig { theta, dim, scaling };
    let plain = rope(10_000.0, 4, RopeScaling::None);
    let ropes = match architecture {
        Phi3 => {
            // Twice the 32 positions that it was trained on.
            let attention = (1.0 + 2f32.ln() / 32f32.ln()).sqrt();
            vec![rope(10_000.0, 2, RopeScaling::Divisors { divisors: vec![1.5], attention })]
        }
        Gemma3 => vec![rope(100.0, 4, RopeScaling::None), plain],
        _ => vec![plain],
    };
    let all = LayerKind { rope: Some(0), window: None };
    let slides = LayerKind { rope: Some(0), window: Some(WINDOW) };
    let layers = match architecture {
        Mistral | Phi3 => [slides, slides],
        SmolLm3 => [all, LayerKind { rope: None, ..all }],
        Gemma2 => [slides, all],
        Gemma3 => [LayerKind { rope: Some(1), ..slides }, all],
        _ => [all, all],
    };
    let gemma = matches!(architecture, Gemma2 | Gemma3);
    let gemma2 = |cap: f32| (architecture == Gemma2).then_some(cap);
    ModelConfig {
        architecture,
        block: architecture.block(),
        vocab: 48,
        hidden_size: 16,
        intermediate_size: 24,
        layers: layers.to_vec(),
        heads: 4,
        kv_heads: 2,
        head_dim: 4,
        rms_eps: 1e-5,
        ropes,
        scores: Scores { scale: if gemma { 1.0 / 3.0 } else { 0.5 }, cap: gemma2(1.5) },
        embedding_scale: gemma.then_some(4.0),
        logit_cap: gemma2(4.0),
        max_positions: if architecture == Phi3 { 32 } else { 64 },
        tied: !matches!(architecture, Qwen2 | Olmo2 | Phi3),
    }
}

fn weights(c: &ModelConfig) -> Weights {
    let mut number = 0;
    let mut next = |shape: &[usize], norm: bool| {
        number += 1;
        hashed(number - 1, shape, if norm { 0.2 } else { 0.5 }, if norm { 1.0 } else { 0.0 })
    };
    let (hidden, query, kv, wide) = (c.hidden_size, c.query_size(), c.kv_size(), c.intermediate_size);
    let embed = next(&[c.vocab, hidden], false);
    let (before, after) = (c.block.norms != Norms::Post, c.block.norms != Norms::Pre);
    let layers = (0..c.layers.len())
        .map(|_| {
            let mut layer = LayerWeights {
                attn_norm: before.then(|| next(&[hidden], true)),
                q: next(&[query, hidden], false).into(),
                k: next(&[kv, hidden], false).into(),
                v: next(&[kv, hidden], false).into(),
                o: next(&[hidden, query], false).into(),
                attn_post_norm: after.then(|| next(&[hidden], true)),
                mlp_norm: before.then(|| next(&[hidden], true)),
                gate: next(&[wide, hidden], false).into(),
                up: next(&[wide, hidden], false).into(),
                down: next(&[hidden, wide], false).into(),
                mlp_post_norm: after.then(|| next(&[hidden], true)),
                q_bias: None,
                k_bias: None,
                v_bias: None,
                q_norm: None,
                k_norm: None,
            };
            if c.architecture == Architecture::Qwen2 {
                layer.q_bias = Some(next(&[query], false));
                layer.k_bias = Some(next(&[kv], false));
                layer.v_bias = Some(next(&[kv], false));
            }
            if let Some((query, key)) = c.qk_norm_sizes() {
                layer.q_norm = Some(next(&[query], true));
                layer.k_norm = Some(next(&[key], true));
            }
            layer
        })
        .collect();
    let norm = next(&[hidden], true);
    let lm_head = if c.tied { embed.clone() } else { next(&[c.vocab, hidden], false) };
    Weights { embed: embed.into(), layers, norm, lm_head: lm_head.into() }
}

/// Returns LoRA matrices as after some training: B is not zero.
pub(crate) fn lora(config: &ModelConfig, spec: &LoraSpec) -> LoraMatrices {
    let mut tensors = BTreeMap::new();
    let mut number = 1000;
    for layer in 0..config.layers.len() {
        for module in Module::all(config) {
            let [a, b] =
                [Factor::A, Factor::B].map(|factor| module.shape(config, factor, spec.rank_of(&module.path(layer))));
            tensors.insert(module.peft_key(layer, Factor::A), hashed(number, &a, 1.0 / (a[1] as f64).sqrt(), 0.0));
            tensors.insert(module.peft_key(layer, Factor::B), hashed(number + 1, &b, 0.02, 0.0));
            number += 2;
        }
    }
    LoraMatrices::restored(config, spec, &tensors).unwrap()
}

/// What PyTorch found; see `tools/reference/training_golden.py`.
#[derive(Deserialize)]
pub(crate) struct Golden {
    pub(crate) rank: usize,
    pub(crate) alpha: f64,
    pub(crate) use_rslora: bool,
    #[serde(default)]
    pub(crate) rank_pattern: BTreeMap<String, usize>,
    #[serde(default)]
    pub(crate) alpha_pattern: BTreeMap<String, f64>,
    pub(crate) groups: Vec<GoldenGroup>,
    pub(crate) loss: f32,
    pub(crate) logprobs: Vec<Vec<f32>>,
    pub(crate) gradients: BTreeMap<String, GoldenTensor>,
    pub(crate) training: GoldenTraining,
    pub(crate) losses: Vec<f32>,
    pub(crate) grad_norms: Vec<f32>,
    #[serde(rename = "final")]
    pub(crate) last: BTreeMap<String, GoldenTensor>,
}

#[derive(Deserialize)]
pub(crate) struct GoldenGroup {
    pub(crate) prompt: Vec<u32>,
    pub(crate) completions: Vec<Vec<u32>>,
}

/// All values of a small tensor, or 4 spread ones.
#[derive(Deserialize)]
pub(crate) struct GoldenTensor {
    pub(crate) norm: f32,
    pub(crate) values: Vec<f32>,
}

#[derive(Deserialize)]
pub(crate) struct GoldenTraining {
    pub(crate) learning_rate: f64,
    pub(crate) warmup_steps: usize,
    pub(crate) steps: usize,
    pub(crate) weight_decay: f64,
    pub(crate) max_grad_norm: f64,
}

impl Golden {
    pub(crate) fn read(name: &str) -> Self {
        let path = format!("{}/tests/golden/training_{name}.json", env!("CARGO_MANIFEST_DIR"));
        let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{path}: {e}"));
        serde_json::from_str(&text).unwrap()
    }

    pub(crate) fn spec(&self) -> LoraSpec {
        let (rank, alpha, use_rslora) = (self.rank, self.alpha, self.use_rslora);
        LoraSpec {
            rank,
            alpha,
            use_rslora,
            rank_pattern: Patterns::from(&self.rank_pattern),
            alpha_pattern: Patterns::from(&self.alpha_pattern),
            ..LoraSpec::default()
        }
    }

    /// Returns the slopes of the golden loss: minus the mean over completions of their mean log-prob.
    pub(crate) fn slopes(groups: &[GroupTokens]) -> Vec<f32> {
        let lengths: Vec<usize> = groups.iter().flat_map(|g| g.completions.iter().map(|c| c.len())).collect();
        let slope = |n: &usize| std::iter::repeat_n(-1.0 / (*n as f32 * lengths.len() as f32), *n);
        lengths.iter().flat_map(slope).collect()
    }

    /// Checks the log-probs, the loss and every gradient: f32 to 1e-3 of its size, 16 bits to 2e-2. Returns the largest
    /// error of a log-prob, and of a gradient as a share of its tensor's norm.
    pub(crate) fn expect_pass(&self, config: &ModelConfig, weights: &Weights, form: WeightForm) -> (f32, f32) {
        let base = Base::new(config, weights, form).unwrap();
        self.expect_pass_of(&base, if form == WeightForm::F32 { 1e-3 } else { 2e-2 })
    }

    /// Does the same for a base that is ready, to a bound.
    pub(crate) fn expect_pass_of(&self, base: &Base, bound: f32) -> (f32, f32) {
        let config = base.config;
        let lora = lora(config, &self.spec());
        let groups = self.groups();
        let pass = base.forward(&lora, &groups).unwrap();
        assert_eq!(pass.logprobs().len(), self.logprobs.concat().len());
        let mut off = (0.0f32, 0.0f32);
        for (a, b) in pass.logprobs().iter().zip(self.logprobs.concat()) {
            off.0 = off.0.max((a - b).abs());
            assert!((a - b).abs() < bound, "{:?}: {a}, PyTorch {b}", config.architecture);
        }
        let slopes = Self::slopes(&groups);
        let loss: f32 = pass.logprobs().iter().zip(&slopes).map(|(l, s)| l * s).sum();
        assert!((loss - self.loss).abs() < bound, "{loss}, PyTorch {}", self.loss);
        let mut gradients = lora.zero_gradients();
        pass.backward(&slopes, &mut gradients).unwrap();
        assert_eq!(lora.matrices.len(), self.gradients.len());
        for (matrix, found) in lora.matrices.iter().zip(gradients) {
            off.1 = off.1.max(self.gradients[&matrix.key].expect(&matrix.key, &found, bound));
        }
        off
    }

    /// Returns how far 16 bits are from f32: the mean distance of a log-prob, and of each matrix's gradient the distance as
    /// a share of its norm: median and largest.
    pub(crate) fn rounding(&self, config: &ModelConfig, weights: &Weights) -> (f32, [f32; 2]) {
        let lora = lora(config, &self.spec());
        let groups = self.groups();
        let run = |form: WeightForm| {
            let base = Base::new(config, weights, form).unwrap();
            let pass = base.forward(&lora, &groups).unwrap();
            let (logprobs, mut gradients) = (pass.logprobs().to_vec(), lora.zero_gradients());
            pass.backward(&Self::slopes(&groups), &mut gradients).unwrap();
            (logprobs, gradients)
        };
        let (exact, rounded) = (run(WeightForm::F32), run(WeightForm::Int16));
        let gaps = exact.0.iter().zip(&rounded.0).map(|(e, r)| (e - r).abs());
        let norm = |values: &mut dyn Iterator<Item = f32>| values.map(|v| v * v).sum::<f32>().sqrt();
        let share = |(e, r): (&Vec<f32>, &Vec<f32>)| {
            norm(&mut e.iter().zip(r).map(|(e, r)| e - r)) / norm(&mut e.iter().copied())
        };
        let mut shares: Vec<f32> = exact.1.iter().zip(&rounded.1).map(share).collect();
        shares.sort_by(f32::total_cmp);
        (gaps.sum::<f32>() / exact.0.len() as f32, [shares[shares.len() / 2], shares[shares.len() - 1]])
    }

    pub(crate) fn groups(&self) -> Vec<GroupTokens<'_>> {
        self.groups.iter().map(GoldenGroup::tokens).collect()
    }
}

impl GoldenGroup {
    fn tokens(&self) -> GroupTokens<'_> {
        GroupTokens { prompt: &self.prompt, completions: self.completions.iter().map(Vec::as_slice).collect() }
    }
}

impl GoldenTensor {
    /// Checks `found` to `bound` of the tensor's own size: its norm, and each value that is there. Returns the largest
    /// error as a share of the norm.
    pub(crate) fn expect(&self, name: &str, found: &[f32], bound: f32) -> f32 {
        let norm = found.iter().map(|v| v * v).sum::<f32>().sqrt();
        assert!((norm - self.norm).abs() <= bound * self.norm, "{name}: norm {norm}, PyTorch {}", self.norm);
        let stride = if self.values.len() == found.len() { 1 } else { found.len() / 4 };
        let mean = self.norm / (found.len() as f32).sqrt();
        let mut worst = 0.0f32;
        for (i, expected) in self.values.iter().enumerate() {
            let value = found[i * stride];
            let error = (value - expected).abs();
            assert!(error <= bound * expected.abs().max(mean), "{name}[{}]: {value}, PyTorch {expected}", i * stride);
            worst = worst.max(error / self.norm);
        }
        worst
    }
}
