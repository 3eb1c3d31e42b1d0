//! RMSNorm.

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
    for (rows, width) in SIZES {
        let x = put::<B, B::Float>(b, &normals(1, rows * width));
        let weight = put::<B, B::Float>(b, &normals(2, width));
        let (exact, exact_rstd) = norm(&x.host, &weight.host);
        let mut y = put::<B, B::Float>(b, &vec![f64::NAN; rows * width]);
        let mut rstd = put::<B, f32>(b, &vec![f64::NAN; rows]);
        let (xv, wv) = (x.device.view(), weight.device.view());
        let kept = Some(rstd.device.view_mut());
        b.rmsnorm(xv.clone(), wv.clone(), y.device.view_mut(), kept, width, EPS as f32).unwrap();
        let with_rstd = get(b, &y.device);
        assert_close::<B>(&with_rstd, &exact, 2e-6, &format!("{rows} × {width}"));
        assert_close::<B>(&get(b, &rstd.device), &exact_rstd, 2e-6, &format!("rstd of {rows} × {width}"));
        b.rmsnorm(xv, wv, y.device.view_mut(), None, width, EPS as f32).unwrap();
        assert_eq!(get(b, &y.device), with_rstd);
    }
}

pub(super) fn backward<B: Backend>(b: &B) {
    for (rows, width) in SIZES {
        let [x, dy] = [1, 3].map(|stream| put::<B, B::Float>(b, &normals(stream, rows * width)));
        let weight = put::<B, B::Float>(b, &normals(2, width));
        let rstd = put::<B, f32>(b, &norm(&x.host, &weight.host).1);
        for case in 0..16 {
            let [with_dx, with_dw, add_dx, add_dw] = [1, 2, 4, 8].map(|bit| case & bit != 0);
            let mut dx = put::<B, B::Float>(b, &normals(4, rows * width));
            let mut dw = put::<B, B::Grad>(b, &normals(5, width));
            b.rmsnorm_backward(
                dy.device.view(),
                x.device.view(),
                weight.device.view(),
                rstd.device.view(),
                with_dx.then(|| dx.device.view_mut()),
                with_dw.then(|| dw.device.view_mut()),
                width,
                add_dx,
                add_dw,
            )
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
    }
}

on_every_backend!(forward, backward);
