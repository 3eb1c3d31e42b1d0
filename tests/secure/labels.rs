//! Checks of the security prompts' labels.

use swat::data::{Label, SecurityPrompt, Split};
use swat::secure::check_labels;

fn label(label: Label, split: Split, pair: &str) -> SecurityPrompt {
    SecurityPrompt {
        prompt: String::new(),
        label,
        split,
        pair: Some(pair.to_owned()),
        category: None,
        place: String::new(),
    }
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
