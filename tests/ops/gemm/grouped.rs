//! Layers of one X: q, k and v; gate and up.

use super::*;

/// (tokens, inputs) of layers with these outputs: sizes that go in one launch, and sizes that no launch takes together.
const GROUPS: [(usize, usize, [usize; 3]); 6] = [
    (1, 577, [1, 65, 130]),
    (3, 64, [24, 8, 136]),
    (8, 40, [1, 65, 130]),
    (9, 65, [16, 8, 8]),
    (70, 96, [136, 8, 72]),
    (70, 96, [136, 4, 72]),
];

fn forward<B: Backend>(b: &B) {
    for (tokens, inputs, outputs) in GROUPS {
        let x = put::<B, B::Float>(b, &normals(1, tokens * inputs));
        let w = outputs.map(|n| put::<B, B::Float>(b, &normals(n as u64, n * inputs)));
        let bias = put::<B, B::Float>(b, &normals(2, outputs[1]));
        let mut y = outputs.map(|n| put::<B, B::Float>(b, &normals(3, tokens * n)));
        for layers in [1, 2, 3] {
            let each = w.iter().zip(&mut y).enumerate().take(layers);
            let each = each.map(|(i, (w, y))| {
                let bias = (i == 1).then(|| bias.device.view());
                Projection { w: w.device.view(), bias, y: y.device.view_mut() }
            });
            LinearEach { x: x.device.view(), layers: &mut each.collect::<Vec<_>>(), tokens }.run(b).unwrap();
            for (i, n) in outputs.into_iter().enumerate().take(layers) {
                let mut exact = product(&x.host, (inputs, 1), &w[i].host, (1, inputs), (tokens, n, inputs));
                if i == 1 {
                    exact.iter_mut().enumerate().for_each(|(at, y)| *y += bias.host[at % n]);
                }
                let what = format!("{tokens} × {inputs}, {layers} of {outputs:?}, layer {i}");
                assert_close::<B>(&get(b, &y[i].device), &exact, error(inputs), &what);
            }
        }
    }
}

fn backward<B: Backend>(b: &B) {
    for (tokens, inputs, outputs) in GROUPS {
        let x = put::<B, B::Float>(b, &normals(1, tokens * inputs));
        let w = outputs.map(|n| put::<B, B::Float>(b, &normals(n as u64, n * inputs)));
        let dy = outputs.map(|n| put::<B, B::Float>(b, &normals(1000 + n as u64, tokens * n)));
        for (layers, accumulate) in [(1, true), (2, false), (3, true), (3, false)] {
            let what = format!("{tokens} × {inputs}, {layers} of {outputs:?}, accumulate {accumulate}");
            let mut dx = put::<B, B::Float>(b, &normals(6, tokens * inputs));
            let mut exact = if accumulate { dx.host.clone() } else { vec![0.0; tokens * inputs] };
            for ((w, dy), n) in w.iter().zip(&dy).zip(outputs).take(layers) {
                let term = product(&dy.host, (n, 1), &w.host, (inputs, 1), (tokens, inputs, n));
                exact.iter_mut().zip(term).for_each(|(sum, term)| *sum += term);
            }
            let each = w.iter().zip(&dy).take(layers);
            let each: Vec<_> = each.map(|(w, dy)| InputGradient { dy: dy.device.view(), w: w.device.view() }).collect();
            LinearBackwardInputEach { layers: &each, dx: dx.device.view_mut(), tokens, accumulate }.run(b).unwrap();
            let terms = outputs.iter().take(layers).sum();
            assert_close::<B>(&get(b, &dx.device), &exact, error(terms), &format!("dx of {what}"));

            let mut dw = outputs.map(|n| put::<B, B::Grad>(b, &normals(7, n * inputs)));
            let each = dy.iter().zip(&mut dw).take(layers);
            let each = each.map(|(dy, dw)| WeightGradient { dy: dy.device.view(), dw: dw.device.view_mut() });
            let each = &mut each.collect::<Vec<_>>();
            LinearBackwardWeightEach { x: x.device.view(), layers: each, tokens, accumulate }.run(b).unwrap();
            for (i, (n, dw)) in outputs.into_iter().zip(&dw).enumerate() {
                let dytx = product(&dy[i].host, (1, n), &x.host, (inputs, 1), (n, inputs, tokens));
                let exact = scaled(accumulate.then_some(&dw.host), 1.0, &dytx);
                let exact = if i < layers { exact } else { dw.host.clone() };
                assert_close::<B>(&get(b, &dw.device), &exact, error(tokens), &format!("dw {i} of {what}"));
            }
        }
    }
}

/// The largest distance of two rows of numbers.
fn far(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max)
}

/// At most twice as far from the exact results as f32 sums in order that are rounded once.
#[track_caller]
pub(super) fn assert_as_f32_sums<T: FloatElement>(got: &[f64], exact: &[f64], sums: &[f32], terms: usize, what: &str) {
    let emulated: Vec<f64> = sums.iter().map(|sum| T::from_f32(*sum).to_f32() as f64).collect();
    let (error, allowed) = (far(got, exact), 2.0 * far(&emulated, exact) + 1e-6 * (terms as f64).sqrt());
    assert!(error <= allowed, "{what}: {error} > {allowed}");
}

/// The plans that a group of these shapes can have in one launch.
fn plans<P: Precision>(cuda: &Cuda<P>, shapes: &[GemmShape]) -> impl Iterator<Item = GemmPlan> {
    let decode = shapes[0].layout == GemmLayout::Tn && shapes[0].m <= 8;
    let hopper = cuda.capability() == (9, 0);
    let tiles = GemmVersion::ALL[2..6].iter().copied();
    let tiles: Vec<_> = tiles
        .filter(|version| shapes.iter().all(|shape| version.supports(*shape, GemmSupport { aligned: true, hopper })))
        .flat_map(|version| [(version, 1), (version, 3)])
        .collect();
    let tiles = tiles.into_iter();
    let slices = [1, 2, 4, 8].map(|slices| (GemmVersion::Decode, slices)).into_iter().filter(move |_| decode);
    tiles.chain(slices).map(|(version, splits)| GemmPlan { version, splits })
}

/// Results behind the tensors of a group are left alone.
const BEHIND: usize = 3;

/// One of several layers: its weight and Y, or its dY and dW.
struct Layer<'a, P: Precision, T: FloatElement> {
    own: In<'a, Cuda<P>>,
    bias: Option<In<'a, Cuda<P>>>,
    c: ViewMut<'a, Cuda<P>, T>,
}

/// An operator on layers of one X of so many tokens; whether it adds to what C holds.
type Each<P, T> = fn(&Cuda<P>, In<'_, Cuda<P>>, Vec<Layer<'_, P, T>>, usize, bool);

fn forward_each<P: Precision>(
    cuda: &Cuda<P>,
    x: In<'_, Cuda<P>>,
    layers: Vec<Layer<'_, P, half::bf16>>,
    tokens: usize,
    accumulate: bool,
) {
    assert!(!accumulate);
    let mut layers: Vec<_> =
        layers.into_iter().map(|Layer { own, bias, c }| Projection { w: own, bias, y: c }).collect();
    LinearEach { x, layers: &mut layers, tokens }.run(cuda).unwrap();
}

fn weight_each<P: Precision>(
    cuda: &Cuda<P>,
    x: In<'_, Cuda<P>>,
    layers: Vec<Layer<'_, P, P::Grad>>,
    tokens: usize,
    accumulate: bool,
) {
    let mut layers: Vec<_> = layers.into_iter().map(|Layer { own, c, .. }| WeightGradient { dy: own, dw: c }).collect();
    LinearBackwardWeightEach { x, layers: &mut layers, tokens, accumulate }.run(cuda).unwrap();
}

/// Products side by side, into C's that only single elements of can be accessed in turn.
fn side_by_side<P: Precision, T: FloatElement>(
    cuda: &Cuda<P>,
    layout: GemmLayout,
    rows: usize,
    k: usize,
    run: Each<P, T>,
) {
    for widths in [&[136, 8, 72][..], &[40, 200]] {
        let shapes: Vec<GemmShape> = widths
            .iter()
            .map(|width| match layout {
                GemmLayout::Tn => GemmShape { layout, m: rows, n: *width, k },
                _ => GemmShape { layout, m: *width, n: rows, k },
            })
            .collect();
        let shared = put::<_, half::bf16>(cuda, &normals(1, rows * k));
        let own: Vec<_> =
            widths.iter().map(|width| put::<_, half::bf16>(cuda, &normals(*width as u64, width * k))).collect();
        let biases: Vec<_> = shapes.iter().map(|shape| put::<_, half::bf16>(cuda, &normals(4, shape.n))).collect();
        for (case, plan) in plans(cuda, &shapes).enumerate() {
            // Hopper's kernels store by copies of whole 16 bytes.
            let copies = matches!(plan.version, GemmVersion::Wgmma128 | GemmVersion::Wgmma256);
            let shift = if copies { 0 } else { case % 2 };
            let accumulate = layout == GemmLayout::Nt && case % 3 > 0;
            let before: Vec<_> = shapes
                .iter()
                .map(|GemmShape { m, n, .. }| put::<_, T>(cuda, &normals(5, shift + m * n + BEHIND)).host)
                .collect();
            let mut c: Vec<_> = before.iter().map(|before| put::<_, T>(cuda, before)).collect();
            let operands = |i: usize| match layout {
                GemmLayout::Tn => (&shared, &own[i]),
                _ => (&own[i], &shared),
            };
            let with_bias = |i: usize| layout == GemmLayout::Tn && i != 1;
            let layers = c.iter_mut().enumerate().map(|(i, c)| Layer {
                own: own[i].device.view(),
                bias: with_bias(i).then(|| biases[i].device.view()),
                c: c.device.range_mut(shift..shift + shapes[i].m * shapes[i].n),
            });
            let (layers, tokens) = (layers.collect(), if layout == GemmLayout::Tn { rows } else { k });
            with_plan(plan, || run(cuda, shared.device.view(), layers, tokens, accumulate));
            for (i, GemmShape { m, n, .. }) in shapes.iter().copied().enumerate() {
                let (a, b) = (&operands(i).0.host, &operands(i).1.host);
                let (sa, sb) = if layout == GemmLayout::Tn { ((k, 1), (1, k)) } else { ((1, m), (n, 1)) };
                let addend = |at: usize| {
                    let bias = if with_bias(i) { biases[i].host[at % n] } else { 0.0 };
                    bias + if accumulate { before[i][shift + at] } else { 0.0 }
                };
                let mut exact = product(a, sa, b, sb, (m, n, k));
                exact.iter_mut().enumerate().for_each(|(at, x)| *x += addend(at));
                let term = |c: usize, l: usize| a[c / n * sa.0 + l * sa.1] as f32 * b[l * sb.0 + c % n * sb.1] as f32;
                let sum = |c: usize| (0..k).fold(0.0, |sum, l| sum + term(c, l)) + addend(c) as f32;
                let sums: Vec<f32> = (0..m * n).map(sum).collect();
                let (after, what) = (get(cuda, &c[i].device), format!("{plan:?}, {:?}", shapes[i]));
                assert_as_f32_sums::<T>(&after[shift..shift + m * n], &exact, &sums, k, &what);
                let outside = |x: &[f64]| [x[..shift].to_vec(), x[shift + m * n..].to_vec()];
                assert_eq!(outside(&after), outside(&before[i]), "{what}");
            }
        }
    }
}

fn every_version_of_a_group<P: Precision>(cuda: &Cuda<P>) {
    for rows in [1, 2, 4, 7, 67] {
        side_by_side(cuda, GemmLayout::Tn, rows, 264, forward_each);
    }
    side_by_side(cuda, GemmLayout::Nt, 72, 203, weight_each);
    side_by_side(cuda, GemmLayout::Nt, 136, 77, weight_each);
}

/// Terms of which each is a hundred times their sum: what is rounded in between is not in the result.
fn a_sum_is_rounded_once<P: Precision>(cuda: &Cuda<P>) {
    let (m, n) = (67, 136);
    for depths in [&[136, 8, 136][..], &[72, 72], &[200, 0, 200]] {
        let first = depths[0];
        let a = put::<_, half::bf16>(cuda, &normals(1, m * first)).host;
        let b: Vec<f64> = normals(2, first * n).iter().map(|x| 100.0 * x).collect();
        let near: Vec<f64> = a.iter().zip(normals(3, m * first)).map(|(a, x)| -a * (1.0 + 0.01 * x)).collect();
        let others = |depth: usize, rows: usize| normals(depth as u64, depth * rows);
        let last = depths.len() - 1;
        let terms: Vec<_> = (0..=last)
            .map(|i| {
                let a = if i == 0 {
                    a.clone()
                } else if i == last {
                    near.clone()
                } else {
                    others(depths[i], m)
                };
                let b = if i == 0 || i == last { b.clone() } else { others(depths[i], n) };
                (put::<_, half::bf16>(cuda, &a), put::<_, half::bf16>(cuda, &b), depths[i])
            })
            .collect();
        let term = |c: usize, i: usize, l: usize| {
            let (a, b, k) = &terms[i];
            (a.host[c / n * k + l], b.host[l * n + c % n])
        };
        let places = || (0..=last).flat_map(|i| (0..depths[i]).map(move |l| (i, l)));
        for accumulate in [false, true] {
            let before = put::<_, half::bf16>(cuda, &normals(4, m * n + BEHIND)).host;
            let addend = |c: usize| if accumulate { before[c] } else { 0.0 };
            let exact: Vec<f64> = (0..m * n)
                .map(|c| places().map(|(i, l)| term(c, i, l)).map(|(a, b)| a * b).sum::<f64>() + addend(c))
                .collect();
            let sums: Vec<f32> = (0..m * n)
                .map(|c| {
                    let sum = places().map(|(i, l)| term(c, i, l)).fold(0.0, |sum, (a, b)| sum + a as f32 * b as f32);
                    sum + addend(c) as f32
                })
                .collect();
            let shapes: Vec<_> = depths.iter().map(|k| GemmShape { layout: GemmLayout::Nn, m, n, k: *k }).collect();
            for plan in plans(cuda, &shapes) {
                let mut c = put::<_, half::bf16>(cuda, &before);
                let layers = terms.iter().map(|(a, b, _)| InputGradient { dy: a.device.view(), w: b.device.view() });
                let (layers, dx) = (&layers.collect::<Vec<_>>()[..], c.device.range_mut(0..m * n));
                let sum = LinearBackwardInputEach { layers, dx, tokens: m, accumulate };
                with_plan(plan, || sum.run(cuda)).unwrap();
                let (after, what) = (get(cuda, &c.device), format!("{plan:?}, {depths:?}, accumulate {accumulate}"));
                assert_as_f32_sums::<half::bf16>(&after[..m * n], &exact, &sums, places().count(), &what);
                assert_eq!(after[m * n..], before[m * n..], "{what}");
            }
        }
    }
}

/// What goes in one launch: kernels by the versions that they are chosen from, and widths of whole 16 bytes.
fn one_launch_where_there_is_a_kernel<P: Precision>(cuda: &Cuda<P>) {
    let launch = |m: usize, widths: [usize; 2], offset: usize| {
        let k = 64;
        let x = put::<_, half::bf16>(cuda, &normals(1, m * k));
        let w = widths.map(|n| put::<_, half::bf16>(cuda, &normals(2, offset + n * k)));
        let mut y = widths.map(|n| put::<_, half::bf16>(cuda, &vec![0.0; m * n]));
        let layers = w.iter().zip(&mut y).zip(widths).map(|((w, y), n)| {
            let w = w.device.range(offset..offset + n * k);
            Projection { w, bias: None, y: y.device.view_mut() }
        });
        let recording = swat::backend::trace::record().expect("no recording runs on this thread");
        LinearEach { x: x.device.view(), layers: &mut layers.collect::<Vec<_>>(), tokens: m }.run(cuda).unwrap();
        cuda.synchronize().unwrap();
        let names: Vec<_> =
            recording.take().iter().map(|span| span.name).filter(|name| name.starts_with("gemm_")).collect();
        let [name] = names[..] else { return None };
        ["decode", "mma64", "wgmma128", "mma128"].into_iter().find(|version| name.contains(version))
    };
    let hopper = cuda.capability() == (9, 0);
    assert_eq!(launch(4, [72, 8], 0), Some("decode"));
    assert_eq!(launch(4, [72, 8], 1), None);
    assert_eq!(launch(200, [72, 8], 0), Some("mma64"));
    let large = if hopper { "wgmma128" } else { "mma128" };
    assert_eq!(launch(1000, [512, 72], 0), Some(large));
    assert_eq!(launch(1000, [512, 68], 0), if hopper { None } else { Some("mma128") });
    assert_eq!(launch(200, [72, 8], 1), None);
}

on_every_backend!(forward, backward);
on_every_gpu!(every_version_of_a_group, a_sum_is_rounded_once, one_launch_where_there_is_a_kernel);
