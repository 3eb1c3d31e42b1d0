//! A run of the tuner on a tiny random model, and what it reports.

use crate::common;
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use swat::backend::Roofline;
use swat::backend::cpu::Cpu;
use swat::data::Example;
use swat::engine::{Decoder, Plan};
use swat::error::{Error, Result};
use swat::modules::{Cell, LearningRates, ModuleKind, ModuleSet, ParamId};
use swat::train::{Callbacks, Phase, PhaseOptions, RunDir, RunPosition, StepMetrics, TuneOptions, TuneSummary, Tuner};

pub fn model() -> Decoder<Cpu> {
    common::decoder(common::config(2, true, true, false), 7)
}

/// Random examples; the first third of each is the prompt.
pub fn examples(count: usize) -> Vec<Example> {
    let mut next = common::numbers(99);
    (0..count)
        .map(|i| {
            let len = 5 + i % 7;
            let tokens = (0..len).map(|_| ((next() + 1.0) * 30.0) as u32).collect();
            Example { tokens, trained: (0..len).map(|t| t >= len / 3).collect(), replayed: false }
        })
        .collect()
}

pub fn options() -> TuneOptions {
    TuneOptions { batch_size: 2, max_length: 32, save_every: 3, seed: 5, ..TuneOptions::default() }
}

/// Phase 1 on the V and O projections, phase 2 on everything.
pub fn two_phases(first: u64, second: u64) -> Vec<Phase> {
    let all = model().config.cells();
    let mods: ModuleSet = all
        .iter()
        .filter(|cell| matches!(cell, Cell::Module(m) if matches!(m.kind, ModuleKind::V | ModuleKind::O)))
        .collect();
    let phase = |name: &str, set: &ModuleSet, steps| Phase {
        name: name.into(),
        rates: LearningRates::masked(set, &all, 0.0),
        options: PhaseOptions { lr: 1e-2, weight_decay: 0.1, steps: Some(steps), ..PhaseOptions::default() },
    };
    vec![phase("mods", &mods, first), phase("all", &all, second)]
}

pub fn run_dir(dir: &Path, resume: bool) -> RunDir {
    RunDir { dir: dir.into(), model: "m".into(), data: "d".into(), resume }
}

/// Records the callbacks; fails at `stop_at`.
#[derive(Default)]
pub struct Recorder {
    pub stop_at: Option<u64>,
    pub notes: Vec<String>,
    pub infos: Vec<String>,
    /// Planned bytes of each phase.
    pub plans: Vec<(String, u64)>,
    pub steps: Vec<StepMetrics>,
    pub epochs: Vec<u64>,
    pub phases: Vec<String>,
    /// All weights at the end of each epoch.
    pub weights: Vec<BTreeMap<ParamId, Vec<f32>>>,
}

impl Callbacks<Cpu> for Recorder {
    fn note(&mut self, text: &str) {
        self.notes.push(text.into());
    }
    fn info(&mut self, text: &str) {
        self.infos.push(text.into());
    }
    fn run_begins(&mut self, plans: &[(String, Plan)]) {
        self.plans = plans.iter().map(|(phase, plan)| (phase.clone(), plan.total_bytes())).collect();
    }
    fn step(&mut self, metrics: &StepMetrics, at: &RunPosition) -> Result<()> {
        assert_eq!(metrics.step, at.step);
        self.steps.push(metrics.clone());
        if self.stop_at == Some(at.step) { Err(Error::failed("stopped", "resume")) } else { Ok(()) }
    }
    fn epoch_ends(&mut self, decoder: &Decoder<Cpu>, at: &RunPosition) -> Result<()> {
        self.epochs.push(at.epoch);
        self.weights.push(weights(decoder));
        Ok(())
    }
    fn phase_ends(&mut self, _: &Decoder<Cpu>, at: &RunPosition) -> Result<()> {
        self.phases.push(at.phase.clone());
        Ok(())
    }
}

pub fn weights(decoder: &Decoder<Cpu>) -> BTreeMap<ParamId, Vec<f32>> {
    decoder.params().iter().map(|p| (p.id, decoder.read(p.id).unwrap())).collect()
}

pub fn bits(decoder: &Decoder<Cpu>) -> BTreeMap<ParamId, Vec<u32>> {
    weights(decoder).into_iter().map(|(id, w)| (id, w.into_iter().map(f32::to_bits).collect())).collect()
}

/// Lines of `metrics.jsonl` without the fields that depend on time and machine.
pub fn lines(dir: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(dir.join("metrics.jsonl")).unwrap();
    let line = |line: &str| {
        let mut value: Value = serde_json::from_str(line).unwrap();
        for field in ["tok_per_s", "peak_bytes", "step_ms"] {
            value.as_object_mut().unwrap().shift_remove(field).unwrap();
        }
        value.as_object_mut().unwrap().shift_remove("speed_of_light");
        value
    };
    text.lines().map(line).collect()
}

/// A run with a fresh model and a fresh loader, as in a new process: to its end, or to `stop_at`.
pub struct Run<'a> {
    pub dir: Option<&'a Path>,
    pub resume: bool,
    pub options: TuneOptions,
    pub phases: Vec<Phase>,
    pub examples: Vec<Example>,
    pub model: fn() -> Decoder<Cpu>,
    /// Whether the weights before the run can be read again.
    pub given: bool,
    pub stop_at: Option<u64>,
}

impl<'a> Run<'a> {
    pub fn new(dir: Option<&'a Path>) -> Self {
        Self {
            dir,
            resume: true,
            options: options(),
            phases: two_phases(7, 8),
            examples: examples(8),
            model,
            given: false,
            stop_at: None,
        }
    }

    pub fn run(self) -> (Result<TuneSummary>, Decoder<Cpu>, Recorder) {
        let mut decoder = (self.model)();
        let mut loader = self.options.load(self.examples).unwrap();
        let mut recorded = Recorder { stop_at: self.stop_at, ..Recorder::default() };
        let tuner = Tuner::new(&mut decoder, &mut loader, self.options, self.phases).unwrap().measure_updates();
        // The measured roofline differs from process to process and must not change any result.
        static RUNS: AtomicU64 = AtomicU64::new(1);
        let rate = RUNS.fetch_add(1, Ordering::Relaxed) as f64 * 1e12;
        let tuner = match self.dir {
            Some(dir) => {
                tuner.at(run_dir(dir, self.resume)).roofline(Roofline { flops_per_s: rate, bytes_per_s: rate })
            }
            None => tuner,
        };
        let files = (self.model)();
        let tuner = if self.given { tuner.initial_weights(|id, _| files.read(id)) } else { tuner };
        let summary = tuner.run(&mut recorded);
        (summary, decoder, recorded)
    }
}
