//! The robustness map on a small random model: against copies perturbed by hand; resuming, refusals, and the search on
//! it.

use crate::common;
use std::fs;
use std::path::Path;
use swat::backend::cpu::Cpu;
use swat::data::{Label, SecurityPrompt, Split};
use swat::engine::{Decoder, NoiseKind};
use swat::error::{Error, Result};
use swat::modules::{Cell, ModuleKind, ModuleSet};
use swat::secure::{
    ControlLabel, FirstTokens, Head, ModsRob, Noise, PerturbationScorer, Probe, ProbeInput, ProbeOptions,
    RobustnessMap, RobustnessOptions, ScoreKind, ScorerInput, ScorerOptions, SearchOptions, drift, features,
    prompts_hash, robustness, search, snapshot, train_probe,
};

/// Prompts whose last token determines the label (harmful: below 30), so that a probe separates them even on a random
/// model.
pub(crate) struct World {
    pub(crate) decoder: Decoder<Cpu>,
    pub(crate) prompts: Vec<SecurityPrompt>,
    pub(crate) tokens: Vec<Vec<u32>>,
    pub(crate) control: Vec<bool>,
    pub(crate) probe: Probe,
}

pub(crate) fn world() -> World {
    let decoder = common::decoder(common::config(3, true, true, true), 11);
    let mut next = common::numbers(5);
    let mut token = |low: u32, high: u32| low + ((next() + 1.0) * 0.5 * (high - low) as f32) as u32;
    let (mut prompts, mut tokens) = (Vec::new(), Vec::new());
    for (split, pairs) in [(Split::Train, 24), (Split::Valid, 8), (Split::Test, 10)] {
        for pair in 0..pairs {
            for label in [Label::Harmful, Label::Benign] {
                let words = 2 + pair % 4;
                let mut ids: Vec<u32> = (0..words).map(|_| token(1, 60)).collect();
                ids.push(if label == Label::Harmful { token(1, 6) } else { token(40, 45) });
                tokens.push(ids);
                prompts.push(SecurityPrompt {
                    prompt: vec!["w"; words].join(" "),
                    label,
                    split,
                    pair: Some(format!("{}{pair}", split.name())),
                    category: None,
                    place: String::new(),
                });
            }
        }
    }
    let features = features(&decoder, &tokens, 50, &mut |_| {}).unwrap();
    let control_label = ControlLabel::choose(&prompts).unwrap();
    let control = control_label.labels(&prompts);
    let first = FirstTokens::learn([(3, true), (9, false), (11, true), (11, false)]).unwrap();
    let hash = prompts_hash(&tokens, &prompts);
    let input = ProbeInput {
        features: &features,
        labels: &prompts,
        refused: None,
        first_tokens: Some(&first),
        control: Some((&control_label, &control)),
        model_hash: "model",
        prompts_hash: &hash,
    };
    let probe = train_probe(input, &ProbeOptions::default(), &mut |_| {}).unwrap();
    let auroc = probe.head(3, &Head::Harmful).unwrap().metrics[&Split::Test].auroc.unwrap();
    assert!(auroc > 0.8, "{auroc}");
    World { decoder, prompts, tokens, control, probe }
}

fn scorer<'w>(world: &'w World, kind: NoiseKind, options: ScorerOptions) -> PerturbationScorer<'w, Cpu> {
    try_proxy(world, kind, options, "model").unwrap()
}

fn try_proxy<'w>(
    w: &'w World,
    kind: NoiseKind,
    options: ScorerOptions,
    hash: &'w str,
) -> Result<PerturbationScorer<'w, Cpu>> {
    let input = ScorerInput {
        decoder: &w.decoder,
        model_hash: hash,
        probe: &w.probe,
        prompts: &w.tokens,
        labels: &w.prompts,
        control: Some(&w.control),
        kind,
    };
    PerturbationScorer::new(input, options)
}

fn small() -> ScorerOptions {
    ScorerOptions { members: 2, batch_tokens: 60, ..Default::default() }
}

fn at(epsilon: f32) -> RobustnessOptions {
    RobustnessOptions { epsilon: Some(epsilon), ..Default::default() }
}

fn close(a: f64, b: f64) -> bool {
    (a - b).abs() < 1e-3 * (1.0 + a.abs())
}

#[test]
fn scaling_agrees_with_a_model_scaled_by_hand() {
    let mut world = world();
    let options = ScorerOptions { kind: Noise::Scale, ..small() };
    let proxy_of = scorer(&world, NoiseKind::Scale, options);
    let map = robustness(&proxy_of, &at(0.5), None, &mut |_| {}).unwrap();
    assert_eq!(map.cells.len(), world.decoder.config.cells().len());
    assert_eq!((map.seeds.len(), map.antithetic), (1, true));
    let clean = proxy_of.clean();
    assert_eq!(clean.shift, 0.0);
    drop(proxy_of);

    let base =
        snapshot(&world.decoder, &world.tokens, world.probe.metadata.first_tokens.as_ref(), 1000, &mut |_| {}).unwrap();
    let cell = Cell::module(1, ModuleKind::V);
    let mut gaps = [0.0; 2];
    let mut shifts = [0.0; 2];
    for (i, factor) in [1.5f32, 0.5].into_iter().enumerate() {
        let ids: Vec<_> = world.decoder.params().iter().map(|p| p.id).filter(|id| id.cell() == cell).collect();
        let before: Vec<Vec<f32>> = ids.iter().map(|id| world.decoder.read(*id).unwrap()).collect();
        for (id, values) in ids.iter().zip(&before) {
            let scaled: Vec<f32> = values.iter().map(|v| v * factor).collect();
            world.decoder.write(*id, &scaled).unwrap();
        }
        let first = world.probe.metadata.first_tokens.as_ref();
        let tuned = snapshot(&world.decoder, &world.tokens, first, 1000, &mut |_| {}).unwrap();
        let report = drift(&world.probe, &base, &tuned, &world.prompts).unwrap();
        let test = &report.splits[&Split::Test];
        gaps[i] = test.tuned.gap;
        shifts[i] = test.layers[3].output_shift;
        assert!(
            close(test.base.gap, clean.scores.gap) && close(test.base.refusal.unwrap(), clean.scores.refusal.unwrap())
        );
        for (id, values) in ids.iter().zip(&before) {
            world.decoder.write(*id, values).unwrap();
        }
    }
    let found = map.cell(cell).unwrap();
    let mean = |v: [f64; 2]| (v[0] + v[1]) / 2.0;
    assert!(close(found.scores[&ScoreKind::Gap].mean, mean(gaps)), "{} {gaps:?}", found.scores[&ScoreKind::Gap].mean);
    assert!(close(found.shift.mean, mean(shifts)), "{} {shifts:?}", found.shift.mean);
    assert!(close(found.drop[&ScoreKind::Gap].mean, 1.0 - mean(gaps) / clean.scores.gap));
    assert_eq!(found.drop[&ScoreKind::Gap].error, None);
}

#[test]
fn stronger_noise_costs_more_and_controls_are_reported() {
    let world = world();
    let scorer = scorer(&world, NoiseKind::Gaussian, small());
    let weak = robustness(&scorer, &at(0.05), None, &mut |_| {}).unwrap();
    let strong = robustness(&scorer, &at(1.5), None, &mut |_| {}).unwrap();
    let mean = |map: &RobustnessMap| {
        map.cells.iter().map(|c| c.drop[&ScoreKind::Gap].mean).sum::<f64>() / map.cells.len() as f64
    };
    assert!(mean(&weak).abs() < 0.05 && mean(&strong) > mean(&weak), "{} {}", mean(&weak), mean(&strong));
    for cell in &strong.cells {
        assert!(cell.shift.mean > 0.0 && cell.shift.error.is_some(), "{}", cell.cell);
        assert!(cell.drop_per_shift.is_some() && cell.retrained_auroc.is_some(), "{}", cell.cell);
        assert_eq!(cell.drop_by_seed[&ScoreKind::Gap].len(), 2);
        let own = cell.drop[&ScoreKind::Gap].mean - cell.control_drop.unwrap().mean;
        assert!((cell.beyond_control.unwrap().mean - own).abs() < 1e-9);
    }
    let all: u64 = strong.cells.iter().map(|c| c.parameters).sum();
    let expected: usize = world.decoder.params().iter().map(|p| p.values.len()).sum();
    assert_eq!(all, expected as u64);
    let automatic = robustness(&scorer, &RobustnessOptions::default(), None, &mut |_| {}).unwrap();
    assert!(automatic.epsilon > 0.01 && automatic.epsilon <= 2.0);
    assert!(automatic.epsilon_sweep.windows(2).all(|p| p[0].epsilon < p[1].epsilon && p[0].drop < 0.5));
}

#[test]
fn chunking_and_grouping_change_nothing() {
    let world = world();
    let whole = ScorerOptions { members: 2, ..Default::default() };
    let tiny = ScorerOptions { batch_tokens: 7, group_bytes: 1, budget_bytes: 1, ..whole.clone() };
    let options = RobustnessOptions { cells: "layers.1 embed_tokens".into(), ..at(0.7) };
    let maps = [whole, tiny]
        .map(|o| robustness(&scorer(&world, NoiseKind::Gaussian, o), &options, None, &mut |_| {}).unwrap());
    for (a, b) in maps[0].cells.iter().zip(&maps[1].cells) {
        assert_eq!(a.cell, b.cell);
        assert!(close(a.drop[&ScoreKind::Gap].mean, b.drop[&ScoreKind::Gap].mean), "{}", a.cell);
        assert!(close(a.scores[&ScoreKind::Refusal].mean, b.scores[&ScoreKind::Refusal].mean), "{}", a.cell);
    }
}

/// Runs a map that fails after `groups` groups, as if the process were killed.
fn interrupted(world: &World, out: &Path, groups: usize) {
    let scorer = scorer(world, NoiseKind::Gaussian, ScorerOptions { group_bytes: 1, ..small() });
    let mut left = groups + 1;
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        let _ = robustness(&scorer, &at(0.7), Some(out), &mut |_| {
            left -= 1;
            assert!(left > 0, "stopped on purpose");
        });
    }));
    assert!(result.is_err());
}

#[test]
fn an_interrupted_map_is_resumed() {
    let world = world();
    let dir = tempfile::tempdir().unwrap();
    let (out, whole) = (dir.path().join("map.json"), dir.path().join("whole.json"));
    let partial = dir.path().join("map.json.partial.jsonl");
    let options = || ScorerOptions { group_bytes: 1, ..small() };
    let expected =
        robustness(&scorer(&world, NoiseKind::Gaussian, options()), &at(0.7), Some(&whole), &mut |_| {}).unwrap();
    interrupted(&world, &out, 5);
    let text = fs::read_to_string(&partial).unwrap();
    assert_eq!(text.lines().count(), 6, "a header and five groups of one cell");
    // The last line is cut off.
    fs::write(&partial, &text[..text.len() - 20]).unwrap();
    let mut first = None;
    let map = robustness(&scorer(&world, NoiseKind::Gaussian, options()), &at(0.7), Some(&out), &mut |p| {
        first.get_or_insert(p.done);
        assert_eq!(p.total, expected.cells.len());
    })
    .unwrap();
    assert_eq!(first, Some(4));
    assert!(!partial.exists());
    let same = |a: &RobustnessMap, b: &RobustnessMap| {
        RobustnessMap { seconds: 0.0, ..a.clone() } == RobustnessMap { seconds: 0.0, ..b.clone() }
    };
    assert!(same(&map, &expected));
    assert!(same(&RobustnessMap::load(&out).unwrap(), &map));

    // Another ε is another run: nothing is taken over.
    interrupted(&world, &out, 3);
    let mut first = None;
    robustness(&scorer(&world, NoiseKind::Gaussian, options()), &at(0.6), Some(&out), &mut |p| {
        first.get_or_insert(p.done);
    })
    .unwrap();
    assert_eq!(first, Some(0));
}

#[test]
fn mismatched_inputs_are_refused() {
    let world = world();
    let text = |r: Result<PerturbationScorer<'_, Cpu>>| r.err().unwrap().to_string();
    assert!(text(try_proxy(&world, NoiseKind::Gaussian, small(), "other")).contains("hash other"));
    let none = ScorerOptions { members: 0, ..small() };
    assert!(text(try_proxy(&world, NoiseKind::Gaussian, none, "model")).contains("members"));
    let ood = ScorerOptions { split: Split::Ood, ..small() };
    assert!(text(try_proxy(&world, NoiseKind::Gaussian, ood, "model")).contains("`ood`"));
    let scorer = scorer(&world, NoiseKind::Gaussian, small());
    for (options, word) in [
        (at(0.0), "epsilon"),
        (RobustnessOptions { cells: "layers.9".into(), ..at(1.0) }, "layer 9"),
        (RobustnessOptions { epsilon_target: 2.0, ..Default::default() }, "epsilon_target"),
    ] {
        let error = robustness(&scorer, &options, None, &mut |_| {}).unwrap_err();
        assert!(error.to_string().contains(word) && error.exit_code() == 2, "{error}");
    }
    assert!(serde_json::from_str::<RobustnessOptions>("{\"epsilonn\": 1}").is_err());
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("map.json");
    for content in ["", "{}", "[1]", "{\"format\":\"swat.mods_rob/1\"}"] {
        fs::write(&path, content).unwrap();
        assert!(matches!(RobustnessMap::load(&path), Err(Error::Input { .. })), "{content}");
        assert!(matches!(ModsRob::load(&path), Err(Error::Input { .. })), "{content}");
    }
}

#[test]
fn a_search_with_the_real_scorer() {
    let world = world();
    let scorer = scorer(&world, NoiseKind::Gaussian, small());
    let map = robustness(&scorer, &at(0.3), None, &mut |_| {}).unwrap();
    let options = SearchOptions { tau: 0.3, floor: 0.01, ..Default::default() };
    let joint = &mut |set: &ModuleSet, seeds: &[u64]| scorer.joint(set, options.score, map.epsilon, seeds);
    let mods = search(&map, &options, joint, &mut |p| assert!(p.done <= p.total)).unwrap();
    let set = mods.modules(&world.decoder.config.cells()).unwrap();
    assert!(!set.is_empty() && mods.share <= 0.5 && mods.joint <= 0.3);
    let again = scorer.joint(&set, options.score, map.epsilon, &map.seeds).unwrap();
    assert!((again - mods.joint).abs() < 1e-9);
    assert!(scorer.observe(&[], 0.3).unwrap().is_empty());
    assert_eq!(scorer.joint(&ModuleSet::default(), ScoreKind::Gap, 0.3, &[1]).unwrap(), 0.0);
}
