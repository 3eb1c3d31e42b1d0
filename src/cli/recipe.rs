//! Recipes beside options that say the same.

use super::method::MethodArgs;
use crate::engine::Lora;
use crate::error::{Error, Result};
use crate::secure::{Mix, Recipe, TuneRecipe};

/// Options of a command that keys of a recipe say too.
pub(super) struct Beside<'a> {
    /// `--lr`, where a recipe's own does not take its place.
    pub(super) lr: Option<f64>,
    /// `--mods-lr`, where the command has it.
    pub(super) mods_lr: Option<f64>,
    pub(super) method: &'a MethodArgs,
    pub(super) tune: &'a TuneRecipe,
}

impl Beside<'_> {
    /// Refuses what the recipe and an option both say, and options on replayed answers where the recipe has none.
    ///
    /// # Errors
    /// [`Error::Input`] names key and option.
    pub(super) fn check(&self, recipe: &Recipe) -> Result<()> {
        let wrong = |found: &str, expected: &str| Err(Error::input(recipe.place(), found, expected));
        let (options, shared, phase) = (&recipe.options, &self.tune.shared, &self.tune.all_phase);
        let rank = self.method.lora.rank;
        let other_rank = rank != Lora::default().rank && options.lora.is_some_and(|own| own.rank != rank);
        let other_modules = self.method.lora_modules.is_some() && options.lora.is_some_and(|own| own.all_linear);
        for (key, both, option) in [
            ("lr", options.lr.is_some() && self.lr.is_some(), "--lr"),
            ("lr", options.lr.is_some() && self.mods_lr.is_some(), "--mods-lr"),
            ("steps", options.steps.is_some() && phase.steps.is_some(), "--steps"),
            ("steps", options.steps.is_some() && phase.epochs.is_some(), "--epochs"),
            ("screen", options.screen && self.tune.screen, "--screen"),
            ("constrain", options.constrain.is_some() && shared.constrain.is_some(), "--constrain"),
            ("distil", options.distil.is_some() && shared.distil.is_some(), "--distil"),
            ("prox", options.prox.is_some() && shared.prox.is_some(), "--prox"),
            ("lisa", options.lisa.is_some() && shared.lisa.is_some(), "--lisa"),
            ("vaccine", options.vaccine.is_some() && shared.vaccine.is_some(), "--vaccine"),
            ("ema", options.ema.is_some() && shared.ema_decay.is_some(), "--ema-decay"),
            ("lora", other_rank, "--lora-rank"),
            ("lora", other_modules, "--lora-modules"),
        ] {
            if both {
                let value = if key == "screen" { "" } else { "=" };
                return wrong(&format!("{key}{value}, and {option} beside it"), "one of them");
            }
        }
        let replays = options.share_of(Mix::Replay).is_some();
        for (option, given) in [("--distil", shared.distil.is_some()), ("--lisa", shared.lisa.is_some())] {
            if given && !replays {
                let expected = format!("replay=SHARE in the recipe, or no {option}");
                return wrong(&format!("{option} beside it, where nothing is replayed"), &expected);
            }
        }
        Ok(())
    }
}
