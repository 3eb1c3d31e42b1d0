//! Perturbed copies of a weight, both signs at once. `common` tells how to run it.

pub(crate) mod common;

use common::{Device, Session, random};
use swat::backend::cpu::Cpu;
use swat::backend::cuda::{Cuda, F32State};
use swat::backend::{Backend, Buffer, Cost, Direction, NoiseKey};

const KEY: NoiseKey = NoiseKey { seed: 1, stream: 2 };
const EPSILON: f32 = 0.1;
const RANK: usize = 4;

/// A weight, what is added to it where that is given, and its copies.
type Tensors<D, F> = [Buffer<D, F>; 4];
/// A call.
type Work<D, F> = fn(&D, &mut Tensors<D, F>);
/// A direction, of the tensor that may be given and the rows of the weight.
type Kind<D> = fn(&Buffer<D, <D as Backend>::Float>, usize) -> Direction<'_, D>;

fn main() {
    common::main("perturb", cpu, cuda);
}

pub(crate) fn cpu(session: &mut Session, cpu: &Cpu) {
    perturb(session, cpu, None);
}

pub(crate) fn cuda(session: &mut Session, cuda: &Cuda<F32State>) {
    perturb(session, cuda, Some(gaussian_baseline));
}

fn gaussian_baseline(cuda: &Cuda<F32State>, [w, _, plus, minus]: &mut Tensors<Cuda<F32State>, half::bf16>) {
    let minus = Some(minus.view_mut());
    cuda.perturb_gaussian_baseline(w.view(), KEY, EPSILON, plus.view_mut(), minus).expect("a working device");
}

fn perturb<D: Device>(session: &mut Session, device: &D, gaussian_baseline: Option<Work<D, D::Float>>) {
    for model in session.scale.models() {
        let (rows, len) = (model.ffn, model.ffn * model.hidden);
        let shape = format!("{}/{rows}x{}", model.name, model.hidden);
        let cost = |tensors: usize, flops: usize| Cost {
            bytes: (tensors * len * size_of::<D::Float>()) as u64,
            flops: (flops * len) as u64,
        };
        let make = move |d: &D| [(); 4].map(|()| random::<D, D::Float>(d, len));
        // FLOPs beside those of the random numbers, which are integers' work.
        let kinds: [(&str, Cost, Kind<D>); 5] = [
            ("gaussian", cost(3, 12), |_, _| Direction::Gaussian(KEY)),
            ("rademacher", cost(3, 4), |_, _| Direction::Rademacher(KEY)),
            ("lowrank-4", cost(3, 4 + 2 * RANK), |_, rows| Direction::LowRank { key: KEY, rank: RANK, rows }),
            ("scale", cost(3, 4), |_, _| Direction::Scale),
            ("given", cost(4, 4), |n, _| Direction::Given(n.view())),
        ];
        for (op, cost, direction) in kinds {
            let ladder = session.ladder(device, op, &shape, cost, make);
            let mut ladder = ladder.variant("swat", move |d, [w, n, plus, minus]| {
                let (plus, minus) = (plus.view_mut(), Some(minus.view_mut()));
                d.perturb(w.view(), &direction(n, rows), EPSILON, plus, minus).expect("a working device");
            });
            if let ("gaussian", Some(baseline)) = (op, gaussian_baseline) {
                ladder = ladder.variant("baseline", baseline);
            }
            ladder.copy().run();
        }
    }
}
