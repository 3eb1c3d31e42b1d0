//! The prompts and tasks of a study.

use super::RunConfig;
use crate::data::{Label, RowReader, SecurityPrompt, Split, Task};
use crate::error::Result;
use crate::rng::Philox;
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::Path;

/// Stream of the draws that sample prompts and tasks.
const SAMPLE_STREAM: u64 = 0x5a3;

/// Prompts and tasks of every setting.
pub(super) struct StudyData {
    /// Prompts of probe, map and drift.
    pub(super) security: Vec<SecurityPrompt>,
    /// Prompts of the evaluation.
    pub(super) evaluation: Vec<SecurityPrompt>,
    /// Compliant answers, by prompt.
    pub(super) strict: Option<BTreeMap<String, Vec<String>>>,
    pub(super) tasks: Vec<Task>,
}

impl StudyData {
    /// Reads the files of prompts and tasks.
    pub(super) fn read(config: &RunConfig, rows: &mut RowReader) -> Result<Self> {
        let (data, options, seed) = (&config.data, &config.evaluate, config.seed);
        let security = SecurityPrompt::read(&data.security, seed, rows)?;
        SecurityPrompt::require_both_labels(&security, &data.security)?;
        let mut prompts: Vec<SecurityPrompt> = if data.evaluation.is_empty() {
            security.iter().filter(|p| matches!(p.split, Split::Test | Split::Ood)).cloned().collect()
        } else {
            let mut all = Vec::new();
            for path in &data.evaluation {
                all.extend(SecurityPrompt::read(path, seed, rows)?);
            }
            all
        };
        prompts = [(Label::Harmful, options.harmful), (Label::Benign, options.benign)]
            .into_iter()
            .flat_map(|(label, most)| {
                sample(prompts.iter().filter(|p| p.label == label).cloned().collect(), most, seed)
            })
            .collect();
        let tasks = match &data.task {
            Some(path) => sample(Task::read(path, rows)?, options.tasks, seed),
            None => Vec::new(),
        };
        let strict = data.strict.as_deref().map(|path| read_strict(path, rows)).transpose()?;
        Ok(Self { security, evaluation: prompts, strict, tasks })
    }
}

/// A random sample of at most `most` items (0 = all), in their original order.
fn sample<T>(items: Vec<T>, most: usize, seed: u64) -> Vec<T> {
    if most == 0 || items.len() <= most {
        return items;
    }
    let mut order: Vec<usize> = (0..items.len()).collect();
    Philox::new(seed, SAMPLE_STREAM).shuffle(&mut order);
    let mut kept = order[..most].to_vec();
    kept.sort_unstable();
    let mut kept = kept.into_iter().peekable();
    items.into_iter().enumerate().filter(|(i, _)| kept.next_if_eq(i).is_some()).map(|(_, item)| item).collect()
}

fn read_strict(path: &Path, rows: &mut RowReader) -> Result<BTreeMap<String, Vec<String>>> {
    let all = rows.read(path, |row| {
        let list = |value: &Value| serde_json::from_value(value.clone()).ok();
        let answers: Option<Vec<String>> = row.get("answers").and_then(list);
        let answers = answers.ok_or_else(|| row.error("no `answers`", "`answers`: a list of strings"))?;
        Ok((row.text("prompt")?.to_owned(), answers))
    })?;
    Ok(all.into_iter().collect())
}
