//! Progress on stderr: bars on a terminal, elsewhere a line every ten seconds.

use super::common::{Common, say};
use crate::backend::Backend;
use crate::engine::Plan;
use crate::error::Result;
use crate::progress::Progress;
use crate::report::format::{bytes, percent};
use crate::report::{EventFile, memory_table};
use crate::secure::MODS_PHASE;
use crate::train::{Callbacks, RunPosition, StepMetrics};
use indicatif::{ProgressBar, ProgressStyle};
use std::io::IsTerminal;
use std::time::{Duration, Instant};

/// Time between lines where stderr is not a terminal.
const INTERVAL: Duration = Duration::from_secs(10);

/// Progress on stderr, of one task at a time; none with `--quiet`.
pub(super) enum Bars {
    Quiet,
    Terminal(Option<(String, ProgressBar)>),
    Lines(Lines),
}

impl Bars {
    pub(super) fn new(common: &Common) -> Self {
        match (common.quiet, std::io::stderr().is_terminal()) {
            (true, _) => Self::Quiet,
            (false, true) => Self::Terminal(None),
            (false, false) => Self::Lines(Lines::default()),
        }
    }

    /// Shows that `done` of `total` units of a task are finished.
    pub(super) fn report(
        &mut self,
        task: &str,
        unit: &str,
        (done, total): (u64, u64),
        message: impl FnOnce() -> String,
    ) {
        match self {
            Self::Quiet => {}
            Self::Lines(lines) => {
                if let Some(line) = lines.line(Instant::now(), task, unit, (done, total), message) {
                    say(&line);
                }
            }
            Self::Terminal(shown) => {
                if let Some((_, bar)) = shown.take_if(|(name, _)| name != task) {
                    bar.finish_and_clear();
                }
                let (_, bar) = shown.get_or_insert_with(|| (task.to_owned(), bar(task, unit, (done, total))));
                bar.set_length(total);
                bar.set_position(done);
                bar.set_message(message());
            }
        }
    }

    /// The observer of the library's progress reports.
    pub(super) fn observer(&mut self) -> impl FnMut(Progress<'_>) + '_ {
        |report| {
            let loss = || report.loss.map(|loss| format!("loss {loss:.3}")).unwrap_or_default();
            self.report(report.task, "", (report.done as u64, report.total as u64), loss);
        }
    }

    pub(super) fn finish(&mut self) {
        if let Self::Terminal(shown) = self
            && let Some((_, bar)) = shown.take()
        {
            bar.finish_and_clear();
        }
    }
}

fn bar(task: &str, unit: &str, (done, total): (u64, u64)) -> ProgressBar {
    let bar = ProgressBar::new(total).with_prefix(task.to_owned()).with_position(done);
    let template = format!(
        "{{prefix}} {{wide_bar}} {{pos}}/{{len}} {unit}  {{per_sec}}  {{elapsed}} elapsed, {{eta}} left {{msg}}"
    );
    if let Ok(style) = ProgressStyle::with_template(&template) {
        bar.set_style(style);
    }
    bar.reset_eta();
    bar
}

/// Progress as plain lines.
#[derive(Default)]
pub(super) struct Lines {
    task: String,
    /// When the task began, and how much of it was done by then.
    began: Option<(Instant, u64)>,
    /// The last line, of any task.
    last: Option<Instant>,
}

impl Lines {
    /// The line to print now, if one is due.
    fn line(
        &mut self,
        now: Instant,
        task: &str,
        unit: &str,
        (done, total): (u64, u64),
        message: impl FnOnce() -> String,
    ) -> Option<String> {
        if self.task != task || self.began.is_none() {
            (self.task, self.began) = (task.to_owned(), Some((now, done)));
        }
        let last = *self.last.get_or_insert(now);
        if now.duration_since(last) < INTERVAL {
            return None;
        }
        self.last = Some(now);
        let (began, before) = self.began?;
        let per_unit = now.duration_since(began).as_secs_f64() / done.checked_sub(before).filter(|n| *n > 0)? as f64;
        let left = per_unit * total.saturating_sub(done) as f64;
        let share = percent(done as f64 / total.max(1) as f64, 0);
        let parts = [format!("{task}:"), format!("{done}/{total}"), unit.to_owned(), format!("({share})"), message()];
        let parts: Vec<String> = parts.into_iter().filter(|part| !part.is_empty()).collect();
        Some(format!("{}, {left:.0} s left\n", parts.join(" ")))
    }
}

/// Progress of a tuning run: a bar per phase, with loss, throughput and peak memory.
pub(super) struct StepBar {
    bars: Bars,
    /// Memory and compute plan of each phase, by its name.
    pub(super) plans: Vec<(String, Plan)>,
    /// Where scalars of each step go as well.
    pub(super) events: Option<EventFile>,
}

impl StepBar {
    pub(super) fn new(common: &Common) -> Self {
        Self { bars: Bars::new(common), plans: Vec::new(), events: None }
    }

    pub(super) fn finish(&mut self) {
        self.bars.finish();
    }

    fn record(&mut self, metrics: &StepMetrics) {
        let scalars = [
            ("train/loss", metrics.loss),
            ("train/lr", Some(metrics.lr)),
            ("train/grad_norm", metrics.grad_norm),
            ("train/tok_per_s", Some(metrics.tok_per_s)),
            ("eval/loss", metrics.eval_loss),
            ("eval/refusal_log_odds", metrics.eval_refusal),
        ];
        let scalars: Vec<(&str, f64)> = scalars.into_iter().filter_map(|(tag, value)| Some((tag, value?))).collect();
        if let Some(events) = &mut self.events
            && let Err(e) = events.scalars(metrics.step, &scalars)
        {
            say(&format!("note: no more events for TensorBoard are written: {e}\n"));
            self.events = None;
        }
    }

    fn report(&mut self, at: &RunPosition, message: impl FnOnce() -> String) {
        let task = if at.phase == MODS_PHASE { "tuning mods" } else { "tuning all" };
        self.bars.report(task, "steps", (at.phase_step, at.phase_steps), message);
    }
}

impl<B: Backend> Callbacks<B> for StepBar {
    fn run_begins(&mut self, plans: &[(String, Plan)]) {
        self.plans = plans.to_vec();
        if !matches!(self.bars, Bars::Quiet) {
            say(&memory_table(plans).text());
        }
    }

    fn prepares(&mut self, progress: Progress<'_>) {
        self.bars.observer()(progress);
    }

    fn note(&mut self, text: &str) {
        say(&format!("note: {text}\n"));
    }

    fn info(&mut self, text: &str) {
        if !matches!(self.bars, Bars::Quiet) {
            say(&format!("{text}\n"));
        }
    }

    fn phase_begins(&mut self, at: &RunPosition) -> Result<()> {
        self.report(at, String::new);
        Ok(())
    }

    fn step(&mut self, metrics: &StepMetrics, at: &RunPosition) -> Result<()> {
        self.record(metrics);
        self.report(at, || {
            let loss = metrics.loss.map_or("skipped".to_string(), |loss| format!("loss {loss:.4}"));
            let light = metrics.speed_of_light.map(|share| format!("  {} of light", percent(share, 0)));
            let peak = bytes(metrics.peak_bytes);
            let held = metrics.eval_loss.map(|loss| format!("  held-out loss {loss:.4}")).unwrap_or_default();
            format!("{loss}{held}  {:.0} tok/s{}  {peak}", metrics.tok_per_s, light.unwrap_or_default())
        });
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_every_ten_seconds() {
        let (mut lines, start) = (Lines::default(), Instant::now());
        let mut at = |seconds, task: &str, done| {
            let now = start + Duration::from_secs(seconds);
            lines.line(now, task, "steps", (done, 100), || "loss 1.5".into())
        };
        assert_eq!(at(0, "tuning all", 20), None);
        assert_eq!(at(9, "tuning all", 29), None);
        // 20 steps in 10 seconds, from step 20 on, as after a resume; 60 are left.
        assert_eq!(at(10, "tuning all", 40).unwrap(), "tuning all: 40/100 steps (40 %) loss 1.5, 30 s left\n");
        assert_eq!(at(19, "tuning all", 60), None);
        // A new task has a rate of its own.
        assert_eq!(at(19, "judge", 0), None);
        assert_eq!(at(24, "judge", 10).unwrap(), "judge: 10/100 steps (10 %) loss 1.5, 45 s left\n");
    }
}
