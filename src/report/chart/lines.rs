//! Line charts: panels over one x axis, each with its own y axis.

use super::{Key, LegendItem, MARGIN, foot, head};
use crate::report::axis::{Axis, range_of};
use crate::report::format;
use crate::report::palette::Tone;
use crate::report::svg::{Anchor, Drawing, FULL_WIDTH, Font, HALF_WIDTH, Marker, clip, px, text_width};
use std::fmt::Write as _;

/// More points than this are drawn without markers.
const MARKED_POINTS: usize = 40;
/// More points than twice this are drawn as the lowest and highest of each of this many stretches.
const STRETCHES: usize = 400;
/// Pixels between the intervals of neighbouring series at the same x.
const DODGE: f64 = 4.0;
const PANEL_HEIGHT: f64 = 170.0;
const PANEL_GAP: f64 = 16.0;

/// One measured point.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Point {
    /// Epoch, step or layer.
    pub x: f64,
    /// Value; a point that is not finite is left out and the line broken there.
    pub y: f64,
    /// Ends of its interval, if it has one.
    pub interval: Option<(f64, f64)>,
}

impl Point {
    /// A point without an interval.
    pub fn new(x: f64, y: f64) -> Self {
        Self { x, y, interval: None }
    }
}

/// One line.
#[derive(Clone, Debug, PartialEq)]
pub struct LineSeries {
    /// Its name in the legend; the same name in two panels is one entry.
    pub name: String,
    /// Its colour.
    pub tone: Tone,
    /// Points by ascending x.
    pub points: Vec<Point>,
}

/// One y axis with its lines.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LinePanel {
    /// What the y axis shows, with its unit.
    pub y_label: String,
    /// Lines.
    pub series: Vec<LineSeries>,
    /// Ends of the y axis that it must at least reach, for example 0 and 1.
    pub at_least: Option<(f64, f64)>,
}

/// Panels stacked over one x axis.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LineChart {
    /// Title.
    pub title: String,
    /// What the x axis shows.
    pub x_label: String,
    /// Whether x counts something: ticks at whole numbers only.
    pub whole_x: bool,
    /// Panels from the top.
    pub panels: Vec<LinePanel>,
    /// As wide as the page (else half of it).
    pub wide: bool,
    /// Set under the chart.
    pub note: String,
}

impl LineChart {
    /// The chart as a self-contained SVG document.
    pub fn svg(&self) -> String {
        let mut drawing = Drawing::new(if self.wide { FULL_WIDTH } else { HALF_WIDTH });
        let names = self.names();
        let legend: Vec<LegendItem<'_>> = names
            .iter()
            .enumerate()
            .map(|(i, (name, tone))| {
                let marked = self.series().any(|s| s.name == *name && s.points.len() <= MARKED_POINTS);
                LegendItem { name, tone: *tone, key: if marked { Key::Marker(Marker::of(i)) } else { Key::Line } }
            })
            .collect();
        let mut top = head(&mut drawing, &self.title, &legend);

        let y_axes: Vec<Axis> = self.panels.iter().map(LinePanel::axis).collect();
        let label_width = y_axes
            .iter()
            .flat_map(|axis| axis.ticks().into_iter().map(|t| text_width(&axis.label(t), Font::SMALL.size)))
            .fold(0.0, f64::max);
        let (left, right) = (MARGIN + label_width + 8.0, drawing.width - MARGIN - 8.0);
        let all_x = self.series().flat_map(|s| &s.points).map(|p| p.x);
        let ticks = if self.wide { 12 } else { 6 };
        // A little air, so that the first and last markers do not sit on the frame.
        let x_axis = Axis::exact(range_of(all_x).unwrap_or((0.0, 1.0)), ticks, self.whole_x, (left + 8.0, right - 4.0));

        for (panel, y_axis) in self.panels.iter().zip(y_axes) {
            let room = drawing.width - 2.0 * MARGIN;
            drawing.text(MARGIN, top + 12.0, &clip(&panel.y_label, Font::SMALL.size, room), Font::SMALL);
            top += 26.0;
            let y_axis = y_axis.between(top + PANEL_HEIGHT, top);
            for tick in y_axis.ticks() {
                let y = y_axis.place(tick);
                drawing.line((left, y), (right, y), 1.0, Tone::Line);
                drawing.text(left - 6.0, y + 4.0, &y_axis.label(tick), Font::SMALL.at(Anchor::End));
            }
            for series in &panel.series {
                let index = names.iter().position(|(name, _)| *name == series.name).unwrap_or(0);
                // Intervals at the same x stand side by side, or they would hide each other.
                let intervals = self.series().flat_map(|s| &s.points).any(|p| p.interval.is_some());
                let shift = if intervals { DODGE * (index as f64 - (names.len() as f64 - 1.0) / 2.0) } else { 0.0 };
                let x_axis = x_axis.clone().shifted(shift);
                self.draw(&mut drawing, series, Marker::of(index), &x_axis, &y_axis);
            }
            top += PANEL_HEIGHT + PANEL_GAP;
        }
        top -= PANEL_GAP;
        for tick in x_axis.ticks() {
            let x = x_axis.place(tick);
            drawing.line((x, top), (x, top + 4.0), 1.0, Tone::Muted);
            drawing.text(x, top + 17.0, &x_axis.label(tick), Font::SMALL.at(Anchor::Middle));
        }
        top += 22.0;
        let middle = (left + right) / 2.0;
        let label = clip(&self.x_label, Font::SMALL.size, right - left);
        drawing.text(middle, top + 12.0, &label, Font::SMALL.at(Anchor::Middle));
        drawing.height = foot(&mut drawing, top + 20.0, &self.note);
        drawing.finish(&self.title, &self.description())
    }

    fn series(&self) -> impl Iterator<Item = &LineSeries> {
        self.panels.iter().flat_map(|p| &p.series)
    }

    /// Names and tones in order of first use.
    fn names(&self) -> Vec<(&str, Tone)> {
        let mut names: Vec<(&str, Tone)> = Vec::new();
        for series in self.series() {
            if !names.iter().any(|(name, _)| *name == series.name) {
                names.push((&series.name, series.tone));
            }
        }
        names
    }

    fn description(&self) -> String {
        let mut text = format!("Line chart over {}.", self.x_label);
        for panel in &self.panels {
            for series in &panel.series {
                let ends = (series.points.first(), series.points.last());
                if let (Some(first), Some(last)) = ends {
                    let number = |v| format::significant(v, 3);
                    let _ = write!(
                        text,
                        " {}, {}: {} at {}, {} at {}.",
                        panel.y_label,
                        series.name,
                        number(first.y),
                        number(first.x),
                        number(last.y),
                        number(last.x)
                    );
                }
            }
        }
        text
    }

    fn draw(&self, drawing: &mut Drawing, series: &LineSeries, marker: Marker, x_axis: &Axis, y_axis: &Axis) {
        let points = thin(&series.points);
        let mut data = String::new();
        let mut pen_up = true;
        for point in &points {
            if point.x.is_finite() && point.y.is_finite() {
                let command = if pen_up { 'M' } else { 'L' };
                let _ = write!(data, "{command}{} {}", px(x_axis.place(point.x)), px(y_axis.place(point.y)));
                pen_up = false;
            } else {
                pen_up = true;
            }
        }
        if !data.is_empty() {
            drawing.path(&data, if points.len() > MARKED_POINTS { 1.4 } else { 2.0 }, series.tone);
        }
        if points.len() > MARKED_POINTS {
            return;
        }
        for point in points.iter().filter(|p| p.x.is_finite() && p.y.is_finite()) {
            let (x, y) = (x_axis.place(point.x), y_axis.place(point.y));
            let mut tooltip = format!(
                "{}, {} {}: {}",
                series.name,
                self.x_label,
                x_axis.label(point.x),
                format::significant(point.y, 4)
            );
            if let Some((low, high)) = point.interval.filter(|(low, high)| low.is_finite() && high.is_finite()) {
                let (y_low, y_high) = (y_axis.place(low), y_axis.place(high));
                drawing.line((x, y_low), (x, y_high), 1.4, series.tone);
                drawing.line((x - 3.0, y_low), (x + 3.0, y_low), 1.4, series.tone);
                drawing.line((x - 3.0, y_high), (x + 3.0, y_high), 1.4, series.tone);
                let _ = write!(tooltip, " ({}–{})", format::significant(low, 4), format::significant(high, 4));
            }
            drawing.marker((x, y), marker, series.tone, &tooltip);
        }
    }
}

impl LinePanel {
    fn axis(&self) -> Axis {
        let points = self.series.iter().flat_map(|s| &s.points);
        let values = points.flat_map(|p| {
            let (low, high) = p.interval.unwrap_or((p.y, p.y));
            [p.y, low, high]
        });
        let ends = self.at_least.into_iter().flat_map(|(low, high)| [low, high]);
        Axis::nice(range_of(values.chain(ends)).unwrap_or((0.0, 1.0)), 5, (0.0, 1.0))
    }
}

/// At most two points a stretch, its lowest and its highest, so that spikes stay.
fn thin(points: &[Point]) -> Vec<Point> {
    if points.len() <= 2 * STRETCHES {
        return points.to_vec();
    }
    let stretch = points.len().div_ceil(STRETCHES);
    let mut kept = Vec::new();
    for part in points.chunks(stretch) {
        let by_value = |(_, a): &(usize, &Point), (_, b): &(usize, &Point)| a.y.total_cmp(&b.y);
        let finite = || part.iter().enumerate().filter(|(_, p)| p.y.is_finite());
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
    fn thinning_keeps_spikes_and_order() {
        let mut points: Vec<Point> =
            (0..10_000).map(|i| Point::new(f64::from(i), (f64::from(i) / 50.0).sin())).collect();
        points[7_777].y = 40.0;
        points[3_333].y = f64::NAN;
        let kept = thin(&points);
        assert!(kept.len() <= 2 * STRETCHES);
        assert!(kept.iter().any(|p| p.y == 40.0 && p.x == 7_777.0));
        assert!(kept.windows(2).all(|w| w[0].x < w[1].x));
    }
}
