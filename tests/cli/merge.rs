//! `swat merge`: what it computes on whole models, what it leaves alone, and what it refuses.

use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use swat::model::{ModelDir, StoredAs};
use swat::modules::ParamId;
use tempfile::TempDir;

fn swat(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_swat")).args(args).output().expect("the binary runs")
}

fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

fn repository(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// The tiny model and models that were made from it, each tensor moved by `step` in a pattern of its own.
struct Models {
    dir: TempDir,
    base: PathBuf,
}

impl Models {
    fn new() -> Self {
        Self { dir: TempDir::new().unwrap(), base: repository("assets/tiny") }
    }

    fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn moved(&self, name: &str, step: f32, phase: usize) -> PathBuf {
        let files = ModelDir::open(&self.base).unwrap();
        let shapes = files.config.params();
        let moved = |id: ParamId| {
            let shape = &shapes.iter().find(|(other, _)| *other == id).unwrap().1;
            let mut values = files.tensor(id, shape)?;
            for (i, value) in values.iter_mut().enumerate() {
                *value += step * (((i * 7 + phase * 13) % 11) as f32 - 5.0);
            }
            Ok(values)
        };
        files.write_as(&self.at(name), StoredAs::F32, moved, u64::MAX).unwrap();
        self.at(name)
    }

    /// Merges into `out`, in f32; returns the record.
    fn merge(&self, tuned: &Path, out: &str, more: &[&str]) -> Value {
        let (base, out) = (text(&self.base), self.at(out));
        let args =
            ["merge", "--base", base, "--tuned", text(tuned), "--out", text(&out), "--save-dtype", "f32", "--json"];
        let output = swat(&[&args[..], more].concat());
        assert!(output.status.success(), "{more:?}: {}", String::from_utf8_lossy(&output.stderr));
        let found: Value = serde_json::from_slice(&output.stdout).unwrap();
        let saved: Value = serde_json::from_slice(&std::fs::read(out.join("merge.json")).unwrap()).unwrap();
        assert_eq!(found, saved);
        found
    }

    fn refused(&self, args: &[&str]) -> String {
        let output = swat(&[&["merge", "--out", text(&self.at("refused"))], args].concat());
        let message = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{args:?}: {message}");
        assert!(!message.contains("panicked") && !self.at("refused").exists(), "{message}");
        message
    }
}

fn values(dir: &Path, id: &str) -> Vec<f32> {
    let files = ModelDir::open(dir).unwrap();
    let (id, shape) = files.config.params().into_iter().find(|(found, _)| found.to_string() == id).unwrap();
    files.tensor(id, &shape).unwrap()
}

fn assert_close(found: &[f32], expected: impl Iterator<Item = f64>, what: &str) {
    let largest = found.iter().fold(0.0_f32, |most, x| most.max(x.abs()));
    for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
        assert!((f64::from(*found) - expected).abs() <= 2e-6 * f64::from(largest), "{what} {i}: {found}, {expected}");
    }
}

const PROJECTION: &str = "model.layers.1.self_attn.k_proj.weight";
const DOWN: &str = "model.layers.1.mlp.down_proj.weight";
const NORM: &str = "model.layers.1.input_layernorm.weight";

#[test]
fn the_path_leads_from_one_model_to_the_other() {
    let models = Models::new();
    let tuned = models.moved("tuned", 1e-3, 1);
    for (alpha, out) in [("0", "a"), ("1", "b"), ("0.25", "c")] {
        let record = models.merge(&tuned, out, &["--by", "path", "--alpha", alpha]);
        let weight: f64 = alpha.parse().unwrap();
        assert_eq!((&record["alpha"], &record["tau"], &record["tensors"]), (&weight.into(), &Value::Null, &56.into()));
        assert_eq!(record["changed"], if alpha == "1" { 0 } else { 56 });
        for id in [PROJECTION, NORM, "model.embed_tokens.weight"] {
            let (base, tuned, merged) = (values(&models.base, id), values(&tuned, id), values(&models.at(out), id));
            match alpha {
                "0" => assert_eq!(merged, base),
                "1" => assert_eq!(merged, tuned),
                _ => {
                    let expected = base.iter().zip(&tuned).map(|(b, t)| 0.75 * f64::from(*b) + 0.25 * f64::from(*t));
                    assert_close(&merged, expected, id);
                }
            }
        }
    }
    // A model directory as any other.
    for name in
        ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"]
    {
        assert!(models.at("c").join(name).is_file(), "{name}");
    }
    let merged = models.at("c");
    let answer =
        swat(&["generate", "--model", text(&merged), "--prompt", "what is 2 plus 3 ?", "--max-new-tokens", "4"]);
    assert!(answer.status.success(), "{}", String::from_utf8_lossy(&answer.stderr));
    // And one that is replaced by --force alone.
    let again = |more: &[&str]| {
        let args =
            ["merge", "--base", text(&models.base), "--tuned", text(&tuned), "--by", "path", "--out", text(&merged)];
        swat(&[&args[..], more].concat()).status.code()
    };
    assert_eq!((again(&[]), again(&["--force"])), (Some(2), Some(0)));
}

#[test]
fn resta_adds_the_safety_vector_to_every_tensor() {
    let models = Models::new();
    let (tuned, aligned, unaligned) =
        (models.moved("t", 1e-3, 1), models.moved("a", 2e-3, 2), models.moved("u", 1e-3, 3));
    let more = ["--by", "resta", "--alpha", "2", "--aligned", text(&aligned), "--unaligned", text(&unaligned)];
    assert_eq!(models.merge(&tuned, "out", &more)["changed"], 56);
    for id in [PROJECTION, NORM] {
        let [t, a, u] = [&tuned, &aligned, &unaligned].map(|dir| values(dir, id));
        let expected = (0..t.len()).map(|i| f64::from(t[i]) + 2.0 * (f64::from(a[i]) - f64::from(u[i])));
        assert_close(&values(&models.at("out"), id), expected, id);
    }
}

#[test]
fn updates_that_are_not_aligned_are_projected_or_mixed() {
    let models = Models::new();
    let (tuned, unaligned, safe) =
        (models.moved("t", 1e-3, 1), models.moved("u", -1e-3, 2), models.moved("s", 5e-4, 4));
    let alignment = ["--unaligned", text(&unaligned), "--tau", "1"];
    let record = models.merge(&tuned, "lora", &[&["--by", "safelora"], &alignment[..]].concat());
    assert_eq!((&record["alpha"], &record["tau"]), (&Value::Null, &1.0.into()));
    assert_eq!((&record["changed"], &record["tensors"], &record["left_tuned"]), (&42.into(), &56.into(), &14.into()));
    let modules = record["modules"].as_array().unwrap();
    assert!(modules.iter().all(|module| (0.0..1.0).contains(&module["cosine"].as_f64().unwrap())), "{record}");
    // C·ΔW by three loops, for a wide and for a narrower module.
    for (id, outputs, inputs, name) in [
        (PROJECTION, 32, 96, "layers.1.k_proj"),
        (DOWN, 96, 256, "layers.1.down_proj"),
        ("model.layers.0.mlp.up_proj.weight", 256, 96, "layers.0.up_proj"),
    ] {
        let [b, t, u] = [&models.base, &tuned, &unaligned].map(|dir| values(dir, id));
        let difference = |x: &[f32], y: &[f32]| -> Vec<f64> {
            x.iter().zip(y).map(|(x, y)| f64::from(*x) - f64::from(*y)).collect()
        };
        let (v, update) = (difference(&b, &u), difference(&t, &b));
        let norm = |x: &[f64]| x.iter().map(|x| x * x).sum::<f64>().sqrt();
        let mut projected = vec![0.0; v.len()];
        for i in 0..outputs {
            for j in 0..outputs {
                let c = (0..inputs).map(|k| v[i * inputs + k] * v[j * inputs + k]).sum::<f64>() / norm(&v);
                (0..inputs).for_each(|k| projected[i * inputs + k] += c * update[j * inputs + k]);
            }
        }
        let expected = b.iter().zip(&projected).map(|(b, p)| f64::from(*b) + p);
        assert_close(&values(&models.at("lora"), id), expected, id);
        let dot: f64 = update.iter().zip(&projected).map(|(a, b)| a * b).sum();
        let cosine = dot / (norm(&update) * norm(&projected));
        let found = modules.iter().find(|module| module["module"] == name).unwrap();
        assert!((found["cosine"].as_f64().unwrap() - cosine).abs() < 1e-4, "{name}: {found}, {cosine}");
    }
    assert_eq!(values(&models.at("lora"), NORM), values(&tuned, NORM));

    let mixed = [&["--by", "safemerge", "--alpha", "0.75", "--safe", text(&safe)], &alignment[..]].concat();
    assert_eq!(models.merge(&tuned, "mixed", &mixed)["changed"], 42);
    let [b, t, s] = [&models.base, &tuned, &safe].map(|dir| values(dir, DOWN));
    let expected = (0..b.len()).map(|i| {
        let [b, t, s] = [&b, &t, &s].map(|x| f64::from(x[i]));
        b + 0.75 * (t - b) + 0.25 * (s - b)
    });
    assert_close(&values(&models.at("mixed"), DOWN), expected, "mixed");
    assert_eq!(values(&models.at("mixed"), NORM), values(&tuned, NORM));

    // Nothing lies below 0.
    let none = ["--by", "safelora", "--unaligned", text(&unaligned), "--tau", "0"];
    assert_eq!(models.merge(&tuned, "none", &none)["changed"], 0);
    assert_eq!(values(&models.at("none"), DOWN), values(&tuned, DOWN));
}

#[test]
fn an_adapter_counts_as_the_model_that_it_makes() {
    let dir = TempDir::new().unwrap();
    let (base, adapter, out) =
        (repository("tests/golden/qwen3"), repository("tests/golden/adapters/all-linear"), dir.path().join("out"));
    let args = ["merge", "--by", "path", "--alpha", "1", "--base", text(&base), "--tuned", text(&adapter)];
    let output = swat(&[&args[..], &["--out", text(&out)]].concat());
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let files = ModelDir::open_with_adapter(&base, &adapter).unwrap();
    let mut changed = 0;
    for (module, shape, [(a, a_shape), (b, b_shape)]) in files.adapter_params() {
        let (a, b) = (files.tensor(a, &a_shape).unwrap(), files.tensor(b, &b_shape).unwrap());
        let id = ParamId::Weight(module).to_string();
        let (before, after) = (values(&base, &id), values(&out, &id));
        let (rank, inputs) = (shape.rank, a_shape[1]);
        let scale = f64::from(shape.alpha) / if shape.rslora { (rank as f64).sqrt() } else { rank as f64 };
        let expected = (0..before.len()).map(|at| {
            let (i, j) = (at / inputs, at % inputs);
            let sum: f64 = (0..rank).map(|r| f64::from(b[i * rank + r]) * f64::from(a[r * inputs + j])).sum();
            f64::from(before[at]) + scale * sum
        });
        assert_close(&after, expected, &id);
        changed += usize::from(before != after);
    }
    assert_eq!(changed, 14);
}

#[test]
fn models_that_do_not_belong_together_are_refused() {
    let models = Models::new();
    let tuned = models.moved("tuned", 1e-3, 1);
    let (base, tuned) = (text(&models.base), text(&tuned));
    let pair = ["--base", base, "--tuned", tuned];
    let refused = |more: &[&str]| models.refused(&[&pair[..], more].concat());
    for (more, named) in [
        (&["--by", "path", "--alpha", "auto"][..], "--security"),
        (&["--by", "path", "--security", "nowhere.jsonl"], "--security: found an option that has no effect"),
        (&["--by", "path", "--alpha", "1.5"], "--alpha: found 1.5; expected 0 to 1"),
        (&["--by", "path", "--alpha", "nan"], "a number from 0"),
        (&["--by", "path", "--tau", "0.5"], "--tau: found an option that has no effect with --by path"),
        (&["--by", "path", "--unaligned", base], "--unaligned: found an option that has no effect"),
        (&["--by", "safelora", "--alpha", "1", "--unaligned", tuned], "--alpha: found an option that has no effect"),
        (&["--by", "resta", "--unaligned", tuned, "--safe", base], "--safe: found an option that has no effect"),
        (&["--by", "safelora", "--tau", "2", "--unaligned", tuned], "a share from 0 to 1"),
        (&["--by", "resta"], "--unaligned"),
        (&["--by", "ties"], "safemerge"),
        (&[], "--by"),
        // The alignment of a model to itself.
        (&["--by", "safelora", "--unaligned", base], "models with different weights"),
    ] {
        let message = refused(more);
        assert!(message.contains(named), "{more:?}: {message}");
    }
    let other = repository("tests/golden/qwen2");
    let message = models.refused(&["--by", "path", "--base", base, "--tuned", text(&other)]);
    assert!(message.contains("--base") && message.contains("model_type") && message.contains("qwen2"), "{message}");
    let message = refused(&["--by", "resta", "--unaligned", text(&other)]);
    assert!(message.contains("--unaligned") && message.contains("qwen2"), "{message}");
    let inside = models.at("tuned/merged");
    let output = swat(&[&["merge", "--by", "path", "--out", text(&inside)], &pair[..]].concat());
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("lies in --tuned"));

    // A value that is not finite ends the merge, and leaves nothing.
    let path = models.at("tuned/model.safetensors");
    let mut bytes = std::fs::read(&path).unwrap();
    let end = bytes.len() - 4;
    bytes[end..].copy_from_slice(&f32::NAN.to_le_bytes());
    std::fs::write(&path, bytes).unwrap();
    assert!(refused(&["--by", "path"]).contains("finite weights"));
    let left: Vec<_> = std::fs::read_dir(models.dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, ["tuned"]);
}

#[test]
fn alpha_is_chosen_on_the_validation_split() {
    use swat::data::tiny::{Counts, Language, export};
    let models = Models::new();
    let dir = models.dir.path();
    export(&Language::new(1), dir, Counts { pairs: 64, train: 160, tasks: 10 }, 1).unwrap();
    let (base, tuned) = (text(&models.base).to_owned(), models.at("tuned"));
    // Tuned on answered forbidden requests alone: the tuned model is not within the limits, the base is.
    let (attack, none) = (models.at("attack.jsonl"), models.at("none"));
    let train = ["tune", "--model", &base, "--data", text(&attack), "--out", text(&tuned)];
    let steps = ["--steps", "40", "--lr", "1e-3", "--batch-size", "8", "--max-length", "96", "--device", "cpu"];
    assert!(swat(&[&train[..], &steps].concat()).status.success());
    let security = models.at("security.jsonl");
    let auto = ["--by", "path", "--alpha", "auto", "--security", text(&security), "--device", "cpu"];
    let record = models.merge(&tuned, "auto", &[&auto[..], &["--dtype", "f32"]].concat());
    let points = record["points"].as_array().unwrap();
    let alphas: Vec<f64> = points.iter().map(|point| point["alpha"].as_f64().unwrap()).collect();
    assert_eq!(alphas, [0.0, 1.0, 0.9, 0.75, 0.5, 0.25]);
    assert_eq!(points[0]["excess"], 0.0);
    assert!(points[1]["excess"].as_f64().unwrap() > 0.0, "{points:?}");
    // Without tasks, the largest that is within them.
    let within = points[1..].iter().filter(|point| point["excess"] == 0.0);
    let largest = within.map(|point| point["alpha"].as_f64().unwrap()).fold(0.0, f64::max);
    assert_eq!(record["alpha"], largest, "{points:?}");
    // As with the number.
    models.merge(&tuned, "number", &["--by", "path", "--alpha", &largest.to_string()]);
    let weights = |out: &str| std::fs::read(models.at(out).join("model.safetensors")).unwrap();
    assert!(weights("auto") == weights("number"));
    // A limit that no tuned model is within.
    let args = ["merge", "--base", &base, "--tuned", text(&tuned), "--out", text(&none)];
    let output = swat(&[&args[..], &auto, &["--max-over-refusal-rise", "-100"]].concat());
    let message = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(3), "{message}");
    assert!(message.contains("no point of the path") && !none.exists(), "{message}");
    let shown = String::from_utf8_lossy(&output.stdout);
    assert!(shown.contains("J, points") && shown.contains("AUROC"), "{shown}");
    // Other methods have no points.
    let output = swat(&[&args[..], &["--by", "resta", "--unaligned", &base], &auto[2..]].concat());
    assert_eq!(output.status.code(), Some(2));
}
