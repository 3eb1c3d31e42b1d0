//! `swat profile`: time of real steps, by kernel and by layer.

use super::common::{Common, print_json, print_line};
use super::names::Names;
use super::open::{ModelArgs, OnDevice, State};
use crate::backend::{Backend, Roofline};
use crate::error::Result;
use crate::io::{IfExists, check_apart, check_file};
use crate::modules::ModuleSet;
use crate::profile::{ProfileOptions, profile, summarize};
use crate::report::format::{fixed, percent};
use crate::report::{is_trace, profile_tables, write_trace};
use crate::train::peak_bytes;
use clap::Args;
use serde_json::json;
use std::path::PathBuf;

/// Profile of real steps, by kernel and by layer: time, bytes, FLOPs, share of the measured roofline
#[derive(Args)]
#[command(after_help = "Examples:
  swat profile --model DIR --batch-size 4 --length 256
  swat profile --model DIR --mods 'layers.16-29.{q_proj,k_proj,v_proj,o_proj}' --trace step.json     open step.json in ui.perfetto.dev
  swat profile --model DIR --work generate --batch-size 1 --length 64
  ncu --profile-from-start off swat profile --model DIR --steps 5 --range 3:3
  nsys profile -t cuda,nvtx swat profile --model DIR --nvtx

The roofline is measured first, by large matrix products and a large copy on the same backend. \"of ceiling\" is a row's
time at the roofline over its measured time. Each tensor of a call counts once, so that data that stays in a cache between
calls can exceed memory bandwidth. The speed of light is the same ratio for the whole step, of its minimum cost: products
and attention (causal, without recomputation), weights once per pass, gradients and moments once per step, keys and values
once per token. It exceeds 100 % only if the roofline was measured too low, or weights stay in a cache.")]
pub(super) struct ProfileCommand {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    options: ProfileOptions,
    /// Modules that train, or that the sweep perturbs: a set such as layers.8-15.{q_proj,v_proj}, or all
    #[arg(long, default_value = "all")]
    mods: String,
    /// Precision of gradients and moments beside bf16 weights: f32 (12 bytes per trained parameter) or bf16 (6)
    #[arg(long, value_enum, default_value_t = State::F32)]
    state: State,
    /// Write all spans as a Chrome trace
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
}

impl OnDevice for ProfileCommand {
    fn model(&self) -> Option<PathBuf> {
        Some(self.model.model.clone())
    }

    fn state(&self) -> State {
        self.state
    }

    fn resolve(&mut self, names: &mut Names<'_>) -> Result<()> {
        self.model.resolve(names)
    }

    fn run<B: Backend>(self, common: &Common, backend: B) -> Result<()> {
        if let Some(path) = &self.trace {
            check_apart(&[("--trace", path)], &self.model.inputs())?;
            check_file(path, IfExists::Replace, is_trace)?;
        }
        let text = self.model.open_plain_text()?;
        self.options.check(text.files.config.max_positions)?;
        let set = ModuleSet::parse(&self.mods, &text.files.config.cells())?;
        // Before the model is loaded, so that its buffers do not raise the peak memory.
        let roofline = Roofline::measure(&backend)?;
        let mut model = text.load(backend)?;
        let device = model.decoder.backend.name();
        let options = ProfileOptions { set, seed: common.seed, ..self.options };
        let profile = profile(&mut model.decoder, &options, roofline)?;
        if let Some(path) = &self.trace {
            write_trace(&profile, &device, path)?;
        }
        let summary = summarize(&profile);
        if common.json {
            let mut value = serde_json::to_value(&summary).unwrap_or_default();
            value["device"] = json!(device);
            value["tokens"] = json!(profile.tokens);
            value["peak_bytes"] = json!(model.decoder.backend.device_peak_bytes().unwrap_or_else(peak_bytes));
            return print_json(&value);
        }
        for table in profile_tables(&summary) {
            print_line(&table.text())?;
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
