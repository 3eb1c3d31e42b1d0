//! `swat run`: a study from one configuration file.

use super::common::{Common, print_json, print_line, say};
use super::names::Names;
use super::open::{OnDevice, Refusals, State};
use super::progress::Bars;
use super::ranks::{PartArgs, Work, refuse_pipes, refuse_ranks, start_processes};
use crate::backend::{Backend, DtypeChoice};
use crate::error::{Error, Result};
use crate::group::Together;
use crate::interrupt;
use crate::report::{results_text, write_report};
use crate::secure::study::{Outcome, RunConfig, Worker, run, run_names, work};
use clap::Args;
use serde_json::json;
use std::path::PathBuf;
use std::time::Duration;

/// A study from one file: probe, map, search, every setting tuned and evaluated, report
#[derive(Args)]
#[command(after_help = "Examples:
  swat run study.toml
  swat run study.toml --set tune.all_phase.lr=1e-5 --set out=study-cool
  swat run study.toml --set 'tune.seeds=[0,1,2]'     each setting with three training seeds: means and ranges
  swat run study.toml --gpus 8                       on all GPUs of this machine, a process each
  swat run study.toml --worker                       shares the study with every other worker, of any machine
  swat run study.toml --list-jobs | xargs -P 4 -d '\\n' -n 1 sh -c

Results of each stage are cached in the output directory; a stage runs again only if its inputs change. Tuning resumes
bit for bit.")]
pub(super) struct RunCommand {
    #[command(flatten)]
    refusals: Refusals,
    /// Configuration (TOML)
    #[arg(value_name = "CONFIG")]
    config: PathBuf,
    /// Precision of gradients and moments beside bf16 weights: f32 (12 bytes per trained parameter) or bf16 (6)
    #[arg(long, value_enum, default_value_t = State::F32)]
    state: State,
    /// Override a key: tune.all_phase.lr=1e-5
    #[arg(long = "set", value_name = "KEY=VALUE")]
    overrides: Vec<String>,
    /// Share the study with other workers, on any machines that see its output directory: each takes the stages that no
    /// other has, and takes over those of one that died. Ends when the whole study is done
    #[arg(long)]
    worker: bool,
    /// As a worker, end when this run is done, a setting with a training seed as --list-jobs names it
    #[arg(long = "job", value_name = "RUN", requires = "worker")]
    jobs: Vec<String>,
    /// Seconds without a sign of life after which the stage of a worker is taken over by another
    #[arg(long, value_name = "SECONDS", value_parser = seconds, default_value = "60", requires = "worker")]
    takeover_after: Duration,
    /// Print the commands that share the study, one a line, for a job array or xargs: one for each run, and a last one
    /// that waits for all and writes the report
    #[arg(long, conflicts_with = "worker")]
    list_jobs: bool,
    #[command(flatten)]
    parts: PartArgs,
    /// The configuration, with paths in the place of names on the hub.
    #[arg(skip)]
    resolved: Option<Box<RunConfig>>,
}

impl OnDevice for RunCommand {
    fn state(&self) -> State {
        self.state
    }

    fn model(&self) -> Option<PathBuf> {
        self.config().ok().map(|config| config.model)
    }

    fn dtype(&self, common: &Common) -> Result<DtypeChoice> {
        match common.dtype {
            DtypeChoice::Auto => Ok(self.config()?.dtype),
            asked => Ok(asked),
        }
    }

    fn resolve(&mut self, names: &mut Names<'_>) -> Result<()> {
        let mut config = self.config()?;
        names.model(&mut config.model)?;
        config.evaluate.guard.iter_mut().try_for_each(|guard| names.model(&mut guard.model).map(drop))?;
        let data = &mut config.data;
        names.data(&mut data.train)?;
        names.data(&mut data.evaluation)?;
        names.file("data.security", &mut data.security)?;
        for (key, file) in [
            ("data.task", &mut data.task),
            ("data.heldout", &mut data.heldout),
            ("data.replay", &mut data.replay),
            ("data.refusals", &mut data.refusals),
            ("data.attack", &mut data.attack),
            ("data.strict", &mut data.strict),
        ] {
            names.file_if_any(key, file)?;
        }
        self.resolved = Some(Box::new(config));
        Ok(())
    }

    fn run<B: Backend>(self, common: &Common, backend: B) -> Result<()> {
        let config = self.config()?;
        if !self.worker {
            return study(backend, common, &self.refusals, &config);
        }
        let refusals = self.refusals.list()?;
        interrupt::watch();
        let worker = Worker { timeout: self.takeover_after, lost };
        let mut bars = Bars::new(common);
        let outcome = work(&config, (&backend, &refusals), worker, &self.jobs, &mut bars.observer())?;
        bars.finish();
        match outcome {
            Some(outcome) => report(&outcome, common, &config),
            None if common.json => print_json(&json!({ "jobs": self.jobs })),
            None => print_line(&format!("done: {}", self.jobs.join(", "))),
        }
    }
}

/// Ends a worker whose stage another has taken over.
fn lost(why: &str) {
    say(&format!("error: {why}: this worker showed no sign of life for too long; start it again\n"));
    std::process::exit(1);
}

/// Seconds from 1 to a day, as a value parser of clap.
pub(super) fn seconds(text: &str) -> Result<Duration, String> {
    let parsed = text.trim().parse().ok().filter(|seconds| (1..=86_400).contains(seconds));
    parsed.map(Duration::from_secs).ok_or_else(|| "expected whole seconds from 1 to 86400".into())
}

impl RunCommand {
    pub(super) fn start(mut self, common: &Common) -> Result<()> {
        if self.list_jobs {
            return self.print_jobs(common);
        }
        if !self.worker {
            refuse_ranks("run", "--worker, with which any number of processes share a study")?;
        }
        match self.parts.work(common)? {
            Work::Whole => OnDevice::start(self, common),
            Work::Launcher(size) => {
                refuse_pipes(&[("CONFIG", &self.config)])?;
                // So that what it names is fetched, and refused, once.
                self.resolve(&mut Names::new(common))?;
                start_processes(size, Together::Apart, common)
            }
            Work::Part(_, common) => {
                self.worker = true;
                OnDevice::start(self, &common)
            }
        }
    }

    /// The command line as it was typed, for each run and for the whole study.
    fn print_jobs(&self, common: &Common) -> Result<()> {
        let typed: Vec<String> =
            std::env::args().filter(|arg| !["--list-jobs", "--json"].contains(&arg.as_str())).collect();
        let command = |more: &[&str]| {
            let words = typed.iter().map(String::as_str).chain(more.iter().copied());
            shlex::try_join(words).map_err(|e| Error::failed(format!("the command line: {e}"), "leave out the byte 0"))
        };
        let mut lines = Vec::new();
        for run in run_names(&self.config()?) {
            lines.push(command(&["--worker", "--job", &run])?);
        }
        lines.push(command(&["--worker"])?);
        if common.json { print_json(&lines) } else { lines.iter().try_for_each(|line| print_line(line)) }
    }

    fn config(&self) -> Result<RunConfig> {
        match &self.resolved {
            Some(config) => Ok(config.as_ref().clone()),
            None => RunConfig::read(&self.config, &self.overrides),
        }
    }
}

/// Runs a study and writes its report.
pub(super) fn study<B: Backend>(backend: B, common: &Common, refusals: &Refusals, config: &RunConfig) -> Result<()> {
    let refusals = refusals.list()?;
    interrupt::watch();
    let mut bars = Bars::new(common);
    let outcome = run(config, &backend, &refusals, &mut bars.observer())?;
    bars.finish();
    report(&outcome, common, config)
}

/// Writes and prints the report of a study.
fn report(outcome: &Outcome, common: &Common, config: &RunConfig) -> Result<()> {
    let command: Vec<String> = std::env::args().skip(1).collect();
    write_report(outcome, config, &format!("swat {}", command.join(" ")), &config.out)?;
    if common.json {
        return print_json(outcome);
    }
    print_line(results_text(outcome, config).trim_end())?;
    print_line(&format!("report: {}", config.out.join("report.html").display()))
}
