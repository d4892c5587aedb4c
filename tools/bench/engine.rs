//! One side of the engine bench: does a piece of work once for each line of its input, and tells its seconds.
//!
//! `engine MODEL WORK`, where WORK is `generate[-int16|-int8] PROMPTS SAMPLES PROMPT NEW`, `logprobs GROUPS SAMPLES PROMPT NEW` or
//! `step[-int16] SAMPLES PROMPT NEW`. It prints `ready`, then a line of JSON for each line it reads.

use std::io::BufRead;
use std::time::Instant;

use taod::adapter::optimizer::AdamW;
use taod::engine::train::{Base, GroupTokens, LoraMatrices};
use taod::engine::{
    BatchLimits, Group, Linear, LoraSpec, Model, Policy, SamplingSettings, ScoreItem, WeightForm, generate, logprobs,
};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [model, work, sizes @ ..] = arguments.as_slice() else { return Err("usage: engine MODEL WORK SIZES".into()) };
    let sizes: Vec<usize> = sizes.iter().map(|size| size.parse()).collect::<std::result::Result<_, _>>()?;
    taod::engine::init_threads(None);
    let model = Model::load(model)?;
    match (work.as_str(), sizes.as_slice()) {
        ("generate", [prompts, samples, prompt, new]) => {
            sample(&model, WeightForm::F32, *prompts, *samples, *prompt, *new)
        }
        ("generate-int16", [prompts, samples, prompt, new]) => {
            sample(&model, WeightForm::Int16, *prompts, *samples, *prompt, *new)
        }
        ("generate-int8", [prompts, samples, prompt, new]) => {
            sample(&model, WeightForm::Int8, *prompts, *samples, *prompt, *new)
        }
        ("logprobs", [groups, samples, prompt, new]) => score(&model, *groups, *samples, *prompt, *new),
        ("step", [samples, prompt, new]) => step(&model, WeightForm::F32, *samples, *prompt, *new),
        ("step-int16", [samples, prompt, new]) => step(&model, WeightForm::Int16, *samples, *prompt, *new),
        _ => Err(format!("no work is called {work} {sizes:?}").into()),
    }
}

/// Does the work once to warm up, then once for each line of the input; it returns the tokens it did.
fn serve(mut work: impl FnMut() -> Result<usize>) -> Result<()> {
    work()?;
    println!("ready");
    for line in std::io::stdin().lock().lines() {
        line?;
        let began = Instant::now();
        let tokens = work()?;
        println!("{}", serde_json::json!({ "seconds": began.elapsed().as_secs_f64(), "tokens": tokens }));
    }
    Ok(())
}

/// The same ids on both sides.
fn ids(seed: usize, n: usize) -> Vec<u32> {
    (0..n).map(|i| (1000 + (seed * 104_729 + i * 7919) % 40_000) as u32).collect()
}

fn sample(model: &Model, form: WeightForm, prompts: usize, samples: usize, prompt: usize, new: usize) -> Result<()> {
    let policy = Policy::new(model, None, form)?;
    let mut round = 0;
    serve(|| {
        round += 1;
        let group = |id: usize| Group {
            id: id as u64,
            prompt: ids(round * prompts + id, prompt),
            seeds: (0..samples).map(|s| (round * 1_000_000 + id * 1000 + s) as u64).collect(),
            sampling: SamplingSettings { temperature: 1.0, max_tokens: new, ..SamplingSettings::default() },
        };
        let groups = (0..prompts).map(group).collect();
        let answers = generate(&policy, groups, &BatchLimits::default(), &mut |_, _, _| {})?;
        Ok(answers.iter().flatten().map(|answer| answer.token_ids.len()).sum())
    })
}

fn score(model: &Model, groups: usize, samples: usize, prompt: usize, new: usize) -> Result<()> {
    let prompts: Vec<Vec<u32>> = (0..groups).map(|g| ids(g, prompt)).collect();
    let answers: Vec<Vec<u32>> = (0..groups * samples).map(|a| ids(1000 + a, new)).collect();
    let item = |(i, completion): (usize, &Vec<u32>)| (prompts[i / samples].clone(), completion.clone());
    let items: Vec<(Vec<u32>, Vec<u32>)> = answers.iter().enumerate().map(item).collect();
    serve(|| {
        let items: Vec<ScoreItem> = items.iter().map(|(prompt, completion)| ScoreItem { prompt, completion }).collect();
        Ok(logprobs(model, None, &items)?.concat().len())
    })
}

/// A step on one group: forward, backward, AdamW, with the mean negative log-likelihood as loss.
fn step(model: &Model, form: WeightForm, samples: usize, prompt: usize, new: usize) -> Result<()> {
    let base = Base::new(model.config(), model.weights(), form)?;
    let spec = LoraSpec { rank: 16, alpha: 32.0, targets: Linear::ALL.to_vec(), use_rslora: false };
    let mut lora = LoraMatrices::fresh(model.config(), &spec, 1);
    let mut optimizer = AdamW::new(&lora.values);
    let prompt = ids(0, prompt);
    let answers: Vec<Vec<u32>> = (0..samples).map(|a| ids(1000 + a, new)).collect();
    serve(|| {
        let group = GroupTokens { prompt: &prompt, completions: answers.iter().map(Vec::as_slice).collect() };
        let mut gradients = lora.zero_gradients();
        let pass = base.forward(&lora, &[group])?;
        pass.backward(&vec![-1.0 / (samples * new) as f32; samples * new], &mut gradients)?;
        optimizer.update(&mut lora.values, &gradients, 1e-5, 0.0);
        // As a trainer without shared prompts counts them.
        Ok(samples * (prompt.len() + new))
    })
}
