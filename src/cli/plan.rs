//! `swat plan`: memory and compute of a run.

use super::common::{Common, print_json, print_line};
use super::open::{Float, ModelArgs, State};
use crate::backend::cpu::Cpu;
use crate::backend::cuda::{Bf16State, Cuda, F32State};
use crate::engine::{Lora, Plan, Workload};
use crate::error::Result;
use crate::model::ModelDir;
use crate::modules::{ModuleSet, ParamId};
use crate::options::{count as count_of, share};
use crate::report::format::{bytes, count, percent};
use crate::report::memory_table;
use crate::train::TuneOptions;
use clap::{Args, ValueEnum};
use serde_json::json;

/// Memory, FLOPs and trainable share of a tuning run, before anything is allocated
#[derive(Args)]
#[command(after_help = "Examples:
  swat plan --model DIR --batch-size 4 --max-length 256
  swat plan --model DIR --mods 'layers.16-31.{o_proj,v_proj}' --recompute
  swat plan --model DIR --device cuda --state bf16        needs no GPU; where there is one, its free memory is shown")]
pub(super) struct PlanCommand {
    #[command(flatten)]
    model: ModelArgs,
    /// Modules that train: a set such as layers.8-15.{q_proj,v_proj}, or all
    #[arg(long, default_value = "all")]
    mods: String,
    /// Documents per micro-batch
    #[arg(long, value_parser = count_of, default_value_t = TuneOptions::default().batch_size)]
    batch_size: usize,
    /// Tokens per document
    #[arg(long, value_parser = count_of, default_value_t = TuneOptions::default().max_length)]
    max_length: usize,
    /// Share of the tokens with a loss (answers)
    #[arg(long, value_parser = share::<f64>, default_value_t = 1.0)]
    trained_share: f64,
    /// Activation checkpointing: keep one activation per layer and recompute the rest
    #[arg(long)]
    recompute: bool,
    /// full, or lora (adapters of rank 8 on q, k, v, o of the set)
    #[arg(long, value_enum, default_value_t = MethodName::Full)]
    method: MethodName,
    /// Rank of the adapters
    #[arg(long, value_parser = count_of, default_value_t = Lora::default().rank)]
    lora_rank: usize,
    /// Precision of gradients and moments beside bf16 weights: f32 (12 bytes per trained parameter) or bf16 (6)
    #[arg(long, value_enum, default_value_t = State::F32)]
    state: State,
}

/// A [`crate::secure::Method`] by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum MethodName {
    /// All parameters
    Full,
    /// LoRA adapters
    Lora,
}

impl PlanCommand {
    pub(super) fn run(self, common: &Common) -> Result<()> {
        let files = ModelDir::open(&self.model.model)?;
        let config = &files.config;
        let set = ModuleSet::parse(&self.mods, &config.cells())?;
        let lora = (self.method == MethodName::Lora).then(|| Lora { rank: self.lora_rank, ..Lora::default() });
        let workload = |recompute| Workload {
            tokens: self.batch_size * self.max_length,
            document_tokens: self.max_length,
            trained_share: self.trained_share,
            recompute,
            lora,
        };
        let trains = |id: ParamId| match id {
            ParamId::LoraA(m) | ParamId::LoraB(m) => m.kind.in_attention() && set.contains(id.cell()),
            _ => lora.is_none() && set.contains(id.cell()),
        };
        let device = common.gpu();
        let float = common.float(device, common.dtype, Some(&self.model.model))?;
        let plan = |recompute| match (device, float, self.state) {
            (None, Float::F32, _) => Plan::new::<Cpu>(config, &workload(recompute), trains),
            (None, Float::Bf16, State::F32) => Plan::new::<Cpu<F32State>>(config, &workload(recompute), trains),
            (None, Float::Bf16, State::Bf16) => Plan::new::<Cpu<Bf16State>>(config, &workload(recompute), trains),
            (Some(_), _, State::F32) => Plan::new::<Cuda<F32State>>(config, &workload(recompute), trains),
            (Some(_), _, State::Bf16) => Plan::new::<Cuda<Bf16State>>(config, &workload(recompute), trains),
        };
        let free = match device {
            None => free_memory(),
            Some(ordinal) => Cuda::<F32State>::open(ordinal).and_then(|gpu| gpu.memory()).ok().map(|(free, _)| free),
        };
        let (smaller, plan) = (plan(true).total_bytes(), plan(self.recompute));
        let device = device.map_or("cpu".into(), |ordinal| format!("cuda:{ordinal}"));
        if common.json {
            let mut value = plan_json(&plan);
            value["device"] = json!(device);
            value["free_bytes"] = json!(free);
            return print_json(&value);
        }
        print_line(memory_table(&[(device, plan.clone())]).text().trim_end())?;
        print_line(&format!(
            "trainable    {:>12}  {} of {} parameters",
            percent(plan.trainable_share(), 1),
            count(plan.trainable),
            count(plan.parameters)
        ))?;
        print_line(&format!(
            "FLOPs/token  {:>12}  forward {:.3e}, backward {:.3e}",
            format!("{:.3e}", plan.forward_flops + plan.backward_flops),
            plan.forward_flops,
            plan.backward_flops
        ))?;
        let Some(free) = free else { return Ok(()) };
        print_line(&format!("free now     {:>12}", bytes(free)))?;
        if plan.total_bytes() > free {
            let help = if !self.recompute && smaller <= free {
                format!("--recompute brings it to {}", bytes(smaller))
            } else {
                "take a smaller --batch-size, --max-length or --mods, or --method lora".to_string()
            };
            print_line(&format!("does not fit: {help}"))?;
        }
        Ok(())
    }
}

/// A plan as scripts see it.
pub(super) fn plan_json(plan: &Plan) -> serde_json::Value {
    let mut value = serde_json::to_value(plan).unwrap_or_default();
    value["total_bytes"] = json!(plan.total_bytes());
    value["trainable_share"] = json!(plan.trainable_share());
    value
}

/// Bytes that could be allocated now; `None` where the system does not say.
pub(super) fn free_memory() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find(|l| l.starts_with("MemAvailable:"))?;
    line.split_whitespace().nth(1)?.parse::<u64>().ok().map(|kib| kib * 1024)
}
