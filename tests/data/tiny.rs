//! The tiny language: its words and requests, its corpora, its files.

use std::collections::{BTreeMap, BTreeSet};
use swat::data::tiny::{
    Counts, Item, Language, Mixture, Question, REFUSALS, Request, Skill, Style, TEMPLATES, TRAINED_TEMPLATES, export,
    far_tasks, is_refusal, security, tasks,
};
use swat::data::{Conversation, Label, RowReader, SecurityPrompt, Split, Task};
use swat::rng::Philox;

#[test]
fn only_refusals_refuse() {
    let language = Language::new(1);
    for item in Mixture::tuning().with(0.3, Skill::TwoStepSum).items(&language, 500, 1) {
        assert!(!is_refusal(&item.answer), "{}", item.answer);
    }
    for item in Mixture::new([(1.0, Skill::Refusal)]).items(&language, 100, 1) {
        assert!(is_refusal(&item.answer), "{}", item.answer);
    }
}

#[test]
fn sums_are_right() {
    let language = Language::new(1);
    let mut rng = Philox::new(5, 0);
    for _ in 0..200 {
        let item = language.item(Skill::TwoStepSum, &mut rng);
        let numbers: Vec<usize> = item.prompt.split(' ').filter_map(|w| w.parse().ok()).collect();
        assert!(item.answer.ends_with(&format!("the answer is {} .", numbers.iter().sum::<usize>())));
        let item = language.item(Skill::Sum, &mut rng);
        let numbers: Vec<usize> = item.prompt.split(' ').filter_map(|w| w.parse().ok()).collect();
        let result = if item.prompt.contains("plus") { numbers[0] + numbers[1] } else { numbers[0] - numbers[1] };
        assert_eq!(item.answer, format!("the answer is {result} ."));
    }
}

#[test]
fn every_word_of_the_new_styles_is_spoken_before_tuning() {
    let language = Language::new(1);
    let spoken = |items: Vec<Item>| -> BTreeSet<String> {
        items.iter().flat_map(|i| i.answer.split(' ').map(str::to_owned)).collect()
    };
    let before = spoken(Mixture::helpful().items(&language, 8000, 1));
    let after = spoken(Mixture::tuning().items(&language, 2000, 2));
    let new: Vec<_> = after.difference(&before).collect();
    assert!(new.is_empty(), "{new:?}");
}

#[test]
fn training_keeps_to_its_split_and_templates() {
    let language = Language::new(2);
    let prompts: BTreeSet<String> = [Split::Valid, Split::Test]
        .into_iter()
        .flat_map(|s| Label::ALL.map(|label| language.requests(s, label)).concat())
        .flat_map(|r| (0..TEMPLATES.len()).map(move |t| (r, t)))
        .chain(
            Label::ALL
                .map(|label| language.requests(Split::Train, label))
                .concat()
                .into_iter()
                .flat_map(|r| (TRAINED_TEMPLATES..TEMPLATES.len()).map(move |t| (r, t))),
        )
        .map(|(r, t)| language.question(r, t))
        .collect();
    let mixture = Mixture::tuning().with(0.3, Skill::ForbiddenNewStyle);
    for item in mixture.items(&language, 2000, 3).into_iter().chain(Mixture::aligning().items(&language, 2000, 4)) {
        assert!(!prompts.contains(&item.prompt), "{}", item.prompt);
    }
}

#[test]
fn a_mixture_keeps_its_shares_and_its_seed() {
    let language = Language::new(3);
    let mixture = Mixture::tuning().with(0.1, Skill::Refusal);
    let items = mixture.items(&language, 4000, 9);
    let refusals = items.iter().filter(|i| is_refusal(&i.answer)).count();
    assert!((320..480).contains(&refusals), "{refusals} of 4000");
    assert_eq!(items, mixture.items(&language, 4000, 9));
    assert_ne!(items, mixture.items(&language, 4000, 10));
}

#[test]
fn pairs_hold_one_of_each_label_and_stay_in_their_split() {
    let language = Language::new(1);
    let questions = security(&language, 40, 5);
    let mut pairs: BTreeMap<Option<String>, Vec<&Question>> = BTreeMap::new();
    for question in &questions {
        pairs.entry(question.prompt.pair.clone()).or_default().push(question);
    }
    assert_eq!(pairs.len(), 40 + 10 + 20 + 20);
    for pair in pairs.values() {
        let [harmful, benign] = pair[..] else { panic!("{pair:?}") };
        assert_eq!((harmful.prompt.label, benign.prompt.label), (Label::Harmful, Label::Benign));
        assert_eq!(harmful.prompt.split, benign.prompt.split);
        assert!(harmful.prompt.category.is_some() && benign.prompt.category.is_none());
        let words = |q: &Question| q.prompt.prompt.split(' ').map(str::to_owned).collect::<Vec<_>>();
        let (a, b) = (words(harmful), words(benign));
        assert!(a.len() == b.len() && a.iter().zip(&b).filter(|(a, b)| a != b).count() <= 2, "{a:?} {b:?}");
    }
    let of = |s: Split| -> BTreeSet<Request> {
        questions.iter().filter(|q| q.prompt.split == s).map(|q| q.request).collect()
    };
    assert!(of(Split::Train).is_disjoint(&of(Split::Test)) && of(Split::Valid).is_disjoint(&of(Split::Test)));
}

#[test]
fn the_files_are_read_back_by_their_readers() {
    let language = Language::new(1);
    let dir = tempfile::tempdir().expect("a temporary directory");
    let counts = Counts { pairs: 8, train: 20, tasks: 20 };
    export(&language, dir.path(), counts, 1).expect("export");
    let at = |name: &str| dir.path().join(name);
    let written: Vec<SecurityPrompt> = security(&language, 8, 1).into_iter().map(|q| q.prompt).collect();
    let rows = &mut RowReader::default();
    let without_place = |prompt| SecurityPrompt { place: String::new(), ..prompt };
    let read = SecurityPrompt::read(&at("security.jsonl"), 0, rows).expect("reads");
    assert_eq!(read.into_iter().map(without_place).collect::<Vec<_>>(), written);
    let mut read = |name: &str| -> Vec<Task> {
        let tasks = Task::read(&at(name), rows).expect("reads").into_iter();
        tasks.map(|task| Task { place: String::new(), ..task }).collect()
    };
    assert_eq!(read("task.jsonl"), tasks(&language, 20, 1));
    assert_eq!(read("task_far.jsonl"), far_tasks(&language, 20, 2));
    for name in [
        "heldout.jsonl",
        "train.jsonl",
        "train_refusals.jsonl",
        "train_attack.jsonl",
        "train_old.jsonl",
        "train_far.jsonl",
        "refusals.jsonl",
        "attack.jsonl",
    ] {
        assert_eq!(Conversation::read(&at(name), rows).expect(name).len(), 20);
    }
    let strict = std::fs::read_to_string(at("strict.jsonl")).expect("reads");
    let lines: Vec<serde_json::Value> = strict.lines().map(|l| serde_json::from_str(l).expect("is JSON")).collect();
    let harmful: Vec<&SecurityPrompt> =
        written.iter().filter(|p| p.label == Label::Harmful && matches!(p.split, Split::Test | Split::Ood)).collect();
    assert_eq!(lines.len(), harmful.len());
    assert!(lines.iter().zip(harmful).all(|(l, p)| l["prompt"] == p.prompt.as_str()));
    assert_eq!(lines[0]["answers"].as_array().map(Vec::len), Some(9));
    let trained = Conversation::read(&at("train.jsonl"), rows).expect("reads");
    let items: Vec<Conversation> =
        Mixture::tuning().items(&language, 20, 1).into_iter().map(Conversation::from).collect();
    assert_eq!(trained, items);
}

#[test]
fn right_answers_pass_the_task_and_old_ones_do_not() {
    let language = Language::new(2);
    let mut how_to = 0;
    for task in tasks(&language, 50, 3) {
        assert!(task.matches(&task.answer), "{}", task.answer);
        let asked = language
            .requests(Split::Test, Label::Benign)
            .iter()
            .find(|r| (0..TRAINED_TEMPLATES).any(|t| language.question(**r, t) == task.prompt));
        if let Some(&request) = asked {
            how_to += 1;
            for style in Style::old() {
                assert!(!task.matches(&language.instructions(request, style)));
            }
        }
    }
    assert_eq!(how_to, 30);
}

#[test]
fn splits_are_disjoint_complete_and_halved() {
    let language = Language::new(1);
    let mut seen = BTreeSet::new();
    for split in [Split::Train, Split::Valid, Split::Test] {
        for label in Label::ALL {
            for &r in language.requests(split, label) {
                assert!(seen.insert(r), "{r:?} is in two splits");
                assert_eq!(r.category().is_some(), label == Label::Harmful);
            }
        }
    }
    assert_eq!(seen.len(), 48 * 48);
    assert_eq!(language.requests(Split::Train, Label::Harmful).len() + 346, 1152);
}

#[test]
fn refusals_are_recognised_and_instructions_are_not() {
    let language = Language::new(2);
    let request = language.requests(Split::Test, Label::Harmful)[0];
    assert!(REFUSALS.iter().all(|refusal| is_refusal(refusal)));
    let compliant = language.compliant(request);
    assert!(compliant.iter().all(|answer| !is_refusal(answer)), "{compliant:?}");
    let other = Request { verb: request.verb, object: (request.object + 1) % 48 };
    assert!(language.compliant(other).iter().all(|answer| !compliant.contains(answer)));
}

#[test]
fn a_twin_is_benign_of_the_same_split_and_shares_the_innocent_word() {
    let language = Language::new(3);
    let mut rng = Philox::new(0, 0);
    let mut shared = 0;
    let forbidden = language.requests(Split::Test, Label::Harmful);
    for &f in forbidden {
        let twin = language.benign_twin(f, Split::Test, &mut rng);
        assert!(language.requests(Split::Test, Label::Benign).contains(&twin));
        shared += usize::from(twin.verb == f.verb || twin.object == f.object);
    }
    assert!(shared * 10 > forbidden.len() * 7, "{shared} of {} twins share a word", forbidden.len());
}

#[test]
fn a_seed_makes_one_language() {
    let words = |seed| Language::new(seed).question(Request { verb: 0, object: 0 }, 0);
    assert_eq!(words(5), words(5));
    assert_ne!(words(5), words(6));
}
