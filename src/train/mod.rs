//! An optimiser run: masked AdamW over a module table, clipping, schedules, the step loop, checkpoints and exact resume.
//!
//! [`Tuner`] runs a list of [`Phase`]s over one decoder and one loader. What a phase trains is said by a table of
//! learning rates; all other tensors get no gradient buffer, no moments and no decay, and stay bit-identical.
//! Nothing is printed in this room: a caller listens through [`Callbacks`].

mod checkpoint;
mod ema;
mod identity;
mod metrics;
mod optimizer;
mod options;
mod plan;
mod schedule;
mod start;
mod state;
mod step;
mod tensors;
mod tuner;
mod updates;

pub use metrics::{StepMetrics, peak_bytes};
pub use optimizer::{Optimizer, StepOutcome, StepSettings};
pub use options::{Length, PhaseOptions, TuneOptions};
pub use schedule::Schedule;
pub use tuner::{Callbacks, Phase, PhaseSummary, RunDir, RunPosition, TuneSummary, Tuner};
pub use updates::{PhaseUpdates, Update, Updates, cell_updates};
