//! Scatter plots: named points in groups.

use super::{Key, LegendItem, MARGIN, Measure, Plot, draw_header, finish};
use crate::report::axis::{Axis, range_of};
use crate::report::format;
use crate::report::palette::Tone;
use crate::report::svg::{Area, Drawing, Font, HALF_WIDTH, Marker, fold, text_width};

const HEIGHT: f64 = 260.0;
/// Above this number of points, only tooltips name them.
const LABELLED_POINTS: usize = 40;

/// One point; it is left out where x or y is not finite.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Dot {
    /// Label beside the point, or below the plot where there is no room.
    pub name: String,
    /// Horizontal position.
    pub x: f64,
    /// Vertical position and interval.
    pub y: Measure,
}

/// Points of one colour and shape.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct DotGroup {
    /// Shown in the legend.
    pub name: String,
    /// Colour of the markers.
    pub tone: Tone,
    /// In any order.
    pub dots: Vec<Dot>,
}

/// A scatter plot, half a page wide.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Scatter {
    /// Above the legend; may be empty.
    pub title: String,
    /// Label of the x axis, with the unit.
    pub x_label: String,
    /// Label of the y axis, with the unit.
    pub y_label: String,
    /// In the order of the legend.
    pub groups: Vec<DotGroup>,
    /// The y axis spans at least 0 to this.
    pub y_at_least: f64,
    /// Below the plot; may be empty.
    pub note: String,
}

impl Scatter {
    /// The plot as a self-contained SVG document.
    pub fn svg(&self) -> String {
        let mut drawing = Drawing::new(HALF_WIDTH);
        let legend = self.groups.iter().enumerate();
        let legend: Vec<LegendItem<'_>> =
            legend.map(|(i, g)| LegendItem { name: &g.name, tone: g.tone, key: Key::Marker(Marker::of(i)) }).collect();
        let top = draw_header(&mut drawing, &self.title, &legend);
        let dots = || self.groups.iter().flat_map(|g| &g.dots);
        let range = range_of(dots().flat_map(|d| d.y.extent()).chain([0.0, self.y_at_least])).unwrap_or((0.0, 1.0));
        let plot = Plot::new(&mut drawing, top, HEIGHT, &self.y_label, range, 5);
        let x_axis = Axis::nice(range_of(dots().map(|d| d.x)).unwrap_or((0.0, 1.0)), 6, (plot.left, plot.right));
        for tick in x_axis.ticks() {
            let x = x_axis.place(tick);
            drawing.line((x, plot.top), (x, plot.bottom), 1.0, Tone::Line);
            plot.x_tick(&mut drawing, x, &x_axis.label(tick));
        }
        let bottom = plot.x_label(&mut drawing, &self.x_label);

        let visible = |d: &&Dot| d.x.is_finite() && d.y.value.is_finite();
        let place = |d: &Dot| (x_axis.place(d.x), plot.y.place(d.y.value));
        // Labels keep clear of every marker, of every interval and of each other.
        let mut taken: Vec<Area> = Vec::new();
        for (i, group) in self.groups.iter().enumerate() {
            for dot in group.dots.iter().filter(visible) {
                let (x, y) = place(dot);
                taken.push(Area::new(x - 5.0, y - 5.0, 10.0, 10.0));
                if let Some((low, high)) = dot.y.bounds() {
                    let (a, b) = (plot.y.place(low), plot.y.place(high));
                    taken.push(Area::new(x - 1.0, a.min(b), 2.0, (a - b).abs()));
                }
                plot.interval(&mut drawing, x, dot.y, group.tone);
                let tooltip = format!("{}: {}, {}", dot.name, format::significant(dot.x, 4), dot.y.text());
                drawing.marker((x, y), Marker::of(i), group.tone, &tooltip);
            }
        }
        // Names for which there is no room stand below the plot, by number.
        let mut below: Vec<String> = Vec::new();
        if dots().count() <= LABELLED_POINTS {
            let font = Font { size: 10.5, ..Font::SMALL };
            let frame = Area::new(plot.left, plot.top, plot.right - plot.left, plot.bottom - plot.top);
            for dot in dots().filter(visible) {
                let number = (below.len() + 1).to_string();
                let spot = |text: &str| free_spot(place(dot), text_width(text, font.size), font.size, frame, &taken);
                let (text, at) = match spot(&dot.name) {
                    Some(at) => (&dot.name, at),
                    None => {
                        below.push(format!("{number}: {}", dot.name));
                        let (x, y) = place(dot);
                        let beside = Area::new(x + 6.0, y - font.size, text_width(&number, font.size), font.size);
                        (&number, spot(&number).unwrap_or(beside))
                    }
                };
                drawing.text(at.x, at.y + font.size - 1.5, text, font);
                taken.push(at);
            }
        }
        let names = fold(&below.join(" · "), Font::SMALL.size, drawing.width - 2.0 * MARGIN);
        let bottom = if names.is_empty() { bottom } else { drawing.lines(MARGIN, bottom, &names, Font::SMALL) + 4.0 };
        let description =
            format!("Scatter plot of {} points: {} against {}.", dots().count(), self.y_label, self.x_label);
        finish(drawing, bottom, &self.note, &self.title, &description)
    }
}

/// The first free place for a label around its point.
fn free_spot((x, y): (f64, f64), width: f64, height: f64, frame: Area, taken: &[Area]) -> Option<Area> {
    let spots = [
        (x + 8.0, y - height / 2.0),
        (x - 8.0 - width, y - height / 2.0),
        (x + 5.0, y - 5.0 - height),
        (x + 5.0, y + 5.0),
        (x - 5.0 - width, y - 5.0 - height),
        (x - 5.0 - width, y + 5.0),
        (x - width / 2.0, y - 8.0 - height),
        (x - width / 2.0, y + 8.0),
    ];
    spots.into_iter().map(|(x, y)| Area::new(x, y, width, height)).find(|spot| {
        let inside = spot.x >= frame.x
            && spot.x + spot.width <= frame.x + frame.width
            && spot.y >= frame.y
            && spot.y + spot.height <= frame.y + frame.height;
        let overlaps = |other: &Area| {
            spot.x < other.x + other.width
                && other.x < spot.x + spot.width
                && spot.y < other.y + other.height
                && other.y < spot.y + spot.height
        };
        inside && !taken.iter().any(overlaps)
    })
}
