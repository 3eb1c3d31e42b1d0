//! The generator of `kernels/philox.cuh` alone, for its tests.

use super::memory::slice_mut;
use super::{Cuda, Precision, perturb};
use crate::backend::{NoiseKey, ViewMut};
use crate::error::Result;

/// The words of a stream from block `first` on ([`crate::rng`]); `to` holds whole blocks of four.
///
/// # Errors
/// [`crate::error::Error::Device`] where the driver fails.
pub fn philox_words<P: Precision>(
    cuda: &Cuda<P>,
    key: NoiseKey,
    first: u64,
    to: ViewMut<'_, Cuda<P>, u32>,
) -> Result<()> {
    perturb::words(&cuda.device, key, first, &slice_mut(to))
}

/// The normals of a stream, from element 0.
///
/// # Errors
/// [`crate::error::Error::Device`] where the driver fails.
pub fn philox_normals<P: Precision>(cuda: &Cuda<P>, key: NoiseKey, to: ViewMut<'_, Cuda<P>, f32>) -> Result<()> {
    let to = slice_mut(to);
    perturb::normals(&cuda.device, key, 0, to.len(), 1, &to)
}
