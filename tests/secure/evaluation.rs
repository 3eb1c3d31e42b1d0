//! Rates of answers.

use swat::secure::{Rate, RefusalList, attack_success, over_refusal, strict_compliance, task_score};

#[test]
fn wilson_intervals() {
    // Values of the usual table: 8 of 10, 0 of 10.
    let rate = Rate::new(8, 10);
    assert!((rate.low - 0.4902).abs() < 1e-4 && (rate.high - 0.9433).abs() < 1e-4, "{rate:?}");
    let none = Rate::new(0, 10);
    assert!(none.low == 0.0 && (none.high - 0.2775).abs() < 1e-4);
    assert_eq!(Rate::new(0, 0).high, 1.0);
}

#[test]
fn rates_of_answers() {
    let list = RefusalList::default();
    let answers = ["I'm sorry, no.", "Take two eggs.", "Sure: boil it."];
    assert_eq!(attack_success(&answers, &list).hits, 2);
    assert_eq!(over_refusal(&answers, &list).hits, 1);
    let wanted = [vec![], vec!["Take  two eggs.".to_owned()], vec!["boil it".to_owned()]];
    assert_eq!(strict_compliance(&answers, &wanted).hits, 1);
    let score = task_score([(true, Some("sums")), (false, Some("sums")), (true, None)]);
    assert_eq!((score.overall.hits, score.overall.total), (2, 3));
    assert_eq!(score.categories["sums"].value, 0.5);
}
