//! Perturbed copies of a weight, both signs at once. `common` tells how to run it.

use super::common::{Device, Session, random};
use swat::backend::cpu::Cpu;
use swat::backend::cuda::{Cuda, F32State};
use swat::backend::{Backend, Buffer, Direction, NoiseKey, cost};

const KEY: NoiseKey = NoiseKey { seed: 1, stream: 2 };
const EPSILON: f32 = 0.1;
const RANK: usize = 4;

/// A weight, what is added to it where that is given, and its copies.
type Tensors<D, F> = [Buffer<D, F>; 4];
/// A call.
type Work<D, F> = fn(&D, &mut Tensors<D, F>);
/// A direction, of the tensor that may be given and the rows of the weight.
type Kind<D> = fn(&Buffer<D, <D as Backend>::Float>, usize) -> Direction<'_, D>;

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
        let make = move |d: &D| [(); 4].map(|()| random::<D, D::Float>(d, len));
        let kinds: [(&str, Kind<D>); 5] = [
            ("gaussian", |_, _| Direction::Gaussian(KEY)),
            ("rademacher", |_, _| Direction::Rademacher(KEY)),
            ("lowrank-4", |_, rows| Direction::LowRank { key: KEY, rank: RANK, rows }),
            ("scale", |_, _| Direction::Scale),
            ("given", |n, _| Direction::Given(n.view())),
        ];
        // A cost depends on the kind of a direction, not on what is in it.
        let any = random::<D, D::Float>(device, 1);
        for (op, direction) in kinds {
            let cost = cost::perturb(len, 2, &direction(&any, rows), size_of::<D::Float>());
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
