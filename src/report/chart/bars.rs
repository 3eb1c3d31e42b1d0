//! Grouped bars with error bars: across the page for settings with long names, upright for layers.

use super::{Key, LegendItem, MARGIN, foot, head};
use crate::report::axis::{Axis, range_of};
use crate::report::format;
use crate::report::palette::Tone;
use crate::report::svg::{Anchor, Area, Drawing, FULL_WIDTH, Font, HALF_WIDTH, clip, text_width};
use std::fmt::Write as _;

const UPRIGHT_HEIGHT: f64 = 150.0;
/// Thickness of a bar that lies.
const LYING_BAR: f64 = 11.0;

/// One bar.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Bar {
    /// Its length.
    pub value: f64,
    /// Ends of its interval, if it has one.
    pub interval: Option<(f64, f64)>,
}

/// The bars of one colour, one a category; `None` where there is none.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct BarSeries {
    /// Its name in the legend.
    pub name: String,
    /// Its colour.
    pub tone: Tone,
    /// One a category.
    pub bars: Vec<Option<Bar>>,
}

/// Bars over one value axis. Panels share the categories, the legend and the range.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct BarPanel {
    /// Set above the panel; empty = nothing.
    pub heading: String,
    /// Series in the order in which their bars stand within a group.
    pub series: Vec<BarSeries>,
}

/// Which way bars grow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Direction {
    /// To the right; categories are rows with their names in front, and values stand behind the bars.
    #[default]
    Lying,
    /// Upwards; categories are columns with short names.
    Upright,
}

/// Grouped bars.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct BarChart {
    /// Title.
    pub title: String,
    /// What the values are, with their unit.
    pub value_label: String,
    /// What the categories are, for upright bars.
    pub category_label: String,
    /// Names of the categories.
    pub categories: Vec<String>,
    /// Panels from the top.
    pub panels: Vec<BarPanel>,
    /// Which way bars grow.
    pub direction: Direction,
    /// The value axis reaches at least this.
    pub at_least: f64,
    /// As wide as the page (else half of it).
    pub wide: bool,
    /// Decimals of the values behind lying bars.
    pub decimals: usize,
    /// Set under the chart.
    pub note: String,
}

impl BarChart {
    /// The chart as a self-contained SVG document.
    pub fn svg(&self) -> String {
        let mut drawing = Drawing::new(if self.wide { FULL_WIDTH } else { HALF_WIDTH });
        let mut legend: Vec<LegendItem<'_>> = Vec::new();
        for series in self.panels.iter().flat_map(|p| &p.series) {
            if !legend.iter().any(|item| item.name == series.name) {
                legend.push(LegendItem { name: &series.name, tone: series.tone, key: Key::Bar });
            }
        }
        let mut top = head(&mut drawing, &self.title, &legend);
        for (i, panel) in self.panels.iter().enumerate() {
            if !panel.heading.is_empty() {
                let room = drawing.width - 2.0 * MARGIN;
                let font = Font { bold: true, ..Font::LABEL };
                drawing.text(MARGIN, top + 13.0, &clip(&panel.heading, font.size, room), font);
                top += 20.0;
            }
            let last = i + 1 == self.panels.len();
            top = match self.direction {
                Direction::Lying => self.lying(&mut drawing, panel, top),
                Direction::Upright => self.upright(&mut drawing, panel, top, last),
            } + if last { 0.0 } else { 12.0 };
        }
        drawing.height = foot(&mut drawing, top + 4.0, &self.note);
        drawing.finish(&self.title, &self.description())
    }

    fn range(&self) -> (f64, f64) {
        let bars = self.panels.iter().flat_map(|p| &p.series).flat_map(|s| s.bars.iter().flatten());
        let values = bars.flat_map(|b| {
            let (low, high) = b.interval.unwrap_or((b.value, b.value));
            [b.value, low, high]
        });
        range_of(values.chain([0.0, self.at_least])).unwrap_or((0.0, 1.0))
    }

    fn lying(&self, drawing: &mut Drawing, panel: &BarPanel, mut top: f64) -> f64 {
        let size = Font::LABEL.size;
        let widest = self.categories.iter().map(|c| text_width(c, size)).fold(0.0, f64::max);
        let names = widest.min(drawing.width * 0.36);
        let left = MARGIN + names + 8.0;
        // Room behind the longest bar for its value.
        let axis = Axis::nice(self.range(), 5, (left, drawing.width - MARGIN - 34.0));
        let group = LYING_BAR * panel.series.len().max(1) as f64;
        let pitch = group + 10.0;
        let bottom = top + pitch * self.categories.len() as f64;
        let ticks = axis.ticks();
        for tick in &ticks {
            let x = axis.place(*tick);
            drawing.line((x, top), (x, bottom), 1.0, Tone::Line);
            drawing.text(x, bottom + 15.0, &axis.label(*tick), Font::SMALL.at(Anchor::Middle));
        }
        for (row, category) in self.categories.iter().enumerate() {
            let middle = top + pitch / 2.0;
            drawing.text(left - 8.0, middle + 4.0, &clip(category, size, names), Font::LABEL.at(Anchor::End));
            let mut y = middle - group / 2.0;
            for series in &panel.series {
                if let Some(bar) = bar_at(series, row) {
                    let (zero, end) = (axis.place(0.0), axis.place(bar.value));
                    let area = Area::new(zero.min(end), y + 1.0, (end - zero).abs(), LYING_BAR - 2.0);
                    drawing.rect(area, 1.5, series.tone, &self.tooltip(series, category, bar));
                    let center = y + LYING_BAR / 2.0;
                    let mut far = end.max(zero);
                    if let Some((low, high)) = finite(bar.interval) {
                        let (a, b) = (axis.place(low), axis.place(high));
                        drawing.line((a, center), (b, center), 1.2, Tone::Ink);
                        for x in [a, b] {
                            drawing.line((x, center - 2.5), (x, center + 2.5), 1.2, Tone::Ink);
                        }
                        far = far.max(b);
                    }
                    let font = Font { size: 10.0, ..Font::SMALL };
                    drawing.text(far + 5.0, center + 3.6, &format::fixed(bar.value, self.decimals), font);
                }
                y += LYING_BAR;
            }
            top += pitch;
        }
        let x = axis.place(0.0);
        drawing.line((x, bottom - pitch * self.categories.len() as f64), (x, bottom), 1.0, Tone::Muted);
        let label = clip(&self.value_label, Font::SMALL.size, drawing.width - left - MARGIN);
        drawing.text(
            (left + drawing.width - MARGIN - 34.0) / 2.0,
            bottom + 31.0,
            &label,
            Font::SMALL.at(Anchor::Middle),
        );
        bottom + 36.0
    }

    fn upright(&self, drawing: &mut Drawing, panel: &BarPanel, mut top: f64, last: bool) -> f64 {
        let size = Font::SMALL.size;
        drawing.text(MARGIN, top + 12.0, &clip(&self.value_label, size, drawing.width - 2.0 * MARGIN), Font::SMALL);
        top += 26.0;
        let bottom = top + UPRIGHT_HEIGHT;
        let axis = Axis::nice(self.range(), 4, (bottom, top));
        let ticks = axis.ticks();
        let labels = ticks.iter().map(|t| text_width(&axis.label(*t), size)).fold(0.0, f64::max);
        let (left, right) = (MARGIN + labels + 8.0, drawing.width - MARGIN);
        for tick in &ticks {
            let y = axis.place(*tick);
            drawing.line((left, y), (right, y), 1.0, Tone::Line);
            drawing.text(left - 6.0, y + 4.0, &axis.label(*tick), Font::SMALL.at(Anchor::End));
        }
        let pitch = (right - left) / self.categories.len().max(1) as f64;
        let thickness = (pitch * 0.74 / panel.series.len().max(1) as f64).min(26.0);
        let group = thickness * panel.series.len() as f64;
        for (column, category) in self.categories.iter().enumerate() {
            let middle = left + pitch * (column as f64 + 0.5);
            let mut x = middle - group / 2.0;
            for series in &panel.series {
                if let Some(bar) = bar_at(series, column) {
                    let (zero, end) = (axis.place(0.0), axis.place(bar.value));
                    let gap = if thickness > 4.0 { 0.5 } else { 0.0 };
                    let area = Area::new(x + gap, zero.min(end), thickness - 2.0 * gap, (end - zero).abs());
                    drawing.rect(area, 1.0, series.tone, &self.tooltip(series, category, bar));
                    if let Some((low, high)) = finite(bar.interval) {
                        let center = x + thickness / 2.0;
                        drawing.line((center, axis.place(low)), (center, axis.place(high)), 1.2, Tone::Ink);
                    }
                }
                x += thickness;
            }
        }
        let zero = axis.place(0.0);
        drawing.line((left, zero), (right, zero), 1.0, Tone::Muted);
        if !last {
            return bottom;
        }
        let widest = self.categories.iter().map(|c| text_width(c, size)).fold(0.0, f64::max);
        let every = ((widest.min(120.0) + 6.0) / pitch).ceil().max(1.0) as usize;
        for (column, category) in self.categories.iter().enumerate().step_by(every) {
            let middle = left + pitch * (column as f64 + 0.5);
            drawing.text(middle, bottom + 15.0, &clip(category, size, 120.0), Font::SMALL.at(Anchor::Middle));
        }
        let label = clip(&self.category_label, size, right - left);
        drawing.text((left + right) / 2.0, bottom + 32.0, &label, Font::SMALL.at(Anchor::Middle));
        bottom + 38.0
    }

    fn tooltip(&self, series: &BarSeries, category: &str, bar: Bar) -> String {
        let number = |v| format::significant(v, 4);
        let mut text = format!("{category}, {}: {}", series.name, number(bar.value));
        if let Some((low, high)) = finite(bar.interval) {
            let _ = write!(text, " ({}–{})", number(low), number(high));
        }
        text
    }

    fn description(&self) -> String {
        let mut text = format!("Bar chart of {}.", self.value_label);
        for panel in &self.panels {
            for series in &panel.series {
                let bars = series.bars.iter().flatten().map(|b| b.value);
                if let Some((low, high)) = range_of(bars) {
                    let heading = if panel.heading.is_empty() { String::new() } else { format!("{}, ", panel.heading) };
                    let number = |v| format::significant(v, 3);
                    let _ = write!(text, " {heading}{}: {} to {}.", series.name, number(low), number(high));
                }
            }
        }
        text
    }
}

fn bar_at(series: &BarSeries, at: usize) -> Option<Bar> {
    series.bars.get(at).copied().flatten().filter(|bar| bar.value.is_finite())
}

fn finite(interval: Option<(f64, f64)>) -> Option<(f64, f64)> {
    interval.filter(|(low, high)| low.is_finite() && high.is_finite())
}
