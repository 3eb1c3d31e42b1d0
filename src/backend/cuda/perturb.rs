//! Perturbed copies of a weight: see `kernels/perturb.cu`.

use super::device::Device;
use super::launch::{Launch, args, blocks};
use super::memory::{Memory, Slice, SliceMut, slice, slice_mut};
use super::{Cuda, FLOAT, Precision, measure};
use crate::backend::cost::{NORMAL_FLOPS, perturbed_copies, sum_squares};
use crate::backend::{Buffer, Cost, Direction, MoveAlong, NoiseKey, Operator, Perturb, SquaredNorm};
use crate::error::Result;
use half::bf16;
use std::sync::Arc;

const BLOCK: usize = 256;
/// Elements that a block's threads take at once, eight each.
const ROUND: usize = 8 * BLOCK;
/// Most partial sums of a tensor: about four blocks for each multiprocessor of an H100, and two sums for each thread of
/// a block that adds them up.
const SUMS: usize = 512;
/// Blocks of a multiprocessor that the copies' kernels are bounded to: the grid is one wave.
const RESIDENT: u32 = 6;
const RESIDENT_LOW_RANK: u32 = 3;
/// Columns and rows of a block of the low-rank kernel.
const TILE: [usize; 2] = [256, 32];

fn launch(kernel: &'static str, grid: [u32; 2], cost: Cost) -> Launch {
    let [x, y] = grid;
    Launch::new("perturb", kernel, [x, y], BLOCK as u32, cost)
}

fn cost(elements: usize, bytes: usize, flops: usize) -> Cost {
    Cost { bytes: (elements * bytes) as u64, flops: (elements * flops) as u64 }
}

/// Partial sums of squares.
struct Sums {
    memory: Memory<f64>,
    count: usize,
}

impl Sums {
    fn new(device: &Arc<Device>, count: usize) -> Result<Self> {
        Ok(Self { memory: Memory::new(device, count)?, count })
    }

    fn all(&mut self) -> SliceMut<'_, f64> {
        self.memory.all(self.count)
    }
}

/// Elements of a partial sum of a tensor.
fn range(len: usize) -> usize {
    len.div_ceil(SUMS).next_multiple_of(ROUND)
}

/// Partial sums of a tensor of `len` elements.
fn parts(len: usize) -> usize {
    if len == 0 { 0 } else { len.div_ceil(range(len)) }
}

/// ‖w‖² in [`parts`].
fn squares(device: &Device, w: Slice<bf16>, sums: &SliceMut<f64>) -> Result<()> {
    let launch = launch("perturb_squares_vec8_bf16", [sums.len() as u32, 1], sum_squares(w.len(), FLOAT));
    // SAFETY: a tensor of `len` elements; a range of it has a block and a place in `sums`.
    unsafe { device.launch(launch, args![w, w.len() as u64, range(w.len()) as u64, sums]) }
}

pub(super) fn squared_norm<P: Precision>(
    device: &Arc<Device>,
    op: SquaredNorm<'_, Cuda<P>>,
) -> Result<Buffer<Cuda<P>, f64>> {
    let Sums { memory, count } = squares_of_tensor(device, slice(&op.w))?;
    Ok(Buffer::new(memory, count))
}

/// ‖w‖² in a new buffer.
fn squares_of_tensor(device: &Arc<Device>, w: Slice<bf16>) -> Result<Sums> {
    let mut sums = Sums::new(device, parts(w.len()))?;
    squares(device, w, &sums.all())?;
    Ok(sums)
}

/// ‖n‖² in parts, of `len` normals.
fn squares_of_normals(device: &Arc<Device>, key: NoiseKey, len: usize) -> Result<Sums> {
    let range = range(len);
    let mut sums = Sums::new(device, len.div_ceil(range))?;
    let launch = launch("perturb_squares_gaussian_f64", [sums.count as u32, 1], cost(len, 0, 2 + NORMAL_FLOPS));
    // SAFETY: a range of the normals has a block and an f64 of `sums`.
    unsafe { device.launch(launch, args![len as u64, range as u64, key.seed, key.stream, &sums.all()]) }?;
    Ok(sums)
}

/// The words of a stream from block `first` on ([`crate::rng`]); `to` holds whole blocks of four.
pub(super) fn words(device: &Device, key: NoiseKey, first: u64, to: &SliceMut<'_, u32>) -> Result<()> {
    assert!(to.len().is_multiple_of(4));
    let count = to.len() / 4;
    let launch = launch("perturb_words_u32", [blocks(count, BLOCK), 1], cost(to.len(), 4, 0));
    // SAFETY: four elements for each of `count` blocks.
    unsafe { device.launch(launch, args![to, count as u64, first, key.seed, key.stream]) }
}

/// Normals of the stream from block `first`, by columns of `rows`: element row·rank + k lies at k·rows + row.
pub(super) fn normals(
    device: &Device,
    key: NoiseKey,
    first: usize,
    rows: usize,
    rank: usize,
    to: &SliceMut<'_, f32>,
) -> Result<()> {
    assert_eq!(to.len(), rows * rank);
    let launch = launch("perturb_normals_f32", [blocks(rows * rank, 4 * BLOCK), 1], cost(rows * rank, 4, NORMAL_FLOPS));
    // SAFETY: `to` has rows·rank elements.
    unsafe { device.launch(launch, args![to, rows as u64, rank as u32, first as u64, key.seed, key.stream]) }
}

/// The copies that a direction makes of w.
struct Copies<'a> {
    w: Slice<'a, bf16>,
    /// ‖w‖² in parts; a scaling needs none.
    squares: Slice<'a, f64>,
    plus: SliceMut<'a, bf16>,
    minus: Option<SliceMut<'a, bf16>>,
    epsilon: f32,
}

impl Copies<'_> {
    /// A launch of one wave; the direction costs `bytes` and `flops` an element.
    fn launch(&self, device: &Device, kernel: &'static str, bytes: usize, flops: usize) -> Launch {
        let grid = blocks(self.w.len(), ROUND).min(device.multiprocessors * RESIDENT);
        launch(kernel, [grid, 1], self.cost(bytes, flops))
    }

    fn cost(&self, bytes: usize, flops: usize) -> Cost {
        perturbed_copies(self.w.len(), 1 + usize::from(self.minus.is_some()), bytes, flops, FLOAT)
    }

    fn gaussian(&self, device: &Arc<Device>, key: NoiseKey) -> Result<()> {
        let Self { w, squares, plus, minus, epsilon } = self;
        let launch = match measure::baseline() {
            true => launch("perturb_gaussian_baseline_bf16", [blocks(w.len(), BLOCK), 1], self.cost(0, NORMAL_FLOPS)),
            false => self.launch(device, "perturb_gaussian_vec8_bf16", 0, NORMAL_FLOPS),
        };
        let mut of_n = squares_of_normals(device, key, w.len())?;
        let (w_count, n_count) = (squares.len() as u32, of_n.count as u32);
        let (of_n, len) = (of_n.all(), w.len() as u64);
        let arguments =
            args![*w, plus, minus.as_ref(), len, *epsilon, *squares, w_count, &of_n, n_count, key.seed, key.stream];
        // SAFETY: tensors of `len` elements, the copies borrowed mutably; `count` partial sums each.
        unsafe { device.launch(launch, arguments) }
    }

    fn rademacher(&self, device: &Device, key: NoiseKey) -> Result<()> {
        let Self { w, squares, plus, minus, epsilon } = self;
        let launch = self.launch(device, "perturb_rademacher_vec8_bf16", 0, 0);
        let (count, len) = (squares.len() as u32, w.len() as u64);
        let arguments = args![*w, plus, minus.as_ref(), len, *epsilon, *squares, count, key.seed, key.stream];
        // SAFETY: tensors of `len` elements, the copies borrowed mutably; `count` partial sums.
        unsafe { device.launch(launch, arguments) }
    }

    fn scale(&self, device: &Device) -> Result<()> {
        let Self { w, plus, minus, epsilon, .. } = self;
        let launch = self.launch(device, "perturb_scale_vec8_bf16", 0, 0);
        // SAFETY: tensors of `len` elements, the copies borrowed mutably.
        unsafe { device.launch(launch, args![*w, plus, minus.as_ref(), w.len() as u64, *epsilon]) }
    }

    fn given(&self, device: &Arc<Device>, n: Slice<bf16>) -> Result<()> {
        let Self { w, squares, plus, minus, epsilon } = self;
        let launch = self.launch(device, "perturb_given_vec8_bf16", 2, 0);
        let mut of_n = squares_of_tensor(device, n)?;
        let (w_count, n_count) = (squares.len() as u32, of_n.count as u32);
        let (of_n, len) = (of_n.all(), w.len() as u64);
        let arguments = args![*w, plus, minus.as_ref(), len, *epsilon, *squares, w_count, &of_n, n_count, n];
        // SAFETY: tensors of `len` elements, the copies borrowed mutably; `count` partial sums each.
        unsafe { device.launch(launch, arguments) }
    }

    fn low_rank(&self, device: &Arc<Device>, key: NoiseKey, rank: usize, rows: usize) -> Result<()> {
        let Self { w, squares, plus, minus, epsilon } = self;
        let columns = w.len() / rows;
        let [mut a, mut b] = [Memory::new(device, rows * rank)?, Memory::new(device, columns * rank)?];
        let (a, b) = (a.all(rows * rank), b.all(columns * rank));
        normals(device, key, 0, rows, rank, &a)?;
        normals(device, key, (rows * rank).div_ceil(4), columns, rank, &b)?;
        let mut of_n = Sums::new(device, rank * rank)?;
        let (w_count, n_count, sides) = (squares.len() as u32, of_n.count as u32, [rows as u64, columns as u64]);
        let (of_n, rank32) = (of_n.all(), rank as u32);
        let gram = launch("perturb_squares_low_rank_f64", [rank32; 2], cost(rank * rank, 4, 2 * (rows + columns)));
        // SAFETY: factors of rank·rows and rank·columns elements; an entry has a block and an f64 of `of_n`.
        unsafe { device.launch(gram, args![*a, *b, sides[0], sides[1], &of_n]) }?;
        let across = blocks(columns, TILE[0]);
        let down = blocks(rows, TILE[1]).min((device.multiprocessors * RESIDENT_LOW_RANK).div_ceil(across));
        let launch = launch("perturb_low_rank_vec8_bf16", [across, down], self.cost(0, 2 * rank));
        let arguments = args![
            *w,
            plus,
            minus.as_ref(),
            sides[0],
            sides[1],
            *epsilon,
            *squares,
            w_count,
            &of_n,
            n_count,
            *a,
            *b,
            rank32
        ];
        // SAFETY: tensors of rows·columns elements, the copies borrowed mutably; the factors as above, aligned to 16
        // bytes as all memory is; `count` partial sums each.
        unsafe { device.launch(launch, arguments) }
    }
}

pub(super) fn perturb<P: Precision>(device: &Arc<Device>, op: Perturb<'_, Cuda<P>>) -> Result<()> {
    let (w, known, direction) = (slice(&op.w), op.squares.as_ref().map(slice), op.direction.map(slice));
    assert!(known.is_none_or(|known| known.len() == parts(w.len())));
    if w.len() == 0 {
        return Ok(());
    }
    let mut own = match known.is_none() && direction.has_norm() {
        true => squares_of_tensor(device, w)?,
        false => Sums::new(device, 0)?,
    };
    let own = own.all();
    let (plus, minus) = (slice_mut(op.plus), op.minus.map(slice_mut));
    let copies = Copies { w, squares: known.unwrap_or(*own), plus, minus, epsilon: op.epsilon };
    match direction {
        Direction::Gaussian(key) => copies.gaussian(device, key),
        Direction::Rademacher(key) => copies.rademacher(device, key),
        Direction::LowRank { key, rank, rows } => copies.low_rank(device, key, rank, rows),
        Direction::Scale => copies.scale(device),
        Direction::Given(n) => copies.given(device, n),
    }
}

pub(super) fn move_along<P: Precision>(device: &Device, op: MoveAlong<'_, Cuda<P>>) -> Result<()> {
    let cost = op.cost();
    let (len, rho) = (op.x.len(), op.rho);
    let (x, direction, squares) = (slice_mut(op.x), slice(&op.direction), slice(&op.squares));
    let launch = launch("perturb_along_vec8_bf16", [blocks(len, ROUND), 1], cost);
    // SAFETY: two views of `len` elements, x borrowed mutably, and one number; a block has `ROUND` elements.
    unsafe { device.launch(launch, args![&x, direction, len as u64, squares, rho]) }
}
