//! Speed of the engine on a device: sampling, log-probs and a LoRA step on random weights of a real model's shape.
//!
//! `device DEVICE DTYPE SHAPE FIXTURE`, for example `device cuda bf16 1.5b tests/fixtures/models/tiny-qwen2`. SHAPE is `0.5b`, `1.5b`
//! or `3b` (those of Qwen2.5) or `tiny`; FIXTURE lends its tokenizer. It prints a table: medians of five runs after one to warm up.

use std::collections::HashMap;
use std::fs;
use std::path::Path;
use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use serde_json::json;
use taod::adapter::optimizer::AdamW;
use taod::engine::train::{Activations, Base, GroupTokens, LoraMatrices};
use taod::engine::{
    BatchLimits, DeviceName, Dtype, Group, Hold, LoraSpec, Model, Policy, SamplingSettings, ScoreItem, Settings,
    WeightForm, generate, logprobs,
};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// Runs of each piece of work that count.
const RUNS: usize = 5;

/// A decoder of Qwen2.5's family.
struct Shape {
    hidden: usize,
    layers: usize,
    heads: usize,
    kv_heads: usize,
    wide: usize,
    vocab: usize,
}

/// How much is done at once.
struct Work {
    prompts: usize,
    samples: usize,
    prompt: usize,
    new: usize,
}

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [device, dtype, name, fixture] = arguments.as_slice() else {
        return Err("usage: device DEVICE DTYPE SHAPE FIXTURE".into());
    };
    let (shape, work) = match name.as_str() {
        "0.5b" => (shape([896, 24, 14, 2, 4864, 151_936]), work([16, 8, 256, 128])),
        "1.5b" => (shape([1536, 28, 12, 2, 8960, 151_936]), work([16, 8, 256, 128])),
        "3b" => (shape([2048, 36, 16, 2, 11_008, 151_936]), work([16, 8, 256, 128])),
        "tiny" => (shape([64, 2, 4, 2, 96, 340]), work([2, 2, 24, 8])),
        _ => return Err(format!("no shape is called {name}; take 0.5b, 1.5b, 3b or tiny").into()),
    };
    let dtype = match dtype.as_str() {
        "f32" => Dtype::F32,
        "bf16" => Dtype::Bf16,
        _ => return Err(format!("{dtype} is neither f32 nor bf16").into()),
    };
    let engine = Settings { device: device.parse::<DeviceName>()?, dtype };
    taod::engine::init_threads(None);
    let folder = tempfile::tempdir()?;
    write(&shape, Path::new(fixture), folder.path())?;
    let model = Model::load_on(&folder.path().display().to_string(), Hold::F32, &engine)?;
    let place = model.computed_on().unwrap_or_else(|| "cpu".to_string());
    println!("| {name} on {place} | tokens | seconds | tokens/s |\n|---|---:|---:|---:|");
    let Work { prompts, samples, prompt, new } = work;
    let sampling = format!("sample {prompts} prompts of {prompt} x {samples} x {new} new");
    measure(&sampling, || sample(&model, shape.vocab, &work))?;
    let scoring = format!("log-probs of {prompts} prompts of {prompt} x {samples} x {new}");
    measure(&scoring, || score(&model, shape.vocab, &work))?;
    for (activations, kept) in [(Activations::Kept, "kept"), (Activations::Again, "made again")] {
        let mut trainer = Trainer::new(&model, activations)?;
        let step = format!("LoRA step, {samples} x ({prompt} shared + {new}), activations {kept}");
        measure(&step, || trainer.step(shape.vocab, &work))?;
    }
    Ok(())
}

fn shape([hidden, layers, heads, kv_heads, wide, vocab]: [usize; 6]) -> Shape {
    Shape { hidden, layers, heads, kv_heads, wide, vocab }
}

fn work([prompts, samples, prompt, new]: [usize; 4]) -> Work {
    Work { prompts, samples, prompt, new }
}

/// Writes a model folder of random weights, one file a layer.
fn write(shape: &Shape, fixture: &Path, folder: &Path) -> Result<()> {
    for name in ["tokenizer.json", "tokenizer_config.json", "generation_config.json"] {
        fs::copy(fixture.join(name), folder.join(name))?;
    }
    let Shape { hidden, layers, heads, kv_heads, wide, vocab } = *shape;
    let config = json!({
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu", "hidden_size": hidden,
        "intermediate_size": wide, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
        "tie_word_embeddings": true, "vocab_size": vocab, "bos_token_id": 0, "eos_token_id": 2,
    });
    fs::write(folder.join("config.json"), config.to_string())?;
    let kv = hidden / heads * kv_heads;
    let mut index = serde_json::Map::new();
    let mut file = |name: String, tensors: Vec<(String, Tensor)>| -> Result<()> {
        index.extend(tensors.iter().map(|(tensor, _)| (tensor.clone(), json!(name))));
        let tensors: HashMap<String, Tensor> = tensors.into_iter().collect();
        Ok(candle_core::safetensors::save(&tensors, folder.join(&name))?)
    };
    let matrix = |rows: usize, columns: usize| -> Result<Tensor> {
        let values = Tensor::randn(0f32, 0.02, (rows, columns), &Device::Cpu)?;
        Ok(values.to_dtype(DType::BF16)?)
    };
    let ones = || Tensor::ones(hidden, DType::BF16, &Device::Cpu);
    for layer in 0..layers {
        let name = |part: &str| format!("model.layers.{layer}.{part}");
        let mut tensors = vec![
            (name("input_layernorm.weight"), ones()?),
            (name("post_attention_layernorm.weight"), ones()?),
            (name("self_attn.o_proj.weight"), matrix(hidden, hidden)?),
            (name("mlp.gate_proj.weight"), matrix(wide, hidden)?),
            (name("mlp.up_proj.weight"), matrix(wide, hidden)?),
            (name("mlp.down_proj.weight"), matrix(hidden, wide)?),
        ];
        for (part, rows) in [("q", hidden), ("k", kv), ("v", kv)] {
            tensors.push((name(&format!("self_attn.{part}_proj.weight")), matrix(rows, hidden)?));
            let bias = Tensor::zeros(rows, DType::BF16, &Device::Cpu)?;
            tensors.push((name(&format!("self_attn.{part}_proj.bias")), bias));
        }
        file(format!("model-{layer:05}.safetensors"), tensors)?;
    }
    let rest = vec![
        ("model.embed_tokens.weight".to_string(), matrix(vocab, hidden)?),
        ("model.norm.weight".to_string(), ones()?),
    ];
    file(format!("model-{layers:05}.safetensors"), rest)?;
    fs::write(folder.join("model.safetensors.index.json"), json!({ "weight_map": index }).to_string())?;
    Ok(())
}

/// Does the work once to warm up, then as often as counts, and prints the median. It returns the tokens it did.
fn measure(name: &str, mut work: impl FnMut() -> Result<usize>) -> Result<()> {
    let tokens = work()?;
    let mut seconds = Vec::new();
    for _ in 0..RUNS {
        let began = Instant::now();
        work()?;
        seconds.push(began.elapsed().as_secs_f64());
    }
    seconds.sort_by(f64::total_cmp);
    let median = seconds[RUNS / 2];
    println!("| {name} | {tokens} | {median:.3} | {:.0} |", tokens as f64 / median);
    Ok(())
}

fn ids(vocab: usize, seed: usize, n: usize) -> Vec<u32> {
    (0..n).map(|i| (10 + (seed * 104_729 + i * 7919) % (vocab - 10)) as u32).collect()
}

fn sample(model: &Model, vocab: usize, work: &Work) -> Result<usize> {
    let policy = Policy::new(model, None, WeightForm::F32)?;
    let group = |id: usize| Group {
        id: id as u64,
        prompt: ids(vocab, id, work.prompt),
        seeds: (0..work.samples).map(|s| (id * 1000 + s) as u64).collect(),
        sampling: SamplingSettings { max_tokens: work.new, ..SamplingSettings::default() },
    };
    let limits = BatchLimits { max_sequences: work.prompts * work.samples, ..BatchLimits::default() };
    let answers = generate(&policy, (0..work.prompts).map(group).collect(), &limits, &mut |_, _, _| {})?;
    Ok(answers.iter().flatten().map(|answer| answer.token_ids.len()).sum())
}

/// Counts all tokens, a prompt once for each answer as a scorer that does not share it would read it.
fn score(model: &Model, vocab: usize, work: &Work) -> Result<usize> {
    let prompts: Vec<Vec<u32>> = (0..work.prompts).map(|p| ids(vocab, p, work.prompt)).collect();
    let answers: Vec<Vec<u32>> = (0..work.prompts * work.samples).map(|a| ids(vocab, 1000 + a, work.new)).collect();
    let numbered = answers.iter().map(Vec::as_slice).enumerate();
    let items: Vec<ScoreItem> = numbered
        .map(|(at, completion)| ScoreItem { prompt: prompts[at / work.samples].as_slice(), completion })
        .collect();
    logprobs(model, None, &items)?;
    Ok(items.len() * (work.prompt + work.new))
}

/// A LoRA of rank 16 on every linear layer, with its optimizer.
struct Trainer<'a> {
    base: Base<'a>,
    lora: LoraMatrices,
    optimizer: AdamW,
}

impl<'a> Trainer<'a> {
    fn new(model: &'a Model, activations: Activations) -> Result<Self> {
        let mut base = Base::of(model, WeightForm::F32)?;
        base.activations = activations;
        let lora = LoraMatrices::fresh(model.config(), &LoraSpec::default(), 1);
        let optimizer = AdamW::new(&lora.values);
        Ok(Trainer { base, lora, optimizer })
    }

    /// One group forth and back, and the update. Counts as a trainer without shared prompts does.
    fn step(&mut self, vocab: usize, work: &Work) -> Result<usize> {
        let prompt = ids(vocab, 0, work.prompt);
        let answers: Vec<Vec<u32>> = (0..work.samples).map(|a| ids(vocab, 1000 + a, work.new)).collect();
        let group = GroupTokens { prompt: &prompt, completions: answers.iter().map(Vec::as_slice).collect() };
        let mut gradients = self.lora.zero_gradients();
        let tokens = work.samples * work.new;
        let pass = self.base.forward(&self.lora, &[group])?;
        pass.backward(&vec![-1.0 / tokens as f32; tokens], &mut gradients)?;
        self.optimizer.update(&mut self.lora.values, &gradients, 1e-5, 0.0);
        Ok(work.samples * (work.prompt + work.new))
    }
}
