//! Checkpoints that several processes write together: one that cannot write, and one that does not
//! see the directory.

use super::ranks::{World, ends, port, start, torchrun_variables};
use super::{stderr, succeeds, swat, text};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

/// Checkpoints after steps 2 and 4, the end of the first phase, and 6.
const STEPS: [&str; 3] = ["--mods-steps=4", "--steps=6", "--save-every=2"];

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// Files of rank 1 may have a million bytes: its moments of the first phase are 0.2 MB, those of the second 1.8 MB.
#[test]
#[cfg(target_os = "linux")]
fn a_rank_that_cannot_write_leaves_the_checkpoint_before() {
    let world = World::new();
    succeeds(world.tune("straight", &[&STEPS[..], &["--gpus=3"]].concat()));
    let (out, at) = ("full", port());
    let named = "moments-1-of-3.safetensors: cannot write: File too large";
    let limited = || {
        let mut command = Command::new("sh");
        let script = "ulimit -c 0; trap '' XFSZ; ulimit -f 2000; exec \"$0\" \"$@\"";
        command.arg("-c").arg(script).arg(env!("CARGO_BIN_EXE_swat")).args(world.arguments(out, &STEPS));
        command.env("RAYON_NUM_THREADS", "1").stdout(Stdio::null());
        command
    };
    let free = |rank: usize| start(|| world.tune(out, &STEPS), vec![torchrun_variables(rank, 3, at)]).remove(0);
    let second: Child = start(limited, vec![torchrun_variables(1, 3, at)]).remove(0);
    let outputs = ends(vec![free(0), second, free(2)]);
    let messages: Vec<String> = outputs.iter().map(stderr).collect();
    for (rank, message) in messages.iter().enumerate() {
        assert_eq!(outputs[rank].status.code(), Some(1), "{messages:?}");
        assert!(message.contains(named) && (rank == 1 || message.contains("rank 1 could not")), "{messages:?}");
    }

    let checkpoints = world.at(&format!("{out}.unfinished/checkpoints"));
    assert_eq!(names(&checkpoints), ["step-00000002", "step-00000004"]);
    let parts = ["moments-0-of-3", "moments-1-of-3", "moments-2-of-3"].map(|part| format!("{part}.safetensors"));
    let expected =
        [&["manifest.json".to_owned()][..], &parts, &["state.json", "weights.safetensors"].map(String::from)];
    assert_eq!(names(&checkpoints.join("step-00000002")), expected.concat());
    assert!(!world.at(out).exists());

    succeeds(world.tune(out, &[&STEPS[..], &["--resume", "--gpus=3"]].concat()));
    assert!(world.weights(out) == world.weights("straight"), "other bytes than without an interruption");
    let written = names(&world.at(out));
    assert!(!written.iter().any(|name| name.starts_with("moments")), "no part is in a model: {written:?}");
    assert!(!world.at(&format!("{out}.unfinished")).exists());
}

/// Two ranks whose relative `--out` leads to the same directory, or to one of each.
#[test]
fn a_rank_that_does_not_see_the_directory_sends_its_moments() {
    let world = World::new();
    let folders: [PathBuf; 2] = ["a", "b"].map(|name| world.at(name));
    folders.iter().for_each(|folder| fs::create_dir(folder).unwrap());
    let run = |folders: [&Path; 2], out: &str| -> String {
        let at = port();
        let ranks = folders.iter().enumerate().map(|(rank, folder)| {
            let (given, mut arguments) = (world.at(out), world.arguments(out, &STEPS));
            arguments.retain(|argument| argument != "--quiet");
            arguments.iter_mut().filter(|argument| **argument == text(&given)).for_each(|path| *path = out.into());
            let command = || {
                let mut command = swat(&arguments.iter().map(String::as_str).collect::<Vec<_>>());
                command.current_dir(folder).env("RAYON_NUM_THREADS", "1").stdout(Stdio::null());
                command
            };
            start(command, vec![torchrun_variables(rank, 2, at)]).remove(0)
        });
        let outputs = ends(ranks.collect());
        let said: Vec<String> = outputs.iter().map(stderr).collect();
        assert!(outputs.iter().all(|output| output.status.success()), "{said:?}");
        assert!(!said[1].contains("checkpoints:"), "{}", said[1]);
        said[0].lines().find(|line| line.starts_with("checkpoints:")).expect("a line").to_owned()
    };
    let [a, b] = [&*folders[0], &*folders[1]];
    assert_eq!(run([a, a], "together"), "checkpoints: each rank writes its own moments");
    let line = run([a, b], "apart");
    assert!(line.starts_with("checkpoints: rank 0 writes the moments of all ranks, as not all share its"), "{line}");
    assert!(line.contains("(rank 1: apart.unfinished/checkpoints: cannot read: No such file"), "{line}");
    assert_eq!(names(b), Vec::<String>::new(), "a rank that sees nothing writes nothing");
    let weights = |out: &str| fs::read(a.join(out).join("model.safetensors")).unwrap();
    assert!(weights("together") == weights("apart"));
}
