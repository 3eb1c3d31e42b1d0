//! The evaluation of a setting's model.

use super::{Run, Study};
use crate::backend::Backend;
use crate::error::{Error, Result};
use crate::progress::{Observer, Progress};
use crate::secure::eval::guard::Moderated;
use crate::secure::eval::{Evaluation, PromptOutcomes};
use crate::secure::loaded::EvaluationInput;
use crate::secure::probe::Probe;
use crate::secure::probe::drift::Drift;
use crate::secure::probe::features::Snapshot;
use crate::secure::study::stage::file_hash;
use serde_json::{Value, json};
use std::path::Path;

/// What the stage keeps; without outcomes in stages of earlier versions.
#[derive(serde::Serialize, serde::Deserialize)]
struct Evaluated(Evaluation, Option<Drift>, #[serde(default)] PromptOutcomes);

impl<B: Backend> Study<'_, B> {
    pub(super) fn evaluation(
        &self,
        run: &Run<'_>,
        dir: &Path,
        model_inputs: &Value,
        probe: &Probe,
        observer: Observer<'_>,
    ) -> Result<(Evaluation, Option<Drift>)> {
        let config = self.config;
        let asked: Vec<String> = [&config.data.task, &config.data.heldout, &config.data.strict]
            .into_iter()
            .flatten()
            .chain(&config.data.evaluation)
            .map(|p| file_hash(p))
            .collect::<Result<_>>()?;
        let mut inputs = json!({ "model": model_inputs, "probe": probe.hash()?, "options": config.evaluate,
            "asked": asked, "seed": config.seed, "refusals": format!("{:?}", self.refusals) });
        if let Some(hash) = &self.guard.hash {
            inputs["guard"] = hash.as_str().into();
        }
        self.add_row_options(&mut inputs);
        let Evaluated(mut evaluation, drift, outcomes) =
            self.stages.run(&format!("evaluate/{}", run.stem), &inputs, || {
                let model = self.model(dir)?;
                let heldout = match &config.data.heldout {
                    Some(path) => {
                        let (max_length, rows) = (config.tune.recipe.shared.max_length, &mut self.rows.borrow_mut());
                        model.text.examples(path, max_length, rows)?.examples
                    }
                    None => Vec::new(),
                };
                let input = EvaluationInput {
                    prompts: &self.data.evaluation,
                    strict: self.data.strict.as_ref(),
                    tasks: &self.data.tasks,
                    heldout: &heldout,
                    judge: self.judge.as_ref(),
                    guard: self.guard.get(self.backend)?,
                    export: None,
                    probe: None,
                    first_tokens: probe.metadata.first_tokens.as_ref(),
                };
                let named = format!("evaluate {}", run.name);
                let mut report = |p: Progress<'_>| observer(Progress { task: &format!("{named}: {}", p.task), ..p });
                let evaluation = model.evaluate(&input, &config.evaluate, self.refusals, &mut report)?;
                evaluation.guard.as_ref().map_or(Ok(()), Moderated::require)?;
                if let Some(harm) = evaluation
                    .harmfulness
                    .or(evaluation.strongreject)
                    .filter(|harm| harm.scored == 0 && harm.failed > 0)
                {
                    // Not to be cached: the same command asks again.
                    let reason = evaluation.judge_failure.as_deref().unwrap_or_default();
                    let what = format!("{}: none of {} answers has a score: {reason}", run.name, harm.failed);
                    return Err(Error::failed(what, "check evaluate.judge, or leave it out"));
                }
                let drift = match run.spec.is_given() {
                    true => None,
                    false => {
                        let base = self.base_snapshot(probe, &mut report)?;
                        Some(model.drift(probe, &self.data.security, base, &mut report)?)
                    }
                };
                let outcomes = evaluation.outcomes.clone();
                Ok(Evaluated(evaluation, drift, outcomes))
            })?;
        evaluation.outcomes = outcomes;
        Ok((evaluation, drift))
    }

    /// What drift is measured from, the same for every run.
    fn base_snapshot(&self, probe: &Probe, observer: Observer<'_>) -> Result<&Snapshot> {
        if let Some(base) = self.base.get() {
            return Ok(base);
        }
        let base = self.model(&self.config.model)?.snapshot(probe, &self.data.security, observer)?;
        Ok(self.base.get_or_init(|| base))
    }
}
