//! Progress on stderr, on a terminal only.

use super::Common;
use crate::backend::Backend;
use crate::engine::Plan;
use crate::error::Result;
use crate::progress::Progress;
use crate::report::format::{bytes, percent};
use crate::report::{TextStyle, memory_table};
use crate::secure::MODS_PHASE;
use crate::train::{Callbacks, RunPosition, StepMetrics};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// A bar with rate and time left; hidden with `--quiet`, and where stderr is not a terminal.
pub(super) fn bar(
    common: &Common,
    total: u64,
    what: impl Into<std::borrow::Cow<'static, str>>,
    unit: &str,
) -> ProgressBar {
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

/// The bar of a tuning run: one a phase, with loss, rate and time left.
pub(super) struct StepBar {
    common: Common,
    bar: Option<ProgressBar>,
    /// What each phase takes, by its name.
    pub(super) plans: Vec<(String, Plan)>,
}

impl StepBar {
    pub(super) fn new(common: &Common) -> Self {
        Self { common: common.clone(), bar: None, plans: Vec::new() }
    }

    pub(super) fn finish(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }
}

impl<B: Backend> Callbacks<B> for StepBar {
    fn run_begins(&mut self, plans: &[(String, Plan)]) {
        self.plans = plans.to_vec();
        if !self.common.quiet {
            eprint!("{}", memory_table(plans).text(TextStyle::Unicode));
        }
    }

    fn note(&mut self, text: &str) {
        eprintln!("note: {text}");
    }

    fn phase_begins(&mut self, at: &RunPosition) -> Result<()> {
        self.finish();
        let what = if at.phase == MODS_PHASE { "tuning mods" } else { "tuning all" };
        let bar = bar(&self.common, at.phase_steps, what, "steps");
        bar.set_position(at.phase_step);
        bar.reset_eta();
        self.bar = Some(bar);
        Ok(())
    }

    fn step(&mut self, metrics: &StepMetrics, _at: &RunPosition) -> Result<()> {
        if let Some(bar) = &self.bar {
            bar.inc(1);
            let loss = metrics.loss.map_or("skipped".to_string(), |loss| format!("loss {loss:.4}"));
            let light =
                metrics.speed_of_light.map_or(String::new(), |share| format!("  {} of light", percent(share, 0)));
            let peak = bytes(metrics.peak_bytes);
            bar.set_message(format!("{loss}  {:.0} tok/s{light}  {peak}", metrics.tok_per_s));
        }
        Ok(())
    }
}

/// One bar at a time, for tasks that report by name.
pub(super) struct Bars {
    common: Common,
    bar: Option<(String, ProgressBar)>,
}

impl Bars {
    pub(super) fn new(common: &Common) -> Self {
        Self { common: common.clone(), bar: None }
    }

    /// What the library reports to.
    pub(super) fn observer(&mut self) -> impl FnMut(Progress<'_>) + '_ {
        |report| {
            let known = self.bar.as_ref().is_some_and(|(task, _)| task == report.task);
            if !known {
                self.finish();
                let bar = bar(&self.common, report.total as u64, report.task.to_owned(), "");
                self.bar = Some((report.task.to_owned(), bar));
            }
            if let Some((_, bar)) = &self.bar {
                bar.set_length(report.total as u64);
                bar.set_position(report.done as u64);
                if let Some(loss) = report.loss {
                    bar.set_message(format!("loss {loss:.3}"));
                }
            }
        }
    }

    pub(super) fn finish(&mut self) {
        if let Some((_, bar)) = self.bar.take() {
            bar.finish_and_clear();
        }
    }
}
