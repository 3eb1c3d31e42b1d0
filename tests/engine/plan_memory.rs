//! `swat plan` against the measured device memory of a training step.

use crate::common::{batch, decoder_on, standin, wide};
use swat::backend::cuda::{Bf16State, F32State, Precision};
use swat::engine::{Beside, GradientOptions, Gradients, Lora, Plan, Workload};
use swat::model::ModelConfig;
use swat::modules::{LearningRates, ModuleSet, ParamId};
use swat::train::{Optimizer, StepSettings};

const DOCUMENT: usize = 128;
const DOCUMENTS: usize = 4;

/// Large enough that unplanned memory, such as partial sums of products, is a small part.
fn config() -> ModelConfig {
    ModelConfig { vocab: 2048, hidden: 256, ffn: 704, max_positions: DOCUMENT, ..wide(4, 64) }
}

fn planned_and_measured<P: Precision>(mods: &str, lora: Option<Lora>, recompute: bool) {
    planned_and_measured_of::<P>(config(), mods, lora, recompute);
}

fn planned_and_measured_of<P: Precision>(config: ModelConfig, mods: &str, lora: Option<Lora>, recompute: bool) {
    let Some(cuda) = standin::open::<P>(0) else { return };
    let set = ModuleSet::parse(mods, &config.cells()).unwrap();
    let trains = |id: ParamId| {
        let adapter = matches!(id, ParamId::LoraA(_) | ParamId::LoraB(_));
        adapter == lora.is_some() && set.contains(id.cell())
    };
    let batch = batch(&config, &[DOCUMENT; DOCUMENTS], 3);
    let work = Workload {
        tokens: DOCUMENTS * DOCUMENT,
        document_tokens: DOCUMENT,
        trained_share: batch.trained_tokens() as f64 / batch.tokens.len() as f64,
        recompute,
        lora,
        beside: Beside::default(),
    };
    let plan = Plan::new::<swat::backend::cuda::Cuda<P>>(&config, &work, trains);

    let mut model = decoder_on(&cuda, &config, 7);
    if let Some(lora) = lora {
        model.add_lora(&set, lora, 1).unwrap();
    }
    let rates = LearningRates::masked(&set, &config.cells(), 0.0);
    let mut gradients = Gradients::new(&model, trains).unwrap();
    let mut optimizer = Optimizer::new(&model, &rates, trains).unwrap();
    let settings = StepSettings {
        lr: 1e-3,
        weight_decay: 0.0,
        beta1: 0.9,
        beta2: 0.999,
        eps: 1e-8,
        max_grad_norm: Some(1.0),
        seed: 1,
    };
    model
        .loss_and_gradients(&batch, &mut gradients, GradientOptions { recompute, ..GradientOptions::scaled(1e-3) })
        .unwrap();
    optimizer.step(&mut model, &gradients, &settings).unwrap();
    let (planned, measured) = (plan.total_bytes() as f64, cuda.peak_bytes() as f64);
    let ratio = planned / measured;
    let what = format!("{mods}, LoRA {}, recompute {recompute}, moments of {}", lora.is_some(), size_of::<P::Moment>());
    eprintln!("planned / measured = {ratio:.3} of {:.1} MB: {what}", measured / 1e6);
    assert!((0.9..=1.1).contains(&ratio), "{what}: {ratio:.3} of {measured}; {plan:?}");
}

#[test]
fn everything() {
    planned_and_measured::<F32State>("all", None, false);
}

#[test]
fn everything_in_bf16() {
    planned_and_measured::<Bf16State>("all", None, false);
}

#[test]
fn some_modules() {
    planned_and_measured::<F32State>("layers.2-3.{q_proj,k_proj,v_proj,o_proj}", None, false);
}

#[test]
fn adapters() {
    planned_and_measured::<F32State>("layers.0-3.{q_proj,k_proj,v_proj,o_proj}", Some(Lora::default()), false);
}

#[test]
fn recomputed_layers() {
    planned_and_measured::<Bf16State>("all", None, true);
}

/// The head processes all rows of this batch at once; their logits are most of the memory.
#[test]
fn a_large_vocabulary() {
    let config = ModelConfig { vocab: 160_000, hidden: 32, ffn: 64, max_positions: DOCUMENT, ..wide(1, 64) };
    planned_and_measured_of::<Bf16State>(config, "all", None, false);
}
