//! How results look: plain-text and Markdown tables, heat maps (SVG and PNG), charts (SVG), one self-contained HTML
//! page, and Chrome traces. Every string that comes in is untrusted and escaped here; numbers are formatted in
//! [`mod@format`] and nowhere else.
//!
//! A drawing carries its light colours as attributes, so a saved `.svg` looks right in any viewer, and class names
//! through which the page recolours it in dark mode.

mod axis;
pub mod chart;
pub mod format;
pub mod heatmap;
pub mod html;
pub mod palette;
mod profile;
mod raster;
mod study;
mod svg;
pub mod swat;
pub mod table;
pub mod trace;

pub use heatmap::{Heatmap, Scale};
pub use html::{Figure, Footer, Highlight, Report, Section};
pub use palette::{Ramp, Tone};
pub use profile::{memory_table, profile_tables, write_trace};
pub use study::{results_text, swat_report, write_report};
pub use table::{Entry, Table, TextStyle};
pub use trace::TraceWriter;
