//! Tables as plain text and Markdown; the page template draws them as HTML.

use super::format;
use super::svg::is_bidi_control;
use serde::Serialize;
use unicode_width::UnicodeWidthStr;

/// One entry of a table.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Entry {
    /// As shown.
    pub text: String,
    /// An interval or uncertainty, beside or below it in a quieter tone; may be empty.
    pub detail: String,
    /// Sort key; `None` sorts by the text.
    pub order: Option<f64>,
}

impl Entry {
    /// Sorted by its text.
    pub fn text(text: impl Into<String>) -> Self {
        Self { text: text.into(), ..Self::default() }
    }

    /// A formatted number, sorted by `value`; missing if that is not finite.
    pub fn number(value: f64, text: impl Into<String>) -> Self {
        if !value.is_finite() {
            return Self::missing();
        }
        Self { text: text.into(), order: Some(value), ..Self::default() }
    }

    /// `31.2`, with this number of decimals; missing if it is none or not finite.
    pub fn fixed(value: impl Into<Option<f64>>, decimals: usize) -> Self {
        let value = value.into().unwrap_or(f64::NAN);
        Self::number(value, format::fixed(value, decimals))
    }

    /// A share in percent with one decimal, `31.2 %`; missing if it is none or not finite.
    pub fn percent(share: impl Into<Option<f64>>) -> Self {
        let share = share.into().unwrap_or(f64::NAN);
        Self::number(share, format::percent(share, 1))
    }

    /// A count with separators: `1,234`.
    pub fn count(count: u64) -> Self {
        Self::number(count as f64, format::count(count))
    }

    /// A mean with its standard error: `0.412 ± 0.013`, both at `decimals`.
    pub fn plus_minus(mean: f64, error: Option<f64>, decimals: usize) -> Self {
        let detail = error.map(|error| format!("± {}", format::fixed(error, decimals))).unwrap_or_default();
        Self { detail, ..Self::fixed(mean, decimals) }
    }

    /// A value with an interval: `31.2 (25.0–38.1)`, all at `decimals`.
    pub fn interval(value: f64, interval: Option<(f64, f64)>, decimals: usize) -> Self {
        let end = |value| format::fixed(value, decimals);
        let detail = interval.map(|(low, high)| format!("({}–{})", end(low), end(high))).unwrap_or_default();
        Self { detail, ..Self::fixed(value, decimals) }
    }

    /// [`format::MISSING`]
    pub fn missing() -> Self {
        Self::text(format::MISSING)
    }
}

impl From<&str> for Entry {
    fn from(text: &str) -> Self {
        Self::text(text)
    }
}

/// One column of a table.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Column {
    /// Heading.
    pub name: String,
    /// Flush right, else flush left.
    pub numeric: bool,
    /// What the heading means, in HTML below it; may be empty.
    pub help: String,
}

/// A table with caption and note.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Table {
    /// One line above the table; may be empty.
    pub caption: String,
    /// From the left.
    pub(super) columns: Vec<Column>,
    /// One entry a column.
    pub(super) rows: Vec<Vec<Entry>>,
    /// Below the table: what the intervals are, how many prompts; may be empty.
    pub note: String,
    /// Highlighted rows, by index.
    pub emphasized: Vec<usize>,
}

impl Table {
    /// Without columns and rows.
    pub fn new(caption: impl Into<String>) -> Self {
        Self { caption: caption.into(), ..Self::default() }
    }

    /// Adds a column of text; columns come before rows.
    pub fn column(mut self, name: impl Into<String>) -> Self {
        self.columns.push(Column { name: name.into(), numeric: false, help: String::new() });
        self
    }

    /// Adds a column of numbers; `help` says what they are, and may be empty.
    pub fn numbers(mut self, name: impl Into<String>, help: impl Into<String>) -> Self {
        self.columns.push(Column { name: name.into(), numeric: true, help: help.into() });
        self
    }

    /// Adds a row; one that is too short is filled up with empty entries, and what is too long is left out.
    pub fn row(&mut self, entries: impl IntoIterator<Item = Entry>) {
        let entries = entries.into_iter().chain(std::iter::repeat_with(Entry::default));
        self.rows.push(entries.take(self.columns.len()).collect());
    }

    /// For a terminal: caption, headings, a rule, rows, note. Control characters are replaced, so that untrusted text
    /// cannot drive the terminal. Ends with a newline.
    pub fn text(&self) -> String {
        let columns: Vec<TextColumn> = (0..self.columns.len()).map(|at| TextColumn::new(self, at)).collect();
        let mut out = String::new();
        let mut push = |cells: Vec<String>| {
            out.push_str(cells.join("  ").trim_end());
            out.push('\n');
        };
        if !self.caption.is_empty() {
            push(vec![one_line(&self.caption)]);
        }
        push(columns.iter().map(|c| c.pad(&c.heading, c.width)).collect());
        push(columns.iter().map(|c| "─".repeat(c.width)).collect());
        for at in 0..self.rows.len() {
            push(columns.iter().map(|c| c.entry(at)).collect());
        }
        if !self.note.is_empty() {
            push(vec![one_line(&self.note)]);
        }
        out
    }

    /// As a Markdown table (GitHub's flavour) with caption and note as paragraphs. Ends with a newline.
    pub fn markdown(&self) -> String {
        let mut out = String::new();
        if !self.caption.is_empty() {
            out.push_str(&format!("**{}**\n\n", markdown_text(&self.caption)));
        }
        let mut push = |cells: Vec<String>| out.push_str(&format!("| {} |\n", cells.join(" | ")));
        push(self.columns.iter().map(|c| markdown_text(&c.name)).collect());
        push(self.columns.iter().map(|c| if c.numeric { "---:" } else { "---" }.to_owned()).collect());
        for row in &self.rows {
            let cell = |entry: &Entry| {
                let text = markdown_text(&entry.text);
                if entry.detail.is_empty() { text } else { format!("{text} {}", markdown_text(&entry.detail)) }
            };
            push(row.iter().map(cell).collect());
        }
        if !self.note.is_empty() {
            out.push_str(&format!("\n{}\n", markdown_text(&self.note)));
        }
        out
    }
}

/// A column and its width in a terminal. Text and detail are two sub-columns, so that both line up.
struct TextColumn {
    heading: String,
    numeric: bool,
    entries: Vec<(String, String)>,
    text_width: usize,
    width: usize,
}

impl TextColumn {
    fn new(table: &Table, at: usize) -> Self {
        let heading = one_line(&table.columns[at].name);
        let entries = table.rows.iter().map(|row| (one_line(&row[at].text), one_line(&row[at].detail)));
        let entries: Vec<(String, String)> = entries.collect();
        let text_width = entries.iter().map(|(text, _)| text.width()).max().unwrap_or(0);
        let detail_width =
            entries.iter().map(|(_, detail)| detail.width()).max().filter(|w| *w > 0).map_or(0, |w| w + 1);
        let width = heading.width().max(text_width + detail_width);
        // Under a wider heading the text gets the room: numbers move right.
        Self { heading, numeric: table.columns[at].numeric, entries, text_width: width - detail_width, width }
    }

    fn entry(&self, at: usize) -> String {
        let (text, detail) = &self.entries[at];
        let text = self.pad(text, self.text_width);
        match self.width - self.text_width {
            0 => text,
            room => text + " " + &self.pad(detail, room - 1),
        }
    }

    /// Pads with spaces: numbers on the left, text on the right.
    fn pad(&self, text: &str, width: usize) -> String {
        let fill = " ".repeat(width.saturating_sub(text.width()));
        if self.numeric { fill + text } else { text.to_owned() + &fill }
    }
}

/// White space becomes single spaces; control characters and bidirectional controls become U+FFFD.
fn one_line(text: &str) -> String {
    let words: Vec<&str> = text.split_whitespace().collect();
    words.join(" ").chars().map(|c| if c.is_control() || is_bidi_control(c) { '\u{fffd}' } else { c }).collect()
}

/// Escapes text for Markdown, as one line.
pub(super) fn markdown_text(text: &str) -> String {
    let mut out = String::new();
    for c in one_line(text).chars() {
        match c {
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '&' => out.push_str("&amp;"),
            '\\' | '`' | '*' | '_' | '[' | ']' | '|' | '~' | '$' | '!' => {
                out.push('\\');
                out.push(c);
            }
            c => out.push(c),
        }
    }
    out
}
