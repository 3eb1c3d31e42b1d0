//! Results of a secure tuning run, without any prompt or answer.

use super::data::PartSizes;
use crate::error::Result;
use crate::secure::check::{Limits, Measures, Verdict};
use crate::secure::eval::{Evaluation, Perplexity};
use crate::secure::replay::ReplaySummary;
use crate::secure::screen::ScreenCounts;
use std::collections::BTreeMap;

/// `outcome.json`, and the object of `--json`. Equal inputs give equal bytes.
#[derive(Clone, Debug, serde::Serialize)]
pub struct SecureOutcome {
    /// `swat.secure/1`
    pub format: &'static str,
    /// The original model, then the tuned one, by the verdict prompts.
    pub settings: Vec<SecureSetting>,
    /// Name of the tuned model's setting, if the verdict is held.
    pub recommended: Option<String>,
    /// Limits of the gates.
    pub limits: Limits,
    /// The verdict.
    pub verdict: Verdict,
    /// Everything that was tried, by the selection prompts, in order.
    pub tried: Vec<Tried>,
    /// What to try next, where the verdict is not held: a sentence each.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub advice: Vec<String>,
    /// What was replayed; none where no recipe replays.
    pub replay: Option<ReplaySummary>,
    /// What recipes with `screen` leave out of the data; none where no recipe screens.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub screened: Option<ScreenCounts>,
    /// Sizes of the parts of the data.
    pub data: PartSizes,
    /// The base model: its name or directory, its hash, and the licence that its card states.
    pub base: BaseModel,
    /// The seed of splits, order and training.
    pub seed: u64,
    /// Hash of every file that was read, by option and name.
    pub files: BTreeMap<String, String>,
    /// Version of swat.
    pub swat: String,
    /// The command line.
    pub command: String,
}

impl SecureOutcome {
    /// Nothing where the verdict is held.
    ///
    /// # Errors
    /// [`crate::error::Error::NotHeld`] names the gates that are not, and what to try.
    pub fn require(&self) -> Result<()> {
        self.verdict.require_or(|| self.advice.join("; "))
    }
}

/// The model that was tuned.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct BaseModel {
    /// Name on the hub, or directory.
    pub name: String,
    /// LoRA adapter that was merged into it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub adapter: Option<String>,
    /// Hash of configuration and weights.
    pub hash: String,
    /// `license` of its card, as it is written there.
    pub license: Option<String>,
}

/// Measures of a setting: shares from 0 to 1, J from −1 to 1, with 95 % intervals.
#[derive(Clone, Debug, serde::Serialize)]
pub struct SecureSetting {
    /// `given`, or the recipe.
    pub name: String,
    /// The recipe; none of the original model.
    pub recipe: Option<String>,
    /// Point on the path from the original model (0) to the tuned one (1).
    pub alpha: f64,
    /// Training seeds.
    pub seeds: Vec<u64>,
    /// The measures.
    #[serde(flatten)]
    pub measures: SecureMeasures,
}

/// What is measured.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize)]
pub struct SecureMeasures {
    /// Safety, and the task score with tasks.
    #[serde(flatten)]
    pub shares: Measures,
    /// Loss of the user's own conversations that were set aside; none with tasks.
    pub heldout: Option<Perplexity>,
}

impl SecureMeasures {
    pub(super) fn of(found: &Evaluation) -> Self {
        Self { shares: Measures::over_seeds(&[found]), heldout: found.perplexity }
    }
}

/// A tuned model, or a point between it and the original model, that was tried.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Tried {
    /// The recipe; `given` for the original model.
    pub recipe: String,
    /// Point on the path: 1 is the tuned model.
    pub alpha: f64,
    /// Points by which it exceeds half of each limit, summed; 0 = within them.
    pub excess: f64,
    /// Whether it was chosen.
    pub chosen: bool,
    /// Its measures on the selection prompts.
    #[serde(flatten)]
    pub measures: SecureMeasures,
}
