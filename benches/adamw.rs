//! Masked AdamW over a module table of a few layers, and the sums of squares for gradient clipping, with moments and
//! gradients in f32 and, on a GPU, in bf16.

use super::common::{Device, Model, Session, random};
use swat::backend::cpu::Cpu;
use swat::backend::cuda::{Bf16State, Cuda, F32State, Precision};
use swat::backend::{
    AdamW, AdamWMasked, AdamWModule, Backend, Buffer, Cost, MeanRow, Operator, ProximalGradients, ProximalRow,
    Rounding, SumSquares, UpdateMeans, cost,
};

pub(crate) fn cuda(session: &mut Session, cuda: &Cuda<F32State>) {
    on_a_gpu(session, cuda, "f32");
    on_a_gpu(session, &Cuda::<Bf16State>::open(0).expect("a device that was opened before"), "bf16");
}

/// Tensors of a module.
struct Module<B: Backend> {
    weight: Buffer<B, B::Float>,
    grad: Buffer<B, B::Grad>,
    m: Buffer<B, B::Moment>,
    v: Buffer<B, B::Moment>,
}

struct Tensors<B: Backend> {
    modules: Vec<Module<B>>,
    squares: Buffer<B, f32>,
}

impl<B: Backend> Tensors<B> {
    fn new(b: &B, lengths: &[usize]) -> Self {
        let module = |len: &usize| Module {
            weight: random(b, *len),
            grad: random(b, *len),
            m: random(b, *len),
            v: b.zeros(*len).expect("memory for a moment"),
        };
        Self {
            modules: lengths.iter().map(module).collect(),
            squares: b.zeros(lengths.len()).expect("memory for sums"),
        }
    }

    fn step(&mut self, work: impl FnOnce(&mut [AdamWModule<'_, B>], &Buffer<B, f32>, AdamW)) {
        let mut table = Vec::new();
        for Module { weight, grad, m, v } in &mut self.modules {
            let (weight, grad, m, v) = (weight.view_mut(), grad.view(), m.view_mut(), v.view_mut());
            table.push(AdamWModule { weight, grad, m, v, lr: 1e-5, weight_decay: 0.1 });
        }
        let hyper = AdamW {
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            step: 3,
            max_grad_norm: Some(1.0),
            seed: 1,
            rounding: Rounding::Stochastic,
        };
        work(&mut table, &self.squares, hyper);
    }
}

/// The projections of as many layers as it takes to have `least` elements.
fn lengths(model: &Model, least: usize) -> Vec<usize> {
    let layer = model.modules();
    let layers = least.div_ceil(layer.iter().sum());
    layer.iter().copied().cycle().take(layers * layer.len()).collect()
}

fn name(model: &Model, lengths: &[usize]) -> String {
    format!("{}/{}-layers", model.name, lengths.len() / model.modules().len())
}

fn costs<B: Backend>(lengths: &[usize]) -> [Cost; 2] {
    let elements = lengths.iter().sum();
    let grad = size_of::<B::Grad>();
    [cost::adamw(elements, size_of::<B::Float>(), grad, size_of::<B::Moment>()), cost::sum_squares(elements, grad)]
}

fn squares<B: Backend>(b: &B, tensors: &mut Tensors<B>) {
    let parts: Vec<_> = tensors.modules.iter().map(|module| module.grad.view()).collect();
    SumSquares { parts: &parts, squares: tensors.squares.view_mut() }.run(b).expect("a working device");
}

fn step<B: Backend>(b: &B, tensors: &mut Tensors<B>) {
    tensors.step(|table, squares, hyper| {
        AdamWMasked { table, squares: squares.view(), hyper }.run(b).expect("a working device")
    });
}

/// Tensors of a step with averages and anchors of their weights.
struct Averages<B: Backend> {
    tensors: Tensors<B>,
    means: Vec<Buffer<B, f32>>,
    anchors: Vec<Buffer<B, B::Float>>,
}

impl<B: Backend> Averages<B> {
    fn new(b: &B, lengths: &[usize]) -> Self {
        let means = lengths.iter().map(|len| random(b, *len)).collect();
        let anchors = lengths.iter().map(|len| random(b, *len)).collect();
        Self { tensors: Tensors::new(b, lengths), means, anchors }
    }
}

fn means<B: Backend>(b: &B, Averages { tensors, means, .. }: &mut Averages<B>) {
    let rows = means.iter_mut().zip(&tensors.modules);
    let mut table: Vec<_> =
        rows.map(|(mean, module)| MeanRow { mean: mean.view_mut(), weight: module.weight.view() }).collect();
    UpdateMeans { table: &mut table, decay: 0.99 }.run(b).expect("a working device");
}

fn proximal<B: Backend>(b: &B, Averages { tensors, anchors, .. }: &mut Averages<B>) {
    let mut table = Vec::new();
    for (Module { weight, grad, .. }, anchor) in tensors.modules.iter_mut().zip(&*anchors) {
        table.push(ProximalRow { grad: grad.view_mut(), weight: weight.view(), anchor: anchor.view() });
    }
    ProximalGradients { table: &mut table, rho: 1e-3 }.run(b).expect("a working device");
}

/// What recipes do beside the step.
fn beside<D: Device>(session: &mut Session, device: &D, state: &str) {
    let scale = session.scale;
    for model in scale.models() {
        let lengths = lengths(model, scale.stepped_elements);
        let (elements, float, grad) = (lengths.iter().sum(), size_of::<D::Float>(), size_of::<D::Grad>());
        let make = |d: &D| Averages::new(d, &lengths);
        let (mean_cost, pull_cost) =
            (cost::update_means(elements, float), cost::proximal_gradients(elements, float, grad));
        let ladder = session.ladder(device, format!("means-{state}"), name(model, &lengths), mean_cost, make);
        ladder.uncaptured().variant("swat", means).copy().run();
        let ladder = session.ladder(device, format!("proximal-{state}"), name(model, &lengths), pull_cost, make);
        ladder.uncaptured().variant("swat", proximal).copy().run();
    }
}

pub(crate) fn cpu(session: &mut Session, cpu: &Cpu) {
    let scale = session.scale;
    for model in scale.models() {
        let lengths = lengths(model, scale.stepped_elements);
        let make = |cpu: &Cpu| Tensors::new(cpu, &lengths);
        let [step_cost, squares_cost] = costs::<Cpu>(&lengths);
        session.ladder(cpu, "step-f32", name(model, &lengths), step_cost, make).variant("swat", step).copy().run();
        let ladder = session.ladder(cpu, "squares-f32", name(model, &lengths), squares_cost, make);
        ladder.variant("swat", squares).copy().run();
    }
    beside(session, cpu, "f32");
}

fn on_a_gpu<P: Precision>(session: &mut Session, cuda: &Cuda<P>, state: &str) {
    let scale = session.scale;
    for model in scale.models() {
        let lengths = lengths(model, scale.stepped_elements);
        let make = |cuda: &Cuda<P>| Tensors::new(cuda, &lengths);
        let [step_cost, squares_cost] = costs::<Cuda<P>>(&lengths);
        // Learning rates come from the host at each step, so that a step cannot be captured.
        let ladder = session.ladder(cuda, format!("step-{state}"), name(model, &lengths), step_cost, make).uncaptured();
        ladder.versions(&["baseline"], step).copy().run();
        let ladder = session.ladder(cuda, format!("squares-{state}"), name(model, &lengths), squares_cost, make);
        ladder.uncaptured().versions(&["baseline"], squares).copy().run();
    }
    beside(session, cuda, state);
}
