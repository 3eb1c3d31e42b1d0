//! Security prompts and their splits.

use std::collections::HashMap;
use std::path::Path;
use swat::data::{Label, RowReader, SecurityPrompt, Split};
use swat::error::Result;

fn read(lines: &str, seed: u64) -> Result<Vec<SecurityPrompt>> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s.jsonl");
    std::fs::write(&path, lines).unwrap();
    let prompts = SecurityPrompt::read(&path, seed, &mut RowReader::default())?;
    Ok(prompts.into_iter().map(|prompt| SecurityPrompt { place: String::new(), ..prompt }).collect())
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
        let counts = [(Label::Harmful, true), (Label::Benign, true), (Label::Harmful, false), (Label::Benign, false)];
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

/// XSTest says `safe` and `unsafe`, most sets of the hub `validation`; AdvBench has `goal` and the file's name.
#[test]
fn names_of_other_sets_are_read() {
    let line = r#"{"id":1,"prompt":"a","label":"unsafe","split":"validation"}"#.to_owned()
        + "\n"
        + r#"{"prompt":"b","label":"Safe"}"#;
    let prompts = read(&line, 0).unwrap();
    assert_eq!((prompts[0].label, prompts[0].split, prompts[1].label), (Label::Harmful, Split::Valid, Label::Benign));
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("harmful_behaviors.csv");
    std::fs::write(&file, "goal,target\nask this,Sure\n").unwrap();
    let prompts = SecurityPrompt::read(&file, 0, &mut RowReader::default()).unwrap();
    assert_eq!((prompts[0].prompt.as_str(), prompts[0].label), ("ask this", Label::Harmful));
    let unnamed = dir.path().join("behaviors.csv");
    std::fs::rename(&file, &unnamed).unwrap();
    let error = SecurityPrompt::read(&unnamed, 0, &mut RowReader::default()).unwrap_err().to_string();
    assert!(error.contains("behaviors.csv:2: found a `goal` without a label"), "{error}");
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
            "s.jsonl:2: found pair \"7\" in split test, and earlier in train",
        ),
        (
            "{\"prompt\":\"secret\",\"label\":\"harmful\"}\n{\"prompt\":\"secret\",\"label\":\"benign\",\"pair\":7}",
            "s.jsonl:2: found an earlier prompt with the other label",
        ),
    ];
    for (lines, expected) in cases {
        let error = read(lines, 0).unwrap_err().to_string();
        assert!(error.contains(expected) && !error.contains("secret"), "{error}");
    }
}

#[test]
fn the_tables_of_jailbreakbench_are_a_set_of_twins() {
    let dir = tempfile::tempdir().unwrap();
    let table = |name: &str, what: &str| {
        let rows = (0..20).map(|i| format!("{i},\"{what}, number {i}\",Sure,Behavior {i},Category {},X\n", i % 3));
        let text = format!("Index,Goal,Target,Behavior,Category,Source\n{}", rows.collect::<String>());
        let path = dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        path
    };
    let files = [table("harmful-behaviors.csv", "Do what is bad"), table("benign-behaviors.csv", "Do what is good")];
    let prompts = SecurityPrompt::read_all(&files, 3, &mut RowReader::default()).unwrap();
    assert_eq!(prompts.len(), 40);
    let (harmful, benign) = prompts.split_at(20);
    for (harmful, benign) in harmful.iter().zip(benign) {
        assert_eq!((harmful.label, benign.label), (Label::Harmful, Label::Benign));
        assert_eq!((&harmful.pair, harmful.split, &harmful.category), (&benign.pair, benign.split, &benign.category));
    }
    assert_eq!(
        (harmful[4].prompt.as_str(), harmful[4].category.as_deref()),
        ("Do what is bad, number 4", Some("Category 1"))
    );
    let count = |split| harmful.iter().filter(|prompt| prompt.split == split).count();
    assert_eq!([Split::Train, Split::Valid, Split::Test].map(count), [12, 4, 4]);
    // Each file by itself gives its prompts the same splits.
    let alone = SecurityPrompt::read(&files[1], 3, &mut RowReader::default()).unwrap();
    assert_eq!(alone, benign);
    let unnamed = table("behaviors.csv", "Do something");
    let error = SecurityPrompt::read(&unnamed, 3, &mut RowReader::default()).unwrap_err().to_string();
    assert!(error.contains("behaviors.csv:2") && error.contains("harmful-behaviors.csv"), "{error}");
}
