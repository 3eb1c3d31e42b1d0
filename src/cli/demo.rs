//! `swat demo`: the method on an embedded model, without downloads.

use super::common::{Common, print_line};
use super::open::{OnDevice, Refusals};
use super::progress::Bars;
use crate::backend::Backend;
use crate::error::Result;
use crate::io::{IfExists, check_not_in};
use crate::progress::{Observer, Progress};
use crate::secure::study::claim_folder;
use crate::secure::{DEMO_SEED, Stage, demo_study, make_tiny_model, write_demo_model};
use crate::train::{Callbacks, RunPosition, StepMetrics};
use clap::Args;
use std::path::{Path, PathBuf};

/// The whole method on an embedded tiny aligned model, in a minute on two cores: plain tuning, SWAT and its control, the
/// recommended recipe, and a verdict
#[derive(Args)]
#[command(after_help = "Examples:
  swat demo                            writes swat-demo/report.html
  swat demo --seeds 5                  each setting with five training seeds: means and ranges
  swat demo --make-model tiny          trains such a model from scratch (some minutes)
  swat demo --model tiny --out other   and studies it

The model speaks a language of made-up words with forbidden combinations of verbs and objects, which it was trained to
refuse. Harmless tuning data with a new style of answers makes it forget that; its own answers, replayed, keep it.")]
pub(super) struct Demo {
    /// Output directory; a second run continues from it
    #[arg(long, value_name = "DIR", default_value = "swat-demo")]
    out: PathBuf,
    /// Number of training seeds, from --seed on. Each setting is tuned and evaluated with each; the report shows means
    /// and ranges over them
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=100))]
    seeds: u64,
    /// A model made by --make-model, in place of the embedded one
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// Train a model directory from scratch: weights and data by --seed, words by --language-seed
    #[arg(long, value_name = "DIR")]
    make_model: Option<PathBuf>,
    /// Seed of the words and facts of the language; 1 for the embedded model
    #[arg(long, default_value_t = DEMO_SEED)]
    language_seed: u64,
    /// Replace --make-model's directory
    #[arg(long)]
    force: bool,
}

impl OnDevice for Demo {
    fn model(&self) -> Option<PathBuf> {
        None
    }

    fn run<B: Backend>(self, common: &Common, backend: B) -> Result<()> {
        if let Some(dir) = &self.make_model {
            let mut bars = Bars::new(common);
            let seed = if common.seed == 0 { DEMO_SEED } else { common.seed };
            let stages = Stage::recipe();
            make_tiny_model(
                backend,
                self.language_seed,
                seed,
                &stages,
                dir,
                IfExists::from_force(self.force),
                &mut MakeProgress(&mut bars.observer()),
            )?;
            bars.finish();
            return print_line(&format!("made {}", dir.display()));
        }
        let inputs: Vec<(&str, &Path)> = self.model.iter().map(|dir| ("--model", dir.as_path())).collect();
        check_not_in(&[("--out", &self.out)], &inputs)?;
        let written: &[&str] = if self.model.is_none() { &["model", "data"] } else { &["data"] };
        claim_folder(&self.out, written)?;
        let model = match self.model {
            Some(dir) => dir,
            None => {
                let dir = self.out.join("model");
                write_demo_model(&dir)?;
                dir
            }
        };
        let config = demo_study(&model, self.language_seed, common.seed, self.seeds, &self.out)?;
        super::run::study(backend, common, &Refusals::default(), &config)
    }
}

/// Progress of making a model.
struct MakeProgress<'a>(Observer<'a>);

impl<B: Backend> Callbacks<B> for MakeProgress<'_> {
    fn step(&mut self, metrics: &StepMetrics, at: &RunPosition) -> Result<()> {
        let (done, total) = (at.phase_step as usize, at.phase_steps as usize);
        (self.0)(Progress { task: &at.phase, done, total, loss: metrics.loss });
        Ok(())
    }
}
