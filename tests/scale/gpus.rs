//! Maps and studies by several processes of one machine, which `--gpus` starts.

use super::shards::{World, lines, timeless};
use super::workers::{options, outcome, study, weights};
use super::{data, refused, stderr, succeeds, swat};
use std::fs;
use swat::data::tiny::Counts;

#[test]
fn a_map_by_several_processes_is_that_of_one() {
    let world = World::new();
    let whole = succeeds(world.map("whole.json", &[]));
    let divided = succeeds(world.map("map.json", &["--gpus=3"]));
    assert_eq!(stderr(&divided), "", "nothing is said with --quiet");
    assert_eq!(timeless(&world.at("map.json")), timeless(&world.at("whole.json")));
    let drawing = |name: &str| fs::read_to_string(world.at(name)).unwrap();
    assert_eq!(drawing("map.svg"), drawing("whole.svg"));
    let printed = |stdout: Vec<u8>| String::from_utf8(stdout).unwrap().replace("whole.json", "map.json");
    assert_eq!(printed(divided.stdout), printed(whole.stdout), "the table of the map, once");
    let left = fs::read_dir(world.at("map.json").parent().unwrap()).unwrap();
    let left: Vec<String> = left.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    assert!(!left.iter().any(|name| name.contains("shard") || name.contains("partial")), "{left:?}");

    let json = succeeds(world.map("json.json", &["--gpus=2", "--json", "--cells=layers.0", "--epsilon=1"]));
    let map: serde_json::Value = serde_json::from_slice(&json.stdout).expect("one object");
    assert_eq!(map["cells"].as_array().unwrap().len(), 8);
    assert!(refused(world.map("map.json", &["--gpus=2"])).contains("--force"), "a map is not replaced");
}

#[test]
fn what_several_processes_cannot_do_is_refused_once() {
    let world = World::new();
    for (args, words) in [
        (&["--gpus=2", "--shard=0/2"][..], "--gpus: found an option that has no effect with --shard"),
        (&["--gpus=2", "--data=d"], "training data, which --by noise does not use"),
        (&["--gpus=0"], "--gpus"),
    ] {
        let message = refused(world.map("map.json", args));
        assert!(message.contains(words), "{message}");
    }
    for (data, words) in [
        ("--data=d", "--gpus: found 2 processes for a conflict map"),
        ("--data=/dev/stdin", "--data: found /dev/stdin, a pipe"),
    ] {
        let inputs = ["--model=m", "--probe=p", "--security=s", "--by=conflict", "--device=cpu", "--gpus=2", data];
        let message = refused(swat(&[&["robustness"][..], &inputs].concat()));
        assert!(message.contains(words), "{message}");
    }
    let message = refused(swat(&["run", "missing.toml", "--gpus=2", "--device=cpu"]));
    assert!(message.matches("error:").count() == 1 && message.contains("missing.toml"), "{message}");
    let message = refused(swat(&["run", "/dev/stdin", "--gpus=2", "--device=cpu"]));
    assert!(message.contains("CONFIG: found /dev/stdin, a pipe"), "{message}");
    assert!(!world.at("map.json").exists());
}

#[test]
fn a_study_by_several_processes_is_that_of_one() {
    let dir = tempfile::tempdir().unwrap();
    data(dir.path(), Counts { pairs: 16, train: 24, tasks: 8 });
    let (settings, seeds) = ("['given', 'plain', 'swat']", "[0, 1]");
    succeeds(swat(&options(&study(dir.path(), "alone", settings, seeds))));
    let divided = study(dir.path(), "divided", settings, seeds);
    let output = succeeds(swat(&[&options(&divided)[..], &["--gpus=2"]].concat()));
    serde_json::from_slice::<serde_json::Value>(&output.stdout).expect("one object");
    assert_eq!(stderr(&output), "");
    assert!(outcome(dir.path(), "alone") == outcome(dir.path(), "divided"), "the outcomes differ");
    assert!(weights(dir.path(), "alone") == weights(dir.path(), "divided"), "the weights differ");
    assert!(dir.path().join("divided/report.html").is_file());
}

#[cfg(target_os = "linux")]
mod killed {
    use super::super::ranks::{children, send};
    use super::*;
    use std::process::Stdio;
    use std::time::{Duration, Instant};

    #[test]
    fn a_process_that_dies_ends_the_others_and_its_work_is_continued() {
        let world = World::new();
        // Slow enough to be killed between two groups of cells.
        succeeds(world.map_of("8", "whole.json", &["--epsilon=1"]));
        let divided = || world.map_of("8", "map.json", &["--epsilon=1", "--gpus=2"]);
        let parts = [0, 1].map(|index| world.at(&format!("map.shard-{index}-of-2.jsonl")));
        let mut launcher = divided().stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        while lines(&parts[0]) < 17 {
            assert!(launcher.try_wait().unwrap().is_none(), "it ended before it could be killed");
            std::thread::sleep(Duration::from_millis(1));
        }
        let began = Instant::now();
        send(children(&launcher)[0], "-KILL");
        let output = launcher.wait_with_output().unwrap();
        assert!(began.elapsed() < Duration::from_secs(30), "{:?}", began.elapsed());
        let message = stderr(&output);
        assert_eq!(output.status.code(), Some(137), "as a shell gives it: {message}");
        assert!(message.contains("error: process 0: signal: 9"), "{message}");
        assert!(!world.at("map.json").exists(), "nothing half-written");
        let finished = fs::read_to_string(&parts[0]).unwrap();
        assert!(finished.lines().count() < 33, "it was killed too late");

        // What is finished is not computed again: its seconds stay.
        let kept: Vec<&str> = finished.lines().skip(1).take(16).collect();
        let seconds =
            |line: &str| serde_json::from_str::<serde_json::Value>(line).unwrap()["seconds"].as_f64().unwrap();
        let least: f64 = kept.iter().copied().map(seconds).sum();
        succeeds(divided());
        assert_eq!(timeless(&world.at("map.json")), timeless(&world.at("whole.json")));
        let map: serde_json::Value = serde_json::from_slice(&fs::read(world.at("map.json")).unwrap()).unwrap();
        assert!(map["seconds"].as_f64().unwrap() > least);
        assert!(parts.iter().all(|part| !part.exists()));
    }

    #[test]
    fn the_second_process_is_named_with_its_error() {
        let world = World::new();
        // A part of another run, which only the second process meets.
        succeeds(world.map("map.json", &["--shard=1/2", "--cells=layers.0", "--epsilon=1", "--seed=7"]));
        let other = fs::read(world.at("map.shard-1-of-2.jsonl")).unwrap();
        let message = refused(world.map("map.json", &["--gpus=2", "--cells=layers.0", "--epsilon=1"]));
        assert!(
            message.contains("process 1: exit status: 2") && message.contains("map.shard-1-of-2.jsonl"),
            "{message}"
        );
        assert!(fs::read(world.at("map.shard-1-of-2.jsonl")).unwrap() == other, "it is not replaced");
        succeeds(world.map("map.json", &["--gpus=2", "--cells=layers.0", "--epsilon=1", "--force"]));
    }
}
