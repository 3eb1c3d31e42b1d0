//! Maps of the planned training step, by gradients and by moved copies, against finite differences and one another.

use crate::robustness::World;
use std::collections::BTreeMap;
use swat::backend::cpu::Cpu;
use swat::data::Example;
use swat::engine::{Batch, GradientOptions, Gradients, NoiseKind};
use swat::error::Result;
use swat::modules::{Cell, ModuleKind, ModuleSet, ParamId};
use swat::secure::{
    By, FirstTokens, Noise, PerturbationScorer, PlannedStep, RobustnessMap, RobustnessOptions, ScoreKind, ScorerInput,
    ScorerOptions, StepOptions, conflict_map, robustness,
};

/// The random model, with first tokens of refusals by which it refuses harmful prompts the more.
fn world() -> World {
    let mut world = crate::robustness::world();
    let first = FirstTokens::learn([(3, false), (9, true), (11, false), (11, true)]);
    world.probe.metadata.first_tokens = first;
    world
}

/// Conversations of random tokens, whose second half is trained.
fn examples() -> Vec<Example> {
    let mut next = crate::common::numbers(8);
    let mut token = || 1 + ((next() + 1.0) * 29.0) as u32;
    let example = |_| Example {
        tokens: (0..12).map(|_| token()).collect(),
        trained: (0..12).map(|i| i >= 6).collect(),
        replayed: false,
    };
    (0..6).map(example).collect()
}

/// One micro-batch of all examples.
fn one_batch() -> StepOptions {
    StepOptions { batch_size: 6, batches: 1, lr: 1e-4, steps: 30, ..StepOptions::default() }
}

fn step(world: &World, options: &StepOptions) -> PlannedStep {
    PlannedStep::new(&world.decoder, examples(), options, &mut |_| {}).unwrap()
}

fn input(world: &World) -> ScorerInput<'_, '_, Cpu> {
    ScorerInput {
        decoder: &world.decoder,
        model_hash: "model",
        probe: &world.probe,
        prompts: &world.tokens,
        labels: &world.prompts,
        control: None,
        kind: NoiseKind::Zero,
    }
}

fn scorer_options() -> ScorerOptions {
    ScorerOptions { batch_tokens: 60, ..ScorerOptions::default() }
}

fn by(by: By, epsilon: Option<f32>) -> RobustnessOptions {
    RobustnessOptions { by, epsilon, ..RobustnessOptions::default() }
}

fn conflict(world: &World, epsilon: Option<f32>) -> RobustnessMap {
    let scorer = PerturbationScorer::new(input(world), scorer_options()).unwrap();
    conflict_map(&scorer, &step(world, &one_batch()), &by(By::Conflict, epsilon), None, &mut |_| {}).unwrap()
}

fn update(world: &World, epsilon: Option<f32>) -> Result<RobustnessMap> {
    let options = ScorerOptions { retrain: false, ..scorer_options() };
    let scorer = PerturbationScorer::of_step(input(world), options, step(world, &one_batch()))?;
    robustness(&scorer, &by(By::Update, epsilon), None, &mut |_| {})
}

fn drop_of(map: &RobustnessMap, cell: Cell) -> f64 {
    map.cell(cell).unwrap().drop[&ScoreKind::Refusal].mean
}

#[test]
fn the_gain_is_the_fall_of_the_loss() {
    let mut world = world();
    let map = conflict(&world, None);
    let record = map.step.as_ref().unwrap();
    assert_eq!((record.batches, record.trained_tokens, map.seeds.len(), map.kind.clone()), (1, 36, 1, Noise::Step));
    let batch = Batch::from_examples(&examples());
    let mean = |world: &World| {
        let losses = world.decoder.losses(&batch).unwrap();
        losses.iter().map(|loss| f64::from(*loss)).sum::<f64>() / 36.0
    };
    let mut gradients = Gradients::new(&world.decoder, |_| true).unwrap();
    world.decoder.loss_and_gradients(&batch, &mut gradients, GradientOptions::scaled(1.0 / 36.0)).unwrap();
    let read = |id: ParamId| -> Vec<f32> {
        let buffer = gradients.get(id).unwrap();
        let mut host = vec![0.0; buffer.len()];
        swat::backend::Backend::read(&world.decoder.backend, buffer.view(), &mut host).unwrap();
        host
    };
    let ids: Vec<ParamId> = world.decoder.params().iter().map(|param| param.id).collect();
    let all: BTreeMap<ParamId, Vec<f32>> = ids.iter().map(|id| (*id, read(*id))).collect();
    // Of one micro-batch P g is the sign of g, so that the gain is η ‖g‖₁, with η = 1e-4 · 30.
    for cell in [Cell::module(1, ModuleKind::V), Cell::module(2, ModuleKind::Down), Cell::Embedding, Cell::Norms(0)] {
        let own = || all.iter().filter(|(id, _)| id.cell() == cell);
        let norm: f64 = own().flat_map(|(_, g)| g).map(|g| f64::from(g.abs())).sum();
        let gain = map.cell(cell).unwrap().task_gain.unwrap();
        assert!((gain - 3e-3 * norm).abs() < 1e-3 * gain, "{cell}: {gain}, {}", 3e-3 * norm);
        // The loss falls by as much, on both sides of the model as it is.
        let mut losses = [0.0; 2];
        for (loss, t) in losses.iter_mut().zip([5e-4f32, -5e-4]) {
            for (id, gradient) in own() {
                let before = world.decoder.read(*id).unwrap();
                let moved: Vec<f32> =
                    before.iter().zip(gradient).map(|(w, g)| if *g == 0.0 { *w } else { w - t * g.signum() }).collect();
                world.decoder.write(*id, &moved).unwrap();
            }
            *loss = mean(&world);
            for (id, gradient) in own() {
                let now = world.decoder.read(*id).unwrap();
                let back: Vec<f32> =
                    now.iter().zip(gradient).map(|(w, g)| if *g == 0.0 { *w } else { w + t * g.signum() }).collect();
                world.decoder.write(*id, &back).unwrap();
            }
        }
        let fall = (losses[1] - losses[0]) / 1e-3;
        assert!((fall - norm).abs() < 0.02 * norm, "{cell}: {fall} and {norm}");
    }
}

#[test]
fn the_first_order_is_the_slope_of_the_moved_copies() {
    let world = world();
    let epsilon = 0.01;
    let map = conflict(&world, Some(epsilon));
    assert_eq!((map.by, map.epsilon), (By::Conflict, epsilon));
    // R(ε) = a ε + b ε²: the slope from two steps of the sweep, which computes no gradient.
    let [whole, half] = [epsilon, epsilon / 2.0].map(|epsilon| update(&world, Some(epsilon)).unwrap());
    let largest = map.cells.iter().map(|c| drop_of(&map, c.cell).abs()).fold(0.0, f64::max);
    assert!(largest > 1e-3, "{largest}");
    for cell in map.cells.iter().map(|c| c.cell) {
        let slope = 4.0 * drop_of(&half, cell) - drop_of(&whole, cell);
        let first = drop_of(&map, cell);
        assert!((first - slope).abs() < 0.02 * largest, "{cell}: {first}, by copies {slope}, of {largest}");
        let gains = [&map, &whole].map(|map| map.cell(cell).unwrap().task_gain.unwrap());
        assert!((gains[0] - gains[1]).abs() < 1e-6 * gains[0].abs(), "{cell}: {gains:?}");
    }
    let set: ModuleSet = [Cell::module(0, ModuleKind::Q), Cell::module(2, ModuleKind::Up)].into_iter().collect();
    let sum: f64 = set.iter().map(|cell| drop_of(&map, cell)).sum();
    assert!((map.first_order(&set).unwrap() - sum).abs() < 1e-15);
}

#[test]
fn a_step_has_the_length_of_rate_times_steps() {
    let world = world();
    let map = update(&world, None).unwrap();
    assert_eq!((map.by, map.kind.clone(), map.antithetic, map.seeds.len()), (By::Update, Noise::Step, false, 1));
    assert!(map.epsilon_sweep.is_empty() && map.cells.iter().all(|cell| cell.shift.mean > 0.0));
    // With P g = ±1 nearly everywhere the step of one micro-batch has the length η √n.
    let values: Vec<f32> =
        world.decoder.params().iter().flat_map(|param| world.decoder.read(param.id).unwrap()).collect();
    let norm = values.iter().map(|w| f64::from(*w).powi(2)).sum::<f64>().sqrt();
    let expected = 3e-3 * (values.len() as f64).sqrt() / norm;
    let epsilon = f64::from(map.epsilon);
    assert!(epsilon < 1.001 * expected && epsilon > 0.5 * expected, "{epsilon}, at most {expected}");
    // The same step over again, and one of twice the length.
    assert_eq!(update(&world, None).unwrap().cells, map.cells);
    let twice = update(&world, Some(2.0 * map.epsilon)).unwrap();
    let cell = Cell::module(1, ModuleKind::O);
    let gain = |map: &RobustnessMap| map.cell(cell).unwrap().task_gain.unwrap();
    assert!((gain(&twice) - 2.0 * gain(&map)).abs() < 1e-6 * gain(&twice));
}

#[test]
fn maps_say_how_they_were_made() {
    let world = world();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("map.json");
    let map = conflict(&world, None);
    map.save(&path).unwrap();
    assert_eq!(RobustnessMap::load(&path).unwrap(), map);
    assert_eq!(map.score(ScoreKind::Gap), ScoreKind::Refusal);
    let text = std::fs::read_to_string(&path).unwrap();
    assert!(text.contains("\"conflict\"") && text.contains("\"data_hash\""), "{text}");
    let noise =
        PerturbationScorer::new(input(&world), ScorerOptions { members: 1, retrain: false, ..scorer_options() });
    let options = RobustnessOptions { cells: "layers.0.q_proj".into(), ..by(By::Noise, Some(0.5)) };
    let noise = robustness(&noise.unwrap(), &options, None, &mut |_| {}).unwrap();
    noise.save(&path).unwrap();
    let text = std::fs::read_to_string(&path).unwrap();
    assert!(["\"by\"", "\"step\"", "task_gain"].iter().all(|key| !text.contains(key)), "{text}");
    // Without a loss there is no step.
    let mut silent = examples();
    silent.iter_mut().for_each(|example| example.trained.fill(false));
    let error = PlannedStep::new(&world.decoder, silent, &one_batch(), &mut |_| {}).unwrap_err().to_string();
    assert!(error.contains("--data") && error.contains("no token with a loss"), "{error}");
}
