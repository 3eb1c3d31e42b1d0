//! The security-feature classifier: linear probes p = σ(w·h + b) on standardised hidden states (paper, section on the
//! security feature space). Once trained it is frozen, its mean and deviation included, and reads any changed model.

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
use crate::model::ModelConfig;
use crate::secure::eval::metrics::Metrics;
use crate::secure::eval::refusal::FirstTokens;
use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

/// What a probe tells apart.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Head {
    /// Harmful from benign prompts.
    Harmful,
    /// Prompts that the model refuses from prompts that it answers, by its own greedy answers.
    Tendency,
    /// The non-security label of control (c).
    Control,
    /// One category of harmful prompts from the others.
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

impl serde::Serialize for Head {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> serde::Deserialize<'de> for Head {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let text = String::deserialize(d)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// How one head of one layer was fitted and how well it does.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HeadMetrics {
    /// Index of the hidden state, 0 = the embedding's output.
    pub layer: usize,
    /// What it tells apart.
    pub head: Head,
    /// The ridge, chosen on the validation split.
    pub lambda: f64,
    /// Norm of the gradient at the fit relative to the one at w = 0; about 1e-8 when the minimum was found.
    pub gradient: f64,
    /// Per split that holds prompts of this head.
    pub metrics: BTreeMap<Split, Metrics>,
}

/// Everything about a probe but its numbers: the metadata of `probe.safetensors`.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ProbeAbout {
    /// `swat.probe/1`.
    pub format: String,
    /// Hash of the model that it was trained on.
    pub model_hash: String,
    /// Hash of the prompts that it was trained on.
    pub prompts_hash: String,
    /// Width of the hidden states.
    pub hidden: usize,
    /// Decoder layers; there is one probe more.
    pub layers: usize,
    /// The layer whose probe scores drift and robustness.
    pub metric_layer: usize,
    /// Seed of the run that made the prompts' split and the answers.
    pub seed: u64,
    /// One entry a layer and head.
    pub heads: Vec<HeadMetrics>,
    /// Heads that were asked for and left out, with the reason.
    pub skipped: BTreeMap<Head, String>,
    /// The rule behind [`Head::Control`].
    pub control: Option<ControlLabel>,
    /// First tokens of the model's own refusals and compliances.
    pub first_tokens: Option<FirstTokens>,
}

/// A direction and a threshold in standardised features.
#[derive(Clone, Debug, PartialEq)]
pub struct LinearHead {
    /// \[hidden\]
    pub w: Vec<f32>,
    /// Bias.
    pub b: f32,
}

/// The probes of one layer.
#[derive(Clone, Debug, PartialEq)]
pub struct ProbeLayer {
    /// Of the training prompts on the unperturbed model, \[hidden\].
    pub mean: Vec<f32>,
    /// Likewise; 1 where a feature does not vary.
    pub deviation: Vec<f32>,
    /// The directions.
    pub heads: BTreeMap<Head, LinearHead>,
}

/// Frozen probes of every layer.
#[derive(Clone, Debug, PartialEq)]
pub struct Probe {
    /// What they are.
    pub about: ProbeAbout,
    /// layers + 1 of them.
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
        let hidden = self.about.hidden;
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

    /// The fit of a head.
    pub fn head(&self, layer: usize, head: &Head) -> Option<&HeadMetrics> {
        self.about.heads.iter().find(|h| h.layer == layer && h.head == *head)
    }

    /// Refuses a model of another shape: a probe reads any change of the weights that it was trained on, nothing else.
    ///
    /// # Errors
    /// [`Error::Input`] names what differs.
    pub fn check_shape(&self, config: &ModelConfig) -> Result<()> {
        let (hidden, layers) = (self.about.hidden, self.about.layers);
        if (hidden, layers) != (config.hidden, config.layers) {
            let found = format!("a model of {} layers and width {}", config.layers, config.hidden);
            return Err(Error::input("probe", found, format!("{layers} layers and width {hidden}, as it was trained")));
        }
        match &self.about.first_tokens {
            Some(first) => first.check(Some(config.vocab), "probe"),
            None => Ok(()),
        }
    }

    /// Refuses any model but the one that it was trained on.
    ///
    /// # Errors
    /// [`Error::Input`] names what differs.
    pub fn check_model(&self, config: &ModelConfig, model_hash: &str) -> Result<()> {
        self.check_shape(config)?;
        if self.about.model_hash != model_hash {
            let found = format!("a model with hash {model_hash}");
            let expected = format!("the one it was trained on, {}; train a probe of this model", self.about.model_hash);
            return Err(Error::input("probe", found, expected));
        }
        Ok(())
    }
}
