//! Cross-entropy: losses alone, and with the gradient in place.

use super::common::{Device, Session, integers, random};
use swat::backend::cpu::Cpu;
use swat::backend::cuda::{Cuda, F32State};
use swat::backend::{CrossEntropy, Operator, cost};

pub(crate) fn cpu(session: &mut Session, cpu: &Cpu) {
    cross_entropy(session, cpu, &[]);
}

pub(crate) fn cuda(session: &mut Session, cuda: &Cuda<F32State>) {
    cross_entropy(session, cuda, &["baseline", "vec8"]);
}

fn cross_entropy<D: Device>(session: &mut Session, device: &D, versions: &[&'static str]) {
    let rows = session.scale.logit_rows;
    for model in session.scale.models() {
        let (vocab, len) = (model.vocab, rows * model.vocab);
        let shape = format!("{}/{rows}x{vocab}", model.name);
        let make = move |d: &D| {
            let targets = integers(d, (0..rows).map(|i| (i * 7919 % vocab) as u32));
            let (logits, before) = (random::<D, D::Float>(d, len), random::<D, D::Float>(d, len));
            (logits, before, targets, random::<D, f32>(d, rows))
        };
        let float = size_of::<D::Float>();
        for (op, scale, cost) in [
            ("loss", None, cost::cross_entropy(len, float)),
            ("gradient", Some(1.0), cost::cross_entropy_gradient(len, float)),
        ] {
            // The gradient overwrites the logits: they are restored before each sample.
            let ladder = session.ladder(device, op, &shape, cost, make).refresh(move |d, (logits, before, ..)| {
                if scale.is_some() {
                    d.copy(before.view(), logits.view_mut()).expect("a working device");
                }
            });
            let ladder = ladder.versions(versions, move |d, (logits, _, targets, losses)| {
                let (targets, losses) = (targets.view(), losses.view_mut());
                CrossEntropy { logits: logits.view_mut(), targets, losses, vocab, scale, terms: None }
                    .run(d)
                    .expect("a working device");
            });
            ladder.copy().run();
        }
    }
}
