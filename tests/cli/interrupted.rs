//! Signals and streams: they cost no work.
#![cfg(unix)]

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

fn data(dir: &Path) -> PathBuf {
    use swat::data::tiny::{Counts, Language, export};
    export(&Language::new(1), dir, Counts { pairs: 16, train: 24, tasks: 4 }, 1).unwrap();
    dir.join("train.jsonl")
}

fn tune(train: &Path, out: &Path, more: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_swat"));
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/tiny");
    command.arg("tune").arg("--model").arg(model).arg("--data").arg(train).arg("--out").arg(out).args(more);
    command.args(["--device", "cpu", "--batch-size", "4", "--max-length", "96", "--lr", "1e-3", "--steps", "60"]);
    command.stdout(Stdio::null()).stderr(Stdio::null());
    command
}

/// Waits until the run has taken some steps.
fn running(child: &mut Child, out: &Path) {
    let metrics = out.with_file_name("stopped.unfinished").join("metrics.jsonl");
    while std::fs::read_to_string(&metrics).map_or(0, |t| t.lines().count()) < 8 {
        assert!(child.try_wait().unwrap().is_none(), "it ended before it could be stopped");
        std::thread::sleep(Duration::from_millis(3));
    }
}

fn send(child: &Child, signal: &str) {
    assert!(Command::new("kill").args([signal, &child.id().to_string()]).status().unwrap().success());
}

#[test]
fn a_stopped_run_is_saved_and_resumes_to_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let train = data(dir.path());
    let straight = dir.path().join("straight");
    assert!(tune(&train, &straight, &[]).status().unwrap().success());
    let bytes = |out: &Path| std::fs::read(out.join("model.safetensors")).unwrap();
    let out = dir.path().join("stopped");
    for (signal, code, name) in
        [("-TERM", 143, "SIGTERM"), ("-INT", 130, "SIGINT"), ("-HUP", 129, "SIGHUP"), ("-USR1", 138, "SIGUSR1")]
    {
        let mut child = tune(&train, &out, &["--save-every", "0", "--force"]).stderr(Stdio::piped()).spawn().unwrap();
        running(&mut child, &out);
        send(&child, signal);
        let ended = child.wait_with_output().unwrap();
        let message = String::from_utf8(ended.stderr).unwrap();
        assert_eq!(ended.status.code(), Some(code), "{message}");
        assert!(message.contains(name) && message.contains("--resume"), "{message}");
        let checkpoints = dir.path().join("stopped.unfinished/checkpoints");
        let saved: Vec<String> = std::fs::read_dir(checkpoints)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        // No checkpoint is due before the end.
        assert!(saved.len() == 1 && saved[0].as_str() >= "step-00000008", "{saved:?}");
        assert!(tune(&train, &out, &["--save-every", "0", "--force", "--resume"]).status().unwrap().success());
        assert!(bytes(&straight) == bytes(&out), "{signal}");
    }
}

/// `ulimit -f`, as clusters set it: an error that names the file, and no signal's death.
#[test]
#[cfg(target_os = "linux")]
fn a_limit_of_file_sizes_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let (train, out) = (data(dir.path()), dir.path().join("limited"));
    let command = tune(&train, &out, &["--save-every", "0"]);
    let mut shell = Command::new("bash");
    shell.args(["-c", "ulimit -f 100; exec \"$0\" \"$@\""]).arg(command.get_program()).args(command.get_args());
    let ended = shell.output().unwrap();
    let message = String::from_utf8(ended.stderr).unwrap();
    assert_eq!(ended.status.code(), Some(1), "{message}");
    assert!(message.contains("File too large"), "{message}");
    assert!(!out.exists());
}

#[test]
fn a_signal_that_is_ignored_stays_ignored() {
    let dir = tempfile::tempdir().unwrap();
    let (train, out) = (data(dir.path()), dir.path().join("stopped"));
    let command = tune(&train, &out, &[]);
    let mut shell = Command::new("bash");
    shell.args(["-c", "trap '' HUP; exec \"$0\" \"$@\""]).arg(command.get_program()).args(command.get_args());
    let mut child = shell.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    running(&mut child, &out);
    send(&child, "-HUP");
    assert!(child.wait().unwrap().success());
}

#[test]
#[cfg(target_os = "linux")]
fn streams_that_cannot_be_written_end_no_run() {
    let dir = tempfile::tempdir().unwrap();
    let train = data(dir.path());
    let full = || Stdio::from(std::fs::File::options().write(true).open("/dev/full").unwrap());
    let done = |name: &str| dir.path().join(name).join("model.safetensors").is_file();
    assert!(tune(&train, &dir.path().join("a"), &[]).stderr(full()).status().unwrap().success() && done("a"));
    let closed = |name: &str, redirection: &str| {
        let command = tune(&train, &dir.path().join(name), &[]);
        let mut shell = Command::new("bash");
        shell.args(["-c", &format!("exec \"$0\" \"$@\" {redirection}")]);
        shell.arg(command.get_program()).args(command.get_args());
        shell.status().unwrap().code()
    };
    assert_eq!((closed("b", "2>&-"), done("b")), (Some(0), true));
    assert_eq!((closed("c", ">&- 2>&-"), done("c")), (Some(0), true));
    // The summary is lost, which the exit code says; the model is not.
    assert_eq!((closed("d", ">/dev/full"), done("d")), (Some(1), true));
    assert_eq!((closed("e", "2> >(exec true)"), done("e")), (Some(0), true));
    assert_eq!((closed("f", "> >(exec true)"), done("f")), (Some(0), true));
    // Errors as well.
    let code = |args: &str| {
        let command = format!("\"$0\" {args}");
        Command::new("bash").args(["-c", &command, env!("CARGO_BIN_EXE_swat")]).status().unwrap().code()
    };
    assert_eq!(code("score --model nowhere --ids 1 2>/dev/full"), Some(2));
    assert_eq!(code("tune --no-such-option 2>/dev/full"), Some(2));
}
