//! Grouped bars with error bars: horizontal for settings with long names, upright for layers.

use super::{Key, LegendItem, MARGIN, Measure, Plot, draw_header, finish};
use crate::report::axis::{Axis, range_of};
use crate::report::format;
use crate::report::palette::Tone;
use crate::report::svg::{Anchor, Area, Drawing, FULL_WIDTH, Font, HALF_WIDTH, clip, fold, text_width};
use std::fmt::Write as _;

const UPRIGHT_HEIGHT: f64 = 150.0;
/// Thickness of a horizontal bar.
const BAR_THICKNESS: f64 = 11.0;
/// Height of a line of a category's name, in pixels.
const NAME_STEP: f64 = 14.0;
/// Room for the value at the end of a horizontal bar.
const VALUE_WIDTH: f64 = 34.0;

/// The bars of one colour, one per category.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct BarSeries {
    /// In the legend; the same name in two panels is one item there.
    pub name: String,
    /// Colour of the bars.
    pub tone: Tone,
    /// `None` = not measured.
    pub bars: Vec<Option<Measure>>,
}

/// Bars over one value axis. Panels share the categories, the legend and the range.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct BarPanel {
    /// Above the panel; may be empty.
    pub heading: String,
    /// In the order of the bars within a group.
    pub series: Vec<BarSeries>,
}

/// How bars are drawn.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Direction {
    /// Half a page wide; a row per category, values at the ends of the bars.
    #[default]
    Horizontal,
    /// Full width of a page; a column per category, for short names.
    Upright,
}

/// A bar chart with a group of bars per category.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct BarChart {
    /// Above the legend; may be empty.
    pub title: String,
    /// Label of the value axis, with the unit.
    pub value_label: String,
    /// Label of the categories of upright bars.
    pub category_label: String,
    /// Names of the categories.
    pub categories: Vec<String>,
    /// From top to bottom.
    pub panels: Vec<BarPanel>,
    /// Horizontal or upright.
    pub direction: Direction,
    /// The value axis spans at least 0 to this.
    pub at_least: f64,
    /// Below the chart; may be empty.
    pub note: String,
}

impl BarChart {
    /// The chart as a self-contained SVG document.
    pub fn svg(&self) -> String {
        let upright = self.direction == Direction::Upright;
        let mut drawing = Drawing::new(if upright { FULL_WIDTH } else { HALF_WIDTH });
        let mut legend: Vec<LegendItem<'_>> = Vec::new();
        for series in self.panels.iter().flat_map(|p| &p.series) {
            if !legend.iter().any(|item| item.name == series.name) {
                legend.push(LegendItem { name: &series.name, tone: series.tone, key: Key::Bar });
            }
        }
        let mut top = draw_header(&mut drawing, &self.title, &legend);
        for (i, panel) in self.panels.iter().enumerate() {
            if !panel.heading.is_empty() {
                let room = drawing.width - 2.0 * MARGIN;
                let font = Font { bold: true, ..Font::LABEL };
                drawing.text(MARGIN, top + 13.0, &clip(&panel.heading, font.size, room), font);
                top += 20.0;
            }
            let last = i + 1 == self.panels.len();
            let bottom = match self.direction {
                Direction::Horizontal => self.horizontal(&mut drawing, panel, top),
                Direction::Upright => self.upright(&mut drawing, i, top),
            };
            top = if last { bottom } else { bottom + 12.0 };
        }
        finish(drawing, top, &self.note, &self.title, &self.description())
    }

    fn range(&self) -> (f64, f64) {
        let bars = self.panels.iter().flat_map(|p| &p.series).flat_map(|s| s.bars.iter().flatten());
        range_of(bars.flat_map(|bar| bar.extent()).chain([0.0, self.at_least])).unwrap_or((0.0, 1.0))
    }

    fn horizontal(&self, drawing: &mut Drawing, panel: &BarPanel, top: f64) -> f64 {
        let size = Font::LABEL.size;
        let widest = self.categories.iter().map(|c| text_width(c, size)).fold(0.0, f64::max);
        let names = widest.min(drawing.width * 0.36);
        let (left, right) = (MARGIN + names + 8.0, drawing.width - MARGIN - VALUE_WIDTH);
        let axis = Axis::nice(self.range(), 5, (left, right));
        let group = BAR_THICKNESS * panel.series.len().max(1) as f64;
        let folded: Vec<Vec<String>> = self.categories.iter().map(|category| fold(category, size, names)).collect();
        let most = folded.iter().map(Vec::len).max().unwrap_or(1) as f64;
        let pitch = (group + 10.0).max(NAME_STEP * most + 4.0);
        let bottom = top + pitch * self.categories.len() as f64;
        for tick in axis.ticks() {
            let x = axis.place(tick);
            drawing.line((x, top), (x, bottom), 1.0, Tone::Line);
            drawing.text(x, bottom + 15.0, &axis.label(tick), Font::SMALL.at(Anchor::Middle));
        }
        let zero = axis.place(0.0);
        for (row, category) in self.categories.iter().enumerate() {
            let middle = top + pitch * (row as f64 + 0.5);
            let first = middle + 4.0 - NAME_STEP * (folded[row].len() as f64 - 1.0) / 2.0;
            for (i, line) in folded[row].iter().enumerate() {
                drawing.text(left - 8.0, first + NAME_STEP * i as f64, line, Font::LABEL.at(Anchor::End));
            }
            for (i, series) in panel.series.iter().enumerate() {
                let Some(bar) = series.bar(row) else { continue };
                let y = middle - group / 2.0 + BAR_THICKNESS * i as f64;
                let (end, center) = (axis.place(bar.value), y + BAR_THICKNESS / 2.0);
                let area = Area::new(zero.min(end), y + 1.0, (end - zero).abs(), BAR_THICKNESS - 2.0);
                drawing.rect(area, 1.5, series.tone, &tooltip(series, category, bar));
                let mut far = end.max(zero);
                if let Some((low, high)) = bar.bounds() {
                    let (a, b) = (axis.place(low), axis.place(high));
                    drawing.line((a, center), (b, center), 1.2, Tone::Ink);
                    for x in [a, b] {
                        drawing.line((x, center - 2.5), (x, center + 2.5), 1.2, Tone::Ink);
                    }
                    far = far.max(b);
                }
                let font = Font { size: 10.0, ..Font::SMALL };
                drawing.text(far + 5.0, center + 3.6, &format::fixed(bar.value, 1), font);
            }
        }
        drawing.line((zero, top), (zero, bottom), 1.0, Tone::Muted);
        let label = clip(&self.value_label, Font::SMALL.size, right - left);
        drawing.text((left + right) / 2.0, bottom + 31.0, &label, Font::SMALL.at(Anchor::Middle));
        bottom + 40.0
    }

    fn upright(&self, drawing: &mut Drawing, index: usize, top: f64) -> f64 {
        let panel = &self.panels[index];
        let plot = Plot::new(drawing, top, UPRIGHT_HEIGHT, &self.value_label, self.range(), 4);
        let pitch = (plot.right - plot.left) / self.categories.len().max(1) as f64;
        let middle = |column: usize| plot.left + pitch * (column as f64 + 0.5);
        let thickness = (pitch * 0.74 / panel.series.len().max(1) as f64).min(26.0);
        let gap = if thickness > 4.0 { 0.5 } else { 0.0 };
        let zero = plot.y.place(0.0);
        for (column, category) in self.categories.iter().enumerate() {
            let left = middle(column) - thickness * panel.series.len() as f64 / 2.0;
            for (i, series) in panel.series.iter().enumerate() {
                let Some(bar) = series.bar(column) else { continue };
                let (x, end) = (left + thickness * i as f64, plot.y.place(bar.value));
                let area = Area::new(x + gap, zero.min(end), thickness - 2.0 * gap, (end - zero).abs());
                drawing.rect(area, 1.0, series.tone, &tooltip(series, category, bar));
                plot.interval(drawing, x + thickness / 2.0, bar, Tone::Ink);
            }
        }
        drawing.line((plot.left, zero), (plot.right, zero), 1.0, Tone::Muted);
        if index + 1 < self.panels.len() {
            return plot.bottom;
        }
        let size = Font::SMALL.size;
        let widest = self.categories.iter().map(|c| text_width(c, size)).fold(0.0, f64::max);
        let every = ((widest.min(120.0) + 6.0) / pitch).ceil().max(1.0) as usize;
        for (column, category) in self.categories.iter().enumerate().step_by(every) {
            plot.x_tick(drawing, middle(column), &clip(category, size, 120.0));
        }
        plot.x_label(drawing, &self.category_label)
    }

    fn description(&self) -> String {
        let mut text = format!("Bar chart of {}.", self.value_label);
        for panel in &self.panels {
            for series in &panel.series {
                if let Some((low, high)) = range_of(series.bars.iter().flatten().map(|b| b.value)) {
                    let heading = if panel.heading.is_empty() { String::new() } else { format!("{}, ", panel.heading) };
                    let number = |v| format::significant(v, 3);
                    let _ = write!(text, " {heading}{}: {} to {}.", series.name, number(low), number(high));
                }
            }
        }
        text
    }
}

impl BarSeries {
    fn bar(&self, at: usize) -> Option<Measure> {
        self.bars.get(at).copied().flatten().filter(|bar| bar.value.is_finite())
    }
}

fn tooltip(series: &BarSeries, category: &str, bar: Measure) -> String {
    format!("{category}, {}: {}", series.name, bar.text())
}
