//! From scored samples to optimizer steps: which train, in which order, and how many at once.

use std::collections::HashMap;

use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha20Rng;

use super::losses::{Choice, Loss};
use super::{Sample, Settings, TuneError};
use crate::engine::ModelConfig;
use crate::engine::train::GroupTokens;
use crate::record::derive_seed;

/// A sample that trains.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Chosen<'a> {
    pub completion: &'a [u32],
    pub reward: f64,
    /// Its log-probs as the sampler told them, where they are known.
    pub sampler_logprobs: Option<&'a [f32]>,
    /// Its log-probs under the base, where they are known.
    pub base_logprobs: Option<&'a [f32]>,
    /// Counts the chosen samples of all groups.
    pub index: usize,
}

/// A prompt with those of its samples that train.
#[derive(Debug, Clone, PartialEq)]
pub struct Group<'a> {
    pub prompt: &'a [u32],
    pub samples: Vec<Chosen<'a>>,
}

impl Group<'_> {
    /// Returns true for the index of one of its samples.
    pub fn holds(&self, index: usize) -> bool {
        self.samples.iter().any(|sample| sample.index == index)
    }
}

/// What trains, and how much does not.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Selection<'a> {
    pub groups: Vec<Group<'a>>,
    pub samples: usize,
    /// Tokens of the longest completion that trains.
    pub longest: usize,
    pub all_equal: usize,
    pub none_above: usize,
}

/// Checks every sample and chooses those that train, groups in the order in which they first appear.
pub fn select<'a>(
    samples: &'a [Sample],
    settings: &Settings,
    config: &ModelConfig,
) -> Result<Selection<'a>, TuneError> {
    let loss = Loss::new(settings);
    let mut order: Vec<Vec<usize>> = Vec::new();
    let mut seen: HashMap<&str, usize> = HashMap::new();
    for (index, sample) in samples.iter().enumerate() {
        check(index, sample, settings, config)?;
        let at = *seen.entry(&sample.group).or_insert(order.len());
        if at == order.len() {
            order.push(Vec::new());
        }
        order[at].push(index);
    }
    let mut selection = Selection::default();
    for members in &order {
        let group: Vec<&Sample> = members.iter().map(|index| &samples[*index]).collect();
        check_group(&group, members, settings)?;
        let rewards: Vec<f64> = group.iter().map(|sample| sample.reward).collect();
        match loss.choose(&rewards) {
            Choice::AllEqual => selection.all_equal += 1,
            Choice::NoneAbove => selection.none_above += 1,
            Choice::Train(chosen) => selection.add(&group, chosen),
        }
    }
    if selection.groups.is_empty() {
        let Selection { all_equal, none_above, .. } = selection;
        let min_reward = settings.min_reward;
        return Err(TuneError::Nothing { groups: order.len(), all_equal, none_above, min_reward });
    }
    Ok(selection)
}

impl<'a> Selection<'a> {
    fn add(&mut self, group: &[&'a Sample], chosen: Vec<usize>) {
        let mut samples = Vec::with_capacity(chosen.len());
        for member in chosen {
            let Sample { completion, reward, old_logprobs, base_logprobs, .. } = group[member];
            let (sampler_logprobs, base_logprobs) = (old_logprobs.as_deref(), base_logprobs.as_deref());
            let index = self.samples;
            samples.push(Chosen { completion, reward: *reward, sampler_logprobs, base_logprobs, index });
            self.samples += 1;
            self.longest = self.longest.max(completion.len());
        }
        self.groups.push(Group { prompt: &group[0].prompt, samples });
    }
}

fn check(index: usize, sample: &Sample, settings: &Settings, config: &ModelConfig) -> Result<(), TuneError> {
    // The last token is only predicted, never read.
    let length = (sample.prompt.len() + sample.completion.len()).saturating_sub(1);
    let known = [&sample.old_logprobs, &sample.base_logprobs];
    let stranger = sample.prompt.iter().chain(&sample.completion).find(|id| **id as usize >= config.vocab);
    let (problem, remedy) = if !sample.reward.is_finite() {
        (format!("its reward is {}", sample.reward), "score it again or leave it out")
    } else if sample.prompt.is_empty() {
        ("its prompt has no tokens".to_string(), "leave it out")
    } else if sample.completion.is_empty() {
        ("its completion has no tokens".to_string(), "leave it out")
    } else if length > config.max_positions {
        let problem = format!("prompt and completion take {length} positions of a context of {}", config.max_positions);
        (problem, "shorten or leave it out")
    } else if let Some(id) = stranger {
        (format!("token id {id} is outside the vocabulary of {}", config.vocab), "tokenise it with this model")
    } else if let Some(found) = known.into_iter().flatten().find(|l| l.len() != sample.completion.len()) {
        let problem = format!("{} log-probs for {} tokens", found.len(), sample.completion.len());
        (problem, "carry the sampler's log-probs with its ids, or leave them out")
    } else if settings.method.is_on_policy() && sample.old_logprobs.is_none() {
        let problem =
            format!("it has no log-probs of its sampler, without which {} cannot be trusted", settings.method);
        (problem, "carry them with its ids, or set tuning.method to raft or dpo")
    } else {
        return Ok(());
    };
    Err(TuneError::Sample { index, group: sample.group.clone(), problem, remedy })
}

fn check_group(group: &[&Sample], members: &[usize], settings: &Settings) -> Result<(), TuneError> {
    let name = || group[0].group.clone();
    if group.len() == 1 && settings.method.compares() {
        return Err(TuneError::Alone { group: name() });
    }
    match group.iter().position(|sample| sample.prompt != group[0].prompt) {
        Some(at) => Err(TuneError::Sample {
            index: members[at],
            group: name(),
            problem: "its prompt differs from that of its group".to_string(),
            remedy: "give each prompt its own group",
        }),
        None => Ok(()),
    }
}

/// One optimizer step: its epoch, from 0, and the groups that it trains on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    pub epoch: usize,
    pub groups: Vec<usize>,
}

/// Plans all steps: every epoch is a seeded order of all groups, cut where a step has enough samples.
pub fn plan(groups: &[Group], settings: &Settings, seed: u64) -> Vec<Step> {
    let mut steps = Vec::new();
    for epoch in 0..settings.epochs {
        let mut order: Vec<usize> = (0..groups.len()).collect();
        order.shuffle(&mut ChaCha20Rng::seed_from_u64(derive_seed(seed, &["order", &epoch.to_string()])));
        let mut step = Step { epoch, groups: Vec::new() };
        let mut samples = 0;
        for group in order {
            step.groups.push(group);
            samples += groups[group].samples.len();
            if samples >= settings.batch_samples {
                steps.push(std::mem::replace(&mut step, Step { epoch, groups: Vec::new() }));
                samples = 0;
            }
        }
        if !step.groups.is_empty() {
            steps.push(step);
        }
    }
    steps
}

/// What one forward pass holds: groups, and their samples in the order of the pass.
#[derive(Debug, Clone, Default)]
pub struct Part<'a> {
    pub groups: Vec<GroupTokens<'a>>,
    pub samples: Vec<Chosen<'a>>,
}

impl<'a> Part<'a> {
    /// Returns each sample with its own of values that the pass returned, one a completion token.
    pub fn split<'v>(&self, values: &'v [f32]) -> impl Iterator<Item = (&Chosen<'a>, &'v [f32])> {
        let mut rest = values;
        self.samples.iter().map(move |sample| {
            let (own, others) = rest.split_at(sample.completion.len());
            rest = others;
            (sample, own)
        })
    }
}

/// Cuts the groups of a step into parts of at most `rows` rows. A group whose samples do not fit together is cut too,
/// and its prompt run again; a single sample with more rows is a part of its own.
pub fn parts<'a>(groups: impl IntoIterator<Item = &'a Group<'a>>, rows: usize) -> Vec<Part<'a>> {
    let mut parts: Vec<Part> = Vec::new();
    let mut held = usize::MAX;
    for group in groups {
        let mut open = false;
        for sample in &group.samples {
            let own = sample.completion.len() - 1;
            let needed = if open { own } else { own + group.prompt.len() };
            if held.saturating_add(needed) > rows {
                parts.push(Part::default());
                held = 0;
                open = false;
            }
            let Some(part) = parts.last_mut() else { continue };
            if !open {
                part.groups.push(GroupTokens { prompt: group.prompt, completions: Vec::new() });
                held += group.prompt.len();
                open = true;
            }
            held += own;
            part.samples.push(*sample);
            if let Some(tokens) = part.groups.last_mut() {
                tokens.completions.push(sample.completion);
            }
        }
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    fn group(prompt: &'static [u32], first: usize, completions: &[&'static [u32]]) -> Group<'static> {
        let chosen = |(i, c): (usize, &&'static [u32])| Chosen {
            completion: c,
            reward: 1.0,
            sampler_logprobs: None,
            base_logprobs: None,
            index: first + i,
        };
        Group { prompt, samples: completions.iter().enumerate().map(chosen).collect() }
    }

    #[test]
    fn every_epoch_holds_each_group_once_in_an_order_of_its_own() {
        let groups: Vec<Group> = (0..9).map(|i| group(&[1], i, &[&[2, 3]])).collect();
        let settings = Settings { epochs: 3, batch_samples: 2, ..Settings::default() };
        let steps = plan(&groups, &settings, 7);
        assert_eq!(steps, plan(&groups, &settings, 7));
        assert_ne!(steps, plan(&groups, &settings, 8));
        let mut orders = Vec::new();
        for epoch in 0..3 {
            let of_epoch: Vec<&Step> = steps.iter().filter(|s| s.epoch == epoch).collect();
            assert_eq!(of_epoch.iter().map(|s| s.groups.len()).collect::<Vec<_>>(), [2, 2, 2, 2, 1]);
            let order: Vec<usize> = of_epoch.iter().flat_map(|s| s.groups.clone()).collect();
            let mut sorted = order.clone();
            sorted.sort();
            assert_eq!(sorted, (0..9).collect::<Vec<_>>());
            orders.push(order);
        }
        assert!(orders[0] != orders[1] && orders[1] != orders[2]);
    }

    #[test]
    fn parts_hold_every_sample_once_within_the_limit() {
        let groups = [
            group(&[1, 2, 3], 0, &[&[4, 5], &[6, 7, 8], &[9]]),
            group(&[1], 3, &[&[4, 5, 6, 7, 8, 9, 10, 11, 12, 13], &[2, 2]]),
        ];
        for limit in [1, 4, 5, 6, 7, 16, 100] {
            let parts = parts(&groups, limit);
            let indices: Vec<usize> = parts.iter().flat_map(|p| p.samples.iter().map(|s| s.index)).collect();
            assert_eq!(indices, [0, 1, 2, 3, 4], "limit {limit}");
            for part in &parts {
                let rows: usize = part.groups.iter().map(GroupTokens::rows).sum();
                assert!(rows <= limit || part.samples.len() == 1, "{rows} rows, limit {limit}");
                let completions: Vec<&[u32]> = part.groups.iter().flat_map(|g| g.completions.clone()).collect();
                assert_eq!(completions, part.samples.iter().map(|s| s.completion).collect::<Vec<_>>());
            }
        }
        assert_eq!(parts(&groups, 100).len(), 1);
        assert_eq!(parts(&groups, 100)[0].groups.len(), 2, "a prompt is run once");
    }
}
