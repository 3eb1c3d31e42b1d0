//! `swat tune` by several processes, on the CPU: against one, by every launcher, interrupted and continued.

use super::{data, refused, stderr, succeeds, swat, text, tiny};
use serde_json::Value;
use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use swat::data::tiny::Counts;

/// A directory with data of the tiny model's language.
pub struct World {
    pub dir: tempfile::TempDir,
}

impl World {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        data(dir.path(), Counts { pairs: 8, train: 40, tasks: 4 });
        Self { dir }
    }

    pub fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Two phases; `more` comes last.
    pub fn arguments(&self, out: &str, more: &[&str]) -> Vec<String> {
        let (model, train, out) = (tiny(), self.at("data/train.jsonl"), self.at(out));
        let paths = ["--model", text(&model), "--data", text(&train), "--out", text(&out)];
        let fixed = ["--device=cpu", "--dtype=f32", "--batch-size=6", "--max-length=64", "--lr=2e-4", "--quiet"];
        let mods = ["--mods=layers.*.{v_proj,o_proj}"];
        [&["tune"][..], &paths, &fixed, &mods, more].concat().into_iter().map(String::from).collect()
    }

    pub fn tune(&self, out: &str, more: &[&str]) -> Command {
        let arguments = self.arguments(out, more);
        let mut command = swat(&arguments.iter().map(String::as_str).collect::<Vec<_>>());
        command.env("RAYON_NUM_THREADS", "1").stdout(Stdio::null());
        command
    }

    pub fn weights(&self, out: &str) -> Vec<u8> {
        fs::read(self.at(out).join("model.safetensors")).unwrap()
    }

    /// Losses of the steps of a finished run.
    pub fn losses(&self, out: &str) -> Vec<f64> {
        let lines = fs::read_to_string(self.at(out).join("metrics.jsonl")).unwrap();
        let loss = |line: &str| serde_json::from_str::<Value>(line).unwrap()["loss"].as_f64().unwrap();
        lines.lines().map(loss).collect()
    }
}

/// A port that was free a moment ago, and the next one as well.
pub fn port() -> u16 {
    loop {
        let own = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = own.local_addr().unwrap().port();
        if port < u16::MAX && TcpListener::bind(("127.0.0.1", port + 1)).is_ok() {
            return port;
        }
    }
}

/// The variables of torchrun.
pub fn torchrun_variables(rank: usize, size: usize, port: u16) -> Vec<(&'static str, String)> {
    vec![
        ("RANK", rank.to_string()),
        ("WORLD_SIZE", size.to_string()),
        ("LOCAL_RANK", rank.to_string()),
        ("LOCAL_WORLD_SIZE", size.to_string()),
        ("MASTER_ADDR", "127.0.0.1".into()),
        ("MASTER_PORT", port.to_string()),
    ]
}

/// Starts a process for each table of variables.
pub fn start(mut command: impl FnMut() -> Command, variables: Vec<Vec<(&str, String)>>) -> Vec<Child> {
    let start = |variables| command().envs::<Vec<_>, _, _>(variables).stderr(Stdio::piped()).spawn().unwrap();
    variables.into_iter().map(start).collect()
}

pub fn ends(ranks: Vec<Child>) -> Vec<Output> {
    ranks.into_iter().map(|rank| rank.wait_with_output().unwrap()).collect()
}

fn assert_near(found: &[f64], expected: &[f64], what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (step, (found, expected)) in (1..).zip(found.iter().zip(expected)) {
        // Rounding adds up: the promise is for 20 steps.
        let most = if step <= 20 { 1e-6 } else { 1e-5 };
        assert!((found - expected).abs() <= most * expected.max(1.0), "{what}, step {step}: {found} and {expected}");
    }
}

const TWENTY: [&str; 2] = ["--mods-steps=10", "--steps=10"];

#[test]
fn several_processes_train_as_one() {
    let world = World::new();
    let held_out = world.at("data/train.jsonl");
    for (method, more) in [
        ("full", vec!["--eval-data", text(&held_out), "--eval-every=4", "--keep-best"]),
        ("lora", vec!["--method=lora", "--lora-modules=all-linear"]),
    ] {
        let options = [&TWENTY[..], &more].concat();
        let one = format!("{method}-1");
        succeeds(world.tune(&one, &options));
        for size in ["2", "4"] {
            let out = format!("{method}-{size}");
            let output = succeeds(world.tune(&out, &[&options[..], &["--gpus", size]].concat()));
            assert_eq!(stderr(&output), "", "nothing is said with --quiet");
            assert_near(&world.losses(&out), &world.losses(&one), &out);
            let record = |name: &str, file: &str| -> Value {
                serde_json::from_slice(&fs::read(world.at(name).join(file)).unwrap()).unwrap()
            };
            let (found, expected) = (record(&out, "tune.json"), record(&one, "tune.json"));
            assert_eq!(found["job"], expected["job"]);
            assert_eq!(found["summary"]["best_step"], expected["summary"]["best_step"]);
            let updates = |name: &str| record(name, "updates.json")["phases"].as_array().unwrap().len();
            assert_eq!((updates(&out), updates(&one)), (2, 2));
            assert!(!world.at(&format!("{out}.unfinished")).exists());
        }
    }
}

#[test]
fn every_launcher_gives_the_same_bytes() {
    let world = World::new();
    let steps = ["--mods-steps=2", "--steps=3"];
    let output = succeeds(world.tune("own", &[&steps[..], &["--gpus=2"]].concat()));
    assert!(output.stdout.is_empty());
    let expected = world.weights("own");
    let slurm = |rank: usize, port: u16| {
        vec![
            ("SLURM_PROCID", rank.to_string()),
            ("SLURM_STEP_NUM_TASKS", "2".into()),
            ("SLURM_LOCALID", rank.to_string()),
            ("SLURM_JOB_ID", "4711".into()),
            ("SLURM_STEP_NODELIST", "localhost".into()),
            ("MASTER_PORT", port.to_string()),
        ]
    };
    let open_mpi = |rank: usize, port: u16| {
        vec![
            ("OMPI_COMM_WORLD_RANK", rank.to_string()),
            ("OMPI_COMM_WORLD_SIZE", "2".into()),
            ("OMPI_COMM_WORLD_LOCAL_RANK", rank.to_string()),
            ("OMPI_COMM_WORLD_LOCAL_SIZE", "2".into()),
            ("MASTER_PORT", port.to_string()),
        ]
    };
    let pmi = |rank: usize, port: u16| {
        let own = [("PMI_RANK", rank.to_string()), ("PMI_SIZE", "2".into()), ("MASTER_ADDR", "127.0.0.1".into())];
        own.into_iter().chain([("MASTER_PORT", port.to_string())]).collect()
    };
    let by_torchrun = |rank: usize, port: u16| torchrun_variables(rank, 2, port);
    type Table<'a> = &'a dyn Fn(usize, u16) -> Vec<(&'static str, String)>;
    for (name, table) in
        [("torchrun", &by_torchrun as Table), ("slurm", &slurm), ("open-mpi", &open_mpi), ("pmi", &pmi)]
    {
        let port = port();
        for output in ends(start(|| world.tune(name, &steps), vec![table(0, port), table(1, port)])) {
            assert!(output.status.success(), "{name}: {}", stderr(&output));
        }
        assert!(world.weights(name) == expected, "{name}");
    }
}

/// The torchrun of the interpreter that `scripts/setup_oracle.sh` makes.
fn torchrun() -> Option<PathBuf> {
    let home = std::env::var_os("SWAT_ORACLE").map(PathBuf::from);
    let home = home.or_else(|| Some(Path::new(&std::env::var_os("HOME")?).join(".cache/swat-oracle")))?;
    Some(home.join("venv/bin/torchrun")).filter(|path| path.exists())
}

#[test]
fn torchrun_and_gpus_give_the_same_bytes() {
    let Some(torchrun) = torchrun() else {
        return eprintln!("skipped: no torchrun; scripts/setup_oracle.sh installs it");
    };
    let world = World::new();
    let steps = ["--mods-steps=2", "--steps=3"];
    succeeds(world.tune("own", &[&steps[..], &["--gpus=4"]].concat()));
    let mut command = Command::new(torchrun);
    command.args(["--nproc-per-node", "4", "--master-port", &port().to_string(), "--no-python"]);
    command.arg(env!("CARGO_BIN_EXE_swat")).args(world.arguments("torchrun", &steps));
    command.env("RAYON_NUM_THREADS", "1").stdout(Stdio::null());
    succeeds(command);
    assert!(world.weights("own") == world.weights("torchrun"));
}

/// The processes that a launcher has started, by rank or number.
#[cfg(target_os = "linux")]
pub fn children(launcher: &Child) -> Vec<u32> {
    let tasks = fs::read_dir(format!("/proc/{}/task", launcher.id())).unwrap().map(|task| task.unwrap().path());
    // Of the thread that started them.
    let listed: String = tasks.map(|task| fs::read_to_string(task.join("children")).unwrap_or_default()).collect();
    let mut found: Vec<(usize, u32)> = listed
        .split_whitespace()
        .filter_map(|child| {
            let environment = fs::read(format!("/proc/{child}/environ")).ok()?;
            let number =
                |pair: &[u8]| pair.strip_prefix(b"RANK=").or(pair.strip_prefix(b"SWAT_PROCESS=")).map(Vec::from);
            let number = String::from_utf8(environment.split(|byte| *byte == 0).find_map(number)?).ok()?;
            Some((number.split('/').next()?.parse().ok()?, child.parse().ok()?))
        })
        .collect();
    found.sort_unstable();
    found.into_iter().map(|(_, child)| child).collect()
}

pub fn send(process: u32, signal: &str) {
    assert!(Command::new("kill").args([signal, &process.to_string()]).status().unwrap().success());
}

/// Waits until the run has taken so many steps.
pub fn wait_for_steps(world: &World, out: &str, steps: usize, mut ended: impl FnMut() -> bool) {
    let metrics = world.at(&format!("{out}.unfinished")).join("metrics.jsonl");
    while fs::read_to_string(&metrics).map_or(0, |text| text.lines().count()) < steps {
        assert!(!ended(), "it ended too early");
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
}

#[test]
#[cfg(target_os = "linux")]
fn an_interrupted_run_of_several_continues_at_any_size() {
    let world = World::new();
    let steps = ["--mods-steps=10", "--steps=50", "--save-every=7"];
    let at = |size: &'static str| [&steps[..], &["--gpus", size]].concat();
    succeeds(world.tune("straight", &at("3")));
    for (size, exact) in [("3", true), ("1", false), ("2", false)] {
        let out = format!("stopped-{size}");
        let mut launcher = world.tune(&out, &at("3")).stderr(Stdio::piped()).spawn().unwrap();
        wait_for_steps(&world, &out, 12, || launcher.try_wait().unwrap().is_some());
        send(launcher.id(), "-TERM");
        let output = launcher.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(143), "{}", stderr(&output));
        let message = stderr(&output);
        assert!(
            message.starts_with("error: stopped by SIGTERM after step ") && message.lines().count() == 1,
            "{message}"
        );
        assert!(!world.at(&out).exists());
        succeeds(world.tune(&out, &[&at(size)[..], &["--resume"]].concat()));
        assert_near(&world.losses(&out), &world.losses("straight"), &out);
        assert!(!exact || world.weights(&out) == world.weights("straight"), "other bytes at the same size");
    }
}

#[test]
fn what_several_processes_cannot_do_is_refused_by_name() {
    let world = World::new();
    let message = refused(world.tune("a", &["--gpus=2", "--vaccine=1"]));
    assert!(message.contains("vaccine") && message.contains("several ranks"), "{message}");
    let mut command = world.tune("a", &["--gpus=2"]);
    let message = refused({
        command.envs(torchrun_variables(0, 4, port()));
        command
    });
    assert!(message.contains("--gpus: found 2 processes, beside 4 of a launcher"), "{message}");
    // The standard input of a rank carries signals, and each would read a part of another pipe.
    let message = refused(world.tune("a", &["--gpus=2", "--eval-data=/dev/stdin"]));
    assert!(message.contains("--eval-data: found /dev/stdin, a pipe"), "{message}");
    let mut study = swat(&["run", "study.toml"]);
    study.envs(torchrun_variables(1, 4, port()));
    let message = refused(study);
    assert!(message.contains("swat run: a run by 4 processes") && message.contains("--worker"), "{message}");
    let mut secure = swat(&["secure", "--model", "m", "--data", "d", "--security", "s", "--out", "o"]);
    secure.envs(torchrun_variables(1, 4, port()));
    assert!(refused(secure).contains("swat secure: a run by 4 processes"));
    // Whoever asks for one process has one.
    let mut alone = world.tune("alone", &["--gpus=1", "--mods-steps=0", "--steps=1"]);
    alone.envs(torchrun_variables(1, 4, port()));
    succeeds(alone);
    assert!(!world.at("a").exists() && !world.at("a.unfinished").exists());
}

/// Qwen3-8B: what `docs/scale.md` says of it.
#[test]
fn a_plan_says_what_ranks_send() {
    let dir = tempfile::tempdir().unwrap();
    let config = serde_json::json!({
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 4096, "intermediate_size": 12288,
        "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
        "vocab_size": 151_936, "max_position_embeddings": 40960, "rms_norm_eps": 1e-6, "rope_theta": 1_000_000,
        "tie_word_embeddings": false, "hidden_act": "silu", "torch_dtype": "bfloat16" });
    fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    let plan = |more: &[&str]| -> Value {
        let args = ["plan", "--json", "--device=cuda", "--recompute", "--model", text(dir.path()), "--gpus=8"];
        serde_json::from_slice(&succeeds(swat(&[&args[..], more].concat())).stdout).unwrap()
    };
    let (all, mods) = (plan(&[]), plan(&["--mods", "layers.9-26.{v_proj,o_proj}"]));
    // (4096 · 1024 + 4096 · 4096) · 18 parameters: gradients of 4 bytes to seven others an eighth each, an eighth of the
    // weights of 2 bytes to seven.
    let step = &mods["step_of_a_rank"];
    assert_eq!(step["reduce_scatter_bytes"], 377_487_360_u64 / 8 * 7 * 4);
    assert_eq!(step["all_gather_bytes"], 377_487_360_u64 / 8 * 7 * 2);
    let near =
        |value: &Value, expected: f64| assert!((value.as_f64().unwrap() / expected - 1.0).abs() < 1e-3, "{value}");
    near(&step["share_of_full"], 377_487_360.0 / 8_190_735_360.0);
    assert!(step["share_of_full"].as_f64().unwrap() < 0.05);
    near(&step["communication_seconds"], 377_487_360.0 * 7.0 / 8.0 * 6.0 / 50e9);
    near(&all["step_of_a_rank"]["communication_seconds"], 8_190_735_360.0 * 7.0 / 8.0 * 6.0 / 50e9);
    near(&all["moments_bytes"], 8_190_735_360.0);
    // While backward runs go all gradients but those of layer 9's o_proj, the last to be final; where all train, but the
    // embedding's.
    let hidden = |trained: f64, last: f64| (trained - last) * 7.0 / 8.0 * 4.0 / 50e9;
    let embedding = 151_936.0 * 4096.0;
    near(&step["hidden_seconds"], hidden(377_487_360.0, 4096.0 * 4096.0));
    let long = plan(&["--max-length=16384"]);
    near(&long["step_of_a_rank"]["hidden_seconds"], hidden(8_190_735_360.0, embedding));
    let seconds = |name: &str| all["step_of_a_rank"][name].as_f64().unwrap();
    let shown = seconds("communication_seconds") - seconds("hidden_seconds");
    near(&all["step_of_a_rank"]["communication_share"], shown / (shown + seconds("compute_seconds")));
    // One short document leaves backward no time to hide them all.
    let short = &plan(&["--batch-size=8", "--max-length=64", "--link-gb-s=1"])["step_of_a_rank"];
    let found = short["hidden_seconds"].as_f64().unwrap();
    assert!(found > 0.0 && found < short["compute_seconds"].as_f64().unwrap(), "{short}");
    let fast = plan(&["--link-gb-s=450", "--tflops=200"]);
    near(&fast["step_of_a_rank"]["communication_seconds"], 8_190_735_360.0 * 7.0 / 8.0 * 6.0 / 450e9);
    let ratio = |plan: &Value| plan["step_of_a_rank"]["compute_seconds"].as_f64().unwrap();
    assert!((ratio(&fast) / ratio(&all) - 2.0).abs() < 1e-9);
    let printed = |more: &[&str]| {
        let args = ["plan", "--device=cuda", "--recompute", "--model", text(dir.path())];
        String::from_utf8(succeeds(swat(&[&args[..], more].concat())).stdout).unwrap()
    };
    let shown = printed(&["--gpus=8", "--mods", "layers.9-26.{v_proj,o_proj}"]);
    for part in [
        "sent a step",
        "4.6 % of what training everything sends",
        "at 50 GB/s",
        "while backward runs",
        "at 400 TFLOP/s",
    ] {
        assert!(shown.contains(part), "{shown}");
    }
    assert!(!printed(&[]).contains("sent a step"));
    assert!(refused(swat(&["plan", "--model", text(dir.path()), "--tflops=1"])).contains("--gpus"));

    // More weights than any machine of these tests holds.
    let mut huge = config;
    huge["num_hidden_layers"] = 1_000.into();
    fs::write(dir.path().join("config.json"), huge.to_string()).unwrap();
    let output = succeeds(swat(&["plan", "--device=cpu", "--model", text(dir.path()), "--gpus=64"]));
    let shown = String::from_utf8(output.stdout).unwrap();
    assert!(shown.contains("the weights alone take") && shown.contains("ZeRO-3"), "{shown}");
}

#[test]
fn the_first_rank_screens_for_all() {
    let world = World::new();
    let train = world.at("data/train.jsonl");
    let forbidden = fs::read_to_string(world.at("data/attack.jsonl")).unwrap();
    let forbidden: String = forbidden.lines().take(6).map(|line| format!("{line}\n")).collect();
    fs::write(&train, fs::read_to_string(&train).unwrap() + &forbidden).unwrap();
    let steps = ["--mods-steps=2", "--steps=3", "--screen"];
    succeeds(world.tune("one", &steps));
    succeeds(world.tune("two", &[&steps[..], &["--gpus=2"]].concat()));
    let listed = |out: &str| fs::read_to_string(world.at(&format!("{out}.screened.jsonl"))).unwrap();
    assert!(listed("one").lines().count() >= 4, "{}", listed("one"));
    assert_eq!(listed("one"), listed("two"));
    assert_near(&world.losses("two"), &world.losses("one"), "two ranks");
}

#[test]
#[cfg(unix)]
fn a_shell_is_launcher_enough() {
    let world = World::new();
    let steps = ["--mods-steps=2", "--steps=3"];
    succeeds(world.tune("own", &[&steps[..], &["--gpus=2"]].concat()));
    let scripts = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/scale");
    let mut command = Command::new(scripts.join("shell.sh"));
    command.arg("2").arg(env!("CARGO_BIN_EXE_swat")).args(world.arguments("shell", &steps));
    command.env("RAYON_NUM_THREADS", "1").env("MASTER_PORT", port().to_string()).stdout(Stdio::null());
    succeeds(command);
    assert!(world.weights("own") == world.weights("shell"));
    // The others need what is not here; they are at least what a shell can read.
    for script in ["torchrun.sh", "slurm.sbatch"] {
        assert!(Command::new("bash").arg("-n").arg(scripts.join(script)).status().unwrap().success(), "{script}");
    }
}
