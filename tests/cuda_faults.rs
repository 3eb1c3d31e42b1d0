//! The engine on a GPU with a sticky fault: after a kernel has failed, every driver call fails until the process ends.
//! Each of them must be an error that says so; nothing may panic, hang, or return a number.

mod common;

use common::standin::{self, FaultScope};
use common::{batch, decoder_on, wide};
use std::sync::{Mutex, MutexGuard, PoisonError};
use swat::backend::cuda::{Cuda, F32State, LaunchMode, Precision};
use swat::backend::{Backend, trace};
use swat::engine::{Decoder, GradientOptions, Gradients};
use swat::error::{Error, Result};

/// Faults and recordings concern the whole process.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Each test has a device of its own, which stays broken.
fn device(ordinal: u32) -> Option<Cuda<F32State>> {
    standin::open::<F32State>(ordinal).filter(|_| !standin::real())
}

#[track_caller]
fn assert_broken<T>(result: Result<T>, ordinal: u32) {
    let Err(error) = result else { panic!("no error") };
    let said = error.to_string();
    assert!(matches!(error, Error::Device { .. }), "{said}");
    for part in [&format!("cuda:{ordinal}"), "an illegal memory access was encountered", "start again"] {
        assert!(said.contains(part), "`{part}` not in: {said}");
    }
}

/// Computes gradients and synchronizes.
fn gradients<P: Precision>(model: &Decoder<Cuda<P>>, to: &mut Gradients<Cuda<P>>, seed: u64) -> Result<f64> {
    let batch = batch(&model.config, &[9, 14], seed);
    let mut losses = model.losses_of(batch.trained_tokens())?;
    model.queue_gradients(&batch, to, GradientOptions::scaled(1.0), &mut losses)?;
    losses.sum()
}

/// A fault in the middle of a training step, launched as a graph (`replays`) or kernel by kernel.
fn training(ordinal: u32, scope: FaultScope, replays: bool) {
    let _alone = alone();
    let Some(cuda) = device(ordinal) else { return };
    cuda.set_launch_mode(if replays { LaunchMode::Graphs } else { LaunchMode::Eager });
    let config = wide(2, 64);
    let model = decoder_on(&cuda, &config, 3);
    let mut to = Gradients::new(&model, |_| true).unwrap();
    for seed in 0..4 {
        assert!(gradients(&model, &mut to, seed).unwrap().is_finite());
    }
    standin::faults(ordinal as i32, 20, scope);
    assert_broken(gradients(&model, &mut to, 5), ordinal);
    assert_broken(gradients(&model, &mut to, 6), ordinal);
    assert_broken(cuda.synchronize(), ordinal);
    assert_broken(cuda.zeros::<f32>(1 << 20), ordinal);
    assert_broken(cuda.memory(), ordinal);
    assert_broken(cuda.time(|| Ok(())), ordinal);
    let launched = standin::launches(ordinal as i32);
    drop((model, to, cuda));
    assert_broken(Cuda::<F32State>::open(ordinal).map(drop), ordinal);
    assert_eq!(standin::launches(ordinal as i32), launched, "kernels of a broken device");
}

#[test]
fn a_kernel_of_a_graph_fails() {
    training(0, FaultScope::Work, true);
}

#[test]
fn a_kernel_fails_and_no_thread_can_be_bound() {
    training(1, FaultScope::WorkAndBinding, true);
}

#[test]
fn a_kernel_that_is_launched_alone_fails() {
    training(2, FaultScope::Work, false);
}

#[test]
fn a_kernel_fails_while_the_trace_records() {
    let _alone = alone();
    let Some(cuda) = device(3) else { return };
    let model = decoder_on(&cuda, &wide(1, 64), 3);
    let mut to = Gradients::new(&model, |_| true).unwrap();
    standin::faults(3, 10, FaultScope::Work);
    let recording = trace::record().expect("nobody else records");
    assert_broken(gradients(&model, &mut to, 5), 3);
    assert_broken(cuda.synchronize(), 3);
    drop((recording, model, to, cuda));
}
