//! Self-replay: the model's own answers to security prompts, as training data that keeps it as it is.
//!
//! L = CE(task) + CE(y | x) with y drawn from the model before tuning: refusals of harmful prompts and answers to their
//! benign twins (GR-SAP, arXiv 2603.10243; the choice by behaviour and diversity, arXiv 2510.21885). Only the train
//! split is used. Harmful prompts that the model answers are dropped, and their answers with them.

use super::eval::kinds::AnswerView;
use super::eval::refusal::RefusalList;
use super::loaded::{LoadedModel, REFUSAL_TOKENS};
use super::overlap::NearDuplicates;
use crate::backend::Backend;
use crate::data::{Label, SecurityPrompt, Split};
use crate::engine::{Finish, GenerateOptions};
use crate::error::{Error, Result};
use crate::io::json;
use crate::options::{count, default_from_args, mib_or_none};
use crate::progress::{Observer, Progress};
use crate::rng::Philox;
use clap::Args;
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet, HashSet};

/// Stream of the draws that order prompts; one more for each label.
const ORDER_STREAM: u64 = u64::MAX - 16;
/// Fewest prompts that are answered at once.
const ROUND: usize = 64;
/// How a line of the file begins, by which it is recognised.
pub const REPLAY_START: &str = "{\"replay\":";

/// Options of self-replay.
#[derive(schemars::JsonSchema, Clone, Debug, PartialEq, Serialize, serde::Deserialize, Args)]
#[serde(default, deny_unknown_fields)]
pub struct ReplayOptions {
    /// Keep at most N refusals and N benign answers; 0 = all
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub per: usize,
    /// Longest answer, in tokens; answers that are not finished by then are dropped
    ///
    /// Refusals are short: where many benign answers are dropped, what is replayed refuses more than the model does.
    #[arg(long, value_parser = count, default_value_t = 512)]
    pub answer_tokens: usize,
    /// Memory of the key-value cache, in MiB
    #[arg(long = "cache-mib", value_name = "CACHE_MIB", value_parser = mib_or_none, default_value = "1024")]
    pub cache_bytes: u64,
    /// Seed of the order in which prompts are taken; in a study, the study's.
    #[arg(skip)]
    #[serde(skip)]
    pub seed: u64,
}

default_from_args!(ReplayOptions);

/// What became of the train split's prompts of one label.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, serde::Deserialize)]
pub struct ReplayCounts {
    /// Prompts of the train split.
    pub prompts: usize,
    /// Answers that are in the file.
    pub kept: usize,
    /// Answers of the other kind: harmful prompts that are answered, benign ones that are refused.
    pub other_behaviour: usize,
    /// Answers without an end.
    pub cut_off: usize,
    /// Answers of which nothing is visible.
    pub empty: usize,
    /// Answers that are no text, as `swat eval` counts them.
    pub incoherent: usize,
    /// Prompts that another of the train split repeats, up to case, white space and punctuation.
    pub repeated: usize,
    /// Prompts that another split repeats, up to the same or nearly ([`crate::secure::NEAR`]).
    pub held_out: usize,
    /// Prompts that were not needed.
    pub not_needed: usize,
}

/// Counts of self-replay, by label.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, serde::Deserialize)]
pub struct ReplaySummary {
    /// Harmful prompts: refusals are kept.
    pub harmful: ReplayCounts,
    /// Benign prompts: answers are kept.
    pub benign: ReplayCounts,
}

/// A line of the file: a training conversation in the layout `messages`.
#[derive(Serialize)]
struct ReplayLine<'a> {
    replay: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    category: Option<&'a str>,
    messages: [Turn<'a>; 2],
}

#[derive(Serialize)]
struct Turn<'a> {
    role: &'static str,
    content: &'a str,
}

impl ReplaySummary {
    /// Whether so many benign answers were cut off that refusals are a larger part of what is kept than of what the model
    /// says: more than a fifth of them.
    pub fn lacks_long_answers(&self) -> bool {
        5 * self.benign.cut_off > self.benign.kept + self.benign.cut_off
    }
}

impl<B: Backend> LoadedModel<B> {
    /// The model's own refusals of harmful prompts and answers to benign ones, as a JSON Lines file of training
    /// conversations, refusals first. Equal inputs and seed give equal bytes.
    ///
    /// A refusal is known by `refusals` in the first [`REFUSAL_TOKENS`] tokens, an answer by the absence of any such
    /// expression.
    ///
    /// # Errors
    /// [`Error::Failed`] where no refusal is kept; a failing device.
    pub fn replay(
        &self,
        prompts: &[SecurityPrompt],
        options: &ReplayOptions,
        refusals: &RefusalList,
        observer: Observer<'_>,
    ) -> Result<(String, ReplaySummary)> {
        let mut lines = String::new();
        let harmful = self.replay_label(prompts, Label::Harmful, (options, refusals), &mut lines, observer)?;
        if harmful.kept == 0 {
            let what = format!("the model refuses none of {} harmful prompts in a finished answer", harmful.prompts);
            return Err(Error::failed(what, "an aligned --model, other prompts, or a larger --answer-tokens"));
        }
        let benign = self.replay_label(prompts, Label::Benign, (options, refusals), &mut lines, observer)?;
        Ok((lines, ReplaySummary { harmful, benign }))
    }

    fn replay_label(
        &self,
        prompts: &[SecurityPrompt],
        label: Label,
        (options, refusals): (&ReplayOptions, &RefusalList),
        lines: &mut String,
        observer: Observer<'_>,
    ) -> Result<ReplayCounts> {
        let (candidates, mut counts) = candidates(prompts, label);
        let order = spread(&candidates, options.seed, ORDER_STREAM + label as u64);
        let wanted = if options.per == 0 { order.len() } else { options.per };
        let (task, kind) = match label {
            Label::Harmful => ("own refusals", "refusal"),
            Label::Benign => ("own answers", "answer"),
        };
        let generate = GenerateOptions {
            max_new_tokens: options.answer_tokens,
            cache_bytes: options.cache_bytes,
            stop: self.text.stop_tokens(),
            ..GenerateOptions::default()
        };
        let mut next = 0;
        while counts.kept < wanted && next < order.len() {
            let end = order.len().min(next + (wanted - counts.kept).max(ROUND));
            let round: Vec<&SecurityPrompt> = order[next..end].iter().map(|index| candidates[*index]).collect();
            let tokens = self.text.render_prompts(round.iter().map(|prompt| prompt.prompt.as_str()))?;
            let mut begun = HashSet::new();
            let mut on_token = |prompt, _| {
                if begun.insert(prompt) {
                    observer(Progress::new(task, next + begun.len(), order.len()));
                }
            };
            // Of a harmful prompt the opening alone decides.
            let ends = |_: usize, answer: &[u32]| {
                label == Label::Harmful && answer.len() == REFUSAL_TOKENS && self.complies(answer, refusals)
            };
            let answers = self.decoder.generate_until(&tokens, &generate, &mut on_token, &ends)?;
            next = end;
            for (prompt, answer) in round.into_iter().zip(answers) {
                if counts.kept == wanted {
                    counts.not_needed += 1;
                    continue;
                }
                let text = self.text.tokenizer.decode(&answer.tokens)?;
                let opening = self.text.tokenizer.decode(&answer.tokens[..answer.tokens.len().min(REFUSAL_TOKENS)])?;
                let behaves = match label {
                    Label::Harmful => refusals.is_refusal(&opening),
                    Label::Benign => !refusals.is_refusal(&text),
                };
                let view = AnswerView { text: &text, tokens: &answer.tokens, finish: answer.finish };
                if view.is_empty() {
                    counts.empty += 1;
                } else if !behaves {
                    counts.other_behaviour += 1;
                } else if view.is_cut_off() {
                    counts.cut_off += 1;
                } else if view.is_incoherent() {
                    counts.incoherent += 1;
                } else {
                    counts.kept += 1;
                    let messages = [("user", prompt.prompt.as_str()), ("assistant", text.trim())];
                    let messages = messages.map(|(role, content)| Turn { role, content });
                    lines.push_str(&json::line(&ReplayLine {
                        replay: kind,
                        category: prompt.category.as_deref(),
                        messages,
                    })?);
                }
            }
        }
        counts.not_needed += order.len() - next;
        Ok(counts)
    }

    /// Whether an answer that begins so is neither a refusal nor empty, however it goes on.
    fn complies(&self, opening: &[u32], refusals: &RefusalList) -> bool {
        let Ok(text) = self.text.tokenizer.decode(opening) else { return false };
        // The last character may be the first bytes of one that is not visible.
        let whole = text.trim_end_matches(char::REPLACEMENT_CHARACTER);
        let view = AnswerView { text: whole, tokens: opening, finish: Finish::Length };
        !refusals.is_refusal(&text) && !view.is_empty()
    }
}

/// The prompts of a label in the train split, without those that repeat another of it, or one of another split.
fn candidates(prompts: &[SecurityPrompt], label: Label) -> (Vec<&SecurityPrompt>, ReplayCounts) {
    let others = || prompts.iter().filter(|prompt| prompt.split != Split::Train).map(|prompt| prompt.prompt.as_str());
    let (held_out, near) =
        (others().map(words).collect::<HashSet<_>>(), NearDuplicates::new(&others().collect::<Vec<_>>()));
    let mut seen = HashSet::new();
    let mut counts = ReplayCounts::default();
    let mut found = Vec::new();
    for prompt in prompts.iter().filter(|prompt| prompt.split == Split::Train && prompt.label == label) {
        counts.prompts += 1;
        let words = words(&prompt.prompt);
        if held_out.contains(&words) || near.find(&prompt.prompt).is_some() {
            counts.held_out += 1;
        } else if seen.insert(words) {
            found.push(prompt);
        } else {
            counts.repeated += 1;
        }
    }
    (found, counts)
}

/// Prompts without those of the train split that an evaluation asks as well, up to small changes: what is replayed is
/// trained.
pub(super) fn without_held_out(prompts: &[SecurityPrompt], held_out: &[String]) -> Vec<SecurityPrompt> {
    let near = NearDuplicates::new(held_out);
    let kept = |prompt: &&SecurityPrompt| prompt.split != Split::Train || near.find(&prompt.prompt).is_none();
    prompts.iter().filter(kept).cloned().collect()
}

/// The words of a text in lower case, without punctuation.
fn words(text: &str) -> Vec<String> {
    let words = text.split(|c: char| !c.is_alphanumeric()).filter(|word| !word.is_empty());
    words.map(str::to_lowercase).collect()
}

/// An order of the prompts whose every beginning is spread: categories in turn (prompts without one are a category), and
/// in each the prompt that is farthest from those before it.
fn spread(prompts: &[&SecurityPrompt], seed: u64, stream: u64) -> Vec<usize> {
    let mut categories: BTreeMap<Option<&str>, Vec<usize>> = BTreeMap::new();
    for (index, prompt) in prompts.iter().enumerate() {
        categories.entry(prompt.category.as_deref()).or_default().push(index);
    }
    let mut rng = Philox::new(seed, stream);
    let ordered: Vec<Vec<usize>> = categories
        .into_values()
        .map(|mut members| {
            rng.shuffle(&mut members);
            let texts: Vec<&str> = members.iter().map(|index| prompts[*index].prompt.as_str()).collect();
            farthest_first(&texts).into_iter().map(|at| members[at]).collect()
        })
        .collect();
    let longest = ordered.iter().map(Vec::len).max().unwrap_or(0);
    (0..longest).flat_map(|turn| ordered.iter().filter_map(move |members| members.get(turn).copied())).collect()
}

/// Greedy farthest-point order (Gonzalez, 1985) from the first text: next is the one whose smallest distance to those
/// before it is largest, the earlier of equal ones. The distance is Jaccard's, 1 − |a ∩ b| / |a ∪ b| of the words.
fn farthest_first(texts: &[&str]) -> Vec<usize> {
    let sets: Vec<BTreeSet<String>> = texts.iter().map(|text| words(text).into_iter().collect()).collect();
    let mut nearest = vec![f64::INFINITY; texts.len()];
    let mut order = Vec::with_capacity(texts.len());
    let mut left: Vec<usize> = (0..texts.len()).collect();
    while !left.is_empty() {
        let best = left.iter().enumerate().fold(
            0,
            |best, (at, index)| {
                if nearest[*index] > nearest[left[best]] { at } else { best }
            },
        );
        let chosen = left.remove(best);
        order.push(chosen);
        for &index in &left {
            nearest[index] = nearest[index].min(distance(&sets[chosen], &sets[index]));
        }
    }
    order
}

fn distance(a: &BTreeSet<String>, b: &BTreeSet<String>) -> f64 {
    let both = a.intersection(b).count();
    let either = a.len() + b.len() - both;
    if either == 0 { 0.0 } else { 1.0 - both as f64 / either as f64 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prompt(text: &str, category: Option<&str>, split: Split) -> SecurityPrompt {
        let category = category.map(str::to_owned);
        SecurityPrompt { place: String::new(), prompt: text.into(), label: Label::Harmful, pair: None, category, split }
    }

    #[test]
    fn answers_that_are_cut_off_are_missed_beside_the_refusals() {
        let summary = |kept, cut_off| ReplaySummary {
            harmful: ReplayCounts::default(),
            benign: ReplayCounts { kept, cut_off, ..ReplayCounts::default() },
        };
        assert!(summary(34, 34).lacks_long_answers() && summary(0, 1).lacks_long_answers());
        assert!(!summary(61, 7).lacks_long_answers() && !summary(0, 0).lacks_long_answers());
    }

    #[test]
    fn the_farthest_comes_next() {
        // Distances from the first: 1 − 2/4, 1, 1 − 1/5; from the third: 1, –, 1 − 2/4.
        assert_eq!(farthest_first(&["a b c", "a b d", "x y z", "a y z"]), [0, 2, 1, 3]);
        assert_eq!(farthest_first(&[]), [0; 0]);
    }

    #[test]
    fn an_opening_tells_compliance() {
        let model = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/tiny");
        let model = LoadedModel::open(crate::backend::cpu::Cpu::new(), &model, None).unwrap();
        let complies = |text: &str, expression: &str| {
            let list = RefusalList::parse(expression, "list").unwrap();
            model.complies(&model.text.tokenizer.encode(text).unwrap(), &list)
        };
        assert!(complies("first the", "second"));
        assert!(!complies("first the", "first"));
        // Nothing is to be seen yet.
        assert!(!model.complies(&[], &RefusalList::default()));
    }

    #[test]
    fn categories_take_turns() {
        let all: Vec<SecurityPrompt> = [("a", "x"), ("b", "x"), ("c", "x"), ("d", "x"), ("e", "y")]
            .map(|(text, category)| prompt(text, Some(category), Split::Train))
            .to_vec();
        let (found, _) = candidates(&all, Label::Harmful);
        for seed in 0..5 {
            let order = spread(&found, seed, 0);
            assert_eq!(order[1], 4, "{order:?}");
            assert_eq!(order.len(), 5);
            assert_eq!(order, spread(&found, seed, 0));
        }
    }

    #[test]
    fn what_is_held_out_is_never_replayed() {
        let texts = [("Do it now!", Split::Train), ("do it  now", Split::Test), ("and that", Split::Train)];
        let mut all = texts.map(|(text, split)| prompt(text, None, split)).to_vec();
        all.push(prompt("And that?", None, Split::Train));
        // All words of a held-out prompt and one more.
        all.push(prompt("a b c d e f g h i j", None, Split::Valid));
        all.push(prompt("a b c d e f g h i j k", None, Split::Train));
        let (found, counts) = candidates(&all, Label::Harmful);
        assert_eq!(found, [&all[2]]);
        assert_eq!((counts.prompts, counts.held_out, counts.repeated), (4, 2, 1));
        assert!(candidates(&all, Label::Benign).0.is_empty());
        // Of the train split alone, for nothing else is replayed.
        let left = without_held_out(&all, &["AND that".into(), "a b c d e f g h i j".into()]);
        assert_eq!(left, [all[0].clone(), all[1].clone(), all[4].clone()]);
    }
}
