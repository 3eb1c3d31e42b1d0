//! Line charts.

use super::{Key, LegendItem, Measure, Plot, draw_header, finish};
use crate::report::axis::{Axis, range_of};
use crate::report::format;
use crate::report::palette::Tone;
use crate::report::svg::{Drawing, FULL_WIDTH, HALF_WIDTH, Marker, px};
use std::fmt::Write as _;

/// Longer lines are drawn without markers.
const MARKED_POINTS: usize = 40;
/// Lines of more than twice as many points are decimated to the minimum and maximum of this many intervals.
const INTERVALS: usize = 400;
/// Pixels between the intervals of neighbouring series at the same x.
const DODGE: f64 = 4.0;
const HEIGHT: f64 = 170.0;

/// One point of a line.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Point {
    /// Epoch or step.
    pub x: f64,
    /// The line is broken where it is not finite.
    pub y: Measure,
}

/// A named line.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LineSeries {
    /// Shown in the legend.
    pub name: String,
    /// Colour of line and markers.
    pub tone: Tone,
    /// By ascending x.
    pub points: Vec<Point>,
}

/// Lines over epochs or steps: x has ticks at whole numbers only.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LineChart {
    /// Above the legend; may be empty.
    pub title: String,
    /// Label of the x axis.
    pub x_label: String,
    /// Label of the y axis, with the unit.
    pub y_label: String,
    /// Whether the y axis includes 0.
    pub from_zero: bool,
    /// In the order of the legend.
    pub series: Vec<LineSeries>,
    /// Full width of a page, else half.
    pub wide: bool,
    /// Below the chart; may be empty.
    pub note: String,
}

impl LineChart {
    /// The chart as a self-contained SVG document.
    pub fn svg(&self) -> String {
        let mut drawing = Drawing::new(if self.wide { FULL_WIDTH } else { HALF_WIDTH });
        let key = |i: usize, series: &LineSeries| {
            if series.points.len() <= MARKED_POINTS { Key::Marker(Marker::of(i)) } else { Key::Line }
        };
        let legend = self.series.iter().enumerate();
        let legend: Vec<LegendItem<'_>> =
            legend.map(|(i, s)| LegendItem { name: &s.name, tone: s.tone, key: key(i, s) }).collect();
        let top = draw_header(&mut drawing, &self.title, &legend);

        let points = || self.series.iter().flat_map(|s| &s.points);
        let zero = self.from_zero.then_some(0.0);
        let range = range_of(points().flat_map(|p| p.y.extent()).chain(zero)).unwrap_or((0.0, 1.0));
        let plot = Plot::new(&mut drawing, top, HEIGHT, &self.y_label, range, 5);
        // Padding, so that the first and last markers do not touch the frame.
        let ends = (plot.left + 8.0, plot.right - 4.0);
        let range = range_of(points().map(|p| p.x)).unwrap_or((0.0, 1.0));
        let x_axis = Axis::exact(range, if self.wide { 12 } else { 6 }, 1.0, ends);
        let dodge = if points().any(|p| p.y.interval.is_some()) { DODGE } else { 0.0 };
        for (i, series) in self.series.iter().enumerate() {
            // Intervals at the same x stand side by side, or they would hide each other.
            let shift = dodge * (i as f64 - (self.series.len() as f64 - 1.0) / 2.0);
            self.draw(&mut drawing, series, Marker::of(i), &x_axis.clone().shifted(shift), &plot);
        }
        for tick in x_axis.ticks() {
            let x = x_axis.place(tick);
            drawing.line((x, plot.bottom), (x, plot.bottom + 4.0), 1.0, Tone::Muted);
            plot.x_tick(&mut drawing, x, &x_axis.label(tick));
        }
        let bottom = plot.x_label(&mut drawing, &self.x_label);
        finish(drawing, bottom, &self.note, &self.title, &self.description())
    }

    fn description(&self) -> String {
        let mut text = format!("Line chart of {} over {}.", self.y_label, self.x_label);
        let number = |v| format::significant(v, 3);
        for series in &self.series {
            if let (Some(first), Some(last)) = (series.points.first(), series.points.last()) {
                let (from, to) = (number(first.y.value), number(last.y.value));
                let _ = write!(text, " {}: {from} at {}, {to} at {}.", series.name, number(first.x), number(last.x));
            }
        }
        text
    }

    fn draw(&self, drawing: &mut Drawing, series: &LineSeries, marker: Marker, x_axis: &Axis, plot: &Plot) {
        let points = decimate(&series.points);
        let finite = |p: &&Point| p.x.is_finite() && p.y.value.is_finite();
        let place = |p: &Point| (x_axis.place(p.x), plot.y.place(p.y.value));
        let mut data = String::new();
        for run in points.split(|p| !finite(&p)) {
            for (i, point) in run.iter().enumerate() {
                let (x, y) = place(point);
                let _ = write!(data, "{}{} {}", if i == 0 { 'M' } else { 'L' }, px(x), px(y));
            }
        }
        let marked = points.len() <= MARKED_POINTS;
        if !data.is_empty() {
            drawing.path(&data, if marked { 2.0 } else { 1.4 }, series.tone);
        }
        for point in points.iter().filter(|_| marked).filter(finite) {
            let (x, y) = place(point);
            plot.interval(drawing, x, point.y, series.tone);
            for end in point.y.bounds().into_iter().flat_map(|(low, high)| [low, high]) {
                let y = plot.y.place(end);
                drawing.line((x - 3.0, y), (x + 3.0, y), 1.4, series.tone);
            }
            let at = x_axis.label(point.x);
            let tooltip = format!("{}, {} {at}: {}", series.name, self.x_label, point.y.text());
            drawing.marker((x, y), marker, series.tone, &tooltip);
        }
    }
}

/// Decimates a line to minimum and maximum per interval, which preserves spikes.
fn decimate(points: &[Point]) -> Vec<Point> {
    if points.len() <= 2 * INTERVALS {
        return points.to_vec();
    }
    let interval = points.len().div_ceil(INTERVALS);
    let mut kept = Vec::new();
    for part in points.chunks(interval) {
        let by_value = |(_, a): &(usize, &Point), (_, b): &(usize, &Point)| a.y.value.total_cmp(&b.y.value);
        let finite = || part.iter().enumerate().filter(|(_, p)| p.y.value.is_finite());
        if let (Some(low), Some(high)) = (finite().min_by(by_value), finite().max_by(by_value)) {
            let (first, second) = if low.0 <= high.0 { (low, high) } else { (high, low) };
            kept.push(*first.1);
            if first.0 != second.0 {
                kept.push(*second.1);
            }
        }
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decimation_keeps_spikes_and_order() {
        let point = |x: f64, y| Point { x, y: Measure::new(y) };
        let mut points: Vec<Point> = (0..10_000).map(f64::from).map(|x| point(x, (x / 50.0).sin())).collect();
        points[7_777].y.value = 40.0;
        points[3_333].y.value = f64::NAN;
        let kept = decimate(&points);
        assert!(kept.len() <= 2 * INTERVALS);
        assert!(kept.iter().any(|p| p.y.value == 40.0 && p.x == 7_777.0));
        assert!(kept.windows(2).all(|w| w[0].x < w[1].x));
    }
}
