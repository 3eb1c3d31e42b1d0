//! The driver's context and stream of one GPU, and the driver's errors.

use crate::error::{Error, Result};
use cudarc::driver::{DriverError, result, sys};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// An open GPU for the driver. Everything goes through one stream, so that operations run in the order of the calls.
pub(super) struct Context {
    ordinal: u32,
    raw: sys::CUdevice,
    context: sys::CUcontext,
    stream: sys::CUstream,
}

// SAFETY: the handles of the driver may be used from any thread; each call binds the context to its thread first.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

impl Context {
    /// Retains the primary context of `raw`, which is GPU `ordinal`, binds it to this thread and creates the stream.
    pub(super) fn open(ordinal: u32, raw: sys::CUdevice) -> Result<Self> {
        // SAFETY: `raw` is a device of the driver; the context is released by `drop`.
        let context = unsafe { result::primary_ctx::retain(raw) }.map_err(|error| cannot_open(ordinal, error))?;
        let mut opened = Self { ordinal, raw, context, stream: std::ptr::null_mut() };
        opened.bind()?;
        opened.stream = result::stream::create(result::stream::StreamKind::NonBlocking)
            .map_err(|error| cannot_open(ordinal, error))?;
        Ok(opened)
    }

    /// `cuda:0`.
    pub(super) fn label(&self) -> String {
        label(self.ordinal)
    }

    /// The driver's handle of the device.
    pub(super) fn raw(&self) -> sys::CUdevice {
        self.raw
    }

    /// The driver's handle of the context.
    pub(super) fn handle(&self) -> sys::CUcontext {
        self.context
    }

    /// The stream of all work.
    pub(super) fn stream(&self) -> sys::CUstream {
        self.stream
    }

    /// Makes this thread's driver calls go to this device.
    pub(super) fn bind(&self) -> Result<()> {
        // SAFETY: the context is retained until `drop`.
        unsafe { result::ctx::set_current(self.context) }
            .map_err(|error| self.failed("cannot bind the context to a thread", error))
    }

    /// Waits until the stream is idle.
    pub(super) fn wait(&self) -> Result<(), DriverError> {
        // SAFETY: the stream lives as long as the context.
        unsafe { result::stream::synchronize(self.stream) }
    }

    /// An [`Error::Device`] of this device.
    pub(super) fn failed(&self, what: &str, error: DriverError) -> Error {
        failed(self.ordinal, what, error)
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // Nothing can be done where the driver refuses here; the process's end frees it all.
        // SAFETY: nothing uses the handles any more.
        unsafe {
            if !self.stream.is_null() {
                let _ = result::stream::destroy(self.stream);
            }
            let _ = result::primary_ctx::release(self.raw);
        }
    }
}

/// Locks what no panic leaves in a broken state.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// An [`Error::Device`] of a GPU that cannot be opened.
pub(super) fn cannot_open(ordinal: u32, error: DriverError) -> Error {
    failed(ordinal, "cannot be opened", error)
}

fn label(ordinal: u32) -> String {
    format!("cuda:{ordinal}")
}

fn failed(ordinal: u32, what: &str, error: DriverError) -> Error {
    let help = match ends_context(error) {
        true => {
            "a kernel has failed, and this process cannot use the GPU any more: start again; compute-sanitizer finds it"
        }
        false => "see `nvidia-smi`; --device cpu needs no GPU",
    };
    let what = format!("{what}: {}", describe(error));
    Error::Device { device: label(ordinal), what, help: help.into() }
}

/// Whether every later call of this process fails, too.
fn ends_context(error: DriverError) -> bool {
    use sys::CUresult::*;
    matches!(
        error.0,
        CUDA_ERROR_ILLEGAL_ADDRESS
            | CUDA_ERROR_LAUNCH_TIMEOUT
            | CUDA_ERROR_ASSERT
            | CUDA_ERROR_HARDWARE_STACK_ERROR
            | CUDA_ERROR_ILLEGAL_INSTRUCTION
            | CUDA_ERROR_MISALIGNED_ADDRESS
            | CUDA_ERROR_INVALID_ADDRESS_SPACE
            | CUDA_ERROR_INVALID_PC
            | CUDA_ERROR_LAUNCH_FAILED
    )
}

/// The driver's text of an error.
pub(super) fn describe(error: DriverError) -> String {
    match error.error_string() {
        Ok(text) => text.to_string_lossy().into_owned(),
        Err(_) => format!("{error:?}"),
    }
}
