//! Training in bf16 on the CPU beside training in f32.

use crate::common;
use swat::backend::cpu::Cpu;
use swat::backend::{Backend, Bf16State, F32State};
use swat::engine::{Batch, Decoder, GradientOptions, Gradients};
use swat::modules::LearningRates;
use swat::train::{Optimizer, StepOutcome, StepSettings};

const STEPS: u64 = 80;

/// Losses before each step of a run over changing batches, and the mean loss of a held-out batch at its end.
fn run<B: Backend>(backend: &B) -> (Vec<f64>, f64) {
    let config = common::wide(2, 64);
    // Arithmetic sequences: what comes next can be learned from any of them.
    let batch = |seed: u64| {
        let mut batch = common::batch(&config, &[40, 25], seed);
        for document in batch.starts.clone().windows(2) {
            for i in document[0] as usize..document[1] as usize {
                batch.tokens[i] = (batch.tokens[document[0] as usize] + 3 * (i as u32 - document[0])) % 50;
            }
        }
        batch.targets = (0..batch.tokens.len()).map(|i| batch.tokens.get(i + 1).copied().unwrap_or(0)).collect();
        batch
    };
    let mut model: Decoder<B> = common::decoder_on(backend, &config, 3);
    let cells = model.config.cells();
    let rates = LearningRates::masked(&cells, &cells, 0.0);
    let mut optimizer = Optimizer::new(&model, &rates, |_| true).unwrap();
    let mut gradients = Gradients::new(&model, |_| true).unwrap();
    let mean = |model: &Decoder<B>, batch: &Batch| {
        let losses = model.losses(batch).unwrap();
        losses.iter().map(|x| f64::from(*x)).sum::<f64>() / batch.trained_tokens() as f64
    };
    let losses = (0..STEPS).map(|step| {
        let batch = batch(step);
        let scale = 1.0 / batch.trained_tokens() as f32;
        let loss = model.loss_and_gradients(&batch, &mut gradients, GradientOptions::scaled(scale)).unwrap();
        let settings = StepSettings {
            lr: 5e-4,
            weight_decay: 0.0,
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            max_grad_norm: Some(1.0),
            seed: step,
        };
        assert!(matches!(optimizer.step(&mut model, &gradients, &settings).unwrap(), StepOutcome::Done { .. }));
        loss / batch.trained_tokens() as f64
    });
    let losses = losses.collect();
    (losses, mean(&model, &batch(STEPS + 1)))
}

/// The held-out loss falls as far as in f32, to 1 % of that, whichever precision gradients and moments have; so does the mean over
/// the run.
#[test]
fn learns_what_f32_learns() {
    let (exact, held_out) = run(&Cpu::new());
    let mean = |losses: &[f64]| losses.iter().sum::<f64>() / losses.len() as f64;
    assert!(held_out < 0.8 * exact[0], "{held_out} after {}", exact[0]);
    for (name, (losses, found)) in
        [("f32", run(&Cpu::<F32State>::default())), ("bf16", run(&Cpu::<Bf16State>::default()))]
    {
        let (fell, expected) = (losses[0] - found, exact[0] - held_out);
        assert!((fell / expected - 1.0).abs() < 0.01, "{fell} with moments in {name}, {expected} in f32");
        let (found, expected) = (mean(&losses), mean(&exact));
        assert!((found / expected - 1.0).abs() < 0.01, "mean {found} with moments in {name}, {expected} in f32");
    }
}

/// The same bytes with one thread and with two.
#[test]
fn threads_change_nothing() {
    let on = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| run(&Cpu::<Bf16State>::default()))
    };
    assert!(on(1) == on(2));
}
