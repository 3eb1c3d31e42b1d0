//! `swat profile`: where a step's time goes.

use super::open::{ModelArgs, OnDevice, State};
use super::{Common, print_json, print_line};
use crate::backend::{Backend, Roofline};
use crate::error::{Error, Result};
use crate::modules::ModuleSet;
use crate::profile::{ProfileOptions, Work, profile, summarize};
use crate::report::format::{fixed, percent};
use crate::report::{TextStyle, profile_tables, write_trace};
use crate::train::peak_bytes;
use clap::{Args, ValueEnum};
use serde_json::json;
use std::ops::RangeInclusive;
use std::path::PathBuf;

/// Real steps of a model, by kernel and by layer: time, bytes, FLOPs, share of what this machine can do
#[derive(Args)]
#[command(after_help = "Examples:
  swat profile --model DIR --batch-size 4 --length 256
  swat profile --model DIR --mods 'layers.16-29.{q_proj,k_proj,v_proj,o_proj}' --trace step.json     open step.json in ui.perfetto.dev
  swat profile --model DIR --work generate --batch-size 1 --length 64
  ncu --profile-from-start off swat profile --model DIR --steps 5 --range 3:3
  nsys profile -t cuda,nvtx swat profile --model DIR --nvtx

The ceilings are measured first: large products and a large copy on the same backend. \"of ceiling\" is the time that a
row's bytes and FLOPs would take there over the time it took: each tensor of a call counts once, so that what stays in a
cache between calls can be faster than a copy of memory. The speed of light is the same of the whole step, of which only
this counts: products and attention, causal and without what --recompute runs again; weights once a pass, gradients and
moments once a step, keys and values once a token. It exceeds 100 % only where the ceilings were measured too low, or the
weights stay in a cache.")]
pub(super) struct ProfileCommand {
    #[command(flatten)]
    common: Common,
    #[command(flatten)]
    model: ModelArgs,
    /// What to run
    #[arg(long, value_enum, default_value_t = WorkArg::Train)]
    work: WorkArg,
    /// What trains, or what the sweep perturbs: a set such as layers.8-15.{q_proj,v_proj}, or all
    #[arg(long, default_value = "all")]
    mods: String,
    /// Documents a step
    #[arg(long, default_value_t = 4)]
    batch_size: usize,
    /// Tokens a document; with --work generate, of the prompt and of the answer
    #[arg(long, default_value_t = 256)]
    length: usize,
    /// Steps to record
    #[arg(long, default_value_t = 3)]
    steps: usize,
    /// Steps before the first that is recorded
    #[arg(long, default_value_t = 1)]
    warmup: usize,
    /// Keep one activation a layer and run layers again
    #[arg(long)]
    recompute: bool,
    /// On a GPU, gradients and moments in f32 (12 bytes a trained parameter) or bf16 (6)
    #[arg(long, value_enum, default_value_t = State::F32)]
    pub(super) state: State,
    /// Write all spans as a Chrome trace
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
    /// Steps around which the CUDA profiler starts and stops, such as 3:5
    #[arg(long, value_name = "FIRST:LAST", value_parser = range)]
    range: Option<RangeInclusive<usize>>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum WorkArg {
    /// Forward, backward, optimiser
    Train,
    /// Forward to the losses
    Forward,
    /// Greedy tokens
    Generate,
    /// The robustness sweep
    Sweep,
}

fn range(text: &str) -> Result<RangeInclusive<usize>, String> {
    let wrong = || format!("{text}: expected two steps counted from 1, such as 3:5");
    let (first, last) = text.split_once(':').ok_or_else(wrong)?;
    let (first, last) = (first.parse().map_err(|_| wrong())?, last.parse().map_err(|_| wrong())?);
    if first == 0 || last < first { Err(wrong()) } else { Ok(first..=last) }
}

impl OnDevice for ProfileCommand {
    fn common(&self) -> &Common {
        &self.common
    }

    fn run<B: Backend>(self, backend: B) -> Result<()> {
        if let Some(range) = self.range.as_ref().filter(|range| *range.end() > self.steps) {
            return Err(Error::input(
                "--range",
                format!("step {}", range.end()),
                format!("at most --steps {}", self.steps),
            ));
        }
        // Before the model is there, so that what it takes is not on top of the peak.
        let roofline = Roofline::measure(&backend)?;
        let mut opened = self.model.open(backend)?;
        let device = opened.decoder.backend.name();
        let set = ModuleSet::parse(&self.mods, &opened.files.config.cells())?;
        let options = ProfileOptions {
            work: match self.work {
                WorkArg::Train => Work::Train(set),
                WorkArg::Forward => Work::Forward,
                WorkArg::Generate => Work::Generate,
                WorkArg::Sweep => Work::Sweep(set),
            },
            batch_size: self.batch_size,
            length: self.length,
            steps: self.steps,
            warmup: self.warmup,
            recompute: self.recompute,
            seed: self.common.seed,
            range: self.range,
        };
        let profile = profile(&mut opened.decoder, &options, roofline)?;
        if let Some(path) = &self.trace {
            write_trace(&profile, &device, path)?;
        }
        let summary = summarize(&profile);
        if self.common.json {
            let mut value = serde_json::to_value(&summary).unwrap_or_default();
            value["device"] = json!(device);
            value["tokens"] = json!(profile.tokens);
            value["peak_bytes"] = json!(opened.decoder.backend.device_peak_bytes().unwrap_or_else(peak_bytes));
            return print_json(&value);
        }
        for table in profile_tables(&summary) {
            print_line(&table.text(TextStyle::Unicode))?;
        }
        let roofline = summary.roofline;
        print_line(&format!(
            "ceilings on {device}: {} GFLOP/s (product), {} GB/s (copy)",
            fixed(roofline.flops_per_s / 1e9, 1),
            fixed(roofline.bytes_per_s / 1e9, 1)
        ))?;
        print_line(&format!(
            "step {} ms, {} tok/s; the rows explain {} of it; speed of light {}",
            fixed(summary.step_ms, 2),
            fixed(summary.tok_per_s, 0),
            percent(summary.explained, 1),
            percent(summary.speed_of_light, 1)
        ))
    }
}
