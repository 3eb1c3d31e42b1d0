//! `swat search`: from the map to Mods_Rob.

use super::open::{ModelArgs, OnDevice};
use super::progress::Bars;
use super::robustness::score;
use super::{Common, print_json, print_line};
use crate::backend::Backend;
use crate::data::SecurityPrompt;
use crate::error::{Error, Result};
use crate::modules::ModuleSet;
use crate::report::format::{fixed, percent};
use crate::secure::{Probe, RobustnessMap, ScorerOptions, SearchOptions, search};
use clap::Args;
use std::path::PathBuf;

/// Finds Mods_Rob: the modules that, perturbed together, move the security features least
#[derive(Args)]
#[command(after_help = "Example:
  swat search --map map.json --out mods.json

Sets are scored jointly, so the model, probe and prompts of the map are needed again: the map knows where they were.
The file that comes out can be edited by hand.")]
pub(super) struct SearchCommand {
    #[command(flatten)]
    common: Common,
    /// The map's model, if it moved
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// Chat template (Jinja) for a model that has none of its own
    #[arg(long, value_name = "FILE")]
    chat_template: Option<PathBuf>,
    /// Map of `swat robustness` on this model
    #[arg(long, value_name = "FILE")]
    map: PathBuf,
    /// The map's probes, if they moved
    #[arg(long, value_name = "FILE")]
    probe: Option<PathBuf>,
    /// The map's prompts, if they moved
    #[arg(long, value_name = "FILE")]
    security: Option<PathBuf>,
    /// Where the set goes
    #[arg(long, value_name = "FILE", default_value = "mods.json")]
    out: PathBuf,
    /// Score: gap, refusal, margin, auroc, accuracy
    #[arg(long, default_value = "gap")]
    score: String,
    /// Largest joint relative drop of the score
    #[arg(long, default_value_t = 0.05)]
    tau: f64,
    /// Largest share of the projections' parameters
    #[arg(long, default_value_t = 0.5)]
    cap: f64,
    /// Smallest share; below it the search fails
    #[arg(long, default_value_t = 0.1)]
    floor: f64,
    /// Consecutive layers a window; an eighth of the layers if not given
    #[arg(long)]
    window: Option<usize>,
    /// Leave out the swap pass: about half of the joint runs
    #[arg(long)]
    no_swap: bool,
    /// Working memory of the sweep, in MiB
    #[arg(long, default_value_t = 1024)]
    memory_mib: u64,
    /// Replace --out
    #[arg(long)]
    force: bool,
}

impl OnDevice for SearchCommand {
    fn common(&self) -> &Common {
        &self.common
    }

    fn run<B: Backend>(self, backend: B) -> Result<()> {
        if self.out.exists() && !self.force {
            return Err(Error::Exists { path: self.out });
        }
        let map = RobustnessMap::load(&self.map)?;
        let from = map.made_from.as_ref();
        let known = |own: Option<PathBuf>, there: Option<&PathBuf>, option: &str| {
            let missing = || Error::input(self.map.display().to_string(), "no record of its inputs", option);
            own.or_else(|| there.cloned()).ok_or_else(missing)
        };
        let model = known(self.model, from.map(|f| &f.model), "--model DIR")?;
        let probe = Probe::load(&known(self.probe, from.map(|f| &f.probe), "--probe FILE")?)?;
        let security = known(self.security, from.map(|f| &f.security), "--security FILE")?;
        let prompts = SecurityPrompt::read(&security, self.common.seed)?;
        let model = ModelArgs { model, chat_template: self.chat_template };
        let subject = model.subject(backend)?;
        map.check_model(subject.files.hash()?)?;
        let options = ScorerOptions {
            kind: map.kind.clone(),
            split: map.split,
            retrain: false,
            budget_bytes: self.memory_mib << 20,
            ..ScorerOptions::default()
        };
        let scorer = subject.scorer(&probe, &prompts, options)?;
        let options = SearchOptions {
            score: score(&self.score)?,
            tau: self.tau,
            cap: self.cap,
            floor: self.floor,
            window: self.window,
            swap: !self.no_swap,
        };
        let mut bars = Bars::new(&self.common);
        let mut joint = |set: &ModuleSet, seeds: &[u64]| scorer.joint(set, options.score, map.epsilon, seeds);
        let found = search(&map, &options, &mut joint, &mut bars.observer())?;
        bars.finish();
        found.save(&self.out)?;
        if self.common.json {
            return print_json(&serde_json::to_value(&found).unwrap_or_default());
        }
        print_line(&format!("Mods_Rob     {}", found.set))?;
        print_line(&format!("share        {} of the projections' parameters", percent(found.share, 1)))?;
        print_line(&format!("joint drop   {} (limit {})", fixed(found.joint, 4), fixed(found.tau, 4)))?;
        print_line(&format!("saved as     {}", self.out.display()))
    }
}
