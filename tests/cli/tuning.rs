//! Tuning runs: what they say about themselves (skipped steps, rounding, the date), and recipes by name.

use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn tiny() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/tiny")
}

fn data(dir: &Path) -> PathBuf {
    use swat::data::tiny::{Counts, Language, export};
    export(&Language::new(1), dir, Counts { pairs: 16, train: 24, tasks: 4 }, 1).unwrap();
    dir.join("train.jsonl")
}

fn tune(train: &Path, out: &Path, more: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_swat"));
    command.arg("tune").arg("--model").arg(tiny()).arg("--data").arg(train).arg("--out").arg(out);
    command.args(["--device", "cpu", "--dtype", "f32", "--batch-size", "4", "--max-length", "96"]).args(more);
    command.env_remove("SOURCE_DATE_EPOCH");
    command
}

fn parsed(output: &Output) -> Value {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn a_run_that_diverges_fails_and_says_what_to_change() {
    let dir = tempfile::tempdir().unwrap();
    let (train, out) = (data(dir.path()), dir.path().join("out"));
    let output = tune(&train, &out, &["--lr", "1e5", "--steps", "20"]).output().unwrap();
    let message = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{message}");
    assert!(message.contains("steps were skipped") && message.contains("lower lr (1e5)"), "{message}");
    assert!(!out.exists());
}

/// Options that contradict each other, or that cannot have an effect, are told before anything is done.
#[test]
fn options_that_cannot_have_an_effect_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (train, out) = (data(dir.path()), dir.path().join("out"));
    let heldout = dir.path().join("heldout.jsonl");
    let heldout = heldout.to_str().unwrap();
    let refused = |more: &[&str], named: &str| {
        let output = tune(&train, &out, more).output().unwrap();
        let message = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{more:?}: {message}");
        assert!(message.contains(named), "{more:?}: {message}");
        assert!(!out.exists() && !out.with_extension("unfinished").exists());
    };
    // 24 rows in batches of 4 are 6 steps an epoch.
    refused(
        &["--epochs", "2", "--lr-warmup-steps", "12"],
        "lr_warmup_steps: found 12 steps of warm-up in a phase of 12",
    );
    refused(&["--steps", "20", "--lr-warmup-steps", "30"], "30 steps of warm-up in a phase of 20");
    let mods = ["--mods", "layers.0.v_proj", "--mods-steps", "5", "--steps", "20", "--lr-warmup-steps", "5"];
    refused(&mods, "5 steps of warm-up in a phase of 5");
    refused(
        &["--steps", "20", "--eval-data", heldout, "--keep-best"],
        "--keep-best: found the best, with 1 evaluation",
    );
    let patience = ["--steps", "20", "--eval-data", heldout, "--eval-every", "5", "--early-stop", "3"];
    refused(&patience, "--early-stop: found a patience of 3, with 4 evaluations");
    for (recipe, option) in [
        ("plain", ["--mods-steps", "5"]),
        ("plain", ["--rest-lr-factor", "0.5"]),
        ("ml-lr:.1", ["--mods-lr", "1e-3"]),
        ("mods-only", ["--steps", "5"]),
    ] {
        refused(&["--recipe", recipe, option[0], option[1]], &format!("{} beside it, which has no effect", option[0]));
    }
    refused(&["--recipe", "plain", "--keep-optimizer"], "--keep-optimizer beside it");
    let part = "expected a whole number of epochs; steps may be part of one (--steps, --mods-steps)";
    refused(&["--epochs", "0.5"], part);
    refused(&["--mods", "layers.0.v_proj", "--mods-epochs", ".5"], part);
    refused(&["--steps", "1e3"], "expected a whole number from 0");
    refused(&["--seed", "0.5"], "expected a whole number from 0");
    refused(&["--steps", "2", "--tensorboard", heldout], "heldout.jsonl, which is no directory");
    let output = tune(&train, &out, &["--epochs", "2", "--lr-warmup-steps", "11", "--quiet"]).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// Losses of 20 steps of AdamW with decay and clipping, against TRL's SFTTrainer on the same rows (sft.py).
#[test]
fn losses_are_those_of_trl() {
    let known: Value = serde_json::from_str(include_str!("sft.json")).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, text: String| {
        let path = dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        path
    };
    let template = write("t.jinja", known["template"].as_str().unwrap().to_owned());
    for (name, rows, accumulation) in
        [("assistant", "messages", "1"), ("completion", "pairs", "1"), ("accumulated", "messages", "2")]
    {
        let lines = known[rows].as_array().unwrap().iter().map(|row| format!("{row}\n")).collect();
        let (train, out) = (write(&format!("{name}.jsonl"), lines), dir.path().join(name));
        let options = ["--steps", "20", "--lr", "1e-3", "--schedule", "constant", "--weight-decay", "0.1", "--quiet"];
        let order = ["--shuffle", "false", "--grad-accum", accumulation, "--chat-template", template.to_str().unwrap()];
        let output = tune(&train, &out, &[&options[..], &order].concat()).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let metrics = std::fs::read_to_string(out.join("metrics.jsonl")).unwrap();
        let found = metrics.lines().map(|line| serde_json::from_str::<Value>(line).unwrap()["loss"].as_f64().unwrap());
        let expected: Vec<f64> = serde_json::from_value(known["losses"][name].clone()).unwrap();
        let apart: Vec<f64> = found.zip(&expected).map(|(loss, expected)| (loss - expected).abs()).collect();
        assert!(apart.len() == 20 && apart.iter().all(|apart| *apart < 1e-4), "{name}: {apart:?}");
    }
}

/// Values of every tensor of a model file.
fn values(path: &Path) -> Vec<f32> {
    let bytes = std::fs::read(path.join("model.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let mut names = file.names();
    names.sort();
    let mut all = Vec::new();
    for name in names {
        let tensor = file.tensor(name).unwrap();
        match tensor.dtype() {
            safetensors::Dtype::F32 => {
                all.extend(tensor.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())))
            }
            _ => {
                let pairs = tensor.data().chunks_exact(2);
                all.extend(pairs.map(|b| half::bf16::from_le_bytes(b.try_into().unwrap()).to_f32()))
            }
        }
    }
    all
}

#[test]
fn updates_that_rounding_loses_are_told() {
    let dir = tempfile::tempdir().unwrap();
    let train = data(dir.path());
    let run = |name: &str, dtype: &str| {
        let out = dir.path().join(name);
        let more = ["--lr", "2e-5", "--steps", "4", "--save-dtype", dtype];
        let found = parsed(&tune(&train, &out, &[&more[..], &["--json"]].concat()).output().unwrap());
        let config: Value = serde_json::from_slice(&std::fs::read(out.join("config.json")).unwrap()).unwrap();
        (found["rounding"].clone(), config["torch_dtype"].clone(), values(&out))
    };
    let (stored, _, narrow) = run("stored", "as-stored");
    let (full, dtype, wide) = run("full", "f32");
    // Counted on the files: the same run, saved without rounding, tells which weights moved.
    let before = values(&tiny());
    let moved = wide.iter().zip(&before).filter(|(after, before)| after != before).count();
    let lost = wide.iter().zip(&narrow).zip(&before).filter(|((w, n), b)| w != b && n == b).count();
    assert!(lost > moved / 20, "{lost} of {moved}");
    assert_eq!(stored, serde_json::json!({ "moved": moved, "unchanged": lost }));
    assert_eq!((full["unchanged"].clone(), dtype), (0.into(), "float32".into()));
    let rounded: Vec<f32> = wide.iter().map(|w| half::bf16::from_f32(*w).to_f32()).collect();
    assert!(rounded == narrow);
    let printed = tune(&train, &dir.path().join("told"), &["--lr", "2e-5", "--steps", "4"]).output().unwrap();
    let printed = String::from_utf8(printed.stdout).unwrap();
    assert!(printed.contains("saved unchanged") && printed.contains("--save-dtype f32"), "{printed}");
    assert!(printed.contains("peak memory") && printed.contains("before the model was loaded"), "{printed}");
}

#[test]
fn the_date_of_a_template_is_part_of_the_run() {
    let dir = tempfile::tempdir().unwrap();
    let train = data(dir.path());
    let config: Value = serde_json::from_slice(&std::fs::read(tiny().join("tokenizer_config.json")).unwrap()).unwrap();
    let template = dir.path().join("dated.jinja");
    let dated = format!("{{{{ strftime_now('%d %B %Y') }}}}\n{}", config["chat_template"].as_str().unwrap());
    std::fs::write(&template, dated).unwrap();
    let run = |name: &str, epoch: &str, more: &[&str]| {
        let out = dir.path().join(name);
        let own = ["--steps", "12", "--lr", "1e-3", "--save-every", "2", "--chat-template", template.to_str().unwrap()];
        let mut command = tune(&train, &out, &[&own[..], more].concat());
        command.env("SOURCE_DATE_EPOCH", epoch);
        (command, out)
    };
    let weights = |out: &Path| std::fs::read(out.join("model.safetensors")).unwrap();
    let (mut command, straight) = run("straight", "1751373000", &[]);
    assert!(command.output().unwrap().status.success());
    let record: Value = serde_json::from_slice(&std::fs::read(straight.join("tune.json")).unwrap()).unwrap();
    assert_eq!(record["config"]["date"], "2025-07-01T12:30:00Z");
    // Killed on one day, resumed on another.
    let (mut command, out) = run("killed", "1751373000", &[]);
    let mut child = command.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null()).spawn().unwrap();
    while !dir.path().join("killed.unfinished/checkpoints/step-00000004").exists() {
        assert!(child.try_wait().unwrap().is_none(), "it ended before it could be killed");
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    let output = run("killed", "1999999999", &["--resume"]).0.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(weights(&out) == weights(&straight));
    // An option fixes it, whatever the clock says.
    let (mut command, out) = run("fixed", "1999999999", &["--date", "2025-07-01"]);
    assert!(command.output().unwrap().status.success());
    assert!(weights(&out) == weights(&straight));
    let output = run("wrong", "yesterday", &[]).0.output().unwrap();
    assert!(String::from_utf8_lossy(&output.stderr).contains("SOURCE_DATE_EPOCH"));
}

#[test]
fn a_recipe_is_the_same_as_its_options() {
    let dir = tempfile::tempdir().unwrap();
    let train = data(dir.path());
    let refusals = dir.path().join("refusals.jsonl");
    let run = |name: &str, more: &[&str]| {
        let out = dir.path().join(name);
        parsed(&tune(&train, &out, &[more, &["--json"]].concat()).output().unwrap());
        let record: Value = serde_json::from_slice(&std::fs::read(out.join("tune.json")).unwrap()).unwrap();
        (std::fs::read(out.join("model.safetensors")).unwrap(), record)
    };
    let path = refusals.to_str().unwrap();
    let (by_options, plain) =
        run("options", &["--lr", "1e-3", "--steps", "4", "--ema-decay", "0.5", "--mix", path, "--mix-share", "0.25"]);
    let recipe = "plain+lr=1e-3,steps=4,ema=.5,refusals=.25";
    let (by_recipe, named) = run("recipe", &["--recipe", recipe, "--refusals", path]);
    assert!(by_options == by_recipe, "the same weights");
    assert_eq!((&plain["job"], &named["config"]["recipe"]), (&named["job"], &recipe.into()));
    assert_eq!(plain["config"].get("recipe"), None);
    // What holds the model near itself, on replayed answers.
    let near = ["--lr", "1e-3", "--steps", "3", "--constrain", "0.5", "--distil", "2", "--prox", "0.1"];
    let (by_options, plain) = run("near", &[&near[..], &["--mix", path, "--mix-share", "0.25"]].concat());
    let recipe = "plain+lr=1e-3,steps=3,constrain=.5,distil=2,prox=.1,replay=.25";
    let (by_recipe, named) = run("near-recipe", &["--recipe", recipe, "--replay", path]);
    assert!(by_options == by_recipe, "the same weights");
    assert_eq!(plain["job"], named["job"]);
    // Both phases, by adapters of another rank.
    let set = "layers.0.q_proj";
    let lora = ["--method", "lora", "--lora-rank", "2", "--lr", "1e-3", "--mods-steps", "2", "--steps", "2"];
    let (by_options, _) = run("lora", &[&lora[..], &["--mods", set]].concat());
    let recipe = format!("swat:mods={set}+lora=2,lr=1e-3,steps=2");
    let (by_recipe, _) = run("lora-recipe", &["--recipe", &recipe, "--mods-steps", "2"]);
    assert!(by_options == by_recipe, "the same weights");
}

#[test]
fn a_recipe_that_cannot_be_run_is_refused_before_anything_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let (train, out) = (data(dir.path()), dir.path().join("out"));
    let refusals = dir.path().join("refusals.jsonl");
    let refusals = refusals.to_str().unwrap();
    for (more, expected) in [
        (&["--recipe", "swot"][..], "did you mean `swat`?"),
        (&["--recipe", "swat+emma=.9"], "did you mean `ema`?"),
        (&["--recipe", "plain+ema=2"], "found ema=2; expected a number above 0 and below 1"),
        (&["--recipe", "plain+replay=.1"], "`swat replay --model M --security S --out FILE` makes one"),
        (&["--recipe", "plain+refusals"], "no --refusals"),
        (&["--recipe", "plain", "--refusals", refusals], "which is not mixed in"),
        (&["--recipe", "swat"], "no Mods_Rob; expected --mods SET_OR_FILE"),
        (&["--recipe", "plain", "--mods", "layers.0.q_proj"], "--mods beside it"),
        (&["--recipe", "plain+lr=1e-4", "--lr", "1e-3"], "lr=, and --lr beside it"),
        (&["--recipe", "plain+steps=4", "--epochs", "3"], "steps=, and --epochs beside it"),
        (&["--recipe", "plain", "--distil", "1"], "--distil beside it, where nothing is replayed"),
        (&["--recipe", "plain+merge=path:.5"], "`swat merge --by path`"),
        (&["--recipe", "plain+seeds=2"], "--seed N"),
        (&["--recipe", "given"], "trains nothing"),
        (&["--replay", refusals], "--recipe"),
    ] {
        let output = tune(&train, &out, more).output().unwrap();
        let message = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{more:?}: {message}");
        assert!(message.contains(expected), "{more:?}: {message}");
        assert!(!out.exists());
    }
}

#[test]
fn losses_of_recipes_leave_nothing_behind() {
    let dir = tempfile::tempdir().unwrap();
    let (train, out) = (data(dir.path()), dir.path().join("out"));
    let recipe = ["--constrain", "--prox", "0.1", "--vaccine", "0.1", "--ema-decay", "0.9"];
    let mixed = ["--distil", "0.5", "--mix", train.to_str().unwrap(), "--mix-share", "0.25"];
    let more = ["--module-lr", "layers.*.{q,k}=0.5,embed_tokens=0", "--steps", "2", "--lr", "1e-3", "--json"];
    let found = parsed(&tune(&train, &out, &[&recipe[..], &mixed, &more].concat()).output().unwrap());
    assert!(found["plans"]["all"]["copies_bytes"].as_u64().unwrap() > 0, "{found}");
    assert!(!dir.path().join("out.unfinished").exists());
    let record: Value = serde_json::from_slice(&std::fs::read(out.join("tune.json")).unwrap()).unwrap();
    let shared = &record["job"]["shared"];
    let values = ["constrain", "distil", "prox", "vaccine"].map(|key| shared[key].as_f64().unwrap() as f32);
    assert_eq!(values, [1.0, 0.5, 0.1, 0.1], "{shared}");
    assert_eq!(record["job"]["module_lr"], "layers.*.{q,k}=0.5,embed_tokens=0");
    let (before, after) = (embedding(&tiny()), embedding(&out));
    assert!(before == after, "frozen, and no average of anything else");

    let plan = |more: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_swat"));
        command.arg("plan").arg("--model").arg(tiny()).args(["--dtype", "f32", "--device", "cpu", "--json"]).args(more);
        parsed(&command.output().unwrap())
    };
    let (plain, full) = (plan(&[]), plan(&[&recipe[..], &["--distil", "0.5"]].concat()));
    let of = |plan: &Value, key: &str| plan[key].as_u64().unwrap();
    // An average and an anchor, both f32.
    assert_eq!(of(&full, "copies_bytes"), 8 * of(&full, "trainable"));
    assert_eq!(of(&plain, "copies_bytes"), 0);
    assert!(
        of(&full, "activations_bytes") > of(&plain, "activations_bytes"),
        "outputs of all layers and their gradients"
    );
    // 8 × 1024 tokens, each with a reference, β and 64 tokens of a teacher.
    assert_eq!(of(&full, "workspace_bytes") - of(&plain, "workspace_bytes"), 8 * 1024 * (8 + 8 * 64));
}

/// The bytes of a model's embedding.
fn embedding(path: &Path) -> Vec<u8> {
    let bytes = std::fs::read(path.join("model.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    file.tensor("model.embed_tokens.weight").unwrap().data().to_vec()
}
