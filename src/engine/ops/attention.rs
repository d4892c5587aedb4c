//! Causal attention over a packed batch in which the completions of a group share the run of their prompt.
//!
//! A group's rows are its prompt and then its completions. A prompt row sees the prompt up to itself; a completion's
//! row sees the whole prompt and its own completion up to itself, never a sibling. So the prompt is computed once for
//! all completions, and its keys and values collect the gradients of all of them.

use std::ops::Range;

use candle_core::{Result, bail};
use rayon::prelude::*;

use super::mat::{Into, Mat, MatMut, Threads, multiply};
use super::{dot, exp, largest, tanh};

/// Where the rows of one group lie in a packed batch: the prompt, then each completion, without gaps.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GroupRows {
    pub prompt: Range<usize>,
    pub completions: Vec<Range<usize>>,
}

impl GroupRows {
    /// Returns all rows of the group.
    pub fn all(&self) -> Range<usize> {
        self.prompt.start..self.completions.last().map_or(self.prompt.end, |last| last.end)
    }

    /// Returns each run of rows with the run that it sees before itself. Empty runs are left out.
    fn segments(&self) -> impl Iterator<Item = Segment> {
        let prompt = Segment { own: self.prompt.clone(), prefix: 0..0 };
        let completions = self.completions.iter().map(|own| Segment { own: own.clone(), prefix: self.prompt.clone() });
        std::iter::once(prompt).chain(completions).filter(|segment| !segment.own.is_empty())
    }
}

#[derive(Debug)]
struct Segment {
    own: Range<usize>,
    prefix: Range<usize>,
}

/// How the products of queries and keys become scores, and how far a row looks back.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Scoring {
    pub scale: f32,
    /// Scores are bent into +- this: `cap * tanh(score / cap)`.
    pub cap: Option<f32>,
    /// How many positions a row sees, its own included.
    pub window: Option<usize>,
}

/// How many heads there are and how wide they are.
#[derive(Debug, Clone, Copy)]
pub struct Heads {
    pub query: usize,
    pub key_value: usize,
    pub dim: usize,
}

/// The attention of one packed batch.
pub struct Attention {
    groups: Vec<GroupRows>,
    heads: Heads,
}

/// One head's columns of a `[rows, heads * dim]` matrix.
#[derive(Clone, Copy)]
struct Head<'a> {
    values: &'a [f32],
    width: usize,
    dim: usize,
    index: usize,
}

impl<'a> Head<'a> {
    fn rows(&self, rows: &Range<usize>) -> Result<Mat<'a>> {
        Mat::strided(&self.values[rows.start * self.width + self.index * self.dim..], rows.len(), self.dim, self.width)
    }
}

/// A block of the result that one task fills: the rows of a group and `heads` heads of it.
struct Block {
    values: Vec<f32>,
    first: usize,
    width: usize,
    dim: usize,
}

impl Block {
    fn new(group: &GroupRows, heads: usize, dim: usize) -> Self {
        let rows = group.all();
        Block { values: vec![0.0; rows.len() * heads * dim], first: rows.start, width: heads * dim, dim }
    }

    fn rows(&mut self, rows: &Range<usize>, head: usize) -> Result<MatMut<'_>> {
        let at = (rows.start - self.first) * self.width + head * self.dim;
        MatMut::strided(&mut self.values[at..], rows.len(), self.dim, self.width)
    }

    /// Copies the block to its columns of the whole result, whose rows are `width` wide.
    fn place(&self, result: &mut [f32], width: usize, column: usize) {
        for (row, values) in self.values.chunks_exact(self.width).enumerate() {
            let at = (self.first + row) * width + column;
            result[at..at + self.width].copy_from_slice(values);
        }
    }
}

impl Attention {
    /// Takes the rows of a batch's groups, which must follow each other without gaps.
    pub fn new(groups: Vec<GroupRows>, heads: Heads) -> Result<Self> {
        let end = groups.iter().try_fold(0, |at, group| (group.all().start == at).then_some(group.all().end));
        if end.is_none() || heads.key_value == 0 || !heads.query.is_multiple_of(heads.key_value) {
            bail!("the groups of a batch have gaps, or {heads:?} do not fit each other");
        }
        Ok(Attention { groups, heads })
    }

    /// Returns `[rows, query heads * dim]` for `q` of that shape and `k`, `v` `[rows, key-value heads * dim]`, rotated
    /// already.
    pub fn forward(&self, q: &[f32], k: &[f32], v: &[f32], scoring: Scoring) -> Result<Vec<f32>> {
        let mut y = vec![0.0; q.len()];
        let inputs = Inputs { q, k, v, grad: &[], scoring };
        for (kv, block) in self.tasks(|group, kv| self.forward_task(&inputs, group, kv))? {
            block.place(&mut y, self.heads.query * self.heads.dim, kv * block.width);
        }
        Ok(y)
    }

    /// Returns the gradients of `q`, `k` and `v`.
    pub fn backward(&self, q: &[f32], k: &[f32], v: &[f32], grad: &[f32], scoring: Scoring) -> Result<[Vec<f32>; 3]> {
        let inputs = Inputs { q, k, v, grad, scoring };
        let (mut dq, mut dk, mut dv) = (vec![0.0; q.len()], vec![0.0; k.len()], vec![0.0; v.len()]);
        let (query_width, kv_width) = (self.heads.query * self.heads.dim, self.heads.key_value * self.heads.dim);
        for (kv, [q_block, k_block, v_block]) in self.tasks(|group, kv| self.backward_task(&inputs, group, kv))? {
            q_block.place(&mut dq, query_width, kv * q_block.width);
            k_block.place(&mut dk, kv_width, kv * k_block.width);
            v_block.place(&mut dv, kv_width, kv * v_block.width);
        }
        Ok([dq, dk, dv])
    }

    /// Runs `work` for each group and key-value head, in parallel; the results come in order.
    fn tasks<T: Send>(&self, work: impl Fn(&GroupRows, usize) -> Result<T> + Sync) -> Result<Vec<(usize, T)>> {
        let heads = self.heads.key_value;
        let tasks = (0..self.groups.len() * heads).into_par_iter();
        tasks.map(|task| Ok((task % heads, work(&self.groups[task / heads], task % heads)?))).collect()
    }

    fn sharing(&self) -> usize {
        self.heads.query / self.heads.key_value
    }

    fn query<'a>(&self, values: &'a [f32], index: usize) -> Head<'a> {
        Head { values, width: self.heads.query * self.heads.dim, dim: self.heads.dim, index }
    }

    fn key_value<'a>(&self, values: &'a [f32], index: usize) -> Head<'a> {
        Head { values, width: self.heads.key_value * self.heads.dim, dim: self.heads.dim, index }
    }

    fn forward_task(&self, inputs: &Inputs, group: &GroupRows, kv: usize) -> Result<Block> {
        let (k, v) = (self.key_value(inputs.k, kv), self.key_value(inputs.v, kv));
        let mut block = Block::new(group, self.sharing(), self.heads.dim);
        for head in 0..self.sharing() {
            let q = self.query(inputs.q, kv * self.sharing() + head);
            for segment in group.segments() {
                let mut p = products(q, k, &segment, inputs.scoring.scale)?;
                probabilities(&mut p, &segment, inputs.scoring, None);
                let (seen, own) = halves(&p, &segment)?;
                multiply(block.rows(&segment.own, head)?, Into::Fresh, 1.0, own, v.rows(&segment.own)?, Threads::One)?;
                if !segment.prefix.is_empty() {
                    let v = v.rows(&segment.prefix)?;
                    multiply(block.rows(&segment.own, head)?, Into::Sum, 1.0, seen, v, Threads::One)?;
                }
            }
        }
        Ok(block)
    }

    /// Returns the gradients of the queries, the keys and the values of one group and key-value head.
    fn backward_task(&self, inputs: &Inputs, group: &GroupRows, kv: usize) -> Result<[Block; 3]> {
        let (k, v) = (self.key_value(inputs.k, kv), self.key_value(inputs.v, kv));
        let mut dq = Block::new(group, self.sharing(), self.heads.dim);
        let mut dk = Block::new(group, 1, self.heads.dim);
        let mut dv = Block::new(group, 1, self.heads.dim);
        for head in 0..self.sharing() {
            let index = kv * self.sharing() + head;
            let (q, grad) = (self.query(inputs.q, index), self.query(inputs.grad, index));
            for segment in group.segments() {
                let Scoring { scale, cap, .. } = inputs.scoring;
                let mut p = products(q, k, &segment, scale)?;
                let mut bends = cap.map(|_| vec![0.0; p.len()]);
                probabilities(&mut p, &segment, inputs.scoring, bends.as_deref_mut());
                let mut ds = products(grad, v, &segment, 1.0)?;
                let width = segment.own.len() + segment.prefix.len();
                for (ds, p) in ds.chunks_exact_mut(width).zip(p.chunks_exact(width)) {
                    let mean = dot(ds, p);
                    ds.iter_mut().zip(p).for_each(|(ds, p)| *ds = p * (*ds - mean));
                }
                if let Some(bends) = bends {
                    ds.iter_mut().zip(bends).for_each(|(ds, bend)| *ds *= bend);
                }
                let (p_seen, p_own) = halves(&p, &segment)?;
                let (ds_seen, ds_own) = halves(&ds, &segment)?;
                let one = Threads::One;
                let (rows, prefix) = (&segment.own, &segment.prefix);
                let (q, grad) = (q.rows(rows)?, grad.rows(rows)?);
                multiply(dq.rows(rows, head)?, Into::Fresh, scale, ds_own, k.rows(rows)?, one)?;
                multiply(dk.rows(rows, 0)?, Into::Sum, scale, ds_own.t(), q, one)?;
                multiply(dv.rows(rows, 0)?, Into::Sum, 1.0, p_own.t(), grad, one)?;
                if !prefix.is_empty() {
                    multiply(dq.rows(rows, head)?, Into::Sum, scale, ds_seen, k.rows(prefix)?, one)?;
                    multiply(dk.rows(prefix, 0)?, Into::Sum, scale, ds_seen.t(), q, one)?;
                    multiply(dv.rows(prefix, 0)?, Into::Sum, 1.0, p_seen.t(), grad, one)?;
                }
            }
        }
        Ok([dq, dk, dv])
    }
}

struct Inputs<'a> {
    q: &'a [f32],
    k: &'a [f32],
    v: &'a [f32],
    grad: &'a [f32],
    scoring: Scoring,
}

/// Turns `[own, prefix + own]` products into how much each row of a segment looks at each row that it sees. `bends`
/// takes the slopes of the bent scores, where scores are bent and the slopes are wanted.
fn probabilities(products: &mut [f32], segment: &Segment, scoring: Scoring, mut bends: Option<&mut [f32]>) {
    let prefix = segment.prefix.len();
    let width = prefix + segment.own.len();
    for (row, scores) in products.chunks_exact_mut(width).enumerate() {
        let end = prefix + row + 1;
        let seen = scoring.window.map_or(0, |window| end.saturating_sub(window))..end;
        if let Some(cap) = scoring.cap {
            let bent = &mut scores[seen.clone()];
            bent.iter_mut().for_each(|s| *s = cap * tanh(*s / cap));
            if let Some(bends) = &mut bends {
                let bends = &mut bends[row * width..][seen.clone()];
                bends.iter_mut().zip(&*bent).for_each(|(bend, s)| *bend = 1.0 - (s / cap) * (s / cap));
            }
        }
        softmax(&mut scores[seen.clone()]);
        scores[..seen.start].fill(0.0);
        scores[seen.end..].fill(0.0);
    }
}

/// Returns `[own, prefix + own]`: the products of a segment's rows of `a` with the rows of `b` before and in it.
fn products(a: Head, b: Head, segment: &Segment, factor: f32) -> Result<Vec<f32>> {
    let (own, prefix) = (segment.own.len(), segment.prefix.len());
    let width = prefix + own;
    let mut result = vec![0.0; own * width];
    let a = a.rows(&segment.own)?;
    if prefix > 0 {
        let dst = MatMut::strided(&mut result, own, prefix, width)?;
        multiply(dst, Into::Fresh, factor, a, b.rows(&segment.prefix)?.t(), Threads::One)?;
    }
    let dst = MatMut::strided(&mut result[prefix..], own, own, width)?;
    multiply(dst, Into::Fresh, factor, a, b.rows(&segment.own)?.t(), Threads::One)?;
    Ok(result)
}

/// Splits `[own, prefix + own]` into its columns for the prefix and for the segment itself.
fn halves<'a>(values: &'a [f32], segment: &Segment) -> Result<(Mat<'a>, Mat<'a>)> {
    let (own, prefix) = (segment.own.len(), segment.prefix.len());
    let seen = Mat::strided(values, own, prefix, prefix + own)?;
    Ok((seen, Mat::strided(&values[prefix..], own, own, prefix + own)?))
}

fn softmax(scores: &mut [f32]) {
    let max = largest(scores);
    scores.iter_mut().for_each(|s| *s = exp(*s - max));
    let inverse = 1.0 / scores.iter().sum::<f32>();
    scores.iter_mut().for_each(|s| *s *= inverse);
}

#[cfg(test)]
mod tests {
    use candle_core::Tensor;

    use super::super::check::{gradients, random, tensor};
    use super::*;

    const HEADS: Heads = Heads { query: 4, key_value: 2, dim: 4 };
    const PLAIN: Scoring = Scoring { scale: 0.5, cap: None, window: None };
    /// A window shorter than the prompt, and scores bent hard.
    const GEMMA: Scoring = Scoring { scale: 0.5, cap: Some(0.6), window: Some(2) };

    /// Two groups: one with two completions and an empty one (an answer of one token), one of a bare prompt.
    fn attention() -> Attention {
        let first = GroupRows { prompt: 0..3, completions: vec![3..5, 5..5, 5..8] };
        Attention::new(vec![first, GroupRows { prompt: 8..10, completions: vec![] }], HEADS).unwrap()
    }

    /// Attention of one plain sequence made of `rows`, by candle's ops: returns the outputs of those rows.
    fn plain(q: &Tensor, k: &Tensor, v: &Tensor, rows: &[u32], scoring: Scoring) -> Vec<Vec<f32>> {
        let n = rows.len();
        let ids = Tensor::new(rows, q.device()).unwrap();
        let split = |t: &Tensor, heads: usize| {
            let t = t.index_select(&ids, 0).unwrap().reshape((n, heads, HEADS.dim)).unwrap();
            t.transpose(0, 1).unwrap().contiguous().unwrap()
        };
        let repeat = |t: Tensor| {
            let parts: Vec<Tensor> = (0..HEADS.query).map(|h| t.get(h / 2).unwrap()).collect();
            Tensor::stack(&parts, 0).unwrap()
        };
        let (q, k, v) = (split(q, HEADS.query), repeat(split(k, 2)), repeat(split(v, 2)));
        let seen = |row: usize, column: usize| column <= row && row - column < scoring.window.unwrap_or(n);
        let mask = (0..n * n).map(|i| if seen(i / n, i % n) { 0.0 } else { f32::NEG_INFINITY }).collect::<Vec<f32>>();
        let mask = Tensor::from_vec(mask, (n, n), q.device()).unwrap();
        let mut scores = (q.matmul(&k.t().unwrap()).unwrap() * f64::from(scoring.scale)).unwrap();
        if let Some(cap) = scoring.cap.map(f64::from) {
            scores = ((scores / cap).unwrap().tanh().unwrap() * cap).unwrap();
        }
        let scores = scores.broadcast_add(&mask).unwrap();
        let p = candle_nn::ops::softmax_last_dim(&scores).unwrap();
        let y = p.matmul(&v).unwrap().transpose(0, 1).unwrap().contiguous().unwrap();
        y.reshape((n, HEADS.query * HEADS.dim)).unwrap().to_vec2().unwrap()
    }

    #[test]
    fn each_completion_sees_the_prompt_and_itself_only() {
        let (q, k, v) = (random(1, 160), random(2, 80), random(3, 80));
        let found = [PLAIN, GEMMA].map(|scoring| attention().forward(&q, &k, &v, scoring).unwrap());
        let (q, k, v) = (tensor(&q, &[10, 16]), tensor(&k, &[10, 8]), tensor(&v, &[10, 8]));
        let sequences: [&[u32]; 3] = [&[0, 1, 2, 3, 4], &[0, 1, 2, 5, 6, 7], &[8, 9]];
        for (rows, (found, scoring)) in
            sequences.iter().flat_map(|s| found.iter().zip([PLAIN, GEMMA]).map(move |f| (s, f)))
        {
            for (expected, row) in plain(&q, &k, &v, rows, scoring).iter().zip(*rows) {
                for (a, b) in found[*row as usize * 16..].iter().zip(expected) {
                    assert!((a - b).abs() < 1e-5, "{scoring:?}, row {row}: {a} {b}");
                }
            }
        }
    }

    #[test]
    fn backward_agrees_with_differences() {
        for scoring in [PLAIN, GEMMA] {
            gradients(
                &[random(1, 160), random(2, 80), random(3, 80)],
                |t| attention().forward(&t[0], &t[1], &t[2], scoring).unwrap(),
                |t, grad| attention().backward(&t[0], &t[1], &t[2], grad, scoring).unwrap().to_vec(),
            );
        }
    }

    #[test]
    fn groups_with_a_gap_are_refused() {
        let gap =
            vec![GroupRows { prompt: 0..3, completions: vec![] }, GroupRows { prompt: 4..5, completions: vec![] }];
        assert!(Attention::new(gap, HEADS).is_err());
    }
}
