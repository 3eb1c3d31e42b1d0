//! A study's outcome as files: what is in them, and that missing parts are left out.

use serde_json::{Value, json};
use swat::modules::{Cell, ModuleKind};
use swat::report::swat::SettingKind;
use swat::report::{results_text, swat_report, write_report};
use swat::secure::Rate;
use swat::secure::study::{Outcome, RunConfig};

fn rate(hits: usize, total: usize) -> Value {
    json!(Rate::new(hits, total))
}

fn stat(mean: f64) -> Value {
    json!({ "mean": mean, "error": 0.01 })
}

fn cell(layer: usize, kind: ModuleKind) -> String {
    Cell::module(layer, kind).to_string()
}

fn scores(gap: f64) -> Value {
    json!({ "gap": gap, "refusal": 2.0 * gap, "margin": gap / 2.0, "auroc": 0.9, "accuracy": 0.8 })
}

/// A phase that moved the queries by 3 and the values by 4, of norms 10.
fn phase(name: &str) -> Value {
    let update = |delta: f64| json!({ "delta_norm": delta, "weight_norm": 10.0 });
    json!({ "phase": name, "cells": {
        cell(0, ModuleKind::Q): update(3.0), cell(1, ModuleKind::V): update(4.0), "embed_tokens": update(1.0) } })
}

fn setting(text: &str, asr: usize, task: usize) -> Value {
    let given = text == "given";
    let steps = if text == "plain" { 4 } else { 8 };
    let summary = json!({ "phase": "all", "steps": steps, "skipped_non_finite": 0, "skipped_empty": 0,
        "trained_tokens": 800, "tokens": 1600, "first_loss": 3.0, "last_loss": 1.0, "seconds": 12.5 });
    let tuned = json!({ "dir": "tuned/x", "seed": 7, "steps_per_epoch": 2, "phases": [summary],
        "updates": { "phases": [phase("mods"), phase("all")] },
        "points": [{ "step": 0, "scores": scores(4.0) }, { "step": 2, "scores": scores(1.0) }],
        "losses": [[1, 3.0], [2, 1.5]], "peak_bytes": 3_u64 << 29 });
    json!({ "setting": text, "mods": null, "share": null,
        "joint": (text == "swat" || text.starts_with("warmup")).then_some(0.04),
        "tuned": if given { Value::Null } else { tuned },
        "evaluation": { "asr": rate(asr, 100), "strict_asr": null, "asr_by_category": {}, "over_refusal": rate(3, 50),
            "over_refusal_by_category": {}, "task": { "overall": rate(task, 200), "categories": {} },
            "perplexity": null },
        "drift": (!given).then(|| json!({ "metric_layer": 2, "splits": { "test": { "layers": [],
            "base": scores(4.0), "tuned": scores(1.0), "drop": { "gap": 0.75 } } } })) })
}

/// The run of another training seed: its gap falls to `gap`, its weights move `factor` times as far.
fn another_seed(value: &mut Value, seed: u64, asr: usize, task: usize, gap: f64, factor: f64) {
    let mut run = value.clone();
    run["tuned"]["seed"] = json!(seed);
    run["tuned"]["points"][1]["scores"] = scores(gap);
    run["tuned"]["losses"] = json!([[1, 5.0], [3, 1.0]]);
    for phase in run["tuned"]["updates"]["phases"].as_array_mut().unwrap() {
        for cell in phase["cells"].as_object_mut().unwrap().values_mut() {
            cell["delta_norm"] = json!(cell["delta_norm"].as_f64().unwrap() * factor);
        }
    }
    run["evaluation"]["asr"] = rate(asr, 100);
    run["evaluation"]["task"]["overall"] = rate(task, 200);
    run["drift"]["splits"]["test"]["tuned"] = scores(gap);
    for key in ["setting", "mods", "share", "joint", "more_seeds"] {
        run.as_object_mut().unwrap().remove(key);
    }
    value["more_seeds"] = json!([run]);
}

/// Two training seeds a setting.
fn two_seeds() -> Value {
    let mut value =
        outcome(&[("given", 2, 40), ("plain-equal", 80, 180), ("swat", 40, 188), ("warmup:random:1", 50, 188)]);
    another_seed(&mut value["settings"][1], 8, 60, 190, 2.0, 2.0);
    another_seed(&mut value["settings"][2], 8, 50, 190, 2.0, 2.0);
    another_seed(&mut value["settings"][3], 8, 70, 190, 2.0, 2.0);
    value
}

fn outcome(settings: &[(&str, usize, usize)]) -> Value {
    let cells: Vec<Value> = (0..2)
        .flat_map(|layer| ModuleKind::ALL.map(|kind| (layer, kind)))
        .map(|(layer, kind)| {
            json!({ "cell": cell(layer, kind), "parameters": 100, "scores": {}, "drop": { "gap": stat(0.125) },
                "drop_by_seed": {}, "shift": stat(0.5), "drop_per_shift": stat(0.25), "control_drop": stat(0.1),
                "beyond_control": stat(0.025), "retrained_auroc": null })
        })
        .collect();
    let map = json!({ "format": "swat.robustness/1", "model_hash": "abc", "probe_hash": "", "prompts_hash": "",
        "layers": 2, "metric_layer": 2, "split": "test", "prompts": [50, 50], "kind": "update:/secret/place/tuned",
        "epsilon": 1.25, "epsilon_sweep": [], "seeds": [3, 4], "antithetic": true, "clean": scores(4.0),
        "clean_control_gap": 2.0, "clean_retrained_auroc": 0.99, "cells": cells, "seconds": 61.0 });
    let chosen = cell(1, ModuleKind::V);
    let search = json!({ "format": "swat.mods_rob/1", "set": chosen, "found": chosen, "share": 0.25, "joint": 0.04,
        "tau": 0.05, "cap": 0.5, "floor": 0.1, "window": 1, "score": "gap", "kind": "gaussian", "epsilon": 1.25,
        "seeds": [3, 4], "votes": { chosen.clone(): 2, cell(0, ModuleKind::O): 1 },
        "single": { chosen.clone(): 0.125, cell(0, ModuleKind::O): 0.125, cell(0, ModuleKind::Q): 0.125 },
        "steps": [], "model_hash": "abc", "map_hash": "", "seconds": 9.0 });
    json!({ "title": "tiny <model>", "model_hash": "0123abcd",
        "probe": { "format": "swat.probe/1", "model_hash": "abc", "prompts_hash": "", "hidden": 8, "layers": 2,
            "metric_layer": 2, "seed": 1, "heads": [], "skipped": {}, "control": null, "first_tokens": null },
        "map": map, "search": search, "mods": [chosen], "seconds": 100.0,
        "settings": settings.iter().map(|(text, asr, task)| setting(text, *asr, *task)).collect::<Vec<_>>() })
}

fn parse(value: Value) -> Outcome {
    serde_json::from_value(value).unwrap()
}

const ALL: [(&str, usize, usize); 8] = [
    ("given", 2, 40),
    ("plain", 60, 180),
    ("plain-equal", 90, 190),
    ("swat", 40, 188),
    ("warmup:random:1", 85, 190),
    ("warmup:complement", 30, 190),
    ("plain-equal+refusals", 1, 189),
    ("ml-lr:0.001", 88, 190),
];

#[test]
fn every_file_is_written_and_holds_its_numbers() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("new");
    let outcome = parse(outcome(&ALL));
    write_report(&outcome, &RunConfig::default(), "swat run study.toml", &out).unwrap();
    let read = |name: &str| std::fs::read_to_string(out.join(name)).unwrap();

    let html = read("report.html");
    let names = ["as given", "plain, equal steps", "SWAT", "random set 1", "complement", "ML-LR, the rest × 0.001"];
    for text in names.into_iter().chain(["plain, equal steps + 10 % refusals", "tiny &lt;model&gt;", "0123abcd"]) {
        assert!(html.contains(text), "{text}");
    }
    for text in ["40.0 %", "50.0 points lower", "swat run study.toml", "update towards tuned, ε = 1.25", "Controls of"]
    {
        assert!(html.contains(text), "{text}");
    }
    assert!(!html.contains("/secret/place"));
    let results = read("results.md");
    for text in ["# tiny &lt;model&gt;", "| SWAT | 40.0 (", "**By layer**", "**Updates by phase**", "**Wall times**"] {
        assert!(results.contains(text), "{text} in {results}");
    }
    // Queries (3 of 10) are the rest, values (4 of 10) are Mods_Rob.
    assert!(results.contains("| SWAT | mods | 40.000 | 30.000 | 10.000 | 0.75 |"), "{results}");
    assert!(results.contains("| SWAT | test | 4.00 | 1.00 | 75.0 | 0.900 | 8.00 | 2.00 |"), "{results}");
    for name in ["robustness.svg", "mods.svg"] {
        assert!(read(name).starts_with("<svg"), "{name}");
    }
    assert!(std::fs::read(out.join("robustness.png")).unwrap().starts_with(b"\x89PNG"));
    let kept: Outcome = serde_json::from_str(&read("outcome.json")).unwrap();
    assert_eq!((kept.settings.len(), kept.mods, kept.title), (ALL.len(), outcome.mods, outcome.title));
}

#[test]
fn figures_get_what_was_measured() {
    let report = swat_report(&parse(outcome(&ALL)), &RunConfig::default(), "");
    let results = report.results.unwrap();
    let kinds: Vec<SettingKind> = results.rows.iter().map(|row| row.setting.kind).collect();
    use SettingKind::*;
    assert_eq!(kinds, [AsGiven, Plain, PlainEqualSteps, Swat, Random, Complement, Refusals, Other]);
    assert_eq!((results.rows[3].steps, results.rows[3].seeds.as_slice()), (8, [7].as_slice()));
    // The probe's gap went from 4 to 1 within the first epoch.
    let drift = &report.drift.unwrap().settings[0];
    assert_eq!((drift.epochs[1].epoch, drift.epochs[1].probe.unwrap().value), (1.0, 0.25));
    // Two phases of 4 of 10 each: √(16 + 16) / 10; the embedding is no projection.
    let updates = &report.updates.unwrap().settings[0].relative;
    let value = updates.iter().find(|(c, _)| *c == Cell::module(1, ModuleKind::V)).unwrap().1;
    assert!((value - 32_f64.sqrt() / 10.0).abs() < 1e-9 && updates.len() == 2, "{updates:?}");
    let mods = report.mods.unwrap();
    assert_eq!(mods.agreement.len(), 2);
    assert!(mods.agreement.contains(&(Cell::module(0, ModuleKind::O), 0.5)));
    // Warm-ups alone, on the same data.
    assert_eq!(report.sets.len(), 3);
}

#[test]
fn findings_say_what_the_numbers_say() {
    let findings =
        |settings: &[(&str, usize, usize)]| swat_report(&parse(outcome(settings)), &RunConfig::default(), "").findings;
    let all = findings(&ALL);
    for text in [
        "Attack success of SWAT is 50.0 points lower than that of plain, equal steps",
        "the intervals do not overlap",
        "The task score of SWAT is 1.0 points lower than that of plain, equal steps",
        "That of SWAT is lower than 1 of these 2. SWAT is not better here than: complement.",
        "Attack success of plain, equal steps + 10 % refusals is 39.0 points lower than that of SWAT",
        "Each setting was trained once (seed 7).",
    ] {
        assert!(all.contains(text), "{text} in {all}");
    }
    assert!(!all.contains("not better than plain"));
    let worse = findings(&[("given", 2, 40), ("plain", 50, 190), ("swat", 53, 190)]);
    for text in ["3.0 points higher", "intervals overlap", "not better than plain here", "8 steps of SWAT, 4 of plain"]
    {
        assert!(worse.contains(text), "{text} in {worse}");
    }
    assert!(worse.contains("The task score of SWAT is the same as that of plain"), "{worse}");
    // An attack is compared with an attack.
    let attack = findings(&[("plain-equal", 10, 190), ("plain-equal+attack", 90, 190), ("swat+attack", 40, 190)]);
    assert!(attack.contains("50.0 points lower than that of plain, equal steps + 10 % attack"), "{attack}");
}

#[test]
fn several_seeds_are_means_with_ranges() {
    let outcome = parse(two_seeds());
    let report = swat_report(&outcome, &RunConfig::default(), "");
    let results = report.results.unwrap();
    let (given, swat) = (&results.rows[0], &results.rows[2]);
    assert_eq!((swat.seeds.as_slice(), swat.steps), ([7, 8].as_slice(), 8));
    let asr = swat.asr.unwrap();
    assert!((asr.value - 0.45).abs() < 1e-12 && asr.interval == Some((0.4, 0.5)), "{asr:?}");
    // One value, of prompts and not of seeds.
    assert_eq!((given.asr.unwrap().value, given.asr.unwrap().interval, given.seeds.len()), (0.02, None, 0));
    assert!(results.intervals.contains("lowest and the highest") && !results.intervals.contains("Wilson"));
    // From 4 to 1 and to 2.
    let drift = report.drift.unwrap();
    let probe = drift.settings[0].epochs[1].probe.unwrap();
    assert_eq!((probe.value, probe.interval), (0.375, Some((0.25, 0.5))));
    assert!(drift.note.contains("training seeds 7, 8"), "{}", drift.note);
    // The only step that both have.
    assert_eq!(report.losses[0].points, [(1, 4.0)]);
    let relative = &report.updates.unwrap().settings[1].relative;
    let value = relative.iter().find(|(c, _)| *c == Cell::module(1, ModuleKind::V)).unwrap().1;
    assert!((value - 1.5 * 32_f64.sqrt() / 10.0).abs() < 1e-6, "{value}");
    assert_eq!(report.footer.seeds[1], ("training".to_owned(), vec![7, 8]));
    assert!(report.subtitle.ends_with("Tuned with training seeds 7, 8."), "{}", report.subtitle);
}

#[test]
fn findings_of_several_seeds_compare_ranges() {
    let findings = swat_report(&parse(two_seeds()), &RunConfig::default(), "").findings;
    for text in [
        "mean and range over training seeds: as given 2.0 %; plain, equal steps 70.0 % [60.0–80.0]; SWAT 45.0 % [40.0–50.0].",
        "25.0 points lower than that of plain, equal steps: 45.0 % [40.0–50.0] against 70.0 % [60.0–80.0]; the ranges over \
         training seeds do not overlap.",
        "That of SWAT is lower than 1 of these 1.",
        "Each setting was trained with 2 seeds (7, 8).",
        "one comparison of 3 by chance",
    ] {
        assert!(findings.contains(text), "{text} in {findings}");
    }
    for text in ["interval", "95 %", "trained once"] {
        assert!(!findings.contains(text), "{text} in {findings}");
    }
    // Equal means of other values.
    let mut value = two_seeds();
    another_seed(&mut value["settings"][1], 8, 10, 190, 2.0, 2.0);
    let findings = swat_report(&parse(value), &RunConfig::default(), "").findings;
    let equal = "Attack success of SWAT is as high as that of plain, equal steps: 45.0 % [40.0–50.0] against 45.0 % [10.0–80.0]";
    assert!(
        findings.contains(equal) && findings.contains("SWAT is not better than plain, equal steps here"),
        "{findings}"
    );
}

#[test]
fn every_run_of_several_seeds_is_kept() {
    let dir = tempfile::tempdir().unwrap();
    write_report(&parse(two_seeds()), &RunConfig::default(), "", dir.path()).unwrap();
    let read = |name: &str| std::fs::read_to_string(dir.path().join(name)).unwrap();
    let kept: Outcome = serde_json::from_str(&read("outcome.json")).unwrap();
    let hits: Vec<usize> = kept.settings[2].runs().map(|run| run.evaluation.asr.unwrap().hits).collect();
    assert_eq!((hits.as_slice(), kept.settings[0].more_seeds.len()), ([40, 50].as_slice(), 0));
    let results = read("results.md");
    for text in [
        "| SWAT | 45.0 (40.0–50.0) |",
        "**Every training run**",
        "| SWAT | 40.0 (30.9–49.8) |",
        "| SWAT | 50.0 (40.4–59.6) |",
        "95 % Wilson intervals over 100 harmful prompts",
        // Of 40 % and 80 %, 30 % and 60 %, 10 % and 20 %.
        "| SWAT | mods | 60.000 | 45.000 | 15.000 | 0.75 |",
        "| SWAT | test | 4.00 | 1.50 (1.00–2.00) | 75.0 (75.0–75.0) |",
        "| tuning: SWAT, 2 runs together | 25.0 s | 16 |",
    ] {
        assert!(results.contains(text), "{text} in {results}");
    }
    assert!(read("report.html").contains("Means over the training seeds."));

    // One seed: nothing of all this, and the file has no place for it.
    write_report(&parse(outcome(&ALL)), &RunConfig::default(), "", dir.path()).unwrap();
    for name in ["results.md", "report.html", "outcome.json"] {
        let text = read(name);
        assert!(["Every training run", "over the training seeds", "more_seeds"].iter().all(|t| !text.contains(t)));
    }
}

#[test]
fn missing_parts_are_left_out() {
    let config = RunConfig::default();
    let mut bare = outcome(&[("given", 2, 40)]);
    for part in ["map", "search", "mods"] {
        bare[part] = Value::Null;
    }
    bare["settings"][0]["evaluation"] = json!({ "asr": rate(0, 0), "strict_asr": null, "asr_by_category": {},
        "over_refusal": null, "over_refusal_by_category": {}, "task": null, "perplexity": null });
    let mut by_hand = outcome(&[("swat", 40, 190)]);
    by_hand["search"] = Value::Null;
    let mut still = outcome(&ALL);
    still["settings"][1]["tuned"]["points"] = json!([]);
    still["settings"][2]["tuned"]["updates"]["phases"] = json!([]);
    still["settings"][3]["tuned"]["steps_per_epoch"] = json!(0);
    still["settings"][4]["tuned"]["phases"] = json!([]);
    still["map"]["cells"] = json!([]);
    still["seconds"] = json!(-1.0);
    let mut none = bare.clone();
    none["settings"] = json!([]);
    for (i, value) in [bare.clone(), by_hand, still, none].into_iter().enumerate() {
        let dir = tempfile::tempdir().unwrap();
        let outcome = parse(value);
        write_report(&outcome, &config, "", dir.path()).unwrap();
        let html = std::fs::read_to_string(dir.path().join("report.html")).unwrap();
        assert!(!html.contains("NaN") && !html.contains("inf "), "{i}");
        assert_eq!(dir.path().join("robustness.svg").exists(), i == 1, "{i}");
        assert!(!results_text(&outcome, &config).is_empty());
    }
    let report = swat_report(&parse(bare), &config, "");
    assert_eq!(report.findings, "");
    assert!(report.results.unwrap().rows[0].asr.is_none(), "nothing of nothing is not 0 %");
}

#[test]
fn the_terminal_gets_one_line_a_setting() {
    let text = results_text(&parse(outcome(&ALL)), &RunConfig::default());
    assert!(text.lines().any(|line| line.starts_with("SWAT ") && line.contains("40.0")), "{text}");
    assert!(text.lines().count() >= ALL.len());
}
