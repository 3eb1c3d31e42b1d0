//! Loops compiled for the widest vectors that the machine has, and the few building blocks they share.
//!
//! [`simd_kernel!`] defines them. Element-wise loops are written plainly and vectorised by the compiler; float sums may
//! not be reordered by it, so reductions name their vectors, through [`pulp::Simd`].
//! Reductions have a fixed order on one instruction set; between instruction sets the last bits may differ.

use pulp::Simd;

/// Defines a function whose body is compiled for every instruction set and runs on the best one of this machine, with
/// `$simd` for its vectors. All its reference arguments live for `'a`; everything that it calls is `#[inline(always)]`.
macro_rules! simd_kernel {
    ($(#[$attr:meta])* $vis:vis fn $name:ident $(<$($t:ident: $bound:ident),+>)? ($simd:ident $(, $arg:ident: $ty:ty)* $(,)?)
        $(-> $out:ty)? $body:block) => {
        $(#[$attr])*
        #[allow(clippy::too_many_arguments)]
        $vis fn $name<'a $($(, $t: $bound)+)?>($($arg: $ty),*) $(-> $out)? {
            struct Kernel<'a $($(, $t: $bound)+)?> {
                $($arg: $ty,)*
                lifetime: std::marker::PhantomData<&'a ($($($t,)+)?)>,
            }
            impl<'a $($(, $t: $bound)+)?> pulp::WithSimd for Kernel<'a $($(, $t)+)?> {
                type Output = simd_kernel!(@out $($out)?);
                #[inline(always)]
                fn with_simd<S: pulp::Simd>(self, $simd: S) -> Self::Output {
                    let Self { $($arg,)* lifetime: _ } = self;
                    $body
                }
            }
            pulp::Arch::new().dispatch(Kernel { $($arg,)* lifetime: std::marker::PhantomData })
        }
    };
    (@out) => { () };
    (@out $out:ty) => { $out };
}
pub(super) use simd_kernel;

/// Asks for the cache line at `x`, which need not be valid, in the second-level cache.
#[inline(always)]
pub(super) fn prefetch(x: *const f32) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch reads nothing and never faults.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T1 }>(x.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = x;
}

/// eˣ, within 2 units in the last place for −87.3 ≤ x ≤ 88.3; 0 below, +∞ above, NaN for NaN.
///
/// Reduction to |r| ≤ ln 2 / 2 by two-step Cody–Waite, then the polynomial of Cephes' `expf`.
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0;
    let shifted = x.mul_add(std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = n.mul_add(-0.693_359_4, x);
    let r = n.mul_add(2.121_944_4e-4, r);
    let p = 1.987_569_1e-4_f32
        .mul_add(r, 1.398_199_9e-3)
        .mul_add(r, 8.333_452e-3)
        .mul_add(r, 4.166_579_6e-2)
        .mul_add(r, 1.666_666_5e-1)
        .mul_add(r, 0.5);
    let mantissa = p.mul_add(r * r, r) + 1.0;
    let power = f32::from_bits((shifted.to_bits() << 23).wrapping_add(127 << 23));
    let y = mantissa * power;
    let y = if x < -87.3 { 0.0 } else { y };
    if x > 88.3 { f32::INFINITY } else { y }
}

/// Σ aᵢ·bᵢ.
#[inline(always)]
pub(super) fn dot<S: Simd>(simd: S, a: &[f32], b: &[f32]) -> f32 {
    let (a, a_tail) = S::as_simd_f32s(a);
    let (b, b_tail) = S::as_simd_f32s(b);
    let (a4, a1) = a.as_chunks::<4>();
    let (b4, b1) = b.as_chunks::<4>();
    let zero = simd.splat_f32s(0.0);
    let (mut s0, mut s1, mut s2, mut s3) = (zero, zero, zero, zero);
    for (a, b) in a4.iter().zip(b4) {
        s0 = simd.mul_add_f32s(a[0], b[0], s0);
        s1 = simd.mul_add_f32s(a[1], b[1], s1);
        s2 = simd.mul_add_f32s(a[2], b[2], s2);
        s3 = simd.mul_add_f32s(a[3], b[3], s3);
    }
    for (a, b) in a1.iter().zip(b1) {
        s0 = simd.mul_add_f32s(*a, *b, s0);
    }
    s1 = simd.mul_add_f32s(simd.partial_load_f32s(a_tail), simd.partial_load_f32s(b_tail), s1);
    simd.reduce_sum_f32s(simd.add_f32s(simd.add_f32s(s0, s1), simd.add_f32s(s2, s3)))
}

/// Σ xᵢ.
#[inline(always)]
pub(super) fn sum<S: Simd>(simd: S, x: &[f32]) -> f32 {
    let (x, tail) = S::as_simd_f32s(x);
    let (x4, x1) = x.as_chunks::<4>();
    let zero = simd.splat_f32s(0.0);
    let (mut s0, mut s1, mut s2, mut s3) = (zero, zero, zero, zero);
    for x in x4 {
        s0 = simd.add_f32s(s0, x[0]);
        s1 = simd.add_f32s(s1, x[1]);
        s2 = simd.add_f32s(s2, x[2]);
        s3 = simd.add_f32s(s3, x[3]);
    }
    for x in x1 {
        s0 = simd.add_f32s(s0, *x);
    }
    s1 = simd.add_f32s(s1, simd.partial_load_f32s(tail));
    simd.reduce_sum_f32s(simd.add_f32s(simd.add_f32s(s0, s1), simd.add_f32s(s2, s3)))
}

/// max xᵢ; −∞ for an empty slice.
#[inline(always)]
pub(super) fn max<S: Simd>(simd: S, x: &[f32]) -> f32 {
    let (x, tail) = S::as_simd_f32s(x);
    let (x4, x1) = x.as_chunks::<4>();
    let low = simd.splat_f32s(f32::NEG_INFINITY);
    let (mut m0, mut m1, mut m2, mut m3) = (low, low, low, low);
    for x in x4 {
        m0 = simd.max_f32s(m0, x[0]);
        m1 = simd.max_f32s(m1, x[1]);
        m2 = simd.max_f32s(m2, x[2]);
        m3 = simd.max_f32s(m3, x[3]);
    }
    for x in x1 {
        m0 = simd.max_f32s(m0, *x);
    }
    let mut max = simd.reduce_max_f32s(simd.max_f32s(simd.max_f32s(m0, m1), simd.max_f32s(m2, m3)));
    for x in tail {
        max = if *x > max { *x } else { max };
    }
    max
}

#[cfg(test)]
mod tests {
    use super::*;

    simd_kernel! {
        fn reductions(simd, a: &'a [f32], b: &'a [f32]) -> [f32; 3] {
            [dot(simd, a, b), sum(simd, a), max(simd, a)]
        }
    }

    simd_kernel! {
        fn exponentials(_simd, xs: &'a [f32], ys: &'a mut [f32]) {
            for (y, x) in ys.iter_mut().zip(xs) {
                *y = exp(*x);
            }
        }
    }

    #[test]
    fn exp_is_within_two_ulp() {
        let xs: Vec<f32> = (0..400_000).map(|i| -87.3 + i as f32 * (175.6 / 400_000.0)).collect();
        let mut ys = vec![0.0; xs.len()];
        exponentials(&xs, &mut ys);
        for (x, y) in xs.iter().zip(&ys) {
            let exact = (*x as f64).exp();
            let ulp = f32::from_bits((exact as f32).to_bits() + 1) as f64 - exact as f32 as f64;
            assert!((*y as f64 - exact).abs() <= 2.0 * ulp, "exp({x}) = {y}, exact {exact}");
        }
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(f32::INFINITY), f32::INFINITY);
        assert_eq!(exp(-1e30), 0.0);
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn reductions_of_every_length() {
        for len in (0..200).chain([1000, 1537]) {
            let a: Vec<f32> = (0..len).map(|i| ((i * 37 % 101) as f32 - 50.0) / 8.0).collect();
            let b: Vec<f32> = (0..len).map(|i| ((i * 53 % 97) as f32 - 48.0) / 4.0).collect();
            let [d, s, m] = reductions(&a, &b);
            assert_eq!(d, a.iter().zip(&b).map(|(x, y)| x * y).sum::<f32>(), "{len}");
            assert_eq!(s, a.iter().sum::<f32>(), "{len}");
            assert_eq!(m, a.iter().copied().fold(f32::NEG_INFINITY, f32::max), "{len}");
        }
    }
}
