//! Tiny models of every family, read from disk, against what `transformers` and `peft` compute with them
//! (`tests/golden/make.py`): hidden states, logits, losses, every gradient, ten masked AdamW steps, greedy
//! continuations.

use safetensors::SafeTensors;
use std::collections::BTreeMap;
use std::path::PathBuf;
use swat::backend::{Backend, IGNORE, Sampling, cpu::Cpu};
use swat::engine::{Batch, Decoder, GenerateOptions, GradientOptions, Gradients, Lora};
use swat::model::ModelDir;
use swat::modules::{LearningRates, ModuleSet, ParamId};
use swat::train::{Optimizer, StepOutcome, StepSettings};

/// Largest error of an element, relative to the largest of its tensor. PyTorch in f32 stays within 3e-6 of PyTorch in
/// f64.
const TENSOR_TOLERANCE: f64 = 2e-5;
/// Largest relative error of a loss.
const LOSS_TOLERANCE: f64 = 1e-5;

macro_rules! golden {
    ($($module:ident: $directory:literal,)*) => {
        const DIRECTORIES: &[&str] = &[$($directory),*];
        $(mod $module {
            #[test]
            fn forward() {
                super::forward($directory);
            }
            #[test]
            fn gradients() {
                super::gradients($directory);
            }
            #[test]
            fn ten_masked_steps() {
                super::ten_masked_steps($directory);
            }
            #[test]
            fn greedy_continuations() {
                super::greedy_continuations($directory);
            }
        })*
    };
}

golden! {
    llama: "llama",
    llama_bf16: "llama-bf16",
    llama_bias: "llama-bias",
    llama_f16: "llama-f16",
    llama_rope_dynamic: "llama-rope-dynamic",
    llama_rope_linear: "llama-rope-linear",
    llama_rope_llama3: "llama-rope-llama3",
    llama_rope_yarn: "llama-rope-yarn",
    llama_sharded: "llama-sharded",
    mistral: "mistral",
    qwen2: "qwen2",
    qwen2_window: "qwen2-window",
    qwen3: "qwen3",
    qwen3_tied: "qwen3-tied",
}

#[derive(serde::Deserialize)]
struct Case {
    documents: Vec<Vec<u32>>,
    /// The token that each row must predict, where it counts.
    targets: Vec<Vec<Option<u32>>>,
    /// What the ten steps train.
    trained: String,
    loss: f64,
    /// Before each of the ten steps.
    step_losses: Vec<f64>,
    greedy: Vec<Continuation>,
}

#[derive(serde::Deserialize)]
struct Continuation {
    prompt: Vec<u32>,
    tokens: Vec<u32>,
}

#[derive(serde::Deserialize)]
struct LoraCase {
    rank: usize,
    alpha: f32,
    loss: f64,
}

/// The directory that holds the expectations: its own, or that of the model of which it is a variant.
#[derive(serde::Deserialize)]
struct Variant {
    same_as: Option<String>,
}

fn directory(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

fn case<T: serde::de::DeserializeOwned>(name: &str) -> T {
    serde_json::from_slice(&std::fs::read(directory(name).join("case.json")).unwrap()).unwrap()
}

fn tensors(name: &str) -> BTreeMap<String, Vec<f32>> {
    let bytes = std::fs::read(directory(name).join("expected.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let values = |data: &[u8]| data.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
    file.tensors()
        .into_iter()
        .map(|(name, tensor)| {
            assert_eq!(tensor.dtype(), safetensors::Dtype::F32, "{name}");
            (name, values(tensor.data()))
        })
        .collect()
}

fn decoder(name: &str) -> Decoder<Cpu> {
    let files = ModelDir::open(&directory(name)).unwrap();
    Decoder::new(Cpu::new(), files.config.clone(), |id, shape| files.tensor(id, shape)).unwrap()
}

/// A model with its expectations.
struct Golden {
    decoder: Decoder<Cpu>,
    case: Case,
    expected: BTreeMap<String, Vec<f32>>,
    /// Ways to run the documents: all in one batch, and each in a batch of its own. Dynamic rope turns by the longest
    /// document of a batch, so there only the second equals running them one by one.
    batchings: Vec<Vec<Batch>>,
}

impl Golden {
    fn open(name: &str) -> Self {
        let home = case::<Variant>(name).same_as.unwrap_or_else(|| name.to_owned());
        let case: Case = case(&home);
        let single = |(tokens, targets): (&Vec<u32>, &Vec<Option<u32>>)| {
            let mut batch = Batch::from_prompts([tokens.as_slice()]);
            batch.targets = targets.iter().map(|t| t.unwrap_or(IGNORE)).collect();
            batch
        };
        let singles: Vec<Batch> = case.documents.iter().zip(&case.targets).map(single).collect();
        let mut packed = Batch::from_prompts(case.documents.iter().map(Vec::as_slice));
        packed.targets = singles.iter().flat_map(|b| b.targets.clone()).collect();
        let mut batchings = vec![singles];
        if name != "llama-rope-dynamic" {
            batchings.push(vec![packed]);
        }
        Self { decoder: decoder(name), case, expected: tensors(&home), batchings }
    }

    fn trained_tokens(&self) -> f64 {
        self.batchings[0].iter().map(Batch::trained_tokens).sum::<usize>() as f64
    }

    /// Mean loss over all trained tokens; its gradients are put into `gradients`.
    fn loss_and_gradients(&self, batches: &[Batch], gradients: &mut Gradients<Cpu>, recompute: bool) -> f64 {
        let scale = (1.0 / self.trained_tokens()) as f32;
        let sum: f64 = batches
            .iter()
            .enumerate()
            .map(|(i, b)| {
                self.decoder
                    .loss_and_gradients(
                        b,
                        gradients,
                        GradientOptions { accumulate: i > 0, recompute, ..GradientOptions::scaled(scale) },
                    )
                    .unwrap()
            })
            .sum();
        sum / self.trained_tokens()
    }
}

/// Errors of everything that was compared; fails with the worst by name.
struct Comparison {
    of: String,
    errors: Vec<(f64, String)>,
}

impl Comparison {
    fn new(of: impl Into<String>) -> Self {
        Self { of: of.into(), errors: Vec::new() }
    }

    /// A NaN counts as an infinite error.
    fn tensor(&mut self, name: &str, actual: &[f32], expected: &[f32]) {
        assert_eq!(actual.len(), expected.len(), "{}: elements of {name}", self.of);
        let largest = expected.iter().fold(0.0, |m, x| f64::max(m, f64::from(x.abs()))).max(1e-12);
        let error = actual.iter().zip(expected).map(|(a, e)| (f64::from(*a) - f64::from(*e)).abs() / largest);
        let error = error.fold(0.0, |m, e| if e.is_nan() { f64::INFINITY } else { f64::max(m, e) });
        self.errors.push((error / TENSOR_TOLERANCE, format!("{name}: {error:.1e} of its largest element")));
    }

    fn loss(&mut self, name: &str, actual: f64, expected: f64) {
        let error = (actual - expected).abs() / expected.abs();
        let share = if error.is_nan() { f64::INFINITY } else { error / LOSS_TOLERANCE };
        self.errors.push((share, format!("{name}: {actual} instead of {expected}")));
    }

    fn finish(mut self) {
        self.errors.sort_by(|a, b| b.0.total_cmp(&a.0));
        let above: Vec<&str> = self.errors.iter().filter(|e| e.0 > 1.0).map(|e| e.1.as_str()).collect();
        let (of, all) = (&self.of, self.errors.len());
        assert!(above.is_empty(), "{of}: {} of {all} are off, the worst first:\n{}", above.len(), above.join("\n"));
        if let Some((_, worst)) = self.errors.first() {
            println!("{of}: {all} within tolerance, worst {worst}");
        }
    }
}

fn forward(name: &str) {
    let golden = Golden::open(name);
    let (decoder, expected) = (&golden.decoder, &golden.expected);
    for batches in &golden.batchings {
        let mut hidden = vec![Vec::new(); decoder.config.layers + 1];
        let (mut logits, mut losses) = (Vec::new(), 0.0);
        for batch in batches {
            let rows: Vec<u32> = (0..batch.tokens.len() as u32).collect();
            let of_batch = decoder.hidden_states(batch, &rows).unwrap();
            assert_eq!(of_batch.len(), hidden.len());
            hidden.iter_mut().zip(of_batch).for_each(|(all, part)| all.extend(part));
            logits.extend(decoder.logits(batch, &rows).unwrap());
            losses += decoder.losses(batch).unwrap().iter().map(|l| f64::from(*l)).sum::<f64>();
        }
        let mut comparison = Comparison::new(format!("{name}, {} batches", batches.len()));
        for (i, states) in hidden.iter().enumerate() {
            comparison.tensor(&format!("hidden.{i}"), states, &expected[&format!("hidden.{i}")]);
        }
        comparison.tensor("logits", &logits, &expected["logits"]);
        comparison.loss("loss", losses / golden.trained_tokens(), golden.case.loss);
        comparison.finish();
    }
}

fn gradients(name: &str) {
    let golden = Golden::open(name);
    let decoder = &golden.decoder;
    let stored = golden.expected.keys().filter(|key| key.starts_with("grad.")).count();
    assert_eq!(stored, decoder.params().len(), "each tensor has a gradient");
    for batches in &golden.batchings {
        for recompute in [false, true] {
            let mut comparison = Comparison::new(format!("{name}, {} batches, recompute {recompute}", batches.len()));
            let mut gradients = Gradients::new(decoder, |_| true).unwrap();
            let loss = golden.loss_and_gradients(batches, &mut gradients, recompute);
            comparison.loss("loss", loss, golden.case.loss);
            compare_gradients(&mut comparison, decoder, &gradients, &golden.expected);
            comparison.finish();
        }
    }
}

fn compare_gradients(
    comparison: &mut Comparison,
    decoder: &Decoder<Cpu>,
    gradients: &Gradients<Cpu>,
    expected: &BTreeMap<String, Vec<f32>>,
) {
    for (id, buffer) in gradients.iter() {
        let mut values = vec![0.0; buffer.len()];
        decoder.backend.read(buffer.view(), &mut values).unwrap();
        let name = format!("grad.{id}");
        comparison.tensor(&name, &values, &expected[&name]);
    }
}

fn ten_masked_steps(name: &str) {
    let mut golden = Golden::open(name);
    let batches = golden.batchings.last().unwrap().clone();
    let all = golden.decoder.config.cells();
    let rates = LearningRates::masked(&ModuleSet::parse(&golden.case.trained, &all).unwrap(), &all, 0.0);
    let before: BTreeMap<ParamId, Vec<f32>> =
        golden.decoder.params().iter().map(|p| (p.id, golden.decoder.read(p.id).unwrap())).collect();
    let mut gradients = Gradients::new(&golden.decoder, |id| rates.trains(id.cell())).unwrap();
    let mut optimizer = Optimizer::new(&golden.decoder, &rates, |_| true).unwrap();
    let settings = StepSettings {
        lr: 1e-2,
        weight_decay: 0.1,
        beta1: 0.9,
        beta2: 0.999,
        eps: 1e-8,
        max_grad_norm: Some(1.0),
        seed: 0,
    };

    let mut comparison = Comparison::new(name);
    assert_eq!(golden.case.step_losses.len(), 10);
    for step in 0..10 {
        let loss = golden.loss_and_gradients(&batches, &mut gradients, false);
        comparison.loss(&format!("loss before step {}", step + 1), loss, golden.case.step_losses[step]);
        let outcome = optimizer.step(&mut golden.decoder, &gradients, &settings).unwrap();
        assert!(matches!(outcome, StepOutcome::Done { .. }), "{outcome:?}");
    }
    let mut moved = 0;
    for (id, before) in before {
        let after = golden.decoder.read(id).unwrap();
        match golden.expected.get(&format!("after.{id}")) {
            Some(expected) => {
                comparison.tensor(&format!("after.{id}"), &after, expected);
                moved += 1;
            }
            None => {
                let same = after.iter().zip(&before).all(|(a, b)| a.to_bits() == b.to_bits());
                assert!(same, "{name}: {id} is frozen and moved");
            }
        }
    }
    assert_eq!(moved, golden.expected.keys().filter(|key| key.starts_with("after.")).count());
    comparison.finish();
}

fn greedy_continuations(name: &str) {
    let golden = Golden::open(name);
    let prompts: Vec<Vec<u32>> = golden.case.greedy.iter().map(|c| c.prompt.clone()).collect();
    let options = GenerateOptions {
        max_new_tokens: 20,
        sampling: Sampling { temperature: 0.0, top_p: 1.0 },
        stop: Vec::new(),
        ..GenerateOptions::default()
    };
    let answers = golden.decoder.generate(&prompts, &options, &mut |_, _| {}).unwrap();
    for (i, (answer, expected)) in answers.iter().zip(&golden.case.greedy).enumerate() {
        assert_eq!(answer.tokens, expected.tokens, "{name}: continuation {i}");
    }
}

#[test]
fn lora_gradients_are_those_of_peft() {
    let mut golden = Golden::open("llama");
    let (case, expected): (LoraCase, _) = (case("lora"), tensors("lora"));
    let all = golden.decoder.config.cells();
    let set = ModuleSet::parse("layers.*.{q,k,v,o}", &all).unwrap();
    golden.decoder.add_lora(&set, Lora { rank: case.rank, alpha: case.alpha, ..Lora::default() }, 0).unwrap();
    let adapters: Vec<ParamId> = golden.decoder.params().iter().map(|p| p.id).filter(|id| is_adapter(*id)).collect();
    assert_eq!(adapters.len(), expected.keys().filter(|key| key.starts_with("adapter.")).count());
    for id in adapters {
        golden.decoder.write(id, &expected[&format!("adapter.{id}")]).unwrap();
    }

    let batches = golden.batchings.last().unwrap().clone();
    let rows: Vec<u32> = (0..batches[0].tokens.len() as u32).collect();
    let mut comparison = Comparison::new("lora");
    let mut gradients = Gradients::new(&golden.decoder, is_adapter).unwrap();
    let loss = golden.loss_and_gradients(&batches, &mut gradients, false);
    comparison.loss("loss", loss, case.loss);
    comparison.tensor("logits", &golden.decoder.logits(&batches[0], &rows).unwrap(), &expected["logits"]);
    compare_gradients(&mut comparison, &golden.decoder, &gradients, &expected);
    golden.decoder.merge_lora().unwrap();
    let merged = golden.decoder.logits(&batches[0], &rows).unwrap();
    comparison.tensor("logits of the merged weights", &merged, &expected["logits"]);
    comparison.finish();
}

fn is_adapter(id: ParamId) -> bool {
    matches!(id, ParamId::LoraA(_) | ParamId::LoraB(_))
}

#[test]
fn every_directory_is_tested() {
    let mut found: Vec<String> = std::fs::read_dir(directory("."))
        .unwrap()
        .map(|entry| entry.unwrap())
        .filter(|entry| entry.path().join("config.json").exists())
        .map(|entry| entry.file_name().into_string().unwrap())
        .collect();
    found.sort();
    assert_eq!(found, DIRECTORIES);
}
