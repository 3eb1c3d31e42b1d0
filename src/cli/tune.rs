//! `swat tune`: two-phase tuning, or any of its ablations.

use super::common::{Common, print_json, print_line, say};
use super::open::{ModelArgs, OnDevice, State};
use super::plan::{MethodName, plan_json};
use super::progress::StepBar;
use crate::backend::{Backend, Roofline};
use crate::data::{Example, mix};
use crate::engine::Lora;
use crate::error::{Error, Result};
use crate::interrupt;
use crate::modules::ModuleSet;
use crate::options::{above_zero, share};
use crate::report::format::{bytes, percent};
use crate::secure::{Method, ModelText, SetSpec, TuneJob, TuneOutput, TuneRecipe, attention_projections};
use crate::train::PhaseOptions;
use clap::Args;
use serde_json::json;
use std::path::{Path, PathBuf};

/// Two-phase secure tuning of a model: first Mods_Rob alone, then everything; plain tuning without --mods
#[derive(Args)]
#[command(after_help = "Examples:
  swat tune --model DIR --data train.jsonl --out tuned --epochs 3                        plain
  swat tune --model DIR --data train.jsonl --out tuned --mods mods.json --mods-epochs 4 --epochs 3
  swat tune --model DIR --data train.jsonl --out tuned --mods 'layers.8-15.{o_proj,v_proj}' --mods-steps 200 --steps 400
  swat tune ... --resume                                                continues an interrupted run, bit for bit")]
pub(super) struct Tune {
    #[command(flatten)]
    model: ModelArgs,
    /// Training conversations: alpaca, sharegpt, messages or prompt-completion lines
    #[arg(long, value_name = "FILE", required = true)]
    data: Vec<PathBuf>,
    /// Modules of the first phase: a file of `swat search`, or a set such as layers.8-15.{q_proj,v_proj}
    #[arg(long, value_name = "SET_OR_FILE")]
    mods: Option<SetSpec>,
    /// Epochs of the phase on --mods
    #[arg(long, conflicts_with = "mods_steps")]
    mods_epochs: Option<u64>,
    /// Optimizer steps of the phase on --mods
    #[arg(long)]
    mods_steps: Option<u64>,
    /// Learning rate of the phase on --mods; --lr if not given
    #[arg(long, value_parser = above_zero::<f64>)]
    mods_lr: Option<f64>,
    /// full, or lora: adapters, merged at the end
    #[arg(long, value_enum, default_value_t = MethodName::Full)]
    method: MethodName,
    #[command(flatten)]
    lora: Lora,
    /// Projections with adapters; q, k, v, o of every layer if not given
    #[arg(long, value_name = "SET")]
    lora_modules: Option<String>,
    /// Learning rate; 2e-5 for full, 2e-4 for lora if not given
    #[arg(long, value_parser = above_zero::<f64>)]
    lr: Option<f64>,
    #[command(flatten)]
    recipe: TuneRecipe,
    /// Mix in examples of another training file, such as refusals
    #[arg(long, value_name = "FILE", requires = "mix_share")]
    mix: Option<PathBuf>,
    /// Share of the examples that come from --mix
    #[arg(long, value_parser = share::<f64>, requires = "mix")]
    mix_share: Option<f64>,
    #[command(flatten)]
    output: TuneOutput,
    /// Precision of gradients and moments beside bf16 weights: f32 (12 bytes per trained parameter) or bf16 (6)
    #[arg(long, value_enum, default_value_t = State::F32)]
    state: State,
}

impl OnDevice for Tune {
    fn model(&self) -> Option<PathBuf> {
        Some(self.model.model.clone())
    }

    fn state(&self) -> State {
        self.state
    }

    fn run<B: Backend>(self, common: &Common, backend: B) -> Result<()> {
        if self.mods.is_none() && (self.mods_epochs.is_some() || self.mods_steps.is_some()) {
            return Err(Error::input("--mods-epochs", "no --mods", "--mods SET_OR_FILE: what phase 1 trains"));
        }
        // All that can be known is checked before the weights are read.
        let output = TuneOutput {
            config: json!({ "model": self.model.model, "data": self.data, "mix": self.mix, "mix_share": self.mix_share,
                "seed": common.seed, "swat": env!("CARGO_PKG_VERSION") }),
            ..self.output.clone()
        };
        interrupt::watch();
        let output = output.open(&self.inputs())?;
        let text = self.model.open_text()?;
        let job = self.job(common, &text)?;
        let mut examples = Vec::new();
        for path in &self.data {
            examples.extend(self.read(common, &text, path)?);
        }
        if let (Some(path), Some(share)) = (&self.mix, self.mix_share) {
            examples = mix(&examples, &self.read(common, &text, path)?, share, common.seed)?;
        }
        let prepared = output.prepare(&text.files, examples, job, &backend)?;
        // Before the model is loaded, so that its buffers do not raise the run's peak memory.
        let prepared = prepared.roofline(Some(Roofline::measure(&backend)?));
        let mut model = text.load(backend)?;
        let mut callbacks = StepBar::new(common);
        let summary = prepared.run(&model.text.files, &mut model.decoder, &mut callbacks)?;
        callbacks.finish();
        if common.json {
            let plans = callbacks.plans.iter().map(|(phase, plan)| (phase.clone(), plan_json(plan)));
            return print_json(&json!({ "out": self.output.path, "phases": summary.phases,
                "peak_bytes": summary.peak_bytes, "planned_bytes": summary.planned_bytes,
                "plans": plans.collect::<serde_json::Map<_, _>>(), "resumed_from": summary.resumed_from }));
        }
        for phase in &summary.phases {
            let loss = |x: Option<f32>| x.map_or("none".into(), |x| format!("{x:.4}"));
            let skipped = [(phase.skipped_non_finite, "not finite"), (phase.skipped_empty, "without trained tokens")];
            let skipped = skipped.iter().filter(|(count, _)| *count > 0);
            let skipped: String = skipped.map(|(count, why)| format!("  {count} skipped ({why})")).collect();
            print_line(&format!(
                "phase {:<5} {:>6} steps  loss {} -> {}  {:.0} tok/s{skipped}",
                phase.phase,
                phase.steps,
                loss(phase.first_loss),
                loss(phase.last_loss),
                phase.tokens as f64 / phase.seconds.max(1e-9)
            ))?;
        }
        print_line(&format!("peak memory {}, {} planned", bytes(summary.peak_bytes), bytes(summary.planned_bytes)))?;
        print_line(&format!("the tuned model is in {}", self.output.path.display()))
    }
}

impl Tune {
    /// Every file and directory that is read, with its option.
    fn inputs(&self) -> Vec<(&str, &Path)> {
        let mut inputs = self.model.inputs();
        inputs.extend(self.data.iter().map(|path| ("--data", path.as_path())));
        inputs.extend(self.mix.iter().map(|path| ("--mix", path.as_path())));
        inputs.extend(self.mods.iter().filter_map(SetSpec::file).map(|path| ("--mods", path)));
        inputs
    }

    fn read(&self, common: &Common, text: &ModelText, path: &Path) -> Result<Vec<Example>> {
        let max_length = self.recipe.shared.max_length;
        let read = text.examples(path, max_length)?;
        let total = read.examples.len() + read.dropped;
        for (count, what) in [(read.cut, "were truncated to"), (read.dropped, "were dropped: their prompts fill")] {
            if count > 0 && !common.quiet {
                let share = percent(count as f64 / total as f64, 1);
                say(&format!("{}: {count} examples ({share}) {what} {max_length} tokens\n", path.display()));
            }
        }
        Ok(read.examples)
    }

    fn job(&self, common: &Common, text: &ModelText) -> Result<TuneJob> {
        let config = &text.files.config;
        let resolve = |mods: &SetSpec| {
            let hash = mods.file().map(|_| text.files.hash()).transpose()?;
            mods.resolve(config, None, hash)
        };
        let mods = self.mods.as_ref().map(resolve).transpose()?;
        let mut recipe = self.recipe.clone();
        recipe.shared.seed = common.seed;
        if self.method == MethodName::Lora {
            let modules = match &self.lora_modules {
                Some(text) => ModuleSet::parse(text, &config.cells())?,
                None => attention_projections(config.layers),
            };
            recipe.method = Method::Lora { lora: self.lora, modules };
        }
        recipe.all_phase.lr = self.lr.unwrap_or_else(|| recipe.method.default_lr());
        recipe.mods_phase = PhaseOptions {
            lr: self.mods_lr.unwrap_or(recipe.all_phase.lr),
            epochs: self.mods_epochs,
            steps: self.mods_steps,
            ..recipe.all_phase.clone()
        };
        Ok(TuneJob { mods, recipe })
    }
}
