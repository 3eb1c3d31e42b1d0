//! Training: masked AdamW, gradient clipping, schedules, the training loop, checkpoints and exact resume.
//!
//! [`Tuner`] runs a list of [`Phase`]s over one decoder and one loader. A phase trains the cells in its table of
//! learning rates; all other tensors have no gradients, moments or decay, and stay bit-identical. Nothing is printed:
//! progress goes to [`Callbacks`].

mod access;
mod buckets;
mod checkpoint;
mod ema;
mod identity;
mod lisa;
mod metrics;
mod moments;
mod optimizer;
mod options;
mod parts;
mod plan;
mod reference;
mod restore;
mod schedule;
mod setup;
mod start;
mod state;
mod step;
mod tensors;
mod tuner;
mod updates;
mod watch;

pub use checkpoint::disk_bytes;
pub use lisa::Lisa;
pub use metrics::{PhaseSummary, Rounding, RunPosition, StepMetrics, TuneSummary, peak_bytes};
pub use optimizer::{Optimizer, StepOutcome, StepSettings};
pub use options::{Length, PhaseOptions, TuneOptions};
pub use schedule::Schedule;
pub use setup::{Callbacks, Phase, RunDir, Tuner};
pub use updates::{PhaseUpdates, Update, Updates, cell_updates};
pub use watch::{Evaluated, Evaluation, Evaluator, WatchSettings};
