//! `probe.safetensors`: `layers.L.mean`, `layers.L.deviation` and, for head number I of that layer in the order of the
//! metadata, `layers.L.heads.I.w` and `.b`, all f32. The metadata entry `swat.probe` holds [`ProbeMetadata`] as JSON.

use super::{Head, LinearHead, Probe, ProbeLayer, ProbeMetadata};
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

    /// Whether a file is one that [`Probe::save`] wrote, of any version.
    pub fn is_file(path: &Path) -> bool {
        Safetensors::open(path).is_ok_and(|file| file.metadata(KEY).is_some())
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
        let mut values: Vec<(String, &[f32])> = Vec::new();
        for (l, layer) in self.layers.iter().enumerate() {
            values.push((format!("layers.{l}.mean"), &layer.mean));
            values.push((format!("layers.{l}.deviation"), &layer.deviation));
            for (i, head) in heads_of(&self.metadata, l).enumerate() {
                let Some(linear) = layer.heads.get(head) else {
                    return Err(bad(&format!("no weights for head `{head}` of layer {l}")));
                };
                values.push((format!("layers.{l}.heads.{i}.w"), &linear.w));
                values.push((format!("layers.{l}.heads.{i}.b"), std::slice::from_ref(&linear.b)));
            }
        }
        let views: Vec<(String, TensorView<'_>)> = values
            .into_iter()
            .map(|(name, values)| {
                let view = TensorView::new(Dtype::F32, vec![values.len()], bytemuck::cast_slice(values));
                Ok((name, view.map_err(|e| bad(&e))?))
            })
            .collect::<Result<_>>()?;
        let metadata = serde_json::to_string(&self.metadata).map_err(|e| bad(&e))?;
        serialize(views, Some(HashMap::from([(KEY.to_owned(), metadata)]))).map_err(|e| bad(&e))
    }

    /// Reads a file and checks its format, shapes and values.
    ///
    /// # Errors
    /// [`Error::Input`] names the malformed field or tensor; [`Error::Io`].
    pub fn load(path: &Path) -> Result<Self> {
        let file = Safetensors::open(path)?;
        let place = path.display().to_string();
        let Some(metadata) = file.metadata(KEY) else {
            return Err(Error::input(place, format!("no metadata `{KEY}`"), "a probe that `swat probe` wrote"));
        };
        let metadata: ProbeMetadata = serde_json::from_str(&metadata)
            .map_err(|e| Error::input(format!("{place}: {KEY}"), e.to_string(), "metadata that swat wrote"))?;
        let wrong = |field: &str, found: String, expected: &str| {
            Err(Error::input(format!("{place}: {KEY}.{field}"), found, expected))
        };
        check_format(&place, &metadata.format, FORMAT)?;
        if metadata.layers > MAX_LAYERS || metadata.metric_layer > metadata.layers {
            let found = format!("{} layers, metric layer {}", metadata.layers, metadata.metric_layer);
            return wrong("layers", found, "a metric layer among them");
        }
        if let Some(head) = metadata.heads.iter().find(|h| h.layer > metadata.layers) {
            return wrong("heads", format!("layer {}", head.layer), "layers of the probe");
        }
        if let Some(first) = &metadata.first_tokens {
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
        let mut layers = Vec::with_capacity(metadata.layers + 1);
        for l in 0..=metadata.layers {
            let mean = vector(format!("layers.{l}.mean"), metadata.hidden)?;
            let deviation = vector(format!("layers.{l}.deviation"), metadata.hidden)?;
            if deviation.iter().any(|d| *d <= 0.0) {
                let place = format!("{place}: tensor `layers.{l}.deviation`");
                return Err(Error::input(place, "a value of 0 or below", "standard deviations above 0"));
            }
            let mut heads = BTreeMap::new();
            for (i, head) in heads_of(&metadata, l).enumerate() {
                let w = vector(format!("layers.{l}.heads.{i}.w"), metadata.hidden)?;
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
        Ok(Self { metadata, layers })
    }
}

fn heads_of(metadata: &ProbeMetadata, layer: usize) -> impl Iterator<Item = &Head> {
    metadata.heads.iter().filter(move |h| h.layer == layer).map(|h| &h.head)
}
