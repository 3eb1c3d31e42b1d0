//! Statistics of a run, and `metrics.jsonl`: one line per step, each step once even across interruptions.

use super::updates::Updates;
use super::watch::Evaluation;
use crate::error::{Error, FileOp, Result};
use crate::io::json;
use crate::io::safetensors::{Dtype, rounded};
use std::fs::{File, OpenOptions};
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

/// One line of `metrics.jsonl`.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct StepMetrics {
    /// Step from 1, over all phases.
    pub step: u64,
    /// Name of the phase.
    pub phase: String,
    /// Mean cross-entropy over the trained tokens, in nats; `null` if there are none or it is not finite.
    pub loss: Option<f64>,
    /// Learning rate by the schedule, before the cells' factors.
    pub lr: f64,
    /// Global gradient norm before clipping; `null` in a skipped step.
    pub grad_norm: Option<f64>,
    /// Tokens with a loss.
    pub trained_tokens: u64,
    /// All tokens of the step.
    pub tokens: u64,
    /// `tokens` per second.
    pub tok_per_s: f64,
    /// Time of the minimum cost at the measured roofline over the step's time (see [`crate::engine::MinimumCost`]);
    /// none without a roofline, and in a step without a loss.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub speed_of_light: Option<f64>,
    /// Peak memory so far, in bytes: of the GPU's buffers, else resident memory of the process (0 where unknown).
    pub peak_bytes: u64,
    /// Duration of the step, in milliseconds.
    pub step_ms: f64,
    /// Held-out loss after the step, if it was evaluated.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub eval_loss: Option<f64>,
    /// Mean refusal log-odds over harmful prompts after the step, likewise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub eval_refusal: Option<f64>,
    /// Reason if the step was skipped.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub skipped: Option<String>,
}

/// Position of a run at a callback.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RunPosition {
    /// Name of the phase.
    pub phase: String,
    /// Steps taken, over all phases.
    pub step: u64,
    /// Steps taken in this phase.
    pub phase_step: u64,
    /// Steps of this phase.
    pub phase_steps: u64,
    /// Epochs finished, over all phases.
    pub epoch: u64,
}

/// Statistics of a phase.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct PhaseSummary {
    /// Its name.
    pub phase: String,
    /// Steps, skipped ones included.
    pub steps: u64,
    /// Steps skipped for a non-finite loss or gradient.
    pub skipped_non_finite: u64,
    /// Why the last of those was skipped.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_skipped: Option<String>,
    /// Steps skipped for lack of trained tokens.
    pub skipped_empty: u64,
    /// Tokens with a loss.
    pub trained_tokens: u64,
    /// All tokens.
    pub tokens: u64,
    /// First loss.
    pub first_loss: Option<f32>,
    /// Last loss.
    pub last_loss: Option<f32>,
    /// Wall time of the steps, in seconds.
    pub seconds: f64,
}

/// What saving does to the weights that a run has moved: those of a model that is saved in bf16 are rounded, and small
/// updates are lost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Rounding {
    /// Weights that differ from those before the run, as they are computed with.
    pub moved: u64,
    /// Of those, weights that are saved as they were before the run.
    pub unchanged: u64,
}

impl Rounding {
    /// Counts a tensor's values before and after the run, saved in `dtype`.
    pub fn count(&mut self, before: &[f32], after: &[f32], dtype: Dtype) {
        for (before, after) in before.iter().zip(after).filter(|(before, after)| before != after) {
            self.moved += 1;
            self.unchanged += u64::from(rounded(*before, dtype) == rounded(*after, dtype));
        }
    }
}

/// Statistics of a run.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct TuneSummary {
    /// One per phase; phases of no steps are left out.
    pub phases: Vec<PhaseSummary>,
    /// Updates of each cell, if measured.
    pub updates: Updates,
    /// Step of the checkpoint that was resumed.
    pub resumed_from: Option<u64>,
    /// Peak memory in bytes, as [`StepMetrics::peak_bytes`].
    pub peak_bytes: u64,
    /// Largest [`crate::engine::Plan::total_bytes`] of a phase.
    #[serde(default)]
    pub planned_bytes: u64,
    /// Evaluations during the run.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub evaluations: Vec<Evaluation>,
    /// Step whose weights were kept as the best.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub best_step: Option<u64>,
    /// What saving did to the weights, if the run was saved.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rounding: Option<Rounding>,
}

/// Peak resident memory of the process, in bytes (`VmHWM` of `/proc/self/status`); 0 where unknown.
pub fn peak_bytes() -> u64 {
    std::fs::read_to_string("/proc/self/status").ok().and_then(|status| high_water_bytes(&status)).unwrap_or(0)
}

fn high_water_bytes(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kibibytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kibibytes.checked_mul(1024)
}

/// The log file.
pub(super) struct MetricsLog {
    path: PathBuf,
    file: File,
    bytes: u64,
}

impl MetricsLog {
    /// Opens the log and truncates it to `keep` bytes: the lines behind are of steps that will be repeated.
    pub(super) fn open(path: &Path, keep: u64) -> Result<Self> {
        let mut file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)
            .map_err(Error::io(path, FileOp::Write))?;
        let there = file.metadata().map_err(Error::io(path, FileOp::Read))?.len();
        let bytes = keep.min(there);
        file.set_len(bytes).map_err(Error::io(path, FileOp::Write))?;
        file.seek(SeekFrom::Start(bytes)).map_err(Error::io(path, FileOp::Write))?;
        Ok(Self { path: path.to_owned(), file, bytes })
    }

    /// Appends a line in a single write, so that a killed process leaves no partial line.
    pub(super) fn append(&mut self, metrics: &StepMetrics) -> Result<()> {
        let line = json::line(metrics)?;
        self.file.write_all(line.as_bytes()).map_err(Error::io(&self.path, FileOp::Write))?;
        self.bytes += line.len() as u64;
        Ok(())
    }

    /// Bytes so far.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Flushes the file to the disk.
    pub(super) fn sync(&self) -> Result<()> {
        self.file.sync_data().map_err(Error::io(&self.path, FileOp::Write))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(step: u64) -> StepMetrics {
        StepMetrics {
            step,
            phase: "all".into(),
            loss: Some(1.5),
            lr: 1e-3,
            grad_norm: None,
            trained_tokens: 3,
            tokens: 9,
            tok_per_s: 1.0,
            speed_of_light: Some(0.5),
            peak_bytes: 0,
            step_ms: 2.0,
            eval_loss: None,
            eval_refusal: None,
            skipped: (step == 2).then(|| "why".into()),
        }
    }

    #[test]
    fn reopening_cuts_what_comes_after() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        let mut log = MetricsLog::open(&path, 0).unwrap();
        log.append(&line(1)).unwrap();
        let keep = log.bytes();
        log.append(&line(2)).unwrap();
        drop(log);
        let mut log = MetricsLog::open(&path, keep).unwrap();
        log.append(&line(3)).unwrap();
        let steps: Vec<StepMetrics> =
            std::fs::read_to_string(&path).unwrap().lines().map(|l| serde_json::from_str(l).unwrap()).collect();
        assert_eq!(steps, [line(1), line(3)]);
        assert_eq!(log.bytes(), std::fs::metadata(&path).unwrap().len());
    }

    #[test]
    fn a_shorter_file_is_continued_where_it_ends() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        let mut log = MetricsLog::open(&path, 1000).unwrap();
        log.append(&line(1)).unwrap();
        assert_eq!(std::fs::read(&path).unwrap().first(), Some(&b'{'));
    }

    #[test]
    fn high_water_mark_is_in_bytes() {
        assert_eq!(high_water_bytes("Name:\tx\nVmHWM:\t    1234 kB\nVmRSS:\t 1 kB\n"), Some(1234 * 1024));
        assert_eq!(high_water_bytes("nothing"), None);
        if cfg!(target_os = "linux") {
            assert!(peak_bytes() > 1 << 20);
        }
    }
}
