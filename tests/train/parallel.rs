//! Data-parallel runs: several ranks, as threads, against one.

use crate::common;
use crate::run::{Recorder, bits, examples, model, options, two_phases};
use std::collections::BTreeMap;
use swat::backend::cpu::Cpu;
use swat::data::{Example, Loader};
use swat::engine::{Decoder, Lora};
use swat::group::{Alone, Group, Share, Threads, Traffic};
use swat::modules::{Cell, ModuleKind, ModuleSet, ParamId};
use swat::train::{Phase, PhaseOptions, StepMetrics, TuneOptions, Tuner};

/// What a rank ends with.
struct Done {
    steps: Vec<StepMetrics>,
    bits: BTreeMap<ParamId, Vec<u32>>,
    traffic: Traffic,
}

#[derive(Clone)]
struct Case {
    lora: bool,
    phases: Vec<Phase>,
    examples: Vec<Example>,
    options: TuneOptions,
}

impl Case {
    /// Ten steps on Mods_Rob, ten on everything; five documents a micro-batch, so that no two ranks have as many.
    fn new(lora: bool) -> Self {
        let mut phases = two_phases(10, 10);
        phases.iter_mut().for_each(|phase| phase.options.lr = 2e-4);
        let options = TuneOptions { batch_size: 5, grad_accum: 2, ..options() };
        Self { lora, phases, examples: examples(23), options }
    }

    fn decoder(&self) -> Decoder<Cpu> {
        let mut decoder = model();
        if self.lora {
            let all = decoder.config.cells();
            let attention = |cell: &Cell| matches!(cell, Cell::Module(m) if m.kind.in_attention());
            let set: ModuleSet = all.iter().filter(attention).collect();
            decoder.add_lora(&set, Lora { rank: 3, ..Lora::default() }, 3).unwrap();
        }
        decoder
    }

    fn rank(&self, group: &dyn Group<Cpu>) -> Done {
        let mut decoder = self.decoder();
        let mut loader = Loader::new(self.examples.clone(), self.options.loader()).unwrap();
        let mut recorded = Recorder::default();
        let tuner = Tuner::new(&mut decoder, &mut loader, self.options.clone(), self.phases.clone()).unwrap();
        tuner.group(group).run(&mut recorded).unwrap();
        Done { steps: recorded.steps, bits: bits(&decoder), traffic: group.traffic() }
    }

    fn ranks(&self, size: usize) -> Vec<Done> {
        let groups = Threads::groups(size);
        std::thread::scope(|scope| {
            let ranks: Vec<_> = groups.iter().map(|group| scope.spawn(|| self.rank(group))).collect();
            ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
        })
    }

    /// Lengths of the tensors that a phase trains.
    fn lengths(&self, phase: &Phase) -> Vec<usize> {
        let decoder = self.decoder();
        let adapter = |id: ParamId| matches!(id, ParamId::LoraA(_) | ParamId::LoraB(_));
        let trained = decoder.params().iter().filter(|p| phase.rates.trains(p.id.cell()) && adapter(p.id) == self.lora);
        trained.map(|p| p.values.len()).collect()
    }
}

#[test]
fn several_ranks_train_as_one() {
    for lora in [false, true] {
        let case = Case::new(lora);
        let one = case.rank(&Alone);
        assert_eq!(one.steps.len(), 20);
        let before = bits(&case.decoder());
        for size in [1, 2, 3, 4] {
            let ranks = case.ranks(size);
            for (rank, done) in ranks.iter().enumerate() {
                let name = format!("rank {rank} of {size}, adapters: {lora}");
                assert!(done.bits == ranks[0].bits, "{name}: other weights");
                for (found, expected) in done.steps.iter().zip(&one.steps) {
                    let tokens = |step: &StepMetrics| (step.tokens, step.trained_tokens, step.lr.to_bits());
                    assert_eq!(tokens(found), tokens(expected), "{name}");
                    let apart = |of: fn(&StepMetrics) -> Option<f64>| {
                        let (found, expected) = (of(found).unwrap(), of(expected).unwrap());
                        (found - expected).abs() / expected
                    };
                    let (loss, norm) = (apart(|step| step.loss), apart(|step| step.grad_norm));
                    assert!(loss <= 1e-6 && norm <= 1e-5, "{name}, step {}: {loss:e}, {norm:e}", found.step);
                }
                for (id, bits) in &done.bits {
                    let adapter = matches!(id, ParamId::LoraA(_) | ParamId::LoraB(_));
                    assert_eq!(*bits != before[id], adapter == lora || !lora, "{name}: {id}");
                }
                let share = Share { rank, size };
                let planned = |phase: &Phase| Traffic::of_step::<Cpu>(case.lengths(phase).into_iter(), share);
                let (first, second) = (planned(&case.phases[0]), planned(&case.phases[1]));
                let ten = |bytes: fn(&Traffic) -> u64| 10 * (bytes(&first) + bytes(&second));
                assert_eq!(done.traffic.reduce_scatter_bytes, ten(|t| t.reduce_scatter_bytes), "{name}");
                assert_eq!(done.traffic.all_gather_bytes, ten(|t| t.all_gather_bytes), "{name}");
            }
            if size == 1 {
                assert!(ranks[0].bits == one.bits, "a group of one rank is no group");
            }
            if size == 3 {
                assert!(case.ranks(3)[1].bits == ranks[1].bits, "the same bytes each time");
            }
        }
    }
}

#[test]
fn a_frozen_phase_leaves_the_rest_alone_and_empty_ranks_take_part() {
    let mut case = Case::new(false);
    // One document a micro-batch: three of four ranks have nothing to compute.
    case.options = TuneOptions { batch_size: 1, grad_accum: 1, ..options() };
    case.phases = vec![two_phases(6, 0).remove(0)];
    let one = case.rank(&Alone);
    let before = bits(&case.decoder());
    for done in case.ranks(4) {
        for (id, bits) in &done.bits {
            let trains = matches!(id.cell(), Cell::Module(m) if matches!(m.kind, ModuleKind::V | ModuleKind::O));
            assert_eq!(*bits != before[id], trains, "{id}");
        }
        for (found, expected) in done.steps.iter().zip(&one.steps) {
            assert!((found.loss.unwrap() - expected.loss.unwrap()).abs() < 1e-6 * expected.loss.unwrap());
        }
    }
}

#[test]
fn terms_beside_the_loss_count_once() {
    let mut case = Case::new(false);
    (case.options.constrain, case.options.prox) = (Some(1.0), Some(0.5));
    let one = case.rank(&Alone);
    let without = Case::new(false).rank(&Alone);
    assert!(one.steps[19].grad_norm != without.steps[19].grad_norm, "they matter");
    for done in case.ranks(3) {
        for (found, expected) in done.steps.iter().zip(&one.steps) {
            let apart = |of: fn(&StepMetrics) -> Option<f64>| of(found).unwrap() / of(expected).unwrap() - 1.0;
            let (loss, norm) = (apart(|step| step.loss), apart(|step| step.grad_norm));
            assert!(loss.abs() <= 1e-6 && norm.abs() <= 1e-5, "step {}: {loss:e}, {norm:e}", found.step);
        }
    }
}

#[test]
fn what_needs_a_whole_batch_is_refused() {
    let mut case = Case::new(false);
    case.options.vaccine = Some(1.0);
    let groups = Threads::groups(2);
    let mut decoder = case.decoder();
    let mut loader = Loader::new(case.examples.clone(), case.options.loader()).unwrap();
    let tuner = Tuner::new(&mut decoder, &mut loader, case.options.clone(), case.phases.clone()).unwrap();
    let error = tuner.group(&groups[0]).run(&mut ()).unwrap_err().to_string();
    assert!(error.contains("vaccine") && error.contains("several ranks"), "{error}");
}

#[test]
fn packed_rows_are_dealt_out_whole() {
    let mut case = Case::new(false);
    case.options = TuneOptions { packing: true, batch_size: 3, grad_accum: 1, ..options() };
    let one = case.rank(&Alone);
    for done in case.ranks(2) {
        for (found, expected) in done.steps.iter().zip(&one.steps) {
            assert_eq!((found.tokens, found.trained_tokens), (expected.tokens, expected.trained_tokens));
            assert!((found.loss.unwrap() - expected.loss.unwrap()).abs() < 1e-6 * expected.loss.unwrap());
        }
    }
}

#[test]
fn a_gradient_that_is_not_finite_on_one_rank_stops_all() {
    let mut case = Case::new(false);
    case.options = TuneOptions { batch_size: 3, grad_accum: 1, shuffle: false, ..options() };
    case.examples = examples(3);
    // Token 60 is in the second document alone, and its embedding is not finite.
    case.examples.iter_mut().for_each(|example| example.tokens.iter_mut().for_each(|token| *token = (*token).min(50)));
    case.examples[1].tokens[0] = 60;
    case.phases = vec![Phase {
        options: PhaseOptions { steps: Some(3), ..PhaseOptions::default() },
        ..two_phases(0, 3).remove(1)
    }];
    let groups = Threads::groups(3);
    let errors: Vec<String> = std::thread::scope(|scope| {
        let case = &case;
        let run = |group| {
            let mut decoder = case.decoder();
            let mut values = decoder.read(ParamId::Embedding).unwrap();
            values[60 * decoder.config.hidden] = f32::NAN;
            decoder.write(ParamId::Embedding, &values).unwrap();
            let mut loader = Loader::new(case.examples.clone(), case.options.loader()).unwrap();
            let tuner = Tuner::new(&mut decoder, &mut loader, case.options.clone(), case.phases.clone()).unwrap();
            tuner.group(group).run(&mut ()).unwrap_err().to_string()
        };
        let ranks: Vec<_> = groups.iter().map(|group| scope.spawn(move || run(group))).collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    });
    assert!(errors[0].contains("3 of 3 steps were skipped") && errors[0].contains("gradients of"), "{}", errors[0]);
    assert!(errors.iter().all(|error| *error == errors[0]), "{errors:?}");
}

#[test]
fn a_rank_that_ends_ends_the_others() {
    let case = Case::new(false);
    let mut groups = Threads::groups(3);
    drop(groups.pop());
    let errors: Vec<String> = std::thread::scope(|scope| {
        let run = |group| {
            let mut decoder = case.decoder();
            let mut loader = Loader::new(case.examples.clone(), case.options.loader()).unwrap();
            let tuner = Tuner::new(&mut decoder, &mut loader, case.options.clone(), case.phases.clone()).unwrap();
            tuner.group(group).run(&mut ()).unwrap_err().to_string()
        };
        let ranks: Vec<_> = groups.iter().map(|group| scope.spawn(move || run(group))).collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    });
    assert!(errors.iter().all(|error| error.contains("rank 2 has ended")), "{errors:?}");
}

/// Mods_Rob in the example of the documentation moves less than 5 % of what full tuning moves.
#[test]
fn mods_rob_of_a_large_model_moves_little() {
    let mut config = common::config(36, false, false, true);
    (config.hidden, config.ffn, config.vocab) = (4096, 12_288, 151_936);
    (config.heads, config.kv_heads, config.head_dim) = (32, 8, 128);
    let cells = config.cells();
    let mods = ModuleSet::parse("layers.9-26.{v_proj,o_proj}", &cells).unwrap();
    let bytes = |set: &ModuleSet| {
        let trained = config.params().into_iter().filter(|(id, _)| set.contains(id.cell()));
        let lengths = trained.map(|(_, shape)| shape.iter().product());
        Traffic::of_step::<Cpu>(lengths, Share { rank: 0, size: 8 }).total_bytes()
    };
    // (4096 · 1024 + 4096 · 4096) · 18 of 8.19 · 10⁹ parameters.
    let share = bytes(&mods) as f64 / bytes(&cells) as f64;
    assert!((share - 377_487_360.0 / 8_190_735_360.0).abs() < 1e-4 && share < 0.05, "{share}");
}
