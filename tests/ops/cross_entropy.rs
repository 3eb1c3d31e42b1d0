//! Cross-entropy.

use super::*;

fn losses(logits: &[f64], targets: &[u32], vocab: usize) -> Vec<f64> {
    let row = |(row, target): (&[f64], &u32)| {
        if *target == IGNORE {
            return 0.0;
        }
        let top = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        top + row.iter().map(|x| (x - top).exp()).sum::<f64>().ln() - row[*target as usize]
    };
    logits.chunks(vocab).zip(targets).map(row).collect()
}

pub(super) fn loss_and_gradient<B: Backend>(b: &B) {
    for (rows, vocab) in [(1, 1), (2, 17), (5, 1000), (3, 49_152), (40, 945)] {
        let values: Vec<f64> = normals(1, rows * vocab).iter().map(|x| x * 5.0).collect();
        let mut logits = put::<B, B::Float>(b, &values);
        let mut rng = Philox::new(8, 0);
        let targets: Vec<u32> = (0..rows).map(|r| if r % 3 == 1 { IGNORE } else { rng.below(vocab) as u32 }).collect();
        let exact = losses(&logits.host, &targets, vocab);
        let on_device = put_u32(b, &targets);
        let mut loss = put::<B, f32>(b, &vec![f64::NAN; rows]);
        let what = format!("{rows} × {vocab}");
        CrossEntropy {
            logits: logits.device.view_mut(),
            targets: on_device.view(),
            losses: loss.device.view_mut(),
            vocab,
            scale: None,
            terms: None,
        }
        .run(b)
        .unwrap();
        assert_close::<B>(&get(b, &loss.device), &exact, 2e-6, &what);
        assert_eq!(get(b, &logits.device), logits.host, "logits without a scale");
        let scale = 0.25;
        CrossEntropy {
            logits: logits.device.view_mut(),
            targets: on_device.view(),
            losses: loss.device.view_mut(),
            vocab,
            scale: Some(scale),
            terms: None,
        }
        .run(b)
        .unwrap();
        assert_close::<B>(&get(b, &loss.device), &exact, 2e-6, &what);
        let got = get(b, &logits.device);
        for row in 0..rows {
            let range = row * vocab..(row + 1) * vocab;
            let (got, x) = (&got[range.clone()], &logits.host[range]);
            if targets[row] == IGNORE {
                assert!(got.iter().all(|g| *g == 0.0), "{what}, row {row}");
            } else {
                let loss = |x: &[f64]| losses(x, &targets[row..=row], vocab);
                assert_gradient::<B>(got, loss, x, &[scale as f64], &format!("{what}, row {row}"));
            }
        }
    }
}

/// Terms of two rows: a constrained one, and one that a teacher of one token pulls at. By hand.
pub(super) fn terms_by_hand<B: Backend>(b: &B) {
    // Softmax (1/4, 3/4), loss ln 4/3; β·Δ = ln 3, so w = 2(1 − 3/4) = 1/2.
    let loss = (4f64 / 3.0).ln();
    let mut logits = put::<B, B::Float>(b, &[0.0, 3f64.ln(), 0.0, 3f64.ln()]);
    let (targets, ids) = (put_u32(b, &[1, 1]), put_u32(b, &[0, 0]));
    let [reference, beta, probs] =
        [[loss + 3f64.ln() / 2.0, 9.0], [2.0, 0.0], [0.0, 1.0]].map(|values| put::<B, f32>(b, &values));
    let mut losses = put::<B, f32>(b, &[f64::NAN; 2]);
    let (reference, beta, probs) = (reference.device.view(), beta.device.view(), probs.device.view());
    CrossEntropy {
        logits: logits.device.view_mut(),
        targets: targets.view(),
        losses: losses.device.view_mut(),
        vocab: 2,
        scale: Some(0.5),
        terms: Some(LossTerms { reference, beta, ids: ids.view(), probs, distil: 2.0 }),
    }
    .run(b)
    .unwrap();
    // Row 0: ½·½·(1/4, −1/4); row 1: ½·((1/4, −1/4) + 2·((1/4, 3/4) − (1, 0))).
    assert_close::<B>(&get(b, &losses.device), &[loss; 2], 2e-7, "losses");
    assert_close::<B>(&get(b, &logits.device), &[0.0625, -0.0625, -0.625, 0.625], 2e-7, "gradients");
}

/// A reference beside which any loss is small takes the cross-entropy out; what is left are the weights in the teacher's
/// place, whatever their signs.
pub(super) fn weights_in_the_place_of_a_teacher<B: Backend>(b: &B) {
    let mut logits = put::<B, B::Float>(b, &[0.5, -1.0, 2.0, 3.0]);
    let (targets, ids) = (put_u32(b, &[1]), put_u32(b, &[3, 0, 1]));
    let [reference, beta, probs] =
        [vec![1e30], vec![1.0], vec![-0.75, 0.5, 0.25]].map(|values| put::<B, f32>(b, &values));
    let mut losses = put::<B, f32>(b, &[f64::NAN]);
    let (reference, beta, probs) = (reference.device.view(), beta.device.view(), probs.device.view());
    CrossEntropy {
        logits: logits.device.view_mut(),
        targets: targets.view(),
        losses: losses.device.view_mut(),
        vocab: 4,
        scale: Some(1.0),
        terms: Some(LossTerms { reference, beta, ids: ids.view(), probs, distil: 1.0 }),
    }
    .run(b)
    .unwrap();
    assert!(get(b, &losses.device)[0] > 0.0);
    assert_close::<B>(&get(b, &logits.device), &[-0.5, -0.25, 0.0, 0.75], 2e-7, "gradients");
}

/// Gradients of rows with terms against differences of the losses that they belong to.
pub(super) fn terms_of_any_size<B: Backend>(b: &B) {
    for (rows, vocab, width) in [(2, 17, 0), (4, 17, 3), (3, 1000, 64), (5, 945, 64), (2, 49_152, 200)] {
        let values: Vec<f64> = normals(3, rows * vocab).iter().map(|x| x * 2.0).collect();
        let mut logits = put::<B, B::Float>(b, &values);
        let mut rng = Philox::new(18, 0);
        let targets: Vec<u32> = (0..rows).map(|r| if r % 4 == 2 { IGNORE } else { rng.below(vocab) as u32 }).collect();
        let nll = losses(&logits.host, &targets, vocab);
        // Row 3 has neither; a teacher may know the target, and may have entries of 0.
        let reference: Vec<f64> = nll.iter().zip(normals(4, rows)).map(|(loss, x)| loss + x).collect();
        let beta: Vec<f64> = (0..rows).map(|r| [0.5, 2.0, 0.1, 0.0][r % 4]).collect();
        let (mut ids, mut probs) = (Vec::new(), Vec::new());
        for row in 0..rows {
            let mut all: Vec<u32> = (0..vocab as u32).collect();
            rng.shuffle(&mut all);
            ids.extend(&all[..width]);
            probs.extend((0..width).map(|i| if row % 4 == 3 || i % 5 == 4 { 0.0 } else { 1.0 / width as f64 }));
        }
        if width > 0 && !ids[..width].contains(&targets[0]) {
            ids[0] = targets[0];
        }
        let (on_device, ids_on_device) = (put_u32(b, &targets), put_u32(b, &ids));
        let [reference, beta, probs] = [reference, beta, probs].map(|values| put::<B, f32>(b, &values));
        let mut loss = put::<B, f32>(b, &vec![f64::NAN; rows]);
        let (scale, distil) = (0.25f32, 1.5f32);
        CrossEntropy {
            logits: logits.device.view_mut(),
            targets: on_device.view(),
            losses: loss.device.view_mut(),
            vocab,
            scale: Some(scale),
            terms: Some(LossTerms {
                reference: reference.device.view(),
                beta: beta.device.view(),
                ids: ids_on_device.view(),
                probs: probs.device.view(),
                distil,
            }),
        }
        .run(b)
        .unwrap();
        let what = format!("{rows} × {vocab}, {width} of the teacher");
        assert_close::<B>(&get(b, &loss.device), &nll, 2e-6, &what);
        let got = get(b, &logits.device);
        for (row, target) in targets.iter().enumerate() {
            let own = row * vocab..(row + 1) * vocab;
            let (got, x) = (&got[own.clone()], &logits.host[own]);
            if *target == IGNORE {
                assert!(got.iter().all(|g| *g == 0.0), "{what}, row {row}");
                continue;
            }
            let (reference, beta) = (reference.host[row], beta.host[row]);
            let teacher = row * width..(row + 1) * width;
            let full = |x: &[f64]| {
                let of = |token: u32| losses(x, &[token], vocab)[0];
                let own = of(*target);
                let sigmoid = 1.0 / (1.0 + (-beta * (reference - own)).exp());
                let constrained = if beta == 0.0 { own } else { -2.0 / beta * sigmoid.ln() };
                let taught = ids[teacher.clone()].iter().zip(&probs.host[teacher.clone()]).filter(|(_, p)| **p > 0.0);
                // KL up to the teacher's entropy.
                let divergence: f64 = taught.map(|(id, p)| p * of(*id)).sum();
                vec![constrained + f64::from(distil) * divergence]
            };
            // Where the teacher pulls, beside the elements that the check draws.
            let near = ids[teacher.clone()].iter().take(3).chain([target]);
            for i in near.map(|id| *id as usize) {
                let exact = f64::from(scale) * difference(|x| full(x)[0], x, i);
                assert_close::<B>(&[got[i]], &[exact], 2e-5, &format!("{what}, row {row}, token {i}"));
            }
            if vocab <= 1000 {
                assert_gradient::<B>(got, full, x, &[f64::from(scale)], &format!("{what}, row {row}"));
            }
        }
    }
}

pub(super) fn far_logits_stay_finite<B: Backend>(b: &B) {
    let mut logits = put::<B, B::Float>(b, &[1e4, -1e4, 0.0, -1e4, -1e4, -1e4]);
    let targets = put_u32(b, &[0, 1]);
    let mut loss = put::<B, f32>(b, &[f64::NAN; 2]);
    CrossEntropy {
        logits: logits.device.view_mut(),
        targets: targets.view(),
        losses: loss.device.view_mut(),
        vocab: 3,
        scale: Some(1.0),
        terms: None,
    }
    .run(b)
    .unwrap();
    let (loss, gradient) = (get(b, &loss.device), get(b, &logits.device));
    assert_close::<B>(&loss, &[0.0, 3f64.ln()], 1e-6, "losses");
    let third = 1.0 / 3.0;
    assert_close::<B>(&gradient, &[0.0, 0.0, 0.0, third, third - 1.0, third], 1e-6, "gradients");
}

pub(super) fn a_broken_row_is_not_hidden<B: Backend>(b: &B) {
    let mut logits = put::<B, B::Float>(b, &[0.0, f64::NAN, 0.0]);
    let targets = put_u32(b, &[0]);
    let mut loss = put::<B, f32>(b, &[0.0]);
    CrossEntropy {
        logits: logits.device.view_mut(),
        targets: targets.view(),
        losses: loss.device.view_mut(),
        vocab: 3,
        scale: None,
        terms: None,
    }
    .run(b)
    .unwrap();
    assert!(get(b, &loss.device)[0].is_nan());
}

on_every_backend!(
    loss_and_gradient,
    terms_by_hand,
    weights_in_the_place_of_a_teacher,
    terms_of_any_size,
    far_logits_stay_finite,
    a_broken_row_is_not_hidden
);
