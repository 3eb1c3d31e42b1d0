//! The CUDA side of this machine and build, without opening a GPU.

use super::device::{self, Image};
use crate::error::Result;

/// Driver, devices and embedded kernels, for `swat doctor`.
pub struct Survey {
    /// Embedded kernel images.
    pub images: Vec<Image>,
    /// Whether the driver's library is found.
    pub driver: bool,
    /// Number of GPUs that the driver shows, or why there are none.
    pub devices: Result<u32, String>,
}

/// Queries the driver and the embedded images; opens no GPU.
pub fn survey() -> Survey {
    Survey { images: device::images().collect(), driver: device::driver(), devices: device::count() }
}
