//! Settings of a study: the method, plain tuning, controls and ablations.

use crate::error::{Error, Result};
use crate::model::ModelConfig;
use crate::modules::ModuleSet;
use crate::options::serde_as_text;
use crate::secure::robustness::mods::SetSpec;
use crate::secure::tune::{TuneJob, TuneRecipe};
use crate::train::PhaseOptions;
use std::fmt;
use std::str::FromStr;

/// A setting: a base, then optionally `+refusals` or `+attack`. Configuration and JSON hold the text form.
///
/// | text | meaning |
/// |---|---|
/// | `given` | the base model, not tuned |
/// | `plain` | everything, for the duration of phase 2 |
/// | `plain-equal` | everything, for the duration of both phases: the fair control |
/// | `swat` | Mods_Rob, then everything |
/// | `reversed` | everything, then Mods_Rob |
/// | `mods-only` | Mods_Rob alone |
/// | `ml-lr:BETA` | one phase of the duration of both, other modules at BETA times the learning rate |
/// | `warmup:SET` | another set in place of Mods_Rob, see [`SetSpec`]: `warmup:random:1` |
#[derive(Clone, Debug, PartialEq)]
pub struct SettingSpec {
    /// The text that it was parsed from.
    pub text: String,
    /// How the model is tuned.
    pub base: Base,
    /// Examples mixed into the training data.
    pub mix: Option<Mix>,
}

/// How a setting tunes the model.
#[derive(Clone, Debug, PartialEq)]
pub enum Base {
    /// Not at all.
    Given,
    /// All parameters, for the steps of phase 2.
    Plain,
    /// All parameters, for the steps of both phases.
    PlainEqual,
    /// Mods_Rob, then all parameters.
    Swat,
    /// All parameters, then Mods_Rob.
    Reversed,
    /// Mods_Rob alone.
    ModsOnly,
    /// One phase of the duration of both, modules outside Mods_Rob at this multiple (0 to 1) of the learning rate.
    MlLr(f32),
    /// This set, then all parameters.
    Warmup(SetSpec),
}

/// Examples mixed into the training data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mix {
    /// Refusals of harmful requests.
    Refusals,
    /// Harmful requests that are answered.
    Attack,
}

impl FromStr for SettingSpec {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let wrong = || {
            let known = "given, plain, plain-equal, swat, reversed, mods-only, ml-lr:BETA or warmup:SET, \
                         perhaps with +refusals or +attack";
            Error::input("settings", format!("`{text}`"), known)
        };
        let (base, mix) = match text.rsplit_once('+') {
            Some((base, "refusals")) => (base, Some(Mix::Refusals)),
            Some((base, "attack")) => (base, Some(Mix::Attack)),
            Some(_) => return Err(wrong()),
            None => (text, None),
        };
        let base = match base.split_once(':') {
            Some(("ml-lr", beta)) => {
                Base::MlLr(beta.parse().ok().filter(|b| (0.0..=1.0).contains(b)).ok_or_else(wrong)?)
            }
            Some(("warmup", set)) => Base::Warmup(set.parse()?),
            Some(_) => return Err(wrong()),
            None => match base {
                "given" if mix.is_none() => Base::Given,
                "plain" => Base::Plain,
                "plain-equal" => Base::PlainEqual,
                "swat" => Base::Swat,
                "reversed" => Base::Reversed,
                "mods-only" => Base::ModsOnly,
                _ => return Err(wrong()),
            },
        };
        Ok(Self { text: text.to_owned(), base, mix })
    }
}

impl fmt::Display for SettingSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

serde_as_text!(SettingSpec);

impl SettingSpec {
    /// Name of its files: the text with other characters than letters, digits, `-` and `.` replaced by `_`.
    pub fn stem(&self) -> String {
        self.text.chars().map(|c| if c.is_ascii_alphanumeric() || "-.".contains(c) { c } else { '_' }).collect()
    }

    /// Name of the files of a training seed's run: `swat-seed3`. The run with the seed `first` has the setting's name,
    /// so that a study of one seed can be continued with several.
    pub fn run_stem(&self, seed: u64, first: u64) -> String {
        let stem = self.stem();
        if seed == first { stem } else { format!("{stem}-seed{seed}") }
    }

    /// Whether nothing is trained.
    pub fn is_given(&self) -> bool {
        self.base == Base::Given
    }

    /// Whether it needs Mods_Rob.
    pub fn needs_mods(&self) -> bool {
        !matches!(self.base, Base::Given | Base::Plain | Base::PlainEqual)
    }

    /// The tuning run of a study's recipe.
    ///
    /// # Errors
    /// [`Error::Input`] where the durations of both phases are needed and one is in epochs, the other in steps.
    pub fn job(&self, recipe: &TuneRecipe, model: &ModelConfig, mods: Option<&ModuleSet>) -> Result<TuneJob> {
        let mut job = TuneJob { mods: None, recipe: recipe.clone() };
        let none = PhaseOptions { epochs: Some(0), steps: None, ..recipe.all_phase.clone() };
        let own =
            || mods.cloned().ok_or_else(|| Error::failed("there is no Mods_Rob", "this is a bug; please report it"));
        match &self.base {
            Base::Given => job.recipe.all_phase = none,
            Base::Plain => {}
            Base::PlainEqual => job.recipe.all_phase = both(recipe)?,
            Base::Swat => job.mods = Some(own()?),
            Base::Reversed => (job.mods, job.recipe.reversed) = (Some(own()?), true),
            Base::ModsOnly => (job.mods, job.recipe.all_phase) = (Some(own()?), none),
            Base::MlLr(beta) => {
                (job.mods, job.recipe.rest_lr_factor) = (Some(own()?), *beta);
                (job.recipe.mods_phase, job.recipe.all_phase) = (both(recipe)?, none);
            }
            Base::Warmup(set) => job.mods = Some(set.resolve(model, mods, None)?),
        }
        Ok(job)
    }
}

/// The phase on everything, for the duration of both phases.
fn both(job: &TuneRecipe) -> Result<PhaseOptions> {
    let (first, second) = (&job.mods_phase, &job.all_phase);
    let sum = match (first.epochs, first.steps, second.epochs, second.steps) {
        (_, Some(a), _, Some(b)) => (None, Some(a + b)),
        (a, None, b, None) => (Some(a.unwrap_or(1) + b.unwrap_or(1)), None),
        _ => {
            let found = "one phase in epochs and the other in steps";
            return Err(Error::input("tune", found, "both in epochs or both in steps, for controls of equal length"));
        }
    };
    Ok(PhaseOptions { epochs: sum.0, steps: sum.1, ..second.clone() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_are_parsed_or_refused() {
        for text in ["given", "plain", "plain-equal+refusals", "swat+attack", "ml-lr:0.0001", "warmup:random:3"] {
            assert_eq!(text.parse::<SettingSpec>().unwrap().text, text);
        }
        for text in ["", "given+refusals", "swat+x", "ml-lr:2", "warm", "swat:1", "warmup:random:x"] {
            assert!(text.parse::<SettingSpec>().is_err(), "{text}");
        }
        assert_eq!("warmup:random:3".parse::<SettingSpec>().unwrap().stem(), "warmup_random_3");
    }

    #[test]
    fn runs_of_other_seeds_have_names_of_their_own() {
        let stem = |text: &str, seed| text.parse::<SettingSpec>().unwrap().run_stem(seed, 4);
        assert_eq!(
            (stem("swat+attack", 3), stem("swat+attack", 4)),
            ("swat_attack-seed3".into(), "swat_attack".into())
        );
    }

    #[test]
    fn equal_steps_are_the_sum_of_both_phases() {
        let mut job = TuneRecipe::default();
        (job.mods_phase.steps, job.all_phase.steps) = (Some(3), Some(5));
        assert_eq!(both(&job).unwrap().steps, Some(8));
        (job.mods_phase.steps, job.all_phase.steps) = (None, None);
        (job.mods_phase.epochs, job.all_phase.epochs) = (Some(4), Some(3));
        assert_eq!(both(&job).unwrap().epochs, Some(7));
        job.all_phase.steps = Some(1);
        assert!(both(&job).is_err());
    }
}
