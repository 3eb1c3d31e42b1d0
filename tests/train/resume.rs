//! Interrupted runs: resumed, they leave the same bytes; what does not belong to them is refused.

use crate::run::{Run, bits, examples, lines, model, options, two_phases, weights};
use serde_json::Value;
use std::path::Path;
use swat::backend::cpu::Cpu;
use swat::engine::{Decoder, Lora};
use swat::modules::{Cell, LearningRates, ModuleKind, ModuleSet, ParamId};
use swat::train::{Phase, TuneOptions, Updates};

/// The model with adapters on every projection.
fn adapted() -> Decoder<Cpu> {
    let mut decoder = model();
    let cells = decoder.config.cells();
    decoder.add_lora(&cells, Lora { rank: 2, alpha: 4.0, ..Lora::default() }, 3).unwrap();
    decoder
}

#[test]
fn any_interruption_leaves_the_same_bytes() {
    let straight_dir = tempfile::tempdir().unwrap();
    let (straight, expected, recorded) = Run::new(Some(straight_dir.path())).run();
    let straight = straight.unwrap();
    assert_eq!(recorded.phases, ["mods", "all"]);
    assert!(recorded.steps.iter().all(|step| step.speed_of_light.is_some_and(|share| share > 0.0 && share < 1.0)));
    assert_eq!(lines(straight_dir.path()).len(), 15);
    let (unsaved, other, _) = Run::new(None).run();
    assert_eq!(bits(&other), bits(&expected), "saving changes nothing");
    assert_eq!(unsaved.unwrap().updates, straight.updates);

    for stop in 1..=15 {
        let dir = tempfile::tempdir().unwrap();
        let (stopped, ..) = Run { stop_at: Some(stop), ..Run::new(Some(dir.path())) }.run();
        assert!(stopped.is_err());
        let (resumed, decoder, recorded) = Run { given: stop % 2 == 0, ..Run::new(Some(dir.path())) }.run();
        let resumed = resumed.unwrap();
        // Checkpoints: every 3 steps, and after step 7, where the phase ends; the hook fails before the step is saved.
        let saved = [0, 3, 6, 7, 9, 12].into_iter().filter(|step| *step < stop).max().unwrap();
        assert_eq!(resumed.resumed_from.unwrap_or(0), saved, "stopped at {stop}");
        assert_eq!(recorded.steps.first().unwrap().step, saved + 1);
        assert_eq!(bits(&decoder), bits(&expected), "stopped at {stop}");
        assert_eq!(lines(dir.path()), lines(straight_dir.path()), "stopped at {stop}");
        assert_eq!(resumed.updates, straight.updates, "stopped at {stop}");
        let file: Updates = serde_json::from_slice(&std::fs::read(dir.path().join("updates.json")).unwrap()).unwrap();
        assert_eq!(file.phases.len(), 2);
        for name in ["weights.safetensors", "moments.safetensors"] {
            let bytes = |dir: &Path| std::fs::read(dir.join("checkpoints/step-00000012").join(name)).unwrap();
            assert!(bytes(dir.path()) == bytes(straight_dir.path()), "{name}, stopped at {stop}");
            assert!(bytes(dir.path()).len() > 1000);
        }
    }

    // A run that is over is only loaded.
    let (again, decoder, recorded) = Run::new(Some(straight_dir.path())).run();
    assert_eq!(again.unwrap().resumed_from, Some(15));
    assert!(recorded.steps.is_empty());
    assert_eq!(bits(&decoder), bits(&expected));
    assert_eq!(lines(straight_dir.path()).len(), 15);
}

/// The copy that is held, the checkpoint at a phase's start and the files of the model tell the same.
#[test]
fn updates_are_measured_against_the_start_of_each_phase() {
    let mut three = two_phases(3, 4);
    // Another half, so that the last phase meets what trained once, twice and never before.
    let all = model().config.cells();
    let q: ModuleSet = all.iter().filter(|c| matches!(c, Cell::Module(m) if m.kind == ModuleKind::Q)).collect();
    three.insert(1, Phase { name: "q".into(), rates: LearningRates::masked(&q, &all, 0.0), ..three[0].clone() });
    for (model, name) in [(model as fn() -> Decoder<Cpu>, "full"), (adapted, "adapters")] {
        let run = |dir: Option<&Path>, given, stop_at| {
            let run = Run { phases: three.clone(), model, given, stop_at, ..Run::new(dir) };
            run.run().0.map(|summary| summary.updates)
        };
        let held = run(None, false, None).unwrap();
        assert!(held.phases[1].cells[&Cell::module(1, ModuleKind::Q)].delta_norm > 0.0);
        assert_eq!(held.phases[1].cells[&Cell::module(1, ModuleKind::V)].delta_norm, 0.0);
        assert_eq!(run(None, true, None).unwrap(), held, "{name}");
        for given in [false, true] {
            let dir = tempfile::tempdir().unwrap();
            assert_eq!(run(Some(dir.path()), given, None).unwrap(), held, "{name}, given: {given}");
            for stop in [4, 8, 10] {
                let dir = tempfile::tempdir().unwrap();
                assert!(run(Some(dir.path()), given, Some(stop)).is_err());
                assert_eq!(run(Some(dir.path()), given, None).unwrap(), held, "{name}, given: {given}, after {stop}");
            }
        }
    }
}

#[test]
fn accumulation_and_moments_and_means_survive_interruptions() {
    fn with(dir: Option<&Path>, stop_at: Option<u64>) -> Run<'_> {
        let options =
            TuneOptions { batch_size: 1, grad_accum: 3, keep_optimizer: true, ema_decay: Some(0.9), ..options() };
        Run { options, stop_at, ..Run::new(dir) }
    }
    let (_, expected, _) = with(None, None).run();
    for stop in [2, 5, 7, 8, 11, 14] {
        let dir = tempfile::tempdir().unwrap();
        assert!(with(Some(dir.path()), Some(stop)).run().0.is_err());
        let (resumed, decoder, _) = with(Some(dir.path()), None).run();
        resumed.unwrap();
        assert_eq!(bits(&decoder), bits(&expected), "stopped at {stop}");
    }
}

#[test]
fn what_the_proximal_term_holds_weights_near_survives_interruptions() {
    fn with(dir: Option<&Path>, prox: Option<f32>, keep_optimizer: bool) -> Run<'_> {
        Run { options: TuneOptions { prox, keep_optimizer, ..options() }, ..Run::new(dir) }
    }
    let (_, free, steps) = with(None, None, true).run();
    for keep in [false, true] {
        let (_, expected, held) = with(None, Some(5.0), keep).run();
        // At the first step of the phase nothing has moved.
        assert_eq!(held.steps[0].grad_norm, steps.steps[0].grad_norm);
        assert_ne!(held.steps[1].grad_norm, steps.steps[1].grad_norm);
        let moved = |decoder: &Decoder<Cpu>| -> f64 {
            let pairs = weights(decoder).into_values().flatten().zip(weights(&model()).into_values().flatten());
            pairs.map(|(after, before)| f64::from(after - before).powi(2)).sum()
        };
        assert!(moved(&expected) < 0.9 * moved(&free), "{} {}", moved(&expected), moved(&free));
        for stop in [2, 5, 7, 8, 11, 14] {
            let dir = tempfile::tempdir().unwrap();
            assert!(Run { stop_at: Some(stop), ..with(Some(dir.path()), Some(5.0), keep) }.run().0.is_err());
            let (resumed, decoder, _) = with(Some(dir.path()), Some(5.0), keep).run();
            resumed.unwrap();
            assert_eq!(bits(&decoder), bits(&expected), "stopped at {stop}, kept moments: {keep}");
        }
    }
}

#[test]
fn a_damaged_checkpoint_is_passed_over() {
    let dir = tempfile::tempdir().unwrap();
    let (_, expected, _) = Run::new(None).run();
    assert!(Run { stop_at: Some(14), ..Run::new(Some(dir.path())) }.run().0.is_err());
    let file = dir.path().join("checkpoints/step-00000012/moments.safetensors");
    let bytes = std::fs::read(&file).unwrap();
    std::fs::write(&file, &bytes[..bytes.len() - 1]).unwrap();
    let (resumed, decoder, recorded) = Run::new(Some(dir.path())).run();
    assert_eq!(resumed.unwrap().resumed_from, Some(9));
    assert!(recorded.notes[0].contains("step 12") && recorded.notes[0].contains("moments"), "{:?}", recorded.notes);
    assert_eq!(bits(&decoder), bits(&expected));
    assert_eq!(lines(dir.path()).len(), 15);
}

#[test]
fn a_lost_phase_start_costs_the_measurement_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let (_, expected, _) = Run::new(None).run();
    assert!(Run { stop_at: Some(14), ..Run::new(Some(dir.path())) }.run().0.is_err());
    std::fs::remove_file(dir.path().join("checkpoints/step-00000007/weights.safetensors")).unwrap();
    let (resumed, decoder, recorded) = Run::new(Some(dir.path())).run();
    assert_eq!(resumed.unwrap().updates.phases.len(), 1);
    assert!(recorded.notes.iter().any(|note| note.contains("not measured")), "{:?}", recorded.notes);
    assert_eq!(bits(&decoder), bits(&expected));
}

#[test]
fn another_run_is_refused_by_what_differs() {
    let dir = tempfile::tempdir().unwrap();
    assert!(Run { stop_at: Some(5), ..Run::new(Some(dir.path())) }.run().0.is_err());
    let refusal = |run: Run| {
        let error = run.run().0.unwrap_err();
        assert_eq!(error.exit_code(), 2);
        error.to_string()
    };
    let seed = TuneOptions { seed: 6, ..options() };
    let text = refusal(Run { options: seed, ..Run::new(Some(dir.path())) });
    assert!(text.contains("options.seed is 5 in the checkpoint and 6 in this run"), "{text}");
    let text = refusal(Run { phases: two_phases(7, 9), ..Run::new(Some(dir.path())) });
    assert!(text.contains("phases.1.options.steps is 8 in the checkpoint and 9 in this run"), "{text}");
    let text = refusal(Run { examples: examples(12), ..Run::new(Some(dir.path())) });
    assert!(text.contains("batches_per_epoch is 4 in the checkpoint and 6 in this run"), "{text}");
    // What changes no bit may change.
    let free = TuneOptions { save_every: 1, keep_last: 1, recompute: true, ..options() };
    let (resumed, decoder, _) = Run { options: free, ..Run::new(Some(dir.path())) }.run();
    resumed.unwrap();
    assert_eq!(bits(&decoder), bits(&Run::new(None).run().1));
}

#[test]
fn without_resume_an_old_run_is_gone() {
    let dir = tempfile::tempdir().unwrap();
    assert!(Run { stop_at: Some(14), ..Run::new(Some(dir.path())) }.run().0.is_err());
    assert!(Run { resume: false, stop_at: Some(4), ..Run::new(Some(dir.path())) }.run().0.is_err());
    assert_eq!(lines(dir.path()).len(), 4);
    let (resumed, ..) = Run::new(Some(dir.path())).run();
    assert_eq!(resumed.unwrap().resumed_from, Some(3));
}

#[test]
fn adapters_train_alone_and_resume() {
    let dir = tempfile::tempdir().unwrap();
    let (summary, expected, _) = Run { model: adapted, ..Run::new(None) }.run();
    let summary = summary.unwrap();
    let before = bits(&adapted());
    for (id, after) in bits(&expected) {
        let adapter = matches!(id, ParamId::LoraA(_) | ParamId::LoraB(_));
        assert_eq!(after != before[&id], adapter, "{id}");
    }
    let cells = &summary.updates.phases[1].cells;
    assert!(cells[&Cell::module(1, ModuleKind::Down)].delta_norm > 0.0);
    assert_eq!(cells[&Cell::Embedding].delta_norm, 0.0);

    assert!(Run { model: adapted, stop_at: Some(11), ..Run::new(Some(dir.path())) }.run().0.is_err());
    let (resumed, decoder, _) = Run { model: adapted, ..Run::new(Some(dir.path())) }.run();
    assert_eq!(resumed.unwrap().updates, summary.updates);
    assert_eq!(bits(&decoder), bits(&expected));
}

/// What the killed process below runs; on its own it does nothing.
#[test]
fn child_process() {
    if let Some(dir) = std::env::var_os("SWAT_TEST_TRAIN_DIR") {
        long(Some(Path::new(&dir))).run().0.unwrap();
    }
}

fn long(dir: Option<&Path>) -> Run<'_> {
    let options = TuneOptions { save_every: 2, ..options() };
    Run { options, phases: two_phases(60, 60), ..Run::new(dir) }
}

#[test]
fn killed_processes_are_resumed() {
    let dir = tempfile::tempdir().unwrap();
    let mut kills = 0;
    for milliseconds in (5..).step_by(17) {
        let mut child = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "resume::child_process"])
            .env("SWAT_TEST_TRAIN_DIR", dir.path())
            .stdout(std::process::Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(std::time::Duration::from_millis(milliseconds));
        if let Some(status) = child.try_wait().unwrap() {
            assert!(status.success());
            break;
        }
        child.kill().unwrap();
        child.wait().unwrap();
        kills += 1;
    }
    assert!(kills > 0);
    let (_, expected, _) = long(None).run();
    let (resumed, decoder, _) = long(Some(dir.path())).run();
    assert_eq!(resumed.unwrap().resumed_from, Some(120));
    assert_eq!(bits(&decoder), bits(&expected));
    let steps: Vec<_> = lines(dir.path()).iter().map(|line| line["step"].as_u64().unwrap()).collect();
    assert_eq!(steps, (1..=120).collect::<Vec<_>>());
}

#[test]
fn a_checkpoint_that_stands_outside_the_run_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    assert!(Run { stop_at: Some(5), ..Run::new(Some(dir.path())) }.run().0.is_err());
    let checkpoint = dir.path().join("checkpoints/step-00000003");
    let read =
        |name: &str| -> Value { serde_json::from_slice(&std::fs::read(checkpoint.join(name)).unwrap()).unwrap() };
    let (state, mut manifest) = (read("state.json"), read("manifest.json"));
    for (field, value) in [
        ("/run/phase", 9.into()),
        ("/run/position/batch", 4.into()),
        ("/run/summaries", Value::Array(vec![])),
        ("/run/step", u64::MAX.into()),
        ("/run/phase_step", 4.into()),
        ("/run/phase", Value::Null),
    ] {
        let mut changed = state.clone();
        *changed.pointer_mut(field).unwrap() = value;
        let text = changed.to_string();
        manifest["state.json"]["bytes"] = text.len().into();
        manifest["state.json"]["blake3"] = blake3::hash(text.as_bytes()).to_hex().to_string().into();
        std::fs::write(checkpoint.join("state.json"), text).unwrap();
        std::fs::write(checkpoint.join("manifest.json"), manifest.to_string()).unwrap();
        let error = Run::new(Some(dir.path())).run().0.unwrap_err();
        assert_eq!(error.exit_code(), 2, "{field}: {error}");
        assert!(error.to_string().contains("state.json"), "{field}: {error}");
    }
}
