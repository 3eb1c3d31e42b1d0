//! The method: security-feature classifiers, drift, the robustness map, the search for Mods_Rob, evaluation.
//!
//! Source: Du et al., "Toward Secure Tuning" (arXiv 2410.04524), called the paper below. Nothing is printed in this
//! room, and no prompt or answer is kept in what it saves: progress goes to callbacks, results are serde types.

mod control;
mod demo;
mod demo_model;
mod drift;
mod epsilon;
mod evaluate;
mod features;
mod judge;
mod labels;
mod linalg;
mod logistic;
mod map;
mod mods;
mod noise;
mod partial;
mod probe;
mod probe_file;
mod probe_train;
mod proxy;
mod refusal;
mod robustness;
pub mod run;
mod scores;
mod search;
mod sets;
mod subject;
mod tuning;
mod updates;

pub use control::{ControlLabel, ControlRule};
pub use demo::{demo_study, write_demo_model};
pub use demo_model::{DEMO_MAX_LENGTH, DEMO_SEED, Stage, make_tiny_model};
pub use drift::{Drift, LayerDrift, SplitDrift, drift};
pub use epsilon::EpsilonPoint;
pub use evaluate::{
    Answer, Perplexity, Rate, TaskScore, attack_success, generate_answers, over_refusal, perplexity, strict_compliance,
    task_score,
};
pub use features::{Features, Progress, Snapshot, features, prompts_hash, render_prompts, snapshot};
pub use judge::{Judge, JudgeOptions, Judgement, probe_harmfulness};
pub use labels::check_labels;
pub use map::{CellRobustness, MadeFrom, RobustnessMap, Stat};
pub use mods::{ModsRob, SearchStep};
pub use noise::{Noise, update_directions};
pub use probe::{Head, HeadMetrics, LinearHead, Probe, ProbeAbout, ProbeLayer};
pub use probe_train::{ProbeInput, ProbeOptions, train_probe};
pub use proxy::{Observation, Proxy, ProxyInput, ProxyOptions};
pub use refusal::{FirstTokens, RefusalList};
pub use robustness::{RobustnessOptions, robustness};
pub use scores::{Metrics, ScoreKind, Scores, auroc, relative_drop};
pub use search::{SearchOptions, search};
pub use sets::{SetSpec, cell_parameters, random_set, resolve_mods, share};
pub use subject::{AnswerLengths, Evaluation, Harmfulness, Questions, Subject, Watch};
pub use tuning::{
    ALL_PHASE, MODS_PHASE, Method, TuneJob, TuneOutput, attention_projections, examples_hash, tune, tune_directory,
};
pub use updates::{UpdateComparison, UpdateGroup, compare_updates};

/// Whether this is the format a file says it has; else an error that names both.
fn check_format(place: &str, found: &str, expected: &str) -> crate::error::Result<()> {
    if found == expected {
        return Ok(());
    }
    let found: String = found.chars().take(60).collect();
    Err(crate::error::Error::input(format!("{place}: format"), format!("`{found}`"), format!("`{expected}`")))
}
