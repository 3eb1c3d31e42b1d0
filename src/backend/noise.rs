//! What a module is perturbed by.

use super::{Backend, In};

/// Where a draw starts in the counter-based generator (Philox4x32-10: key = `seed`, counter = (`stream`, element / 4)).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct NoiseKey {
    /// The run's seed for this draw.
    pub seed: u64,
    /// One stream a tensor, so that draws do not depend on the order of work.
    pub stream: u64,
}

/// The direction n of a perturbation w ± epsilon·‖w‖/‖n‖·n.
pub enum Direction<'a, B: Backend> {
    /// Independent normals.
    Gaussian(NoiseKey),
    /// Independent signs.
    Rademacher(NoiseKey),
    /// A·Bᵀ of normals, A [rows, rank], B [columns, rank].
    LowRank {
        /// The draw.
        key: NoiseKey,
        /// Rank of n.
        rank: usize,
        /// Rows of w.
        rows: usize,
    },
    /// n = w: the module is scaled by 1 ± epsilon; epsilon = −1 zeroes it.
    Scale,
    /// A given direction, such as a real update.
    Given(In<'a, B>),
}
