//! Tables as plain text and Markdown; the page template draws them as HTML.

use super::format;
use super::svg::is_bidi_control;
use serde::Serialize;

/// Character set of a text table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TextStyle {
    /// `─`, `±`.
    Unicode,
    /// `-`, `+-`: for logs and terminals without UTF-8; other characters become `?`.
    Ascii,
}

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

    /// `31.2`, with this number of decimals; missing if it is not finite.
    pub fn fixed(value: f64, decimals: usize) -> Self {
        Self::number(value, format::fixed(value, decimals))
    }

    /// A mean with its standard error: `0.412 ± 0.013`, both at `decimals`.
    pub fn plus_minus(mean: f64, error: f64, decimals: usize) -> Self {
        let detail = if error.is_finite() { format!("± {}", format::fixed(error, decimals)) } else { String::new() };
        Self { detail, ..Self::fixed(mean, decimals) }
    }

    /// A value with an interval: `31.2 (25.0–38.1)`, all at `decimals`.
    pub fn interval(value: f64, low: f64, high: f64, decimals: usize) -> Self {
        let detail = if low.is_finite() && high.is_finite() {
            format!("({}–{})", format::fixed(low, decimals), format::fixed(high, decimals))
        } else {
            String::new()
        };
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

impl From<String> for Entry {
    fn from(text: String) -> Self {
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
    pub fn text(&self, style: TextStyle) -> String {
        let plain = |text: &str| {
            let line = one_line(text);
            if style == TextStyle::Ascii { ascii(&line) } else { line }
        };
        let gap = "  ";
        let rule = if style == TextStyle::Ascii { "-" } else { "─" };
        let columns: Vec<TextColumn> = self
            .columns
            .iter()
            .enumerate()
            .map(|(at, column)| {
                let entries = self.rows.iter().map(|row| (plain(&row[at].text), plain(&row[at].detail)));
                TextColumn::new(plain(&column.name), column.numeric, entries.collect())
            })
            .collect();

        let mut out = String::new();
        if !self.caption.is_empty() {
            out.push_str(&plain(&self.caption));
            out.push('\n');
        }
        let mut push = |cells: Vec<String>| {
            out.push_str(cells.join(gap).trim_end());
            out.push('\n');
        };
        push(columns.iter().map(TextColumn::heading).collect());
        push(columns.iter().map(|c| rule.repeat(c.width)).collect());
        for at in 0..self.rows.len() {
            push(columns.iter().map(|c| c.entry(at)).collect());
        }
        if !self.note.is_empty() {
            push(vec![plain(&self.note)]);
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

/// A column and its width. Text and detail are two sub-columns, so that both line up.
struct TextColumn {
    heading: String,
    numeric: bool,
    entries: Vec<(String, String)>,
    text_width: usize,
    width: usize,
}

impl TextColumn {
    fn new(heading: String, numeric: bool, entries: Vec<(String, String)>) -> Self {
        let widest =
            |of: fn(&(String, String)) -> &String| entries.iter().map(|e| columns_of(of(e))).max().unwrap_or(0);
        let (mut text_width, detail_width) = (widest(|e| &e.0), widest(|e| &e.1));
        let entry_width = |text: usize| text + if detail_width > 0 { 1 + detail_width } else { 0 };
        let width = entry_width(text_width).max(columns_of(&heading));
        // A heading wider than its entries: numbers move right under it, text gets the room.
        text_width += width - entry_width(text_width);
        Self { heading, numeric, entries, text_width, width }
    }

    fn heading(&self) -> String {
        pad(&self.heading, self.width, self.numeric)
    }

    fn entry(&self, at: usize) -> String {
        let Some((text, detail)) = self.entries.get(at) else { return String::new() };
        let mut line = pad(text, self.text_width, self.numeric);
        if self.width > self.text_width {
            line.push(' ');
            line.push_str(&pad(detail, self.width - self.text_width - 1, self.numeric));
        }
        line
    }
}

fn pad(text: &str, width: usize, right: bool) -> String {
    let fill = " ".repeat(width.saturating_sub(columns_of(text)));
    if right { format!("{fill}{text}") } else { format!("{text}{fill}") }
}

/// Width of text in a terminal: 0 for combining marks, 2 for wide East Asian characters and emoji, else 1.
fn columns_of(text: &str) -> usize {
    let columns = |c: char| match c {
        '\u{300}'..='\u{36f}' | '\u{200b}'..='\u{200d}' | '\u{20d0}'..='\u{20ff}' | '\u{fe00}'..='\u{fe0f}' => 0,
        '\u{1100}'..='\u{115f}'
        | '\u{2e80}'..='\u{303e}'
        | '\u{3041}'..='\u{a4cf}'
        | '\u{ac00}'..='\u{d7a3}'
        | '\u{f900}'..='\u{faff}'
        | '\u{fe30}'..='\u{fe6f}'
        | '\u{ff00}'..='\u{ff60}'
        | '\u{ffe0}'..='\u{ffe6}'
        | '\u{1f300}'..='\u{1faff}'
        | '\u{20000}'..='\u{3fffd}' => 2,
        _ => 1,
    };
    text.chars().map(columns).sum()
}

/// White space becomes single spaces; control characters and bidirectional controls become U+FFFD.
fn one_line(text: &str) -> String {
    let words: Vec<&str> = text.split_whitespace().collect();
    words.join(" ").chars().map(|c| if c.is_control() || is_bidi_control(c) { '\u{fffd}' } else { c }).collect()
}

/// ASCII for the few other characters that the program itself writes, `?` for the rest.
fn ascii(text: &str) -> String {
    let mut out = String::new();
    for c in text.chars() {
        match c {
            '±' => out.push_str("+-"),
            '–' | '—' | '−' | '─' => out.push('-'),
            '…' => out.push_str("..."),
            'µ' => out.push('u'),
            '×' => out.push('x'),
            '≤' => out.push_str("<="),
            '≥' => out.push_str(">="),
            '‖' => out.push_str("||"),
            'Δ' => out.push('D'),
            c if c.is_ascii() => out.push(c),
            _ => out.push('?'),
        }
    }
    out
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
