//! Adapters on the command line: LoRA runs that save what peft reads, and commands that take `--adapter`.

use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use swat::data::tiny::{Counts, Language, export};

fn swat(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_swat")).args(args).output().expect("the binary runs")
}

fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

fn tiny() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/tiny")
}

fn done(args: &[&str]) -> String {
    let output = swat(args);
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn refused(args: &[&str]) -> String {
    let output = swat(args);
    let message = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{args:?}: {message}");
    message
}

fn data(dir: &Path) -> PathBuf {
    let data = dir.join("data");
    std::fs::create_dir(&data).unwrap();
    export(&Language::new(1), &data, Counts { pairs: 12, train: 24, tasks: 4 }, 1).unwrap();
    data
}

/// Log-probabilities of a fixed text.
fn score(more: &[&str]) -> Vec<f64> {
    let args = [&["score", "--ids", "5,9,300,7,11,40", "--json", "--dtype", "f32"][..], more].concat();
    let found: Value = serde_json::from_str(&done(&args)).unwrap();
    found["logprobs"].as_array().unwrap()[1..].iter().map(|x| x.as_f64().unwrap()).collect()
}

fn close(a: &[f64], b: &[f64]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| (a - b).abs() < 2e-4)
}

#[test]
fn adapters_are_saved_attached_and_trained_further() {
    let dir = tempfile::tempdir().unwrap();
    let (data, tiny) = (data(dir.path()), tiny());
    let train = data.join("train.jsonl");
    let tune = |out: &Path, more: &[&str]| {
        let args = [
            "tune",
            "--model",
            text(&tiny),
            "--data",
            text(&train),
            "--out",
            text(out),
            "--steps",
            "6",
            "--quiet",
            "--batch-size",
            "4",
            "--lr",
            "5e-3",
            "--dtype",
            "f32",
        ];
        done(&[&args[..], more].concat());
    };
    let both = dir.path().join("both");
    let lora = ["--method", "lora", "--lora-modules", "q_proj,down_proj", "--lora-rank", "4", "--lora-rslora"];
    tune(&both, &[&lora[..], &["--save", "both"]].concat());
    let adapter = both.join("adapter");
    let settings: Value = serde_json::from_slice(&std::fs::read(adapter.join("adapter_config.json")).unwrap()).unwrap();
    assert_eq!(settings["target_modules"], serde_json::json!(["q_proj", "down_proj"]));
    assert_eq!((&settings["r"], &settings["use_rslora"]), (&4.into(), &true.into()));
    assert_eq!(settings["base_model_name_or_path"], text(&tiny));
    assert!(adapter.join("tokenizer.json").exists() && !adapter.join("config.json").exists());

    // The adapter on the base is the merged model, which is stored in the base's dtype; without it, it is the base.
    let base = score(&["--model", text(&tiny)]);
    let attached = score(&["--model", text(&tiny), "--adapter", text(&adapter)]);
    assert!(!close(&base, &attached));
    let only = dir.path().join("only");
    tune(&only, &[&lora[..], &["--save", "adapter"]].concat());
    assert!(!only.join("model.safetensors").exists() && only.join("tune.json").exists());
    let weights = |dir: &Path| std::fs::read(dir.join("adapter_model.safetensors")).unwrap();
    assert_eq!(weights(&only), weights(&adapter));
    let merged = dir.path().join("merged");
    tune(&merged, &lora);
    assert!(!merged.join("adapter").exists() && !merged.join("adapter_config.json").exists());

    // Further training begins where the adapter stands and ends somewhere else.
    let further = dir.path().join("further");
    tune(&further, &["--adapter", text(&adapter), "--save", "both"]);
    let first = |dir: &Path| -> f64 {
        let text = std::fs::read_to_string(dir.join("metrics.jsonl")).unwrap();
        serde_json::from_str::<Value>(text.lines().next().unwrap()).unwrap()["loss"].as_f64().unwrap()
    };
    assert!(first(&further) < first(&both) - 0.01, "{} and {}", first(&further), first(&both));
    assert_ne!(weights(&further.join("adapter")), weights(&adapter));
    let same = dir.path().join("same");
    let none = ["--adapter", text(&adapter), "--save", "adapter"];
    let args = [
        "tune",
        "--model",
        text(&tiny),
        "--data",
        text(&train),
        "--out",
        text(&same),
        "--steps",
        "0",
        "--quiet",
        "--dtype",
        "f32",
    ];
    done(&[&args[..], &none].concat());
    assert_eq!(weights(&same), weights(&adapter));

    // The other commands.
    let security = data.join("security.jsonl");
    let probe = dir.path().join("probe.safetensors");
    done(&["probe", "--model", text(&tiny), "--security", text(&security), "--out", text(&probe), "--quiet"]);
    let prompts = ["--security", text(&security), "--quiet", "--json", "--dtype", "f32"];
    let drift = |more: &[&str]| -> Value {
        let args = [&["drift", "--model", text(&tiny), "--probe", text(&probe)][..], &prompts, more].concat();
        serde_json::from_str(&done(&args)).unwrap()
    };
    let found = drift(&["--adapter", text(&adapter)]);
    assert_ne!(found, drift(&["--tuned", text(&tiny)]));
    done(
        &[
            &["eval", "--model", text(&tiny), "--adapter", text(&adapter), "--limit", "2", "--answer-tokens", "4"][..],
            &prompts,
        ]
        .concat(),
    );
    done(&["generate", "--model", text(&tiny), "--adapter", text(&adapter), "--prompt", "a", "--max-new-tokens", "3"]);
    let other = dir.path().join("probe-of-the-adapter.safetensors");
    done(&[
        "probe",
        "--model",
        text(&tiny),
        "--adapter",
        text(&adapter),
        "--security",
        text(&security),
        "--out",
        text(&other),
        "--quiet",
    ]);
    let args = ["drift", "--model", text(&tiny), "--probe", text(&other), "--adapter", text(&adapter)];
    let message = refused(&[&args[..], &prompts].concat());
    assert!(message.contains("train a probe of this model"), "{message}");
}

#[test]
fn adapters_that_would_have_no_effect_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (data, tiny) = (data(dir.path()), tiny());
    let train = data.join("train.jsonl");
    let out = dir.path().join("out");
    let tune = |more: &[&str]| {
        let args = ["tune", "--model", text(&tiny), "--data", text(&train), "--out", text(&out), "--steps", "1"];
        let message = refused(&[&args[..], more].concat());
        assert!(!out.exists());
        message
    };
    assert!(tune(&["--save", "adapter"]).contains("--method lora, or --adapter DIR, as well"));
    for set in ["embed_tokens norm", "embed_tokens", "layers.0.norms,q_proj"] {
        let message = tune(&["--method", "lora", "--lora-modules", set]);
        assert!(message.contains("have no adapters; --method full trains them"), "{message}");
    }
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/adapters/all-linear");
    assert!(tune(&["--adapter", text(&golden)]).contains("adapter_model.safetensors"));
    for option in [&["--lora-rank", "4"][..], &["--lora-alpha", "4"], &["--lora-rslora"], &["--lora-modules", "q_proj"]]
    {
        let message = tune(&[&["--adapter", text(&golden), "--method", "lora"][..], option].concat());
        assert!(message.contains(option[0]) && message.contains("--adapter"), "{message}");
    }
    assert!(tune(&["--adapter", text(&golden), "--method", "full"]).contains("no effect with --method full"));
    let args = ["robustness", "--probe", "p", "--security", "s", "--kind", "update:d", "--model", text(&tiny)];
    let message = refused(&[&args[..], &["--adapter", text(&golden)]].concat());
    assert!(message.contains("--kind: found update:DIR beside --adapter"), "{message}");
    // Whole layers and the whole model stand for their projections.
    let args = [
        "tune",
        "--model",
        text(&tiny),
        "--data",
        text(&train),
        "--out",
        text(&out),
        "--steps",
        "1",
        "--method",
        "lora",
        "--lora-modules",
        "layers.1",
        "--quiet",
    ];
    done(&args);
    let updates: Value = serde_json::from_slice(&std::fs::read(out.join("updates.json")).unwrap()).unwrap();
    let cells = updates["phases"][0]["cells"].as_object().unwrap();
    let moved = |name: &str| cells[name]["delta_norm"].as_f64().unwrap() > 0.0;
    assert!(moved("layers.1.q_proj") && !moved("layers.0.q_proj") && !moved("layers.1.norms"));
}

/// The tokens of the first training example.
fn preview(more: &[&str]) -> Value {
    let found: Value = serde_json::from_str(&done(&[&["tune", "--preview", "--json"][..], more].concat())).unwrap();
    found["first"]["tokens"].clone()
}

#[test]
fn an_adapter_carries_the_chat_that_it_was_trained_by() {
    let dir = tempfile::tempdir().unwrap();
    let (data, tiny) = (data(dir.path()), tiny());
    let (train, template) = (data.join("train.jsonl"), dir.path().join("t.jinja"));
    let source = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}";
    std::fs::write(&template, source).unwrap();
    let adapter = dir.path().join("adapter");
    let model = ["--model", text(&tiny), "--data", text(&train), "--dtype", "f32"];
    let lora = ["--method", "lora", "--steps", "1", "--quiet", "--save", "adapter", "--out", text(&adapter)];
    let named = ["--chat-template", text(&template)];
    done(&[&["tune"][..], &model, &lora, &named].concat());
    // What transformers and vLLM read beside an adapter.
    assert_eq!(std::fs::read_to_string(adapter.join("chat_template.jinja")).unwrap(), source);
    for name in ["tokenizer.json", "tokenizer_config.json", "generation_config.json"] {
        assert!(adapter.join(name).exists(), "{name}");
    }
    // swat reads it there, too.
    let attached = ["--adapter", text(&adapter)];
    let by_template = preview(&[&model[..], &named].concat());
    assert_eq!(preview(&[&model[..], &attached].concat()), by_template);
    assert_ne!(preview(&model), by_template);
    // And the model that is made of both has it.
    let merged = dir.path().join("merged");
    done(&[&["tune"][..], &model, &attached, &["--steps", "0", "--quiet", "--out", text(&merged)]].concat());
    assert_eq!(preview(&["--model", text(&merged), "--data", text(&train)]), by_template);
    // An adapter without a tokenizer is rendered by its model's template.
    std::fs::remove_file(adapter.join("tokenizer.json")).unwrap();
    assert_eq!(preview(&[&model[..], &attached].concat()), preview(&model));
}

#[test]
fn maps_searches_and_plans_take_adapters() {
    let dir = tempfile::tempdir().unwrap();
    let (data, tiny) = (data(dir.path()), tiny());
    let (train, security) = (data.join("train.jsonl"), data.join("security.jsonl"));
    let out = dir.path().join("out");
    let tune = ["--steps", "6", "--lr", "5e-3", "--batch-size", "4", "--save", "both", "--save-dtype", "f32"];
    let lora = ["--method", "lora", "--lora-modules", "q_proj,down_proj", "--lora-rank", "4", "--out", text(&out)];
    let common = ["--model", text(&tiny), "--quiet", "--dtype", "f32"];
    done(&[&["tune", "--data", text(&train)][..], &common, &tune, &lora].concat());
    let adapter = out.join("adapter");
    let file = |name: &str| dir.path().join(name);

    // The map of a model with its adapter is that of the merged model.
    let map = |name: &str, model: &[&str]| -> Value {
        let (probe, map) = (file(&format!("{name}.safetensors")), file(&format!("{name}.json")));
        let given = [model, &["--security", text(&security), "--quiet", "--dtype", "f32"]].concat();
        done(&[&["probe", "--out", text(&probe)][..], &given].concat());
        let options = ["--probe", text(&probe), "--members", "2", "--epsilon", "0.5", "--no-retrain"];
        serde_json::from_str(&done(&[&["robustness", "--json", "--out", text(&map)][..], &options, &given].concat()))
            .unwrap()
    };
    let attached = map("attached", &["--model", text(&tiny), "--adapter", text(&adapter)]);
    let merged = map("merged", &["--model", text(&out)]);
    assert_eq!(attached["made_from"]["adapter"], text(&adapter));
    let drops = |map: &Value| -> Vec<f64> {
        map["cells"].as_array().unwrap().iter().map(|cell| cell["drop"]["gap"]["mean"].as_f64().unwrap()).collect()
    };
    // Merged they differ by rounding, 4e-8; a map of the weights without the adapter is 6e-5 away.
    for (a, b) in drops(&attached).iter().zip(drops(&merged)) {
        assert!((a - b).abs() < 1e-5, "{a} and {b}");
    }
    // The search finds the adapter by the map, and a run on the same model takes its set.
    let (map, mods) = (file("attached.json"), file("mods.json"));
    let search = ["--map", text(&map), "--out", text(&mods), "--tau", "1e9", "--quiet", "--dtype", "f32"];
    done(&[&["search"][..], &search].concat());
    let phases = ["--mods", text(&mods), "--mods-steps", "1", "--steps", "0", "--adapter", text(&adapter)];
    done(&[&["tune", "--data", text(&train), "--out", text(&file("tuned"))][..], &common, &phases].concat());

    // q_proj: 96 to 96, down_proj: 256 to 96, each of six layers; rank 4.
    let plan = |more: &[&str]| -> Value {
        let mut plan: Value = serde_json::from_str(&done(&[&["plan", "--json"][..], &common, more].concat())).unwrap();
        plan["free_bytes"].take();
        plan
    };
    let found = plan(&["--adapter", text(&adapter)]);
    assert_eq!(found["trainable"], 6 * (4 * (96 + 96) + 4 * (256 + 96)));
    std::fs::remove_file(adapter.join("adapter_model.safetensors")).unwrap();
    assert_eq!(plan(&["--adapter", text(&adapter)]), found, "a plan needs no weights");
}
