//! The configuration of a study: one TOML file.

use crate::error::{Error, Result};
use crate::secure::{JudgeOptions, ProbeOptions, RobustnessOptions, ScorerOptions, SearchOptions, TuneJob};
use serde::de::DeserializeOwned;
use std::path::{Path, PathBuf};

/// Everything that `swat run` does, from one file. Relative paths are relative to that file.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RunConfig {
    /// The model as given: a Hugging Face directory.
    pub model: PathBuf,
    /// Chat template, for a model that has none.
    pub chat_template: Option<PathBuf>,
    /// Where everything goes.
    pub out: PathBuf,
    /// Title of the report; the model directory's name if empty.
    pub title: String,
    /// Seed of splits and of the prompts and tasks that are asked; training and noise have their own below.
    pub seed: u64,
    /// What is compared: see [`super::SettingSpec`].
    pub settings: Vec<String>,
    /// Files.
    pub data: DataFiles,
    /// Security-feature classifiers.
    pub probe: ProbeOptions,
    /// Perturbations behind the map and the search.
    pub perturb: ScorerOptions,
    /// The map.
    pub robustness: RobustnessOptions,
    /// The search for Mods_Rob.
    pub search: SearchOptions,
    /// Mods_Rob given by hand (an expression or a file): no search then.
    pub mods: Option<String>,
    /// Tuning; `mods` there stays empty, settings fill it in. `seeds`: each setting is tuned and evaluated with each, at N
    /// times the time and disk space.
    pub tune: TuneJob,
    /// What is measured of every setting.
    pub evaluate: EvaluateOptions,
}

/// Input files of a study, all JSONL.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DataFiles {
    /// Labelled prompts for probe, map and drift.
    pub security: PathBuf,
    /// Training conversations.
    pub train: Vec<PathBuf>,
    /// Prompts whose answers give the attack success rate (harmful) and over-refusal (benign); the security file's test
    /// and ood splits if empty.
    pub evaluation: Vec<PathBuf>,
    /// Checkable tasks.
    pub task: Option<PathBuf>,
    /// Conversations for the perplexity.
    pub heldout: Option<PathBuf>,
    /// Refusals to mix in, for settings with `+refusals`.
    pub refusals: Option<PathBuf>,
    /// Answered harmful requests to mix in, for settings with `+attack`.
    pub attack: Option<PathBuf>,
    /// `{"prompt", "answers": […]}`: what counts as obeying word for word.
    pub strict: Option<PathBuf>,
}

/// What is measured.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EvaluateOptions {
    /// Most harmful prompts that are answered, drawn from all by the run's seed; 0 = all.
    pub harmful: usize,
    /// Most benign prompts that are answered; 0 = all.
    pub benign: usize,
    /// Most tasks; 0 = all.
    pub tasks: usize,
    /// Longest answer to a security prompt, in tokens: refusals show early.
    pub answer_tokens: usize,
    /// Longest answer to a task, in tokens.
    pub task_tokens: usize,
    /// Share of the mixed-in lines of `+refusals` and `+attack`.
    pub mix_share: f64,
    /// Key-value cache of the generation, in bytes.
    pub cache_bytes: u64,
    /// A judge of harmfulness; off if absent. Prompts and answers are sent to it.
    pub judge: Option<JudgeOptions>,
}

impl Default for EvaluateOptions {
    fn default() -> Self {
        Self {
            harmful: 0,
            benign: 0,
            tasks: 0,
            answer_tokens: 48,
            task_tokens: 64,
            mix_share: 0.1,
            cache_bytes: 1 << 30,
            judge: None,
        }
    }
}

impl RunConfig {
    /// Reads a TOML file and applies `key=value` overrides such as `tune.shared.seed=2`. Unknown keys are errors that
    /// name the nearest known one.
    ///
    /// # Errors
    /// [`Error::Input`] names the key; [`Error::Io`].
    pub fn read(path: &Path, overrides: &[String]) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(Error::io(path, "read"))?;
        let place = path.display().to_string();
        let mut table: toml::Table =
            text.parse().map_err(|e: toml::de::Error| Error::input(&place, e.message(), "valid TOML"))?;
        for change in overrides {
            apply(&mut table, change)?;
        }
        let mut config: Self = parse(toml::Value::Table(table), &place)?;
        config.resolve(path.parent().unwrap_or(Path::new("")));
        config.check(&place)?;
        Ok(config)
    }

    fn resolve(&mut self, base: &Path) {
        let at = |path: &mut PathBuf| {
            if path.is_relative() && !path.as_os_str().is_empty() {
                *path = base.join(&*path);
            }
        };
        at(&mut self.model);
        at(&mut self.out);
        at(&mut self.data.security);
        self.data.train.iter_mut().for_each(at);
        self.data.evaluation.iter_mut().for_each(at);
        let data = &mut self.data;
        let optional = [&mut self.chat_template, &mut data.task, &mut data.heldout, &mut data.refusals];
        optional.into_iter().chain([&mut data.attack, &mut data.strict]).flatten().for_each(at);
    }

    /// The training seeds: every setting that tunes has a run with each.
    pub fn training_seeds(&self) -> Vec<u64> {
        self.tune.seeds.clone().unwrap_or_else(|| vec![self.tune.shared.seed])
    }

    /// What must be there.
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
        if self.data.train.is_empty() && self.settings.iter().any(|s| s != "given") {
            return missing("data.train", "at least one training file");
        }
        if self.tune.mods.is_some() {
            return Err(Error::input(format!("{place}: tune.mods"), "a set", "nothing there: `mods` at the top level"));
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
        self.tune.shared.check()?;
        self.tune.mods_phase.check()?;
        self.tune.all_phase.check()
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

/// Deserialises with the offending key in the error and a suggestion for an unknown one.
fn parse<T: DeserializeOwned>(value: toml::Value, place: &str) -> Result<T> {
    value.try_into().map_err(|e: toml::de::Error| {
        let message = e.message().to_owned();
        let expected = suggestion(&message).unwrap_or_else(|| "a known key with a value of its type".into());
        Error::input(place, message.lines().next().unwrap_or_default(), expected)
    })
}

/// From "unknown field `x`, expected one of `a`, `b`": the name nearest to `x`.
fn suggestion(message: &str) -> Option<String> {
    let rest = message.strip_prefix("unknown field `")?;
    let (unknown, rest) = rest.split_once('`')?;
    let known = rest.split('`').skip(1).step_by(2);
    let nearest = known.max_by(|a, b| strsim::jaro(a, unknown).total_cmp(&strsim::jaro(b, unknown)))?;
    Some(format!("perhaps `{nearest}`"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_with_overrides_resolves_its_paths() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run.toml");
        let text = "model = 'm'\nout = '/tmp/o'\nsettings = ['given', 'swat']\n[data]\nsecurity = 's.jsonl'\ntrain = ['t.jsonl']\n[tune.all_phase]\nsteps = 3\n";
        std::fs::write(&path, text).unwrap();
        let set = ["tune.all_phase.lr=0.5".to_owned(), "perturb.kind=lowrank:4".to_owned()];
        let config = RunConfig::read(&path, &set).unwrap();
        assert_eq!(config.model, dir.path().join("m"));
        assert_eq!(config.out, Path::new("/tmp/o"));
        assert_eq!(config.tune.all_phase.lr, 0.5);
        assert_eq!(config.perturb.kind.to_string(), "lowrank:4");
        assert_eq!(config.data.train, [dir.path().join("t.jsonl")]);
    }

    #[test]
    fn training_seeds_are_one_or_a_list() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run.toml");
        std::fs::write(&path, "model = 'm'\nout = 'o'\n[data]\nsecurity = 's'\n[tune.shared]\nseed = 4\n").unwrap();
        let read = |overrides: &[&str]| {
            let overrides: Vec<String> = overrides.iter().map(|o| (*o).to_owned()).collect();
            RunConfig::read(&path, &overrides)
        };
        let one = read(&[]).unwrap();
        assert_eq!(one.training_seeds(), [4]);
        // Kept stages are found by a hash of this.
        assert!(!serde_json::to_string(&one.tune).unwrap().contains("seeds"));
        assert_eq!(read(&["tune.seeds=[3, 0, 4]"]).unwrap().training_seeds(), [3, 0, 4]);
        for (wrong, found) in
            [("[]", "an empty list"), ("[1, 2, 0, 2]", "2 more than once"), ("[-1]", "-1"), ("3", "3")]
        {
            let error = read(&[&format!("tune.seeds={wrong}")]).unwrap_err();
            assert!(error.to_string().contains(found), "{error}");
            assert_eq!(error.exit_code(), 2);
        }
    }

    #[test]
    fn an_unknown_key_is_named_with_the_nearest_known_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run.toml");
        std::fs::write(&path, "modle = 'm'\n").unwrap();
        let error = RunConfig::read(&path, &[]).unwrap_err();
        assert!(error.to_string().contains("`modle`") && error.to_string().contains("`model`"), "{error}");
        assert_eq!(error.exit_code(), 2);
    }
}
