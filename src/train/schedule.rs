//! Learning-rate schedules: pure functions of the step.

/// Share of the steps after the warm-up in which [`Schedule::Wsd`] decays.
const WSD_DECAY_SHARE: f64 = 0.2;

/// Learning-rate schedule after the linear warm-up.
#[derive(
    schemars::JsonSchema,
    Clone,
    Copy,
    Debug,
    Default,
    PartialEq,
    Eq,
    serde::Serialize,
    serde::Deserialize,
    clap::ValueEnum,
)]
#[serde(rename_all = "snake_case")]
pub enum Schedule {
    /// The base rate throughout
    Constant,
    /// Linear decay
    Linear,
    /// Cosine decay (Loshchilov and Hutter, arXiv 1608.03983)
    #[default]
    Cosine,
    /// Warmup-stable-decay: the base rate, then 1 − √x over the last fifth (Hägele et al., arXiv 2405.18392)
    Wsd,
}

impl Schedule {
    /// Factor on the base rate at `step` (from 0) of `total`.
    ///
    /// During the first `warmup` steps it is (step + 1) / warmup; after them it decays from 1 to `min_ratio`, which it
    /// reaches at step `total` and keeps from there on.
    pub fn factor(self, step: u64, total: u64, warmup: u64, min_ratio: f64) -> f64 {
        if step < warmup {
            return (step + 1) as f64 / warmup as f64;
        }
        let after = total.saturating_sub(warmup).max(1) as f64;
        let progress = ((step - warmup) as f64 / after).min(1.0);
        let shape = match self {
            Self::Constant => return 1.0,
            Self::Linear => 1.0 - progress,
            Self::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * progress).cos()),
            Self::Wsd => 1.0 - ((progress - (1.0 - WSD_DECAY_SHARE)) / WSD_DECAY_SHARE).max(0.0).sqrt(),
        };
        min_ratio + (1.0 - min_ratio) * shape
    }
}
