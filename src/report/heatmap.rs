//! Heat maps: layers × modules, as SVG and as PNG.

use super::axis::{Axis, range_of};
use super::format;
use super::palette::{Ramp, Rgb, Tone};
use super::raster;
use super::svg::{Anchor, Area, Drawing, FULL_WIDTH, Font, HALF_WIDTH, clip, px, text_width, wrap};
use crate::error::Result;
use std::fmt::Write as _;

const MARGIN: f64 = 12.0;
const LEGEND_WIDTH: f64 = 180.0;
/// More columns than this take the whole width of a page.
const HALF_WIDTH_COLUMNS: usize = 16;
/// An outlier is more than this many times the 95th percentile; a scale that followed it would flatten the rest.
const OUTLIER: f64 = 1.5;

/// How values become colours: a ramp and the range that it spans.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scale {
    /// The colours.
    pub ramp: Ramp,
    /// The value at the low end.
    pub low: f64,
    /// The value at the high end; above it the colour stays.
    pub high: f64,
}

impl Scale {
    /// A range for these values. Sequential: from the least (or 0, if that is close) to the largest, or to the 95th
    /// percentile where single values lie far above it; the drawing says so. Diverging: as far below 0 as above.
    /// Share: 0 to 1.
    pub fn fit(ramp: Ramp, values: &[Option<f64>]) -> Self {
        let mut finite: Vec<f64> = values.iter().flatten().copied().filter(|v| v.is_finite()).collect();
        finite.sort_by(f64::total_cmp);
        let (Some(&least), Some(&largest)) = (finite.first(), finite.last()) else {
            return Self { ramp, low: 0.0, high: 1.0 };
        };
        let capped = |largest: f64, sorted: &[f64]| {
            let at = ((sorted.len() - 1) as f64 * 0.95).ceil() as usize;
            let usual = sorted.get(at).copied().unwrap_or(largest);
            if usual > 0.0 && largest > OUTLIER * usual { usual } else { largest }
        };
        let (low, high) = match ramp {
            Ramp::Share => (0.0, 1.0),
            Ramp::Sequential => {
                let high = capped(largest, &finite);
                (if least > 0.0 && least < 0.3 * high { 0.0 } else { least }, high)
            }
            Ramp::Diverging => {
                let mut sizes: Vec<f64> = finite.iter().map(|v| v.abs()).collect();
                sizes.sort_by(f64::total_cmp);
                let reach = capped(sizes.last().copied().unwrap_or(1.0), &sizes);
                (-reach, reach)
            }
        };
        if high > low { Self { ramp, low, high } } else { Self { ramp, low: low - 0.5, high: high + 0.5 } }
    }

    /// The colour of a value and its opacity.
    pub fn color(&self, value: f64) -> (Rgb, f64) {
        self.ramp.color((value - self.low) / (self.high - self.low))
    }
}

/// A grid of values with named rows and columns.
///
/// `values`, `errors` and `marks` are row by row, `rows.len() × columns.len()` long; what is missing there counts as no
/// value, no error, no mark.
#[derive(Clone, Debug, PartialEq)]
pub struct Heatmap {
    /// Title.
    pub title: String,
    /// What the rows are: `layer`.
    pub row_label: String,
    /// Names of the rows from the top.
    pub rows: Vec<String>,
    /// Names of the columns.
    pub columns: Vec<String>,
    /// Values; `None` and what is not finite are drawn as empty.
    pub values: Vec<Option<f64>>,
    /// Standard errors, shown in tooltips; may be empty.
    pub errors: Vec<Option<f64>>,
    /// Cells to outline, for example those in Mods_Rob; may be empty.
    pub marks: Vec<bool>,
    /// What the outline means, for the legend.
    pub mark_label: String,
    /// Indices of rows that are one cell over all columns (embedding, head); its value is that of the first column.
    pub wide_rows: Vec<usize>,
    /// Colours and range.
    pub scale: Scale,
    /// What the values are, for the legend.
    pub unit: String,
    /// Set under the map.
    pub note: String,
}

impl Heatmap {
    /// Index into `values` of a cell; all cells of a wide row are its first.
    fn index(&self, row: usize, column: usize) -> usize {
        row * self.columns.len() + if self.wide_rows.contains(&row) { 0 } else { column }
    }

    pub(super) fn value(&self, row: usize, column: usize) -> Option<f64> {
        self.values.get(self.index(row, column)).copied().flatten().filter(|v| v.is_finite())
    }

    pub(super) fn marked(&self, row: usize, column: usize) -> bool {
        self.marks.get(self.index(row, column)).copied().unwrap_or(false)
    }

    /// Whether a row's name is drawn where there is room for every `every`-th alone: counted from the first narrow row.
    pub(super) fn named(&self, row: usize, every: usize) -> bool {
        let first = (0..row).find(|r| !self.wide_rows.contains(r)).unwrap_or(row);
        self.wide_rows.contains(&row) || (row - first).is_multiple_of(every)
    }

    /// Whether a wide row borders on a narrow one here, which are kept apart.
    pub(super) fn parted(&self, row: usize) -> bool {
        row > 0 && (self.wide_rows.contains(&row) || self.wide_rows.contains(&(row - 1)))
    }

    /// Cells as first column and how many columns they span, for one row.
    pub(super) fn spans(&self, row: usize) -> Vec<(usize, usize)> {
        let columns = self.columns.len();
        if self.wide_rows.contains(&row) { vec![(0, columns)] } else { (0..columns).map(|c| (c, 1)).collect() }
    }

    /// Borders between marked and unmarked cells as grid points (column, row) → (column, row).
    pub(super) fn outline(&self) -> Vec<((usize, usize), (usize, usize))> {
        let (rows, columns) = (self.rows.len(), self.columns.len());
        let inside = |r: Option<usize>, c: Option<usize>| match (r, c) {
            (Some(r), Some(c)) => r < rows && c < columns && self.marked(r, c),
            _ => false,
        };
        let mut edges = Vec::new();
        for r in 0..rows {
            for c in 0..columns {
                if !self.marked(r, c) {
                    continue;
                }
                if !inside(r.checked_sub(1), Some(c)) {
                    edges.push(((c, r), (c + 1, r)));
                }
                if !inside(Some(r + 1), Some(c)) {
                    edges.push(((c, r + 1), (c + 1, r + 1)));
                }
                if !inside(Some(r), c.checked_sub(1)) {
                    edges.push(((c, r), (c, r + 1)));
                }
                if !inside(Some(r), Some(c + 1)) {
                    edges.push(((c + 1, r), (c + 1, r + 1)));
                }
            }
        }
        edges
    }

    /// Colours of outlines, edge and core: light lines on the dark viridis, dark ones on ramps that are mostly pale.
    pub(super) fn outline_colors(&self) -> (Rgb, Rgb) {
        let (light, dark) = (Tone::Paper.light(), Tone::Ink.light());
        if self.scale.ramp == Ramp::Sequential { (dark, light) } else { (light, dark) }
    }

    /// A line with an edge of the opposite lightness, so that it stands out on every colour. On a ramp that lets the
    /// page shine through it takes the page's tones.
    fn outline_path(&self, drawing: &mut Drawing, path: &str) {
        let (edge, core) = self.outline_colors();
        if self.scale.ramp == Ramp::Share {
            drawing.path(path, 3.6, Tone::Paper);
            drawing.path(path, 1.7, Tone::Ink);
        } else {
            drawing.fixed_path(path, 3.6, edge);
            drawing.fixed_path(path, 1.7, core);
        }
    }

    /// Whether the values are a set (only 0 and 1), whose legend is two names and not a scale.
    pub(super) fn is_set(&self) -> bool {
        self.scale.ramp == Ramp::Share && self.values.iter().flatten().all(|v| *v == 0.0 || *v == 1.0)
    }

    /// Whether any cell has no value.
    pub(super) fn has_gaps(&self) -> bool {
        (0..self.rows.len()).any(|r| self.spans(r).into_iter().any(|(c, _)| self.value(r, c).is_none()))
    }

    /// What the legend says about values outside its range; empty if there is none.
    pub(super) fn beyond(&self) -> String {
        let Some((least, largest)) = range_of(self.values.iter().flatten().copied()) else { return String::new() };
        let (number, scale) = (|v| format::significant(v, 3), self.scale);
        match (least < scale.low, largest > scale.high) {
            (false, false) => String::new(),
            (false, true) => {
                format!("Colours end at {}; the largest value is {}.", number(scale.high), number(largest))
            }
            (true, false) => format!("Colours end at {}; the least value is {}.", number(scale.low), number(least)),
            (true, true) => format!(
                "Colours end at {} and {}; values reach from {} to {}.",
                number(scale.low),
                number(scale.high),
                number(least),
                number(largest)
            ),
        }
    }

    /// Ticks of the legend as share of its width and text.
    pub(super) fn ticks(&self) -> Vec<(f64, String)> {
        let ticks = if self.scale.ramp == Ramp::Share { 2 } else { 4 };
        let axis = Axis::exact((self.scale.low, self.scale.high), ticks, false, (0.0, 1.0));
        axis.ticks().into_iter().map(|t| (axis.place(t), axis.label(t))).collect()
    }

    /// The map as a self-contained SVG document: values as tooltips, marks as outlines, a legend with ticks.
    pub fn svg(&self) -> String {
        let width = if self.columns.len() > HALF_WIDTH_COLUMNS { FULL_WIDTH } else { HALF_WIDTH };
        let mut drawing = Drawing::new(width);
        let room = width - 2.0 * MARGIN;
        let mut top = MARGIN;
        if !self.title.is_empty() {
            top = drawing.lines(MARGIN, top, &wrap(&self.title, Font::TITLE.size, room, 2), Font::TITLE) + 4.0;
        }
        top = self.legend(&mut drawing, top);

        let size = Font::SMALL.size;
        let names = self.rows.iter().chain([&self.row_label]).map(|r| text_width(r, size)).fold(0.0, f64::max);
        let names = names.min(width * 0.3);
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
        let every = (13.0 / cell_height).ceil() as usize;
        // Upper edges of the rows and the lower edge of the last; a wide row always has room for its name.
        let mut edges = vec![top];
        for row in 0..self.rows.len() {
            top += if self.wide_rows.contains(&row) { cell_height.max(14.0) } else { cell_height };
            edges.push(top);
        }
        for ((row, name), edge) in self.rows.iter().enumerate().zip(edges.windows(2)) {
            let (y, height) = (edge[0], edge[1] - edge[0]);
            if self.named(row, every) {
                let middle = y + height / 2.0 + 4.0;
                drawing.text(left - 8.0, middle, &clip(name, size, names), Font::SMALL.at(Anchor::End));
            }
            for (column, span) in self.spans(row) {
                let x = left + cell_width * column as f64;
                let tooltip = self.tooltip(row, column, span);
                let whole = Area::new(x, y, cell_width * span as f64, height);
                let apart = Area::new(x + 0.4, y + 0.4, whole.width - 0.8, whole.height - 0.8);
                match self.value(row, column) {
                    // Cells of a set are things of their own, those of a scale make up one surface.
                    Some(value) if self.scale.ramp == Ramp::Share => {
                        drawing.swatch(apart, self.scale.color(value), &tooltip);
                    }
                    Some(value) => drawing.tile(whole, self.scale.color(value), &tooltip),
                    None => gap(&mut drawing, apart, &tooltip),
                }
            }
        }
        for (_, y) in edges.iter().enumerate().filter(|(row, _)| *row < self.rows.len() && self.parted(*row)) {
            drawing.line((left, *y), (width - MARGIN, *y), 2.0, Tone::Paper);
        }
        let mut path = String::new();
        for ((c0, r0), (c1, r1)) in self.outline() {
            let at = |c: usize, r: usize| (px(left + cell_width * c as f64), px(edges.get(r).copied().unwrap_or(top)));
            let ((x0, y0), (x1, y1)) = (at(c0, r0), at(c1, r1));
            let _ = write!(path, "M{x0} {y0}L{x1} {y1}");
        }
        if !path.is_empty() {
            self.outline_path(&mut drawing, &path);
        }
        let note = wrap(&self.note, Font::SMALL.size, room, 4);
        drawing.height = drawing.lines(MARGIN, top + 6.0, &note, Font::SMALL) + MARGIN;
        drawing.finish(&self.title, &self.description())
    }

    fn legend(&self, drawing: &mut Drawing, top: f64) -> f64 {
        let room = drawing.width - 2.0 * MARGIN;
        let mut y = top;
        let mut x = MARGIN;
        if self.is_set() {
            for (name, value) in [(self.unit.as_str(), 1.0), ("not in it", 0.0)] {
                drawing.swatch(Area::new(x, y + 3.0, 22.0, 11.0), self.scale.color(value), "");
                let name = clip(name, Font::LABEL.size, room * 0.6);
                drawing.text(x + 28.0, y + 13.0, &name, Font::LABEL);
                x += 28.0 + text_width(&name, Font::LABEL.size) + 14.0;
            }
            return self.legend_symbols(drawing, x, y).max(y + 17.0) + 8.0;
        }
        y = drawing.lines(x, y, &wrap(&self.unit, Font::SMALL.size, room, 2), Font::SMALL) + 3.0;
        let steps = 60;
        for i in 0..steps {
            let t = (f64::from(i) + 0.5) / f64::from(steps);
            let step = LEGEND_WIDTH / f64::from(steps);
            drawing.tile(Area::new(x + step * f64::from(i), y, step, 11.0), self.scale.ramp.color(t), "");
        }
        for (share, label) in self.ticks() {
            let at = x + LEGEND_WIDTH * share;
            drawing.line((at, y + 11.0), (at, y + 15.0), 1.0, Tone::Muted);
            let anchor = if share < 0.04 { Anchor::Start } else { Anchor::Middle };
            drawing.text(if share < 0.04 { x } else { at }, y + 26.0, &label, Font::SMALL.at(anchor));
        }
        x += LEGEND_WIDTH + 24.0;
        y = self.legend_symbols(drawing, x, y - 2.0).max(y + 32.0);
        let beyond = wrap(&self.beyond(), Font::SMALL.size, room, 2);
        drawing.lines(MARGIN, y, &beyond, Font::SMALL) + 6.0
    }

    /// What outlines and empty cells mean; returns the bottom.
    fn legend_symbols(&self, drawing: &mut Drawing, x: f64, mut y: f64) -> f64 {
        let room = drawing.width - MARGIN - x - 28.0;
        if self.marks.contains(&true) && !self.mark_label.is_empty() {
            let (x0, y0, x1, y1) = (px(x + 1.5), px(y + 4.0), px(x + 20.5), px(y + 13.0));
            let middle = self.scale.ramp.color(0.5);
            drawing.swatch(Area::new(x + 1.5, y + 4.0, 19.0, 9.0), middle, "");
            let path = format!("M{x0} {y0}L{x1} {y0}L{x1} {y1}L{x0} {y1}Z");
            self.outline_path(drawing, &path);
            drawing.text(x + 28.0, y + 13.0, &clip(&self.mark_label, Font::LABEL.size, room), Font::LABEL);
            y += 17.0;
        }
        if self.has_gaps() {
            gap(drawing, Area::new(x + 0.5, y + 3.0, 21.0, 11.0), "");
            drawing.text(x + 28.0, y + 13.0, "no value", Font::LABEL);
            y += 17.0;
        }
        y
    }

    fn tooltip(&self, row: usize, column: usize, span: usize) -> String {
        let row_name = self.rows.get(row).map_or("", String::as_str);
        let column_name = self.columns.get(column).map_or("", String::as_str);
        let place = if span > 1 || self.wide_rows.contains(&row) {
            row_name.to_owned()
        } else {
            format!("{} {row_name}, {column_name}", self.row_label)
        };
        let error = self.errors.get(self.index(row, column)).copied().flatten();
        let value = match self.value(row, column) {
            None => "no value".to_owned(),
            Some(v) if self.is_set() => if v == 1.0 { "in the set" } else { "not in the set" }.to_owned(),
            Some(v) => format::plus_minus(v, error.unwrap_or(f64::NAN)),
        };
        let mark = if self.marked(row, column) && !self.mark_label.is_empty() {
            format!(" · {}", self.mark_label)
        } else {
            String::new()
        };
        format!("{place}: {value}{mark}")
    }

    fn description(&self) -> String {
        let mut text =
            format!("Heat map of {} rows by {} columns. {}.", self.rows.len(), self.columns.len(), self.unit);
        let mut cells: Vec<(f64, String)> = Vec::new();
        for row in 0..self.rows.len() {
            for (column, span) in self.spans(row) {
                if let Some(value) = self.value(row, column) {
                    cells.push((value, self.tooltip(row, column, span)));
                }
            }
        }
        cells.sort_by(|a, b| a.0.total_cmp(&b.0));
        if let (Some(least), Some(largest), false) = (cells.first(), cells.last(), self.is_set()) {
            let _ = write!(text, " Least: {}. Largest: {}.", least.1, largest.1);
        }
        text
    }

    /// The map as PNG bytes, drawn with a bitmap font magnified `magnification` times (1–8); 2 suits most uses.
    ///
    /// # Errors
    /// [`crate::error::Error::Input`] where the picture would be larger than 64 million pixels.
    pub fn png(&self, magnification: usize) -> Result<Vec<u8>> {
        raster::heatmap(self, magnification.clamp(1, 8))
    }

    /// Width and height in pixels of what [`Heatmap::png`] gives.
    pub fn png_size(&self, magnification: usize) -> (usize, usize) {
        raster::size(self, magnification.clamp(1, 8))
    }
}

/// A cell without a value: empty, with a stroke through it.
fn gap(drawing: &mut Drawing, area: Area, tooltip: &str) {
    drawing.rect(area, 0.0, Tone::Line, tooltip);
    let (x, y) = (area.x + area.width / 2.0, area.y + area.height / 2.0);
    drawing.line((x - 4.0, y), (x + 4.0, y), 1.2, Tone::Muted);
}
