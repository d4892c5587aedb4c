//! Log-probabilities of given answers, and how far two adapters' distributions lie apart on them.
//!
//! Items with the same prompt share its forward pass. The output layer runs only on the positions that predict answer
//! tokens, a piece of the vocabulary at a time, so that no full row of logits is ever held.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use rayon::prelude::*;

use super::cache::{Cache, Pool, Segment};
use super::decoder::{Decoder, Run};
use super::device::{DeviceModel, Lora};
use super::error::EngineError;
use super::lora::Adapter;
use super::low_rank::LoraPack;
use super::math;
use super::matmul::WIDTH;
use super::model::Model;
use super::sampler::check_tokens;

/// Rows of one forward pass.
const ROWS: usize = 512;
/// Tokens whose keys and values are held at once, unless one item has more.
const HELD: usize = 8192;

/// Panels of the output layer at a time: 2,048 tokens of the vocabulary.
const PANELS: usize = 64;

/// A prompt and an answer to it, as token ids.
#[derive(Debug, Clone, Copy)]
pub struct ScoreItem<'a> {
    pub prompt: &'a [u32],
    pub completion: &'a [u32],
}

/// Returns the log-probabilities of each item's completion tokens, at temperature 1.
pub fn logprobs(model: &Model, adapter: Option<&Adapter>, items: &[ScoreItem]) -> Result<Vec<Vec<f32>>, EngineError> {
    if let Some(device) = model.device() {
        let lora = copied(device, adapter)?;
        return score(model, items, |batch| device.logprobs(lora.as_ref(), batch));
    }
    let scorer = Scorer::new(model, adapter)?;
    score(model, items, |batch| {
        let targets: Vec<u32> = batch.iter().flat_map(|item| item.completion.iter().copied()).collect();
        Ok(scorer.target_logprobs(&scorer.hidden(batch), &targets))
    })
}

/// Returns the Kullback-Leibler divergence of `p` from `q` over the whole vocabulary, in nats, at each position of
/// each item's completion.
pub fn divergence(
    model: &Model,
    p: Option<&Adapter>,
    q: Option<&Adapter>,
    items: &[ScoreItem],
) -> Result<Vec<Vec<f32>>, EngineError> {
    if let Some(device) = model.device() {
        let (p, q) = (copied(device, p)?, copied(device, q)?);
        return score(model, items, |batch| device.divergences(p.as_ref(), q.as_ref(), batch));
    }
    let (p, q) = (Scorer::new(model, p)?, Scorer::new(model, q)?);
    score(model, items, |batch| Ok(p.divergences(&p.hidden(batch), &q.hidden(batch))))
}

fn copied(device: &DeviceModel, adapter: Option<&Adapter>) -> Result<Option<Lora>, EngineError> {
    adapter.map(|adapter| Lora::new(device.config(), adapter, &device.place().device)).transpose()
}

/// Runs a function that returns one number per completion token over batches of items, prompts in common kept together.
fn score(
    model: &Model,
    items: &[ScoreItem],
    mut values: impl FnMut(&[ScoreItem]) -> Result<Vec<f32>, EngineError>,
) -> Result<Vec<Vec<f32>>, EngineError> {
    for item in items {
        check(model, item)?;
    }
    let mut scores: Vec<Vec<f32>> = vec![Vec::new(); items.len()];
    for batch in batches(items).into_iter().filter(|batch| !batch.is_empty()) {
        let chosen: Vec<ScoreItem> = batch.iter().map(|i| items[*i]).collect();
        let values = values(&chosen)?;
        let mut rest = values.as_slice();
        for i in batch {
            let (own, tail) = rest.split_at(items[i].completion.len());
            scores[i] = own.to_vec();
            rest = tail;
        }
    }
    Ok(scores)
}

fn check(model: &Model, item: &ScoreItem) -> Result<(), EngineError> {
    check_tokens(model, item.prompt)?;
    check_tokens(model, item.completion)?;
    if item.prompt.is_empty() {
        return Err(EngineError::request("the prompt has no tokens; give at least one message"));
    }
    let (tokens, context) = (item.prompt.len() + item.completion.len(), model.config().max_positions);
    if tokens > context {
        return Err(EngineError::PromptTooLong { tokens, context });
    }
    Ok(())
}

/// Returns the items' places in batches of about [`ROWS`] completion tokens and at most [`HELD`] held ones, equal prompts side by side.
fn batches(items: &[ScoreItem]) -> Vec<Vec<usize>> {
    let mut seen: HashMap<&[u32], usize> = HashMap::new();
    for (i, item) in items.iter().enumerate() {
        seen.entry(item.prompt).or_insert(i);
    }
    let mut order: Vec<usize> = (0..items.len()).filter(|i| !items[*i].completion.is_empty()).collect();
    order.sort_by_key(|i| (seen[items[*i].prompt], *i));
    let mut batches = vec![Vec::new()];
    let (mut rows, mut held, mut last) = (0, 0, None);
    for i in order {
        let ScoreItem { prompt, completion } = items[i];
        let more = completion.len() + if last == Some(prompt) { 0 } else { prompt.len() };
        if rows > 0 && (rows + completion.len() > ROWS || held + more > HELD) {
            batches.push(Vec::new());
            (rows, held, last) = (0, 0, None);
        }
        held += completion.len() + if last == Some(prompt) { 0 } else { prompt.len() };
        rows += completion.len();
        last = Some(prompt);
        batches.last_mut().into_iter().for_each(|batch| batch.push(i));
    }
    batches
}

struct Scorer<'a> {
    decoder: &'a Decoder,
    adapter: Option<LoraPack>,
}

impl<'a> Scorer<'a> {
    fn new(model: &'a Model, adapter: Option<&Adapter>) -> Result<Self, EngineError> {
        let adapter = adapter.map(|a| LoraPack::new(model.config(), a)).transpose()?;
        Ok(Scorer { decoder: model.decoder()?, adapter })
    }

    /// Returns the hidden rows that predict each completion token, item after item.
    fn hidden(&self, items: &[ScoreItem]) -> Vec<f32> {
        let pool = Pool::new(self.decoder.shape());
        let mut prompts: Vec<&[u32]> = items.iter().map(|item| item.prompt).collect();
        prompts.dedup();
        let read_prompts = self.read_prompts(&prompts, &pool);
        let by_prompt: HashMap<&[u32], &(Arc<Segment>, Vec<f32>)> = prompts.into_iter().zip(&read_prompts).collect();
        let mut caches: Vec<Cache> = items.iter().map(|item| Cache::after(&by_prompt[item.prompt].0)).collect();
        let mut rows: Vec<Vec<f32>> = items.iter().map(|item| by_prompt[item.prompt].1.clone()).collect();
        // The last token of a completion predicts nothing.
        let tokens: Vec<&[u32]> = items.iter().map(|item| &item.completion[..item.completion.len() - 1]).collect();
        read(self.decoder, self.adapter.as_ref(), &mut caches, &tokens, &pool, |i, _, row| {
            rows[i].extend_from_slice(row);
        });
        rows.concat()
    }

    /// Reads prompts; returns each one's cache and its last hidden row.
    fn read_prompts(&self, prompts: &[&[u32]], pool: &Pool) -> Vec<(Arc<Segment>, Vec<f32>)> {
        let mut caches: Vec<Cache> = prompts.iter().map(|_| Cache::new(self.decoder.shape())).collect();
        let mut last = vec![Vec::new(); prompts.len()];
        read(self.decoder, self.adapter.as_ref(), &mut caches, prompts, pool, |i, place, row| {
            if place + 1 == prompts[i].len() {
                last[i] = row.to_vec();
            }
        });
        caches.iter_mut().map(Cache::take_prefix).zip(last).collect()
    }

    fn target_logprobs(&self, hidden: &[f32], targets: &[u32]) -> Vec<f32> {
        let mut totals = vec![LogSum::default(); targets.len()];
        let mut chosen = vec![0.0f32; targets.len()];
        let mut room = Vec::new();
        for panels in self.pieces() {
            let first = panels.start * WIDTH;
            let logits = self.decoder.logits_of(hidden, panels, room);
            let rows = totals.par_iter_mut().zip(&mut chosen).zip(targets).enumerate();
            rows.for_each_init(Vec::new, |scratch, (i, ((total, chosen), target))| {
                logits.read_row(i, scratch);
                if let Some(logit) = (*target as usize).checked_sub(first).and_then(|at| scratch.get(at)) {
                    *chosen = *logit;
                }
                total.add(scratch);
            });
            room = logits.into_room();
        }
        chosen.iter().zip(totals).map(|(logit, total)| (f64::from(*logit) - total.ln()) as f32).collect()
    }

    fn divergences(&self, p_hidden: &[f32], q_hidden: &[f32]) -> Vec<f32> {
        let rows = p_hidden.len() / self.decoder.hidden_size();
        let mut sums = vec![Divergence::default(); rows];
        let mut rooms = (Vec::new(), Vec::new());
        for panels in self.pieces() {
            let p = self.decoder.logits_of(p_hidden, panels.clone(), rooms.0);
            let q = self.decoder.logits_of(q_hidden, panels, rooms.1);
            sums.par_iter_mut().enumerate().for_each_init(
                || (Vec::new(), Vec::new()),
                |(p_row, q_row), (i, sum)| {
                    p.read_row(i, p_row);
                    q.read_row(i, q_row);
                    sum.add(p_row, q_row);
                },
            );
            rooms = (p.into_room(), q.into_room());
        }
        sums.into_iter().map(Divergence::value).collect()
    }

    /// Returns the pieces of the vocabulary, as panels of the output layer.
    fn pieces(&self) -> impl Iterator<Item = Range<usize>> {
        let panels = self.decoder.panels();
        (0..panels).step_by(PANELS).map(move |start| start..panels.min(start + PANELS))
    }
}

/// Reads whole token lists into their caches, [`ROWS`] a pass, and hands over each row as (list, place, hidden).
pub(super) fn read(
    decoder: &Decoder,
    adapter: Option<&LoraPack>,
    caches: &mut [Cache],
    tokens: &[&[u32]],
    pool: &Pool,
    mut take: impl FnMut(usize, usize, &[f32]),
) {
    let mut places = vec![0; tokens.len()];
    loop {
        let mut room = ROWS;
        let mut runs = Vec::new();
        let mut spans = Vec::new();
        for (i, cache) in caches.iter_mut().enumerate() {
            let piece = (tokens[i].len() - places[i]).min(room);
            if piece > 0 {
                spans.push((i, places[i]..places[i] + piece));
                runs.push(Run { cache, tokens: &tokens[i][places[i]..places[i] + piece], adapter });
                places[i] += piece;
                room -= piece;
            }
        }
        if runs.is_empty() {
            return;
        }
        let hidden = decoder.forward(&mut runs, pool);
        let places = spans.into_iter().flat_map(|(i, span)| span.map(move |place| (i, place)));
        for ((i, place), row) in places.zip(hidden.chunks_exact(decoder.hidden_size())) {
            take(i, place, row);
        }
    }
}

/// A running log of a sum of exponentials.
#[derive(Clone)]
struct LogSum {
    largest: f32,
    sum: f64,
}

impl Default for LogSum {
    fn default() -> Self {
        LogSum { largest: f32::NEG_INFINITY, sum: 0.0 }
    }
}

impl LogSum {
    /// Adds logits, which are overwritten by their exponentials above the largest so far.
    fn add(&mut self, logits: &mut [f32]) {
        let largest = math::wide_max(logits).max(self.largest);
        let kept = if self.sum > 0.0 { self.sum * f64::from(self.largest - largest).exp() } else { 0.0 };
        self.sum = kept + f64::from(math::wide_exp_sum(logits, largest));
        self.largest = largest;
    }

    fn ln(&self) -> f64 {
        f64::from(self.largest) + self.sum.ln()
    }
}

/// A running divergence: KL = E_p[p - q] - ln sum e^p + ln sum e^q over logits p and q.
#[derive(Clone, Default)]
struct Divergence {
    p: LogSum,
    q: LogSum,
    /// Sum of e^(p - largest p) (p - q).
    weighted: f64,
}

impl Divergence {
    fn add(&mut self, p: &mut [f32], q: &mut [f32]) {
        let gaps: Vec<f32> = p.iter().zip(&*q).map(|(p, q)| p - q).collect();
        let before = self.p.largest;
        self.p.add(p);
        self.q.add(q);
        let kept = if self.weighted == 0.0 { 0.0 } else { self.weighted * f64::from(before - self.p.largest).exp() };
        let more: f64 = p.iter().zip(gaps).map(|(weight, gap)| f64::from(weight * gap)).sum();
        self.weighted = kept + more;
    }

    fn value(self) -> f32 {
        let divergence = self.weighted / self.p.sum - self.p.ln() + self.q.ln();
        // Rounding can bring two equal distributions just below 0.
        divergence.max(0.0) as f32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_divergence_in_pieces_is_that_of_the_whole() {
        let p: Vec<f32> = (0..40).map(|i| (i as f32 * 0.7).sin() * 3.0).collect();
        let q: Vec<f32> = (0..40).map(|i| (i as f32 * 0.3).cos() * 3.0).collect();
        let softmax = |v: &[f32]| {
            let total: f64 = v.iter().map(|x| f64::from(*x).exp()).sum();
            v.iter().map(|x| f64::from(*x).exp() / total).collect::<Vec<f64>>()
        };
        let expected: f64 = softmax(&p).iter().zip(softmax(&q)).map(|(p, q)| p * (p / q).ln()).sum();
        let mut sum = Divergence::default();
        for (p, q) in p.chunks(17).zip(q.chunks(17)) {
            sum.add(&mut p.to_vec(), &mut q.to_vec());
        }
        assert!((f64::from(sum.value()) - expected).abs() < 1e-5, "{expected}");
    }

    #[test]
    fn equal_prompts_come_together_and_batches_stay_small() {
        let (a, b) = ([1u32], [2u32]);
        let long = vec![0u32; 300];
        let item = |prompt| ScoreItem { prompt, completion: &long };
        let items = [item(&a), item(&b), item(&a[..])];
        assert_eq!(batches(&items), [vec![0], vec![2], vec![1]]);
        // A short answer to a long prompt holds that prompt's keys and values, once for all its answers.
        let (c, d) = (vec![3u32; HELD - 100], vec![4u32; HELD - 100]);
        let short = |prompt| ScoreItem { prompt, completion: &long[..20] };
        let items = [short(&c[..]), short(&d), short(&c), short(&a)];
        assert_eq!(batches(&items), [vec![0, 2], vec![1, 3]]);
        let empty = ScoreItem { prompt: &a, completion: &[] };
        assert_eq!(batches(&[empty]), [Vec::<usize>::new()]);
    }
}
