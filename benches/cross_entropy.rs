//! Cross-entropy: losses alone, and with the gradient in place.

use super::common::{Device, Session, integers, random};
use swat::backend::cpu::Cpu;
use swat::backend::cuda::{Cuda, F32State};
use swat::backend::{Cost, CrossEntropy, LossTerms, Operator, cost};

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
        terms(session, device, &shape, [rows, vocab]);
    }
}

/// The gradient with the terms of the constrained loss, and of a teacher of 64 tokens.
fn terms<D: Device>(session: &mut Session, device: &D, shape: &str, [rows, vocab]: [usize; 2]) {
    let (width, float) = (64.min(vocab), size_of::<D::Float>());
    let make = move |d: &D| {
        let targets = integers(d, (0..rows).map(|i| (i * 7919 % vocab) as u32));
        let ids = integers(d, (0..rows * width).map(|i| (i % width * (vocab / width)) as u32));
        let logits = [(); 2].map(|()| random::<D, D::Float>(d, rows * vocab));
        (logits, targets, ids, [rows, rows, rows, rows * width].map(|len| random::<D, f32>(d, len)))
    };
    let cost = cost::cross_entropy_gradient(rows * vocab, float) + Cost::moved(8 * rows * (1 + width));
    let ladder = session.ladder(device, "terms", shape, cost, make);
    let ladder = ladder.refresh(|d, ([logits, before], ..)| {
        d.copy(before.view(), logits.view_mut()).expect("a working device");
    });
    let ladder = ladder.variant("swat", move |d, ([logits, _], targets, ids, [losses, reference, beta, probs])| {
        let (reference, beta, ids, probs) = (reference.view(), beta.view(), ids.view(), probs.view());
        let terms = Some(LossTerms { reference, beta, ids, probs, distil: 1.0 });
        let (logits, targets, losses) = (logits.view_mut(), targets.view(), losses.view_mut());
        CrossEntropy { logits, targets, losses, vocab, scale: Some(1.0), terms }.run(d).expect("a working device");
    });
    ladder.copy().run();
}
