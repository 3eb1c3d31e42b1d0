//! The files of a study's outcome: their contents, and that missing parts are left out.

use crate::xml::check_xml;
use serde_json::{Value, json};
use swat::modules::{Cell, ModuleKind, ModuleSet};
use swat::report::page::Section;
use swat::report::{Report, results_text, robustness_map, study_report, write_report};
use swat::secure::study::{Outcome, RunConfig};
use swat::secure::{Rate, RobustnessMap, ScoreKind};

pub(crate) fn rate(hits: usize, total: usize) -> Value {
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

/// Turns an outcome into that of another training seed: its gap falls to `gap`, its weights move `factor` times as far.
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

/// Outcomes with two training seeds for each setting.
pub(crate) fn two_seeds() -> Value {
    let mut value =
        outcome(&[("given", 2, 40), ("plain-equal", 80, 180), ("swat", 40, 188), ("warmup:random:1", 50, 188)]);
    another_seed(&mut value["settings"][1], 8, 60, 190, 2.0, 2.0);
    another_seed(&mut value["settings"][2], 8, 50, 190, 2.0, 2.0);
    another_seed(&mut value["settings"][3], 8, 70, 190, 2.0, 2.0);
    value
}

/// A cell of the map in which the gap drops by an eighth.
fn map_cell(cell: String) -> Value {
    json!({ "cell": cell, "parameters": 100, "scores": {}, "drop": { "gap": stat(0.125) }, "drop_by_seed": {},
        "shift": stat(0.5), "drop_per_shift": stat(0.25), "control_drop": stat(0.1), "beyond_control": stat(0.025),
        "retrained_auroc": null })
}

pub(crate) fn outcome(settings: &[(&str, usize, usize)]) -> Value {
    let cells = (0..2).flat_map(|layer| ModuleKind::ALL.map(|kind| map_cell(cell(layer, kind))));
    let cells: Vec<Value> = cells.collect();
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

pub(crate) fn parse(value: Value) -> Outcome {
    serde_json::from_value(value).unwrap()
}

pub(crate) const ALL: [(&str, usize, usize); 8] = [
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
    let names = ["original", "plain, equal steps", "SWAT", "random set 1", "complement", "ML-LR, the rest × 0.001"];
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
    let kept: Outcome = serde_json::from_str(&read("outcome.json")).unwrap();
    assert_eq!((kept.settings.len(), kept.mods, kept.title), (ALL.len(), outcome.mods, outcome.title));
}

pub(crate) fn report(outcome: Value) -> Report {
    study_report(&parse(outcome), &RunConfig::default(), "")
}

fn results(report: &Report) -> &Section {
    report.sections.iter().find(|section| section.heading == "Results").expect("results")
}

/// The paragraphs of findings.
fn findings(report: &Report) -> &str {
    let compared = report.sections.iter().find(|section| section.heading == "Comparisons");
    compared.map_or("", |section| &section.text)
}

pub(crate) fn figure<'a>(report: &'a Report, name: &str) -> &'a str {
    let found = report.sections.iter().flat_map(|s| &s.figures).find(|figure| figure.name == name);
    &found.unwrap_or_else(|| panic!("no figure {name}")).svg
}

#[test]
fn figures_show_the_measurements() {
    let report = report(outcome(&ALL));
    let names: Vec<&str> = report.sections.iter().flat_map(|s| &s.figures).map(|f| f.name.as_str()).collect();
    let expected = [
        "front",
        "front-refusal",
        "results",
        "sets",
        "robustness",
        "mods",
        "updates",
        "drift-probe",
        "drift-refusal",
        "loss",
    ];
    assert_eq!(names, expected);
    for figure in report.sections.iter().flat_map(|s| &s.figures) {
        check_xml(&figure.svg).unwrap_or_else(|e| panic!("{}: {e}", figure.name));
    }
    let holds = |name: &str, tooltip: &str| {
        let svg = figure(&report, name);
        assert!(svg.contains(&format!("<title>{tooltip}</title>")), "{name}: {tooltip}: {svg}");
    };
    holds("results", "SWAT, ASR: 40.00 (30.94–49.80)");
    holds("results", "SWAT, task score: 94.00 (89.81–96.53)");
    holds("sets", "complement: 0.04000, 30.00 (21.89–39.58)");
    holds("robustness", "layer 1, v: 0.125 ± 0.010 · in Mods_Rob");
    // Two searches: one chose the output projection of layer 0, both the values of layer 1.
    holds("mods", "layer 0, o: 0.500");
    holds("mods", "layer 1, v: 1.00 · in the set");
    holds("mods", "layer 0, q: 0");
    // Two phases of 4 of 10 each: √(16 + 16) / 10; the embedding is no projection.
    holds("updates", "1, in Mods_Rob: 56.57");
    holds("updates", "0, the rest: 42.43");
    // The probe's gap went from 4 to 1 within the first epoch, the refusal log-odds from 8 to 2.
    holds("drift-probe", "SWAT, epoch 1: 0.2500");
    holds("drift-refusal", "SWAT, epoch 1: 2.000");
    holds("loss", "SWAT, step 2: 1.500");
    // Warm-ups alone, on the same data, each kind with its colour.
    assert!(figure(&report, "sets").contains("Scatter plot of 3 points"));
    for (name, color) in [("Mods_Rob", "blue"), ("random sets", "green"), ("complement", "pink")] {
        let legend = figure(&report, "sets").split_once(&format!(">{name}</text>")).expect(name).0;
        let marker = legend.rsplit_once(" s-paper\"").expect(name).0;
        assert!(marker.ends_with(&format!("class=\"f-{color}")), "{name}: {marker}");
    }
    let tones: Vec<String> = report.highlights.iter().map(|h| format!("{} {:?}", h.label, h.tone)).collect();
    assert_eq!(
        tones,
        [
            "Verdict Green",
            "original Grey",
            "plain Vermilion",
            "plain, equal steps Amber",
            "SWAT Blue",
            "plain, equal steps + 10 % refusals Sky"
        ]
    );
}

#[test]
fn findings_agree_with_the_numbers() {
    let found = |settings: &[(&str, usize, usize)]| findings(&report(outcome(settings))).to_owned();
    let all = found(&ALL);
    for text in [
        "SWAT against plain, equal steps: Attack success is 50.0 points lower; the intervals do not overlap.",
        "Over-refusal is the same. The task score is 1.0 points lower; the intervals overlap.",
        "Warm-ups on other sets, by attack success: SWAT is lower than 1 of these 2, and no better than: complement.",
        "Variants of the schedule, by attack success: SWAT is lower than ML-LR, the rest × 0.001.",
        "plain, equal steps + 10 % refusals against SWAT: Attack success is 39.0 points lower; the intervals do not",
        "Each setting was trained once (seed 7).",
    ] {
        assert!(all.contains(text), "{text} in {all}");
    }
    // The values themselves are in the table.
    assert!(!all.contains("no better than plain") && !all.contains("40.0 %"), "{all}");
    let worse = found(&[("given", 2, 40), ("plain", 50, 190), ("swat", 53, 190)]);
    for text in [
        "SWAT against plain: Attack success is 3.0 points higher; the intervals overlap.",
        "The task score is the same.",
        "SWAT is no better than plain.",
        "The two differ in length: SWAT takes more steps.",
    ] {
        assert!(worse.contains(text), "{text} in {worse}");
    }
    // An attack is compared with an attack.
    let attack = found(&[("plain-equal", 10, 190), ("plain-equal+attack", 90, 190), ("swat+attack", 40, 190)]);
    let pair = "SWAT + 10 % attack against plain, equal steps + 10 % attack: Attack success is 50.0 points lower";
    assert!(attack.contains(pair), "{attack}");
    // Without SWAT nothing is compared.
    let none = found(&[("given", 2, 40), ("plain", 50, 190)]);
    assert_eq!(none.split("\n\n").count(), 1, "{none}");
    assert!(none.starts_with("Each setting was trained once"), "{none}");
}

#[test]
fn several_seeds_give_means_with_ranges() {
    let report = report(two_seeds());
    let row = |text: &str| {
        let rows = results(&report).tables[0].markdown();
        assert!(rows.contains(text), "{text} in {rows}");
    };
    row("| SWAT | 45.0 (40.0–50.0) |");
    row("| 8 | – | 7, 8 |");
    // One value, of prompts and not of seeds.
    row("| original | 2.0 |");
    row("In brackets: the lowest and the highest of them");
    assert!(!results(&report).tables[0].markdown().contains("Wilson"));
    let holds = |name: &str, text: &str| {
        let svg = figure(&report, name);
        assert!(svg.contains(text), "{text} in {svg}");
    };
    // From 4 to 1 and to 2.
    holds("drift-probe", "<title>SWAT, epoch 1: 0.3750 (0.2500–0.5000)</title>");
    holds("drift-probe", "means over training seeds 7, 8");
    // The only step that both have.
    holds("loss", "<title>SWAT, step 1: 4.000</title>");
    assert!(!figure(&report, "loss").contains("step 2") && !figure(&report, "loss").contains("step 3"));
    holds("updates", "<title>1, in Mods_Rob: 84.85</title>");
    assert_eq!(report.footer.items[1], ("Seeds, training".to_owned(), "7, 8".to_owned()));
    assert!(report.subtitle.ends_with("Tuned with training seeds 7, 8."), "{}", report.subtitle);
}

#[test]
fn findings_of_several_seeds_compare_ranges() {
    let report_of_two = report(two_seeds());
    let found = findings(&report_of_two);
    for text in [
        "SWAT against plain, equal steps: Attack success is 25.0 points lower; the ranges over training seeds do not \
         overlap.",
        "SWAT is lower than random set 1.",
        "Each setting was trained with 2 seeds (7, 8).",
        "one comparison of 3",
    ] {
        assert!(found.contains(text), "{text} in {found}");
    }
    for text in ["interval", "95 %", "trained once"] {
        assert!(!found.contains(text), "{text} in {found}");
    }
    // Equal means of other values.
    let mut value = two_seeds();
    another_seed(&mut value["settings"][1], 8, 10, 190, 2.0, 2.0);
    let report_of_equals = report(value);
    let found = findings(&report_of_equals);
    let equal = "SWAT against plain, equal steps: Attack success is the same.";
    assert!(found.contains(equal) && found.contains("SWAT is no better than plain, equal steps."), "{found}");
}

/// Each measure of the answers has a heading of its own, also where no pointer shows what the column is.
#[test]
fn judges_have_columns_of_their_own() {
    let mut value = two_seeds();
    let mut judge = |setting: usize, score: f64| {
        let evaluation = &mut value["settings"][setting]["evaluation"];
        evaluation["asr_coherent"] = rate(20, 100);
        evaluation["harmfulness"] = json!({ "mean": score, "scored": 90, "unscored": 10 });
        let verdicts = "1".repeat(30) + &"0".repeat(60) + "----------";
        evaluation["guard"] = json!({ "asr": rate(30, 90), "unscored": 10, "verdicts": verdicts });
        if let Some(run) = value["settings"][setting].get_mut("more_seeds") {
            run[0]["evaluation"]["asr_coherent"] = rate(40, 100);
            run[0]["evaluation"]["harmfulness"] = json!({ "mean": 3.0, "scored": 100, "unscored": 0 });
        }
    };
    judge(0, 1.25);
    judge(1, 4.0);
    let dir = tempfile::tempdir().unwrap();
    write_report(&parse(value), &RunConfig::default(), "swat run study.toml", dir.path()).unwrap();
    let results = std::fs::read_to_string(dir.path().join("results.md")).unwrap();
    let headings = "| Setting | ASR % | Coherent ASR % | Empty % | Incoherent % | Cut off % | Guard ASR % | Cohen's κ | \
                    Harmfulness |";
    assert!(results.contains(headings), "{results}");
    let row = |name: &str| {
        let rows = results.lines().filter(|line| line.starts_with(&format!("| {name} | ")));
        rows.map(|line| line.split(" | ").map(|cell| cell.trim_matches(['|', ' '])).collect::<Vec<_>>())
            .find(|cells| cells.len() == 9)
            .unwrap_or_else(|| panic!("{results}"))
    };
    assert_eq!(row("original")[8], "1.25");
    // Means of both seeds with their range; the second has no guard model.
    assert_eq!((row("plain, equal steps")[2], row("plain, equal steps")[6]), ("30.0 (20.0–40.0)", "–"));
    assert_eq!(row("plain, equal steps")[8], "3.50 (3.00–4.00)");
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
        "| tuning: SWAT, 2 runs | 25.0 s | 16 |",
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
    let report = report(bare);
    assert_eq!(findings(&report), "");
    let table = results(&report).tables[0].markdown();
    assert!(table.contains("| original | – |"), "nothing of nothing is not 0 %: {table}");
}

#[test]
fn the_terminal_gets_one_line_a_setting() {
    let text = results_text(&parse(outcome(&ALL)), &RunConfig::default());
    assert!(text.lines().any(|line| line.starts_with("SWAT ") && line.contains("40.0")), "{text}");
    assert!(text.lines().count() >= ALL.len());
}

#[test]
fn a_deep_model_fits() {
    let mut value = outcome(&ALL);
    let mut cells = vec!["embed_tokens".to_owned(), "norm".into(), "lm_head".into()];
    for layer in 0..80 {
        cells.extend(ModuleKind::ALL.iter().filter(|k| layer != 41 || k.in_attention()).map(|k| cell(layer, *k)));
        cells.push(format!("layers.{layer}.norms"));
    }
    value["map"]["layers"] = json!(80);
    value["map"]["cells"] = cells.into_iter().map(map_cell).collect();
    let outcome = parse(value);
    let map = robustness_map(outcome.map.as_ref().unwrap(), ScoreKind::Gap, &ModuleSet::default());
    assert_eq!((map.rows.len(), map.columns.len()), (83, 8));
    let wide: Vec<usize> = (0..83).filter(|row| map.rows[*row].tiles.len() == 1).collect();
    assert_eq!(wide, [0, 81, 82]);
    let svg = map.svg();
    check_xml(&svg).unwrap();
    for text in ["layer 41, gate: no value", "layer 41, norms: 0.125", ">embed<", ">final norm<"] {
        assert!(svg.contains(text), "{text}");
    }
    for figure in study_report(&outcome, &RunConfig::default(), "").sections.iter().flat_map(|s| &s.figures) {
        check_xml(&figure.svg).unwrap_or_else(|e| panic!("{}: {e}", figure.name));
    }
}

#[test]
fn a_layer_index_from_a_file_does_not_size_the_map() {
    let mut value = outcome(&[])["map"].take();
    value["cells"] = [3, usize::MAX].map(|layer| map_cell(cell(layer, ModuleKind::Q))).into_iter().collect();
    let map: RobustnessMap = serde_json::from_value(value).unwrap();
    let rows = robustness_map(&map, ScoreKind::Gap, &ModuleSet::default()).rows;
    assert_eq!(rows.into_iter().map(|row| row.name).collect::<Vec<_>>(), ["3".to_owned(), usize::MAX.to_string()]);
}

#[test]
fn hostile_names_are_escaped() {
    let hostile = "</script><svg onload='alert(1)'>\u{0}\u{202e}&";
    let mut value = outcome(&ALL);
    value["title"] = json!(hostile);
    value["model_hash"] = json!(hostile);
    value["map"]["kind"] = json!(format!("update:{hostile}"));
    value["settings"][4]["setting"] = json!(format!("warmup:{hostile} with a name that is too long for any column"));
    let report = study_report(&parse(value), &RunConfig::default(), hostile);
    for figure in report.sections.iter().flat_map(|s| &s.figures) {
        check_xml(&figure.svg).unwrap_or_else(|e| panic!("{}: {e}", figure.name));
    }
    let html = report.html().unwrap();
    assert_eq!((html.matches("</script").count(), html.matches("<svg").count()), (1, html.matches("</svg>").count()));
    assert!(html.contains("warm-up on &lt;/script&gt;") && !html.contains(['\u{0}', '\u{202e}']));
}

#[test]
fn an_outcome_of_an_unknown_setting_is_refused() {
    let mut value = outcome(&ALL);
    value["settings"][3]["setting"] = json!("swot");
    let error = serde_json::from_value::<Outcome>(value).unwrap_err().to_string();
    assert!(error.contains("`swot`") && error.contains("plain-equal"), "{error}");
}
