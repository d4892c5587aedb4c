//! Causal attention over a packed batch in which the completions of a group share the run of their prompt.
//!
//! A group's rows are its prompt and then its completions. A prompt row sees the prompt up to itself; a completion's
//! row sees the whole prompt and its own completion up to itself, never a sibling. So the prompt is computed once for
//! all completions, and its keys and values collect the gradients of all of them.

use std::ops::Range;

use candle_core::{Result, bail};
use rayon::prelude::*;

use super::mat::{Into, Mat, MatMut, Threads, multiply};
use super::{LANES, Work, dot, exp, largest, tanh, wide, zeros};

/// Rows of a prompt whose scores are made at once. The rows after them are masked for all of them and never multiplied.
const TILE: usize = 128;

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

    /// Returns runs of rows, each with all that it sees. Empty runs are left out.
    fn segments(&self) -> impl Iterator<Item = Segment> {
        let Range { start, end } = self.prompt;
        let tile = move |at: usize| {
            let own = at..end.min(at + TILE);
            Segment { seen: [0..0, start..own.end], own }
        };
        let completion = |own: &Range<usize>| Segment { seen: [self.prompt.clone(), own.clone()], own: own.clone() };
        let completions = self.completions.iter().map(completion);
        (start..end).step_by(TILE).map(tile).chain(completions).filter(|segment| !segment.own.is_empty())
    }
}

/// Rows whose scores are made at once.
#[derive(Debug)]
struct Segment {
    own: Range<usize>,
    /// The runs of rows that they see; the last one ends with the segment itself.
    seen: [Range<usize>; 2],
}

impl Segment {
    /// Returns how many rows they see: the columns of their scores.
    fn width(&self) -> usize {
        self.seen.iter().map(Range::len).sum()
    }

    /// Returns the runs that they see, each with the column of its first row.
    fn runs(&self) -> impl Iterator<Item = (usize, &Range<usize>)> {
        let [first, last] = &self.seen;
        [(0, first), (first.len(), last)].into_iter().filter(|(_, run)| !run.is_empty())
    }

    /// Returns the columns of a run.
    fn part<'a>(&self, scores: &'a [f32], (column, run): (usize, &Range<usize>)) -> Result<Mat<'a>> {
        Mat::strided(&scores[column..], self.own.len(), run.len(), self.width())
    }
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

/// What one task fills: the rows of a group and the columns of one head.
struct Block {
    values: Vec<f32>,
    first: usize,
    dim: usize,
}

impl Block {
    fn new(group: &GroupRows, dim: usize) -> Self {
        let rows = group.all();
        Block { values: vec![0.0; rows.len() * dim], first: rows.start, dim }
    }

    fn rows(&mut self, rows: &Range<usize>) -> Result<MatMut<'_>> {
        MatMut::strided(&mut self.values[(rows.start - self.first) * self.dim..], rows.len(), self.dim, self.dim)
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
        let mut y = zeros(q.len());
        let inputs = Inputs { q, k, v, grad: &[], scoring };
        let blocks = self.tasks(|group, head| self.forward_task(&inputs, group, head))?;
        let blocks: Vec<(usize, &Block)> = blocks.iter().map(|(head, block)| (*head, block)).collect();
        self.add_all(&blocks, self.heads.query, &mut y);
        Ok(y)
    }

    /// Returns the gradients of `q`, `k` and `v`.
    pub fn backward(&self, q: &[f32], k: &[f32], v: &[f32], grad: &[f32], scoring: Scoring) -> Result<[Vec<f32>; 3]> {
        let inputs = Inputs { q, k, v, grad, scoring };
        let mut gradients = [zeros(q.len()), zeros(k.len()), zeros(v.len())];
        let blocks = self.tasks(|group, head| self.backward_task(&inputs, group, head))?;
        let (own, shared) = (self.heads.query, self.heads.key_value);
        for (which, (sum, heads)) in gradients.iter_mut().zip([own, shared, shared]).enumerate() {
            let parts = blocks.iter().map(|(head, blocks)| (head * heads / own, &blocks[which]));
            self.add_all(&parts.collect::<Vec<_>>(), heads, sum);
        }
        Ok(gradients)
    }

    /// Adds blocks to the columns of their heads of `[rows, heads * dim]`, in their order.
    fn add_all(&self, blocks: &[(usize, &Block)], heads: usize, result: &mut [f32]) {
        let dim = self.heads.dim;
        result.par_chunks_mut(TILE * heads * dim).enumerate().for_each(|(at, rows)| {
            let (first, end) = (at * TILE, at * TILE + rows.len() / (heads * dim));
            for (head, block) in blocks {
                let own = first.max(block.first)..end.min(block.first + block.values.len() / dim);
                for row in own {
                    let sums = &mut rows[((row - first) * heads + head) * dim..][..dim];
                    let values = &block.values[(row - block.first) * dim..][..dim];
                    sums.iter_mut().zip(values).for_each(|(sum, value)| *sum += value);
                }
            }
        });
    }

    /// Runs `work` for each group and query head, in parallel; the results come in order.
    fn tasks<T: Send>(&self, work: impl Fn(&GroupRows, usize) -> Result<T> + Sync) -> Result<Vec<(usize, T)>> {
        let heads = self.heads.query;
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

    fn forward_task(&self, inputs: &Inputs, group: &GroupRows, head: usize) -> Result<Block> {
        let q = self.query(inputs.q, head);
        let [k, v] = [inputs.k, inputs.v].map(|values| self.key_value(values, head / self.sharing()));
        let mut y = Block::new(group, self.heads.dim);
        for segment in group.segments() {
            let mut p = products(q, k, &segment, inputs.scoring.scale)?;
            probabilities(&mut p, &segment, inputs.scoring, None);
            for (at, run) in segment.runs() {
                let p = segment.part(&p, (at, run))?;
                multiply(y.rows(&segment.own)?, Into::Sum, 1.0, p, v.rows(run)?, Threads::One)?;
            }
        }
        Ok(y)
    }

    /// Returns the gradients of the queries of one group and head, and its part of those of the keys and the values.
    fn backward_task(&self, inputs: &Inputs, group: &GroupRows, head: usize) -> Result<[Block; 3]> {
        let (q, grad) = (self.query(inputs.q, head), self.query(inputs.grad, head));
        let [k, v] = [inputs.k, inputs.v].map(|values| self.key_value(values, head / self.sharing()));
        let [mut dq, mut dk, mut dv] = [(); 3].map(|()| Block::new(group, self.heads.dim));
        for segment in group.segments() {
            let Scoring { scale, cap, .. } = inputs.scoring;
            let mut p = products(q, k, &segment, scale)?;
            let mut bends = cap.map(|_| vec![0.0; p.len()]);
            probabilities(&mut p, &segment, inputs.scoring, bends.as_deref_mut());
            let mut ds = products(grad, v, &segment, 1.0)?;
            let rows = ds.chunks_exact_mut(segment.width()).zip(p.chunks_exact(segment.width()));
            rows.for_each(|row| wide(ThroughSoftmax, row));
            if let Some(bends) = bends {
                ds.iter_mut().zip(bends).for_each(|(ds, bend)| *ds *= bend);
            }
            let (own, one) = (&segment.own, Threads::One);
            let (q, grad) = (q.rows(own)?, grad.rows(own)?);
            for (at, run) in segment.runs() {
                let [p, ds] = [&p, &ds].map(|values| segment.part(values, (at, run)));
                let (p, ds) = (p?, ds?);
                multiply(dq.rows(own)?, Into::Sum, scale, ds, k.rows(run)?, one)?;
                multiply(dk.rows(run)?, Into::Sum, scale, ds.t(), q, one)?;
                multiply(dv.rows(run)?, Into::Sum, 1.0, p.t(), grad, one)?;
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

/// Turns `[own, seen]` products into how much each row of a segment looks at each row that it sees. `bends`
/// takes the slopes of the bent scores, where scores are bent and the slopes are wanted.
fn probabilities(products: &mut [f32], segment: &Segment, scoring: Scoring, mut bends: Option<&mut [f32]>) {
    let width = segment.width();
    let before = width - segment.own.len();
    for (row, scores) in products.chunks_exact_mut(width).enumerate() {
        let end = before + row + 1;
        let seen = scoring.window.map_or(0, |window| end.saturating_sub(window))..end;
        if let Some(cap) = scoring.cap {
            let bent = &mut scores[seen.clone()];
            wide(Bend, (&mut *bent, cap));
            if let Some(bends) = &mut bends {
                let bends = &mut bends[row * width..][seen.clone()];
                bends.iter_mut().zip(&*bent).for_each(|(bend, s)| *bend = 1.0 - (s / cap) * (s / cap));
            }
        }
        wide(Softmax, &mut scores[seen.clone()]);
        scores[..seen.start].fill(0.0);
        scores[seen.end..].fill(0.0);
    }
}

/// Turns the gradients of the probabilities of a row into those of its products.
struct ThroughSoftmax;

impl Work<(&mut [f32], &[f32])> for ThroughSoftmax {
    type Output = ();

    #[inline(always)]
    fn run((ds, p): (&mut [f32], &[f32])) {
        let mean = dot(ds, p);
        ds.iter_mut().zip(p).for_each(|(ds, p)| *ds = p * (*ds - mean));
    }
}

struct Bend;

impl Work<(&mut [f32], f32)> for Bend {
    type Output = ();

    #[inline(always)]
    fn run((scores, cap): (&mut [f32], f32)) {
        scores.iter_mut().for_each(|s| *s = cap * tanh(*s / cap));
    }
}

/// Returns `[own, seen]`: the products of a segment's rows of `a` with the rows of `b` that they see.
fn products(a: Head, b: Head, segment: &Segment, factor: f32) -> Result<Vec<f32>> {
    let (own, width) = (segment.own.len(), segment.width());
    let mut result = vec![0.0; own * width];
    let a = a.rows(&segment.own)?;
    for (column, run) in segment.runs() {
        let dst = MatMut::strided(&mut result[column..], own, run.len(), width)?;
        multiply(dst, Into::Fresh, factor, a, b.rows(run)?.t(), Threads::One)?;
    }
    Ok(result)
}

struct Softmax;

impl Work<&mut [f32]> for Softmax {
    type Output = ();

    #[inline(always)]
    fn run(scores: &mut [f32]) {
        let max = largest(scores);
        let (chunks, rest) = scores.as_chunks_mut::<LANES>();
        let mut sums = [0.0; LANES];
        for chunk in chunks {
            for i in 0..LANES {
                chunk[i] = exp(chunk[i] - max);
                sums[i] += chunk[i];
            }
        }
        for score in &mut *rest {
            *score = exp(*score - max);
        }
        let inverse = 1.0 / (sums.iter().sum::<f32>() + rest.iter().sum::<f32>());
        scores.iter_mut().for_each(|s| *s *= inverse);
    }
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

    /// The prompt's last tile is not full; windows reach over a tile's edge and from the completion into the prompt.
    #[test]
    fn a_prompt_of_several_tiles_gives_what_plain_attention_gives() {
        let prompt = 2 * TILE + 5;
        let rows = prompt + 7;
        let group = GroupRows { prompt: 0..prompt, completions: std::iter::once(prompt..rows).collect() };
        let attention = Attention::new(vec![group], HEADS).unwrap();
        let (q, k, v) = (random(1, rows * 16), random(2, rows * 8), random(3, rows * 8));
        let all: Vec<u32> = (0..rows as u32).collect();
        for scoring in [PLAIN, GEMMA, Scoring { window: Some(TILE + 3), ..PLAIN }] {
            let found = attention.forward(&q, &k, &v, scoring).unwrap();
            let (q, k, v) = (tensor(&q, &[rows, 16]), tensor(&k, &[rows, 8]), tensor(&v, &[rows, 8]));
            let expected = plain(&q, &k, &v, &all, scoring).concat();
            let worst = found.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(found.len() == expected.len() && worst < 1e-5, "{scoring:?}: {worst}");
        }
    }

    /// The same gradients as those of a completion that follows nothing shared, row for row.
    #[test]
    fn gradients_through_tiles_are_those_of_one_run() {
        let rows = TILE + 9;
        let runs = |prompt: usize| {
            let group = GroupRows { prompt: 0..prompt, completions: std::iter::once(prompt..rows).collect() };
            Attention::new(vec![group], HEADS).unwrap()
        };
        let (q, k, v, grad) = (random(1, rows * 16), random(2, rows * 8), random(3, rows * 8), random(4, rows * 16));
        for scoring in [PLAIN, GEMMA] {
            // Everything in tiles, and everything in one run.
            let [tiled, whole] = [rows, 0].map(|prompt| runs(prompt).backward(&q, &k, &v, &grad, scoring).unwrap());
            for (tiled, whole) in tiled.iter().zip(&whole) {
                let worst = tiled.iter().zip(whole).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                assert!(worst < 1e-5, "{scoring:?}: {worst}");
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
