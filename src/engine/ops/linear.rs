//! Linear layers whose weight is frozen: `y = x W^T + b`, and with a LoRA pair `y = x W^T + b + s (x A^T) B^T`.
//!
//! candle's matmul would make and keep a gradient for the frozen weight, half as much work again. Here the weight is no
//! argument of the op at all.

use candle_core::{CpuStorage, CustomOp1, CustomOp3, Layout, Result, Shape, Tensor, bail};

use super::mat::{Into, Mat, MatMut, Threads, multiply};
use super::{Values, output, tensor, values};

/// A frozen weight `[out, in]` and its bias `[out]`.
#[derive(Clone)]
pub struct Frozen {
    pub weight: Tensor,
    pub bias: Option<Tensor>,
}

impl Frozen {
    /// Applies the layer to `x`, `[rows, in]`; the gradient flows to `x` only.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        x.apply_op1(self.clone())
    }

    /// Applies the layer with a trainable pair `a`, `[rank, in]`, and `b`, `[out, rank]`.
    pub fn forward_lora(&self, x: &Tensor, a: &Tensor, b: &Tensor, scale: f64) -> Result<Tensor> {
        let rank = a.dim(0)?;
        x.apply_op3(a, b, WithLora { frozen: self.clone(), rank, scale: scale as f32 })
    }

    fn sizes(&self, x_len: usize) -> Result<(usize, usize, usize)> {
        let (outs, ins) = self.weight.dims2()?;
        if ins == 0 || x_len % ins != 0 {
            bail!("a linear layer of {ins} inputs cannot take {x_len} values");
        }
        Ok((x_len / ins, outs, ins))
    }

    fn apply(&self, x: &[f32]) -> Result<Vec<f32>> {
        let (rows, outs, ins) = self.sizes(x.len())?;
        let mut y = vec![0.0; rows * outs];
        let weight = Values::of(&self.weight)?;
        let mut into = Into::Fresh;
        if let Some(bias) = &self.bias {
            let bias = Values::of(bias)?;
            y.chunks_exact_mut(outs).for_each(|row| row.copy_from_slice(&bias));
            into = Into::Sum;
        }
        let (x, w) = (Mat::new(x, rows, ins)?, Mat::new(&weight, outs, ins)?);
        multiply(MatMut::new(&mut y, rows, outs)?, into, 1.0, x, w.t(), Threads::All)?;
        Ok(y)
    }

    /// Returns `grad W`: the gradient of the input.
    fn input_gradient(&self, grad: &[f32], rows: usize) -> Result<Vec<f32>> {
        let (outs, ins) = self.weight.dims2()?;
        let mut dx = vec![0.0; rows * ins];
        let weight = Values::of(&self.weight)?;
        let (g, w) = (Mat::new(grad, rows, outs)?, Mat::new(&weight, outs, ins)?);
        multiply(MatMut::new(&mut dx, rows, ins)?, Into::Fresh, 1.0, g, w, Threads::All)?;
        Ok(dx)
    }
}

impl CustomOp1 for Frozen {
    fn name(&self) -> &'static str {
        "frozen-linear"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let y = self.apply(values(x, layout)?)?;
        let outs = self.weight.dim(0)?;
        let rows = y.len() / outs;
        output(y, (rows, outs))
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let grad = grad.contiguous()?;
        let dx = self.input_gradient(&Values::of(&grad)?, x.dim(0)?)?;
        Ok(Some(tensor(dx, x.dims())?))
    }
}

struct WithLora {
    frozen: Frozen,
    rank: usize,
    scale: f32,
}

impl WithLora {
    /// Returns `x A^T`, `[rows, rank]`: cheaper to make again in the backward pass than to keep.
    fn down(&self, x: Mat, a: Mat, rows: usize) -> Result<Vec<f32>> {
        let mut u = vec![0.0; rows * self.rank];
        multiply(MatMut::new(&mut u, rows, self.rank)?, Into::Fresh, 1.0, x, a.t(), Threads::All)?;
        Ok(u)
    }
}

impl CustomOp3 for WithLora {
    fn name(&self) -> &'static str {
        "lora-linear"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        a: &CpuStorage,
        a_layout: &Layout,
        b: &CpuStorage,
        b_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let x = values(x, x_layout)?;
        let (rows, outs, ins) = self.frozen.sizes(x.len())?;
        let mut y = self.frozen.apply(x)?;
        let a = Mat::new(values(a, a_layout)?, self.rank, ins)?;
        let b = Mat::new(values(b, b_layout)?, outs, self.rank)?;
        let u = self.down(Mat::new(x, rows, ins)?, a, rows)?;
        let u = Mat::new(&u, rows, self.rank)?;
        multiply(MatMut::new(&mut y, rows, outs)?, Into::Sum, self.scale, u, b.t(), Threads::All)?;
        output(y, (rows, outs))
    }

    fn bwd(&self, x: &Tensor, a: &Tensor, b: &Tensor, _y: &Tensor, grad: &Tensor) -> Result<Grads> {
        let grad = grad.contiguous()?;
        let (x_values, a_values, b_values) = (Values::of(x)?, Values::of(a)?, Values::of(b)?);
        let grad_values = Values::of(&grad)?;
        let (rows, outs, ins) = self.frozen.sizes(x_values.len())?;
        let g = Mat::new(&grad_values, rows, outs)?;
        let (x_mat, a_mat) = (Mat::new(&x_values, rows, ins)?, Mat::new(&a_values, self.rank, ins)?);

        let u = self.down(x_mat, a_mat, rows)?;
        let mut db = vec![0.0; outs * self.rank];
        let u = Mat::new(&u, rows, self.rank)?;
        multiply(MatMut::new(&mut db, outs, self.rank)?, Into::Fresh, self.scale, g.t(), u, Threads::All)?;

        let mut t = vec![0.0; rows * self.rank];
        let b_mat = Mat::new(&b_values, outs, self.rank)?;
        multiply(MatMut::new(&mut t, rows, self.rank)?, Into::Fresh, self.scale, g, b_mat, Threads::All)?;
        let t = Mat::new(&t, rows, self.rank)?;
        let mut da = vec![0.0; self.rank * ins];
        multiply(MatMut::new(&mut da, self.rank, ins)?, Into::Fresh, 1.0, t.t(), x_mat, Threads::All)?;

        // The first layer's input is an embedding that nothing trains: its gradient would be thrown away.
        let mut dx = None;
        if x.track_op() {
            let mut values = self.frozen.input_gradient(&grad_values, rows)?;
            multiply(MatMut::new(&mut values, rows, ins)?, Into::Sum, 1.0, t, a_mat, Threads::All)?;
            dx = Some(tensor(values, x.dims())?);
        }
        Ok((dx, Some(tensor(da, a.dims())?), Some(tensor(db, b.dims())?)))
    }
}

type Grads = (Option<Tensor>, Option<Tensor>, Option<Tensor>);

#[cfg(test)]
mod tests {
    use super::super::check::{gradients, random};
    use super::*;

    fn layer() -> Frozen {
        Frozen { weight: random(1, &[5, 6]), bias: Some(random(2, &[5])) }
    }

    #[test]
    fn forward_agrees_with_plain_ops() {
        let (x, a, b) = (random(3, &[7, 6]), random(4, &[2, 6]), random(5, &[5, 2]));
        let layer = layer();
        let base = x.matmul(&layer.weight.t().unwrap()).unwrap();
        let base = base.broadcast_add(layer.bias.as_ref().unwrap()).unwrap();
        let update = x.matmul(&a.t().unwrap()).unwrap().matmul(&b.t().unwrap()).unwrap();
        let expected = (&base + (update * 1.5).unwrap()).unwrap();
        let found = layer.forward_lora(&x, &a, &b, 1.5).unwrap();
        let difference = |a: &Tensor, b: &Tensor| {
            let d = (a - b).unwrap().abs().unwrap().flatten_all().unwrap();
            d.max(0).unwrap().to_scalar::<f32>().unwrap()
        };
        assert!(difference(&found, &expected) < 1e-5);
        assert!(difference(&layer.forward(&x).unwrap(), &base) < 1e-5);
    }

    #[test]
    fn backward_agrees_with_differences() {
        let layer = layer();
        gradients(&[random(3, &[7, 6])], |t| layer.forward(&t[0]));
        let inputs = [random(3, &[7, 6]), random(4, &[2, 6]), random(5, &[5, 2])];
        gradients(&inputs, |t| layer.forward_lora(&t[0], &t[1], &t[2], 1.5));
    }
}
