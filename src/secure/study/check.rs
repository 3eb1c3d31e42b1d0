//! What a study checks on its model before any weights are read.

use super::RunConfig;
use super::config::OverlapRule;
use super::data::StudyData;
use crate::data::RowReader;
use crate::error::Result;
use crate::secure::overlap::{Passage, overlaps, refuse_overlaps};
use crate::secure::recipe::Mix;
use crate::secure::text::ModelText;
use std::collections::BTreeSet;
use std::path::PathBuf;

/// Checks options that depend on the model, and the lengths of all rows; the evaluation's are samples.
pub(super) fn check_model(config: &RunConfig, text: &ModelText, data: &StudyData, rows: &mut RowReader) -> Result<()> {
    let model = &text.files.config;
    config.probe.check(model.layers)?;
    config.robustness.check(&model.cells())?;
    config.search.check()?;
    text.check_prompts(data.security.iter().chain(&data.evaluation).map(|p| (p.place.as_str(), p.prompt.as_str())))?;
    text.check_prompts(data.tasks.iter().map(|task| (task.place.as_str(), task.prompt.as_str())))?;
    let conversations = config.data.train.iter().chain(&config.data.heldout);
    let mixed = [Mix::Refusals, Mix::Attack, Mix::Replay].into_iter().filter_map(|what| config.data.mixed(what));
    for path in conversations.map(PathBuf::as_path).chain(mixed) {
        text.examples(path, config.tune.recipe.shared.max_length, rows)?;
    }
    rows.check_used()
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
