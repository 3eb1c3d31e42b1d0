//! The stand-in GPU with the kernels that swat embeds.

use swat::backend::cuda::{Cuda, F32State};

pub use swat_standin::*;

/// The kernels of this build.
pub const BUILD: Build = Build { images: env!("SWAT_IMAGES"), scratch: env!("CARGO_TARGET_TMPDIR") };

/// See [`Build::available`].
pub fn available() -> bool {
    BUILD.available()
}

/// Device `ordinal`; `None` if there are none to test on. A real GPU takes the place of each of the stand-in's.
pub fn open(ordinal: u32) -> Option<Cuda<F32State>> {
    let ordinal = if real() { 0 } else { ordinal };
    available().then(|| Cuda::open(ordinal).unwrap_or_else(|e| panic!("cuda:{ordinal}: {e}")))
}
