//! SwiGLU.

use super::*;

fn silu_times_up(gate: &[f64], up: &[f64]) -> Vec<f64> {
    gate.iter().zip(up).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect()
}

pub(super) fn forward_and_backward<B: Backend>(b: &B) {
    for len in [1, 15, 64, 1000, 100_003] {
        let gates: Vec<f64> = normals(1, len).iter().map(|x| x * 4.0).collect();
        let (mut gate, mut up) = (put::<B, B::Float>(b, &gates), put::<B, B::Float>(b, &normals(2, len)));
        let dy = put::<B, B::Float>(b, &normals(3, len));
        let mut y = put::<B, B::Float>(b, &vec![f64::NAN; len]);
        SwiGlu { gate: gate.device.view(), up: up.device.view(), y: y.device.view_mut() }.run(b).unwrap();
        assert_close::<B>(&get(b, &y.device), &silu_times_up(&gate.host, &up.host), 1e-6, &format!("{len}"));
        SwiGluBackward { gate: gate.device.view_mut(), up: up.device.view_mut(), dy: dy.device.view() }.run(b).unwrap();
        let (dgate, dup) = (get(b, &gate.device), get(b, &up.device));
        assert_gradient::<B>(&dgate, |g| silu_times_up(g, &up.host), &gate.host, &dy.host, &format!("dgate of {len}"));
        assert_gradient::<B>(&dup, |u| silu_times_up(&gate.host, u), &up.host, &dy.host, &format!("dup of {len}"));
    }
}

fn far_gates_saturate<B: Backend>(b: &B) {
    let gate = put::<B, B::Float>(b, &[-1000.0, -100.0, 0.0, 100.0, 1000.0]);
    let up = put::<B, B::Float>(b, &[1.0; 5]);
    let mut y = put::<B, B::Float>(b, &[f64::NAN; 5]);
    SwiGlu { gate: gate.device.view(), up: up.device.view(), y: y.device.view_mut() }.run(b).unwrap();
    assert_close::<B>(&get(b, &y.device), &[0.0, 0.0, 0.0, 100.0, 1000.0], 1e-6, "far gates");
}

on_every_backend!(forward_and_backward, far_gates_saturate);
