//! Kinds of weight perturbation: their text form and the engine's.

use crate::engine::NoiseKind;
use crate::error::{Error, Result};
use crate::model::{ModelConfig, ModelDir};
use crate::modules::ParamId;
use crate::options::serde_as_text;
use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

/// A kind of perturbation, scaled to relative norm ε per tensor; written `gaussian`, `rademacher`, `lowrank:8`,
/// `scale`, `zero`, `update:DIR`; `step` in files alone.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Noise {
    /// Independent normal entries.
    #[default]
    Gaussian,
    /// Independent random signs.
    Rademacher,
    /// Product of two normal factors of this rank.
    LowRank(usize),
    /// W·(1 ± ε).
    Scale,
    /// W′ = 0: ablation, whatever ε is.
    Zero,
    /// The direction ΔW of tuning: towards the tuned model directory at this path.
    Update(PathBuf),
    /// The step that training would take ([`super::step::PlannedStep`]), each tensor by its own length.
    Step,
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
            Self::Step => f.write_str("step"),
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
                "step" => Ok(Self::Step),
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

serde_as_text!(Noise);

impl Noise {
    /// The engine's form; for [`Noise::Update`] this reads the tuned weights, f32 on the host.
    ///
    /// # Errors
    /// [`Error::Input`] where the tuned model's shapes differ, or for [`Noise::Step`], which needs training data; as
    /// [`ModelDir::open`].
    pub fn engine_kind(&self, base: &ModelDir) -> Result<NoiseKind> {
        match self {
            Self::Gaussian => Ok(NoiseKind::Gaussian),
            Self::Rademacher => Ok(NoiseKind::Rademacher),
            Self::LowRank(rank) => Ok(NoiseKind::LowRank(*rank)),
            Self::Scale => Ok(NoiseKind::Scale),
            Self::Zero => Ok(NoiseKind::Zero),
            Self::Step => Err(Error::input("--kind", "step", "--by update, with the data of the step by --data")),
            Self::Update(path) => {
                let tuned = ModelDir::open(path)?;
                if tuned.config.params() != base.config.params() {
                    let place = path.join("config.json").display().to_string();
                    return Err(Error::input(place, "a model of another shape", "a tuned copy of the model"));
                }
                Ok(NoiseKind::Update(update_directions(
                    &base.config,
                    |id, shape| base.tensor(id, shape),
                    |id, shape| tuned.tensor(id, shape),
                )?))
            }
        }
    }

    /// Whether another seed gives another perturbation.
    pub(crate) fn is_random(&self) -> bool {
        matches!(self, Self::Gaussian | Self::Rademacher | Self::LowRank(_))
    }

    /// Whether −δ is as meaningful as +δ: an update has a direction, and zero has no sign.
    pub(crate) fn is_antithetic(&self) -> bool {
        self.is_random() || *self == Self::Scale
    }
}

/// ΔW = W′ − W of every tensor that changed.
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
