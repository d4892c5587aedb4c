//! The audit prompts, asked through the name that clients use, before and after the promotion.

use std::collections::BTreeMap;
use std::sync::Arc;

use anyhow::Result;
use futures::StreamExt;
use serde_json::{Value, json};

use super::report::{Comparison, Example, Side};
use crate::candidates::write_sampling;
use crate::config::Config;
use crate::dataset::Prompt;
use crate::progress::Progress;
use crate::record::{FinishReason, derive_seed, last_user_text};
use crate::rewards::{Item, Rewards};

/// Examples shown, at most.
const EXAMPLES: usize = 3;

/// The audit prompts and what is needed to ask and to score them.
pub(super) struct Audit {
    config: Config,
    prompts: Vec<Prompt>,
    rewards: Arc<Rewards>,
}

/// An answer with how the rules judged it.
pub(super) struct Judged {
    item: Item,
    passed: bool,
}

impl Audit {
    /// Takes the audit split's prompts; those of workloads without rules are left out.
    pub(super) fn new(config: &Config, prompts: &[Prompt], rewards: Arc<Rewards>) -> Self {
        let covered = prompts.iter().filter(|p| rewards.covers(p.workload.as_deref()));
        Audit { config: config.clone(), prompts: covered.cloned().collect(), rewards }
    }

    /// Asks every prompt once through the stable name, in production's decoding, and judges the answers.
    pub(super) async fn ask(&self, progress: &Progress) -> Result<Vec<Judged>> {
        let mut step = progress.step("ask the audit prompts", self.prompts.len() as u64, "prompts");
        let client = reqwest::Client::new();
        let asked: Vec<_> = self.prompts.iter().map(|prompt| ask_one(&client, &self.config, prompt)).collect();
        let mut answers = futures::stream::iter(asked).buffered(super::CONCURRENCY);
        let mut items = Vec::new();
        while let Some(answer) = answers.next().await {
            let answer = answer?;
            let prompt = &self.prompts[items.len()];
            items.push(Item {
                workload: prompt.workload.clone(),
                messages: prompt.messages.clone(),
                response: answer.0,
                finish_reason: answer.1,
                prompt_ids: None,
                token_ids: None,
                ratings: Vec::new(),
            });
            step.advance(1, "");
        }
        drop(answers);
        let rewards = self.rewards.clone();
        let (items, scored) = tokio::task::spawn_blocking(move || {
            let scored = rewards.strict(&items);
            (items, scored)
        })
        .await?;
        Ok(items.into_iter().zip(scored?).map(|(item, s)| Judged { item, passed: s.passed }).collect())
    }

    /// Compares the two askings by workload, and picks examples where the second passes and the first does not.
    pub(super) async fn compare(&self, before: &[Judged], after: &[Judged]) -> Result<(Vec<Comparison>, Vec<Example>)> {
        let names: Vec<String> = self.prompts.iter().filter_map(|p| p.workload.clone()).collect();
        let (old, new) = (self.sides(before, &names).await?, self.sides(after, &names).await?);
        let comparisons = old.into_iter().map(|(workload, before)| {
            let after = new.get(&workload).cloned().unwrap_or_default();
            Comparison { workload, before, after }
        });
        let mut examples: Vec<Example> = Vec::new();
        for (b, a) in before.iter().zip(after) {
            let workload = b.item.workload.clone().unwrap_or_default();
            let new_workload = examples.iter().all(|e| e.workload != workload);
            if !b.passed && a.passed && new_workload && examples.len() < EXAMPLES {
                examples.push(Example {
                    workload,
                    prompt: last_user_text(&b.item.messages),
                    before: b.item.response.clone(),
                    after: a.item.response.clone(),
                });
            }
        }
        Ok((comparisons.collect(), examples))
    }

    async fn sides(&self, judged: &[Judged], names: &[String]) -> Result<BTreeMap<String, Side>> {
        let pairs: Vec<(String, String)> =
            judged.iter().map(|j| (self.rewards.question(&j.item), j.item.response.clone())).collect();
        let rewards = self.rewards.clone();
        let similarity = tokio::task::spawn_blocking(move || rewards.similarity(&pairs)).await??;
        let mut sides: BTreeMap<String, Side> = BTreeMap::new();
        for ((j, name), similarity) in judged.iter().zip(names).zip(similarity) {
            let side = sides.entry(name.clone()).or_default();
            side.answers += 1;
            side.passed += usize::from(j.passed);
            side.mean_words += j.item.response.split_whitespace().count() as f64;
            side.similarity += similarity;
        }
        for side in sides.values_mut() {
            side.mean_words /= side.answers as f64;
            side.similarity /= side.answers as f64;
        }
        Ok(sides)
    }
}

/// Asks one prompt as a client would, marked as taod's own so that it never becomes traffic to learn from.
async fn ask_one(client: &reqwest::Client, config: &Config, prompt: &Prompt) -> Result<(String, FinishReason)> {
    let seed = derive_seed(config.round.seed, &["audit", &prompt.prompt_hash]) >> 1;
    let mut body = json!({
        "model": config.endpoint.stable_name, "messages": prompt.messages, "seed": seed, "user": "taod-internal",
    });
    write_sampling(&mut body, &config.decoding.sampling());
    let url = format!("{}/v1/chat/completions", config.endpoint.urls[0]);
    let request = client.post(url).header("x-taod-internal", "1").json(&body);
    let answer: Value = request.send().await?.error_for_status()?.json().await?;
    let choice = &answer["choices"][0];
    let text = choice["message"]["content"].as_str().unwrap_or_default().to_string();
    let finish = if choice["finish_reason"] == "stop" { FinishReason::Stop } else { FinishReason::Length };
    Ok((text, finish))
}
