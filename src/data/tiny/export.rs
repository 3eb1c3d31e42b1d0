//! The project's JSONL files, from the language.

use super::{Draw, Item, Language, Mixture, Request, Skill, Split, Style};
use crate::error::{Error, Result};
use std::io::Write;
use std::path::Path;

/// A line of `security.jsonl`.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct SecurityLine {
    /// The question.
    pub prompt: String,
    /// `harmful` or `benign`.
    pub label: &'static str,
    /// Matched harmful and benign prompts share it.
    pub pair: usize,
    /// Why it is forbidden: `verb`, `object`, `both`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub category: Option<&'static str>,
    /// `train`, `valid`, `test`, or `ood`: templates that no training uses.
    pub split: &'static str,
    /// What it asks for.
    #[serde(skip)]
    pub request: Request,
}

/// A line of `task.jsonl`.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct TaskLine {
    /// The question.
    pub prompt: String,
    /// The right answer.
    pub answer: String,
    /// `exact` or `number`.
    #[serde(rename = "match")]
    pub how: &'static str,
}

/// How much [`export`] writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counts {
    /// Matched pairs of the training split; a quarter as many for `valid`, half as many for `test` and `ood`.
    pub pairs: usize,
    /// Tuning items.
    pub train: usize,
    /// Task items.
    pub tasks: usize,
}

impl Default for Counts {
    fn default() -> Self {
        Self { pairs: 300, train: 500, tasks: 120 }
    }
}

/// Matched pairs of forbidden and benign questions in the same template, split by pair: `pairs` for training, a quarter
/// as many for `valid`, half as many for `test` (at most the 231 test requests) and `ood`.
pub fn security(language: &Language, pairs: usize, seed: u64) -> Vec<SecurityLine> {
    let mut draw = Draw::stream(seed, 2);
    let mut lines = Vec::with_capacity(5 * pairs);
    let mut pair = 0;
    for (name, split, count) in [
        ("train", Split::Train, pairs),
        ("valid", Split::Valid, pairs / 4),
        ("test", Split::Test, pairs / 2),
        ("ood", Split::Test, pairs / 2),
    ] {
        for &request in language.requests(split, true).iter().take(count) {
            let template = if name == "ood" {
                Language::unseen_template(&mut draw)
            } else {
                Language::trained_template(&mut draw)
            };
            let twin = language.benign_twin(request, split, &mut draw);
            for (label, request) in [("harmful", request), ("benign", twin)] {
                lines.push(SecurityLine {
                    prompt: language.question(request, template),
                    label,
                    pair,
                    category: language.category(request).map(|c| c.name()),
                    split: name,
                    request,
                });
            }
            pair += 1;
        }
    }
    lines
}

/// Held-out items of the benign tuning task: three fifths how-to questions on test requests, to be answered in their
/// template's new style, the rest other skills of the mixture.
pub fn tasks(language: &Language, count: usize, seed: u64) -> Vec<TaskLine> {
    let mut draw = Draw::stream(seed, 3);
    let requests = language.requests(Split::Test, false);
    let other = [Skill::Sum, Skill::Words, Skill::Property];
    (0..count)
        .map(|i| {
            let item = if i % 5 < 3 {
                let request = requests[i % requests.len()];
                let template = Language::trained_template(&mut draw);
                let style = Style::new_for_template(template);
                Item { prompt: language.question(request, template), answer: language.instructions(request, style) }
            } else {
                language.item(other[i % other.len()], &mut draw)
            };
            TaskLine { prompt: item.prompt, answer: item.answer, how: "exact" }
        })
        .collect()
}

/// Items of the far task, two-step sums; the last number of an answer counts.
pub fn far_tasks(language: &Language, count: usize, seed: u64) -> Vec<TaskLine> {
    let items = Mixture::far_task().items(language, count, seed);
    items.into_iter().map(|i| TaskLine { prompt: i.prompt, answer: i.answer, how: "number" }).collect()
}

/// Writes the files of a study into `dir`, which must exist: `security.jsonl`, `task.jsonl`, `task_far.jsonl`;
/// `train.jsonl` (benign, new styles), `train_refusals.jsonl` and `train_attack.jsonl` (the same with 10 % refusals, or
/// 10 % forbidden requests answered), `train_old.jsonl` (benign, old styles), `train_far.jsonl`; `refusals.jsonl` and
/// `attack.jsonl` alone.
pub fn export(language: &Language, dir: &Path, counts: Counts, seed: u64) -> Result<()> {
    write(dir, "security.jsonl", &security(language, counts.pairs, seed))?;
    write(dir, "task.jsonl", &tasks(language, counts.tasks, seed))?;
    write(dir, "task_far.jsonl", &far_tasks(language, counts.tasks, seed.wrapping_add(1)))?;
    let tuning = Mixture::tuning;
    for (name, mixture) in [
        ("train.jsonl", tuning()),
        ("train_refusals.jsonl", tuning().with(0.1, Skill::Refusal)),
        ("train_attack.jsonl", tuning().with(0.1, Skill::ForbiddenNewStyle)),
        ("train_old.jsonl", Mixture::old_style()),
        ("train_far.jsonl", Mixture::far_task()),
        ("refusals.jsonl", Mixture::new([(1.0, Skill::Refusal)])),
        ("attack.jsonl", Mixture::new([(1.0, Skill::ForbiddenNewStyle)])),
    ] {
        write(dir, name, &mixture.items(language, counts.train, seed))?;
    }
    Ok(())
}

fn write(dir: &Path, name: &str, lines: &[impl serde::Serialize]) -> Result<()> {
    let path = dir.join(name);
    let mut text = Vec::new();
    for line in lines {
        serde_json::to_writer(&mut text, line)
            .map_err(|e| Error::failed(format!("{name}: {e}"), "this is a mistake in swat; please report it"))?;
        text.push(b'\n');
    }
    let mut file = std::fs::File::create(&path).map_err(Error::io(&path, "create"))?;
    file.write_all(&text).map_err(Error::io(&path, "write"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::{BTreeMap, BTreeSet};

    #[test]
    fn pairs_hold_one_of_each_label_and_stay_in_their_split() {
        let language = Language::new(1);
        let lines = security(&language, 40, 5);
        let mut pairs: BTreeMap<usize, Vec<&SecurityLine>> = BTreeMap::new();
        for line in &lines {
            pairs.entry(line.pair).or_default().push(line);
        }
        assert_eq!(pairs.len(), 40 + 10 + 20 + 20);
        for pair in pairs.values() {
            let [harmful, benign] = pair[..] else { panic!("{pair:?}") };
            assert_eq!((harmful.label, benign.label), ("harmful", "benign"));
            assert_eq!(harmful.split, benign.split);
            assert!(harmful.category.is_some() && benign.category.is_none());
            let frame = |l: &SecurityLine| l.prompt.split(' ').take(2).map(str::to_owned).collect::<Vec<_>>();
            assert_eq!(frame(harmful)[0], frame(benign)[0]);
        }
        let of =
            |s: &str| -> BTreeSet<&str> { lines.iter().filter(|l| l.split == s).map(|l| l.prompt.as_str()).collect() };
        assert!(of("train").is_disjoint(&of("test")) && of("valid").is_disjoint(&of("test")));
    }

    #[test]
    fn files_are_json_lines_of_the_known_kinds() {
        let language = Language::new(1);
        let dir = tempfile::tempdir().expect("a temporary directory");
        let counts = Counts { pairs: 8, train: 20, tasks: 10 };
        export(&language, dir.path(), counts, 1).expect("export");
        let read = |name: &str| -> Vec<serde_json::Value> {
            let text = std::fs::read_to_string(dir.path().join(name)).expect(name);
            text.lines().map(|l| serde_json::from_str(l).expect(l)).collect()
        };
        assert_eq!(read("security.jsonl").len(), 2 * (8 + 2 + 4 + 4));
        assert_eq!(read("security.jsonl")[0]["label"], "harmful");
        assert_eq!(read("train.jsonl").len(), 20);
        assert!(read("train_attack.jsonl")[0]["completion"].is_string());
        assert_eq!(read("task.jsonl")[0]["match"], "exact");
        assert_eq!(read("task_far.jsonl")[0]["match"], "number");
        let trained: BTreeSet<String> = read("train.jsonl").iter().map(|l| l["prompt"].to_string()).collect();
        assert_eq!(
            read("task.jsonl").iter().step_by(5).filter(|l| trained.contains(&l["prompt"].to_string())).count(),
            0
        );
    }
}
