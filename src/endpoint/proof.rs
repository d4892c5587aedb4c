//! Which model answered: attribution by likelihood, not by what a server says of itself.
//!
//! The server answers fixed prompts greedily with the log-probs of its tokens. The same tokens are scored here under
//! each model that may have answered. The served log-probs agree with one of them up to the server's numeric
//! tolerance; a server that answers with the base under the new name, or with a stale cache, is found out.
//!
//! Two models may be nearer to each other, token by token, than a server's arithmetic is to ours: a night's adapter moves
//! log-probs by hundredths of a nat, and so does bf16. But the arithmetic errs to both sides and the models differ the same way
//! at every token, so what counts is the projection: how far along the way from the one model's scores to the other's the served
//! ones lie, which is 0 for the one and 1 for the other. Its standard error falls with the root of the number of tokens, and
//! prompts are asked until it is small enough. That is judged by the local scores alone, so the server has no say in it.

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
    /// Standard errors between what is served and the middle of any two models, 2 or more: a mistake at 5 takes an error of
    /// arithmetic that happens once in a million proofs. More takes more prompts.
    pub margin: f64,
    /// Prompts that are asked at a time, 1 to 100.
    pub prompts: usize,
    /// Prompts that must have been answered, 1 to prompts.
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
    /// Prompts that count: each model has a score for each token of the answer.
    pub prompts_used: usize,
    /// How far the two models that are most alike stand apart, in standard errors of their middle: the margin or more decides.
    /// Nothing where there is but one model.
    #[serde(default)]
    pub separation: Option<f64>,
}

/// Attributes answers by their log-probs: `served[prompt][token]` against `local[who][prompt][token]`.
pub fn attribute(served: &[Vec<f64>], local: &BTreeMap<Who, Vec<Vec<f64>>>, settings: &Settings) -> Proof {
    let used: Vec<usize> = (0..served.len()).filter(|&prompt| is_whole(prompt, served, local)).collect();
    let flat = |scores: &Vec<Vec<f64>>| -> Vec<f64> { used.iter().flat_map(|&p| scores[p].iter().copied()).collect() };
    let said: Vec<f64> = used.iter().flat_map(|&prompt| served[prompt].iter().copied()).collect();
    let models: Vec<(Who, Vec<f64>)> = local.iter().map(|(&who, scores)| (who, flat(scores))).collect();
    let separation = pairs(&models).map(|(a, b)| length(a, b) / (2.0 * settings.tolerance)).min_by(f64::total_cmp);
    let distance = |scores: &[f64]| mean(said.iter().zip(scores).map(|(a, b)| (a - b).abs()));
    let distances: BTreeMap<Who, f64> = models.iter().map(|(who, scores)| (*who, distance(scores))).collect();
    let attribution = match used.len() < settings.min_prompts.max(1) {
        true => Attribution::Inconclusive,
        false => judge(&said, &models, &distances, settings),
    };
    Proof { attribution, distances, prompts_asked: served.len(), prompts_used: used.len(), separation }
}

/// Returns true where each model has a score for each token of an answer.
fn is_whole(prompt: usize, served: &[Vec<f64>], local: &BTreeMap<Who, Vec<Vec<f64>>>) -> bool {
    let tokens = served[prompt].len();
    tokens > 0 && local.values().all(|all| all.get(prompt).is_some_and(|scores| scores.len() == tokens))
}

/// Judges by two things: the served scores are within the tolerance of a model's, and along the way from every other model
/// to that one they lie at its end. A number that is not finite is near nothing.
fn judge(said: &[f64], models: &[(Who, Vec<f64>)], distances: &BTreeMap<Who, f64>, settings: &Settings) -> Attribution {
    let wide = settings.margin * settings.tolerance;
    let is_near = |who: &Who| distances[who] <= settings.tolerance;
    if !distances.keys().any(is_near) {
        let all_far = distances.values().all(|distance| !distance.is_finite() || *distance >= wide);
        return if all_far { Attribution::Wrong } else { Attribution::Inconclusive };
    }
    let beats = |who: &Who, own: &[f64]| {
        models.iter().filter(|(other, _)| other != who).all(|(_, other)| {
            length(own, other) >= 2.0 * settings.tolerance * settings.margin
                && (projection(said, other, own) - 1.0).abs() <= ENDS
        })
    };
    let mut found = models.iter().filter(|(who, own)| is_near(who) && beats(who, own));
    found.next().map_or(Attribution::Inconclusive, |(who, _)| Attribution::Proven(*who))
}

/// How far from its end a projection may lie; two models' ranges never meet.
const ENDS: f64 = 0.4;

/// Returns where `said` lies along the way from `from` (0) to `to` (1).
fn projection(said: &[f64], from: &[f64], to: &[f64]) -> f64 {
    let way = |i: usize| to[i] - from[i];
    let along: f64 = (0..said.len()).map(|i| (said[i] - from[i]) * way(i)).sum();
    along / length(from, to).powi(2)
}

/// Returns the Euclidean distance of two models' scores. By it, the standard error of a projection is the server's error a
/// token divided by this.
fn length(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| (a - b).powi(2)).sum::<f64>().sqrt()
}

fn pairs(models: &[(Who, Vec<f64>)]) -> impl Iterator<Item = (&[f64], &[f64])> {
    (1..models.len()).flat_map(move |i| (0..i).map(move |j| (models[i].1.as_slice(), models[j].1.as_slice())))
}

fn mean(values: impl Iterator<Item = f64>) -> f64 {
    let (sum, count) = values.fold((0.0, 0), |(sum, count), value| (sum + value, count + 1));
    if count == 0 { f64::NAN } else { sum / f64::from(count) }
}

/// Asks `server` for `model` and attributes its answers to one of the panel's models.
///
/// The models may be much alike. So where those prompts that were asked do not tell them apart, as many again are asked, until
/// the panel has no more.
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
        if proof.prompts_used >= panel.settings.min_prompts
            && proof.separation.is_none_or(|apart| apart >= panel.settings.margin)
        {
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
        // Over four tokens, two of which differ by six tolerances: 4.2 standard errors.
        let local = case(0.06);
        let proof = attribute(&local[&Who::New], &local, &f32());
        assert_eq!((proof.attribution, proof.prompts_used), (Attribution::Inconclusive, 2));
        assert!((proof.separation.unwrap() - 4.243).abs() < 1e-3, "{proof:?}");
    }

    #[test]
    fn a_prompt_on_which_two_models_agree_says_nothing_of_them() {
        let mut local = case(0.2);
        let base = local[&Who::Base].clone();
        local.get_mut(&Who::Incumbent).unwrap()[0].clone_from(&base[0]);
        let proof = attribute(&local[&Who::New].clone(), &local, &f32());
        assert_eq!((proof.attribution, proof.prompts_used), (Attribution::Proven(Who::New), 2));
        local.insert(Who::Incumbent, base);
        // Which of two that are the same answered cannot be said; that a third one did can.
        for (who, attribution) in [(Who::Base, Attribution::Inconclusive), (Who::New, Attribution::Proven(Who::New))] {
            let alike = attribute(&local[&who].clone(), &local, &f32());
            assert_eq!((alike.attribution, alike.separation), (attribution, Some(0.0)));
        }
    }

    /// A night's adapter is nearer to its base at each token than bf16 is to f32; over enough tokens it is told all the same.
    #[test]
    fn what_is_less_than_the_servers_error_at_a_token_is_told_over_many() {
        let noise = |seed: usize, size: f64| -> Vec<Vec<f64>> {
            let value = |prompt: usize, token: usize| {
                let uniform = |salt: u64| {
                    let place = [seed.to_string(), prompt.to_string(), token.to_string(), salt.to_string()];
                    let place = place.each_ref().map(String::as_str);
                    (crate::record::derive_seed(11, &place) >> 11) as f64 / (1u64 << 53) as f64
                };
                // Two uniform numbers of variance 1/12 each.
                (uniform(0) + uniform(1) - 1.0) * 6f64.sqrt() * size
            };
            (0..16).map(|prompt| (0..24).map(|token| value(prompt, token)).collect()).collect()
        };
        let sum = |a: &[Vec<f64>], b: &[Vec<f64>]| -> Vec<Vec<f64>> {
            a.iter().zip(b).map(|(a, b)| a.iter().zip(b).map(|(a, b)| a + b).collect()).collect()
        };
        let base = noise(0, 1.0);
        let settings = Settings::default().of(Kind::Vllm);
        for night in 1..200 {
            let new = sum(&base, &noise(night, 0.02));
            let local = BTreeMap::from([(Who::Base, base.clone()), (Who::New, new.clone())]);
            for (who, scores) in [(Who::Base, &base), (Who::New, &new)] {
                let served = sum(scores, &noise(1000 + night, settings.tolerance));
                let proof = attribute(&served, &local, &settings);
                assert_eq!(proof.attribution, Attribution::Proven(who), "night {night}: {proof:?}");
            }
            // Half of an adapter, or one twice as strong, is none of the two.
            for strength in [0.01, 0.04] {
                let served = sum(&base, &noise(night, strength));
                assert_eq!(attribute(&served, &local, &settings).attribution, Attribution::Inconclusive);
            }
        }
    }

    #[test]
    fn scores_of_another_length_or_an_empty_answer_do_not_count() {
        let mut local = case(0.2);
        local.get_mut(&Who::Base).unwrap()[1].pop();
        let served = [local[&Who::New][0].clone(), local[&Who::New][1].clone(), Vec::new()];
        assert_eq!(attribute(&served, &local, &f32()).prompts_used, 1);
    }
}
