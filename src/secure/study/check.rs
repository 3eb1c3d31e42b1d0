//! What a study checks on its model before any weights are read.

use super::RunConfig;
use super::config::OverlapRule;
use super::data::StudyData;
use crate::data::{Example, RowReader};
use crate::error::Result;
use crate::model::ModelConfig;
use crate::modules::{Cell, ModuleKind, ModuleSet};
use crate::secure::overlap::{Passage, overlaps, refuse_overlaps};
use crate::secure::recipe::{Base, Mix, Recipe};
use crate::secure::text::ModelText;
use crate::secure::tune::TuneJob;
use crate::secure::warmup::check_warmups;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// Checks options that depend on the model, and the lengths of all rows; the evaluation's are samples.
pub(super) fn check_model(config: &RunConfig, text: &ModelText, data: &StudyData, rows: &mut RowReader) -> Result<()> {
    let model = &text.files.config;
    config.probe.check(model.layers)?;
    config.robustness.check(&model.cells())?;
    config.search.check()?;
    text.check_prompts(data.security.iter().chain(&data.evaluation).map(|p| (p.place.as_str(), p.prompt.as_str())))?;
    text.check_prompts(data.tasks.iter().map(|task| (task.place.as_str(), task.prompt.as_str())))?;
    let mut read =
        |path: &Path| text.examples(path, config.tune.recipe.shared.max_length, rows).map(|read| read.examples);
    let train: Vec<Vec<Example>> = config.data.train.iter().map(|path| read(path)).collect::<Result<_>>()?;
    config.data.heldout.iter().try_for_each(|path| read(path).map(drop))?;
    let mut mixes = BTreeMap::new();
    for what in [Mix::Refusals, Mix::Attack, Mix::Replay] {
        if let Some(path) = config.data.mixed(what) {
            let mut examples = read(path)?;
            examples.iter_mut().for_each(|example| example.replayed = what == Mix::Replay);
            mixes.insert(what, examples);
        }
    }
    rows.check_used()?;
    check_lengths(config, model, &train.concat(), &mixes)
}

/// Checks that the warm-ups of all settings end within their phases.
fn check_lengths(
    config: &RunConfig,
    model: &ModelConfig,
    train: &[Example],
    mixes: &BTreeMap<Mix, Vec<Example>>,
) -> Result<()> {
    // In the place of Mods_Rob, which is still to be found: how long it is trained does not depend on it.
    let set = ModuleSet::from_iter([Cell::module(0, ModuleKind::Q)]);
    for setting in config.settings.iter().filter(|setting| !setting.is_given()) {
        let recipe = &config.tune.recipe;
        let mut job = match setting.base {
            Base::Warmup(_) => TuneJob { mods: Some(set.clone()), recipe: setting.apply(recipe, Some(model))? },
            Base::Rates(None) => Recipe { base: Base::PlainEqual, ..setting.clone() }.job(recipe, model, None, None)?,
            _ => setting.job(recipe, model, Some(&set), None)?,
        };
        let share = |share: Option<f64>| share.unwrap_or(config.evaluate.mix_share);
        let more = setting.options.mixes.iter();
        let more = more.map(|mix| (mix.what, share(mix.share), mixes.get(&mix.what).cloned()));
        let more: Vec<_> = more.collect();
        for seed in setting.seeds(&config.training_seeds(), recipe.shared.seed) {
            job.recipe.shared.seed = seed;
            check_warmups(&job, train, &more).map_err(|e| e.at(&setting.place()))?;
        }
    }
    Ok(())
}

/// Looks for prompts of the evaluation, and near-duplicates of them, in the tuning data of the settings: an error, or
/// their number, as the configuration asks.
pub(super) fn check_overlap(config: &RunConfig, data: &StudyData, rows: &mut RowReader) -> Result<usize> {
    let passage = |place: &str, text: &str| Passage { place: place.into(), text: text.into() };
    let mut held_out: Vec<Passage> = data.evaluation.iter().map(|p| passage(&p.place, &p.prompt)).collect();
    held_out.extend(data.tasks.iter().map(|task| passage(&task.place, &task.prompt)));
    if let Some(path) = &config.data.heldout {
        held_out.extend(Passage::of_conversations(path, rows)?);
    }
    let tuned = || config.settings.iter().filter(|setting| !setting.is_given());
    let train = config.data.train.iter().filter(|_| tuned().next().is_some()).map(PathBuf::as_path);
    let kinds: BTreeSet<Mix> = tuned().flat_map(|setting| &setting.options.mixes).map(|mix| mix.what).collect();
    let mut tuning = Vec::new();
    for path in train.chain(kinds.into_iter().filter_map(|what| config.data.mixed(what))) {
        tuning.extend(Passage::of_conversations(path, rows)?);
    }
    let found = overlaps(&tuning, &held_out);
    if config.data.overlap == OverlapRule::Refuse {
        let help =
            "other rows, so that the evaluation asks what tuning has not seen; data.overlap = \"report\" counts them";
        refuse_overlaps(&found, help)?;
    }
    Ok(found.iter().map(|overlap| &overlap.place).collect::<BTreeSet<_>>().len())
}
