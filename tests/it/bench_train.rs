//! Tokens per second of a LoRA training step on the shapes of SmolLM2-135M with random weights: one group of 8
//! completions of 64 tokens on a shared prompt of 64, and its share of the f32 GEMM rate of the same run.
//!
//! The share compares work per second of processor time, which neighbours on the machine distort less than wall time.

use std::time::Instant;

use candle_core::{Device, Tensor};
use taod::engine::ops::mat::{Into, Mat, MatMut, Threads, multiply};
use taod::engine::train::{Activations, Base, GroupTokens, LoraMatrices};
use taod::engine::{
    Architecture, LayerKind, LayerWeights, Linear, LoraSpec, ModelConfig, RopeConfig, RopeScaling, Scores, WeightForm,
    Weights,
};

const PROMPT: usize = 64;
const COMPLETION: usize = 64;
const SAMPLES: usize = 8;

#[test]
#[ignore = "a benchmark: `make bench`"]
fn bench_train() -> Result<(), Box<dyn std::error::Error>> {
    let config = config();
    let weights = weights(&config)?;
    let base = Base::new(&config, &weights, WeightForm::F32)?;
    let spec = LoraSpec::default();
    let lora = LoraMatrices::fresh(&config, &spec, 1);
    let prompt: Vec<u32> = (0..PROMPT as u32).collect();
    let completions: Vec<Vec<u32>> =
        (0..SAMPLES as u32).map(|s| (0..COMPLETION as u32).map(|t| 1000 + s * 97 + t * 13).collect()).collect();
    let group = || GroupTokens { prompt: &prompt, completions: completions.iter().map(Vec::as_slice).collect() };

    let raw = gemm_rate()?;
    let threads = rayon::current_num_threads();
    println!("{threads} threads, gemm [576, 576] x [576, 1536]: {raw:.0} GFLOP per processor second");
    println!(
        "{:>6} {:>9} {:>9} {:>14} {:>12} {:>9}",
        "step", "forward", "backward", "tokens/s (*)", "GFLOP/CPU s", "of gemm"
    );
    for step in 0..5 {
        let mut gradients = lora.zero_gradients();
        let (began, cpu) = (Instant::now(), cpu_seconds());
        let pass = base.forward(&lora, &[group()])?;
        let forward = began.elapsed().as_secs_f64();
        pass.backward(&[-1.0 / (SAMPLES * COMPLETION) as f32; SAMPLES * COMPLETION], &mut gradients)?;
        let seconds = began.elapsed().as_secs_f64();
        let tokens = (SAMPLES * (PROMPT + COMPLETION)) as f64;
        let rate = flops(&config) / (cpu_seconds() - cpu) / 1e9;
        let backward = seconds - forward;
        let share = 100.0 * rate / raw;
        println!("{step:>6} {forward:>8.2}s {backward:>8.2}s {:>14.0} {rate:>12.0} {share:>8.0}%", tokens / seconds);
    }
    println!("8 groups of 1 answer: in one pass with activations made again or kept, and in a pass each:");
    for (name, activations, alone) in [
        ("again", Activations::Again, false),
        ("kept", Activations::Kept, false),
        ("one by one", Activations::Kept, true),
    ] {
        let mut base = Base::new(&config, &weights, WeightForm::F32)?;
        base.activations = activations;
        let mut seconds = Vec::new();
        for _ in 0..5 {
            let (mut gradients, began) = (lora.zero_gradients(), Instant::now());
            // Eight groups of one answer: packed into one pass, or in a pass each.
            let groups: Vec<GroupTokens> =
                completions.iter().map(|c| GroupTokens { prompt: &prompt, completions: vec![c.as_slice()] }).collect();
            let passes: Vec<&[GroupTokens]> = if alone { groups.chunks(1).collect() } else { vec![&groups[..]] };
            for groups in passes {
                let slopes = vec![-1.0 / (SAMPLES * COMPLETION) as f32; groups.len() * COMPLETION];
                base.forward(&lora, groups)?.backward(&slopes, &mut gradients)?;
            }
            seconds.push(began.elapsed().as_secs_f64());
        }
        seconds.sort_by(f64::total_cmp);
        println!("{name:>12}: {:.2} s", seconds[2]);
    }
    println!("(*) prompt and completion tokens of all samples, as a trainer without shared prompts counts them");
    println!("peak memory {} MB", peak_memory_mb());
    Ok(())
}

/// Returns the multiplications that the step cannot do without: frozen layers forth and back, output layer for targets.
fn flops(c: &ModelConfig) -> f64 {
    let shapes = Linear::ALL.iter().map(|linear| linear.shape(c));
    let layer: usize = shapes.map(|(ins, outs)| ins * outs).sum();
    let rows = PROMPT + SAMPLES * (COMPLETION - 1);
    let head = c.vocab * c.hidden_size * SAMPLES * COMPLETION;
    4.0 * (c.layers.len() * layer * rows + head) as f64
}

fn gemm_rate() -> candle_core::Result<f64> {
    let (m, k, n) = (576, 576, 1536);
    let (a, b, mut c) = (vec![0.5; m * k], vec![0.25; n * k], vec![0.0; m * n]);
    let (rounds, began) = (2000, cpu_seconds());
    for _ in 0..rounds {
        let (a, b) = (Mat::new(&a, m, k)?, Mat::new(&b, n, k)?);
        multiply(MatMut::new(&mut c, m, n)?, Into::Fresh, 1.0, a, b.t(), Threads::All)?;
    }
    Ok((2 * m * n * k * rounds) as f64 / (cpu_seconds() - began) / 1e9)
}

/// Returns the processor time of all threads of this process, in steps of 10 ms.
fn cpu_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let fields = stat.rsplit(')').next().unwrap_or_default().split_whitespace();
    fields.skip(11).take(2).filter_map(|ticks| ticks.parse::<f64>().ok()).sum::<f64>() / 100.0
}

fn peak_memory_mb() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find(|line| line.starts_with("VmHWM"));
    line.and_then(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok()).unwrap_or(0) / 1024
}

fn config() -> ModelConfig {
    ModelConfig {
        architecture: Architecture::Llama,
        block: Architecture::Llama.block(),
        vocab: 49_152,
        hidden_size: 576,
        intermediate_size: 1536,
        layers: vec![LayerKind { rope: Some(0), window: None }; 30],
        heads: 9,
        kv_heads: 3,
        head_dim: 64,
        rms_eps: 1e-5,
        ropes: vec![RopeConfig { theta: 100_000.0, dim: 64, scaling: RopeScaling::None }],
        scores: Scores { scale: 0.125, cap: None },
        embedding_scale: None,
        logit_cap: None,
        max_positions: 8192,
        tied: true,
    }
}

fn weights(c: &ModelConfig) -> candle_core::Result<Weights> {
    let random = |outs: usize, ins: usize| Tensor::randn(0f32, 0.03, (outs, ins), &Device::Cpu);
    let ones = || Tensor::ones(c.hidden_size, candle_core::DType::F32, &Device::Cpu);
    let layer = || -> candle_core::Result<LayerWeights> {
        let linear = |linear: Linear| {
            let (ins, outs) = linear.shape(c);
            random(outs, ins)
        };
        Ok(LayerWeights {
            attn_norm: Some(ones()?),
            attn_post_norm: None,
            q: linear(Linear::Q)?.into(),
            k: linear(Linear::K)?.into(),
            v: linear(Linear::V)?.into(),
            o: linear(Linear::O)?.into(),
            mlp_norm: Some(ones()?),
            mlp_post_norm: None,
            gate: linear(Linear::Gate)?.into(),
            up: linear(Linear::Up)?.into(),
            down: linear(Linear::Down)?.into(),
            q_bias: None,
            k_bias: None,
            v_bias: None,
            q_norm: None,
            k_norm: None,
        })
    };
    let embed = random(c.vocab, c.hidden_size)?;
    let layers = (0..c.layers.len()).map(|_| layer()).collect::<candle_core::Result<_>>()?;
    Ok(Weights { lm_head: embed.clone().into(), embed: embed.into(), layers, norm: ones()? })
}
