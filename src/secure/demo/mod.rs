//! The demonstration: a study of the embedded tiny aligned model.

pub(crate) mod model;

use self::model::DEMO_MAX_LENGTH;
use super::{EvaluateOptions, RobustnessOptions, ScorerOptions, SearchOptions, TuneRecipe};
use crate::data::RowReader;
use crate::data::tiny::{Counts, Language, export};
use crate::error::{Error, FileOp, Result};
use crate::io::write_atomic;
use crate::secure::overlap::{NearDuplicates, Passage};
use crate::secure::replay::ReplayOptions;
use crate::secure::study::{DataFiles, RunConfig, TuneConfig};
use crate::train::{PhaseOptions, Schedule, TuneOptions};
use std::path::Path;

/// The embedded model directory, made by `swat demo --make-model`.
const MODEL: [(&str, &[u8]); 5] = [
    ("config.json", include_bytes!("../../../assets/tiny/config.json")),
    ("generation_config.json", include_bytes!("../../../assets/tiny/generation_config.json")),
    ("tokenizer.json", include_bytes!("../../../assets/tiny/tokenizer.json")),
    ("tokenizer_config.json", include_bytes!("../../../assets/tiny/tokenizer_config.json")),
    ("model.safetensors", include_bytes!("../../../assets/tiny/model.safetensors")),
];

/// Writes the embedded model to `dir`.
///
/// # Errors
/// [`Error::Io`] where a file cannot be written.
pub fn write_demo_model(dir: &Path) -> Result<()> {
    std::fs::create_dir_all(dir).map_err(Error::io(dir, FileOp::Create))?;
    for (name, bytes) in MODEL {
        let path = dir.join(name);
        if std::fs::read(&path).ok().as_deref() != Some(bytes) {
            write_atomic(&path, bytes)?;
        }
    }
    Ok(())
}

/// The recipe that the demonstration recommends: 15 % of the model's own answers, and a third more examples of the task than the
/// 300 steps of the others. docs/recipes.md says how it was chosen.
const RECOMMENDED: &str = "plain+replay=.15,steps=470";

/// Removes the tasks and held-out conversations whose prompts are in the tuning data of a setting.
fn keep_unseen(data: &Path) -> Result<()> {
    let rows = &mut RowReader::default();
    let mut seen = Vec::new();
    for name in ["train.jsonl", "refusals.jsonl", "attack.jsonl"] {
        seen.extend(Passage::of_conversations(&data.join(name), rows)?.into_iter().map(|passage| passage.text));
    }
    let seen = NearDuplicates::new(&seen);
    for name in ["task.jsonl", "heldout.jsonl"] {
        let path = data.join(name);
        let text = std::fs::read_to_string(&path).map_err(Error::io(&path, FileOp::Read))?;
        let unseen = |line: &&str| {
            let row: serde_json::Value = serde_json::from_str(line).unwrap_or_default();
            row["prompt"].as_str().is_some_and(|prompt| seen.find(prompt).is_none())
        };
        let kept: String = text.lines().filter(unseen).flat_map(|line| [line, "\n"]).collect();
        write_atomic(&path, kept.as_bytes())?;
    }
    Ok(())
}

/// Writes the language's data to `out/data` and returns the configuration of a study of `model`: plain tuning, the
/// method and its controls, each with `seeds` training seeds from `seed` on.
///
/// # Errors
/// [`Error::Io`] where a file cannot be written.
pub fn demo_study(model: &Path, language_seed: u64, seed: u64, seeds: u64, out: &Path) -> Result<RunConfig> {
    let data = out.join("data");
    std::fs::create_dir_all(&data).map_err(Error::io(&data, FileOp::Create))?;
    let language = Language::new(language_seed);
    export(&language, &data, Counts { pairs: 200, train: 600, tasks: 150 }, 1)?;
    keep_unseen(&data)?;
    let phase = |steps| PhaseOptions {
        lr: 5e-4,
        schedule: Schedule::Cosine,
        lr_warmup_steps: 10,
        min_lr_ratio: 0.1,
        steps: Some(steps),
        ..PhaseOptions::default()
    };
    let settings = ["given", "plain-equal", "swat", "warmup:random:1", RECOMMENDED];
    Ok(RunConfig {
        model: model.to_owned(),
        out: out.to_owned(),
        title: "SWAT on a tiny aligned model".into(),
        seed,
        settings: settings.into_iter().map(str::parse).collect::<Result<_>>()?,
        data: DataFiles {
            security: data.join("security.jsonl"),
            train: vec![data.join("train.jsonl")],
            task: Some(data.join("task.jsonl")),
            heldout: Some(data.join("heldout.jsonl")),
            refusals: Some(data.join("refusals.jsonl")),
            attack: Some(data.join("attack.jsonl")),
            strict: Some(data.join("strict.jsonl")),
            ..DataFiles::default()
        },
        perturb: ScorerOptions { members: 2, seed, ..ScorerOptions::default() },
        robustness: RobustnessOptions::default(),
        search: SearchOptions { swap: false, ..SearchOptions::default() },
        tune: TuneConfig {
            seeds: (seeds != 1).then(|| (0..seeds).map(|i| seed.wrapping_add(i)).collect()),
            recipe: TuneRecipe {
                shared: TuneOptions {
                    batch_size: 16,
                    max_length: DEMO_MAX_LENGTH,
                    save_every: 100,
                    seed,
                    ..TuneOptions::default()
                },
                mods_phase: phase(100),
                all_phase: phase(200),
                ..TuneRecipe::default()
            },
        },
        replay: ReplayOptions { answer_tokens: 40, ..ReplayOptions::default() },
        evaluate: EvaluateOptions { task_tokens: 48, answer_tokens: 40, ..EvaluateOptions::default() },
        ..RunConfig::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn training_seeds_follow_the_seed() {
        let dir = tempfile::tempdir().unwrap();
        let study = |seeds| demo_study(Path::new("model"), 1, 5, seeds, dir.path()).unwrap();
        assert_eq!(study(3).training_seeds(), [5, 6, 7]);
        // As with a single seed before, so that finished stages are reused.
        assert_eq!((study(1).tune.seeds, study(1).tune.recipe.shared.seed), (None, 5));
        study(3).check("demo").unwrap();
    }
}
