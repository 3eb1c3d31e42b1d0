//! Every kernel family on tensors of more than 2³¹ elements or 2³² bytes, as in a 7B model, where 32-bit offsets
//! overflow. The stand-in maps memory when it is touched, and runs only the first and the last blocks of a grid.
//!
//! Tensors are zero except for their last row or last elements, which determine the expected end of the output.

mod common;

use common::standin;
use std::sync::Once;
use swat::backend::cuda::{
    Bf16State, Cuda, F32State, GemmLayout, GemmPlan, GemmShape, GemmSupport, GemmVersion, Precision, with_plan,
    with_version,
};
use swat::backend::*;

/// Logits of a batch with the largest vocabulary of 7B models, and with one that is no multiple of eight.
const ROWS: usize = 32_768;
const VOCAB: usize = 152_064;
const ODD_VOCAB: usize = 152_063;
/// Elements beyond 2³¹, in rows of 4096.
const WIDTH: usize = 4096;
const LONG: usize = 600_000 * WIDTH;

/// Device 0 (9.0) or 2 (8.0) in sparse mode: two blocks at each end of a grid run.
fn device<P: Precision>(ordinal: u32) -> Option<Cuda<P>> {
    if standin::real() || !standin::available() {
        return None;
    }
    static SPARSE: Once = Once::new();
    SPARSE.call_once(|| (0..4).for_each(|ordinal| standin::sparse(ordinal, 2)));
    standin::open::<P>(ordinal)
}

fn on_both(test: impl Fn(&Cuda<F32State>)) {
    [0, 2].into_iter().filter_map(device::<F32State>).for_each(|b| test(&b));
}

/// Runs `test` with the backend's choice, then with each of the named versions forced.
fn each_version(names: &[&'static str], test: impl Fn(&str)) {
    test("chosen");
    names.iter().for_each(|name| with_version(name, || test(name)));
}

fn put<B: Backend, T: Element>(b: &B, values: &[T]) -> Buffer<B, T> {
    let mut buffer = b.zeros(values.len()).unwrap();
    b.write(values, buffer.view_mut()).unwrap();
    buffer
}

/// `len` zeros that end with these values.
fn ending<B: Backend, T: FloatElement>(b: &B, len: usize, last: &[f32]) -> Buffer<B, T> {
    let mut buffer = b.zeros(len).unwrap();
    let last: Vec<T> = last.iter().map(|x| T::from_f32(*x)).collect();
    b.write(&last, buffer.range_mut(len - last.len()..len)).unwrap();
    buffer
}

/// The last elements.
fn last<B: Backend, T: FloatElement>(b: &B, buffer: &Buffer<B, T>, count: usize) -> Vec<f32> {
    let mut host = vec![T::from_f32(0.0); count];
    b.read(buffer.range(buffer.len() - count..buffer.len()), &mut host).unwrap();
    host.iter().map(|x| x.to_f32()).collect()
}

#[track_caller]
fn assert_all(got: &[f32], expected: f32, what: &str) {
    let wrong = got.iter().position(|x| (x - expected).abs() > 0.01 * expected.abs().max(1e-6));
    assert!(wrong.is_none(), "{what}: {:?} at {wrong:?} of {}, expected {expected}", got[wrong.unwrap()], got.len());
}

#[test]
fn cross_entropy_of_logits() {
    on_both(|b| {
        for vocab in [VOCAB, ODD_VOCAB] {
            each_version(&["baseline"], |version| {
                let what = format!("{version}, {}, vocabulary {vocab}", b.name());
                // The last row: a logit of 12 at its end, which is not the target.
                let mut logits = ending(b, ROWS * vocab, &[12.0]);
                let targets = put(b, &vec![0u32; ROWS]);
                let mut losses = b.zeros::<f32>(ROWS).unwrap();
                let sum = (vocab as f32 - 1.0) + 12f32.exp();
                for scale in [None, Some(2.0)] {
                    let (lv, ov) = (logits.view_mut(), losses.view_mut());
                    CrossEntropy { logits: lv, targets: targets.view(), losses: ov, vocab, scale, terms: None }
                        .run(b)
                        .unwrap();
                    let loss = last(b, &losses, 2);
                    assert_all(&loss[..1], (vocab as f32).ln(), &what);
                    assert_all(&loss[1..], sum.ln(), &what);
                }
                let gradient = last(b, &logits, vocab);
                assert_all(&gradient[..1], 2.0 / sum - 2.0, &what);
                assert_all(&gradient[1..vocab - 1], 2.0 / sum, &what);
                assert_all(&gradient[vocab - 1..], 2.0 * 12f32.exp() / sum, &what);
            });
        }
    });
}

#[test]
fn tokens_drawn_from_logits() {
    on_both(|b| {
        for vocab in [VOCAB, ODD_VOCAB] {
            let logits = ending(b, ROWS * vocab, &[40.0]);
            let uniforms = put(b, &vec![0.5f32; ROWS]);
            for (temperature, top_p) in [(0.0, 1.0), (1.0, 1.0), (1.0, 0.9)] {
                let mut tokens = b.zeros::<u32>(ROWS).unwrap();
                let sampling = Sampling { temperature, top_p };
                Sample { logits: logits.view(), uniforms: uniforms.view(), tokens: tokens.view_mut(), vocab, sampling }
                    .run(b)
                    .unwrap();
                let mut drawn = [0];
                b.read(tokens.range(ROWS - 1..ROWS), &mut drawn).unwrap();
                assert_eq!(drawn, [vocab as u32 - 1], "{sampling:?}, {}", b.name());
            }
        }
    });
}

/// A product with a large C or a large operand: the last element of C comes from the ends of A and B.
fn product<T: FloatElement>(b: &Cuda<F32State>, shape: GemmShape, splits: u32, versions: &[GemmVersion]) {
    let GemmShape { layout, m, n, k } = shape;
    // A and B are 1 at their ends: in row m − 1 and column n − 1, for k − 1 alone where a line of k is not contiguous.
    let ones = vec![1.0; 8];
    let (left, right) = (ending::<_, half::bf16>(b, m * k, &ones), ending::<_, half::bf16>(b, n * k, &ones));
    let expected = if layout == GemmLayout::Tn { 8.0 } else { 1.0 };
    for version in versions
        .iter()
        .filter(|version| version.supports(shape, GemmSupport { aligned: true, hopper: b.capability() == (9, 0) }))
    {
        let mut c = b.zeros::<T>(m * n).unwrap();
        let plan = GemmPlan { version: *version, splits };
        with_plan(plan, || b.gemm(left.view(), right.view(), c.view_mut(), shape, Epilogue::default())).unwrap();
        assert_all(&last(b, &c, 1), expected, &format!("{version:?} of {shape:?}, {splits} parts, {}", b.name()));
    }
}

use GemmVersion::{Baseline, Decode, Mma64, Mma128, Scalar64, Wgmma128, Wgmma256};
const TILED: [GemmVersion; 5] = [Scalar64, Mma64, Mma128, Wgmma128, Wgmma256];

#[test]
fn products_with_a_large_result() {
    on_both(|b| {
        let versions = [&TILED[..], &[Baseline]].concat();
        let shape = |layout| GemmShape { layout, m: ROWS, n: VOCAB, k: 64 };
        product::<half::bf16>(b, shape(GemmLayout::Tn), 1, &versions);
        product::<half::bf16>(b, shape(GemmLayout::Nn), 1, &versions);
        product::<half::bf16>(b, shape(GemmLayout::Nt), 1, &versions);
        product::<f32>(b, shape(GemmLayout::Nt), 1, &versions);
    });
}

#[test]
fn products_with_large_partial_sums() {
    on_both(|b| {
        let shape = GemmShape { layout: GemmLayout::Tn, m: ROWS, n: ROWS + 64, k: 512 };
        product::<half::bf16>(b, shape, 4, &TILED);
    });
}

#[test]
fn products_with_a_large_operand() {
    on_both(|b| {
        let some = [Scalar64, Mma128, Wgmma256];
        // dlogits · W; W of a product; dlogitsᵀ · X.
        product::<half::bf16>(b, GemmShape { layout: GemmLayout::Nn, m: 2 * ROWS, n: 64, k: ROWS + 8 }, 1, &some);
        product::<half::bf16>(b, GemmShape { layout: GemmLayout::Tn, m: 64, n: VOCAB, k: 16_384 }, 1, &some);
        product::<half::bf16>(b, GemmShape { layout: GemmLayout::Nn, m: 64, n: VOCAB, k: 16_384 }, 1, &some);
        product::<f32>(b, GemmShape { layout: GemmLayout::Nt, m: VOCAB, n: 64, k: 16_384 }, 1, &some);
        product::<f32>(b, GemmShape { layout: GemmLayout::Nt, m: 64, n: VOCAB, k: 16_384 }, 1, &some);
        for m in [1, 2, 3, 8] {
            product::<half::bf16>(b, GemmShape { layout: GemmLayout::Tn, m, n: VOCAB, k: 16_384 }, 1, &[Decode]);
        }
    });
}

#[test]
fn column_sums() {
    on_both(|b| {
        for rows in [ROWS, 40] {
            let outputs = LONG / rows / 8 * 8;
            let dy = ending(b, rows * outputs, &[3.0; 8]);
            let mut dbias = b.zeros::<f32>(outputs).unwrap();
            LinearBackwardBias { dy: dy.view(), dbias: dbias.view_mut(), accumulate: false }.run(b).unwrap();
            assert_all(&last(b, &dbias, 8), 3.0, &format!("{rows} rows, {}", b.name()));
        }
    });
}

/// K, V and dO are zero except in the last row of the last document, and Q everywhere. The blocks that run may be those
/// of the first or of the last heads.
#[test]
fn attention_of_many_documents() {
    const DOCUMENT: usize = 512;
    const SCALE: f32 = 0.125;
    on_both(|b| {
        for (tokens, heads, kv_heads, head_dim) in
            [(1 << 20, 28, 4, 128), (1 << 21, 14, 14, 80), (1 << 21, 28, 28, 64), (1 << 22, 28, 4, 64)]
        {
            let starts: Vec<u32> = (0..=tokens / DOCUMENT).map(|i| (i * DOCUMENT) as u32).collect();
            let documents = Documents { device: put(b, &starts), starts };
            let shape = AttentionShape { heads, kv_heads, head_dim, scale: SCALE, window: None };
            let (row, kv_row) = (heads * head_dim, kv_heads * head_dim);
            let q = b.zeros(tokens * row).unwrap();
            let [k, v] = [(); 2].map(|()| ending(b, tokens * kv_row, &vec![1.0; kv_row]));
            let d_o = ending(b, tokens * row, &vec![1.0; row]);
            let weight = 1.0 / DOCUMENT as f32;
            let saved = ending(b, tokens * row, &vec![weight; row]);
            let stats = put(b, &vec![(DOCUMENT as f32).ln(); heads * tokens]);
            let some_heads = |got: &[f32], expected: f32, what: &str| {
                let done: Vec<&[f32]> = got.chunks(head_dim).filter(|head| head[0] != 0.0).collect();
                assert!(!done.is_empty(), "{what}: no head");
                done.iter().for_each(|head| assert_all(head, expected, what));
            };
            each_version(&["flash64", "flash128", "wgmma", "baseline"], |version| {
                let what = format!("{version}, {tokens} tokens, {heads} heads of {head_dim}, {}", b.name());
                let (mut o, mut lse) = (b.zeros(tokens * row).unwrap(), b.zeros(heads * tokens).unwrap());
                let (q, k, v, documents, lse) = (q.view(), k.view(), v.view(), &documents, Some(lse.view_mut()));
                let forward =
                    Attention { q: q.clone(), k: k.clone(), v: v.clone(), o: o.view_mut(), lse, shape, documents };
                forward.run(b).unwrap();
                some_heads(&last(b, &o, row), weight, &format!("o: {what}"));
                let mut dq = b.zeros(tokens * row).unwrap();
                let [mut dk, mut dv] = [(); 2].map(|()| b.zeros(tokens * kv_row).unwrap());
                let (o, lse, d_o, [dqv, dkv, dvv]) =
                    (saved.view(), stats.view(), d_o.view(), [&mut dq, &mut dk, &mut dv].map(Buffer::view_mut));
                AttentionBackward { q, k, v, o, lse, d_o, dq: dqv, dk: dkv, dv: dvv, shape, documents }.run(b).unwrap();
                let delta = head_dim as f32 * weight;
                some_heads(&last(b, &dq, row), SCALE * weight * (head_dim as f32 - delta), &format!("dq: {what}"));
                // Of the heads of a group those that ran.
                let got = last(b, &dv, kv_row);
                let counted = got.iter().map(|x| x / weight).filter(|x| *x != 0.0);
                let counts: Vec<f32> = counted.collect();
                let whole = counts.iter().all(|x| (x - x.round()).abs() < 0.02 && *x <= (heads / kv_heads) as f32);
                assert!(!counts.is_empty() && whole, "dv: {what}: {counts:?}");
            });
        }
    });
}

/// More queries than a grid has blocks in y or z, as the members of a sweep have, each over the same keys.
#[test]
fn attention_of_many_queries() {
    on_both(|b| {
        // One chunk of keys, which a block finishes; two, whose sums are combined.
        for (head_dim, len) in [(64, 20), (80, 20), (64, 300)] {
            let queries = 70_000;
            let v = put(b, &vec![half::bf16::ONE; len * head_dim]);
            let k = b.zeros::<half::bf16>(len * head_dim).unwrap();
            let q = b.zeros::<half::bf16>(queries * head_dim).unwrap();
            let span = [0, len as u32].repeat(queries);
            let on_device = put(b, &span);
            let shape = AttentionShape { heads: 1, kv_heads: 1, head_dim, scale: 0.125, window: None };
            each_version(&["baseline"], |version| {
                let mut o = b.zeros::<half::bf16>(queries * head_dim).unwrap();
                let spans = DecodeSpans { host: &span, device: on_device.view() };
                let (q, k, v) = (q.view(), k.view(), v.view());
                AttentionDecode { q, k, v, o: o.view_mut(), spans, shape }.run(b).unwrap();
                let what = format!("{version}, {len} keys of {head_dim}, {}", b.name());
                assert_all(&last(b, &o, head_dim), 1.0, &what);
            });
        }
    });
}

/// The only span is the end of the cache.
#[test]
fn attention_of_a_large_cache() {
    on_both(|b| {
        for (heads, kv_heads, head_dim) in [(28, 4, 128), (28, 28, 64), (8, 4, 80)] {
            let (width, len) = (kv_heads * head_dim, 300);
            let rows = LONG / width;
            let k = b.zeros(rows * width).unwrap();
            let v = ending(b, rows * width, &vec![1.0; len * width]);
            let shape = AttentionShape { heads, kv_heads, head_dim, scale: 0.125, window: None };
            let span = [(rows - len) as u32, len as u32];
            let on_device = put(b, &span);
            let q = b.zeros(heads * head_dim).unwrap();
            each_version(&["baseline"], |version| {
                let mut o = b.zeros(heads * head_dim).unwrap();
                let spans = DecodeSpans { host: &span, device: on_device.view() };
                let (q, k, v) = (q.view(), k.view(), v.view());
                AttentionDecode { q, k, v, o: o.view_mut(), spans, shape }.run(b).unwrap();
                let done = last(b, &o, heads * head_dim);
                let what = format!("{version}, {heads} heads of {head_dim}, {}", b.name());
                assert!(done.iter().any(|x| (x - 1.0).abs() < 0.01), "{what}");
            });
        }
    });
}

#[test]
fn rmsnorm_of_rows() {
    on_both(|b| {
        for (width, rows) in [
            (128, LONG / 128),
            (1024, LONG / 1024),
            (2048, LONG / 2048),
            (WIDTH, LONG / WIDTH),
            (8192, LONG / 8192),
            (8191, LONG / 8191),
        ] {
            let x = ending(b, rows * width, &vec![2.0; width]);
            let weight = put(b, &vec![half::bf16::from_f32(3.0); width]);
            let dy = ending(b, rows * width, &[1.0]);
            each_version(&["baseline", "lanes", "warp", "row1024", "row2048", "row4096", "row8192"], |version| {
                let what = format!("{version}, width {width}, {}", b.name());
                let (mut y, mut rstd) = (b.zeros(rows * width).unwrap(), b.zeros(rows).unwrap());
                RmsNorm { x: x.view(), weight: weight.view(), y: y.view_mut(), rstd: Some(rstd.view_mut()), eps: 1e-6 }
                    .run(b)
                    .unwrap();
                assert_all(&last(b, &y, width), 3.0, &what);
                assert_all(&last(b, &rstd, 1), 0.5, &what);
            });
            each_version(&["baseline", "lanes", "row1024"], |version| {
                let what = format!("{version}, width {width}, {}, backward", b.name());
                let rstd = ending(b, rows, &[0.5]);
                let (mut dx, mut dweight) = (b.zeros(rows * width).unwrap(), b.zeros::<f32>(width).unwrap());
                RmsNormBackward {
                    dy: dy.view(),
                    x: x.view(),
                    weight: weight.view(),
                    rstd: rstd.view(),
                    dx: Some(dx.view_mut()),
                    dweight: Some(dweight.view_mut()),
                    accumulate_dx: false,
                    accumulate_dweight: false,
                }
                .run(b)
                .unwrap();
                let mean = 3.0 / width as f32;
                assert_all(&last(b, &dx, 1), 0.5 * (3.0 - mean), &what);
                assert_all(&last(b, &dx, 2)[..1], -0.5 * mean, &what);
                assert_all(&last(b, &dweight, 1), 1.0, &what);
            });
        }
    });
}

#[test]
fn rope_of_heads() {
    on_both(|b| {
        for head_dim in [128, 20] {
            let heads = 28;
            let tokens = LONG / heads / head_dim;
            // A quarter turn makes (1, 1) of (−1, 1).
            let table: Vec<f32> = (0..head_dim).map(|i| if i < head_dim / 2 { 0.0 } else { 1.0 }).collect();
            let (table, positions) = (put(b, &table), b.zeros::<u32>(tokens).unwrap());
            each_version(&["baseline"], |version| {
                let mut x = ending(b, tokens * heads * head_dim, &vec![1.0; head_dim]);
                Rope { x: x.view_mut(), table: table.view(), positions: positions.view(), head_dim, inverse: false }
                    .run(b)
                    .unwrap();
                let (got, what) = (last(b, &x, head_dim), format!("{version}, heads of {head_dim}, {}", b.name()));
                assert_all(&got[..head_dim / 2], -1.0, &what);
                assert_all(&got[head_dim / 2..], 1.0, &what);
            });
        }
    });
}

#[test]
fn swiglu_of_rows() {
    on_both(|b| {
        let [mut gate, mut up] = [2.0, 3.0].map(|x| ending(b, LONG, &[x; 8]));
        let dy = ending(b, LONG, &[1.0; 8]);
        let sigmoid = 1.0 / (1.0 + (-2f32).exp());
        each_version(&["baseline"], |version| {
            let mut y = b.zeros(LONG).unwrap();
            SwiGlu { gate: gate.view(), up: up.view(), y: y.view_mut() }.run(b).unwrap();
            assert_all(&last(b, &y, 8), 6.0 * sigmoid, &format!("{version}, {}", b.name()));
        });
        SwiGluBackward { gate: gate.view_mut(), up: up.view_mut(), dy: dy.view() }.run(b).unwrap();
        assert_all(&last(b, &up, 8), 2.0 * sigmoid, "dup");
        assert_all(&last(b, &gate, 8), 3.0 * sigmoid * (1.0 + 2.0 * (1.0 - sigmoid)), "dgate");
        with_version("baseline", || {
            let [mut gate, mut up] = [2.0, 3.0].map(|x| ending(b, LONG, &[x; 8]));
            SwiGluBackward { gate: gate.view_mut(), up: up.view_mut(), dy: dy.view() }.run(b).unwrap();
            assert_all(&last(b, &up, 8), 2.0 * sigmoid, "dup, baseline");
        });
    });
}

#[test]
fn embedding_rows() {
    on_both(|b| {
        for width in [16_384, 16_385] {
            let (table, row) = (ending(b, VOCAB * width, &vec![5.0; width]), VOCAB as u32 - 1);
            each_version(&["baseline"], |version| {
                let what = format!("{version}, rows of {width}, {}", b.name());
                let (rows, mut to) = (put(b, &[row]), b.zeros(width).unwrap());
                GatherRows { from: table.view(), rows: rows.view(), to: to.view_mut(), width }.run(b).unwrap();
                assert_all(&last(b, &to, 8), 5.0, &what);
                let mut table = b.zeros(VOCAB * width).unwrap();
                ScatterRows { from: to.view(), rows: rows.view(), to: table.view_mut(), width }.run(b).unwrap();
                assert_all(&last(b, &table, 8), 5.0, &what);
                // Many rows, of which the last is the last of the table.
                let count = VOCAB;
                let many = put(b, &(0..count as u32).collect::<Vec<_>>());
                let mut to = b.zeros(count * width).unwrap();
                let from = ending(b, VOCAB * width, &vec![5.0; width]);
                GatherRows { from: from.view(), rows: many.view(), to: to.view_mut(), width }.run(b).unwrap();
                assert_all(&last(b, &to, 8), 5.0, &what);
                let mut to = b.zeros(count * width).unwrap();
                ScatterRows { from: from.view(), rows: many.view(), to: to.view_mut(), width }.run(b).unwrap();
                assert_all(&last(b, &to, 8), 5.0, &what);
            });
        }
    });
}

/// Gradients of a few rows of a large table, by every kernel; few enough that all blocks that link rows run. Checked
/// are the first columns of the table's last row, which the first blocks sum.
#[test]
fn embedding_gradients() {
    on_both(|b| {
        for (width, copies) in [(16_384, 3), (16_385, 3), (16_384, 200)] {
            let dy = ending(b, copies * width, &vec![1.0; copies * width]);
            let rows = put(b, &vec![VOCAB as u32 - 1; copies]);
            each_version(&["baseline"], |version| {
                let mut dtable = b.zeros::<f32>(VOCAB * width).unwrap();
                EmbeddingBackward { dy: dy.view(), rows: rows.view(), dtable: dtable.view_mut(), width }
                    .run(b)
                    .unwrap();
                let what = format!("{version}, {copies} of {width}, {}", b.name());
                assert_all(&last(b, &dtable, width)[..8], copies as f32, &what);
            });
        }
    });
}

fn optimizer<P: Precision>(b: &Cuda<P>, offset: usize) {
    let len = LONG + offset;
    let hyper = AdamW {
        beta1: 0.9,
        beta2: 0.999,
        eps: 1e-8,
        step: 1,
        max_grad_norm: Some(1.0),
        seed: 3,
        rounding: Rounding::Nearest,
    };
    let (mut weight, grad) = (ending(b, len, &[1.0; 8]), ending(b, len, &[2.0; 8]));
    let (mut m, mut v) = (b.zeros(len).unwrap(), b.zeros(len).unwrap());
    let mut squares = b.zeros::<f32>(1).unwrap();
    let range = offset..len;
    SumSquares { parts: &[grad.range(range.clone())], squares: squares.view_mut() }.run(b).unwrap();
    let what = format!("{}, from {offset}", b.name());
    assert_all(&last(b, &squares, 1), 32.0, &what);
    let row = AdamWModule {
        weight: weight.range_mut(range.clone()),
        grad: grad.range(range.clone()),
        m: m.range_mut(range.clone()),
        v: v.range_mut(range),
        lr: 0.5,
        weight_decay: 0.0,
    };
    AdamWMasked { table: &mut [row], squares: squares.view(), hyper }.run(b).unwrap();
    // The first step is lr, whatever the gradient.
    assert_all(&last(b, &weight, 8), 0.5, &what);
    assert_all(&last(b, &m, 8), 0.1 * 2.0 / 32f32.sqrt(), &what);
}

#[test]
fn optimizer_steps() {
    for offset in [0, 1] {
        device::<F32State>(0).iter().for_each(|b| optimizer(b, offset));
        device::<Bf16State>(3).iter().for_each(|b| optimizer(b, offset));
    }
}

#[test]
fn perturbed_modules() {
    on_both(|b| {
        let w = ending(b, LONG, &[4.0; 16]);
        let n = ending(b, LONG, &[2.0; 16]);
        let key = NoiseKey { seed: 5, stream: 6 };
        let perturbed = |direction: Direction<In<'_, Cuda<F32State>>>, epsilon| {
            let [mut plus, mut minus] = [(); 2].map(|()| b.zeros(LONG).unwrap());
            Perturb {
                w: w.view(),
                squares: None,
                direction,
                epsilon,
                plus: plus.view_mut(),
                minus: Some(minus.view_mut()),
            }
            .run(b)
            .unwrap();
            (last(b, &plus, 16), last(b, &minus, 16))
        };
        // ‖w‖ / ‖n‖ is 2.
        for direction in [Direction::Scale, Direction::Given(n.view())] {
            let (plus, minus) = perturbed(direction, 0.5);
            assert_all(&plus, 6.0, &b.name());
            assert_all(&minus, 2.0, &b.name());
        }
        // Noise of all elements has a norm of thousands.
        let low_rank = Direction::LowRank { key, rank: 4, rows: LONG / WIDTH };
        for (name, direction) in
            [("normals", Direction::Gaussian(key)), ("signs", Direction::Rademacher(key)), ("low rank", low_rank)]
        {
            let (plus, minus) = perturbed(direction, 3000.0);
            for (p, m) in plus.iter().zip(&minus) {
                let close = ((p + m) / 2.0 - 4.0).abs() < 0.01 * (p - m).abs() + 0.02;
                assert!(close && p != m, "{name}, {}: {p}, {m}", b.name());
            }
        }
    });
}
