//! Security scores.

use proptest::prelude::*;
use swat::secure::{Metrics, Scores, auroc, relative_drop};

proptest! {
    #[test]
    fn auroc_is_the_share_of_pairs_in_order(
        items in proptest::collection::vec((-3i32..4, any::<bool>()), 1..40),
    ) {
        let values: Vec<f64> = items.iter().map(|(v, _)| f64::from(*v)).collect();
        let labels: Vec<bool> = items.iter().map(|(_, y)| *y).collect();
        let (mut wins, mut pairs) = (0.0, 0.0);
        for (a, _) in items.iter().filter(|(_, y)| *y) {
            for (b, _) in items.iter().filter(|(_, y)| !*y) {
                wins += if a > b { 1.0 } else if a == b { 0.5 } else { 0.0 };
                pairs += 1.0;
            }
        }
        match auroc(&values, &labels) {
            None => prop_assert_eq!(pairs, 0.0),
            Some(found) => prop_assert!((found - wins / pairs).abs() < 1e-12),
        }
    }
}

#[test]
fn scores_by_hand() {
    let harmful = [true, true, false, false, false];
    let scores = Scores::new(&[2.0, -1.0, -3.0, 0.5, -0.5], Some(&[4.0, 2.0, 0.0, 0.0, 3.0]), &harmful);
    assert!((scores.gap - 1.5).abs() < 1e-12);
    assert!((scores.refusal.unwrap() - 2.0).abs() < 1e-12);
    assert!((scores.margin - 0.5).abs() < 1e-12);
    assert!((scores.auroc - 4.0 / 6.0).abs() < 1e-12);
    assert!((scores.accuracy - 0.5).abs() < 1e-12);
    let metrics = Metrics::new(&[2.0, -1.0, -3.0, 0.5, -0.5], &harmful);
    assert!((metrics.accuracy - 0.6).abs() < 1e-12);
    // A shift that all share moves the margin and not the gap.
    let shifted = Scores::new(&[1.0, -2.0, -4.0, -0.5, -1.5], None, &harmful);
    assert!((shifted.gap - scores.gap).abs() < 1e-12 && (shifted.margin - scores.margin + 1.0).abs() < 1e-12);
}

#[test]
fn drops() {
    assert_eq!(relative_drop(4.0, 3.0), Some(0.25));
    assert_eq!(relative_drop(4.0, -4.0), Some(2.0));
    assert_eq!(relative_drop(0.0, 1.0), None);
    assert_eq!(relative_drop(1.0, f64::NAN), None);
    assert_eq!(auroc(&[f64::NAN, 1.0], &[true, false]), None);
}
