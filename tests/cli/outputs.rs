//! What a run may write, and what it checks before it reads any weights.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn swat(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_swat")).args(args).output().expect("the binary runs")
}

fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

/// The message of a command that must be refused.
fn refused(args: &[&str]) -> String {
    let output = swat(args);
    let message = String::from_utf8(output.stderr).expect("UTF-8");
    assert_eq!(output.status.code(), Some(2), "{args:?}: {message}");
    message
}

const ROW: &str = "{\"prompt\": \"what is 2 plus 3 ?\", \"completion\": \"the answer is 5 .\"}\n";

/// A copy of the tiny model whose weights hold a NaN: whoever reads them fails.
fn unreadable(to: &Path) -> PathBuf {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/tiny")).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, to.join(path.file_name().unwrap())).unwrap();
    }
    let weights = to.join("model.safetensors");
    let mut bytes = std::fs::read(&weights).unwrap();
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    bytes[8 + header..][..2].copy_from_slice(&half::bf16::NAN.to_le_bytes());
    std::fs::write(&weights, bytes).unwrap();
    to.to_owned()
}

/// Names and sizes of everything below a directory.
fn everything(dir: &Path) -> Vec<(PathBuf, u64)> {
    let mut found = Vec::new();
    let mut left = vec![dir.to_owned()];
    while let Some(at) = left.pop() {
        for entry in std::fs::read_dir(at).unwrap() {
            let path = entry.unwrap().path();
            match path.is_dir() {
                true => left.push(path),
                false => found.push((path.clone(), std::fs::metadata(&path).unwrap().len())),
            }
        }
    }
    found.sort();
    found
}

#[test]
fn force_removes_no_input_and_nothing_of_others() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    unreadable(&at("outer/m"));
    std::fs::write(at("train.jsonl"), ROW).unwrap();
    std::fs::create_dir(at("mine")).unwrap();
    std::fs::write(at("mine/notes.txt"), "mine").unwrap();
    std::fs::create_dir(at("new.unfinished")).unwrap();
    std::fs::write(at("new.unfinished/thesis.tex"), "mine").unwrap();
    // In the place of checkpoints, and in one.
    std::fs::create_dir_all(at("later.unfinished/checkpoints/step-00000004")).unwrap();
    std::fs::write(at("later.unfinished/checkpoints/step-00000004/results.csv"), "mine").unwrap();
    std::fs::create_dir_all(at("last.unfinished/best")).unwrap();
    std::fs::write(at("last.unfinished/best/readme"), "mine").unwrap();
    std::fs::write(at("thesis.json"), "{}").unwrap();
    std::fs::write(at("drawn.svg"), "<svg>mine</svg>").unwrap();
    std::fs::create_dir_all(at("demo/model")).unwrap();
    std::fs::write(at("demo/model/config.json"), "mine").unwrap();
    let before = everything(dir.path());
    let (model, train) = (at("outer/m"), at("train.jsonl"));
    let tune = ["tune", "--model", text(&model), "--data", text(&train), "--steps", "1", "--force", "--out"];
    for (out, named) in [
        ("outer", "holds --model"),
        ("outer/m", "is --model"),
        ("outer/m/tuned", "lies in --model"),
        ("mine/../outer", "holds --model"),
        ("mine", "notes.txt"),
        ("new", "thesis.tex"),
        ("later", "results.csv"),
        ("last", "readme"),
        ("train.jsonl", "train.jsonl"),
    ] {
        let message = refused(&[&tune[..], &[text(&at(out))]].concat());
        assert!(message.contains(named), "{out}: {message}");
    }
    let security = ["--model", text(&model), "--security", text(&train), "--force", "--out"];
    for (command, out) in [("probe", "thesis.json"), ("probe", "train.jsonl"), ("probe", "mine")] {
        refused(&[&[command], &security[..], &[text(&at(out))]].concat());
    }
    let probe = ["--probe", text(&train)];
    for out in ["thesis.json", "drawn.json"] {
        let message = refused(&[&["robustness"], &probe[..], &security[..], &[text(&at(out))]].concat());
        assert!(message.contains("did not write"), "{message}");
    }
    let score = ["score", "--model", text(&model), "--ids", "1,2", "--logits-out"];
    refused(&[&score[..], &[text(&at("thesis.json"))]].concat());
    refused(&["profile", "--model", text(&model), "--trace", text(&at("thesis.json"))]);
    refused(&["demo", "--out", text(&at("demo"))]);
    assert_eq!(everything(dir.path()), before);
}

#[test]
fn what_can_be_known_is_checked_before_the_weights_are_read() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let model = unreadable(&at("m"));
    let (train, out) = (at("train.jsonl"), at("out"));
    let long = format!("{{\"prompt\": \"{}\", \"completion\": \"the answer is 5 .\"}}\n", "2 plus ".repeat(600));
    std::fs::write(&train, ROW.repeat(239) + &long + ROW).unwrap();
    let tune = |more: &[&str]| {
        let args = ["tune", "--model", text(&model), "--data", text(&train), "--out", text(&out), "--steps", "1"];
        refused(&[&args[..], more].concat())
    };
    let message = tune(&["--max-length", "4096"]);
    assert!(message.contains("train.jsonl:240: found 12") && message.contains("at most 256"), "{message}");
    std::fs::write(&train, ROW.repeat(4)).unwrap();
    assert!(tune(&[]).contains("NaN"), "all the checks pass, and the weights are read");
    for (more, named) in [
        (&["--lr", "-1"][..], "--lr"),
        (&["--lr", "nan"], "--lr"),
        (&["--lr", "0"], "--lr"),
        (&["--weight-decay", "-0.1"], "--weight-decay"),
        (&["--batch-size", "0"], "--batch-size"),
        (&["--ema-decay", "1.5"], "--ema-decay"),
        (&["--constrain", "-1"], "--constrain"),
        (&["--distil", "1"], "--mix"),
        (&["--mods", "layers.99.q_proj"], "99"),
    ] {
        let message = tune(more);
        assert!(message.contains(named) && !message.contains("NaN"), "{more:?}: {message}");
    }
    let nowhere = PathBuf::from("/proc/swat/out");
    let args = ["tune", "--model", text(&model), "--data", text(&train), "--out", text(&nowhere), "--steps", "1"];
    let message = String::from_utf8(swat(&args).stderr).unwrap();
    assert!(message.contains("/proc/swat") && !message.contains("NaN"), "{message}");
    // Prompts for an evaluation, by file and line.
    let security = at("security.jsonl");
    let prompt = |text: &str| format!("{{\"prompt\": \"{text}\", \"label\": \"harmful\"}}\n");
    std::fs::write(&security, prompt("2 plus 3").repeat(20) + "\n" + &prompt(&"2 plus ".repeat(600))).unwrap();
    for command in ["eval", "generate"] {
        let (option, more) = if command == "eval" { ("--security", "--json") } else { ("--chat", "--json") };
        let message = refused(&[command, "--model", text(&model), option, text(&security), more]);
        assert!(message.contains("security.jsonl:22") && message.contains("255"), "{message}");
    }
    assert!(!out.exists());
}

/// A volume of a container, which cannot be renamed: written twice, and what somebody else keeps in it stays.
const ON_A_MOUNT_POINT: &str = r#"
out=$1
shift
mount -t tmpfs none "$out" || exit 90
"$@" || exit 91
test -f "$out/model.safetensors" && test -f "$out/.swat.json" || exit 92
"$@" && exit 93
"$@" --force || exit 94
echo mine > "$out/notes.txt"
"$@" --force && exit 95
ls -A "$out"
"#;

#[test]
#[cfg(target_os = "linux")]
fn a_mount_point_is_written_in_place() {
    let unshare = ["--user", "--map-root-user", "--mount"];
    let trial = Command::new("unshare").args(unshare).arg("true").output();
    if !trial.is_ok_and(|trial| trial.status.success()) {
        println!("skipped: no name space of mounts on this machine");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (train, out) = (dir.path().join("train.jsonl"), dir.path().join("volume"));
    std::fs::write(&train, ROW).unwrap();
    std::fs::create_dir(&out).unwrap();
    let mut command = Command::new("unshare");
    command.args(unshare).args(["sh", "-c", ON_A_MOUNT_POINT, "sh", text(&out), env!("CARGO_BIN_EXE_swat")]);
    command.args(["tune", "--model", concat!(env!("CARGO_MANIFEST_DIR"), "/assets/tiny"), "--data", text(&train)]);
    let output = command.args(["--steps", "1", "--device", "cpu", "--json", "--out", text(&out)]).output().unwrap();
    let message = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(0), "{message}");
    assert!(message.contains("`notes.txt`, which swat did not write"), "{message}");
    let printed = String::from_utf8(output.stdout).unwrap();
    let names: Vec<&str> = printed.lines().filter(|line| !line.starts_with('{')).collect();
    assert!(names.contains(&"notes.txt") && names.contains(&"config.json"), "{names:?}");
    let hidden: Vec<&&str> = names.iter().filter(|name| name.starts_with('.')).collect();
    assert_eq!(hidden, [&".swat.json"], "no lock, no part and no unfinished run is left");
}

/// Starts a command under a limit on its address space, in KiB.
#[test]
#[cfg(target_os = "linux")]
fn a_plan_that_does_not_fit_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let model = unreadable(&dir.path().join("m"));
    let train = dir.path().join("train.jsonl");
    let row = ROW.replace("5 .", &"5 . ".repeat(50));
    std::fs::write(&train, row.repeat(4096)).unwrap();
    // Screening, which reads the weights, comes later.
    for screen in ["", "--screen"] {
        let args = format!(
            "ulimit -v 2000000; exec {} tune --model {} --data {} --out {} --steps 1 --batch-size 4096 --max-length 256 --device \
             cpu {screen}",
            env!("CARGO_BIN_EXE_swat"),
            model.display(),
            train.display(),
            dir.path().join("out").display()
        );
        let output = Command::new("bash").args(["-c", &args]).output().unwrap();
        let message = String::from_utf8(output.stderr).unwrap();
        assert!(message.contains("ulimit -v is the bound") && message.contains("--batch-size"), "{screen}: {message}");
        assert_eq!(output.status.code(), Some(1));
    }
}

/// What a run does beside its work takes no memory that it has not: the roofline's takes more than this model.
#[test]
#[cfg(target_os = "linux")]
fn a_run_fits_where_its_roofline_does_not() {
    let dir = tempfile::tempdir().unwrap();
    let (train, out) = (dir.path().join("train.jsonl"), dir.path().join("out"));
    std::fs::write(&train, ROW).unwrap();
    let args = format!(
        "ulimit -v 320000; exec {} tune --model {}/assets/tiny --data {} --out {} --steps 1 --device cpu",
        env!("CARGO_BIN_EXE_swat"),
        env!("CARGO_MANIFEST_DIR"),
        train.display(),
        out.display()
    );
    let output = Command::new("bash").args(["-c", &args]).env("RAYON_NUM_THREADS", "2").output().unwrap();
    let message = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success() && out.join("model.safetensors").is_file(), "{message}");
}
