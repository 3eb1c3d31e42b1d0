//! Checks of the security prompts' labels.

use crate::data::{Label, SecurityPrompt, Split};
use crate::error::{Error, Result};
use std::collections::BTreeMap;

/// Checks that train, valid and test have both classes, and that no pair spans two splits, which would leak its test
/// prompt into training.
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
