//! Progress on stderr, on a terminal only.

use super::common::Common;
use crate::backend::Backend;
use crate::engine::Plan;
use crate::error::Result;
use crate::progress::Progress;
use crate::report::format::{bytes, percent};
use crate::report::memory_table;
use crate::secure::MODS_PHASE;
use crate::train::{Callbacks, RunPosition, StepMetrics};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Progress bars on stderr, one at a time; hidden with `--quiet`, and where stderr is not a terminal.
pub(super) struct Bars {
    quiet: bool,
    bar: Option<(String, ProgressBar)>,
}

impl Bars {
    pub(super) fn new(common: &Common) -> Self {
        Self { quiet: common.quiet, bar: None }
    }

    /// The bar of a task, in `unit`s; a new one if the last was of another task.
    pub(super) fn show(&mut self, task: &str, unit: &str, total: u64) -> &ProgressBar {
        if self.bar.as_ref().is_none_or(|(shown, _)| shown != task) {
            self.finish();
        }
        let quiet = self.quiet;
        let (_, bar) = self.bar.get_or_insert_with(|| {
            let bar = ProgressBar::new(total).with_prefix(task.to_owned());
            if quiet {
                bar.set_draw_target(ProgressDrawTarget::hidden());
            }
            let template = format!(
                "{{prefix}} {{wide_bar}} {{pos}}/{{len}} {unit}  {{per_sec}}  {{elapsed}} elapsed, {{eta}} left {{msg}}"
            );
            if let Ok(style) = ProgressStyle::with_template(&template) {
                bar.set_style(style);
            }
            (task.to_owned(), bar)
        });
        bar.set_length(total);
        bar
    }

    /// The observer of the library's progress reports.
    pub(super) fn observer(&mut self) -> impl FnMut(Progress<'_>) + '_ {
        |report| {
            let bar = self.show(report.task, "", report.total as u64);
            bar.set_position(report.done as u64);
            if let Some(loss) = report.loss {
                bar.set_message(format!("loss {loss:.3}"));
            }
        }
    }

    pub(super) fn finish(&mut self) {
        if let Some((_, bar)) = self.bar.take() {
            bar.finish_and_clear();
        }
    }
}

/// Progress of a tuning run: a bar per phase, with loss, throughput and peak memory.
pub(super) struct StepBar {
    bars: Bars,
    /// Memory and compute plan of each phase, by its name.
    pub(super) plans: Vec<(String, Plan)>,
}

impl StepBar {
    pub(super) fn new(common: &Common) -> Self {
        Self { bars: Bars::new(common), plans: Vec::new() }
    }

    pub(super) fn finish(&mut self) {
        self.bars.finish();
    }

    fn bar(&mut self, at: &RunPosition) -> &ProgressBar {
        let task = if at.phase == MODS_PHASE { "tuning mods" } else { "tuning all" };
        self.bars.show(task, "steps", at.phase_steps)
    }
}

impl<B: Backend> Callbacks<B> for StepBar {
    fn run_begins(&mut self, plans: &[(String, Plan)]) {
        self.plans = plans.to_vec();
        if !self.bars.quiet {
            eprint!("{}", memory_table(plans).text());
        }
    }

    fn note(&mut self, text: &str) {
        eprintln!("note: {text}");
    }

    fn phase_begins(&mut self, at: &RunPosition) -> Result<()> {
        let bar = self.bar(at);
        bar.set_position(at.phase_step);
        bar.reset_eta();
        Ok(())
    }

    fn step(&mut self, metrics: &StepMetrics, at: &RunPosition) -> Result<()> {
        let loss = metrics.loss.map_or("skipped".to_string(), |loss| format!("loss {loss:.4}"));
        let light = metrics.speed_of_light.map(|share| format!("  {} of light", percent(share, 0))).unwrap_or_default();
        let peak = bytes(metrics.peak_bytes);
        let bar = self.bar(at);
        bar.inc(1);
        bar.set_message(format!("{loss}  {:.0} tok/s{light}  {peak}", metrics.tok_per_s));
        Ok(())
    }
}
