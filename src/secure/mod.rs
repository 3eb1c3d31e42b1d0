//! The method: security-feature classifiers, drift, the robustness map, the search for Mods_Rob, two-phase tuning,
//! evaluation.
//!
//! Source: Du et al., "Toward Secure Tuning" (arXiv 2410.04524), called the paper below. Nothing is printed in this
//! room, and no prompt or answer is kept in what it saves: progress goes to callbacks, results are serde types.

mod demo;
mod eval;
mod probe;
mod robustness;
pub mod study;
mod subject;
mod tune;
mod updates;

pub use demo::model::{DEMO_MAX_LENGTH, DEMO_SEED, Stage, make_tiny_model};
pub use demo::{demo_study, write_demo_model};
pub use eval::judge::{Judge, JudgeOptions, Judgement, probe_harmfulness};
pub use eval::metrics::{Metrics, ScoreKind, Scores, auroc, relative_drop};
pub use eval::refusal::{FirstTokens, RefusalList};
pub use eval::{
    Answer, Perplexity, Rate, TaskScore, attack_success, generate_answers, over_refusal, perplexity, strict_compliance,
    task_score,
};
pub use probe::control::{ControlLabel, ControlRule};
pub use probe::drift::{Drift, LayerDrift, SplitDrift, drift};
pub use probe::features::{Features, Snapshot, features, prompts_hash, render_prompts, snapshot};
pub use probe::labels::check_labels;
pub use probe::train::{ProbeInput, ProbeOptions, train_probe};
pub use probe::{Head, HeadMetrics, LinearHead, Probe, ProbeAbout, ProbeLayer};
pub use robustness::map::{CellRobustness, EpsilonPoint, MadeFrom, RobustnessMap, Stat};
pub use robustness::mods::{ModsRob, SearchStep, SetSpec, resolve_mods};
pub use robustness::noise::{Noise, update_directions};
pub use robustness::scorer::{Observation, PerturbationScorer, ScorerInput, ScorerOptions};
pub use robustness::search::{SearchOptions, search};
pub use robustness::sets::{cell_parameters, random_set, share};
pub use robustness::{RobustnessOptions, robustness};
pub use subject::{AnswerLengths, Evaluation, Harmfulness, Questions, Subject};
pub use tune::{
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
