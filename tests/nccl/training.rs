//! A whole run, of the same tiny model on one and on several ranks.

use crate::common;
use crate::ranks::{Run, Story};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::sync::OnceLock;
use swat::backend::Backend;
use swat::backend::cpu::Cpu;
use swat::backend::cuda::{Cuda, F32State};
use swat::data::{Example, Loader};
use swat::engine::{Decoder, Lora};
use swat::error::Result;
use swat::group::{Alone, Group, Share, Traffic};
use swat::model::ModelConfig;
use swat::modules::{Cell, LearningRates, ModuleKind, ModuleSet};
use swat::train::{Callbacks, Phase, PhaseOptions, RunPosition, StepMetrics, TuneOptions, Tuner};

/// Some tensors of a layer, so that most gradients are sent while the backward pass goes on.
const BUCKET_BYTES: usize = 4 << 10;

/// What is trained, and for how long.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kind {
    /// Steps of each of the two phases.
    steps: u64,
    /// Adapters of the attention's projections in place of all weights.
    lora: bool,
}

impl Kind {
    /// All weights, in a few steps.
    pub const SHORT: Self = Self { steps: 3, lora: false };
}

/// What a rank ends with.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Done {
    pub losses: Vec<f64>,
    /// All weights after each phase, in bits.
    pub weights: Vec<BTreeMap<String, Vec<u16>>>,
    pub reduce_scatter_bytes: u64,
    pub all_gather_bytes: u64,
}

impl<B: Backend> Callbacks<B> for Done {
    fn step(&mut self, metrics: &StepMetrics, _: &RunPosition) -> Result<()> {
        self.losses.push(metrics.loss.expect("a loss"));
        Ok(())
    }

    fn phase_ends(&mut self, decoder: &Decoder<B>, _: &RunPosition) -> Result<()> {
        self.weights.push(bits(decoder));
        Ok(())
    }
}

fn bits<B: Backend>(decoder: &Decoder<B>) -> BTreeMap<String, Vec<u16>> {
    let bits = |values: Vec<f32>| values.into_iter().map(|x| half::bf16::from_f32(x).to_bits()).collect();
    decoder.params().iter().map(|p| (p.id.to_string(), bits(decoder.read(p.id).unwrap()))).collect()
}

/// Odd sizes: of some tensors all parts are alike, of others they are not.
fn config() -> ModelConfig {
    common::config(2, true, true, false)
}

fn is_mod(cell: Cell) -> bool {
    matches!(cell, Cell::Module(module) if matches!(module.kind, ModuleKind::V | ModuleKind::O))
}

/// Some modules, then all.
fn phases(config: &ModelConfig, steps: u64) -> Vec<Phase> {
    let all = config.cells();
    let mods: ModuleSet = all.iter().filter(|cell| is_mod(*cell)).collect();
    let phase = |name: &str, set: &ModuleSet| Phase {
        name: name.into(),
        rates: LearningRates::masked(set, &all, 0.0),
        options: PhaseOptions { lr: 2e-3, weight_decay: 0.1, steps: Some(steps), ..PhaseOptions::default() },
    };
    vec![phase("mods", &mods), phase("all", &all)]
}

fn examples() -> Vec<Example> {
    let mut next = common::numbers(99);
    let example = |i| {
        let len = 5 + i % 7;
        let tokens = (0..len).map(|_| ((next() + 1.0) * 30.0) as u32).collect();
        Example { tokens, trained: (0..len).map(|t| t >= len / 3).collect(), replayed: false }
    };
    (0..23).map(example).collect()
}

/// The run as one rank of a group.
pub fn train<B: Backend>(backend: &B, group: &dyn Group<B>, kind: Kind) -> Result<Done> {
    let config = config();
    let mut decoder = common::decoder_on(backend, &config, 7);
    if kind.lora {
        let cells = config.cells();
        let attention: ModuleSet =
            cells.iter().filter(|cell| matches!(cell, Cell::Module(module) if module.kind.in_attention())).collect();
        decoder.add_lora(&attention, Lora { rank: 4, ..Lora::default() }, 3)?;
    }
    // Five documents a micro-batch, so that no two ranks have as many.
    let options = TuneOptions { batch_size: 5, grad_accum: 2, max_length: 32, seed: 5, ..TuneOptions::default() };
    let mut loader = Loader::new(examples(), options.loader())?;
    let mut done = Done::default();
    let tuner = Tuner::new(&mut decoder, &mut loader, options, phases(&config, kind.steps))?.group(group);
    tuner.bucket_bytes(BUCKET_BYTES).run(&mut done)?;
    let Traffic { reduce_scatter_bytes, all_gather_bytes } = group.traffic();
    Ok(Done { reduce_scatter_bytes, all_gather_bytes, ..done })
}

/// The run of four ranks on this machine.
pub fn of_four() -> Option<&'static [Done]> {
    static DONE: OnceLock<Option<Vec<Done>>> = OnceLock::new();
    DONE.get_or_init(|| Some(Run::new(4)?.done())).as_deref()
}

/// What all ranks must send in the whole run.
fn planned(size: usize) -> Traffic {
    let config = config();
    let mut total = Traffic::default();
    let steps = Kind::SHORT.steps;
    for phase in phases(&config, steps) {
        let trained = config.params().into_iter().filter(|(id, _)| phase.rates.trains(id.cell()));
        let lengths: Vec<usize> = trained.map(|(_, shape)| shape.iter().product()).collect();
        for share in (Share { rank: 0, size }).all() {
            let step = Traffic::of_step::<Cuda<F32State>>(lengths.iter().copied(), share);
            total.reduce_scatter_bytes += steps * step.reduce_scatter_bytes;
            total.all_gather_bytes += steps * step.all_gather_bytes;
        }
    }
    total
}

#[test]
fn several_ranks_train_as_one() {
    let Some(run) = Run::new(1) else { return };
    let one = run.done().remove(0);
    // The error of one rank in bf16, against f32, measures what several may differ by.
    let exact = train(&Cpu::new(), &Alone, Kind::SHORT).unwrap();
    let off = |of: &Done| farthest(of, &exact);
    let allowed = 2.0 * off(&one) + 1e-5;
    let before = bits(&common::decoder_on(&Cpu::new(), &config(), 7));
    assert_eq!(one.losses.len(), 2 * Kind::SHORT.steps as usize);
    for size in [2, 4] {
        let two;
        let ranks = if size == 4 {
            of_four().expect("there is a stand-in")
        } else {
            two = Run::new(size).expect("there is a stand-in").done();
            &two
        };
        for (rank, done) in ranks.iter().enumerate() {
            assert!(done.weights == ranks[0].weights, "rank {rank} of {size} has other weights");
            assert_eq!(done.losses, ranks[0].losses, "rank {rank} of {size}");
            assert!(off(done) <= allowed, "rank {rank} of {size}: {:e}, {allowed:e} allowed", off(done));
            let trained: Vec<&String> = before.keys().filter(|id| done.weights[0][*id] != before[*id]).collect();
            let mods = config().params().into_iter().filter(|(id, _)| is_mod(id.cell())).map(|(id, _)| id.to_string());
            let mut mods: Vec<String> = mods.collect();
            mods.sort();
            assert!(trained.iter().copied().eq(&mods), "rank {rank} of {size}: phase 1 changes {trained:?}");
            assert!(before.iter().all(|(id, bits)| done.weights[1][id] != *bits), "rank {rank} of {size}: all train");
        }
        let sum = |bytes: fn(&Done) -> u64| ranks.iter().map(bytes).sum::<u64>();
        let planned = planned(size);
        assert_eq!(sum(|done| done.reduce_scatter_bytes), planned.reduce_scatter_bytes);
        assert_eq!(sum(|done| done.all_gather_bytes), planned.all_gather_bytes);
    }
}

/// How far a loss of any step is off that of another run.
fn farthest(of: &Done, from: &Done) -> f64 {
    of.losses.iter().zip(&from.losses).map(|(a, b)| (a / b - 1.0).abs()).fold(0.0, f64::max)
}

/// Ten steps on some modules and ten on all, full and with adapters, by one rank and by four. Both round to bf16, and
/// differently: each may be off the run in f32 by as much as bf16 makes one rank be off, so that they are twice that apart.
#[test]
fn four_ranks_train_as_one_over_twenty_steps() {
    for lora in [false, true] {
        let kind = Kind { steps: 10, lora };
        let Some(one) = Run::new(1) else { return };
        let one = one.of(kind).done().remove(0);
        let exact = train(&Cpu::new(), &Alone, kind).unwrap();
        let off = farthest(&one, &exact);
        let allowed = 2.0 * off + 1e-5;
        let four = Run::new(4).expect("there is a stand-in").of(kind).done();
        for (rank, done) in four.iter().enumerate() {
            assert_eq!(done.losses.len(), 20);
            assert!(done.losses == four[0].losses && done.weights == four[0].weights, "rank {rank}");
            let found = farthest(done, &exact);
            assert!(found <= allowed, "rank {rank}, adapters: {lora}: {found:e}, {allowed:e} allowed");
        }
        assert!(four[0].weights[0] != four[0].weights[1], "adapters: {lora}: the second phase trains");
        eprintln!("adapters: {lora}: one rank is off f32 by {off:.1e}, four are by {:.1e}", farthest(&four[0], &exact));
    }
}

#[test]
fn what_is_sent_is_what_is_planned() {
    let Some(run) = Run::new(3) else { return };
    let story = run.story();
    assert_eq!(story.sent_bytes, planned(3).total_bytes(), "counted below NCCL's calls");
}

/// The same bytes, whenever the operations of each rank's streams happen.
#[test]
fn results_do_not_depend_on_time() {
    for seed in [1, 2] {
        let Some(run) = Run::new(4) else { return };
        let Story { done, .. } = run.with("STANDIN_STREAMS", &seed.to_string()).story();
        let four = of_four().expect("there is a stand-in");
        assert!(done.iter().zip(four).all(|(found, expected)| found.as_ref() == Ok(expected)), "seed {seed}");
    }
}
