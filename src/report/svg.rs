//! SVG documents: escaping, text metrics, and the few shapes that the charts use.

use super::palette::{Rgb, Tone};
use crate::io::file::begins_with;
use crate::io::input::read_text;
use std::fmt::Write as _;
use std::path::Path;

/// Width of a drawing that takes half of a page, in pixels.
pub(crate) const HALF_WIDTH: f64 = 440.0;
/// Width of a drawing that takes a whole page, in pixels.
pub(crate) const FULL_WIDTH: f64 = 900.0;

const FONTS: &str = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Noto Sans', 'DejaVu Sans', Arial, sans-serif";

/// Escapes text for XML and HTML, in content and in quoted attributes. Characters that XML 1.0 does not allow, and
/// bidirectional controls, become U+FFFD.
pub(crate) fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            '\n' | '\t' => out.push(c),
            c if c.is_control() || is_bidi_control(c) || matches!(c, '\u{fffe}' | '\u{ffff}') => out.push('\u{fffd}'),
            c => out.push(c),
        }
    }
    out
}

/// Bidirectional controls: they reorder what is shown around them.
pub(crate) fn is_bidi_control(c: char) -> bool {
    matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{200e}' | '\u{200f}' | '\u{61c}')
}

/// Estimated text width in pixels, on the wide side, as the reader's fonts are unknown.
pub(crate) fn text_width(text: &str, size: f64) -> f64 {
    let ems = |c: char| match c {
        'i' | 'j' | 'l' | '.' | ',' | ':' | ';' | '\'' | '|' | '!' | 'I' => 0.31,
        ' ' | 'f' | 't' | 'r' | '(' | ')' | '[' | ']' | '/' | '-' => 0.40,
        'm' | 'w' | 'M' | 'W' | '%' | '@' => 0.95,
        'A'..='Z' => 0.70,
        c if c.is_ascii() => 0.60,
        c if c >= '\u{1100}' => 1.0,
        _ => 0.64,
    };
    text.chars().map(ems).sum::<f64>() * size
}

/// Truncates text to `width` pixels, with an ellipsis.
pub(crate) fn clip(text: &str, size: f64, width: f64) -> String {
    if text_width(text, size) <= width {
        return text.to_owned();
    }
    let mut kept = String::new();
    let mut used = text_width("…", size);
    for c in text.chars() {
        used += text_width(c.encode_utf8(&mut [0; 4]), size);
        if used > width {
            break;
        }
        kept.push(c);
    }
    format!("{}…", kept.trim_end())
}

/// Breaks text into at most `limit` lines of `width` pixels; the last one is truncated if it must be.
pub(crate) fn wrap(text: &str, size: f64, width: f64, limit: usize) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for word in text.split_whitespace() {
        let full = lines.len() == limit;
        match lines.last_mut() {
            Some(line) if full || lines_fit(line, word, size, width) => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(word.to_owned()),
        }
    }
    lines.iter().map(|line| clip(line, size, width)).collect()
}

/// Breaks text into lines of `width` pixels, as many as it takes; a word that is wider is broken as well, so that nothing
/// is cut.
pub(crate) fn fold(text: &str, size: f64, width: f64) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for word in text.split_whitespace() {
        match lines.last_mut() {
            Some(line) if lines_fit(line, word, size, width) => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(word.to_owned()),
        }
        while let Some(last) = lines.pop() {
            let mut used = 0.0;
            let fits = |c: &char| {
                used += text_width(c.encode_utf8(&mut [0; 4]), size);
                used <= width
            };
            // At least one character, however narrow the column.
            let kept = last.chars().take_while(fits).count().max(1);
            let at = last.char_indices().nth(kept).map_or(last.len(), |(at, _)| at);
            let (head, tail) = last.split_at(at);
            lines.push(head.to_owned());
            if tail.is_empty() {
                break;
            }
            lines.push(tail.to_owned());
        }
    }
    lines
}

fn lines_fit(line: &str, word: &str, size: f64, width: f64) -> bool {
    text_width(line, size) + text_width(" ", size) + text_width(word, size) <= width
}

/// Whether a file is a drawing of this module.
pub fn is_drawing(path: &Path) -> bool {
    let start = "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 ";
    begins_with(path, start) && read_text(path, 1 << 26).is_ok_and(|text| text.contains("<rect class=\"f-paper\""))
}

/// Text anchor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Anchor {
    Start,
    Middle,
    End,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Font {
    pub size: f64,
    pub tone: Tone,
    pub bold: bool,
    pub anchor: Anchor,
}

impl Font {
    pub(crate) const TITLE: Self = Self { size: 14.0, tone: Tone::Ink, bold: true, anchor: Anchor::Start };
    pub(crate) const LABEL: Self = Self { size: 11.5, tone: Tone::Ink, bold: false, anchor: Anchor::Start };
    pub(crate) const SMALL: Self = Self { size: 11.0, tone: Tone::Muted, bold: false, anchor: Anchor::Start };

    pub(crate) fn at(self, anchor: Anchor) -> Self {
        Self { anchor, ..self }
    }
}

/// A drawing of fixed width, in pixels; its height is set when everything is drawn.
pub(crate) struct Drawing {
    pub width: f64,
    pub height: f64,
    body: String,
}

impl Drawing {
    pub(crate) fn new(width: f64) -> Self {
        Self { width, height: 0.0, body: String::new() }
    }

    /// The document; `title` and `description` are for screen readers.
    pub(crate) fn finish(self, title: &str, description: &str) -> String {
        let (w, h) = (self.width, self.height.ceil());
        format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {w} {h}\" width=\"{w}\" height=\"{h}\" \
             role=\"img\" font-family=\"{FONTS}\" style=\"font-variant-numeric:tabular-nums\">\n<title>{}</title>\n\
             <desc>{}</desc>\n<rect class=\"f-paper\" width=\"{w}\" height=\"{h}\" fill=\"{}\"/>\n{}</svg>\n",
            escape(title),
            escape(description),
            Tone::Paper.light(),
            self.body
        )
    }

    pub(crate) fn text(&mut self, x: f64, y: f64, text: &str, font: Font) {
        let anchor = match font.anchor {
            Anchor::Start => "",
            Anchor::Middle => " text-anchor=\"middle\"",
            Anchor::End => " text-anchor=\"end\"",
        };
        let weight = if font.bold { " font-weight=\"600\"" } else { "" };
        let (x, y, size, fill, text) = (px(x), px(y), font.size, fill(font.tone), escape(text));
        let place = format!("x=\"{x}\" y=\"{y}\" font-size=\"{size}\"");
        let _ = writeln!(self.body, "<text {place}{anchor}{weight} {fill}>{text}</text>");
    }

    /// Several lines of text from `y`, the top of the first; returns the bottom of the last.
    pub(crate) fn lines(&mut self, x: f64, y: f64, lines: &[String], font: Font) -> f64 {
        let step = (font.size * 1.4).round();
        for (i, line) in lines.iter().enumerate() {
            self.text(x, y + step * i as f64 + font.size, line, font);
        }
        y + step * lines.len() as f64
    }

    /// A filled rectangle; no tooltip if it is empty.
    pub(crate) fn rect(&mut self, area: Area, radius: f64, tone: Tone, tooltip: &str) {
        let attributes = fill(tone);
        self.shape(&format!("rect {} rx=\"{}\" {attributes}", area.attributes(), px(radius)), tooltip);
    }

    /// A rectangle in a colour that is the same on light and dark pages.
    pub(crate) fn swatch(&mut self, area: Area, color: (Rgb, f64), tooltip: &str) {
        self.colored(area, color, "", tooltip);
    }

    /// A swatch without antialiasing, so that no seams show between neighbours.
    pub(crate) fn tile(&mut self, area: Area, color: (Rgb, f64), tooltip: &str) {
        self.colored(area, color, " shape-rendering=\"crispEdges\"", tooltip);
    }

    fn colored(&mut self, area: Area, (color, opacity): (Rgb, f64), rendering: &str, tooltip: &str) {
        let opacity = if opacity < 1.0 { format!(" fill-opacity=\"{opacity:.3}\"") } else { String::new() };
        self.shape(&format!("rect {} fill=\"{color}\"{opacity}{rendering}", area.attributes()), tooltip);
    }

    pub(crate) fn line(&mut self, from: (f64, f64), to: (f64, f64), width: f64, tone: Tone) {
        let [x1, y1, x2, y2] = [from.0, from.1, to.0, to.1].map(px);
        let place = format!("x1=\"{x1}\" y1=\"{y1}\" x2=\"{x2}\" y2=\"{y2}\"");
        let _ = writeln!(self.body, "<line {place} stroke-width=\"{width}\" {}/>", stroke(tone));
    }

    /// An unfilled path; `data` is not escaped.
    pub(crate) fn path(&mut self, data: &str, width: f64, tone: Tone) {
        let stroke = stroke(tone);
        let _ = writeln!(
            self.body,
            "<path d=\"{data}\" fill=\"none\" stroke-width=\"{width}\" stroke-linejoin=\"round\" \
             stroke-linecap=\"round\"{stroke}/>"
        );
    }

    /// A path in a colour that is the same on light and dark pages.
    pub(crate) fn fixed_path(&mut self, data: &str, width: f64, color: Rgb) {
        let _ = writeln!(
            self.body,
            "<path d=\"{data}\" fill=\"none\" stroke=\"{color}\" stroke-width=\"{width}\" stroke-linecap=\"square\"/>"
        );
    }

    /// A centred marker with a thin edge in the colour of the paper.
    pub(crate) fn marker(&mut self, (x, y): (f64, f64), marker: Marker, tone: Tone, tooltip: &str) {
        let (name, color, paper) = (tone.name(), tone.light(), Tone::Paper.light());
        let edge = format!("class=\"f-{name} s-paper\" fill=\"{color}\" stroke=\"{paper}\" stroke-width=\"1\"");
        let points = |offsets: &[(f64, f64)]| {
            let points: Vec<String> = offsets.iter().map(|(dx, dy)| format!("{},{}", px(x + dx), px(y + dy))).collect();
            format!("polygon points=\"{}\" {edge}", points.join(" "))
        };
        let shape = match marker {
            Marker::Circle => format!("circle cx=\"{}\" cy=\"{}\" r=\"4\" {edge}", px(x), px(y)),
            Marker::Square => points(&[(-3.6, -3.6), (3.6, -3.6), (3.6, 3.6), (-3.6, 3.6)]),
            Marker::Triangle => points(&[(0.0, -4.8), (4.6, 3.6), (-4.6, 3.6)]),
            Marker::Diamond => points(&[(0.0, -5.0), (5.0, 0.0), (0.0, 5.0), (-5.0, 0.0)]),
        };
        self.shape(&shape, tooltip);
    }

    fn shape(&mut self, shape: &str, tooltip: &str) {
        let _ = if tooltip.is_empty() {
            writeln!(self.body, "<{shape}/>")
        } else {
            let name = shape.split(' ').next().unwrap_or_default();
            writeln!(self.body, "<{shape}><title>{}</title></{name}>", escape(tooltip))
        };
    }
}

/// Shapes by which series can be told apart without colour.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Marker {
    Circle,
    Square,
    Triangle,
    Diamond,
}

impl Marker {
    /// The marker of the i-th series.
    pub(crate) fn of(index: usize) -> Self {
        [Self::Circle, Self::Square, Self::Triangle, Self::Diamond][index % 4]
    }
}

/// A rectangle in pixels.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Area {
    pub x: f64,
    pub y: f64,
    pub width: f64,
    pub height: f64,
}

impl Area {
    pub(crate) fn new(x: f64, y: f64, width: f64, height: f64) -> Self {
        Self { x, y, width, height }
    }

    fn attributes(self) -> String {
        let [x, y, width, height] = [self.x, self.y, self.width.max(0.0), self.height.max(0.0)].map(px);
        format!("x=\"{x}\" y=\"{y}\" width=\"{width}\" height=\"{height}\"")
    }
}

fn fill(tone: Tone) -> String {
    format!("class=\"f-{}\" fill=\"{}\"", tone.name(), tone.light())
}

fn stroke(tone: Tone) -> String {
    format!("class=\"s-{}\" stroke=\"{}\"", tone.name(), tone.light())
}

/// A coordinate with at most two decimals; 0 if it is not finite.
pub(crate) fn px(value: f64) -> String {
    let text = super::format::fixed(if value.is_finite() { value } else { 0.0 }, 2);
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folded_text_is_whole() {
        let text = "a_name_that_is_far_too_long_for_its_column then two";
        let lines = fold(text, 10.0, 80.0);
        assert!(lines.len() > 3 && lines.iter().all(|line| text_width(line, 10.0) <= 80.0), "{lines:?}");
        assert_eq!(lines.concat().replace(' ', ""), text.replace(' ', ""));
        assert_eq!(fold("one two", 10.0, 500.0), ["one two"]);
        assert_eq!(fold("ab", 10.0, 0.0), ["a", "b"]);
    }
}
