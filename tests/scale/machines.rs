//! Ranks on machines of their own: network namespaces with an address each. Skipped where they cannot be created, such as in
//! a container without user namespaces.

use super::ranks::World;
use super::{succeeds, text};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/scale/machines.sh");

fn in_namespaces(command: &[&str]) -> Command {
    let mut unshare = Command::new("unshare");
    unshare.args(["--user", "--map-root-user", "--net", "--mount"]).args(command);
    unshare
}

/// Whether networks can be made here.
fn possible() -> bool {
    let bridge = "mount -t tmpfs none /run && ip link add switch type bridge && ip netns add machine";
    let tried = in_namespaces(&["bash", "-c", bridge]).stderr(Stdio::null()).status();
    let possible = tried.is_ok_and(|status| status.success());
    if !possible {
        eprintln!("skipped: no network namespaces here (unshare, ip)");
    }
    possible
}

/// Exit codes and messages of three ranks on machines of their own, the second of which is cut off once `cut` has lines.
fn on_three_machines(world: &World, out: &str, cut: Option<&Path>, more: &[&str]) -> [(i32, String); 3] {
    let dir: PathBuf = world.at(&format!("{out}.machines"));
    fs::create_dir(&dir).unwrap();
    let arguments = world.arguments(out, more);
    let mut command = in_namespaces(&["bash", SCRIPT, text(&dir), cut.map_or("", text), env!("CARGO_BIN_EXE_swat")]);
    succeeds({
        command.args(arguments).stdout(Stdio::null());
        command
    });
    [0, 1, 2].map(|rank| {
        let read = |kind: &str| fs::read_to_string(dir.join(format!("{rank}.{kind}"))).unwrap();
        (read("status").trim().parse().unwrap(), read("err"))
    })
}

#[test]
fn three_machines_train_as_three_processes() {
    if !possible() {
        return;
    }
    let world = World::new();
    let steps = ["--mods-steps=3", "--steps=4", "--save-every=3"];
    let ranks = on_three_machines(&world, "machines", None, &steps);
    assert!(ranks.iter().all(|(status, _)| *status == 0), "{ranks:?}");
    succeeds(world.tune("processes", &[&steps[..], &["--gpus=3"]].concat()));
    assert!(world.weights("machines") == world.weights("processes"));
}

/// Nothing answers any more, and nothing says so: the others end by the missing signs of life.
#[test]
fn a_machine_without_network_ends_the_run_by_name() {
    if !possible() {
        return;
    }
    let world = World::new();
    let metrics = world.at("cut.unfinished/metrics.jsonl");
    let begun = Instant::now();
    let ranks =
        on_three_machines(&world, "cut", Some(&metrics), &["--mods-steps=3", "--steps=100000", "--save-every=3"]);
    assert!(begun.elapsed() < Duration::from_secs(45), "{:?}", begun.elapsed());
    for (rank, (status, message)) in ranks.iter().enumerate() {
        assert_eq!(*status, 1, "rank {rank}: {message}");
        assert!(rank == 1 || message.contains("rank 1 "), "rank {rank}: {message}");
    }
    let saved = fs::read_dir(world.at("cut.unfinished/checkpoints")).unwrap();
    let saved: Vec<String> = saved.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    assert!(!saved.is_empty() && saved.iter().all(|name| name.starts_with("step-")), "{saved:?}");
}
