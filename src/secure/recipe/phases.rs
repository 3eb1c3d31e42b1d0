//! Which modules are trained when: SWAT, plain tuning, controls and ablations.
//!
//! SWAT (Du et al., arXiv 2410.04524): first Mods_Rob alone, the modules whose perturbation changes the model's security
//! features least, then everything. Plain tuning is the second phase alone; of equal length where it has the steps of
//! both.

use super::{Adapters, Recipe};
use crate::error::{Error, Result};
use crate::model::ModelConfig;
use crate::modules::ModuleSet;
use crate::options::one_of;
use crate::secure::eval::metrics::ScoreKind;
use crate::secure::robustness::map::RobustnessMap;
use crate::secure::robustness::mods::SetSpec;
use crate::secure::tune::{Method, TuneJob, TuneRecipe, all_projections, attention_projections};
use crate::train::PhaseOptions;
use std::path::PathBuf;

/// Bases and what they are.
pub(super) const BASES: [(&str, &str); 10] = [
    ("given", "the original model, not tuned"),
    ("plain", "everything, for the steps of phase 2"),
    ("plain-equal", "everything, for the steps of both phases"),
    ("swat", "Mods_Rob, then everything"),
    ("swat:mods=SET", "the same with this set in place of Mods_Rob"),
    ("reversed", "everything, then Mods_Rob"),
    ("mods-only", "Mods_Rob alone"),
    ("ml-lr:BETA", "one phase, modules outside Mods_Rob at BETA times the rate"),
    ("rates[:MAP]", "one phase, each module at 0 to 2 times the rate by its rank in the map"),
    ("warmup:SET", "this set, then everything: random:1, complement, layers.8-15.v_proj"),
];

/// Which modules are trained when.
#[derive(Clone, Debug, PartialEq)]
pub enum Base {
    /// None.
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
    /// One phase of the duration of both, each cell at 0 to 2 times the learning rate by its rank in this robustness map, or
    /// in that of the study ([`crate::secure::RobustnessMap::rates`]).
    Rates(Option<PathBuf>),
    /// This set, then all parameters.
    Warmup(SetSpec),
}

impl Base {
    pub(super) fn parse(text: &str, place: &str) -> Result<Self> {
        let names = BASES.map(|(name, _)| name);
        let (name, arg) = text.split_once(':').map_or((text, None), |(name, arg)| (name, Some(arg)));
        let unknown = || Error::input(place, format!("`{text}`"), one_of(name, &names, "a base"));
        let set = |set: &str| match set.trim() {
            "" => Err(Error::input(place, format!("`{text}` without a set"), "a set of modules, or a Mods_Rob file")),
            set => set.parse().map(Self::Warmup),
        };
        Ok(match (name, arg) {
            ("given", None) => Self::Given,
            ("plain", None) => Self::Plain,
            ("plain-equal", None) => Self::PlainEqual,
            ("swat", None) => Self::Swat,
            ("reversed", None) => Self::Reversed,
            ("mods-only", None) => Self::ModsOnly,
            ("ml-lr", beta) => {
                let valid = beta.and_then(|beta| beta.parse().ok()).filter(|beta| (0.0..=1.0).contains(beta));
                Self::MlLr(
                    valid.ok_or_else(|| Error::input(place, format!("`{text}`"), "ml-lr:BETA, BETA from 0 to 1"))?,
                )
            }
            ("swat", Some(arg)) => match arg.strip_prefix("mods=") {
                Some(mods) => set(mods)?,
                None => return Err(Error::input(place, format!("`{text}`"), "swat, or swat:mods=SET")),
            },
            ("rates", None) => Self::Rates(None),
            ("rates", Some(map)) if !map.trim().is_empty() => Self::Rates(Some(map.trim().into())),
            ("warmup", arg) => set(arg.unwrap_or_default())?,
            _ => return Err(unknown()),
        })
    }

    /// Options of phases without effect in it, by their keys in a configuration.
    pub(super) fn ignored(&self) -> &'static [&'static str] {
        match self {
            Self::Given | Self::Plain => &["mods_epochs", "mods_steps", "mods_lr", "rest_lr_factor", "keep_optimizer"],
            Self::PlainEqual | Self::MlLr(_) | Self::Rates(_) => &["mods_lr", "rest_lr_factor", "keep_optimizer"],
            Self::ModsOnly => &["epochs", "steps", "keep_optimizer"],
            Self::Swat | Self::Reversed | Self::Warmup(_) => &[],
        }
    }

    /// The run of `recipe`, whose options are applied already.
    pub(super) fn job(
        &self,
        place: &str,
        recipe: TuneRecipe,
        model: &ModelConfig,
        mods: Option<&ModuleSet>,
        model_hash: Option<&str>,
    ) -> Result<TuneJob> {
        let none = PhaseOptions { epochs: Some(0), steps: None, ..recipe.all_phase.clone() };
        let both = || both(&recipe);
        let mut job = TuneJob { mods: None, recipe: recipe.clone() };
        let own = || {
            let missing =
                || Error::input(place, "no Mods_Rob", "--mods SET_OR_FILE beside it, or swat:mods=SET_OR_FILE");
            mods.cloned().ok_or_else(missing)
        };
        match self {
            Self::Given => job.recipe.all_phase = none,
            Self::Plain => {}
            Self::PlainEqual => job.recipe.all_phase = both()?,
            Self::Swat => job.mods = Some(own()?),
            Self::Reversed => (job.mods, job.recipe.reversed) = (Some(own()?), true),
            Self::ModsOnly => (job.mods, job.recipe.all_phase) = (Some(own()?), none),
            Self::MlLr(beta) => {
                (job.mods, job.recipe.rest_lr_factor) = (Some(own()?), *beta);
                (job.recipe.mods_phase, job.recipe.all_phase) = (both()?, none);
            }
            Self::Rates(map) => {
                let none =
                    || Error::input(place, "no robustness map", "rates:MAP; `swat run` makes one for its studies");
                let map = RobustnessMap::load(map.as_deref().ok_or_else(none)?)?;
                model_hash.map_or(Ok(()), |hash| map.check_model(hash))?;
                job.recipe.all_phase = both()?;
                job.recipe.set_rates(map.rates(ScoreKind::Gap)?, place)?;
            }
            Self::Warmup(set) => job.mods = Some(set.resolve(model, mods, model_hash)?),
        }
        Ok(job)
    }
}

/// Sets learning rate, length and adapters.
pub(super) fn apply(recipe: &Recipe, tuned: &mut TuneRecipe, model: Option<&ModelConfig>) -> Result<()> {
    let options = &recipe.options;
    if let Some(lr) = options.lr {
        (tuned.mods_phase.lr, tuned.all_phase.lr) = (lr, lr);
    }
    if let Some(steps) = options.steps {
        let phase = if recipe.base == Base::ModsOnly { &mut tuned.mods_phase } else { &mut tuned.all_phase };
        (phase.epochs, phase.steps) = (None, Some(steps));
    }
    let Some(Adapters { rank, all_linear }) = options.lora else { return Ok(()) };
    let all = || model.map(|model| all_projections(model.layers)).unwrap_or_default();
    match &mut tuned.method {
        Method::Lora { lora, modules } => {
            lora.rank = rank;
            if all_linear {
                *modules = all();
            }
        }
        Method::Full if options.lr.is_none() => {
            let found = "lora without lr, where the rate is that of training all parameters";
            return Err(Error::input(recipe.place(), found, "lr=RATE beside it, such as lr=2e-4"));
        }
        Method::Full => {
            let lora = crate::engine::Lora { rank, ..crate::engine::Lora::default() };
            let attention = || model.map(|model| attention_projections(model.layers)).unwrap_or_default();
            let modules = if all_linear { all() } else { attention() };
            tuned.method = Method::Lora { lora, modules };
        }
        Method::Adapter { .. } => {
            return Err(Error::input(
                recipe.place(),
                "lora, where an adapter is trained further",
                "the recipe without it",
            ));
        }
    }
    Ok(())
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
    use crate::model::ModelDir;

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

    #[test]
    fn rates_need_a_map() {
        let (mut study, model) = (TuneRecipe::default(), ModelDir::open("assets/tiny".as_ref()).unwrap().config);
        let job = |text: &str, study: &TuneRecipe| text.parse::<Recipe>().unwrap().job(study, &model, None, None);
        assert!(job("rates", &study).unwrap_err().to_string().contains("no robustness map"));
        assert!(job("rates:/nowhere/map.json", &study).unwrap_err().to_string().contains("/nowhere/map.json"));
        study.set_rates("layers.0.q_proj=0.5".parse().unwrap(), "x").unwrap();
        assert!(
            study.set_rates("all=1".parse().unwrap(), "recipe `rates`").unwrap_err().to_string().contains("rates`")
        );
    }

    #[test]
    fn keys_change_rate_length_and_adapters() {
        let mut study = TuneRecipe::default();
        (study.mods_phase.steps, study.all_phase.epochs) = (Some(3), Some(2));
        let applied = |text: &str| text.parse::<Recipe>().unwrap().apply(&study, None);
        let plain = applied("plain+lr=1e-4,steps=80,ema=.5").unwrap();
        assert_eq!((plain.mods_phase.lr, plain.all_phase.lr), (1e-4, 1e-4));
        assert_eq!((plain.all_phase.steps, plain.all_phase.epochs, plain.mods_phase.steps), (Some(80), None, Some(3)));
        assert_eq!(plain.shared.ema_decay, Some(0.5));
        let near = applied("plain+replay=.1,constrain,distil=2,prox=.5,vaccine=3").unwrap().shared;
        assert_eq!(
            (near.constrain, near.distil, near.prox, near.vaccine),
            (Some(1.0), Some(2.0), Some(0.5), Some(3.0))
        );
        assert_eq!(applied("mods-only+steps=7").unwrap().mods_phase.steps, Some(7));
        assert_eq!(applied("swat").unwrap(), study);
        // An adapter at the rate of full tuning would hardly move.
        assert!(applied("plain+lora=4").unwrap_err().to_string().contains("lora without lr"));
        let Method::Lora { lora, .. } = applied("plain+lora=4,lr=2e-4").unwrap().method else { panic!("no adapters") };
        assert_eq!(lora.rank, 4);
        let model = ModelDir::open("assets/tiny".as_ref()).unwrap().config;
        for (text, count) in [("plain+lora=4,lr=2e-4", 4), ("plain+lora=4:all-linear,lr=2e-4", 7)] {
            let applied = text.parse::<Recipe>().unwrap().apply(&study, Some(&model)).unwrap();
            let Method::Lora { modules, .. } = applied.method else { panic!("no adapters") };
            assert_eq!(modules.len(), count * model.layers, "{text}");
        }
    }
}
