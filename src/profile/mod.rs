//! What a step's time is spent on: real steps of a model, recorded span by span and held against what the machine can do.

mod summary;

pub use summary::{Row, Summary, summarize};

use crate::backend::trace::{self, Span};
use crate::backend::{Backend, Cost, Roofline};
use crate::engine::{Batch, Decoder, Floor, GenerateOptions, Gradients, Member, NoiseKind, SweepOptions};
use crate::error::{Error, Result};
use crate::modules::{Cell, LearningRates, ModuleSet, ParamId};
use crate::train::{Optimizer, StepSettings};
use std::ops::RangeInclusive;

/// What is run.
#[derive(Clone, Debug, PartialEq)]
pub enum Work {
    /// Forward, backward and AdamW of the modules in the set; the rest is frozen.
    Train(ModuleSet),
    /// Forward to the losses.
    Forward,
    /// Greedy tokens of a batch of prompts: a step is `length` tokens of each.
    Generate,
    /// Perturbed copies: every projection of the set, one at a time, with both signs.
    Sweep(ModuleSet),
}

/// How much of it.
#[derive(Clone, Debug, PartialEq)]
pub struct ProfileOptions {
    /// What is run.
    pub work: Work,
    /// Documents, or prompts.
    pub batch_size: usize,
    /// Tokens of each.
    pub length: usize,
    /// Steps that are recorded.
    pub steps: usize,
    /// Steps before that, which allocate and warm up.
    pub warmup: usize,
    /// Keep one activation a layer and run layers again.
    pub recompute: bool,
    /// Seed of the tokens.
    pub seed: u64,
    /// Recorded steps, counted from 1, around which an outside profiler is told to start and to stop.
    pub range: Option<RangeInclusive<usize>>,
}

/// What was recorded.
#[derive(Clone, Debug, PartialEq)]
pub struct Profile {
    /// Nanoseconds of each step, from its first call to the end of its last kernel; its begin since the recording began.
    pub steps: Vec<(u64, u64)>,
    /// Tokens of a step.
    pub tokens: usize,
    /// All spans.
    pub spans: Vec<Span>,
    /// The least that a step must compute and move: passes that follow one another.
    pub floor: Vec<Cost>,
    /// What the spans are read against.
    pub roofline: Roofline,
}

/// Runs steps and records their spans, to be read against `roofline`.
///
/// # Errors
/// Sizes that the model does not have room for; a failing device; a recording that runs already.
pub fn profile<B: Backend>(decoder: &mut Decoder<B>, options: &ProfileOptions, roofline: Roofline) -> Result<Profile> {
    if options.batch_size == 0 || options.length == 0 || options.steps == 0 {
        return Err(Error::input("--batch-size, --length, --steps", "0", "at least 1"));
    }
    let tokens = options.length * if options.work == Work::Generate { 2 } else { 1 };
    if tokens > decoder.longest_context() {
        let most = format!("at most the model's context of {}", decoder.longest_context());
        return Err(Error::input("--length", format!("documents of {tokens} tokens"), most));
    }
    let backend = decoder.backend.clone();
    let batch = batch(decoder, options);
    let floor = floor(decoder, options, &batch);
    let mut step = runner(decoder, options, &batch)?;
    for _ in 0..options.warmup {
        step()?;
    }
    backend.synchronize()?;
    let recording = trace::record().ok_or_else(|| Error::failed("something else is recording", "let it finish"))?;
    let mut steps = Vec::with_capacity(options.steps);
    let range = options.range.clone().unwrap_or(0..=0);
    for i in 1..=options.steps {
        if i == *range.start() {
            backend.profiler(true)?;
        }
        let began = recording.now_ns();
        step()?;
        backend.synchronize()?;
        steps.push((began, recording.now_ns() - began));
        if i == *range.end() {
            backend.profiler(false)?;
        }
    }
    let tokens = match options.work {
        Work::Train(_) | Work::Forward | Work::Generate => options.batch_size * options.length,
        Work::Sweep(ref set) => 2 * projections(set).count() * options.batch_size * options.length,
    };
    Ok(Profile { steps, tokens, spans: recording.take(), floor, roofline })
}

/// What the sweep perturbs.
fn projections(set: &ModuleSet) -> impl Iterator<Item = Cell> + '_ {
    set.iter().filter(|cell| matches!(cell, Cell::Module(_)))
}

fn floor<B: Backend>(decoder: &Decoder<B>, options: &ProfileOptions, batch: &Batch) -> Vec<Cost> {
    let of = |trains: &dyn Fn(ParamId) -> bool| Floor::new::<B>(&decoder.config, None, trains);
    match &options.work {
        Work::Forward => vec![of(&|_| false).forward(&batch.starts, batch.trained_tokens())],
        Work::Train(set) => of(&|id| set.contains(id.cell())).step(std::slice::from_ref(batch)),
        Work::Generate => of(&|_| false).generation(&batch.starts, options.length),
        Work::Sweep(set) => vec![of(&|_| false).sweep(&batch.starts, set)],
    }
}

type Step<'a> = Box<dyn FnMut() -> Result<()> + 'a>;

fn runner<'a, B: Backend>(
    decoder: &'a mut Decoder<B>,
    options: &'a ProfileOptions,
    batch: &'a Batch,
) -> Result<Step<'a>> {
    Ok(match &options.work {
        Work::Forward => Box::new(|| decoder.losses(batch).map(drop)),
        Work::Train(set) => {
            let rates = LearningRates::masked(set, &decoder.config.cells(), 0.0);
            let mut gradients = Gradients::new(decoder, |id| rates.trains(id.cell()))?;
            let mut optimizer = Optimizer::new(decoder, &rates, |_| true)?;
            let scale = 1.0 / batch.trained_tokens().max(1) as f32;
            let settings = StepSettings {
                lr: 1e-5,
                weight_decay: 0.0,
                beta1: 0.9,
                beta2: 0.999,
                eps: 1e-8,
                max_grad_norm: Some(1.0),
                seed: options.seed,
            };
            Box::new(move || {
                decoder.loss_and_gradients(batch, &mut gradients, scale, false, options.recompute)?;
                optimizer.step(decoder, &gradients, &settings).map(drop)
            })
        }
        Work::Generate => {
            let prompts: Vec<Vec<u32>> =
                batch.starts.windows(2).map(|w| batch.tokens[w[0] as usize..w[1] as usize].to_vec()).collect();
            let generate = GenerateOptions { max_new_tokens: options.length, ..GenerateOptions::default() };
            Box::new(move || decoder.generate(&prompts, &generate, &mut |_, _| {}).map(drop))
        }
        Work::Sweep(set) => {
            let members: Vec<Member> = projections(set)
                .flat_map(|cell| {
                    let cells: ModuleSet = [cell].into_iter().collect();
                    [false, true].map(|negative| Member { cells: cells.clone(), seed: options.seed, negative })
                })
                .collect();
            let sweep = SweepOptions {
                kind: NoiseKind::Gaussian,
                epsilon: 0.1,
                layers: vec![decoder.config.layers],
                head_rows: vec![0],
                budget_bytes: 1 << 30,
            };
            Box::new(move || decoder.sweep(batch, &members, &sweep, &mut |_, _| Ok(())))
        }
    })
}

/// Documents of tokens drawn from the whole vocabulary; every token but the last is trained.
fn batch<B: Backend>(decoder: &Decoder<B>, options: &ProfileOptions) -> Batch {
    let mut rng = crate::rng::Philox::new(options.seed, 0);
    let documents: Vec<Vec<u32>> = (0..options.batch_size)
        .map(|_| (0..options.length).map(|_| rng.below(decoder.config.vocab) as u32).collect())
        .collect();
    let mut batch = Batch::from_prompts(documents.iter().map(Vec::as_slice));
    for document in &documents {
        batch.targets.extend(&document[1..]);
        batch.targets.push(crate::backend::IGNORE);
    }
    batch
}
