//! Adapters as peft saves and trains them (`tests/golden/make.py`, `ADAPTERS`): logits, the losses of twenty AdamW steps
//! on what the adapter trains, its tensors after them, and the files that are written back.

use safetensors::SafeTensors;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use swat::backend::{IGNORE, cpu::Cpu};
use swat::engine::{Batch, Decoder, GradientOptions, Gradients, Lora};
use swat::model::adapter::{adapter_settings, write_adapter};
use swat::model::{AdapterShape, ModelDir};
use swat::modules::{Cell, LearningRates, ModuleId, ModuleKind, ModuleSet, ParamId};
use swat::train::{Optimizer, StepOutcome, StepSettings};

const NAMES: [&str; 6] = ["patterns", "regex-bias", "all-linear", "saved-norms", "untied-embedding", "untied-ends"];

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden")
}

#[derive(serde::Deserialize)]
struct Case {
    base: String,
    losses: Vec<f64>,
}

#[derive(serde::Deserialize)]
struct Documents {
    documents: Vec<Vec<u32>>,
    targets: Vec<Vec<Option<u32>>>,
}

fn json<T: serde::de::DeserializeOwned>(path: &Path) -> T {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn tensors(path: &Path) -> BTreeMap<String, (Vec<usize>, Vec<f32>)> {
    let bytes = std::fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let values = |data: &[u8]| data.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
    file.tensors().into_iter().map(|(name, t)| (name, (t.shape().to_vec(), values(t.data())))).collect()
}

/// All documents of a golden model in one batch.
fn batch(base: &str) -> Batch {
    let Documents { documents, targets } = json(&golden().join(base).join("case.json"));
    let mut batch = Batch::from_prompts(documents.iter().map(Vec::as_slice));
    batch.targets = targets.iter().flatten().map(|t| t.unwrap_or(IGNORE)).collect();
    batch
}

fn open(name: &str) -> (Case, ModelDir) {
    let dir = golden().join("adapters").join(name);
    let case: Case = json(&dir.join("case.json"));
    let files = ModelDir::open_with_adapter(&golden().join(&case.base), &dir).unwrap();
    (case, files)
}

/// Largest difference, relative to the largest value that is expected.
fn difference(found: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(found.len(), expected.len());
    let scale = expected.iter().fold(1e-12f32, |m, x| m.max(x.abs()));
    found.iter().zip(expected).fold(0f32, |m, (a, b)| m.max((a - b).abs())) / scale
}

/// Saves the adapter of a decoder as `swat tune` does.
fn save(files: &ModelDir, decoder: &Decoder<Cpu>, out: &Path) {
    let adapter = files.adapter().unwrap();
    let kept = |id: &ParamId| adapter.trains(*id) || adapter.replaced.contains(id);
    let params: Vec<_> = decoder.params().iter().filter(|p| kept(&p.id)).map(|p| (p.id, p.shape.clone())).collect();
    write_adapter(out, &adapter.settings, ("base", None), &params, |id| decoder.read(id)).unwrap();
}

#[test]
fn logits_and_twenty_steps_are_those_of_peft() {
    for name in NAMES {
        let (case, files) = open(name);
        let adapter = files.adapter().unwrap();
        let expected = tensors(&golden().join("adapters").join(name).join("expected.safetensors"));
        let mut decoder = Decoder::from_files(Cpu::new(), &files).unwrap();
        let batch = batch(&case.base);
        let rows: Vec<u32> = (0..batch.tokens.len() as u32).collect();
        let error = difference(&decoder.logits(&batch, &rows).unwrap(), &expected["logits"].1);
        assert!(error < 1e-5, "{name}: logits differ by {error}");

        let rates = LearningRates::masked(&adapter.cells(), &adapter.cells(), 0.0);
        let mut optimizer = Optimizer::new(&decoder, &rates, |id| adapter.trains(id)).unwrap();
        let mut gradients = Gradients::new(&decoder, |id| adapter.trains(id)).unwrap();
        let settings = StepSettings {
            lr: 1e-2,
            weight_decay: 0.1,
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            max_grad_norm: Some(1.0),
            seed: 0,
        };
        let trained = batch.targets.iter().filter(|t| **t != IGNORE).count() as f64;
        for (step, expected) in case.losses.iter().enumerate() {
            let options = GradientOptions::scaled((1.0 / trained) as f32);
            let loss = decoder.loss_and_gradients(&batch, &mut gradients, options).unwrap() / trained;
            assert!((loss - expected).abs() < 1e-4, "{name}: step {step}: loss {loss}, not {expected}");
            let done = optimizer.step(&mut decoder, &gradients, &settings).unwrap();
            assert!(matches!(done, StepOutcome::Done { .. }), "{done:?}");
        }

        let out = tempfile::tempdir().unwrap();
        save(&files, &decoder, out.path());
        let written = tensors(&out.path().join("adapter_model.safetensors"));
        let after = expected.iter().filter_map(|(key, tensor)| Some((key.strip_prefix("after.")?, tensor)));
        let after: BTreeMap<&str, _> = after.collect();
        assert_eq!(written.keys().map(String::as_str).collect::<Vec<_>>(), after.keys().copied().collect::<Vec<_>>());
        for (key, (shape, values)) in &written {
            assert_eq!(*shape, after[key.as_str()].0, "{name}: {key}");
            // The gradient of k's bias is nearly nothing, so that AdamW amplifies its rounding.
            let error = difference(values, &after[key.as_str()].1);
            assert!(error < 1e-3 || key.ends_with("k_proj.bias"), "{name}: {key} differs by {error}");
        }
    }
}

#[test]
fn merged_weights_are_the_same_model() {
    for name in NAMES {
        let (case, files) = open(name);
        let mut decoder = Decoder::from_files(Cpu::new(), &files).unwrap();
        let batch = batch(&case.base);
        let rows: Vec<u32> = (0..batch.tokens.len() as u32).collect();
        let before = decoder.logits(&batch, &rows).unwrap();
        decoder.merge_lora().unwrap();
        let out = tempfile::tempdir().unwrap();
        files.write(out.path(), |id| decoder.read(id), u64::MAX).unwrap();
        let merged = ModelDir::open(out.path()).unwrap();
        let merged = Decoder::from_files(Cpu::new(), &merged).unwrap();
        let error = difference(&merged.logits(&batch, &rows).unwrap(), &before);
        assert!(error < 1e-5, "{name}: {error}");
    }
}

#[test]
fn what_is_written_is_read_back() {
    for name in NAMES {
        let (case, files) = open(name);
        let decoder = Decoder::from_files(Cpu::new(), &files).unwrap();
        let out = tempfile::tempdir().unwrap();
        save(&files, &decoder, out.path());
        let there = golden().join("adapters").join(name);
        let weights = "adapter_model.safetensors";
        assert_eq!(tensors(&out.path().join(weights)), tensors(&there.join(weights)), "{name}");
        let mut settings: serde_json::Value = json(&out.path().join("adapter_config.json"));
        assert_eq!(settings["base_model_name_or_path"], "base");
        settings["base_model_name_or_path"] = serde_json::json!(case.base);
        assert_eq!(settings, json::<serde_json::Value>(&there.join("adapter_config.json")), "{name}");
        let again = ModelDir::open_with_adapter(&golden().join(&case.base), out.path()).unwrap();
        assert_eq!(again.adapter().unwrap().modules, files.adapter().unwrap().modules);
        assert_eq!(again.hash().unwrap(), files.hash().unwrap());
    }
    // The hash tells adapters and their scale apart.
    let hash = |files: &ModelDir| files.hash().unwrap().to_owned();
    let (case, files) = open("all-linear");
    let base = ModelDir::open(&golden().join(&case.base)).unwrap();
    assert_ne!(hash(&files), hash(&base));
    let out = tempfile::tempdir().unwrap();
    let decoder = Decoder::from_files(Cpu::new(), &files).unwrap();
    save(&files, &decoder, out.path());
    let path = out.path().join("adapter_config.json");
    let mut settings: serde_json::Value = json(&path);
    settings["lora_alpha"] = serde_json::json!(5);
    std::fs::write(&path, settings.to_string()).unwrap();
    let other = ModelDir::open_with_adapter(&golden().join(&case.base), out.path()).unwrap();
    assert_ne!(hash(&files), hash(&other));
}

/// Settings that swat writes for its own adapters select exactly their modules.
#[test]
fn settings_select_the_modules_that_they_were_made_of() {
    let base = golden().join("qwen2-window");
    let config = ModelDir::open(&base).unwrap().config;
    let all = config.cells();
    for (set, targets) in [
        ("layers.*.{q,v}", serde_json::json!(["q_proj", "v_proj"])),
        ("layers.1-2.{q,down}", serde_json::json!(["q_proj", "down_proj"])),
        (
            "layers.0.q,layers.2.{q,up}",
            serde_json::json!([
                "model.layers.0.self_attn.q_proj",
                "model.layers.2.self_attn.q_proj",
                "model.layers.2.mlp.up_proj"
            ]),
        ),
        ("modules", serde_json::json!(ModuleKind::ALL.map(ModuleKind::name))),
    ] {
        let set = ModuleSet::parse(set, &all).unwrap();
        let lora = Lora { rank: 3, alpha: 4.5, rslora: true };
        let mut decoder = Decoder::from_files(Cpu::new(), &ModelDir::open(&base).unwrap()).unwrap();
        decoder.add_lora(&set, lora, 7).unwrap();
        let modules: std::collections::BTreeSet<ModuleId> =
            set.iter().filter_map(|cell| if let Cell::Module(id) = cell { Some(id) } else { None }).collect();
        let shape = AdapterShape { rank: 3, alpha: 4.5, rslora: true };
        let settings = adapter_settings(&modules, shape, config.layers);
        assert_eq!(settings["target_modules"], targets);
        let adapters = |p: &&swat::engine::Parameter<Cpu>| matches!(p.id, ParamId::LoraA(_) | ParamId::LoraB(_));
        let params: Vec<_> = decoder.params().iter().filter(adapters).map(|p| (p.id, p.shape.clone())).collect();
        let out = tempfile::tempdir().unwrap();
        write_adapter(out.path(), &settings, ("org/name", Some("v2")), &params, |id| decoder.read(id)).unwrap();
        let read = ModelDir::open_with_adapter(&base, out.path()).unwrap();
        let found = &read.adapter().unwrap().modules;
        assert_eq!(found.keys().copied().collect::<std::collections::BTreeSet<_>>(), modules);
        assert!(found.values().all(|found| *found == shape));
        let settings: serde_json::Value = json(&out.path().join("adapter_config.json"));
        assert_eq!((&settings["base_model_name_or_path"], &settings["revision"]), (&"org/name".into(), &"v2".into()));
    }
}
