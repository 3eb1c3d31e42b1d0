//! What a study compares: the method, plain tuning, controls and ablations.

use super::RunConfig;
use crate::error::{Error, Result};
use crate::model::ModelConfig;
use crate::modules::ModuleSet;
use crate::secure::{SetSpec, TuneJob};
use crate::train::PhaseOptions;

/// One setting, written as its base, then `+refusals` or `+attack`; in JSON it is that text.
///
/// | text | is |
/// |---|---|
/// | `given` | the model as given |
/// | `plain` | everything, for phase 2's length |
/// | `plain-equal` | everything, for both phases' length: the fair control |
/// | `swat` | Mods_Rob, then everything |
/// | `reversed` | everything, then Mods_Rob |
/// | `mods-only` | Mods_Rob alone |
/// | `ml-lr:BETA` | one phase of both lengths, the rest of the modules at BETA times the rate |
/// | `warmup:SET` | another set in the place of Mods_Rob, see [`SetSpec`]: `warmup:random:1` |
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SettingSpec {
    /// As written.
    pub text: String,
    /// How the model is tuned.
    pub base: Base,
    /// What is mixed into the training data.
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
    /// One phase of both lengths in which modules outside Mods_Rob learn at this multiple of the rate, 0 to 1.
    MlLr(f32),
    /// This set, then all parameters.
    Warmup(SetSpec),
}

/// What is mixed into the training data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mix {
    /// Refusals of harmful requests.
    Refusals,
    /// Harmful requests that are answered.
    Attack,
}

impl SettingSpec {
    /// Parses the text form.
    ///
    /// # Errors
    /// [`Error::Input`] names the part that is not known.
    pub fn parse(text: &str) -> Result<Self> {
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

    /// A name for files.
    pub fn stem(&self) -> String {
        self.text.chars().map(|c| if c.is_ascii_alphanumeric() || "-.".contains(c) { c } else { '_' }).collect()
    }

    /// A name for the files of the run with a training seed: `swat-seed3`. That of `tune.shared.seed` has the setting's
    /// own, so that a study of one seed goes on as one of several.
    pub fn run_stem(&self, config: &RunConfig, seed: u64) -> String {
        let stem = self.stem();
        if seed == config.tune.shared.seed { stem } else { format!("{stem}-seed{seed}") }
    }

    /// Whether nothing is trained.
    pub fn is_given(&self) -> bool {
        self.base == Base::Given
    }

    /// Whether its first phase depends on Mods_Rob.
    pub fn needs_mods(&self) -> bool {
        !matches!(self.base, Base::Given | Base::Plain | Base::PlainEqual)
    }

    /// The tuning run of the seed in `tune.shared`, given Mods_Rob.
    ///
    /// # Errors
    /// [`Error::Input`] where phases of equal length are asked for and one counts epochs, the other steps.
    pub fn job(&self, config: &RunConfig, model: &ModelConfig, mods: Option<&ModuleSet>) -> Result<TuneJob> {
        let mut job = TuneJob { seeds: None, ..config.tune.clone() };
        let none = PhaseOptions { epochs: Some(0), steps: None, ..config.tune.all_phase.clone() };
        let own = || mods.cloned().ok_or_else(|| Error::failed("there is no Mods_Rob", "report this"));
        match &self.base {
            Base::Given => job.all_phase = none,
            Base::Plain => {}
            Base::PlainEqual => job.all_phase = both(&config.tune)?,
            Base::Swat => job.mods = Some(own()?),
            Base::Reversed => (job.mods, job.reversed) = (Some(own()?), true),
            Base::ModsOnly => (job.mods, job.all_phase) = (Some(own()?), none),
            Base::MlLr(beta) => {
                (job.mods, job.rest_lr_factor) = (Some(own()?), *beta);
                (job.mods_phase, job.all_phase) = (both(&config.tune)?, none);
            }
            Base::Warmup(set) => job.mods = Some(set.resolve(model, mods, None)?),
        }
        Ok(job)
    }
}

impl TryFrom<String> for SettingSpec {
    type Error = Error;

    fn try_from(text: String) -> Result<Self> {
        Self::parse(&text)
    }
}

impl From<SettingSpec> for String {
    fn from(spec: SettingSpec) -> Self {
        spec.text
    }
}

/// Phase 2 for as long as both phases.
fn both(job: &TuneJob) -> Result<PhaseOptions> {
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
            assert_eq!(SettingSpec::parse(text).unwrap().text, text);
        }
        for text in ["", "given+refusals", "swat+x", "ml-lr:2", "warm", "swat:1", "warmup:random:x"] {
            assert!(SettingSpec::parse(text).is_err(), "{text}");
        }
        assert_eq!(SettingSpec::parse("warmup:random:3").unwrap().stem(), "warmup_random_3");
    }

    #[test]
    fn runs_of_other_seeds_have_names_of_their_own() {
        let mut config = RunConfig::default();
        config.tune.shared.seed = 4;
        config.tune.seeds = Some(vec![3, 4]);
        let stem = |text: &str, seed| SettingSpec::parse(text).unwrap().run_stem(&config, seed);
        assert_eq!(
            (stem("swat+attack", 3), stem("swat+attack", 4)),
            ("swat_attack-seed3".into(), "swat_attack".into())
        );
    }

    #[test]
    fn equal_steps_are_the_sum_of_both_phases() {
        let mut job = TuneJob::default();
        (job.mods_phase.steps, job.all_phase.steps) = (Some(3), Some(5));
        assert_eq!(both(&job).unwrap().steps, Some(8));
        (job.mods_phase.steps, job.all_phase.steps) = (None, None);
        (job.mods_phase.epochs, job.all_phase.epochs) = (Some(4), Some(3));
        assert_eq!(both(&job).unwrap().epochs, Some(7));
        job.all_phase.steps = Some(1);
        assert!(both(&job).is_err());
    }
}
