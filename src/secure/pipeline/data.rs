//! The data of a secure tuning run, in parts that have nothing in common: what is trained, what the choice is made on, and
//! what the verdict is about.

use super::SecureJob;
use crate::data::{Conversation, Example, Label, RowReader, SecurityPrompt, Split, Task};
use crate::error::{Error, Result};
use crate::rng::Philox;
use crate::secure::overlap::NearDuplicates;
use crate::secure::replay::without_held_out;
use crate::secure::screen::RefusedExamples;
use crate::secure::text::ModelText;
use crate::secure::tune::examples_hash;
use serde_json::json;
use std::collections::HashSet;

/// Stream of the draws that halve the tasks and set examples aside.
const HALVES_STREAM: u64 = 0x5ec;
/// Of so many distinct rows one is set aside where there are no tasks: half of them for selection, half for the verdict.
const HELD_OUT: usize = 10;
/// Most rows that are set aside.
const MOST_HELD_OUT: usize = 400;

/// What a model is measured on.
pub(super) struct Asked {
    pub(super) prompts: Vec<SecurityPrompt>,
    pub(super) tasks: Vec<Task>,
    /// The user's own conversations; none where there are tasks.
    pub(super) heldout: Vec<Example>,
}

impl Asked {
    /// Hash of all that is asked, for the inputs of a stage.
    pub(super) fn hash(&self) -> String {
        let all = json!([self.prompts, self.tasks, examples_hash(&self.heldout)]);
        blake3::hash(all.to_string().as_bytes()).to_hex()[..16].to_owned()
    }

    fn count(&self, label: Label) -> usize {
        self.prompts.iter().filter(|prompt| prompt.label == label).count()
    }
}

/// Sizes of the parts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct PartSizes {
    /// Conversations to train on, before screening, without what is mixed in.
    pub train: usize,
    /// Selection prompts.
    pub valid_prompts: usize,
    /// Selection tasks.
    pub valid_tasks: usize,
    /// Prompts of the verdict.
    pub test_prompts: usize,
    /// Tasks of the verdict.
    pub test_tasks: usize,
    /// The user's own conversations that are set aside, for choice and verdict.
    pub heldout: usize,
    /// Prompts of the evaluation that are left out, since training data or the other part repeat them.
    pub repeated_prompts: usize,
    /// Tasks that are left out for the same reason.
    pub repeated_tasks: usize,
    /// Prompts of the train split that are not replayed, since a task repeats them.
    pub not_replayed: usize,
}

pub(super) struct SecureData {
    pub(super) train: Vec<Example>,
    /// Prompts, of whose train split the answers are replayed: none resembles a task.
    pub(super) security: Vec<SecurityPrompt>,
    pub(super) valid: Asked,
    pub(super) test: Asked,
    pub(super) sizes: PartSizes,
}

impl SecureData {
    /// Reads all files, and keeps the parts apart.
    pub(super) fn read(job: &SecureJob, text: &ModelText, rows: &mut RowReader) -> Result<Self> {
        let mut train = Vec::new();
        let mut asked = Vec::new();
        for path in &job.data {
            train.extend(text.examples(path, job.tune.shared.max_length, rows)?.examples);
            let users = |conversation: Conversation| {
                conversation
                    .messages
                    .into_iter()
                    .filter(|message| message.role == "user")
                    .map(|message| message.content)
            };
            asked.extend(Conversation::read(path, rows)?.into_iter().flat_map(users));
        }
        let trained = NearDuplicates::new(&asked);
        let security = SecurityPrompt::read_all(&job.security, job.seed, rows)?;
        let tasks = job.task.as_deref().map(|path| Task::read(path, rows)).transpose()?.unwrap_or_default();
        rows.check_used()?;
        text.check_prompts(security.iter().map(|prompt| (prompt.place.as_str(), prompt.prompt.as_str())))?;
        text.check_prompts(tasks.iter().map(|task| (task.place.as_str(), task.prompt.as_str())))?;

        let of = |splits: &[Split]| -> Vec<SecurityPrompt> {
            security.iter().filter(|prompt| splits.contains(&prompt.split)).cloned().collect()
        };
        let group = |prompt: &SecurityPrompt| prompt.pair.clone().unwrap_or_else(|| prompt.prompt.clone());
        let (mut valid, mut test) = (of(&[Split::Valid]), of(&[Split::Test]));
        let [choice_ood, verdict_ood] = halves(of(&[Split::Ood]), job.seed, group);
        valid.extend(choice_ood);
        test.extend(verdict_ood);
        let prompts = valid.len() + test.len();
        let [valid_prompts, test_prompts] = apart([valid, test], &trained, |prompt| &prompt.prompt);
        let task_prompts: Vec<String> = tasks.iter().map(|task| task.prompt.clone()).collect();
        let all_prompts = security.len();
        let security = without_held_out(&security, &task_prompts);
        let [valid_tasks, test_tasks] =
            apart(halves(tasks, job.seed, |task| task.prompt.clone()), &trained, |task| &task.prompt);
        let (valid_heldout, test_heldout) =
            if job.task.is_none() { set_aside(&mut train, job.seed)? } else { Default::default() };
        let valid = Asked { prompts: valid_prompts, tasks: valid_tasks, heldout: valid_heldout };
        let test = Asked { prompts: test_prompts, tasks: test_tasks, heldout: test_heldout };
        for (part, name) in [(&valid, "valid"), (&test, "test")] {
            let (harmful, benign) = (part.count(Label::Harmful), part.count(Label::Benign));
            if harmful == 0 || benign == 0 {
                let found = format!("{harmful} harmful and {benign} benign prompts in the {name} split");
                let expected =
                    "prompts of both labels in the splits train, valid and test, none of which the data repeat";
                return Err(Error::input("--security", found, expected));
            }
            if job.task.is_some() && part.tasks.is_empty() {
                let expected =
                    "tasks that the training data do not repeat: half of them for selection, half for the verdict";
                return Err(Error::input("--task", format!("no task for the {name} part"), expected));
            }
        }
        if train.is_empty() {
            return Err(Error::input("--data", "no conversation to train on", "at least one"));
        }
        let sizes = PartSizes {
            train: train.len(),
            valid_prompts: valid.prompts.len(),
            valid_tasks: valid.tasks.len(),
            test_prompts: test.prompts.len(),
            test_tasks: test.tasks.len(),
            heldout: valid.heldout.len() + test.heldout.len(),
            repeated_prompts: prompts - valid.prompts.len() - test.prompts.len(),
            repeated_tasks: task_prompts.len() - valid.tasks.len() - test.tasks.len(),
            not_replayed: all_prompts - security.len(),
        };
        Ok(Self { train, security, valid, test, sizes })
    }

    /// All conversations, those that are set aside behind the others.
    pub(super) fn conversations(&self) -> impl Iterator<Item = &Example> {
        self.train.iter().chain(&self.valid.heldout).chain(&self.test.heldout)
    }

    /// Measures no loss of what is not to be learned.
    pub(super) fn leave_out_of_heldout(&mut self, refused: &RefusedExamples) {
        for part in [&mut self.valid, &mut self.test] {
            part.heldout.retain(|example| !refused.contains(example));
        }
        self.sizes.heldout = self.valid.heldout.len() + self.test.heldout.len();
    }
}

/// The parts without what training data repeat; of the first without what the second repeats.
fn apart<T>([valid, test]: [Vec<T>; 2], trained: &NearDuplicates, prompt: fn(&T) -> &String) -> [Vec<T>; 2] {
    let fresh = |item: &T| trained.find(prompt(item)).is_none();
    let test: Vec<T> = test.into_iter().filter(fresh).collect();
    let known = NearDuplicates::new(&test.iter().map(prompt).collect::<Vec<_>>());
    let valid = valid.into_iter().filter(|item| fresh(item) && known.find(prompt(item)).is_none()).collect();
    [valid, test]
}

/// Two random halves, each in the order of the whole; items of one group stay together.
fn halves<T>(items: Vec<T>, seed: u64, group: impl Fn(&T) -> String) -> [Vec<T>; 2] {
    let mut seen = HashSet::new();
    let mut groups: Vec<String> = items.iter().map(&group).filter(|name| seen.insert(name.clone())).collect();
    Philox::new(seed, HALVES_STREAM).shuffle(&mut groups);
    let first: HashSet<&String> = groups[..groups.len() / 2].iter().collect();
    let (first, second) = items.into_iter().partition(|item| first.contains(&group(item)));
    [first, second]
}

/// Takes a tenth of the distinct examples out of `train`, with all that repeat them: half for selection, half for the
/// verdict.
fn set_aside(train: &mut Vec<Example>, seed: u64) -> Result<(Vec<Example>, Vec<Example>)> {
    let key = |example: &Example| blake3::hash(bytemuck::cast_slice(&example.tokens));
    let mut keys: Vec<blake3::Hash> = train.iter().map(key).collect();
    keys.sort_unstable_by(|a, b| a.as_bytes().cmp(b.as_bytes()));
    keys.dedup();
    let count = (keys.len() / HELD_OUT).min(MOST_HELD_OUT);
    if count < 2 {
        let found = format!("{} different rows", keys.len());
        let expected = "20 or more, some of which are set aside to measure the loss; or --task, a file of tasks";
        return Err(Error::input("--data", found, expected));
    }
    Philox::new(seed, HALVES_STREAM).shuffle(&mut keys);
    let (valid, test) = keys[..count].split_at(count / 2);
    let (mut for_choice, mut for_verdict) = (Vec::new(), Vec::new());
    let mut seen = HashSet::new();
    train.retain(|example| {
        let key = key(example);
        let part = match (valid.contains(&key), test.contains(&key)) {
            (true, _) => &mut for_choice,
            (_, true) => &mut for_verdict,
            _ => return true,
        };
        if seen.insert(key) {
            part.push(example.clone());
        }
        false
    });
    Ok((for_choice, for_verdict))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repeated_examples_are_set_aside_together() {
        let example =
            |token: u32| Example { tokens: vec![token, token + 1], trained: vec![false, true], replayed: false };
        let mut train: Vec<Example> = (0..40).flat_map(|i| [example(i), example(i)]).collect();
        let (valid, test) = set_aside(&mut train, 3).unwrap();
        assert_eq!((valid.len(), test.len(), train.len()), (2, 2, 72));
        assert!(valid.iter().chain(&test).all(|example| !train.contains(example)));
        assert!(valid.iter().all(|example| !test.contains(example)));
        let mut few: Vec<Example> = (0..19).map(example).collect();
        assert!(set_aside(&mut few, 3).unwrap_err().to_string().contains("19 different rows"));
    }

    #[test]
    fn parts_share_no_text() {
        let texts = |all: &[&str]| all.iter().map(|text| (*text).to_owned()).collect::<Vec<String>>();
        let trained = NearDuplicates::new(&["what is it"]);
        let parts = [texts(&["a b c", "what is it?", "x y"]), texts(&["A, b; C", "What is it", "z"])];
        let [valid, test] = apart(parts, &trained, |text| text);
        assert_eq!((valid, test), (texts(&["x y"]), texts(&["A, b; C", "z"])));
        let [first, second] = halves((0..7).collect(), 1, u32::to_string);
        assert_eq!((first.len(), second.len()), (3, 4));
        assert!(first.is_sorted() && second.is_sorted());
        // Twins stay together.
        let [first, second] = halves((0..14).collect(), 1, |item: &u32| (item / 2).to_string());
        assert_eq!((first.len(), second.len()), (6, 8));
        assert!(first.iter().all(|item| first.contains(&(item ^ 1))));
    }
}
