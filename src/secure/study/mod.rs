//! A study from one configuration: probe, map, search, every setting tuned and evaluated. Results of each stage are
//! cached.

mod check;
mod config;
mod data;
mod folder;
mod lease;
mod outcome;
mod record;
mod run;
mod stage;

pub use config::{DataFiles, RunConfig, TuneConfig};
pub use folder::claim_folder;
pub use lease::Worker;
pub use outcome::{DriftPoint, Outcome, RunOutcome, SettingOutcome, TunedOutcome};
pub use run::{run, run_names, work};
