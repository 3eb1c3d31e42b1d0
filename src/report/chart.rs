//! Charts as SVG: lines, bars, scatter; one set of axes, ticks and legends under all of them.

mod bars;
mod lines;
mod scatter;

pub use bars::{Bar, BarChart, BarPanel, BarSeries, Direction};
pub use lines::{LineChart, LinePanel, LineSeries, Point};
pub use scatter::{Dot, DotGroup, Scatter};

use super::palette::Tone;
use super::svg::{Area, Drawing, Font, Marker, clip, text_width, wrap};

/// Space around a drawing, in pixels.
const MARGIN: f64 = 12.0;
const LEGEND_STEP: f64 = 19.0;

/// One item of a legend.
struct LegendItem<'a> {
    name: &'a str,
    tone: Tone,
    key: Key,
}

/// What stands before a name in a legend.
#[derive(Clone, Copy)]
enum Key {
    Bar,
    Line,
    Marker(Marker),
}

/// Title, then the legend in as many lines as it takes; returns the bottom.
fn head(drawing: &mut Drawing, title: &str, legend: &[LegendItem<'_>]) -> f64 {
    let room = drawing.width - 2.0 * MARGIN;
    let mut bottom = MARGIN;
    if !title.is_empty() {
        bottom = drawing.lines(MARGIN, bottom, &wrap(title, Font::TITLE.size, room, 2), Font::TITLE) + 4.0;
    }
    if legend.len() > 1 || legend.first().is_some_and(|item| !item.name.is_empty()) {
        let mut x = MARGIN;
        for item in legend {
            let name = clip(item.name, Font::LABEL.size, room - 18.0);
            let width = 18.0 + text_width(&name, Font::LABEL.size);
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
            drawing.text(x + 16.0, middle + 4.0, &name, Font::LABEL);
            x += width + 14.0;
        }
        bottom += LEGEND_STEP + 6.0;
    }
    bottom
}

/// The note under a chart; returns the bottom of the drawing.
fn foot(drawing: &mut Drawing, top: f64, note: &str) -> f64 {
    let room = drawing.width - 2.0 * MARGIN;
    drawing.lines(MARGIN, top, &wrap(note, Font::SMALL.size, room, 4), Font::SMALL)
        + if note.is_empty() { 4.0 } else { MARGIN }
}
