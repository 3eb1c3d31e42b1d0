//! Benches of every kernel family and of whole steps, in one executable. `common` tells how to run it.

// tests/bench/main.rs includes this file too, and uses another part of it.
#![allow(dead_code)]

pub(crate) mod common;

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
        pub(crate) const FAMILIES: &[Family] =
            &[$(Family { name: stringify!($name), cpu: $name::cpu, cuda: $name::cuda }),*];
    };
}

families![gemm, attention, rmsnorm, rope, swiglu, embedding, cross_entropy, sampling, adamw, perturb, engine,];

fn main() {
    common::main(FAMILIES);
}
