//! Rotary position embedding of a layer's queries.

use super::common::{Device, Session, integers, random};
use swat::backend::cpu::Cpu;
use swat::backend::cuda::{Cuda, F32State};
use swat::backend::{Operator, Rope, cost};

pub(crate) fn cpu(session: &mut Session, cpu: &Cpu) {
    rope(session, cpu, &[]);
}

pub(crate) fn cuda(session: &mut Session, cuda: &Cuda<F32State>) {
    rope(session, cuda, &["baseline", "vec8"]);
}

/// Positions of a document.
const POSITIONS: usize = 1024;

fn rope<D: Device>(session: &mut Session, device: &D, versions: &[&'static str]) {
    let tokens = session.scale.tokens;
    for model in session.scale.models() {
        let (heads, head_dim, len) = (model.heads, model.head_dim, tokens * model.q_width());
        let make = move |d: &D| {
            let half = head_dim / 2;
            let angle = |i: usize| (i / head_dim) as f32 * 0.7f32.powi((i % half) as i32);
            let turn = |i: usize| if i % head_dim < half { angle(i).cos() } else { angle(i).sin() };
            let turns: Vec<f32> = (0..POSITIONS * head_dim).map(turn).collect();
            let mut table = d.zeros(turns.len()).expect("memory for a table");
            d.write(&turns, table.view_mut()).expect("a working device");
            (random::<D, D::Float>(d, len), table, integers(d, (0..tokens).map(|i| (i % POSITIONS) as u32)))
        };
        let cost = cost::rope(len, size_of::<D::Float>());
        let shape = format!("{}/{tokens}x{heads}x{head_dim}", model.name);
        let ladder = session.ladder(device, "forward", shape, cost, make);
        let ladder = ladder.versions(versions, move |d, (x, table, positions)| {
            let (table, positions) = (table.view(), positions.view());
            Rope { x: x.view_mut(), table, positions, head_dim, inverse: false }.run(d).expect("a working device");
        });
        ladder.copy().run();
    }
}
