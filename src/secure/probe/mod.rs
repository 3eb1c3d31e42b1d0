//! Security-feature classifiers: linear probes p = σ(w·h + b) on standardised hidden states (paper, section 3). A
//! trained probe is frozen, its mean and deviation included, and applied to changed models.

pub(crate) mod control;
pub(crate) mod drift;
pub(crate) mod features;
pub(crate) mod file;
pub(crate) mod labels;
pub(crate) mod linalg;
pub(crate) mod logistic;
pub(crate) mod train;

use self::control::ControlLabel;
use crate::data::Split;
use crate::error::{Error, Result};
use crate::model::{Clock, ModelConfig};
use crate::options::serde_as_text;
use crate::secure::eval::metrics::Metrics;
use crate::secure::eval::refusal::FirstTokens;
use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

/// Label that a linear head of a probe predicts.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Head {
    /// Harmful against benign prompts.
    Harmful,
    /// Refused against answered prompts, by the model's own greedy answers.
    Tendency,
    /// Label unrelated to security: control (c).
    Control,
    /// One category of harmful prompts against the others.
    Category(String),
}

impl fmt::Display for Head {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Harmful => f.write_str("harmful"),
            Self::Tendency => f.write_str("tendency"),
            Self::Control => f.write_str("control"),
            Self::Category(name) => write!(f, "category:{name}"),
        }
    }
}

impl FromStr for Head {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "harmful" => Ok(Self::Harmful),
            "tendency" => Ok(Self::Tendency),
            "control" => Ok(Self::Control),
            _ => match text.strip_prefix("category:") {
                Some(name) => Ok(Self::Category(name.to_owned())),
                None => Err("expected harmful, tendency, control or category:NAME".to_owned()),
            },
        }
    }
}

serde_as_text!(Head);

/// Fit and quality of one head at one layer.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HeadMetrics {
    /// Index of the hidden state, 0 = the embedding's output.
    pub layer: usize,
    /// The head.
    pub head: Head,
    /// Ridge penalty, chosen on the validation split.
    pub lambda: f64,
    /// Gradient norm at the fit relative to w = 0; about 1e-8 at the minimum.
    pub gradient: f64,
    /// Metrics by split, for the splits with prompts of this head.
    pub metrics: BTreeMap<Split, Metrics>,
}

/// Metadata of a probe, stored in `probe.safetensors`.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ProbeMetadata {
    /// `swat.probe/1`.
    pub format: String,
    /// Hash of the model it was trained on.
    pub model_hash: String,
    /// Hash of the prompts it was trained on.
    pub prompts_hash: String,
    /// Width of the hidden states.
    pub hidden: usize,
    /// Number of decoder layers L; there are L + 1 probes.
    pub layers: usize,
    /// Index of the hidden state at which drift and robustness are scored.
    pub metric_layer: usize,
    /// Seed of the prompts' splits and of the answers.
    pub seed: u64,
    /// The time at which the chat template was rendered, if it writes the date.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub date: Option<Clock>,
    /// One entry per layer and head.
    pub heads: Vec<HeadMetrics>,
    /// Heads that were not trained, with the reason.
    pub skipped: BTreeMap<Head, String>,
    /// Rule of [`Head::Control`].
    pub control: Option<ControlLabel>,
    /// First tokens of the model's own refusals and other answers.
    pub first_tokens: Option<FirstTokens>,
}

/// Weights of a linear head on standardised features.
#[derive(Clone, Debug, PartialEq)]
pub struct LinearHead {
    /// Direction, \[hidden\].
    pub w: Vec<f32>,
    /// Bias.
    pub b: f32,
}

/// The probes of one layer.
#[derive(Clone, Debug, PartialEq)]
pub struct ProbeLayer {
    /// Feature means over the training prompts, \[hidden\].
    pub mean: Vec<f32>,
    /// Standard deviations likewise; 1 for a constant feature.
    pub deviation: Vec<f32>,
    /// Linear heads.
    pub heads: BTreeMap<Head, LinearHead>,
}

/// Probes of every hidden state of a model.
#[derive(Clone, Debug, PartialEq)]
pub struct Probe {
    /// Metadata.
    pub metadata: ProbeMetadata,
    /// One per hidden state, layers + 1.
    pub layers: Vec<ProbeLayer>,
}

impl Probe {
    /// Logits of one head for `features` [prompts, hidden] of a layer: w·(h − mean)/deviation + b, in f64.
    ///
    /// # Errors
    /// [`Error::Input`] where the layer has no such head, or rows of another width.
    pub fn logits(&self, layer: usize, head: &Head, features: &[f32]) -> Result<Vec<f64>> {
        let missing = || {
            let found = format!("no head `{head}` at layer {layer}");
            Error::input("probe", found, "a probe trained with that head, on a model with that layer")
        };
        let probe = self.layers.get(layer).ok_or_else(missing)?;
        let head = probe.heads.get(head).ok_or_else(missing)?;
        let hidden = self.metadata.hidden;
        if hidden == 0 || !features.len().is_multiple_of(hidden) {
            let found = format!("{} feature values", features.len());
            return Err(Error::input("probe", found, format!("rows of {hidden}, the width it was trained on")));
        }
        let weights: Vec<f64> =
            head.w.iter().zip(&probe.deviation).map(|(w, d)| f64::from(*w) / f64::from(*d)).collect();
        let offset: f64 = weights.iter().zip(&probe.mean).map(|(w, m)| w * f64::from(*m)).sum();
        let bias = f64::from(head.b) - offset;
        let logit = |row: &[f32]| row.iter().zip(&weights).map(|(h, w)| f64::from(*h) * w).sum::<f64>() + bias;
        Ok(features.chunks_exact(hidden).map(logit).collect())
    }

    /// Fit and metrics of a head.
    pub fn head(&self, layer: usize, head: &Head) -> Option<&HeadMetrics> {
        self.metadata.heads.iter().find(|h| h.layer == layer && h.head == *head)
    }

    /// Checks that the model has the shape of the one the probe was trained on, whatever its weights.
    ///
    /// # Errors
    /// [`Error::Input`] names what differs.
    pub fn check_shape(&self, config: &ModelConfig) -> Result<()> {
        let (hidden, layers) = (self.metadata.hidden, self.metadata.layers);
        if (hidden, layers) != (config.hidden, config.layers) {
            let found = format!("a model of {} layers and width {}", config.layers, config.hidden);
            return Err(Error::input("probe", found, format!("{layers} layers and width {hidden}, as it was trained")));
        }
        match &self.metadata.first_tokens {
            Some(first) => first.check(Some(config.vocab), "probe"),
            None => Ok(()),
        }
    }

    /// Checks that the model is the one the probe was trained on.
    ///
    /// # Errors
    /// [`Error::Input`] names what differs.
    pub fn check_model(&self, config: &ModelConfig, model_hash: &str) -> Result<()> {
        self.check_shape(config)?;
        if self.metadata.model_hash != model_hash {
            let found = format!("a model with hash {model_hash}");
            let expected =
                format!("the one it was trained on, {}; train a probe of this model", self.metadata.model_hash);
            return Err(Error::input("probe", found, expected));
        }
        Ok(())
    }
}
