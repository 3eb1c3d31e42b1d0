//! Texts that two sets of data share, near-duplicates included: tuning data must hold no prompt of the evaluation.

use crate::data::{Conversation, RowReader};
use crate::error::{Error, Result};
use rayon::prelude::*;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::Path;

/// Least similarity of near-duplicates.
pub const NEAR: f64 = 0.85;
/// Most rows of a file that an error names.
const NAMED_ROWS: usize = 12;

/// A text and where it stands.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Passage {
    /// `train.jsonl:17`
    pub place: String,
    /// The text.
    pub text: String,
}

impl Passage {
    /// The messages of users in a file of training conversations.
    ///
    /// # Errors
    /// As [`RowReader::read`].
    pub fn of_conversations(path: &Path, rows: &mut RowReader) -> Result<Vec<Self>> {
        let read = rows.read(path, |row| Ok((row.place.clone(), Conversation::from_row(row)?)))?;
        let asked = read.into_iter().flat_map(|(place, conversation)| {
            let users = conversation.messages.into_iter().filter(|message| message.role == "user");
            users.map(move |message| Self { place: place.clone(), text: message.content })
        });
        Ok(asked.collect())
    }
}

/// A text that is in two sets.
#[derive(Clone, Debug, PartialEq)]
pub struct Overlap {
    /// Where it stands in the one set.
    pub place: String,
    /// Where in the other.
    pub other: String,
    /// Jaccard similarity of both, [`NEAR`] to 1.
    pub similarity: f64,
}

/// A set of texts, in which near-duplicates of others are found.
///
/// The similarity is Jaccard's, |a ∩ b| / |a ∪ b|, of the words and pairs of adjacent words of both: order counts, so that
/// "3 + 4" and "4 + 3" are two. Texts of one similarity of [`NEAR`] or more share one of their rarest features (prefix
/// filter; Bayardo, Ma and Srikant, WWW 2007), so that few pairs are compared.
#[derive(Debug, Default)]
pub struct NearDuplicates {
    /// Features of each text, ascending.
    sets: Vec<Vec<u64>>,
    /// Number of texts with a feature.
    counts: HashMap<u64, u32>,
    /// Texts that have the feature among their rarest.
    rare: HashMap<u64, Vec<usize>>,
}

impl NearDuplicates {
    /// Indexes texts.
    pub fn new<S: AsRef<str> + Sync>(texts: &[S]) -> Self {
        let sets: Vec<Vec<u64>> = texts.par_iter().map(|text| features(text.as_ref())).collect();
        let mut found = Self::default();
        for feature in sets.iter().flatten() {
            *found.counts.entry(*feature).or_default() += 1;
        }
        for (index, set) in sets.iter().enumerate() {
            for feature in found.prefix(set) {
                found.rare.entry(feature).or_default().push(index);
            }
        }
        found.sets = sets;
        found
    }

    /// The rarest features of a set, of which any near-duplicate has one.
    fn prefix(&self, set: &[u64]) -> Vec<u64> {
        let mut order: Vec<u64> = set.to_vec();
        order.sort_by_key(|feature| (self.counts.get(feature).copied().unwrap_or(0), *feature));
        let needed = (NEAR * set.len() as f64).ceil() as usize;
        order.truncate((set.len() + 1).saturating_sub(needed).min(set.len()));
        order
    }

    /// Index and similarity of the most similar text, if it is a near-duplicate of `text`; the first of equal ones.
    pub fn find(&self, text: &str) -> Option<(usize, f64)> {
        let set = features(text);
        let candidates: BTreeSet<usize> =
            self.prefix(&set).iter().filter_map(|feature| self.rare.get(feature)).flatten().copied().collect();
        let similar = candidates.into_iter().map(|index| (index, jaccard(&set, &self.sets[index])));
        let near = similar.filter(|(_, similarity)| *similarity >= NEAR);
        near.reduce(|best, next| if next.1 > best.1 { next } else { best })
    }
}

/// Passages of `data` that are in `held_out` as well, in order.
pub fn overlaps(data: &[Passage], held_out: &[Passage]) -> Vec<Overlap> {
    let texts: Vec<&str> = held_out.iter().map(|passage| passage.text.as_str()).collect();
    let index = NearDuplicates::new(&texts);
    let found = data.par_iter().filter_map(|passage| {
        let (other, similarity) = index.find(&passage.text)?;
        Some(Overlap { place: passage.place.clone(), other: held_out[other].place.clone(), similarity })
    });
    found.collect()
}

/// Refuses tuning data that holds prompts of the evaluation; `help` says what to do.
///
/// # Errors
/// [`Error::Input`] names rows by file, and no text.
pub fn refuse_overlaps(found: &[Overlap], help: &str) -> Result<()> {
    let Some(first) = found.first() else { return Ok(()) };
    let mut files: BTreeMap<&str, BTreeSet<u64>> = BTreeMap::new();
    for overlap in found {
        let (file, row) = overlap.place.rsplit_once(':').unwrap_or((&overlap.place, ""));
        files.entry(file).or_default().insert(row.parse().unwrap_or(0));
    }
    let list = files.iter().map(|(file, rows)| {
        let named: Vec<String> = rows.iter().take(NAMED_ROWS).map(u64::to_string).collect();
        let more = rows.len().saturating_sub(NAMED_ROWS);
        let more = if more > 0 { format!(" and {more} more") } else { String::new() };
        format!("rows {}{more} of {file}", named.join(", "))
    });
    let how =
        if first.similarity < 1.0 { format!("similarity {:.2}", first.similarity) } else { "the same words".into() };
    let found = format!(
        "prompts that the evaluation asks too, up to small changes ({} with {}: {how}): {}",
        first.place,
        first.other,
        list.collect::<Vec<_>>().join("; ")
    );
    Err(Error::input("tuning data", found, help))
}

/// Hashes of the words and of the pairs of adjacent words, ascending.
fn features(text: &str) -> Vec<u64> {
    let words = words(text);
    let pairs = words.windows(2).map(|pair| hash(&(&pair[0], &pair[1])));
    let all: BTreeSet<u64> = words.iter().map(hash).chain(pairs).collect();
    all.into_iter().collect()
}

fn hash(value: &impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    value.hash(&mut hasher);
    hasher.finish()
}

/// Words in lower case without punctuation; arithmetic signs, and characters of scripts without spaces, are words.
fn words(text: &str) -> Vec<String> {
    let mut words = Vec::new();
    let mut word = String::new();
    for c in text.chars() {
        let alone = "+-*/=<>^%".contains(c) || ('\u{2e80}'..='\u{9fff}').contains(&c);
        if c.is_alphanumeric() && !alone {
            word.extend(c.to_lowercase());
            continue;
        }
        if !word.is_empty() {
            words.push(std::mem::take(&mut word));
        }
        if alone {
            words.push(c.to_string());
        }
    }
    words.extend((!word.is_empty()).then_some(word));
    words
}

/// Of two ascending sets; 0 where either is empty.
fn jaccard(a: &[u64], b: &[u64]) -> f64 {
    let both = a.iter().filter(|feature| b.binary_search(feature).is_ok()).count();
    if both == 0 { 0.0 } else { both as f64 / (a.len() + b.len() - both) as f64 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn passages(name: &str, texts: &[&str]) -> Vec<Passage> {
        let passage = |(i, text): (usize, &&str)| Passage { place: format!("{name}:{}", i + 1), text: (*text).into() };
        texts.iter().enumerate().map(passage).collect()
    }

    #[test]
    fn similarity_by_hand() {
        let similarity = |a: &str, b: &str| jaccard(&features(a), &features(b));
        // Words a b c and pairs ab bc, against a b d, ab bd: 3 of 7.
        assert_eq!(similarity("A, b c!", "a b. d"), 3.0 / 7.0);
        // Words 3 + 4 and pairs, in another order: 3 of 7; another sign: 2 of 8.
        assert_eq!((similarity("3 + 4", "4 + 3"), similarity("3 + 4", "3 - 4")), (3.0 / 7.0, 2.0 / 8.0));
        assert_eq!((similarity("How are you?", "how are YOU"), similarity("", "")), (1.0, 0.0));
        assert_eq!(words("你好 world-wide"), ["你", "好", "world", "-", "wide"]);
    }

    #[test]
    fn near_duplicates_are_found_by_row() {
        let test = passages("test.jsonl", &["how do I fix the old wooden door of my house", "what is 3 + 4"]);
        // Eleven words and ten pairs, all among twelve and eleven: 21 of 23. The last word changed: 19 of 23.
        let train = passages(
            "train.jsonl",
            &[
                "what is 4 + 3",
                "How do I fix the old wooden door of my house, please?",
                "how do I fix the old wooden door of my barn",
                "What is 3 + 4?",
            ],
        );
        let found = overlaps(&train, &test);
        let places: Vec<(&str, &str, f64)> =
            found.iter().map(|o| (o.place.as_str(), o.other.as_str(), o.similarity)).collect();
        assert_eq!(places, [("train.jsonl:2", "test.jsonl:1", 21.0 / 23.0), ("train.jsonl:4", "test.jsonl:2", 1.0)]);
        let error = refuse_overlaps(&found, "other rows").unwrap_err();
        assert_eq!(error.exit_code(), 2);
        let error = error.to_string();
        assert!(error.contains("rows 2, 4 of train.jsonl") && !error.contains("door"), "{error}");
        refuse_overlaps(&[], "").unwrap();
    }

    #[test]
    fn the_index_finds_what_a_comparison_of_all_pairs_finds() {
        // Texts of few words from a small vocabulary, so that many are close.
        let mut rng = crate::rng::Philox::new(5, 0);
        let mut text = |length: usize| (0..length).map(|_| format!("w{}", rng.below(3))).collect::<Vec<_>>().join(" ");
        let texts: Vec<String> = (0..300).map(|i| text(4 + i % 9)).collect();
        let index = NearDuplicates::new(&texts);
        let mut near = 0;
        for i in 0..200 {
            let other = text(4 + i % 9);
            let best = texts.iter().map(|t| jaccard(&features(&other), &features(t))).fold(0.0, f64::max);
            let found = index.find(&other).map(|(_, similarity)| similarity);
            assert_eq!(found, (best >= NEAR).then_some(best), "{other}");
            near += usize::from(found.is_some());
        }
        assert!((20..200).contains(&near), "{near}");
    }
}
