//! Presentation of results: tables as plain text, Markdown and HTML, SVG charts and heat maps, a self-contained HTML
//! page, and Chrome traces. All text that comes in is untrusted and escaped here; numbers are formatted in
//! [`mod@format`].
//!
//! A drawing carries its light colours as attributes, so that a saved `.svg` is right in any viewer, and class names by
//! which the page recolours it in dark mode.

mod axis;
mod card;
pub mod chart;
mod check;
mod events;
pub mod format;
pub mod heatmap;
pub mod page;
pub mod palette;
mod profile;
mod secure;
mod study;
mod svg;
pub mod table;
pub mod trace;

pub use card::model_card;
pub use check::{agreement_table, agreement_tables, check_tables};
pub use events::EventFile;
pub use heatmap::Heatmap;
pub use page::Report;
pub use palette::{Ramp, Tone};
pub use profile::{is_trace, memory_table, profile_tables, write_trace};
pub use secure::{secure_report, times_table, tried_table};
pub use study::{perturbation, results_text, robustness_map, robustness_table, study_report, write_report};
pub use svg::is_drawing;
pub use table::{Entry, Table};
pub use trace::Trace;
