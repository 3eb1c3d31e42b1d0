//! A study from one configuration: probe, map, search, every setting tuned and evaluated. Results of each stage are
//! cached.

mod check;
mod claims;
mod config;
mod data;
mod folder;
mod lease;
mod outcome;
mod record;
mod run;
mod stage;
mod verdict;

pub(crate) use claims::is_plain;
pub use claims::{Claim, Distance, Distances, Holds, claims};
pub use config::{DataFiles, MergeFiles, OverlapRule, RunConfig, TuneConfig};
pub use folder::claim_folder;
pub(super) use folder::{clock, lock};
pub use lease::Worker;
pub use outcome::{
    DriftPoint, MapOutcome, Outcome, RunOutcome, ScreenedFile, SettingOutcome, SettingSummary, TunedOutcome,
};
pub use run::{run, run_names, work};
pub(super) use stage::{Stages, file_hash, hash};
pub use verdict::Conclusion;
