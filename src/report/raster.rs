//! Heat maps in pixels, with a bitmap font: the picture is the same on every machine.

use super::heatmap::Heatmap;
use super::palette::{Ramp, Rgb, Tone};
use crate::error::{Error, Result};
use font8x8::{BASIC_FONTS, GREEK_FONTS, LATIN_FONTS, UnicodeFonts};

const MAX_PIXELS: usize = 64 << 20;
/// Everything below is in pixels of the font, 8 × 8 a character, before magnification.
const GLYPH: usize = 8;
const MARGIN: usize = 8;
const LINE: usize = 12;
const CELL_HEIGHT: usize = 12;
const LEGEND_WIDTH: usize = 160;
const LONGEST_NAME: usize = 16;
const LONGEST_LINES: usize = 4;

/// Where everything stands, before magnification.
struct Layout {
    title: Vec<String>,
    unit: Vec<String>,
    note: Vec<String>,
    symbols: Vec<Symbol>,
    left: usize,
    cell_width: usize,
    legend_top: usize,
    grid_top: usize,
    width: usize,
    height: usize,
}

#[derive(Clone, Copy, PartialEq)]
enum Symbol {
    InSet,
    NotInSet,
    Mark,
    Gap,
}

impl Layout {
    fn new(map: &Heatmap) -> Self {
        let name = |text: &str| text.chars().count().min(LONGEST_NAME);
        let row_name = map.rows.iter().map(|r| name(r)).chain([name(&map.row_label)]).max().unwrap_or(0);
        let column_name = map.columns.iter().map(|c| name(c)).max().unwrap_or(0);
        let left = MARGIN + row_name * GLYPH + GLYPH;
        let cell_width = (column_name * GLYPH + GLYPH).max(40);
        let mut symbols = Vec::new();
        if map.is_set() {
            symbols.extend([Symbol::InSet, Symbol::NotInSet]);
        }
        if map.marks.contains(&true) && !map.mark_label.is_empty() {
            symbols.push(Symbol::Mark);
        }
        if map.has_gaps() {
            symbols.push(Symbol::Gap);
        }
        let grid = left.saturating_add(cell_width.saturating_mul(map.columns.len()));
        let width = grid.max(2 * MARGIN + 2 * LEGEND_WIDTH).saturating_add(MARGIN);
        let letters = (width.min(1 << 14) - 2 * MARGIN) / GLYPH;
        let title = lines(&map.title, letters);
        let unit = if map.is_set() { Vec::new() } else { lines(&map.unit, letters) };
        let mut note = lines(&map.beyond(), letters);
        note.extend(lines(&map.note, letters));

        let legend_top = MARGIN + (title.len() + unit.len()) * LINE + 4;
        let bar = if map.is_set() { 0 } else { 2 * LINE };
        let grid_top = legend_top + bar.max(symbols.len() * LINE) + LINE + 8;
        let height = grid_top
            .saturating_add(CELL_HEIGHT.saturating_mul(map.rows.len()))
            .saturating_add(MARGIN + note.len() * LINE + if note.is_empty() { 0 } else { 4 });
        Self { title, unit, note, symbols, left, cell_width, legend_top, grid_top, width, height }
    }
}

/// Width and height of the picture.
pub(super) fn size(map: &Heatmap, magnification: usize) -> (usize, usize) {
    let layout = Layout::new(map);
    (layout.width.saturating_mul(magnification), layout.height.saturating_mul(magnification))
}

/// The picture as PNG.
pub(super) fn heatmap(map: &Heatmap, magnification: usize) -> Result<Vec<u8>> {
    let layout = Layout::new(map);
    let (width, height) = size(map, magnification);
    if width.saturating_mul(height) > MAX_PIXELS {
        return Err(Error::input(
            format!("heat map {}", map.title),
            format!("{} × {} cells", map.rows.len(), map.columns.len()),
            "a picture of at most 64 million pixels: use a smaller magnification, or the SVG",
        ));
    }
    let mut canvas = Canvas::new(width, height, magnification);
    let (ink, muted) = (Tone::Ink.light(), Tone::Muted.light());

    let mut y = MARGIN;
    for (text, color) in layout.title.iter().map(|t| (t, ink)).chain(layout.unit.iter().map(|t| (t, muted))) {
        canvas.text(MARGIN, y, text, color);
        y += LINE;
    }
    legend(&mut canvas, map, &layout);

    let header = layout.grid_top - LINE;
    canvas.text_right(layout.left - GLYPH, header, &short(&map.row_label), muted);
    for (at, name) in map.columns.iter().enumerate() {
        canvas.text_centered(layout.left + layout.cell_width * at + layout.cell_width / 2, header, &short(name), ink);
    }
    for (row, name) in map.rows.iter().enumerate() {
        let y = layout.grid_top + CELL_HEIGHT * row;
        canvas.text_right(layout.left - GLYPH, y + 2, &short(name), muted);
        for (column, span) in map.spans(row) {
            let x = layout.left + layout.cell_width * column;
            let wide = layout.cell_width * span;
            match map.value(row, column) {
                Some(value) => {
                    let apart = map.scale.ramp == Ramp::Share;
                    canvas.cell((x, y, wide, CELL_HEIGHT), apart, on_paper(map.scale.color(value)));
                }
                None => canvas.gap(x, y, wide, CELL_HEIGHT),
            }
        }
    }
    let edges = map.outline();
    for row in (0..map.rows.len()).filter(|row| map.parted(*row)) {
        let wide = layout.cell_width * map.columns.len();
        canvas.rect(layout.left, layout.grid_top + CELL_HEIGHT * row - 1, wide, 2, Tone::Paper.light());
    }
    let (edge, core) = map.outline_colors();
    // The edges of all lines first, so that none covers a core.
    for (color, thickness) in [(edge, 3), (core, 1)] {
        for ((c0, r0), (c1, r1)) in &edges {
            let at = |c: &usize, r: &usize| (layout.left + layout.cell_width * c, layout.grid_top + CELL_HEIGHT * r);
            canvas.edge(at(c0, r0), at(c1, r1), thickness, color);
        }
    }
    let mut y = layout.grid_top + CELL_HEIGHT * map.rows.len() + 6;
    for line in &layout.note {
        canvas.text(MARGIN, y, line, muted);
        y += LINE;
    }
    canvas.png()
}

fn legend(canvas: &mut Canvas, map: &Heatmap, layout: &Layout) {
    let (ink, muted) = (Tone::Ink.light(), Tone::Muted.light());
    let top = layout.legend_top;
    let mut x = MARGIN;
    if !map.is_set() {
        for i in 0..LEGEND_WIDTH {
            let t = (i as f64 + 0.5) / LEGEND_WIDTH as f64;
            canvas.rect(x + i, top, 1, 8, on_paper(map.scale.ramp.color(t)));
        }
        // Labels end here so far: one that would run into another is left out.
        let mut free = 0;
        for (share, label) in map.ticks() {
            let at = x + (LEGEND_WIDTH as f64 * share) as usize;
            canvas.rect(at.min(x + LEGEND_WIDTH - 1), top + 8, 1, 2, muted);
            let half = label.chars().count() * GLYPH / 2;
            let middle = at.max(MARGIN + half);
            if middle >= free + half {
                canvas.text_centered(middle, top + 12, &label, muted);
                free = middle + half + GLYPH / 2;
            }
        }
        x += LEGEND_WIDTH + 3 * GLYPH;
    }
    for (i, symbol) in layout.symbols.iter().enumerate() {
        let y = top + i * LINE;
        let middle = on_paper(map.scale.ramp.color(0.5));
        let text = match symbol {
            Symbol::InSet => {
                canvas.rect(x, y, 20, 8, on_paper(map.scale.color(1.0)));
                map.unit.as_str()
            }
            Symbol::NotInSet => {
                canvas.rect(x, y, 20, 8, on_paper(map.scale.color(0.0)));
                "not in it"
            }
            Symbol::Mark => {
                let (edge, core) = map.outline_colors();
                canvas.rect(x, y, 20, 9, edge);
                canvas.rect(x + 1, y + 1, 18, 7, core);
                canvas.rect(x + 2, y + 2, 16, 5, middle);
                map.mark_label.as_str()
            }
            Symbol::Gap => {
                canvas.gap(x, y, 20, 9);
                "no value"
            }
        };
        let letters = (layout.width.saturating_sub(x + 28 + MARGIN)) / GLYPH;
        let text: String = text.chars().take(letters).collect();
        canvas.text(x + 28, y + 1, &text, ink);
    }
}

/// A colour laid over white.
fn on_paper((color, opacity): (Rgb, f64)) -> Rgb {
    Tone::Paper.light().mix(color, opacity)
}

fn short(name: &str) -> String {
    name.chars().take(LONGEST_NAME).collect()
}

/// Text in lines of at most `letters` characters.
fn lines(text: &str, letters: usize) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for word in text.split_whitespace() {
        let full = lines.len() == LONGEST_LINES;
        match lines.last_mut() {
            Some(line) if line.chars().count() + 1 + word.chars().count() <= letters => {
                line.push(' ');
                line.push_str(word);
            }
            _ if full => break,
            _ => lines.push(word.chars().take(letters).collect()),
        }
    }
    lines
}

/// Pixels, 3 bytes each. Coordinates are those before magnification; what lies outside is not drawn.
struct Canvas {
    width: usize,
    height: usize,
    magnification: usize,
    pixels: Vec<u8>,
}

impl Canvas {
    fn new(width: usize, height: usize, magnification: usize) -> Self {
        Self { width, height, magnification, pixels: vec![255; width * height * 3] }
    }

    fn rect(&mut self, x: usize, y: usize, width: usize, height: usize, color: Rgb) {
        let m = self.magnification;
        let (x0, x1) = ((x * m).min(self.width), ((x + width) * m).min(self.width));
        let (y0, y1) = ((y * m).min(self.height), ((y + height) * m).min(self.height));
        for row in y0..y1 {
            let (from, to) = ((row * self.width + x0) * 3, (row * self.width + x1) * 3);
            if let Some(line) = self.pixels.get_mut(from..to) {
                for pixel in line.chunks_exact_mut(3) {
                    pixel.copy_from_slice(&[color.0, color.1, color.2]);
                }
            }
        }
    }

    /// A cell, with a hairline of paper at its right and bottom where it stands apart from its neighbours.
    fn cell(&mut self, (x, y, width, height): (usize, usize, usize, usize), apart: bool, color: Rgb) {
        let hairline = usize::from(apart);
        self.rect(x, y, width - hairline, height - hairline, color);
    }

    fn gap(&mut self, x: usize, y: usize, width: usize, height: usize) {
        self.cell((x, y, width, height), true, Tone::Line.light());
        self.rect(x + width / 2 - 3, y + height / 2, 6, 1, Tone::Muted.light());
    }

    /// A line along the grid; it lies on the hairline before the cell at its end.
    fn edge(&mut self, from: (usize, usize), to: (usize, usize), thickness: usize, color: Rgb) {
        let half = thickness / 2;
        let (x, y) = (from.0 - 1 - half, from.1 - 1 - half);
        self.rect(x, y, to.0 - from.0 + thickness, to.1 - from.1 + thickness, color);
    }

    fn text(&mut self, x: usize, y: usize, text: &str, color: Rgb) {
        for (i, c) in text.chars().enumerate() {
            for (dy, bits) in glyph(c).into_iter().enumerate() {
                for dx in 0..GLYPH {
                    if bits >> dx & 1 == 1 {
                        self.rect(x + i * GLYPH + dx, y + dy, 1, 1, color);
                    }
                }
            }
        }
    }

    fn text_right(&mut self, right: usize, y: usize, text: &str, color: Rgb) {
        self.text(right.saturating_sub(text.chars().count() * GLYPH), y, text, color);
    }

    fn text_centered(&mut self, middle: usize, y: usize, text: &str, color: Rgb) {
        self.text(middle.saturating_sub(text.chars().count() * GLYPH / 2), y, text, color);
    }

    fn png(self) -> Result<Vec<u8>> {
        let failed =
            |e: png::EncodingError| Error::failed(format!("the heat map's PNG: {e}"), "save it as SVG instead");
        let mut bytes = Vec::new();
        let mut encoder = png::Encoder::new(&mut bytes, self.width as u32, self.height as u32);
        encoder.set_color(png::ColorType::Rgb);
        encoder.set_depth(png::BitDepth::Eight);
        let mut writer = encoder.write_header().map_err(failed)?;
        writer.write_image_data(&self.pixels).map_err(failed)?;
        writer.finish().map_err(failed)?;
        Ok(bytes)
    }
}

/// The character's bitmap; dashes and the like as their ASCII kin, `?` for what the font lacks.
fn glyph(c: char) -> [u8; 8] {
    let c = match c {
        '–' | '—' | '−' => '-',
        '’' => '\'',
        c => c,
    };
    BASIC_FONTS
        .get(c)
        .or_else(|| LATIN_FONTS.get(c))
        .or_else(|| GREEK_FONTS.get(c))
        .or_else(|| BASIC_FONTS.get('?'))
        .unwrap_or([0; 8])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::Scale;

    #[test]
    fn a_picture_too_large_is_refused() {
        let map = Heatmap {
            title: String::new(),
            row_label: String::new(),
            rows: vec![String::new(); 40_000],
            columns: vec![String::new(); 100],
            values: Vec::new(),
            errors: Vec::new(),
            marks: Vec::new(),
            mark_label: String::new(),
            wide_rows: Vec::new(),
            scale: Scale { ramp: Ramp::Sequential, low: 0.0, high: 1.0 },
            unit: String::new(),
            note: String::new(),
        };
        assert!(matches!(map.png(2), Err(Error::Input { .. })));
    }
}
