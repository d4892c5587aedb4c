//! RMS norm, rotary position embedding and SwiGLU, row by row on all threads.

use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp1, CustomOp2, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use super::{Values, dot, exp, output, tensor, values};

/// Rows per parallel task: enough work to pay for the hand-over.
const ROWS: usize = 16;

/// Scales each row of `weight.len()` values of `x` to unit mean square, times the frozen `weight`.
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    x.apply_op1(RmsNorm { weight: weight.clone(), eps: eps as f32 })
}

struct RmsNorm {
    weight: Tensor,
    eps: f32,
}

impl RmsNorm {
    fn inverse_rms(&self, x: &[f32]) -> f32 {
        let mean = dot(x, x) / x.len() as f32;
        1.0 / (mean + self.eps).sqrt()
    }
}

impl CustomOp1 for RmsNorm {
    fn name(&self) -> &'static str {
        "rms-norm"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = values(x, layout)?;
        let weight = Values::of(&self.weight)?;
        let n = divides(weight.len(), x.len())?;
        let weight = &weight[..];
        let mut y = vec![0.0; x.len()];
        y.par_chunks_mut(n * ROWS).zip(x.par_chunks(n * ROWS)).for_each(|(y, x)| {
            for (y, x) in y.chunks_exact_mut(n).zip(x.chunks_exact(n)) {
                let r = self.inverse_rms(x);
                y.iter_mut().zip(x).zip(weight).for_each(|((y, x), w)| *y = x * r * w);
            }
        });
        output(y, layout.shape().clone())
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let grad = grad.contiguous()?;
        let (xs, gs, weight) = (Values::of(x)?, Values::of(&grad)?, Values::of(&self.weight)?);
        let n = divides(weight.len(), xs.len())?;
        let (xs, gs, weight) = (&xs[..], &gs[..], &weight[..]);
        let mut dx = vec![0.0; xs.len()];
        let chunks = xs.par_chunks(n * ROWS).zip(gs.par_chunks(n * ROWS));
        dx.par_chunks_mut(n * ROWS).zip(chunks).for_each(|(dx, (x, g))| {
            for ((dx, x), g) in dx.chunks_exact_mut(n).zip(x.chunks_exact(n)).zip(g.chunks_exact(n)) {
                let r = self.inverse_rms(x);
                dx.iter_mut().zip(g).zip(weight).for_each(|((dx, g), w)| *dx = g * w);
                let c = dot(x, dx) * r * r * r / n as f32;
                dx.iter_mut().zip(x).for_each(|(dx, x)| *dx = *dx * r - x * c);
            }
        });
        Ok(Some(tensor(dx, x.dims())?))
    }
}

/// Cosines and sines of the rows of one packed batch, `[rows, head_dim / 2]` each, by the position of each row.
#[derive(Clone)]
pub struct Rotation {
    pub cos: Arc<[f32]>,
    pub sin: Arc<[f32]>,
    pub head_dim: usize,
}

/// Rotates the heads of `x`, `[rows, heads * head_dim]`, in the rotate-half order of Hugging Face.
pub fn rope(x: &Tensor, rotation: &Rotation) -> Result<Tensor> {
    x.apply_op1(Rope(rotation.clone()))
}

struct Rope(Rotation);

impl Rope {
    /// Rotates by the angle times `sign`.
    fn rotate(&self, x: &[f32], rows: usize, sign: f32) -> Result<Vec<f32>> {
        let Rotation { cos, sin, head_dim } = &self.0;
        let half = head_dim / 2;
        if rows == 0 || cos.len() != rows * half || sin.len() != cos.len() || x.len() % (rows * head_dim) != 0 {
            bail!("{} angles do not fit {} values in {rows} rows of heads of {head_dim}", cos.len(), x.len());
        }
        let width = x.len() / rows;
        let mut y = vec![0.0; x.len()];
        y.par_chunks_mut(width).zip(x.par_chunks(width)).enumerate().with_min_len(ROWS).for_each(|(row, (y, x))| {
            let (cos, sin) = (&cos[row * half..][..half], &sin[row * half..][..half]);
            for (y, x) in y.chunks_exact_mut(*head_dim).zip(x.chunks_exact(*head_dim)) {
                let ((y1, y2), (x1, x2)) = (y.split_at_mut(half), x.split_at(half));
                for i in 0..half {
                    let s = sin[i] * sign;
                    y1[i] = x1[i] * cos[i] - x2[i] * s;
                    y2[i] = x2[i] * cos[i] + x1[i] * s;
                }
            }
        });
        Ok(y)
    }
}

impl CustomOp1 for Rope {
    fn name(&self) -> &'static str {
        "rope"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let rows = layout.dims().first().copied().unwrap_or(0);
        output(self.rotate(values(x, layout)?, rows, 1.0)?, layout.shape().clone())
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let grad = grad.contiguous()?;
        let dx = self.rotate(&Values::of(&grad)?, x.dim(0)?, -1.0)?;
        Ok(Some(tensor(dx, x.dims())?))
    }
}

/// Returns `silu(gate) * up`.
pub fn swiglu(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    gate.apply_op2(up, SwiGlu)
}

struct SwiGlu;

const VALUES: usize = 1 << 14;

#[inline(always)]
fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

impl CustomOp2 for SwiGlu {
    fn name(&self) -> &'static str {
        "swiglu"
    }

    fn cpu_fwd(&self, gate: &CpuStorage, l: &Layout, up: &CpuStorage, l2: &Layout) -> Result<(CpuStorage, Shape)> {
        let (gate, up) = (values(gate, l)?, values(up, l2)?);
        let mut y = vec![0.0; gate.len()];
        let chunks = gate.par_chunks(VALUES).zip(up.par_chunks(VALUES));
        y.par_chunks_mut(VALUES).zip(chunks).for_each(|(y, (gate, up))| {
            y.iter_mut().zip(gate).zip(up).for_each(|((y, g), u)| *y = g * sigmoid(*g) * u);
        });
        output(y, l.shape().clone())
    }

    fn bwd(&self, gate: &Tensor, up: &Tensor, _y: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let grad = grad.contiguous()?;
        let (gates, ups, grads) = (Values::of(gate)?, Values::of(up)?, Values::of(&grad)?);
        let (mut d_gate, mut d_up) = (vec![0.0; gates.len()], vec![0.0; gates.len()]);
        let inputs = gates.par_chunks(VALUES).zip(ups.par_chunks(VALUES)).zip(grads.par_chunks(VALUES));
        let outputs = d_gate.par_chunks_mut(VALUES).zip(d_up.par_chunks_mut(VALUES));
        outputs.zip(inputs).for_each(|((d_gate, d_up), ((gate, up), grad))| {
            for i in 0..d_gate.len().min(gate.len()).min(up.len()).min(grad.len()) {
                let s = sigmoid(gate[i]);
                d_up[i] = grad[i] * gate[i] * s;
                d_gate[i] = grad[i] * up[i] * s * (1.0 + gate[i] * (1.0 - s));
            }
        });
        Ok((Some(tensor(d_gate, gate.dims())?), Some(tensor(d_up, up.dims())?)))
    }
}

fn divides(n: usize, len: usize) -> Result<usize> {
    if n == 0 || !len.is_multiple_of(n) {
        bail!("rows of {n} values do not divide {len} values");
    }
    Ok(n)
}

#[cfg(test)]
mod tests {
    use super::super::check::{gradients, random};
    use super::*;

    fn close(a: &Tensor, b: &Tensor) {
        let d = (a - b).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap();
        assert!(d.to_scalar::<f32>().unwrap() < 1e-6, "{a} {b}");
    }

    fn rotation(rows: usize) -> Rotation {
        let angles: Vec<f32> = (0..rows * 2).map(|i| i as f32 * 0.37).collect();
        let cos = angles.iter().map(|a| a.cos()).collect();
        Rotation { cos, sin: angles.iter().map(|a| a.sin()).collect(), head_dim: 4 }
    }

    #[test]
    fn forward_agrees_with_candle() {
        let (x, w) = (random(1, &[5, 8]), random(2, &[8]));
        close(&rms_norm(&x, &w, 1e-5).unwrap(), &candle_nn::ops::rms_norm(&x, &w, 1e-5).unwrap());
        let up = random(3, &[5, 8]);
        close(&swiglu(&x, &up).unwrap(), &(x.silu().unwrap() * &up).unwrap());
        let r = rotation(5);
        let cos = Tensor::new(&r.cos[..], x.device()).unwrap().reshape((5, 2)).unwrap();
        let sin = Tensor::new(&r.sin[..], x.device()).unwrap().reshape((5, 2)).unwrap();
        let heads = x.reshape((1, 5, 2, 4)).unwrap().transpose(1, 2).unwrap().contiguous().unwrap();
        let expected = candle_nn::rotary_emb::rope(&heads, &cos, &sin).unwrap();
        let expected = expected.transpose(1, 2).unwrap().contiguous().unwrap().reshape((5, 8)).unwrap();
        close(&rope(&x, &r).unwrap(), &expected);
    }

    #[test]
    fn backward_agrees_with_differences() {
        let w = random(2, &[4]);
        // A weight of 4 on rows of 8 is the per-head norm of Qwen3.
        gradients(&[random(1, &[5, 8])], |t| rms_norm(&t[0], &w, 1e-5));
        gradients(&[random(1, &[5, 8])], |t| rope(&t[0], &rotation(5)));
        gradients(&[random(1, &[5, 8]), random(3, &[5, 8])], |t| swiglu(&t[0], &t[1]));
    }
}
