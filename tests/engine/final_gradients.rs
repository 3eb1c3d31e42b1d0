//! Gradients that a backward pass hands over while it goes on.

use crate::common::{batch, config, decoder};
use std::collections::BTreeMap;
use swat::backend::cpu::Cpu;
use swat::engine::{Batch, Decoder, FinalGradients, GradientOptions, Gradients, buckets};
use swat::modules::{ModuleKind, ParamId};

type Values = BTreeMap<ParamId, Vec<f32>>;

fn values(gradients: &FinalGradients<Cpu>, decoder: &Decoder<Cpu>) -> Values {
    let read = |(id, buffer): &(ParamId, swat::backend::Buffer<Cpu, f32>)| {
        let mut values = vec![0.0; buffer.len()];
        swat::backend::Backend::read(&decoder.backend, buffer.view(), &mut values).unwrap();
        (*id, values)
    };
    gradients.iter().map(read).collect()
}

/// The gradients of two micro-batches, and what was handed over in the second, with the values of that time.
fn handed_over(decoder: &Decoder<Cpu>, trains: fn(ParamId) -> bool, last: &Batch) -> (Values, Vec<Values>) {
    let options = GradientOptions::scaled(0.1);
    let more = GradientOptions { accumulate: true, ..options };
    let first = batch(&decoder.config, &[5, 9], 1);
    let mut expected = Gradients::new(decoder, trains).unwrap();
    decoder.loss_and_gradients(&first, &mut expected, options).unwrap();
    decoder.loss_and_gradients(last, &mut expected, more).unwrap();

    let mut gradients = Gradients::new(decoder, trains).unwrap();
    decoder.loss_and_gradients(&first, &mut gradients, options).unwrap();
    let (mut taken, mut calls) = (Vec::new(), Vec::new());
    let mut losses = decoder.losses_of(last.trained_tokens()).unwrap();
    let mut finished = |gradients: FinalGradients<Cpu>| {
        calls.push(values(&gradients, decoder));
        taken.extend(gradients);
        Ok(())
    };
    decoder.queue_last_gradients(last, &mut gradients, more, &mut losses, &mut finished).unwrap();
    assert_eq!(gradients.iter().count(), 0, "all were handed over");
    taken.into_iter().for_each(|(id, buffer)| gradients.put_back(id, buffer));
    assert_eq!(gradients.iter().count(), expected.iter().count());
    (values(&expected.take(|_| true), decoder), calls)
}

#[test]
fn what_is_handed_over_is_final_and_in_the_order_of_buckets() {
    for tied in [false, true] {
        let decoder = decoder(config(3, tied, true, true), 3);
        let last = batch(&decoder.config, &[11, 4], 2);
        let (expected, calls) = handed_over(&decoder, |_| true, &last);
        let found: Values = calls.iter().flatten().map(|(id, values)| (*id, values.clone())).collect();
        assert!(found == expected, "tied: {tied}");
        let stages: Vec<Vec<ParamId>> = calls.iter().map(|call| call.keys().copied().collect()).collect();
        assert_eq!(stages[0].contains(&ParamId::Head), !tied);
        assert!(stages[0].contains(&ParamId::FinalNorm) && !stages[0].contains(&ParamId::Embedding));
        for (stage, layer) in stages[1..4].iter().zip([2, 1, 0]) {
            assert!(stage.len() > 10 && stage.iter().all(|id| id.layer() == Some(layer)), "{stage:?}");
        }
        assert_eq!(stages[4..], [[ParamId::Embedding]]);
        let in_order: Vec<ParamId> = stages.concat();
        let sizes = expected.iter().map(|(id, values)| (*id, values.len() * size_of::<f32>()));
        assert_eq!(buckets(sizes.clone(), 1000).concat(), in_order);
        assert!(buckets(sizes, 1000).len() > 5);
    }
}

#[test]
fn a_pass_that_ends_early_hands_over_all() {
    let decoder = decoder(config(3, false, false, false), 3);
    let o_of_two = |id: ParamId| {
        matches!(id, ParamId::Weight(module) if module.layer == 1 && module.kind == ModuleKind::O)
            || id == ParamId::Head
    };
    let (expected, calls) = handed_over(&decoder, o_of_two, &batch(&decoder.config, &[6, 7], 2));
    let found: Vec<ParamId> = calls.iter().flat_map(Values::keys).copied().collect();
    assert_eq!((found.len(), found[0]), (2, ParamId::Head));
    assert_eq!(calls.into_iter().flatten().collect::<Values>(), expected);
    // Without a target nothing is added.
    let mut none = batch(&decoder.config, &[6, 7], 2);
    none.targets.fill(swat::backend::IGNORE);
    let (expected, calls) = handed_over(&decoder, o_of_two, &none);
    assert_eq!(calls.into_iter().flatten().collect::<Values>(), expected);
}
