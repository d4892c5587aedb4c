//! Linear layers whose weight is frozen: `y = x W^T + b`, and with a LoRA pair `y = x W^T + b + s (x A^T) B^T`.

use candle_core::{Result, Tensor, bail};

use super::Values;
use super::mat::{Into, Mat, MatMut, Threads, multiply};
use crate::engine::error::EngineError;
use crate::engine::matmul::rounded::Rounded;

/// A frozen weight `[out, in]` and its bias `[out]`.
pub struct Frozen<'a> {
    weight: Values<'a>,
    rounded: Option<&'a BothWays>,
    bias: Option<Values<'a>>,
    outs: usize,
    ins: usize,
}

/// A frozen weight rounded to 16 bits, for the product of each pass.
pub(crate) struct BothWays {
    /// For `x W^T`.
    forth: Rounded<2>,
    /// For `grad W`.
    back: Rounded<2>,
}

impl BothWays {
    pub(crate) fn new(weight: &Tensor) -> std::result::Result<Self, EngineError> {
        Ok(BothWays { forth: Rounded::new(&[weight])?, back: Rounded::new(&[&weight.t()?.contiguous()?])? })
    }
}

/// The values of a frozen weight `[outs, ins]`, and how it is multiplied: as they are, or rounded.
#[derive(Clone, Copy)]
pub(crate) struct Weight<'a> {
    pub(crate) values: &'a [f32],
    pub(crate) rounded: Option<&'a BothWays>,
    pub(crate) outs: usize,
    pub(crate) ins: usize,
}

impl Weight<'_> {
    /// Writes or adds `x W^T`, a forward pass's product.
    pub(crate) fn forth(self, x: &[f32], y: &mut [f32], into: Into) -> Result<()> {
        let Some(rounded) = self.rounded else {
            let (rows, weight) = (x.len() / self.ins, Mat::new(self.values, self.outs, self.ins)?);
            let (x, y) = (Mat::new(x, rows, self.ins)?, MatMut::new(y, rows, self.outs)?);
            return multiply(y, into, 1.0, x, weight.t(), Threads::All);
        };
        rounded.forth.multiply(x, y, into);
        Ok(())
    }

    /// Writes or adds `grad W`, a backward pass's product.
    pub(crate) fn back(self, grad: &[f32], dx: &mut [f32], into: Into) -> Result<()> {
        let Some(rounded) = self.rounded else {
            let (rows, weight) = (grad.len() / self.outs, Mat::new(self.values, self.outs, self.ins)?);
            let (grad, dx) = (Mat::new(grad, rows, self.outs)?, MatMut::new(dx, rows, self.ins)?);
            return multiply(dx, into, 1.0, grad, weight, Threads::All);
        };
        rounded.back.multiply(grad, dx, into);
        Ok(())
    }
}

/// A LoRA pair: `a` is `[rank, in]`, `b` `[out, rank]`.
#[derive(Clone, Copy)]
pub struct Pair<'a> {
    pub a: &'a [f32],
    pub b: &'a [f32],
    pub rank: usize,
    pub scale: f32,
}

/// Where the gradients of a pair are added up.
pub struct PairGradient<'a> {
    pub a: &'a mut [f32],
    pub b: &'a mut [f32],
}

impl<'a> Frozen<'a> {
    /// Borrows the tensors of a layer.
    pub fn new(weight: &'a Tensor, bias: Option<&'a Tensor>) -> Result<Self> {
        let (outs, ins) = weight.dims2()?;
        let bias = bias.map(Values::of).transpose()?;
        if ins == 0 || bias.as_ref().is_some_and(|bias| bias.len() != outs) {
            bail!("a linear layer of {ins} inputs and {outs} outputs has a bias of another width");
        }
        Ok(Frozen { weight: Values::of(weight)?, rounded: None, bias, outs, ins })
    }

    /// Multiplies by the weight as it was rounded.
    pub(crate) fn rounded(mut self, rounded: Option<&'a BothWays>) -> Self {
        self.rounded = rounded;
        self
    }

    /// Applies the layer to rows of inputs.
    pub fn forward(&self, x: &[f32], pair: Option<Pair>) -> Result<Vec<f32>> {
        let rows = x.len() / self.ins;
        let mut y = vec![0.0; rows * self.outs];
        let mut into = Into::Fresh;
        if let Some(bias) = &self.bias {
            y.chunks_exact_mut(self.outs).for_each(|row| row.copy_from_slice(bias));
            into = Into::Sum;
        }
        self.weight().forth(x, &mut y, into)?;
        let x = Mat::new(x, rows, self.ins)?;
        if let Some(pair) = pair {
            let (down, b) = (self.down(x, rows, pair)?, Mat::new(pair.b, self.outs, pair.rank)?);
            let down = Mat::new(&down, rows, pair.rank)?;
            multiply(MatMut::new(&mut y, rows, self.outs)?, Into::Sum, pair.scale, down, b.t(), Threads::All)?;
        }
        Ok(y)
    }

    /// Writes or adds the gradient of the inputs to `dx` where it is wanted, and adds that of the pair where there is
    /// one.
    pub fn backward(
        &self,
        x: &[f32],
        grad: &[f32],
        pair: Option<(Pair, PairGradient)>,
        dx: Option<(&mut [f32], Into)>,
    ) -> Result<()> {
        let rows = x.len() / self.ins;
        let (x, values, grad) = (Mat::new(x, rows, self.ins)?, grad, Mat::new(grad, rows, self.outs)?);
        let mut through = None;
        if let Some((pair, sums)) = pair {
            let (down, b) = (self.down(x, rows, pair)?, Mat::new(pair.b, self.outs, pair.rank)?);
            let down = Mat::new(&down, rows, pair.rank)?;
            let db = MatMut::new(sums.b, self.outs, pair.rank)?;
            multiply(db, Into::Sum, pair.scale, grad.t(), down, Threads::All)?;
            let mut t = vec![0.0; rows * pair.rank];
            multiply(MatMut::new(&mut t, rows, pair.rank)?, Into::Fresh, pair.scale, grad, b, Threads::All)?;
            let da = MatMut::new(sums.a, pair.rank, self.ins)?;
            multiply(da, Into::Sum, 1.0, Mat::new(&t, rows, pair.rank)?.t(), x, Threads::All)?;
            through = Some((pair, t));
        }
        let Some((dx, into)) = dx else { return Ok(()) };
        self.weight().back(values, dx, into)?;
        if let Some((pair, t)) = through {
            let (t, a) = (Mat::new(&t, rows, pair.rank)?, Mat::new(pair.a, pair.rank, self.ins)?);
            multiply(MatMut::new(dx, rows, self.ins)?, Into::Sum, 1.0, t, a, Threads::All)?;
        }
        Ok(())
    }

    fn weight(&self) -> Weight<'_> {
        Weight { values: &self.weight, rounded: self.rounded, outs: self.outs, ins: self.ins }
    }

    /// Returns `x A^T`, `[rows, rank]`: cheaper to make again in the backward pass than to keep.
    fn down(&self, x: Mat, rows: usize, pair: Pair) -> Result<Vec<f32>> {
        let mut down = vec![0.0; rows * pair.rank];
        let a = Mat::new(pair.a, pair.rank, self.ins)?;
        multiply(MatMut::new(&mut down, rows, pair.rank)?, Into::Fresh, 1.0, x, a.t(), Threads::All)?;
        Ok(down)
    }
}

#[cfg(test)]
mod tests {
    use super::super::check::{assert_close, gradients, random, random_tensor, tensor};
    use super::*;

    fn pair<'a>(a: &'a [f32], b: &'a [f32]) -> Pair<'a> {
        Pair { a, b, rank: 2, scale: 1.5 }
    }

    #[test]
    fn forward_agrees_with_candle() {
        let (x, a, b) = (random(3, 7 * 6), random(4, 2 * 6), random(5, 5 * 2));
        let (weight, bias) = (random_tensor(1, &[5, 6]), random_tensor(2, &[5]));
        let layer = Frozen::new(&weight, Some(&bias)).unwrap();
        let (tx, ta, tb) = (tensor(&x, &[7, 6]), tensor(&a, &[2, 6]), tensor(&b, &[5, 2]));
        let base = tx.matmul(&weight.t().unwrap()).unwrap().broadcast_add(&bias).unwrap();
        let update = tx.matmul(&ta.t().unwrap()).unwrap().matmul(&tb.t().unwrap()).unwrap();
        assert_close(&layer.forward(&x, None).unwrap(), &base);
        let expected = (base + (update * 1.5).unwrap()).unwrap();
        assert_close(&layer.forward(&x, Some(pair(&a, &b))).unwrap(), &expected);
    }

    #[test]
    fn backward_agrees_with_differences() {
        let (weight, bias) = (random_tensor(1, &[5, 6]), random_tensor(2, &[5]));
        let layer = Frozen::new(&weight, Some(&bias)).unwrap();
        gradients(
            &[random(3, 7 * 6), random(4, 2 * 6), random(5, 5 * 2)],
            |t| layer.forward(&t[0], Some(pair(&t[1], &t[2]))).unwrap(),
            |t, grad| {
                // Gradients are added to what is there already.
                let (mut dx, mut da, mut db) = (vec![1.0; 42], vec![1.0; 12], vec![1.0; 10]);
                let sums = PairGradient { a: &mut da, b: &mut db };
                let into = Some((&mut dx[..], Into::Sum));
                layer.backward(&t[0], grad, Some((pair(&t[1], &t[2]), sums)), into).unwrap();
                [dx, da, db].map(|d| d.iter().map(|v| v - 1.0).collect()).to_vec()
            },
        );
        gradients(
            &[random(3, 7 * 6)],
            |t| layer.forward(&t[0], None).unwrap(),
            |t, grad| {
                let mut dx = vec![9.0; 42];
                layer.backward(&t[0], grad, None, Some((&mut dx, Into::Fresh))).unwrap();
                vec![dx]
            },
        );
    }
}
