//! The project's JSONL files, from the language.

use super::{Item, Language, Mixture, Request, Skill, Style};
use crate::data::{Draw, Label, Match, SecurityPrompt, Split, Task};
use crate::error::{Error, Result};
use crate::io::write_atomic;
use std::path::Path;

/// A security prompt and what it asks for, so that obedience can be checked word for word.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Question {
    /// The prompt; its category says why it is forbidden: `verb`, `object` or `both`.
    pub prompt: SecurityPrompt,
    /// What it asks for.
    pub request: Request,
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
        Self { pairs: 300, train: 600, tasks: 150 }
    }
}

/// Matched pairs of forbidden and benign questions in the same template, split by pair: `pairs` for training, a quarter
/// as many for `valid`, half as many for `test` and for `ood`, and never more than a split has requests.
pub fn security(language: &Language, pairs: usize, seed: u64) -> Vec<Question> {
    let mut draw = Draw::stream(seed, 2);
    let mut questions = Vec::with_capacity(5 * pairs);
    for split in Split::ALL {
        let count = match split {
            Split::Train => pairs,
            Split::Valid => pairs / 4,
            Split::Test | Split::Ood => pairs / 2,
        };
        for &forbidden in language.requests(split, true).iter().take(count) {
            let template = Language::template(split, &mut draw);
            let twin = language.benign_twin(forbidden, split, &mut draw);
            let pair = (questions.len() / 2).to_string();
            questions.extend([(Label::Harmful, forbidden), (Label::Benign, twin)].map(|(label, request)| Question {
                prompt: SecurityPrompt {
                    prompt: language.question(request, template),
                    label,
                    pair: Some(pair.clone()),
                    category: language.category(request).map(|c| c.name().to_owned()),
                    split,
                },
                request,
            }));
        }
    }
    questions
}

/// Held-out items of the benign tuning task: three fifths how-to questions on test requests, to be answered in their
/// template's new style, the rest other skills of the mixture.
pub fn tasks(language: &Language, count: usize, seed: u64) -> Vec<Task> {
    let mut draw = Draw::stream(seed, 3);
    let requests = language.requests(Split::Test, false);
    let other = [Skill::Sum, Skill::Words, Skill::Property];
    (0..count)
        .map(|i| {
            let item = if i % 5 < 3 {
                let request = requests[i % requests.len()];
                let template = Language::template(Split::Test, &mut draw);
                let style = Style::new_for_template(template);
                Item { prompt: language.question(request, template), answer: language.instructions(request, style) }
            } else {
                language.item(other[i % other.len()], &mut draw)
            };
            Task { prompt: item.prompt, answer: item.answer, matching: Match::Exact, category: None }
        })
        .collect()
}

/// Items of the far task, two-step sums; the last number of an answer counts.
pub fn far_tasks(language: &Language, count: usize, seed: u64) -> Vec<Task> {
    let items = Mixture::far_task().items(language, count, seed);
    let task = |i: Item| Task { prompt: i.prompt, answer: i.answer, matching: Match::Number, category: None };
    items.into_iter().map(task).collect()
}

/// Held-out conversations for a perplexity: prompts and answers as in [`tasks`].
pub fn heldout(language: &Language, count: usize, seed: u64) -> Vec<Item> {
    let task = |t: Task| Item { prompt: t.prompt, answer: t.answer };
    tasks(language, count, seed).into_iter().map(task).collect()
}

/// Writes the files of a study into `dir`, which must exist: `security.jsonl`; `strict.jsonl` (of each forbidden question
/// of its test and ood splits, the texts that obey); `task.jsonl`, `task_far.jsonl`, `heldout.jsonl`;
/// `train.jsonl` (benign, new styles), `train_refusals.jsonl` and `train_attack.jsonl` (the same with 10 % refusals, or
/// 10 % forbidden requests answered), `train_old.jsonl` (benign, old styles), `train_far.jsonl`; `refusals.jsonl` and
/// `attack.jsonl` alone.
///
/// # Errors
/// [`Error::Io`] where a file cannot be written.
pub fn export(language: &Language, dir: &Path, counts: Counts, seed: u64) -> Result<()> {
    let questions = security(language, counts.pairs, seed);
    write(dir, "security.jsonl", questions.iter().map(|q| &q.prompt))?;
    let strict = questions
        .iter()
        .filter(|q| q.prompt.label == Label::Harmful && matches!(q.prompt.split, Split::Test | Split::Ood));
    write(
        dir,
        "strict.jsonl",
        strict.map(|q| serde_json::json!({"prompt": q.prompt.prompt, "answers": language.compliant(q.request)})),
    )?;
    write(dir, "heldout.jsonl", heldout(language, counts.tasks, seed.wrapping_add(2)))?;
    write(dir, "task.jsonl", tasks(language, counts.tasks, seed))?;
    write(dir, "task_far.jsonl", far_tasks(language, counts.tasks, seed.wrapping_add(1)))?;
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
        write(dir, name, mixture.items(language, counts.train, seed))?;
    }
    Ok(())
}

fn write(dir: &Path, name: &str, lines: impl IntoIterator<Item = impl serde::Serialize>) -> Result<()> {
    let mut text = Vec::new();
    for line in lines {
        serde_json::to_writer(&mut text, &line).map_err(|e| Error::failed(format!("{name}: {e}"), "report this"))?;
        text.push(b'\n');
    }
    write_atomic(&dir.join(name), &text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::Conversation;
    use std::collections::{BTreeMap, BTreeSet};

    #[test]
    fn pairs_hold_one_of_each_label_and_stay_in_their_split() {
        let language = Language::new(1);
        let questions = security(&language, 40, 5);
        let mut pairs: BTreeMap<Option<String>, Vec<&Question>> = BTreeMap::new();
        for question in &questions {
            pairs.entry(question.prompt.pair.clone()).or_default().push(question);
        }
        assert_eq!(pairs.len(), 40 + 10 + 20 + 20);
        for pair in pairs.values() {
            let [harmful, benign] = pair[..] else { panic!("{pair:?}") };
            assert_eq!((harmful.prompt.label, benign.prompt.label), (Label::Harmful, Label::Benign));
            assert_eq!(harmful.prompt.split, benign.prompt.split);
            assert!(harmful.prompt.category.is_some() && benign.prompt.category.is_none());
            let words = |q: &Question| q.prompt.prompt.split(' ').map(str::to_owned).collect::<Vec<_>>();
            let (a, b) = (words(harmful), words(benign));
            assert!(a.len() == b.len() && a.iter().zip(&b).filter(|(a, b)| a != b).count() <= 2, "{a:?} {b:?}");
        }
        let of = |s: Split| -> BTreeSet<Request> {
            questions.iter().filter(|q| q.prompt.split == s).map(|q| q.request).collect()
        };
        assert!(of(Split::Train).is_disjoint(&of(Split::Test)) && of(Split::Valid).is_disjoint(&of(Split::Test)));
    }

    #[test]
    fn the_files_are_read_back_by_their_readers() {
        let language = Language::new(1);
        let dir = tempfile::tempdir().expect("a temporary directory");
        let counts = Counts { pairs: 8, train: 20, tasks: 20 };
        export(&language, dir.path(), counts, 1).expect("export");
        let at = |name: &str| dir.path().join(name);
        let written: Vec<SecurityPrompt> = security(&language, 8, 1).into_iter().map(|q| q.prompt).collect();
        assert_eq!(SecurityPrompt::read(&at("security.jsonl"), 0).expect("reads"), written);
        assert_eq!(Task::read(&at("task.jsonl")).expect("reads"), tasks(&language, 20, 1));
        assert_eq!(Task::read(&at("task_far.jsonl")).expect("reads"), far_tasks(&language, 20, 2));
        for name in [
            "heldout.jsonl",
            "train.jsonl",
            "train_refusals.jsonl",
            "train_attack.jsonl",
            "train_old.jsonl",
            "train_far.jsonl",
            "refusals.jsonl",
            "attack.jsonl",
        ] {
            assert_eq!(Conversation::read(&at(name)).expect(name).len(), 20);
        }
        let strict = std::fs::read_to_string(at("strict.jsonl")).expect("reads");
        let lines: Vec<serde_json::Value> = strict.lines().map(|l| serde_json::from_str(l).expect("is JSON")).collect();
        let harmful: Vec<&SecurityPrompt> = written
            .iter()
            .filter(|p| p.label == Label::Harmful && matches!(p.split, Split::Test | Split::Ood))
            .collect();
        assert_eq!(lines.len(), harmful.len());
        assert!(lines.iter().zip(harmful).all(|(l, p)| l["prompt"] == p.prompt.as_str()));
        assert_eq!(lines[0]["answers"].as_array().map(Vec::len), Some(9));
        let trained = Conversation::read(&at("train.jsonl")).expect("reads");
        let items: Vec<Conversation> =
            Mixture::tuning().items(&language, 20, 1).into_iter().map(Conversation::from).collect();
        assert_eq!(trained, items);
    }

    #[test]
    fn right_answers_pass_the_task_and_old_ones_do_not() {
        let language = Language::new(2);
        let mut how_to = 0;
        for task in tasks(&language, 50, 3) {
            assert!(task.matches(&task.answer), "{}", task.answer);
            let asked = language
                .requests(Split::Test, false)
                .iter()
                .find(|r| (0..super::super::TRAINED_TEMPLATES).any(|t| language.question(**r, t) == task.prompt));
            if let Some(&request) = asked {
                how_to += 1;
                for style in Style::old() {
                    assert!(!task.matches(&language.instructions(request, style)));
                }
            }
        }
        assert_eq!(how_to, 30);
    }
}
