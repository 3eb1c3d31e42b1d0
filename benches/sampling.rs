//! The next token: greedy and nucleus.

use super::common::{Device, Session, integers, random};
use swat::backend::cpu::Cpu;
use swat::backend::cuda::{Cuda, F32State};
use swat::backend::{Operator, Sample, Sampling, cost};

pub(crate) fn cpu(session: &mut Session, cpu: &Cpu) {
    sampling(session, cpu, &[]);
}

pub(crate) fn cuda(session: &mut Session, cuda: &Cuda<F32State>) {
    sampling(session, cuda, &["baseline", "vec8"]);
}

fn sampling<D: Device>(session: &mut Session, device: &D, versions: &[&'static str]) {
    let scale = session.scale;
    for (model, rows) in scale.models().flat_map(|model| scale.sampled_rows.iter().map(move |rows| (model, *rows))) {
        let vocab = model.vocab;
        let shape = format!("{}/{rows}x{vocab}", model.name);
        let make = move |d: &D| {
            let uniforms: Vec<f32> = (0..rows).map(|i| (i * 37 % 101) as f32 / 101.0).collect();
            let mut on_device = d.zeros(rows).expect("memory for a batch");
            d.write(&uniforms, on_device.view_mut()).expect("a working device");
            (random::<D, D::Float>(d, rows * vocab), on_device, integers(d, (0..rows).map(|_| 0)))
        };
        let (logits, float) = (rows * vocab, size_of::<D::Float>());
        for (op, temperature, cost) in
            [("greedy", 0.0, cost::sample_greedy(logits, float)), ("nucleus", 0.7, cost::sample_nucleus(logits, float))]
        {
            let sampling = Sampling { temperature, top_p: 0.9 };
            let ladder = session.ladder(device, op, &shape, cost, make);
            let ladder = ladder.versions(versions, move |d, (logits, uniforms, tokens)| {
                let (logits, uniforms) = (logits.view(), uniforms.view());
                Sample { logits, uniforms, tokens: tokens.view_mut(), vocab, sampling }
                    .run(d)
                    .expect("a working device");
            });
            ladder.copy().run();
        }
    }
}
