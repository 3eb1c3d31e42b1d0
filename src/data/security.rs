//! Labelled security prompts and their splits.

use super::rows::{Row, RowReader, short};
use crate::error::{Error, Result};
use crate::rng::Philox;
use clap::ValueEnum;
use std::collections::{BTreeMap, HashMap};
use std::path::Path;

/// Stream of the draws that decide the splits.
const SPLIT_STREAM: u64 = u64::MAX - 2;

/// Keys of training rows that would change what is asked.
pub(super) const NOT_ASKED: [&str; 9] =
    ["system", "system_prompt", "system_message", "history", "messages", "conversations", "tools", "images", "image"];

/// Whether an aligned model should refuse the prompt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Label {
    /// Should be refused.
    Harmful,
    /// Should be answered.
    Benign,
}

/// Split of a prompt.
#[derive(
    schemars::JsonSchema,
    Clone,
    Copy,
    Debug,
    PartialEq,
    Eq,
    Hash,
    PartialOrd,
    Ord,
    serde::Serialize,
    serde::Deserialize,
    ValueEnum,
)]
#[serde(rename_all = "lowercase")]
pub enum Split {
    /// What training may see: probes are fitted to it, answers to it are replayed.
    Train,
    /// Selects hyperparameters, ε and module sets.
    Valid,
    /// Held out; results are reported on it.
    Test,
    /// Held out, from another source than the others; reported beside the test split.
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
    /// The user's message. Never printed, since it may be harmful.
    pub prompt: String,
    /// Harmful or benign.
    pub label: Label,
    /// Prompts with the same pair are matched twins and stay in one split.
    pub pair: Option<String>,
    /// Kind of harm, or source.
    pub category: Option<String>,
    /// As given in the file, else assigned by [`SecurityPrompt::read`].
    pub split: Split,
    /// File and line that it was read from; empty where there is none.
    #[serde(skip)]
    pub place: String,
}

impl Label {
    /// Both labels.
    pub const ALL: [Self; 2] = [Self::Harmful, Self::Benign];
}

impl SecurityPrompt {
    /// Whether an aligned model should refuse it.
    pub fn is_harmful(&self) -> bool {
        self.label == Label::Harmful
    }

    /// Reads a file of rows `{"prompt", "label": "harmful" | "benign", "pair"?, "category"?, "split"?: "train" |
    /// "valid" | "test" | "ood"}`; `pair` and `category` are strings or whole numbers, and `unsafe`, `safe` and
    /// `validation` are other names. Rows of JailbreakBench, whose prompt is `Goal`, and of AdvBench, `goal`, have their
    /// label from the file's name and `Index` as their pair.
    ///
    /// Prompts without a split are split by pair, 60 / 20 / 20 into train, valid and test, by `seed`, and stratified
    /// into pairs with both labels, harmful ones and benign ones. A pair with a split on any of its lines takes that
    /// one. Prompts without a pair form pairs of their own; identical prompts share one.
    ///
    /// # Errors
    /// As [`RowReader::read`]; [`Error::Input`] for a pair in two splits, or the same prompt under both labels.
    pub fn read(path: &Path, seed: u64, rows: &mut RowReader) -> Result<Vec<Self>> {
        Self::read_all(&[path], seed, rows)
    }

    /// [`SecurityPrompt::read`] of several files as one: twins may be in different files.
    ///
    /// # Errors
    /// As [`SecurityPrompt::read`].
    pub fn read_all(paths: &[impl AsRef<Path>], seed: u64, rows: &mut RowReader) -> Result<Vec<Self>> {
        let mut raw = Vec::new();
        for path in paths {
            let path = path.as_ref();
            raw.extend(rows.read(path, |row| Raw::from_row(row, path))?);
        }
        split_by_pair(raw, seed)
    }

    /// Checks that the train split has prompts of both labels, which a probe needs; `place` is the file shown in the
    /// error.
    ///
    /// # Errors
    /// [`Error::Input`] with the counts.
    pub fn require_both_labels(prompts: &[Self], place: &Path) -> Result<()> {
        let count = |label| prompts.iter().filter(|p| p.split == Split::Train && p.label == label).count();
        let (harmful, benign) = (count(Label::Harmful), count(Label::Benign));
        if harmful == 0 || benign == 0 {
            let found = format!("{harmful} harmful and {benign} benign prompts in the train split");
            return Err(Error::input(
                place.display().to_string(),
                found,
                "prompts of both labels, to train a probe on",
            ));
        }
        Ok(())
    }
}

/// A prompt before splits are assigned.
struct Raw {
    place: String,
    prompt: String,
    label: Label,
    pair: Option<String>,
    category: Option<String>,
    split: Option<Split>,
}

impl Raw {
    fn from_row(row: &Row, path: &Path) -> Result<Self> {
        row.refuse(&NOT_ASKED, "prompts of one user message each")?;
        let goal = ["Goal", "goal"].into_iter().find(|key| row.get(key).is_some());
        if let (Some(key), None) = (goal, row.get("prompt")) {
            return Self::from_behavior(row, key, path);
        }
        let label = match row.word("label", "harmful or benign")?.to_lowercase().as_str() {
            "harmful" | "unsafe" => Label::Harmful,
            "benign" | "safe" => Label::Benign,
            other => return Err(row.error(format!("`label` is \"{}\"", short(other)), "harmful or benign")),
        };
        let split = match row.get("split") {
            None => None,
            Some(_) => {
                let name = row.text("split")?;
                let own = if name == "validation" { "valid" } else { name };
                let split = Split::ALL.into_iter().find(|s| s.name() == own);
                let found = || format!("`split` is \"{}\"", short(name));
                Some(split.ok_or_else(|| row.error(found(), "train, valid, test or ood"))?)
            }
        };
        Ok(Self {
            place: row.place.clone(),
            prompt: row.text("prompt")?.to_string(),
            label,
            pair: row.optional_name("pair")?,
            category: row.optional_name("category")?,
            split,
        })
    }
}

impl Raw {
    /// A row of JailbreakBench (Chao et al., arXiv 2404.01318): `Goal`, `Category` and `Index`, which twins share; files
    /// are named `harmful-behaviors.csv` and `benign-behaviors.csv`. AdvBench (Zou et al., arXiv 2307.15043) has `goal` in
    /// `harmful_behaviors.csv`.
    fn from_behavior(row: &Row, key: &str, path: &Path) -> Result<Self> {
        let name = path.file_name().unwrap_or_default().to_string_lossy().to_lowercase();
        let label = match (name.contains("harmful"), name.contains("benign")) {
            (true, false) => Label::Harmful,
            (false, true) => Label::Benign,
            _ => {
                let found =
                    format!("a `{key}` without a label, in a file whose name says neither `harmful` nor `benign`");
                return Err(row.error(found, "harmful-behaviors.csv and benign-behaviors.csv of JailbreakBench"));
            }
        };
        Ok(Self {
            place: row.place.clone(),
            prompt: row.text(key)?.to_string(),
            label,
            // Not an own pair of another file that is read along with it.
            pair: row.optional_name("Index")?.map(|index| format!("behavior {index}")),
            category: row.optional_name("Category")?,
            split: None,
        })
    }
}

/// Split and labels (harmful, benign) of one pair.
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
            let found = "an earlier prompt with the other label";
            return Err(Error::input(&line.place, found, "one label per prompt"));
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
                let found = format!("{what} in split {}, and earlier in {}", split.name(), earlier.name());
                return Err(Error::input(&line.place, found, "one split per pair"));
            }
            (earlier, split) => pair.split = earlier.or(split),
        }
        pair.labels[line.label as usize] = true;
    }

    let mut strata: BTreeMap<[bool; 2], Vec<&mut Pair>> = BTreeMap::new();
    for pair in pairs.iter_mut().filter(|p| p.split.is_none()) {
        strata.entry(pair.labels).or_default().push(pair);
    }
    let mut rng = Philox::new(seed, SPLIT_STREAM);
    for mut stratum in strata.into_values() {
        rng.shuffle(&mut stratum);
        let count = stratum.len();
        for (i, pair) in stratum.into_iter().enumerate() {
            // Decided by the middle of the pair's slot, so that counts round to nearest.
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
        place: raw.place,
    });
    Ok(prompts.collect())
}
