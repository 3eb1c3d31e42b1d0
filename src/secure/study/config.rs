//! The configuration of a study: one TOML file.

use crate::backend::DtypeChoice;
use crate::data::{Column, RowOptions, read_columns, write_columns};
use crate::error::{Error, Result};
use crate::hub::data_name;
use crate::io::input::read_stream;
use crate::model::Clock;
use crate::secure::check::Limits;
use crate::secure::eval::EvaluateOptions;
use crate::secure::merge::MergeMethod;
use crate::secure::probe::train::ProbeOptions;
use crate::secure::recipe::{Base, Mix, Recipe};
use crate::secure::replay::ReplayOptions;
use crate::secure::robustness::RobustnessOptions;
use crate::secure::robustness::mods::SetSpec;
use crate::secure::robustness::scorer::ScorerOptions;
use crate::secure::robustness::search::SearchOptions;
use crate::secure::tune::TuneRecipe;
use crate::train::{Length, PhaseOptions};
use serde::de::DeserializeOwned;
use std::path::{Path, PathBuf};

/// Largest configuration file, in bytes.
const MAX_CONFIG_BYTES: u64 = 1 << 20;

/// Configuration of `swat run`. Relative paths are relative to its file.
#[derive(schemars::JsonSchema, Clone, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RunConfig {
    /// Hugging Face directory of the base model.
    pub model: PathBuf,
    /// Chat template, for a model without its own.
    pub chat_template: Option<PathBuf>,
    /// Date for a chat template that writes it; that of the study's first run if not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub date: Option<Clock>,
    /// Output directory.
    pub out: PathBuf,
    /// Title of the report; the name of the model directory if empty.
    pub title: String,
    /// Seed of the splits and of the sampled prompts and tasks; training and perturbations have their own seeds below.
    pub seed: u64,
    /// Precision of weights and activations, where `--dtype` is not given.
    pub dtype: DtypeChoice,
    /// Settings to compare, one recipe each: `BASE[:ARG][+KEY=VALUE[,KEY=VALUE…]]`, such as `plain`, `swat`,
    /// `warmup:random:1`, `plain+replay=.1,ema=.99`; see docs/recipes.md.
    pub settings: Vec<Recipe>,
    /// Input files.
    pub data: DataFiles,
    /// Security-feature classifiers.
    pub probe: ProbeOptions,
    /// Perturbations of the map and the search.
    pub perturb: ScorerOptions,
    /// The robustness map.
    pub robustness: RobustnessOptions,
    /// The search for Mods_Rob.
    pub search: SearchOptions,
    /// Mods_Rob, in place of a search.
    pub mods: Option<SetSpec>,
    /// Tuning.
    pub tune: TuneConfig,
    /// Evaluation of every setting.
    pub evaluate: EvaluateOptions,
    /// The model's own answers for settings with `replay=`, where `data.replay` names no file of them.
    #[serde(skip_serializing_if = "is_default")]
    pub replay: ReplayOptions,
    /// Other models of settings with `merge=`.
    #[serde(skip_serializing_if = "is_default")]
    pub merge: MergeFiles,
    /// Limits of the verdict, in points.
    #[serde(skip_serializing_if = "is_default")]
    pub limits: Limits,
}

/// Whether a part of the configuration need not be written.
fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

/// Other models of settings with `merge=`: [`crate::secure::MergeModels`] says what they are.
#[derive(schemars::JsonSchema, Clone, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct MergeFiles {
    /// Aligned model; the study's if not given.
    pub aligned: Option<PathBuf>,
    /// Model without alignment, for safelora, safemerge and resta.
    pub unaligned: Option<PathBuf>,
    /// Model that was tuned on refusals, for safemerge; the study's if not given.
    pub safe: Option<PathBuf>,
}

/// What a study does about tuning data that holds prompts of its evaluation.
#[derive(schemars::JsonSchema, Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OverlapRule {
    /// Stops with an error before anything runs.
    #[default]
    Refuse,
    /// Counts the rows in outcome and report.
    Report,
}

/// Input files of a study, and how they are read.
#[derive(schemars::JsonSchema, Clone, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DataFiles {
    /// Labelled prompts for probe, map and drift.
    pub security: PathBuf,
    /// Training conversations.
    pub train: Vec<PathBuf>,
    /// Prompts of the attack success rate (harmful) and over-refusal (benign); the security file's test and ood splits
    /// if empty.
    pub evaluation: Vec<PathBuf>,
    /// Checkable tasks.
    pub task: Option<PathBuf>,
    /// Conversations for the perplexity.
    pub heldout: Option<PathBuf>,
    /// The model's own answers to mix in, by `swat replay`, for settings with `replay=`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub replay: Option<PathBuf>,
    /// Refusals to mix in, for settings with `+refusals`.
    pub refusals: Option<PathBuf>,
    /// Answered harmful requests to mix in, for settings with `+attack`.
    pub attack: Option<PathBuf>,
    /// `{"prompt", "answers": […]}`: compliant answers, for the strict attack success rate.
    pub strict: Option<PathBuf>,
    /// Columns that the files have under other names, for all files that have them: `{ prompt = "question" }`.
    #[serde(
        serialize_with = "write_columns",
        deserialize_with = "read_columns",
        skip_serializing_if = "Vec::is_empty"
    )]
    #[schemars(with = "std::collections::BTreeMap<String, String>")]
    pub columns: Vec<Column>,
    /// Key that holds the list of rows, in files that are one JSON object.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub field: Option<String>,
    /// Tuning data that holds prompts of the evaluation, near-duplicates included: `refuse` is an error, `report` counts
    /// them.
    #[serde(skip_serializing_if = "is_default")]
    pub overlap: OverlapRule,
    /// Whether rows that cannot be read are left out and counted, in place of an error.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub skip_bad_rows: bool,
}

impl DataFiles {
    /// How the files are read.
    pub fn row_options(&self) -> RowOptions {
        let Self { columns, field, skip_bad_rows, .. } = self;
        RowOptions { columns: columns.clone(), field: field.clone(), skip_bad_rows: *skip_bad_rows }
    }

    /// The file of what settings mix in.
    pub fn mixed(&self, what: Mix) -> Option<&Path> {
        match what {
            Mix::Attack => self.attack.as_deref(),
            Mix::Refusals => self.refusals.as_deref(),
            Mix::Replay => self.replay.as_deref(),
        }
    }
}

/// The `[tune]` table of a study: the recipe of every setting, and the training seeds.
#[derive(schemars::JsonSchema, Clone, Debug, Default, PartialEq, serde::Serialize)]
pub struct TuneConfig {
    /// Training seeds; each setting is tuned and evaluated with each, at that many times the time and disk space. None
    /// = `shared.seed` alone.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seeds: Option<Vec<u64>>,
    /// The recipe; settings add Mods_Rob and vary it.
    #[serde(flatten)]
    pub recipe: TuneRecipe,
}

impl<'de> serde::Deserialize<'de> for TuneConfig {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        // Not by `flatten`, which cannot name unknown keys.
        let mut table = toml::Table::deserialize(deserializer)?;
        // The path inside of this table, which the outer error does not know.
        let custom = |e: toml::de::Error| match key(&e) {
            Some(key) => serde::de::Error::custom(format!("`{key}`: {}", e.message())),
            None => serde::de::Error::custom(e.message()),
        };
        let seeds = table.remove("seeds").map(toml::Value::try_into).transpose().map_err(custom)?;
        Ok(Self { seeds, recipe: table.try_into().map_err(custom)? })
    }
}

impl RunConfig {
    /// Reads a TOML file and applies `key=value` overrides such as `tune.shared.seed=2`. Unknown keys are errors that
    /// name the nearest known one.
    ///
    /// # Errors
    /// [`Error::Input`] names the key; [`Error::Io`].
    pub fn read(path: &Path, overrides: &[String]) -> Result<Self> {
        let text = read_stream(path, MAX_CONFIG_BYTES)?;
        let place = path.display().to_string();
        let mut table: toml::Table = text.parse().map_err(|e: toml::de::Error| {
            let before = e.span().and_then(|span| text.get(..span.start)).unwrap_or_default();
            Error::input(format!("{place}:{}", before.matches('\n').count() + 1), e.message(), "valid TOML")
        })?;
        for change in overrides {
            apply(&mut table, change)?;
        }
        let mut config: Self = parse(toml::Value::Table(table), &place, overrides)?;
        config.resolve(path.parent().unwrap_or(Path::new("")));
        config.check(&place)?;
        Ok(config)
    }

    fn resolve(&mut self, base: &Path) {
        let data = &mut self.data;
        let required = [&mut self.model, &mut data.security];
        let optional = [&mut self.chat_template, &mut data.task, &mut data.heldout, &mut data.replay];
        let optional = optional.into_iter().chain([&mut data.refusals, &mut data.attack, &mut data.strict]);
        let merge = &mut self.merge;
        let optional = optional.chain([&mut merge.aligned, &mut merge.unaligned, &mut merge.safe]).flatten();
        let guard = self.evaluate.guard.iter_mut().map(|guard| &mut guard.model);
        let paths =
            required.into_iter().chain(optional).chain(guard).chain(&mut data.train).chain(&mut data.evaluation);
        for path in paths.filter(|path| path.is_relative() && !path.as_os_str().is_empty()) {
            let beside = base.join(&*path);
            // What is no path beside the file may be a name on the hub. That of the output is none: it need not exist.
            if beside.exists() || data_name(path).is_none() {
                *path = beside;
            }
        }
        if !self.out.as_os_str().is_empty() {
            self.out = base.join(&self.out);
        }
    }

    /// Training seeds of every setting.
    pub fn training_seeds(&self) -> Vec<u64> {
        self.tune.seeds.clone().unwrap_or_else(|| vec![self.tune.recipe.shared.seed])
    }

    /// Checks required keys and ranges.
    ///
    /// # Errors
    /// [`Error::Input`] names the key that is missing or wrong.
    pub fn check(&self, place: &str) -> Result<()> {
        let missing = |field: &str, expected: &str| Err(Error::input(format!("{place}: {field}"), "nothing", expected));
        if self.model.as_os_str().is_empty() {
            return missing("model", "a model directory");
        }
        if self.out.as_os_str().is_empty() {
            return missing("out", "a directory for the results");
        }
        if self.data.security.as_os_str().is_empty() {
            return missing("data.security", "a file of labelled prompts");
        }
        if self.data.train.is_empty() && !self.settings.iter().all(Recipe::is_given) {
            return missing("data.train", "at least one training file");
        }
        let seeds = self.training_seeds();
        let wrong =
            |found: String| Err(Error::input(format!("{place}: tune.seeds"), found, "training seeds, each once"));
        if seeds.is_empty() {
            return wrong("an empty list".into());
        }
        if let Some((_, seed)) = seeds.iter().enumerate().find(|(i, seed)| seeds[..*i].contains(seed)) {
            return wrong(format!("{seed} more than once"));
        }
        for (i, setting) in self.settings.iter().enumerate() {
            self.check_setting(setting, place)?;
            let same = |other: &&Recipe| {
                other.stem() == setting.stem() && (other.base != setting.base || !other.has_options_of(setting))
            };
            if let Some(other) = self.settings[..i].iter().find(same) {
                let found = format!("`{other}` and `{setting}`, whose files would have one name");
                return Err(Error::input(format!("{place}: settings"), found, "one of them, or another spelling"));
            }
        }
        self.evaluate.check()?;
        self.limits.check()?;
        self.tune.recipe.shared.check()?;
        self.tune.recipe.mods_phase.check()?;
        self.tune.recipe.all_phase.check()
    }

    /// Checks that a setting trains something, with options that there are and files that are given.
    fn check_setting(&self, setting: &Recipe, place: &str) -> Result<()> {
        let recipe = setting.apply(&self.tune.recipe, None).map_err(|e| e.at(place))?;
        let (mods, all) = (&recipe.mods_phase, &recipe.all_phase);
        [mods, all].into_iter().try_for_each(|phase| phase.check().map_err(|e| e.at(&setting.place())))?;
        let none = |phase: &PhaseOptions| matches!(phase.length(), Ok(Length::Steps(0) | Length::Epochs(0)));
        let idle = match setting.base {
            Base::Given => false,
            Base::Plain => none(all),
            Base::ModsOnly => none(mods),
            Base::PlainEqual | Base::Swat | Base::Reversed | Base::MlLr(_) | Base::Rates(_) | Base::Warmup(_) => {
                none(all) && none(mods)
            }
        };
        if idle {
            let key = if setting.base == Base::ModsOnly { "mods_phase" } else { "all_phase" };
            let found = format!("no steps, so that the setting `{setting}` trains nothing");
            return Err(Error::input(format!("{place}: tune.{key}"), found, "at least one step or epoch"));
        }
        let merge = setting.options.merge.map(|step| step.by);
        if merge.is_some_and(|by| by != MergeMethod::Path) && self.merge.unaligned.is_none() {
            let expected = format!("a model without alignment, for the setting `{setting}`");
            return Err(Error::input(format!("{place}: merge.unaligned"), "nothing", expected));
        }
        // Without a file of them the model's own answers are made.
        let mut needed = setting.options.mixes.iter().map(|mix| mix.what).filter(|what| *what != Mix::Replay);
        if let Some(what) = needed.find(|what| self.data.mixed(*what).is_none()) {
            let expected = format!("a file of training conversations, for the setting `{setting}`");
            return Err(Error::input(format!("{place}: data.{}", what.name()), "nothing", expected));
        }
        Ok(())
    }
}

/// `a.b.c=value`, the value as TOML or else as text.
fn apply(table: &mut toml::Table, change: &str) -> Result<()> {
    let wrong = || Error::input("--set", change, "KEY=VALUE, such as tune.all_phase.lr=2e-5");
    let (key, text) = change.split_once('=').ok_or_else(wrong)?;
    let value = format!("value = {text}")
        .parse::<toml::Table>()
        .ok()
        .and_then(|mut t| t.remove("value"))
        .unwrap_or_else(|| toml::Value::String(text.to_owned()));
    let mut path: Vec<&str> = key.trim().split('.').collect();
    let last = path.pop().filter(|k| !k.is_empty()).ok_or_else(wrong)?;
    let mut at = table;
    for part in path {
        let next = at.entry(part).or_insert_with(|| toml::Value::Table(toml::Table::new()));
        at = next.as_table_mut().ok_or_else(wrong)?;
    }
    at.insert(last.to_owned(), value);
    Ok(())
}

/// Names of types in serde's messages, and what they are to a user.
const TYPES: [(&str, &str); 6] = [
    ("usize", "a whole number"),
    ("u64", "a whole number"),
    ("u32", "a whole number"),
    ("f64", "a number"),
    ("f32", "a number"),
    ("a sequence", "a list"),
];

/// Deserializes; an error names the key, and the nearest known one for an unknown key.
fn parse<T: DeserializeOwned>(value: toml::Value, place: &str, overrides: &[String]) -> Result<T> {
    value.try_into().map_err(|e: toml::de::Error| {
        let message = e.message().to_owned();
        let mut found = message.lines().next().unwrap_or_default();
        let mut path = key(&e).unwrap_or_default();
        // Of a nested table, see `TuneConfig`.
        if let Some((inner, rest)) = found.strip_prefix('`').and_then(|text| text.split_once("`: ")) {
            path = if path.is_empty() { inner.to_owned() } else { format!("{path}.{inner}") };
            found = rest;
        }
        let expected = suggestion(found).unwrap_or_else(|| "a known key with a value of its type".into());
        // Of a type that reads its text itself, see `serde_as_text`: "place: found …; expected …".
        let own = found.rsplit_once("; expected ").map(|(found, expected)| (found.to_owned(), expected.to_owned()));
        let (inner, found, expected) =
            match own.as_ref().and_then(|(text, expected)| Some((text.split_once(": found ")?, expected))) {
                Some(((inner, found), expected)) => (format!(": {inner}"), found, expected.clone()),
                None => (String::new(), found, expected),
            };
        let by_option = overrides.iter().any(|change| change.split('=').next().is_some_and(|key| key.trim() == path));
        let place = match (path.is_empty(), by_option) {
            (true, _) => place.to_owned(),
            (false, true) => format!("--set {path}"),
            (false, false) => format!("{place}: {path}"),
        };
        let found = TYPES.iter().fold(found.to_owned(), |text, (name, plain)| {
            text.replace(&format!("expected {name}"), &format!("expected {plain}"))
        });
        Error::input(place + &inner, found, expected)
    })
}

/// The key of an error, from the line "in `a.b`" of its text.
fn key(error: &toml::de::Error) -> Option<String> {
    let text = error.to_string();
    let line = text.lines().find_map(|line| line.strip_prefix("in `"))?;
    Some(line.trim_end_matches('`').to_owned())
}

/// From "unknown field `x`, expected one of `a`, `b`": the name nearest to `x`.
fn suggestion(message: &str) -> Option<String> {
    let rest = message.strip_prefix("unknown field `")?;
    let (unknown, rest) = rest.split_once('`')?;
    let known = rest.split('`').skip(1).step_by(2);
    let nearest = known.max_by(|a, b| strsim::jaro(a, unknown).total_cmp(&strsim::jaro(b, unknown)))?;
    Some(format!("perhaps `{nearest}`"))
}
