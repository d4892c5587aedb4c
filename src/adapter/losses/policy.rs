//! Policy gradients: the advantage of each answer over its siblings times the ratio of the policy to what it was, clipped.
//!
//! The ratio is of a token (GRPO, Dr. GRPO, DAPO) or of a sequence (GSPO, RLOO). Where sampler and trainer compute
//! the same policy not quite alike, a truncated weight that no gradient flows through makes up for it. Formulas and
//! constants are TRL's, whose GRPO and RLOO trainers document them.

use super::{Batch, Loss, Member, Method, Slopes, capped, difference, k3, weight};

/// Keeps the deviation of equal rewards from dividing by 0; TRL's.
const TINY: f64 = 1e-4;

pub(super) fn slopes(loss: &Loss, group: &[Member], batch: &Batch) -> Slopes {
    let mut all = Slopes::default();
    for (member, advantage) in group.iter().zip(advantages(loss, group)) {
        if member.is_elsewhere() {
            all.slopes.push(Vec::new());
            continue;
        }
        let slopes = match loss.method {
            Method::Rloo | Method::Gspo => sequence(loss, member, advantage, batch, &mut all),
            _ => tokens(loss, member, advantage, batch, &mut all),
        };
        all.slopes.push(slopes);
    }
    all
}

/// Returns how much better each answer is than its siblings.
pub(super) fn advantages(loss: &Loss, group: &[Member]) -> Vec<f64> {
    let count = group.len() as f64;
    let tie = |member: &Member| match loss.method {
        // The drift from the base shapes the reward; no gradient flows through it.
        Method::Rloo => loss.beta * difference(member.old, member.base),
        _ => 0.0,
    };
    let rewards: Vec<f64> = group.iter().map(|member| member.reward - tie(member)).collect();
    let sum: f64 = rewards.iter().sum();
    let mean = sum / count;
    let deviation = (rewards.iter().map(|r| (r - mean).powi(2)).sum::<f64>() / (count - 1.0)).sqrt();
    let advantage = |reward: &f64| match loss.method {
        Method::Rloo => reward - (sum - reward) / (count - 1.0),
        Method::DrGrpo => reward - mean,
        _ => (reward - mean) / (deviation + TINY),
    };
    rewards.iter().map(advantage).collect()
}

/// One ratio a token.
fn tokens(loss: &Loss, member: &Member, advantage: f64, batch: &Batch, all: &mut Slopes) -> Vec<f32> {
    let share = match loss.method {
        Method::Dapo => 1.0 / batch.tokens as f64,
        Method::DrGrpo => 1.0 / (batch.samples as f64 * batch.longest as f64),
        _ => 1.0 / (batch.samples as f64 * member.tokens()),
    };
    let slope = |at: usize| {
        let (policy, old) = (member.policy[at], member.old[at]);
        let weight = member.sampler.map_or(1.0, |sampler| weight(f64::from(old) - f64::from(sampler[at])));
        let Ratio { gain, slope, clipped } = ratio(loss, f64::from(policy) - f64::from(old), advantage);
        all.ratio += (f64::from(policy) - f64::from(old)).exp();
        all.clipped += usize::from(clipped);
        let mut along = -share * weight * slope;
        all.value -= share * weight * gain;
        if loss.beta > 0.0 {
            let (cost, pull) = tie(policy, member.base[at]);
            all.value += share * loss.beta * cost;
            along += share * loss.beta * pull;
        }
        along as f32
    };
    (0..member.policy.len()).map(slope).collect()
}

/// One ratio a sequence: of all its tokens (RLOO), or their geometric mean (GSPO).
fn sequence(loss: &Loss, member: &Member, advantage: f64, batch: &Batch, all: &mut Slopes) -> Vec<f32> {
    let share = 1.0 / batch.samples as f64;
    let scale = if loss.method == Method::Gspo { 1.0 / member.tokens() } else { 1.0 };
    let log = scale * member.log_ratio(member.old);
    let weight = member.sampler.map_or(1.0, |sampler| weight(scale * difference(member.old, sampler)));
    let Ratio { gain, slope, clipped } = ratio(loss, log, advantage);
    all.value -= share * weight * gain;
    all.ratio += log.exp() * member.tokens();
    all.clipped += if clipped { member.policy.len() } else { 0 };
    let along = -share * weight * slope * scale;
    let ties = loss.method == Method::Gspo && loss.beta > 0.0;
    let slope = |(policy, base): (&f32, &f32)| {
        if !ties {
            return along as f32;
        }
        let (cost, pull) = tie(*policy, *base);
        let share = share * loss.beta / member.tokens();
        all.value += share * cost;
        (along + share * pull) as f32
    };
    member.policy.iter().zip(member.base).map(slope).collect()
}

/// The clipped gain of one ratio.
struct Ratio {
    gain: f64,
    /// The gain's slope along the ratio's logarithm.
    slope: f64,
    clipped: bool,
}

/// Returns `min(r A, clip(r, 1 - low, 1 + high) A)` of the ratio with this logarithm.
fn ratio(loss: &Loss, log: f64, advantage: f64) -> Ratio {
    let ratio = log.exp();
    let bound = ratio.clamp(1.0 - loss.clip_low, 1.0 + loss.clip_high);
    match ratio * advantage <= bound * advantage {
        true => Ratio { gain: ratio * advantage, slope: ratio * advantage, clipped: false },
        false => Ratio { gain: bound * advantage, slope: 0.0, clipped: true },
    }
}

/// Returns the estimate of the divergence from the base at one token, and its slope along the policy's log-prob.
fn tie(policy: f32, base: f32) -> (f64, f64) {
    (k3(policy, base), 1.0 - capped(policy, base).exp())
}
