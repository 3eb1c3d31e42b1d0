//! Heat maps of layers × modules as SVG.

use super::axis::{Axis, range_of};
use super::chart::{MARGIN, draw_header, finish};
use super::format;
use super::palette::{Ramp, Tone};
use super::svg::{Anchor, Area, Drawing, FULL_WIDTH, Font, HALF_WIDTH, clip, px, text_width, wrap};
use std::fmt::Write as _;

const LEGEND_WIDTH: f64 = 180.0;
/// More columns than this take the whole width of a page.
const HALF_WIDTH_COLUMNS: usize = 16;
/// An outlier is more than this many times the 95th percentile; a scale that followed it would flatten the rest.
const OUTLIER: f64 = 1.5;

/// A grid of values as colours, with the values as tooltips, marked cells outlined, and a legend.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Heatmap {
    /// Above the legend; may be empty.
    pub title: String,
    /// Name of the row axis: `layer`.
    pub row_label: String,
    /// Names of the columns.
    pub columns: Vec<String>,
    /// From top to bottom.
    pub rows: Vec<Row>,
    /// Colour scale.
    pub ramp: Ramp,
    /// Quantity of the values, for the legend.
    pub unit: String,
    /// What the tiles are that are coloured apart, for the legend.
    pub apart_label: String,
    /// Meaning of the outline, for the legend.
    pub mark_label: String,
    /// Below the map; may be empty.
    pub note: String,
}

/// A row of cells.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Row {
    /// Left of the row.
    pub name: String,
    /// One per column, or a single one that spans all columns.
    pub tiles: Vec<Tile>,
}

/// A cell.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Tile {
    /// Drawn as a gap if `None` or not finite.
    pub value: Option<f64>,
    /// Standard error of the value.
    pub error: Option<f64>,
    /// Whether it is outlined.
    pub marked: bool,
    /// Whether it is coloured on the second scale.
    pub apart: bool,
}

impl Row {
    fn tile(&self, column: usize) -> Tile {
        let tile = self.tiles.get(if self.spans() { 0 } else { column }).copied().unwrap_or_default();
        Tile { value: tile.value.filter(|v| v.is_finite()), ..tile }
    }

    fn spans(&self) -> bool {
        self.tiles.len() == 1
    }
}

/// Range of values that the ramp spans.
#[derive(Clone, Copy)]
struct Scale {
    low: f64,
    high: f64,
}

impl Scale {
    /// Share: 0 to 1. Sequential: from the least value (or 0, if that is close) to the largest, or to the 95th
    /// percentile where single values lie far above it; the legend says so.
    fn fit(ramp: Ramp, mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        let (Some(&least), Some(&largest), Ramp::Sequential) = (values.first(), values.last(), ramp) else {
            return Self { low: 0.0, high: 1.0 };
        };
        let usual = values[((values.len() - 1) as f64 * 0.95).ceil() as usize];
        let high = if usual > 0.0 && largest > OUTLIER * usual { usual } else { largest };
        let low = if least > 0.0 && least < 0.3 * high { 0.0 } else { least };
        if high > low { Self { low, high } } else { Self { low: low - 0.5, high: high + 0.5 } }
    }

    fn share(self, value: f64) -> f64 {
        (value - self.low) / (self.high - self.low)
    }
}

impl Heatmap {
    /// The map as a self-contained SVG document.
    pub fn svg(&self) -> String {
        let scales = [false, true].map(|apart| Scale::fit(self.ramp, self.values(apart).collect()));
        let width = if self.columns.len() > HALF_WIDTH_COLUMNS { FULL_WIDTH } else { HALF_WIDTH };
        let mut drawing = Drawing::new(width);
        let mut top = draw_header(&mut drawing, &self.title, &[]);
        top = self.legend(&mut drawing, scales, top);

        let size = Font::SMALL.size;
        let names = self.rows.iter().map(|r| &r.name).chain([&self.row_label]);
        let names = names.map(|name| text_width(name, size)).fold(0.0, f64::max).min(width * 0.3);
        let left = MARGIN + names + 8.0;
        let cell_width = (width - MARGIN - left) / self.columns.len().max(1) as f64;
        let cell_height: f64 = match self.rows.len() {
            0..=14 => 20.0,
            15..=48 => 15.0,
            _ => 10.0,
        };
        drawing.text(left - 8.0, top + 12.0, &clip(&self.row_label, size, names), Font::SMALL.at(Anchor::End));
        for (column, name) in self.columns.iter().enumerate() {
            let middle = left + cell_width * (column as f64 + 0.5);
            let name = clip(name, Font::LABEL.size, cell_width - 1.0);
            drawing.text(middle, top + 12.0, &name, Font::LABEL.at(Anchor::Middle));
        }
        top += 19.0;
        // Upper edges of the rows and the lower edge of the last; a row of one tile always has room for its name.
        let mut edges = vec![top];
        for row in &self.rows {
            top += if row.spans() { cell_height.max(14.0) } else { cell_height };
            edges.push(top);
        }
        let every = (13.0 / cell_height).ceil() as usize;
        let first = self.rows.iter().position(|row| !row.spans()).unwrap_or(0);
        for (i, row) in self.rows.iter().enumerate() {
            let (y, height) = (edges[i], edges[i + 1] - edges[i]);
            if row.spans() || (i - first.min(i)).is_multiple_of(every) {
                let name = clip(&row.name, size, names);
                drawing.text(left - 8.0, y + height / 2.0 + 4.0, &name, Font::SMALL.at(Anchor::End));
            }
            for (column, span) in self.spans(row) {
                let whole = Area::new(left + cell_width * column as f64, y, cell_width * span as f64, height);
                let apart = Area::new(whole.x + 0.4, y + 0.4, whole.width - 0.8, height - 0.8);
                let tooltip = self.tooltip(row, column);
                let own = row.tile(column);
                let scale = scales[usize::from(own.apart)];
                let color = own.value.map(|value| self.ramp.color(scale.share(value)));
                match (color, self.ramp) {
                    // Cells of a set stand apart, those of a scale make up one surface.
                    (Some(color), Ramp::Share) => drawing.swatch(apart, color, &tooltip),
                    (Some(color), Ramp::Sequential) => drawing.tile(whole, color, &tooltip),
                    (None, _) => gap(&mut drawing, apart, &tooltip),
                }
            }
        }
        for (pair, y) in self.rows.windows(2).zip(&edges[1..]) {
            if pair[0].spans() || pair[1].spans() {
                drawing.line((left, *y), (width - MARGIN, *y), 2.0, Tone::Paper);
            }
        }
        let mut path = String::new();
        for ((c0, r0), (c1, r1)) in self.outline() {
            let at = |c: usize, r: usize| (px(left + cell_width * c as f64), px(edges[r]));
            let ((x0, y0), (x1, y1)) = (at(c0, r0), at(c1, r1));
            let _ = write!(path, "M{x0} {y0}L{x1} {y1}");
        }
        if !path.is_empty() {
            self.outline_path(&mut drawing, &path);
        }
        finish(drawing, top + 6.0, &self.note, &self.title, &self.description())
    }

    /// Tiles as first column and number of columns.
    fn spans(&self, row: &Row) -> Vec<(usize, usize)> {
        let columns = self.columns.len();
        if row.spans() { vec![(0, columns)] } else { (0..columns).map(|c| (c, 1)).collect() }
    }

    fn tiles(&self) -> impl Iterator<Item = (&Row, usize)> {
        self.rows.iter().flat_map(|row| self.spans(row).into_iter().map(move |(column, _)| (row, column)))
    }

    /// Values on the first scale, or on the second. A tile that spans all columns counts once per column, as it fills that
    /// much of the map.
    fn values(&self, apart: bool) -> impl Iterator<Item = f64> {
        let tiles = self.rows.iter().flat_map(|row| (0..self.columns.len()).map(|column| row.tile(column)));
        tiles.filter(move |tile| tile.apart == apart).filter_map(|tile| tile.value)
    }

    /// Whether the values are a set (only 0 and 1), whose legend has two names instead of a scale.
    fn is_set(&self) -> bool {
        self.ramp == Ramp::Share
            && [false, true].into_iter().flat_map(|apart| self.values(apart)).all(|v| v == 0.0 || v == 1.0)
    }

    /// Borders between marked and unmarked cells as grid points (column, row) → (column, row).
    fn outline(&self) -> Vec<((usize, usize), (usize, usize))> {
        let columns = self.columns.len();
        let marked = |r: Option<usize>, c: Option<usize>| {
            let row = r.and_then(|r| self.rows.get(r));
            row.zip(c).is_some_and(|(row, c)| c < columns && row.tile(c).marked)
        };
        let mut edges = Vec::new();
        for r in 0..self.rows.len() {
            for c in (0..columns).filter(|c| marked(Some(r), Some(*c))) {
                let borders = [
                    (r.checked_sub(1), Some(c), (c, r), (c + 1, r)),
                    (Some(r + 1), Some(c), (c, r + 1), (c + 1, r + 1)),
                    (Some(r), c.checked_sub(1), (c, r), (c, r + 1)),
                    (Some(r), Some(c + 1), (c + 1, r), (c + 1, r + 1)),
                ];
                let outer = borders.into_iter().filter(|(row, column, ..)| !marked(*row, *column));
                edges.extend(outer.map(|(.., from, to)| (from, to)));
            }
        }
        edges
    }

    /// Draws an outline with an edge of the opposite lightness, visible on every colour: light on viridis, in the
    /// page's tones on the translucent ramp.
    fn outline_path(&self, drawing: &mut Drawing, path: &str) {
        if self.ramp == Ramp::Share {
            drawing.path(path, 3.6, Tone::Paper);
            drawing.path(path, 1.7, Tone::Ink);
        } else {
            drawing.fixed_path(path, 3.6, Tone::Ink.light());
            drawing.fixed_path(path, 1.7, Tone::Paper.light());
        }
    }

    /// Note on values outside of the colour scales; empty if there are none.
    fn beyond(&self, scales: [Scale; 2]) -> String {
        let number = |v| format::significant(v, 3);
        let note = |(apart, scale): (bool, Scale)| match range_of(self.values(apart)) {
            Some((_, largest)) if largest > scale.high => {
                let scale_of = if apart { format!("scale of {}", self.apart_label) } else { "colour scale".to_owned() };
                let (end, largest) = (number(scale.high), number(largest));
                Some(format!("The {scale_of} ends at {end}; the largest value is {largest}."))
            }
            _ => None,
        };
        let notes: Vec<String> = [false, true].into_iter().zip(scales).filter_map(note).collect();
        notes.join(" ")
    }

    /// Returns the bottom.
    fn legend(&self, drawing: &mut Drawing, scales: [Scale; 2], top: f64) -> f64 {
        let room = drawing.width - 2.0 * MARGIN;
        let mut y = top;
        let mut x = MARGIN;
        if self.is_set() {
            for (name, value) in [(self.unit.as_str(), 1.0), ("not in the set", 0.0)] {
                drawing.swatch(Area::new(x, y + 3.0, 22.0, 11.0), self.ramp.color(value), "");
                let name = clip(name, Font::LABEL.size, room * 0.6);
                drawing.text(x + 28.0, y + 13.0, &name, Font::LABEL);
                x += 28.0 + text_width(&name, Font::LABEL.size) + 14.0;
            }
            return self.legend_symbols(drawing, x, y).max(y + 17.0) + 8.0;
        }
        y = drawing.lines(x, y, &wrap(&self.unit, Font::SMALL.size, room, 2), Font::SMALL) + 3.0;
        self.scale_bar(drawing, scales[0], y);
        x += LEGEND_WIDTH + 24.0;
        y = self.legend_symbols(drawing, x, y - 2.0).max(y + 32.0);
        if self.values(true).next().is_some() {
            let name = wrap(&format!("{}, on a scale of their own", self.apart_label), Font::SMALL.size, room, 2);
            y = drawing.lines(MARGIN, y + 2.0, &name, Font::SMALL) + 3.0;
            self.scale_bar(drawing, scales[1], y);
            y += 32.0;
        }
        let beyond = wrap(&self.beyond(scales), Font::SMALL.size, room, 3);
        drawing.lines(MARGIN, y, &beyond, Font::SMALL) + 6.0
    }

    /// The colours of a scale, with its values below them.
    fn scale_bar(&self, drawing: &mut Drawing, scale: Scale, y: f64) {
        let (x, steps) = (MARGIN, 60);
        let step = LEGEND_WIDTH / f64::from(steps);
        for i in 0..steps {
            let color = self.ramp.color((f64::from(i) + 0.5) / f64::from(steps));
            drawing.tile(Area::new(x + step * f64::from(i), y, step, 11.0), color, "");
        }
        let ticks = if self.ramp == Ramp::Share { 2 } else { 4 };
        let axis = Axis::exact((scale.low, scale.high), ticks, 0.0, (x, x + LEGEND_WIDTH));
        for tick in axis.ticks() {
            let at = axis.place(tick);
            drawing.line((at, y + 11.0), (at, y + 15.0), 1.0, Tone::Muted);
            // The label of the low end would run out of the drawing.
            let (at, anchor) = if at < x + 0.04 * LEGEND_WIDTH { (x, Anchor::Start) } else { (at, Anchor::Middle) };
            drawing.text(at, y + 26.0, &axis.label(tick), Font::SMALL.at(anchor));
        }
    }

    /// Legend of outlines and empty cells; returns the bottom.
    fn legend_symbols(&self, drawing: &mut Drawing, x: f64, mut y: f64) -> f64 {
        let room = drawing.width - MARGIN - x - 28.0;
        if !self.mark_label.is_empty() && self.tiles().any(|(row, column)| row.tile(column).marked) {
            let (x0, y0, x1, y1) = (px(x + 1.5), px(y + 4.0), px(x + 20.5), px(y + 13.0));
            drawing.swatch(Area::new(x + 1.5, y + 4.0, 19.0, 9.0), self.ramp.color(0.5), "");
            self.outline_path(drawing, &format!("M{x0} {y0}L{x1} {y0}L{x1} {y1}L{x0} {y1}Z"));
            drawing.text(x + 28.0, y + 13.0, &clip(&self.mark_label, Font::LABEL.size, room), Font::LABEL);
            y += 17.0;
        }
        if self.tiles().any(|(row, column)| row.tile(column).value.is_none()) {
            gap(drawing, Area::new(x + 0.5, y + 3.0, 21.0, 11.0), "");
            drawing.text(x + 28.0, y + 13.0, "no value", Font::LABEL);
            y += 17.0;
        }
        y
    }

    fn tooltip(&self, row: &Row, column: usize) -> String {
        let place = if row.spans() {
            row.name.clone()
        } else {
            format!("{} {}, {}", self.row_label, row.name, self.columns.get(column).map_or("", String::as_str))
        };
        let tile = row.tile(column);
        let value = match tile.value {
            None => "no value".to_owned(),
            Some(v) if self.is_set() => if v == 1.0 { "in the set" } else { "not in the set" }.to_owned(),
            Some(v) => format::plus_minus(v, tile.error.unwrap_or(f64::NAN)),
        };
        let mark =
            if tile.marked && !self.mark_label.is_empty() { format!(" · {}", self.mark_label) } else { "".into() };
        format!("{place}: {value}{mark}")
    }

    fn description(&self) -> String {
        let mut text =
            format!("Heat map of {} rows by {} columns. {}.", self.rows.len(), self.columns.len(), self.unit);
        if !self.is_set() {
            let mut cells: Vec<_> =
                self.tiles().filter_map(|(row, column)| Some((row.tile(column).value?, row, column))).collect();
            cells.sort_by(|a, b| a.0.total_cmp(&b.0));
            for (what, cell) in [("Least", cells.first()), ("Largest", cells.last())] {
                if let Some((_, row, column)) = cell {
                    let _ = write!(text, " {what}: {}.", self.tooltip(row, *column));
                }
            }
        }
        text
    }
}

/// A cell without a value: empty, with a stroke through it.
fn gap(drawing: &mut Drawing, area: Area, tooltip: &str) {
    drawing.rect(area, 0.0, Tone::Line, tooltip);
    let (x, y) = (area.x + area.width / 2.0, area.y + area.height / 2.0);
    drawing.line((x - 4.0, y), (x + 4.0, y), 1.2, Tone::Muted);
}
