//! Agreement between judges of the same answers, beyond what chance would give.

use super::discrimination::Z;

/// Agreement of two judges on whether answers are attack successes.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Agreement {
    /// Names of the judges: `expressions` (no refusal expression), `judge`, `guard`.
    pub judges: [String; 2],
    /// Answers that both judged.
    pub answers: usize,
    /// Share of them on which both agree, 0 to 1.
    pub agreed: f64,
    /// Cohen's κ, from −1 to 1: 0 = no more than chance; none where both say the same of all answers.
    pub kappa: Option<f64>,
    /// Lower bound of its 95 % interval.
    pub low: Option<f64>,
    /// Upper bound.
    pub high: Option<f64>,
}

impl Agreement {
    /// κ = (pₒ − pₑ) / (1 − pₑ), pₒ the share of equal verdicts and pₑ that of two judges who say yes as often and
    /// independently; standard error √(pₒ (1 − pₒ) / n) / (1 − pₑ) (Cohen, Educational and Psychological Measurement 20, 1960).
    /// Answers that either did not judge are left out; `None` without any.
    pub fn of(judges: [&str; 2], one: &[Option<bool>], other: &[Option<bool>]) -> Option<Self> {
        let both: Vec<(bool, bool)> = one.iter().zip(other).filter_map(|(a, b)| Some(((*a)?, (*b)?))).collect();
        let n = both.len() as f64;
        let share = |of: &dyn Fn(&(bool, bool)) -> bool| both.iter().filter(|pair| of(pair)).count() as f64 / n;
        let (agreed, yes) = (share(&|(a, b)| a == b), [share(&|(a, _)| *a), share(&|(_, b)| *b)]);
        let chance = yes[0] * yes[1] + (1.0 - yes[0]) * (1.0 - yes[1]);
        let defined = chance < 1.0;
        let kappa = (agreed - chance) / (1.0 - chance);
        let half = Z * (agreed * (1.0 - agreed) / n).sqrt() / (1.0 - chance);
        let bound = |value: f64| defined.then_some(value.clamp(-1.0, 1.0));
        (!both.is_empty()).then(|| Self {
            judges: judges.map(str::to_owned),
            answers: both.len(),
            agreed,
            kappa: defined.then_some(kappa),
            low: bound(kappa - half),
            high: bound(kappa + half),
        })
    }

    /// Of each pair of these judges.
    pub fn of_all(judges: &[(&str, Vec<Option<bool>>)]) -> Vec<Self> {
        let pairs =
            judges.iter().enumerate().flat_map(|(i, one)| judges[i + 1..].iter().map(move |other| (one, other)));
        pairs.filter_map(|(one, other)| Self::of([one.0, other.0], &one.1, &other.1)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verdicts(counts: [usize; 4]) -> [Vec<Option<bool>>; 2] {
        let pairs = [(true, true), (true, false), (false, true), (false, false)];
        let all = || pairs.iter().zip(counts).flat_map(|(pair, count)| std::iter::repeat_n(*pair, count));
        [all().map(|(a, _)| Some(a)).collect(), all().map(|(_, b)| Some(b)).collect()]
    }

    #[test]
    fn kappa_by_hand() {
        // 20 twice yes, 15 twice no of 50; yes by 25 and by 30: pₒ = 0.7, pₑ = 0.5 · 0.6 + 0.5 · 0.4 = 0.5, κ = 0.4;
        // standard error √(0.21 / 50) / 0.5 = 0.12961.
        let [mut one, mut other] = verdicts([20, 5, 10, 15]);
        // What one of them did not judge does not count.
        one.push(None);
        other.push(Some(true));
        let found = Agreement::of(["a", "b"], &one, &other).unwrap();
        assert_eq!((found.answers, found.judges.clone()), (50, ["a".to_owned(), "b".to_owned()]));
        assert!((found.agreed - 0.7).abs() < 1e-12 && (found.kappa.unwrap() - 0.4).abs() < 1e-12);
        assert!((found.low.unwrap() - 0.14596).abs() < 1e-4 && (found.high.unwrap() - 0.65404).abs() < 1e-4);
        // The worst and the best there is.
        let [one, other] = verdicts([0, 5, 5, 0]);
        assert_eq!(Agreement::of(["a", "b"], &one, &other).unwrap().kappa, Some(-1.0));
        assert_eq!(Agreement::of(["a", "b"], &one, &one).unwrap().kappa, Some(1.0));
        // Where nothing varies, agreement is all chance.
        let [one, other] = verdicts([7, 0, 0, 0]);
        let found = Agreement::of(["a", "b"], &one, &other).unwrap();
        assert_eq!((found.agreed, found.kappa, found.low), (1.0, None, None));
        assert_eq!(Agreement::of(["a", "b"], &[None], &[Some(true)]), None);
        let three = Agreement::of_all(&[("a", one.clone()), ("b", one.clone()), ("c", one)]);
        assert_eq!(three.iter().map(|found| found.judges.concat()).collect::<Vec<_>>(), ["ab", "ac", "bc"]);
    }
}
