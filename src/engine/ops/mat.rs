//! Views of f32 matrices in slices, and one safe entrance to what multiplies them, the `gemm` crate or, for large products
//! on processors that have it, AMX: multiply and write or add in place.
//!
//! candle's own matmul always allocates its result and cannot add to one, which costs a pass over memory for each LoRA
//! pair and each head of an attention.

use candle_core::{Result, bail};

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
use super::bf16;

/// A matrix in a slice: element (i, j) lies at `i * row_stride + j * col_stride`.
#[derive(Clone, Copy)]
pub struct Mat<'a> {
    data: &'a [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a> Mat<'a> {
    /// Views a whole row-major slice.
    pub fn new(data: &'a [f32], rows: usize, cols: usize) -> Result<Self> {
        Mat::strided(data, rows, cols, cols)
    }

    /// Views `cols` columns of rows that lie `row_stride` apart; `data` starts at the first element.
    pub fn strided(data: &'a [f32], rows: usize, cols: usize, row_stride: usize) -> Result<Self> {
        check(data.len(), rows, cols, row_stride)?;
        Ok(Mat { data, rows, cols, row_stride, col_stride: 1 })
    }

    /// Returns the transposed view.
    pub fn t(self) -> Self {
        let Mat { data, rows, cols, row_stride, col_stride } = self;
        Mat { data, rows: cols, cols: rows, row_stride: col_stride, col_stride: row_stride }
    }
}

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
impl<'a> Mat<'a> {
    fn rows(self) -> bf16::Side<'a> {
        bf16::Side { data: self.data, count: self.rows, stride: self.row_stride, inputs_stride: self.col_stride }
    }

    fn columns(self) -> bf16::Side<'a> {
        self.t().rows()
    }
}

/// Returns true if a product is large enough for AMX: to lay its sides out costs as much as a product with 150 rows gains. Tests, whose
/// models are tiny, take both ways.
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
fn pays(rows: usize, columns: usize, inputs: usize) -> bool {
    match cfg!(test) {
        true => rows >= 8 && columns >= 8,
        false => rows >= 192 && columns >= 128 && inputs >= 64 && rows >= 32 * rayon::current_num_threads(),
    }
}

/// A row-major matrix in a slice to write to.
pub struct MatMut<'a> {
    data: &'a mut [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
}

impl<'a> MatMut<'a> {
    /// Views a whole row-major slice.
    pub fn new(data: &'a mut [f32], rows: usize, cols: usize) -> Result<Self> {
        MatMut::strided(data, rows, cols, cols)
    }

    /// Views `cols` columns of rows that lie `row_stride` apart; `data` starts at the first element.
    pub fn strided(data: &'a mut [f32], rows: usize, cols: usize, row_stride: usize) -> Result<Self> {
        check(data.len(), rows, cols, row_stride)?;
        Ok(MatMut { data, rows, cols, row_stride })
    }
}

fn check(len: usize, rows: usize, cols: usize, row_stride: usize) -> Result<()> {
    if rows > 0 && cols > 0 && (row_stride < cols || (rows - 1) * row_stride + cols > len) {
        bail!("a {rows} x {cols} matrix with rows {row_stride} apart does not fit in {len} values");
    }
    Ok(())
}

/// What becomes of the values that the destination holds.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Into {
    /// They are overwritten.
    Fresh,
    /// The product is added to them.
    Sum,
}

/// How many threads one multiplication uses.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Threads {
    /// The caller's: for small products inside a parallel loop.
    One,
    /// All of the pool's.
    All,
}

/// How much of each number is multiplied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Digits {
    All,
    /// The upper 16 bits of its mantissa where that is faster, as [`cuts`] tells; else all.
    Sixteen,
}

impl Digits {
    /// Returns the pieces of 8 bits.
    pub(super) fn pieces(self) -> usize {
        match self {
            Digits::All => 3,
            Digits::Sixteen => 2,
        }
    }
}

/// Returns true where large products of numbers that are cut to 16 bits are faster than whole ones.
pub(crate) fn cuts() -> bool {
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    return bf16::is_there();
    #[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
    return false;
}

/// Computes `dst (+)= factor * lhs * rhs`.
pub fn multiply(dst: MatMut, into: Into, factor: f32, lhs: Mat, rhs: Mat, threads: Threads) -> Result<()> {
    if threads == Threads::All {
        return multiply_digits(dst, into, factor, lhs, rhs, Digits::All);
    }
    check_sizes(&dst, lhs, rhs)?;
    by_gemm(dst, into, factor, lhs, rhs, threads);
    Ok(())
}

/// Computes the same by all threads, from so much of each number.
pub fn multiply_digits(dst: MatMut, into: Into, factor: f32, lhs: Mat, rhs: Mat, digits: Digits) -> Result<()> {
    check_sizes(&dst, lhs, rhs)?;
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    if pays(lhs.rows, rhs.cols, lhs.cols) && bf16::is_there() {
        let target = bf16::Target { data: dst.data, stride: dst.row_stride, adds: into == Into::Sum, factor };
        bf16::multiply(target, lhs.rows(), rhs.columns(), lhs.cols, digits);
        return Ok(());
    }
    by_gemm(dst, into, factor, lhs, rhs, Threads::All);
    Ok(())
}

fn check_sizes(dst: &MatMut, lhs: Mat, rhs: Mat) -> Result<()> {
    let (m, n, k) = (lhs.rows, rhs.cols, lhs.cols);
    if dst.rows != m || dst.cols != n || rhs.rows != k {
        bail!("cannot multiply [{m}, {k}] by [{}, {n}] into [{}, {}]", rhs.rows, dst.rows, dst.cols);
    }
    Ok(())
}

/// Multiplies matrices that fit each other.
fn by_gemm(dst: MatMut, into: Into, factor: f32, lhs: Mat, rhs: Mat, threads: Threads) {
    let (m, n, k) = (lhs.rows, rhs.cols, lhs.cols);
    assert!(dst.rows == m && dst.cols == n && rhs.rows == k, "checked by the callers");
    let parallelism = match (threads, rayon::current_num_threads()) {
        (Threads::One, _) | (_, 1) => gemm::Parallelism::None,
        (Threads::All, count) => gemm::Parallelism::Rayon(count),
    };
    let read = into == Into::Sum;
    #[expect(unsafe_code, reason = "gemm takes raw pointers")]
    // SAFETY: the constructors checked that every element of the three views lies in its slice, the sizes agree, and
    // `dst` is a unique borrow, so nothing else reads or writes it.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            dst.data.as_mut_ptr(),
            1,
            dst.row_stride as isize,
            read,
            lhs.data.as_ptr(),
            lhs.col_stride as isize,
            lhs.row_stride as isize,
            rhs.data.as_ptr(),
            rhs.col_stride as isize,
            rhs.row_stride as isize,
            if read { 1.0 } else { 0.0 },
            factor,
            false,
            false,
            false,
            parallelism,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::super::check::random;
    use super::*;

    #[test]
    fn multiplies_strided_and_transposed_views_in_place() {
        let a: Vec<f32> = (0..6).map(|i| i as f32).collect(); // [2, 3]
        let b: Vec<f32> = (0..8).map(|i| i as f32 * 0.5).collect(); // [2, 4], of which 3 columns
        let mut c = vec![1.0; 6]; // [3, 3] of which 2 x 2 at stride 3
        let b = Mat::strided(&b, 2, 3, 4).unwrap();
        let dst = MatMut::strided(&mut c, 2, 2, 3).unwrap();
        multiply(dst, Into::Sum, 2.0, Mat::new(&a, 2, 3).unwrap(), b.t(), Threads::One).unwrap();
        // c00 = 1 + 2 [0, 1, 2] [0, .5, 1], c11 = 1 + 2 [3, 4, 5] [2, 2.5, 3]
        assert_eq!(c, [6.0, 18.0, 1.0, 15.0, 63.0, 1.0]);
    }

    /// Of a size that tiles are for, where the processor has them: f32 is f32, and 16 bits are no more than that.
    #[test]
    fn large_products_are_the_same_by_either_way() {
        let (m, n, k) = (32 * rayon::current_num_threads().max(7), 130, 200);
        let (a, b) = (random(1, m * k), random(2, n * k));
        let (lhs, rhs) = (Mat::new(&a, m, k).unwrap(), Mat::new(&b, n, k).unwrap().t());
        let mut expected = vec![1.0; m * n];
        by_gemm(MatMut::new(&mut expected, m, n).unwrap(), Into::Sum, 0.5, lhs, rhs, Threads::All);
        for (digits, least, most) in
            [(Digits::All, 0.0, 1e-5), (Digits::Sixteen, if cuts() { 1e-5 } else { 0.0 }, 1e-3)]
        {
            let mut found = vec![1.0; m * n];
            multiply_digits(MatMut::new(&mut found, m, n).unwrap(), Into::Sum, 0.5, lhs, rhs, digits).unwrap();
            let off = found.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!((least..most).contains(&off), "{digits:?}: {off}");
        }
    }

    #[test]
    fn a_view_outside_its_slice_is_refused() {
        assert!(Mat::new(&[0.0; 5], 2, 3).is_err());
        assert!(Mat::strided(&[0.0; 9], 2, 3, 2).is_err(), "rows that overlap");
        let mut c = [0.0; 4];
        let (a, dst) = (Mat::new(&[0.0; 4], 2, 2).unwrap(), MatMut::new(&mut c, 2, 2).unwrap());
        let b = Mat::new(&[0.0; 6], 3, 2).unwrap();
        assert!(multiply(dst, Into::Fresh, 1.0, a, b, Threads::One).is_err());
    }
}
