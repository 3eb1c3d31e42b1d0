//! The counter-based generator.

use swat::rng::{Philox, philox4x32, uniform, words};

/// `kat_vectors` of Random123, philox4x32 10.
#[test]
fn known_answers() {
    assert_eq!(philox4x32([0; 4], [0; 2]), [0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8]);
    assert_eq!(philox4x32([!0; 4], [!0; 2]), [0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd]);
    assert_eq!(
        philox4x32([0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344], [0xa4093822, 0x299f31d0]),
        [0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1]
    );
    let seed = 0x299f31d0_a4093822;
    assert_eq!(words(seed, 0x03707344_13198a2e, 0x85a308d3_243f6a88), [0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1]);
}

#[test]
fn uniforms_stay_in_their_interval() {
    assert!(uniform(0) > 0.0);
    assert_eq!(uniform(u32::MAX), 1.0);
    let mut rng = Philox::new(7, 1);
    let mean = (0..100_000).map(|_| rng.uniform()).inspect(|u| assert!((0.0..1.0).contains(u))).sum::<f64>() / 1e5;
    assert!((mean - 0.5).abs() < 0.005, "{mean}");
}

#[test]
fn normals_have_unit_moments() {
    let mut rng = Philox::new(7, 2);
    let draws: Vec<f64> = (0..200_000).map(|_| rng.normal()).collect();
    let mean = draws.iter().sum::<f64>() / draws.len() as f64;
    let variance = draws.iter().map(|x| x * x).sum::<f64>() / draws.len() as f64;
    assert!(mean.abs() < 0.01 && (variance - 1.0).abs() < 0.02, "{mean} {variance}");
}

#[test]
fn below_is_even_and_shuffle_permutes() {
    let mut rng = Philox::new(3, 0);
    let mut counts = [0usize; 7];
    for _ in 0..70_000 {
        counts[rng.below(7)] += 1;
    }
    assert!(counts.iter().all(|c| c.abs_diff(10_000) < 500), "{counts:?}");
    assert_eq!((rng.below(0), rng.below(1)), (0, 0));
    let mut items: Vec<usize> = (0..100).collect();
    rng.shuffle(&mut items);
    assert_ne!(items, (0..100).collect::<Vec<_>>());
    items.sort_unstable();
    assert_eq!(items, (0..100).collect::<Vec<_>>());
}

#[test]
fn streams_repeat_and_differ() {
    let draw = |seed, stream| {
        let mut rng = Philox::new(seed, stream);
        [rng.next_u32(), rng.next_u32(), rng.next_u32(), rng.next_u32(), rng.next_u32()]
    };
    assert_eq!(draw(1, 2), draw(1, 2));
    assert_ne!(draw(1, 2), draw(1, 3));
    assert_ne!(draw(1, 2), draw(2, 2));
    assert_eq!(draw(1, 2)[4], words(1, 2, 1)[0]);
}

#[test]
fn shuffles_put_every_item_anywhere_with_the_same_probability() {
    let mut counts = [[0u32; 4]; 4];
    for stream in 0..24_000 {
        let mut items = [0, 1, 2, 3];
        Philox::new(5, stream).shuffle(&mut items);
        for (place, item) in items.into_iter().enumerate() {
            counts[place][item] += 1;
        }
    }
    // 6,000 expected, standard deviation 67.
    assert!(counts.iter().flatten().all(|c| (5_650..6_350).contains(c)), "{counts:?}");
}
