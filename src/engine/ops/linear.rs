//! Linear layers whose weight is frozen: `y = x W^T + b`, and with a LoRA pair `y = x W^T + b + s (x A^T) B^T`.

use std::borrow::Cow;

use candle_core::Tensor;

use super::dropout::Dropout;
use super::mat::{Digits, Into, Mat, MatMut, Threads, multiply, multiply_digits};
use super::{Values, zeros};
use crate::engine::error::EngineError;
use crate::engine::held::{Held, Stored};
use crate::engine::matmul::rounded::Rounded;

type Found<T> = Result<T, EngineError>;

/// A frozen weight `[out, in]` and its bias `[out]`.
pub struct Frozen<'a> {
    weight: Weight<'a>,
    bias: Option<Values<'a>>,
}

/// A frozen weight rounded to 16 bits, for the product of each pass.
pub(crate) struct BothWays {
    /// For `x W^T`.
    forth: Rounded<2>,
    /// For `grad W`.
    back: Rounded<2>,
}

impl BothWays {
    pub(crate) fn new(weight: &Held) -> Found<Self> {
        let weight = weight.tensor()?;
        Ok(BothWays { forth: Rounded::new(&[&weight])?, back: Rounded::new(&[&weight.t()?.contiguous()?])? })
    }
}

/// How products with a frozen weight are made.
#[derive(Clone, Copy)]
pub(crate) enum Products<'a> {
    /// Of the weight as it is held, by so much of each number.
    Of(Digits),
    /// Of a rounded copy.
    Rounded(&'a BothWays),
}

/// A frozen weight `[outs, ins]`, by how it is multiplied.
pub(crate) struct Weight<'a> {
    form: Form<'a>,
    pub(crate) outs: usize,
    pub(crate) ins: usize,
}

enum Form<'a> {
    /// As it is.
    Wide(Values<'a>, Digits),
    /// As it is, widened some rows at a time.
    Stored(&'a Stored, Digits),
    Rounded(&'a BothWays),
}

impl<'a> Weight<'a> {
    /// Borrows a matrix.
    pub(crate) fn new(held: &'a Held, products: Products<'a>) -> Found<Self> {
        let (outs, ins) = held.dims2()?;
        let form = match (held, products) {
            (_, Products::Rounded(rounded)) => Form::Rounded(rounded),
            (Held::Wide(tensor), Products::Of(digits)) => Form::Wide(Values::of(tensor)?, digits),
            (Held::Stored(stored), Products::Of(digits)) => Form::Stored(stored, digits),
        };
        Ok(Weight { form, outs, ins })
    }

    /// Writes or adds `x W^T`, a forward pass's product.
    pub(crate) fn forth(&self, x: &[f32], y: &mut [f32], into: Into) -> Found<()> {
        let (rows, outs, ins) = (x.len() / self.ins, self.outs, self.ins);
        match &self.form {
            Form::Rounded(rounded) => rounded.forth.multiply(x, y, into),
            Form::Wide(values, digits) => {
                let (x, y) = (Mat::new(x, rows, ins)?, MatMut::new(y, rows, outs)?);
                multiply_digits(y, into, 1.0, x, Mat::new(values, outs, ins)?.t(), *digits)?;
            }
            Form::Stored(stored, digits) => {
                for tile in stored.tiles().filter(|_| rows > 0) {
                    let values = stored.widened(tile.clone())?;
                    let part = MatMut::strided(&mut y[tile.start..], rows, tile.len(), outs)?;
                    let weight = Mat::new(&values, tile.len(), ins)?;
                    multiply_digits(part, into, 1.0, Mat::new(x, rows, ins)?, weight.t(), *digits)?;
                }
            }
        }
        Ok(())
    }

    /// Writes or adds `grad W`, a backward pass's product.
    pub(crate) fn back(&self, grad: &[f32], dx: &mut [f32], mut into: Into) -> Found<()> {
        let (rows, outs, ins) = (grad.len() / self.outs, self.outs, self.ins);
        match &self.form {
            Form::Rounded(rounded) => rounded.back.multiply(grad, dx, into),
            Form::Wide(values, digits) => {
                let (grad, dx) = (Mat::new(grad, rows, outs)?, MatMut::new(dx, rows, ins)?);
                multiply_digits(dx, into, 1.0, grad, Mat::new(values, outs, ins)?, *digits)?;
            }
            Form::Stored(stored, digits) => {
                for tile in stored.tiles().filter(|_| rows > 0) {
                    let values = stored.widened(tile.clone())?;
                    let part = Mat::strided(&grad[tile.start..], rows, tile.len(), outs)?;
                    let weight = Mat::new(&values, tile.len(), ins)?;
                    multiply_digits(MatMut::new(dx, rows, ins)?, into, 1.0, part, weight, *digits)?;
                    into = Into::Sum;
                }
            }
        }
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
    /// What the pair does not see of its inputs.
    pub dropout: Option<Dropout<'a>>,
}

impl Pair<'_> {
    /// Returns the inputs as the pair sees them.
    fn sees<'x>(&self, x: &'x [f32]) -> Cow<'x, [f32]> {
        let Some(dropout) = self.dropout else { return Cow::Borrowed(x) };
        let mut seen = x.to_vec();
        dropout.apply(&mut seen);
        Cow::Owned(seen)
    }
}

/// Where the gradients of a pair are added up.
pub struct PairGradient<'a> {
    pub a: &'a mut [f32],
    pub b: &'a mut [f32],
}

impl<'a> Frozen<'a> {
    /// Borrows the weights of a layer.
    pub fn new(weight: &'a Held, bias: Option<&'a Tensor>) -> Found<Self> {
        Self::by(weight, bias, Products::Of(Digits::All))
    }

    /// Does the same, to multiply so.
    pub(crate) fn by(weight: &'a Held, bias: Option<&'a Tensor>, products: Products<'a>) -> Found<Self> {
        let weight = Weight::new(weight, products)?;
        let bias = bias.map(Values::of).transpose()?;
        if weight.ins == 0 || bias.as_ref().is_some_and(|bias| bias.len() != weight.outs) {
            let (ins, outs) = (weight.ins, weight.outs);
            let problem = format!("a linear layer of {ins} inputs and {outs} outputs has a bias of another width");
            return Err(EngineError::request(problem));
        }
        Ok(Frozen { weight, bias })
    }

    /// Applies the layer to rows of inputs.
    pub fn forward(&self, x: &[f32], pair: Option<Pair>) -> Found<Vec<f32>> {
        let (ins, outs) = (self.weight.ins, self.weight.outs);
        let rows = x.len() / ins;
        let mut y = zeros(rows * outs);
        let mut into = Into::Fresh;
        if let Some(bias) = &self.bias {
            y.chunks_exact_mut(outs).for_each(|row| row.copy_from_slice(bias));
            into = Into::Sum;
        }
        self.weight.forth(x, &mut y, into)?;
        if let Some(pair) = pair {
            let seen = pair.sees(x);
            let x = Mat::new(&seen, rows, ins)?;
            let (down, b) = (self.down(x, rows, pair)?, Mat::new(pair.b, outs, pair.rank)?);
            let down = Mat::new(&down, rows, pair.rank)?;
            multiply(MatMut::new(&mut y, rows, outs)?, Into::Sum, pair.scale, down, b.t(), Threads::All)?;
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
    ) -> Found<()> {
        let (ins, outs) = (self.weight.ins, self.weight.outs);
        let rows = x.len() / ins;
        let (values, grad) = (grad, Mat::new(grad, rows, outs)?);
        let mut through = None;
        if let Some((pair, sums)) = pair {
            let seen = pair.sees(x);
            let x = Mat::new(&seen, rows, ins)?;
            let (down, b) = (self.down(x, rows, pair)?, Mat::new(pair.b, outs, pair.rank)?);
            let down = Mat::new(&down, rows, pair.rank)?;
            let db = MatMut::new(sums.b, outs, pair.rank)?;
            multiply(db, Into::Sum, pair.scale, grad.t(), down, Threads::All)?;
            let mut t = vec![0.0; rows * pair.rank];
            multiply(MatMut::new(&mut t, rows, pair.rank)?, Into::Fresh, pair.scale, grad, b, Threads::All)?;
            let da = MatMut::new(sums.a, pair.rank, ins)?;
            multiply(da, Into::Sum, 1.0, Mat::new(&t, rows, pair.rank)?.t(), x, Threads::All)?;
            through = Some((pair, t));
        }
        let Some((dx, into)) = dx else { return Ok(()) };
        self.weight.back(values, dx, into)?;
        if let Some((pair, t)) = through {
            let (t, a) = (Mat::new(&t, rows, pair.rank)?, Mat::new(pair.a, pair.rank, ins)?);
            let Some(dropout) = pair.dropout else {
                return Ok(multiply(MatMut::new(dx, rows, ins)?, Into::Sum, 1.0, t, a, Threads::All)?);
            };
            let mut seen = vec![0.0; rows * ins];
            multiply(MatMut::new(&mut seen, rows, ins)?, Into::Fresh, 1.0, t, a, Threads::All)?;
            dropout.apply(&mut seen);
            dx.iter_mut().zip(seen).for_each(|(dx, seen)| *dx += seen);
        }
        Ok(())
    }

    /// Returns `x A^T`, `[rows, rank]`: cheaper to make again in the backward pass than to keep.
    fn down(&self, x: Mat, rows: usize, pair: Pair) -> Found<Vec<f32>> {
        let mut down = vec![0.0; rows * pair.rank];
        let a = Mat::new(pair.a, pair.rank, self.weight.ins)?;
        multiply(MatMut::new(&mut down, rows, pair.rank)?, Into::Fresh, 1.0, x, a.t(), Threads::All)?;
        Ok(down)
    }
}

#[cfg(test)]
mod tests {
    use candle_core::quantized::{GgmlDType, QTensor};

    use super::super::check::{assert_close, gradients, random, random_tensor, tensor};
    use super::super::dropout::{RowSeeds, row_seed};
    use super::*;

    fn pair<'a>(a: &'a [f32], b: &'a [f32]) -> Pair<'a> {
        Pair { a, b, rank: 2, scale: 1.5, dropout: None }
    }

    fn seeds() -> RowSeeds {
        RowSeeds { rate: 0.4, rows: (0..7).map(|row| row_seed(1, row)).collect() }
    }

    #[test]
    fn forward_agrees_with_candle() {
        let (x, a, b) = (random(3, 7 * 6), random(4, 2 * 6), random(5, 5 * 2));
        let (weight, bias) = (random_tensor(1, &[5, 6]), random_tensor(2, &[5]));
        let held = Held::from(weight.clone());
        let layer = Frozen::new(&held, Some(&bias)).unwrap();
        let (tx, ta, tb) = (tensor(&x, &[7, 6]), tensor(&a, &[2, 6]), tensor(&b, &[5, 2]));
        let base = tx.matmul(&weight.t().unwrap()).unwrap().broadcast_add(&bias).unwrap();
        let update = tx.matmul(&ta.t().unwrap()).unwrap().matmul(&tb.t().unwrap()).unwrap();
        assert_close(&layer.forward(&x, None).unwrap(), &base);
        let expected = (base + (update * 1.5).unwrap()).unwrap();
        assert_close(&layer.forward(&x, Some(pair(&a, &b))).unwrap(), &expected);
    }

    /// As PEFT has it: the frozen weight sees all inputs, the pair those that are left, enlarged.
    #[test]
    fn dropout_is_before_the_pair_alone() {
        let (x, a, b) = (random(3, 7 * 6), random(4, 2 * 6), random(5, 5 * 2));
        let (weight, seeds) = (random_tensor(1, &[5, 6]), seeds());
        let mut mask = vec![1.0; 7 * 6];
        seeds.of(4).apply(&mut mask);
        assert!(mask.contains(&0.0) && mask.iter().any(|m| (m - 1.0 / 0.6).abs() < 1e-6));
        let (tx, ta, tb) = (tensor(&x, &[7, 6]), tensor(&a, &[2, 6]), tensor(&b, &[5, 2]));
        let seen = (&tx * tensor(&mask, &[7, 6])).unwrap();
        let update = seen.matmul(&ta.t().unwrap()).unwrap().matmul(&tb.t().unwrap()).unwrap();
        let expected = (tx.matmul(&weight.t().unwrap()).unwrap() + (update * 1.5).unwrap()).unwrap();
        let dropping = Pair { dropout: Some(seeds.of(4)), ..pair(&a, &b) };
        let held = Held::from(weight);
        assert_close(&Frozen::new(&held, None).unwrap().forward(&x, Some(dropping)).unwrap(), &expected);
    }

    #[test]
    fn backward_agrees_with_differences() {
        let (weight, bias) = (random_tensor(1, &[5, 6]), random_tensor(2, &[5]));
        let held = Held::from(weight.clone());
        let layer = Frozen::new(&held, Some(&bias)).unwrap();
        let seeds = seeds();
        for dropout in [None, Some(seeds.of(4))] {
            gradients(
                &[random(3, 7 * 6), random(4, 2 * 6), random(5, 5 * 2)],
                |t| layer.forward(&t[0], Some(Pair { dropout, ..pair(&t[1], &t[2]) })).unwrap(),
                |t, grad| {
                    // Gradients are added to what is there already.
                    let (mut dx, mut da, mut db) = (vec![1.0; 42], vec![1.0; 12], vec![1.0; 10]);
                    let sums = PairGradient { a: &mut da, b: &mut db };
                    let into = Some((&mut dx[..], Into::Sum));
                    let pair = Pair { dropout, ..pair(&t[1], &t[2]) };
                    layer.backward(&t[0], grad, Some((pair, sums)), into).unwrap();
                    [dx, da, db].map(|d| d.iter().map(|v| v - 1.0).collect()).to_vec()
                },
            );
        }
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

    /// In several tiles, whose sums come in another order.
    #[test]
    fn a_stored_weight_gives_what_a_widened_one_gives() {
        let (outs, ins, rows) = (3 * (1 << 17) + 5, 32, 3);
        let wide = tensor(&random(1, outs * ins), &[outs, ins]);
        let stored = Held::stored(QTensor::quantize(&wide, GgmlDType::Q8_0).unwrap(), None).unwrap();
        let Held::Stored(tiled) = &stored else { panic!("stored") };
        assert_eq!(tiled.tiles().count(), 4);
        let wide = Held::from(stored.tensor().unwrap());
        let (x, grad) = (random(2, rows * ins), random(3, rows * outs));
        let run = |held: &Held| {
            let (mut y, mut dx) = (vec![1.0; rows * outs], vec![9.0; rows * ins]);
            let weight = Weight::new(held, Products::Of(Digits::All)).unwrap();
            weight.forth(&x, &mut y, Into::Sum).unwrap();
            weight.back(&grad, &mut dx, Into::Fresh).unwrap();
            [y, dx]
        };
        for (found, expected) in run(&stored).iter().zip(run(&wide)) {
            let largest = expected.iter().fold(0.0f32, |m, v| m.max(v.abs()));
            let off = found.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(off < 1e-5 * largest, "{off} of {largest}");
        }
    }
}
