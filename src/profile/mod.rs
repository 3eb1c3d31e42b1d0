//! Profiles of real steps, span by span, against the measured roofline.

mod summary;

pub use summary::{Row, Summary, summarize};

use crate::backend::trace::{self, Span};
use crate::backend::{Backend, Cost, Roofline};
use crate::engine::{
    Batch, Decoder, GenerateOptions, GradientOptions, Gradients, Member, MinimumCost, NoiseKind, SweepOptions,
};
use crate::error::{Error, Result};
use crate::modules::{Cell, LearningRates, ModuleSet, ParamId};
use crate::options::count;
use crate::train::{Optimizer, StepSettings};
use clap::{Args, ValueEnum};
use std::ops::RangeInclusive;

/// Workload of a profile.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Work {
    /// Forward, backward and AdamW on the modules of the set; the rest is frozen
    Train,
    /// Forward pass to the losses
    Forward,
    /// Greedy decoding of a batch of prompts; a step is `length` tokens of each
    Generate,
    /// The robustness sweep: every projection of the set perturbed alone, with both signs
    Sweep,
}

/// Options of a profile.
#[derive(Clone, Debug, PartialEq, Args)]
pub struct ProfileOptions {
    /// Workload
    #[arg(long, value_enum, default_value_t = Work::Train)]
    pub work: Work,
    /// Cells that [`Work::Train`] trains or [`Work::Sweep`] perturbs.
    #[arg(skip)]
    pub set: ModuleSet,
    /// Documents, or prompts, per step
    #[arg(long, value_parser = count, default_value_t = 4)]
    pub batch_size: usize,
    /// Tokens per document; with --work generate, of the prompt and of the answer
    #[arg(long, value_parser = count, default_value_t = 256)]
    pub length: usize,
    /// Recorded steps
    #[arg(long, value_parser = count, default_value_t = 3)]
    pub steps: usize,
    /// Warm-up steps before the first recorded one
    #[arg(long, default_value_t = 1)]
    pub warmup: usize,
    /// Activation checkpointing: keep one activation per layer and recompute the rest
    #[arg(long)]
    pub recompute: bool,
    /// Seed of the tokens.
    #[arg(skip)]
    pub seed: u64,
    /// Recorded steps, counted from 1, around which the CUDA profiler starts and stops, such as 3:5
    #[arg(long, value_name = "FIRST:LAST", value_parser = parse_range)]
    pub range: Option<RangeInclusive<usize>>,
}

impl ProfileOptions {
    /// Checks the ranges, for a model with this context.
    ///
    /// # Errors
    /// [`Error::Input`] names the option.
    pub fn check(&self, context: usize) -> Result<()> {
        if self.batch_size == 0 || self.length == 0 || self.steps == 0 {
            return Err(Error::input("--batch-size, --length, --steps", "0", "at least 1"));
        }
        if let Some(range) = self.range.as_ref().filter(|range| *range.end() > self.steps) {
            let found = format!("step {}", range.end());
            return Err(Error::input("--range", found, format!("at most --steps {}", self.steps)));
        }
        let tokens = self.length.saturating_mul(if self.work == Work::Generate { 2 } else { 1 });
        if tokens > context {
            let most = format!("at most the model's context of {context}");
            return Err(Error::input("--length", format!("documents of {tokens} tokens"), most));
        }
        Ok(())
    }
}

fn parse_range(text: &str) -> Result<RangeInclusive<usize>, String> {
    let range = text.split_once(':').and_then(|(first, last)| Some(first.parse().ok()?..=last.parse().ok()?));
    let valid = range.filter(|range| *range.start() > 0 && range.start() <= range.end());
    valid.ok_or_else(|| format!("{text}: expected two steps counted from 1, such as 3:5"))
}

/// A recorded profile.
#[derive(Clone, Debug, PartialEq)]
pub struct Profile {
    /// Start since the beginning of the recording, and duration, of each step, in nanoseconds.
    pub steps: Vec<(u64, u64)>,
    /// Tokens per step.
    pub tokens: usize,
    /// All spans.
    pub spans: Vec<Span>,
    /// Minimum cost of a step, by consecutive passes.
    pub minimum_cost: Vec<Cost>,
    /// The roofline.
    pub roofline: Roofline,
}

/// Runs steps and records their spans.
///
/// # Errors
/// [`Error::Input`] names an option that is out of range; [`Error::Failed`] where another recording is active; a
/// failing device.
pub fn profile<B: Backend>(decoder: &mut Decoder<B>, options: &ProfileOptions, roofline: Roofline) -> Result<Profile> {
    options.check(decoder.longest_context())?;
    let backend = decoder.backend.clone();
    let batch = batch(decoder, options);
    let minimum_cost = minimum_cost(decoder, options, &batch);
    let mut step = runner(decoder, options, &batch)?;
    for _ in 0..options.warmup {
        step()?;
    }
    backend.synchronize()?;
    let recording = trace::record().ok_or_else(|| Error::failed("another recording is active", "wait for its end"))?;
    let mut steps = Vec::with_capacity(options.steps);
    let range = options.range.clone().unwrap_or(0..=0);
    for i in 1..=options.steps {
        if i == *range.start() {
            backend.start_profiler()?;
        }
        let began = recording.now_ns();
        step()?;
        backend.synchronize()?;
        steps.push((began, recording.now_ns() - began));
        if i == *range.end() {
            backend.stop_profiler()?;
        }
    }
    let tokens = match options.work {
        Work::Train | Work::Forward | Work::Generate => options.batch_size * options.length,
        Work::Sweep => 2 * projections(&options.set).count() * options.batch_size * options.length,
    };
    Ok(Profile { steps, tokens, spans: recording.take(), minimum_cost, roofline })
}

/// Cells that the sweep perturbs.
fn projections(set: &ModuleSet) -> impl Iterator<Item = Cell> + '_ {
    set.iter().filter(|cell| matches!(cell, Cell::Module(_)))
}

fn minimum_cost<B: Backend>(decoder: &Decoder<B>, options: &ProfileOptions, batch: &Batch) -> Vec<Cost> {
    let of = |trains: &dyn Fn(ParamId) -> bool| MinimumCost::new::<B>(&decoder.config, None, trains);
    let set = &options.set;
    match options.work {
        Work::Forward => vec![of(&|_| false).forward(&batch.starts, batch.trained_tokens())],
        Work::Train => of(&|id| set.contains(id.cell())).step(std::slice::from_ref(batch)),
        Work::Generate => of(&|_| false).generation(&batch.starts, options.length),
        Work::Sweep => vec![of(&|_| false).sweep(&batch.starts, set)],
    }
}

type Step<'a> = Box<dyn FnMut() -> Result<()> + 'a>;

fn runner<'a, B: Backend>(
    decoder: &'a mut Decoder<B>,
    options: &'a ProfileOptions,
    batch: &'a Batch,
) -> Result<Step<'a>> {
    let set = &options.set;
    Ok(match options.work {
        Work::Forward => Box::new(|| decoder.losses(batch).map(drop)),
        Work::Train => {
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
                let options = GradientOptions { recompute: options.recompute, ..GradientOptions::scaled(scale) };
                decoder.loss_and_gradients(batch, &mut gradients, options)?;
                optimizer.step(decoder, &gradients, &settings).map(drop)
            })
        }
        Work::Generate => {
            let prompts: Vec<Vec<u32>> =
                batch.starts.windows(2).map(|w| batch.tokens[w[0] as usize..w[1] as usize].to_vec()).collect();
            let generate = GenerateOptions { max_new_tokens: options.length, ..GenerateOptions::default() };
            Box::new(move || decoder.generate(&prompts, &generate, &mut |_, _| {}).map(drop))
        }
        Work::Sweep => {
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

/// Documents of random tokens; every token but the last is trained.
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
