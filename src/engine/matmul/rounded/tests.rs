use candle_core::Device;

use super::super::Packed;
use super::super::tests::numbers;
use super::*;

impl Loop {
    /// Returns those that this processor has.
    fn all() -> Vec<Loop> {
        let mut all = vec![Loop::Portable];
        #[cfg(target_arch = "x86_64")]
        all.extend(vnni::is_there().then_some(Loop::Vnni));
        #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
        all.extend(amx::is_there().then_some(Loop::Amx));
        println!("loops of this processor: {all:?}");
        all
    }
}

fn weight(outputs: usize, inputs: usize, seed: u32) -> Tensor {
    Tensor::from_vec(numbers(outputs * inputs, seed), (outputs, inputs), &Device::Cpu).unwrap()
}

/// Inputs that do not fill the last group, outputs that do not fill the last panel.
fn the_product_is_that_of_f32<const BYTES: usize>() {
    for (inputs, outputs) in [(64, 32), (200, 73), (576, 96)] {
        let (first, second) = (weight(outputs, inputs, 1), weight(7, inputs, 2));
        let exact = Packed::new(&[&first, &second]).unwrap();
        let rounded = Rounded::<BYTES>::new(&[&first, &second]).unwrap();
        for rows in 1..15 {
            let x = numbers(rows * inputs, 3);
            let (exact, rounded) = (
                exact.apply(&x, rows).to_rows(),
                rounded.apply_panels(&x, rows, 0..rounded.panels(), Vec::new()).to_rows(),
            );
            assert_eq!(exact.len(), rounded.len());
            // Both factors lie below 1 and are off by half a step; the errors of many products go both ways.
            let bound = 3.0 * (inputs as f32).sqrt() / (2.0 * Packing::<BYTES>::MOST);
            let worst = exact.iter().zip(&rounded).map(|(e, r)| (e - r).abs()).fold(0.0, f32::max);
            assert!(worst < bound && worst > bound / 100.0, "{inputs} x {outputs}, {rows} rows: {worst} of {bound}");
        }
    }
}

#[test]
fn the_product_is_that_of_f32_but_for_the_rounding() {
    the_product_is_that_of_f32::<1>();
    the_product_is_that_of_f32::<2>();
}

/// Integers up to the largest one are kept as they are, also where all of a group are that large.
fn integers_stay<const BYTES: usize>() {
    let most = Packing::<BYTES>::MOST;
    let integers = |n: usize, seed: u32| -> Vec<f32> {
        let scaled = numbers(n, seed).into_iter().map(|v| (v * most).round());
        scaled.enumerate().map(|(i, v)| if i < GROUP || i % GROUP == 5 { -most } else { v }).collect()
    };
    let (inputs, outputs, rows) = (128, 40, 9);
    let (w, x) = (integers(outputs * inputs, 4), integers(rows * inputs, 5));
    let weight = Tensor::from_slice(&w, (outputs, inputs), &Device::Cpu).unwrap();
    let of = |inner| Rounded::<BYTES>::laid_out(&[&weight], inner).unwrap();
    let got: Vec<f32> = Loop::all()
        .into_iter()
        .flat_map(|inner| of(inner).apply_panels(&x, rows, 0..outputs.div_ceil(WIDTH), Vec::new()).to_rows())
        .collect();
    for (at, got) in got.iter().enumerate() {
        let at = at % (rows * outputs);
        let (x, w) = (&x[at / outputs * inputs..][..inputs], &w[at % outputs * inputs..][..inputs]);
        let exact: f64 = x.iter().zip(w).map(|(x, w)| f64::from(*x) * f64::from(*w)).sum();
        // Two groups are rounded to f32 and added.
        assert!((f64::from(*got) - exact).abs() <= 256.0, "{got} for {exact}");
        assert!(BYTES == 2 || f64::from(*got) == exact, "{got} for {exact}");
    }
}

#[test]
fn integers_stay_what_they_are() {
    integers_stay::<1>();
    integers_stay::<2>();
}

fn loops_agree<const BYTES: usize>() {
    let weight = weight(75, 200, 6);
    let portable = Rounded::<BYTES>::laid_out(&[&weight], Loop::Portable).unwrap();
    let x = numbers(37 * 200, 7);
    let all = portable.apply_panels(&x, 37, 0..3, Vec::new()).to_rows();
    for inner in Loop::all() {
        let rounded = Rounded::<BYTES>::laid_out(&[&weight], inner).unwrap();
        for rows in [37, 17, 1] {
            let some = rounded.apply_panels(&x[..rows * 200], rows, 0..3, Vec::new()).to_rows();
            assert_eq!(some, all[..rows * 75], "{inner:?}, {rows} rows");
        }
        for row in 0..37 {
            let alone = rounded.apply_panels(&x[row * 200..][..200], 1, 0..3, Vec::new()).to_rows();
            assert_eq!(alone, all[row * 75..][..75], "{inner:?}, row {row}");
        }
        let part = rounded.apply_panels(&x, 37, 1..2, Vec::new()).to_rows();
        assert_eq!(part[32..64], all[75 + 32..75 + 64], "{inner:?}");
    }
}

#[test]
fn all_loops_give_the_same_bits_in_any_batch() {
    loops_agree::<1>();
    loops_agree::<2>();
}

fn many_rows_are_written_or_added<const BYTES: usize>() {
    let (inputs, outputs) = (200, 75);
    let rounded = Rounded::<BYTES>::new(&[&weight(outputs, inputs, 6)]).unwrap();
    for rows in [1, 5, 2 * BLOCK + 7] {
        let x = numbers(rows * inputs, 7);
        let expected = rounded.apply_panels(&x, rows, 0..3, Vec::new()).to_rows();
        let mut y = vec![9.0; rows * outputs];
        rounded.multiply(&x, &mut y, Into::Fresh);
        assert_eq!(y, expected);
        rounded.multiply(&x, &mut y, Into::Sum);
        assert!(y.iter().zip(&expected).all(|(y, e)| *y == 2.0 * e));
    }
}

#[test]
fn many_rows_give_what_few_give() {
    many_rows_are_written_or_added::<1>();
    many_rows_are_written_or_added::<2>();
}

fn faults_are_seen<const BYTES: usize>() {
    let rounded = Rounded::<BYTES>::new(&[&weight(3, 70, 8)]).unwrap();
    for fault in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut x = numbers(70, 9);
        x[66] = fault;
        let out = rounded.apply_panels(&x, 1, 0..1, Vec::new()).to_rows();
        assert!(out.iter().all(|v| !v.is_finite()), "{fault}: {out:?}");
    }
    assert_eq!(rounded.apply_panels(&[0.0; 70], 1, 0..1, Vec::new()).to_rows(), [0.0; 3]);
}

#[test]
fn what_is_no_number_is_not_hidden() {
    faults_are_seen::<1>();
    faults_are_seen::<2>();
}
