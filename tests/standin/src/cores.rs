//! Accumulation as on tensor cores (sources: `cpp/cores.h`): the products of a block are exact; they and the
//! accumulator are truncated some bits below the largest exponent among them; their sum is exact, and truncated to f32.

/// Parameters of a tensor core for bf16 with f32 accumulation.
#[derive(Clone, Copy, Debug)]
pub struct Cores {
    /// Products that are summed at once.
    terms: usize,
    /// Bits that are kept below the largest exponent.
    bits: i32,
}

/// Compute capability 8.x.
pub const AMPERE: Cores = Cores { terms: 8, bits: 24 };
/// Compute capability 9.0.
pub const HOPPER: Cores = Cores { terms: 16, bits: 25 };

impl Cores {
    /// The tensor cores of a device of compute capability `major`.x.
    pub fn of(major: i32) -> Self {
        if major >= 9 { HOPPER } else { AMPERE }
    }

    /// Σ aᵢ·bᵢ of bf16 numbers, in ascending blocks.
    pub fn dot(self, a: &[f32], b: &[f32]) -> f32 {
        let blocks = a.chunks(self.terms).zip(b.chunks(self.terms));
        blocks.fold(0.0, |sum, (a, b)| self.add(sum, a, b))
    }

    /// sum + Σ aᵢ·bᵢ over a block.
    fn add(self, sum: f32, a: &[f32], b: &[f32]) -> f32 {
        let products = || a.iter().zip(b);
        let exponents = products().filter_map(|(a, b)| Some(exponent(*a)? + exponent(*b)?));
        let Some(top) = exponents.chain(exponent(sum)).max() else { return sum };
        let (unit, per_unit) = (power(top - self.bits), power(self.bits - top));
        let cut = |x: f64| (x * per_unit).trunc();
        let total: f64 = products().map(|(a, b)| cut(f64::from(*a) * f64::from(*b))).sum();
        towards_zero((cut(f64::from(sum)) + total) * unit)
    }
}

/// The exponent of a float; `None` for zero.
fn exponent(x: f32) -> Option<i32> {
    (x != 0.0).then_some(((x.to_bits() >> 23 & 255) as i32).max(1) - 127)
}

fn power(of_two: i32) -> f64 {
    f64::from_bits(((of_two + 1023) as u64) << 52)
}

fn towards_zero(x: f64) -> f32 {
    let near = x as f32;
    if f64::from(near).abs() > x.abs() { f32::from_bits(near.to_bits() - 1) } else { near }
}
