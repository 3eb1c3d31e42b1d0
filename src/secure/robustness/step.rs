//! The planned step: what training would do to each tensor of the model as it is, on the data that it is to be tuned on.
//!
//! Δ = −η P g, with g the mean gradient of the task's loss over a few micro-batches, P = 1 / (√v + 10⁻⁸) and v the mean of
//! the gradients' squares, element by element: a step of Adam (arXiv 1412.6980) with plain means in the place of running
//! ones; η is learning rate × steps. To first order it lowers the task's loss by η ⟨P g, g⟩, the sum over the modules.
//!
//! Gradients are taken at the model as it is, which is not moved: in bf16 the small steps of a real run would be lost in
//! rounding.

use crate::backend::{Backend, FloatElement};
use crate::data::{Example, Loader, LoaderOptions};
use crate::engine::{Batch, Decoder, GradientOptions, Gradients, NoiseKind, Plan, Workload};
use crate::error::{Error, Result};
use crate::model::ModelConfig;
use crate::modules::{Cell, ParamId};
use crate::options::{above_zero, count, default_from_args};
use crate::progress::{Observer, Progress};
use crate::secure::text::check_free;
use crate::secure::tune::examples_hash;
use clap::Args;
use std::collections::BTreeMap;

/// Added to √v in the step's denominator, as AdamW's default.
const EPSILON: f32 = 1e-8;

/// Options of the planned step.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize, Args)]
#[serde(deny_unknown_fields)]
pub struct StepOptions {
    /// Learning rate of the planned training
    #[arg(id = "step_lr", long = "lr", value_name = "LR", value_parser = above_zero::<f64>, default_value = "2e-5")]
    pub lr: f64,
    /// Optimizer steps of the planned training: a change of rate × steps is scored, unless --epsilon says its norm
    #[arg(id = "step_steps", long = "steps", value_name = "N", default_value_t = 100)]
    #[arg(value_parser = clap::value_parser!(u64).range(1..))]
    pub steps: u64,
    /// Examples per micro-batch
    #[arg(id = "step_batch_size", long = "batch-size", value_name = "N", value_parser = count, default_value_t = 8)]
    pub batch_size: usize,
    /// Micro-batches over which gradient and squared gradient are averaged, at most those of one epoch
    #[arg(id = "step_batches", long = "batches", value_name = "N", value_parser = count, default_value_t = 8)]
    pub batches: usize,
    /// Longest example, in tokens; longer ones are truncated
    #[arg(id = "step_max_length", long = "max-length", value_name = "TOKENS", value_parser = count, default_value_t = 1024)]
    pub max_length: usize,
    /// Seed of the order of the examples.
    #[arg(skip)]
    pub seed: u64,
}

default_from_args!(StepOptions);

/// What a planned step was made of, kept with a map.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StepRecord {
    /// Its options.
    pub options: StepOptions,
    /// Micro-batches with a loss.
    pub batches: usize,
    /// Their tokens with a loss.
    pub trained_tokens: usize,
    /// Hash of all examples of the data.
    pub data_hash: String,
}

/// Lengths of a planned step, and what it gains.
#[derive(Clone, Debug)]
pub(crate) struct StepScale {
    pub(crate) record: StepRecord,
    /// ⟨P g, g⟩ of each cell.
    gains: BTreeMap<Cell, f64>,
    /// ‖P g‖ / ‖W‖ over all tensors.
    norm: f64,
}

impl StepScale {
    /// Relative norm of the whole model's step of this η: what ε is to this perturbation.
    pub(crate) fn epsilon(&self) -> f32 {
        let StepOptions { lr, steps, .. } = self.record.options;
        (self.norm * lr * steps as f64) as f32
    }

    /// η of a step of relative norm ε.
    pub(crate) fn rate(&self, epsilon: f32) -> f64 {
        f64::from(epsilon) / self.norm
    }

    /// First-order fall of the task's loss by a cell's part of a step of relative norm ε, in nats a token.
    pub(crate) fn gain(&self, cell: Cell, epsilon: f32) -> Option<f64> {
        self.gains.get(&cell).map(|gain| self.rate(epsilon) * gain)
    }
}

/// A planned step on the host: 4 bytes a parameter.
#[derive(Clone, Debug)]
pub struct PlannedStep {
    pub(crate) scale: StepScale,
    /// −P g of each tensor, with its relative norm over that of all tensors.
    pub(crate) directions: BTreeMap<ParamId, (f32, Vec<f32>)>,
}

/// Sums of a tensor's gradients and of their squares.
struct Moments {
    sum: Vec<f32>,
    squares: Vec<f32>,
}

impl Moments {
    fn new(len: usize) -> Self {
        Self { sum: vec![0.0; len], squares: vec![0.0; len] }
    }

    fn add(&mut self, gradient: &[f32]) {
        for ((sum, square), g) in self.sum.iter_mut().zip(&mut self.squares).zip(gradient) {
            *sum += g;
            *square += g * g;
        }
    }

    /// −P g of `count` gradients, and ⟨P g, g⟩.
    fn step(self, count: usize) -> (Vec<f32>, f64) {
        let (n, mut gain) = (count as f32, 0.0);
        let mut step = self.sum;
        for (sum, square) in step.iter_mut().zip(self.squares) {
            let g = *sum / n;
            *sum = -g / ((square / n).sqrt() + EPSILON);
            gain -= f64::from(*sum) * f64::from(g);
        }
        (step, gain)
    }
}

impl PlannedStep {
    /// Checks that gradients of all parameters fit the free memory, on a CPU together with their sums.
    ///
    /// # Errors
    /// [`Error::Memory`].
    pub fn check_memory<B: Backend>(config: &ModelConfig, options: &StepOptions, backend: &B) -> Result<()> {
        let planned = Self::planned_bytes(config, options, backend);
        check_free(backend, "the planned step", planned, "smaller --batch-size or --max-length, or --by noise")
    }

    fn planned_bytes<B: Backend>(config: &ModelConfig, options: &StepOptions, backend: &B) -> u64 {
        let document_tokens = options.max_length.min(config.max_positions);
        let work = Workload {
            tokens: options.batch_size * document_tokens,
            document_tokens,
            trained_share: 1.0,
            recompute: false,
            lora: None,
            beside: Default::default(),
        };
        let plan = Plan::new::<B>(config, &work, |_| true);
        // The sums lie on the host, which a GPU does not share its memory with.
        let sums =
            if backend.device_peak_bytes().is_some() { 0 } else { plan.parameters * size_of::<[f32; 2]>() as u64 };
        plan.total_bytes() - plan.moments_bytes + sums
    }

    /// Computes it by a backward pass for each micro-batch.
    ///
    /// # Errors
    /// [`Error::Input`] where no example has a token with a loss; [`Error::Failed`] where gradients are not finite; a failing
    /// device.
    pub fn new<B: Backend>(
        decoder: &Decoder<B>,
        examples: Vec<Example>,
        options: &StepOptions,
        observer: Observer<'_>,
    ) -> Result<Self> {
        let data_hash = examples_hash(&examples);
        let StepOptions { batch_size, max_length, seed, .. } = *options;
        let order = LoaderOptions { batch_size, max_length, packing: false, shuffle: true, seed };
        let mut loader = Loader::new(examples, order)?;
        let wanted = options.batches.min(loader.batches_per_epoch() as usize);
        let mut gradients = Gradients::new(decoder, |id| !matches!(id, ParamId::LoraA(_) | ParamId::LoraB(_)))?;
        let mut moments: BTreeMap<ParamId, Moments> = BTreeMap::new();
        let (mut batches, mut trained_tokens) = (0, 0);
        for done in 1..=wanted {
            let batch = Batch::from_examples(loader.next_documents());
            let trained = batch.trained_tokens();
            if trained > 0 {
                let scale = GradientOptions::scaled((1.0 / trained as f64) as f32);
                decoder.loss_and_gradients(&batch, &mut gradients, scale)?;
                for (id, gradient) in gradients.iter() {
                    let mut values = vec![B::Grad::from_f32(0.0); gradient.len()];
                    decoder.backend.read(gradient.view(), &mut values)?;
                    let values: Vec<f32> = values.into_iter().map(FloatElement::to_f32).collect();
                    moments.entry(id).or_insert_with(|| Moments::new(values.len())).add(&values);
                }
                (batches, trained_tokens) = (batches + 1, trained_tokens + trained);
            }
            observer(Progress::new("planned step", done, wanted));
        }
        if batches == 0 {
            return Err(Error::input("--data", "no token with a loss", "conversations with answers to train on"));
        }
        drop(gradients);
        decoder.release_pool();
        let record = StepRecord { options: options.clone(), batches, trained_tokens, data_hash };
        Self::of_moments(decoder, moments, record)
    }

    fn of_moments<B: Backend>(
        decoder: &Decoder<B>,
        moments: BTreeMap<ParamId, Moments>,
        record: StepRecord,
    ) -> Result<Self> {
        let (mut gains, mut directions, mut norms) = (BTreeMap::new(), BTreeMap::new(), [0.0; 2]);
        for (id, moments) in moments {
            let (step, gain) = moments.step(record.batches);
            *gains.entry(id.cell()).or_insert(0.0) += gain;
            let squares = [squared_norm(&step), squared_norm(&decoder.read(id)?)];
            norms.iter_mut().zip(squares).for_each(|(sum, square)| *sum += square);
            if squares.iter().all(|square| *square > 0.0) {
                directions.insert(id, ((squares[0] / squares[1]).sqrt() as f32, step));
            }
        }
        let norm = (norms[0] / norms[1]).sqrt();
        if !(norm.is_finite() && norm > 0.0) {
            let help = "check the model and the data: the loss must be finite, and depend on the weights";
            return Err(Error::failed(format!("the planned step has the relative norm {norm}"), help));
        }
        directions.values_mut().for_each(|(factor, _)| *factor = (f64::from(*factor) / norm) as f32);
        Ok(Self { scale: StepScale { record, gains, norm }, directions })
    }

    /// The perturbation by this step, and its lengths.
    pub(crate) fn into_noise(self) -> (NoiseKind, StepScale) {
        (NoiseKind::Step(self.directions), self.scale)
    }
}

fn squared_norm(values: &[f32]) -> f64 {
    values.iter().map(|x| f64::from(*x).powi(2)).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cpu::Cpu;

    #[test]
    fn a_step_by_hand() {
        // Gradients (3, −1, 0) and (1, 1, 0): g = (2, 0, 0), v = (5, 1, 0), P g = (2/√5, 0, 0), ⟨P g, g⟩ = 4/√5.
        let mut moments = Moments::new(3);
        moments.add(&[3.0, -1.0, 0.0]);
        moments.add(&[1.0, 1.0, 0.0]);
        let (step, gain) = moments.step(2);
        let expected = 2.0 / 5f32.sqrt();
        assert!((step[0] + expected).abs() < 1e-6 && step[1..].iter().all(|x| *x == 0.0), "{step:?}");
        assert!((gain - 2.0 * f64::from(expected)).abs() < 1e-6, "{gain}");
    }

    /// In f32 on a CPU 16 bytes a parameter: weight, gradient, and the sums of gradients and of their squares.
    #[test]
    fn sums_on_the_host_are_planned() {
        let config = serde_json::json!({
            "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 64, "intermediate_size": 96,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
            "vocab_size": 5000, "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "rope_theta": 10000,
            "tie_word_embeddings": true, "hidden_act": "silu", "torch_dtype": "float32" });
        let config = ModelConfig::from_json(&config, "config.json").unwrap();
        let options = StepOptions { batch_size: 1, max_length: 1, ..StepOptions::default() };
        let parameters: u64 = config.params().iter().map(|(_, shape)| shape.iter().product::<usize>() as u64).sum();
        let planned = PlannedStep::planned_bytes(&config, &options, &Cpu::new());
        assert!(planned >= 16 * parameters, "{planned} bytes for {parameters} parameters");
    }

    #[test]
    fn lengths_by_hand() {
        // ‖P g‖ / ‖W‖ = 0.5, η = 0.01 · 4: ε = 0.02; a step of ε = 0.1 has η = 0.2 and gains 0.2 · 3.
        let options = StepOptions { lr: 0.01, steps: 4, ..StepOptions::default() };
        let record = StepRecord { options, batches: 1, trained_tokens: 1, data_hash: String::new() };
        let scale = StepScale { record, gains: [(Cell::Embedding, 3.0)].into(), norm: 0.5 };
        assert!((scale.epsilon() - 0.02).abs() < 1e-8);
        assert!((scale.gain(Cell::Embedding, 0.1).unwrap() - 0.6).abs() < 1e-6);
        assert_eq!(scale.gain(Cell::FinalNorm, 0.1), None);
    }
}
