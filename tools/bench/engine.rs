//! One side of the engine bench: does a piece of work once for each line of its input, and tells its seconds.
//!
//! `engine MODEL WORK`, where WORK is `generate[-int16|-int8] PROMPTS SAMPLES PROMPT NEW`, `logprobs[-int16|-gate] GROUPS SAMPLES PROMPT NEW`,
//! `step[-int16] SAMPLES PROMPT NEW`, `classify FILE` (a list of texts as token ids; MODEL is a reward model), or `raft[-int16|-int8]` or `grpo[-int16] PROMPTS SAMPLES NEW FILE`: a whole iteration, from the
//! prompts in a file of token ids to an adapter. It prints `ready`, then a line of JSON for each line it reads.

use std::io::BufRead;
use std::time::Instant;

use taod::adapter::losses::Method;
use taod::adapter::optimizer::AdamW;
use taod::adapter::{Sample, Settings, tune};
use taod::engine::train::{Base, GroupTokens, LoraMatrices};
use taod::engine::{
    BatchLimits, Group, LoraSpec, Model, Policy, Precision, SamplingSettings, ScoreItem, SequenceClassifier,
    WeightForm, generate, logprobs,
};
use taod::progress::Progress;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [model, work, sizes @ ..] = arguments.as_slice() else { return Err("usage: engine MODEL WORK SIZES".into()) };
    if let [prompts, samples, new, file] = sizes
        && let Some((method, form)) = iteration_of(work)
    {
        taod::engine::init_threads(None);
        let prompts = Prompts { count: prompts.parse()?, samples: samples.parse()?, new: new.parse()?, file };
        return iterate(&Model::load(model)?, method, form, &prompts);
    }
    if let ("classify", [file]) = (work.as_str(), sizes) {
        taod::engine::init_threads(None);
        return classify(&SequenceClassifier::load(model)?, file);
    }
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
        ("logprobs", [groups, samples, prompt, new]) => {
            score(&model, WeightForm::F32, *groups, *samples, *prompt, *new)
        }
        ("logprobs-int16", [groups, samples, prompt, new]) => {
            score(&model, WeightForm::Int16, *groups, *samples, *prompt, *new)
        }
        ("logprobs-gate", [groups, samples, prompt, new]) => {
            score_as_the_gate(&model, *groups, *samples, *prompt, *new)
        }
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

/// Makes the base's log-probs as a loss needs them, group by group.
fn score(model: &Model, form: WeightForm, groups: usize, samples: usize, prompt: usize, new: usize) -> Result<()> {
    let prompts: Vec<Vec<u32>> = (0..groups).map(|g| ids(g, prompt)).collect();
    let answers: Vec<Vec<u32>> = (0..groups * samples).map(|a| ids(1000 + a, new)).collect();
    let base = Base::of(model, form)?;
    serve(|| {
        let groups = prompts.iter().zip(answers.chunks(samples));
        let group = |(prompt, answers): (&'_ Vec<u32>, &'_ [Vec<u32>])| -> Result<usize> {
            let completions = answers.iter().map(Vec::as_slice).collect();
            Ok(base.score(&[GroupTokens { prompt, completions }])?.logprobs.len())
        };
        groups.map(group).sum()
    })
}

/// Makes them as the gate measures how far an adapter is from its base, in batches of any items.
fn score_as_the_gate(model: &Model, groups: usize, samples: usize, prompt: usize, new: usize) -> Result<()> {
    let prompts: Vec<Vec<u32>> = (0..groups).map(|g| ids(g, prompt)).collect();
    let answers: Vec<Vec<u32>> = (0..groups * samples).map(|a| ids(1000 + a, new)).collect();
    let item = |(i, completion): (usize, &Vec<u32>)| (prompts[i / samples].clone(), completion.clone());
    let items: Vec<(Vec<u32>, Vec<u32>)> = answers.iter().enumerate().map(item).collect();
    serve(|| {
        let items: Vec<ScoreItem> = items.iter().map(|(prompt, completion)| ScoreItem { prompt, completion }).collect();
        Ok(logprobs(model, None, &items)?.concat().len())
    })
}

/// Scores texts with a reward model. The scores go beside a file of texts, so that the two sides can be compared.
fn classify(model: &SequenceClassifier, file: &str) -> Result<()> {
    let texts: Vec<Vec<u32>> = serde_json::from_slice(&std::fs::read(file)?)?;
    let texts: Vec<&[u32]> = texts.iter().map(Vec::as_slice).collect();
    let scores = model.score(&texts)?;
    std::fs::write(format!("{file}.taod"), serde_json::to_vec(&scores)?)?;
    serve(|| {
        model.score(&texts)?;
        Ok(texts.iter().map(|text| text.len()).sum())
    })
}

/// A step on one group: forward, backward, AdamW, with the mean negative log-likelihood as loss.
fn step(model: &Model, form: WeightForm, samples: usize, prompt: usize, new: usize) -> Result<()> {
    let base = Base::new(model.config(), model.weights(), form)?;
    let spec = LoraSpec::default();
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

/// What a whole iteration begins with.
struct Prompts<'a> {
    count: usize,
    samples: usize,
    new: usize,
    /// A JSON list of lists of token ids.
    file: &'a str,
}

/// Answers of the warm-up: enough to have seen every kind of work.
const WARM_UP_PROMPTS: usize = 4;

fn iteration_of(work: &str) -> Option<(Method, WeightForm)> {
    Some(match work {
        "raft" => (Method::Raft, WeightForm::F32),
        "raft-int16" => (Method::Raft, WeightForm::Int16),
        "raft-int8" => (Method::Raft, WeightForm::Int8),
        "grpo" => (Method::Grpo, WeightForm::F32),
        "grpo-int16" => (Method::Grpo, WeightForm::Int16),
        _ => return None,
    })
}

/// A whole iteration: answers, rewards, an adapter on disk. It counts the answers.
fn iterate(model: &Model, method: Method, form: WeightForm, prompts: &Prompts) -> Result<()> {
    let ids: Vec<Vec<u32>> = serde_json::from_slice(&std::fs::read(prompts.file)?)?;
    if ids.len() < prompts.count {
        return Err(format!("{} holds {} prompts, fewer than {}", prompts.file, ids.len(), prompts.count).into());
    }
    // As many passes as the trainer it is compared with: RAFT's best two answers twice, GRPO's all once.
    let epochs = if method == Method::Raft { 2 } else { 1 };
    // Eight bits are for sampling alone.
    let precision = if form == WeightForm::F32 { Precision::F32 } else { Precision::Int16 };
    let settings = Settings { method, epochs, precision, ..Settings::default() };
    let mut round = 0;
    serve(|| {
        round += 1;
        let count = if round == 1 { WARM_UP_PROMPTS } else { prompts.count };
        let group = |(id, prompt): (usize, &Vec<u32>)| Group {
            id: id as u64,
            prompt: prompt.clone(),
            seeds: (0..prompts.samples).map(|s| (round * 1_000_000 + id * 1000 + s) as u64).collect(),
            sampling: SamplingSettings { temperature: 1.0, max_tokens: prompts.new, ..SamplingSettings::default() },
        };
        let groups: Vec<Group> = ids[..count].iter().enumerate().map(group).collect();
        let policy = Policy::new(model, None, form)?;
        let answers = generate(&policy, groups, &BatchLimits::default(), &mut |_, _, _| {})?;
        drop(policy);
        let mut samples = Vec::new();
        for (at, (prompt, answers)) in ids.iter().zip(answers).enumerate() {
            samples.extend(answers.into_iter().map(|answer| Sample {
                group: at.to_string(),
                prompt: prompt.clone(),
                reward: reward(&answer.token_ids),
                // Rounded weights are another policy than the base.
                base_logprobs: (form == WeightForm::F32).then(|| answer.logprobs.clone()),
                old_logprobs: Some(answer.logprobs),
                completion: answer.token_ids,
            }));
        }
        let out = tempfile::tempdir()?;
        tune(model, &samples, None, &settings, 1, out.path(), &Progress::silent())?;
        Ok(samples.len())
    })
}

/// The share of an answer's tokens that are different ones: a reward that both sides compute alike.
fn reward(ids: &[u32]) -> f64 {
    let different: std::collections::HashSet<&u32> = ids.iter().collect();
    different.len() as f64 / ids.len() as f64
}
