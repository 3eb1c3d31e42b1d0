//! The next token from a row of logits.

use super::simd::{max, simd_kernel};
use crate::backend::Sampling;
use rayon::prelude::*;

/// One token a row; see [`Sampling`].
pub(super) fn sample(logits: &[f32], uniforms: &[f32], tokens: &mut [u32], vocab: usize, sampling: Sampling) {
    logits.par_chunks(vocab).zip(uniforms).zip(tokens).for_each(|((row, &uniform), token)| {
        *token = if sampling.temperature > 0.0 { nucleus(row, uniform, sampling) } else { greedy(row) };
    });
}

simd_kernel! {
    fn largest(simd, row: &'a [f32]) -> f32 { max(simd, row) }
}

/// The first of the largest; 0 where nothing compares (NaN).
fn greedy(row: &[f32]) -> u32 {
    let top = largest(row);
    row.iter().position(|x| *x == top).unwrap_or(0) as u32
}

/// Draws from the smallest set of most probable tokens (of equals, the lower id first) whose probability reaches
/// `top_p` (Holtzman et al., arXiv 1904.09751): the first of them, in that order, at which the sum of probabilities
/// exceeds uniform · (probability of the set). With `top_p` 1 nothing is left out, and the order is that of the ids.
fn nucleus(row: &[f32], uniform: f32, sampling: Sampling) -> u32 {
    let top = largest(row) as f64;
    let weight = |token: u32| ((row[token as usize] as f64 - top) / sampling.temperature as f64).exp();
    let total: f64 = (0..row.len() as u32).map(weight).sum();
    let mut order: Vec<u32> = (0..row.len() as u32).collect();
    if sampling.top_p >= 1.0 {
        return pick(&order, weight, uniform as f64 * total);
    }
    let by_rank = |a: &u32, b: &u32| row[*b as usize].total_cmp(&row[*a as usize]).then(a.cmp(b));
    let wanted = sampling.top_p as f64 * total;
    // The nucleus is nearly always small: sort a growing head of the ranking until it holds the wanted mass.
    let mut head = 256;
    let (members, mass) = loop {
        head = head.min(order.len());
        if head < order.len() {
            order.select_nth_unstable_by(head, by_rank);
        }
        order[..head].sort_unstable_by(by_rank);
        let mut mass = 0.0;
        let reached = order[..head].iter().position(|&token| {
            mass += weight(token);
            mass >= wanted
        });
        match reached {
            Some(last) => break (&order[..=last], mass),
            None if head == order.len() => break (&order[..], mass),
            None => head *= 8,
        }
    };
    pick(members, weight, uniform as f64 * mass)
}

/// The first token at which the sum of weights exceeds `goal`; the last where rounding leaves none.
fn pick(tokens: &[u32], weight: impl Fn(u32) -> f64, goal: f64) -> u32 {
    let mut sum = 0.0;
    let drawn = tokens.iter().find(|&&token| {
        sum += weight(token);
        sum > goal
    });
    drawn.or(tokens.last()).copied().unwrap_or(0)
}
