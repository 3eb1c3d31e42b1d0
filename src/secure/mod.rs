//! The method: security-feature probes, drift, the robustness map, the search for Mods_Rob, two-phase tuning,
//! evaluation.
//!
//! Source: Du et al., "Toward Secure Tuning" (arXiv 2410.04524), "the paper" below. Nothing here prints: progress goes to
//! callbacks, results are serde types. Saved files hold no prompt and no answer, except for replayed answers, the rows of
//! the data that screening lists, and what an export is asked for ([`Export`]).

mod attack;
mod check;
mod choice;
mod demo;
mod eval;
mod loaded;
mod merge;
mod output;
mod overlap;
pub mod pipeline;
mod probe;
mod recipe;
mod replay;
mod robustness;
mod save;
mod screen;
pub mod study;
mod text;
mod tune;
mod warmup;
mod watch;

pub use attack::{Attack, AttackOptions};
pub use check::{Check, CheckedModel, Gate, Limits, Measures, Verdict, paired_difference};
pub use choice::{Candidate, Choice, choose};
pub use demo::model::{DEMO_MAX_LENGTH, DEMO_SEED, Stage, make_tiny_model};
pub use demo::{demo_study, write_demo_model};
pub use eval::agreement::Agreement;
pub(crate) use eval::check_answer_tokens;
pub use eval::discrimination::{Estimate, auroc_estimate, paired_auroc_difference, youden};
pub use eval::export::{Export, Told};
pub use eval::guard::{Guard, GuardOptions, GuardText, Moderated, Moderator};
pub use eval::judge::{Grades, Judge, JudgeOptions, probe_harmfulness};
pub use eval::kept::KeptEvaluation;
pub use eval::kinds::{AnswerKinds, AnswerView, repetition};
pub use eval::metrics::{Metrics, ScoreKind, Scores, auroc, relative_drop};
pub use eval::refusal::{FirstTokens, RefusalLanguage, RefusalList};
pub use eval::rubric::Rubric;
pub use eval::{
    EvaluateOptions, Evaluation, Harmfulness, Perplexity, PromptOutcomes, Rate, TaskScore, attack_success,
    coherent_attack_success, over_refusal, perplexity, strict_compliance, task_score,
};
pub use loaded::{EvaluationInput, LoadedModel, REFUSAL_TOKENS};
pub use merge::{
    Alpha, MergeMethod, MergeModels, MergeOptions, MergeSummary, MergedModule, PATH_POINTS, PathPoint, PathWalk, merge,
};
pub use output::{OpenOutput, PreparedTune, TuneOutput};
pub use overlap::{NEAR, NearDuplicates, Overlap, Passage, overlaps, refuse_overlaps};
pub use probe::control::{ControlLabel, ControlRule};
pub use probe::drift::{Drift, LayerDrift, SplitDrift, drift};
pub use probe::features::{Features, Snapshot, features, prompts_hash, snapshot};
pub use probe::labels::check_labels;
pub use probe::train::{ProbeInput, ProbeOptions, train_probe};
pub use probe::{Head, HeadMetrics, LinearHead, Probe, ProbeLayer, ProbeMetadata};
pub use recipe::{
    Adapters, Base, MergeStep, Mix, MixIn, Recipe, RecipeOptions, mixed, recipe_help, secure_recipe_help,
};
pub use replay::{REPLAY_START, ReplayCounts, ReplayOptions, ReplaySummary};
pub use robustness::conflict::conflict_map;
pub use robustness::map::{CellRobustness, EpsilonPoint, MapInputs, RobustnessMap, Stat};
pub use robustness::mods::{ModsRob, SearchStep, SetSpec};
pub use robustness::noise::{Noise, update_directions};
pub use robustness::scorer::{Observation, PerturbationScorer, SWEEP_MIB, ScorerInput, ScorerOptions};
pub use robustness::search::{SearchOptions, search};
pub use robustness::sets::{cell_parameters, random_set, share};
pub use robustness::shard::Shard;
pub use robustness::step::{PlannedStep, StepOptions, StepRecord};
pub use robustness::{By, RobustnessOptions, robustness, robustness_part};
pub use save::SaveAs;
pub use screen::{
    RefusedExamples, SCREEN_START, ScreenCounts, ScreenOptions, ScreenRow, ScreenScore, Screened, Screening,
};
pub use text::ModelText;
pub use tune::{ALL_PHASE, MODS_PHASE, Method, TuneJob, TuneRecipe, all_projections, attention_projections};
pub use watch::{Watch, WatchOptions};
