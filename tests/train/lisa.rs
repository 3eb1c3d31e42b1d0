//! Lisa's two states, against the same steps taken one by one.

use crate::run::{Run, bits, examples, model, options, two_phases};
use std::path::Path;
use swat::data::{Example, Loader, LoaderOptions};
use swat::engine::{Batch, GradientOptions, Gradients};
use swat::modules::LearningRates;
use swat::train::{Lisa, Optimizer, Phase, StepSettings, TuneOptions};

const RHO: f32 = 0.7;
const STEPS: u64 = 12;

/// Six examples of the task, then three of alignment.
fn both_kinds() -> Vec<Example> {
    let mut all = examples(9);
    all[6..].iter_mut().for_each(|example| example.replayed = true);
    all
}

/// One step on alignment data and two on the task's in turns, without shuffling.
fn lisa() -> TuneOptions {
    TuneOptions { lisa: "1:2".parse().ok(), prox: Some(RHO), shuffle: false, ..options() }
}

/// The phase on everything alone.
fn phases() -> Vec<Phase> {
    two_phases(1, STEPS).split_off(1)
}

fn run(dir: Option<&Path>, stop_at: Option<u64>, options: TuneOptions) -> Run<'_> {
    Run { options, stop_at, phases: phases(), examples: both_kinds(), ..Run::new(dir) }
}

#[test]
fn turns_are_those_taken_by_hand() {
    let (summary, tuned, _) = run(None, None, lisa()).run();
    assert_eq!(summary.unwrap().phases[0].steps, STEPS);
    // Alignment (6, 7), the task (0, 1) and (2, 3), alignment (8, 6), the rest of the task; and so again in the next epoch.
    let epoch: [(bool, &[usize]); 5] =
        [(true, &[6, 7]), (true, &[0, 1]), (false, &[2, 3]), (true, &[8, 6]), (true, &[4, 5])];
    let (mut decoder, all) = (model(), both_kinds());
    let phase = &phases()[0];
    let cells = decoder.config.cells();
    let mut optimizer = Optimizer::new(&decoder, &LearningRates::masked(&cells, &cells, 0.0), |_| true).unwrap();
    optimizer.decay_matrices_only(&decoder);
    let mut gradients = Gradients::new(&decoder, |_| true).unwrap();
    for (step, (switches, indices)) in epoch.iter().cycle().take(STEPS as usize).enumerate() {
        if *switches {
            optimizer.set_anchors(&decoder).unwrap();
        }
        let batch = Batch::from_examples(indices.iter().map(|i| &all[*i]));
        let scale = (1.0 / batch.trained_tokens() as f64) as f32;
        decoder.loss_and_gradients(&batch, &mut gradients, GradientOptions::scaled(scale)).unwrap();
        optimizer.add_proximal(&decoder, &mut gradients, RHO).unwrap();
        let TuneOptions { beta1, beta2, eps, .. } = lisa();
        let settings = StepSettings {
            lr: phase.options.lr * phase.options.schedule.factor(step as u64, STEPS, 0, 0.0),
            weight_decay: phase.options.weight_decay,
            beta1,
            beta2,
            eps,
            max_grad_norm: Some(phase.options.max_grad_norm as f32),
            seed: 0,
        };
        optimizer.step(&mut decoder, &gradients, &settings).unwrap();
    }
    assert_eq!(bits(&tuned), bits(&decoder));
    // Without the proximal term, and without turns, the weights are others.
    for other in [TuneOptions { prox: None, ..lisa() }, TuneOptions { lisa: None, ..lisa() }] {
        assert!(bits(&run(None, None, other).run().1) != bits(&tuned));
    }
}

#[test]
fn a_stopped_run_goes_on_in_its_turn() {
    let shuffled = || TuneOptions { shuffle: true, grad_accum: 2, lisa: "2:1".parse().ok(), ..lisa() };
    let (_, expected, _) = run(None, None, shuffled()).run();
    for stop in [1, 4, 5, 8, 11] {
        let dir = tempfile::tempdir().unwrap();
        assert!(run(Some(dir.path()), Some(stop), shuffled()).run().0.is_err());
        let (resumed, decoder, _) = run(Some(dir.path()), None, shuffled()).run();
        resumed.unwrap();
        assert_eq!(bits(&decoder), bits(&expected), "stopped at {stop}");
    }
}

#[test]
fn packed_rows_are_of_one_kind_and_both_kinds_are_needed() {
    let options = TuneOptions { packing: true, max_length: 24, ..lisa() };
    let mut loader = options.load(both_kinds()).unwrap();
    let batches = loader.batches_per_epoch();
    let mut seen = 0;
    for _ in 0..batches {
        let switches = loader.switches();
        let kinds: Vec<bool> = loader.next_documents().iter().map(|example| example.replayed).collect();
        assert!(kinds.iter().all(|kind| *kind == kinds[0]), "{kinds:?}");
        assert!(switches || !kinds[0], "a step on alignment data begins a turn");
        seen += kinds.iter().filter(|alignment| !**alignment).count();
    }
    assert_eq!((seen, loader.position().epoch), (6, 1));
    let largest = loader.largest_batch();
    assert!(
        (0..3 * batches)
            .all(|_| loader.next_documents().iter().map(|e| e.tokens.len()).sum::<usize>() <= largest.tokens)
    );

    let alone = lisa().load(examples(4)).err().unwrap().to_string();
    assert!(alone.contains("0 examples of alignment data among 4"), "{alone}");
    let named = lisa().check_examples(&examples(4)).unwrap_err().to_string();
    assert!(named.contains("lisa") && named.contains("--mix"), "{named}");
    lisa().check_examples(&both_kinds()).unwrap();
    // Without turns a loader has none.
    let plain = LoaderOptions { batch_size: 2, max_length: 32, packing: false, shuffle: true, seed: 1 };
    assert!(!Loader::new(both_kinds(), plain).unwrap().switches());
    assert_eq!(Lisa { alignment: 3, task: 4 }.to_string(), "3:4");
}
