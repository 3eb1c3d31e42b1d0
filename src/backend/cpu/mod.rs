//! f32 on the host's cores: rayon tasks over fixed blocks, loops compiled for the widest vectors of the machine.
//!
//! Results do not depend on the number of threads: blocks are cut by shape alone, and sums over blocks are added in
//! their order. Called from a thread of the pool (`rayon::scope`), an operation saves two context switches.

mod adamw;
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod amx;
mod attention;
mod cross_entropy;
mod embedding;
mod gemm;
mod perturb;
mod rmsnorm;
mod rope;
mod sampling;
mod simd;
mod storage;
mod swiglu;

pub use storage::Memory;

use super::{
    AdamW, AdamWModule, Attention, Backend, Buffer, Cost, Direction, Element, Epilogue, FloatElement, In, LinearShape,
    Out, Projection, Sampling, View, ViewMut, check, cost, trace,
};
use crate::error::{Error, Result};
use storage::{slice, slice_mut};

/// Bytes of a weight, an activation, a gradient, a moment.
const FLOAT: usize = size_of::<f32>();

/// The host.
#[derive(Clone, Copy, Debug, Default)]
pub struct Cpu;

impl Cpu {
    /// All cores that rayon's global pool has (`RAYON_NUM_THREADS`).
    pub fn new() -> Self {
        Self
    }

    /// Whether large products go to the matrix unit (AMX) of this machine.
    pub fn matrix_unit() -> bool {
        #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
        return amx::available();
        #[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
        return false;
    }
}

/// The sizes of an attention call, checked.
fn attention_shape<'a>(shape: &Attention<'a, Cpu>, kv_len: usize) -> attention::Shape<'a> {
    let Attention { heads, kv_heads, head_dim, scale, window, documents } = *shape;
    assert!(kv_heads > 0 && head_dim > 0 && heads % kv_heads == 0, "{heads} heads on {kv_heads}");
    assert!(kv_len.is_multiple_of(kv_heads * head_dim) && window != Some(0));
    attention::Shape { heads, kv_heads, head_dim, scale, window, starts: &documents.starts }
}

/// Checks that the documents cover the rows of q, and q, k, v match.
fn check_packed(shape: &attention::Shape<'_>, q_len: usize, k_len: usize, v_len: usize) -> usize {
    let tokens = q_len / (shape.heads * shape.head_dim);
    assert_eq!(q_len, tokens * shape.heads * shape.head_dim);
    assert_eq!([k_len, v_len], [tokens * shape.kv_heads * shape.head_dim; 2]);
    assert!(shape.starts.is_sorted() && shape.starts.first() == Some(&0));
    assert_eq!(shape.starts.last().map(|end| *end as usize), Some(tokens));
    tokens
}

impl Backend for Cpu {
    type Float = f32;
    type Grad = f32;
    type Moment = f32;
    type Storage<T: Element> = Memory<T>;

    fn name(&self) -> String {
        "cpu".into()
    }

    fn enough_tokens(&self) -> usize {
        1024
    }

    fn zeros<T: Element>(&self, len: usize) -> Result<Buffer<Self, T>> {
        let _span = trace::op("zeros", Cost::default);
        let memory = Memory::zeroed(len).ok_or_else(|| {
            Error::failed(
                format!("no memory for {len} elements of {}", T::NAME),
                "use a smaller batch, or a machine with more memory",
            )
        })?;
        Ok(Buffer::new(memory, len))
    }

    fn write<T: Element>(&self, host: &[T], to: ViewMut<'_, Self, T>) -> Result<()> {
        let _span = trace::op("write", || Cost::moved(2 * size_of_val(host)));
        slice_mut(to).copy_from_slice(host);
        Ok(())
    }

    fn read<T: Element>(&self, from: View<'_, Self, T>, host: &mut [T]) -> Result<()> {
        let _span = trace::op("read", || Cost::moved(2 * size_of_val(host)));
        host.copy_from_slice(slice(&from));
        Ok(())
    }

    fn copy<T: Element>(&self, from: View<'_, Self, T>, to: ViewMut<'_, Self, T>) -> Result<()> {
        let _span = trace::op("copy", || Cost::moved(2 * from.len() * size_of::<T>()));
        storage::copy(slice(&from), slice_mut(to));
        Ok(())
    }

    fn clear<T: Element>(&self, to: ViewMut<'_, Self, T>) -> Result<()> {
        let _span = trace::op("clear", || Cost::moved(to.len() * size_of::<T>()));
        slice_mut(to).fill(bytemuck::Zeroable::zeroed());
        Ok(())
    }

    fn synchronize(&self) -> Result<()> {
        Ok(())
    }

    fn linear(
        &self,
        x: In<'_, Self>,
        w: In<'_, Self>,
        y: Out<'_, Self>,
        shape: LinearShape,
        epilogue: Epilogue<'_, Self>,
    ) -> Result<()> {
        let _span = trace::op("linear", || cost::linear(shape, epilogue.addends(y.len()), FLOAT));
        let LinearShape { tokens, inputs, outputs } = shape;
        assert_eq!([x.len(), w.len(), y.len()], [tokens * inputs, outputs * inputs, tokens * outputs], "{shape:?}");
        assert!(epilogue.bias.as_ref().is_none_or(|b| b.len() == outputs), "{shape:?}");
        assert!(epilogue.residual.as_ref().is_none_or(|r| r.len() == tokens * outputs), "{shape:?}");
        let addends = gemm::Addends {
            alpha: epilogue.alpha,
            bias: epilogue.bias.as_ref().map(slice),
            residual: epilogue.residual.as_ref().map(slice),
            accumulate: epilogue.accumulate,
        };
        gemm::linear(slice(&x), slice(&w), slice_mut(y), shape, addends);
        Ok(())
    }

    fn linear_each(&self, x: In<'_, Self>, layers: &mut [Projection<'_, Self>], tokens: usize) -> Result<()> {
        let _span = trace::op("linear_each", || {
            let biases = layers.iter().filter_map(|layer| layer.bias.as_ref()).map(View::len).sum();
            let outputs = layers.iter().map(|layer| layer.y.len()).sum::<usize>() / tokens;
            cost::linear_each(tokens, x.len() / tokens, outputs, biases, FLOAT)
        });
        let LinearShape { inputs, .. } = check::linear_each(&x, layers, tokens);
        let layers = layers.iter_mut().map(|Projection { w, bias, y }| gemm::Layer {
            w: slice(w),
            bias: bias.as_ref().map(slice),
            y: slice_mut(y.reborrow()),
        });
        gemm::linear_each(slice(&x), layers.collect(), tokens, inputs);
        Ok(())
    }

    fn linear_backward_input(
        &self,
        dy: In<'_, Self>,
        w: In<'_, Self>,
        dx: Out<'_, Self>,
        shape: LinearShape,
        alpha: f32,
        accumulate: bool,
    ) -> Result<()> {
        let _span = trace::op("linear_backward_input", || cost::linear_backward_input(shape, accumulate, FLOAT));
        let LinearShape { tokens, inputs, outputs } = shape;
        assert_eq!([dy.len(), w.len(), dx.len()], [tokens * outputs, outputs * inputs, tokens * inputs], "{shape:?}");
        gemm::linear_backward_input(slice(&dy), slice(&w), slice_mut(dx), shape, alpha, accumulate);
        Ok(())
    }

    fn linear_backward_weight(
        &self,
        dy: In<'_, Self>,
        x: In<'_, Self>,
        dw: ViewMut<'_, Self, f32>,
        shape: LinearShape,
        alpha: f32,
        accumulate: bool,
    ) -> Result<()> {
        let _span =
            trace::op("linear_backward_weight", || cost::linear_backward_weight(shape, accumulate, FLOAT, FLOAT));
        let LinearShape { tokens, inputs, outputs } = shape;
        assert_eq!([dy.len(), x.len(), dw.len()], [tokens * outputs, tokens * inputs, outputs * inputs], "{shape:?}");
        gemm::linear_backward_weight(slice(&dy), slice(&x), slice_mut(dw), shape, alpha, accumulate);
        Ok(())
    }

    fn linear_backward_bias(
        &self,
        dy: In<'_, Self>,
        dbias: ViewMut<'_, Self, f32>,
        tokens: usize,
        outputs: usize,
        accumulate: bool,
    ) -> Result<()> {
        let _span =
            trace::op("linear_backward_bias", || cost::linear_backward_bias(tokens, outputs, accumulate, FLOAT, FLOAT));
        assert_eq!([dy.len(), dbias.len()], [tokens * outputs, outputs]);
        gemm::linear_backward_bias(slice(&dy), slice_mut(dbias), outputs, accumulate);
        Ok(())
    }

    fn attention(
        &self,
        q: In<'_, Self>,
        k: In<'_, Self>,
        v: In<'_, Self>,
        o: Out<'_, Self>,
        lse: Option<ViewMut<'_, Self, f32>>,
        shape: &Attention<'_, Self>,
    ) -> Result<()> {
        let _span = trace::op("attention", || shape.size().forward(lse.is_some(), FLOAT));
        let shape = attention_shape(shape, k.len());
        let tokens = check_packed(&shape, q.len(), k.len(), v.len());
        assert_eq!(o.len(), q.len());
        assert!(lse.as_ref().is_none_or(|lse| lse.len() == shape.heads * tokens));
        attention::attention(slice(&q), slice(&k), slice(&v), slice_mut(o), lse.map(slice_mut), shape);
        Ok(())
    }

    fn attention_backward(
        &self,
        q: In<'_, Self>,
        k: In<'_, Self>,
        v: In<'_, Self>,
        o: In<'_, Self>,
        lse: View<'_, Self, f32>,
        d_o: In<'_, Self>,
        dq: Out<'_, Self>,
        dk: Out<'_, Self>,
        dv: Out<'_, Self>,
        shape: &Attention<'_, Self>,
    ) -> Result<()> {
        let _span = trace::op("attention_backward", || shape.size().backward(FLOAT));
        let shape = attention_shape(shape, k.len());
        let tokens = check_packed(&shape, q.len(), k.len(), v.len());
        assert_eq!([o.len(), d_o.len(), dq.len()], [q.len(); 3]);
        assert_eq!([dk.len(), dv.len()], [k.len(); 2]);
        assert_eq!(lse.len(), shape.heads * tokens);
        let saved = attention::Saved {
            q: slice(&q),
            k: slice(&k),
            v: slice(&v),
            o: slice(&o),
            lse: slice(&lse),
            d_o: slice(&d_o),
        };
        attention::attention_backward(saved, slice_mut(dq), slice_mut(dk), slice_mut(dv), shape);
        Ok(())
    }

    fn attention_decode(
        &self,
        q: In<'_, Self>,
        k: In<'_, Self>,
        v: In<'_, Self>,
        o: Out<'_, Self>,
        spans: View<'_, Self, u32>,
        longest: usize,
        shape: &Attention<'_, Self>,
    ) -> Result<()> {
        let _span = trace::op("attention_decode", || {
            let seen = slice(&spans).chunks_exact(2).map(|span| span[1] as usize);
            let pairs: usize = seen.map(|rows| rows.min(shape.window.unwrap_or(usize::MAX))).sum();
            let rows = k.len() / (shape.kv_heads * shape.head_dim);
            shape.decode_size(spans.len() / 2, pairs as u64).decode(rows, FLOAT)
        });
        let shape = attention_shape(shape, k.len());
        let spans = slice(&spans);
        assert!(spans.len().is_multiple_of(2));
        assert_eq!([q.len(), o.len()], [spans.len() / 2 * shape.heads * shape.head_dim; 2]);
        assert_eq!(k.len(), v.len());
        let rows = k.len() / (shape.kv_heads * shape.head_dim);
        assert!(spans.chunks_exact(2).all(|span| (1..=longest).contains(&(span[1] as usize))));
        assert!(spans.chunks_exact(2).all(|span| span[0] as usize + span[1] as usize <= rows));
        attention::attention_decode(slice(&q), slice(&k), slice(&v), slice_mut(o), spans, shape);
        Ok(())
    }

    fn rmsnorm(
        &self,
        x: In<'_, Self>,
        weight: In<'_, Self>,
        y: Out<'_, Self>,
        rstd: Option<ViewMut<'_, Self, f32>>,
        width: usize,
        eps: f32,
    ) -> Result<()> {
        let _span = trace::op("rmsnorm", || cost::rmsnorm(x.len(), width, rstd.is_some(), FLOAT));
        assert!(width > 0 && x.len().is_multiple_of(width) && weight.len() == width);
        assert_eq!(x.len(), y.len());
        assert!(rstd.as_ref().is_none_or(|r| r.len() == x.len() / width));
        rmsnorm::rmsnorm(slice(&x), slice(&weight), slice_mut(y), rstd.map(slice_mut), width, eps);
        Ok(())
    }

    fn rmsnorm_backward(
        &self,
        dy: In<'_, Self>,
        x: In<'_, Self>,
        weight: In<'_, Self>,
        rstd: View<'_, Self, f32>,
        dx: Option<Out<'_, Self>>,
        dweight: Option<ViewMut<'_, Self, f32>>,
        width: usize,
        accumulate_dx: bool,
        accumulate_dweight: bool,
    ) -> Result<()> {
        let _span = trace::op("rmsnorm_backward", || {
            cost::rmsnorm_backward(x.len(), width, dx.as_ref().map(|_| accumulate_dx), dweight.is_some(), FLOAT)
        });
        assert!(width > 0 && x.len().is_multiple_of(width) && weight.len() == width);
        assert_eq!([dy.len(), rstd.len() * width], [x.len(); 2]);
        assert!(dx.as_ref().is_none_or(|dx| dx.len() == x.len()));
        assert!(dweight.as_ref().is_none_or(|dw| dw.len() == width));
        let saved = rmsnorm::Saved { dy: slice(&dy), x: slice(&x), weight: slice(&weight), rstd: slice(&rstd) };
        let (dx, dweight) = (dx.map(slice_mut), dweight.map(slice_mut));
        rmsnorm::rmsnorm_backward(saved, dx, dweight, width, accumulate_dx, accumulate_dweight);
        Ok(())
    }

    fn rope(
        &self,
        x: Out<'_, Self>,
        table: View<'_, Self, f32>,
        positions: View<'_, Self, u32>,
        heads: usize,
        head_dim: usize,
        inverse: bool,
    ) -> Result<()> {
        let _span = trace::op("rope", || cost::rope(x.len(), FLOAT));
        assert!(head_dim > 0 && head_dim.is_multiple_of(2) && heads > 0);
        assert_eq!(x.len(), positions.len() * heads * head_dim);
        rope::rope(slice_mut(x), slice(&table), slice(&positions), heads, head_dim, inverse);
        Ok(())
    }

    fn swiglu(&self, gate: In<'_, Self>, up: In<'_, Self>, y: Out<'_, Self>) -> Result<()> {
        let _span = trace::op("swiglu", || cost::swiglu(y.len(), FLOAT));
        assert_eq!([gate.len(), up.len()], [y.len(); 2]);
        swiglu::swiglu(slice(&gate), slice(&up), slice_mut(y));
        Ok(())
    }

    fn swiglu_backward(&self, gate: Out<'_, Self>, up: Out<'_, Self>, dy: In<'_, Self>) -> Result<()> {
        let _span = trace::op("swiglu_backward", || cost::swiglu_backward(dy.len(), FLOAT));
        assert_eq!([gate.len(), up.len()], [dy.len(); 2]);
        swiglu::swiglu_backward(slice_mut(gate), slice_mut(up), slice(&dy));
        Ok(())
    }

    fn gather_rows(
        &self,
        from: In<'_, Self>,
        rows: View<'_, Self, u32>,
        to: Out<'_, Self>,
        width: usize,
    ) -> Result<()> {
        let _span = trace::op("gather_rows", || cost::move_rows(rows.len(), width, FLOAT));
        assert!(width > 0 && to.len() == rows.len() * width);
        embedding::gather_rows(slice(&from), slice(&rows), slice_mut(to), width);
        Ok(())
    }

    fn scatter_rows(
        &self,
        from: In<'_, Self>,
        rows: View<'_, Self, u32>,
        to: Out<'_, Self>,
        width: usize,
    ) -> Result<()> {
        let _span = trace::op("scatter_rows", || cost::move_rows(rows.len(), width, FLOAT));
        assert!(width > 0 && from.len() == rows.len() * width);
        embedding::scatter_rows(slice(&from), slice(&rows), slice_mut(to), width);
        Ok(())
    }

    fn embedding_backward(
        &self,
        dy: In<'_, Self>,
        rows: View<'_, Self, u32>,
        dtable: ViewMut<'_, Self, f32>,
        width: usize,
    ) -> Result<()> {
        let _span = trace::op("embedding_backward", || cost::embedding_backward(rows.len(), width, FLOAT, FLOAT));
        assert!(width > 0 && dy.len() == rows.len() * width);
        embedding::embedding_backward(slice(&dy), slice(&rows), slice_mut(dtable), width);
        Ok(())
    }

    fn cross_entropy(
        &self,
        logits: Out<'_, Self>,
        targets: View<'_, Self, u32>,
        losses: ViewMut<'_, Self, f32>,
        vocab: usize,
        scale: Option<f32>,
    ) -> Result<()> {
        let _span = trace::op("cross_entropy", || cost::cross_entropy(logits.len(), scale.is_some(), FLOAT));
        assert!(vocab > 0 && logits.len() == targets.len() * vocab);
        assert_eq!(losses.len(), targets.len());
        cross_entropy::cross_entropy(slice_mut(logits), slice(&targets), slice_mut(losses), vocab, scale);
        Ok(())
    }

    fn sample(
        &self,
        logits: In<'_, Self>,
        uniforms: View<'_, Self, f32>,
        tokens: ViewMut<'_, Self, u32>,
        vocab: usize,
        sampling: Sampling,
    ) -> Result<()> {
        let _span = trace::op("sample", || cost::sample(logits.len(), sampling, FLOAT));
        assert!(vocab > 0 && logits.len() == tokens.len() * vocab);
        assert_eq!(uniforms.len(), tokens.len());
        sampling::sample(slice(&logits), slice(&uniforms), slice_mut(tokens), vocab, sampling);
        Ok(())
    }

    fn sum_squares<T: FloatElement>(&self, parts: &[View<'_, Self, T>], squares: ViewMut<'_, Self, f32>) -> Result<()> {
        let _span = trace::op("sum_squares", || cost::sum_squares(parts.iter().map(View::len).sum(), size_of::<T>()));
        assert_eq!(parts.len(), squares.len());
        for (part, square) in parts.iter().zip(slice_mut(squares)) {
            *square = adamw::sum_squares(slice(part)) as f32;
        }
        Ok(())
    }

    fn adamw_masked(
        &self,
        table: &mut [AdamWModule<'_, Self>],
        squares: View<'_, Self, f32>,
        hyper: AdamW,
    ) -> Result<()> {
        let _span = trace::op("adamw_masked", || {
            cost::adamw(table.iter().map(|module| module.grad.len()).sum(), FLOAT, FLOAT, FLOAT)
        });
        assert_eq!(table.len(), squares.len());
        let Some(clip) = adamw::clip_factor(slice(&squares), hyper.max_grad_norm) else { return Ok(()) };
        for module in table {
            let weight = slice_mut(module.weight.reborrow());
            let (m, v) = (slice_mut(module.m.reborrow()), slice_mut(module.v.reborrow()));
            let grad = slice(&module.grad);
            assert_eq!([grad.len(), m.len(), v.len()], [weight.len(); 3]);
            adamw::step(weight, grad, m, v, module.lr, module.weight_decay, clip, &hyper);
        }
        Ok(())
    }

    fn squares(&self, w: In<'_, Self>) -> Result<Buffer<Self, f64>> {
        let mut squares = self.zeros(1)?;
        let _span = trace::op("squares", || cost::sum_squares(w.len(), FLOAT));
        slice_mut(squares.view_mut())[0] = adamw::sum_squares(slice(&w));
        Ok(squares)
    }

    fn perturb(
        &self,
        w: In<'_, Self>,
        squares: Option<View<'_, Self, f64>>,
        direction: &Direction<'_, Self>,
        epsilon: f32,
        plus: Out<'_, Self>,
        minus: Option<Out<'_, Self>>,
    ) -> Result<()> {
        let copies = 1 + usize::from(minus.is_some());
        let _span = trace::op("perturb", || cost::perturb(w.len(), copies, direction, squares.is_some(), FLOAT));
        assert_eq!(w.len(), plus.len());
        assert!(minus.as_ref().is_none_or(|m| m.len() == w.len()));
        let noise = match direction {
            Direction::Gaussian(key) => perturb::Noise::Gaussian(*key),
            Direction::Rademacher(key) => perturb::Noise::Rademacher(*key),
            Direction::LowRank { key, rank, rows } => {
                assert!(*rank > 0 && *rows > 0 && w.len().is_multiple_of(*rows));
                perturb::Noise::LowRank { key: *key, rank: *rank, rows: *rows }
            }
            Direction::Scale => perturb::Noise::Scale,
            Direction::Given(n) => {
                assert_eq!(n.len(), w.len());
                perturb::Noise::Given(slice(n))
            }
        };
        let squares = squares.map(|squares| slice(&squares)[0]);
        perturb::perturb(slice(&w), squares, noise, epsilon, slice_mut(plus), minus.map(slice_mut));
        Ok(())
    }
}
