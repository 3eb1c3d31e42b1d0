//! `--recipe` beside the other options of `swat tune`.

use super::Tune;
use crate::cli::recipe::Beside;
use crate::error::{Error, Result};
use crate::secure::{Base, EvaluateOptions, Mix, Recipe, TuneRecipe};
use std::path::Path;

impl Tune {
    /// The files of what recipes mix in, with their options.
    pub(super) fn mixed(&self) -> [(Mix, &'static str, Option<&Path>); 3] {
        [
            (Mix::Attack, "--attack", self.attack.as_deref()),
            (Mix::Refusals, "--refusals", self.refusals.as_deref()),
            (Mix::Replay, "--replay", self.replay.as_deref()),
        ]
    }

    /// Kind, share and file of what the recipe mixes in.
    pub(super) fn mixes(&self) -> Result<Vec<(Mix, f64, &Path)>> {
        let Some(recipe) = &self.named else { return Ok(Vec::new()) };
        let mut found = Vec::new();
        for (what, option, path) in self.mixed() {
            match (recipe.options.share_of(what), path) {
                (None, None) => {}
                (None, Some(path)) => {
                    let expected = format!("{}=SHARE in --recipe, or no such file", what.name());
                    return Err(Error::input(option, format!("{}, which is not mixed in", path.display()), expected));
                }
                (Some(share), Some(path)) => {
                    found.push((what, share.unwrap_or(EvaluateOptions::default().mix_share), path));
                }
                (Some(_), None) => {
                    let expected = match what {
                        Mix::Replay => {
                            "--replay FILE; `swat replay --model M --security S --out FILE` makes one".into()
                        }
                        _ => format!("{option} FILE, a file of training conversations"),
                    };
                    return Err(Error::input(recipe.place(), format!("no {option}"), expected));
                }
            }
        }
        Ok(found)
    }

    /// Refuses what cannot be done in one run, and what the recipe and another option both say.
    pub(super) fn check_recipe(&self, recipe: &Recipe) -> Result<()> {
        let wrong = |found: &str, expected: &str| Err(Error::input(recipe.place(), found, expected));
        let options = &recipe.options;
        if recipe.is_given() {
            return wrong("a recipe that trains nothing", "plain, swat or another base");
        }
        Beside { lr: self.lr, mods_lr: self.mods_lr, method: &self.method, tune: &self.recipe }.check(recipe)?;
        if options.seeds.is_some() {
            return wrong("seeds=, which belongs to studies (swat run)", "--seed N, once for each run");
        }
        if let Some(by) = options.by {
            let expected = format!("`swat robustness --by {}`, `swat search`, and its file by --mods", by.name());
            return wrong("by=, which belongs to studies (swat run)", &expected);
        }
        if let Some(step) = options.merge {
            let by = step.to_string();
            let by = by.split(':').next().unwrap_or_default();
            return wrong(
                &format!("merge={step}, a step after tuning"),
                &format!("the recipe without it, then `swat merge --by {by}` on the tuned model"),
            );
        }
        if self.recipe.reversed {
            return wrong("--reversed beside it", "reversed as the base of the recipe");
        }
        let phase = &self.recipe.all_phase;
        let given = [
            ("mods_epochs", self.mods_epochs.is_some()),
            ("mods_steps", self.mods_steps.is_some()),
            ("mods_lr", self.mods_lr.is_some()),
            ("rest_lr_factor", self.recipe.rest_lr_factor != TuneRecipe::default().rest_lr_factor),
            ("keep_optimizer", self.recipe.shared.keep_optimizer),
            ("epochs", phase.epochs.is_some()),
            ("steps", phase.steps.is_some()),
        ];
        let given: Vec<&str> = given.into_iter().filter_map(|(key, given)| given.then_some(key)).collect();
        recipe.check_phases(&given)?;
        let takes_mods = !matches!(recipe.base, Base::Plain);
        if self.mods.is_some() && !takes_mods {
            return wrong("--mods beside it, which it does not use", "swat as the base, or no --mods");
        }
        Ok(())
    }
}
