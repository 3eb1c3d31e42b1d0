//! `swat plan`: memory and compute of a run.

use super::common::{Common, print_json, print_line};
use super::method::MethodName;
use super::names::Names;
use super::open::{Float, ModelArgs, State, check_state};
use crate::backend::cpu::Cpu;
use crate::backend::cuda::{Bf16State, Cuda, F32State};
use crate::backend::{Backend, FreeMemory};
use crate::engine::{Lora, Plan, RankStep, Speeds, Workload, lora_rank};
use crate::error::{Error, Result};
use crate::model::{Adapter, ModelConfig, ModelDir};
use crate::modules::{ModuleSet, ParamId};
use crate::options::{above_zero, count as count_of, inner_share, share};
use crate::report::format::{bytes, count, percent};
use crate::report::memory_table;
use crate::train::TuneOptions;
use clap::Args;
use serde_json::json;

/// Most tokens of a micro-batch that are planned.
const MAX_TOKENS: usize = u32::MAX as usize;

/// Memory, FLOPs and trainable share of a tuning run, before anything is allocated
#[derive(Args)]
#[command(after_help = "Examples:
  swat plan --model DIR --batch-size 4 --max-length 256
  swat plan --model DIR --mods 'layers.16-31.{o_proj,v_proj}' --recompute
  swat plan --model DIR --adapter ADAPTER                 to train that adapter further
  swat plan --model DIR --device cuda --state bf16        needs no GPU, but shows its free memory
  swat plan --model DIR --device cuda --gpus 8            one of eight GPUs, and what it sends

Needs config.json alone: no weights, no tokenizer.")]
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
    #[arg(long, value_parser = lora_rank, default_value_t = Lora::default().rank)]
    lora_rank: usize,
    /// Precision of gradients and moments beside bf16 weights: f32 (12 bytes per trained parameter) or bf16 (6)
    #[arg(long, value_enum, default_value_t = State::F32)]
    state: State,
    /// As of `swat tune`
    #[arg(long, value_name = "SCALE", num_args = 0..=1, default_missing_value = "1", value_parser = above_zero::<f32>)]
    constrain: Option<f32>,
    /// As of `swat tune`
    #[arg(long, value_name = "WEIGHT", value_parser = above_zero::<f32>)]
    distil: Option<f32>,
    /// As of `swat tune`
    #[arg(long, value_name = "RHO", value_parser = above_zero::<f32>)]
    prox: Option<f32>,
    /// As of `swat tune`
    #[arg(long, value_name = "RHO", value_parser = above_zero::<f32>)]
    vaccine: Option<f32>,
    /// As of `swat tune`
    #[arg(long, value_parser = inner_share::<f32>)]
    ema_decay: Option<f32>,
    /// Plan one of N processes that train together, each with its part of every micro-batch
    #[arg(long, value_name = "N", value_parser = count_of)]
    gpus: Option<usize>,
    /// GB/s that one GPU sends to the others: 50 by a network card of 400 Gb/s, 450 by the NVLink of an H100
    #[arg(long, value_name = "GB_S", value_parser = above_zero::<f64>, default_value_t = 50.0)]
    link_gb_s: f64,
    /// TFLOP/s that one GPU reaches in training, an assumption
    #[arg(long, value_name = "TFLOP_S", value_parser = above_zero::<f64>, default_value_t = 400.0)]
    tflops: f64,
}

impl PlanCommand {
    /// What of a recipe costs memory.
    fn recipe(&self) -> TuneOptions {
        let Self { ema_decay, constrain, distil, prox, vaccine, .. } = *self;
        TuneOptions { ema_decay, constrain, distil, prox, vaccine, ..TuneOptions::default() }
    }

    pub(super) fn run(mut self, common: &Common) -> Result<()> {
        let mut names = Names::new(common);
        names.configuration(&mut self.model.model)?;
        self.model.adapter.iter_mut().try_for_each(|adapter| names.model(adapter).map(drop))?;
        let mut config = ModelDir::read_config(&self.model.model)?;
        let adapter = self.model.adapter.as_ref().map(|dir| Adapter::open_settings(dir, &mut config)).transpose()?;
        let largest = adapter.iter().flat_map(|adapter| adapter.modules.values()).max_by_key(|shape| shape.rank);
        let lora = (self.method == MethodName::Lora).then(|| Lora { rank: self.lora_rank, ..Lora::default() });
        let set = ModuleSet::parse(&self.mods, &config.cells())?;
        // More would overflow what is computed of them.
        if self.batch_size.checked_mul(self.max_length).is_none_or(|tokens| tokens > MAX_TOKENS) {
            let found = format!("{} documents of {} tokens", self.batch_size, self.max_length);
            return Err(Error::input("--batch-size", found, format!("at most {MAX_TOKENS} tokens in a micro-batch")));
        }
        let device = common.gpu();
        let float = common.float(device, common.dtype, Some(&self.model.model))?;
        check_state(float, self.state)?;
        let run = Planned {
            batch_size: self.batch_size,
            max_length: self.max_length,
            recompute: self.recompute,
            lora: largest.copied().map(Lora::from).or(lora),
            state: self.state,
            ranks: self.gpus.unwrap_or(1),
        };
        let speeds = Speeds { link_bytes_per_s: self.link_gb_s * 1e9, flops_per_s: self.tflops * 1e12 };
        let work = (self.trained_share, self.recipe());
        let plan = |run: &Planned| {
            let trains = |id: ParamId| adapter.as_ref().map_or_else(|| run.trains(id, &set), |own| own.trains(id));
            match (device, float, run.state) {
                (None, Float::F32, _) => run.plan::<Cpu>(&config, &work, trains, speeds),
                (None, Float::Bf16, State::F32) => run.plan::<Cpu<F32State>>(&config, &work, trains, speeds),
                (None, Float::Bf16, State::Bf16) => run.plan::<Cpu<Bf16State>>(&config, &work, trains, speeds),
                (Some(_), _, State::F32) => run.plan::<Cuda<F32State>>(&config, &work, trains, speeds),
                (Some(_), _, State::Bf16) => run.plan::<Cuda<Bf16State>>(&config, &work, trains, speeds),
            }
        };
        let free = match device {
            None => FreeMemory::now(),
            Some(ordinal) => Cuda::<F32State>::open(ordinal).ok().and_then(|gpu| gpu.free_memory()),
        };
        let (planned, step) = plan(&run);
        let total = planned.total_bytes();
        let missing = free.as_ref().filter(|free| total > free.bytes);
        let remedies = missing
            .map_or(Vec::new(), |free| remedies(&run, float, free.bytes, &|changed| plan(changed).0.total_bytes()));
        // No option makes them fit, however many GPUs there are.
        let weights = free.as_ref().is_some_and(|free| planned.weights_bytes > free.bytes);
        let device = device.map_or("cpu".into(), |ordinal| format!("cuda:{ordinal}"));
        if common.json {
            let mut value = plan_json(&planned);
            value["device"] = json!(device);
            value["free_bytes"] = json!(free.as_ref().map(|free| free.bytes));
            value["bound"] = json!(free.as_ref().map(|free| &free.bound));
            value["fits"] = json!(free.as_ref().map(|free| total <= free.bytes));
            value["remedies"] = json!(remedies);
            value["step_of_a_rank"] = json!(self.gpus.map(|_| step));
            value["needs_sharded_weights"] = json!(weights);
            return print_json(&value);
        }
        print_line(memory_table(&[(device.clone(), planned.clone())]).text().trim_end())?;
        print_line(&format!(
            "trainable    {:>12}  {} of {} parameters",
            percent(planned.trainable_share(), 1),
            count(planned.trainable),
            count(planned.parameters)
        ))?;
        print_line(&format!(
            "FLOPs/token  {:>12}  forward {:.3e}, backward {:.3e}",
            format!("{:.3e}", planned.forward_flops + planned.backward_flops),
            planned.forward_flops,
            planned.backward_flops
        ))?;
        if self.gpus.is_some() {
            self.print_step(&step)?;
        }
        let Some(free) = free else {
            return print_line(&format!(
                "free memory of {device} is not known here, so that nothing can be said of it"
            ));
        };
        print_line(&format!("free now     {:>12}  bounded by {}", bytes(free.bytes), free.bound))?;
        if total <= free.bytes {
            return print_line(&format!("fits on {device}, with {} to spare", bytes(free.bytes - total)));
        }
        print_line(&format!("does not fit on {device}: {} too much", bytes(total - free.bytes)))?;
        if weights {
            return print_line(&format!(
                "the weights alone take {}: swat keeps all of them on each GPU, and has no weights in parts (ZeRO-3, tensor \
                 parallelism), which a model of this size needs",
                bytes(planned.weights_bytes)
            ));
        }
        if remedies.is_empty() {
            return print_line(
                "no options of `swat tune` make it fit: take a smaller model, or a device with more memory",
            );
        }
        print_line("would fit, cheapest first:")?;
        for remedy in remedies {
            print_line(&format!("  {:<34} {:>9}  {}", remedy.flags, bytes(remedy.total_bytes), remedy.cost))?;
        }
        Ok(())
    }

    fn print_step(&self, step: &RankStep) -> Result<()> {
        let RankStep { ranks, traffic, .. } = step;
        print_line(&format!(
            "GPUs         {ranks:>12}  each with all weights, and its part of moments and micro-batch"
        ))?;
        print_line(&format!(
            "sent a step  {:>12}  by each: gradients {}, weights {}; {} of what training everything sends",
            bytes(traffic.total_bytes()),
            bytes(traffic.reduce_scatter_bytes),
            bytes(traffic.all_gather_bytes),
            percent(step.share_of_full, 1)
        ))?;
        print_line(&format!(
            "communicates {:>12}  of a step: {:.3} s at {} GB/s, {:.3} s of them while backward runs, beside {:.3} s of \
             computing at {} TFLOP/s",
            percent(step.communication_share, 1),
            step.communication_seconds,
            self.link_gb_s,
            step.hidden_seconds,
            step.compute_seconds,
            self.tflops
        ))
    }
}

/// What a plan depends on, and a remedy may change.
#[derive(Clone, Copy)]
struct Planned {
    batch_size: usize,
    max_length: usize,
    recompute: bool,
    lora: Option<Lora>,
    state: State,
    ranks: usize,
}

impl Planned {
    /// The plan of a rank on a backend, of data with this share of tokens that have a loss, and of a recipe.
    fn plan<B: Backend>(
        &self,
        config: &ModelConfig,
        (trained_share, recipe): &(f64, TuneOptions),
        trains: impl Fn(ParamId) -> bool,
        speeds: Speeds,
    ) -> (Plan, RankStep) {
        let work = Workload {
            tokens: self.batch_size.div_ceil(self.ranks) * self.max_length,
            document_tokens: self.max_length,
            trained_share: *trained_share,
            recompute: self.recompute,
            lora: self.lora,
            beside: recipe.beside::<B>(),
        };
        let plan = Plan::new::<B>(config, &work, &trains).sharded(self.ranks);
        let step = RankStep::new::<B>(config, (&work, &plan), trains, self.ranks, speeds);
        (plan, step)
    }

    fn trains(&self, id: ParamId, set: &ModuleSet) -> bool {
        match id {
            ParamId::LoraA(m) | ParamId::LoraB(m) => m.kind.in_attention() && set.contains(id.cell()),
            _ => self.lora.is_none() && set.contains(id.cell()),
        }
    }
}

/// Options of `swat tune` that make a run fit.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
struct Remedy {
    flags: String,
    total_bytes: u64,
    /// What it costs.
    cost: String,
}

/// A change of a run: its flags, what it costs, and the run with it.
type Change<'a> = (String, &'static str, Box<dyn Fn(Planned) -> Planned + 'a>);

/// Options that make a run fit `free` bytes, cheapest first: each that does so alone, else the first of them that do
/// together, without those that are not needed.
fn remedies(run: &Planned, float: Float, free: u64, total: &dyn Fn(&Planned) -> u64) -> Vec<Remedy> {
    let smaller = |batch_size: usize| -> Change<'_> {
        let flags = format!("--batch-size {batch_size} --grad-accum {}", run.batch_size / batch_size);
        let change = move |run: Planned| Planned { batch_size, ..run };
        (flags, "the same steps in smaller pieces, a little slower", Box::new(change))
    };
    // Halves that divide the batch, so that steps stay the same.
    let halves = std::iter::successors(Some(run.batch_size), |size| (size % 2 == 0).then_some(size / 2)).skip(1);
    let halves: Vec<usize> = halves.collect();
    let enough = halves.iter().copied().find(|size| total(&smaller(*size).2(*run)) <= free);
    let mut changes: Vec<Change<'_>> = enough.or(halves.last().copied()).map(smaller).into_iter().collect();
    if !run.recompute {
        let change = |run: Planned| Planned { recompute: true, ..run };
        changes.push(("--recompute".into(), "a third more time, the same results", Box::new(change)));
    }
    if float == Float::Bf16 && run.state == State::F32 {
        let change = |run: Planned| Planned { state: State::Bf16, ..run };
        changes.push(("--state bf16".into(), "gradients and moments are rounded", Box::new(change)));
    }
    if run.lora.is_none() {
        let change = |run: Planned| Planned { lora: Some(Lora::default()), ..run };
        changes.push(("--method lora".into(), "adapters train, in place of the weights", Box::new(change)));
    }
    let half = run.max_length / 2;
    if half >= 2 {
        let change = move |run: Planned| Planned { max_length: half, ..run };
        changes.push((format!("--max-length {half}"), "longer examples are truncated", Box::new(change)));
    }
    let with = |chosen: &[&Change<'_>]| total(&chosen.iter().fold(*run, |run, (_, _, change)| change(run)));
    let remedy = |flags: String, cost: &str, total_bytes| Remedy { flags, total_bytes, cost: cost.to_owned() };
    let alone = changes.iter().map(|change| remedy(change.0.clone(), change.1, with(&[change])));
    let alone: Vec<Remedy> = alone.filter(|remedy| remedy.total_bytes <= free).collect();
    if !alone.is_empty() {
        return alone;
    }
    let all: Vec<&Change<'_>> = changes.iter().collect();
    let Some(count) = (2..=all.len()).find(|count| with(&all[..*count]) <= free) else { return Vec::new() };
    // The last is needed; of the others the dearest goes first.
    let mut chosen = all[..count].to_vec();
    for i in (0..count - 1).rev() {
        let mut fewer = chosen.clone();
        fewer.remove(i);
        if with(&fewer) <= free {
            chosen = fewer;
        }
    }
    let flags: Vec<&str> = chosen.iter().map(|change| change.0.as_str()).collect();
    vec![remedy(flags.join(" "), "together", with(&chosen))]
}

/// A plan as scripts see it.
pub(super) fn plan_json(plan: &Plan) -> serde_json::Value {
    let mut value = serde_json::to_value(plan).unwrap_or_default();
    value["total_bytes"] = json!(plan.total_bytes());
    value["trainable_share"] = json!(plan.trainable_share());
    value
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cheapest_options_that_fit_come_first() {
        let run = Planned { batch_size: 8, max_length: 64, recompute: false, lora: None, state: State::F32, ranks: 1 };
        // 10 a token, 2 with recomputation; 4000 of weights and state, half of it with state in bf16, 1000 with adapters.
        let total = |run: &Planned| {
            let tokens = (run.batch_size * run.max_length) as u64;
            let state = if run.state == State::Bf16 { 2 } else { 1 };
            tokens * if run.recompute { 2 } else { 10 } + if run.lora.is_some() { 1000 } else { 4000 / state }
        };
        assert_eq!(total(&run), 9120);
        let flags = |free, float| -> Vec<String> {
            remedies(&run, float, free, &total).into_iter().map(|remedy| remedy.flags).collect()
        };
        assert_eq!(
            flags(7200, Float::Bf16),
            ["--batch-size 4 --grad-accum 2", "--recompute", "--state bf16", "--method lora", "--max-length 32"]
        );
        assert_eq!(flags(5000, Float::F32), ["--batch-size 1 --grad-accum 8"]);
        assert_eq!(flags(4200, Float::F32), ["--batch-size 1 --grad-accum 8 --recompute"]);
        assert_eq!(flags(2200, Float::Bf16), ["--batch-size 1 --grad-accum 8 --recompute --state bf16"]);
        // Adapters and a smaller batch do without what is between them.
        assert_eq!(flags(1700, Float::Bf16), ["--batch-size 1 --grad-accum 8 --method lora"]);
        assert_eq!(flags(100, Float::Bf16), [""; 0]);
        assert_eq!(remedies(&run, Float::F32, 5000, &total)[0].total_bytes, 4640);
    }
}
