//! The forward pass for sampling and scoring: everything laid out for speed, nothing kept for gradients.
//!
//! A forward pass takes *runs*: pieces of several sequences, one token long in decoding and a prompt long in prefill,
//! and multiplies all their rows by each weight matrix at once. Only attention looks at which row belongs to which.

use rayon::prelude::*;

use super::attention::View;
use super::cache::{Cache, Pool, Shape};
use super::config::{Activation, ModelConfig};
use super::error::EngineError;
use super::held::Held;
use super::lora::{Adapter, Linear, LoraPair, merged};
use super::low_rank::{LoraPack, Part, Site, add_low_rank, parts};
use super::math;
use super::matmul::{Matrix, Product, WeightForm};
use super::rope::Rope;
use super::weights::{LayerWeights, Weights};

/// A model laid out for inference.
pub(crate) struct Decoder {
    config: ModelConfig,
    embed: Embedding,
    layers: Vec<Layer>,
    norm: Vec<f32>,
    head: Matrix,
    ropes: Vec<Tables>,
}

/// The cosines and sines of one rotary embedding, position after position.
struct Tables {
    cos: Vec<f32>,
    sin: Vec<f32>,
    /// Numbers of one position.
    width: usize,
}

struct Layer {
    attn_norm: Option<Vec<f32>>,
    attn_post_norm: Option<Vec<f32>>,
    qkv: Matrix,
    qkv_bias: Option<Vec<f32>>,
    q_norm: Option<Vec<f32>>,
    k_norm: Option<Vec<f32>>,
    o: Matrix,
    mlp_norm: Option<Vec<f32>>,
    mlp_post_norm: Option<Vec<f32>>,
    gate_up: Matrix,
    down: Matrix,
}

/// Tokens to read next in one sequence.
pub(crate) struct Run<'a> {
    pub(crate) cache: &'a mut Cache,
    pub(crate) tokens: &'a [u32],
    /// The adapter that the sequence is read with. Runs of one adapter side by side are multiplied together.
    pub(crate) adapter: Option<&'a LoraPack>,
}

/// The rows of a run's own place in the batch.
#[derive(Clone, Copy)]
struct Row {
    run: usize,
    /// Place inside the run.
    offset: usize,
}

/// The `[vocab, hidden]` embedding as the model holds it.
struct Embedding(Held);

impl Embedding {
    /// Copies the row of each token, which is in the vocabulary: every entrance checks it.
    fn read<'a>(&self, tokens: impl Iterator<Item = &'a u32>, x: &mut [f32]) {
        match self.0.gather(tokens.map(|token| *token as usize)) {
            Ok(rows) => x.copy_from_slice(&rows),
            Err(_) => x.fill(f32::NAN),
        }
    }
}

impl Decoder {
    /// Lays a model out in a form. An adapter given here becomes part of the weights.
    pub(crate) fn new(
        config: &ModelConfig,
        weights: &Weights,
        ropes: &[Rope],
        form: WeightForm,
        merge: Option<&Adapter>,
    ) -> Result<Self, EngineError> {
        let flat = |t: &candle_core::Tensor| t.flatten_all()?.to_vec1::<f32>();
        let tables = |rope: &Rope| -> Result<Tables, EngineError> {
            Ok(Tables { cos: flat(&rope.cos)?, sin: flat(&rope.sin)?, width: rope.cos.dims2()?.1 })
        };
        let layer = |(i, w): (usize, &LayerWeights)| {
            let pair = |linear| merge.and_then(|adapter| adapter.get(i, linear));
            Layer::new(config, w, form, pair)
        };
        let layers = weights.layers.par_iter().enumerate().map(layer).collect::<Result<_, EngineError>>()?;
        Ok(Decoder {
            config: config.clone(),
            embed: Embedding(weights.embed.clone()),
            layers,
            norm: flat(&weights.norm)?,
            head: Matrix::new(form, std::slice::from_ref(&weights.lm_head))?,
            ropes: ropes.iter().map(tables).collect::<Result<_, _>>()?,
        })
    }

    /// Returns the layout of its cache pages.
    pub(crate) fn shape(&self) -> Shape {
        Shape::new(&self.config)
    }

    pub(crate) fn hidden_size(&self) -> usize {
        self.config.hidden_size
    }

    /// Reads the runs' tokens into their caches and returns the last layer's rows, `[rows, hidden]`, normed.
    pub(crate) fn forward(&self, runs: &mut [Run], pool: &Pool) -> Vec<f32> {
        let hidden = self.config.hidden_size;
        let rows: Vec<Row> = runs
            .iter()
            .enumerate()
            .flat_map(|(run, r)| (0..r.tokens.len()).map(move |offset| Row { run, offset }))
            .collect();
        for run in runs.iter_mut() {
            run.cache.reserve(run.tokens.len(), pool);
        }
        let mut x = vec![0.0; rows.len() * hidden];
        self.embed.read(runs.iter().flat_map(|r| r.tokens), &mut x);
        if let Some(scale) = self.config.embedding_scale {
            x.iter_mut().for_each(|x| *x *= scale);
        }
        let lora = parts(runs.iter().map(|run| (run.adapter, run.tokens.len())));
        for (i, layer) in self.layers.iter().enumerate() {
            self.attention(i, layer, &lora, runs, &rows, &mut x);
            self.mlp(i, layer, &lora, &mut x);
        }
        for run in runs.iter_mut() {
            run.cache.advance(run.tokens.len());
        }
        self.normed(&x, &self.norm)
    }

    /// Returns the logits of rows that [`Decoder::forward`] returned, in the room of earlier ones.
    pub(crate) fn logits(&self, hidden: &[f32], room: Vec<f32>) -> Product {
        self.logits_of(hidden, 0..self.head.panels(), room)
    }

    /// Returns the number of panels of the output layer.
    pub(crate) fn panels(&self) -> usize {
        self.head.panels()
    }

    /// Returns the logits of a part of the vocabulary.
    pub(crate) fn logits_of(&self, hidden: &[f32], panels: std::ops::Range<usize>, room: Vec<f32>) -> Product {
        let mut logits = self.head.apply_panels(hidden, hidden.len() / self.config.hidden_size, panels, room);
        if let Some(cap) = self.config.logit_cap {
            logits.change(|values| math::wide_cap(values, cap));
        }
        logits
    }

    fn normed(&self, x: &[f32], weight: &[f32]) -> Vec<f32> {
        let hidden = self.config.hidden_size;
        let mut out = vec![0.0; x.len()];
        let rows = out.par_chunks_exact_mut(hidden).with_min_len(16).zip(x.par_chunks_exact(hidden));
        rows.for_each(|(out, x)| math::rms_norm(x, weight, self.config.rms_eps, out));
        out
    }

    fn attention(&self, index: usize, layer: &Layer, lora: &[Part], runs: &mut [Run], rows: &[Row], x: &mut [f32]) {
        let (c, kind) = (&self.config, self.config.layers[index]);
        let normed = layer.attn_norm.as_ref().map(|norm| self.normed(x, norm));
        let input = normed.as_deref().unwrap_or(x);
        let mut product = layer.qkv.apply(input, rows.len());
        add_low_rank(lora, index, Site::Qkv, input, &mut product);
        let mut q = vec![0.0; rows.len() * c.query_size()];
        self.place(index, layer, runs, &product, &mut q);

        let group = c.heads / c.kv_heads * c.head_dim;
        let mut attended = vec![0.0; q.len()];
        let runs = &*runs;
        let work = attended.par_chunks_exact_mut(group).zip(q.par_chunks_exact(group)).enumerate();
        work.with_min_len(4).for_each_init(Vec::new, |scratch, (at, (out, q))| {
            let (row, head) = (rows[at / c.kv_heads], at % c.kv_heads);
            let cache = &*runs[row.run].cache;
            let before = cache.prefix_len();
            let end = cache.own().len() + row.offset + 1;
            // The first position that the row sees.
            let first = kind.window.map_or(0, |window| (before + end).saturating_sub(window));
            let prefix = cache.prefix().filter(|_| first < before).map(|p| (p, first..before));
            let own = Some((cache.own(), first.saturating_sub(before)..end));
            let view = View { layer: index, head, parts: [prefix, own], head_dim: c.head_dim, cap: c.scores.cap };
            view.attend(q, out, scratch);
        });
        let mut product = layer.o.apply(&attended, rows.len());
        add_low_rank(lora, index, Site::O, &attended, &mut product);
        self.add(x, product, layer.attn_post_norm.as_deref());
    }

    /// Finishes queries, keys and values (bias, norm, rotation), writes keys and values to the caches.
    fn place(&self, index: usize, layer: &Layer, runs: &mut [Run], product: &Product, q: &mut [f32]) {
        let c = &self.config;
        let scale = c.scores.scale;
        let mut work = Vec::with_capacity(runs.len());
        let (mut first, mut rest) = (0, q);
        for run in runs.iter_mut() {
            let (head, tail) = rest.split_at_mut(run.tokens.len() * c.query_size());
            let rows = run.tokens.len();
            work.push((first, run, head));
            first += rows;
            rest = tail;
        }
        work.into_par_iter().with_min_len(4).for_each_init(Vec::new, |row, (first, run, q)| {
            row.resize(c.query_size() + 2 * c.kv_size(), 0.0);
            for (offset, q) in q.chunks_exact_mut(c.query_size()).enumerate() {
                product.copy_row(first + offset, row);
                let position = run.cache.len() + offset;
                self.finish(index, layer, position, row);
                for (q, value) in q.iter_mut().zip(&*row) {
                    *q = value * scale;
                }
                let (keys, values) = row[c.query_size()..].split_at(c.kv_size());
                let own = run.cache.own().len() + offset;
                run.cache.own_mut().write(index, own, keys, values);
            }
        });
    }

    fn finish(&self, index: usize, layer: &Layer, position: usize, row: &mut [f32]) {
        let c = &self.config;
        if let Some(bias) = &layer.qkv_bias {
            row.iter_mut().zip(bias).for_each(|(value, bias)| *value += bias);
        }
        let (queries, rest) = row.split_at_mut(c.query_size());
        let (keys, _) = rest.split_at_mut(c.kv_size());
        for (values, norm) in [(queries, &layer.q_norm), (keys, &layer.k_norm)] {
            if let Some(norm) = norm {
                // As wide as a head, or as the whole projection.
                let parts = values.chunks_exact_mut(norm.len());
                parts.for_each(|part| math::rms_norm_in_place(part, norm, c.rms_eps));
            }
        }
        let Some(Tables { cos, sin, width }) = c.layers[index].rope.map(|rope| &self.ropes[rope]) else { return };
        let (cos, sin) = (&cos[position * width..][..*width], &sin[position * width..][..*width]);
        for head in row.chunks_exact_mut(c.head_dim).take(c.heads + c.kv_heads) {
            math::rotate(head, cos, sin);
        }
    }

    fn mlp(&self, index: usize, layer: &Layer, lora: &[Part], x: &mut [f32]) {
        let (hidden, wide) = (self.config.hidden_size, self.config.intermediate_size);
        let rows = x.len() / hidden;
        let normed = layer.mlp_norm.as_ref().map(|norm| self.normed(x, norm));
        let input = normed.as_deref().unwrap_or(x);
        let mut product = layer.gate_up.apply(input, rows);
        add_low_rank(lora, index, Site::GateUp, input, &mut product);
        let activate = match self.config.block.activation {
            Activation::SwiGlu => math::swiglu,
            Activation::GeGlu => math::geglu,
        };
        let mut active = vec![0.0; rows * wide];
        let work = active.par_chunks_exact_mut(wide).with_min_len(4).enumerate();
        work.for_each_init(
            || vec![0.0; 2 * wide],
            |both, (i, out)| {
                product.copy_row(i, both);
                let (gate, up) = both.split_at(wide);
                activate(gate, up, out);
            },
        );
        let mut product = layer.down.apply(&active, rows);
        add_low_rank(lora, index, Site::Down, &active, &mut product);
        self.add(x, product, layer.mlp_post_norm.as_deref());
    }

    /// Adds a product to the residual rows, normed first where the layer norms what comes out.
    fn add(&self, x: &mut [f32], product: Product, norm: Option<&[f32]>) {
        let Some(norm) = norm else { return add_rows(x, &product, self.config.hidden_size) };
        let normed = self.normed(&product.to_rows(), norm);
        x.iter_mut().zip(normed).for_each(|(x, y)| *x += y);
    }
}

/// Adds a product to the residual rows.
fn add_rows(x: &mut [f32], product: &Product, hidden: usize) {
    x.par_chunks_exact_mut(hidden).with_min_len(16).enumerate().for_each(|(i, x)| {
        for (at, piece) in product.row(i) {
            x[at..].iter_mut().zip(piece).for_each(|(x, y)| *x += y);
        }
    });
}

impl Layer {
    fn new<'a>(
        config: &ModelConfig,
        w: &LayerWeights,
        form: WeightForm,
        pair: impl Fn(Linear) -> Option<&'a LoraPair>,
    ) -> Result<Self, EngineError> {
        let matrix = |parts: &[(&Held, Linear)]| {
            let merged = |(weight, linear): &(&Held, Linear)| merged(weight, pair(*linear));
            let parts: Vec<Held> = parts.iter().map(merged).collect::<Result<_, _>>()?;
            Matrix::new(form, &parts)
        };
        let flat = |t: &candle_core::Tensor| t.flatten_all()?.to_vec1::<f32>();
        let optional = |t: &Option<candle_core::Tensor>| t.as_ref().map(flat).transpose();
        let biases = [(&w.q_bias, config.query_size()), (&w.k_bias, config.kv_size()), (&w.v_bias, config.kv_size())];
        let mut qkv_bias = Vec::new();
        for (bias, width) in biases {
            qkv_bias.extend(optional(bias)?.unwrap_or_else(|| vec![0.0; width]));
        }
        Ok(Layer {
            attn_norm: optional(&w.attn_norm)?,
            attn_post_norm: optional(&w.attn_post_norm)?,
            qkv: matrix(&[(&w.q, Linear::Q), (&w.k, Linear::K), (&w.v, Linear::V)])?,
            qkv_bias: biases.iter().any(|(b, _)| b.is_some()).then_some(qkv_bias),
            q_norm: optional(&w.q_norm)?,
            k_norm: optional(&w.k_norm)?,
            o: matrix(&[(&w.o, Linear::O)])?,
            mlp_norm: optional(&w.mlp_norm)?,
            mlp_post_norm: optional(&w.mlp_post_norm)?,
            gate_up: matrix(&[(&w.gate, Linear::Gate), (&w.up, Linear::Up)])?,
            down: matrix(&[(&w.down, Linear::Down)])?,
        })
    }
}
