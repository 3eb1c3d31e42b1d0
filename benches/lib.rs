//! Benches of every kernel family and of whole steps. [`common`] says how they are run.

pub mod common;

mod adamw;
mod attention;
mod cross_entropy;
mod embedding;
mod engine;
mod gemm;
mod perturb;
mod rmsnorm;
mod rope;
mod sampling;
mod swiglu;

use common::Family;

/// The families, by the first part of their ids.
macro_rules! families {
    ($($name:ident),* $(,)?) => {
        /// Every family of benches, in the order in which they run.
        pub const FAMILIES: &[Family] =
            &[$(Family { name: stringify!($name), cpu: $name::cpu, cuda: $name::cuda }),*];
    };
}

families![gemm, attention, rmsnorm, rope, swiglu, embedding, cross_entropy, sampling, adamw, perturb, engine,];
