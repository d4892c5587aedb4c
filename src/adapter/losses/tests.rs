use std::collections::BTreeMap;
use std::path::Path;

use super::*;

fn loss(method: Method) -> Loss {
    Loss::new(&Settings { method, ..Settings::default() })
}

/// Numbers of `tools/reference/losses_golden.py`.
#[derive(Deserialize)]
struct Golden {
    groups: Vec<Vec<GoldenMember>>,
    methods: BTreeMap<String, GoldenMethod>,
}

#[derive(Deserialize)]
struct GoldenMember {
    reward: f64,
    policy: Vec<f32>,
    old: Vec<f32>,
    base: Vec<f32>,
    sampler: Vec<f32>,
}

#[derive(Deserialize)]
struct GoldenMethod {
    constants: BTreeMap<String, f64>,
    value: f64,
    slopes: Vec<Vec<Vec<f64>>>,
}

#[test]
fn every_loss_and_its_slopes_agree_with_pytorch() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/losses.json");
    let golden: Golden = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let groups: Vec<Vec<Member>> = golden.groups.iter().map(|group| group.iter().map(member).collect()).collect();
    let all: Vec<&Member> = groups.iter().flatten().collect();
    let batch = Batch {
        samples: all.len(),
        tokens: all.iter().map(|m| m.policy.len()).sum(),
        longest: all.iter().map(|m| m.policy.len()).max().unwrap(),
    };
    let mut clipped = 0;
    for method in Method::ALL {
        let expected = &golden.methods[&method.to_string()];
        let constant = |name: &str| expected.constants.get(name).copied();
        let mut loss = loss(method);
        loss.beta = constant("beta").unwrap_or(loss.beta);
        loss.value_beta = constant("value_beta").unwrap_or(loss.value_beta);
        loss.clip_low = constant("clip_low").unwrap_or(loss.clip_low);
        loss.clip_high = constant("clip_high").unwrap_or(loss.clip_high);
        let found: Vec<Slopes> = groups.iter().map(|group| loss.slopes(group, &batch)).collect();
        let value: f64 = found.iter().map(|group| group.value).sum();
        assert!((value - expected.value).abs() < 1e-6 * expected.value.abs().max(1.0), "{method}: {value}");
        let slopes = found.iter().flat_map(|group| group.slopes.iter().flatten());
        let pairs: Vec<(f32, f64)> = slopes.copied().zip(expected.slopes.iter().flatten().flatten().copied()).collect();
        assert_eq!(pairs.len(), batch.tokens, "{method}");
        for (found, expected) in pairs {
            assert!((f64::from(found) - expected).abs() < 1e-6, "{method}: {found}, PyTorch {expected}");
        }
        clipped += found.iter().map(|group| group.clipped).sum::<usize>();
    }
    assert!(clipped > 5, "the numbers reach the clip: {clipped}");
    assert_eq!(golden.methods.len(), Method::ALL.len());
}

fn member(golden: &GoldenMember) -> Member<'_> {
    let GoldenMember { reward, policy, old, base, sampler } = golden;
    Member { reward: *reward, policy, old, base, sampler: Some(sampler) }
}

/// An answer whose policy has not moved.
fn still(reward: f64, logs: &[f32]) -> Member<'_> {
    Member { reward, policy: logs, old: logs, base: logs, sampler: None }
}

/// An answer of two tokens that scored 1 and one of a single token that scored 0, of a run whose longest has four.
fn expect(method: Method, value: f64, slopes: [f64; 2]) {
    let group = [still(1.0, &[-1.0, -2.0]), still(0.0, &[-0.5])];
    let found = loss(method).slopes(&group, &Batch { samples: 2, tokens: 3, longest: 4 });
    assert!((found.value - value).abs() < 1e-6, "{method}: {}", found.value);
    for (found, expected) in found.slopes.iter().zip(slopes) {
        assert!(
            found.iter().all(|slope| (f64::from(*slope) - expected).abs() < 1e-6),
            "{method}: {found:?} {expected}"
        );
    }
    assert_eq!((found.slopes[0].len(), found.slopes[1].len()), (2, 1));
    assert_eq!((found.ratio, found.clipped), (3.0, 0), "{method}");
}

#[test]
fn each_loss_by_hand_where_the_policy_has_not_moved() {
    // Mean log-probs -1.5 and -0.5, over two samples.
    for method in [Method::Raft, Method::Rest, Method::Sft] {
        expect(method, 1.0, [-0.25, -0.5]);
    }
    // Advantages of +-0.5 over a deviation of 0.70711, and 1e-4.
    let a = 0.5 / (0.5f64.sqrt() + 1e-4);
    expect(Method::Grpo, 0.0, [-a / 4.0, a / 2.0]);
    expect(Method::Gspo, 0.0, [-a / 4.0, a / 2.0]);
    expect(Method::Dapo, -a / 3.0, [-a / 3.0, a / 3.0]);
    expect(Method::DrGrpo, -0.5 / 8.0, [-0.5 / 8.0, 0.5 / 8.0]);
    // Each is the other's baseline.
    expect(Method::Rloo, 0.0, [-0.5, 0.5]);
    // No margin yet: the loss of a coin, its slope half of beta.
    let coin = 2f64.ln();
    expect(Method::Dpo, coin, [-0.05, 0.05]);
    let sure = 1.0 / (1.0 + (-1f64).exp());
    expect(Method::RcDpo, coin, [-0.1 * (sure - 0.5), 0.1 * (sure - 0.5)]);
    expect(Method::Rpo, coin + 1.5, [-0.05 - 0.5, 0.05]);
    expect(Method::Rebel, 1.0, [-0.2, 0.2]);
    // The value of rewards 1 and 0: ln((e + 1) / 2), and half of ln((e^2 + 1) / 2).
    for (method, value) in
        [(Method::Oapl, ((1f64.exp() + 1.0) / 2.0).ln()), (Method::AStarPo, 0.5 * ((2f64.exp() + 1.0) / 2.0).ln())]
    {
        let (up, down) = (1.0 - value, -value);
        expect(method, (up * up + down * down) / 2.0, [-0.05 * up, -0.05 * down]);
    }
}

#[test]
fn a_ratio_past_its_bound_pulls_no_further_and_one_that_went_astray_is_pulled_back() {
    let batch = Batch { samples: 2, tokens: 2, longest: 1 };
    let moved = |by: f32| {
        let policy = [-1.0 + by, -1.0 + by];
        let [up, down] = [&policy[..1], &policy[1..]];
        let good = Member { policy: up, ..still(1.0, &[-1.0]) };
        let bad = Member { policy: down, ..still(0.0, &[-1.0]) };
        let found = loss(Method::DrGrpo).slopes(&[good, bad], &batch);
        (found.slopes[0][0], found.slopes[1][0], found.clipped)
    };
    // The good answer is likelier by half already: enough. The bad one is, too: back with it.
    let (good, bad, clipped) = moved(0.5);
    assert_eq!((good, clipped), (0.0, 1));
    assert!((bad - 0.25 * 0.5f32.exp()).abs() < 1e-6);
    let (good, bad, clipped) = moved(-0.5);
    assert_eq!((bad, clipped), (0.0, 1));
    assert!((good + 0.25 * (-0.5f32).exp()).abs() < 1e-6);
}

#[test]
fn a_token_that_the_sampler_held_unlikely_weighs_twice_at_most() {
    let batch = Batch { samples: 2, tokens: 2, longest: 1 };
    let told = |sampler: f32| {
        let told = [sampler];
        let good = Member { sampler: Some(&told), ..still(1.0, &[-1.0]) };
        loss(Method::DrGrpo).slopes(&[good, still(0.0, &[-1.0])], &batch).slopes[0][0]
    };
    assert_eq!(told(-1.0), -0.25);
    assert!((told(-1.1) + 0.25 * 0.1f32.exp()).abs() < 1e-6);
    assert_eq!(told(-9.0), -0.5);
}

#[test]
fn rewards_choose_what_trains_and_ties_go_to_the_earlier() {
    let choose = |method, rewards: &[f64], min_reward| Loss { min_reward, ..loss(method) }.choose(rewards);
    let train = |indices: &[usize]| Choice::Train(indices.to_vec());
    assert_eq!(choose(Method::Raft, &[0.1, 0.9, 0.5, 0.9], 0.0), train(&[1, 3]));
    assert_eq!(choose(Method::Raft, &[0.5, 0.9, 0.5, 0.0], 0.0), train(&[1, 0]));
    assert_eq!(choose(Method::Raft, &[0.1, 0.9, 0.5], 0.6), train(&[1]));
    assert_eq!(choose(Method::Raft, &[0.1, 0.2], 0.2), Choice::NoneAbove);
    assert_eq!(choose(Method::Raft, &[0.7], 0.0), Choice::AllEqual);
    assert_eq!(choose(Method::Rest, &[0.3, 0.9, 0.5, 0.2], 0.25), train(&[1, 2, 0]));
    assert_eq!(choose(Method::Sft, &[0.7, 0.7], 0.9), train(&[0, 1]));
    // The best with the worst, the second with the second worst; a pair of equals is none.
    assert_eq!(choose(Method::Dpo, &[0.2, 0.9, 0.5, 0.1, 0.6], 0.0), train(&[1, 3, 4, 0]));
    assert_eq!(choose(Method::Dpo, &[0.5, 0.9, 0.5, 0.5], 0.0), train(&[1, 3]));
    assert_eq!(choose(Method::Rebel, &[0.2, 0.1], 0.3), Choice::NoneAbove);
    for method in [Method::Grpo, Method::Rloo, Method::Oapl, Method::AStarPo] {
        assert_eq!(choose(method, &[0.0, 0.1, 0.0], 0.5), train(&[0, 1, 2]));
    }
    for method in Method::ALL.into_iter().filter(|method| *method != Method::Sft) {
        assert_eq!(choose(method, &[0.7, 0.7, 0.7], 0.0), Choice::AllEqual, "{method}");
    }
}

#[test]
fn drift_is_zero_on_equal_log_probs_and_grows_both_ways_by_a_line() {
    assert_eq!(drift(&[-1.0, -2.0], &[-1.0, -2.0]), 0.0);
    assert_eq!((drift(&[-1.0], &[-1.5]), drift(&[-1.5], &[-1.0])), (0.125, 0.125));
    assert_eq!((drift(&[0.0], &[-1.0]), drift(&[0.0], &[-8.0]), drift(&[-8.0], &[0.0])), (0.5, 7.5, 7.5));
    assert!(drift(&[-1e30], &[0.0]).is_finite());
}

#[test]
fn one_token_learnt_away_is_no_collapse_but_a_policy_that_left_all_its_samples_is() {
    let max_kl = Settings::default().max_kl;
    let base = [-3.0f32; 20];
    let mut policy = base;
    policy[7] = -23.0;
    assert!(drift(&policy, &base) / 20.0 < max_kl);
    assert!(drift(&[-7.0; 20], &base) / 20.0 > max_kl);
}

#[test]
fn a_method_has_one_name_everywhere() {
    let names: Vec<String> = Method::ALL.iter().map(Method::to_string).collect();
    assert_eq!(names[7..10], ["gspo", "oapl", "a_star_po"]);
    for (method, name) in Method::ALL.iter().zip(&names) {
        assert_eq!(serde_json::to_value(method).unwrap(), *name);
    }
}
