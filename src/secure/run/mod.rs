//! A study from one configuration: probe, map, search, every setting tuned and evaluated. Each stage is kept and
//! resumable.

mod config;
mod outcome;
mod setting;
mod stage;
mod study;

pub use config::{DataFiles, EvaluateOptions, RunConfig};
pub use outcome::{DriftPoint, Outcome, RunOutcome, SettingOutcome, TunedOutcome};
pub use setting::{Base, Mix, SettingSpec};
pub use study::run;
