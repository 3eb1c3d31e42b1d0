//! Texts that repeat each other but for a few words: what must not be in training data and evaluation at once.

use std::collections::{BTreeSet, HashMap};

/// Smallest [`similarity`] of texts that repeat each other: one word in ten may differ.
pub const NEAR: f64 = 0.9;

/// The words of a text in lower case, without punctuation, in order.
pub fn words(text: &str) -> Vec<String> {
    let words = text.split(|c: char| !c.is_alphanumeric()).filter(|word| !word.is_empty());
    words.map(str::to_lowercase).collect()
}

/// Jaccard's index of two sets of words, |a ∩ b| / |a ∪ b|, from 0 to 1; 1 for two empty sets.
pub fn similarity(a: &BTreeSet<String>, b: &BTreeSet<String>) -> f64 {
    jaccard(a.intersection(b).count(), a.len(), b.len())
}

fn jaccard(both: usize, a: usize, b: usize) -> f64 {
    let either = a + b - both;
    if either == 0 { 1.0 } else { both as f64 / either as f64 }
}

/// Texts that others are held against.
pub struct NearTexts {
    /// Number of distinct words of each text.
    sizes: Vec<usize>,
    /// The texts that hold a word.
    holding: HashMap<String, Vec<usize>>,
}

impl NearTexts {
    /// These texts, in this order.
    pub fn new<'t>(texts: impl IntoIterator<Item = &'t str>) -> Self {
        let mut all = Self { sizes: Vec::new(), holding: HashMap::new() };
        for text in texts {
            let set: BTreeSet<String> = words(text).into_iter().collect();
            let index = all.sizes.len();
            all.sizes.push(set.len());
            for word in set {
                all.holding.entry(word).or_default().push(index);
            }
        }
        all
    }

    /// The first text whose similarity with `text` is at least [`NEAR`]; none for a text without words.
    pub fn find(&self, text: &str) -> Option<usize> {
        let set: BTreeSet<String> = words(text).into_iter().collect();
        let mut shared = vec![0; self.sizes.len()];
        for index in set.iter().filter_map(|word| self.holding.get(word)).flatten() {
            shared[*index] += 1;
        }
        let near = |(both, size): (&usize, &usize)| *both > 0 && jaccard(*both, set.len(), *size) >= NEAR;
        shared.iter().zip(&self.sizes).position(near)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_word_in_ten_may_differ() {
        let texts = NearTexts::new(["a b c", "one two three four five six seven eight nine ten"]);
        assert_eq!(texts.find("C, b — A!"), Some(0));
        // 3 of 4 words.
        assert_eq!(texts.find("a b c d"), None);
        // 10 of 11, and 9 of 11 where one is exchanged.
        assert_eq!(texts.find("One two three four five six seven eight nine ten eleven"), Some(1));
        assert_eq!(texts.find("one two three four five six seven eight nine eleven"), None);
        assert_eq!((texts.find(""), texts.find("?!")), (None, None));
    }

    #[test]
    fn similarity_by_hand() {
        let set = |text: &str| words(text).into_iter().collect::<BTreeSet<String>>();
        assert_eq!(similarity(&set("a b c"), &set("b c d")), 0.5);
        assert_eq!((similarity(&set(""), &set("")), similarity(&set("a"), &set(""))), (1.0, 0.0));
    }
}
