//! Medians and their confidence intervals by order statistics: no assumption about the distribution of times.

/// The `q`-quantile, linearly interpolated. NaN without samples.
pub fn quantile(samples: &[f64], q: f64) -> f64 {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let Some(last) = sorted.len().checked_sub(1) else { return f64::NAN };
    let at = q.clamp(0.0, 1.0) * last as f64;
    let (low, high) = (sorted[at.floor() as usize], sorted[at.ceil() as usize]);
    low + (high - low) * at.fract()
}

/// The median; NaN without samples.
pub fn median(samples: &[f64]) -> f64 {
    quantile(samples, 0.5)
}

/// A 95 % confidence interval of the median (sign test): the narrowest one between two samples of equal rank from both
/// ends. The number of samples below the true median is binomial with p = ½. With fewer than six samples: their whole
/// range.
pub fn median_interval(samples: &[f64]) -> [f64; 2] {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let n = sorted.len();
    if n == 0 {
        return [f64::NAN; 2];
    }
    // P(fewer than `rank` samples are below the median), for growing ranks.
    let (mut tail, mut term, mut rank) = (0.0, 0.5f64.powi(n as i32), 0);
    loop {
        tail += term;
        if tail > 0.025 || rank + 1 > n / 2 {
            break;
        }
        rank += 1;
        term *= (n - rank + 1) as f64 / rank as f64;
    }
    let rank = rank.max(1);
    [sorted[rank - 1], sorted[n - rank]]
}
