//! Masked AdamW and sums of squares: see `kernels/adamw.cu`.

use super::device::Device;
use super::launch::{Arg, Launch, args, blocks};
use super::memory::{self, Memory, Slice, slice, slice_mut};
use super::{Cuda, FLOAT, Precision, measure};
use crate::backend::{
    AdamW, AdamWMasked, AdamWModule, Cost, Element, FloatElement, Operator, ProximalGradients, Rounding, SumSquares,
    UpdateMeans, cost,
};
use crate::error::Result;
use std::sync::{Arc, Mutex};

const BLOCK: u32 = 256;
/// Elements of a chunk of the sums of squares: a constant, for the order of the sums depends on it.
const SUM_CHUNK: usize = 16 << 10;
/// Elements of a chunk of the step, least and most: multiples of the 2048 of a round of a block.
const STEP_CHUNKS: [usize; 2] = [8 << 10, 64 << 10];
/// Chunks of a block that a multiprocessor runs at a time, [`STEP_RESIDENT`] of them: the last ones leave it idle for
/// half of one, on average.
const STEP_ROUNDS: usize = 32;
const STEP_RESIDENT: usize = 3;
/// Tables kept on the device: a step's, the last phase's, and a few more.
const TABLES: usize = 8;

/// Cache of module tables in device memory, by their words: from step to step pointers and sizes stay, so that nothing
/// is uploaded.
#[derive(Default)]
pub(super) struct Tables(Mutex<Vec<Table>>);

struct Table {
    words: Vec<u64>,
    memory: Memory<u32>,
}

impl Tables {
    /// Runs `launch` with these words in device memory. The lock is held until the launch is queued: a table that is
    /// evicted later returns to the arena behind it.
    fn with(&self, device: &Arc<Device>, words: Vec<u64>, launch: impl FnOnce(Slice<u32>) -> Result<()>) -> Result<()> {
        let mut tables = self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let halves = words.len() * 2;
        let mut table = match tables.iter().position(|table| table.words == words) {
            Some(known) => tables.remove(known),
            None => {
                let mut memory = Memory::new(device, halves)?;
                memory::write(device, bytemuck::cast_slice(&words), &memory.all(halves))?;
                Table { words, memory }
            }
        };
        let launched = launch(*table.memory.all(halves));
        if tables.len() == TABLES {
            tables.remove(0);
        }
        tables.push(table);
        launched
    }
}

/// A table's rows (pointers, elements, chunks of the rows before it) and the chunks of all rows.
fn table<const POINTERS: usize>(
    rows: impl Iterator<Item = ([u64; POINTERS], usize)>,
    chunk: usize,
) -> (Vec<u64>, usize) {
    let (mut words, mut chunks) = (Vec::new(), 0);
    for (pointers, len) in rows {
        words.extend(pointers);
        words.extend([len as u64, chunks as u64]);
        chunks += len.div_ceil(chunk);
    }
    (words, chunks)
}

/// Elements of a chunk of a step over `elements`: enough chunks for all multiprocessors to end at about the same time,
/// and none so small that looking for its module counts.
fn step_chunk(elements: usize, multiprocessors: u32) -> usize {
    let [least, most] = STEP_CHUNKS;
    (elements / (multiprocessors as usize * STEP_RESIDENT * STEP_ROUNDS)).clamp(least, most) / least * least
}

fn launch(kernel: &'static str, blocks: u32, cost: Cost) -> Launch {
    Launch::new("adamw", kernel, [blocks], BLOCK, cost)
}

/// The kernel for gradients of type T.
fn by_element<T: FloatElement>([f32_form, bf16_form]: [&'static str; 2]) -> &'static str {
    if T::NAME == "f32" { f32_form } else { bf16_form }
}

/// The kernel for the types of gradients and moments: f32 f32, f32 bf16, bf16 f32, bf16 bf16.
fn by_state<P: Precision>(forms: [&'static str; 4]) -> &'static str {
    forms[usize::from(P::Grad::NAME != "f32") * 2 + usize::from(P::Moment::NAME != "f32")]
}

pub(super) fn sum_squares<P: Precision, T: FloatElement>(
    device: &Arc<Device>,
    tables: &Tables,
    op: SumSquares<'_, Cuda<P>, T>,
) -> Result<()> {
    let (cost, parts, squares) = (op.cost(), op.parts, slice_mut(op.squares));
    let (words, chunks) = table(parts.iter().map(|part| ([slice(part).pointer()], part.len())), SUM_CHUNK);
    if measure::baseline() {
        let kernel = by_element::<T>(["sum_squares_baseline_f32", "sum_squares_baseline_bf16"]);
        let launch = launch(kernel, blocks(parts.len(), 1), cost);
        // SAFETY: the table's rows are live views; a row has a block and an element of `squares`.
        return tables.with(device, words, |table| unsafe { device.launch(launch, args![table, &squares]) });
    }
    let mut sums = Memory::<u32>::new(device, chunks * 2)?;
    let sums = sums.all(chunks * 2);
    let chunk = SUM_CHUNK as u32;
    tables.with(device, words, |table| {
        let kernel = by_element::<T>(["sum_squares_chunks_vec8_f32", "sum_squares_chunks_vec8_bf16"]);
        let first = launch(kernel, blocks(chunks, 1), cost);
        // SAFETY: the table's rows are live views; a chunk has a block and an f64 of `sums`.
        unsafe { device.launch(first, args![table, &sums, parts.len() as u32, chunk]) }?;
        let second = launch("sum_squares_tensors", blocks(parts.len(), 1), Cost::default());
        // SAFETY: `sums` has an f64 for each of the table's chunks, and `squares` an element a row.
        unsafe { device.launch(second, args![table, &sums, &squares, chunk]) }
    })
}

/// Factors that are computed on the host in f64.
struct Factors {
    /// A pair a module: 1 − lr·decay, lr / (1 − β₁ᵗ).
    rates: Vec<f32>,
    /// 1 / √(1 − β₂ᵗ)
    inverse_root: f32,
}

impl Factors {
    fn new<P: Precision>(modules: &[AdamWModule<'_, Cuda<P>>], hyper: &AdamW) -> Self {
        let correction = |beta: f32| 1.0 - f64::from(beta).powi(hyper.step as i32);
        let rate = |module: &AdamWModule<'_, Cuda<P>>| {
            let (lr, decay) = (f64::from(module.lr), f64::from(module.weight_decay));
            [(1.0 - lr * decay) as f32, (lr / correction(hyper.beta1)) as f32]
        };
        Self {
            rates: modules.iter().flat_map(rate).collect(),
            inverse_root: (1.0 / correction(hyper.beta2).sqrt()) as f32,
        }
    }
}

/// Addresses of a module's tensors.
fn pointers<P: Precision>(module: &mut AdamWModule<'_, Cuda<P>>) -> [u64; 4] {
    let AdamWModule { weight, grad, m, v, .. } = module;
    let (weight, m, v) = (slice_mut(weight.reborrow()), slice_mut(m.reborrow()), slice_mut(v.reborrow()));
    [weight.pointer(), slice(grad).pointer(), m.pointer(), v.pointer()]
}

pub(super) fn adamw_masked<P: Precision>(
    device: &Arc<Device>,
    tables: &Tables,
    op: AdamWMasked<'_, '_, Cuda<P>>,
) -> Result<()> {
    let (cost, AdamWMasked { table: modules, squares, hyper }) = (op.cost(), op);
    let squares = slice(&squares);
    let AdamW { beta1, beta2, eps, seed, step, .. } = hyper;
    let Factors { rates, inverse_root } = Factors::new(modules, &hyper);
    let stochastic = u32::from(hyper.rounding == Rounding::Stochastic);
    let count = modules.len() as u32;
    let (mut on_device, mut clip) = (Memory::new(device, rates.len())?, Memory::<f32>::new(device, 1)?);
    let (on_device, clip) = (on_device.all(rates.len()), &clip.all(1));
    memory::write(device, &rates, &on_device)?;
    let rates = &on_device;
    let max_grad_norm = hyper.max_grad_norm.unwrap_or(f32::INFINITY);
    let factor = launch("adamw_clip_factor", u32::from(count > 0), Cost::default());
    // SAFETY: `squares` has `count` elements, `clip` one.
    unsafe { device.launch(factor, args![squares, count, max_grad_norm, clip]) }?;
    if measure::baseline() {
        let kernel = by_state::<P>([
            "adamw_masked_baseline_f32_f32",
            "adamw_masked_baseline_f32_bf16",
            "adamw_masked_baseline_bf16_f32",
            "adamw_masked_baseline_bf16_bf16",
        ]);
        return modules.iter_mut().enumerate().try_for_each(|(i, module)| {
            let (len, i) = (module.weight.len(), i as u32);
            let cost = cost::adamw(len, FLOAT, size_of::<P::Grad>(), size_of::<P::Moment>());
            let launch = launch(kernel, blocks(len, BLOCK as usize), cost);
            let [w, grad, m, v] = pointers(module).map(Arg::Pointer);
            let len = len as u64;
            let arguments =
                args![w, grad, m, v, len, i, rates, clip, beta1, beta2, inverse_root, eps, seed, step, stochastic];
            // SAFETY: four views of `len` elements, three of them borrowed mutably; a pair of rates a module.
            unsafe { device.launch(launch, arguments) }
        });
    }
    let chunk = step_chunk(modules.iter().map(|module| module.weight.len()).sum(), device.multiprocessors);
    let (words, chunks) = table(modules.iter_mut().map(|module| (pointers(module), module.weight.len())), chunk);
    let kernel = by_state::<P>([
        "adamw_masked_vec8_f32_f32",
        "adamw_masked_vec8_f32_bf16",
        "adamw_masked_vec8_bf16_f32",
        "adamw_masked_vec8_bf16_bf16",
    ]);
    let launch = launch(kernel, blocks(chunks, 1), cost);
    tables.with(device, words, |table| {
        let chunk = chunk as u32;
        let arguments =
            args![table, rates, clip, count, chunk, beta1, beta2, inverse_root, eps, seed, step, stochastic];
        // SAFETY: the table's rows are four live views of one length, three of them borrowed mutably; `rates` has a pair
        // a row; a chunk has a block.
        unsafe { device.launch(launch, arguments) }
    })
}

pub(super) fn update_means<P: Precision>(
    device: &Arc<Device>,
    tables: &Tables,
    op: UpdateMeans<'_, '_, Cuda<P>>,
) -> Result<()> {
    let (cost, UpdateMeans { table: rows, decay }) = (op.cost(), op);
    let (chunk, count) =
        (step_chunk(rows.iter().map(|row| row.mean.len()).sum(), device.multiprocessors), rows.len() as u32);
    let pointers = rows.iter_mut().map(|row| {
        let len = row.mean.len();
        ([slice_mut(row.mean.reborrow()).pointer(), slice(&row.weight).pointer()], len)
    });
    let (words, chunks) = table(pointers, chunk);
    let launch = launch("adamw_means_vec8_bf16", blocks(chunks, 1), cost);
    // SAFETY: the table's rows are two live views of one length, the mean borrowed mutably; a chunk has a block.
    tables.with(device, words, |table| unsafe { device.launch(launch, args![table, count, chunk as u32, decay]) })
}

pub(super) fn proximal_gradients<P: Precision>(
    device: &Arc<Device>,
    tables: &Tables,
    op: ProximalGradients<'_, '_, Cuda<P>>,
) -> Result<()> {
    let (cost, ProximalGradients { table: rows, rho }) = (op.cost(), op);
    let (chunk, count) =
        (step_chunk(rows.iter().map(|row| row.grad.len()).sum(), device.multiprocessors), rows.len() as u32);
    let pointers = rows.iter_mut().map(|row| {
        let (len, weight, anchor) = (row.grad.len(), slice(&row.weight).pointer(), slice(&row.anchor).pointer());
        ([slice_mut(row.grad.reborrow()).pointer(), weight, anchor], len)
    });
    let (words, chunks) = table(pointers, chunk);
    let kernel = by_element::<P::Grad>(["adamw_proximal_vec8_f32", "adamw_proximal_vec8_bf16"]);
    let launch = launch(kernel, blocks(chunks, 1), cost);
    // SAFETY: the table's rows are three live views of one length, the gradient borrowed mutably; a chunk has a block.
    tables.with(device, words, |table| unsafe { device.launch(launch, args![table, count, chunk as u32, rho]) })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The tensors of Qwen2.5-7B: 339, with 7.6e9 parameters.
    fn seven_billion() -> Vec<usize> {
        let (hidden, ffn, kv, vocab) = (3584, 18944, 512, 152_064);
        let layer = [
            hidden,
            hidden * hidden,
            hidden,
            kv * hidden,
            kv,
            kv * hidden,
            kv,
            hidden * hidden,
            hidden,
            ffn * hidden,
            ffn * hidden,
            hidden * ffn,
        ];
        [vocab * hidden].into_iter().chain(layer.repeat(28)).chain([hidden, vocab * hidden]).collect()
    }

    #[test]
    fn a_table_of_seven_billion_parameters() {
        let lengths = seven_billion();
        let elements: usize = lengths.iter().sum();
        assert_eq!((lengths.len(), elements), (339, 7_615_616_512));
        for chunk in [SUM_CHUNK, step_chunk(elements, 132)] {
            let (words, chunks) = table(lengths.iter().map(|len| ([7], *len)), chunk);
            let rows: Vec<&[u64]> = words.chunks(3).collect();
            let ends = rows.iter().skip(1).map(|row| row[2]).chain([chunks as u64]);
            for ((row, end), len) in rows.iter().zip(ends).zip(&lengths) {
                assert_eq!((row[0], row[1]), (7, *len as u64));
                assert!((end - row[2]) * chunk as u64 >= row[1] && (end - row[2] - 1) * (chunk as u64) < row[1]);
            }
            assert!(blocks(chunks, 1) as usize == chunks && chunks * chunk > elements);
        }
    }

    #[test]
    fn chunks_grow_with_the_table() {
        let chunks: Vec<usize> =
            [1, 800_000, 494_000_000, 7_615_616_512].iter().map(|elements| step_chunk(*elements, 132)).collect();
        assert_eq!(chunks, [8192, 8192, 32_768, 65_536]);
        assert!(chunks.iter().all(|chunk| chunk % (8 * BLOCK as usize) == 0));
    }
}
