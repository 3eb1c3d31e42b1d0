//! What is known of each security prompt.

use crate::error::{Error, Result};
use std::collections::BTreeMap;

/// Part of the security prompts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Split {
    /// Probes are fitted on it.
    Train,
    /// λ is chosen on it.
    Valid,
    /// In-domain test; the default for everything that is measured.
    Test,
    /// Out-of-distribution test.
    Ood,
}

impl Split {
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

/// What a prompt asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Label {
    /// Something an aligned model refuses.
    Harmful,
    /// Anything else.
    Benign,
}

/// What is known of one security prompt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PromptLabel {
    /// The class.
    pub label: Label,
    /// The part it belongs to.
    pub split: Split,
    /// A harmful prompt and its benign twin share this.
    pub pair: Option<String>,
    /// Any finer class of harmful prompts.
    pub category: Option<String>,
}

impl PromptLabel {
    /// Whether it is harmful.
    pub fn harmful(&self) -> bool {
        self.label == Label::Harmful
    }
}

/// Checks that train, valid and test hold both classes and that no pair is torn between two of the splits: a twin seen in
/// training makes its test prompt worthless.
pub fn check_labels(labels: &[PromptLabel]) -> Result<()> {
    for split in [Split::Train, Split::Valid, Split::Test] {
        for label in [Label::Harmful, Label::Benign] {
            if !labels.iter().any(|l| l.split == split && l.label == label) {
                let name = if label == Label::Harmful { "harmful" } else { "benign" };
                let found = format!("no {name} prompt in split `{}`", split.name());
                return Err(Error::input("security prompts", found, "both classes in train, valid and test"));
            }
        }
    }
    let mut splits: BTreeMap<&str, Split> = BTreeMap::new();
    for label in labels {
        let Some(pair) = &label.pair else { continue };
        let split = *splits.entry(pair).or_insert(label.split);
        if split != label.split {
            let pair: String = pair.chars().take(60).collect();
            let found = format!("pair `{pair}` in both `{}` and `{}`", split.name(), label.split.name());
            return Err(Error::input("security prompts", found, "each pair whole in one split"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn label(label: Label, split: Split, pair: &str) -> PromptLabel {
        PromptLabel { label, split, pair: Some(pair.to_owned()), category: None }
    }

    fn whole() -> Vec<PromptLabel> {
        [(Split::Train, "a"), (Split::Valid, "b"), (Split::Test, "c")]
            .into_iter()
            .flat_map(|(split, pair)| [Label::Harmful, Label::Benign].map(|class| label(class, split, pair)))
            .collect()
    }

    #[test]
    fn torn_pairs_and_missing_classes_are_refused() {
        assert!(check_labels(&whole()).is_ok());
        let mut torn = whole();
        torn.push(label(Label::Benign, Split::Test, "a"));
        let error = check_labels(&torn).unwrap_err().to_string();
        assert!(error.contains("pair `a`") && error.contains("`train`") && error.contains("`test`"), "{error}");
        let mut missing = whole();
        missing.remove(2);
        assert!(check_labels(&missing).unwrap_err().to_string().contains("no harmful prompt in split `valid`"));
    }
}
