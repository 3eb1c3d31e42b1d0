//! Prefix deduplication in training, against each document by itself.

use crate::common::{config, decoder, numbers, relative};
use std::collections::BTreeMap;
use swat::backend::cpu::Cpu;
use swat::backend::trace::{self, SpanKind};
use swat::backend::{Backend, IGNORE};
use swat::engine::{Batch, Decoder, GradientOptions, Gradients, Lora};
use swat::model::ModelConfig;
use swat::modules::{Cell, ModuleKind, ModuleSet, ParamId};

type Values = BTreeMap<ParamId, Vec<f32>>;

/// Documents with the same first `shared` tokens; what is behind them is trained.
fn documents(config: &ModelConfig, shared: usize, tails: &[usize]) -> Vec<Batch> {
    let mut next = numbers(5);
    let mut token = || ((next() + 1.0) * 0.5 * (config.vocab - 1) as f32) as u32;
    let prefix: Vec<u32> = (0..shared).map(|_| token()).collect();
    let document = |tail: &usize| {
        let tokens: Vec<u32> = prefix.iter().copied().chain((0..*tail).map(|_| token())).collect();
        let mut batch = Batch::from_prompts([tokens.as_slice()]);
        batch.targets = vec![IGNORE; tokens.len()];
        batch.targets[shared - 1..tokens.len() - 1].copy_from_slice(&tokens[shared..]);
        batch
    };
    tails.iter().map(document).collect()
}

fn together(documents: &[Batch]) -> Batch {
    let mut batch = Batch::from_prompts(documents.iter().map(|document| document.tokens.as_slice()));
    batch.targets = documents.iter().flat_map(|document| document.targets.clone()).collect();
    batch
}

/// Losses and gradients of micro-batches, and how often rows were added up.
fn computed(
    model: &Decoder<Cpu>,
    batches: &[Batch],
    trains: impl Fn(ParamId) -> bool,
    recompute: bool,
) -> (f64, Values, usize) {
    let mut gradients = Gradients::new(model, trains).unwrap();
    let recording = trace::record().expect("no recording runs on this thread");
    let mut loss = 0.0;
    for (i, batch) in batches.iter().enumerate() {
        let options = GradientOptions { recompute, accumulate: i > 0, ..GradientOptions::scaled(0.1) };
        loss += model.loss_and_gradients(batch, &mut gradients, options).unwrap();
    }
    let spans = recording.take();
    let added = spans.iter().filter(|span| span.kind == SpanKind::Op && span.name == "add_rows").count();
    let read = |(id, buffer): (ParamId, &swat::backend::Buffer<Cpu, f32>)| {
        let mut values = vec![0.0; buffer.len()];
        model.backend.read(buffer.view(), &mut values).unwrap();
        (id, values)
    };
    (loss, gradients.iter().map(read).collect(), added)
}

fn compare(model: &Decoder<Cpu>, trains: impl Fn(ParamId) -> bool + Copy, layers: usize) {
    // The last two documents are equal: they share the rows before their first target.
    let mut documents = documents(&model.config, 9, &[6, 3, 8]);
    documents.push(documents[2].clone());
    let batch = together(&documents);
    for recompute in [false, true] {
        let (loss, expected, none) = computed(model, &documents, trains, recompute);
        let (found_loss, found, added) = computed(model, std::slice::from_ref(&batch), trains, recompute);
        assert_eq!((none, added), (0, 2 * layers), "keys and values of each layer");
        assert!((found_loss - loss).abs() < 1e-5 * loss, "{found_loss} {loss}");
        assert_eq!(found.len(), expected.len());
        for (id, gradient) in &found {
            assert!(relative(gradient, &expected[id]) < 2e-5, "{id}: {}", relative(gradient, &expected[id]));
        }
    }
}

#[test]
fn gradients_are_those_of_each_document_by_itself() {
    for (tied, biases, qk_norm) in [(false, false, false), (true, true, false), (false, false, true)] {
        compare(&decoder(config(3, tied, biases, qk_norm), 3), |_| true, 3);
    }
    let mut windowed = config(3, false, false, false);
    windowed.windows = vec![None, Some(4), Some(7)];
    compare(&decoder(windowed, 3), |_| true, 3);
}

#[test]
fn so_are_those_of_few_modules_and_of_an_adapter() {
    let o_and_down = |id: ParamId| matches!(id, ParamId::Weight(module) if module.layer > 0 && matches!(module.kind, ModuleKind::V | ModuleKind::Down));
    compare(&decoder(config(3, false, false, false), 3), o_and_down, 2);
    let mut model = decoder(config(3, true, true, false), 3);
    let set: ModuleSet =
        (0..3).flat_map(|l| [Cell::module(l, ModuleKind::Q), Cell::module(l, ModuleKind::V)]).collect();
    model.add_lora(&set, Lora { rank: 3, alpha: 6.0, ..Lora::default() }, 1).unwrap();
    let mut next = numbers(33);
    let sizes: Vec<(ParamId, usize)> = model.params().iter().map(|p| (p.id, p.values.len())).collect();
    for (id, len) in sizes.into_iter().filter(|(id, _)| matches!(id, ParamId::LoraB(_))) {
        model.write(id, &(0..len).map(|_| 0.3 * next()).collect::<Vec<f32>>()).unwrap();
    }
    compare(&model, |id| matches!(id, ParamId::LoraA(_) | ParamId::LoraB(_)), 3);
}
