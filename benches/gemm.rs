//! Linear layers: forward, both gradients, a few tokens at a time, the gradient of a bias.
//!
//! Versions run without split-k (`splits: 1`), `swat` by the plan that is chosen for device and shape. The two slowest
//! versions are left out where they would take more than about a tenth of a second.

use super::common::cublaslt::CublasLt;
use super::common::{Device, Model, Scale, Session, random};
use half::bf16;
use std::rc::Rc;
use swat::backend::cpu::Cpu;
use swat::backend::cuda::{Cuda, F32State, GemmLayout, GemmPlan, GemmShape, GemmSupport, GemmVersion, with_plan};
use swat::backend::{
    Backend, Epilogue, FloatElement, Linear, LinearBackwardBias, LinearBackwardInput, LinearBackwardWeight,
    LinearShape, Operator, cost,
};

/// Largest product, in FLOPs, that the slowest versions are timed on.
const SLOW_FLOPS: u64 = 1 << 37;
/// Bytes of an element on the CPU.
const FLOAT: usize = size_of::<f32>();

/// Inputs and outputs of a model's layers: q, k and v, gate and up, down.
fn layers(model: &Model) -> [[usize; 2]; 4] {
    let Model { hidden, ffn, .. } = *model;
    [[hidden, model.q_width()], [hidden, model.kv_width()], [hidden, ffn], [ffn, hidden]]
}

/// The shapes of training: all tokens of a batch, and a chunk of them for the head.
fn shapes(scale: &Scale, model: &Model) -> impl Iterator<Item = LinearShape> {
    let head = LinearShape { tokens: scale.head_tokens, inputs: model.hidden, outputs: model.vocab };
    let layers = layers(model).map(|[inputs, outputs]| LinearShape { tokens: scale.tokens, inputs, outputs });
    layers.into_iter().chain([head])
}

/// The shapes of generation.
fn decoded(scale: &'static Scale, model: &Model) -> impl Iterator<Item = LinearShape> {
    let shape = |tokens, outputs| LinearShape { tokens, inputs: model.hidden, outputs };
    scale.decoded_tokens.iter().flat_map(move |tokens| [shape(*tokens, model.ffn), shape(*tokens, model.vocab)])
}

fn named(model: &Model, shape: LinearShape) -> String {
    let LinearShape { tokens, inputs, outputs } = shape;
    format!("{}/{tokens}x{inputs}x{outputs}", model.name)
}

pub(crate) fn cuda(session: &mut Session, cuda: &Cuda<F32State>) {
    let scale = session.scale;
    let peer = session.cublaslt(cuda);
    for model in scale.models() {
        for shape in shapes(scale, model) {
            let (name, LinearShape { tokens, inputs, outputs }) = (named(model, shape), shape);
            let forward = GemmShape { layout: GemmLayout::Tn, m: tokens, n: outputs, k: inputs };
            product::<bf16>(session, cuda, peer.as_ref(), "forward", &name, forward);
            let input = GemmShape { layout: GemmLayout::Nn, m: tokens, n: inputs, k: outputs };
            product::<bf16>(session, cuda, peer.as_ref(), "backward-input", &name, input);
            let weight = GemmShape { layout: GemmLayout::Nt, m: outputs, n: inputs, k: tokens };
            product::<f32>(session, cuda, peer.as_ref(), "backward-weight", &name, weight);
        }
        for shape in decoded(scale, model) {
            let (name, LinearShape { tokens, inputs, outputs }) = (named(model, shape), shape);
            let shape = GemmShape { layout: GemmLayout::Tn, m: tokens, n: outputs, k: inputs };
            product::<bf16>(session, cuda, peer.as_ref(), "decode", &name, shape);
        }
        bias(session, cuda, model);
    }
}

fn product<T: FloatElement>(
    session: &mut Session,
    cuda: &Cuda<F32State>,
    peer: Option<&Rc<CublasLt<F32State>>>,
    op: &str,
    name: &str,
    shape: GemmShape,
) {
    let GemmShape { m, n, k, .. } = shape;
    let cost = shape.cost(size_of::<T>());
    let make = move |cuda: &Cuda<F32State>| {
        let [a, b] = [m * k, n * k].map(|len| random::<_, bf16>(cuda, len));
        (a, b, cuda.zeros::<T>(m * n).expect("memory for a product"))
    };
    let hopper = cuda.capability() == (9, 0);
    let slow = |version| matches!(version, GemmVersion::Baseline | GemmVersion::Scalar64);
    let versions = GemmVersion::ALL.into_iter().filter(|version| {
        version.supports(shape, GemmSupport { aligned: true, hopper }) && (cost.flops <= SLOW_FLOPS || !slow(*version))
    });
    let plans = versions.map(|version| Some(GemmPlan { version, splits: 1 }));
    let mut ladder = session.ladder(cuda, op, name, cost, make);
    for plan in [None].into_iter().chain(plans) {
        let variant = plan.map_or("swat".into(), |plan| format!("{:?}", plan.version).to_lowercase());
        ladder = ladder.variant(variant, move |cuda, (a, b, c)| {
            let mut product = || cuda.gemm(a.view(), b.view(), c.view_mut(), shape, Epilogue::default());
            match plan {
                Some(plan) => with_plan(plan, product),
                None => product(),
            }
            .expect("a working device");
        });
    }
    if let Some(peer) = peer {
        let mut product = None;
        ladder = ladder.peer("cublaslt", move |_, (a, b, c)| {
            product.get_or_insert_with(|| peer.product(shape, a, b, c)).run(a, b, c);
        });
    }
    ladder.run();
}

pub(crate) fn cpu(session: &mut Session, cpu: &Cpu) {
    let scale = session.scale;
    for model in scale.models() {
        for shape in shapes(scale, model) {
            linear(session, cpu, &named(model, shape), shape);
        }
        for shape in decoded(scale, model) {
            let make = move |cpu: &Cpu| {
                let LinearShape { tokens, inputs, outputs } = shape;
                [tokens * inputs, outputs * inputs, tokens * outputs].map(|len| random::<_, f32>(cpu, len))
            };
            let ladder = session.ladder(cpu, "decode", named(model, shape), cost::linear(shape, 0, FLOAT), make);
            let ladder = ladder.variant("swat", move |cpu, [x, w, y]| {
                Linear::new(x.view(), w.view(), y.view_mut(), shape).run(cpu).expect("a CPU");
            });
            ladder.run();
        }
        bias(session, cpu, model);
    }
}

/// A linear layer on the CPU beside the `gemm` crate.
fn linear(session: &mut Session, cpu: &Cpu, name: &str, shape: LinearShape) {
    let LinearShape { tokens, inputs, outputs } = shape;
    let make = move |cpu: &Cpu| {
        let tensors = [tokens * inputs, outputs * inputs, tokens * outputs].map(|len| random::<_, f32>(cpu, len));
        // The peer takes slices.
        let host = [tokens * inputs, outputs * inputs, tokens * outputs].map(|len| vec![0.5f32; len]);
        (tensors, host)
    };
    let ladder = session.ladder(cpu, "forward", name, cost::linear(shape, 0, FLOAT), make);
    let ladder = ladder.variant("swat", move |cpu, ([x, w, y], _)| {
        Linear::new(x.view(), w.view(), y.view_mut(), shape).run(cpu).expect("a CPU");
    });
    let ladder = ladder.peer("gemm-crate", move |_, (_, [x, w, y])| {
        gemm_crate(y, (x, (inputs, 1)), (w, (1, inputs)), (tokens, outputs, inputs));
    });
    ladder.run();
    let cost = cost::linear_backward_input(shape, FLOAT);
    let ladder = session.ladder(cpu, "backward-input", name, cost, make);
    let ladder = ladder.variant("swat", move |cpu, ([dx, w, dy], _)| {
        LinearBackwardInput::new(dy.view(), w.view(), dx.view_mut(), shape).run(cpu).expect("a CPU");
    });
    let ladder = ladder.peer("gemm-crate", move |_, (_, [dx, w, dy])| {
        gemm_crate(dx, (dy, (outputs, 1)), (w, (inputs, 1)), (tokens, inputs, outputs));
    });
    ladder.run();
    let cost = cost::linear_backward_weight(shape, FLOAT, FLOAT);
    let ladder = session.ladder(cpu, "backward-weight", name, cost, make);
    let ladder = ladder.variant("swat", move |cpu, ([x, dw, dy], _)| {
        LinearBackwardWeight::new(dy.view(), x.view(), dw.view_mut(), shape).run(cpu).expect("a CPU");
    });
    let ladder = ladder.peer("gemm-crate", move |_, (_, [x, dw, dy])| {
        gemm_crate(dw, (dy, (1, outputs)), (x, (inputs, 1)), (outputs, inputs, tokens));
    });
    ladder.run();
}

/// C [m, n] = A·B; strides are (row, column).
fn gemm_crate(
    c: &mut [f32],
    (a, sa): (&[f32], (usize, usize)),
    (b, sb): (&[f32], (usize, usize)),
    (m, n, k): (usize, usize, usize),
) {
    assert!(c.len() >= m * n && a.len() >= m * k && b.len() >= k * n);
    let [a_rows, a_columns, b_rows, b_columns] = [sa.0, sa.1, sb.0, sb.1].map(|s| s as isize);
    // SAFETY: dense matrices of the sizes asserted above.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            c.as_mut_ptr(),
            1,
            n as isize,
            false,
            a.as_ptr(),
            a_columns,
            a_rows,
            b.as_ptr(),
            b_columns,
            b_rows,
            0.0,
            1.0,
            false,
            false,
            false,
            gemm::Parallelism::Rayon(0),
        );
    }
}

/// The bias gradient: sums over the tokens.
fn bias<D: Device>(session: &mut Session, device: &D, model: &Model) {
    let (tokens, outputs) = (session.scale.tokens, model.q_width());
    let cost = cost::linear_backward_bias(tokens * outputs, outputs, size_of::<D::Float>(), size_of::<D::Grad>());
    let make = move |d: &D| (random::<D, D::Float>(d, tokens * outputs), random::<D, D::Grad>(d, outputs));
    let ladder = session.ladder(device, "bias", format!("{}/{tokens}x{outputs}", model.name), cost, make);
    let ladder = ladder.variant("swat", move |d, (dy, dbias)| {
        LinearBackwardBias { dy: dy.view(), dbias: dbias.view_mut(), accumulate: false }
            .run(d)
            .expect("a working device");
    });
    ladder.copy().run();
}
