//! What is known of the CUDA side without opening a GPU.

use super::device;
use crate::error::Result;

/// What is known of the CUDA side of this machine and this build, for `swat doctor`.
pub struct Survey {
    /// Embedded code.
    pub images: Vec<Image>,
    /// Whether there is a driver at all.
    pub driver: bool,
    /// GPUs that the driver shows, or why there are none.
    pub devices: Result<u32, String>,
}

/// The embedded code of a kernel file.
#[derive(serde::Serialize)]
pub struct Image {
    /// Of the file.
    pub stem: &'static str,
    /// Compressed.
    pub bytes: usize,
    /// `sm_80` for code of a compute capability, `compute_80` for PTX that the driver compiles for newer ones.
    pub architectures: &'static [&'static str],
}

/// Looks at the driver and the embedded images; opens nothing.
pub fn survey() -> Survey {
    Survey { images: device::images().collect(), driver: device::driver(), devices: device::count() }
}
