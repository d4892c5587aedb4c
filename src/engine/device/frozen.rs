//! Multiplication by a weight that nothing trains.
//!
//! candle's matrix product makes the gradient of both sides on its way back, and would keep one as large as the model for
//! weights that nobody asks about. As an op of its own it goes through the same kernels of the device and makes one.

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CudaStorage, CustomOp2, Layout, MetalStorage, Result, Shape, Tensor};

/// Multiplies `[rows, in]` by the transpose of a frozen `[out, in]`.
struct Frozen;

impl Frozen {
    fn product<S: BackendStorage>(x: &S, x_layout: &Layout, weight: &S, weight_layout: &Layout) -> Result<(S, Shape)> {
        let (rows, ins) = x_layout.shape().dims2()?;
        let (outs, _) = weight_layout.shape().dims2()?;
        let transposed = weight_layout.transpose(0, 1)?;
        Ok((x.matmul(weight, (1, rows, outs, ins), x_layout, &transposed)?, Shape::from((rows, outs))))
    }
}

impl CustomOp2 for Frozen {
    fn name(&self) -> &'static str {
        "frozen-linear"
    }

    fn cpu_fwd(&self, x: &CpuStorage, xl: &Layout, w: &CpuStorage, wl: &Layout) -> Result<(CpuStorage, Shape)> {
        Self::product(x, xl, w, wl)
    }

    fn cuda_fwd(&self, x: &CudaStorage, xl: &Layout, w: &CudaStorage, wl: &Layout) -> Result<(CudaStorage, Shape)> {
        Self::product(x, xl, w, wl)
    }

    fn metal_fwd(&self, x: &MetalStorage, xl: &Layout, w: &MetalStorage, wl: &Layout) -> Result<(MetalStorage, Shape)> {
        Self::product(x, xl, w, wl)
    }

    fn bwd(&self, _: &Tensor, w: &Tensor, _: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        Ok((Some(grad.contiguous()?.matmul(w)?), None))
    }
}

/// Returns `x` `[rows, in]` times the transpose of `weight` `[out, in]`, in their common precision. Only `x` gets a gradient.
pub(super) fn product(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    x.contiguous()?.apply_op2(weight, Frozen)
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};

    use super::*;

    fn matrix(rows: usize, columns: usize, seed: f64) -> Tensor {
        let values: Vec<f32> = (0..rows * columns).map(|i| ((i as f64 * 0.7 + seed).sin()) as f32).collect();
        Tensor::from_vec(values, (rows, columns), &Device::Cpu).unwrap()
    }

    #[test]
    fn it_is_candle_s_product_and_only_the_rows_get_a_gradient() {
        let x = Var::from_tensor(&matrix(5, 6, 0.1)).unwrap();
        // Also a weight that is some rows of a larger one.
        let weight = matrix(9, 6, 0.4).narrow(0, 2, 4).unwrap();
        let (ours, theirs) = (product(&x, &weight).unwrap(), x.matmul(&weight.t().unwrap()).unwrap());
        assert_eq!(ours.to_vec2::<f32>().unwrap(), theirs.to_vec2::<f32>().unwrap());
        let gradients = |y: &Tensor| {
            let grads = y.sqr().unwrap().sum_all().unwrap().backward().unwrap();
            (grads.get(&x).unwrap().to_vec2::<f32>().unwrap(), grads.get_ids().count())
        };
        let (ours, theirs) = (gradients(&ours), gradients(&theirs));
        assert_eq!(ours.0, theirs.0);
        assert_eq!((ours.1, theirs.1), (1, 2), "candle's own also has one of the weight");
    }
}
