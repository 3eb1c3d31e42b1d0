//! `swat search`: from the map to Mods_Rob.

use super::common::{Common, print_json, print_line};
use super::names::Names;
use super::open::{OnDevice, check_security};
use super::progress::Bars;
use super::robustness::step_examples;
use crate::backend::Backend;
use crate::data::{RowOptions, RowReader, SecurityPrompt};
use crate::error::{Error, Result};
use crate::io::{IfExists, check_apart, check_file};
use crate::model::{Clock, ModelDir};
use crate::modules::ModuleSet;
use crate::options::mib;
use crate::report::format::{fixed, percent};
use crate::secure::{By, ModelText, ModsRob, Probe, RobustnessMap, SWEEP_MIB, ScorerOptions, SearchOptions, search};
use clap::Args;
use std::path::{Path, PathBuf};

/// Finds Mods_Rob: the modules that, perturbed together, move the security features least
#[derive(Args)]
#[command(after_help = "Example:
  swat search --map map.json --out mods.json

Sets are scored jointly, with the model, probe and prompts of the map, whose paths the map records; on a map of
--by conflict by its own sums, which need neither. The output file can be edited by hand.")]
pub(super) struct SearchCommand {
    /// The map's model, if it moved
    #[arg(long, value_name = "DIR_OR_NAME")]
    model: Option<PathBuf>,
    /// The map's adapter, if it moved
    #[arg(long, value_name = "DIR_OR_NAME")]
    adapter: Option<PathBuf>,
    /// Chat template (Jinja), for a model without its own
    #[arg(long, value_name = "FILE")]
    chat_template: Option<PathBuf>,
    /// Map of `swat robustness` on this model
    #[arg(long, value_name = "FILE")]
    map: PathBuf,
    /// The map's probes, if they moved
    #[arg(long, value_name = "FILE")]
    probe: Option<PathBuf>,
    /// The map's prompts, if they moved
    #[arg(long, value_name = "FILE")]
    security: Option<PathBuf>,
    /// The training data of a map of --by update, if they moved
    #[arg(long, value_name = "FILE_OR_NAME")]
    data: Vec<PathBuf>,
    #[command(flatten)]
    rows: RowOptions,
    /// Output file of the set
    #[arg(long, value_name = "FILE", default_value = "mods.json")]
    out: PathBuf,
    #[command(flatten)]
    options: SearchOptions,
    /// Memory of the sweep, in MiB
    #[arg(long = "memory-mib", value_name = "MEMORY_MIB", value_parser = mib, default_value = SWEEP_MIB)]
    memory: u64,
    /// Replace --out
    #[arg(long)]
    force: bool,
}

impl OnDevice for SearchCommand {
    fn model(&self) -> Option<PathBuf> {
        self.model.clone().or_else(|| RobustnessMap::load(&self.map).ok()?.made_from.map(|from| from.model))
    }

    fn resolve(&mut self, names: &mut Names<'_>) -> Result<()> {
        self.model.iter_mut().chain(&mut self.adapter).try_for_each(|model| names.model(model).map(drop))?;
        names.data(&mut self.data)?;
        names.file_if_any("--security", &mut self.security)
    }

    fn run<B: Backend>(self, common: &Common, backend: B) -> Result<()> {
        self.options.check()?;
        check_file(&self.out, IfExists::from_force(self.force), ModsRob::is_file)?;
        let map = RobustnessMap::load(&self.map)?;
        if map.by == By::Conflict {
            return self.first_order(common, &map);
        }
        let from = map.made_from.as_ref();
        let known = |own: Option<&PathBuf>, there: Option<&PathBuf>, option: &str| {
            let missing = || Error::input(self.map.display().to_string(), "no record of its inputs", option);
            own.or(there).cloned().ok_or_else(missing)
        };
        let model = known(self.model.as_ref(), from.map(|f| &f.model), "--model DIR")?;
        let probe = known(self.probe.as_ref(), from.map(|f| &f.probe), "--probe FILE")?;
        let security = known(self.security.as_ref(), from.map(|f| &f.security), "--security FILE")?;
        let adapter = self.adapter.as_ref().or(from.and_then(|f| f.adapter.as_ref()));
        let step = map.step.as_ref().map(|step| &step.options);
        let data = match (self.data.is_empty(), from) {
            (true, Some(from)) if step.is_some() => from.data.as_slice(),
            _ => self.data.as_slice(),
        };
        match (step, data) {
            (None, [_, ..]) => {
                return Err(Error::input("--data", "training data, which this map does not use", "no --data"));
            }
            (Some(_), []) => {
                let place = self.map.display().to_string();
                return Err(Error::input(place, "no record of its training data", "--data FILE"));
            }
            _ => {}
        }
        let mut inputs: Vec<(&str, &Path)> =
            vec![("--model", &model), ("--probe", &probe), ("--security", &security), ("--map", &self.map)];
        inputs.extend(adapter.map(|adapter| ("--adapter", adapter.as_path())));
        inputs.extend(data.iter().map(|path| ("--data", path.as_path())));
        check_apart(&[("--out", &self.out)], &inputs)?;
        let probe = Probe::load(&probe)?;
        let given = if self.rows.is_default() { from.map(|f| &f.rows) } else { None };
        let mut rows = RowReader::new(given.unwrap_or(&self.rows));
        let prompts = SecurityPrompt::read(&security, common.seed, &mut rows)?;
        let files = match adapter {
            None => ModelDir::open(&model)?,
            Some(adapter) => ModelDir::open_with_adapter(&model, adapter)?,
        };
        let mut text = ModelText::of(files, self.chat_template.as_deref())?;
        text.set_clock(probe.metadata.date.map_or_else(Clock::now, Ok)?);
        map.check_model(text.files.hash()?)?;
        check_security(&text, &prompts)?;
        let examples = step.map(|step| step_examples(&text, data, step, &mut rows, &backend)).transpose()?;
        common.end_reading(&rows)?;
        let mut model = text.load(backend)?;
        model.decoder.merge_lora()?;
        let mut bars = Bars::new(common);
        let mut options =
            ScorerOptions { split: map.split, retrain: false, budget_bytes: self.memory, ..ScorerOptions::default() };
        let scorer = match step.zip(examples) {
            None => {
                options.kind = map.kind.clone();
                model.scorer(&probe, &prompts, options)?
            }
            Some((step, examples)) => {
                let step = model.planned_step(examples, step, &mut bars.observer())?;
                map.check_step(&step)?;
                model.step_scorer(&probe, &prompts, options, step)?
            }
        };
        let options = &self.options;
        let mut joint = |set: &ModuleSet, seeds: &[u64]| scorer.joint(set, options.score, map.epsilon, seeds);
        let found = search(&map, options, &mut joint, &mut bars.observer())?;
        bars.finish();
        self.save(common, &found)
    }
}

impl SearchCommand {
    /// The search on a conflict map, which needs neither model nor prompts: joint scores are sums.
    fn first_order(&self, common: &Common, map: &RobustnessMap) -> Result<()> {
        let given = [
            ("--model", self.model.is_some()),
            ("--adapter", self.adapter.is_some()),
            ("--chat-template", self.chat_template.is_some()),
            ("--probe", self.probe.is_some()),
            ("--security", self.security.is_some()),
            ("--data", !self.data.is_empty()),
        ];
        if let Some((option, _)) = given.into_iter().find(|(_, given)| *given) {
            let found = format!("an option that has no effect on {}, a map of --by conflict", self.map.display());
            return Err(Error::input(option, found, "no such option: its sets are scored by its own sums"));
        }
        check_apart(&[("--out", &self.out)], &[("--map", &self.map)])?;
        let mut joint = |set: &ModuleSet, _: &[u64]| map.first_order(set);
        self.save(common, &search(map, &self.options, &mut joint, &mut |_| {})?)
    }

    fn save(&self, common: &Common, found: &ModsRob) -> Result<()> {
        found.save(&self.out)?;
        if common.json {
            return print_json(found);
        }
        print_line(&format!("Mods_Rob     {}", found.set))?;
        print_line(&format!("share        {} of the projections' parameters", percent(found.share, 1)))?;
        print_line(&format!("joint drop   {} (limit {})", fixed(found.joint, 4), fixed(found.tau, 4)))?;
        print_line(&format!("saved as     {}", self.out.display()))
    }
}
