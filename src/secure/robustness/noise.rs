//! The kinds of perturbation, as text and as the engine takes them.

use crate::engine::NoiseKind;
use crate::error::{Error, Result};
use crate::model::{ModelConfig, ModelDir};
use crate::modules::ParamId;
use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

/// A kind of perturbation, at relative norm ε of each tensor; written `gaussian`, `rademacher`, `lowrank:8`, `scale`,
/// `zero`, `update:DIR`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Noise {
    /// Independent normals.
    #[default]
    Gaussian,
    /// Independent signs.
    Rademacher,
    /// Products of normals of this rank.
    LowRank(usize),
    /// W·(1 ± ε).
    Scale,
    /// W = 0: an ablation; ε does not matter.
    Zero,
    /// The direction in which tuning took each tensor: towards the tuned model directory at this path.
    Update(PathBuf),
}

impl fmt::Display for Noise {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Gaussian => f.write_str("gaussian"),
            Self::Rademacher => f.write_str("rademacher"),
            Self::LowRank(rank) => write!(f, "lowrank:{rank}"),
            Self::Scale => f.write_str("scale"),
            Self::Zero => f.write_str("zero"),
            Self::Update(path) => write!(f, "update:{}", path.display()),
        }
    }
}

impl FromStr for Noise {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let wrong = || {
            let found = format!("`{}`", text.chars().take(80).collect::<String>());
            Error::input("noise kind", found, "gaussian, rademacher, lowrank:RANK, scale, zero or update:DIR")
        };
        match text.split_once(':') {
            None => match text {
                "gaussian" => Ok(Self::Gaussian),
                "rademacher" => Ok(Self::Rademacher),
                "scale" => Ok(Self::Scale),
                "zero" => Ok(Self::Zero),
                _ => Err(wrong()),
            },
            Some(("lowrank", rank)) => {
                let rank = rank.parse().ok().filter(|r| (1..=4096).contains(r)).ok_or_else(wrong)?;
                Ok(Self::LowRank(rank))
            }
            Some(("update", path)) if !path.is_empty() => Ok(Self::Update(PathBuf::from(path))),
            Some(_) => Err(wrong()),
        }
    }
}

impl serde::Serialize for Noise {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> serde::Deserialize<'de> for Noise {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        String::deserialize(d)?.parse().map_err(serde::de::Error::custom)
    }
}

impl Noise {
    /// As the engine takes it; reads the tuned model for [`Noise::Update`] (its weights in f32, on the host).
    ///
    /// # Errors
    /// [`Error::Input`] where the tuned model is of another shape; as [`ModelDir::open`].
    pub fn engine_kind(&self, base: &ModelDir) -> Result<NoiseKind> {
        match self {
            Self::Gaussian => Ok(NoiseKind::Gaussian),
            Self::Rademacher => Ok(NoiseKind::Rademacher),
            Self::LowRank(rank) => Ok(NoiseKind::LowRank(*rank)),
            Self::Scale => Ok(NoiseKind::Scale),
            Self::Zero => Ok(NoiseKind::Zero),
            Self::Update(path) => {
                let tuned = ModelDir::open(path)?;
                if tuned.config.params() != base.config.params() {
                    let place = path.join("config.json").display().to_string();
                    return Err(Error::input(place, "a model of another shape", "a tuned copy of the model"));
                }
                let tensor = |dir: &ModelDir, id, shape: &[usize]| dir.tensor(id, shape);
                let (from, to) = (|id, s: &[usize]| tensor(base, id, s), |id, s: &[usize]| tensor(&tuned, id, s));
                Ok(NoiseKind::Update(update_directions(&base.config, from, to)?))
            }
        }
    }

    /// Whether members with other seeds differ, and whether w − δ is worth a look beside w + δ.
    pub(crate) fn draws(&self) -> (bool, bool) {
        match self {
            Self::Gaussian | Self::Rademacher | Self::LowRank(_) => (true, true),
            Self::Scale => (false, true),
            // A real update has a direction, and zero is zero.
            Self::Zero | Self::Update(_) => (false, false),
        }
    }
}

/// W′ − W of every tensor that changed.
///
/// # Errors
/// What `from` and `to` return.
pub fn update_directions(
    config: &ModelConfig,
    mut from: impl FnMut(ParamId, &[usize]) -> Result<Vec<f32>>,
    mut to: impl FnMut(ParamId, &[usize]) -> Result<Vec<f32>>,
) -> Result<BTreeMap<ParamId, Vec<f32>>> {
    let mut directions = BTreeMap::new();
    for (id, shape) in config.params() {
        let mut update = to(id, &shape)?;
        update.iter_mut().zip(from(id, &shape)?).for_each(|(new, old)| *new -= old);
        if update.iter().any(|x| *x != 0.0) {
            directions.insert(id, update);
        }
    }
    Ok(directions)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_read_back() {
        for text in ["gaussian", "rademacher", "lowrank:8", "scale", "zero", "update:out/tuned"] {
            assert_eq!(text.parse::<Noise>().unwrap().to_string(), text);
        }
        for text in ["", "gauss", "lowrank:", "lowrank:0", "lowrank:x", "update:", "zero:1"] {
            assert!(text.parse::<Noise>().is_err(), "{text}");
        }
    }
}
