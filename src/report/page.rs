//! A self-contained HTML page: loads nothing, adapts to phones, dark mode and print.

use super::palette::Tone;
use super::svg::escape;
use super::table::Table;
use crate::error::{Error, Result};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Serde, Value};
use minijinja::{Environment, Output, State, UndefinedBehavior, context, escape_formatter};
use serde::Serialize;

const TEMPLATE: &str = include_str!("page.html.jinja");
const CSS: &str = include_str!("page.css");
const JS: &str = include_str!("page.js");

/// A page. Texts, captions and notes may hold `code` between backticks, and no other markup.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Report {
    /// Heading of the page and title of the document.
    pub title: String,
    /// One or two sentences below the title.
    pub subtitle: String,
    /// Headline numbers, as tiles at the top.
    pub highlights: Vec<Highlight>,
    /// Sections; two or more get a table of contents.
    pub sections: Vec<Section>,
    /// How the run can be repeated.
    pub footer: Footer,
}

/// A tile with one number.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Highlight {
    /// What was measured.
    pub label: String,
    /// The number with its unit.
    pub value: String,
    /// Interval and context, in lines.
    pub detail: String,
    /// Colour of the edge.
    pub tone: Tone,
}

/// Text, then figures, then tables.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Section {
    /// Heading, also in the table of contents.
    pub heading: String,
    /// Paragraphs separated by blank lines.
    pub text: String,
    /// Two side by side where the page is wide enough.
    pub figures: Vec<Figure>,
    /// Below the figures.
    pub tables: Vec<Table>,
}

/// A drawing with its caption.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Figure {
    /// Identifier within the page, such as `robustness`.
    pub name: String,
    /// SVG document by this crate; it is **not** escaped.
    pub svg: String,
    /// Caption below the drawing.
    pub caption: String,
    /// Spans both columns of the page.
    pub wide: bool,
}

impl Figure {
    /// A figure of half the page's width.
    pub fn new(name: &str, svg: String, caption: impl Into<String>) -> Self {
        Self { name: name.into(), svg, caption: caption.into(), wide: false }
    }

    /// Over the whole width of the page.
    pub fn wide(self) -> Self {
        Self { wide: true, ..self }
    }
}

/// How to repeat the run.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Footer {
    /// The command line; empty = not shown.
    pub command: String,
    /// Names and values: seeds, versions, model hash, wall time.
    pub items: Vec<(String, String)>,
}

impl Report {
    /// The page as one HTML document.
    ///
    /// # Errors
    /// [`Error::Failed`] where the template does not render, which is a bug.
    pub fn html(&self) -> Result<String> {
        let mut environment = Environment::new();
        environment.set_undefined_behavior(UndefinedBehavior::Strict);
        environment.set_formatter(write_value);
        let tones: Vec<_> = Tone::all().map(|tone| (tone, tone.light().to_string(), tone.dark().to_string())).collect();
        let values = context! { report => Serde(self), tones => Serde(tones), css => CSS, js => JS };
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        let html = syntax.and_then(|syntax| {
            environment.set_syntax(syntax);
            environment.render_named_str("page.html", TEMPLATE, values)
        });
        html.map_err(|e| Error::failed(format!("cannot render the report: {e}"), "this is a bug; please report it"))
    }
}

/// Escapes text as in drawings, control characters included; values marked as safe are written as they are.
fn write_value(out: &mut Output<'_>, state: &mut State<'_, '_>, value: &Value) -> Result<(), minijinja::Error> {
    match value.as_str() {
        Some(text) if !value.is_safe() => out.write_str(&escape(text)).map_err(minijinja::Error::from),
        _ => escape_formatter(out, state, value),
    }
}
