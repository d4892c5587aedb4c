//! Regression of an answer's log-ratio to a reference on its optimal advantage:
//! `mean_i (b2 log(p(y_i) / ref(y_i)) - (r_i - V))^2`, where `V = b1 ln mean_i exp(r_i / b1)` is the prompt's value.
//!
//! The reference is the base (A*-PO) or the sampler's policy (OAPL). The published b2 of 1e-3 belongs to full fine-tuning
//! with gradients clipped to 1e-3: it asks for log-ratios of up to 1,000 nats. The own one here asks for 20.

use super::{Batch, Loss, Member, Method, Slopes};

pub(super) fn slopes(loss: &Loss, group: &[Member], batch: &Batch) -> Slopes {
    let share = 1.0 / batch.samples as f64;
    let value = soft_maximum(group, loss.value_beta);
    let mut all = Slopes::default();
    for member in group {
        if member.is_elsewhere() {
            all.slopes.push(Vec::new());
            continue;
        }
        let reference = if loss.method == Method::AStarPo { member.base } else { member.old };
        let off = loss.beta * member.log_ratio(reference) - (member.reward - value);
        all.value += share * off * off;
        all.ratio += member.tokens();
        all.slopes.push(vec![(share * 2.0 * loss.beta * off) as f32; member.policy.len()]);
    }
    all
}

fn soft_maximum(group: &[Member], temperature: f64) -> f64 {
    let most = group.iter().map(|member| member.reward).fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = group.iter().map(|member| ((member.reward - most) / temperature).exp()).sum();
    most + temperature * (sum / group.len() as f64).ln()
}
