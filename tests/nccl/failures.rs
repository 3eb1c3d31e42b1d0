//! What goes wrong is said by all ranks, with the one that is to blame.

use crate::ranks::{Run, Story};
use std::time::Duration;

/// The errors of all ranks that left one.
fn errors(story: &Story) -> Vec<&str> {
    story.done.iter().map(|done| done.as_ref().expect_err("an error").as_str()).collect()
}

#[test]
fn a_rank_that_dies_ends_the_others() {
    // With NCCL reporting the lost connection, and where it notices nothing.
    for mode in ["loud", "silent"] {
        let Some(run) = Run::new(3) else { return };
        let story = run.dies(1, 2).with("STANDIN_NCCL", mode).story();
        let errors = errors(&story);
        assert_eq!(errors[1], "it left nothing", "{mode}: it died");
        for rank in [0, 2] {
            assert!(errors[rank].contains("rank 1 has ended"), "{mode}, rank {rank}: {}", errors[rank]);
        }
        assert!(story.took < Duration::from_secs(60), "{mode}: {:?}", story.took);
    }
}

#[test]
fn a_rank_without_nccl_is_named() {
    let Some(run) = Run::new(2) else { return };
    let story = run.without_nccl(1).story();
    let errors = errors(&story);
    assert!(errors[1].contains("libnccl.so.2") && errors[1].contains("package libnccl2"), "{}", errors[1]);
    assert!(errors[0].contains("rank 1: ") && errors[0].contains("libnccl.so.2"), "{}", errors[0]);
}

#[test]
fn versions_of_nccl_are_compared() {
    let Some(run) = Run::new(2) else { return };
    let story = run.with_rank(1, "STANDIN_NCCL_VERSION", "22005").story();
    for error in errors(&story) {
        assert!(error.contains("rank 1 has NCCL 2.20.5, and rank 0 has 2.24.3"), "{error}");
    }
    let story = Run::new(2).expect("there is a stand-in").with("STANDIN_NCCL_VERSION", "21602").story();
    for error in errors(&story) {
        assert!(error.contains("version 2.16.2, and swat needs 2.18.0"), "{error}");
    }
}
