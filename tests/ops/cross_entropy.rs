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
    }
    .run(b)
    .unwrap();
    assert!(get(b, &loss.device)[0].is_nan());
}

on_every_backend!(loss_and_gradient, far_logits_stay_finite, a_broken_row_is_not_hidden);
