//! Points on the path from the base model to the tuned one, in memory: what a choice of α is measured on.

use super::source::Source;
use super::{MergeMethod, MergeModels, Opened, path};
use crate::backend::Backend;
use crate::error::{Error, Result};
use crate::modules::ParamId;
use crate::secure::check::Limits;
use crate::secure::choice::{Candidate, choose, excess};
use crate::secure::eval::discrimination::Estimate;
use crate::secure::eval::{Evaluation, Rate};
use crate::secure::loaded::LoadedModel;
use crate::secure::text::ModelText;

/// Points that are measured where α is chosen: the base model, then from the tuned model towards it.
pub const PATH_POINTS: [f64; 6] = [0.0, 1.0, 0.9, 0.75, 0.5, 0.25];

/// The path between two models, on which one is loaded.
pub struct PathWalk<B: Backend> {
    opened: Opened,
    model: LoadedModel<B>,
}

/// Measures of a point on the path.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct PathPoint {
    /// 0 is the base model, 1 the tuned one.
    pub alpha: f64,
    /// Attack success rate.
    pub asr: Option<Rate>,
    /// Share of benign prompts that are refused.
    pub over_refusal: Option<Rate>,
    /// Refused harmful − refused benign.
    pub j: Option<Estimate>,
    /// AUROC of the refusal log-odds, by the first tokens of the base model's answers.
    pub auroc: Option<Estimate>,
    /// Task accuracy.
    pub task: Option<Rate>,
    /// Points by which it exceeds the limits, summed; 0 = within them.
    pub excess: f64,
}

impl PathPoint {
    /// Points and the chosen one among those other than the base, from evaluations in the order of `alphas`; the first is
    /// the base model's, at 0.
    ///
    /// # Errors
    /// [`Error::NotHeld`] where no other point is within the limits.
    pub fn choose(alphas: &[f64], found: &[Evaluation], limits: &Limits) -> (Vec<Self>, Result<f64>) {
        let Some(base) = found.first() else { return (Vec::new(), Err(Error::input("--alpha", "no points", "some"))) };
        let point = |(alpha, found): (&f64, &Evaluation)| Self {
            alpha: *alpha,
            asr: found.asr,
            over_refusal: found.over_refusal,
            j: found.j,
            auroc: found.auroc,
            task: found.task.as_ref().map(|task| task.overall),
            excess: excess(base, found, limits),
        };
        let points: Vec<Self> = alphas.iter().zip(found).map(point).collect();
        let candidate = |(alpha, evaluation): (&f64, _)| Candidate { alpha: *alpha, evaluation };
        let candidates: Vec<Candidate<'_>> = alphas.iter().zip(found).skip(1).map(candidate).collect();
        let chosen = choose(base, &candidates, limits).filter(|choice| choice.excess <= 0.0);
        let chosen = chosen.map(|choice| candidates[choice.index].alpha).ok_or_else(|| Error::NotHeld {
            what: "no point of the path but the base model is within the limits".into(),
            help: "take a number for --alpha from the table, raise a limit, or tune with `swat secure`".into(),
        });
        (points, chosen)
    }
}

impl MergeModels {
    /// The tuned model, or the base with the tuned adapter, opened for chat without its weights.
    ///
    /// # Errors
    /// As [`ModelText::of`].
    pub fn tuned_text(&self) -> Result<ModelText> {
        ModelText::of(Source::open("--tuned", &self.tuned, &self.base)?.files, None)
    }
}

impl<B: Backend> PathWalk<B> {
    /// Opens the models, and loads the tuned one; `text` is [`MergeModels::tuned_text`].
    ///
    /// # Errors
    /// As [`super::merge`] and [`ModelText::load`].
    pub fn open(models: &MergeModels, text: ModelText, backend: B) -> Result<Self> {
        let opened = Opened::open(models, MergeMethod::Path)?;
        let model = text.load_values(backend, |id, shape| opened.tuned.tensor(id, shape))?;
        Ok(Self { opened, model })
    }

    /// The model at `alpha`, from 0 (base) to 1 (tuned), rounded to the backend's precision and not to the one in which it
    /// would be saved.
    ///
    /// # Errors
    /// [`crate::error::Error::Io`] where a tensor cannot be read; a failing device.
    pub fn at(&mut self, alpha: f64) -> Result<&LoadedModel<B>> {
        let shapes: Vec<(ParamId, Vec<usize>)> = self.opened.tuned.files.config.params();
        for (id, shape) in shapes {
            let mut values = self.opened.tuned.tensor(id, &shape)?;
            path::path(&self.opened.base.tensor(id, &shape)?, &mut values, alpha);
            self.model.decoder.write(id, &values)?;
        }
        Ok(&self.model)
    }

    /// The model at the last point.
    pub(in crate::secure) fn into_model(self) -> LoadedModel<B> {
        self.model
    }
}
