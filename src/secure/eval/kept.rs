//! Evaluations as they are kept between runs.

use super::{Evaluation, PromptOutcomes};

/// An evaluation with the outcome of each prompt, which [`Evaluation`] alone does not save: what a paired comparison with
/// a later evaluation over the same prompts needs. No text of an answer is in it.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct KeptEvaluation {
    evaluation: Evaluation,
    outcomes: PromptOutcomes,
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
