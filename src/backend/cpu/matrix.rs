//! Matrices in slices, and their products.

/// A matrix in a slice: element (i, j) is at `i·rows + j·columns`.
#[derive(Clone, Copy)]
pub(super) struct Matrix<'a> {
    pub data: &'a [f32],
    pub row_stride: usize,
    pub column_stride: usize,
}

impl<'a> Matrix<'a> {
    /// Row-major with rows `stride` apart.
    pub(super) fn rows(data: &'a [f32], stride: usize) -> Self {
        Self { data, row_stride: stride, column_stride: 1 }
    }

    /// The transpose.
    pub(super) fn t(self) -> Self {
        Self { data: self.data, row_stride: self.column_stride, column_stride: self.row_stride }
    }

    /// Whether neighbours in a row or in a column are neighbours in memory.
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    pub(super) fn has_vectors(&self) -> bool {
        self.row_stride == 1 || self.column_stride == 1
    }

    fn check(&self, rows: usize, columns: usize) {
        if rows > 0 && columns > 0 {
            let last = (rows - 1) * self.row_stride + (columns - 1) * self.column_stride;
            assert!(last < self.data.len(), "{rows} × {columns} of {} elements", self.data.len());
        }
    }
}

/// C [m, n] = alpha·A [m, k]·B [k, n] (+ C).
pub(super) struct Product<'a> {
    pub c: &'a mut [f32],
    /// Elements from one row of C to the next.
    pub stride: usize,
    pub a: Matrix<'a>,
    pub b: Matrix<'a>,
    /// (m, n, k)
    pub size: (usize, usize, usize),
    pub alpha: f32,
    /// Adds to what C holds.
    pub accumulate: bool,
    /// Shares the work among rayon's threads.
    pub parallel: bool,
}

impl<'a> Product<'a> {
    /// C = A·B on all threads.
    pub(super) fn new(
        c: &'a mut [f32],
        stride: usize,
        a: Matrix<'a>,
        b: Matrix<'a>,
        size: (usize, usize, usize),
    ) -> Self {
        Self { c, stride, a, b, size, alpha: 1.0, accumulate: false, parallel: true }
    }

    /// C = A·B on the calling thread.
    pub(super) fn serial(
        c: &'a mut [f32],
        stride: usize,
        a: Matrix<'a>,
        b: Matrix<'a>,
        size: (usize, usize, usize),
    ) -> Self {
        Self { parallel: false, ..Self::new(c, stride, a, b, size) }
    }

    /// Asserts that all matrices are inside their slices.
    pub(super) fn check(&self) {
        let (m, n, k) = self.size;
        self.a.check(m, k);
        self.b.check(k, n);
        let inside = n <= self.stride && (m - 1) * self.stride + n <= self.c.len();
        assert!(inside, "{m} × {n} of {} elements", self.c.len());
    }
}
