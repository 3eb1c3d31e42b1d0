//! `probe.safetensors`: `layers.L.mean`, `layers.L.deviation` and, for head number I of that layer in the order of the
//! metadata, `layers.L.heads.I.w` and `.b`, all f32. The metadata entry `swat.probe` holds [`ProbeAbout`] as JSON.

use super::{Head, LinearHead, Probe, ProbeAbout, ProbeLayer};
use crate::error::{Error, Result};
use crate::io::json::check_format;
use crate::io::safetensors::{Dtype, Safetensors};
use crate::io::write_atomic;
use safetensors::tensor::{TensorView, serialize};
use std::collections::{BTreeMap, HashMap};
use std::path::Path;

pub(crate) const FORMAT: &str = "swat.probe/1";
const KEY: &str = "swat.probe";
/// Upper bound on the layers of a model.
const MAX_LAYERS: usize = 4096;

impl Probe {
    /// Writes the file atomically.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn save(&self, path: &Path) -> Result<()> {
        write_atomic(path, &self.to_bytes()?)
    }

    /// blake3 of the file's bytes.
    ///
    /// # Errors
    /// [`Error::Failed`] where the probe cannot be serialized, which would be a bug.
    pub fn hash(&self) -> Result<String> {
        Ok(blake3::hash(&self.to_bytes()?).to_hex().to_string())
    }

    fn to_bytes(&self) -> Result<Vec<u8>> {
        let bad = |e: &dyn std::fmt::Display| {
            Error::failed(format!("cannot write the probe: {e}"), "this is a bug; please report it")
        };
        let mut tensors: Vec<(String, Vec<usize>, Vec<u8>)> = Vec::new();
        let mut push = |name: String, shape: Vec<usize>, values: &[f32]| {
            tensors.push((name, shape, values.iter().flat_map(|v| v.to_le_bytes()).collect()));
        };
        let hidden = self.about.hidden;
        for (l, layer) in self.layers.iter().enumerate() {
            push(format!("layers.{l}.mean"), vec![hidden], &layer.mean);
            push(format!("layers.{l}.deviation"), vec![hidden], &layer.deviation);
            for (i, head) in heads_of(&self.about, l).enumerate() {
                let Some(linear) = layer.heads.get(head) else {
                    return Err(bad(&format!("no weights for head `{head}` of layer {l}")));
                };
                push(format!("layers.{l}.heads.{i}.w"), vec![hidden], &linear.w);
                push(format!("layers.{l}.heads.{i}.b"), vec![1], &[linear.b]);
            }
        }
        let views = tensors
            .iter()
            .map(|(name, shape, bytes)| Ok((name, TensorView::new(Dtype::F32, shape.clone(), bytes)?)))
            .collect::<Result<Vec<_>, safetensors::SafeTensorError>>()
            .map_err(|e| bad(&e))?;
        let about = serde_json::to_string(&self.about).map_err(|e| bad(&e))?;
        serialize(views, Some(HashMap::from([(KEY.to_owned(), about)]))).map_err(|e| bad(&e))
    }

    /// Reads a file and checks its format, shapes and values.
    ///
    /// # Errors
    /// [`Error::Input`] says what is wrong with the file; [`Error::Io`].
    pub fn load(path: &Path) -> Result<Self> {
        let file = Safetensors::open(path)?;
        let place = path.display().to_string();
        let Some(about) = file.metadata(KEY) else {
            return Err(Error::input(place, format!("no metadata `{KEY}`"), "a probe that `swat probe` wrote"));
        };
        let about: ProbeAbout = serde_json::from_str(&about)
            .map_err(|e| Error::input(format!("{place}: {KEY}"), e.to_string(), "metadata that swat wrote"))?;
        let wrong = |field: &str, found: String, expected: &str| {
            Err(Error::input(format!("{place}: {KEY}.{field}"), found, expected))
        };
        check_format(&place, &about.format, FORMAT)?;
        if about.layers > MAX_LAYERS || about.metric_layer > about.layers {
            let found = format!("{} layers, metric layer {}", about.layers, about.metric_layer);
            return wrong("layers", found, "a metric layer among them");
        }
        if let Some(head) = about.heads.iter().find(|h| h.layer > about.layers) {
            return wrong("heads", format!("layer {}", head.layer), "layers of the probe");
        }
        if let Some(first) = &about.first_tokens {
            first.check(None, &place)?;
        }
        let vector = |name: String, len: usize| -> Result<Vec<f32>> {
            let (dtype, shape) = file.info(&name)?;
            if dtype != Dtype::F32 || shape != [len] {
                let found = format!("{dtype} of shape {shape:?}");
                return Err(Error::input(format!("{place}: tensor `{name}`"), found, format!("F32 of shape [{len}]")));
            }
            file.values(&name)
        };
        let mut layers = Vec::with_capacity(about.layers + 1);
        for l in 0..=about.layers {
            let mean = vector(format!("layers.{l}.mean"), about.hidden)?;
            let deviation = vector(format!("layers.{l}.deviation"), about.hidden)?;
            if deviation.iter().any(|d| *d <= 0.0) {
                let place = format!("{place}: tensor `layers.{l}.deviation`");
                return Err(Error::input(place, "a value of 0 or below", "standard deviations above 0"));
            }
            let mut heads = BTreeMap::new();
            for (i, head) in heads_of(&about, l).enumerate() {
                let w = vector(format!("layers.{l}.heads.{i}.w"), about.hidden)?;
                let b = vector(format!("layers.{l}.heads.{i}.b"), 1)?.first().copied().unwrap_or_default();
                if heads.insert(head.clone(), LinearHead { w, b }).is_some() {
                    return wrong("heads", format!("`{head}` twice at layer {l}"), "each head once a layer");
                }
            }
            if !heads.contains_key(&Head::Harmful) {
                return wrong("heads", format!("no `harmful` at layer {l}"), "that head at every layer");
            }
            layers.push(ProbeLayer { mean, deviation, heads });
        }
        Ok(Self { about, layers })
    }
}

fn heads_of(about: &ProbeAbout, layer: usize) -> impl Iterator<Item = &Head> {
    about.heads.iter().filter(move |h| h.layer == layer).map(|h| &h.head)
}
