//! Scatter charts: named points in groups.

use super::{Key, LegendItem, MARGIN, foot, head};
use crate::report::axis::{Axis, range_of};
use crate::report::format;
use crate::report::palette::Tone;
use crate::report::svg::{Anchor, Area, Drawing, Font, HALF_WIDTH, Marker, clip, text_width};

const HEIGHT: f64 = 260.0;
/// With more points than this only tooltips name them.
const LABELLED_POINTS: usize = 40;

/// One point.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Dot {
    /// Its name.
    pub name: String,
    /// Along.
    pub x: f64,
    /// Up.
    pub y: f64,
    /// Ends of the interval of y, if it has one.
    pub interval: Option<(f64, f64)>,
}

/// Points of one colour.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct DotGroup {
    /// Its name in the legend.
    pub name: String,
    /// Its colour.
    pub tone: Tone,
    /// Points.
    pub dots: Vec<Dot>,
}

/// A scatter chart.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Scatter {
    /// Title.
    pub title: String,
    /// What x is, with its unit.
    pub x_label: String,
    /// What y is, with its unit.
    pub y_label: String,
    /// Groups.
    pub groups: Vec<DotGroup>,
    /// Ends that the y axis must at least reach.
    pub y_at_least: Option<(f64, f64)>,
    /// Set under the chart.
    pub note: String,
}

impl Scatter {
    /// The chart as a self-contained SVG document.
    pub fn svg(&self) -> String {
        let mut drawing = Drawing::new(HALF_WIDTH);
        let legend: Vec<LegendItem<'_>> = self
            .groups
            .iter()
            .enumerate()
            .map(|(i, g)| LegendItem { name: &g.name, tone: g.tone, key: Key::Marker(Marker::of(i)) })
            .collect();
        let mut top = head(&mut drawing, &self.title, &legend);
        drawing.text(
            MARGIN,
            top + 12.0,
            &clip(&self.y_label, Font::SMALL.size, HALF_WIDTH - 2.0 * MARGIN),
            Font::SMALL,
        );
        top += 26.0;
        let bottom = top + HEIGHT;

        let dots = || self.groups.iter().flat_map(|g| &g.dots);
        let ys = dots().flat_map(|d| {
            let (low, high) = d.interval.unwrap_or((d.y, d.y));
            [d.y, low, high]
        });
        let ends = self.y_at_least.into_iter().flat_map(|(low, high)| [low, high]);
        let y_axis = Axis::nice(range_of(ys.chain(ends)).unwrap_or((0.0, 1.0)), 5, (bottom, top));
        let labels = y_axis.ticks().iter().map(|t| text_width(&y_axis.label(*t), Font::SMALL.size)).fold(0.0, f64::max);
        let (left, right) = (MARGIN + labels + 8.0, drawing.width - MARGIN - 8.0);
        let x_axis = Axis::nice(range_of(dots().map(|d| d.x)).unwrap_or((0.0, 1.0)), 6, (left, right));
        for tick in y_axis.ticks() {
            let y = y_axis.place(tick);
            drawing.line((left, y), (right, y), 1.0, Tone::Line);
            drawing.text(left - 6.0, y + 4.0, &y_axis.label(tick), Font::SMALL.at(Anchor::End));
        }
        for tick in x_axis.ticks() {
            let x = x_axis.place(tick);
            drawing.line((x, top), (x, bottom), 1.0, Tone::Line);
            drawing.text(x, bottom + 17.0, &x_axis.label(tick), Font::SMALL.at(Anchor::Middle));
        }
        let x_label = clip(&self.x_label, Font::SMALL.size, right - left);
        drawing.text((left + right) / 2.0, bottom + 34.0, &x_label, Font::SMALL.at(Anchor::Middle));

        let visible = |d: &&Dot| d.x.is_finite() && d.y.is_finite();
        // Labels keep clear of every marker, of every interval and of each other.
        let mut taken: Vec<Area> = Vec::new();
        for dot in dots().filter(visible) {
            let (x, y) = (x_axis.place(dot.x), y_axis.place(dot.y));
            taken.push(Area::new(x - 5.0, y - 5.0, 10.0, 10.0));
            if let Some((low, high)) = dot.interval.filter(|(l, h)| l.is_finite() && h.is_finite()) {
                let (a, b) = (y_axis.place(low), y_axis.place(high));
                taken.push(Area::new(x - 1.0, a.min(b), 2.0, (a - b).abs()));
            }
        }
        for (i, group) in self.groups.iter().enumerate() {
            for dot in group.dots.iter().filter(visible) {
                let (x, y) = (x_axis.place(dot.x), y_axis.place(dot.y));
                let mut tooltip =
                    format!("{}: {}, {}", dot.name, format::significant(dot.x, 4), format::significant(dot.y, 4));
                if let Some((low, high)) = dot.interval.filter(|(l, h)| l.is_finite() && h.is_finite()) {
                    drawing.line((x, y_axis.place(low)), (x, y_axis.place(high)), 1.2, group.tone);
                    tooltip += &format!(" ({}–{})", format::significant(low, 4), format::significant(high, 4));
                }
                drawing.marker((x, y), Marker::of(i), group.tone, &tooltip);
            }
        }
        if dots().count() <= LABELLED_POINTS {
            let font = Font { size: 10.5, ..Font::SMALL };
            let frame = Area::new(left, top, right - left, bottom - top);
            for dot in dots().filter(visible) {
                let name = clip(&dot.name, font.size, 130.0);
                let at = (x_axis.place(dot.x), y_axis.place(dot.y));
                if let Some(spot) = free_spot(at, text_width(&name, font.size), font.size, frame, &taken) {
                    drawing.text(spot.x, spot.y + font.size - 1.5, &name, font);
                    taken.push(spot);
                }
            }
        }
        drawing.height = foot(&mut drawing, bottom + 42.0, &self.note);
        let description =
            format!("Scatter chart of {} points: {} against {}.", dots().count(), self.y_label, self.x_label);
        drawing.finish(&self.title, &description)
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
