//! Matrices in slices, and their products.

use super::wide::{as_type, as_type_mut, same_type};
use crate::backend::{Element, Epilogue};

/// A matrix in a slice: element (i, j) is at `i·row_stride + j·column_stride`.
#[derive(Clone, Copy)]
pub(super) struct Matrix<'a, T = f32> {
    pub data: &'a [T],
    pub row_stride: usize,
    pub column_stride: usize,
}

impl<'a, T: Element> Matrix<'a, T> {
    /// Row-major with rows `stride` apart.
    pub(super) fn rows(data: &'a [T], stride: usize) -> Self {
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

    fn with_type<U: Element>(self) -> Matrix<'a, U> {
        let Self { data, row_stride, column_stride } = self;
        Matrix { data: as_type(data).unwrap_or_default(), row_stride, column_stride }
    }

    fn check(&self, rows: usize, columns: usize) {
        if rows > 0 && columns > 0 {
            let last = (rows - 1) * self.row_stride + (columns - 1) * self.column_stride;
            assert!(last < self.data.len(), "{rows} × {columns} of {} elements", self.data.len());
        }
    }
}

/// C [m, n] = alpha·A [m, k]·B [k, n] + bias + residual (+ C), in f32 sums.
pub(super) struct Product<'a, T = f32, C = T> {
    pub c: &'a mut [C],
    /// Elements from one row of C to the next.
    pub stride: usize,
    pub a: Matrix<'a, T>,
    pub b: Matrix<'a, T>,
    /// (m, n, k)
    pub size: (usize, usize, usize),
    /// A bias has n elements; a residual is laid out as C, and given only where rows of C are adjacent.
    pub epilogue: Epilogue<&'a [T]>,
    pub threads: Threads,
}

/// What happens to the values that are in the output.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Store {
    Overwrite,
    Add,
}

impl Store {
    /// For the flag of an operator.
    pub(super) fn of(accumulate: bool) -> Self {
        if accumulate { Self::Add } else { Self::Overwrite }
    }
}

/// The threads that compute a product.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Threads {
    /// Those of rayon's pool.
    All,
    /// The calling one, which is a task of the pool already.
    One,
}

impl<'a, T: Element, C: Element> Product<'a, T, C> {
    /// C = A·B on all threads.
    pub(super) fn new(
        c: &'a mut [C],
        stride: usize,
        a: Matrix<'a, T>,
        b: Matrix<'a, T>,
        size: (usize, usize, usize),
    ) -> Self {
        Self { c, stride, a, b, size, epilogue: Epilogue::default(), threads: Threads::All }
    }

    /// C = A·B on the calling thread.
    pub(super) fn serial(
        c: &'a mut [C],
        stride: usize,
        a: Matrix<'a, T>,
        b: Matrix<'a, T>,
        size: (usize, usize, usize),
    ) -> Self {
        Self { threads: Threads::One, ..Self::new(c, stride, a, b, size) }
    }

    /// C = alpha·A·B, or that added to C.
    pub(super) fn with(mut self, alpha: f32, store: Store) -> Self {
        (self.epilogue.alpha, self.epilogue.accumulate) = (alpha, store == Store::Add);
        self
    }

    /// Whether the elements of A and B are `U`, and those of C `D`.
    pub(super) fn has_types<U: Element, D: Element>() -> bool {
        same_type::<T, U>() && same_type::<C, D>()
    }

    /// The product typed as [`Product::has_types`] found it.
    ///
    /// # Panics
    /// Where the types differ.
    pub(super) fn with_types<U: Element, D: Element>(self) -> Product<'a, U, D> {
        assert!(Self::has_types::<U, D>());
        let Self { c, stride, a, b, size, epilogue, threads } = self;
        Product {
            c: as_type_mut(c).unwrap_or_default(),
            stride,
            a: a.with_type(),
            b: b.with_type(),
            size,
            epilogue: epilogue.map(|addend| as_type(addend).unwrap_or_default()),
            threads,
        }
    }

    /// Asserts that all matrices are inside their slices.
    pub(super) fn check(&self) {
        let (m, n, k) = self.size;
        self.a.check(m, k);
        self.b.check(k, n);
        let inside = m == 0 || n <= self.stride && (m - 1) * self.stride + n <= self.c.len();
        assert!(inside, "{m} × {n} of {} elements", self.c.len());
        assert!(self.epilogue.bias.is_none_or(|bias| bias.len() == n));
        assert!(self.epilogue.residual.is_none_or(|residual| residual.len() == self.c.len() && self.stride == n));
    }
}
