//! Views of f32 matrices in slices, and one safe entrance to the `gemm` crate: multiply and write or add in place.
//!
//! candle's own matmul always allocates its result and cannot add to one, which costs a pass over memory for each LoRA
//! pair and each head of an attention.

use candle_core::{Result, bail};

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

/// Computes `dst (+)= factor * lhs * rhs`.
pub fn multiply(dst: MatMut, into: Into, factor: f32, lhs: Mat, rhs: Mat, threads: Threads) -> Result<()> {
    let (m, n, k) = (lhs.rows, rhs.cols, lhs.cols);
    if dst.rows != m || dst.cols != n || rhs.rows != k {
        bail!("cannot multiply [{m}, {k}] by [{}, {n}] into [{}, {}]", rhs.rows, dst.rows, dst.cols);
    }
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
    Ok(())
}

#[cfg(test)]
mod tests {
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
