//! The CPU backend, rounding to bf16 where the CUDA backend does: what the device's precision alone makes of a result.
//!
//! What a kernel computes in f32 is computed in f32 here, in another order; what it stores as bf16 is rounded once. Rounded
//! inside of an operation: the normalised value of RMSNorm; P and dS of attention, for a head_dim of 64 or 128, by the
//! largest of the whole row where the kernel goes by that of the tiles so far. log-sum-exps, 1/rms and losses are f32. What tensor
//! cores cut off of a sum (`swat_standin::cores`) is thousands of times less than the roundings to bf16, and left out.

use crate::common::attention::{Products, Sizes, attend_query, attend_rounding, gradients};
use half::bf16;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use swat::backend::cpu::Cpu;
use swat::backend::{
    AdamW, AdamWModule, Attention, Backend, Buffer, Direction, Documents, Element, Epilogue, FloatElement, In,
    InputGradient, LinearShape, Out, Sampling, View, ViewMut,
};
use swat::error::Result;
use swat::rng::{Philox, words};

/// The emulation. bf16 numbers are kept as f32.
#[derive(Clone)]
pub struct Rounded {
    /// Whether gradients and moments are bf16, too.
    bf16_state: bool,
    /// Where activations and gradients are rounded on a grid that is moved by a part of a unit, drawn for each: the seed
    /// and the draws so far.
    moved: Option<(u64, Arc<AtomicU64>)>,
}

impl Rounded {
    /// Rounds to nearest even, as the kernels do.
    pub fn new(bf16_state: bool) -> Self {
        Self { bf16_state, moved: None }
    }

    /// Rounds as much as [`Rounded::new`], but to other numbers for each seed: errors as large, and independent.
    pub fn moved(bf16_state: bool, seed: u64) -> Self {
        Self { bf16_state, moved: Some((seed, Arc::default())) }
    }

    fn round(&self, y: ViewMut<'_, Self, f32>) -> Result<()> {
        let Some((seed, draws)) = &self.moved else { return edit(y, |_, x| nearest(x)) };
        let mut random = Philox::new(*seed, draws.fetch_add(1, Ordering::Relaxed));
        edit(y, |_, x| {
            let unit = f32::from_bits(x.to_bits() & 0x7f80_0000) / 128.0;
            let part = random.uniform() as f32 - 0.5;
            if unit == 0.0 { 0.0 } else { ((x / unit + part).round_ties_even() - part) * unit }
        })
    }

    /// What is stored as a gradient of a weight.
    fn round_state(&self, y: ViewMut<'_, Self, f32>) -> Result<()> {
        if self.bf16_state { self.round(y) } else { Ok(()) }
    }
}

fn nearest(x: f32) -> f32 {
    bf16::from_f32(x).to_f32()
}

/// A view as the CPU's.
fn of<'a, T: Element>(view: &View<'a, Rounded, T>) -> View<'a, Cpu, T> {
    view.storage.range(view.range.clone())
}

/// A view as the CPU's, to write.
fn to<'a, T: Element>(view: &'a mut ViewMut<'_, Rounded, T>) -> ViewMut<'a, Cpu, T> {
    view.storage.range_mut(view.range.clone())
}

fn read<T: Element>(view: View<'_, Cpu, T>) -> Result<Vec<T>> {
    let mut host = vec![bytemuck::Zeroable::zeroed(); view.len()];
    Cpu.read(view, &mut host)?;
    Ok(host)
}

fn read_f64(view: &View<'_, Rounded, f32>) -> Result<Vec<f64>> {
    Ok(read(of(view))?.into_iter().map(f64::from).collect())
}

fn write_f64(values: &[f64], mut into: ViewMut<'_, Rounded, f32>) -> Result<()> {
    let values: Vec<f32> = values.iter().map(|x| *x as f32).collect();
    Cpu.write(&values, to(&mut into))
}

/// Puts f(index, x) for each x.
fn edit(mut y: ViewMut<'_, Rounded, f32>, mut f: impl FnMut(usize, f32) -> f32) -> Result<()> {
    let mut host = read(y.storage.range(y.range.clone()))?;
    host.iter_mut().enumerate().for_each(|(i, x)| *x = f(i, *x));
    Cpu.write(&host, to(&mut y))
}

/// Calls `f` with an attention as the CPU's.
fn on_cpu(shape: &Attention<'_, Rounded>, f: impl FnOnce(&Attention<'_, Cpu>) -> Result<()>) -> Result<()> {
    let Attention { heads, kv_heads, head_dim, scale, window, documents } = *shape;
    let documents = Documents { starts: documents.starts.clone(), device: Cpu.zeros(0)? };
    f(&Attention { heads, kv_heads, head_dim, scale, window, documents: &documents })
}

/// Calls `f` with the sizes of an attention, where tensor cores serve it.
fn on_tensor_cores(shape: &Attention<'_, Rounded>, f: impl FnOnce(&Sizes) -> Result<()>) -> Option<Result<()>> {
    let Attention { heads, kv_heads, head_dim, window, .. } = *shape;
    let lengths: Vec<usize> = shape.documents.starts.windows(2).map(|w| (w[1] - w[0]) as usize).collect();
    matches!(head_dim, 64 | 128).then(|| f(&Sizes { heads, kv_heads, head_dim, window, lengths: &lengths }))
}

impl Backend for Rounded {
    type Float = f32;
    type Grad = f32;
    type Moment = f32;
    type Storage<T: Element> = Buffer<Cpu, T>;

    fn name(&self) -> String {
        "rounded".into()
    }

    fn zeros<T: Element>(&self, len: usize) -> Result<Buffer<Self, T>> {
        Ok(Buffer::new(Cpu.zeros(len)?, len))
    }

    fn write<T: Element>(&self, host: &[T], mut into: ViewMut<'_, Self, T>) -> Result<()> {
        Cpu.write(host, to(&mut into))
    }

    fn read<T: Element>(&self, from: View<'_, Self, T>, host: &mut [T]) -> Result<()> {
        Cpu.read(of(&from), host)
    }

    fn copy<T: Element>(&self, from: View<'_, Self, T>, mut into: ViewMut<'_, Self, T>) -> Result<()> {
        Cpu.copy(of(&from), to(&mut into))
    }

    fn clear<T: Element>(&self, mut into: ViewMut<'_, Self, T>) -> Result<()> {
        Cpu.clear(to(&mut into))
    }

    fn synchronize(&self) -> Result<()> {
        Ok(())
    }

    fn linear(
        &self,
        x: In<'_, Self>,
        w: In<'_, Self>,
        mut y: Out<'_, Self>,
        shape: LinearShape,
        epilogue: Epilogue<'_, Self>,
    ) -> Result<()> {
        let epilogue = Epilogue {
            alpha: epilogue.alpha,
            bias: epilogue.bias.as_ref().map(of),
            residual: epilogue.residual.as_ref().map(of),
            accumulate: epilogue.accumulate,
        };
        Cpu.linear(of(&x), of(&w), to(&mut y), shape, epilogue)?;
        self.round(y)
    }

    fn linear_backward_input(
        &self,
        dy: In<'_, Self>,
        w: In<'_, Self>,
        mut dx: Out<'_, Self>,
        shape: LinearShape,
        alpha: f32,
        accumulate: bool,
    ) -> Result<()> {
        Cpu.linear_backward_input(of(&dy), of(&w), to(&mut dx), shape, alpha, accumulate)?;
        self.round(dx)
    }

    /// The terms are added in f32, and rounded once.
    fn linear_backward_input_each(
        &self,
        layers: &[InputGradient<'_, Self>],
        mut dx: Out<'_, Self>,
        tokens: usize,
        accumulate: bool,
    ) -> Result<()> {
        let layers = layers.iter().map(|InputGradient { dy, w }| InputGradient { dy: of(dy), w: of(w) });
        Cpu.linear_backward_input_each(&layers.collect::<Vec<_>>(), to(&mut dx), tokens, accumulate)?;
        self.round(dx)
    }

    fn linear_backward_weight(
        &self,
        dy: In<'_, Self>,
        x: In<'_, Self>,
        mut dw: Out<'_, Self>,
        shape: LinearShape,
        alpha: f32,
        accumulate: bool,
    ) -> Result<()> {
        Cpu.linear_backward_weight(of(&dy), of(&x), to(&mut dw), shape, alpha, accumulate)?;
        self.round_state(dw)
    }

    fn linear_backward_bias(
        &self,
        dy: In<'_, Self>,
        mut dbias: Out<'_, Self>,
        tokens: usize,
        outputs: usize,
        accumulate: bool,
    ) -> Result<()> {
        Cpu.linear_backward_bias(of(&dy), to(&mut dbias), tokens, outputs, accumulate)?;
        self.round_state(dbias)
    }

    fn attention(
        &self,
        q: In<'_, Self>,
        k: In<'_, Self>,
        v: In<'_, Self>,
        mut o: Out<'_, Self>,
        mut lse: Option<ViewMut<'_, Self, f32>>,
        shape: &Attention<'_, Self>,
    ) -> Result<()> {
        let cores = on_tensor_cores(shape, |sizes| {
            let (values, sums) =
                attend_rounding(sizes, &read_f64(&q)?, &read_f64(&k)?, &read_f64(&v)?, Products::Rounded);
            write_f64(&values, o.reborrow())?;
            lse.as_mut().map_or(Ok(()), |lse| write_f64(&sums, lse.reborrow()))
        });
        cores.unwrap_or_else(|| {
            on_cpu(shape, |shape| Cpu.attention(of(&q), of(&k), of(&v), to(&mut o), lse.as_mut().map(to), shape))
        })?;
        self.round(o)
    }

    fn attention_backward(
        &self,
        q: In<'_, Self>,
        k: In<'_, Self>,
        v: In<'_, Self>,
        o: In<'_, Self>,
        lse: View<'_, Self, f32>,
        d_o: In<'_, Self>,
        mut dq: Out<'_, Self>,
        mut dk: Out<'_, Self>,
        mut dv: Out<'_, Self>,
        shape: &Attention<'_, Self>,
    ) -> Result<()> {
        let saved = [&q, &k, &v, &o, &lse, &d_o];
        let cores = on_tensor_cores(shape, |sizes| {
            let saved = saved.map(read_f64).into_iter().collect::<Result<Vec<_>>>()?;
            let results = gradients(sizes, std::array::from_fn(|i| saved[i].as_slice()), Products::Rounded);
            let into = [dq.reborrow(), dk.reborrow(), dv.reborrow()];
            results.iter().zip(into).try_for_each(|(values, into)| write_f64(values, into))
        });
        cores.unwrap_or_else(|| {
            on_cpu(shape, |shape| {
                let [q, k, v, o, lse, d_o] = saved.map(of);
                Cpu.attention_backward(q, k, v, o, lse, d_o, to(&mut dq), to(&mut dk), to(&mut dv), shape)
            })
        })?;
        self.round(dq)?;
        self.round(dk)?;
        self.round(dv)
    }

    fn attention_decode(
        &self,
        q: In<'_, Self>,
        k: In<'_, Self>,
        v: In<'_, Self>,
        mut o: Out<'_, Self>,
        spans: View<'_, Self, u32>,
        longest: usize,
        shape: &Attention<'_, Self>,
    ) -> Result<()> {
        let cores = on_tensor_cores(shape, |sizes| {
            let [q, k, v] = [read_f64(&q)?, read_f64(&k)?, read_f64(&v)?];
            let width = sizes.heads * sizes.head_dim;
            let mut values = vec![0.0; q.len()];
            let queries = q.chunks_exact(width).zip(values.chunks_exact_mut(width));
            for ((q, o), span) in queries.zip(read(of(&spans))?.chunks_exact(2)) {
                let (end, rows) = ((span[0] + span[1]) as usize, span[1] as usize);
                let seen = rows.min(sizes.window.unwrap_or(rows));
                attend_query(sizes, q, &k, &v, end - seen..end, o, Products::Rounded);
            }
            write_f64(&values, o.reborrow())
        });
        cores.unwrap_or_else(|| {
            on_cpu(shape, |shape| Cpu.attention_decode(of(&q), of(&k), of(&v), to(&mut o), of(&spans), longest, shape))
        })?;
        self.round(o)
    }

    fn rmsnorm(
        &self,
        x: In<'_, Self>,
        weight: In<'_, Self>,
        mut y: Out<'_, Self>,
        mut rstd: Option<ViewMut<'_, Self, f32>>,
        width: usize,
        eps: f32,
    ) -> Result<()> {
        let mut ones = Cpu.zeros(width)?;
        Cpu.write(&vec![1.0; width], ones.view_mut())?;
        Cpu.rmsnorm(of(&x), ones.view(), to(&mut y), rstd.as_mut().map(to), width, eps)?;
        self.round(y.reborrow())?;
        let weight = read(of(&weight))?;
        edit(y.reborrow(), |i, x| x * weight[i % width])?;
        self.round(y)
    }

    fn rmsnorm_backward(
        &self,
        dy: In<'_, Self>,
        x: In<'_, Self>,
        weight: In<'_, Self>,
        rstd: View<'_, Self, f32>,
        mut dx: Option<Out<'_, Self>>,
        mut dweight: Option<Out<'_, Self>>,
        width: usize,
        accumulate_dx: bool,
        accumulate_dweight: bool,
    ) -> Result<()> {
        let (dx_to, dweight_to) = (dx.as_mut().map(to), dweight.as_mut().map(to));
        let (dy, x, weight, rstd) = (of(&dy), of(&x), of(&weight), of(&rstd));
        Cpu.rmsnorm_backward(dy, x, weight, rstd, dx_to, dweight_to, width, accumulate_dx, accumulate_dweight)?;
        dx.map_or(Ok(()), |dx| self.round(dx))?;
        dweight.map_or(Ok(()), |dweight| self.round_state(dweight))
    }

    fn rope(
        &self,
        mut x: Out<'_, Self>,
        table: View<'_, Self, f32>,
        positions: View<'_, Self, u32>,
        heads: usize,
        head_dim: usize,
        inverse: bool,
    ) -> Result<()> {
        Cpu.rope(to(&mut x), of(&table), of(&positions), heads, head_dim, inverse)?;
        self.round(x)
    }

    fn swiglu(&self, gate: In<'_, Self>, up: In<'_, Self>, mut y: Out<'_, Self>) -> Result<()> {
        Cpu.swiglu(of(&gate), of(&up), to(&mut y))?;
        self.round(y)
    }

    fn swiglu_backward(&self, mut gate: Out<'_, Self>, mut up: Out<'_, Self>, dy: In<'_, Self>) -> Result<()> {
        Cpu.swiglu_backward(to(&mut gate), to(&mut up), of(&dy))?;
        self.round(gate)?;
        self.round(up)
    }

    fn gather_rows(
        &self,
        from: In<'_, Self>,
        rows: View<'_, Self, u32>,
        mut into: Out<'_, Self>,
        width: usize,
    ) -> Result<()> {
        Cpu.gather_rows(of(&from), of(&rows), to(&mut into), width)
    }

    fn scatter_rows(
        &self,
        from: In<'_, Self>,
        rows: View<'_, Self, u32>,
        mut into: Out<'_, Self>,
        width: usize,
    ) -> Result<()> {
        Cpu.scatter_rows(of(&from), of(&rows), to(&mut into), width)
    }

    fn embedding_backward(
        &self,
        dy: In<'_, Self>,
        rows: View<'_, Self, u32>,
        mut dtable: Out<'_, Self>,
        width: usize,
    ) -> Result<()> {
        Cpu.embedding_backward(of(&dy), of(&rows), to(&mut dtable), width)?;
        self.round_state(dtable)
    }

    fn cross_entropy(
        &self,
        mut logits: Out<'_, Self>,
        targets: View<'_, Self, u32>,
        mut losses: ViewMut<'_, Self, f32>,
        vocab: usize,
        scale: Option<f32>,
    ) -> Result<()> {
        Cpu.cross_entropy(to(&mut logits), of(&targets), to(&mut losses), vocab, scale)?;
        if scale.is_some() { self.round(logits) } else { Ok(()) }
    }

    fn sample(
        &self,
        logits: In<'_, Self>,
        uniforms: View<'_, Self, f32>,
        mut tokens: ViewMut<'_, Self, u32>,
        vocab: usize,
        sampling: Sampling,
    ) -> Result<()> {
        Cpu.sample(of(&logits), of(&uniforms), to(&mut tokens), vocab, sampling)
    }

    fn sum_squares<T: FloatElement>(
        &self,
        parts: &[View<'_, Self, T>],
        mut squares: ViewMut<'_, Self, f32>,
    ) -> Result<()> {
        let parts: Vec<_> = parts.iter().map(of).collect();
        Cpu.sum_squares(&parts, to(&mut squares))
    }

    /// Weights, and moments where they are bf16, are rounded by the bits that `kernels/adamw.cu` draws.
    fn adamw_masked(
        &self,
        table: &mut [AdamWModule<'_, Self>],
        squares: View<'_, Self, f32>,
        hyper: AdamW,
    ) -> Result<()> {
        let rows = table.iter_mut().map(|AdamWModule { weight, grad, m, v, lr, weight_decay }| AdamWModule {
            weight: to(weight),
            grad: of(grad),
            m: to(m),
            v: to(v),
            lr: *lr,
            weight_decay: *weight_decay,
        });
        Cpu.adamw_masked(&mut rows.collect::<Vec<_>>(), of(&squares), hyper)?;
        let seed = hyper.seed ^ self.moved.as_ref().map_or(0, |(seed, _)| *seed);
        for (row, module) in table.iter_mut().enumerate() {
            let AdamWModule { weight, m, v, .. } = module;
            let tensors = [weight, m, v].into_iter().take(if self.bf16_state { 3 } else { 1 });
            for (tensor, values) in tensors.enumerate() {
                let stream = u64::from(hyper.step) << 32 | (tensor as u64) << 30 | row as u64;
                edit(values.reborrow(), |i, x| {
                    let word = words(seed, stream, i as u64 / 8)[i % 8 / 2];
                    f32::from_bits((x.to_bits() + (word >> (i % 2 * 16) & 0xffff)) & 0xffff_0000)
                })?;
            }
        }
        Ok(())
    }

    fn squares(&self, w: In<'_, Self>) -> Result<Buffer<Self, f64>> {
        let squares = Cpu.squares(of(&w))?;
        let len = squares.len();
        Ok(Buffer::new(squares, len))
    }

    fn perturb(
        &self,
        w: In<'_, Self>,
        squares: Option<View<'_, Self, f64>>,
        direction: &Direction<'_, Self>,
        epsilon: f32,
        mut plus: Out<'_, Self>,
        mut minus: Option<Out<'_, Self>>,
    ) -> Result<()> {
        let direction = match direction {
            Direction::Gaussian(key) => Direction::Gaussian(*key),
            Direction::Rademacher(key) => Direction::Rademacher(*key),
            Direction::LowRank { key, rank, rows } => Direction::LowRank { key: *key, rank: *rank, rows: *rows },
            Direction::Scale => Direction::Scale,
            Direction::Given(n) => Direction::Given(of(n)),
        };
        Cpu.perturb(of(&w), squares.as_ref().map(of), &direction, epsilon, to(&mut plus), minus.as_mut().map(to))?;
        self.round(plus)?;
        minus.map_or(Ok(()), |minus| self.round(minus))
    }
}
