//! Choice of ε: the relative norm at which random reference sets lose half of the score.

use super::map::EpsilonPoint;
use super::scorer::PerturbationScorer;
use super::sets::{cell_parameters, random_set};
use crate::backend::Backend;
use crate::error::{Error, Result};
use crate::secure::eval::metrics::{ScoreKind, relative_drop};

/// Values of ε, ascending, that are tried until the reference sets reach the target.
const GRID: [f32; 11] = [0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0, 1.2, 1.4, 1.6, 2.0];
/// Share of the reference sets: large enough to reach the target, which a single cell may not.
const REFERENCE_SHARE: f64 = 0.4;

/// Sweeps ε over random sets of 40 % of the projections, one per draw, up to the first whose mean R reaches `target`,
/// and interpolates; the largest ε if none does. Returns ε and the points of the sweep.
pub(crate) fn choose<B: Backend>(
    scorer: &PerturbationScorer<'_, B>,
    score: ScoreKind,
    target: f64,
) -> Result<(f32, Vec<EpsilonPoint>)> {
    let clean = scorer.clean_score(score)?;
    let parameters = cell_parameters(&scorer.decoder.config);
    let members: Vec<_> = scorer
        .seeds()
        .into_iter()
        .flat_map(|seed| scorer.members(&random_set(&parameters, REFERENCE_SHARE, seed, |_| true), seed))
        .collect();
    let mut points: Vec<EpsilonPoint> = Vec::new();
    for epsilon in GRID {
        let values: Vec<f64> = scorer.observe(&members, epsilon)?.iter().filter_map(|o| o.scores.get(score)).collect();
        let mean = values.iter().sum::<f64>() / values.len().max(1) as f64;
        let drop = relative_drop(clean, mean).ok_or_else(|| {
            Error::failed(format!("the score `{score}` is not finite at ε = {epsilon}"), "set --epsilon")
        })?;
        points.push(EpsilonPoint { epsilon, drop });
        if drop >= target {
            break;
        }
    }
    Ok((reaching(&points, target), points))
}

/// ε at which R reaches the target, interpolated between the last two points, to two significant digits.
fn reaching(points: &[EpsilonPoint], target: f64) -> f32 {
    let (below, at) = match points {
        [.., below, at] => (*below, *at),
        [at] => (EpsilonPoint { epsilon: 0.0, drop: 0.0 }, *at),
        [] => return GRID[0],
    };
    if at.drop < target {
        return at.epsilon;
    }
    let part = ((target - below.drop) / (at.drop - below.drop).max(1e-9)).clamp(0.0, 1.0) as f32;
    let epsilon = below.epsilon + part * (at.epsilon - below.epsilon);
    format!("{epsilon:.1e}").parse().unwrap_or(epsilon)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interpolates_to_the_target() {
        let points = |drops: &[(f32, f64)]| -> Vec<EpsilonPoint> {
            drops.iter().map(|(epsilon, drop)| EpsilonPoint { epsilon: *epsilon, drop: *drop }).collect()
        };
        assert_eq!(reaching(&points(&[(0.8, 0.3), (1.0, 0.4), (1.2, 0.6)]), 0.5), 1.1);
        assert_eq!(reaching(&points(&[(0.05, 1.0)]), 0.5), 0.025);
        assert_eq!(reaching(&points(&[(1.6, 0.1), (2.0, 0.2)]), 0.5), 2.0);
    }
}
