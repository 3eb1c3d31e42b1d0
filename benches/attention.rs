//! Attention: forward, backward, and one query a span of a key-value cache.
//!
//! The baseline is left out where it would take more than about a tenth of a second.

use super::common::shapes::Published;
use super::common::{Device, Model, Session, documents, integers, random};
use swat::backend::cost::attention_pairs;
use swat::backend::cpu::Cpu;
use swat::backend::cuda::{Cuda, F32State};
use swat::backend::{
    Attention, AttentionBackward, AttentionDecode, AttentionShape, Buffer, Cost, DecodeSpans, Documents, Operator,
};

/// Largest call, in FLOPs, that the baseline is timed on.
const BASELINE_FLOPS: u64 = 1 << 36;

/// Versions of the backward pass: the flash ones differ in how the heads of a group are spread over blocks; the last is
/// for Hopper.
const VERSIONS: [&str; 4] = ["baseline", "flash64", "flash128", "wgmma"];
/// Versions of decoding attention.
const DECODE_VERSIONS: [&str; 2] = ["baseline", "flash"];

pub(crate) fn cuda(session: &mut Session, cuda: &Cuda<F32State>) {
    let versions = if cuda.capability() == (9, 0) { &VERSIONS[..] } else { &VERSIONS[..3] };
    attention(session, cuda, versions, &DECODE_VERSIONS);
}

pub(crate) fn cpu(session: &mut Session, cpu: &Cpu) {
    attention(session, cpu, &[], &[]);
}

fn attention<D: Device>(
    session: &mut Session,
    device: &D,
    versions: &[&'static str],
    decode_versions: &[&'static str],
) {
    let scale = session.scale;
    for model in scale.models() {
        scale.packed.iter().for_each(|packed| sequences(session, device, model, *packed, versions));
        scale.spans.iter().for_each(|spans| decode(session, device, model, *spans, decode_versions));
    }
    for Published { model, packed } in &scale.published {
        sequences(session, device, Model::named(model), *packed, versions);
    }
}

/// The tensors of a layer, and their gradients.
struct Tensors<D: Device> {
    q: Buffer<D, D::Float>,
    k: Buffer<D, D::Float>,
    v: Buffer<D, D::Float>,
    o: Buffer<D, D::Float>,
    lse: Buffer<D, f32>,
    d_o: Buffer<D, D::Float>,
    dq: Buffer<D, D::Float>,
    dk: Buffer<D, D::Float>,
    dv: Buffer<D, D::Float>,
    documents: Documents<D>,
}

/// A call.
type Work<D> = fn(&D, &mut Tensors<D>, &Model);

fn shape(model: &Model) -> AttentionShape {
    let Model { heads, kv_heads, head_dim, .. } = *model;
    AttentionShape { heads, kv_heads, head_dim, scale: (head_dim as f32).sqrt().recip(), window: None }
}

fn forward<D: Device>(d: &D, t: &mut Tensors<D>, model: &Model) {
    let Tensors { q, k, v, o, lse, documents, .. } = t;
    let shape = shape(model);
    Attention { q: q.view(), k: k.view(), v: v.view(), o: o.view_mut(), lse: Some(lse.view_mut()), shape, documents }
        .run(d)
        .expect("a working device");
}

fn backward<D: Device>(d: &D, t: &mut Tensors<D>, model: &Model) {
    let Tensors { q, k, v, o, lse, d_o, dq, dk, dv, documents } = t;
    AttentionBackward {
        q: q.view(),
        k: k.view(),
        v: v.view(),
        o: o.view(),
        lse: lse.view(),
        d_o: d_o.view(),
        dq: dq.view_mut(),
        dk: dk.view_mut(),
        dv: dv.view_mut(),
        shape: shape(model),
        documents,
    }
    .run(d)
    .expect("a working device");
}

/// `count` documents of `length` tokens.
fn sequences<D: Device>(
    session: &mut Session,
    device: &D,
    model: &'static Model,
    [count, length]: [usize; 2],
    versions: &[&'static str],
) {
    let tokens = count * length;
    let (q_len, kv_len) = (tokens * model.q_width(), tokens * model.kv_width());
    let make = move |d: &D| {
        let q_like = || random(d, q_len);
        let kv_like = || random(d, kv_len);
        let (q, k, v) = (q_like(), kv_like(), kv_like());
        let (o, lse, documents) = (q_like(), random(d, tokens * model.heads), documents(d, count, length));
        let mut tensors =
            Tensors { q, k, v, o, lse, d_o: q_like(), dq: q_like(), dk: kv_like(), dv: kv_like(), documents };
        // Backward needs the output and log-sum-exp of these very inputs.
        forward(d, &mut tensors, model);
        tensors
    };
    let name = format!("{}/{count}x{length}", model.name);
    let float = size_of::<D::Float>();
    let size = shape(model).size(tokens, count as u64 * attention_pairs(&[0, length as u32], None));
    let works: [(&str, Cost, Work<D>); 2] = [
        ("forward", size.forward(float) + size.lse(), forward::<D>),
        ("backward", size.backward(float), backward::<D>),
    ];
    for (op, cost, work) in works {
        let ladder = session.ladder(device, op, &name, cost, make);
        let ladder = ladder.variant("swat", move |d, t| work(d, t, model));
        let quick = |version: &&'static str| *version != "baseline" || cost.flops <= BASELINE_FLOPS;
        let ladder = versions.iter().copied().filter(quick).fold(ladder, |ladder, version| {
            ladder.variant(version, move |d, t| d.with_version(version, &mut || work(d, t, model)))
        });
        ladder.run();
    }
}

/// Decoding: one query for each of `count` spans of `length` cached rows.
fn decode<D: Device>(
    session: &mut Session,
    device: &D,
    model: &'static Model,
    [count, length]: [usize; 2],
    versions: &[&'static str],
) {
    let width = count * model.q_width();
    let cache = count * length * model.kv_width();
    let make = move |d: &D| {
        let spans: Vec<u32> = (0..count).flat_map(|i| [(i * length) as u32, length as u32]).collect();
        let [q, k, v, o] = [width, cache, cache, width].map(|len| random::<D, D::Float>(d, len));
        (q, k, v, o, integers(d, spans.iter().copied()), spans)
    };
    let rows = count * length;
    let cost = shape(model).size(count, rows as u64).decode(rows, size_of::<D::Float>());
    let ladder = session.ladder(device, "decode", format!("{}/{count}x{length}", model.name), cost, make);
    type Cached<D, F> = (Buffer<D, F>, Buffer<D, F>, Buffer<D, F>, Buffer<D, F>, Buffer<D, u32>, Vec<u32>);
    let work = move |d: &D, (q, k, v, o, on_device, spans): &mut Cached<D, D::Float>| {
        let (spans, shape) = (DecodeSpans { host: spans, device: on_device.view() }, shape(model));
        let (q, k, v, o) = (q.view(), k.view(), v.view(), o.view_mut());
        AttentionDecode { q, k, v, o, spans, shape }.run(d).expect("a working device");
    };
    ladder.versions(versions, work).copy().run();
}
