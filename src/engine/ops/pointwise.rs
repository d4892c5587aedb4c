//! RMS norm, rotary position embedding, SwiGLU and GeGLU, row by row on all threads.

use candle_core::{Result, Tensor, bail};
use rayon::prelude::*;

use super::{Values, Work, dot, exp, tanh, wide, zeros};
use crate::engine::math::{GELU_CUBIC, SQRT_2_OVER_PI};

/// Rows per parallel task: enough work to pay for the hand-over.
const ROWS: usize = 16;
/// Values per parallel task.
pub(crate) const VALUES: usize = 1 << 13;

/// RMS norm with a frozen weight: scales each row of the weight's width to unit mean square, times the weight.
pub struct RmsNorm<'a> {
    weight: Values<'a>,
    eps: f32,
}

impl<'a> RmsNorm<'a> {
    /// Borrows the weight.
    pub fn new(weight: &'a Tensor, eps: f64) -> Result<Self> {
        let weight = Values::of(weight)?;
        match weight.is_empty() {
            true => bail!("a norm has no weight"),
            false => Ok(RmsNorm { weight, eps: eps as f32 }),
        }
    }

    /// Returns the normed rows.
    pub fn forward(&self, x: &[f32]) -> Vec<f32> {
        let n = self.weight.len();
        let mut y = zeros(x.len());
        let chunks = y.par_chunks_mut(n * ROWS).zip(x.par_chunks(n * ROWS));
        chunks.for_each(|(y, x)| wide(Norm, (y, x, &self.weight, self.eps)));
        y
    }

    /// Adds the gradient of `x` to `dx`.
    pub fn backward(&self, x: &[f32], grad: &[f32], dx: &mut [f32]) {
        let n = self.weight.len();
        let chunks = x.par_chunks(n * ROWS).zip(grad.par_chunks(n * ROWS));
        let chunks = dx.par_chunks_mut(n * ROWS).zip(chunks);
        chunks.for_each(|(dx, (x, grad))| wide(NormBackward, (dx, x, grad, &self.weight, self.eps)));
    }
}

struct Norm;

impl Work<(&mut [f32], &[f32], &[f32], f32)> for Norm {
    type Output = ();

    #[inline(always)]
    fn run((y, x, weight, eps): (&mut [f32], &[f32], &[f32], f32)) {
        let n = weight.len();
        for (y, x) in y.chunks_exact_mut(n).zip(x.chunks_exact(n)) {
            let r = inverse_rms(x, eps);
            y.iter_mut().zip(x).zip(weight).for_each(|((y, x), w)| *y = x * r * w);
        }
    }
}

struct NormBackward;

impl Work<(&mut [f32], &[f32], &[f32], &[f32], f32)> for NormBackward {
    type Output = ();

    #[inline(always)]
    fn run((dx, x, grad, weight, eps): (&mut [f32], &[f32], &[f32], &[f32], f32)) {
        let n = weight.len();
        let mut scaled = vec![0.0; n];
        for ((dx, x), grad) in dx.chunks_exact_mut(n).zip(x.chunks_exact(n)).zip(grad.chunks_exact(n)) {
            let r = inverse_rms(x, eps);
            scaled.iter_mut().zip(grad).zip(weight).for_each(|((s, g), w)| *s = g * w);
            let along = dot(x, &scaled) * r * r * r / n as f32;
            dx.iter_mut().zip(&scaled).zip(x).for_each(|((dx, s), x)| *dx += s * r - x * along);
        }
    }
}

#[inline(always)]
fn inverse_rms(x: &[f32], eps: f32) -> f32 {
    1.0 / (dot(x, x) / x.len() as f32 + eps).sqrt()
}

/// Cosines and sines of the rows of one packed batch, `[rows, dim / 2]` each, by the position of each row.
#[derive(Clone)]
pub struct Rotation {
    pub cos: Vec<f32>,
    pub sin: Vec<f32>,
    pub head_dim: usize,
    /// How many dimensions of a head are rotated: the first.
    pub dim: usize,
}

impl Rotation {
    /// Rotates the heads of `[rows, heads * head_dim]` in place, in the rotate-half order of Hugging Face.
    pub fn forward(&self, x: &mut [f32]) {
        self.rotate(x, 1.0);
    }

    /// Turns the gradient of rotated heads into that of the heads before, in place.
    pub fn backward(&self, grad: &mut [f32]) {
        self.rotate(grad, -1.0);
    }

    /// Rotates by the angle times `sign`.
    fn rotate(&self, x: &mut [f32], sign: f32) {
        let half = self.dim / 2;
        let rows = self.cos.len() / half.max(1);
        let Some(width) = x.len().checked_div(rows).filter(|width| *width > 0) else { return };
        x.par_chunks_mut(width).enumerate().with_min_len(ROWS).for_each(|(row, x)| {
            let (cos, sin) = (&self.cos[row * half..][..half], &self.sin[row * half..][..half]);
            wide(Turn, (x, self.head_dim, cos, sin, sign));
        });
    }
}

/// Turns the first dimensions of each head of a row by its angles.
struct Turn;

impl Work<(&mut [f32], usize, &[f32], &[f32], f32)> for Turn {
    type Output = ();

    #[inline(always)]
    fn run((x, head_dim, cos, sin, sign): (&mut [f32], usize, &[f32], &[f32], f32)) {
        let half = cos.len();
        for head in x.chunks_exact_mut(head_dim) {
            let (first, second) = head[..2 * half].split_at_mut(half);
            for i in 0..half {
                let (a, b, s) = (first[i], second[i], sin[i] * sign);
                first[i] = a * cos[i] - b * s;
                second[i] = b * cos[i] + a * s;
            }
        }
    }
}

/// Returns `gelu(gate) * up`, GELU in its tanh form.
pub fn geglu(gate: &[f32], up: &[f32]) -> Vec<f32> {
    gated(gate, up, |values| wide(GegluValues, values))
}

/// Returns the gradients of `gate` and `up`; that of `up` takes the place of `grad`.
pub fn geglu_backward(gate: &[f32], up: &[f32], grad: Vec<f32>) -> (Vec<f32>, Vec<f32>) {
    gated_backward(gate, up, grad, |values| wide(GegluGradients, values))
}

/// Returns `silu(gate) * up`.
pub fn swiglu(gate: &[f32], up: &[f32]) -> Vec<f32> {
    gated(gate, up, |values| wide(SwigluValues, values))
}

/// Returns the gradients of `gate` and `up`; that of `up` takes the place of `grad`.
pub fn swiglu_backward(gate: &[f32], up: &[f32], grad: Vec<f32>) -> (Vec<f32>, Vec<f32>) {
    gated_backward(gate, up, grad, |values| wide(SwigluGradients, values))
}

/// What comes out, the gate and up.
type Forth<'a> = (&'a mut [f32], &'a [f32], &'a [f32]);
/// The gradient of the gate, the gradient that becomes up's, the gate and up.
type Back<'a> = (&'a mut [f32], &'a mut [f32], &'a [f32], &'a [f32]);

fn gated(gate: &[f32], up: &[f32], work: impl Fn(Forth) + Sync) -> Vec<f32> {
    let mut y = zeros(gate.len());
    let chunks = gate.par_chunks(VALUES).zip(up.par_chunks(VALUES));
    y.par_chunks_mut(VALUES).zip(chunks).for_each(|(y, (gate, up))| work((y, gate, up)));
    y
}

fn gated_backward(gate: &[f32], up: &[f32], mut grad: Vec<f32>, work: impl Fn(Back) + Sync) -> (Vec<f32>, Vec<f32>) {
    let mut d_gate = zeros(gate.len());
    let inputs = gate.par_chunks(VALUES).zip(up.par_chunks(VALUES));
    let outputs = d_gate.par_chunks_mut(VALUES).zip(grad.par_chunks_mut(VALUES));
    outputs.zip(inputs).for_each(|((d_gate, grad), (gate, up))| work((d_gate, grad, gate, up)));
    (d_gate, grad)
}

struct GegluValues;

impl Work<Forth<'_>> for GegluValues {
    type Output = ();

    #[inline(always)]
    fn run((y, gate, up): Forth<'_>) {
        y.iter_mut().zip(gate).zip(up).for_each(|((y, g), u)| *y = 0.5 * g * (1.0 + bend(*g)) * u);
    }
}

struct GegluGradients;

impl Work<Back<'_>> for GegluGradients {
    type Output = ();

    #[inline(always)]
    fn run((d_gate, grad, gate, up): Back<'_>) {
        for (((d_gate, grad), g), up) in d_gate.iter_mut().zip(grad).zip(gate).zip(up) {
            let t = bend(*g);
            let slope = SQRT_2_OVER_PI * (1.0 + 3.0 * GELU_CUBIC * g * g);
            *d_gate = *grad * up * (0.5 * (1.0 + t) + 0.5 * g * (1.0 - t * t) * slope);
            *grad *= 0.5 * g * (1.0 + t);
        }
    }
}

/// The hyperbolic tangent of GELU's tanh form.
#[inline(always)]
fn bend(x: f32) -> f32 {
    tanh(SQRT_2_OVER_PI * (x + GELU_CUBIC * x * x * x))
}

struct SwigluValues;

impl Work<Forth<'_>> for SwigluValues {
    type Output = ();

    #[inline(always)]
    fn run((y, gate, up): Forth<'_>) {
        y.iter_mut().zip(gate).zip(up).for_each(|((y, g), u)| *y = g * sigmoid(*g) * u);
    }
}

struct SwigluGradients;

impl Work<Back<'_>> for SwigluGradients {
    type Output = ();

    #[inline(always)]
    fn run((d_gate, grad, gate, up): Back<'_>) {
        for (((d_gate, grad), gate), up) in d_gate.iter_mut().zip(grad).zip(gate).zip(up) {
            let s = sigmoid(*gate);
            *d_gate = *grad * up * s * (1.0 + gate * (1.0 - s));
            *grad *= gate * s;
        }
    }
}

#[inline(always)]
fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

#[cfg(test)]
mod tests {
    use super::super::check::{assert_close, gradients, random, random_tensor, tensor};
    use super::*;

    fn rotation(rows: usize) -> Rotation {
        let angles: Vec<f32> = (0..rows * 2).map(|i| i as f32 * 0.37).collect();
        let cos = angles.iter().map(|a| a.cos()).collect();
        Rotation { cos, sin: angles.iter().map(|a| a.sin()).collect(), head_dim: 4, dim: 4 }
    }

    fn rotated(x: &[f32]) -> Vec<f32> {
        let mut x = x.to_vec();
        rotation(5).forward(&mut x);
        x
    }

    #[test]
    fn forward_agrees_with_candle() {
        let (values, w) = (random(1, 40), random_tensor(2, &[8]));
        let x = tensor(&values, &[5, 8]);
        let norm = RmsNorm::new(&w, 1e-5).unwrap();
        assert_close(&norm.forward(&values), &candle_nn::ops::rms_norm(&x, &w, 1e-5).unwrap());
        let up = random(3, 40);
        let expected = (x.silu().unwrap() * tensor(&up, &[5, 8])).unwrap();
        assert_close(&swiglu(&values, &up), &expected);
        let expected = (x.gelu().unwrap() * tensor(&up, &[5, 8])).unwrap();
        assert_close(&geglu(&values, &up), &expected);
        let r = rotation(5);
        let (cos, sin) = (tensor(&r.cos, &[5, 2]), tensor(&r.sin, &[5, 2]));
        let heads = x.reshape((1, 5, 2, 4)).unwrap().transpose(1, 2).unwrap().contiguous().unwrap();
        let expected = candle_nn::rotary_emb::rope(&heads, &cos, &sin).unwrap();
        assert_close(&rotated(&values), &expected.transpose(1, 2).unwrap().contiguous().unwrap());
    }

    #[test]
    fn dimensions_past_the_rotated_ones_stay() {
        let angles = [0.3f32, 1.1, 2.0];
        let (cos, sin) = (angles.map(f32::cos).to_vec(), angles.map(f32::sin).to_vec());
        // Heads of 4 of which 2 rotate: three rows of two heads.
        let part = Rotation { cos, sin, head_dim: 4, dim: 2 };
        let x = random(1, 24);
        let mut turned = x.clone();
        part.forward(&mut turned);
        for (row, (x, turned)) in x.chunks(8).zip(turned.chunks(8)).enumerate() {
            let (s, c) = angles[row].sin_cos();
            for (x, turned) in x.chunks(4).zip(turned.chunks(4)) {
                let expected = [x[0] * c - x[1] * s, x[1] * c + x[0] * s, x[2], x[3]];
                assert!(turned.iter().zip(expected).all(|(t, e)| (t - e).abs() < 1e-6), "row {row}");
            }
        }
        part.backward(&mut turned);
        assert!(turned.iter().zip(&x).all(|(t, x)| (t - x).abs() < 1e-6));
    }

    #[test]
    fn backward_agrees_with_differences() {
        // A weight of 4 on rows of 8 is the per-head norm of Qwen3.
        let w = random_tensor(2, &[4]);
        let norm = RmsNorm::new(&w, 1e-5).unwrap();
        let norm_backward = |t: &[Vec<f32>], grad: &[f32]| {
            let mut dx = vec![1.0; t[0].len()];
            norm.backward(&t[0], grad, &mut dx);
            vec![dx.iter().map(|v| v - 1.0).collect()]
        };
        gradients(&[random(1, 40)], |t| norm.forward(&t[0]), norm_backward);
        let rope_backward = |_: &[Vec<f32>], grad: &[f32]| {
            let mut dx = grad.to_vec();
            rotation(5).backward(&mut dx);
            vec![dx]
        };
        gradients(&[random(1, 40)], |t| rotated(&t[0]), rope_backward);
        let swiglu_backward = |t: &[Vec<f32>], grad: &[f32]| {
            let (gate, up) = swiglu_backward(&t[0], &t[1], grad.to_vec());
            vec![gate, up]
        };
        gradients(&[random(1, 40), random(3, 40)], |t| swiglu(&t[0], &t[1]), swiglu_backward);
        let geglu_backward = |t: &[Vec<f32>], grad: &[f32]| {
            let (gate, up) = geglu_backward(&t[0], &t[1], grad.to_vec());
            vec![gate, up]
        };
        gradients(&[random(1, 40), random(3, 40)], |t| geglu(&t[0], &t[1]), geglu_backward);
    }
}
