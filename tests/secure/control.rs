//! The control label of probes.

use swat::data::{Label, SecurityPrompt, Split};
use swat::secure::{ControlLabel, ControlRule};

/// Training prompts, harmful and benign in turn.
fn prompts(text: impl Fn(usize) -> String) -> Vec<SecurityPrompt> {
    let label = |i: usize| if i.is_multiple_of(2) { Label::Harmful } else { Label::Benign };
    let prompt = |i| SecurityPrompt {
        prompt: text(i),
        label: label(i),
        split: Split::Train,
        pair: None,
        category: None,
        place: String::new(),
    };
    (0..40).map(prompt).collect()
}

#[test]
fn length_where_it_varies() {
    let prompts = prompts(|i| vec!["w"; 3 + (i / 2) % 4].join(" "));
    let control = ControlLabel::choose(&prompts).unwrap();
    assert_eq!(control.rule, ControlRule::WordsAbove(4));
    assert!(control.correlation.abs() < 1e-12);
    assert_eq!(control.labels(&prompts)[..6], [false, false, false, false, true, true]);
}

#[test]
fn a_length_that_betrays_the_label_is_passed_over() {
    // 4 words against 5 says harmful or benign; above 5 does not.
    let prompts = prompts(|i| vec!["w"; if i % 4 < 2 { 4 + i % 2 } else { 6 }].join(" "));
    let control = ControlLabel::choose(&prompts).unwrap();
    assert_eq!(control.rule, ControlRule::WordsAbove(5));
}

#[test]
fn first_word_where_all_are_equally_long() {
    let different = prompts(|i| format!("{} b c", ["How", "what", "why", "tell"][(i / 2) % 4]));
    let control = ControlLabel::choose(&different).unwrap();
    assert!(matches!(&control.rule, ControlRule::FirstWordIn(words) if words.len() == 2));
    assert_eq!(control.labels(&different).iter().filter(|l| **l).count(), 20);
    assert_eq!(ControlLabel::choose(&prompts(|_| "how b c".to_owned())), None);
}
