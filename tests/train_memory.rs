//! `swat plan` against measured memory: the peak resident set of a process that trains, minus that of a process that
//! trains a model of 24 × 2. Each case is a process of its own, because the peak never falls.
#![cfg(target_os = "linux")]

mod common;

use swat::backend::cpu::Cpu;
use swat::backend::{Backend, Bf16State, F32State};
use swat::data::{Example, Loader};
use swat::engine::{Beside, Decoder, Lora, Plan, Workload};
use swat::model::ModelConfig;
use swat::modules::{Cell, LearningRates, ModuleSet, ParamId};
use swat::train::{Phase, PhaseOptions, RunDir, TuneOptions, Tuner, peak_bytes};

const CASE: &str = "SWAT_TEST_MEMORY_CASE";
const DOCUMENT: usize = 128;
const DOCUMENTS: usize = 4;

/// What is trained, and how.
#[derive(Clone, Copy, Debug)]
struct Case {
    name: &'static str,
    /// `all`, or a set.
    mods: &'static str,
    lora: bool,
    grad_accum: usize,
    recompute: bool,
    precision: Precision,
}

/// Precision of weights and activations, and of gradients and moments.
#[derive(Clone, Copy, Debug)]
enum Precision {
    F32,
    F32State,
    Bf16State,
}

const FULL: Case =
    Case { name: "full", mods: "all", lora: false, grad_accum: 1, recompute: false, precision: Precision::F32 };
const CASES: [Case; 9] = [
    FULL,
    Case { name: "masked", mods: "layers.6-11.{q_proj,k_proj,v_proj,o_proj}", ..FULL },
    Case { name: "lora", mods: "layers.0-11.{q_proj,k_proj,v_proj,o_proj}", lora: true, ..FULL },
    Case { name: "accumulation", grad_accum: 3, ..FULL },
    Case { name: "recompute", recompute: true, ..FULL },
    Case { name: "masked, recompute", mods: "layers.9-11.{down_proj}", recompute: true, ..FULL },
    Case { name: "bf16", precision: Precision::F32State, ..FULL },
    Case { name: "bf16 state", precision: Precision::Bf16State, ..FULL },
    Case { name: "bf16 state, recompute", precision: Precision::Bf16State, recompute: true, ..FULL },
];

/// 10 million parameters: a step needs some hundred megabytes, against which a process's own memory is negligible.
fn config() -> ModelConfig {
    ModelConfig {
        vocab: 2048,
        hidden: 256,
        ffn: 704,
        heads: 4,
        kv_heads: 2,
        head_dim: 64,
        max_positions: DOCUMENT,
        ..common::config(12, true, false, false)
    }
}

fn weights(id: ParamId, shape: &[usize]) -> Vec<f32> {
    let mut next = common::numbers(id.to_string().bytes().map(u64::from).sum());
    let centre = if shape.len() == 1 { 1.0 } else { 0.0 };
    (0..shape.iter().product::<usize>()).map(|_| centre + 0.05 * next()).collect()
}

fn plan(case: Case) -> Plan {
    let config = config();
    let set = ModuleSet::parse(case.mods, &config.cells()).unwrap();
    let work = Workload {
        tokens: DOCUMENTS * DOCUMENT,
        document_tokens: DOCUMENT,
        trained_share: 1.0,
        recompute: case.recompute,
        lora: case.lora.then(Lora::default),
        beside: Beside::default(),
    };
    let trains = |id| {
        let adapter = matches!(id, ParamId::LoraA(_) | ParamId::LoraB(_));
        adapter == case.lora && set.contains(id.cell())
    };
    match case.precision {
        Precision::F32 => Plan::new::<Cpu>(&config, &work, trains),
        Precision::F32State => Plan::new::<Cpu<F32State>>(&config, &work, trains),
        Precision::Bf16State => Plan::new::<Cpu<Bf16State>>(&config, &work, trains),
    }
}

/// Trains two steps, each followed by a checkpoint, and measures how far the weights moved.
fn train<B: Backend>(backend: B, config: ModelConfig, case: Case) {
    let dir = tempfile::tempdir().unwrap();
    let set = ModuleSet::parse(case.mods, &config.cells()).unwrap();
    let mut decoder = Decoder::new(backend, config, |id, shape| Ok(weights(id, shape))).unwrap();
    if case.lora {
        decoder.add_lora(&set, Lora::default(), 1).unwrap();
    }
    let mut next = common::numbers(4);
    let example = |_| {
        let tokens = (0..DOCUMENT).map(|_| ((next() + 1.0) * 1000.0) as u32).collect();
        Example { tokens, trained: vec![true; DOCUMENT], replayed: false }
    };
    let examples = (0..DOCUMENTS * case.grad_accum).map(example).collect::<Vec<_>>();
    let options = TuneOptions {
        batch_size: DOCUMENTS,
        grad_accum: case.grad_accum,
        recompute: case.recompute,
        save_every: 1,
        ..TuneOptions::default()
    };
    let phase = Phase {
        name: "all".into(),
        rates: LearningRates::masked(&set, &set, 0.0),
        options: PhaseOptions { steps: Some(2), ..PhaseOptions::default() },
    };
    let place = RunDir { dir: dir.path().into(), model: "m".into(), data: "d".into(), resume: false };
    let mut loader = Loader::new(examples, options.loader()).unwrap();
    let tuner = Tuner::new(&mut decoder, &mut loader, options, vec![phase]).unwrap();
    let summary =
        tuner.measure_updates().initial_weights(|id, shape| Ok(weights(id, shape))).at(place).run(&mut ()).unwrap();
    let moved = |cell: &Cell| summary.updates.phases[0].cells[cell].delta_norm > 0.0;
    assert!(set.iter().all(|cell| moved(&cell)), "everything of the set trains");
}

/// The body of the child processes below; does nothing otherwise.
#[test]
fn child_process() {
    let Ok(name) = std::env::var(CASE) else { return };
    match CASES.into_iter().find(|case| case.name == name) {
        Some(case) => match case.precision {
            Precision::F32 => train(Cpu::new(), config(), case),
            Precision::F32State => train(Cpu::<F32State>::default(), config(), case),
            Precision::Bf16State => train(Cpu::<Bf16State>::default(), config(), case),
        },
        None => {
            let config = ModelConfig { vocab: 2048, max_positions: DOCUMENT, ..common::config(2, true, false, false) };
            train(Cpu::new(), config, FULL)
        }
    }
    eprintln!("measured {}", peak_bytes());
}

fn measured(case: &str) -> f64 {
    let output = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "child_process", "--nocapture"])
        .env(CASE, case)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{case}: {text}");
    let bytes = text.lines().find_map(|line| line.strip_prefix("measured ")).expect("a line that says so");
    bytes.parse().unwrap()
}

#[test]
fn planned_memory_is_what_a_run_uses() {
    let base = measured("base");
    for case in CASES {
        let measured = measured(case.name) - base;
        let plan = plan(case);
        let ratio = plan.total_bytes() as f64 / measured;
        eprintln!("{:<18} planned / measured = {ratio:.3} ({:.1} MB)", case.name, measured / 1e6);
        assert!((0.9..=1.1).contains(&ratio), "{}: {ratio:.3} of {measured}; {plan:?}", case.name);
    }
}
