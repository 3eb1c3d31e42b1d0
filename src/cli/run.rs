//! `swat run`: a study from one configuration file.

use super::common::{Common, print_json, print_line};
use super::names::Names;
use super::open::{OnDevice, Refusals, State};
use super::progress::Bars;
use crate::backend::{Backend, DtypeChoice};
use crate::error::Result;
use crate::interrupt;
use crate::report::{results_text, write_report};
use crate::secure::study::{RunConfig, run};
use clap::Args;
use std::path::PathBuf;

/// A study from one file: probe, map, search, every setting tuned and evaluated, report
#[derive(Args)]
#[command(after_help = "Examples:
  swat run study.toml
  swat run study.toml --set tune.all_phase.lr=1e-5 --set out=study-cool
  swat run study.toml --set 'tune.seeds=[0,1,2]'     each setting with three training seeds: means and ranges

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
        names.data(&mut config.data.train)?;
        self.resolved = Some(Box::new(config));
        Ok(())
    }

    fn run<B: Backend>(self, common: &Common, backend: B) -> Result<()> {
        study(backend, common, &self.refusals, &self.config()?)
    }
}

impl RunCommand {
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
    let command: Vec<String> = std::env::args().skip(1).collect();
    write_report(&outcome, config, &format!("swat {}", command.join(" ")), &config.out)?;
    if common.json {
        return print_json(&outcome);
    }
    print_line(results_text(&outcome, config).trim_end())?;
    print_line(&format!("report: {}", config.out.join("report.html").display()))
}
