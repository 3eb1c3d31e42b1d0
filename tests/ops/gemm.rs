//! Linear layers.

mod gated;
mod grouped;

use super::*;
use crate::cores::Cores;
use swat::backend::cuda::{
    Bf16State, Cuda, F32State, GemmLayout, GemmPlan, GemmShape, GemmSupport, GemmVersion, Precision, with_plan,
};

/// (tokens, inputs, outputs): decoding sizes, odd sizes, sizes of several panels and depths.
const SHAPES: [(usize, usize, usize); 15] = [
    (1, 1, 1),
    (1, 64, 48),
    (1, 577, 131),
    (2, 100, 33),
    (3, 16, 7),
    (4, 129, 65),
    (5, 96, 40),
    (7, 31, 70),
    (8, 200, 66),
    (9, 65, 17),
    (16, 48, 129),
    (33, 7, 5),
    (130, 150, 70),
    (257, 576, 192),
    (300, 40, 1030),
];

/// a [m, k] · b [k, n] with strides (row, column).
fn product(a: &[f64], sa: (usize, usize), b: &[f64], sb: (usize, usize), (m, n, k): (usize, usize, usize)) -> Vec<f64> {
    let mut c = vec![0.0; m * n];
    for i in 0..m {
        for j in 0..n {
            c[i * n + j] = (0..k).map(|l| a[i * sa.0 + l * sa.1] * b[l * sb.0 + j * sb.1]).sum();
        }
    }
    c
}

/// What f32 sums of `terms` products of normals may be off by.
fn error(terms: usize) -> f64 {
    3e-6 * (terms as f64).sqrt()
}

fn scaled(base: Option<&[f64]>, alpha: f64, product: &[f64]) -> Vec<f64> {
    product.iter().enumerate().map(|(i, p)| alpha * p + base.map_or(0.0, |b| b[i])).collect()
}

fn linear_with_every_epilogue<B: Backend>(b: &B) {
    for (tokens, inputs, outputs) in SHAPES {
        let shape = LinearShape { tokens, inputs, outputs };
        let x = put::<B, B::Float>(b, &normals(1, tokens * inputs));
        let w = put::<B, B::Float>(b, &normals(2, outputs * inputs));
        let bias = put::<B, B::Float>(b, &normals(3, outputs));
        let residual = put::<B, B::Float>(b, &normals(4, tokens * outputs));
        let xw = product(&x.host, (inputs, 1), &w.host, (1, inputs), (tokens, outputs, inputs));
        for case in 0..16 {
            let [with_bias, with_residual, accumulate, with_alpha] = [1, 2, 4, 8].map(|bit| case & bit != 0);
            let alpha = if with_alpha { -0.375 } else { 1.0 };
            let mut y = put::<B, B::Float>(b, &normals(5, tokens * outputs));
            let exact: Vec<f64> = (0..tokens * outputs)
                .map(|i| {
                    alpha as f64 * xw[i]
                        + if with_bias { bias.host[i % outputs] } else { 0.0 }
                        + if with_residual { residual.host[i] } else { 0.0 }
                        + if accumulate { y.host[i] } else { 0.0 }
                })
                .collect();
            let epilogue = Epilogue {
                alpha,
                bias: with_bias.then(|| bias.device.view()),
                residual: with_residual.then(|| residual.device.view()),
                accumulate,
            };
            Linear { epilogue, ..Linear::new(x.device.view(), w.device.view(), y.device.view_mut(), shape) }
                .run(b)
                .unwrap();
            assert_close::<B>(&get(b, &y.device), &exact, error(inputs), &format!("{shape:?}, case {case}"));
        }
    }
}

fn backward_of_input_and_weight<B: Backend>(b: &B) {
    for (tokens, inputs, outputs) in SHAPES {
        let shape = LinearShape { tokens, inputs, outputs };
        let x = put::<B, B::Float>(b, &normals(1, tokens * inputs));
        let w = put::<B, B::Float>(b, &normals(2, outputs * inputs));
        let dy = put::<B, B::Float>(b, &normals(3, tokens * outputs));
        let dyw = product(&dy.host, (outputs, 1), &w.host, (inputs, 1), (tokens, inputs, outputs));
        let dytx = product(&dy.host, (1, outputs), &x.host, (inputs, 1), (outputs, inputs, tokens));
        for (alpha, accumulate) in [(1.0, false), (1.0, true), (0.25, false), (-2.0, true)] {
            let mut dx = put::<B, B::Float>(b, &normals(6, tokens * inputs));
            let mut dw = put::<B, B::Grad>(b, &normals(7, outputs * inputs));
            let exact_dx = scaled(accumulate.then_some(&dx.host), alpha as f64, &dyw);
            let exact_dw = scaled(accumulate.then_some(&dw.host), alpha as f64, &dytx);
            let (dyv, wv, xv) = (dy.device.view(), w.device.view(), x.device.view());
            LinearBackwardInput {
                alpha,
                accumulate,
                ..LinearBackwardInput::new(dyv.clone(), wv, dx.device.view_mut(), shape)
            }
            .run(b)
            .unwrap();
            LinearBackwardWeight {
                alpha,
                accumulate,
                ..LinearBackwardWeight::new(dyv, xv, dw.device.view_mut(), shape)
            }
            .run(b)
            .unwrap();
            assert_close::<B>(&get(b, &dx.device), &exact_dx, error(outputs), &format!("dx of {shape:?}"));
            assert_close::<B>(&get(b, &dw.device), &exact_dw, error(tokens), &format!("dw of {shape:?}"));
        }
    }
}

fn bias_gradient_sums_columns<B: Backend>(b: &B) {
    for (tokens, outputs) in [(1, 1), (3, 17), (300, 33), (129, 64), (70, 264), (8300, 5)] {
        let dy = put::<B, B::Float>(b, &normals(1, tokens * outputs));
        for accumulate in [false, true] {
            let mut dbias = put::<B, B::Grad>(b, &normals(2, outputs));
            let exact: Vec<f64> = (0..outputs)
                .map(|o| {
                    let base = if accumulate { dbias.host[o] } else { 0.0 };
                    base + (0..tokens).map(|t| dy.host[t * outputs + o]).sum::<f64>()
                })
                .collect();
            LinearBackwardBias { dy: dy.device.view(), dbias: dbias.device.view_mut(), accumulate }.run(b).unwrap();
            assert_close::<B>(&get(b, &dbias.device), &exact, 1e-5, &format!("{tokens} × {outputs}"));
        }
    }
}

/// What a frozen module's neighbours hold must not change: views are parts of larger buffers.
fn writes_only_its_view<B: Backend>(b: &B) {
    let (tokens, inputs, outputs) = (20, 30, 10);
    let x = put::<B, B::Float>(b, &normals(1, tokens * inputs));
    let w = put::<B, B::Float>(b, &normals(2, outputs * inputs));
    let mut y = put::<B, B::Float>(b, &vec![7.0; tokens * outputs + 11]);
    let to = y.device.range_mut(4..4 + tokens * outputs);
    Linear::new(x.device.view(), w.device.view(), to, LinearShape { tokens, inputs, outputs }).run(b).unwrap();
    let y = get(b, &y.device);
    assert!(y[..4].iter().chain(&y[4 + tokens * outputs..]).all(|y| *y == 7.0));
}

/// Operands of a product, its result before the epilogue in f64, and the same as sums of tensor cores.
struct Case<B: Backend> {
    shape: GemmShape,
    /// Elements before each operand.
    offset: usize,
    a: Buffer<B, B::Float>,
    b: Buffer<B, B::Float>,
    exact: Vec<f64>,
    emulated: Vec<f32>,
}

impl<P: Precision> Case<Cuda<P>> {
    fn new(cuda: &Cuda<P>, shape: GemmShape, offset: usize) -> Self {
        let GemmShape { layout, m, n, k } = shape;
        let a = put::<_, half::bf16>(cuda, &normals(1, offset + m * k));
        let b = put::<_, half::bf16>(cuda, &normals(2, offset + n * k));
        let strides_a = if layout == GemmLayout::Nt { (1, m) } else { (k, 1) };
        let strides_b = if layout == GemmLayout::Tn { (1, k) } else { (n, 1) };
        let (host_a, host_b) = (&a.host[offset..], &b.host[offset..]);
        let exact = product(host_a, strides_a, host_b, strides_b, (m, n, k));
        let line =
            |host: &[f64], at: usize, step: usize| (0..k).map(|l| host[at + l * step] as f32).collect::<Vec<_>>();
        let rows: Vec<_> = (0..m).map(|i| line(host_a, i * strides_a.0, strides_a.1)).collect();
        let columns: Vec<_> = (0..n).map(|j| line(host_b, j * strides_b.1, strides_b.0)).collect();
        let cores = Cores::of(cuda.capability().0);
        let emulated = (0..m * n).map(|c| cores.dot(&rows[c / n], &columns[c % n])).collect();
        Self { shape, offset, a: a.device, b: b.device, exact, emulated }
    }

    /// Every version that supports the case, into C's of type T, with these of the addends: bias 1, residual 2,
    /// accumulate 4, alpha 8. C, bias and residual lie where only single elements can be accessed if `shifted`.
    fn check<T: FloatElement>(&self, cuda: &Cuda<P>, addends: usize, shifted: bool) {
        let GemmShape { m, n, k, .. } = self.shape;
        let [with_bias, with_residual, accumulate, with_alpha] = [1, 2, 4, 8].map(|bit| addends & bit != 0);
        let (alpha, shift) = (if with_alpha { -0.375 } else { 1.0 }, if shifted { 1 } else { 0 });
        let bias = put::<_, half::bf16>(cuda, &normals(3, shift + n));
        let residual = put::<_, half::bf16>(cuda, &normals(4, shift + m * n));
        let before = normals(5, shift + m * n + 2);
        let addend = |c: usize| {
            let bias = if with_bias { bias.host[shift + c % n] } else { 0.0 };
            let residual = if with_residual { residual.host[shift + c] } else { 0.0 };
            let before = T::from_f32(before[shift + c] as f32).to_f32() as f64;
            [bias, residual, if accumulate { before } else { 0.0 }]
        };
        let exact: Vec<f64> =
            (0..m * n).map(|c| alpha as f64 * self.exact[c] + addend(c).iter().sum::<f64>()).collect();
        let emulated = (0..m * n).map(|c| {
            let x = addend(c).iter().fold(alpha * self.emulated[c], |x, addend| x + *addend as f32);
            T::from_f32(x).to_f32() as f64
        });
        let far = |results: &[f64]| results.iter().zip(&exact).map(|(r, e)| (r - e).abs()).fold(0.0, f64::max);
        let allowed = 2.0 * far(&emulated.collect::<Vec<_>>()) + 1e-6 * (k as f64).sqrt();
        let (begin, aligned) = (self.offset, self.offset.is_multiple_of(8));
        for version in GemmVersion::ALL {
            if !version.supports(self.shape, GemmSupport { aligned, hopper: cuda.capability() == (9, 0) }) {
                continue;
            }
            let splits: &[u32] = match version {
                GemmVersion::Baseline => &[1],
                GemmVersion::Decode => &[1, 2, 4, 8],
                _ => &[1, 3],
            };
            for splits in splits {
                let plan = GemmPlan { version, splits: *splits };
                let mut c = put::<_, T>(cuda, &before);
                let epilogue = Epilogue {
                    alpha,
                    bias: with_bias.then(|| bias.device.range(shift..shift + n)),
                    residual: with_residual.then(|| residual.device.range(shift..shift + m * n)),
                    accumulate,
                };
                let (a, b) = (self.a.range(begin..begin + m * k), self.b.range(begin..begin + n * k));
                let to = c.device.range_mut(shift..shift + m * n);
                with_plan(plan, || cuda.gemm(a, b, to, self.shape, epilogue)).unwrap();
                let after = get(cuda, &c.device);
                let error = far(&after[shift..shift + m * n]);
                assert!(error <= allowed, "{:?}, {plan:?}, {addends}: {error} > {allowed}", self.shape);
                let outside = |x: &[f64]| [x[..shift].to_vec(), x[shift + m * n..].to_vec()];
                assert_eq!(outside(&after), outside(&c.host), "{:?}, {plan:?}", self.shape);
            }
        }
    }
}

const LAYOUTS: [GemmLayout; 3] = [GemmLayout::Tn, GemmLayout::Nn, GemmLayout::Nt];

/// Sizes (m, n, k): odd ones, none, a tile and tails of tiles in each extent, with rows of whole 16 bytes or not.
const PRODUCTS: [(usize, usize, usize); 12] = [
    (1, 1, 1),
    (0, 5, 3),
    (4, 0, 8),
    (5, 8, 0),
    (7, 5, 3),
    (67, 131, 72),
    (136, 264, 77),
    (65, 136, 200),
    (8, 37, 2056),
    (3, 40, 264),
    (1, 130, 520),
    (128, 256, 64),
];

fn every_version_is_as_exact_as_tensor_cores<P: Precision>(cuda: &Cuda<P>) {
    let mut addends = 0;
    for layout in LAYOUTS {
        for (m, n, k) in PRODUCTS {
            for (offset, flip) in [(0, false), (3, true)] {
                let case = Case::new(cuda, GemmShape { layout, m, n, k }, offset);
                addends = (addends + 5) % 16;
                let shifted = (addends % 2 == 0) != flip;
                case.check::<half::bf16>(cuda, addends, shifted);
                if layout == GemmLayout::Nt {
                    case.check::<f32>(cuda, addends & !3, !shifted);
                }
            }
        }
    }
}

fn every_epilogue_of_every_version<P: Precision>(cuda: &Cuda<P>) {
    for layout in LAYOUTS {
        let case = Case::new(cuda, GemmShape { layout, m: 8, n: 72, k: 136 }, 0);
        for addends in 0..16 {
            case.check::<half::bf16>(cuda, addends, false);
        }
    }
}

/// A row that is not finite does not leak into others, not even through what fills tiles up.
fn what_is_not_finite_stays_in_its_row<P: Precision>(cuda: &Cuda<P>) {
    let (m, n, k) = (8, 48, 72);
    for layout in LAYOUTS {
        let shape = GemmShape { layout, m, n, k };
        for broken in [f64::NAN, f64::INFINITY] {
            let (mut a, b) = (normals(1, m * k), put::<_, half::bf16>(cuda, &normals(2, n * k)));
            a[if layout == GemmLayout::Nt { 3 * m + 7 } else { 7 * k + 3 }] = broken;
            let a = put::<_, half::bf16>(cuda, &a);
            for version in GemmVersion::ALL {
                if !version.supports(shape, GemmSupport { aligned: true, hopper: cuda.capability() == (9, 0) }) {
                    continue;
                }
                let mut c = put::<_, half::bf16>(cuda, &vec![0.0; m * n]);
                let (a, b, plan) = (a.device.view(), b.device.view(), GemmPlan { version, splits: 1 });
                with_plan(plan, || cuda.gemm(a, b, c.device.view_mut(), shape, Epilogue::default())).unwrap();
                for (i, row) in get(cuda, &c.device).chunks(n).enumerate() {
                    assert!(row.iter().all(|x| x.is_finite() == (i != 7)), "{layout:?}, {version:?}, row {i}");
                }
            }
        }
    }
}

/// More tiles than any GPU has multiprocessors: a block's rings go round, and what is to be added comes for the next
/// tile while one is stored. Sums of few small integers, which every way of adding gives exactly.
fn blocks_take_several_tiles<P: Precision>(cuda: &Cuda<P>) {
    let (m, n, k) = (128 * (2 * 132 + 5) - 40, 8, 8);
    let integers =
        |seed: usize, len: usize| -> Vec<f64> { (0..len).map(|i| ((i * seed + i / 7) % 5) as f64 - 2.0).collect() };
    let bf16s = |seed, len| put::<_, half::bf16>(cuda, &integers(seed, len));
    let (a, b, bias, residual, before) =
        (bf16s(3, m * k), bf16s(2, n * k), bf16s(1, n), bf16s(4, m * n), integers(6, m * n));
    for (layout, with_bias, with_residual, accumulate, splits) in [
        (GemmLayout::Tn, false, false, false, 1),
        (GemmLayout::Tn, true, true, false, 1),
        (GemmLayout::Tn, false, true, true, 1),
        (GemmLayout::Nn, true, false, true, 1),
        (GemmLayout::Nn, false, false, false, 2),
        (GemmLayout::Nt, false, false, true, 1),
    ] {
        let shape = GemmShape { layout, m, n, k };
        let strides_a = if layout == GemmLayout::Nt { (1, m) } else { (k, 1) };
        let strides_b = if layout == GemmLayout::Tn { (1, k) } else { (n, 1) };
        let mut exact = product(&a.host, strides_a, &b.host, strides_b, (m, n, k));
        for (i, x) in exact.iter_mut().enumerate() {
            *x += if with_bias { bias.host[i % n] } else { 0.0 } + if with_residual { residual.host[i] } else { 0.0 };
            *x += if accumulate { before[i] } else { 0.0 };
        }
        for version in [GemmVersion::Wgmma128, GemmVersion::Wgmma256] {
            if !version.supports(shape, GemmSupport { aligned: true, hopper: cuda.capability() == (9, 0) }) {
                continue;
            }
            let epilogue = || Epilogue {
                alpha: 1.0,
                bias: with_bias.then(|| bias.device.view()),
                residual: with_residual.then(|| residual.device.view()),
                accumulate,
            };
            let (plan, what) = (GemmPlan { version, splits }, format!("{layout:?}, {version:?}"));
            let mut c = put::<_, half::bf16>(cuda, &before);
            let operands = (a.device.view(), b.device.view());
            with_plan(plan, || cuda.gemm(operands.0, operands.1, c.device.view_mut(), shape, epilogue())).unwrap();
            assert!(get(cuda, &c.device) == exact, "{what}");
            if layout == GemmLayout::Nt {
                let mut c = put::<_, f32>(cuda, &before);
                let operands = (a.device.view(), b.device.view());
                with_plan(plan, || cuda.gemm(operands.0, operands.1, c.device.view_mut(), shape, epilogue())).unwrap();
                assert!(get(cuda, &c.device) == exact, "{what} into f32");
            }
        }
    }
}

/// Decoding gives a token the same bits in any company, and so does a second run.
fn a_token_is_decoded_alike_in_any_batch<P: Precision>(cuda: &Cuda<P>) {
    let (n, k) = (70, 1032);
    let x = put::<_, half::bf16>(cuda, &normals(1, 8 * k));
    let w = put::<_, half::bf16>(cuda, &normals(2, n * k));
    let decode = |tokens: std::ops::Range<usize>| {
        let (mut y, m) = (put::<_, half::bf16>(cuda, &vec![0.0; tokens.len() * n]), tokens.len());
        let (x, shape) =
            (x.device.range(tokens.start * k..tokens.end * k), GemmShape { layout: GemmLayout::Tn, m, n, k });
        let plan = cuda.gemm(x, w.device.view(), y.device.view_mut(), shape, Epilogue::default()).unwrap();
        assert_eq!(plan.version, GemmVersion::Decode);
        read(cuda, &y.device)
    };
    let all = decode(0..8);
    assert_eq!(all, decode(0..8));
    for tokens in [0..1, 7..8, 2..4, 3..6, 1..8] {
        assert_eq!(decode(tokens.clone()), all[tokens.start * n..tokens.end * n], "{tokens:?}");
    }
}

/// Runs the named functions, each of which takes a GPU, on every device of the stand-in.
macro_rules! on_every_gpu {
    ($($name:ident),* $(,)?) => {
        on_every_gpu!(gpu_0 0 F32State: $($name),*);
        on_every_gpu!(gpu_1 1 Bf16State: $($name),*);
        on_every_gpu!(gpu_2 2 Bf16State: $($name),*);
        on_every_gpu!(gpu_3 3 F32State: $($name),*);
    };
    ($module:ident $ordinal:literal $state:ident: $($name:ident),*) => {
        mod $module {
            $(#[test] fn $name() {
                crate::standin::open::<super::$state>($ordinal).iter().for_each(super::$name);
            })*
        }
    };
}
use on_every_gpu;

on_every_gpu!(
    every_version_is_as_exact_as_tensor_cores,
    every_epilogue_of_every_version,
    what_is_not_finite_stays_in_its_row,
    blocks_take_several_tiles,
    a_token_is_decoded_alike_in_any_batch
);

on_every_backend!(
    linear_with_every_epilogue,
    backward_of_input_and_weight,
    bias_gradient_sums_columns,
    writes_only_its_view
);
