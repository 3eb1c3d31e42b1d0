//! Perturbed copies of a weight, both signs at once.

use super::common::{Device, Session, random};
use swat::backend::cpu::Cpu;
use swat::backend::cuda::{Cuda, F32State};
use swat::backend::{Backend, Buffer, Cost, Direction, In, MoveAlong, NoiseKey, Operator, Perturb, cost};

const KEY: NoiseKey = NoiseKey { seed: 1, stream: 2 };
const EPSILON: f32 = 0.1;
const RANK: usize = 4;

/// Makes a direction from the given tensor and the number of rows of the weight.
type Kind<D> = fn(&Buffer<D, <D as Backend>::Float>, usize) -> Direction<In<'_, D>>;

pub(crate) fn cpu(session: &mut Session, cpu: &Cpu) {
    perturb(session, cpu, &[]);
}

pub(crate) fn cuda(session: &mut Session, cuda: &Cuda<F32State>) {
    perturb(session, cuda, &["baseline"]);
}

fn perturb<D: Device>(session: &mut Session, device: &D, of_gaussian: &[&'static str]) {
    for model in session.scale.models() {
        let (rows, len) = (model.ffn, model.ffn * model.hidden);
        let shape = format!("{}/{rows}x{}", model.name, model.hidden);
        // The weight, the given direction, and the two copies.
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
            let direction_of_any = direction(&any, rows);
            let norm = if direction_of_any.has_norm() { cost::sum_squares(len, 0) } else { Cost::default() };
            let cost = direction_of_any.cost(len, 2, size_of::<D::Float>()) + norm;
            let ladder = session.ladder(device, op, &shape, cost, make);
            let versions = if op == "gaussian" { of_gaussian } else { &[] };
            let ladder = ladder.versions(versions, move |d, [w, n, plus, minus]| {
                let (plus, minus) = (plus.view_mut(), Some(minus.view_mut()));
                Perturb { w: w.view(), squares: None, direction: direction(n, rows), epsilon: EPSILON, plus, minus }
                    .run(d)
                    .expect("a working device");
            });
            ladder.copy().run();
        }
        let ladder =
            session.ladder(device, "along", &shape, cost::move_along(len, size_of::<D::Float>()), move |d: &D| {
                ([(); 2].map(|()| random::<D, D::Float>(d, len)), random::<D, f32>(d, 1))
            });
        let ladder = ladder.variant("swat", |d, ([x, n], squares)| {
            let (x, direction, squares) = (x.view_mut(), n.view(), squares.view());
            MoveAlong { x, direction, squares, rho: 0.1 }.run(d).expect("a working device");
        });
        ladder.copy().run();
    }
}
