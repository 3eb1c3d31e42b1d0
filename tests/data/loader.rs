//! Batches, their order and the mixing of examples.

use swat::data::{Example, Loader, LoaderOptions, LoaderPosition, Mixture, Redraw};

fn loader(examples: u32, options: LoaderOptions) -> Loader {
    let example = |id| Example {
        tokens: vec![id; 1 + id as usize % 5],
        trained: vec![id % 3 > 0; 1 + id as usize % 5],
        replayed: false,
    };
    Loader::new((0..examples).map(example).collect::<Vec<_>>(), options).unwrap()
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
fn every_epoch_takes_other_examples_of_a_pool() {
    let example = |token| Example { tokens: vec![token; 2], trained: vec![false, true], replayed: token >= 100 };
    let examples = |tokens: std::ops::Range<u32>| tokens.map(example).collect::<Vec<_>>();
    let mut mixture = Mixture::from(examples(0..90));
    mixture.mix_in(examples(100..125), 0.1, Redraw::EveryEpoch, 7).unwrap();
    for shuffle in [false, true] {
        let mut loader = Loader::new(mixture.clone(), LoaderOptions { shuffle, ..options() }).unwrap();
        let mut epoch = || -> Vec<u32> {
            let batches = loader.batches_per_epoch();
            (0..batches).flat_map(|_| loader.next_documents().iter().map(|e| e.tokens[0]).collect::<Vec<_>>()).collect()
        };
        let epochs = [epoch(), epoch(), epoch(), epoch(), epoch()];
        let mut added: Vec<u32> = Vec::new();
        for epoch in &epochs {
            let (new, mut kept): (Vec<u32>, Vec<u32>) = epoch.iter().partition(|token| **token >= 100);
            assert_eq!(new.len(), 10, "a tenth of an epoch");
            assert!(epoch[90..].iter().any(|token| *token < 100), "not just appended");
            if shuffle {
                kept.sort_unstable();
            }
            assert_eq!(kept, (0..90).collect::<Vec<_>>());
            added.extend(new);
        }
        // Two and a half epochs go through the pool once, five twice.
        let times = |drawn: &[u32], token: u32| drawn.iter().filter(|other| **other == token).count();
        assert!((100..125).all(|token| times(&added, token) == 2), "{added:?}");
        assert!((100..125).all(|token| times(&added[..20], token) <= 1), "{added:?}");
        // A position is enough to go on from.
        loader.seek(LoaderPosition { epoch: 3, batch: 0 }).unwrap();
        let again: Vec<u32> = (0..loader.batches_per_epoch())
            .flat_map(|_| loader.next_documents().iter().map(|e| e.tokens[0]).collect::<Vec<_>>())
            .collect();
        assert_eq!(again, epochs[3]);
    }
}

#[test]
fn rows_of_a_pool_are_packed_by_themselves() {
    let example = |token| Example { tokens: vec![token; 4], trained: vec![true; 4], replayed: false };
    let mut mixture = Mixture::from((0..8).map(example).collect::<Vec<_>>());
    // 2 of 10 examples an epoch, two in a row of 8 tokens: one row of three.
    mixture.mix_in((100..106).map(example).collect(), 0.2, Redraw::EveryEpoch, 7).unwrap();
    let mut loader = Loader::new(mixture, LoaderOptions { packing: true, batch_size: 1, ..options() }).unwrap();
    assert_eq!(loader.batches_per_epoch(), 5);
    let mut added = Vec::new();
    for _ in 0..15 {
        let row: Vec<u32> = loader.next_documents().iter().map(|e| e.tokens[0]).collect();
        assert!(row.len() == 2 && (row[0] < 100) == (row[1] < 100), "{row:?}");
        added.extend(row.into_iter().filter(|token| *token >= 100));
    }
    added.sort_unstable();
    assert_eq!(added, (100..106).collect::<Vec<_>>());
}
