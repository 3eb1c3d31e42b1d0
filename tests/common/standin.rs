//! The CUDA devices of swat's tests: the stand-in (`tests/standin`) with the kernels that swat embeds, or a real GPU.

use swat::backend::cuda::{Cuda, Precision};

pub use swat_standin::*;

/// The kernels of this build.
pub const BUILD: Build = Build { images: env!("SWAT_IMAGES"), scratch: env!("CARGO_TARGET_TMPDIR") };

/// Whether there are CUDA devices to test on; see [`Build::available`].
pub fn available() -> bool {
    BUILD.available()
}

/// Device `ordinal`; `None` if there are none to test on. A real GPU takes the place of each of the stand-in's.
pub fn open<P: Precision>(ordinal: u32) -> Option<Cuda<P>> {
    if !available() {
        return None;
    }
    let ordinal = if real() { 0 } else { ordinal };
    Some(Cuda::open(ordinal).unwrap_or_else(|e| panic!("cuda:{ordinal}: {e}")))
}

/// See [`Build::for_children`].
pub fn for_children() -> Option<ChildDriver> {
    BUILD.for_children()
}
