//! The measured roofline of a backend: peak FLOPs and peak memory bandwidth (Williams, Waterman and Patterson, CACM 52,
//! 2009).

use super::{
    Backend, Buffer, Cost, FloatElement, Linear, LinearBackwardInput, LinearBackwardWeight, LinearShape, Operator,
};
use crate::error::{Error, Result};
use crate::rng::Philox;
use std::time::{Duration, Instant};

/// Peak rates of a backend, measured on large products of random numbers and on a large copy.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct Roofline {
    /// Multiplications and additions a second.
    pub flops_per_s: f64,
    /// Bytes read and written a second.
    pub bytes_per_s: f64,
}

impl Roofline {
    /// Measures a backend: about a second of a quiet machine and at most 700 MB of memory, which a GPU's arena keeps
    /// for later buffers. Whatever else the machine does meanwhile lowers it.
    ///
    /// # Errors
    /// A device without memory for it, or that fails.
    pub fn measure<B: Backend>(backend: &B) -> Result<Self> {
        Ok(Self { flops_per_s: product(backend)?, bytes_per_s: copy(backend)? })
    }

    /// [`Roofline::measure`] where as much memory is free, for a run that does without: none where it is not, or where the
    /// measurement fails.
    pub fn measure_if_free<B: Backend>(backend: &B) -> Option<Self> {
        let room = backend.free_memory().is_none_or(|free| free.bytes >= MEASURED_BYTES);
        room.then(|| Self::measure(backend).ok()).flatten()
    }

    /// The least time a cost can take, in seconds: computing and moving overlap.
    pub fn seconds(&self, cost: Cost) -> f64 {
        (cost.flops as f64 / self.flops_per_s).max(cost.bytes as f64 / self.bytes_per_s)
    }
}

/// Sides of the product, and bytes of the copy, from where they start to where they end: doubled until one takes
/// [`LONG`]. No cache holds the copy.
const SIDES: [usize; 2] = [256, 8192];
const COPIED_BYTES: [usize; 2] = [64 << 20, 256 << 20];
/// Most memory of a measurement.
const MEASURED_BYTES: u64 = 700 << 20;
/// Long enough for a host's clock, and short enough that one of many timings meets a moment in which a busy machine
/// does nothing else.
const LONG: Duration = Duration::from_millis(2);
/// Time of all timings of one piece of work; the best counts.
const BUDGET: Duration = Duration::from_millis(250);
/// Fewest and most timings.
const TIMINGS: [u128; 2] = [5, 100];
/// Numbers that are drawn; larger tensors repeat them.
const DRAWN: usize = 1 << 16;

/// FLOPs a second of the fastest of the three products of training, as large.
fn product<B: Backend>(backend: &B) -> Result<f64> {
    let [mut side, most] = SIDES;
    loop {
        let shape = LinearShape { tokens: side, inputs: side, outputs: side };
        let (x, w) = (random(backend, side * side)?, random(backend, side * side)?);
        let mut y = backend.zeros::<B::Float>(side * side)?;
        let forward = || Linear::new(x.view(), w.view(), y.view_mut(), shape).run(backend);
        if let Some(forward) = seconds(backend, if side == most { Duration::ZERO } else { LONG }, forward)? {
            let input = || LinearBackwardInput::new(x.view(), w.view(), y.view_mut(), shape).run(backend);
            let input = seconds(backend, Duration::ZERO, input)?.unwrap_or(forward);
            let mut dw = backend.zeros::<B::Grad>(side * side)?;
            let weight = || LinearBackwardWeight::new(x.view(), w.view(), dw.view_mut(), shape).run(backend);
            let weight = seconds(backend, Duration::ZERO, weight)?.unwrap_or(forward);
            return Ok(2.0 * (side as f64).powi(3) / forward.min(input).min(weight));
        }
        side *= 2;
    }
}

/// Bytes a second of a large copy, read and written.
fn copy<B: Backend>(backend: &B) -> Result<f64> {
    let [mut bytes, most] = COPIED_BYTES;
    loop {
        let from = random(backend, bytes / size_of::<B::Float>())?;
        let mut to = backend.zeros::<B::Float>(from.len())?;
        let least = if bytes == most { Duration::ZERO } else { LONG };
        if let Some(seconds) = seconds(backend, least, || backend.copy(from.view(), to.view_mut()))? {
            return Ok(2.0 * bytes as f64 / seconds);
        }
        bytes *= 2;
    }
}

/// Least seconds of `work`; `None` where one run takes less than `least`. Short work is timed several times in a row.
fn seconds<B: Backend>(backend: &B, least: Duration, mut work: impl FnMut() -> Result<()>) -> Result<Option<f64>> {
    let mut time = |times: usize| {
        backend.synchronize()?;
        let began = Instant::now();
        for _ in 0..times {
            work()?;
        }
        backend.synchronize()?;
        Ok::<Duration, Error>(began.elapsed() / times as u32)
    };
    time(1)?;
    let once = time(1)?;
    if once < least {
        return Ok(None);
    }
    let once_ns = once.as_nanos().max(1);
    let times = LONG.as_nanos().div_ceil(once_ns).min(1000);
    let timings = (BUDGET.as_nanos() / (once_ns * times)).clamp(TIMINGS[0], TIMINGS[1]);
    let (mut best, times) = (once, times as usize);
    for _ in 0..timings {
        best = best.min(time(times)?);
    }
    Ok(Some(best.as_secs_f64().max(1e-9)))
}

/// Normals: a product of zeros takes less power, so that clocks are higher than in real work.
fn random<B: Backend>(backend: &B, len: usize) -> Result<Buffer<B, B::Float>> {
    let mut rng = Philox::new(1, 1);
    let host: Vec<B::Float> = (0..len.min(DRAWN)).map(|_| B::Float::from_f32(rng.normal() as f32)).collect();
    let mut buffer = backend.zeros(len)?;
    for first in (0..len).step_by(DRAWN) {
        let part = first..(first + DRAWN).min(len);
        backend.write(&host[..part.len()], buffer.range_mut(part))?;
    }
    Ok(buffer)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cpu::Cpu;

    #[test]
    fn measured_rates_are_plausible() {
        let measured = Roofline::measure(&Cpu::new()).unwrap();
        assert!((1e8..1e14).contains(&measured.flops_per_s), "{measured:?}");
        assert!((1e8..1e13).contains(&measured.bytes_per_s), "{measured:?}");
    }

    #[test]
    fn the_longer_of_computing_and_moving_counts() {
        let roofline = Roofline { flops_per_s: 10.0, bytes_per_s: 2.0 };
        assert_eq!(roofline.seconds(Cost { bytes: 4, flops: 100 }), 10.0);
        assert_eq!(roofline.seconds(Cost { bytes: 40, flops: 100 }), 20.0);
    }
}
