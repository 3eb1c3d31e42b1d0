//! RMSNorm, forward and backward.

use super::common::{Device, Session, random};
use swat::backend::cost::NormGradients;
use swat::backend::cpu::Cpu;
use swat::backend::cuda::{Cuda, F32State};
use swat::backend::{Buffer, Cost, Operator, RmsNorm, RmsNormBackward, cost};

pub(crate) fn cpu(session: &mut Session, cpu: &Cpu) {
    rmsnorm(session, cpu, &[], &[]);
}

pub(crate) fn cuda(session: &mut Session, cuda: &Cuda<F32State>) {
    rmsnorm(session, cuda, &FORWARD, &BACKWARD);
}

/// A version of the kernels and the widest rows that it takes.
type Version = (&'static str, usize);
const FORWARD: [Version; 6] =
    [("baseline", usize::MAX), ("lanes", 256), ("warp", 1024), ("row2048", 2048), ("row4096", 4096), ("row8192", 8192)];
const BACKWARD: [Version; 6] = [
    ("baseline", usize::MAX),
    ("lanes", 256),
    ("row1024", 1024),
    ("row2048", 2048),
    ("row4096", 4096),
    ("row8192", 8192),
];

struct Tensors<D: Device> {
    x: Buffer<D, D::Float>,
    weight: Buffer<D, D::Float>,
    y: Buffer<D, D::Float>,
    rstd: Buffer<D, f32>,
    dx: Buffer<D, D::Float>,
    dweight: Buffer<D, D::Grad>,
}

fn rmsnorm<D: Device>(session: &mut Session, device: &D, forward: &[Version], backward: &[Version]) {
    let tokens = session.scale.tokens;
    let models = session.scale.models().map(|model| (model.name.as_str(), tokens, model.hidden));
    // The norm of the queries of Qwen3: rows of a head.
    for (name, rows, width) in models.chain([("q-norm", tokens * 16, 128)]) {
        let len = rows * width;
        let make = move |d: &D| Tensors {
            x: random(d, len),
            weight: random(d, width),
            y: random(d, len),
            rstd: random(d, rows),
            dx: random(d, len),
            dweight: random(d, width),
        };
        let fitting = |versions: &[Version]| -> Vec<&'static str> {
            versions.iter().filter(|(_, most)| width <= *most).map(|(version, _)| *version).collect()
        };
        let shape = format!("{name}/{rows}x{width}");
        let cost = cost::rmsnorm(len, width, size_of::<D::Float>()) + Cost::moved(rows * size_of::<f32>());
        let ladder = session.ladder(device, "forward", &shape, cost, make);
        let ladder = ladder.versions(&fitting(forward), move |d, t| {
            let (y, rstd) = (t.y.view_mut(), Some(t.rstd.view_mut()));
            RmsNorm { x: t.x.view(), weight: t.weight.view(), y, rstd, eps: 1e-5 }.run(d).expect("a working device");
        });
        ladder.copy().run();
        // Accumulates on the gradient of the residual path.
        let wanted = NormGradients { dx: Some(true), dweight: true };
        let cost = cost::rmsnorm_backward(len, width, wanted, size_of::<D::Float>());
        let ladder = session.ladder(device, "backward", &shape, cost, make);
        let ladder = ladder.versions(&fitting(backward), move |d, t| {
            let (dx, dweight) = (Some(t.dx.view_mut()), Some(t.dweight.view_mut()));
            let (dy, x, weight) = (t.y.view(), t.x.view(), t.weight.view());
            RmsNormBackward {
                dy,
                x,
                weight,
                rstd: t.rstd.view(),
                dx,
                dweight,
                accumulate_dx: true,
                accumulate_dweight: true,
            }
            .run(d)
            .expect("a working device");
        });
        ladder.copy().run();
    }
}
