//! Ranks that do not come, do not belong to the others, or end: each is named, and nothing half-written is left.

use super::ranks::{World, ends, port, start, torchrun_variables};
use super::{stderr, succeeds, text};
use std::fs;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

const STEPS: [&str; 3] = ["--mods-steps=1", "--steps=1", "--rendezvous-timeout=2"];

/// The messages of ranks that must all fail with this exit code.
fn failures(outputs: &[Output], code: i32) -> Vec<String> {
    let messages: Vec<String> = outputs.iter().map(stderr).collect();
    for (output, message) in outputs.iter().zip(&messages) {
        assert_eq!(output.status.code(), Some(code), "{messages:?}");
        assert!(!message.contains("panicked"), "{message}");
    }
    messages
}

#[test]
fn ranks_that_do_not_come_are_named() {
    let world = World::new();
    let at = port();
    let tables = [0, 2].map(|rank| torchrun_variables(rank, 4, at)).to_vec();
    for message in failures(&ends(start(|| world.tune("out", &STEPS), tables)), 1) {
        assert!(message.contains("of 4 ranks these did not come") && message.contains("within 2 s: 1, 3"), "{message}");
    }
    let message = &failures(&ends(start(|| world.tune("out", &STEPS), vec![torchrun_variables(1, 2, port())])), 1)[0];
    assert!(message.contains("rank 1: rank 0 did not come to 127.0.0.1:"), "{message}");
    // A late one is no failure.
    let at = port();
    let mut ranks = start(|| world.tune("late", &STEPS), vec![torchrun_variables(0, 2, at)]);
    std::thread::sleep(Duration::from_secs(1));
    ranks.extend(start(|| world.tune("late", &STEPS), vec![torchrun_variables(1, 2, at)]));
    assert!(ends(ranks).iter().all(|output| output.status.success()));
    assert!(!world.at("out").exists());
}

#[test]
fn ranks_that_do_not_belong_together_are_refused_by_name() {
    let world = World::new();
    let at = port();
    let tables = vec![torchrun_variables(0, 2, at), torchrun_variables(1, 3, at)];
    for message in failures(&ends(start(|| world.tune("out", &STEPS), tables)), 1) {
        assert!(message.contains("rank 1 counts 3 ranks, and rank 0 counts 2"), "{message}");
    }

    // Two jobs on one port: the second rank 0 finds it taken, its other ranks meet a stranger.
    let at = port();
    let job = |rank: usize, job: &str| {
        let mut table = torchrun_variables(rank, 2, at);
        table.push(("TORCHELASTIC_RUN_ID", job.to_owned()));
        table
    };
    let mut first = start(|| world.tune("first", &STEPS[..2]), vec![job(0, "first")]);
    std::thread::sleep(Duration::from_millis(500));
    let second = ends(start(|| world.tune("second", &STEPS), vec![job(0, "second"), job(1, "second")]));
    let messages = failures(&second, 1);
    assert!(messages[0].contains("another job may have this port: set MASTER_PORT"), "{}", messages[0]);
    assert!(messages[1].contains("belongs to another job"), "{}", messages[1]);
    first.extend(start(|| world.tune("first", &STEPS[..2]), vec![job(1, "first")]));
    assert!(ends(first).iter().all(|output| output.status.success()), "the first job is not disturbed");

    let fewer: String = fs::read_to_string(world.at("data/train.jsonl"))
        .unwrap()
        .lines()
        .skip(1)
        .fold(String::new(), |text, line| text + line + "\n");
    fs::write(world.at("fewer.jsonl"), fewer).unwrap();
    let (train, other) = (world.at("data/train.jsonl"), world.at("fewer.jsonl"));
    for (differs, named) in [
        (vec!["--data", text(&other)], "data is "),
        (vec!["--weight-decay=0.5"], "phases.0.options.weight_decay is 0.0 in rank 0 and 0.5 in rank 1"),
        (vec!["--save-every=3"], "save_every is 200 in rank 0 and 3 in rank 1"),
        (vec!["--seed=9"], "options.seed is 0 in rank 0 and 9 in rank 1"),
    ] {
        let at = port();
        let mut ranks = start(|| world.tune("out", &STEPS), vec![torchrun_variables(0, 2, at)]);
        let command = || {
            let mut arguments = world.arguments("out", &[&STEPS[..], &differs].concat());
            if differs[0] == "--data" {
                // In the place of the one that all have.
                arguments.retain(|argument| argument != text(&train));
                let at = arguments.iter().position(|argument| argument == "--data").unwrap();
                arguments.remove(at);
            }
            let mut command = super::swat(&arguments.iter().map(String::as_str).collect::<Vec<_>>());
            command.env("RAYON_NUM_THREADS", "1");
            command
        };
        ranks.extend(start(command, vec![torchrun_variables(1, 2, at)]));
        for message in failures(&ends(ranks), 2) {
            assert!(message.contains("rank 1: found another run than that of rank 0"), "{message}");
            assert!(message.contains(named), "{message}");
        }
        assert!(
            !world.at("out").exists() && !world.at("out.unfinished").exists(),
            "nothing was trained, nothing is left"
        );
    }

    // Nor is an unfinished run touched that --force would replace.
    fs::create_dir(world.at("out.unfinished")).unwrap();
    fs::write(world.at("out.unfinished/metrics.jsonl"), "the steps so far\n").unwrap();
    let (at, forced) = (port(), [&STEPS[..], &["--force"]].concat());
    let mut ranks = start(|| world.tune("out", &forced), vec![torchrun_variables(0, 2, at)]);
    let other = [&forced[..], &["--seed=9"]].concat();
    ranks.extend(start(|| world.tune("out", &other), vec![torchrun_variables(1, 2, at)]));
    failures(&ends(ranks), 2);
    let left: Vec<_> =
        fs::read_dir(world.at("out.unfinished")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, ["metrics.jsonl"]);
    assert_eq!(fs::read_to_string(world.at("out.unfinished/metrics.jsonl")).unwrap(), "the steps so far\n");
}

#[cfg(target_os = "linux")]
mod killed {
    use super::super::ranks::{children, send, wait_for_steps};
    use super::*;

    const LONG: [&str; 3] = ["--mods-steps=10", "--steps=60", "--save-every=5"];

    /// What a rank's end leaves is continued by any number of ranks; there is no output before.
    fn continues(world: &World, out: &str, sizes: &[&str]) {
        assert!(!world.at(out).exists(), "{out}");
        for size in sizes {
            let copy = format!("{out}-{size}");
            let (from, to) = (world.at(&format!("{out}.unfinished")), world.at(&format!("{copy}.unfinished")));
            assert!(Command::new("cp").arg("-r").arg(from).arg(to).status().unwrap().success());
            succeeds(world.tune(&copy, &[&LONG[..], &["--resume", "--gpus", size]].concat()));
            let record = fs::read_to_string(world.at(&copy).join("tune.json")).unwrap();
            let record: serde_json::Value = serde_json::from_str(&record).unwrap();
            assert!(record["summary"]["resumed_from"].as_u64().unwrap() >= 5, "{record}");
            assert_eq!(world.losses(&copy).len(), 70);
        }
    }

    #[test]
    fn the_end_of_one_rank_ends_all_within_half_a_minute() {
        let world = World::new();
        // By a launcher that does not look after them.
        let at = port();
        let tables = (0..3).map(|rank| torchrun_variables(rank, 3, at)).collect();
        let mut ranks = start(|| world.tune("a", &LONG), tables);
        wait_for_steps(&world, "a", 7, || ranks[0].try_wait().unwrap().is_some());
        let began = Instant::now();
        send(ranks[1].id(), "-KILL");
        ranks.remove(1).wait().unwrap();
        for message in failures(&ends(ranks), 1) {
            assert!(message.contains("rank 1 has ended"), "{message}");
        }
        assert!(began.elapsed() < Duration::from_secs(30), "{:?}", began.elapsed());
        continues(&world, "a", &["1", "2"]);

        // By --gpus, whose rank 0 says it, and the launcher how.
        let mut launcher = world.tune("b", &[&LONG[..], &["--gpus=3"]].concat());
        let mut launcher = launcher.stderr(std::process::Stdio::piped()).spawn().unwrap();
        wait_for_steps(&world, "b", 7, || launcher.try_wait().unwrap().is_some());
        let began = Instant::now();
        send(children(&launcher)[2], "-KILL");
        let output = launcher.wait_with_output().unwrap();
        assert!(began.elapsed() < Duration::from_secs(30), "{:?}", began.elapsed());
        assert_eq!(output.status.code(), Some(137), "as a shell gives it");
        let message = stderr(&output);
        assert!(message.contains("rank 2 has ended") && message.contains("rank 2: signal: 9"), "{message}");
    }

    #[test]
    fn a_rank_that_gives_no_sign_of_life_ends_all_within_half_a_minute() {
        let world = World::new();
        let at = port();
        let tables = (0..3).map(|rank| torchrun_variables(rank, 3, at)).collect();
        let mut ranks = start(|| world.tune("a", &LONG), tables);
        wait_for_steps(&world, "a", 3, || ranks[0].try_wait().unwrap().is_some());
        let began = Instant::now();
        let stopped = ranks.remove(2);
        send(stopped.id(), "-STOP");
        for message in failures(&ends(ranks), 1) {
            assert!(message.contains("rank 2 has ended, or cannot be reached: no sign of life for 15 s"), "{message}");
        }
        assert!(began.elapsed() < Duration::from_secs(30), "{:?}", began.elapsed());
        // It wakes up in a run that is over.
        send(stopped.id(), "-CONT");
        assert_eq!(stopped.wait_with_output().unwrap().status.code(), Some(1));
    }

    #[test]
    fn the_end_of_the_launcher_leaves_no_rank() {
        let world = World::new();
        let mut launcher = world.tune("a", &[&LONG[..], &["--gpus=2"]].concat()).spawn().unwrap();
        wait_for_steps(&world, "a", 7, || launcher.try_wait().unwrap().is_some());
        let ranks = children(&launcher);
        assert_eq!(ranks.len(), 2);
        launcher.kill().unwrap();
        launcher.wait().unwrap();
        let began = Instant::now();
        let alive =
            |rank: &u32| fs::read_to_string(format!("/proc/{rank}/stat")).is_ok_and(|stat| !stat.contains(") Z "));
        while ranks.iter().any(alive) {
            assert!(began.elapsed() < Duration::from_secs(30), "ranks are left");
            std::thread::sleep(Duration::from_millis(20));
        }
        // They have saved what they had.
        assert!(world.at("a.unfinished/checkpoints").exists() && !world.at("a").exists());
    }
}

#[test]
fn an_error_of_one_rank_is_told_by_all() {
    let world = World::new();
    let at = port();
    let mut ranks = start(|| world.tune("out", &STEPS), vec![torchrun_variables(0, 2, at)]);
    let missing = || {
        let mut command = world.tune("out", &STEPS);
        command.args(["--eval-data", "missing.jsonl"]);
        command
    };
    ranks.extend(start(missing, vec![torchrun_variables(1, 2, at)]));
    let outputs = ends(ranks);
    let messages: Vec<String> = outputs.iter().map(stderr).collect();
    assert_eq!((outputs[0].status.code(), outputs[1].status.code()), (Some(1), Some(2)), "{messages:?}");
    assert!(messages[0].contains("rank 1 has ended: missing.jsonl"), "{messages:?}");
    assert!(messages[1].starts_with("error: missing.jsonl"), "{messages:?}");
    succeeds(world.tune("out", &STEPS));
}
