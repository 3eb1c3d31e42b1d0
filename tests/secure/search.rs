//! The search for Mods_Rob on synthetic joint scores, and named module sets.

use crate::common;
use std::collections::BTreeMap;
use swat::data::Split;
use swat::error::Error;
use swat::model::ModelConfig;
use swat::modules::{Cell, ModuleId, ModuleKind, ModuleSet};
use swat::secure::{
    By, CellRobustness, ModsRob, Noise, RobustnessMap, ScoreKind, Scores, SearchOptions, SetSpec, Stat,
    cell_parameters, random_set, search, share,
};

/// A map of four layers with cells of equal size; `drop(cell, seed)` is the R of a single cell.
fn map(seeds: &[u64], drop: impl Fn(ModuleId, u64) -> f64) -> RobustnessMap {
    let stat = |mean| Stat { mean, error: None };
    let mut cells = Vec::new();
    for layer in 0..4 {
        for kind in ModuleKind::ALL {
            let id = ModuleId { layer, kind };
            let by_seed: Vec<f64> = seeds.iter().map(|s| drop(id, *s)).collect();
            cells.push(CellRobustness {
                cell: Cell::Module(id),
                parameters: 100,
                scores: BTreeMap::new(),
                drop: BTreeMap::from([(ScoreKind::Gap, stat(by_seed.iter().sum::<f64>() / seeds.len() as f64))]),
                drop_by_seed: BTreeMap::from([(ScoreKind::Gap, by_seed)]),
                shift: stat(0.1),
                drop_per_shift: None,
                control_drop: None,
                beyond_control: None,
                retrained_auroc: None,
                task_gain: None,
            });
        }
    }
    RobustnessMap {
        made_from: None,
        format: "swat.robustness/1".into(),
        model_hash: "model".into(),
        probe_hash: "probe".into(),
        prompts_hash: "prompts".into(),
        layers: 4,
        metric_layer: 4,
        split: Split::Test,
        prompts: (10, 10),
        kind: Noise::Gaussian,
        epsilon: 1.2,
        epsilon_sweep: Vec::new(),
        seeds: seeds.to_vec(),
        antithetic: true,
        clean: Scores { gap: 5.0, refusal: None, margin: 2.0, auroc: 1.0, accuracy: 1.0 },
        clean_control_gap: None,
        clean_retrained_auroc: None,
        cells,
        seconds: 0.0,
        by: By::Noise,
        step: None,
    }
}

/// Rates by rank: the largest R is frozen, the smallest has twice the rate, the mean is 1.
#[test]
fn rates_go_by_rank() {
    let map = map(&[1], |id, _| (id.layer * 7 + id.kind as usize) as f64);
    let all: ModuleSet = map.cells.iter().map(|cell| cell.cell).collect();
    let factors = map.rates(ScoreKind::Gap).unwrap().factors(&all).unwrap();
    assert_eq!(factors.len(), 28);
    for (i, cell) in map.cells.iter().enumerate() {
        let expected = 2.0 * (27 - i) as f32 / 27.0;
        assert!((factors[&cell.cell] - expected).abs() < 1e-6, "{}: {}", cell.cell, factors[&cell.cell]);
    }
    assert!((factors.values().sum::<f32>() / 28.0 - 1.0).abs() < 1e-6);
    assert!(map.rates(ScoreKind::Margin).unwrap_err().to_string().contains("0 cells"));
}

fn modules(set: &ModuleSet) -> impl Iterator<Item = ModuleId> + '_ {
    set.iter().filter_map(|c| if let Cell::Module(m) = c { Some(m) } else { None })
}

/// A joint R that is the sum over the cells.
fn additive(drop: impl Fn(ModuleId) -> f64) -> impl Fn(&ModuleSet, &[u64]) -> swat::error::Result<f64> {
    move |set, _| Ok(modules(set).map(&drop).sum())
}

fn resolve_mods(
    text: &str,
    config: &ModelConfig,
    reference: Option<&ModuleSet>,
    model_hash: Option<&str>,
) -> swat::error::Result<ModuleSet> {
    text.parse::<SetSpec>()?.resolve(config, reference, model_hash)
}

fn parse(text: &str) -> ModuleSet {
    ModuleSet::parse(text, &common::config(4, true, false, false).cells()).unwrap()
}

#[test]
fn takes_the_most_robust_up_to_the_cap() {
    // Deeper layers and V, O are more robust.
    let drop = |m: ModuleId| {
        let kind = if matches!(m.kind, ModuleKind::V | ModuleKind::O) { 0.0 } else { 0.01 };
        kind + 0.002 * (3 - m.layer) as f64
    };
    let map = map(&[1, 2, 3], |m, _| drop(m));
    let mut joint = additive(drop);
    let options = SearchOptions { tau: 1.0, cap: 0.25, ..Default::default() };
    let mods = search(&map, &options, &mut joint, &mut |_| {}).unwrap();
    assert_eq!(mods.set, "layers.0.o_proj,layers.1-3.{v_proj,o_proj}", "deeper first, O before V, 7 of 28 cells");
    assert!((mods.share - 0.25).abs() < 1e-12);
    assert!(mods.votes.values().all(|v| *v == 3));
    let tight = SearchOptions { tau: 0.0045, cap: 0.25, swap: false, ..Default::default() };
    let mods = search(&map, &tight, &mut joint, &mut |_| {}).unwrap();
    assert_eq!(mods.set, "layers.2-3.{v_proj,o_proj}");
    assert!((mods.joint - 0.004).abs() < 1e-12);
}

#[test]
fn modules_that_are_sensitive_together_are_not_combined() {
    // Pattern C: V of layer 3 and O of layer 3 are harmless alone and ruinous together.
    let single = |m: ModuleId| 0.001 * (4 - m.layer) as f64;
    let both =
        |set: &ModuleSet| set.contains(Cell::module(3, ModuleKind::V)) && set.contains(Cell::module(3, ModuleKind::O));
    let mut joint =
        |set: &ModuleSet, _: &[u64]| Ok(modules(set).map(single).sum::<f64>() + if both(set) { 0.9 } else { 0.0 });
    let map = map(&[1], |m, _| single(m));
    let mods = search(&map, &SearchOptions::default(), &mut joint, &mut |_| {}).unwrap();
    let set = parse(&mods.set);
    assert!(!both(&set) && set.contains(Cell::module(3, ModuleKind::O)), "{}", mods.set);
    assert!(mods.steps.iter().any(|s| s.window == "layers.3.v_proj" && !s.accepted && s.joint > 0.9));
}

#[test]
fn a_swap_replaces_what_looked_robust_and_is_not() {
    // K of layer 3 looks best by itself, and costs much with anything else; the set may hold three cells.
    let looks = |m: ModuleId| match (m.layer, m.kind) {
        (3, ModuleKind::K) => 0.001,
        (3, ModuleKind::Q) => 0.002,
        (3, _) => 0.003,
        _ => 0.5,
    };
    let map = map(&[1], |m, _| looks(m));
    let mut joint = |set: &ModuleSet, _: &[u64]| {
        let trouble = set.contains(Cell::module(3, ModuleKind::K)) && set.len() > 1;
        Ok(modules(set).map(looks).sum::<f64>() + if trouble { 0.03 } else { 0.0 })
    };
    let options = SearchOptions { cap: 3.0 / 28.0, floor: 0.0, ..Default::default() };
    let without = SearchOptions { swap: false, ..options.clone() };
    let plain = search(&map, &without, &mut joint, &mut |_| {}).unwrap();
    let swapped = search(&map, &options, &mut joint, &mut |_| {}).unwrap();
    assert_eq!(plain.set, "layers.3.{q_proj,k_proj,o_proj}");
    assert!(!parse(&swapped.set).contains(Cell::module(3, ModuleKind::K)), "{}", swapped.set);
    assert!(swapped.joint < plain.joint && swapped.share >= plain.share);
    assert!(swapped.steps.iter().any(|s| s.without.as_deref() == Some("layers.3.k_proj") && s.accepted));
}

#[test]
fn windows_are_consecutive_layers_of_one_kind() {
    let drop = |m: ModuleId| 0.001 * (4 - m.layer) as f64;
    let map = map(&[1], |m, _| drop(m));
    let options = SearchOptions { window: Some(3), cap: 0.25, tau: 1.0, swap: false, ..Default::default() };
    let mods = search(&map, &options, &mut additive(drop), &mut |_| {}).unwrap();
    assert_eq!(mods.set, "layers.0.o_proj,layers.1-3.{v_proj,o_proj}");
    assert_eq!(mods.steps[0].window, "layers.1-3.o_proj");
}

#[test]
fn the_majority_over_seeds_is_checked_jointly() {
    // Seed 1 likes O and Q, seed 2 O and V, seed 3 O and V.
    let liked = |m: ModuleId, seed: u64| match m.kind {
        ModuleKind::O => true,
        ModuleKind::Q => seed == 1,
        ModuleKind::V => seed != 1,
        _ => false,
    };
    let map = map(&[1, 2, 3], |m, seed| if liked(m, seed) { 0.0 } else { 0.2 });
    let calls = std::cell::RefCell::new(Vec::new());
    let mut joint = |set: &ModuleSet, seeds: &[u64]| {
        calls.borrow_mut().push(seeds.len());
        let one = |seed: &u64| modules(set).map(|m| if liked(m, *seed) { 0.0 } else { 0.01 }).sum::<f64>();
        Ok(seeds.iter().map(one).sum::<f64>() / seeds.len() as f64)
    };
    let options = SearchOptions { tau: 0.009, ..Default::default() };
    let mods = search(&map, &options, &mut joint, &mut |_| {}).unwrap();
    // V costs seed 1 0.01 a cell, a third of that on average: two V fit under τ, the others leave.
    assert_eq!(mods.set, "layers.0-1.o_proj,layers.2-3.{v_proj,o_proj}");
    assert_eq!(mods.votes[&Cell::module(0, ModuleKind::O)], 3);
    assert_eq!(mods.votes[&Cell::module(3, ModuleKind::Q)], 1);
    assert_eq!(calls.borrow().last(), Some(&3));
    assert!(mods.steps.iter().any(|s| s.seed.is_none() && !s.accepted));
}

#[test]
fn a_set_below_the_floor_is_an_error_with_advice() {
    let map = map(&[1, 2], |_, _| 0.3);
    let error = search(&map, &SearchOptions::default(), &mut additive(|_| 0.3), &mut |_| {}).unwrap_err();
    let text = error.to_string();
    assert_eq!(error.exit_code(), 1);
    for part in ["0.0 %", "floor of 10.0 %", "0.300", "--tau", "--epsilon", "--floor"] {
        assert!(text.contains(part), "{text}");
    }
    let bad = SearchOptions { floor: 0.6, ..Default::default() };
    assert!(search(&map, &bad, &mut additive(|_| 0.0), &mut |_| {}).unwrap_err().to_string().contains("floor"));
    let refusal = SearchOptions { score: ScoreKind::Refusal, ..Default::default() };
    let error = search(&map, &refusal, &mut additive(|_| 0.0), &mut |_| {}).unwrap_err();
    assert!(error.to_string().contains("`refusal`"), "{error}");
    let broken = &mut |_: &ModuleSet, _: &[u64]| Err(Error::failed("no", "help"));
    assert!(search(&map, &SearchOptions::default(), broken, &mut |_| {}).is_err());
}

#[test]
fn edited_files_and_named_sets_are_read() {
    let config = common::config(4, true, true, false);
    let drop = |m: ModuleId| 0.001 * (4 - m.layer) as f64;
    let map = map(&[1], |m, _| drop(m));
    let mods = search(&map, &SearchOptions::default(), &mut additive(drop), &mut |_| {}).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("mods.json");
    mods.save(&path).unwrap();
    assert_eq!(ModsRob::load(&path).unwrap(), mods);
    let text = path.to_str().unwrap();
    let resolve = |text: &str, reference: Option<&ModuleSet>| resolve_mods(text, &config, reference, Some("model"));
    assert_eq!(resolve(text, None).unwrap(), parse(&mods.set));
    assert!(resolve_mods(text, &config, None, Some("another")).unwrap_err().to_string().contains("another"));
    let edited = std::fs::read_to_string(&path).unwrap().replacen(&mods.set, "layers.2-3.q", 1);
    std::fs::write(&path, &edited).unwrap();
    assert_eq!((mods.set == mods.found, ModsRob::load(&path).unwrap().set == mods.found), (true, false));
    let edited = resolve(text, None).unwrap();
    assert_eq!(edited, parse("layers.2-3.q_proj"));
    std::fs::write(&path, "{\"format\": \"swat.mods_rob/1\", \"set\": \"all\"}").unwrap();
    assert_eq!(resolve(text, None).unwrap_err().exit_code(), 2);

    assert_eq!(resolve("layers.0-1.{q,k}", None).unwrap().len(), 4);
    assert_eq!(resolve("all", None).unwrap(), config.cells());
    assert_eq!(resolve("layer0", None).unwrap(), parse("layers.0.modules"));
    let complement = resolve("complement", Some(&edited)).unwrap();
    assert_eq!(complement.union(&edited), parse("modules"));
    assert_eq!(complement.len() + edited.len(), 28);
    for wrong in ["complement", "random:x", "random:-1", "nonsense", "missing.json", "layers.9"] {
        assert!(resolve(wrong, None).is_err(), "{wrong}");
    }
}

#[test]
fn random_sets_match_a_size() {
    let config = common::config(4, true, true, false);
    let parameters = cell_parameters(&config);
    let reference = parse("layers.2-3.{gate,v}");
    let wanted = share(&reference, &parameters);
    let smallest = 1.0 / 28.0;
    let mut seen = std::collections::BTreeSet::new();
    for seed in 0..20 {
        let text = format!("random:{seed}");
        let set = resolve_mods(&text, &config, Some(&reference), None).unwrap();
        assert_eq!(set, resolve_mods(&text, &config, Some(&reference), None).unwrap());
        assert!((share(&set, &parameters) - wanted).abs() < smallest, "{set}");
        seen.insert(set.to_string());
        let without = resolve_mods(&format!("random-without-layer0:{seed}"), &config, Some(&reference), None).unwrap();
        assert!(without.iter().all(|c| c.layer() != Some(0)));
        assert!((share(&without, &parameters) - wanted).abs() < smallest, "{without}");
    }
    assert!(seen.len() > 15);
    assert!((share(&random_set(&parameters, 0.5, 3, |_| true), &parameters) - 0.5).abs() < smallest);
    assert_eq!(random_set(&parameters, 1.0, 3, |_| true), parse("modules"));
}

#[test]
fn a_conflict_map_is_searched_by_cost_per_gain() {
    // q costs the least and teaches next to nothing; o costs more and teaches most for it.
    let of = |kind| match kind {
        ModuleKind::Q => (0.001, 0.001),
        ModuleKind::O => (0.004, 0.2),
        ModuleKind::Up => (0.002, -0.1),
        _ => (0.01, 0.1),
    };
    let mut map = map(&[0], |_, _| 0.0);
    map.by = By::Conflict;
    for cell in &mut map.cells {
        let Cell::Module(module) = cell.cell else { continue };
        let (cost, gain) = of(module.kind);
        cell.drop = BTreeMap::from([(ScoreKind::Refusal, Stat { mean: cost, error: None })]);
        cell.drop_by_seed = BTreeMap::from([(ScoreKind::Refusal, vec![cost])]);
        cell.task_gain = Some(gain);
    }
    let options = SearchOptions { cap: 0.15, swap: false, ..Default::default() };
    let found = search(&map, &options, &mut |set, _| map.first_order(set), &mut |_| {}).unwrap();
    // Costs per gain: o 0.02, q 1, up none, the others 0.1.
    assert_eq!((found.set.as_str(), found.score, found.by), ("layers.0-3.o_proj", ScoreKind::Refusal, By::Conflict));
    assert!((found.joint - 0.016).abs() < 1e-12);
    let first = found.steps.iter().filter(|step| step.seed.is_some()).map(|step| step.window.as_str());
    assert_eq!(first.take(4).collect::<Vec<_>>(), [3, 2, 1, 0].map(|layer| format!("layers.{layer}.o_proj")));
    let missing = map.first_order(&parse("embed_tokens")).unwrap_err().to_string();
    assert!(missing.contains("embed_tokens"), "{missing}");
}
