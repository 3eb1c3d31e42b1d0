//! The CPU backend, rounding to bf16 where the CUDA backend does: what the device's precision alone makes of a result.
//!
//! What a kernel computes in f32 is computed in f32 here, in another order; what it stores as bf16 is rounded once.
//! Rounded inside of an operation: the normalised value of RMSNorm; P and dS of attention, for a head_dim of 64 or 128,
//! by the largest of the whole row where the kernel goes by that of the tiles so far. log-sum-exps, 1/rms and losses
//! are f32. What tensor cores cut off of a sum (`swat_standin::cores`) is thousands of times less than the roundings to
//! bf16, and left out.

use crate::common::attention::{Products, Sizes, attend_query, attend_rounding, gradients};
use half::bf16;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use swat::backend::cpu::Cpu;
use swat::backend::{
    AdamWMasked, AdamWModule, AddRows, Attention, AttentionBackward, AttentionDecode, AttentionShape, Backend, Buffer,
    CrossEntropy, DecodeSpans, Documents, Element, EmbeddingBackward, FloatElement, GatherRows, InputGradient, Linear,
    LinearBackwardBias, LinearBackwardInput, LinearBackwardInputEach, LinearBackwardWeight, LossTerms, MeanRow,
    MoveAlong, Operator, Perturb, ProximalGradients, ProximalRow, RmsNorm, RmsNormBackward, Rope, Sample, ScatterRows,
    SquaredNorm, SumSquares, SwiGlu, SwiGluBackward, UpdateMeans, View, ViewMut,
};
use swat::error::Result;
use swat::rng::{Philox, words};

/// The emulation. bf16 numbers are kept as f32.
#[derive(Clone)]
pub struct Rounded {
    /// Whether gradients and moments are bf16, too.
    bf16_state: bool,
    /// Where activations and gradients are rounded on a grid that is moved by a part of a unit, drawn for each: the
    /// seed and the draws so far.
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
    Cpu::new().read(view, &mut host)?;
    Ok(host)
}

fn read_f64(view: &View<'_, Rounded, f32>) -> Result<Vec<f64>> {
    Ok(read(of(view))?.into_iter().map(f64::from).collect())
}

fn write_f64(values: &[f64], mut into: ViewMut<'_, Rounded, f32>) -> Result<()> {
    let values: Vec<f32> = values.iter().map(|x| *x as f32).collect();
    Cpu::new().write(&values, to(&mut into))
}

/// Puts f(index, x) for each x.
fn edit(mut y: ViewMut<'_, Rounded, f32>, mut f: impl FnMut(usize, f32) -> f32) -> Result<()> {
    let mut host = read(y.storage.range(y.range.clone()))?;
    host.iter_mut().enumerate().for_each(|(i, x)| *x = f(i, *x));
    Cpu::new().write(&host, to(&mut y))
}

/// Documents as the CPU's.
fn on_cpu(documents: &Documents<Rounded>) -> Documents<Cpu> {
    let device = Cpu::new().zeros(documents.starts.len()).expect("memory for documents");
    Documents { starts: documents.starts.clone(), device }
}

/// Calls `f` with the sizes of an attention over documents of these lengths, where tensor cores serve it.
fn on_tensor_cores(
    shape: &AttentionShape,
    lengths: &[usize],
    f: impl FnOnce(&Sizes) -> Result<()>,
) -> Option<Result<()>> {
    let AttentionShape { heads, kv_heads, head_dim, window, .. } = *shape;
    matches!(head_dim, 64 | 128).then(|| f(&Sizes { heads, kv_heads, head_dim, window, lengths }))
}

fn lengths(documents: &Documents<Rounded>) -> Vec<usize> {
    documents.starts.windows(2).map(|w| (w[1] - w[0]) as usize).collect()
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
        Ok(Buffer::new(Cpu::new().zeros(len)?, len))
    }

    fn write<T: Element>(&self, host: &[T], mut into: ViewMut<'_, Self, T>) -> Result<()> {
        Cpu::new().write(host, to(&mut into))
    }

    fn read<T: Element>(&self, from: View<'_, Self, T>, host: &mut [T]) -> Result<()> {
        Cpu::new().read(of(&from), host)
    }

    fn copy<T: Element>(&self, from: View<'_, Self, T>, mut into: ViewMut<'_, Self, T>) -> Result<()> {
        Cpu::new().copy(of(&from), to(&mut into))
    }

    fn clear<T: Element>(&self, mut into: ViewMut<'_, Self, T>) -> Result<()> {
        Cpu::new().clear(to(&mut into))
    }

    fn synchronize(&self) -> Result<()> {
        Ok(())
    }

    fn linear(&self, op: Linear<'_, Self>) -> Result<()> {
        let Linear { x, w, mut y, shape, epilogue } = op;
        Linear { x: of(&x), w: of(&w), y: to(&mut y), shape, epilogue: epilogue.map(of) }.run(&Cpu::new())?;
        self.round(y)
    }

    fn linear_backward_input(&self, op: LinearBackwardInput<'_, Self>) -> Result<()> {
        let LinearBackwardInput { dy, w, mut dx, shape, alpha, accumulate } = op;
        let (dy, w, to) = (of(&dy), of(&w), to(&mut dx));
        LinearBackwardInput { dy, w, dx: to, shape, alpha, accumulate }.run(&Cpu::new())?;
        self.round(dx)
    }

    /// The terms are added in f32, and rounded once.
    fn linear_backward_input_each(&self, op: LinearBackwardInputEach<'_, Self>) -> Result<()> {
        let LinearBackwardInputEach { layers, mut dx, tokens, accumulate } = op;
        let layers = layers.iter().map(|InputGradient { dy, w }| InputGradient { dy: of(dy), w: of(w) });
        let layers: Vec<_> = layers.collect();
        LinearBackwardInputEach { layers: &layers, dx: to(&mut dx), tokens, accumulate }.run(&Cpu::new())?;
        self.round(dx)
    }

    fn linear_backward_weight(&self, op: LinearBackwardWeight<'_, Self>) -> Result<()> {
        let LinearBackwardWeight { dy, x, mut dw, shape, alpha, accumulate } = op;
        let (dy, x, to) = (of(&dy), of(&x), to(&mut dw));
        LinearBackwardWeight { dy, x, dw: to, shape, alpha, accumulate }.run(&Cpu::new())?;
        self.round_state(dw)
    }

    fn linear_backward_bias(&self, op: LinearBackwardBias<'_, Self>) -> Result<()> {
        let LinearBackwardBias { dy, mut dbias, accumulate } = op;
        LinearBackwardBias { dy: of(&dy), dbias: to(&mut dbias), accumulate }.run(&Cpu::new())?;
        self.round_state(dbias)
    }

    fn attention(&self, op: Attention<'_, Self>) -> Result<()> {
        let Attention { q, k, v, mut o, mut lse, shape, documents } = op;
        let cores = on_tensor_cores(&shape, &lengths(documents), |sizes| {
            let (values, sums) =
                attend_rounding(sizes, &read_f64(&q)?, &read_f64(&k)?, &read_f64(&v)?, Products::Rounded);
            write_f64(&values, o.reborrow())?;
            lse.as_mut().map_or(Ok(()), |lse| write_f64(&sums, lse.reborrow()))
        });
        cores.unwrap_or_else(|| {
            let (q, k, v, lse, documents) = (of(&q), of(&k), of(&v), lse.as_mut().map(to), &on_cpu(documents));
            Attention { q, k, v, o: to(&mut o), lse, shape, documents }.run(&Cpu::new())
        })?;
        self.round(o)
    }

    fn attention_backward(&self, op: AttentionBackward<'_, Self>) -> Result<()> {
        let AttentionBackward { q, k, v, o, lse, d_o, mut dq, mut dk, mut dv, shape, documents } = op;
        let saved = [&q, &k, &v, &o, &lse, &d_o];
        let cores = on_tensor_cores(&shape, &lengths(documents), |sizes| {
            let saved = saved.map(read_f64).into_iter().collect::<Result<Vec<_>>>()?;
            let results = gradients(sizes, std::array::from_fn(|i| saved[i].as_slice()), Products::Rounded);
            let into = [dq.reborrow(), dk.reborrow(), dv.reborrow()];
            results.iter().zip(into).try_for_each(|(values, into)| write_f64(values, into))
        });
        cores.unwrap_or_else(|| {
            let ([q, k, v, o, lse, d_o], documents) = (saved.map(of), &on_cpu(documents));
            let (dq, dk, dv) = (to(&mut dq), to(&mut dk), to(&mut dv));
            AttentionBackward { q, k, v, o, lse, d_o, dq, dk, dv, shape, documents }.run(&Cpu::new())
        })?;
        self.round(dq)?;
        self.round(dk)?;
        self.round(dv)
    }

    fn attention_decode(&self, op: AttentionDecode<'_, Self>) -> Result<()> {
        let AttentionDecode { q, k, v, mut o, spans, shape } = op;
        let cores = on_tensor_cores(&shape, &[], |sizes| {
            let [q, k, v] = [read_f64(&q)?, read_f64(&k)?, read_f64(&v)?];
            let width = sizes.heads * sizes.head_dim;
            let mut values = vec![0.0; q.len()];
            let queries = q.chunks_exact(width).zip(values.chunks_exact_mut(width));
            for ((q, o), span) in queries.zip(spans.host.chunks_exact(2)) {
                let (end, rows) = ((span[0] + span[1]) as usize, span[1] as usize);
                let seen = rows.min(sizes.window.unwrap_or(rows));
                attend_query(sizes, q, &k, &v, end - seen..end, o, Products::Rounded);
            }
            write_f64(&values, o.reborrow())
        });
        cores.unwrap_or_else(|| {
            let spans = DecodeSpans { host: spans.host, device: of(&spans.device) };
            AttentionDecode { q: of(&q), k: of(&k), v: of(&v), o: to(&mut o), spans, shape }.run(&Cpu::new())
        })?;
        self.round(o)
    }

    fn rmsnorm(&self, op: RmsNorm<'_, Self>) -> Result<()> {
        let RmsNorm { x, weight, mut y, mut rstd, eps } = op;
        let width = weight.len();
        let mut ones = Cpu::new().zeros(width)?;
        Cpu::new().write(&vec![1.0; width], ones.view_mut())?;
        let rstd = rstd.as_mut().map(to);
        RmsNorm { x: of(&x), weight: ones.view(), y: to(&mut y), rstd, eps }.run(&Cpu::new())?;
        self.round(y.reborrow())?;
        let weight = read(of(&weight))?;
        edit(y.reborrow(), |i, x| x * weight[i % width])?;
        self.round(y)
    }

    fn rmsnorm_backward(&self, op: RmsNormBackward<'_, Self>) -> Result<()> {
        let RmsNormBackward { dy, x, weight, rstd, mut dx, mut dweight, accumulate_dx, accumulate_dweight } = op;
        RmsNormBackward {
            dy: of(&dy),
            x: of(&x),
            weight: of(&weight),
            rstd: of(&rstd),
            dx: dx.as_mut().map(to),
            dweight: dweight.as_mut().map(to),
            accumulate_dx,
            accumulate_dweight,
        }
        .run(&Cpu::new())?;
        dx.map_or(Ok(()), |dx| self.round(dx))?;
        dweight.map_or(Ok(()), |dweight| self.round_state(dweight))
    }

    fn rope(&self, op: Rope<'_, Self>) -> Result<()> {
        let Rope { mut x, table, positions, head_dim, inverse } = op;
        Rope { x: to(&mut x), table: of(&table), positions: of(&positions), head_dim, inverse }.run(&Cpu::new())?;
        self.round(x)
    }

    fn swiglu(&self, op: SwiGlu<'_, Self>) -> Result<()> {
        let SwiGlu { gate, up, mut y } = op;
        SwiGlu { gate: of(&gate), up: of(&up), y: to(&mut y) }.run(&Cpu::new())?;
        self.round(y)
    }

    fn swiglu_backward(&self, op: SwiGluBackward<'_, Self>) -> Result<()> {
        let SwiGluBackward { mut gate, mut up, dy } = op;
        SwiGluBackward { gate: to(&mut gate), up: to(&mut up), dy: of(&dy) }.run(&Cpu::new())?;
        self.round(gate)?;
        self.round(up)
    }

    fn gather_rows(&self, op: GatherRows<'_, Self>) -> Result<()> {
        let GatherRows { from, rows, to: mut into, width } = op;
        GatherRows { from: of(&from), rows: of(&rows), to: to(&mut into), width }.run(&Cpu::new())
    }

    fn scatter_rows(&self, op: ScatterRows<'_, Self>) -> Result<()> {
        let ScatterRows { from, rows, to: mut into, width } = op;
        ScatterRows { from: of(&from), rows: of(&rows), to: to(&mut into), width }.run(&Cpu::new())
    }

    fn add_rows(&self, op: AddRows<'_, Self>) -> Result<()> {
        let AddRows { from, rows, to: mut into, width } = op;
        AddRows { from: of(&from), rows: of(&rows), to: to(&mut into), width }.run(&Cpu::new())?;
        self.round(into)
    }

    fn embedding_backward(&self, op: EmbeddingBackward<'_, Self>) -> Result<()> {
        let EmbeddingBackward { dy, rows, mut dtable, width } = op;
        EmbeddingBackward { dy: of(&dy), rows: of(&rows), dtable: to(&mut dtable), width }.run(&Cpu::new())?;
        self.round_state(dtable)
    }

    fn cross_entropy(&self, op: CrossEntropy<'_, Self>) -> Result<()> {
        let CrossEntropy { mut logits, targets, mut losses, vocab, scale, terms } = op;
        let (targets, losses) = (of(&targets), to(&mut losses));
        let terms = terms.as_ref().map(|terms| LossTerms {
            reference: of(&terms.reference),
            beta: of(&terms.beta),
            ids: of(&terms.ids),
            probs: of(&terms.probs),
            distil: terms.distil,
        });
        CrossEntropy { logits: to(&mut logits), targets, losses, vocab, scale, terms }.run(&Cpu::new())?;
        if scale.is_some() { self.round(logits) } else { Ok(()) }
    }

    fn sample(&self, op: Sample<'_, Self>) -> Result<()> {
        let Sample { logits, uniforms, mut tokens, vocab, sampling } = op;
        let (logits, uniforms, tokens) = (of(&logits), of(&uniforms), to(&mut tokens));
        Sample { logits, uniforms, tokens, vocab, sampling }.run(&Cpu::new())
    }

    fn sum_squares<T: FloatElement>(&self, op: SumSquares<'_, Self, T>) -> Result<()> {
        let SumSquares { parts, mut squares } = op;
        let parts: Vec<_> = parts.iter().map(of).collect();
        SumSquares { parts: &parts, squares: to(&mut squares) }.run(&Cpu::new())
    }

    /// Weights, and moments where they are bf16, are rounded by the bits that `kernels/adamw.cu` draws.
    fn adamw_masked(&self, op: AdamWMasked<'_, '_, Self>) -> Result<()> {
        let AdamWMasked { table, squares, hyper } = op;
        let rows = table.iter_mut().map(|AdamWModule { weight, grad, m, v, lr, weight_decay }| AdamWModule {
            weight: to(weight),
            grad: of(grad),
            m: to(m),
            v: to(v),
            lr: *lr,
            weight_decay: *weight_decay,
        });
        AdamWMasked { table: &mut rows.collect::<Vec<_>>(), squares: of(&squares), hyper }.run(&Cpu::new())?;
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

    fn update_means(&self, op: UpdateMeans<'_, '_, Self>) -> Result<()> {
        let rows = op.table.iter_mut().map(|MeanRow { mean, weight }| MeanRow { mean: to(mean), weight: of(weight) });
        UpdateMeans { table: &mut rows.collect::<Vec<_>>(), decay: op.decay }.run(&Cpu::new())
    }

    fn proximal_gradients(&self, op: ProximalGradients<'_, '_, Self>) -> Result<()> {
        let rows = op.table.iter_mut().map(|ProximalRow { grad, weight, anchor }| ProximalRow {
            grad: to(grad),
            weight: of(weight),
            anchor: of(anchor),
        });
        ProximalGradients { table: &mut rows.collect::<Vec<_>>(), rho: op.rho }.run(&Cpu::new())?;
        op.table.iter_mut().try_for_each(|row| self.round_state(row.grad.reborrow()))
    }

    fn squared_norm(&self, op: SquaredNorm<'_, Self>) -> Result<Buffer<Self, f64>> {
        let squares = SquaredNorm { w: of(&op.w) }.run(&Cpu::new())?;
        let len = squares.len();
        Ok(Buffer::new(squares, len))
    }

    fn move_along(&self, op: MoveAlong<'_, Self>) -> Result<()> {
        let MoveAlong { mut x, direction, squares, rho } = op;
        let (direction, squares) = (of(&direction), of(&squares));
        MoveAlong { x: to(&mut x), direction, squares, rho }.run(&Cpu::new())?;
        self.round(x)
    }

    fn perturb(&self, op: Perturb<'_, Self>) -> Result<()> {
        let Perturb { w, squares, direction, epsilon, mut plus, mut minus } = op;
        Perturb {
            w: of(&w),
            squares: squares.as_ref().map(of),
            direction: direction.map(of),
            epsilon,
            plus: to(&mut plus),
            minus: minus.as_mut().map(to),
        }
        .run(&Cpu::new())?;
        self.round(plus)?;
        minus.map_or(Ok(()), |minus| self.round(minus))
    }
}
