//! Linear layers.

use super::*;
use swat::backend::{Epilogue, LinearShape, Projection};

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
            b.linear(x.device.view(), w.device.view(), y.device.view_mut(), shape, epilogue).unwrap();
            assert_close::<B>(&get(b, &y.device), &exact, error(inputs), &format!("{shape:?}, case {case}"));
        }
    }
}

fn layers_of_the_same_input<B: Backend>(b: &B) {
    for (tokens, inputs) in [(1, 577), (3, 64), (8, 40), (9, 65), (70, 96)] {
        let x = put::<B, B::Float>(b, &normals(1, tokens * inputs));
        let outputs = [1usize, 65, 130];
        let w = outputs.map(|n| put::<B, B::Float>(b, &normals(n as u64, n * inputs)));
        let bias = put::<B, B::Float>(b, &normals(2, outputs[1]));
        let mut y = outputs.map(|n| put::<B, B::Float>(b, &normals(3, tokens * n)));
        let mut layers: Vec<Projection<'_, B>> = Vec::new();
        for (i, (w, y)) in w.iter().zip(&mut y).enumerate() {
            let bias = (i == 1).then(|| bias.device.view());
            layers.push(Projection { w: w.device.view(), bias, y: y.device.view_mut() });
        }
        b.linear_each(x.device.view(), &mut layers, tokens).unwrap();
        for (i, n) in outputs.into_iter().enumerate() {
            let mut exact = product(&x.host, (inputs, 1), &w[i].host, (1, inputs), (tokens, n, inputs));
            if i == 1 {
                exact.iter_mut().enumerate().for_each(|(at, y)| *y += bias.host[at % n]);
            }
            assert_close::<B>(&get(b, &y[i].device), &exact, error(inputs), &format!("{tokens} × {inputs}, layer {i}"));
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
            b.linear_backward_input(dyv.clone(), wv, dx.device.view_mut(), shape, alpha, accumulate).unwrap();
            b.linear_backward_weight(dyv, xv, dw.device.view_mut(), shape, alpha, accumulate).unwrap();
            assert_close::<B>(&get(b, &dx.device), &exact_dx, error(outputs), &format!("dx of {shape:?}"));
            assert_close::<B>(&get(b, &dw.device), &exact_dw, error(tokens), &format!("dw of {shape:?}"));
        }
    }
}

fn bias_gradient_sums_columns<B: Backend>(b: &B) {
    for (tokens, outputs) in [(1, 1), (3, 17), (300, 33), (129, 64)] {
        let dy = put::<B, B::Float>(b, &normals(1, tokens * outputs));
        for accumulate in [false, true] {
            let mut dbias = put::<B, B::Grad>(b, &normals(2, outputs));
            let exact: Vec<f64> = (0..outputs)
                .map(|o| {
                    let base = if accumulate { dbias.host[o] } else { 0.0 };
                    base + (0..tokens).map(|t| dy.host[t * outputs + o]).sum::<f64>()
                })
                .collect();
            b.linear_backward_bias(dy.device.view(), dbias.device.view_mut(), tokens, outputs, accumulate).unwrap();
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
    b.linear(x.device.view(), w.device.view(), to, LinearShape { tokens, inputs, outputs }, Epilogue::default())
        .unwrap();
    let y = get(b, &y.device);
    assert!(y[..4].iter().chain(&y[4 + tokens * outputs..]).all(|y| *y == 7.0));
}

on_every_backend!(
    linear_with_every_epilogue,
    layers_of_the_same_input,
    backward_of_input_and_weight,
    bias_gradient_sums_columns,
    writes_only_its_view
);
