//! Masked AdamW and the sums of squares.

use super::*;
use swat::backend::{AdamW, AdamWModule, Rounding};

const HYPER: AdamW =
    AdamW { beta1: 0.9, beta2: 0.999, eps: 1e-8, step: 1, max_grad_norm: None, seed: 0, rounding: Rounding::Nearest };

struct Module<B: Backend> {
    weight: Tensor<B, B::Float>,
    grad: Tensor<B, B::Grad>,
    m: Tensor<B, B::Moment>,
    v: Tensor<B, B::Moment>,
    lr: f32,
    weight_decay: f32,
}

fn modules<B: Backend>(b: &B) -> Vec<Module<B>> {
    let sizes = [(1, 1e-3, 0.0), (100, 2e-3, 0.1), (70_001, 1e-4, 0.01)];
    let module = |(i, (len, lr, weight_decay)): (usize, (usize, f32, f32))| Module {
        weight: put(b, &normals(10 + i as u64, len)),
        grad: put(b, &normals(20 + i as u64, len)),
        m: put(b, &normals(30 + i as u64, len)),
        v: put(b, &normals(40 + i as u64, len).iter().map(|x| x * x).collect::<Vec<_>>()),
        lr,
        weight_decay,
    };
    sizes.into_iter().enumerate().map(module).collect()
}

fn step<B: Backend>(b: &B, modules: &mut [Module<B>], hyper: AdamW) -> Vec<f64> {
    let mut squares = put::<B, f32>(b, &vec![0.0; modules.len()]);
    let parts: Vec<_> = modules.iter().map(|m| m.grad.device.view()).collect();
    b.sum_squares(&parts, squares.device.view_mut()).unwrap();
    let row = |m: &mut Module<B>| (m.lr, m.weight_decay);
    let mut table: Vec<_> = modules
        .iter_mut()
        .map(|module| {
            let (lr, weight_decay) = row(module);
            AdamWModule {
                weight: module.weight.device.view_mut(),
                grad: module.grad.device.view(),
                m: module.m.device.view_mut(),
                v: module.v.device.view_mut(),
                lr,
                weight_decay,
            }
        })
        .collect();
    b.adamw_masked(&mut table, squares.device.view(), hyper).unwrap();
    get(b, &squares.device)
}

fn steps_as_written<B: Backend>(b: &B) {
    for (step_number, max_grad_norm) in [(1, None), (7, Some(1.0)), (7, Some(1e9)), (1000, Some(0.5))] {
        let hyper = AdamW { step: step_number, max_grad_norm, ..HYPER };
        let mut modules = modules(b);
        let exact_squares: Vec<f64> = modules.iter().map(|m| m.grad.host.iter().map(|g| g * g).sum()).collect();
        let norm = exact_squares.iter().sum::<f64>().sqrt();
        let clip = max_grad_norm.map_or(1.0, |most| (most as f64 / (norm + 1e-6)).min(1.0));
        let squares = step(b, &mut modules, hyper);
        assert_close::<B>(&squares, &exact_squares, 1e-6, "squares");
        for (i, module) in modules.iter().enumerate() {
            let (b1, b2) = (HYPER.beta1 as f64, HYPER.beta2 as f64);
            let correction = |beta: f64| 1.0 - beta.powi(step_number as i32);
            let (lr, decay) = (module.lr as f64, module.weight_decay as f64);
            let (mut w, mut m, mut v) = (module.weight.host.clone(), module.m.host.clone(), module.v.host.clone());
            for e in 0..w.len() {
                let g = module.grad.host[e] * clip;
                w[e] *= 1.0 - lr * decay;
                m[e] = b1 * m[e] + (1.0 - b1) * g;
                v[e] = b2 * v[e] + (1.0 - b2) * g * g;
                let denominator = v[e].sqrt() / correction(b2).sqrt() + HYPER.eps as f64;
                w[e] -= lr / correction(b1) * m[e] / denominator;
            }
            let what = |name| format!("{name} of module {i}, step {step_number}");
            assert_close::<B>(&get(b, &module.m.device), &m, 1e-6, &what("m"));
            assert_close::<B>(&get(b, &module.v.device), &v, 1e-6, &what("v"));
            assert_close::<B>(&get(b, &module.weight.device), &w, 1e-6, &what("w"));
        }
    }
}

fn nothing_changes_where_a_gradient_is_not_finite<B: Backend>(b: &B) {
    for (broken, max_grad_norm) in [(f64::NAN, None), (f64::INFINITY, Some(1.0)), (f64::NEG_INFINITY, None)] {
        let mut modules = modules(b);
        let mut gradient = modules[1].grad.host.clone();
        gradient[17] = broken;
        modules[1].grad = put(b, &gradient);
        let squares = step(b, &mut modules, AdamW { max_grad_norm, ..HYPER });
        assert!(!squares[1].is_finite() && squares[0].is_finite() && squares[2].is_finite());
        for module in &modules {
            assert_eq!(get(b, &module.weight.device), module.weight.host);
            assert_eq!(get(b, &module.m.device), module.m.host);
            assert_eq!(get(b, &module.v.device), module.v.host);
        }
    }
}

fn rate_zero_keeps_the_weight<B: Backend>(b: &B) {
    let mut modules = modules(b);
    modules[1].lr = 0.0;
    step(b, &mut modules, HYPER);
    assert_eq!(get(b, &modules[1].weight.device), modules[1].weight.host);
    assert_ne!(get(b, &modules[2].weight.device), modules[2].weight.host);
}

/// A sum in which f32 accumulation would be far off.
fn sum_of_many_squares<B: Backend>(b: &B) {
    let len = 3_000_001;
    let part = put::<B, f32>(b, &vec![0.1; len]);
    let mut squares = put::<B, f32>(b, &[0.0]);
    b.sum_squares(&[part.device.view()], squares.device.view_mut()).unwrap();
    let exact = len as f64 * part.host[0] * part.host[0];
    let got = get(b, &squares.device)[0];
    assert!((got / exact - 1.0).abs() < 1e-7, "{got}, exact {exact}");
}

on_every_backend!(
    steps_as_written,
    nothing_changes_where_a_gradient_is_not_finite,
    rate_zero_keeps_the_weight,
    sum_of_many_squares
);
