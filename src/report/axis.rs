//! Axes: ranges, ticks at round numbers, pixels of values.

use crate::report::format;

/// A range of values over a range of pixels, with ticks.
#[derive(Clone, Debug)]
pub(crate) struct Axis {
    low: f64,
    high: f64,
    /// Distance between ticks.
    step: f64,
    from: f64,
    to: f64,
}

/// Least and largest of the finite values; `None` if there are none.
pub(crate) fn range_of(values: impl Iterator<Item = f64>) -> Option<(f64, f64)> {
    values.filter(|v| v.is_finite()).fold(None, |range, v| {
        let (low, high) = range.unwrap_or((v, v));
        Some((low.min(v), high.max(v)))
    })
}

/// 1, 2, 2.5 or 5 times a power of ten, at least `raw`.
fn nice_step(raw: f64) -> f64 {
    let power = 10f64.powf(raw.log10().floor());
    let factor = [1.0, 2.0, 2.5, 5.0, 10.0].into_iter().find(|f| f * power >= raw * 0.999_999).unwrap_or(10.0);
    factor * power
}

impl Axis {
    /// An axis whose ends are ticks, with about `ticks` of them, from pixel `from` to pixel `to`.
    pub(crate) fn nice(range: (f64, f64), ticks: usize, (from, to): (f64, f64)) -> Self {
        // Beyond these bounds differences would overflow or vanish; no measured value is there.
        let bounded = |v: f64| if v.is_finite() { v.clamp(-1e150, 1e150) } else { 0.0 };
        let (mut low, mut high) = (bounded(range.0.min(range.1)), bounded(range.0.max(range.1)));
        let size = low.abs().max(high.abs());
        if high - low <= size * 1e-9 {
            let around = if size > 1e-150 { size * 0.5 } else { 0.5 };
            (low, high) = (low - around, high + around);
        }
        let step = nice_step((high - low) / ticks.max(1) as f64);
        low = (low / step + 1e-9).floor() * step;
        high = (high / step - 1e-9).ceil() * step;
        Self { low, high, step, from, to }
    }

    /// An axis of exactly this range, with ticks at multiples of at least `least_step`.
    pub(crate) fn exact(range: (f64, f64), ticks: usize, least_step: f64, (from, to): (f64, f64)) -> Self {
        let mut axis = Self::nice(range, ticks, (from, to));
        if range.1 > range.0 && range.0.is_finite() && range.1.is_finite() {
            (axis.low, axis.high) = range;
        }
        if least_step > 0.0 {
            axis.step = (axis.step / least_step).ceil().max(1.0) * least_step;
        }
        axis
    }

    /// The axis shifted by pixels.
    pub(crate) fn shifted(self, by: f64) -> Self {
        Self { from: self.from + by, to: self.to + by, ..self }
    }

    /// The pixel of a value, clamped to the axis.
    pub(crate) fn place(&self, value: f64) -> f64 {
        let share = ((value - self.low) / (self.high - self.low)).clamp(0.0, 1.0);
        self.from + (self.to - self.from) * share
    }

    /// Tick values, at most 24.
    pub(crate) fn ticks(&self) -> Vec<f64> {
        let first = (self.low / self.step - 1e-9).ceil();
        (0..24).map(|i| (first + f64::from(i)) * self.step).take_while(|v| *v <= self.high + self.step * 1e-9).collect()
    }

    /// Label of a tick, with a typographic minus.
    pub(crate) fn label(&self, tick: f64) -> String {
        let size = self.low.abs().max(self.high.abs());
        let text = if tick != 0.0 && (size >= 1e6 || self.step < 1e-5) {
            let text = format::significant(tick, 3);
            match text.split_once('e') {
                Some((digits, power)) if digits.contains('.') => {
                    format!("{}e{power}", digits.trim_end_matches('0').trim_end_matches('.'))
                }
                _ => text,
            }
        } else if size >= 1e4 && (self.step % 100.0).abs() < 1e-9 && tick != 0.0 {
            format!("{}k", format::fixed(tick / 1000.0, usize::from(self.step % 1000.0 != 0.0)))
        } else {
            format::fixed(tick, self.decimals())
        };
        text.replace('-', "−")
    }

    fn decimals(&self) -> usize {
        (0..8)
            .find(|d| {
                let scaled = self.step * 10f64.powi(*d);
                (scaled - scaled.round()).abs() < 1e-6 * scaled
            })
            .map_or(8, |d| d as usize)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(low: f64, high: f64) -> Vec<String> {
        let axis = Axis::nice((low, high), 5, (0.0, 100.0));
        axis.ticks().into_iter().map(|t| axis.label(t)).collect()
    }

    #[test]
    fn ticks_are_nice_numbers() {
        assert_eq!(labels(0.0, 1.0), ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]);
        assert_eq!(labels(0.0, 97.0), ["0", "20", "40", "60", "80", "100"]);
        assert_eq!(labels(-0.13, 0.09), ["−0.15", "−0.10", "−0.05", "0.00", "0.05", "0.10"]);
        assert_eq!(labels(0.0, 40_000.0), ["0", "10k", "20k", "30k", "40k"]);
        assert_eq!(labels(0.0, 1.0e-7).last().map(String::as_str), Some("1e−7"));
        assert_eq!(labels(3.0, 3.0), ["1", "2", "3", "4", "5"]);
    }

    #[test]
    fn hostile_ranges_stay_finite_and_short() {
        let nan = f64::NAN;
        for range in
            [(nan, nan), (f64::MIN, f64::MAX), (0.0, f64::INFINITY), (5e-324, 5e-324), (1e300, 1e300), (1.0, 0.0)]
        {
            let axis = Axis::nice(range, 5, (0.0, 100.0));
            let ticks = axis.ticks();
            assert!((2..=24).contains(&ticks.len()), "{range:?}: {ticks:?}");
            for tick in ticks {
                assert!(axis.place(tick).is_finite(), "{range:?}");
                assert!(axis.label(tick).len() < 24, "{range:?}");
            }
        }
    }

    #[test]
    fn place_is_linear_and_held() {
        let axis = Axis::exact((0.0, 10.0), 5, 1.0, (20.0, 120.0));
        assert_eq!(axis.place(5.0), 70.0);
        assert_eq!(axis.place(-5.0), 20.0);
        assert_eq!(axis.place(50.0), 120.0);
    }
}
