//! The masked optimizer against plain loops in f64.

use crate::common;
use std::collections::BTreeMap;
use swat::backend::Backend;
use swat::backend::cpu::Cpu;
use swat::engine::{Decoder, GradientOptions, Gradients};
use swat::modules::{Cell, LearningRates, ModuleKind, ParamId, Rate};
use swat::train::{Optimizer, StepOutcome, StepSettings};

const SETTINGS: StepSettings = StepSettings {
    lr: 3e-3,
    weight_decay: 0.2,
    beta1: 0.9,
    beta2: 0.999,
    eps: 1e-8,
    max_grad_norm: Some(0.5),
    seed: 1,
};

fn model() -> Decoder<Cpu> {
    common::decoder(common::config(2, true, true, true), 11)
}

/// V of layer 0, O of layer 1 and the norms of layer 0, each with its own learning rate and decay.
fn some() -> LearningRates {
    let mut rates = LearningRates::default();
    rates.set(Cell::module(0, ModuleKind::V), Rate { lr: 1.0, weight_decay: 1.0 });
    rates.set(Cell::module(1, ModuleKind::O), Rate { lr: 0.25, weight_decay: 0.0 });
    rates.set(Cell::Norms(0), Rate { lr: 2.0, weight_decay: 0.5 });
    rates
}

fn all(decoder: &Decoder<Cpu>) -> LearningRates {
    let cells = decoder.config.cells();
    LearningRates::masked(&cells, &cells, 0.0)
}

/// AdamW with decoupled decay and a clipped global norm (arXiv 1711.05101, algorithm 2), in f64.
#[derive(Default)]
struct Reference {
    weights: BTreeMap<ParamId, Vec<f64>>,
    moments: BTreeMap<ParamId, (Vec<f64>, Vec<f64>, i32)>,
}

impl Reference {
    fn new(decoder: &Decoder<Cpu>) -> Self {
        let wide = |id| decoder.read(id).unwrap().into_iter().map(f64::from).collect();
        Self { weights: decoder.params().iter().map(|p| (p.id, wide(p.id))).collect(), ..Self::default() }
    }

    fn step(&mut self, gradients: &BTreeMap<ParamId, Vec<f32>>, rates: &LearningRates) -> f64 {
        let norm = gradients.values().flatten().map(|g| f64::from(*g).powi(2)).sum::<f64>().sqrt();
        let clip = (f64::from(SETTINGS.max_grad_norm.unwrap()) / (norm + 1e-6)).min(1.0);
        let (b1, b2) = (f64::from(SETTINGS.beta1), f64::from(SETTINGS.beta2));
        for (id, gradient) in gradients {
            let rate = rates.get(id.cell()).unwrap();
            let (lr, decay) = (SETTINGS.lr * f64::from(rate.lr), SETTINGS.weight_decay * f64::from(rate.weight_decay));
            let weights = self.weights.get_mut(id).unwrap();
            let zeros = || vec![0.0; gradient.len()];
            let (m, v, t) = self.moments.entry(*id).or_insert_with(|| (zeros(), zeros(), 0));
            *t += 1;
            for i in 0..gradient.len() {
                let g = clip * f64::from(gradient[i]);
                m[i] = b1 * m[i] + (1.0 - b1) * g;
                v[i] = b2 * v[i] + (1.0 - b2) * g * g;
                let (m_hat, v_hat) = (m[i] / (1.0 - b1.powi(*t)), v[i] / (1.0 - b2.powi(*t)));
                weights[i] -= lr * decay * weights[i];
                weights[i] -= lr * m_hat / (v_hat.sqrt() + f64::from(SETTINGS.eps));
            }
        }
        norm
    }
}

fn gradients_for(decoder: &Decoder<Cpu>, rates: &LearningRates) -> Gradients<Cpu> {
    Gradients::new(decoder, |id| rates.trains(id.cell())).unwrap()
}

fn to_host(decoder: &Decoder<Cpu>, gradients: &Gradients<Cpu>) -> BTreeMap<ParamId, Vec<f32>> {
    use swat::backend::Backend;
    let read = |buffer: &swat::backend::Buffer<Cpu, f32>| {
        let mut host = vec![0f32; buffer.len()];
        decoder.backend.read(buffer.view(), &mut host).unwrap();
        host
    };
    gradients.iter().map(|(id, buffer)| (id, read(buffer))).collect()
}

/// Takes `steps` steps of both; compares gradient norms and, at the end, all weights.
fn assert_steps_agree(
    decoder: &mut Decoder<Cpu>,
    optimizer: &mut Optimizer<Cpu>,
    reference: &mut Reference,
    rates: &LearningRates,
    steps: std::ops::Range<u64>,
) {
    let mut gradients = gradients_for(decoder, rates);
    for seed in steps {
        let batch = common::batch(&decoder.config, &[7, 12, 3], seed);
        let scale = 1.0 / batch.trained_tokens() as f32;
        decoder.loss_and_gradients(&batch, &mut gradients, GradientOptions::scaled(scale)).unwrap();
        let expected = reference.step(&to_host(decoder, &gradients), rates);
        let StepOutcome::Done { grad_norm } = optimizer.step(decoder, &gradients, &SETTINGS).unwrap() else {
            panic!("finite gradients were refused")
        };
        assert!((grad_norm / expected - 1.0).abs() < 1e-5, "{grad_norm} {expected}");
        assert!(grad_norm > 0.5, "the test is about clipping");
    }
    for (id, expected) in &reference.weights {
        for (found, expected) in decoder.read(*id).unwrap().into_iter().zip(expected) {
            assert!((f64::from(found) - expected).abs() < 2e-6 + 2e-6 * expected.abs(), "{id}: {found} {expected}");
        }
    }
}

#[test]
fn ten_masked_steps_equal_plain_loops() {
    let mut decoder = model();
    let before: BTreeMap<_, _> = decoder.params().iter().map(|p| (p.id, decoder.read(p.id).unwrap())).collect();
    let mut reference = Reference::new(&decoder);
    let mut optimizer = Optimizer::new(&decoder, &some(), |_| true).unwrap();
    assert_steps_agree(&mut decoder, &mut optimizer, &mut reference, &some(), 0..10);
    // Frozen tensors have neither moments nor decay.
    for (id, before) in before {
        assert_eq!(decoder.read(id).unwrap() == before, !some().trains(id.cell()), "{id}");
    }
    assert!(optimizer.trained().eq(decoder.params().iter().map(|p| p.id).filter(|id| some().trains(id.cell()))));
}

#[test]
fn carried_moments_keep_their_age_beside_new_ones() {
    let mut decoder = model();
    let mut reference = Reference::new(&decoder);
    let mut optimizer = Optimizer::new(&decoder, &some(), |_| true).unwrap();
    assert_steps_agree(&mut decoder, &mut optimizer, &mut reference, &some(), 0..4);
    let everything = all(&decoder);
    let mut optimizer = optimizer.next_phase(&decoder, &everything, |_| true).unwrap();
    assert_steps_agree(&mut decoder, &mut optimizer, &mut reference, &everything, 4..8);
}

#[test]
fn a_predicate_restricts_what_trains() {
    let decoder = model();
    let weight = |id| matches!(id, ParamId::Weight(_));
    let optimizer = Optimizer::new(&decoder, &some(), weight).unwrap();
    assert_eq!(optimizer.trained().count(), 2);
}

#[test]
fn a_non_finite_gradient_changes_nothing_and_is_named() {
    use swat::backend::Backend;
    let everything = all(&model());
    let run = |poison: Option<f32>| {
        let mut decoder = model();
        let mut optimizer = Optimizer::new(&decoder, &everything, |_| true).unwrap();
        let mut gradients = gradients_for(&decoder, &everything);
        for seed in 0..4 {
            let batch = common::batch(&decoder.config, &[7, 12], seed);
            decoder.loss_and_gradients(&batch, &mut gradients, GradientOptions::scaled(0.1)).unwrap();
            optimizer.step(&mut decoder, &gradients, &SETTINGS).unwrap();
            if let Some(value) = poison.filter(|_| seed == 1) {
                let id = gradients.iter().map(|(id, _)| id).find(|id| id.cell() == Cell::Norms(1)).unwrap();
                let buffer = gradients.get_mut(id).unwrap();
                let mut host = vec![0f32; buffer.len()];
                host[2] = value;
                decoder.backend.write(&host, buffer.view_mut()).unwrap();
                let outcome = optimizer.step(&mut decoder, &gradients, &SETTINGS).unwrap();
                assert_eq!(outcome, StepOutcome::NonFinite { cells: vec![Cell::Norms(1)] });
            }
        }
        decoder.params().iter().map(|p| decoder.read(p.id).unwrap()).collect::<Vec<_>>()
    };
    let expected = run(None);
    // NaN, infinity, and a value whose square is beyond f32.
    for poison in [f32::NAN, f32::NEG_INFINITY, 3e30] {
        assert_eq!(run(Some(poison)), expected);
    }
}

#[test]
fn the_proximal_term_pulls_towards_its_anchor() {
    let mut decoder = model();
    let rates = all(&decoder);
    let mut optimizer = Optimizer::new(&decoder, &rates, |_| true).unwrap();
    let mut gradients = Gradients::new(&decoder, |_| true).unwrap();
    let pull = |optimizer: &Optimizer<Cpu>, decoder: &Decoder<Cpu>, gradients: &mut Gradients<Cpu>| {
        optimizer.add_proximal(decoder, gradients, 0.25).unwrap();
        let buffer = gradients.get(ParamId::FinalNorm).unwrap();
        let mut values = vec![0f32; buffer.len()];
        decoder.backend.read(buffer.view(), &mut values).unwrap();
        values
    };
    let len = decoder.config.hidden;
    assert_eq!(pull(&optimizer, &decoder, &mut gradients), vec![0.0; len], "no anchors yet");
    decoder.write(ParamId::FinalNorm, &vec![1.0; len]).unwrap();
    optimizer.set_anchors(&decoder).unwrap();
    decoder.write(ParamId::FinalNorm, &vec![3.0; len]).unwrap();
    assert_eq!(pull(&optimizer, &decoder, &mut gradients), vec![0.5; len], "0.25 · (3 − 1)");
    assert_eq!(pull(&optimizer, &decoder, &mut gradients), vec![1.0; len], "it is added");
    optimizer.set_anchors(&decoder).unwrap();
    assert_eq!(pull(&optimizer, &decoder, &mut gradients), vec![1.0; len], "anchored anew");
}
