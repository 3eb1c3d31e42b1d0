//! The learning rate as a pure function of the step.

/// Share of the steps after the warm-up in which [`Schedule::Wsd`] decays.
const WSD_DECAY_SHARE: f64 = 0.2;

/// Shape of the learning rate after the linear warm-up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Schedule {
    /// Stays at the base rate.
    Constant,
    /// Falls in a line.
    Linear,
    /// Falls as half a cosine (Loshchilov and Hutter, arXiv 1608.03983).
    #[default]
    Cosine,
    /// Warm-up, stable, decay: the base rate, then 1 − √x over the last fifth (Hägele et al., arXiv 2405.18392).
    Wsd,
}

impl Schedule {
    /// Factor on the base rate at `step` (from 0) of `total`.
    ///
    /// The first `warmup` steps rise in a line, step 0 already trains: (step + 1) / warmup. After them the factor goes
    /// from 1 to `min_ratio`, which it would reach at step `total`. Beyond that it stays there.
    pub fn factor(self, step: u64, total: u64, warmup: u64, min_ratio: f64) -> f64 {
        if step < warmup {
            return (step + 1) as f64 / warmup as f64;
        }
        let after = total.saturating_sub(warmup).max(1) as f64;
        let progress = ((step - warmup) as f64 / after).min(1.0);
        let shape = match self {
            Self::Constant => return 1.0,
            Self::Linear => 1.0 - progress,
            Self::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * progress).cos()),
            Self::Wsd => 1.0 - ((progress - (1.0 - WSD_DECAY_SHARE)) / WSD_DECAY_SHARE).max(0.0).sqrt(),
        };
        min_ratio + (1.0 - min_ratio) * shape
    }
}

#[cfg(test)]
mod tests {
    use super::Schedule::{self, *};

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
}
