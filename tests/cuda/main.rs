//! The whole engine in bf16, on CUDA devices and on the CPU, against f32 with the same weights, rounded to bf16. Single
//! kernels are tested against f64 loops in `tests/ops`.
//!
//! bf16 rounding errors differ by a factor of ten between tensors (gradients of q, k and their norms are small
//! differences of large terms), so that no fixed tolerance fits: the tolerance is the error of [`Rounded`], which
//! rounds where the kernels round.

#[path = "../common/mod.rs"]
mod common;
mod limits;
mod rounded;

use common::{batch, config, decoder_on as decoder, standin, wide};
use rounded::Rounded;
use std::collections::BTreeMap;
use swat::backend::cpu::Cpu;
use swat::backend::cuda::{Bf16State, Cuda, F32State, Precision};
use swat::backend::trace::{self, SpanKind};
use swat::backend::{Backend, FloatElement, Sampling};
use swat::engine::{
    Batch, Decoder, GenerateOptions, GradientOptions, Gradients, Lora, Member, NoiseKind, Parameter, Readout,
    SweepOptions,
};
use swat::model::ModelConfig;
use swat::modules::{LearningRates, ModuleSet, ParamId};
use swat::train::{Optimizer, StepOutcome, StepSettings};

/// Devices of both compute capabilities, with asynchronous operations late and early. A real GPU takes the place of each:
/// the first two are enough, one for each precision of gradients.
fn devices() -> &'static [u32] {
    if standin::real() { &[0, 1] } else { &[0, 1, 2, 3] }
}

/// Odd sizes with biases and q/k norms, and sizes for the fast kernels.
fn shapes() -> Vec<(&'static str, ModelConfig, Vec<usize>)> {
    let mut window = wide(2, 64);
    window.windows = vec![Some(20), None];
    vec![
        ("odd", config(3, false, true, true), vec![7, 1, 12]),
        ("tied", config(2, true, false, true), vec![9, 4]),
        ("wide", wide(2, 64), vec![70, 5, 21]),
        ("window", window, vec![50, 33]),
        ("wide heads", wide(1, 128), vec![40, 25]),
    ]
}

/// Results by their names.
type Values = BTreeMap<String, Vec<f32>>;

/// ‖got − expected‖ / ‖expected‖.
fn error(got: &[f32], expected: &[f32]) -> f64 {
    assert_eq!(got.len(), expected.len());
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>().sqrt();
    let difference = norm(&mut got.iter().zip(expected).map(|(g, e)| f64::from(*g) - f64::from(*e)));
    difference / norm(&mut expected.iter().map(|e| f64::from(*e))).max(1e-30)
}

/// Results of several emulations of the device's precision. The first rounds on the kernels' grid, the others on
/// shifted grids with the same spacing: where few roundings decide, the error of a single emulation may be small by
/// chance.
fn emulated<B: Backend>(values: impl Fn(&Rounded) -> Values) -> Vec<Values> {
    let bf16_state = size_of::<B::Grad>() == 2;
    let moved = (1..=3).map(|seed| Rounded::moved(bf16_state, seed));
    std::iter::once(Rounded::new(bf16_state)).chain(moved).map(|backend| values(&backend)).collect()
}

/// The largest error of the emulations, plus a margin for the order of f32 sums.
fn worst(name: &str, exact: &Values, emulated: &[Values]) -> f64 {
    emulated.iter().map(|values| error(&values[name], &exact[name])).fold(0.0, f64::max) + 1e-5
}

/// Asserts that the error of each result is at most twice that of the worst emulation.
#[track_caller]
fn assert_within_emulation(got: &Values, exact: &Values, emulated: &[Values], what: &str) {
    assert!(got.keys().eq(exact.keys()));
    for (name, got) in got {
        let (error, most) = (error(got, &exact[name]), 2.0 * worst(name, exact, emulated));
        assert!(error <= most, "{name} of {what}: off by {error:.5} of its norm, {most:.5} allowed");
    }
}

/// [`assert_within_emulation`], and for a single pass on the stand-in: nearly every number is rounded as in the first
/// emulation, so that the distance to it is at most the error of the worst emulation.
#[track_caller]
fn assert_close_to_emulation(got: &Values, exact: &Values, emulated: &[Values], what: &str) {
    assert_within_emulation(got, exact, emulated, what);
    for (name, got) in got.iter().filter(|_| !standin::real()) {
        let (away, most) = (error(got, &emulated[0][name]), worst(name, exact, emulated));
        assert!(away <= most, "{name} of {what}: {away:.5} from its emulation, {most:.5} allowed");
    }
}

/// Runs `test` on the CPU and on every CUDA device, with f32 and with bf16 gradients.
macro_rules! on_every_device {
    ($test:ident) => {
        $test(&Cpu::<F32State>::default());
        $test(&Cpu::<Bf16State>::default());
        on_every_cuda_device!($test);
    };
}

/// Runs `test` on every CUDA device: on some with f32, on others with bf16 gradients.
macro_rules! on_every_cuda_device {
    ($test:ident) => {
        for ordinal in devices().iter().copied() {
            if ordinal % 3 == 0 {
                if let Some(backend) = standin::open::<F32State>(ordinal) {
                    $test(&backend);
                }
            } else if let Some(backend) = standin::open::<Bf16State>(ordinal) {
                $test(&backend);
            }
        }
    };
}

fn forward_values<B: Backend>(backend: &B, config: &ModelConfig, batch: &Batch) -> Values {
    let model = decoder(backend, config, 1);
    let rows: Vec<u32> = (0..batch.tokens.len() as u32).collect();
    let hidden = model.hidden_states(batch, &rows).unwrap().into_iter().enumerate();
    let mut values: Values = hidden.map(|(i, state)| (format!("hidden state {i}"), state)).collect();
    values.insert("logits".into(), model.logits(batch, &batch.last_rows()).unwrap());
    values.insert("losses".into(), model.losses(batch).unwrap());
    values
}

fn forward_on<B: Backend>(device: &B) {
    for (name, config, lengths) in shapes() {
        let batch = batch(&config, &lengths, 2);
        let emulated = emulated::<B>(|backend| forward_values(backend, &config, &batch));
        let exact = forward_values(&Cpu::new(), &config, &batch);
        let got = forward_values(device, &config, &batch);
        assert_close_to_emulation(&got, &exact, &emulated, &format!("{name} on {}", device.name()));
    }
}

#[test]
fn forward() {
    on_every_device!(forward_on);
}

/// The loss, and all gradients by name.
fn gradients_of<B: Backend>(
    backend: &B,
    config: &ModelConfig,
    seed: u64,
    batch: &Batch,
    recompute: bool,
) -> (f64, Values) {
    let model = decoder(backend, config, seed);
    let mut gradients = Gradients::new(&model, |_| true).unwrap();
    let loss = model
        .loss_and_gradients(batch, &mut gradients, GradientOptions { recompute, ..GradientOptions::scaled(0.05) })
        .unwrap();
    let read = |(id, buffer): (ParamId, &swat::backend::Buffer<B, B::Grad>)| {
        let mut values = vec![<B::Grad as FloatElement>::from_f32(0.0); buffer.len()];
        backend.read(buffer.view(), &mut values).unwrap();
        (format!("gradient of {id}"), values.into_iter().map(FloatElement::to_f32).collect())
    };
    (loss, gradients.iter().map(read).chain([("loss".into(), vec![loss as f32])]).collect())
}

fn gradients_on<B: Backend>(device: &B) {
    for (name, config, lengths) in shapes() {
        let seeds = if config.hidden < 128 { 0..8 } else { 3..4 };
        for seed in seeds {
            let batch = batch(&config, &lengths, seed + 1);
            let emulated = emulated::<B>(|backend| gradients_of(backend, &config, seed, &batch, false).1);
            let (_, exact) = gradients_of(&Cpu::new(), &config, seed, &batch, false);
            let (loss, got) = gradients_of(device, &config, seed, &batch, false);
            assert_close_to_emulation(&got, &exact, &emulated, &format!("{name}, seed {seed}, on {}", device.name()));
            let again = gradients_of(device, &config, seed, &batch, true);
            assert!((loss, got) == again, "{name}: a second run, with layers computed again, gave other bytes");
        }
    }
}

#[test]
fn gradients() {
    on_every_device!(gradients_on);
}

const SETTINGS: StepSettings = StepSettings {
    lr: 4e-3,
    weight_decay: 0.1,
    beta1: 0.9,
    beta2: 0.999,
    eps: 1e-8,
    max_grad_norm: Some(1.0),
    seed: 6,
};

/// Losses before each of ten steps of `model` on its Mods_Rob, then on everything.
fn ten_steps<B: Backend>(model: &mut Decoder<B>, batch: &Batch, mods: &str) -> Vec<f64> {
    let all = model.config.cells();
    let mods = LearningRates::masked(&ModuleSet::parse(mods, &all).unwrap(), &all, 0.0);
    let mut losses = Vec::new();
    for (rates, first) in [(mods, 0), (LearningRates::masked(&all, &all, 0.0), 5)] {
        let mut gradients = Gradients::new(model, |id| rates.trains(id.cell())).unwrap();
        let mut optimizer = Optimizer::new(model, &rates, |_| true).unwrap();
        let frozen: Vec<ParamId> = model.params().iter().map(|p| p.id).filter(|id| !rates.trains(id.cell())).collect();
        let before: Vec<Vec<f32>> = frozen.iter().map(|id| model.read(*id).unwrap()).collect();
        for step in first..first + 5 {
            let scale = 1.0 / batch.trained_tokens() as f32;
            losses.push(model.loss_and_gradients(batch, &mut gradients, GradientOptions::scaled(scale)).unwrap());
            let settings = StepSettings { seed: SETTINGS.seed + step, ..SETTINGS };
            let outcome = optimizer.step(model, &gradients, &settings).unwrap();
            assert!(matches!(outcome, StepOutcome::Done { .. }), "{outcome:?}");
        }
        for (id, before) in frozen.iter().zip(before) {
            assert!(model.read(*id).unwrap() == before, "{id} is frozen and moved");
        }
    }
    losses
}

fn ten_masked_steps_on<B: Backend>(device: &B) {
    for (config, lengths, mods) in [
        (config(3, false, true, true), vec![7, 1, 12], "layers.1.{q,v}, layers.2.down"),
        (wide(2, 64), vec![40, 25], "layers.0.{k,o,up}, layers.1.gate"),
    ] {
        let batch = batch(&config, &lengths, 8);
        let expected = ten_steps(&mut decoder(&Cpu::new(), &config, 7), &batch, mods);
        // In parts of the exact ones, so that each step counts as much.
        let phases = |losses: &[f64]| -> Values {
            let parts: Vec<f32> = losses.iter().zip(&expected).map(|(loss, exact)| (loss / exact) as f32).collect();
            let phases = parts.chunks(5).zip(["losses on Mods_Rob", "losses on everything"]);
            phases.map(|(losses, name)| (name.into(), losses.to_vec())).collect()
        };
        let mut model = decoder(device, &config, 7);
        let got = ten_steps(&mut model, &batch, mods);
        assert!(expected[9] < 0.9 * expected[0], "ten steps learn: {expected:?}");
        let emulated = emulated::<B>(|backend| phases(&ten_steps(&mut decoder(backend, &config, 7), &batch, mods)));
        // Adam steps as far for a gradient that is noise: runs part, and follow no emulation.
        assert_within_emulation(
            &phases(&got),
            &phases(&expected),
            &emulated,
            &format!("ten steps on {}", device.name()),
        );
        let mut again = decoder(device, &config, 7);
        assert_eq!(ten_steps(&mut again, &batch, mods), got, "a second run");
        for param in model.params() {
            assert!(model.read(param.id).unwrap() == again.read(param.id).unwrap(), "{}: a second run", param.id);
        }
    }
}

#[test]
fn ten_masked_steps() {
    on_every_device!(ten_masked_steps_on);
}

/// Hidden states and logits of each member, in one row.
fn sweep_values<B: Backend>(
    backend: &B,
    config: &ModelConfig,
    prompts: &Batch,
    members: &[Member],
    options: &SweepOptions,
) -> Values {
    let mut values = Values::new();
    let mut keep = |i: usize, readout: Readout| {
        values.insert(format!("{:?}", members[i]), [readout.hidden.concat(), readout.logits].concat());
        Ok(())
    };
    decoder(backend, config, 9).sweep(prompts, members, options, &mut keep).unwrap();
    values
}

fn sweep_on<B: Backend>(device: &B) {
    let config = wide(2, 64);
    let prompts = batch(&config, &[9, 14, 5], 10);
    let mut next = common::numbers(17);
    // Directions with a length of their own each; some tensors have none.
    let mut step = |param: &Parameter<Cpu>| (0.25 + next().abs(), (0..param.values.len()).map(|_| next()).collect());
    let host = decoder(&Cpu::new(), &config, 9);
    let steps = host.params().iter().step_by(2).map(|param| (param.id, step(param))).collect();
    let kinds = [NoiseKind::Gaussian, NoiseKind::Rademacher, NoiseKind::LowRank(2), NoiseKind::Scale];
    for kind in kinds.into_iter().chain([NoiseKind::Step(steps)]) {
        let cells = config.cells();
        let one = |cell| [cell].into_iter().collect::<ModuleSet>();
        let members: Vec<Member> = (cells.iter().map(one).chain([ModuleSet::default(), cells.clone()]))
            .flat_map(|cells| [false, true].map(|negative| Member { cells: cells.clone(), seed: 5, negative }))
            .collect();
        let options = SweepOptions {
            kind: kind.clone(),
            epsilon: 0.3,
            layers: vec![1, 2],
            head_rows: vec![3, 160, 7],
            budget_bytes: 1 << 20,
        };
        let emulated = emulated::<B>(|backend| sweep_values(backend, &config, &prompts, &members, &options));
        let exact = sweep_values(&Cpu::new(), &config, &prompts, &members, &options);
        let got = sweep_values(device, &config, &prompts, &members, &options);
        assert_eq!(got.len(), members.len());
        let name = match &kind {
            NoiseKind::Step(_) => "Step".to_owned(),
            kind => format!("{kind:?}"),
        };
        assert_close_to_emulation(&got, &exact, &emulated, &format!("{name} on {}", device.name()));
    }
}

#[test]
fn robustness_sweep() {
    on_every_device!(sweep_on);
}

fn generation_on<B: Backend>(device: &B) {
    for config in [config(3, false, true, true), wide(2, 64)] {
        let (host, model) = (decoder(&Cpu::new(), &config, 11), decoder(device, &config, 11));
        let prompts = batch(&config, &[4, 9, 1, 17], 12);
        let prompts: Vec<Vec<u32>> =
            prompts.starts.windows(2).map(|w| prompts.tokens[w[0] as usize..w[1] as usize].to_vec()).collect();
        // Two more that begin as the last one: what they have in common is computed once.
        let alike = [1, 2].map(|end| [prompts[3].as_slice(), &[end]].concat());
        let prompts = [prompts, alike.to_vec()].concat();
        let options = GenerateOptions { max_new_tokens: 8, stop: Vec::new(), ..GenerateOptions::default() };
        let answers = model.generate(&prompts, &options, &mut |_, _| {}).unwrap();
        for (prompt, answer) in prompts.iter().zip(&answers) {
            assert_eq!(answer.tokens.len(), 8);
            let mut text = prompt.clone();
            for token in &answer.tokens {
                let so_far = Batch::from_prompts([text.as_slice()]);
                let logits = host.logits(&so_far, &so_far.last_rows()).unwrap();
                let (low, best) = logits.iter().fold((f32::MAX, f32::MIN), |(l, b), x| (l.min(*x), b.max(*x)));
                let chosen = logits[*token as usize];
                assert!(best - chosen <= 0.02 * (best - low), "{}: {chosen} was chosen, {best} is best", device.name());
                text.push(*token);
            }
        }
        let sampled = GenerateOptions { sampling: Sampling { temperature: 1.0, top_p: 0.9 }, seed: 4, ..options };
        let run = || model.generate(&prompts, &sampled, &mut |_, _| {}).unwrap();
        assert_eq!(run(), run(), "the same seed gives the same tokens");
    }
}

#[test]
fn generation() {
    on_every_device!(generation_on);
}

/// Results of passes that keep no activations, and how many of their MLPs ran gate and up as one fused product.
fn inference_values<P: Precision>(cuda: &Cuda<P>, adapters: bool) -> (Values, Vec<Vec<u32>>, usize) {
    let config = wide(2, 64);
    let (batch, prompts) = (batch(&config, &[70, 5, 21], 2), batch(&config, &[9, 14, 5], 10));
    let mut model = decoder(cuda, &config, 1);
    if adapters {
        let gated = ModuleSet::parse("layers.0.{gate,up}, layers.1.{gate,up}", &config.cells()).unwrap();
        model.add_lora(&gated, Lora::default(), 3).unwrap();
    }
    let recording = trace::record().expect("no recording runs on this thread");
    let rows: Vec<u32> = (0..batch.tokens.len() as u32).collect();
    let hidden = model.hidden_states(&batch, &rows).unwrap().into_iter().enumerate();
    let mut values: Values = hidden.map(|(i, state)| (format!("hidden state {i}"), state)).collect();
    values.insert("losses".into(), model.losses(&batch).unwrap());
    let cell = |text: &str| ModuleSet::parse(text, &config.cells()).unwrap();
    let members = ["layers.0.up", "layers.1.{gate,up}", "layers.1.q"];
    let members = members.map(|text| Member { cells: cell(text), seed: 5, negative: false });
    let options = SweepOptions {
        kind: NoiseKind::Gaussian,
        epsilon: 0.3,
        layers: vec![1, 2],
        head_rows: vec![3, 160, 7],
        budget_bytes: 1 << 20,
    };
    let mut keep = |i: usize, readout: Readout| {
        values.insert(format!("member {i}"), [readout.hidden.concat(), readout.logits].concat());
        Ok(())
    };
    model.sweep(&prompts, &members, &options, &mut keep).unwrap();
    let texts: Vec<Vec<u32>> = (0..12).map(|i| vec![3 + i, 5, 7]).collect();
    let generate = GenerateOptions { max_new_tokens: 4, stop: Vec::new(), ..GenerateOptions::default() };
    let answers = model.generate(&texts, &generate, &mut |_, _| {}).unwrap();
    cuda.synchronize().unwrap();
    let gated = recording.take().iter().filter(|span| span.kind == SpanKind::Op && span.name == "gated_linear").count();
    (values, answers.into_iter().map(|answer| answer.tokens).collect(), gated)
}

/// The fused product of gate and up gives the same bits as separate products, which adapters (of zeros) force.
fn gated_product_on<P: Precision>(cuda: &Cuda<P>) {
    let ((values, tokens, gated), (apart, tokens_apart, none)) =
        (inference_values(cuda, false), inference_values(cuda, true));
    assert!(gated > 8 && none == 0, "{gated} products of gate and up, {none} beside adapters");
    assert_eq!(values, apart, "{}", cuda.name());
    assert_eq!(tokens, tokens_apart, "{}", cuda.name());
}

#[test]
fn fused_gate_and_up_equal_separate_products() {
    on_every_cuda_device!(gated_product_on);
}

#[test]
fn unusable_requests_are_refused_with_the_reason() {
    if !standin::available() || standin::real() {
        return;
    }
    let refused = |ordinal| match Cuda::<F32State>::open(ordinal) {
        Ok(_) => panic!("cuda:{ordinal} opens"),
        Err(e) => (e.exit_code(), e.to_string()),
    };
    let (code, text) = refused(4);
    assert!(code == 2 && text.contains("compute capability 7.0"), "{text}");
    let (code, text) = refused(6);
    assert!(code == 1 && text.contains("cannot load the kernels"), "{text}");
    let (code, text) = refused(99);
    assert!(code == 2 && text.contains("cuda:99") && text.contains("device(s)"), "{text}");

    let small = Cuda::<F32State>::open(5).unwrap();
    let Err(error) = small.zeros::<f32>(1 << 20) else { panic!("4 MiB fit into 1 MiB") };
    let text = error.to_string();
    assert!(error.exit_code() == 1 && text.contains(&(4u64 << 20).to_string()), "{text}");
    small.zeros::<f32>(1 << 10).expect("less than all of it");
}

/// Devices that are too old, that load no image, and that are not there.
#[test]
fn unusable_devices_are_refused() {
    if !standin::available() || standin::real() {
        return;
    }
    let refused = |ordinal| Cuda::<F32State>::open(ordinal).err().expect("a refusal").to_string();
    assert!(refused(4).contains("7.0"), "{}", refused(4));
    assert!(refused(6).contains("no kernel image"), "{}", refused(6));
    assert!(refused(7).contains("7 device"), "{}", refused(7));
    assert_eq!(Cuda::<F32State>::open(1).unwrap().capability(), (9, 0));
    assert_eq!(Cuda::<F32State>::open(3).unwrap().capability(), (8, 0));
}
