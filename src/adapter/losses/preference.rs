//! Preference of one answer over another: a pair's margin is how much further the policy has moved from the reference
//! towards the better answer than towards the worse one, in nats.
//!
//! DPO `-log s(b h)`; RC-DPO `-p log s(b h) - (1 - p) log s(-b h)` with `p = s(r+ - r-)` (compose-rl); RPO adds the better
//! answer's mean negative log-likelihood; REBEL `(b h - (r+ - r-))^2` against the policy that training began from.

use super::{Batch, Choice, Loss, Member, Method, Slopes};

/// Weight of the likelihood that RPO adds (Pang et al. 2024).
const LIKELIHOOD: f64 = 1.0;

/// Pairs the best with the worst, the second best with the second worst, as many as are asked for and differ.
pub(super) fn choose(loss: &Loss, rewards: &[f64]) -> Choice {
    let mut order: Vec<usize> = (0..rewards.len()).collect();
    order.sort_by(|a, b| rewards[*b].total_cmp(&rewards[*a]).then(a.cmp(b)));
    let pairs = (0..loss.best.min(rewards.len() / 2)).map(|i| [order[i], order[rewards.len() - 1 - i]]);
    let good = |[better, worse]: &[usize; 2]| rewards[*better] > rewards[*worse] && rewards[*better] > loss.min_reward;
    let chosen: Vec<usize> = pairs.filter(good).flatten().collect();
    match chosen.is_empty() {
        true => Choice::NoneAbove,
        false => Choice::Train(chosen),
    }
}

pub(super) fn slopes(loss: &Loss, group: &[Member], batch: &Batch) -> Slopes {
    let share = 2.0 / batch.samples as f64;
    let mut all = Slopes::default();
    for pair in group.chunks_exact(2) {
        let (better, worse) = (&pair[0], &pair[1]);
        let reference = |member: &Member| match loss.method {
            Method::Rebel => member.log_ratio(member.old),
            _ => member.log_ratio(member.base),
        };
        let margin = reference(better) - reference(worse);
        let (value, slope) = of_margin(loss, margin, better.reward - worse.reward);
        all.value += share * value;
        let mut up = share * slope;
        if loss.method == Method::Rpo {
            let mean = -LIKELIHOOD / better.tokens();
            all.value += share * mean * better.policy.iter().map(|log| f64::from(*log)).sum::<f64>();
            up += share * mean;
        }
        all.slopes.push(vec![up as f32; better.policy.len()]);
        all.slopes.push(vec![(-share * slope) as f32; worse.policy.len()]);
        all.ratio += better.tokens() + worse.tokens();
    }
    all
}

/// Returns a pair's loss and its slope along the margin.
fn of_margin(loss: &Loss, margin: f64, gap: f64) -> (f64, f64) {
    let Loss { beta, .. } = *loss;
    if loss.method == Method::Rebel {
        let off = beta * margin - gap;
        return (off * off, 2.0 * beta * off);
    }
    let sure = if loss.method == Method::RcDpo { sigmoid(gap) } else { 1.0 };
    let value = sure * softplus(-beta * margin) + (1.0 - sure) * softplus(beta * margin);
    (value, beta * (sigmoid(beta * margin) - sure))
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// Returns `ln(1 + e^x)`, which is `-log s(-x)`, without overflow.
fn softplus(x: f64) -> f64 {
    x.max(0.0) + (-x.abs()).exp().ln_1p()
}
