//! Prompts that an aligned model refuses, and their benign twins.

use super::draw::Draw;
use super::jsonl::{JsonLines, Line, short};
use crate::error::{Error, Result};
use clap::ValueEnum;
use std::collections::{BTreeMap, HashMap};
use std::path::Path;

/// Draws that decide the splits.
const SPLIT_STREAM: u64 = u64::MAX - 2;

/// Whether an aligned model refuses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Label {
    /// To be refused.
    Harmful,
    /// To be answered.
    Benign,
}

/// What a prompt is used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Split {
    /// Probes are fitted on these.
    Train,
    /// Choices are made on these.
    Valid,
    /// Results are reported on these.
    Test,
    /// Reported beside the test split: prompts of another origin.
    Ood,
}

impl Split {
    /// All splits.
    pub const ALL: [Self; 4] = [Self::Train, Self::Valid, Self::Test, Self::Ood];

    /// `train`, `valid`, `test`, `ood`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Train => "train",
            Self::Valid => "valid",
            Self::Test => "test",
            Self::Ood => "ood",
        }
    }
}

/// A labelled prompt.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct SecurityPrompt {
    /// The user's words. Never printed: they may be harmful.
    pub prompt: String,
    /// Harmful or benign.
    pub label: Label,
    /// Prompts that share it are twins and are never in different splits.
    pub pair: Option<String>,
    /// Kind of harm or origin.
    pub category: Option<String>,
    /// What it is used for.
    pub split: Split,
}

impl SecurityPrompt {
    /// Whether an aligned model refuses it.
    pub fn is_harmful(&self) -> bool {
        self.label == Label::Harmful
    }

    /// Reads a JSONL file of `{"prompt", "label": "harmful" | "benign", "pair"?, "category"?, "split"?: "train" | "valid" |
    /// "test" | "ood"}`, `pair` and `category` being strings or whole numbers.
    ///
    /// Prompts without a split are given one by pair, 60 / 20 / 20 to train, valid and test, from `seed`: separately for
    /// pairs with both labels, harmful ones and benign ones, so that each split has its share of each. A pair takes the
    /// split of any of its lines that names one. Prompts without a pair are pairs of their own (equal ones share theirs).
    /// A pair in two splits, and the same words under both labels, are errors.
    ///
    /// # Errors
    /// [`Error::Input`] names the line, pair or prompt that is wrong; [`Error::Io`].
    pub fn read(path: &Path, seed: u64) -> Result<Vec<Self>> {
        split_by_pair(JsonLines::open(path)?.parse_all(Raw::from_line)?, seed)
    }

    /// What training a probe needs: prompts of both labels in the train split of `place`.
    ///
    /// # Errors
    /// [`Error::Input`] names the label that is missing.
    pub fn require_both_labels(prompts: &[Self], place: &Path) -> Result<()> {
        let count = |label| prompts.iter().filter(|p| p.split == Split::Train && p.label == label).count();
        let (harmful, benign) = (count(Label::Harmful), count(Label::Benign));
        if harmful == 0 || benign == 0 {
            let found = format!("{harmful} harmful and {benign} benign prompts in the train split");
            return Err(Error::input(place.display().to_string(), found, "some of both, which a probe learns to tell"));
        }
        Ok(())
    }
}

/// A line before splits are assigned.
struct Raw {
    place: String,
    prompt: String,
    label: Label,
    pair: Option<String>,
    category: Option<String>,
    split: Option<Split>,
}

impl Raw {
    fn from_line(line: &Line) -> Result<Self> {
        let label = match line.text("label")? {
            "harmful" => Label::Harmful,
            "benign" => Label::Benign,
            other => return Err(line.error(format!("`label` is \"{}\"", short(other)), "harmful or benign")),
        };
        let split = match line.get("split") {
            None => None,
            Some(_) => {
                let name = line.text("split")?;
                let split = Split::ALL.into_iter().find(|s| s.name() == name);
                let found = || format!("`split` is \"{}\"", short(name));
                Some(split.ok_or_else(|| line.error(found(), "train, valid, test or ood"))?)
            }
        };
        Ok(Self {
            place: line.place.clone(),
            prompt: line.text("prompt")?.to_string(),
            label,
            pair: line.optional_name("pair")?,
            category: line.optional_name("category")?,
            split,
        })
    }
}

/// The prompts of one pair.
#[derive(Default)]
struct Pair {
    split: Option<Split>,
    labels: [bool; 2],
}

fn split_by_pair(raw: Vec<Raw>, seed: u64) -> Result<Vec<SecurityPrompt>> {
    let mut labels: HashMap<&str, Label> = HashMap::new();
    let mut pairs: Vec<Pair> = Vec::new();
    let mut known: HashMap<(Option<&str>, &str), usize> = HashMap::new();
    let mut pair_of = Vec::with_capacity(raw.len());
    for line in &raw {
        if *labels.entry(&line.prompt).or_insert(line.label) != line.label {
            let found = "the words of an earlier prompt under the other label";
            return Err(Error::input(&line.place, found, "one label for one prompt"));
        }
        let key = match &line.pair {
            Some(pair) => (Some(pair.as_str()), ""),
            None => (None, line.prompt.as_str()),
        };
        let index = *known.entry(key).or_insert(pairs.len());
        if index == pairs.len() {
            pairs.push(Pair::default());
        }
        pair_of.push(index);
        let Some(pair) = pairs.get_mut(index) else { continue };
        match (pair.split, line.split) {
            (Some(earlier), Some(split)) if earlier != split => {
                let what = line.pair.as_deref().map_or("the same prompt".into(), |p| format!("pair \"{}\"", short(p)));
                let found = format!("{what} in the split {}, and earlier in {}", split.name(), earlier.name());
                return Err(Error::input(&line.place, found, "twins in one split"));
            }
            (earlier, split) => pair.split = earlier.or(split),
        }
        pair.labels[line.label as usize] = true;
    }

    let mut strata: BTreeMap<[bool; 2], Vec<&mut Pair>> = BTreeMap::new();
    for pair in pairs.iter_mut().filter(|p| p.split.is_none()) {
        strata.entry(pair.labels).or_default().push(pair);
    }
    let mut draw = Draw::stream(seed, SPLIT_STREAM);
    for mut stratum in strata.into_values() {
        draw.shuffle(&mut stratum);
        let count = stratum.len();
        for (i, pair) in stratum.into_iter().enumerate() {
            // The middle of each pair's slot decides, so that counts are rounded to the nearest.
            pair.split = Some(match (2 * i + 1) * 5 {
                tenths if tenths < 6 * count => Split::Train,
                tenths if tenths < 8 * count => Split::Valid,
                _ => Split::Test,
            });
        }
    }
    let split = |index: usize| pairs.get(index).and_then(|p| p.split).unwrap_or(Split::Train);
    let prompts = raw.into_iter().zip(pair_of).map(|(raw, pair)| SecurityPrompt {
        prompt: raw.prompt,
        label: raw.label,
        pair: raw.pair,
        category: raw.category,
        split: split(pair),
    });
    Ok(prompts.collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(lines: &str, seed: u64) -> Result<Vec<SecurityPrompt>> {
        split_by_pair(JsonLines::new(lines.as_bytes(), "s.jsonl").parse_all(Raw::from_line)?, seed)
    }

    /// 100 pairs, 50 harmful and 30 benign prompts without a pair, no splits.
    fn unsplit() -> String {
        let mut lines = String::new();
        for i in 0..100 {
            for label in ["harmful", "benign"] {
                lines += &format!("{{\"prompt\":\"{label} {i}\",\"label\":\"{label}\",\"pair\":{i}}}\n");
            }
        }
        for (label, count) in [("harmful", 50), ("benign", 30)] {
            for i in 0..count {
                lines += &format!("{{\"prompt\":\"lone {label} {i}\",\"label\":\"{label}\"}}\n");
            }
        }
        lines
    }

    #[test]
    fn splits_are_60_20_20_by_pair_for_each_kind_of_pair() {
        let prompts = read(&unsplit(), 1).unwrap();
        let count = |split, label, paired: bool| {
            let is = |p: &&SecurityPrompt| p.split == split && p.label == label && p.pair.is_some() == paired;
            prompts.iter().filter(is).count()
        };
        for (split, pairs, harmful, benign) in
            [(Split::Train, 60, 30, 18), (Split::Valid, 20, 10, 6), (Split::Test, 20, 10, 6)]
        {
            let counts =
                [(Label::Harmful, true), (Label::Benign, true), (Label::Harmful, false), (Label::Benign, false)];
            assert_eq!(counts.map(|(label, paired)| count(split, label, paired)), [pairs, pairs, harmful, benign]);
        }
        let mut of_pair: HashMap<&str, Split> = HashMap::new();
        for p in &prompts {
            if let Some(pair) = &p.pair {
                assert_eq!(*of_pair.entry(pair).or_insert(p.split), p.split);
            }
        }
        assert_eq!(prompts, read(&unsplit(), 1).unwrap());
        assert_ne!(prompts, read(&unsplit(), 2).unwrap());
    }

    #[test]
    fn given_splits_are_kept_and_twins_follow_them() {
        let prompts = read(
            concat!(
                r#"{"prompt":"a","label":"harmful","pair":1}"#,
                "\n",
                r#"{"prompt":"b","label":"benign","pair":"1","split":"ood","category":null}"#,
                "\n",
                r#"{"prompt":"c","label":"benign","pair":2,"split":"test","category":"x"}"#,
                "\n",
            ),
            0,
        )
        .unwrap();
        let splits: Vec<Split> = prompts.iter().map(|p| p.split).collect();
        assert_eq!(splits, [Split::Ood, Split::Ood, Split::Test]);
        assert_eq!(prompts[2].category.as_deref(), Some("x"));
        let error = SecurityPrompt::require_both_labels(&prompts, Path::new("s.jsonl")).unwrap_err().to_string();
        assert!(error.contains("0 harmful and 0 benign prompts in the train split"), "{error}");
        SecurityPrompt::require_both_labels(&read(&unsplit(), 1).unwrap(), Path::new("s.jsonl")).unwrap();
    }

    #[test]
    fn wrong_lines_are_named_without_the_prompt() {
        let cases = [
            (r#"{"prompt":"secret","label":"bad"}"#, "s.jsonl:1: found `label` is \"bad\"; expected harmful or benign"),
            (r#"{"prompt":"secret"}"#, "no `label`"),
            (r#"{"label":"benign"}"#, "no `prompt`"),
            (r#"{"prompt":["secret"],"label":"benign"}"#, "`prompt` is a list"),
            (r#"{"prompt":"secret","label":"benign","split":"dev"}"#, "`split` is \"dev\""),
            (
                r#"{"prompt":"secret","label":"benign","pair":1.5}"#,
                "`pair` is a number; expected a string or a whole number",
            ),
            (
                "{\"prompt\":\"secret\",\"label\":\"harmful\",\"pair\":7,\"split\":\"train\"}\n\
                 {\"prompt\":\"twin\",\"label\":\"benign\",\"pair\":7,\"split\":\"test\"}",
                "s.jsonl:2: found pair \"7\" in the split test, and earlier in train",
            ),
            (
                "{\"prompt\":\"secret\",\"label\":\"harmful\"}\n{\"prompt\":\"secret\",\"label\":\"benign\",\"pair\":7}",
                "s.jsonl:2: found the words of an earlier prompt under the other label",
            ),
        ];
        for (lines, expected) in cases {
            let error = read(lines, 0).unwrap_err().to_string();
            assert!(error.contains(expected) && !error.contains("secret"), "{error}");
        }
    }
}
