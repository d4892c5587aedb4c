//! Which model answered: attribution by likelihood, not by what a server says of itself.
//!
//! The server answers fixed prompts greedily with the log-probs of its tokens. The same tokens are scored here under
//! each model that may have answered. The served log-probs agree with one of them up to the server's numeric
//! tolerance; a server that answers with the base under the new name, or with a stale cache, is found out.
//!
//! A prompt counts only where all models differ on it by the margin, which is judged by the local scores alone, so the
//! server cannot influence which prompts count.

use std::collections::BTreeMap;
use std::sync::Arc;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::record::Message;

use super::server::{Answers, Question};
use super::{EndpointError, Kind};

/// How an attribution is judged.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// Mean difference of log-probs that the server's arithmetic may cause, in nats a token; 0: that of the kind of
    /// server (0.01 for taod serve, 0.03 for bf16 on vLLM; docs/endpoints.md).
    pub tolerance: f64,
    /// Distance of every other model, in tolerances, 2 or more.
    pub margin: f64,
    /// Prompts that are asked, 1 to 100.
    pub prompts: usize,
    /// Prompts on which the models must differ by the margin, 1 to prompts.
    pub min_prompts: usize,
    /// New tokens of each answer, 1 to 512.
    pub max_tokens: usize,
}

impl Default for Settings {
    fn default() -> Self {
        Settings { tolerance: 0.0, margin: 5.0, prompts: 8, min_prompts: 2, max_tokens: 24 }
    }
}

impl Settings {
    /// Returns the settings with the tolerance of a kind of server, where none is set.
    pub fn of(&self, kind: Kind) -> Settings {
        let tolerance = if self.tolerance > 0.0 { self.tolerance } else { kind.tolerance() };
        Settings { tolerance, ..self.clone() }
    }

    /// Checks the values; the message names the key and the remedy.
    pub fn validate(&self) -> Result<(), String> {
        if !(self.tolerance >= 0.0 && self.tolerance.is_finite()) {
            return Err(format!("tolerance = {}: set it to 0 or more", self.tolerance));
        }
        if !(self.margin >= 2.0 && self.margin.is_finite()) {
            return Err(format!("margin = {}: set it to 2 or more", self.margin));
        }
        if self.prompts == 0 || self.prompts > 100 {
            return Err(format!("prompts = {}: set it between 1 and 100", self.prompts));
        }
        if self.min_prompts == 0 || self.min_prompts > self.prompts {
            return Err(format!("min_prompts = {}: set it between 1 and prompts", self.min_prompts));
        }
        if self.max_tokens == 0 || self.max_tokens > 512 {
            return Err(format!("max_tokens = {}: set it between 1 and 512", self.max_tokens));
        }
        Ok(())
    }
}

/// A model that may have answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Who {
    Base,
    /// The version that is served until now.
    Incumbent,
    /// The version that a change goes to.
    New,
}

/// The tokens of a served answer: ids where the server returns them, else their texts in order.
#[derive(Debug, Clone, PartialEq)]
pub enum Tokens {
    Ids(Vec<u32>),
    Pieces(Vec<String>),
}

/// A prompt with the answer that was served for it.
#[derive(Debug, Clone, PartialEq)]
pub struct Answered {
    pub messages: Vec<Message>,
    pub tokens: Tokens,
    pub finish_reason: Option<String>,
}

/// Scores answers here: the log-prob of each token under one model, in the order of the answers. It blocks.
pub type Likelihood = dyn Fn(Who, &[Answered]) -> Result<Vec<Vec<f32>>, String> + Send + Sync;

/// Everything that a proof needs besides the server.
#[derive(Clone)]
pub struct Panel {
    pub prompts: Vec<Vec<Message>>,
    /// The models that may answer, each once; those that are the same model only once.
    pub hypotheses: Vec<Who>,
    pub likelihood: Arc<Likelihood>,
    pub settings: Settings,
}

/// What a proof found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Attribution {
    /// This model answered, and no other one.
    Proven(Who),
    /// The prompts or the tolerance do not tell the models apart.
    Inconclusive,
    /// None of the models answered.
    Wrong,
}

/// The numbers behind an attribution; kept with the promotion's record.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Proof {
    pub attribution: Attribution,
    /// Mean difference between served and local log-probs, in nats a token.
    pub distances: BTreeMap<Who, f64>,
    pub prompts_asked: usize,
    /// Prompts on which the models differ by the margin; only these count.
    pub prompts_used: usize,
}

/// Attributes answers by their log-probs: `served[prompt][token]` against `local[who][prompt][token]`.
pub fn attribute(served: &[Vec<f64>], local: &BTreeMap<Who, Vec<Vec<f64>>>, settings: &Settings) -> Proof {
    let wide = settings.margin * settings.tolerance;
    let used: Vec<usize> = (0..served.len()).filter(|&prompt| tells_apart(prompt, served, local, wide)).collect();
    let distance = |scores: &Vec<Vec<f64>>| {
        let pairs = used.iter().flat_map(|&prompt| served[prompt].iter().zip(&scores[prompt]));
        mean(pairs.map(|(a, b)| (a - b).abs()))
    };
    let distances: BTreeMap<Who, f64> = local.iter().map(|(&who, scores)| (who, distance(scores))).collect();
    let attribution = match used.len() < settings.min_prompts.max(1) {
        true => Attribution::Inconclusive,
        false => judge(&distances, settings.tolerance, wide),
    };
    Proof { attribution, distances, prompts_asked: served.len(), prompts_used: used.len() }
}

/// Returns true where every two models differ on a prompt by at least `wide`, and each has a score for each token.
fn tells_apart(prompt: usize, served: &[Vec<f64>], local: &BTreeMap<Who, Vec<Vec<f64>>>, wide: f64) -> bool {
    let scores: Vec<Option<&Vec<f64>>> = local.values().map(|all| all.get(prompt)).collect();
    let tokens = served[prompt].len();
    let whole = tokens > 0 && scores.iter().all(|s| s.is_some_and(|s| s.len() == tokens));
    let apart = |a: &[f64], b: &[f64]| mean(a.iter().zip(b).map(|(a, b)| (a - b).abs())) >= wide;
    let scores: Vec<&Vec<f64>> = scores.into_iter().flatten().collect();
    whole && (1..scores.len()).all(|i| (0..i).all(|j| apart(scores[i], scores[j])))
}

/// Judges the distances: one within the tolerance, all others beyond the margin. A number that is not finite is
/// beyond everything.
fn judge(distances: &BTreeMap<Who, f64>, tolerance: f64, wide: f64) -> Attribution {
    let near: Vec<Who> = distances.iter().filter(|(_, d)| **d <= tolerance).map(|(&who, _)| who).collect();
    let far = distances.values().filter(|d| !d.is_finite() || **d >= wide).count();
    match near.as_slice() {
        [who] if far + 1 == distances.len() => Attribution::Proven(*who),
        [] if far == distances.len() => Attribution::Wrong,
        _ => Attribution::Inconclusive,
    }
}

fn mean(values: impl Iterator<Item = f64>) -> f64 {
    let (sum, count) = values.fold((0.0, 0), |(sum, count), value| (sum + value, count + 1));
    if count == 0 { f64::NAN } else { sum / f64::from(count) }
}

/// Asks `server` for `model` and attributes its answers to one of the panel's models.
///
/// The models may be alike on most prompts. So where too few of those that were asked tell them apart, as many again are
/// asked, until the panel has no more.
pub async fn prove(server: &dyn Answers, model: &str, panel: &Panel) -> Result<Proof, EndpointError> {
    let mut served = Vec::new();
    let mut local: BTreeMap<Who, Vec<Vec<f64>>> = panel.hypotheses.iter().map(|&who| (who, Vec::new())).collect();
    let mut proof = attribute(&served, &local, &panel.settings);
    for prompts in panel.prompts.chunks(panel.settings.prompts.max(1)) {
        let mut answered = Vec::new();
        for messages in prompts {
            let reply = server.ask(&Question { model, messages, max_tokens: panel.settings.max_tokens }).await?;
            let tokens = reply.token_ids.map_or(Tokens::Pieces(reply.pieces), Tokens::Ids);
            answered.push(Answered { messages: messages.clone(), tokens, finish_reason: reply.finish_reason });
            served.push(reply.logprobs);
        }
        for (who, scores) in score(panel, answered).await? {
            local.entry(who).or_default().extend(scores);
        }
        proof = attribute(&served, &local, &panel.settings);
        if proof.prompts_used >= panel.settings.min_prompts {
            break;
        }
    }
    Ok(proof)
}

/// Scores the answers under each model, on a thread that may block.
async fn score(panel: &Panel, answered: Vec<Answered>) -> Result<BTreeMap<Who, Vec<Vec<f64>>>, EndpointError> {
    let (likelihood, hypotheses) = (panel.likelihood.clone(), panel.hypotheses.clone());
    let work = move || {
        let score = |who| {
            let rows = likelihood(who, &answered)?;
            Ok((who, rows.into_iter().map(|row| row.into_iter().map(f64::from).collect()).collect()))
        };
        hypotheses.into_iter().map(score).collect::<Result<_, String>>()
    };
    let scored = tokio::task::spawn_blocking(work).await.map_err(|e| EndpointError::Likelihood(e.to_string()))?;
    scored.map_err(EndpointError::Likelihood)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn f32() -> Settings {
        Settings::default().of(Kind::Serve)
    }

    const WHO: [Who; 3] = [Who::Base, Who::Incumbent, Who::New];

    /// Two prompts of two tokens under each model, the models `apart` from each other, and what `who` would serve.
    fn case(apart: f64) -> BTreeMap<Who, Vec<Vec<f64>>> {
        let row = |i: usize| vec![vec![-1.0 - apart * i as f64, -0.5], vec![-0.2, -2.0 + apart * i as f64]];
        WHO.iter().enumerate().map(|(i, &who)| (who, row(i))).collect()
    }

    fn shifted(rows: &[Vec<f64>], by: f64) -> Vec<Vec<f64>> {
        rows.iter().map(|row| row.iter().map(|x| x + by).collect()).collect()
    }

    #[test]
    fn each_model_is_recognised_within_the_tolerance() {
        let local = case(0.2); // differs by 0.1 a token, ten tolerances
        for who in WHO {
            let proof = attribute(&shifted(&local[&who], 0.009), &local, &f32());
            assert_eq!((proof.attribution, proof.prompts_used), (Attribution::Proven(who), 2));
            assert!((proof.distances[&who] - 0.009).abs() < 1e-9);
        }
    }

    #[test]
    fn a_foreign_model_is_wrong_and_a_near_miss_inconclusive() {
        let local = case(0.2);
        let foreign = shifted(&local[&Who::New], 1.0);
        assert_eq!(attribute(&foreign, &local, &f32()).attribution, Attribution::Wrong);
        let near = shifted(&local[&Who::New], 0.02);
        assert_eq!(attribute(&near, &local, &f32()).attribution, Attribution::Inconclusive);
        let broken = shifted(&local[&Who::New], f64::NAN);
        assert_eq!(attribute(&broken, &local, &f32()).attribution, Attribution::Wrong);
    }

    #[test]
    fn models_that_are_too_alike_prove_nothing() {
        let local = case(0.08); // differs by 0.04 a token, four tolerances
        let proof = attribute(&local[&Who::New], &local, &f32());
        assert_eq!((proof.attribution, proof.prompts_used), (Attribution::Inconclusive, 0));
    }

    #[test]
    fn a_prompt_on_which_two_models_agree_does_not_count() {
        let mut local = case(0.2);
        let base = local[&Who::Base][0].clone();
        local.get_mut(&Who::Incumbent).unwrap()[0] = base;
        let proof = attribute(&local[&Who::New].clone(), &local, &Settings { min_prompts: 1, ..f32() });
        assert_eq!((proof.attribution, proof.prompts_used), (Attribution::Proven(Who::New), 1));
        let strict = attribute(&local[&Who::New].clone(), &local, &f32());
        assert_eq!(strict.attribution, Attribution::Inconclusive);
    }

    #[test]
    fn scores_of_another_length_or_an_empty_answer_do_not_count() {
        let mut local = case(0.2);
        local.get_mut(&Who::Base).unwrap()[1].pop();
        let served = [local[&Who::New][0].clone(), local[&Who::New][1].clone(), Vec::new()];
        assert_eq!(attribute(&served, &local, &f32()).prompts_used, 1);
    }
}
