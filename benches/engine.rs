//! Whole steps on models with random weights: training (everything, some modules, adapters), decoding, and the
//! perturbed copies of one layer in a sweep.

use super::common::shapes::Steps;
use super::common::{Device, Model, Session};
use std::cell::{OnceCell, RefCell};
use swat::backend::cpu::Cpu;
use swat::backend::cuda::{Cuda, F32State};
use swat::backend::{Backend, Cost};
use swat::engine::{
    Batch, Decoder, GenerateOptions, GradientOptions, Gradients, Lora, Member, NoiseKind, SweepOptions,
};
use swat::model::{ModelConfig, Rope, RopeScaling};
use swat::modules::{Cell, LearningRates, ModuleKind, ModuleSet, ParamId};
use swat::train::{Optimizer, StepSettings};

pub(crate) fn cpu(session: &mut Session, cpu: &Cpu) {
    engine(session, cpu);
}

pub(crate) fn cuda(session: &mut Session, cuda: &Cuda<F32State>) {
    engine(session, cuda);
}

fn engine<D: Device>(session: &mut Session, device: &D) {
    for steps in &session.scale.steps {
        Bench { device, model: Model::named(&steps.model), decoder: OnceCell::new(), steps }.run(session);
    }
}

/// Without biases: they cost nothing.
fn config(model: &Model) -> ModelConfig {
    ModelConfig {
        family: "llama".into(),
        vocab: model.vocab,
        hidden: model.hidden,
        ffn: model.ffn,
        layers: model.layers,
        heads: model.heads,
        kv_heads: model.kv_heads,
        head_dim: model.head_dim,
        rms_norm_eps: 1e-5,
        rope: Rope { theta: 100_000.0, scaling: RopeScaling::None },
        max_positions: 8192,
        tied: model.tied,
        biases: vec![],
        qk_norm: false,
        windows: vec![None; model.layers],
        bos: None,
        eos: vec![],
    }
}

fn decoder<B: Backend>(backend: &B, model: &Model) -> Decoder<B> {
    let mut state = 1u32;
    Decoder::new(backend.clone(), config(model), |_, shape| {
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 24) as f32 - 0.5
        };
        let norm = shape.len() == 1;
        Ok((0..shape.iter().product::<usize>()).map(|_| if norm { 1.0 } else { 0.1 * next() }).collect())
    })
    .expect("memory for the model")
}

fn documents(vocab: usize, count: usize, tokens: usize) -> Vec<Vec<u32>> {
    (0..count).map(|d| (0..tokens).map(|i| ((d * 7919 + i * 104_729) % vocab) as u32).collect()).collect()
}

/// A model, made at its first timing.
struct Bench<'a, D: Device> {
    device: &'a D,
    model: &'static Model,
    decoder: OnceCell<RefCell<Decoder<D>>>,
    steps: &'static Steps,
}

/// State of a training run.
struct Training<D: Device> {
    gradients: Gradients<D>,
    optimizer: Optimizer<D>,
    batch: Batch,
}

impl<D: Device> Bench<'_, D> {
    fn run(self, session: &mut Session) {
        let layers = self.model.layers;
        let attention = |cell: Cell| matches!(cell, Cell::Module(m) if m.kind.in_attention());
        let top_half = |cell: Cell| matches!(cell, Cell::Module(m) if m.layer >= layers / 2);
        let top_down =
            |cell: Cell| matches!(cell, Cell::Module(m) if m.layer >= layers * 3 / 4 && m.kind == ModuleKind::Down);
        let all = |_: Cell| true;
        let sets: [(&str, &dyn Fn(Cell) -> bool); 4] =
            [("all", &all), ("qkvo", &attention), ("top-half", &top_half), ("top-quarter-down", &top_down)];
        for (name, trains) in sets {
            let set: ModuleSet = self.cells().iter().filter(|cell| trains(*cell)).collect();
            self.step(session, &format!("train-{name}"), &set, false);
        }
        self.generate(session);
        self.sweep(session);
        // Last, because the adapters stay.
        let projections: ModuleSet = self.cells().iter().filter(|cell| matches!(cell, Cell::Module(_))).collect();
        self.step(session, "train-lora-16", &projections, true);
    }

    fn decoder(&self) -> &RefCell<Decoder<D>> {
        self.decoder.get_or_init(|| RefCell::new(decoder(self.device, self.model)))
    }

    fn cells(&self) -> ModuleSet {
        config(self.model).cells()
    }

    /// Forward, backward and AdamW: of a set of cells, or of adapters of rank 16 on the projections of the set.
    fn step(&self, session: &mut Session, op: &str, set: &ModuleSet, adapters: bool) {
        let [count, tokens] = self.steps.packed;
        let rates = LearningRates::masked(set, &self.cells(), 0.0);
        let trains = |id: ParamId| !adapters || matches!(id, ParamId::LoraA(_) | ParamId::LoraB(_));
        let make = |_: &D| {
            let mut decoder = self.decoder().borrow_mut();
            if adapters {
                decoder
                    .add_lora(set, Lora { rank: 16, alpha: 32.0, ..Lora::default() }, 1)
                    .expect("memory for adapters");
            }
            let documents = documents(self.model.vocab, count, tokens);
            let mut batch = Batch::from_prompts(documents.iter().map(Vec::as_slice));
            batch.targets = batch.tokens[1..].iter().copied().chain([0]).collect();
            let gradients = Gradients::new(&decoder, |id| trains(id) && rates.trains(id.cell())).expect("memory");
            Training { gradients, optimizer: Optimizer::new(&decoder, &rates, trains).expect("memory"), batch }
        };
        let settings = StepSettings {
            lr: 1e-5,
            weight_decay: 0.0,
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            max_grad_norm: Some(1.0),
            seed: 1,
        };
        let shape = format!("{}/{count}x{tokens}", self.model.name);
        let ladder = session.ladder(self.device, op, shape, Cost::default(), make).uncaptured().tokens(count * tokens);
        let ladder = ladder.variant("swat", |_, training| {
            let Training { gradients, optimizer, batch } = training;
            let scale = 1.0 / (count * tokens) as f32;
            let mut decoder = self.decoder().borrow_mut();
            decoder.loss_and_gradients(batch, gradients, GradientOptions::scaled(scale)).expect("a valid batch");
            optimizer.step(&mut decoder, gradients, &settings).expect("a working device");
        });
        ladder.run();
    }

    /// Greedy decoding of as many tokens as each prompt has.
    fn generate(&self, session: &mut Session) {
        for [count, length] in self.steps.answers.iter().copied() {
            let prompts = documents(self.model.vocab, count, length);
            let options = GenerateOptions { max_new_tokens: length, ..GenerateOptions::default() };
            let shape = format!("{}/{count}x{length}", self.model.name);
            let ladder = session.ladder(self.device, "generate", shape, Cost::default(), |_| ());
            let ladder = ladder.uncaptured().tokens(length * count).variant("swat", |_, ()| {
                let decoder = self.decoder().borrow();
                decoder.generate(&prompts, &options, &mut |_, _| {}).expect("valid prompts");
            });
            ladder.run();
        }
    }

    /// Every projection of the middle layer (about the mean cost of a cell) with both signs.
    fn sweep(&self, session: &mut Session) {
        let (layers, [count, length]) = (self.model.layers, self.steps.prompts);
        let documents = documents(self.model.vocab, count, length);
        let prompts = Batch::from_prompts(documents.iter().map(Vec::as_slice));
        let options = SweepOptions {
            kind: NoiseKind::Gaussian,
            epsilon: 1.0,
            layers: vec![layers],
            head_rows: vec![1, 2, 3],
            budget_bytes: 1 << 30,
        };
        let members: Vec<Member> = ModuleKind::ALL
            .into_iter()
            .map(|kind| [Cell::module(layers / 2, kind)].into_iter().collect::<ModuleSet>())
            .flat_map(|cells| [false, true].map(|negative| Member { cells: cells.clone(), seed: 1, negative }))
            .collect();
        let shape = format!("{}/{count}x{length}", self.model.name);
        let ladder = session.ladder(self.device, "sweep-layer", shape, Cost::default(), |_| ());
        let ladder = ladder.uncaptured().tokens(count * length * members.len()).variant("swat", |_, ()| {
            let decoder = self.decoder().borrow();
            decoder.sweep(&prompts, &members, &options, &mut |_, _| Ok(())).expect("valid prompts");
        });
        ladder.run();
    }
}
