//! Perturbed copies of a weight at equal relative norm.

use super::Operator;
use crate::backend::{Backend, Buffer, Cost, In, Out, View, cost, trace};
use crate::error::Result;

/// Where a draw starts in the counter-based generator (Philox4x32-10: key = `seed`, counter = (`stream`, element / 4)).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct NoiseKey {
    /// The run's seed for this draw.
    pub seed: u64,
    /// One stream a tensor, so that draws do not depend on the order of work.
    pub stream: u64,
}

/// The direction n of a perturbation w ± epsilon·‖w‖/‖n‖·n. `V` is a backend's view.
#[derive(Clone, Copy, Debug)]
pub enum Direction<V> {
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
    /// A given direction, such as a real update; as long as w.
    Given(V),
}

impl<V> Direction<V> {
    /// Whether ‖w‖ and ‖n‖ are needed; they cancel in [`Direction::Scale`].
    pub fn has_norm(&self) -> bool {
        !matches!(self, Self::Scale)
    }

    /// Cost of `copies` perturbed copies of a weight whose norm is known; the values of the direction and their norm
    /// are computed once. `float`: bytes of an element.
    pub fn cost(&self, elements: usize, copies: usize, float: usize) -> Cost {
        let (bytes, flops) = match self {
            Self::Gaussian(_) => (0, 2 + cost::NORMAL_FLOPS),
            Self::Rademacher(_) | Self::Scale => (0, 0),
            Self::LowRank { rank, .. } => (0, 2 * rank),
            Self::Given(_) => (float, 2),
        };
        cost::perturbed_copies(elements, copies, bytes, flops, float)
    }

    /// The same with its view converted.
    pub fn map<'s, U>(&'s self, convert: impl FnOnce(&'s V) -> U) -> Direction<U> {
        match self {
            Self::Gaussian(key) => Direction::Gaussian(*key),
            Self::Rademacher(key) => Direction::Rademacher(*key),
            Self::LowRank { key, rank, rows } => Direction::LowRank { key: *key, rank: *rank, rows: *rows },
            Self::Scale => Direction::Scale,
            Self::Given(n) => Direction::Given(convert(n)),
        }
    }
}

/// ‖w‖² as partial sums, in the form that [`Perturb`] takes: made once for many draws.
pub struct SquaredNorm<'a, B: Backend> {
    /// Of any length.
    pub w: In<'a, B>,
}

impl<B: Backend> SquaredNorm<'_, B> {
    /// As [`Operator::run`]; returns the partial sums.
    ///
    /// # Errors
    /// [`crate::error::Error::Device`] or [`crate::error::Error::Memory`] where the device fails.
    pub fn run(self, backend: &B) -> Result<Buffer<B, f64>> {
        let _span = trace::op("squares", || cost::sum_squares(self.w.len(), size_of::<B::Float>()));
        backend.squared_norm(self)
    }
}

/// plus = w + epsilon·‖w‖/‖n‖·n and minus = w − the same, out of place and from one draw of n; copies of w where n is
/// 0.
pub struct Perturb<'a, B: Backend> {
    /// The weight, row-major.
    pub w: In<'a, B>,
    /// [`SquaredNorm`] of w; `None`: computed for this draw.
    pub squares: Option<View<'a, B, f64>>,
    /// n.
    pub direction: Direction<In<'a, B>>,
    /// Relative norm of the perturbation.
    pub epsilon: f32,
    /// Like `w`.
    pub plus: Out<'a, B>,
    /// Like `w`: the antithetic copy.
    pub minus: Option<Out<'a, B>>,
}

impl<B: Backend> Operator<B> for Perturb<'_, B> {
    const NAME: &'static str = "perturb";

    fn check(&self) {
        let len = self.w.len();
        assert_eq!(self.plus.len(), len);
        assert!(self.minus.as_ref().is_none_or(|minus| minus.len() == len));
        match &self.direction {
            Direction::LowRank { rank, rows, .. } => assert!(*rank > 0 && *rows > 0 && len.is_multiple_of(*rows)),
            Direction::Given(n) => assert_eq!(n.len(), len),
            Direction::Gaussian(_) | Direction::Rademacher(_) | Direction::Scale => {}
        }
    }

    fn cost(&self) -> Cost {
        let (len, copies) = (self.w.len(), 1 + usize::from(self.minus.is_some()));
        let computed = self.squares.is_none() && self.direction.has_norm();
        self.direction.cost(len, copies, size_of::<B::Float>())
            + if computed { cost::sum_squares(len, 0) } else { Cost::default() }
    }

    fn launch(self, backend: &B) -> Result<()> {
        backend.perturb(self)
    }
}

/// x ← x + rho·direction/√squares: a step of length rho along a direction, or along a part of one, of which the whole has
/// this square of its norm. x stays where that is 0.
pub struct MoveAlong<'a, B: Backend> {
    /// Of any length.
    pub x: Out<'a, B>,
    /// Like `x`.
    pub direction: In<'a, B>,
    /// \[1\]: by [`super::SumSquares`].
    pub squares: View<'a, B, f32>,
    /// Length of the step.
    pub rho: f32,
}

impl<B: Backend> Operator<B> for MoveAlong<'_, B> {
    const NAME: &'static str = "move_along";

    fn check(&self) {
        assert_eq!((self.direction.len(), self.squares.len()), (self.x.len(), 1));
    }

    fn cost(&self) -> Cost {
        cost::move_along(self.x.len(), size_of::<B::Float>())
    }

    fn launch(self, backend: &B) -> Result<()> {
        backend.move_along(self)
    }
}
