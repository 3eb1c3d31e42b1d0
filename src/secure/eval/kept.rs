//! Evaluations as they are kept between runs.

use super::{Evaluation, PromptOutcomes};
use crate::error::Result;
use crate::model::Clock;
use crate::secure::study::{Stages, hash};
use serde_json::Value;
use std::path::Path;

/// An evaluation with the outcome of each prompt, which [`Evaluation`] alone does not save: what a paired comparison with
/// a later evaluation over the same prompts needs. No text of an answer is in it.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct KeptEvaluation {
    evaluation: Evaluation,
    outcomes: PromptOutcomes,
}

impl KeptEvaluation {
    /// The evaluations in `dir` of the same `inputs`, precision `float`, date and chat template, else those of `work`,
    /// which are kept there.
    ///
    /// # Errors
    /// Those of `work`; [`crate::error::Error::Io`].
    pub fn cached(
        dir: &Path,
        inputs: &Value,
        (float, date, template): (&'static str, Option<Clock>, &str),
        work: impl FnOnce() -> Result<Vec<Self>>,
    ) -> Result<Vec<Self>> {
        Stages::new(dir, float, date, template).run(&format!("measures-{}", hash(inputs)), inputs, work)
    }
}

impl From<Evaluation> for KeptEvaluation {
    fn from(mut evaluation: Evaluation) -> Self {
        let outcomes = std::mem::take(&mut evaluation.outcomes);
        Self { evaluation, outcomes }
    }
}

impl From<KeptEvaluation> for Evaluation {
    fn from(KeptEvaluation { evaluation, outcomes }: KeptEvaluation) -> Self {
        Self { outcomes, ..evaluation }
    }
}
