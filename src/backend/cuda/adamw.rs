//! Masked AdamW and sums of squares: see `kernels/adamw.cu`.

use super::device::{Device, Launch, args, blocks};
use super::memory::{self, Memory, Slice, SliceMut, slice, slice_mut};
use super::{Cuda, FLOAT, Precision};
use crate::backend::{AdamW, AdamWModule, Cost, FloatElement, Rounding, View, ViewMut, cost};
use crate::error::Result;
use half::bf16;
use std::sync::{Arc, Mutex};

const BLOCK: u32 = 256;
/// Elements of one block of the vector kernels; `CHUNK` there.
const CHUNK: usize = 16384;
/// Tables kept on the device: those of a step, the old ones of a phase, and a few more.
const TABLES: usize = 8;

/// One row of the table.
pub(super) struct Module<'a, G, M> {
    pub(super) weight: SliceMut<'a, bf16>,
    pub(super) grad: Slice<'a, G>,
    pub(super) m: SliceMut<'a, M>,
    pub(super) v: SliceMut<'a, M>,
    pub(super) lr: f32,
    pub(super) weight_decay: f32,
}

impl<'a, G: FloatElement, M: FloatElement> Module<'a, G, M> {
    /// The memory of a row's views.
    pub(super) fn new<P: Precision<Grad = G, Moment = M>>(module: &'a mut AdamWModule<'_, Cuda<P>>) -> Self {
        Self {
            weight: slice_mut(module.weight.reborrow()),
            grad: slice(&module.grad),
            m: slice_mut(module.m.reborrow()),
            v: slice_mut(module.v.reborrow()),
            lr: module.lr,
            weight_decay: module.weight_decay,
        }
    }
}

/// Module tables on the device, by what they hold: from step to step pointers and sizes stay, so that nothing is
/// uploaded.
#[derive(Default)]
pub(super) struct Tables(Mutex<Vec<Table>>);

struct Table {
    words: Vec<u64>,
    memory: Memory<u32>,
}

impl Tables {
    /// Runs `launch` on these words as the device has them. The lock is held until the launch is queued: a table that
    /// is dropped later goes back to the arena behind it.
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

/// Words of a table, row after row, and how many chunks its tensors have: pointers, elements, chunks before this row.
fn table<const POINTERS: usize>(rows: impl Iterator<Item = ([u64; POINTERS], usize)>) -> (Vec<u64>, usize) {
    let (mut words, mut chunks) = (Vec::new(), 0);
    for (pointers, len) in rows {
        words.extend(pointers);
        words.extend([len as u64, chunks as u64]);
        chunks += len.div_ceil(CHUNK);
    }
    (words, chunks)
}

fn launch(kernel: &'static str, blocks: u32, cost: Cost) -> Launch {
    Launch { image: "adamw", kernel, grid: [blocks, 1, 1], block: BLOCK, shared_bytes: 0, cost }
}

/// The form of a kernel for these gradients.
fn by_element<T: FloatElement>([f32_form, bf16_form]: [&'static str; 2]) -> &'static str {
    if T::NAME == "f32" { f32_form } else { bf16_form }
}

/// The form of a kernel for these gradients and moments: f32 f32, f32 bf16, bf16 f32, bf16 bf16.
fn by_state<G: FloatElement, M: FloatElement>(forms: [&'static str; 4]) -> &'static str {
    forms[usize::from(G::NAME != "f32") * 2 + usize::from(M::NAME != "f32")]
}

fn squares_cost<T: FloatElement>(parts: &[Slice<T>]) -> Cost {
    cost::sum_squares(parts.iter().map(|part| part.len()).sum(), size_of::<T>())
}

/// squares\[i\] = Σ parts\[i\]².
pub(super) fn sum_squares<T: FloatElement>(
    device: &Arc<Device>,
    tables: &Tables,
    parts: &[Slice<T>],
    squares: SliceMut<f32>,
) -> Result<()> {
    assert_eq!(parts.len(), squares.len());
    let (words, chunks) = table(parts.iter().map(|part| ([part.pointer()], part.len())));
    let mut sums = Memory::<u32>::new(device, chunks * 2)?;
    let sums = sums.all(chunks * 2);
    tables.with(device, words, |table| {
        let kernel = by_element::<T>(["sum_squares_chunks_vec8_f32", "sum_squares_chunks_vec8_bf16"]);
        let first = launch(kernel, blocks(chunks, 1), squares_cost(parts));
        // SAFETY: the table's rows are live views; a chunk has a block and a place in `sums`.
        unsafe { device.launch(first, args![table, &sums, parts.len() as u32]) }?;
        let second = launch("sum_squares_tensors", blocks(parts.len(), 1), Cost::default());
        // SAFETY: `sums` has the places that the table tells of, and `squares` one a row.
        unsafe { device.launch(second, args![table, &sums, &squares]) }
    })
}

/// What the step's kernels take beside the table.
struct Hyper {
    /// A pair a module: 1 − lr·decay, lr / (1 − β₁ᵗ).
    rates: Vec<f32>,
    /// 1 / √(1 − β₂ᵗ)
    inverse_root: f32,
    max_grad_norm: f32,
    stochastic: u32,
}

impl Hyper {
    fn new<G, M>(modules: &[Module<G, M>], hyper: &AdamW) -> Self {
        let correction = |beta: f32| 1.0 - f64::from(beta).powi(hyper.step as i32);
        let rate = |module: &Module<G, M>| {
            let (lr, decay) = (f64::from(module.lr), f64::from(module.weight_decay));
            [(1.0 - lr * decay) as f32, (lr / correction(hyper.beta1)) as f32]
        };
        Self {
            rates: modules.iter().flat_map(rate).collect(),
            inverse_root: (1.0 / correction(hyper.beta2).sqrt()) as f32,
            max_grad_norm: hyper.max_grad_norm.unwrap_or(f32::INFINITY),
            stochastic: u32::from(hyper.rounding == Rounding::Stochastic),
        }
    }
}

fn step_cost<G, M>(modules: &[Module<G, M>]) -> Cost {
    let elements = modules.iter().map(|module| module.weight.len()).sum();
    cost::adamw(elements, FLOAT, size_of::<G>(), size_of::<M>())
}

fn check<G, M>(modules: &[Module<G, M>], squares: usize) {
    assert_eq!(modules.len(), squares);
    for module in modules {
        assert_eq!([module.grad.len(), module.m.len(), module.v.len()], [module.weight.len(); 3]);
    }
}

/// One step over the table.
pub(super) fn adamw_masked<G: FloatElement, M: FloatElement>(
    device: &Arc<Device>,
    tables: &Tables,
    modules: &[Module<G, M>],
    squares: Slice<f32>,
    hyper: AdamW,
) -> Result<()> {
    check(modules, squares.len());
    let pointers = |module: &Module<G, M>| {
        [module.weight.pointer(), module.grad.pointer(), module.m.pointer(), module.v.pointer()]
    };
    let (words, chunks) = table(modules.iter().map(|module| (pointers(module), module.weight.len())));
    let AdamW { beta1, beta2, eps, seed, step, .. } = hyper;
    let Hyper { rates, inverse_root, max_grad_norm, stochastic } = Hyper::new(modules, &hyper);
    let mut on_device = Memory::new(device, rates.len())?;
    let on_device = on_device.all(rates.len());
    memory::write(device, &rates, &on_device)?;
    let rates = &on_device;
    let count = modules.len() as u32;
    let kernel = by_state::<G, M>([
        "adamw_masked_vec8_f32_f32",
        "adamw_masked_vec8_f32_bf16",
        "adamw_masked_vec8_bf16_f32",
        "adamw_masked_vec8_bf16_bf16",
    ]);
    let launch = launch(kernel, blocks(chunks, 1), step_cost(modules));
    tables.with(device, words, |table| {
        let arguments =
            args![table, rates, squares, count, max_grad_norm, beta1, beta2, inverse_root, eps, seed, step, stochastic];
        // SAFETY: the table's rows are four live views of one length, three of them borrowed mutably; `rates` has a
        // pair and `squares` a number a row; a chunk has a block.
        unsafe { device.launch(launch, arguments) }
    })
}

/// The first versions of the kernels, for benches and for tests of the others.
impl<P: Precision> Cuda<P> {
    /// [`crate::backend::Backend::sum_squares`], a block a tensor.
    ///
    /// # Errors
    /// [`crate::Error::Device`] where the driver fails.
    pub fn sum_squares_baseline<T: FloatElement>(
        &self,
        parts: &[View<'_, Self, T>],
        squares: ViewMut<'_, Self, f32>,
    ) -> Result<()> {
        assert_eq!(parts.len(), squares.len());
        let parts: Vec<_> = parts.iter().map(slice).collect();
        let squares = slice_mut(squares);
        let (words, _) = table(parts.iter().map(|part| ([part.pointer()], part.len())));
        let kernel = by_element::<T>(["sum_squares_baseline_f32", "sum_squares_baseline_bf16"]);
        self.tables.with(&self.device, words, |table| {
            let launch = launch(kernel, blocks(parts.len(), 1), squares_cost(&parts));
            // SAFETY: the table's rows are live views; a row has a block and a place in `squares`.
            unsafe { self.device.launch(launch, args![table, &squares]) }
        })
    }

    /// [`crate::backend::Backend::adamw_masked`], an element a thread and a launch a module: the same bytes.
    ///
    /// # Errors
    /// [`crate::Error::Device`] where the driver fails.
    pub fn adamw_masked_baseline(
        &self,
        table: &mut [AdamWModule<'_, Self>],
        squares: View<'_, Self, f32>,
        hyper: AdamW,
    ) -> Result<()> {
        let modules: Vec<_> = table.iter_mut().map(Module::new).collect();
        let squares = slice(&squares);
        check(&modules, squares.len());
        let AdamW { beta1, beta2, eps, seed, step, .. } = hyper;
        let Hyper { rates, inverse_root, max_grad_norm, stochastic } = Hyper::new(&modules, &hyper);
        let mut on_device = Memory::new(&self.device, rates.len())?;
        let on_device = on_device.all(rates.len());
        memory::write(&self.device, &rates, &on_device)?;
        let kernel = by_state::<P::Grad, P::Moment>([
            "adamw_masked_baseline_f32_f32",
            "adamw_masked_baseline_f32_bf16",
            "adamw_masked_baseline_bf16_f32",
            "adamw_masked_baseline_bf16_bf16",
        ]);
        let count = modules.len() as u32;
        for (i, module) in modules.iter().enumerate() {
            let Module { weight, grad, m, v, .. } = module;
            let launch = launch(kernel, blocks(weight.len(), BLOCK as usize), step_cost(std::slice::from_ref(module)));
            let arguments = args![
                weight,
                *grad,
                m,
                v,
                weight.len() as u64,
                i as u32,
                &on_device,
                squares,
                count,
                max_grad_norm,
                beta1,
                beta2,
                inverse_root,
                eps,
                seed,
                step,
                stochastic
            ];
            // SAFETY: four views of `len` elements, three of them borrowed mutably; a pair of rates and a number of
            // squares a module.
            unsafe { self.device.launch(launch, arguments) }?;
        }
        Ok(())
    }
}
