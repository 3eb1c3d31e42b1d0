//! What a study checks on its model before any weights are read.

use super::RunConfig;
use super::data::StudyData;
use crate::data::RowReader;
use crate::error::Result;
use crate::secure::recipe::Mix;
use crate::secure::text::ModelText;
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
