//! What a study checks on its model before any weights are read.

use super::RunConfig;
use crate::data::{SecurityPrompt, Task};
use crate::error::Result;
use crate::secure::text::ModelText;

/// Checks options that depend on the model, and the lengths of all rows; the evaluation's are samples.
pub(super) fn check_model(
    config: &RunConfig,
    text: &ModelText,
    prompts: &[SecurityPrompt],
    evaluation: (&[SecurityPrompt], &[Task]),
) -> Result<()> {
    let model = &text.files.config;
    config.probe.check(model.layers)?;
    config.robustness.check(&model.cells())?;
    config.search.check()?;
    // An answer needs a position of its own.
    let most = model.max_positions - 1;
    text.check_prompts(&config.data.security, prompts.iter().map(|p| p.prompt.as_str()), most)?;
    for path in &config.data.evaluation {
        text.check_prompts(path, evaluation.0.iter().map(|p| p.prompt.as_str()), most)?;
    }
    if let Some(path) = &config.data.task {
        text.check_prompts(path, evaluation.1.iter().map(|task| task.prompt.as_str()), most)?;
    }
    let conversations = config.data.train.iter().chain(&config.data.heldout);
    for path in conversations.chain(&config.data.refusals).chain(&config.data.attack) {
        text.examples(path, config.tune.recipe.shared.max_length)?;
    }
    Ok(())
}
