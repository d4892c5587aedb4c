//! Likelihood of good answers: `-(1/B) sum_i (1/|y_i|) sum_t log p(y_it)`. RAFT, ReST and SFT differ in what they choose.

use super::{Batch, Choice, Loss, Member, Method, Slopes};

/// Takes what scored above the minimum, best first; RAFT at most so many.
pub(super) fn choose(loss: &Loss, rewards: &[f64]) -> Choice {
    let mut order: Vec<usize> = (0..rewards.len()).filter(|i| rewards[*i] > loss.min_reward).collect();
    order.sort_by(|a, b| rewards[*b].total_cmp(&rewards[*a]).then(a.cmp(b)));
    if loss.method == Method::Raft {
        order.truncate(loss.best);
    }
    match order.is_empty() {
        true => Choice::NoneAbove,
        false => Choice::Train(order),
    }
}

pub(super) fn slopes(group: &[Member], batch: &Batch) -> Slopes {
    let mut all = Slopes::default();
    for member in group {
        if member.is_elsewhere() {
            all.slopes.push(Vec::new());
            continue;
        }
        let slope = (-1.0 / (member.tokens() * batch.samples as f64)) as f32;
        all.value += member.policy.iter().map(|log| f64::from(*log) * f64::from(slope)).sum::<f64>();
        all.ratio += member.tokens();
        all.slopes.push(vec![slope; member.policy.len()]);
    }
    all
}
