//! Rows of a table: gathered, scattered, added, and the gradient of an embedding.

use super::Operator;
use crate::backend::{Backend, Cost, In, Out, View, ViewMut, cost};
use crate::error::Result;

/// to\[i\] = from[rows\[i\]]: the embedding, and the selection of rows.
pub struct GatherRows<'a, B: Backend> {
    /// [table rows, width]
    pub from: In<'a, B>,
    /// Rows of `from`.
    pub rows: View<'a, B, u32>,
    /// [rows, width]
    pub to: Out<'a, B>,
    /// Columns.
    pub width: usize,
}

impl<B: Backend> Operator<B> for GatherRows<'_, B> {
    const NAME: &'static str = "gather_rows";

    fn check(&self) {
        assert!(self.width > 0 && self.to.len() == self.rows.len() * self.width);
    }

    fn cost(&self) -> Cost {
        cost::move_rows(self.rows.len(), self.width, size_of::<B::Float>())
    }

    fn launch(self, backend: &B) -> Result<()> {
        backend.gather_rows(self)
    }
}

/// to[rows\[i\]] = from\[i\], rows distinct: fills a key-value cache.
pub struct ScatterRows<'a, B: Backend> {
    /// [rows, width]
    pub from: In<'a, B>,
    /// Rows of `to`.
    pub rows: View<'a, B, u32>,
    /// [table rows, width]
    pub to: Out<'a, B>,
    /// Columns.
    pub width: usize,
}

impl<B: Backend> Operator<B> for ScatterRows<'_, B> {
    const NAME: &'static str = "scatter_rows";

    fn check(&self) {
        assert!(self.width > 0 && self.from.len() == self.rows.len() * self.width);
    }

    fn cost(&self) -> Cost {
        cost::move_rows(self.rows.len(), self.width, size_of::<B::Float>())
    }

    fn launch(self, backend: &B) -> Result<()> {
        backend.scatter_rows(self)
    }
}

/// to[rows\[i\]] += from\[i\], summed in f32 in a fixed order of i; rows may repeat: the gradient of [`GatherRows`].
pub struct AddRows<'a, B: Backend> {
    /// [rows, width]
    pub from: In<'a, B>,
    /// Rows of `to`.
    pub rows: View<'a, B, u32>,
    /// [table rows, width]
    pub to: Out<'a, B>,
    /// Columns.
    pub width: usize,
}

impl<B: Backend> Operator<B> for AddRows<'_, B> {
    const NAME: &'static str = "add_rows";

    fn check(&self) {
        assert!(self.width > 0 && self.from.len() == self.rows.len() * self.width);
    }

    fn cost(&self) -> Cost {
        cost::add_rows(self.rows.len(), self.width, size_of::<B::Float>(), size_of::<B::Float>())
    }

    fn launch(self, backend: &B) -> Result<()> {
        backend.add_rows(self)
    }
}

/// [`AddRows`] into a gradient: dtable[rows\[i\]] += dy\[i\].
pub struct EmbeddingBackward<'a, B: Backend> {
    /// [rows, width]
    pub dy: In<'a, B>,
    /// Rows of `dtable`.
    pub rows: View<'a, B, u32>,
    /// [table rows, width]
    pub dtable: ViewMut<'a, B, B::Grad>,
    /// Columns.
    pub width: usize,
}

impl<B: Backend> Operator<B> for EmbeddingBackward<'_, B> {
    const NAME: &'static str = "embedding_backward";

    fn check(&self) {
        assert!(self.width > 0 && self.dy.len() == self.rows.len() * self.width);
    }

    fn cost(&self) -> Cost {
        cost::add_rows(self.rows.len(), self.width, size_of::<B::Float>(), size_of::<B::Grad>())
    }

    fn launch(self, backend: &B) -> Result<()> {
        backend.embedding_backward(self)
    }
}
