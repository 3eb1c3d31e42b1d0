//! RMSNorm.

use super::part::assert_no_worse;
use super::*;

const EPS: f64 = 1e-5;
/// (rows, width)
const SIZES: [(usize, usize); 6] = [(1, 1), (3, 17), (5, 64), (70, 576), (2000, 33), (4, 1030)];

fn norm(x: &[f64], weight: &[f64]) -> (Vec<f64>, Vec<f64>) {
    let width = weight.len();
    let rstd = |row: &[f64]| 1.0 / (row.iter().map(|x| x * x).sum::<f64>() / width as f64 + EPS).sqrt();
    let rstds: Vec<f64> = x.chunks(width).map(rstd).collect();
    (x.iter().enumerate().map(|(i, x)| x * rstds[i / width] * weight[i % width]).collect(), rstds)
}

pub(super) fn forward<B: Backend>(b: &B) {
    SIZES.into_iter().for_each(|(rows, width)| forward_of(b, rows, width));
}

fn forward_of<B: Backend>(b: &B, rows: usize, width: usize) {
    let x = put::<B, B::Float>(b, &normals(1, rows * width));
    let weight = put::<B, B::Float>(b, &normals(2, width));
    let (exact, exact_rstd) = norm(&x.host, &weight.host);
    let mut y = put::<B, B::Float>(b, &vec![f64::NAN; rows * width]);
    let mut rstd = put::<B, f32>(b, &vec![f64::NAN; rows]);
    let (xv, wv) = (x.device.view(), weight.device.view());
    let kept = Some(rstd.device.view_mut());
    RmsNorm { x: xv.clone(), weight: wv.clone(), y: y.device.view_mut(), rstd: kept, eps: EPS as f32 }.run(b).unwrap();
    let with_rstd = get(b, &y.device);
    assert_close::<B>(&with_rstd, &exact, 2e-6, &format!("{rows} × {width}"));
    assert_close::<B>(&get(b, &rstd.device), &exact_rstd, 2e-6, &format!("rstd of {rows} × {width}"));
    RmsNorm { x: xv, weight: wv, y: y.device.view_mut(), rstd: None, eps: EPS as f32 }.run(b).unwrap();
    assert_eq!(get(b, &y.device), with_rstd);
}

pub(super) fn backward<B: Backend>(b: &B) {
    SIZES.into_iter().for_each(|(rows, width)| (0..16).for_each(|case| backward_of(b, rows, width, case)));
}

/// Bits of `case`: dx, dweight, dx added to, dweight added to.
fn backward_of<B: Backend>(b: &B, rows: usize, width: usize, case: u32) {
    let [x, dy] = [1, 3].map(|stream| put::<B, B::Float>(b, &normals(stream, rows * width)));
    let weight = put::<B, B::Float>(b, &normals(2, width));
    let rstd = put::<B, f32>(b, &norm(&x.host, &weight.host).1);
    let [with_dx, with_dw, add_dx, add_dw] = [1, 2, 4, 8].map(|bit| case & bit != 0);
    let mut dx = put::<B, B::Float>(b, &normals(4, rows * width));
    let mut dw = put::<B, B::Grad>(b, &normals(5, width));
    RmsNormBackward {
        dy: dy.device.view(),
        x: x.device.view(),
        weight: weight.device.view(),
        rstd: rstd.device.view(),
        dx: with_dx.then(|| dx.device.view_mut()),
        dweight: with_dw.then(|| dw.device.view_mut()),
        accumulate_dx: add_dx,
        accumulate_dweight: add_dw,
    }
    .run(b)
    .unwrap();
    let what = format!("{rows} × {width}, case {case}");
    let minus = |got: Vec<f64>, base: &[f64], add: bool| -> Vec<f64> {
        got.iter().zip(base).map(|(g, b)| if add { g - b } else { *g }).collect()
    };
    let (got_dx, got_dw) = (get(b, &dx.device), get(b, &dw.device));
    if with_dx {
        let got = minus(got_dx, &dx.host, add_dx);
        assert_gradient::<B>(&got, |x| norm(x, &weight.host).0, &x.host, &dy.host, &what);
    } else {
        assert_eq!(got_dx, dx.host, "{what}");
    }
    if with_dw {
        let got = minus(got_dw, &dw.host, add_dw);
        assert_gradient::<B>(&got, |w| norm(&x.host, w).0, &weight.host, &dy.host, &what);
    } else {
        assert_eq!(got_dw, dw.host, "{what}");
    }
}

fn rounded<T: FloatElement>(x: &[f64]) -> Vec<f64> {
    x.iter().map(|x| T::from_f32(*x as f32).to_f32() as f64).collect()
}

/// Every element of dx and dweight against the exact one: no worse than twice its rounding.
fn whole_backward<B: Backend>(b: &B, rows: usize, width: usize) {
    let [x, dy] = [1, 3].map(|stream| put::<B, B::Float>(b, &normals(stream, rows * width)));
    let weight = put::<B, B::Float>(b, &normals(2, width));
    let rstd = put::<B, f32>(b, &norm(&x.host, &weight.host).1);
    let mut dx = put::<B, B::Float>(b, &vec![f64::NAN; rows * width]);
    let mut dw = put::<B, B::Grad>(b, &vec![f64::NAN; width]);
    let (dxv, dwv) = (Some(dx.device.view_mut()), Some(dw.device.view_mut()));
    let (dyv, xv, wv) = (dy.device.view(), x.device.view(), weight.device.view());
    RmsNormBackward {
        dy: dyv,
        x: xv,
        weight: wv,
        rstd: rstd.device.view(),
        dx: dxv,
        dweight: dwv,
        accumulate_dx: false,
        accumulate_dweight: false,
    }
    .run(b)
    .unwrap();
    let (mut exact_dx, mut exact_dw) = (Vec::new(), vec![0.0; width]);
    for ((x, dy), r) in x.host.chunks(width).zip(dy.host.chunks(width)).zip(&rstd.host) {
        let scaled: Vec<f64> = dy.iter().zip(&weight.host).map(|(dy, w)| dy * w).collect();
        let mean = scaled.iter().zip(x).map(|(s, x)| s * x).sum::<f64>() / width as f64;
        exact_dx.extend(scaled.iter().zip(x).map(|(s, x)| r * (s - x * r * r * mean)));
        exact_dw.iter_mut().zip(x.iter().zip(dy)).for_each(|(sum, (x, dy))| *sum += dy * x * r);
    }
    let what = |name| format!("{name} of {rows} × {width}");
    assert_no_worse(&get(b, &dx.device), &rounded::<B::Float>(&exact_dx), &exact_dx, 1e-6, &what("dx"));
    assert_no_worse(&get(b, &dw.device), &rounded::<B::Grad>(&exact_dw), &exact_dw, 1e-6, &what("dweight"));
}

/// Hidden sizes of models, and one beyond the widest kernel.
fn wide_rows<B: Backend>(b: &B) {
    for (rows, width) in [(3, 1536), (3, 3584), (2, 8192), (2, 8200)] {
        forward_of(b, rows, width);
        whole_backward(b, rows, width);
    }
}

/// More rows than parts: a part has several.
pub(super) fn many_rows<B: Backend>(b: &B) {
    whole_backward(b, 1100, 64);
}

on_every_backend!(forward, backward, wide_rows, many_rows);
