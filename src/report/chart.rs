//! Charts as SVG: lines, bars and scatter plots, with one set of axes, ticks and legends.

mod bars;
mod lines;
mod scatter;

pub use bars::{BarChart, BarPanel, BarSeries, Direction};
pub use lines::{LineChart, LineSeries, Point};
pub use scatter::{Dot, DotGroup, Scatter};

use super::axis::Axis;
use super::format;
use super::palette::Tone;
use super::svg::{Anchor, Area, Drawing, Font, Marker, clip, fold, text_width, wrap};

/// Space around a drawing, in pixels.
pub(super) const MARGIN: f64 = 12.0;
const LEGEND_STEP: f64 = 19.0;

/// A value and the interval around it.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Measure {
    /// Not drawn if it is not finite.
    pub value: f64,
    /// Lower and upper end.
    pub interval: Option<(f64, f64)>,
}

impl Measure {
    /// A value without an interval.
    pub fn new(value: f64) -> Self {
        Self { value, interval: None }
    }

    /// Value and interval times `factor`, for example 100 for a share in percent.
    pub fn scaled(self, factor: f64) -> Self {
        let interval = self.interval.map(|(low, high)| (low * factor, high * factor));
        Self { value: self.value * factor, interval }
    }

    /// The interval, if both ends are finite.
    fn bounds(self) -> Option<(f64, f64)> {
        self.interval.filter(|(low, high)| low.is_finite() && high.is_finite())
    }

    /// Values that an axis must include.
    fn extent(self) -> [f64; 3] {
        let (low, high) = self.interval.unwrap_or((self.value, self.value));
        [self.value, low, high]
    }

    /// `0.538 (0.478–0.598)`, for tooltips.
    fn text(self) -> String {
        let number = |v| format::significant(v, 4);
        let interval = self.bounds().map(|(low, high)| format!(" ({}–{})", number(low), number(high)));
        number(self.value) + &interval.unwrap_or_default()
    }
}

pub(super) struct LegendItem<'a> {
    name: &'a str,
    tone: Tone,
    key: Key,
}

/// The symbol of an item of a legend.
#[derive(Clone, Copy)]
pub(super) enum Key {
    Bar,
    Line,
    Marker(Marker),
}

/// Title and legend; returns the bottom.
pub(super) fn draw_header(drawing: &mut Drawing, title: &str, legend: &[LegendItem<'_>]) -> f64 {
    let room = drawing.width - 2.0 * MARGIN;
    let mut bottom = MARGIN;
    if !title.is_empty() {
        bottom = drawing.lines(MARGIN, bottom, &wrap(title, Font::TITLE.size, room, 2), Font::TITLE) + 4.0;
    }
    if legend.len() > 1 || legend.first().is_some_and(|item| !item.name.is_empty()) {
        let mut x = MARGIN;
        for item in legend {
            let name = fold(item.name, Font::LABEL.size, room - 18.0);
            let widest = name.iter().map(|line| text_width(line, Font::LABEL.size)).fold(0.0, f64::max);
            let width = 18.0 + widest;
            if x > MARGIN && x + width > drawing.width - MARGIN {
                x = MARGIN;
                bottom += LEGEND_STEP;
            }
            let middle = bottom + LEGEND_STEP / 2.0;
            match item.key {
                Key::Marker(marker) => drawing.marker((x + 5.0, middle), marker, item.tone, ""),
                Key::Line => drawing.line((x - 1.0, middle), (x + 11.0, middle), 2.4, item.tone),
                Key::Bar => drawing.rect(Area::new(x, middle - 5.0, 10.0, 10.0), 2.0, item.tone, ""),
            }
            for (i, line) in name.iter().enumerate() {
                bottom += if i > 0 { LEGEND_STEP } else { 0.0 };
                drawing.text(x + 16.0, bottom + LEGEND_STEP / 2.0 + 4.0, line, Font::LABEL);
            }
            x += width + 14.0;
        }
        bottom += LEGEND_STEP + 6.0;
    }
    bottom
}

/// Finishes a drawing with the note under the chart.
pub(super) fn finish(mut drawing: Drawing, top: f64, note: &str, title: &str, description: &str) -> String {
    let lines = wrap(note, Font::SMALL.size, drawing.width - 2.0 * MARGIN, 4);
    let margin = if note.is_empty() { 4.0 } else { MARGIN };
    drawing.height = drawing.lines(MARGIN, top, &lines, Font::SMALL) + margin;
    drawing.finish(title, description)
}

/// The area between the axes, and the y axis.
struct Plot {
    left: f64,
    right: f64,
    top: f64,
    bottom: f64,
    y: Axis,
}

impl Plot {
    /// Draws the label of the y axis at `top`, and below it ticks and grid lines over `height` pixels.
    fn new(drawing: &mut Drawing, top: f64, height: f64, label: &str, range: (f64, f64), ticks: usize) -> Self {
        let size = Font::SMALL.size;
        drawing.text(MARGIN, top + 12.0, &clip(label, size, drawing.width - 2.0 * MARGIN), Font::SMALL);
        let top = top + 26.0;
        let bottom = top + height;
        let y = Axis::nice(range, ticks, (bottom, top));
        let labels: Vec<(f64, String)> = y.ticks().into_iter().map(|tick| (y.place(tick), y.label(tick))).collect();
        let widest = labels.iter().map(|(_, label)| text_width(label, size)).fold(0.0, f64::max);
        let (left, right) = (MARGIN + widest + 8.0, drawing.width - MARGIN - 8.0);
        for (at, label) in labels {
            drawing.line((left, at), (right, at), 1.0, Tone::Line);
            drawing.text(left - 6.0, at + 4.0, &label, Font::SMALL.at(Anchor::End));
        }
        Self { left, right, top, bottom, y }
    }

    /// The text at a tick of the x axis.
    fn x_tick(&self, drawing: &mut Drawing, x: f64, label: &str) {
        drawing.text(x, self.bottom + 17.0, label, Font::SMALL.at(Anchor::Middle));
    }

    /// Draws the label of the x axis; returns the bottom.
    fn x_label(&self, drawing: &mut Drawing, label: &str) -> f64 {
        let label = clip(label, Font::SMALL.size, self.right - self.left);
        drawing.text((self.left + self.right) / 2.0, self.bottom + 34.0, &label, Font::SMALL.at(Anchor::Middle));
        self.bottom + 42.0
    }

    /// A vertical line over the interval, if there is one.
    fn interval(&self, drawing: &mut Drawing, x: f64, measure: Measure, tone: Tone) {
        if let Some((low, high)) = measure.bounds() {
            drawing.line((x, self.y.place(low)), (x, self.y.place(high)), 1.3, tone);
        }
    }
}
