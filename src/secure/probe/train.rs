//! Training of probes: every hidden state and head, λ chosen on the validation split.

use super::control::ControlLabel;
use super::features::Features;
use super::file::FORMAT;
use super::labels::check_labels;
use super::linalg::Matrix;
use super::logistic::Design;
use super::{Head, HeadMetrics, LinearHead, Probe, ProbeLayer, ProbeMetadata};
use crate::data::{SecurityPrompt, Split};
use crate::error::{Error, Result};
use crate::options::{default_from_args, require};
use crate::progress::{Observer, Progress};
use crate::secure::eval::metrics::{Metrics, binary_cross_entropy};
use crate::secure::eval::refusal::FirstTokens;
use clap::Args;
use rayon::prelude::*;
use std::collections::{BTreeMap, BTreeSet};

/// Options of training probes.
#[derive(schemars::JsonSchema, Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize, Args)]
#[serde(default, deny_unknown_fields)]
pub struct ProbeOptions {
    /// Candidate ridge penalties λ; chosen by cross-entropy on the validation split, the larger of equals.
    #[arg(skip = vec![1e-4, 1e-3, 1e-2, 1e-1, 1.0])]
    pub lambdas: Vec<f64>,
    /// Index of the hidden state at which drift and robustness are scored; the last if not given
    #[arg(long)]
    pub metric_layer: Option<usize>,
    /// Train a head per category of harmful prompts, at the metric layer.
    #[arg(skip = true)]
    pub categories: bool,
    /// Tokens per forward pass; affects memory, not results.
    #[arg(skip = 8192usize)]
    pub batch_tokens: usize,
    /// Recorded in the probe file.
    #[arg(skip)]
    pub seed: u64,
}

default_from_args!(ProbeOptions);

impl ProbeOptions {
    /// Checks the ranges, for a model of this many layers.
    ///
    /// # Errors
    /// [`Error::Input`] names the option.
    pub fn check(&self, layers: usize) -> Result<()> {
        let valid = !self.lambdas.is_empty() && self.lambdas.iter().all(|l| l.is_finite() && *l > 0.0);
        require(valid, "probe.lambdas", format!("{:?}", self.lambdas), "at least one, all above 0")?;
        let layer = self.metric_layer.unwrap_or(layers);
        require(layer <= layers, "probe.metric_layer", layer, &format!("0 to {layers}"))
    }
}

/// Training data of probes.
#[derive(Clone, Copy)]
pub struct ProbeInput<'a> {
    /// Features of all security prompts.
    pub features: &'a Features,
    /// Their labels.
    pub labels: &'a [SecurityPrompt],
    /// Whether the model's greedy answer to each prompt refuses: labels of the head `tendency`.
    pub refused: Option<&'a [bool]>,
    /// First tokens of those answers, stored with the probe.
    pub first_tokens: Option<&'a FirstTokens>,
    /// Rule and labels of the head `control`.
    pub control: Option<(&'a ControlLabel, &'a [bool])>,
    /// [`crate::model::ModelDir::hash`].
    pub model_hash: &'a str,
    /// [`crate::secure::prompts_hash`].
    pub prompts_hash: &'a str,
}

/// Label of each prompt for a head; none = not used by it.
type Targets = Vec<Option<bool>>;

/// Fewest training prompts per class.
const MIN_PROMPTS: usize = 4;

/// Trains the probes of every hidden state; progress counts them.
///
/// # Errors
/// [`Error::Input`] names an option or size that is wrong, or the class that is missing; [`Error::Failed`] where
/// features or fits are not finite.
pub fn train_probe(input: ProbeInput<'_>, options: &ProbeOptions, observer: Observer<'_>) -> Result<Probe> {
    let features = input.features;
    let layers = check(&input, options)?;
    let metric_layer = options.metric_layer.unwrap_or(layers);
    let mut skipped = BTreeMap::new();
    let mut heads: Vec<(Head, Targets)> = Vec::new();
    for (head, targets) in targets(&input, options) {
        match too_few(&targets, input.labels) {
            None => heads.push((head, targets)),
            Some(reason) if head == Head::Harmful => return Err(Error::input("security prompts", reason, enough())),
            Some(reason) => {
                skipped.insert(head, reason);
            }
        }
    }
    let train: Vec<usize> = (0..features.prompts).filter(|i| input.labels[*i].split == Split::Train).collect();
    let mut metadata = ProbeMetadata {
        format: FORMAT.to_owned(),
        model_hash: input.model_hash.to_owned(),
        prompts_hash: input.prompts_hash.to_owned(),
        hidden: features.hidden,
        layers,
        metric_layer,
        seed: options.seed,
        date: None,
        heads: Vec::new(),
        skipped,
        control: input.control.map(|(rule, _)| rule.clone()),
        first_tokens: input.first_tokens.cloned(),
    };
    let mut probes = Vec::with_capacity(layers + 1);
    for (layer, rows) in features.layers.iter().enumerate() {
        let (mean, deviation) = moments(rows, features.hidden, &train);
        let at_layer = |head: &Head| layer == metric_layer || !matches!(head, Head::Category(_));
        let space = Space::new(rows, features.hidden, &mean, &deviation, &train);
        let fits: Vec<(Head, Fitted)> = heads
            .par_iter()
            .filter(|(head, _)| at_layer(head))
            .map(|(head, targets)| (head.clone(), space.fit(targets, input.labels, &options.lambdas)))
            .collect();
        let mut probe = ProbeLayer { mean, deviation, heads: BTreeMap::new() };
        for (head, fitted) in fits {
            if !fitted.linear.w.iter().all(|w| w.is_finite()) || !fitted.linear.b.is_finite() {
                let what = format!("the probe `{head}` of layer {layer} did not converge");
                return Err(Error::failed(what, "raise the values of λ"));
            }
            let Fitted { lambda, gradient, metrics, .. } = fitted;
            metadata.heads.push(HeadMetrics { layer, head: head.clone(), lambda, gradient, metrics });
            probe.heads.insert(head, fitted.linear);
        }
        probes.push(probe);
        observer(Progress::new("probes", layer + 1, layers + 1));
    }
    Ok(Probe { metadata, layers: probes })
}

/// Checks shapes, labels and options; returns the number of decoder layers.
fn check(input: &ProbeInput<'_>, options: &ProbeOptions) -> Result<usize> {
    let (features, n) = (input.features, input.labels.len());
    let wrong = |what: &str, found: usize| {
        Err(Error::input(format!("probe: {what}"), format!("{found}"), format!("one for each of {n} prompts")))
    };
    if features.prompts != n {
        return wrong("features", features.prompts);
    }
    if let Some(refused) = input.refused.filter(|r| r.len() != n) {
        return wrong("refused", refused.len());
    }
    if let Some((_, labels)) = input.control.filter(|(_, l)| l.len() != n) {
        return wrong("control labels", labels.len());
    }
    let whole = features.layers.iter().all(|l| l.len() == n * features.hidden);
    let Some(layers) = features.layers.len().checked_sub(1).filter(|_| whole && features.hidden > 0) else {
        return Err(Error::input("probe: features", "layers of unequal size", "[prompts, hidden] for every layer"));
    };
    check_labels(input.labels)?;
    options.check(layers)?;
    let bad = features.layers.iter().position(|l| l.iter().any(|x| !x.is_finite()));
    if let Some(layer) = bad {
        let what = format!("hidden states of layer {layer} are not finite");
        return Err(Error::failed(what, "check the model with `swat score`"));
    }
    Ok(layers)
}

/// The heads that the input allows, with their labels.
fn targets(input: &ProbeInput<'_>, options: &ProbeOptions) -> Vec<(Head, Targets)> {
    let labels = input.labels;
    let mut heads = vec![(Head::Harmful, labels.iter().map(|l| Some(l.is_harmful())).collect())];
    if let Some(refused) = input.refused {
        heads.push((Head::Tendency, refused.iter().map(|r| Some(*r)).collect()));
    }
    if let Some((_, control)) = input.control {
        heads.push((Head::Control, control.iter().map(|c| Some(*c)).collect()));
    }
    if options.categories {
        let categories: BTreeSet<&String> =
            labels.iter().filter(|l| l.is_harmful()).filter_map(|l| l.category.as_ref()).collect();
        for category in categories {
            let target = |l: &SecurityPrompt| l.category.as_ref().filter(|_| l.is_harmful()).map(|c| c == category);
            heads.push((Head::Category(category.clone()), labels.iter().map(target).collect()));
        }
    }
    heads
}

fn enough() -> String {
    format!("at least {MIN_PROMPTS} of either class in the training split")
}

fn too_few(targets: &Targets, labels: &[SecurityPrompt]) -> Option<String> {
    let count =
        |class: bool| targets.iter().zip(labels).filter(|(t, l)| l.split == Split::Train && **t == Some(class)).count();
    let (positives, negatives) = (count(true), count(false));
    (positives.min(negatives) < MIN_PROMPTS)
        .then(|| format!("{positives} positive and {negatives} negative training prompts; {}", enough()))
}

/// Mean and standard deviation over the training rows; the latter 1 for a feature that is constant up to rounding.
fn moments(rows: &[f32], hidden: usize, train: &[usize]) -> (Vec<f32>, Vec<f32>) {
    let n = train.len().max(1) as f64;
    let mut mean = vec![0.0f64; hidden];
    let mut square = vec![0.0f64; hidden];
    for row in train.iter().map(|i| &rows[i * hidden..(i + 1) * hidden]) {
        mean.iter_mut().zip(row).for_each(|(m, h)| *m += f64::from(*h) / n);
    }
    for row in train.iter().map(|i| &rows[i * hidden..(i + 1) * hidden]) {
        square.iter_mut().zip(row).zip(&mean).for_each(|((s, h), m)| *s += (f64::from(*h) - m).powi(2) / n);
    }
    let deviation = square.iter().zip(&mean).map(|(s, m)| {
        let deviation = s.sqrt();
        if deviation > 1e-6 * m.abs() && deviation > 1e-12 { deviation as f32 } else { 1.0 }
    });
    (mean.iter().map(|m| *m as f32).collect(), deviation.collect())
}

/// Standardised features of one hidden state.
struct Space {
    x: Matrix,
    train: Vec<usize>,
    /// Design of all training rows, shared by the heads that use them all.
    design: Design,
}

struct Fitted {
    linear: LinearHead,
    lambda: f64,
    gradient: f64,
    metrics: BTreeMap<Split, Metrics>,
}

impl Space {
    fn new(rows: &[f32], hidden: usize, mean: &[f32], deviation: &[f32], train: &[usize]) -> Self {
        let standard = |row: &[f32]| -> Vec<f64> {
            let parts = row.iter().zip(mean).zip(deviation);
            parts.map(|((h, m), d)| (f64::from(*h) - f64::from(*m)) / f64::from(*d)).collect()
        };
        let values: Vec<f64> = rows.chunks_exact(hidden).flat_map(standard).collect();
        let x = Matrix { rows: rows.len() / hidden, columns: hidden, values };
        let design = Design::new(rows_of(&x, train));
        Self { x, train: train.to_vec(), design }
    }

    fn fit(&self, targets: &Targets, labels: &[SecurityPrompt], lambdas: &[f64]) -> Fitted {
        let own: Vec<usize> = self.train.iter().copied().filter(|i| targets[*i].is_some()).collect();
        let y: Vec<bool> = own.iter().filter_map(|i| targets[*i]).collect();
        let partial = (own.len() < self.train.len()).then(|| Design::new(rows_of(&self.x, &own)));
        let design = partial.as_ref().unwrap_or(&self.design);
        let mut sorted = lambdas.to_vec();
        sorted.sort_by(|a, b| b.total_cmp(a));
        let logits = |w: &[f64], b: f64| -> Vec<f64> { self.x.times(w).iter().map(|z| z + b).collect() };
        let of = |split: Split, z: &[f64]| -> (Vec<f64>, Vec<bool>) {
            let rows = (0..z.len()).filter(|i| labels[*i].split == split);
            rows.filter_map(|i| targets[i].map(|t| (z[i], t))).unzip()
        };
        let mut best: Option<(f64, f64, super::logistic::Fit, Vec<f64>)> = None;
        for lambda in sorted {
            let fit = design.fit(&y, lambda);
            let z = logits(&fit.w, fit.b);
            let (valid, truth) = of(Split::Valid, &z);
            let loss = binary_cross_entropy(&valid, &truth);
            if best.as_ref().is_none_or(|(least, ..)| loss < *least) {
                best = Some((loss, lambda, fit, z));
            }
        }
        let (_, lambda, fit, z) = best.unwrap_or_else(|| {
            let fit = design.fit(&y, 1.0);
            let z = logits(&fit.w, fit.b);
            (0.0, 1.0, fit, z)
        });
        let splits = Split::ALL.into_iter();
        let metrics = splits.map(|s| (s, of(s, &z))).filter(|(_, (z, _))| !z.is_empty());
        Fitted {
            metrics: metrics.map(|(s, (z, y))| (s, Metrics::new(&z, &y))).collect(),
            linear: LinearHead { w: fit.w.iter().map(|w| *w as f32).collect(), b: fit.b as f32 },
            lambda,
            gradient: fit.gradient,
        }
    }
}

fn rows_of(x: &Matrix, rows: &[usize]) -> Matrix {
    let values = rows.iter().flat_map(|i| x.row(*i)).copied().collect();
    Matrix { rows: rows.len(), columns: x.columns, values }
}

/// Control (a): AUROC on `test` of a probe retrained on `train` with a fixed λ. Both are rows [prompts, hidden] with
/// labels, standardised by the training rows.
pub(crate) fn retrained_auroc(
    hidden: usize,
    train: (&[f32], &[bool]),
    test: (&[f32], &[bool]),
    lambda: f64,
) -> Option<f64> {
    let rows: Vec<usize> = (0..train.1.len()).collect();
    let (mean, deviation) = moments(train.0, hidden, &rows);
    let space = Space::new(train.0, hidden, &mean, &deviation, &rows);
    let fit = space.design.fit(train.1, lambda);
    let logits: Vec<f64> = test
        .0
        .chunks_exact(hidden)
        .map(|row| {
            let parts = row.iter().zip(&mean).zip(&deviation).zip(&fit.w);
            parts.map(|(((h, m), d), w)| (f64::from(*h) - f64::from(*m)) / f64::from(*d) * w).sum::<f64>() + fit.b
        })
        .collect();
    crate::secure::eval::metrics::auroc(&logits, test.1)
}
