//! Work that is split among processes and machines.

mod checkpoints;
mod gpus;
mod lost_ranks;
#[cfg(target_os = "linux")]
mod machines;
mod pods;
mod ranks;
mod shards;
mod workers;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use swat::data::tiny::{Counts, Language, export};

/// The model that the demo embeds.
fn tiny() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/tiny")
}

/// Data of the tiny model's language in `dir/data`.
fn data(dir: &Path, counts: Counts) -> PathBuf {
    let data = dir.join("data");
    std::fs::create_dir(&data).unwrap();
    export(&Language::new(1), &data, counts, 1).unwrap();
    data
}

fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

/// The binary, with no variable of a scheduler or launcher that the tests themselves may run under.
fn swat(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_swat"));
    command.args(args);
    for (name, _) in std::env::vars() {
        let of_scheduler = ["SLURM_", "SGE_", "LSB_", "PBS_", "JOB_COMPLETION_", "OMPI_", "PMI_", "MASTER_", "LOCAL_"];
        let of_launcher = ["RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID"].contains(&name.as_str());
        if of_launcher || of_scheduler.iter().any(|prefix| name.starts_with(prefix)) {
            command.env_remove(name);
        }
    }
    command
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).expect("UTF-8")
}

/// The message of a command that must be refused.
fn refused(mut command: Command) -> String {
    let output = command.output().expect("the binary runs");
    let message = stderr(&output);
    assert_eq!(output.status.code(), Some(2), "{command:?}: {message}");
    assert!(!message.contains("panicked"), "{message}");
    message
}

fn succeeds(mut command: Command) -> Output {
    let output = command.output().expect("the binary runs");
    assert!(output.status.success(), "{command:?}: {}", stderr(&output));
    output
}
