//! Runs of the tuner: what trains and what does not, accumulation, skipped steps, schedules, running means.

use crate::run::{Run, bits, examples, lines, model, options, two_phases, weights};
use serde_json::Value;
use swat::backend::cpu::Cpu;
use swat::engine::Decoder;
use swat::modules::{Cell, LearningRates, ModuleKind, Rate};
use swat::train::{Phase, PhaseOptions, Schedule, TuneOptions};

#[test]
fn frozen_tensors_stay_bit_identical_and_the_loss_falls() {
    let before = bits(&model());
    let phases = vec![two_phases(30, 0).remove(0)];
    let (summary, decoder, recorded) = Run { phases: phases.clone(), ..Run::new(None) }.run();
    let summary = summary.unwrap();
    assert!(recorded.steps.iter().all(|step| step.speed_of_light.is_none()), "nobody measured the ceilings");
    assert!(
        summary.planned_bytes > 1 << 12 && recorded.plans == [("mods".to_string(), summary.planned_bytes)],
        "{summary:?}"
    );
    for (id, after) in bits(&decoder) {
        assert_eq!(after != before[&id], phases[0].rates.trains(id.cell()), "{id}");
    }
    let first = &summary.phases[0];
    assert_eq!((first.steps, first.skipped_empty, first.skipped_non_finite), (30, 0, 0));
    assert!(first.last_loss.unwrap() < 0.85 * first.first_loss.unwrap(), "{first:?}");
    assert_eq!(recorded.epochs, (1..=7).collect::<Vec<_>>(), "8 examples, 2 a step: an epoch every 4 steps");
    let cells = &summary.updates.phases[0].cells;
    for (cell, update) in cells {
        assert_eq!(update.delta_norm > 0.0, phases[0].rates.trains(*cell), "{cell}");
        assert!(update.weight_norm > 0.0, "{cell}");
    }
    assert_eq!(cells.len(), decoder.config.cells().len());
}

#[test]
fn four_micro_batches_of_one_are_one_of_four() {
    let run = |batch_size, grad_accum| {
        let options = TuneOptions { batch_size, grad_accum, ..options() };
        let phases = vec![two_phases(0, 6).remove(1)];
        let (summary, decoder, recorded) = Run { options, phases, examples: examples(10), ..Run::new(None) }.run();
        summary.unwrap();
        (decoder, recorded)
    };
    let (one, recorded_one) = run(4, 1);
    let (four, recorded_four) = run(1, 4);
    // 10 examples: groups of 4, 4 and 2.
    assert_eq!(recorded_one.epochs, recorded_four.epochs);
    for (a, b) in recorded_one.steps.iter().zip(&recorded_four.steps) {
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
    let (result, decoder, recorded) = Run { phases, model: poisoned, ..Run::new(Some(dir.path())) }.run();
    let text = result.unwrap_err().to_string();
    assert!(
        text.contains("10 of 10 steps") && text.contains("lr_warmup_steps") && text.contains("layers.0.v_proj"),
        "{text}"
    );
    assert_eq!(recorded.steps.len(), 10);
    assert!(recorded.steps.iter().all(|s| s.grad_norm.is_none() && s.skipped.is_some()));
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
    let (summary, _, recorded) =
        Run { examples: examples.clone(), phases: phases.clone(), options: unshuffled.clone(), ..Run::new(None) }.run();
    let summary = summary.unwrap();
    assert_eq!((summary.phases[0].steps, summary.phases[0].skipped_empty), (6, 2));
    assert_eq!(recorded.steps[1].skipped.as_deref(), Some("no trained tokens"));
    assert_eq!(recorded.steps[1].loss, None);

    examples.iter_mut().for_each(|example| example.trained.fill(false));
    let (none, ..) = Run { examples, phases, options: unshuffled, ..Run::new(None) }.run();
    assert!(none.unwrap_err().to_string().contains("without trained tokens"));
}

#[test]
fn the_running_mean_replaces_the_weights_at_the_end() {
    let options = TuneOptions { batch_size: 8, ema_decay: Some(0.75), ..options() };
    let phases = vec![two_phases(0, 5).remove(1)];
    let (_, decoder, recorded) = Run { options, phases, ..Run::new(None) }.run();
    assert_eq!(recorded.weights.len(), 5, "an epoch a step");
    let mut mean = weights(&model());
    for weights in &recorded.weights {
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
        let error = Run { phases, ..Run::new(None) }.run().0.unwrap_err();
        assert!(error.to_string().contains(part), "{error}");
        assert_eq!(error.exit_code(), 2);
    }
    let (summary, decoder, _) = Run { phases: two_phases(0, 0), ..Run::new(None) }.run();
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
    let (_, _, recorded) = Run { phases, ..Run::new(None) }.run();
    let rates: Vec<f64> = recorded.steps.iter().map(|s| s.lr).collect();
    assert_eq!(rates, [0.5e-3, 1e-3, 1e-3, 0.5e-3]);
}

#[test]
fn phases_go_on_through_the_data() {
    let run = |lengths: &[u64]| {
        let phase = |epochs: &u64| Phase {
            options: PhaseOptions { epochs: Some(*epochs), ..PhaseOptions::default() },
            ..two_phases(0, 1).remove(1)
        };
        let phases = lengths.iter().map(phase).collect();
        let (summary, _, recorded) = Run { phases, examples: examples(9), ..Run::new(None) }.run();
        let steps: Vec<u64> = summary.unwrap().phases.iter().map(|phase| phase.steps).collect();
        (
            steps,
            recorded.epochs,
            recorded.steps.iter().map(|step| (step.tokens, step.trained_tokens)).collect::<Vec<_>>(),
        )
    };
    let (steps, epochs, tokens) = run(&[1, 2]);
    assert_eq!((steps, &epochs[..]), (vec![5, 10], &[1, 2, 3][..]));
    assert_eq!(run(&[3]), (vec![15], epochs, tokens));
}

/// As `Trainer` of transformers: parameters of norms and biases are in the group without weight decay. AdamW's decay is
/// w ← w − lr·λ·w beside the update.
#[test]
fn norms_and_biases_are_not_decayed_unless_asked() {
    let run = |weight_decay, decay_all| {
        let mut phases = two_phases(0, 1);
        let options = PhaseOptions {
            lr: 1e-2,
            weight_decay,
            decay_all,
            steps: Some(1),
            schedule: Schedule::Constant,
            ..PhaseOptions::default()
        };
        phases[1].options = options;
        let (summary, decoder, _) = Run { phases, ..Run::new(None) }.run();
        summary.unwrap();
        weights(&decoder)
    };
    let (none, matrices, all) = (run(0.0, false), run(0.5, false), run(0.5, true));
    let before = weights(&model());
    let mut vectors = 0;
    for param in model().params() {
        let (none, matrices, all, before) =
            (&none[&param.id], &matrices[&param.id], &all[&param.id], &before[&param.id]);
        let vector = param.shape.len() == 1;
        vectors += usize::from(vector);
        assert_eq!(matrices == none, vector, "{}", param.id);
        for ((none, all), before) in none.iter().zip(all).zip(before) {
            assert!((none - 1e-2 * 0.5 * before - all).abs() < 1e-6, "{}: {none} {all} {before}", param.id);
        }
    }
    assert!(vectors > 4);
}
