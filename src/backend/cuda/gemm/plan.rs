//! Which kernel computes a product.

use crate::backend::cuda::FLOAT;
use crate::backend::cuda::measure::with_forced;
use crate::backend::{Cost, cost};
use std::cell::Cell;

/// A product of a linear layer with X [tokens, inputs] and W [outputs, inputs].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GemmLayout {
    /// Y = X·Wᵀ: A [m, k], B [n, k] in memory.
    Tn,
    /// dX = dY·W: A [m, k], B [k, n].
    Nn,
    /// dW = dYᵀ·X: A [k, m], B [k, n].
    Nt,
}

/// C [m, n] = A·B over a depth of k.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GemmShape {
    /// How the operands lie in memory.
    pub layout: GemmLayout,
    /// Rows of C.
    pub m: usize,
    /// Columns of C.
    pub n: usize,
    /// Terms of a sum.
    pub k: usize,
}

impl GemmShape {
    /// Cost of the product without addends, C in elements of `element_bytes`.
    pub fn cost(self, element_bytes: usize) -> Cost {
        let Self { m, n, k, .. } = self;
        cost::product([m, n, k], FLOAT, element_bytes)
    }

    /// Contiguous elements of A and of B.
    pub(super) fn lines(self) -> [usize; 2] {
        match self.layout {
            GemmLayout::Tn => [self.k, self.k],
            GemmLayout::Nn => [self.k, self.n],
            GemmLayout::Nt => [self.m, self.n],
        }
    }
}

/// The kernels of `gemm.cu`, `gemm_decode.cu` and `gemm_sm90.cu`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GemmVersion {
    /// An output a thread.
    Baseline,
    /// Tiles of 64 × 64 for operands that are not aligned.
    Scalar64,
    /// Tiles of 64 × 64, `mma.sync`.
    Mma64,
    /// Tiles of 128 × 128, `mma.sync`.
    Mma128,
    /// Tiles of 128 × 128, `wgmma`: Hopper.
    Wgmma128,
    /// Tiles of 128 × 256, `wgmma`: Hopper.
    Wgmma256,
    /// A warp for four outputs of a few tokens.
    Decode,
}

impl GemmVersion {
    /// All of them.
    pub const ALL: [Self; 7] =
        [Self::Baseline, Self::Scalar64, Self::Mma64, Self::Mma128, Self::Wgmma128, Self::Wgmma256, Self::Decode];

    /// Whether this version computes `shape` with these properties.
    pub fn supports(self, shape: GemmShape, offer: GemmSupport) -> bool {
        let GemmSupport { aligned, hopper } = offer;
        let whole_vectors = aligned && shape.lines().iter().all(|line| line.is_multiple_of(VECTOR));
        match self {
            Self::Baseline | Self::Scalar64 => true,
            Self::Mma64 | Self::Mma128 => whole_vectors,
            Self::Wgmma128 | Self::Wgmma256 => whole_vectors && hopper && shape.k > 0,
            Self::Decode => whole_vectors && shape.layout == GemmLayout::Tn && shape.m <= DECODE_TOKENS,
        }
    }

    /// The tiles of a version that cuts C into tiles.
    pub(super) fn tile(self) -> Option<&'static Tile> {
        TILES.iter().find(|tile| tile.version == self)
    }
}

/// Properties of operands and device that versions require.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GemmSupport {
    /// A and B begin at multiples of 16 bytes.
    pub aligned: bool,
    /// The device has compute capability 9.0.
    pub hopper: bool,
}

/// A version, and how far the depth is split.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GemmPlan {
    /// The kernel.
    pub version: GemmVersion,
    /// Parts of the depth: summed apart by other blocks, then added in order; needs 4·m·n bytes each where there are
    /// several. [`GemmVersion::Decode`]: warps (1, 2, 4 or 8) that share a sum, without such memory.
    pub splits: u32,
}

thread_local! {
    static FORCED: Cell<Option<GemmPlan>> = const { Cell::new(None) };
}

/// Runs `f` with a plan forced: every matrix product that is called from this thread takes it, and panics where its
/// version has no kernel for the tensors.
pub fn with_plan<R>(plan: GemmPlan, f: impl FnOnce() -> R) -> R {
    with_forced(&FORCED, plan, f)
}

/// The plan that is forced.
pub(super) fn forced() -> Option<GemmPlan> {
    FORCED.get()
}

/// Elements of a 16-byte access.
const VECTOR: usize = 8;
/// Tokens up to which [`GemmVersion::Decode`] works.
const DECODE_TOKENS: usize = 8;
/// Outputs of a block of the decoding kernel with one warp a sum, and the inputs of one access of a warp.
pub(super) const DECODE_OUTPUTS: usize = 32;
const DECODE_INPUTS: usize = 256;
/// Blocks of the decoding kernel for each multiprocessor that keep memory busy.
const DECODE_BLOCKS: usize = 4;
/// Most parts of a depth, and most memory for their sums.
const MAX_SPLITS: usize = 16;
const MAX_SPLIT_BYTES: usize = 64 << 20;
/// Depth blocks that a part should have at least: less, and filling its ring costs more than it gains.
const MIN_SPLIT_BLOCKS: usize = 4;
/// Bytes of device memory a clock: 3.0 TB/s at 1.7 GHz.
const BYTES_CLOCK: usize = 1760;

/// Tiles of a version and their clocks on a multiprocessor: a block of depth, and a tile beside that (first loads, sums
/// to memory). Estimates, from the tensor cores' rates (1024 products a clock with `mma.sync`, 2048 with `wgmma`), the
/// share of them that such tiles reach, and the instructions of a tile's end.
pub(super) struct Tile {
    version: GemmVersion,
    pub(super) rows: usize,
    pub(super) columns: usize,
    depth: usize,
    block_clocks: usize,
    tile_clocks: usize,
}

const TILES: [Tile; 5] = [
    Tile { version: GemmVersion::Wgmma256, rows: 128, columns: 256, depth: 64, block_clocks: 1200, tile_clocks: 1000 },
    Tile { version: GemmVersion::Wgmma128, rows: 128, columns: 128, depth: 64, block_clocks: 700, tile_clocks: 800 },
    Tile { version: GemmVersion::Mma128, rows: 128, columns: 128, depth: 32, block_clocks: 640, tile_clocks: 1500 },
    Tile { version: GemmVersion::Mma64, rows: 64, columns: 64, depth: 64, block_clocks: 480, tile_clocks: 1000 },
    Tile { version: GemmVersion::Scalar64, rows: 64, columns: 64, depth: 64, block_clocks: 2000, tile_clocks: 1000 },
];

impl Tile {
    /// Tiles of C.
    pub(super) fn count(&self, shape: GemmShape) -> usize {
        shape.m.div_ceil(self.rows) * shape.n.div_ceil(self.columns)
    }

    /// Estimated clocks of a product.
    fn clocks(&self, shape: GemmShape, splits: usize, multiprocessors: usize) -> usize {
        let rounds = (self.count(shape) * splits).div_ceil(multiprocessors);
        let blocks = shape.k.div_ceil(self.depth).div_ceil(splits);
        let products = rounds * (blocks * self.block_clocks + self.tile_clocks);
        let memory = shape.cost(2).bytes as usize / BYTES_CLOCK;
        // The parts' sums are written and read, by one launch more.
        let combine = if splits > 1 { 8 * splits * shape.m * shape.n / BYTES_CLOCK + self.tile_clocks } else { 0 };
        products.max(memory) + combine
    }

    fn max_splits(&self, shape: GemmShape) -> usize {
        let by_memory = MAX_SPLIT_BYTES / (4 * shape.m * shape.n).max(1);
        MAX_SPLITS.min(by_memory).min(shape.k.div_ceil(self.depth) / MIN_SPLIT_BLOCKS).max(1)
    }
}

/// The version of the least estimated time; of equals the one with the larger tiles and the fewest parts. Few tokens
/// are bound by reading weights, whatever the tiles, and no product is needed where there is no depth.
pub(super) fn choose(shape: GemmShape, offer: GemmSupport, multiprocessors: u32) -> GemmPlan {
    let multiprocessors = multiprocessors as usize;
    if shape.k == 0 {
        return GemmPlan { version: GemmVersion::Baseline, splits: 1 };
    }
    if GemmVersion::Decode.supports(shape, offer) {
        let enough = |slices: &usize| shape.n * slices >= DECODE_OUTPUTS * DECODE_BLOCKS * multiprocessors;
        let fits = |slices: &usize| slices * DECODE_INPUTS <= shape.k || *slices == 1;
        let mut slices = [1, 2, 4, 8].into_iter().filter(fits);
        let slices = slices.clone().find(enough).or(slices.next_back()).unwrap_or(1);
        return GemmPlan { version: GemmVersion::Decode, splits: slices as u32 };
    }
    let plans = TILES.iter().filter(|tile| tile.version.supports(shape, offer)).flat_map(|tile| {
        (1..=tile.max_splits(shape)).map(move |splits| (tile.clocks(shape, splits, multiprocessors), tile, splits))
    });
    let (_, tile, splits) = plans.min_by_key(|(clocks, ..)| *clocks).expect("Scalar64 supports everything");
    GemmPlan { version: tile.version, splits: splits as u32 }
}

/// Bytes of the sums of parts that a product takes on an H100, whose 132 multiprocessors ask for most parts.
pub(in crate::backend::cuda) fn split_bytes(shape: GemmShape) -> u64 {
    let GemmPlan { version, splits } = choose(shape, GemmSupport { aligned: true, hopper: true }, 132);
    if splits == 1 || version == GemmVersion::Decode { 0 } else { 4 * splits as u64 * (shape.m * shape.n) as u64 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(layout: GemmLayout, (m, n, k): (usize, usize, usize), hopper: bool) -> (GemmVersion, u32) {
        let offer = GemmSupport { aligned: true, hopper };
        let plan = choose(GemmShape { layout, m, n, k }, offer, if hopper { 132 } else { 108 });
        (plan.version, plan.splits)
    }

    #[test]
    fn large_products_take_large_tiles_whole() {
        for layout in [GemmLayout::Tn, GemmLayout::Nn, GemmLayout::Nt] {
            assert_eq!(plan(layout, (8192, 8192, 8192), true), (GemmVersion::Wgmma256, 1));
            assert_eq!(plan(layout, (8192, 8192, 8192), false), (GemmVersion::Mma128, 1));
        }
    }

    #[test]
    fn deep_products_of_small_layers_are_split() {
        for hopper in [true, false] {
            let (_, splits) = plan(GemmLayout::Nt, (896, 128, 16384), hopper);
            assert!(splits >= 8, "{splits}");
            assert_eq!(plan(GemmLayout::Nt, (896, 128, 100), hopper).1, 1);
        }
    }

    #[test]
    fn few_tokens_are_decoded_by_as_many_warps_as_fill_the_device() {
        assert_eq!(plan(GemmLayout::Tn, (1, 151936, 896), true), (GemmVersion::Decode, 1));
        assert_eq!(plan(GemmLayout::Tn, (8, 3584, 3584), true), (GemmVersion::Decode, 8));
        assert_eq!(plan(GemmLayout::Tn, (2, 128, 512), true), (GemmVersion::Decode, 2));
        assert_eq!(plan(GemmLayout::Tn, (1, 64, 8), true), (GemmVersion::Decode, 1));
        assert_ne!(plan(GemmLayout::Tn, (9, 3584, 3584), true).0, GemmVersion::Decode);
        assert_ne!(plan(GemmLayout::Nn, (1, 3584, 3584), true).0, GemmVersion::Decode);
    }

    #[test]
    fn what_is_not_aligned_or_has_no_depth_takes_a_kernel_that_can() {
        let odd = GemmShape { layout: GemmLayout::Tn, m: 300, n: 300, k: 301 };
        assert_eq!(choose(odd, GemmSupport { aligned: true, hopper: true }, 132).version, GemmVersion::Scalar64);
        let even = GemmShape { k: 304, ..odd };
        assert_eq!(choose(even, GemmSupport { aligned: false, hopper: true }, 132).version, GemmVersion::Scalar64);
        assert_eq!(
            choose(GemmShape { k: 0, ..odd }, GemmSupport { aligned: true, hopper: true }, 132).version,
            GemmVersion::Baseline
        );
    }

    #[test]
    fn parts_keep_to_their_memory() {
        for (m, n, k) in [(4096, 4096, 1 << 20), (128, 128, 1 << 20), (100_000, 4096, 64), (1, 8, 4096)] {
            for layout in [GemmLayout::Tn, GemmLayout::Nn, GemmLayout::Nt] {
                let (version, splits) = plan(layout, (m, n, k), true);
                let bytes = if splits > 1 && version != GemmVersion::Decode { 4 * m * n * splits as usize } else { 0 };
                assert!(bytes <= MAX_SPLIT_BYTES && splits as usize <= MAX_SPLITS);
            }
        }
    }
}
