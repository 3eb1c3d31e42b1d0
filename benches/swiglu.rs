//! SwiGLU, forward and backward.

use super::common::{Device, Session, random};
use swat::backend::cpu::Cpu;
use swat::backend::cuda::{Cuda, F32State};
use swat::backend::{Operator, SwiGlu, SwiGluBackward, cost};

pub(crate) fn cpu(session: &mut Session, cpu: &Cpu) {
    swiglu(session, cpu, &[]);
}

pub(crate) fn cuda(session: &mut Session, cuda: &Cuda<F32State>) {
    swiglu(session, cuda, &["baseline", "vec8"]);
}

fn swiglu<D: Device>(session: &mut Session, device: &D, versions: &[&'static str]) {
    let tokens = session.scale.tokens;
    for model in session.scale.models() {
        let len = tokens * model.ffn;
        let shape = format!("{}/{tokens}x{}", model.name, model.ffn);
        let make = move |d: &D| [(); 3].map(|()| random::<D, D::Float>(d, len));
        let ladder = session.ladder(device, "forward", &shape, cost::swiglu(len, size_of::<D::Float>()), make);
        let ladder = ladder.versions(versions, move |d, [gate, up, y]| {
            SwiGlu { gate: gate.view(), up: up.view(), y: y.view_mut() }.run(d).expect("a working device");
        });
        ladder.copy().run();
        // The gradients overwrite gate and up, which would vanish over the samples: they are restored before each.
        let make = move |d: &D| ([(); 3].map(|()| random::<D, D::Float>(d, len)), [(); 2].map(|()| random(d, len)));
        let cost = cost::swiglu_backward(len, size_of::<D::Float>());
        let ladder = session.ladder(device, "backward", &shape, cost, make);
        let ladder = ladder.refresh(|d, ([gate, up, _], before)| {
            for (before, now) in before.iter().zip([gate, up]) {
                d.copy(before.view(), now.view_mut()).expect("a working device");
            }
        });
        let ladder = ladder.versions(versions, move |d, ([gate, up, dy], _)| {
            SwiGluBackward { gate: gate.view_mut(), up: up.view_mut(), dy: dy.view() }
                .run(d)
                .expect("a working device");
        });
        ladder.copy().run();
    }
}
