//! Progress on stderr, on a terminal only.

use super::Common;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// A bar with rate and time left; hidden with `--quiet`, and where stderr is not a terminal.
pub(super) fn bar(common: &Common, total: u64, what: &'static str, unit: &str) -> ProgressBar {
    let bar = ProgressBar::new(total);
    if common.quiet {
        bar.set_draw_target(ProgressDrawTarget::hidden());
    }
    let template =
        format!("{{prefix}} {{wide_bar}} {{pos}}/{{len}} {unit}  {{per_sec}}  {{elapsed}} gone, {{eta}} left {{msg}}");
    if let Ok(style) = ProgressStyle::with_template(&template) {
        bar.set_style(style);
    }
    bar.set_prefix(what);
    bar
}
