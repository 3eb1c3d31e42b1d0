//! Writes the language as the project's JSONL files.

use super::{Item, Language, Mixture, Request, Skill, Style};
use crate::data::{Label, Match, SecurityPrompt, Split, Task};
use crate::error::Result;
use crate::io::{json, write_atomic};
use crate::rng::Philox;
use std::path::Path;

/// A security prompt and the request behind it, against which answers can be checked word for word.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Question {
    /// The prompt; its category is why it is forbidden: `verb`, `object` or `both`.
    pub prompt: SecurityPrompt,
    /// The request that the prompt asks about.
    pub request: Request,
}

/// Numbers of items that [`export`] writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counts {
    /// Matched pairs of the train split; `valid` has a quarter as many, `test` and `ood` half as many each.
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

/// Matched pairs of forbidden and benign questions in the same template, split by pair: `pairs` for train, a quarter as
/// many for valid, half as many each for test and ood, capped by the requests of a split.
pub fn security(language: &Language, pairs: usize, seed: u64) -> Vec<Question> {
    let mut rng = Philox::new(seed, 2);
    let mut questions = Vec::with_capacity(5 * pairs);
    for split in Split::ALL {
        let count = match split {
            Split::Train => pairs,
            Split::Valid => pairs / 4,
            Split::Test | Split::Ood => pairs / 2,
        };
        for &forbidden in language.requests(split, Label::Harmful).iter().take(count) {
            let template = Language::template(split, &mut rng);
            let twin = language.benign_twin(forbidden, split, &mut rng);
            let pair = (questions.len() / 2).to_string();
            questions.extend([(Label::Harmful, forbidden), (Label::Benign, twin)].map(|(label, request)| Question {
                prompt: SecurityPrompt {
                    prompt: language.question(request, template),
                    label,
                    pair: Some(pair.clone()),
                    category: request.category().map(|c| c.name().to_owned()),
                    split,
                    place: String::new(),
                },
                request,
            }));
        }
    }
    questions
}

/// Held-out items of the benign tuning task: three fifths how-to questions on test requests, answered in their
/// template's new style, the rest other skills of the mixture.
pub fn tasks(language: &Language, count: usize, seed: u64) -> Vec<Task> {
    let mut rng = Philox::new(seed, 3);
    let requests = language.requests(Split::Test, Label::Benign);
    let other = [Skill::Sum, Skill::Words, Skill::Property];
    (0..count)
        .map(|i| {
            let item = if i % 5 < 3 {
                let request = requests[i % requests.len()];
                let template = Language::template(Split::Test, &mut rng);
                let style = Style::new_for_template(template);
                Item { prompt: language.question(request, template), answer: language.instructions(request, style) }
            } else {
                language.item(other[i % other.len()], &mut rng)
            };
            Task {
                prompt: item.prompt,
                answer: item.answer,
                matching: Match::Exact,
                category: None,
                place: String::new(),
            }
        })
        .collect()
}

/// Held-out items of the far task, two-step sums, compared by the last number of an answer.
pub fn far_tasks(language: &Language, count: usize, seed: u64) -> Vec<Task> {
    let items = Mixture::far_task().items(language, count, seed);
    let task = |i: Item| Task {
        prompt: i.prompt,
        answer: i.answer,
        matching: Match::Number,
        category: None,
        place: String::new(),
    };
    items.into_iter().map(task).collect()
}

/// Held-out conversations for perplexity: the prompts and answers of [`tasks`].
pub fn heldout(language: &Language, count: usize, seed: u64) -> Vec<Item> {
    let task = |t: Task| Item { prompt: t.prompt, answer: t.answer };
    tasks(language, count, seed).into_iter().map(task).collect()
}

/// Writes the files of a study into `dir`, which must exist:
///
/// - `security.jsonl`, and `strict.jsonl` with all compliant answers to each forbidden question of its test and ood
///   splits;
/// - `task.jsonl`, `task_far.jsonl`, `heldout.jsonl`;
/// - `train.jsonl` (benign, new styles), `train_refusals.jsonl` and `train_attack.jsonl` (the same with 10 % refusals
///   or 10 % answered forbidden requests), `train_old.jsonl` (benign, old styles), `train_far.jsonl`;
/// - `refusals.jsonl` and `attack.jsonl`, those shares alone.
///
/// # Errors
/// [`crate::error::Error::Io`] where a file cannot be written.
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
    let text: String = lines.into_iter().map(|line| json::line(&line)).collect::<Result<_>>()?;
    write_atomic(&dir.join(name), text.as_bytes())
}
