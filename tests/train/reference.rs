//! The constrained loss and distillation: gradients of a whole model by differences, and what they do in runs.

use crate::common;
use crate::run::{Run, bits, examples, model, options, two_phases};
use std::path::Path;
use swat::backend::IGNORE;
use swat::backend::cpu::Cpu;
use swat::data::Example;
use swat::engine::{Batch, Decoder, GradientOptions, Gradients, TokenTerms};
use swat::modules::ParamId;
use swat::train::TuneOptions;

/// Rows with a loss, and their targets.
fn rows(batch: &Batch) -> (Vec<u32>, Vec<u32>) {
    batch.targets.iter().enumerate().filter(|(_, t)| **t != IGNORE).map(|(i, t)| (i as u32, *t)).unzip()
}

fn log_softmax(logits: &[f32]) -> Vec<f64> {
    let top = logits.iter().copied().fold(f32::MIN, f32::max);
    let total: f64 = logits.iter().map(|x| f64::from(x - top).exp()).sum();
    logits.iter().map(|x| f64::from(x - top) - total.ln()).collect()
}

/// Σ over tokens of −2/β · log σ(β·(log π − log π₀)), or of the cross-entropy where β is 0, and of
/// distil · KL(teacher ‖ π) without the teacher's entropy.
fn full_loss(decoder: &Decoder<Cpu>, batch: &Batch) -> f64 {
    let (rows, targets) = rows(batch);
    let terms = batch.terms.as_ref().unwrap();
    let width = terms.ids.len() / rows.len();
    let logits = decoder.logits(batch, &rows).unwrap();
    let mut sum = 0.0;
    for (i, logits) in logits.chunks(decoder.config.vocab).enumerate() {
        let logs = log_softmax(logits);
        let (own, beta) = (logs[targets[i] as usize], f64::from(terms.beta[i]));
        let drift = own + f64::from(terms.reference[i]);
        sum += if beta == 0.0 { -own } else { 2.0 / beta * (1.0 + (-beta * drift).exp()).ln() };
        let taught = i * width..(i + 1) * width;
        let pairs = terms.ids[taught.clone()].iter().zip(&terms.probs[taught]);
        sum -= f64::from(terms.distil) * pairs.map(|(id, p)| f64::from(*p) * logs[*id as usize]).sum::<f64>();
    }
    sum
}

/// The derivative along a tensor's own gradient is that gradient's norm.
#[test]
fn gradients_of_a_whole_model_are_those_of_the_loss() {
    let mut decoder = model();
    let config = decoder.config.clone();
    let mut batch = common::batch(&config, &[9, 14, 6], 3);
    let tokens = batch.trained_tokens();
    let teacher = common::decoder(config.clone(), 8).likeliest_tokens(&batch, 5).unwrap();
    let mut next = common::numbers(5);
    batch.terms = Some(TokenTerms {
        reference: (0..tokens).map(|_| 4.0 + 2.0 * next()).collect(),
        beta: (0..tokens).map(|i| [0.5, 2.0, 0.1, 0.0][i % 4]).collect(),
        ids: teacher.0,
        probs: teacher.1.iter().enumerate().map(|(i, p)| if (i / 5).is_multiple_of(3) { 0.0 } else { *p }).collect(),
        distil: 0.7,
    });
    let gradients = |decoder: &Decoder<Cpu>, batch: &Batch| {
        let mut gradients = Gradients::new(decoder, |_| true).unwrap();
        let loss = decoder.loss_and_gradients(batch, &mut gradients, GradientOptions::scaled(1.0)).unwrap();
        let values = |id: ParamId| {
            let buffer = gradients.get(id).unwrap();
            let mut values = vec![0f32; buffer.len()];
            swat::backend::Backend::read(&decoder.backend, buffer.view(), &mut values).unwrap();
            values
        };
        (loss, decoder.params().iter().map(|param| (param.id, values(param.id))).collect::<Vec<_>>())
    };
    let (loss, found) = gradients(&decoder, &batch);
    let (plain_loss, plain) = gradients(&decoder, &Batch { terms: None, ..batch.clone() });
    assert_eq!(loss, plain_loss, "what is reported is the cross-entropy");
    for ((id, gradient), (_, plain)) in found.into_iter().zip(plain) {
        let norm = |x: &[f32]| x.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
        let length = norm(&gradient);
        let before = decoder.read(id).unwrap();
        let step = 1e-3 * norm(&before);
        let mut at = |sign: f64| {
            let moved = before.iter().zip(&gradient).map(|(w, g)| w + (sign * step / length * f64::from(*g)) as f32);
            decoder.write(id, &moved.collect::<Vec<_>>()).unwrap();
            full_loss(&decoder, &batch)
        };
        let difference = (at(1.0) - at(-1.0)) / (2.0 * step);
        decoder.write(id, &before).unwrap();
        assert!((difference / length - 1.0).abs() < 5e-3, "{id}: {difference} along a gradient of {length}");
        let apart: Vec<f32> = gradient.iter().zip(&plain).map(|(a, b)| a - b).collect();
        assert!(norm(&apart) > 0.1 * norm(&plain), "{id}: no other than without terms");
    }
}

/// Examples of which some are replayed, one of them twice.
fn mixed() -> Vec<Example> {
    let mut examples = examples(8);
    examples[1].replayed = true;
    examples[4].replayed = true;
    examples[6] = examples[4].clone();
    examples
}

fn run_with(dir: Option<&Path>, constrain: Option<f32>, distil: Option<f32>) -> Run<'_> {
    let options = TuneOptions { constrain, distil, ..options() };
    Run { options, examples: mixed(), ..Run::new(dir) }
}

/// How far the tokens have moved from the model before, by their place in the answer: mean |log π − log π₀|.
fn drift(decoder: &Decoder<Cpu>, places: impl Fn(usize) -> bool) -> f64 {
    let (mut sum, mut count) = (0.0, 0);
    for example in &mixed() {
        let batch = Batch::from_examples([example]);
        let [now, before] = [decoder, &model()].map(|decoder| decoder.losses(&batch).unwrap());
        for (_, row) in rows(&batch).0.into_iter().enumerate().filter(|(place, _)| places(*place)) {
            sum += f64::from(now[row as usize] - before[row as usize]).abs();
            count += 1;
        }
    }
    sum / f64::from(count)
}

#[test]
fn constrained_tokens_move_less() {
    let (summary, plain, recorded) = run_with(None, None, None).run();
    let (constrained_summary, constrained, constrained_steps) = run_with(None, Some(1.0), None).run();
    // Before the first step nothing has moved: all weights are 1, up to the two ways of computing log π.
    assert_eq!(summary.unwrap().phases[0].first_loss, constrained_summary.unwrap().phases[0].first_loss);
    let norm = |steps: &[swat::train::StepMetrics]| steps[0].grad_norm.unwrap();
    let [plain_norm, constrained_norm] = [norm(&recorded.steps), norm(&constrained_steps.steps)];
    assert!((plain_norm / constrained_norm - 1.0).abs() < 1e-4, "{plain_norm} {constrained_norm}");
    // The second to the fifth token of an answer, with the largest β.
    let held = |place| (1..5).contains(&place);
    let (free, tight) = (drift(&plain, held), drift(&constrained, held));
    assert!(tight < 0.8 * free, "{tight} of {free}");
}

#[test]
fn distilled_examples_stay_nearer_to_their_teacher() {
    let (_, plain, _) = run_with(None, None, None).run();
    let (_, distilled, _) = run_with(None, None, Some(20.0)).run();
    let before = model();
    let divergence = |decoder: &Decoder<Cpu>| {
        let replayed: Vec<Example> = mixed().into_iter().filter(|example| example.replayed).collect();
        let batch = Batch::from_examples(&replayed);
        let rows = rows(&batch).0;
        let [now, then] = [decoder, &before].map(|decoder| decoder.logits(&batch, &rows).unwrap());
        let rows = now.chunks(before.config.vocab).zip(then.chunks(before.config.vocab));
        rows.map(|(now, then)| {
            let (now, then) = (log_softmax(now), log_softmax(then));
            now.iter().zip(&then).map(|(now, then)| then.exp() * (then - now)).sum::<f64>()
        })
        .sum::<f64>()
    };
    let (free, near) = (divergence(&plain), divergence(&distilled));
    assert!(near < 0.5 * free, "{near} of {free}");
}

#[test]
fn the_reference_survives_interruptions_and_damage() {
    fn with(dir: Option<&Path>) -> Run<'_> {
        Run { phases: two_phases(3, 4), ..run_with(dir, Some(2.0), Some(0.5)) }
    }
    let (_, expected, _) = with(None).run();
    for stop in [1, 3, 5] {
        let dir = tempfile::tempdir().unwrap();
        assert!(Run { stop_at: Some(stop), ..with(Some(dir.path())) }.run().0.is_err());
        let file = dir.path().join("reference.safetensors");
        let kept = std::fs::read(&file).unwrap();
        let mut damaged = kept.clone();
        *damaged.last_mut().unwrap() ^= 1;
        if stop == 3 {
            std::fs::write(&file, &damaged).unwrap();
        }
        if stop == 5 {
            std::fs::write(&file, &kept[..kept.len() / 2]).unwrap();
        }
        let (resumed, decoder, recorded) = with(Some(dir.path())).run();
        resumed.unwrap();
        assert_eq!(bits(&decoder), bits(&expected), "stopped at {stop}");
        assert_eq!(recorded.notes.iter().any(|note| note.contains("computed again")), stop > 1, "{:?}", recorded.notes);
        assert_eq!(std::fs::read(&file).unwrap(), kept);
    }
    // Another scale, or other marks, are another run.
    let dir = tempfile::tempdir().unwrap();
    assert!(Run { stop_at: Some(5), ..with(Some(dir.path())) }.run().0.is_err());
    let mut changed = with(Some(dir.path()));
    changed.examples[1].replayed = false;
    assert!(changed.run().0.unwrap_err().to_string().contains("replayed"));
    let mut changed = with(Some(dir.path()));
    changed.options.constrain = Some(1.0);
    assert!(changed.run().0.unwrap_err().to_string().contains("constrain"));
}

#[test]
fn distillation_needs_replayed_examples() {
    let (result, ..) = Run { examples: examples(8), ..run_with(None, None, Some(1.0)) }.run();
    assert!(result.unwrap_err().to_string().contains("mix"));
}
