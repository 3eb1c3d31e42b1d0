//! Drift of a tuned model's features, by the frozen probe and by geometry.

use super::features::{Features, Snapshot, output_shift};
use super::{Head, Probe};
use crate::data::{SecurityPrompt, Split};
use crate::error::{Error, Result};
use crate::secure::eval::metrics::{Metrics, ScoreKind, Scores, relative_drop};
use std::collections::BTreeMap;

/// Drift of a tuned model from the one its probe was trained on.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Drift {
    /// Index of the hidden state that is scored.
    pub metric_layer: usize,
    /// By split, for the splits with both classes.
    pub splits: BTreeMap<Split, SplitDrift>,
}

/// Drift over the prompts of one split.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SplitDrift {
    /// One entry per hidden state, layers + 1.
    pub layers: Vec<LayerDrift>,
    /// Scores of the original model, at the metric layer.
    pub base: Scores,
    /// Scores of the tuned model.
    pub tuned: Scores,
    /// R of each score that was above 0.
    pub drop: BTreeMap<ScoreKind, f64>,
}

/// Drift of one hidden state.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LayerDrift {
    /// Index of the hidden state.
    pub layer: usize,
    /// Metrics of the probe on the original model.
    pub base: Metrics,
    /// Metrics of the frozen probe on the tuned model.
    pub tuned: Metrics,
    /// Mean over prompts of ‖h′ − h‖ / ‖h‖.
    pub output_shift: f64,
    /// Cosine between both models' difference of class means, harmful minus benign; none if one is zero.
    pub direction_cosine: Option<f64>,
}

/// Compares two snapshots of the same prompts.
///
/// # Errors
/// [`Error::Input`] where snapshots, labels and probe differ in shape, or no split holds both classes.
pub fn drift(probe: &Probe, base: &Snapshot, tuned: &Snapshot, labels: &[SecurityPrompt]) -> Result<Drift> {
    for (name, features) in [("base", &base.features), ("tuned", &tuned.features)] {
        let shape = (features.prompts, features.layers.len(), features.hidden);
        let expected = (labels.len(), probe.metadata.layers + 1, probe.metadata.hidden);
        if shape != expected {
            let found = format!("(prompts, layers + 1, hidden) = {shape:?}");
            return Err(Error::input(format!("drift: {name} features"), found, format!("{expected:?}")));
        }
    }
    let metric_layer = probe.metadata.metric_layer;
    let mut splits = BTreeMap::new();
    for split in Split::ALL {
        let rows: Vec<usize> = (0..labels.len()).filter(|i| labels[*i].split == split).collect();
        let harmful: Vec<bool> = rows.iter().map(|i| labels[*i].is_harmful()).collect();
        if !harmful.contains(&true) || !harmful.contains(&false) {
            continue;
        }
        let mut layers = Vec::with_capacity(probe.layers.len());
        for layer in 0..probe.layers.len() {
            let (own, other) = (base.features.rows(layer, &rows), tuned.features.rows(layer, &rows));
            layers.push(LayerDrift {
                layer,
                base: Metrics::new(&probe.logits(layer, &Head::Harmful, &own)?, &harmful),
                tuned: Metrics::new(&probe.logits(layer, &Head::Harmful, &other)?, &harmful),
                output_shift: output_shift(&own, &other, probe.metadata.hidden),
                direction_cosine: direction_cosine(&own, &other, probe.metadata.hidden, &harmful),
            });
        }
        let scores = |snapshot: &Snapshot| -> Result<Scores> {
            let logits = probe.logits(metric_layer, &Head::Harmful, &snapshot.features.rows(metric_layer, &rows))?;
            let refusal: Option<Vec<f64>> =
                snapshot.refusal.as_ref().map(|all| rows.iter().filter_map(|i| all.get(*i).copied()).collect());
            Ok(Scores::new(&logits, refusal.as_deref(), &harmful))
        };
        let (before, after) = (scores(base)?, scores(tuned)?);
        let drop = ScoreKind::ALL
            .into_iter()
            .filter_map(|kind| Some((kind, relative_drop(before.get(kind)?, after.get(kind)?)?)))
            .collect();
        splits.insert(split, SplitDrift { layers, base: before, tuned: after, drop });
    }
    if splits.is_empty() {
        return Err(Error::input("security prompts", "no split with both classes", "harmful and benign prompts"));
    }
    Ok(Drift { metric_layer, splits })
}

impl Features {
    /// Rows of a hidden state, [rows, hidden].
    ///
    /// # Panics
    /// Where a layer or row is out of range.
    pub fn rows(&self, layer: usize, rows: &[usize]) -> Vec<f32> {
        rows.iter().flat_map(|i| &self.layers[layer][i * self.hidden..(i + 1) * self.hidden]).copied().collect()
    }
}

fn direction_cosine(base: &[f32], changed: &[f32], hidden: usize, harmful: &[bool]) -> Option<f64> {
    let direction = |rows: &[f32]| {
        let harm = harmful.iter().filter(|h| **h).count() as f64;
        let rest = harmful.len() as f64 - harm;
        let mut mean = vec![0.0; hidden];
        for (row, is_harmful) in rows.chunks_exact(hidden).zip(harmful) {
            let weight = if *is_harmful { 1.0 / harm } else { -1.0 / rest };
            mean.iter_mut().zip(row).for_each(|(m, x)| *m += weight * f64::from(*x));
        }
        mean
    };
    let (a, b) = (direction(base), direction(changed));
    let product = |x: &[f64], y: &[f64]| x.iter().zip(y).map(|(x, y)| x * y).sum::<f64>();
    let norm = (product(&a, &a) * product(&b, &b)).sqrt();
    (norm > 0.0).then(|| product(&a, &b) / norm)
}
