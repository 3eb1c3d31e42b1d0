//! Batches, their order and the mixing of examples.

use swat::data::{Example, Loader, LoaderOptions, LoaderPosition, mix};

fn loader(examples: u32, options: LoaderOptions) -> Loader {
    let example = |id| Example {
        tokens: vec![id; 1 + id as usize % 5],
        trained: vec![id % 3 > 0; 1 + id as usize % 5],
        replayed: false,
    };
    Loader::new((0..examples).map(example).collect(), options).unwrap()
}

fn options() -> LoaderOptions {
    LoaderOptions { batch_size: 4, max_length: 8, packing: false, shuffle: true, seed: 3 }
}

fn ids(documents: Vec<&Example>) -> Vec<u32> {
    documents.iter().map(|e| e.tokens[0]).collect()
}

#[test]
fn the_order_is_that_of_an_independent_implementation() {
    let mut loader = loader(10, options());
    let first: Vec<u32> = (0..3).flat_map(|_| ids(loader.next_documents())).collect();
    // Philox4x32-10, Lemire and Fisher–Yates written in Python, checked against the published vectors.
    assert_eq!(first, [7, 4, 9, 0, 5, 2, 8, 1, 6, 3]);
}

#[test]
fn epochs_and_seeds_differ_and_without_shuffling_the_order_is_the_files() {
    let epoch = |seed, skip| {
        let mut loader = loader(40, LoaderOptions { batch_size: 40, seed, ..options() });
        loader.seek(LoaderPosition { epoch: skip, batch: 0 }).unwrap();
        ids(loader.next_documents())
    };
    assert_eq!(epoch(1, 2), epoch(1, 2));
    assert!(epoch(1, 2) != epoch(1, 3) && epoch(1, 2) != epoch(2, 2));
    let mut plain = loader(5, LoaderOptions { shuffle: false, ..options() });
    assert_eq!(ids(plain.next_documents()), [0, 1, 2, 3]);
    assert_eq!(ids(plain.next_documents()), [4]);
    assert_eq!(plain.position(), LoaderPosition { epoch: 1, batch: 0 });
    assert_eq!(ids(plain.next_documents()), [0, 1, 2, 3]);
}

#[test]
fn no_batch_is_larger_than_the_largest() {
    for packing in [false, true] {
        let mut loader = loader(23, LoaderOptions { packing, ..options() });
        let largest = loader.largest_batch();
        let sizes = (0..60).map(|_| {
            let documents = loader.next_documents();
            assert!(documents.iter().all(|e| e.tokens.len() <= largest.longest));
            let trained = |e: &&Example| e.trained.iter().skip(1).filter(|trained| **trained).count();
            assert!(documents.iter().map(trained).sum::<usize>() <= largest.trained_tokens);
            documents.iter().map(|e| e.tokens.len()).sum()
        });
        let most: usize = sizes.max().unwrap();
        assert!(most <= largest.tokens && largest.trained_tokens < largest.tokens, "{most} of {largest:?}");
        assert!(most + 4 > largest.tokens, "a bound that is far away");
    }
}

#[test]
fn packing_fills_rows() {
    let packed = loader(1000, LoaderOptions { packing: true, ..options() });
    assert_eq!(packed.batches_per_epoch(), 94, "3,000 tokens in 375 rows of 8");
}

#[test]
fn wrong_input_is_refused() {
    let example = |length| vec![Example { tokens: vec![0; length], trained: vec![true; length], replayed: false }];
    let error = |examples, options| Loader::new(examples, options).err().unwrap().to_string();
    assert!(error(Vec::new(), options()).contains("no examples"));
    assert!(error(example(9), options()).contains("9 tokens in example 0; expected 1 to 8"));
    assert!(error(example(0), options()).contains("0 tokens"));
    assert!(error(example(1), LoaderOptions { batch_size: 0, ..options() }).contains("batch_size"));
    let mut loader = loader(10, options());
    assert!(loader.seek(LoaderPosition { epoch: 0, batch: 3 }).is_err());
    loader.seek(LoaderPosition { epoch: u64::MAX, batch: 2 }).unwrap();
    assert_eq!(loader.next_documents().len(), 2);
}

#[test]
fn mixing_in_gives_the_share_and_keeps_the_base_in_order() {
    let (base, extra): (Vec<u32>, Vec<u32>) = ((0..90).collect(), (100..150).collect());
    let mixed = mix(&base, &extra, 0.1, 7).unwrap();
    let (mut added, kept): (Vec<u32>, Vec<u32>) = mixed.iter().partition(|v| **v >= 100);
    assert_eq!(kept, base);
    assert_eq!(added.len(), 10);
    added.sort_unstable();
    added.dedup();
    assert_eq!(added.len(), 10, "drawn without replacement");
    assert!(mixed[90..].iter().any(|v| *v < 100), "not just appended");
    assert_ne!(mixed, mix(&base, &extra, 0.1, 8).unwrap());
    assert_eq!(mix(&base, &[], 0.0, 7).unwrap(), base);
    let again = mix(&base, &[7], 0.5, 7).unwrap();
    assert_eq!(again.len(), 180);
    for (extra, share) in [(&extra[..], 1.0), (&extra, -0.1), (&extra, f64::NAN), (&[], 0.5)] {
        assert!(mix(&base, extra, share, 7).is_err());
    }
}
