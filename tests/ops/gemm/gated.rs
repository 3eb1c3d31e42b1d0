//! Gate and up in one product that ends in SwiGLU.

use super::grouped::assert_as_f32_sums;
use super::*;

/// (tokens, inputs, outputs): tails of tiles in each extent, whole tiles, outputs that are not of whole 16 bytes.
const SIZES: [(usize, usize, usize); 5] = [(9, 72, 8), (67, 200, 67), (130, 72, 136), (128, 64, 128), (300, 40, 264)];

fn bits(values: Vec<half::bf16>) -> Vec<u16> {
    values.into_iter().map(half::bf16::to_bits).collect()
}

fn silu_times_up(gate: f64, up: f64) -> f64 {
    gate / (1.0 + (-gate).exp()) * up
}

/// [`GatedLinear`] by the kernel of a version.
fn gated<P: Precision>(
    cuda: &Cuda<P>,
    x: In<'_, Cuda<P>>,
    [gate, up]: [In<'_, Cuda<P>>; 2],
    y: Out<'_, Cuda<P>>,
    shape: GemmShape,
    version: GemmVersion,
) {
    let op = GatedLinear { x, gate, up, y, tokens: shape.m };
    assert!(with_plan(GemmPlan { version, splits: 1 }, || op.run(cuda)).unwrap());
}

/// The kernels of tiles, which [`GatedLinear`] takes for outputs of so many columns.
fn versions<P: Precision>(cuda: &Cuda<P>, shape: GemmShape) -> impl Iterator<Item = GemmVersion> {
    let copies = cuda.capability() == (9, 0) && shape.n.is_multiple_of(8);
    GemmVersion::ALL[2..6]
        .iter()
        .copied()
        .filter(move |version| version.supports(shape, GemmSupport { aligned: true, hopper: copies }))
}

/// The bits of gate and up side by side by the same version, then SwiGLU.
fn apart<P: Precision>(
    cuda: &Cuda<P>,
    x: &Buffer<Cuda<P>, half::bf16>,
    weights: [&Buffer<Cuda<P>, half::bf16>; 2],
    shape: GemmShape,
    version: GemmVersion,
) -> Vec<u16> {
    let mut sums = [0, 1].map(|_| cuda.zeros::<half::bf16>(shape.m * shape.n).unwrap());
    let layers = weights.iter().zip(&mut sums).map(|(w, y)| Projection { w: w.view(), bias: None, y: y.view_mut() });
    let layers = &mut layers.collect::<Vec<_>>();
    let each = LinearEach { x: x.view(), layers, tokens: shape.m };
    with_plan(GemmPlan { version, splits: 1 }, || each.run(cuda)).unwrap();
    let mut y = cuda.zeros::<half::bf16>(shape.m * shape.n).unwrap();
    SwiGlu { gate: sums[0].view(), up: sums[1].view(), y: y.view_mut() }.run(cuda).unwrap();
    bits(read(cuda, &y))
}

/// Into a Y of which only single elements can be accessed in turn, with numbers around it that stay.
fn every_epilogue_of_gate_and_up<P: Precision>(cuda: &Cuda<P>) {
    for (m, k, n) in SIZES {
        let shape = GemmShape { layout: GemmLayout::Tn, m, n, k };
        let x = put::<_, half::bf16>(cuda, &normals(1, m * k));
        let [gate, up] = [2, 3].map(|stream| {
            put::<_, half::bf16>(cuda, &normals(stream, n * k).iter().map(|w| w * 0.3).collect::<Vec<_>>())
        });
        let [exact_gate, exact_up] = [&gate, &up].map(|w| product(&x.host, (k, 1), &w.host, (1, k), (m, n, k)));
        let exact: Vec<f64> = exact_gate.iter().zip(&exact_up).map(|(g, u)| silu_times_up(*g, *u)).collect();
        let sums = (0..m * n).map(|c| {
            let [gate, up] = [&gate, &up].map(|w| {
                let sum = (0..k).fold(0.0, |sum, l| sum + x.host[c / n * k + l] as f32 * w.host[c % n * k + l] as f32);
                half::bf16::from_f32(sum).to_f64()
            });
            silu_times_up(gate, up) as f32
        });
        let sums: Vec<f32> = sums.collect();
        for (case, version) in versions(cuda, shape).enumerate() {
            let copies = matches!(version, GemmVersion::Wgmma128 | GemmVersion::Wgmma256);
            let shift = if copies { 0 } else { case % 2 };
            let before = put::<_, half::bf16>(cuda, &normals(5, shift + m * n + 3));
            let mut y = put::<_, half::bf16>(cuda, &before.host);
            let to = y.device.range_mut(shift..shift + m * n);
            let (x_view, gate_view, up_view) = (x.device.view(), gate.device.view(), up.device.view());
            gated(cuda, x_view, [gate_view, up_view], to, shape, version);
            let (after, what) = (get(cuda, &y.device), format!("{version:?} of {m} × {k} × {n}"));
            assert_as_f32_sums::<half::bf16>(&after[shift..shift + m * n], &exact, &sums, k, &what);
            let outside = |y: &[f64]| [y[..shift].to_vec(), y[shift + m * n..].to_vec()];
            assert_eq!(outside(&after), outside(&before.host), "{what}");
            let together = bits(read(cuda, &y.device)[shift..shift + m * n].to_vec());
            let apart = apart(cuda, &x.device, [&gate.device, &up.device], shape, version);
            assert!(together == apart, "{what}: other bits than gate and up in memory");
        }
    }
}

/// More tiles than any GPU has multiprocessors: a block's rings go round.
fn blocks_take_several_gated_tiles<P: Precision>(cuda: &Cuda<P>) {
    let (m, k, n) = (128 * (2 * 132 + 5) - 40, 72, 8);
    let shape = GemmShape { layout: GemmLayout::Tn, m, n, k };
    let [x, gate, up] = [(1, m), (2, n), (3, n)].map(|(stream, rows)| {
        put::<_, half::bf16>(cuda, &normals(stream, rows * k).iter().map(|x| x * 0.5).collect::<Vec<_>>()).device
    });
    for version in versions(cuda, shape).filter(|v| matches!(v, GemmVersion::Wgmma128 | GemmVersion::Wgmma256)) {
        let mut y = cuda.zeros::<half::bf16>(m * n).unwrap();
        gated(cuda, x.view(), [gate.view(), up.view()], y.view_mut(), shape, version);
        assert!(bits(read(cuda, &y)) == apart(cuda, &x, [&gate, &up], shape, version), "{version:?}");
    }
}

/// What a backend computes in one operation has the numbers of two; what it does not is left alone.
fn gated_or_left_alone<B: Backend>(b: &B) {
    for (tokens, inputs, outputs, offset) in [(200, 64, 72, 0), (1000, 64, 256, 0), (4, 64, 72, 0), (200, 64, 72, 1)] {
        let x = put::<B, B::Float>(b, &normals(1, tokens * inputs));
        let [gate, up] = [2, 3].map(|stream| put::<B, B::Float>(b, &normals(stream, offset + outputs * inputs)));
        let weights = || [&gate, &up].map(|w| w.device.range(offset..offset + outputs * inputs));
        let before = put::<B, B::Float>(b, &normals(4, tokens * outputs));
        let mut y = put::<B, B::Float>(b, &before.host);
        let [g, u] = weights();
        let done = GatedLinear { x: x.device.view(), gate: g, up: u, y: y.device.view_mut(), tokens }.run(b).unwrap();
        assert_eq!(done, b.name() != "cpu" && tokens > 8 && offset == 0, "{tokens} × {inputs} × {outputs}, {offset}");
        let mut expected = before;
        if done {
            let mut sums = [0, 1].map(|_| b.zeros::<B::Float>(tokens * outputs).unwrap());
            let each = weights().into_iter().zip(&mut sums);
            let each = each.map(|(w, y)| Projection { w, bias: None, y: y.view_mut() });
            LinearEach { x: x.device.view(), layers: &mut each.collect::<Vec<_>>(), tokens }.run(b).unwrap();
            SwiGlu { gate: sums[0].view(), up: sums[1].view(), y: expected.device.view_mut() }.run(b).unwrap();
        }
        assert!(get(b, &y.device) == get(b, &expected.device), "{tokens} × {inputs} × {outputs}, {offset}");
    }
}

/// Sums that are split, or that Hopper cannot store by copies, are left to the two products.
fn gated_as_the_two_would_be<P: Precision>(cuda: &Cuda<P>) {
    let done = |tokens: usize, inputs: usize, outputs: usize| {
        let x = put::<_, half::bf16>(cuda, &normals(1, tokens * inputs)).device;
        let [gate, up] = [2, 3].map(|s| put::<_, half::bf16>(cuda, &normals(s, outputs * inputs)).device);
        let mut y = cuda.zeros::<half::bf16>(tokens * outputs).unwrap();
        GatedLinear { x: x.view(), gate: gate.view(), up: up.view(), y: y.view_mut(), tokens }.run(cuda).unwrap()
    };
    assert!(!done(16, 4096, 8));
    assert!(done(1000, 64, 256));
    assert_eq!(done(1000, 64, 260), cuda.capability() != (9, 0));
}

on_every_backend!(gated_or_left_alone);
on_every_gpu!(every_epilogue_of_gate_and_up, blocks_take_several_gated_tiles, gated_as_the_two_would_be);
