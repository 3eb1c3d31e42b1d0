//! Learning-rate schedules.

use swat::train::Schedule::{self, *};

const ALL: [Schedule; 4] = [Constant, Linear, Cosine, Wsd];

fn close(a: f64, b: f64) {
    assert!((a - b).abs() < 1e-12, "{a} against {b}");
}

#[test]
fn warm_up_rises_in_a_line_and_reaches_the_base_rate() {
    for schedule in ALL {
        close(schedule.factor(0, 100, 4, 0.0), 0.25);
        close(schedule.factor(2, 100, 4, 0.0), 0.75);
        close(schedule.factor(3, 100, 4, 0.0), 1.0);
        close(schedule.factor(4, 100, 4, 0.0), 1.0);
        close(schedule.factor(0, 100, 0, 0.0), 1.0);
    }
}

#[test]
fn values_by_hand() {
    close(Linear.factor(50, 100, 0, 0.0), 0.5);
    close(Linear.factor(55, 100, 10, 0.0), 0.5);
    close(Linear.factor(50, 100, 0, 0.2), 0.6);
    close(Cosine.factor(50, 100, 0, 0.0), 0.5);
    close(Cosine.factor(25, 100, 0, 0.0), 0.5 + 0.5f64.sqrt() / 2.0);
    close(Cosine.factor(50, 100, 0, 0.1), 0.55);
    close(Wsd.factor(79, 100, 0, 0.0), 1.0);
    close(Wsd.factor(85, 100, 0, 0.0), 0.5);
    close(Constant.factor(99, 100, 0, 0.3), 1.0);
}

#[test]
fn ends_at_the_minimum_and_stays_finite_at_the_edges() {
    for schedule in [Linear, Cosine, Wsd] {
        close(schedule.factor(100, 100, 0, 0.1), 0.1);
        close(schedule.factor(500, 100, 0, 0.1), 0.1);
    }
    for schedule in ALL {
        for (step, total, warmup) in [(0, 0, 0), (0, 1, 0), (5, 5, 9), (9, 5, 9), (u64::MAX, 1, 0)] {
            let factor = schedule.factor(step, total, warmup, 0.0);
            assert!((0.0..=1.0).contains(&factor), "{schedule:?} {step} {total} {warmup}: {factor}");
        }
    }
}
