//! Steps launched as CUDA graphs give the same bytes as steps launched kernel by kernel; and the driver calls of a
//! step, counted.

mod common;

use common::{batch, config, decoder_on, standin, wide};
use std::sync::{Mutex, MutexGuard, PoisonError};
use swat::backend::cuda::{Bf16State, Cuda, F32State, LaunchMode, Precision};
use swat::backend::{Backend, Sampling, trace};
use swat::engine::{Batch, Decoder, GenerateOptions, Generation, GradientOptions, Gradients};
use swat::model::ModelConfig;
use swat::modules::LearningRates;
use swat::train::{Optimizer, StepOutcome, StepSettings};

/// Driver calls are counted for the whole process.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A model in training.
struct Training<P: Precision> {
    model: Decoder<Cuda<P>>,
    gradients: Gradients<Cuda<P>>,
    optimizer: Optimizer<Cuda<P>>,
    steps: u64,
}

impl<P: Precision> Training<P> {
    fn new(cuda: &Cuda<P>, config: &ModelConfig) -> Self {
        let model = decoder_on(cuda, config, 7);
        let rates = LearningRates::masked(&config.cells(), &config.cells(), 0.0);
        let gradients = Gradients::new(&model, |_| true).unwrap();
        let optimizer = Optimizer::new(&model, &rates, |_| true).unwrap();
        Self { model, gradients, optimizer, steps: 0 }
    }

    /// A step over micro-batches, as [`swat::train::Tuner`] takes it; its loss.
    fn step(&mut self, micro_batches: &[Batch]) -> f64 {
        let trained: usize = micro_batches.iter().map(Batch::trained_tokens).sum();
        let mut losses = self.model.losses_of(trained).unwrap();
        for (i, batch) in micro_batches.iter().enumerate() {
            let scale = 1.0 / trained as f32;
            self.model
                .queue_gradients(
                    batch,
                    &mut self.gradients,
                    GradientOptions { accumulate: i > 0, ..GradientOptions::scaled(scale) },
                    &mut losses,
                )
                .unwrap();
        }
        let loss = losses.sum().unwrap();
        self.steps += 1;
        let settings = StepSettings {
            lr: 1e-3 * self.steps as f64,
            weight_decay: 0.1,
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            max_grad_norm: Some(1.0),
            seed: self.steps,
        };
        let outcome = self.optimizer.step(&mut self.model, &self.gradients, &settings).unwrap();
        assert!(matches!(outcome, StepOutcome::Done { .. }), "{outcome:?}");
        loss
    }

    fn weights(&self) -> Vec<Vec<f32>> {
        self.model.params().iter().map(|param| self.model.read(param.id).unwrap()).collect()
    }
}

/// How often `work` calls each of the named driver functions on device `ordinal`.
fn calls<const N: usize, R>(ordinal: i32, names: [&str; N], work: impl FnOnce() -> R) -> [u64; N] {
    let before = names.map(|name| standin::calls(ordinal, name));
    work();
    let mut after = names.map(|name| standin::calls(ordinal, name));
    after.iter_mut().zip(before).for_each(|(after, before)| *after -= before);
    after
}

/// Steps of one shape after which its allocations are stable and its graph exists.
const SETTLED: u64 = 8;

const LAUNCH: &str = "cuLaunchKernel";
const GRAPH_LAUNCH: &str = "cuGraphLaunch";
const INSTANTIATE: &str = "cuGraphInstantiateWithFlags";
const SET_PARAMS: &str = "cuGraphExecKernelNodeSetParams_v2";
const WAIT: &str = "cuStreamSynchronize";
const WAIT_OTHERWISE: [&str; 2] = ["cuCtxSynchronize", "cuEventSynchronize"];
const ALLOCATE: &str = "cuMemAlloc_v2";
const FREE: &str = "cuMemFree_v2";
const TO_DEVICE: &str = "cuMemcpyHtoDAsync_v2";
const TO_HOST: &str = "cuMemcpyDtoHAsync_v2";
const ON_DEVICE: &str = "cuMemcpyDtoDAsync_v2";

/// Losses and final weights of steps with different data: of one shape, of another, and of two micro-batches.
fn training<P: Precision>(cuda: &Cuda<P>, config: &ModelConfig) -> (Vec<f64>, Vec<Vec<f32>>) {
    let mut training = Training::new(cuda, config);
    let one = |seed| vec![batch(config, &[9, 14], seed)];
    let other = |seed| vec![batch(config, &[5, 3, 11], seed)];
    let two = |seed| vec![batch(config, &[9, 14], seed), batch(config, &[9, 14], seed + 1)];
    let first = (0..SETTLED).map(one).chain([other(20)]);
    let steps = first.chain((30..34).map(one)).chain((0..6).map(|i| two(40 + 2 * i)));
    let losses = steps.map(|micro_batches| training.step(&micro_batches)).collect();
    (losses, training.weights())
}

fn same_bytes<P: Precision>(ordinal: u32, config: &ModelConfig) {
    let (Some(with), Some(without)) = (standin::open::<P>(ordinal), standin::open::<P>(ordinal)) else { return };
    without.set_launch_mode(LaunchMode::Eager);
    let mut expected = None;
    let run = || expected = Some(training(&without, config));
    if standin::real() {
        return assert!(training(&with, config) == training(&without, config), "cuda:{ordinal}");
    }
    let none = calls(ordinal as i32, [GRAPH_LAUNCH], run);
    let mut got = None;
    let graphs = calls(ordinal as i32, [GRAPH_LAUNCH], || got = Some(training(&with, config)));
    assert!(none == [0] && graphs[0] >= 10, "graphs launched: {none:?} without, {graphs:?} with");
    assert!(got == expected, "cuda:{ordinal}: other bytes with graphs");
}

#[test]
fn training_gives_the_same_bytes() {
    let _alone = alone();
    same_bytes::<F32State>(0, &wide(2, 64));
    same_bytes::<Bf16State>(3, &wide(2, 64));
    same_bytes::<Bf16State>(1, &config(3, false, true, true));
    same_bytes::<F32State>(2, &config(2, true, false, true));
}

#[test]
fn a_training_step_makes_exactly_these_driver_calls() {
    let _alone = alone();
    let Some(cuda) = standin::open::<F32State>(0).filter(|_| !standin::real()) else { return };
    let config = wide(2, 64);
    let mut training = Training::new(&cuda, &config);
    let one = |seed| [batch(&config, &[30, 20], seed)];
    let two = |seed| [batch(&config, &[30, 20], seed), batch(&config, &[30, 20], seed + 9)];
    for seed in 0..SETTLED {
        training.step(&one(seed));
    }
    let names = [GRAPH_LAUNCH, LAUNCH, INSTANTIATE, WAIT, ALLOCATE, FREE, TO_DEVICE, TO_HOST, ON_DEVICE];
    // Sums of squares in two kernels, the clip factor in one, the step in one. Tokens, positions, starts, rows,
    // targets; rates. Losses and norm.
    let step = [1, 4, 0, 2, 0, 0, 6, 2, 0];
    for seed in 10..13 {
        assert_eq!(calls(0, names, || training.step(&one(seed))), step);
    }
    for seed in 20..20 + SETTLED {
        training.step(&two(seed));
    }
    let step = [2, 4, 0, 2, 0, 0, 11, 2, 0];
    assert_eq!(calls(0, names, || training.step(&two(30))), step, "two micro-batches");
    assert_eq!(calls(0, WAIT_OTHERWISE, || training.step(&two(31))), [0, 0]);

    cuda.set_launch_mode(LaunchMode::Eager);
    let [graphs, launches, ..] = calls(0, names, || training.step(&one(32)));
    assert!(graphs == 0 && launches > 40, "{graphs} graphs and {launches} kernels launched where graphs are off");
}

/// The number of trained tokens in a step is the loss scale, an argument of one kernel of each micro-batch.
#[test]
fn changed_arguments_update_the_graph() {
    let _alone = alone();
    let Some(cuda) = standin::open::<F32State>(2).filter(|_| !standin::real()) else { return };
    let config = wide(2, 64);
    let run = |cuda: &Cuda<F32State>| {
        let mut training = Training::new(cuda, &config);
        let small = batch(&config, &[4], 1);
        let mut step = |seed, beside: usize| {
            let mut micro_batches = vec![batch(&config, &[30, 20], seed)];
            micro_batches.extend(std::iter::repeat_n(small.clone(), beside));
            training.step(&micro_batches)
        };
        let mut losses: Vec<f64> = (0..SETTLED).map(|seed| step(seed, 0)).collect();
        let counted = calls(2, [SET_PARAMS], || losses.push(step(10, 1)));
        (losses, training.weights(), counted)
    };
    let (losses, weights, changed) = run(&cuda);
    assert_eq!(changed, [1], "the node with the loss scale");
    cuda.set_launch_mode(LaunchMode::Eager);
    let (expected, expected_weights, _) = run(&cuda);
    assert!(losses == expected && weights == expected_weights, "{losses:?} with graphs, {expected:?} without");
}

fn prompts(config: &ModelConfig) -> Vec<Vec<u32>> {
    let all = batch(config, &[4, 9, 1, 17, 6], 12);
    all.starts.windows(2).map(|w| all.tokens[w[0] as usize..w[1] as usize].to_vec()).collect()
}

#[test]
fn generation_gives_the_same_tokens() {
    let _alone = alone();
    for (ordinal, config) in [(0, wide(2, 64)), (3, config(3, false, true, true))] {
        let Some(cuda) = standin::open::<F32State>(ordinal) else { return };
        let model = decoder_on(&cuda, &config, 11);
        let prompts = prompts(&config);
        let bytes = 2 * config.layers * config.kv_width() * 2;
        for sampling in [Sampling { temperature: 0.0, top_p: 1.0 }, Sampling { temperature: 1.0, top_p: 0.9 }] {
            // Three places for five prompts, and answers that end at different times.
            let options = GenerateOptions {
                max_new_tokens: 14,
                sampling,
                seed: 4,
                stop: (0..config.vocab as u32 / 12).collect(),
                cache_bytes: (3 * bytes * (17 + 14)) as u64,
            };
            let run = |on| {
                cuda.set_launch_mode(if on { LaunchMode::Graphs } else { LaunchMode::Eager });
                model.generate(&prompts, &options, &mut |_, _| {}).unwrap()
            };
            let with: Vec<Generation> = run(true);
            assert!(with.iter().any(|answer| answer.tokens.len() > 6), "{with:?}");
            assert_eq!(with, run(false), "{} {sampling:?}", cuda.name());
        }
    }
}

/// Decoding attention launches a block for each 256 keys.
#[test]
fn more_keys_update_the_graph() {
    let _alone = alone();
    let Some(cuda) = standin::open::<F32State>(1).filter(|_| !standin::real()) else { return };
    let config = ModelConfig { max_positions: 600, ..wide(2, 64) };
    let model = decoder_on(&cuda, &config, 11);
    let prompt = batch(&config, &[507], 5).tokens;
    let options = GenerateOptions { max_new_tokens: 12, stop: Vec::new(), ..GenerateOptions::default() };
    let generate = || model.generate(std::slice::from_ref(&prompt), &options, &mut |_, _| {}).unwrap();
    let mut with = Vec::new();
    let [made, changed] = calls(1, [INSTANTIATE, SET_PARAMS], || with = generate());
    // At the one token with a third block, in each of two layers: the kernel that sees the keys and the one that
    // combines its parts; and where the memory of the smaller parts, free from then on, has the lowest address of its
    // size, the two kernels that write and read what is there now.
    assert!(made == 1 && matches!(changed, 4 | 8), "{made} made, {changed} nodes changed");
    cuda.set_launch_mode(LaunchMode::Eager);
    assert_eq!(with, generate());
}

#[test]
fn a_token_makes_exactly_these_driver_calls() {
    let _alone = alone();
    let Some(cuda) = standin::open::<F32State>(0).filter(|_| !standin::real()) else { return };
    let config = wide(2, 64);
    let model = decoder_on(&cuda, &config, 11);
    let names = [GRAPH_LAUNCH, LAUNCH, INSTANTIATE, WAIT, ALLOCATE, FREE, TO_DEVICE, TO_HOST, ON_DEVICE];
    for (temperature, copies) in [(0.0, 1), (1.0, 2)] {
        let sampling = Sampling { temperature, top_p: 0.9 };
        let options = GenerateOptions { max_new_tokens: 12, sampling, stop: Vec::new(), ..GenerateOptions::default() };
        let mut counted = Vec::new();
        let mut count = |_, _| counted.push(names.map(|name| standin::calls(0, name)));
        model.generate(&prompts(&config)[..1], &options, &mut count).unwrap();
        let last: Vec<[u64; 9]> =
            counted.windows(2).map(|pair| std::array::from_fn(|i| pair[1][i] - pair[0][i])).collect();
        // Places of the tokens, and what is drawn with; what was drawn.
        for token in &last[5..] {
            assert_eq!(*token, [1, 0, 0, 1, 0, 0, copies, 1, 0], "calls from token to token: {last:?}");
        }
    }
}

#[test]
fn a_recording_sees_every_kernel() {
    let _alone = alone();
    let Some(cuda) = standin::open::<F32State>(0).filter(|_| !standin::real()) else { return };
    let config = wide(2, 64);
    let mut training = Training::new(&cuda, &config);
    let mut step = |seed| training.step(&[batch(&config, &[30, 20], seed)]);
    for seed in 0..SETTLED {
        step(seed);
    }
    let recording = trace::record().unwrap();
    let [graphs, launches] = calls(0, [GRAPH_LAUNCH, LAUNCH], || step(10));
    cuda.synchronize().unwrap();
    // Copies and memsets are on the same lane.
    let is_kernel = |span: &&trace::Span| span.kind == trace::SpanKind::Kernel && !span.name.starts_with("mem");
    let kernels = recording.take().iter().filter(is_kernel).count() as u64;
    drop(recording);
    assert!(graphs == 0 && kernels == launches && launches > 40, "{graphs} graphs; {kernels} of {launches} kernels");
    assert_eq!(calls(0, [GRAPH_LAUNCH], || step(11)), [1], "afterwards as before");
}

#[test]
fn graphs_are_dropped_when_memory_is_short() {
    let _alone = alone();
    let Some(cuda) = standin::open::<F32State>(5).filter(|_| !standin::real()) else { return };
    let config = config(1, true, false, false);
    let run = |cuda: &Cuda<F32State>| {
        let mut training = Training::new(cuda, &config);
        let mut step = |seed| training.step(&[batch(&config, &[7, 5], seed)]);
        let mut losses: Vec<f64> = (0..SETTLED).map(&mut step).collect();
        assert!(cuda.zeros::<f32>(1 << 20).is_err(), "4 MiB fit into 1 MiB");
        losses.extend((10..10 + SETTLED).map(&mut step));
        losses
    };
    let mut losses = Vec::new();
    let made = calls(5, [INSTANTIATE], || losses = run(&cuda));
    assert_eq!(made, [2], "made before and after");
    cuda.set_launch_mode(LaunchMode::Eager);
    assert_eq!(losses, run(&cuda));
}

/// What the arena keeps for the next buffer is given back where memory is short.
#[test]
fn cached_memory_counts_as_free() {
    let _alone = alone();
    let Some(cuda) = standin::open::<F32State>(0).filter(|_| !standin::real()) else { return };
    let free = || cuda.free_memory().unwrap().bytes;
    let before = free();
    let buffer = cuda.zeros::<f32>(1 << 20).unwrap();
    assert_eq!(before - free(), 4 << 20);
    drop(buffer);
    assert_eq!(free(), before);
}
