use super::*;
use crate::engine::ops::check::random;

/// Where the element of a matrix is: `row * strides.0 + column * strides.1`.
type Strides = (usize, usize);

/// Returns the largest distance from the product in f64, as a share of the largest sum of sizes.
fn off(sizes: (usize, usize, usize), a: Strides, b: Strides, digits: Digits, adds: bool) -> f64 {
    let (rows, columns, inputs) = sizes;
    let (left, right) = (random(1, rows * inputs), random(2, inputs * columns));
    // Rows lie further apart than they are long; what is between them stays.
    let (stride, factor, before) = (columns + 3, 0.5, if adds { 2.0 } else { f32::NAN });
    let mut data = vec![before; rows * stride + 5];
    let target = Target { data: &mut data, stride, adds, factor };
    let side = |data, count, stride, inputs_stride| Side { data, count, stride, inputs_stride };
    multiply(target, side(&left, rows, a.0, a.1), side(&right, columns, b.1, b.0), inputs, digits);
    let (mut worst, mut largest) = (0.0_f64, 0.0_f64);
    for (at, found) in data.iter().enumerate() {
        let (row, column) = (at / stride, at % stride);
        if column >= columns || row >= rows {
            assert_eq!(found.to_bits(), before.to_bits(), "between rows, at {row}, {column}");
            continue;
        }
        let terms =
            (0..inputs).map(|i| f64::from(left[row * a.0 + i * a.1]) * f64::from(right[i * b.0 + column * b.1]));
        let (sum, size) = terms.fold((0.0, 0.0), |(sum, size), term| (sum + term, size + term.abs()));
        let expected = 0.5 * sum + if adds { 2.0 } else { 0.0 };
        worst = worst.max((f64::from(*found) - expected).abs());
        largest = largest.max(size);
    }
    worst / largest
}

/// Sizes that fill no block, no step and no chunk, every way that either side may lie, written and added.
#[test]
fn products_are_exact_to_what_f32_sums_are() {
    if !is_there() {
        return eprintln!("skipped: no AMX");
    }
    for sizes in [(1, 1, 1), (33, 2, 5), (64, 64, 64), (70, 45, 77), (130, 100, 1300)] {
        let (rows, columns, inputs) = sizes;
        for a in [(inputs, 1), (1, rows)] {
            for b in [(columns, 1), (1, inputs)] {
                for (digits, bound) in [(Digits::All, 4e-7), (Digits::Sixteen, 4e-5)] {
                    for adds in [false, true] {
                        let off = off(sizes, a, b, digits, adds);
                        assert!(off < bound, "{sizes:?} {a:?} {b:?} {digits:?}: {off:e}");
                    }
                }
            }
        }
    }
}

/// Pieces of numbers of any size, down to those so small that their last piece is none.
#[test]
fn numbers_of_any_size_are_multiplied() {
    if !is_there() {
        return eprintln!("skipped: no AMX");
    }
    for value in [1.0e-30_f32, -3.3e-20, 1.0 / 3.0, -7.7e18, 2.9e37] {
        let (left, right) = ([value; 40], [1.0 / 7.0; 40]);
        let mut found = [0.0; 4];
        let target = Target { data: &mut found, stride: 2, adds: false, factor: 1.0 };
        let side = |data| Side { data, count: 2, stride: 20, inputs_stride: 1 };
        multiply(target, side(&left), side(&right), 20, Digits::All);
        let expected = 20.0 * f64::from(value) * f64::from(1.0_f32 / 7.0);
        found.iter().for_each(|x| assert!((f64::from(*x) / expected - 1.0).abs() < 1e-6, "{x} of {expected}"));
    }
}

/// What is no number or too large is not hidden.
#[test]
fn what_is_not_finite_stays_so() {
    if !is_there() {
        return eprintln!("skipped: no AMX");
    }
    for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut left = [1.0; 40];
        left[25] = value;
        let mut found = [0.0; 4];
        let target = Target { data: &mut found, stride: 2, adds: false, factor: 1.0 };
        let side = |data| Side { data, count: 2, stride: 20, inputs_stride: 1 };
        multiply(target, side(&left), side(&[1.0; 40]), 20, Digits::All);
        assert!(found[..2] == [20.0; 2] && found[2..].iter().all(|x| !x.is_finite()), "{found:?}");
    }
}
