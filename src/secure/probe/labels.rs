//! What the method needs of the security prompts' labels.

use crate::data::{Label, SecurityPrompt, Split};
use crate::error::{Error, Result};
use std::collections::BTreeMap;

/// Whether a prompt is harmful.
pub(crate) fn harmful(prompt: &SecurityPrompt) -> bool {
    prompt.label == Label::Harmful
}

/// Checks that train, valid and test hold both classes and that no pair is torn between two of the splits: a twin seen in
/// training makes its test prompt worthless.
///
/// # Errors
/// [`Error::Input`] names the split or the pair.
pub fn check_labels(prompts: &[SecurityPrompt]) -> Result<()> {
    for split in [Split::Train, Split::Valid, Split::Test] {
        for label in [Label::Harmful, Label::Benign] {
            if !prompts.iter().any(|l| l.split == split && l.label == label) {
                let name = if label == Label::Harmful { "harmful" } else { "benign" };
                let found = format!("no {name} prompt in split `{}`", split.name());
                return Err(Error::input("security prompts", found, "both classes in train, valid and test"));
            }
        }
    }
    let mut splits: BTreeMap<&str, Split> = BTreeMap::new();
    for prompt in prompts {
        let Some(pair) = &prompt.pair else { continue };
        let split = *splits.entry(pair).or_insert(prompt.split);
        if split != prompt.split {
            let pair: String = pair.chars().take(60).collect();
            let found = format!("pair `{pair}` in both `{}` and `{}`", split.name(), prompt.split.name());
            return Err(Error::input("security prompts", found, "each pair whole in one split"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn label(label: Label, split: Split, pair: &str) -> SecurityPrompt {
        SecurityPrompt { prompt: String::new(), label, split, pair: Some(pair.to_owned()), category: None }
    }

    fn whole() -> Vec<SecurityPrompt> {
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
