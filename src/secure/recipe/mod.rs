//! Recipes: how a model is tuned, as one line of text. `swat tune --recipe`, the settings of `swat run` and reports share
//! the type.
//!
//! `BASE[:ARG][+KEY=VALUE[,KEY=VALUE…]]`: a base says which modules are trained when, keys change it. One file per family
//! holds formulas, papers, and how a recipe changes the training run or its data.

mod after;
mod average;
mod losses;
mod mix;
mod options;
mod phases;

pub use after::MergeStep;
pub use mix::{Mix, MixIn, mixed};
pub use options::{Adapters, RecipeOptions};
pub use phases::Base;

use super::tune::{TuneJob, TuneRecipe};
use crate::error::{Error, Result};
use crate::model::ModelConfig;
use crate::modules::ModuleSet;
use crate::options::serde_as_text;
use options::KEYS;
use std::fmt;
use std::str::FromStr;

/// A recipe: a base, then options behind a `+`. Configuration and JSON hold the text.
///
/// | base | meaning |
/// |---|---|
/// | `given` | the original model, not tuned |
/// | `plain` | everything, for the duration of phase 2 |
/// | `plain-equal` | everything, for the duration of both phases: the fair control |
/// | `swat` | Mods_Rob, then everything |
/// | `swat:mods=SET` | this set in place of Mods_Rob, as a Mods_Rob file or an expression |
/// | `reversed` | everything, then Mods_Rob |
/// | `mods-only` | Mods_Rob alone |
/// | `ml-lr:BETA` | one phase of the duration of both, other modules at BETA times the learning rate |
/// | `rates`, `rates:MAP` | one phase of the duration of both, each module at 0 to 2 times the learning rate by its rank in the map |
/// | `warmup:SET` | another set in place of Mods_Rob, see [`super::SetSpec`]: `warmup:random:1` |
///
/// The options are those of [`RecipeOptions`]: `plain+replay=.1,ema=.99`. Options may be joined by `+` as well.
///
/// ```
/// use swat::secure::{Base, Mix, Recipe};
///
/// let recipe: Recipe = "plain+replay=.15,screen".parse()?;
/// assert_eq!(recipe.base, Base::Plain);
/// assert_eq!(recipe.options.share_of(Mix::Replay), Some(Some(0.15)));
/// assert!(recipe.options.screen);
/// # Ok::<(), swat::error::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Recipe {
    /// The text that it was parsed from.
    pub text: String,
    /// Which modules are trained when.
    pub base: Base,
    /// What changes it.
    pub options: RecipeOptions,
}

impl FromStr for Recipe {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let (base, rest) = text.split_once('+').map_or((text, None), |(base, rest)| (base, Some(rest)));
        let place = place(text);
        let base = Base::parse(base, &place)?;
        let mut options = RecipeOptions::default();
        for option in rest.into_iter().flat_map(parts) {
            options.set(option, &place)?;
        }
        let recipe = Self { text: text.to_owned(), base, options };
        recipe.check()?;
        Ok(recipe)
    }
}

/// The options behind the first `+`.
fn parts(rest: &str) -> impl Iterator<Item = &str> {
    rest.split(['+', ','])
}

/// "recipe `swat+emma=.9`", cut where it is long.
fn place(text: &str) -> String {
    format!("recipe `{}`", text.chars().take(80).collect::<String>())
}

impl fmt::Display for Recipe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

serde_as_text!(Recipe);

impl Recipe {
    fn check(&self) -> Result<()> {
        let wrong = |found: &str, expected: &str| Err(Error::input(self.place(), found, expected));
        if self.is_given() && self.options != RecipeOptions::default() {
            return wrong("options of a model that is not tuned", "`given` alone");
        }
        if self.options.distil.is_some() && self.options.share_of(Mix::Replay).is_none() {
            return wrong("distil without replay", "replay=SHARE beside it: its answers are distilled");
        }
        if self.options.lisa.is_some() && self.options.share_of(Mix::Replay).is_none() {
            return wrong(
                "lisa without replay",
                "replay=SHARE beside it: steps on its answers and on the task take turns",
            );
        }
        if self.options.by.is_some() && !self.needs_mods() {
            return wrong("by, which says how Mods_Rob is found", "swat or another base with Mods_Rob");
        }
        let mixed: f64 = self.options.mixes.iter().filter_map(|mix| mix.share).sum();
        if mixed > 0.99 {
            return wrong(&format!("{mixed} of the examples mixed in"), "shares of 0.99 together at most");
        }
        Ok(())
    }

    /// Where an error in it is.
    pub fn place(&self) -> String {
        place(&self.text)
    }

    /// Name of its files: the text without `seeds=`, with other characters than letters, digits, `-` and `.` replaced by
    /// `_`.
    pub fn stem(&self) -> String {
        self.stem_without(&["seeds"])
    }

    fn stem_without(&self, keys: &[&str]) -> String {
        let (base, rest) = self.text.split_once('+').map_or((self.text.as_str(), ""), |(base, rest)| (base, rest));
        let kept = parts(rest).filter(|part| !part.is_empty() && !keys.contains(&options::key(part)));
        let text = std::iter::once(base).chain(kept).collect::<Vec<_>>().join("+");
        text.chars().map(|c| if c.is_ascii_alphanumeric() || "-.".contains(c) { c } else { '_' }).collect()
    }

    /// Name of the files of a training seed's run: `swat-seed3`. The run with the seed `first` has the recipe's name, so
    /// that a study of one seed can be continued with several.
    pub fn run_stem(&self, seed: u64, first: u64) -> String {
        seed_stem(self.stem(), seed, first)
    }

    /// Name of the files of the tuning run alone, which recipes that differ in `merge=` share.
    pub fn tuned_stem(&self, seed: u64, first: u64) -> String {
        seed_stem(self.stem_without(&["seeds", "merge"]), seed, first)
    }

    /// Training seeds in a study: `seeds=N` counts from the first of `study`; without it those of the study.
    pub fn seeds(&self, study: &[u64], first: u64) -> Vec<u64> {
        match self.options.seeds {
            Some(count) => (0..count).map(|i| first.wrapping_add(i)).collect(),
            None => study.to_vec(),
        }
    }

    /// Whether it has no options but seeds and an attack, which changes the task's data and not how a model is tuned.
    pub fn is_bare(&self) -> bool {
        let rest = RecipeOptions { seeds: None, mixes: Vec::new(), ..self.options.clone() };
        rest == RecipeOptions::default() && self.options.mixes.iter().all(|mix| mix.what == Mix::Attack)
    }

    /// Whether both have the same options, whatever their bases and seeds.
    pub fn has_options_of(&self, other: &Self) -> bool {
        let without = |recipe: &Self| RecipeOptions { seeds: None, ..recipe.options.clone() };
        without(self) == without(other)
    }

    /// Whether nothing is trained.
    pub fn is_given(&self) -> bool {
        self.base == Base::Given
    }

    /// Whether it needs Mods_Rob.
    pub fn needs_mods(&self) -> bool {
        !matches!(self.base, Base::Given | Base::Plain | Base::PlainEqual | Base::Rates(Some(_)))
    }

    /// Refuses options of phases that have no effect in this recipe. `given` are those that a command line has, by their
    /// keys in a configuration.
    ///
    /// # Errors
    /// [`Error::Input`] names the option.
    pub fn check_phases(&self, given: &[&str]) -> Result<()> {
        let Some(key) = self.base.ignored().iter().find(|key| given.contains(key)) else { return Ok(()) };
        let found = format!("--{} beside it, which has no effect in this recipe", key.replace('_', "-"));
        Err(Error::input(self.place(), found, "a recipe with such a phase, such as swat:mods=SET, or no such option"))
    }

    /// A tuning recipe with the options of this one.
    ///
    /// # Errors
    /// [`Error::Input`] for adapters without a learning rate of their own, or beside an adapter that is trained further.
    pub fn apply(&self, recipe: &TuneRecipe, model: Option<&ModelConfig>) -> Result<TuneRecipe> {
        let mut recipe = recipe.clone();
        phases::apply(self, &mut recipe, model)?;
        average::apply(&self.options, &mut recipe.shared);
        losses::apply(&self.options, &mut recipe.shared);
        mix::apply(&self.options, &mut recipe);
        Ok(recipe)
    }

    /// The tuning run: `recipe` with the options of this one, in the phases of its base. `mods` is Mods_Rob; a Mods_Rob
    /// file that the recipe names must be of the model with `model_hash`, if that is given.
    ///
    /// # Errors
    /// [`Error::Input`] where the durations of both phases are needed and one is in epochs, the other in steps; where
    /// Mods_Rob is needed and not there; as [`super::SetSpec::resolve`] and [`Recipe::apply`].
    pub fn job(
        &self,
        recipe: &TuneRecipe,
        model: &ModelConfig,
        mods: Option<&ModuleSet>,
        model_hash: Option<&str>,
    ) -> Result<TuneJob> {
        let recipe = self.apply(recipe, Some(model))?;
        self.base.job(&self.place(), recipe, model, mods, model_hash)
    }
}

fn seed_stem(stem: String, seed: u64, first: u64) -> String {
    if seed == first { stem } else { format!("{stem}-seed{seed}") }
}

/// Bases and keys that `swat secure` refuses.
const NOT_IN_SECURE: [&str; 9] =
    ["given", "swat", "reversed", "mods-only", "ml-lr:BETA", "refusals", "attack", "by", "seeds"];

/// The grammar, for `--help`.
pub fn recipe_help() -> String {
    grammar("swat+replay=.1,ema=.99", &phases::BASES, &KEYS)
}

/// The part of the grammar that `swat secure` takes, for its `--help`.
pub fn secure_recipe_help() -> String {
    let bases = phases::BASES.into_iter().filter(|(name, _)| !NOT_IN_SECURE.contains(name)).map(|base| match base {
        ("swat:mods=SET", _) => ("swat:mods=SET", "this set, then everything: layers.8-15.v_proj, mods.json"),
        ("warmup:SET", _) => ("warmup:SET", "the same; also random:SEED, layer0"),
        ("rates[:MAP]", what) => ("rates:MAP", what),
        base => base,
    });
    let keys = KEYS.into_iter().filter(|(name, ..)| !NOT_IN_SECURE.contains(name)).map(|key| match key {
        ("merge", ..) => ("merge", "=path:ALPHA", "after tuning: a point between the original model and the tuned one"),
        key => key,
    });
    grammar("plain+replay=.15,screen", &bases.collect::<Vec<_>>(), &keys.collect::<Vec<_>>())
}

fn grammar(example: &str, bases: &[(&str, &str)], keys: &[(&str, &str, &str)]) -> String {
    let bases: Vec<String> = bases.iter().map(|(name, what)| format!("  {name:<23}{what}")).collect();
    let keys: Vec<String> =
        keys.iter().map(|(name, value, what)| format!("  {:<23}{what}", format!("{name}{value}"))).collect();
    format!(
        "Recipes: BASE[+KEY=VALUE[,KEY=VALUE…]], such as {example}\n{}\nkeys\n{}",
        bases.join("\n"),
        keys.join("\n")
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn recipe(text: &str) -> Recipe {
        text.parse().unwrap_or_else(|e| panic!("{text}: {e}"))
    }

    fn refused(text: &str) -> String {
        text.parse::<Recipe>().expect_err(text).to_string()
    }

    #[test]
    fn recipes_are_parsed_or_refused() {
        for text in [
            "given",
            "plain-equal+refusals",
            "swat+attack",
            "ml-lr:0.0001",
            "ml-lr:.1",
            "rates+by=update",
            "rates:map.json",
            "warmup:random:3",
            "swat:mods=layers.0-1.{q_proj,v_proj}",
            "swat+replay=.1,ema=.99",
            "plain+lr=1e-4,steps=80,lora=8",
            "plain+attack=.2+replay=.1",
            "plain+merge=path:.7,seeds=3",
            "plain+replay=.1,distil=2,constrain,prox=.1",
            "swat+by=conflict,replay=.1",
            "plain+replay=.1,lisa=10:90,prox=.1",
            "plain+attack=.05,replay=.15,screen",
        ] {
            assert_eq!(recipe(text).to_string(), text);
        }
        for text in [
            "",
            "rates:",
            "rates:map.json+by=update",
            "given+refusals",
            "given+seeds=2",
            "swat+",
            "ml-lr:2",
            "ml-lr",
            "warmup:",
            "swat:1",
            "plain:1",
        ] {
            refused(text);
        }
        let both = recipe("plain+attack=.2,replay=.1,lr=3e-4").options;
        assert_eq!((both.share_of(Mix::Attack), both.share_of(Mix::Replay)), (Some(Some(0.2)), Some(Some(0.1))));
        assert_eq!((both.lr, both.share_of(Mix::Refusals)), (Some(3e-4), None));
    }

    #[test]
    fn help_of_secure_has_what_it_takes() {
        let (all, secure) = (recipe_help(), secure_recipe_help());
        for name in NOT_IN_SECURE {
            assert!(all.contains(&format!("\n  {name}")), "{name}");
            assert!(!secure.contains(&format!("\n  {name} ")), "{name}: {secure}");
        }
        for row in ["plain-equal", "swat:mods=SET", "lora=RANK[:all-linear] adapters", "merge=path:ALPHA"] {
            assert!(secure.contains(&format!("\n  {row}")), "{row}: {secure}");
        }
        for name in ["attack", "refusals", "seeds", "by=", "safelora"] {
            assert!(!secure.contains(name), "{name}: {secure}");
        }
    }

    #[test]
    fn unknown_names_have_a_suggestion_and_the_list() {
        let base = refused("swot");
        assert!(base.contains("did you mean `swat`?") && base.contains("plain-equal, swat, swat:mods=SET"), "{base}");
        let key = refused("swat+emma=.9");
        assert!(
            key.contains("the key `emma`") && key.contains("did you mean `ema`?") && key.contains("replay"),
            "{key}"
        );
        let missing = refused("warm:random:1");
        assert!(missing.contains("did you mean `warmup:SET`?"), "{missing}");
        let by = refused("plain+merge=pth:.5");
        assert!(by.contains("did you mean `path`?"), "{by}");
    }

    #[test]
    fn values_are_checked_for_their_range() {
        for (text, found) in [
            ("plain+lr=0", "lr=0"),
            ("plain+lr", "lr without a value"),
            ("plain+lr=", "lr="),
            ("plain+steps=0", "steps=0"),
            ("plain+steps=-1", "steps=-1"),
            ("plain+lora=1.5", "lora=1.5"),
            ("plain+lora=8:q_proj", "RANK:all-linear"),
            ("plain+lora=65537", "from 1 to 65536"),
            ("plain+ema=1", "ema=1"),
            ("plain+replay", "replay without a value"),
            ("plain+replay=1", "replay=1"),
            ("plain+replay=NaN", "replay=NaN"),
            ("plain+refusals=2", "refusals=2"),
            ("plain+attack=.5,replay=.5", "1 of the examples"),
            ("plain+constrain=-1", "constrain=-1"),
            ("plain+distil=1", "distil without replay"),
            ("plain+prox=inf", "prox=inf"),
            ("plain+lisa=1:2", "lisa without replay"),
            ("plain+replay=.1,lisa=10", "lisa=10"),
            ("plain+replay=.1,lisa=0:1", "lisa=0:1"),
            ("plain+seeds=0", "seeds=0"),
            ("plain+seeds=101", "seeds=101"),
            ("plain+merge=path:2", "merge=path:2"),
            ("plain+merge=path", "merge=path"),
            ("swat+by=gradient", "by=gradient"),
            ("swat+by", "by without a value"),
            ("plain+by=conflict", "by, which says how Mods_Rob is found"),
            ("plain+screen=answer", "screen=answer"),
            ("plain+screen,screen", "screen twice"),
            ("plain+lr=1e-4,lr=1e-4", "lr twice"),
            ("swat+refusals,refusals=.1", "refusals twice"),
        ] {
            let error = refused(text);
            assert!(error.starts_with(&format!("recipe `{text}`: found ")) && error.contains(found), "{error}");
        }
    }

    #[test]
    fn options_of_phases_that_a_recipe_does_not_have_are_refused() {
        let check = |text: &str, given: &[&str]| recipe(text).check_phases(given).map_err(|e| e.to_string());
        for (text, key) in [
            ("plain", "mods_steps"),
            ("plain+ema=.9", "keep_optimizer"),
            ("plain-equal", "mods_lr"),
            ("ml-lr:.1", "rest_lr_factor"),
            ("mods-only", "steps"),
        ] {
            let error = check(text, &["lr", key]).expect_err(text);
            assert!(error.contains(&format!("--{} beside it", key.replace('_', "-"))), "{error}");
        }
        let all = ["mods_epochs", "mods_steps", "mods_lr", "rest_lr_factor", "keep_optimizer", "epochs", "steps"];
        for text in ["swat", "reversed", "warmup:random:1", "swat:mods=all"] {
            check(text, &all).unwrap();
        }
        // Their lengths are those of both phases.
        check("plain-equal", &["mods_steps", "steps"]).unwrap();
        check("mods-only", &["mods_steps", "mods_lr", "rest_lr_factor"]).unwrap();
    }

    #[test]
    fn names_of_files_are_those_of_earlier_versions() {
        let stem = |text: &str| recipe(text).stem();
        assert_eq!(
            (stem("warmup:random:3"), stem("plain-equal+refusals")),
            ("warmup_random_3".into(), "plain-equal_refusals".into())
        );
        assert_eq!(recipe("swat+attack").run_stem(3, 4), "swat_attack-seed3");
        assert_eq!(recipe("swat+attack").run_stem(4, 4), "swat_attack");
        let merged = recipe("plain+ema=.9,merge=path:.5");
        assert_eq!(
            (merged.run_stem(4, 4), merged.tuned_stem(5, 4)),
            ("plain_ema_.9_merge_path_.5".into(), "plain_ema_.9-seed5".into())
        );
        // The number of seeds does not rename the runs.
        assert_eq!((stem("plain+seeds=3"), stem("swat+seeds=3,ema=.9")), ("plain".into(), "swat_ema_.9".into()));
        assert_eq!(recipe("swat+seeds=3").seeds(&[7, 1], 7), [7, 8, 9]);
        assert_eq!(recipe("swat").seeds(&[7, 1], 7), [7, 1]);
    }
}
