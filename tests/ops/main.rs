//! Every operation against plain f64 loops, and every backward pass against central differences of those loops.
//! A test is written once, over [`Backend`]; inputs are rounded to the backend's element type first.

mod adamw;
mod attention;
#[path = "../common/mod.rs"]
mod common;
mod cross_entropy;
mod determinism;
mod embedding;
mod gemm;
mod part;
mod perturb;
mod rmsnorm;
mod rope;
mod sampling;
mod swiglu;
mod versions;

use common::standin;
use swat::backend::*;
use swat::rng::Philox;
use swat_standin::cores;

/// Runs the named functions of this file, each of which takes a backend, as tests on every backend.
macro_rules! on_every_backend {
    ($($name:ident),* $(,)?) => {
        on_every_backend!(cpu cpu swat::backend::cpu::F32: $($name),*);
        on_every_backend!(cpu cpu_bf16 swat::backend::F32State: $($name),*);
        on_every_backend!(cpu cpu_bf16_state swat::backend::Bf16State: $($name),*);
        on_every_backend!(cuda cuda_0 0 F32State: $($name),*);
        on_every_backend!(cuda cuda_1 1 Bf16State: $($name),*);
        on_every_backend!(cuda cuda_2 2 Bf16State: $($name),*);
        on_every_backend!(cuda cuda_3 3 F32State: $($name),*);
    };
    (cpu $module:ident $elements:ty: $($name:ident),*) => {
        mod $module {
            $(#[test] fn $name() { super::$name(&swat::backend::cpu::Cpu::<$elements>::default()); })*
        }
    };
    (cuda $module:ident $ordinal:literal $state:ident: $($name:ident),*) => {
        mod $module {
            $(#[test] fn $name() {
                let device = crate::standin::open::<swat::backend::cuda::$state>($ordinal);
                device.iter().for_each(super::$name);
            })*
        }
    };
}
use on_every_backend;

/// The same tests on what nvcc made of the kernels.
#[test]
fn compiled_kernels() {
    if !standin::compiled() {
        standin::BUILD.test_compiled(&[
            "::cuda_0::",
            "::cuda_2::",
            "versions::",
            "gpu_0::every_epilogue",
            "gpu_2::every_epilogue",
        ]);
    }
}

/// A tensor on the backend and its values, as rounded there, in f64.
struct Tensor<B: Backend, T: Element> {
    device: Buffer<B, T>,
    host: Vec<f64>,
}

/// Puts values on the backend.
fn put<B: Backend, T: FloatElement>(b: &B, values: &[f64]) -> Tensor<B, T> {
    let rounded: Vec<T> = values.iter().map(|x| T::from_f32(*x as f32)).collect();
    let mut device = b.zeros(values.len()).unwrap();
    b.write(&rounded, device.view_mut()).unwrap();
    Tensor { device, host: rounded.iter().map(|x| x.to_f32() as f64).collect() }
}

/// Integers on the backend.
fn put_u32<B: Backend>(b: &B, values: &[u32]) -> Buffer<B, u32> {
    let mut device = b.zeros(values.len()).unwrap();
    b.write(values, device.view_mut()).unwrap();
    device
}

/// A backend's elements, as they are.
fn read<B: Backend, T: Element>(b: &B, from: &Buffer<B, T>) -> Vec<T> {
    let mut host = vec![bytemuck::Zeroable::zeroed(); from.len()];
    b.read(from.view(), &mut host).unwrap();
    host
}

/// A backend's numbers in f64.
fn get<B: Backend, T: FloatElement>(b: &B, from: &Buffer<B, T>) -> Vec<f64> {
    read(b, from).iter().map(|x| x.to_f32() as f64).collect()
}

/// Normals, the same for the same `stream`.
fn normals(stream: u64, len: usize) -> Vec<f64> {
    let mut rng = Philox::new(2024, stream);
    (0..len).map(|_| rng.normal()).collect()
}

/// Documents of these lengths.
fn documents<B: Backend>(b: &B, lengths: &[usize]) -> Documents<B> {
    let mut starts = vec![0];
    for len in lengths {
        starts.push(starts[starts.len() - 1] + *len as u32);
    }
    let device = put_u32(b, &starts);
    Documents { starts, device }
}

/// Asserts that each number is within `tolerance` (for f32; bf16 gets 2¹⁵ times that) of the exact one, relative to the
/// larger of 1 and its size.
#[track_caller]
fn assert_close<B: Backend>(got: &[f64], exact: &[f64], tolerance: f64, what: &str) {
    let tolerance = if B::Float::NAME == "f32" { tolerance } else { tolerance * 32768.0 };
    assert_eq!(got.len(), exact.len(), "{what}");
    for (i, (g, e)) in got.iter().zip(exact).enumerate() {
        assert!((g - e).abs() <= tolerance * e.abs().max(1.0), "{what}: element {i} is {g}, exact {e}");
    }
}

/// ∂f/∂xᵢ by central differences.
fn difference(f: impl Fn(&[f64]) -> f64, x: &[f64], i: usize) -> f64 {
    const STEP: f64 = 1e-5;
    let at = |delta: f64| {
        let mut x = x.to_vec();
        x[i] += delta;
        f(&x)
    };
    (at(STEP) - at(-STEP)) / (2.0 * STEP)
}

/// Some indices below `len`, the first and last among them.
fn some(len: usize, count: usize) -> Vec<usize> {
    let mut rng = Philox::new(9, len as u64);
    (0..count).map(|_| rng.below(len)).chain([0, len - 1]).collect()
}

/// Checks some elements of a gradient of Σ y·dy against central differences.
#[track_caller]
fn assert_gradient<B: Backend>(got: &[f64], f: impl Fn(&[f64]) -> Vec<f64>, x: &[f64], dy: &[f64], what: &str) {
    let loss = |x: &[f64]| f(x).iter().zip(dy).map(|(y, d)| y * d).sum();
    let chosen = some(x.len(), 24);
    let exact: Vec<f64> = chosen.iter().map(|i| difference(loss, x, *i)).collect();
    let got: Vec<f64> = chosen.iter().map(|i| got[*i]).collect();
    assert_close::<B>(&got, &exact, 2e-5, what);
}
