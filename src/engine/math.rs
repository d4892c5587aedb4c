//! The small numeric loops of the decoder, written so that the compiler makes vectors of them.
//!
//! `pulp` compiles what is inlined into a `with_simd` once for every instruction set and picks at run time. Inlining
//! must be forced: what is left as a call, a closure for example, is compiled for the oldest processor.

use pulp::{Arch, Simd, WithSimd};

/// Returns e^x to within two units in the last place, for x from -87 up; below it returns 0.
///
/// The standard library's `exp` is a call per number. This one is plain arithmetic: 2^n times a polynomial on
/// [-ln 2 / 2, ln 2 / 2].
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    const MAGIC: f32 = 12_582_912.0; // 1.5 * 2^23: adding it rounds to an integer that lies in the low bits.
    let clamped = x.clamp(-87.0, 88.0);
    let shifted = clamped.mul_add(std::f32::consts::LOG2_E, MAGIC);
    let n = shifted - MAGIC;
    let r = n.mul_add(-0.693_359_4, clamped);
    let r = n.mul_add(2.121_944_4e-4, r);
    let p = 1.987_569_1e-4f32;
    let p = p.mul_add(r, 1.398_199_9e-3);
    let p = p.mul_add(r, 8.333_452e-3);
    let p = p.mul_add(r, 4.166_579_6e-2);
    let p = p.mul_add(r, 1.666_666_5e-1);
    let p = p.mul_add(r, 5e-1);
    let p = (p * r).mul_add(r, r) + 1.0;
    let power = f32::from_bits((shifted.to_bits() << 23).wrapping_add(127 << 23));
    if x < -87.0 { 0.0 } else { p * power }
}

/// Returns the largest value.
#[inline(always)]
pub(crate) fn max(values: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; 16];
    let (chunks, rest) = values.as_chunks::<16>();
    for chunk in chunks {
        for (lane, value) in lanes.iter_mut().zip(chunk) {
            *lane = if *value > *lane { *value } else { *lane };
        }
    }
    let largest = |a: f32, b: &f32| if *b > a { *b } else { a };
    rest.iter().fold(lanes.iter().fold(f32::NEG_INFINITY, largest), largest)
}

/// Replaces each value by e^(value - shift) and returns their sum.
#[inline(always)]
pub(crate) fn exp_sum(values: &mut [f32], shift: f32) -> f32 {
    let mut lanes = [0.0f32; 16];
    let (chunks, rest) = values.as_chunks_mut::<16>();
    for chunk in chunks {
        for (lane, value) in lanes.iter_mut().zip(chunk.iter_mut()) {
            *value = exp(*value - shift);
            *lane += *value;
        }
    }
    let mut sum: f32 = lanes.iter().sum();
    for value in rest {
        *value = exp(*value - shift);
        sum += *value;
    }
    sum
}

/// Returns the largest value, in the widest vectors.
pub(crate) fn wide_max(values: &[f32]) -> f32 {
    struct Max<'a>(&'a [f32]);
    impl WithSimd for Max<'_> {
        type Output = f32;
        #[inline(always)]
        fn with_simd<S: Simd>(self, _: S) -> f32 {
            max(self.0)
        }
    }
    Arch::new().dispatch(Max(values))
}

/// Replaces each value by e^(value - shift) and returns their sum, in the widest vectors.
pub(crate) fn wide_exp_sum(values: &mut [f32], shift: f32) -> f32 {
    struct ExpSum<'a>(&'a mut [f32], f32);
    impl WithSimd for ExpSum<'_> {
        type Output = f32;
        #[inline(always)]
        fn with_simd<S: Simd>(self, _: S) -> f32 {
            exp_sum(self.0, self.1)
        }
    }
    Arch::new().dispatch(ExpSum(values, shift))
}

/// Writes the root-mean-square norm of a row times `weight`, in the widest vectors.
pub(crate) fn rms_norm(x: &[f32], weight: &[f32], eps: f64, out: &mut [f32]) {
    struct Norm<'a>(&'a [f32], f64, &'a mut [f32]);
    impl WithSimd for Norm<'_> {
        type Output = ();
        #[inline(always)]
        fn with_simd<S: Simd>(self, _: S) {
            let Norm(weight, eps, out) = self;
            let scale = inverse_rms(out, eps);
            for (x, weight) in out.iter_mut().zip(weight) {
                *x = *x * scale * weight;
            }
        }
    }
    out.copy_from_slice(x);
    Arch::new().dispatch(Norm(weight, eps, out));
}

/// Norms one head in place.
pub(crate) fn rms_norm_in_place(x: &mut [f32], weight: &[f32], eps: f64) {
    let scale = inverse_rms(x, eps);
    for (x, weight) in x.iter_mut().zip(weight) {
        *x = *x * scale * weight;
    }
}

#[inline(always)]
fn inverse_rms(x: &[f32], eps: f64) -> f32 {
    let mut lanes = [0.0f32; 16];
    let (chunks, rest) = x.as_chunks::<16>();
    for chunk in chunks {
        for (lane, value) in lanes.iter_mut().zip(chunk) {
            *lane = value.mul_add(*value, *lane);
        }
    }
    let sum = lanes.iter().sum::<f32>() + rest.iter().map(|v| v * v).sum::<f32>();
    1.0 / (sum / x.len() as f32 + eps as f32).sqrt()
}

/// Writes `silu(gate) * up`, in the widest vectors.
pub(crate) fn swiglu(gate: &[f32], up: &[f32], out: &mut [f32]) {
    struct SwiGlu<'a>(&'a [f32], &'a [f32], &'a mut [f32]);
    impl WithSimd for SwiGlu<'_> {
        type Output = ();
        #[inline(always)]
        fn with_simd<S: Simd>(self, _: S) {
            for ((out, gate), up) in self.2.iter_mut().zip(self.0).zip(self.1) {
                *out = gate / (1.0 + exp(-gate)) * up;
            }
        }
    }
    Arch::new().dispatch(SwiGlu(gate, up, out));
}

/// Writes `gelu(gate) * up` with GELU in its tanh form, in the widest vectors.
pub(crate) fn geglu(gate: &[f32], up: &[f32], out: &mut [f32]) {
    struct GeGlu<'a>(&'a [f32], &'a [f32], &'a mut [f32]);
    impl WithSimd for GeGlu<'_> {
        type Output = ();
        #[inline(always)]
        fn with_simd<S: Simd>(self, _: S) {
            for ((out, gate), up) in self.2.iter_mut().zip(self.0).zip(self.1) {
                let inner = SQRT_2_OVER_PI * (gate + GELU_CUBIC * gate * gate * gate);
                *out = 0.5 * gate * (1.0 + tanh(inner)) * up;
            }
        }
    }
    Arch::new().dispatch(GeGlu(gate, up, out));
}

/// The constants of GELU's tanh form.
pub(crate) const SQRT_2_OVER_PI: f32 = 0.797_884_6;
pub(crate) const GELU_CUBIC: f32 = 0.044_715;

#[inline(always)]
fn tanh(x: f32) -> f32 {
    let e = exp(-2.0 * x.abs());
    ((1.0 - e) / (1.0 + e)).copysign(x)
}

/// Bends values into +- `cap`: `cap * tanh(value / cap)`.
#[inline(always)]
pub(crate) fn cap(values: &mut [f32], cap: f32) {
    for value in values {
        *value = cap * tanh(*value / cap);
    }
}

/// Bends values into +- `cap`, in the widest vectors.
pub(crate) fn wide_cap(values: &mut [f32], by: f32) {
    struct Cap<'a>(&'a mut [f32], f32);
    impl WithSimd for Cap<'_> {
        type Output = ();
        #[inline(always)]
        fn with_simd<S: Simd>(self, _: S) {
            cap(self.0, self.1);
        }
    }
    Arch::new().dispatch(Cap(values, by));
}

/// Rotates the two halves of a head's rotated dimensions by the angles of its position; the dimensions after them stay.
#[inline(always)]
pub(crate) fn rotate(head: &mut [f32], cos: &[f32], sin: &[f32]) {
    let (low, high) = head.split_at_mut(cos.len());
    for (((low, high), cos), sin) in low.iter_mut().zip(high).zip(cos).zip(sin) {
        (*low, *high) = (*low * cos - *high * sin, *high * cos + *low * sin);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_close_to_the_librarys_everywhere() {
        let worst = (-8700..8800).map(|i| i as f32 / 100.0).map(|x| {
            let exact = f64::from(x).exp();
            (f64::from(exp(x)) - exact).abs() / exact
        });
        let worst = worst.fold(0.0, f64::max);
        assert!(worst < 3e-7, "{worst}");
        assert_eq!((exp(-100.0), exp(f32::NEG_INFINITY)), (0.0, 0.0));
        assert_eq!(exp(0.0), 1.0);
    }

    #[test]
    fn sums_cover_what_is_left_after_full_vectors() {
        let mut values: Vec<f32> = (0..19).map(|i| i as f32 / 10.0).collect();
        assert_eq!(max(&values), 1.8);
        let expected: f32 = values.iter().map(|v| (v - 1.8).exp()).sum();
        assert!((exp_sum(&mut values, 1.8) - expected).abs() < 1e-5);
    }

    #[test]
    fn a_cap_keeps_small_values_and_bends_large_ones() {
        let mut values = [0.01, -0.01, 25.0, 1e4, -1e4, 0.0];
        wide_cap(&mut values, 50.0);
        let expected = [0.01, -0.01, 50.0 * 0.5f32.tanh(), 50.0, -50.0, 0.0];
        assert!(values.iter().zip(expected).all(|(v, e)| (v - e).abs() < 5e-6), "{values:?}");
    }

    #[test]
    fn a_rotation_keeps_the_length_and_turns_by_the_angle() {
        let mut head = [1.0, 0.0, 0.0, 1.0];
        rotate(&mut head, &[0.0, 1.0], &[1.0, 0.0]);
        assert_eq!(head, [0.0, 0.0, 1.0, 1.0]);
        // Two of three pairs' dimensions rotate where the tables are shorter than half a head.
        let mut head = [1.0, 0.0, 7.0, 8.0];
        rotate(&mut head, &[0.0], &[1.0]);
        assert_eq!(head, [0.0, 1.0, 7.0, 8.0]);
    }
}
