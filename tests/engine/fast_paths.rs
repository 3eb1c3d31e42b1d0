//! The decoder against itself: each fast path against the plain computation that it replaces.

use crate::common::{batch, config, decoder, numbers, relative};
use std::collections::BTreeMap;
use swat::backend::trace::SpanKind;
use swat::backend::{Backend, Direction, NoiseKey, Operator, Perturb, Sampling};
use swat::engine::{
    Batch, Decoder, Finish, GenerateOptions, GradientOptions, Gradients, Lora, Member, NoiseKind, SweepOptions,
};
use swat::modules::{Cell, ModuleKind, ModuleSet, ParamId};

type Cpu = swat::backend::cpu::Cpu;

fn gradients_of(
    model: &Decoder<Cpu>,
    batch: &Batch,
    trains: impl Fn(ParamId) -> bool,
    recompute: bool,
) -> (f64, BTreeMap<ParamId, Vec<f32>>) {
    let mut gradients = Gradients::new(model, trains).unwrap();
    let loss = model
        .loss_and_gradients(batch, &mut gradients, GradientOptions { recompute, ..GradientOptions::scaled(0.1) })
        .unwrap();
    let host = gradients
        .iter()
        .map(|(id, b)| {
            let mut values = vec![0.0; b.len()];
            model.backend.read(b.view(), &mut values).unwrap();
            (id, values)
        })
        .collect();
    (loss, host)
}

#[test]
fn gradients_match_finite_differences_of_the_loss() {
    let mut model = decoder(config(2, false, true, true), 3);
    let batch = batch(&model.config, &[7, 1, 12], 5);
    let (_, gradients) = gradients_of(&model, &batch, |_| true, false);
    for (id, gradient) in gradients {
        // The direction of the gradient itself has the largest slope, so f32 noise matters least there.
        let norm = gradient.iter().map(|g| f64::from(*g).powi(2)).sum::<f64>().sqrt();
        assert!(norm > 0.0, "{id} has no gradient");
        let values = model.read(id).unwrap();
        let step = 2e-3;
        let mut losses = [0.0; 2];
        for (sign, loss) in [1.0, -1.0].into_iter().zip(&mut losses) {
            let moved: Vec<f32> = values
                .iter()
                .zip(&gradient)
                .map(|(w, g)| (f64::from(*w) + sign * step * f64::from(*g) / norm) as f32)
                .collect();
            model.write(id, &moved).unwrap();
            *loss = model.losses(&batch).unwrap().iter().map(|l| f64::from(*l)).sum::<f64>() * 0.1;
        }
        model.write(id, &values).unwrap();
        let slope = (losses[0] - losses[1]) / (2.0 * step);
        assert!((slope - norm).abs() <= 0.02 * norm + 1e-4, "{id}: slope {slope}, gradient norm {norm}");
    }
}

#[test]
fn a_masked_backward_gives_the_same_gradients_as_a_full_one() {
    for tied in [false, true] {
        let model = decoder(config(3, tied, true, true), 4);
        let batch = batch(&model.config, &[9, 4], 6);
        let (loss, full) = gradients_of(&model, &batch, |_| true, false);
        for cell in model.config.cells().iter() {
            for recompute in [false, true] {
                let (masked_loss, masked) = gradients_of(&model, &batch, |id| id.cell() == cell, recompute);
                assert_eq!(loss, masked_loss);
                assert!(!masked.is_empty());
                for (id, gradient) in masked {
                    assert_eq!(id.cell(), cell);
                    assert!(relative(&gradient, &full[&id]) < 1e-6, "{id} tied {tied} recompute {recompute}");
                }
            }
        }
    }
}

#[test]
fn gradients_accumulate_over_micro_batches() {
    let model = decoder(config(2, true, false, false), 9);
    let (a, b) = (batch(&model.config, &[5, 8], 1), batch(&model.config, &[11], 2));
    let mut both = Batch::from_prompts([&a.tokens[..5], &a.tokens[5..], &b.tokens[..]]);
    both.targets = [a.targets.clone(), b.targets.clone()].concat();
    let mut sum = Gradients::new(&model, |_| true).unwrap();
    model.loss_and_gradients(&a, &mut sum, GradientOptions::scaled(0.1)).unwrap();
    model
        .loss_and_gradients(&b, &mut sum, GradientOptions { accumulate: true, ..GradientOptions::scaled(0.1) })
        .unwrap();
    let (_, whole) = gradients_of(&model, &both, |_| true, false);
    for (id, buffer) in sum.iter() {
        let mut values = vec![0.0; buffer.len()];
        model.backend.read(buffer.view(), &mut values).unwrap();
        assert!(relative(&values, &whole[&id]) < 1e-5, "{id}");
    }
}

#[test]
fn hidden_states_of_few_rows_are_those_of_all_rows() {
    let model = decoder(config(3, false, true, true), 7);
    let batch = batch(&model.config, &[6, 9, 3], 8);
    let all: Vec<u32> = (0..batch.tokens.len() as u32).collect();
    let rows = batch.last_rows();
    let (whole, few) = (model.hidden_states(&batch, &all).unwrap(), model.hidden_states(&batch, &rows).unwrap());
    assert_eq!(few.len(), model.config.layers + 1);
    for (whole, few) in whole.iter().zip(&few) {
        let picked: Vec<f32> = rows.iter().flat_map(|r| whole[*r as usize * 24..][..24].to_vec()).collect();
        assert!(relative(few, &picked) < 1e-5);
    }
}

#[test]
fn documents_of_a_batch_do_not_see_each_other() {
    let model = decoder(config(2, false, false, true), 17);
    let batch = batch(&model.config, &[6, 9], 8);
    let together = model.logits(&batch, &batch.last_rows()).unwrap();
    for (i, window) in batch.starts.windows(2).enumerate() {
        let alone = Batch::from_prompts([&batch.tokens[window[0] as usize..window[1] as usize]]);
        let logits = model.logits(&alone, &alone.last_rows()).unwrap();
        assert!(relative(&together[i * 61..][..61], &logits) < 1e-5);
    }
}

#[test]
fn the_sweep_equals_perturbing_running_and_restoring() {
    for (tied, kind) in [
        (false, NoiseKind::Gaussian),
        (true, NoiseKind::Rademacher),
        (false, NoiseKind::LowRank(2)),
        (false, NoiseKind::Scale),
        (true, NoiseKind::Zero),
    ] {
        let mut model = decoder(config(3, tied, true, true), 11);
        let prompts = batch(&model.config, &[5, 8, 3], 12);
        let mut sets: Vec<ModuleSet> = model.config.cells().iter().map(|c| [c].into_iter().collect()).collect();
        sets.push(ModuleSet::default());
        sets.push([Cell::module(0, ModuleKind::V), Cell::module(2, ModuleKind::Down)].into_iter().collect());
        sets.push([Cell::module(1, ModuleKind::O), Cell::Norms(1), Cell::FinalNorm].into_iter().collect());
        let members: Vec<Member> = sets
            .iter()
            .flat_map(|cells| [false, true].map(|negative| Member { cells: cells.clone(), seed: 5, negative }))
            .collect();
        let options = SweepOptions {
            kind: kind.clone(),
            epsilon: 0.4,
            layers: vec![0, 1, 3],
            head_rows: vec![3, 60, 7],
            budget_bytes: 1 << 20,
        };
        assert_equals_reference(&mut model, &prompts, &members, &options);
    }
}

#[test]
fn a_sweep_takes_the_norm_of_a_tensor_once() {
    let model = decoder(config(2, false, true, true), 11);
    let prompts = batch(&model.config, &[5, 8], 12);
    let all = model.config.cells();
    let projection: ModuleSet = [Cell::module(0, ModuleKind::Q)].into_iter().collect();
    let member = |cells: &ModuleSet, seed| Member { cells: cells.clone(), seed, negative: false };
    let members = [member(&projection, 1), member(&projection, 2), member(&all, 1), member(&all, 2)];
    let spans = |kind| {
        let options = SweepOptions { kind, epsilon: 0.1, layers: vec![2], head_rows: vec![], budget_bytes: 1 << 20 };
        let recording = swat::backend::trace::record().expect("no recording runs on this thread");
        model.sweep(&prompts, &members, &options, &mut |_, _| Ok(())).unwrap();
        let spans = recording.take();
        ["squares", "perturb"]
            .map(|name| spans.iter().filter(|span| span.kind == SpanKind::Op && span.name == name).count())
    };
    let tensors = model.params().len();
    for (kind, norms) in [(NoiseKind::Gaussian, tensors), (NoiseKind::Scale, 0)] {
        let [squares, perturbed] = spans(kind.clone());
        assert_eq!(squares, norms, "{kind:?}");
        // q_proj has a weight and a bias.
        assert!(perturbed >= 2 * tensors + 4, "{kind:?}: {perturbed} of {tensors} tensors");
    }
}

/// Prompts with shared prefixes, enough of them for several chunks: 692 distinct of 1152 tokens, seven members.
#[test]
fn the_sweep_of_prompts_with_shared_prefixes() {
    let mut model = decoder(config(3, true, false, true), 13);
    let documents: Vec<Vec<u32>> = (0..24u32)
        .map(|d| (0..48).map(|i| if i < 20 { i % 7 } else { (d + (i - 20) * (i + d)) % 60 }).collect())
        .collect();
    let prompts = Batch::from_prompts(documents.iter().map(Vec::as_slice));
    let cells = [Cell::module(0, ModuleKind::K), Cell::module(0, ModuleKind::Down), Cell::Embedding];
    let mut members: Vec<Member> = cells
        .into_iter()
        .map(|cell| [cell].into_iter().collect::<ModuleSet>())
        .flat_map(|cells| [false, true].map(|negative| Member { cells: cells.clone(), seed: 3, negative }))
        .collect();
    let lone = [Cell::module(0, ModuleKind::O), Cell::module(2, ModuleKind::V)].into_iter().collect();
    members.push(Member { cells: lone, seed: 4, negative: false });
    let options = SweepOptions {
        kind: NoiseKind::Gaussian,
        epsilon: 0.4,
        layers: vec![0, 1, 3],
        head_rows: vec![3, 60, 7],
        budget_bytes: 1 << 30,
    };
    assert_equals_reference(&mut model, &prompts, &members, &options);
}

/// Compares the sweep with perturbing, running and restoring one member after another.
fn assert_equals_reference(model: &mut Decoder<Cpu>, prompts: &Batch, members: &[Member], options: &SweepOptions) {
    let mut readouts = vec![None; members.len()];
    model
        .sweep(prompts, members, options, &mut |i, readout| {
            assert!(readouts[i].replace(readout).is_none(), "member {i} came twice");
            Ok(())
        })
        .unwrap();
    for (member, readout) in members.iter().zip(readouts) {
        let readout = readout.expect("every member comes");
        let clean = perturb(model, member, options);
        let hidden = model.hidden_states(prompts, &prompts.last_rows()).unwrap();
        let logits = model.logits(prompts, &prompts.last_rows()).unwrap();
        for (id, values) in clean {
            model.write(id, &values).unwrap();
        }
        let kind = &options.kind;
        for (i, layer) in options.layers.iter().enumerate() {
            let worst = relative(&readout.hidden[i], &hidden[*layer]);
            assert!(worst < 1e-4, "{kind:?} {member:?} layer {layer}: {worst}");
        }
        let picked: Vec<f32> = (0..prompts.documents())
            .flat_map(|p| options.head_rows.iter().map(move |r| (p, *r)))
            .map(|(p, r)| logits[p * 61 + r as usize])
            .collect();
        assert!(relative(&readout.logits, &picked) < 1e-4, "{kind:?} {member:?}");
    }
}

/// Perturbs in place; returns the original weights.
fn perturb(model: &mut Decoder<Cpu>, member: &Member, options: &SweepOptions) -> Vec<(ParamId, Vec<f32>)> {
    let mut clean = Vec::new();
    let ids: Vec<(u64, ParamId, usize)> = model
        .params()
        .iter()
        .enumerate()
        .map(|(i, p)| (i as u64, p.id, if p.shape.len() > 1 { p.shape[0] } else { 1 }))
        .collect();
    for (stream, id, rows) in ids {
        if !member.cells.contains(id.cell()) {
            continue;
        }
        let values = model.read(id).unwrap();
        let key = NoiseKey { seed: member.seed, stream };
        let (direction, epsilon) = match options.kind {
            NoiseKind::Gaussian => (Direction::Gaussian(key), options.epsilon),
            NoiseKind::Rademacher => (Direction::Rademacher(key), options.epsilon),
            NoiseKind::LowRank(rank) => (Direction::LowRank { key, rank, rows }, options.epsilon),
            NoiseKind::Scale => (Direction::Scale, options.epsilon),
            _ => (Direction::Scale, -1.0),
        };
        let (mut plus, mut minus) =
            (model.backend.zeros::<f32>(values.len()).unwrap(), model.backend.zeros::<f32>(values.len()).unwrap());
        let weight = model.param(id).unwrap().values.view();
        Perturb { w: weight, squares: None, direction, epsilon, plus: plus.view_mut(), minus: Some(minus.view_mut()) }
            .run(&model.backend)
            .unwrap();
        let negative = member.negative && options.kind != NoiseKind::Zero;
        let mut perturbed = vec![0.0; values.len()];
        model.backend.read(if negative { minus.view() } else { plus.view() }, &mut perturbed).unwrap();
        model.write(id, &perturbed).unwrap();
        clean.push((id, values));
    }
    clean
}

/// The greedy answer, of at most 12 tokens, by a forward pass over the whole text for each token; it ends at token 2.
fn greedy_answer(model: &Decoder<Cpu>, prompt: &[u32]) -> (Vec<u32>, Finish) {
    let (mut text, mut answer) = (prompt.to_vec(), Vec::new());
    loop {
        let alone = Batch::from_prompts([text.as_slice()]);
        let logits = model.logits(&alone, &alone.last_rows()).unwrap();
        let best = (0..61).fold(0, |b, i| if logits[i] > logits[b] { i } else { b }) as u32;
        if best == 2 {
            return (answer, Finish::Stop);
        }
        answer.push(best);
        text.push(best);
        if answer.len() == 12 {
            return (answer, Finish::Length);
        }
    }
}

/// Prompts of these lengths, of random tokens.
fn prompts(model: &Decoder<Cpu>, lengths: &[usize], seed: u64) -> Vec<Vec<u32>> {
    let batch = batch(&model.config, lengths, seed);
    batch.starts.windows(2).map(|w| batch.tokens[w[0] as usize..w[1] as usize].to_vec()).collect()
}

#[test]
fn greedy_generation_follows_the_largest_logit() {
    let model = decoder(config(3, true, true, true), 21);
    let apart = prompts(&model, &[4, 9, 1, 6, 2], 22);
    // A beginning in common, as of chat templates, is computed once; one of them is the beginning of another.
    let start = &prompts(&model, &[6], 23)[0];
    let ends = [&[7, 8, 9][..], &[7, 8, 1], &[5], &[7, 8], &[7, 8, 9]];
    let alike: Vec<Vec<u32>> = ends.iter().map(|end| [start, *end].concat()).collect();
    // So little cache that prompts have to wait for a free slot.
    let slot = (9 + 12) * 2 * 3 * 16 * 4;
    for (prompts, cache_bytes) in
        [&apart, &alike].into_iter().flat_map(|prompts| [slot, 2 * slot, 1 << 30].map(|bytes| (prompts, bytes)))
    {
        let options = GenerateOptions { max_new_tokens: 12, stop: vec![2], cache_bytes, ..Default::default() };
        let mut seen = vec![Vec::new(); prompts.len()];
        let answers = model.generate(prompts, &options, &mut |i, token| seen[i].push(token)).unwrap();
        for ((prompt, answer), seen) in prompts.iter().zip(&answers).zip(&seen) {
            let expected = greedy_answer(&model, prompt);
            assert_eq!((&answer.tokens, answer.finish), (&expected.0, expected.1));
            assert_eq!(&seen[..expected.0.len()], &expected.0[..]);
        }
    }
}

#[test]
fn an_answer_that_is_ended_early_leaves_its_place_to_the_next() {
    let model = decoder(config(3, true, true, true), 21);
    let prompts = prompts(&model, &[4, 9, 1, 6, 2], 22);
    let whole: Vec<_> = prompts.iter().map(|prompt| greedy_answer(&model, prompt)).collect();
    assert!(whole.iter().filter(|(tokens, _)| tokens.len() > 3).count() >= 3, "{whole:?}");
    // One place: each prompt waits for the one before it. Odd ones end after three tokens.
    let options = GenerateOptions { max_new_tokens: 12, stop: vec![2], cache_bytes: 0, ..Default::default() };
    let mut seen = vec![0; prompts.len()];
    let ends = |prompt: usize, tokens: &[u32]| prompt % 2 == 1 && tokens.len() == 3;
    let answers = model.generate_until(&prompts, &options, &mut |prompt, _| seen[prompt] += 1, &ends).unwrap();
    for (prompt, (answer, (tokens, finish))) in answers.iter().zip(&whole).enumerate() {
        let ended = prompt % 2 == 1 && tokens.len() >= 3;
        let expected = if ended { (&tokens[..3], Finish::Length) } else { (&tokens[..], *finish) };
        assert_eq!((&answer.tokens[..], answer.finish), expected, "prompt {prompt}");
        let stop = usize::from(expected.1 == Finish::Stop);
        assert_eq!(seen[prompt], expected.0.len() + stop, "prompt {prompt}");
    }
}

#[test]
fn sampling_depends_on_seed_and_prompt_but_not_on_the_batch() {
    let model = decoder(config(2, true, false, false), 23);
    let prompts: Vec<Vec<u32>> = (1..6).map(|n| (0..n).collect()).collect();
    let options = GenerateOptions {
        max_new_tokens: 16,
        sampling: Sampling { temperature: 1.0, top_p: 0.9 },
        seed: 4,
        ..Default::default()
    };
    let one = |cache_bytes| {
        model.generate(&prompts, &GenerateOptions { cache_bytes, ..options.clone() }, &mut |_, _| {}).unwrap()
    };
    assert_eq!(one(1), one(1 << 30));
    let other = model.generate(&prompts, &GenerateOptions { seed: 5, ..options.clone() }, &mut |_, _| {}).unwrap();
    assert_ne!(one(1), other);
}

#[test]
fn adapters_change_nothing_until_trained_and_merge_exactly() {
    let mut model = decoder(config(2, false, true, false), 31);
    let batch = batch(&model.config, &[6, 7], 32);
    let before = model.logits(&batch, &batch.last_rows()).unwrap();
    let set: ModuleSet = ModuleKind::ALL.into_iter().map(|kind| Cell::module(1, kind)).collect();
    model.add_lora(&set, Lora { rank: 3, alpha: 6.0, ..Lora::default() }, 1).unwrap();
    assert_eq!(model.logits(&batch, &batch.last_rows()).unwrap(), before);
    let is_adapter = |id| matches!(id, ParamId::LoraA(_) | ParamId::LoraB(_));
    let mut next = numbers(33);
    let ids: Vec<(ParamId, usize)> =
        model.params().iter().filter(|p| is_adapter(p.id)).map(|p| (p.id, p.values.len())).collect();
    assert_eq!(ids.len(), 14);
    for (id, len) in &ids {
        let values: Vec<f32> = (0..*len).map(|_| 0.3 * next()).collect();
        model.write(*id, &values).unwrap();
    }
    let adapted = model.logits(&batch, &batch.last_rows()).unwrap();
    assert!(relative(&adapted, &before) > 0.01);
    let (_, gradients) = gradients_of(&model, &batch, is_adapter, false);
    for (id, gradient) in gradients {
        let norm = gradient.iter().map(|g| f64::from(*g).powi(2)).sum::<f64>().sqrt();
        let values = model.read(id).unwrap();
        let mut losses = [0.0; 2];
        for (sign, loss) in [1.0, -1.0].into_iter().zip(&mut losses) {
            let moved: Vec<f32> =
                values.iter().zip(&gradient).map(|(w, g)| w + sign * 2e-3 * g / norm as f32).collect();
            model.write(id, &moved).unwrap();
            *loss = model.losses(&batch).unwrap().iter().map(|l| f64::from(*l)).sum::<f64>() * 0.1;
        }
        model.write(id, &values).unwrap();
        let slope = (losses[0] - losses[1]) / 4e-3;
        assert!((slope - norm).abs() <= 0.02 * norm + 1e-4, "{id}: slope {slope}, gradient norm {norm}");
    }
    model.merge_lora().unwrap();
    assert!(model.params().iter().all(|p| !is_adapter(p.id)));
    assert!(relative(&model.logits(&batch, &batch.last_rows()).unwrap(), &adapted) < 1e-5);
}

#[test]
fn batches_that_do_not_fit_the_model_are_errors() {
    let model = decoder(config(1, true, false, false), 41);
    let rows = [0];
    assert!(model.logits(&Batch::from_prompts([[61].as_slice()]), &rows).is_err());
    let long: Vec<u32> = vec![1; 65];
    assert!(model.logits(&Batch::from_prompts([long.as_slice()]), &rows).is_err());
    assert!(model.logits(&Batch { starts: vec![0], ..Batch::default() }, &rows).is_err());
    assert!(model.generate(&[long], &GenerateOptions::default(), &mut |_, _| {}).is_err());
}
