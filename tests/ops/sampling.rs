//! The next token.

use super::*;

fn draw<B: Backend>(b: &B, logits: &[f64], uniforms: &[f64], temperature: f32, top_p: f32) -> Vec<u32> {
    let vocab = logits.len() / uniforms.len();
    let logits = put::<B, B::Float>(b, logits);
    let uniforms = put::<B, f32>(b, uniforms);
    let mut tokens = put_u32(b, &vec![u32::MAX; uniforms.host.len()]);
    let (from, by) = (logits.device.view(), uniforms.device.view());
    Sample { logits: from, uniforms: by, tokens: tokens.view_mut(), vocab, sampling: Sampling { temperature, top_p } }
        .run(b)
        .unwrap();
    read(b, &tokens)
}

pub(super) fn greedy_takes_the_first_of_equals<B: Backend>(b: &B) {
    assert_eq!(draw(b, &[1.0, 3.0, 3.0, -1.0, /**/ -5.0, -5.0, -9.0, -5.0], &[0.9, 0.9], 0.0, 1.0), [1, 0]);
    let mut row = normals(1, 151_936);
    row[100_000] = 50.0;
    row[100_001] = 50.0;
    assert_eq!(draw(b, &row, &[0.5], 0.0, 1.0), [100_000]);
}

/// Probabilities 1/2, 1/4, 1/8, 1/8 in ranks; ids 2, 0, 1, 3.
const ROW: [f64; 4] =
    [-1.386_294_361_119_890_6, -2.079_441_541_679_835_7, -std::f64::consts::LN_2, -2.079_441_541_679_835_7];

fn nucleus_is_the_smallest_set_that_reaches_top_p<B: Backend>(b: &B) {
    let rows: Vec<f64> = ROW.repeat(5);
    let uniforms = [0.0, 0.3, 0.4, 0.7, 0.99];
    assert_eq!(draw(b, &rows, &uniforms, 1.0, 0.3), [2; 5]);
    // {0, 2}, in the order of the ids: one third and two thirds.
    assert_eq!(draw(b, &rows, &uniforms, 1.0, 0.7), [0, 0, 2, 2, 2]);
    // {0, 1, 2}, of the equals 1 and 3 the lower id: 2/7, 1/7 and 4/7.
    let uniforms = [0.0, 0.27, 0.3, 0.41, 0.45];
    assert_eq!(draw(b, &rows, &uniforms, 1.0, 0.8), [0, 0, 1, 1, 2]);
    // A cold draw is greedy.
    assert_eq!(draw(b, &rows, &uniforms, 0.01, 0.9), [2; 5]);
}

fn frequencies_follow_the_softmax<B: Backend>(b: &B) {
    let (vocab, draws) = (50, 400);
    let row: Vec<f64> = normals(4, vocab).iter().map(|x| x * 1.5).collect();
    // Evenly spread, so that a token is drawn once more or less often than expected at most.
    let uniforms: Vec<f64> = (0..draws).map(|i| (i as f64 + 0.5) / draws as f64).collect();
    for (temperature, top_p) in [(1.0, 1.0), (0.7, 0.9), (1.5, 0.5)] {
        let row = put::<B, B::Float>(b, &row).host;
        let weights: Vec<f64> = row.iter().map(|x| (x / temperature as f64).exp()).collect();
        let total: f64 = weights.iter().sum();
        let mut order: Vec<usize> = (0..vocab).collect();
        order.sort_by(|i, j| weights[*j].total_cmp(&weights[*i]));
        let mut mass = 0.0;
        let mut kept = vec![0.0; vocab];
        for i in order {
            if mass < top_p as f64 * total {
                kept[i] = weights[i];
                mass += weights[i];
            }
        }
        let tokens = draw(b, &row.repeat(draws), &uniforms, temperature, top_p);
        for (id, weight) in kept.iter().enumerate() {
            let expected = weight / mass * draws as f64;
            let got = tokens.iter().filter(|t| **t as usize == id).count() as f64;
            assert!((got - expected).abs() <= 1.01, "token {id}: {got} of {expected}");
        }
    }
}

/// A nucleus wider than the head that is sorted first.
pub(super) fn wide_nucleus<B: Backend>(b: &B) {
    let vocab = 5000;
    assert_eq!(draw(b, &vec![0.0; vocab], &[0.0], 1.0, 0.9), [0]);
    assert_eq!(draw(b, &vec![0.0; vocab], &[0.5001], 1.0, 0.75), [1875]);
    assert_eq!(draw(b, &vec![0.0; vocab], &[0.999_99], 1.0, 0.75), [3749]);
    assert_eq!(draw(b, &vec![0.0; vocab], &[0.999_99], 1.0, 1.0), [4999]);
}

on_every_backend!(
    greedy_takes_the_first_of_equals,
    nucleus_is_the_smallest_set_that_reaches_top_p,
    frequencies_follow_the_softmax,
    wide_nucleus
);
