//! One self-contained HTML page: no request leaves it, it reads on paper, on a phone, in light and in dark.

use super::format;
use super::palette::Tone;
use super::svg::escape;
use super::table::{Entry, Table};
use std::fmt::Write as _;
use std::time::Duration;

const CSS: &str = include_str!("page.css");
const JS: &str = include_str!("page.js");

/// A page.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// Title of the page.
    pub title: String,
    /// One or two sentences under it.
    pub subtitle: String,
    /// The few numbers that matter most, as tiles.
    pub highlights: Vec<Highlight>,
    /// Sections in order; two or more get a table of contents.
    pub sections: Vec<Section>,
    /// Where the numbers come from.
    pub footer: Footer,
}

/// A number large enough to be seen first.
#[derive(Clone, Debug, Default)]
pub struct Highlight {
    /// What it is.
    pub label: String,
    /// The number with its unit.
    pub value: String,
    /// Interval and context.
    pub detail: String,
    /// The colour of its edge: that of the same setting in the charts.
    pub tone: Tone,
}

/// A part of the page: text, then figures, then tables.
#[derive(Clone, Debug, Default)]
pub struct Section {
    /// Heading.
    pub heading: String,
    /// Paragraphs, parted by blank lines; `code` between backticks. Nothing else has a meaning.
    pub text: String,
    /// Drawings, two side by side where the page is wide enough.
    pub figures: Vec<Figure>,
    /// Tables.
    pub tables: Vec<Table>,
}

/// A drawing on the page.
#[derive(Clone, Debug, Default)]
pub struct Figure {
    /// Stem of the file that it is saved as: `robustness`.
    pub name: String,
    /// A document made by this room; it goes into the page as it is.
    pub svg: String,
    /// What to see in it.
    pub caption: String,
    /// Over the whole width of the page.
    pub wide: bool,
}

/// What it takes to repeat the run.
#[derive(Clone, Debug, Default)]
pub struct Footer {
    /// Seeds of the run, by what they seed: `("training", vec![1, 2, 3])`.
    pub seeds: Vec<(String, Vec<u64>)>,
    /// Names and versions: program, model hash, device, driver.
    pub versions: Vec<(String, String)>,
    /// How long it took.
    pub wall_time: Option<Duration>,
    /// The command line.
    pub command: String,
}

impl Report {
    /// The page as one HTML document.
    pub fn html(&self) -> String {
        let mut page = String::with_capacity(64 << 10);
        let title = escape(&self.title);
        // The policy is a second wall behind the escaping: nothing may be loaded or sent, whatever text got in.
        let _ = write!(
            page,
            "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
             <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; \
             script-src 'unsafe-inline'; base-uri 'none'; form-action 'none'\">\n\
             <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
             <meta name=\"color-scheme\" content=\"light dark\">\n<title>{title}</title>\n<style>\n{CSS}{}\n\
             @media screen and (prefers-color-scheme: dark) {{ {} }}\n</style>\n</head>\n<body>\n<div class=\"page\">\n\
             <header>\n<h1>{title}</h1>\n",
            Tone::tile_css(),
            Tone::dark_css()
        );
        if !self.subtitle.is_empty() {
            let _ = writeln!(page, "<p class=\"subtitle\">{}</p>", inline(&self.subtitle));
        }
        self.highlights(&mut page);
        self.contents(&mut page);
        page.push_str("</header>\n<main>\n");
        for (i, section) in self.sections.iter().enumerate() {
            section.html(&mut page, i + 1);
        }
        page.push_str("</main>\n");
        self.footer.html(&mut page);
        let _ = write!(page, "</div>\n<script>\n{JS}</script>\n</body>\n</html>\n");
        page
    }

    fn highlights(&self, page: &mut String) {
        if self.highlights.is_empty() {
            return;
        }
        page.push_str("<dl class=\"highlights\">\n");
        for tile in &self.highlights {
            let _ = writeln!(
                page,
                "<div class=\"highlight b-{}\"><dt>{}</dt><dd class=\"value\">{}</dd><dd class=\"detail\">{}</dd></div>",
                tile.tone.name(),
                escape(&tile.label),
                escape(&tile.value),
                escape(&tile.detail)
            );
        }
        page.push_str("</dl>\n");
    }

    fn contents(&self, page: &mut String) {
        if self.sections.len() < 2 {
            return;
        }
        page.push_str("<nav aria-label=\"Contents\"><ol>\n");
        for (i, section) in self.sections.iter().enumerate() {
            let _ = writeln!(page, "<li><a href=\"#section-{}\">{}</a></li>", i + 1, escape(&section.heading));
        }
        page.push_str("</ol></nav>\n");
    }
}

impl Section {
    fn html(&self, page: &mut String, number: usize) {
        let heading = escape(&self.heading);
        let _ = writeln!(
            page,
            "<section id=\"section-{number}\" aria-labelledby=\"heading-{number}\">\n<h2 id=\"heading-{number}\">{heading}</h2>"
        );
        for paragraph in self.text.split("\n\n").map(str::trim).filter(|p| !p.is_empty()) {
            let _ = writeln!(page, "<p>{}</p>", inline(paragraph));
        }
        if !self.figures.is_empty() {
            page.push_str("<div class=\"figures\">\n");
            for figure in &self.figures {
                figure.html(page);
            }
            page.push_str("</div>\n");
        }
        for table in &self.tables {
            table_html(page, table);
        }
        page.push_str("</section>\n");
    }
}

impl Figure {
    fn html(&self, page: &mut String) {
        let class = if self.wide { " class=\"wide\"" } else { "" };
        let _ = write!(page, "<figure{class}><div class=\"drawing\">\n{}</div>", self.svg);
        if !self.caption.is_empty() {
            let _ = write!(page, "<figcaption>{}</figcaption>", inline(&self.caption));
        }
        page.push_str("</figure>\n");
    }
}

impl Footer {
    fn html(&self, page: &mut String) {
        let mut items: Vec<(String, String)> = Vec::new();
        if !self.command.is_empty() {
            items.push(("Command".into(), format!("<code>{}</code>", escape(&self.command))));
        }
        for (what, seeds) in &self.seeds {
            let seeds: Vec<String> = seeds.iter().map(u64::to_string).collect();
            items.push((format!("Seeds, {}", escape(what)), seeds.join(", ")));
        }
        if let Some(time) = self.wall_time {
            items.push(("Wall time".into(), format::duration(time)));
        }
        for (name, version) in &self.versions {
            items.push((escape(name), escape(version)));
        }
        if items.is_empty() {
            return;
        }
        page.push_str("<footer>\n<h2>How this was made</h2>\n<dl>\n");
        for (name, value) in items {
            let _ = writeln!(page, "<dt>{name}</dt><dd>{value}</dd>");
        }
        page.push_str("</dl>\n</footer>\n");
    }
}

/// Escaped text in which backticks enclose code; a backtick without a partner is itself.
fn inline(text: &str) -> String {
    let mut out = String::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once('`') {
        let Some((code, after)) = after.split_once('`') else { break };
        let _ = write!(out, "{}<code>{}</code>", escape(before), escape(code));
        rest = after;
    }
    out + &escape(rest)
}

fn table_html(page: &mut String, table: &Table) {
    page.push_str("<div class=\"table\">\n");
    if !table.caption.is_empty() {
        let _ = writeln!(page, "<h3>{}</h3>", inline(&table.caption));
    }
    let label = escape(if table.caption.is_empty() { "Table" } else { &table.caption });
    // A region that scrolls must be reachable with the keyboard.
    let _ = writeln!(
        page,
        "<div class=\"scroll\" role=\"region\" tabindex=\"0\" aria-label=\"{label}\">\n<table>\n<thead><tr>"
    );
    for column in &table.columns {
        let class = if column.numeric { " class=\"n\"" } else { "" };
        let _ = write!(page, "<th scope=\"col\"{class}>{}", escape(&column.name));
        if !column.help.is_empty() {
            let _ = write!(page, "<small>{}</small>", escape(&column.help));
        }
        page.push_str("</th>");
    }
    page.push_str("</tr></thead>\n<tbody>\n");
    for (i, row) in table.rows.iter().enumerate() {
        page.push_str(if table.emphasized.contains(&i) { "<tr class=\"strong\">" } else { "<tr>" });
        for (at, column) in table.columns.iter().enumerate() {
            entry_html(page, row.get(at).unwrap_or(&Entry::default()), column.numeric, at == 0);
        }
        page.push_str("</tr>\n");
    }
    page.push_str("</tbody>\n</table>\n</div>\n");
    if !table.note.is_empty() {
        let _ = writeln!(page, "<p class=\"note\">{}</p>", inline(&table.note));
    }
    page.push_str("</div>\n");
}

fn entry_html(page: &mut String, entry: &Entry, numeric: bool, first: bool) {
    let name = if first { "th scope=\"row\"" } else { "td" };
    let class = if numeric { " class=\"n\"" } else { "" };
    let order = match entry.order {
        Some(order) if order.is_finite() => order.to_string(),
        _ if numeric => String::new(),
        _ => escape(&entry.text),
    };
    let _ = write!(page, "<{name}{class} data-order=\"{order}\">{}", escape(&entry.text));
    if !entry.detail.is_empty() {
        let _ = write!(page, "<small>{}</small>", escape(&entry.detail));
    }
    page.push_str(if first { "</th>" } else { "</td>" });
}
