//! What a study records of a tuning run: its drift, and its loss curve.

use super::outcome::DriftPoint;
use crate::backend::Backend;
use crate::engine::Decoder;
use crate::error::{Error, FileOp, Result};
use crate::io::json;
use crate::progress::{Observer, Progress};
use crate::secure::eval::metrics::Scores;
use crate::secure::probe::features::snapshot;
use crate::secure::probe::{Head, Probe};
use crate::train::{Callbacks, RunPosition, StepMetrics};
use serde_json::Value;
use std::path::{Path, PathBuf};

/// Most points of a recorded loss curve.
const LOSS_POINTS: u64 = 400;

/// Records the drift of a tuning run after each epoch and phase, and reports progress.
pub(super) struct DriftRecorder<'a, 'w> {
    pub(super) probe: &'a Probe,
    pub(super) tokens: Vec<Vec<u32>>,
    pub(super) harmful: Vec<bool>,
    pub(super) points: Vec<DriftPoint>,
    pub(super) path: PathBuf,
    pub(super) observer: Observer<'w>,
    pub(super) name: String,
}

impl DriftRecorder<'_, '_> {
    /// Loads the points of an interrupted run, or measures the first.
    pub(super) fn begin<B: Backend>(&mut self, decoder: &Decoder<B>) -> Result<()> {
        if let Ok(text) = std::fs::read_to_string(&self.path) {
            self.points = serde_json::from_str(&text).unwrap_or_default();
        }
        if self.points.is_empty() { self.measure(decoder, 0) } else { Ok(()) }
    }

    fn measure<B: Backend>(&mut self, decoder: &Decoder<B>, step: u64) -> Result<()> {
        // A resumed run may measure the same step again.
        self.points.retain(|p| p.step < step);
        let first = self.probe.metadata.first_tokens.as_ref();
        let read = snapshot(decoder, &self.tokens, first, 8192, &mut |_| {})?;
        let layer = self.probe.metadata.metric_layer;
        let features = read.features.layers.get(layer).map(Vec::as_slice).unwrap_or_default();
        let logits = self.probe.logits(layer, &Head::Harmful, features)?;
        let scores = Scores::new(&logits, read.refusal.as_deref(), &self.harmful);
        self.points.push(DriftPoint { step, scores });
        json::write(&self.path, &self.points)
    }
}

impl<B: Backend> Callbacks<B> for DriftRecorder<'_, '_> {
    fn step(&mut self, metrics: &StepMetrics, at: &RunPosition) -> Result<()> {
        let task = format!("tune {}: {}", self.name, at.phase);
        let (done, total) = (at.phase_step as usize, at.phase_steps as usize);
        (self.observer)(Progress { task: &task, done, total, loss: metrics.loss });
        Ok(())
    }

    fn epoch_ends(&mut self, decoder: &Decoder<B>, at: &RunPosition) -> Result<()> {
        self.measure(decoder, at.step)
    }

    fn phase_ends(&mut self, decoder: &Decoder<B>, at: &RunPosition) -> Result<()> {
        self.measure(decoder, at.step)
    }
}

/// Loss curve of a finished run, subsampled; empty for a run without steps.
pub(super) fn losses(path: &Path) -> Result<Vec<(u64, f64)>> {
    let text = std::fs::read_to_string(path).map_err(Error::io(path, FileOp::Read))?;
    let line = |line: &str| -> Option<(u64, f64)> {
        let value: Value = serde_json::from_str(line).ok()?;
        value["step"].as_u64().zip(value["loss"].as_f64())
    };
    let all: Vec<(u64, f64)> = text.lines().filter_map(line).collect();
    // By step number, so that the runs of several seeds keep the same steps even where one skipped some.
    let every = all.last().map_or(1, |(step, _)| step.div_ceil(LOSS_POINTS).max(1));
    Ok(all.into_iter().filter(|(step, _)| step % every == 1 % every).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_without_steps_has_an_empty_loss_curve() {
        let file = tempfile::NamedTempFile::new().unwrap();
        assert_eq!(losses(file.path()).unwrap(), []);
        std::fs::write(file.path(), "{\"step\": 1, \"loss\": 2.5}\n{\"step\": 2, \"loss\": null}\n").unwrap();
        assert_eq!(losses(file.path()).unwrap(), [(1, 2.5)]);
    }
}
