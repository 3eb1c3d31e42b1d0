//! Runs of the tuner on a tiny random model: what trains, what does not, and the same bytes after any interruption.

use crate::common;
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use swat::backend::Roofline;
use swat::backend::cpu::Cpu;
use swat::data::{Example, Loader};
use swat::engine::{Decoder, Lora, Plan};
use swat::error::{Error, Result};
use swat::modules::{Cell, LearningRates, ModuleKind, ModuleSet, ParamId, Rate};
use swat::train::{
    Callbacks, Phase, PhaseOptions, RunDir, RunPosition, Schedule, StepMetrics, TuneOptions, TuneSummary, Tuner,
    Updates,
};

fn model() -> Decoder<Cpu> {
    common::decoder(common::config(2, true, true, false), 7)
}

/// Random examples; the first third of each is the prompt.
fn examples(count: usize) -> Vec<Example> {
    let mut next = common::numbers(99);
    (0..count)
        .map(|i| {
            let len = 5 + i % 7;
            let tokens = (0..len).map(|_| ((next() + 1.0) * 30.0) as u32).collect();
            Example { tokens, trained: (0..len).map(|t| t >= len / 3).collect() }
        })
        .collect()
}

fn options() -> TuneOptions {
    TuneOptions { batch_size: 2, max_length: 32, save_every: 3, seed: 5, ..TuneOptions::default() }
}

/// Phase 1 on the V and O projections, phase 2 on everything.
fn two_phases(first: u64, second: u64) -> Vec<Phase> {
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

fn place(dir: &Path, resume: bool) -> RunDir {
    RunDir { dir: dir.into(), model: "m".into(), data: "d".into(), resume }
}

/// Remembers what it hears, and fails at a step.
#[derive(Default)]
struct Ear {
    stop_at: Option<u64>,
    notes: Vec<String>,
    /// What each phase takes, in bytes.
    plans: Vec<(String, u64)>,
    steps: Vec<StepMetrics>,
    epochs: Vec<u64>,
    phases: Vec<String>,
    /// All weights at the end of each epoch.
    weights: Vec<BTreeMap<ParamId, Vec<f32>>>,
}

impl Callbacks<Cpu> for Ear {
    fn note(&mut self, text: &str) {
        self.notes.push(text.into());
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

fn weights(decoder: &Decoder<Cpu>) -> BTreeMap<ParamId, Vec<f32>> {
    decoder.params().iter().map(|p| (p.id, decoder.read(p.id).unwrap())).collect()
}

fn bits(decoder: &Decoder<Cpu>) -> BTreeMap<ParamId, Vec<u32>> {
    weights(decoder).into_iter().map(|(id, w)| (id, w.into_iter().map(f32::to_bits).collect())).collect()
}

/// Lines of the log without what depends on the clock and the process.
fn lines(dir: &Path) -> Vec<Value> {
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

/// One process: a fresh model, a fresh loader, the run until its end or until `stop_at`.
struct Process<'a> {
    dir: Option<&'a Path>,
    resume: bool,
    options: TuneOptions,
    phases: Vec<Phase>,
    examples: Vec<Example>,
    model: fn() -> Decoder<Cpu>,
    /// The weights before the run can be read again.
    given: bool,
    stop_at: Option<u64>,
}

impl<'a> Process<'a> {
    fn new(dir: Option<&'a Path>) -> Self {
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

    fn run(self) -> (Result<TuneSummary>, Decoder<Cpu>, Ear) {
        let mut decoder = (self.model)();
        let mut loader = Loader::new(self.examples, self.options.loader()).unwrap();
        let mut ear = Ear { stop_at: self.stop_at, ..Ear::default() };
        let tuner = Tuner::new(&mut decoder, &mut loader, self.options, self.phases).unwrap().measure_updates();
        // What a process finds the machine to be capable of has no part in what it computes.
        static PROCESSES: AtomicU64 = AtomicU64::new(1);
        let rate = PROCESSES.fetch_add(1, Ordering::Relaxed) as f64 * 1e12;
        let tuner = match self.dir {
            Some(dir) => tuner.at(place(dir, self.resume)).roofline(Roofline { flops_per_s: rate, bytes_per_s: rate }),
            None => tuner,
        };
        let files = (self.model)();
        let tuner = if self.given { tuner.initial_weights(|id, _| files.read(id)) } else { tuner };
        let summary = tuner.run(&mut ear);
        (summary, decoder, ear)
    }
}

#[test]
fn frozen_tensors_stay_bit_identical_and_the_loss_falls() {
    let before = bits(&model());
    let phases = vec![two_phases(30, 0).remove(0)];
    let (summary, decoder, ear) = Process { phases: phases.clone(), ..Process::new(None) }.run();
    let summary = summary.unwrap();
    assert!(ear.steps.iter().all(|step| step.speed_of_light.is_none()), "nobody measured the ceilings");
    assert!(
        summary.planned_bytes > 1 << 12 && ear.plans == [("mods".to_string(), summary.planned_bytes)],
        "{summary:?}"
    );
    for (id, after) in bits(&decoder) {
        assert_eq!(after != before[&id], phases[0].rates.trains(id.cell()), "{id}");
    }
    let first = &summary.phases[0];
    assert_eq!((first.steps, first.skipped_empty, first.skipped_non_finite), (30, 0, 0));
    assert!(first.last_loss.unwrap() < 0.85 * first.first_loss.unwrap(), "{first:?}");
    assert_eq!(ear.epochs, (1..=7).collect::<Vec<_>>(), "8 examples, 2 a step: an epoch every 4 steps");
    let cells = &summary.updates.phases[0].cells;
    for (cell, update) in cells {
        assert_eq!(update.delta_norm > 0.0, phases[0].rates.trains(*cell), "{cell}");
        assert!(update.weight_norm > 0.0, "{cell}");
    }
    assert_eq!(cells.len(), decoder.config.cells().len());
}

#[test]
fn any_interruption_leaves_the_same_bytes() {
    let straight_dir = tempfile::tempdir().unwrap();
    let (straight, expected, heard) = Process::new(Some(straight_dir.path())).run();
    let straight = straight.unwrap();
    assert_eq!(heard.phases, ["mods", "all"]);
    assert!(heard.steps.iter().all(|step| step.speed_of_light.is_some_and(|share| share > 0.0 && share < 1.0)));
    assert_eq!(lines(straight_dir.path()).len(), 15);
    let (unsaved, other, _) = Process::new(None).run();
    assert_eq!(bits(&other), bits(&expected), "saving changes nothing");
    assert_eq!(unsaved.unwrap().updates, straight.updates);

    for stop in 1..=15 {
        let dir = tempfile::tempdir().unwrap();
        let (stopped, ..) = Process { stop_at: Some(stop), ..Process::new(Some(dir.path())) }.run();
        assert!(stopped.is_err());
        let (resumed, decoder, ear) = Process { given: stop % 2 == 0, ..Process::new(Some(dir.path())) }.run();
        let resumed = resumed.unwrap();
        // Checkpoints: every 3 steps, and after step 7, where the phase ends; the hook fails before the step is saved.
        let saved = [0, 3, 6, 7, 9, 12].into_iter().filter(|step| *step < stop).max().unwrap();
        assert_eq!(resumed.resumed_from.unwrap_or(0), saved, "stopped at {stop}");
        assert_eq!(ear.steps.first().unwrap().step, saved + 1);
        assert_eq!(bits(&decoder), bits(&expected), "stopped at {stop}");
        assert_eq!(lines(dir.path()), lines(straight_dir.path()), "stopped at {stop}");
        assert_eq!(resumed.updates, straight.updates, "stopped at {stop}");
        let file: Updates = serde_json::from_slice(&std::fs::read(dir.path().join("updates.json")).unwrap()).unwrap();
        assert_eq!(file.phases.len(), 2);
        for name in ["weights.safetensors", "moments.safetensors"] {
            let bytes = |dir: &Path| std::fs::read(dir.join("checkpoints/step-00000012").join(name)).unwrap();
            assert!(bytes(dir.path()) == bytes(straight_dir.path()), "{name}, stopped at {stop}");
            assert!(bytes(dir.path()).len() > 1000);
        }
    }

    // A run that is over is only loaded.
    let (again, decoder, ear) = Process::new(Some(straight_dir.path())).run();
    assert_eq!(again.unwrap().resumed_from, Some(15));
    assert!(ear.steps.is_empty());
    assert_eq!(bits(&decoder), bits(&expected));
    assert_eq!(lines(straight_dir.path()).len(), 15);
}

/// The copy that is held, the checkpoint at a phase's start and the files of the model tell the same.
#[test]
fn updates_are_measured_against_the_start_of_each_phase() {
    fn adapted() -> Decoder<Cpu> {
        let mut decoder = model();
        let cells = decoder.config.cells();
        decoder.add_lora(&cells, Lora { rank: 2, alpha: 4.0 }, 3).unwrap();
        decoder
    }
    let mut three = two_phases(3, 4);
    // Another half, so that the last phase meets what trained once, twice and never before.
    let all = model().config.cells();
    let q: ModuleSet = all.iter().filter(|c| matches!(c, Cell::Module(m) if m.kind == ModuleKind::Q)).collect();
    three.insert(1, Phase { name: "q".into(), rates: LearningRates::masked(&q, &all, 0.0), ..three[0].clone() });
    for (model, name) in [(model as fn() -> Decoder<Cpu>, "full"), (adapted, "adapters")] {
        let run = |dir: Option<&Path>, given, stop_at| {
            let process = Process { phases: three.clone(), model, given, stop_at, ..Process::new(dir) };
            process.run().0.map(|summary| summary.updates)
        };
        let held = run(None, false, None).unwrap();
        assert!(held.phases[1].cells[&Cell::module(1, ModuleKind::Q)].delta_norm > 0.0);
        assert_eq!(held.phases[1].cells[&Cell::module(1, ModuleKind::V)].delta_norm, 0.0);
        assert_eq!(run(None, true, None).unwrap(), held, "{name}");
        for given in [false, true] {
            let dir = tempfile::tempdir().unwrap();
            assert_eq!(run(Some(dir.path()), given, None).unwrap(), held, "{name}, given: {given}");
            for stop in [4, 8, 10] {
                let dir = tempfile::tempdir().unwrap();
                assert!(run(Some(dir.path()), given, Some(stop)).is_err());
                assert_eq!(run(Some(dir.path()), given, None).unwrap(), held, "{name}, given: {given}, after {stop}");
            }
        }
    }
}

#[test]
fn accumulation_and_moments_and_means_survive_interruptions() {
    fn with(dir: Option<&Path>, stop_at: Option<u64>) -> Process<'_> {
        let options =
            TuneOptions { batch_size: 1, grad_accum: 3, keep_optimizer: true, ema_decay: Some(0.9), ..options() };
        Process { options, stop_at, ..Process::new(dir) }
    }
    let (_, expected, _) = with(None, None).run();
    for stop in [2, 5, 7, 8, 11, 14] {
        let dir = tempfile::tempdir().unwrap();
        assert!(with(Some(dir.path()), Some(stop)).run().0.is_err());
        let (resumed, decoder, _) = with(Some(dir.path()), None).run();
        resumed.unwrap();
        assert_eq!(bits(&decoder), bits(&expected), "stopped at {stop}");
    }
}

#[test]
fn a_damaged_checkpoint_is_passed_over() {
    let dir = tempfile::tempdir().unwrap();
    let (_, expected, _) = Process::new(None).run();
    assert!(Process { stop_at: Some(14), ..Process::new(Some(dir.path())) }.run().0.is_err());
    let file = dir.path().join("checkpoints/step-00000012/moments.safetensors");
    let bytes = std::fs::read(&file).unwrap();
    std::fs::write(&file, &bytes[..bytes.len() - 1]).unwrap();
    let (resumed, decoder, ear) = Process::new(Some(dir.path())).run();
    assert_eq!(resumed.unwrap().resumed_from, Some(9));
    assert!(ear.notes[0].contains("step 12") && ear.notes[0].contains("moments"), "{:?}", ear.notes);
    assert_eq!(bits(&decoder), bits(&expected));
    assert_eq!(lines(dir.path()).len(), 15);
}

#[test]
fn a_lost_phase_start_costs_the_measurement_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let (_, expected, _) = Process::new(None).run();
    assert!(Process { stop_at: Some(14), ..Process::new(Some(dir.path())) }.run().0.is_err());
    std::fs::remove_file(dir.path().join("checkpoints/step-00000007/weights.safetensors")).unwrap();
    let (resumed, decoder, ear) = Process::new(Some(dir.path())).run();
    assert_eq!(resumed.unwrap().updates.phases.len(), 1);
    assert!(ear.notes.iter().any(|note| note.contains("not measured")), "{:?}", ear.notes);
    assert_eq!(bits(&decoder), bits(&expected));
}

#[test]
fn another_run_is_refused_by_what_differs() {
    let dir = tempfile::tempdir().unwrap();
    assert!(Process { stop_at: Some(5), ..Process::new(Some(dir.path())) }.run().0.is_err());
    let refusal = |process: Process| {
        let error = process.run().0.unwrap_err();
        assert_eq!(error.exit_code(), 2);
        error.to_string()
    };
    let seed = TuneOptions { seed: 6, ..options() };
    let text = refusal(Process { options: seed, ..Process::new(Some(dir.path())) });
    assert!(text.contains("options.seed is 5 in the checkpoint and 6 in this run"), "{text}");
    let text = refusal(Process { phases: two_phases(7, 9), ..Process::new(Some(dir.path())) });
    assert!(text.contains("phases.1.options.steps is 8 in the checkpoint and 9 in this run"), "{text}");
    let text = refusal(Process { examples: examples(12), ..Process::new(Some(dir.path())) });
    assert!(text.contains("batches_per_epoch is 4 in the checkpoint and 6 in this run"), "{text}");
    // What changes no bit may change.
    let free = TuneOptions { save_every: 1, keep_last: 1, recompute: true, ..options() };
    let (resumed, decoder, _) = Process { options: free, ..Process::new(Some(dir.path())) }.run();
    resumed.unwrap();
    assert_eq!(bits(&decoder), bits(&Process::new(None).run().1));
}

#[test]
fn without_resume_an_old_run_is_gone() {
    let dir = tempfile::tempdir().unwrap();
    assert!(Process { stop_at: Some(14), ..Process::new(Some(dir.path())) }.run().0.is_err());
    assert!(Process { resume: false, stop_at: Some(4), ..Process::new(Some(dir.path())) }.run().0.is_err());
    assert_eq!(lines(dir.path()).len(), 4);
    let (resumed, ..) = Process::new(Some(dir.path())).run();
    assert_eq!(resumed.unwrap().resumed_from, Some(3));
}

#[test]
fn four_micro_batches_of_one_are_one_of_four() {
    let run = |batch_size, grad_accum| {
        let options = TuneOptions { batch_size, grad_accum, ..options() };
        let phases = vec![two_phases(0, 6).remove(1)];
        let (summary, decoder, ear) = Process { options, phases, examples: examples(10), ..Process::new(None) }.run();
        summary.unwrap();
        (decoder, ear)
    };
    let (one, ear_one) = run(4, 1);
    let (four, ear_four) = run(1, 4);
    // 10 examples: groups of 4, 4 and 2.
    assert_eq!(ear_one.epochs, ear_four.epochs);
    for (a, b) in ear_one.steps.iter().zip(&ear_four.steps) {
        assert_eq!((a.trained_tokens, a.tokens), (b.trained_tokens, b.tokens));
        let close = |a: Option<f64>, b: Option<f64>| (a.unwrap() / b.unwrap() - 1.0).abs() < 1e-4;
        assert!(close(a.loss, b.loss) && close(a.grad_norm, b.grad_norm), "{a:?} {b:?}");
    }
    let start = weights(&model());
    let (mut apart, mut moved) = (0.0, 0.0);
    for (id, a) in weights(&one) {
        for ((a, b), w) in a.iter().zip(four.read(id).unwrap()).zip(&start[&id]) {
            apart += f64::from(a - b).powi(2);
            moved += f64::from(a - w).powi(2);
        }
    }
    assert!(apart.sqrt() < 1e-3 * moved.sqrt(), "{apart} of {moved}");
}

#[test]
fn a_poisoned_model_is_named_and_left_as_it_is() {
    fn poisoned() -> Decoder<Cpu> {
        let mut decoder = model();
        let id =
            decoder.params().iter().map(|p| p.id).find(|id| id.to_string().contains("1.self_attn.q_proj")).unwrap();
        let mut values = decoder.read(id).unwrap();
        values[3] = f32::NAN;
        decoder.write(id, &values).unwrap();
        decoder
    }
    let dir = tempfile::tempdir().unwrap();
    let phases = two_phases(40, 0);
    let (result, decoder, ear) = Process { phases, model: poisoned, ..Process::new(Some(dir.path())) }.run();
    let text = result.unwrap_err().to_string();
    assert!(text.contains("20 steps in a row") && text.contains("layers.0.v_proj"), "{text}");
    assert_eq!(ear.steps.len(), 20);
    assert!(ear.steps.iter().all(|s| s.grad_norm.is_none() && s.skipped.is_some()));
    assert_eq!(lines(dir.path())[0]["loss"], Value::Null);
    assert_eq!(bits(&decoder), bits(&poisoned()));
}

#[test]
fn batches_without_an_answer_are_counted() {
    let mut examples = examples(6);
    for example in &mut examples[2..4] {
        example.trained.fill(false);
    }
    let phases = vec![Phase {
        options: PhaseOptions { epochs: Some(2), ..PhaseOptions::default() },
        ..two_phases(0, 1).remove(1)
    }];
    let unshuffled = TuneOptions { shuffle: false, ..options() };
    let (summary, _, ear) = Process {
        examples: examples.clone(),
        phases: phases.clone(),
        options: unshuffled.clone(),
        ..Process::new(None)
    }
    .run();
    let summary = summary.unwrap();
    assert_eq!((summary.phases[0].steps, summary.phases[0].skipped_empty), (6, 2));
    assert_eq!(ear.steps[1].skipped.as_deref(), Some("no trained tokens"));
    assert_eq!(ear.steps[1].loss, None);

    examples.iter_mut().for_each(|example| example.trained.fill(false));
    let (none, ..) = Process { examples, phases, options: unshuffled, ..Process::new(None) }.run();
    assert!(none.unwrap_err().to_string().contains("without trained tokens"));
}

#[test]
fn adapters_train_alone_and_resume() {
    fn adapted() -> Decoder<Cpu> {
        let mut decoder = model();
        let cells = decoder.config.cells();
        decoder.add_lora(&cells, Lora { rank: 2, alpha: 4.0 }, 3).unwrap();
        decoder
    }
    let dir = tempfile::tempdir().unwrap();
    let (summary, expected, _) = Process { model: adapted, ..Process::new(None) }.run();
    let summary = summary.unwrap();
    let before = bits(&adapted());
    for (id, after) in bits(&expected) {
        let adapter = matches!(id, ParamId::LoraA(_) | ParamId::LoraB(_));
        assert_eq!(after != before[&id], adapter, "{id}");
    }
    let cells = &summary.updates.phases[1].cells;
    assert!(cells[&Cell::module(1, ModuleKind::Down)].delta_norm > 0.0);
    assert_eq!(cells[&Cell::Embedding].delta_norm, 0.0);

    assert!(Process { model: adapted, stop_at: Some(11), ..Process::new(Some(dir.path())) }.run().0.is_err());
    let (resumed, decoder, _) = Process { model: adapted, ..Process::new(Some(dir.path())) }.run();
    assert_eq!(resumed.unwrap().updates, summary.updates);
    assert_eq!(bits(&decoder), bits(&expected));
}

#[test]
fn the_running_mean_replaces_the_weights_at_the_end() {
    let options = TuneOptions { batch_size: 8, ema_decay: Some(0.75), ..options() };
    let phases = vec![two_phases(0, 5).remove(1)];
    let (_, decoder, ear) = Process { options, phases, ..Process::new(None) }.run();
    assert_eq!(ear.weights.len(), 5, "an epoch a step");
    let mut mean = weights(&model());
    for weights in &ear.weights {
        for (id, values) in weights {
            for (mean, value) in mean.get_mut(id).unwrap().iter_mut().zip(values) {
                *mean = 0.75 * *mean + 0.25 * value;
            }
        }
    }
    assert_eq!(weights(&decoder), mean);
}

#[test]
fn phases_that_cannot_run_are_refused() {
    let mut absent = two_phases(1, 0);
    absent[0].rates.set(Cell::module(9, ModuleKind::Q), Rate { lr: 1.0, weight_decay: 1.0 });
    let mut negative = two_phases(1, 0);
    negative[0].rates.set(Cell::Embedding, Rate { lr: -1.0, weight_decay: 1.0 });
    let mut nothing = two_phases(1, 0);
    nothing[0].rates = LearningRates::default();
    let mut rate = two_phases(1, 0);
    rate[0].options.lr = f64::INFINITY;
    for (phases, part) in [
        (absent, "layers.9.q_proj"),
        (negative, "embed_tokens: lr factor -1"),
        (nothing, "no trained tensor"),
        (rate, "phase mods: lr: found inf"),
    ] {
        let error = Process { phases, ..Process::new(None) }.run().0.unwrap_err();
        assert!(error.to_string().contains(part), "{error}");
        assert_eq!(error.exit_code(), 2);
    }
    let (summary, decoder, _) = Process { phases: two_phases(0, 0), ..Process::new(None) }.run();
    assert_eq!(summary.unwrap().phases.len(), 0);
    assert_eq!(bits(&decoder), bits(&model()));
}

#[test]
fn the_schedule_is_in_the_log() {
    let mut phases = two_phases(4, 0);
    phases[0].options = PhaseOptions {
        lr: 1e-3,
        schedule: Schedule::Linear,
        lr_warmup_steps: 2,
        steps: Some(4),
        ..PhaseOptions::default()
    };
    let (_, _, ear) = Process { phases, ..Process::new(None) }.run();
    let rates: Vec<f64> = ear.steps.iter().map(|s| s.lr).collect();
    assert_eq!(rates, [0.5e-3, 1e-3, 1e-3, 0.5e-3]);
}

/// What the killed process below runs; on its own it does nothing.
#[test]
fn child_process() {
    if let Some(dir) = std::env::var_os("SWAT_TEST_TRAIN_DIR") {
        long(Some(Path::new(&dir))).run().0.unwrap();
    }
}

fn long(dir: Option<&Path>) -> Process<'_> {
    let options = TuneOptions { save_every: 2, ..options() };
    Process { options, phases: two_phases(60, 60), ..Process::new(dir) }
}

#[test]
fn killed_processes_are_resumed() {
    let dir = tempfile::tempdir().unwrap();
    let mut kills = 0;
    for milliseconds in (5..).step_by(17) {
        let mut child = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "tuner::child_process"])
            .env("SWAT_TEST_TRAIN_DIR", dir.path())
            .stdout(std::process::Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(std::time::Duration::from_millis(milliseconds));
        if let Some(status) = child.try_wait().unwrap() {
            assert!(status.success());
            break;
        }
        child.kill().unwrap();
        child.wait().unwrap();
        kills += 1;
    }
    assert!(kills > 0);
    let (_, expected, _) = long(None).run();
    let (resumed, decoder, _) = long(Some(dir.path())).run();
    assert_eq!(resumed.unwrap().resumed_from, Some(120));
    assert_eq!(bits(&decoder), bits(&expected));
    let steps: Vec<_> = lines(dir.path()).iter().map(|line| line["step"].as_u64().unwrap()).collect();
    assert_eq!(steps, (1..=120).collect::<Vec<_>>());
}

#[test]
fn phases_go_on_through_the_data() {
    let run = |lengths: &[u64]| {
        let phase = |epochs: &u64| Phase {
            options: PhaseOptions { epochs: Some(*epochs), ..PhaseOptions::default() },
            ..two_phases(0, 1).remove(1)
        };
        let phases = lengths.iter().map(phase).collect();
        let (summary, _, ear) = Process { phases, examples: examples(9), ..Process::new(None) }.run();
        let steps: Vec<u64> = summary.unwrap().phases.iter().map(|phase| phase.steps).collect();
        (steps, ear.epochs, ear.steps.iter().map(|step| (step.tokens, step.trained_tokens)).collect::<Vec<_>>())
    };
    let (steps, epochs, tokens) = run(&[1, 2]);
    assert_eq!((steps, &epochs[..]), (vec![5, 10], &[1, 2, 3][..]));
    assert_eq!(run(&[3]), (vec![15], epochs, tokens));
}

#[test]
fn a_checkpoint_that_stands_outside_the_run_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    assert!(Process { stop_at: Some(5), ..Process::new(Some(dir.path())) }.run().0.is_err());
    let checkpoint = dir.path().join("checkpoints/step-00000003");
    let read =
        |name: &str| -> Value { serde_json::from_slice(&std::fs::read(checkpoint.join(name)).unwrap()).unwrap() };
    let (state, mut manifest) = (read("state.json"), read("manifest.json"));
    for (field, value) in [
        ("/run/phase", 9.into()),
        ("/run/position/batch", 4.into()),
        ("/run/summaries", Value::Array(vec![])),
        ("/run/step", u64::MAX.into()),
        ("/run/phase_step", 4.into()),
        ("/run/phase", Value::Null),
    ] {
        let mut changed = state.clone();
        *changed.pointer_mut(field).unwrap() = value;
        let text = changed.to_string();
        manifest["state.json"]["bytes"] = text.len().into();
        manifest["state.json"]["blake3"] = blake3::hash(text.as_bytes()).to_hex().to_string().into();
        std::fs::write(checkpoint.join("state.json"), text).unwrap();
        std::fs::write(checkpoint.join("manifest.json"), manifest.to_string()).unwrap();
        let error = Process::new(Some(dir.path())).run().0.unwrap_err();
        assert_eq!(error.exit_code(), 2, "{field}: {error}");
        assert!(error.to_string().contains("state.json"), "{field}: {error}");
    }
}
