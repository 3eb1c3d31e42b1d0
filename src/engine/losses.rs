//! Losses of a step, which stay on the backend until they are read.

use super::decoder::read_floats;
use super::pool::Stats;
use crate::backend::{Backend, ViewMut, trace};
use crate::error::Result;

/// Losses of trained tokens, one micro-batch after another: reading them once a step waits for the device once a step.
pub struct Losses<'d, B: Backend> {
    backend: &'d B,
    values: Stats<'d, B>,
    filled: usize,
}

impl<'d, B: Backend> Losses<'d, B> {
    pub(super) fn new(backend: &'d B, values: Stats<'d, B>) -> Self {
        Self { backend, values, filled: 0 }
    }

    /// Room for the losses of the next micro-batch.
    pub(super) fn next(&mut self, rows: usize) -> ViewMut<'_, B, f32> {
        let first = self.filled;
        self.filled += rows;
        self.values.range_mut(first..self.filled)
    }

    /// Σ loss over all that was queued; waits for the device.
    ///
    /// # Errors
    /// [`crate::error::Error::Device`] where the work has failed.
    pub fn sum(self) -> Result<f64> {
        let _span = trace::phase("head");
        if self.filled == 0 {
            return Ok(0.0);
        }
        let losses = read_floats(self.backend, self.values.range(0..self.filled))?;
        Ok(losses.into_iter().map(f64::from).sum())
    }
}
