//! Probes on synthetic features, their file, and drift.

use crate::common;
use std::collections::BTreeMap;
use std::fs;
use swat::data::{Label, SecurityPrompt, Split};
use swat::rng::Philox;
use swat::secure::{
    ControlLabel, Features, FirstTokens, Head, Probe, ProbeInput, ProbeOptions, Snapshot, drift, train_probe,
};

const HIDDEN: usize = 12;

/// Pairs by split; harmful prompts of category `a` or `b`.
fn prompts() -> Vec<SecurityPrompt> {
    let splits = [(Split::Train, 40), (Split::Valid, 15), (Split::Test, 30), (Split::Ood, 30)];
    let mut prompts = Vec::new();
    for (split, pairs) in splits {
        for pair in 0..pairs {
            for label in [Label::Harmful, Label::Benign] {
                prompts.push(SecurityPrompt {
                    prompt: vec!["w"; 3 + pair % 4].join(" "),
                    label,
                    split,
                    pair: Some(format!("{}{pair}", split.name())),
                    category: (label == Label::Harmful).then(|| ["a", "b"][pair % 2].to_owned()),
                    place: String::new(),
                });
            }
        }
    }
    prompts
}

/// Three layers of noise. Layer l's first feature holds the label with weight `strength[l]`, the second whether the
/// pair is odd (the category of harmful prompts), the third the number of words; the last feature is constant.
fn features(prompts: &[SecurityPrompt], strength: [f64; 3], hidden: usize, seed: u64) -> Features {
    let mut draw = Philox::new(seed, 0);
    let layers = strength
        .map(|strength| {
            let mut rows = Vec::new();
            for p in prompts {
                let sign = |positive: bool| if positive { 1.0 } else { -1.0 };
                let mut row: Vec<f64> = (0..hidden).map(|_| draw.normal()).collect();
                row[0] += strength * sign(p.label == Label::Harmful);
                let pair = p.pair.as_deref().unwrap_or_default();
                row[1] += 3.0 * sign(pair.ends_with(['0', '2', '4', '6', '8']));
                row[2] += 3.0 * sign(p.prompt.split(' ').count() > 4);
                row[hidden - 1] = 7.0;
                rows.extend(row.into_iter().map(|x| x as f32 * 40.0 + 100.0));
            }
            rows
        })
        .to_vec();
    Features { prompts: prompts.len(), hidden, layers }
}

fn train(prompts: &[SecurityPrompt], features: &Features, options: &ProbeOptions) -> Probe {
    let control = ControlLabel::choose(prompts).expect("a control");
    let labels = control.labels(prompts);
    let refused: Vec<bool> = prompts.iter().map(|p| p.label == Label::Harmful).collect();
    let first = FirstTokens::learn([(5, true), (7, false), (9, true), (9, false)]).expect("both");
    let input = ProbeInput {
        features,
        labels: prompts,
        refused: Some(&refused),
        first_tokens: Some(&first),
        control: Some((&control, &labels)),
        model_hash: "model",
        prompts_hash: "prompts",
    };
    train_probe(input, options, &mut |_| {}).expect("a probe")
}

#[test]
fn probes_separate_exactly_the_informative_layers() {
    let prompts = prompts();
    // With more features than prompts, noise hides what is there, but not all of it.
    for (hidden, enough) in [(HIDDEN, 0.97), (300, 0.75)] {
        let features = features(&prompts, [0.0, 1.0, 5.0], hidden, 1);
        let probe = train(&prompts, &features, &ProbeOptions::default());
        let auroc = |layer, head: &Head, split| probe.head(layer, head).unwrap().metrics[&split].auroc.unwrap();
        assert!((auroc(0, &Head::Harmful, Split::Test) - 0.5).abs() < 0.2, "{hidden}");
        assert!(auroc(2, &Head::Harmful, Split::Test) > enough, "{hidden}");
        assert!(auroc(2, &Head::Harmful, Split::Ood) > enough);
        assert!(auroc(1, &Head::Harmful, Split::Test) < auroc(2, &Head::Harmful, Split::Test));
        if hidden == HIDDEN {
            assert!(auroc(2, &Head::Control, Split::Test) > 0.9);
            assert!(auroc(2, &Head::Category("a".into()), Split::Test) > 0.9);
        }
        assert!(probe.head(1, &Head::Category("a".into())).is_none(), "categories are read at the metric layer alone");
        assert!(probe.metadata.control.as_ref().unwrap().correlation.abs() < 1e-9);
        assert!(probe.metadata.heads.iter().all(|h| h.gradient < 1e-6));
        // Noise wants the strongest ridge, a clear label a weaker one.
        let lambda = |layer| probe.head(layer, &Head::Harmful).unwrap().lambda;
        assert!(lambda(0) > lambda(2), "{} {}", lambda(0), lambda(2));
    }
}

#[test]
fn leaking_pairs_and_bad_shapes_are_refused() {
    let mut prompts = prompts();
    let features = features(&prompts, [0.0, 1.0, 5.0], HIDDEN, 1);
    let run = |prompts: &[SecurityPrompt], features: &Features, options: &ProbeOptions| {
        let input = ProbeInput {
            features,
            labels: prompts,
            refused: None,
            first_tokens: None,
            control: None,
            model_hash: "model",
            prompts_hash: "prompts",
        };
        train_probe(input, options, &mut |_| {}).unwrap_err().to_string()
    };
    let bad = ProbeOptions { lambdas: vec![0.0], ..Default::default() };
    assert!(run(&prompts, &features, &bad).contains("probe.lambdas"));
    let bad = ProbeOptions { metric_layer: Some(3), ..Default::default() };
    assert!(run(&prompts, &features, &bad).contains("0 to 2"));
    let mut nan = features.clone();
    nan.layers[1][5] = f32::NAN;
    assert!(run(&prompts, &nan, &ProbeOptions::default()).contains("layer 1 are not finite"));
    assert!(run(&prompts[1..], &features, &ProbeOptions::default()).contains("features"));
    prompts[0].split = Split::Test;
    assert!(run(&prompts, &features, &ProbeOptions::default()).contains("pair `train0`"));
}

#[test]
fn the_file_round_trips_and_damage_is_refused() {
    let prompts = prompts();
    let features = features(&prompts, [0.0, 1.0, 5.0], HIDDEN, 1);
    let probe = train(&prompts, &features, &ProbeOptions::default());
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("probe.safetensors");
    probe.save(&path).unwrap();
    let read = Probe::load(&path).unwrap();
    assert_eq!(read, probe);
    assert_eq!(read.hash().unwrap(), probe.hash().unwrap());
    assert_eq!(train(&prompts, &features, &ProbeOptions::default()).hash().unwrap(), probe.hash().unwrap());

    let bytes = fs::read(&path).unwrap();
    let other = dir.path().join("other.safetensors");
    for cut in [0, 7, 8, 100, bytes.len() / 2, bytes.len() - 1] {
        fs::write(&other, &bytes[..cut]).unwrap();
        assert!(Probe::load(&other).is_err(), "{cut}");
    }
    // Any byte of the header may be damaged: an error or another probe, never a panic.
    let header = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    for at in (0..header).step_by(31) {
        let mut damaged = bytes.clone();
        damaged[at] ^= 0x15;
        fs::write(&other, &damaged).unwrap();
        let _ = Probe::load(&other);
    }
    let text = String::from_utf8_lossy(&bytes[..header]).into_owned();
    for (from, to) in
        [("swat.probe/1", "swat.probe/9"), ("\\\"layers\\\":2", "\\\"layers\\\":9"), ("swat.probe\"", "swat.prone\"")]
    {
        assert!(text.contains(from), "{from}");
        let mut foreign = text.replace(from, to).into_bytes();
        foreign.extend_from_slice(&bytes[header..]);
        foreign[..8].copy_from_slice(&bytes[..8]);
        fs::write(&other, &foreign).unwrap();
        assert!(Probe::load(&other).is_err(), "{from}");
    }
}

#[test]
fn other_models_are_refused() {
    let prompts = prompts();
    let features = features(&prompts, [0.0, 1.0, 5.0], HIDDEN, 1);
    let probe = train(&prompts, &features, &ProbeOptions::default());
    let mut config = common::config(2, true, false, false);
    assert!(probe.check_shape(&config).unwrap_err().to_string().contains("width 12"));
    config.hidden = HIDDEN;
    probe.check_model(&config, "model").unwrap();
    assert!(probe.check_model(&config, "another").unwrap_err().to_string().contains("another"));
    config.vocab = 9;
    assert!(probe.check_shape(&config).unwrap_err().to_string().contains("token id 9"));
}

#[test]
fn drift_detects_a_lost_direction() {
    let prompts = prompts();
    let base = features(&prompts, [0.0, 1.0, 5.0], HIDDEN, 1);
    let probe = train(&prompts, &base, &ProbeOptions::default());
    // The same noise with the label taken out of the last layer and doubled in the second.
    let tuned = features(&prompts, [0.0, 2.0, 0.0], HIDDEN, 1);
    let harmful = |p: &SecurityPrompt| p.label == Label::Harmful;
    let refusal = |high: f64| Some(prompts.iter().map(|p| if harmful(p) { high } else { -4.0 }).collect());
    let snapshot = |features: &Features, high| Snapshot { features: features.clone(), refusal: refusal(high) };
    let (before, after) = (snapshot(&base, 4.0), snapshot(&tuned, 0.0));
    let report = drift(&probe, &before, &after, &prompts).unwrap();
    let test = &report.splits[&Split::Test];
    let drop: BTreeMap<String, f64> = test.drop.iter().map(|(k, v)| (k.to_string(), *v)).collect();
    assert!(drop["gap"] > 0.9 && (drop["refusal"] - 0.5).abs() < 1e-9, "{drop:?}");
    assert!(test.layers[1].tuned.gap > test.layers[1].base.gap);
    assert!(test.layers[0].output_shift == 0.0 && test.layers[2].output_shift > 0.1);
    assert!(test.layers[1].direction_cosine.unwrap() > 0.8 && test.layers[2].direction_cosine.unwrap() < 0.6);
    let same = drift(&probe, &before, &before, &prompts).unwrap();
    assert!(same.splits.values().all(|s| s.drop.values().all(|d| *d == 0.0)));
    assert!(drift(&probe, &before, &after, &prompts[2..]).is_err());
    let text = serde_json::to_string(&report).unwrap();
    assert_eq!(serde_json::from_str::<swat::secure::Drift>(&text).unwrap().metric_layer, report.metric_layer);
}
