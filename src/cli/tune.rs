//! `swat tune`: two-phase tuning, or any of its ablations.

use super::open::{ModelArgs, OnDevice, State};
use super::plan::plan_json;
use super::progress::StepBar;
use super::{Common, print_json, print_line};
use crate::backend::{Backend, Roofline};
use crate::data::{Chat, Examples, mix};
use crate::engine::Lora;
use crate::error::{Error, Result};
use crate::modules::ModuleSet;
use crate::report::format::{bytes, percent};
use crate::secure::{Method, TuneJob, TuneOutput, attention_projections, resolve_mods, tune_directory};
use crate::train::{PhaseOptions, Schedule, TuneOptions};
use clap::{Args, ValueEnum};
use serde_json::json;
use std::path::PathBuf;

/// Two-phase secure tuning of a model: first Mods_Rob alone, then everything; plain tuning without --mods
#[derive(Args)]
#[command(after_help = "Examples:
  swat tune --model DIR --data train.jsonl --out tuned --epochs 3                        plain
  swat tune --model DIR --data train.jsonl --out tuned --mods mods.json --mods-epochs 4 --epochs 3
  swat tune --model DIR --data train.jsonl --out tuned --mods 'layers.8-15.{o_proj,v_proj}' --mods-steps 200 --steps 400
  swat tune ... --resume                                                continues an interrupted run, bit for bit")]
pub(super) struct Tune {
    #[command(flatten)]
    common: Common,
    #[command(flatten)]
    model: ModelArgs,
    /// Training conversations: alpaca, sharegpt, messages or prompt-completion lines
    #[arg(long, value_name = "FILE", required = true)]
    data: Vec<PathBuf>,
    /// Where the tuned model directory appears when it is complete
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Phase 1 trains these: a file of `swat search`, or a set such as layers.8-15.{q_proj,v_proj}
    #[arg(long, value_name = "SET_OR_FILE")]
    mods: Option<String>,
    /// Epochs of phase 1
    #[arg(long, conflicts_with = "mods_steps")]
    mods_epochs: Option<u64>,
    /// Optimiser steps of phase 1
    #[arg(long)]
    mods_steps: Option<u64>,
    /// Learning rate of phase 1, if not --lr
    #[arg(long)]
    mods_lr: Option<f64>,
    /// Factor on the learning rate of all other modules in phase 1; 0 = frozen, bit for bit
    #[arg(long, default_value_t = 0.0)]
    rest_lr_factor: f32,
    /// Everything first, Mods_Rob second (an ablation)
    #[arg(long)]
    reversed: bool,
    /// Epochs of phase 2, on everything; 0 = no such phase
    #[arg(long, conflicts_with = "steps")]
    epochs: Option<u64>,
    /// Optimiser steps of phase 2; 0 = no such phase
    #[arg(long)]
    steps: Option<u64>,
    /// full, or lora: adapters, merged at the end
    #[arg(long, value_enum, default_value_t = MethodArg::Full)]
    method: MethodArg,
    /// Rank of the adapters
    #[arg(long, default_value_t = 8)]
    lora_rank: usize,
    /// The adapters' output is scaled by alpha / rank
    #[arg(long, default_value_t = 16.0)]
    lora_alpha: f32,
    /// Which projections get adapters; q, k, v, o of every layer if not given
    #[arg(long, value_name = "SET")]
    lora_modules: Option<String>,
    /// Learning rate; 2e-5 for full, 2e-4 for lora
    #[arg(long)]
    lr: Option<f64>,
    /// Shape of the learning rate over each phase
    #[arg(long, value_enum, default_value_t = ScheduleArg::Cosine)]
    schedule: ScheduleArg,
    /// Steps of linear warm-up of the learning rate at the start of each phase
    #[arg(long, default_value_t = 0)]
    lr_warmup_steps: u64,
    /// Decoupled weight decay on what trains
    #[arg(long, default_value_t = 0.0)]
    weight_decay: f64,
    /// Clip the global norm of the gradients; 0 = no clipping
    #[arg(long, default_value_t = 1.0)]
    max_grad_norm: f64,
    /// Examples a micro-batch; activation memory grows in proportion
    #[arg(long, default_value_t = 8)]
    batch_size: usize,
    /// Micro-batches a step
    #[arg(long, default_value_t = 1)]
    grad_accum: usize,
    /// Longest example in tokens; longer ones are cut
    #[arg(long, default_value_t = 1024)]
    max_length: usize,
    /// Fill rows of --max-length with whole examples
    #[arg(long, action = clap::ArgAction::Set, default_value_t = false)]
    packing: bool,
    /// A new order each epoch
    #[arg(long, action = clap::ArgAction::Set, default_value_t = true)]
    shuffle: bool,
    /// A checkpoint every so many steps (weights that changed and moments, on disk); 0 = between phases only
    #[arg(long, default_value_t = 200)]
    save_every: u64,
    /// Checkpoints that are kept
    #[arg(long, default_value_t = 2)]
    keep_last: usize,
    /// Keep one activation a layer instead of about ten: a third more time
    #[arg(long)]
    recompute: bool,
    /// Carry Adam's moments from phase 1 into phase 2
    #[arg(long)]
    keep_optimizer: bool,
    /// End with a running mean of the weights of this decay (a baseline)
    #[arg(long)]
    ema_decay: Option<f32>,
    /// Mix in lines of another training file, such as refusals
    #[arg(long, value_name = "FILE", requires = "mix_share")]
    mix: Option<PathBuf>,
    /// Share of the examples that come from --mix
    #[arg(long)]
    mix_share: Option<f64>,
    /// Continue an interrupted run
    #[arg(long)]
    resume: bool,
    /// Replace --out, and forget an unfinished run
    #[arg(long)]
    force: bool,
    /// On a GPU, gradients and moments in f32 (12 bytes a trained parameter) or bf16 (6)
    #[arg(long, value_enum, default_value_t = State::F32)]
    pub(super) state: State,
    /// Largest safetensors shard, in MiB
    #[arg(long, default_value_t = 4096)]
    max_shard_mib: u64,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum MethodArg {
    Full,
    Lora,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum ScheduleArg {
    Constant,
    Linear,
    Cosine,
    Wsd,
}

impl OnDevice for Tune {
    fn common(&self) -> &Common {
        &self.common
    }

    fn run<B: Backend>(self, backend: B) -> Result<()> {
        if self.mods.is_none() && (self.mods_epochs.is_some() || self.mods_steps.is_some()) {
            return Err(Error::input("--mods-epochs", "no --mods", "--mods SET_OR_FILE: what phase 1 trains"));
        }
        // Before the model is there, so that what it takes is not on top of the run's peak.
        let roofline = Roofline::measure(&backend)?;
        let mut opened = self.model.open(backend)?;
        let cells = opened.files.config.cells();
        let hash = opened.files.hash()?;
        let read = |text| resolve_mods(text, &opened.files.config, None, Some(hash));
        let mods = self.mods.as_deref().map(read).transpose()?;
        let job = self.job(mods, &cells, opened.files.config.layers)?;
        let template = self.model.template(&opened.files)?;
        let chat = Chat::new(&template, &opened.tokenizer, &opened.files.config.eos);
        let mut examples = Vec::new();
        for path in &self.data {
            examples.extend(self.read(path, &chat)?);
        }
        if let (Some(path), Some(share)) = (&self.mix, self.mix_share) {
            examples = mix(&examples, &self.read(path, &chat)?, share, self.common.seed)?;
        }
        let output = TuneOutput {
            path: self.out.clone(),
            force: self.force,
            resume: self.resume,
            max_shard_bytes: self.max_shard_mib << 20,
            roofline: Some(roofline),
            config: json!({ "model": self.model.model, "data": self.data, "mix": self.mix, "mix_share": self.mix_share,
                "seed": self.common.seed, "swat": env!("CARGO_PKG_VERSION") }),
        };
        let mut callbacks = StepBar::new(&self.common);
        let summary = tune_directory(&opened.files, &mut opened.decoder, examples, &job, &output, &mut callbacks)?;
        callbacks.finish();
        if self.common.json {
            let plans = callbacks.plans.iter().map(|(phase, plan)| (phase.clone(), plan_json(plan)));
            return print_json(&json!({ "out": self.out, "phases": summary.phases,
                "peak_bytes": summary.peak_bytes, "planned_bytes": summary.planned_bytes,
                "plans": plans.collect::<serde_json::Map<_, _>>(), "resumed_from": summary.resumed_from }));
        }
        for phase in &summary.phases {
            let loss = |x: Option<f32>| x.map_or("none".into(), |x| format!("{x:.4}"));
            print_line(&format!(
                "phase {:<5} {:>6} steps  loss {} -> {}  {:.0} tok/s",
                phase.phase,
                phase.steps,
                loss(phase.first_loss),
                loss(phase.last_loss),
                phase.tokens as f64 / phase.seconds.max(1e-9)
            ))?;
        }
        print_line(&format!("peak memory {}, {} planned", bytes(summary.peak_bytes), bytes(summary.planned_bytes)))?;
        print_line(&format!("the tuned model is in {}", self.out.display()))
    }
}

impl Tune {
    fn read(&self, path: &std::path::Path, chat: &Chat<'_>) -> Result<Vec<crate::data::Example>> {
        let read = Examples::read(path, chat, self.max_length)?;
        let total = read.examples.len() + read.dropped;
        for (count, what) in [(read.cut, "were cut to"), (read.dropped, "were left out: their prompts fill")] {
            if count > 0 && !self.common.quiet {
                let share = percent(count as f64 / total as f64, 1);
                eprintln!("{}: {count} examples ({share}) {what} {} tokens", path.display(), self.max_length);
            }
        }
        Ok(read.examples)
    }

    fn job(&self, mods: Option<ModuleSet>, cells: &ModuleSet, layers: usize) -> Result<TuneJob> {
        let method = match self.method {
            MethodArg::Full => Method::Full,
            MethodArg::Lora => Method::Lora {
                lora: Lora { rank: self.lora_rank, alpha: self.lora_alpha },
                modules: match &self.lora_modules {
                    Some(text) => ModuleSet::parse(text, cells)?,
                    None => attention_projections(layers),
                },
            },
        };
        let default_lr = if matches!(self.method, MethodArg::Full) { 2e-5 } else { 2e-4 };
        let schedule = match self.schedule {
            ScheduleArg::Constant => Schedule::Constant,
            ScheduleArg::Linear => Schedule::Linear,
            ScheduleArg::Cosine => Schedule::Cosine,
            ScheduleArg::Wsd => Schedule::Wsd,
        };
        let phase = |lr: Option<f64>, epochs, steps| PhaseOptions {
            lr: lr.or(self.lr).unwrap_or(default_lr),
            schedule,
            lr_warmup_steps: self.lr_warmup_steps,
            weight_decay: self.weight_decay,
            max_grad_norm: self.max_grad_norm,
            epochs,
            steps,
            ..PhaseOptions::default()
        };
        Ok(TuneJob {
            mods,
            rest_lr_factor: self.rest_lr_factor,
            reversed: self.reversed,
            seeds: None,
            method,
            shared: TuneOptions {
                batch_size: self.batch_size,
                grad_accum: self.grad_accum,
                max_length: self.max_length,
                packing: self.packing,
                shuffle: self.shuffle,
                seed: self.common.seed,
                save_every: self.save_every,
                keep_last: self.keep_last,
                recompute: self.recompute,
                keep_optimizer: self.keep_optimizer,
                ema_decay: self.ema_decay,
                ..TuneOptions::default()
            },
            mods_phase: phase(self.mods_lr, self.mods_epochs, self.mods_steps),
            all_phase: phase(None, self.epochs, self.steps),
        })
    }
}
