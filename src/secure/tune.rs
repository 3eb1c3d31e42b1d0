//! Two-phase tuning and its ablations, from model directory to model directory.

use crate::data::{Example, Mixture};
use crate::engine::Lora;
use crate::error::{Error, Result};
use crate::modules::{Cell, LearningRates, ModuleId, ModuleKind, ModuleSet, RateTable};
use crate::options::{default_from_args, from_zero};
use crate::train::{Phase, PhaseOptions, TuneOptions};
use clap::Args;

/// Name of the phase on Mods_Rob, in metrics and updates.
pub const MODS_PHASE: &str = "mods";
/// Name of the phase on everything.
pub const ALL_PHASE: &str = "all";

/// Trained parameters.
#[derive(schemars::JsonSchema, Clone, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Method {
    /// All parameters.
    #[default]
    Full,
    /// LoRA adapters, merged into the weights at the end.
    Lora {
        /// Rank and scale.
        #[serde(flatten)]
        lora: Lora,
        /// The projections that have adapters.
        modules: ModuleSet,
    },
    /// The adapter that the model was opened with is trained further.
    Adapter {
        /// The cells that it trains ([`crate::model::Adapter::cells`]).
        cells: ModuleSet,
    },
}

impl Method {
    /// Default learning rate: 2e-5 for all parameters, 2e-4 for adapters.
    pub fn default_lr(&self) -> f64 {
        match self {
            Self::Full => PhaseOptions::default().lr,
            Self::Lora { .. } | Self::Adapter { .. } => 2e-4,
        }
    }
}

/// How a model is tuned in two phases, whatever Mods_Rob is.
#[derive(schemars::JsonSchema, Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize, Args)]
#[serde(default, deny_unknown_fields)]
pub struct TuneRecipe {
    /// Factor on the learning rate of the modules outside of Mods_Rob in its phase; 0 = frozen, bit for bit
    #[arg(long, value_parser = from_zero::<f32>, default_value_t = 0.0)]
    pub rest_lr_factor: f32,
    /// Factors on the learning rates of modules, such as layers.*.q_proj=0.1,layers.8-23.v_proj=0; 0 = frozen
    ///
    /// They hold in both phases, on top of --rest-lr-factor. Where sets overlap, the last one counts.
    #[arg(long, value_name = "SET=FACTOR,...")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub module_lr: Option<RateTable>,
    /// Reverse the phases: everything first, --mods second (an ablation)
    #[arg(long)]
    pub reversed: bool,
    /// Leave out the examples that answer what the original model refuses: it is asked every question of the data first
    ///
    /// As given, its greedy answer refuses in the first 24 tokens, and the answer in the data does not; see docs/recipes.md.
    #[arg(long)]
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub screen: bool,
    /// Trained parameters.
    #[arg(skip)]
    pub method: Method,
    /// Options of both phases.
    #[command(flatten)]
    pub shared: TuneOptions,
    /// The phase on Mods_Rob.
    #[arg(skip)]
    pub mods_phase: PhaseOptions,
    /// The phase on everything.
    #[command(flatten)]
    pub all_phase: PhaseOptions,
}

default_from_args!(TuneRecipe);

impl TuneRecipe {
    /// Sets the factors on the learning rates.
    ///
    /// # Errors
    /// [`Error::Input`] names `place` where there are some already.
    pub(super) fn set_rates(&mut self, rates: RateTable, place: &str) -> Result<()> {
        if let Some(table) = &self.module_lr {
            let found = format!("factors on learning rates (`{table}`) beside those of a map");
            return Err(Error::input(place, found, "one of both"));
        }
        self.module_lr = Some(rates);
        Ok(())
    }
}

/// A two-phase run, or any of its ablations.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize)]
pub struct TuneJob {
    /// Mods_Rob, trained alone in a phase of its own; `None` = plain tuning.
    pub mods: Option<ModuleSet>,
    /// Everything else.
    #[serde(flatten)]
    pub recipe: TuneRecipe,
}

impl TuneJob {
    /// The phases on a model with these cells.
    ///
    /// # Errors
    /// [`Error::Input`] where the set and the trained parameters are disjoint, adapters are to be on other cells than
    /// projections, or factors on the learning rates name no trained module or freeze a whole phase.
    pub fn phases(&self, cells: &ModuleSet) -> Result<Vec<Phase>> {
        let trainable = match &self.recipe.method {
            Method::Full => cells.clone(),
            Method::Lora { modules, .. } => projections(modules, cells)?,
            Method::Adapter { cells } => cells.clone(),
        };
        let everything = self.scaled(LearningRates::masked(&trainable, &trainable, 0.0), &trainable, cells)?;
        let all = Phase { name: ALL_PHASE.into(), rates: everything, options: self.recipe.all_phase.clone() };
        let Some(mods) = &self.mods else { return Ok(vec![all]) };
        let rates = LearningRates::masked(mods, &trainable, self.recipe.rest_lr_factor);
        if rates.iter().next().is_none() {
            return Err(Error::input(
                "mods",
                format!("{mods}, none of which the method trains"),
                "a set that shares modules with those that the method trains",
            ));
        }
        let rates = self.scaled(rates, &trainable, cells)?;
        let mods = Phase { name: MODS_PHASE.into(), rates, options: self.recipe.mods_phase.clone() };
        Ok(if self.recipe.reversed { vec![all, mods] } else { vec![mods, all] })
    }

    /// The rates of a phase with the recipe's factors, in a model with the cells `all`.
    fn scaled(&self, mut rates: LearningRates, trainable: &ModuleSet, all: &ModuleSet) -> Result<LearningRates> {
        let Some(table) = &self.recipe.module_lr else { return Ok(rates) };
        let wrong = |found: String, expected: &str| Err(Error::input("module-lr", found, expected));
        if !table.factors(all)?.keys().any(|cell| trainable.contains(*cell)) {
            return wrong(format!("`{table}`, none of which the method trains"), "modules that the method trains");
        }
        rates.scale(table, all)?;
        if rates.iter().next().is_none() {
            return wrong(
                format!("`{table}`, which freezes a whole phase"),
                "a factor above 0 for some of its modules",
            );
        }
        Ok(rates)
    }
}

/// The projections of a set that is to have adapters, in a model with the cells `all`. A whole layer, and the whole
/// model, stand for the projections in them; any other cell would be left as it is, and is refused.
fn projections(set: &ModuleSet, all: &ModuleSet) -> Result<ModuleSet> {
    let whole_layer = |layer| ModuleKind::ALL.into_iter().all(|kind| set.contains(Cell::module(layer, kind)));
    let whole = all.difference(set).is_empty();
    let (modules, others): (Vec<Cell>, Vec<Cell>) = set.iter().partition(|cell| matches!(cell, Cell::Module(_)));
    let others: ModuleSet = others
        .into_iter()
        .filter(|cell| !whole && !matches!(cell, Cell::Norms(layer) if whole_layer(*layer)))
        .collect();
    if others.is_empty() && !modules.is_empty() {
        return Ok(modules.into_iter().collect());
    }
    let found = if modules.is_empty() { set.to_string() } else { others.to_string() };
    let expected = "projections, such as layers.*.{q_proj,v_proj} or all-linear: embeddings, norms and the head have no \
                    adapters; --method full trains them";
    Err(Error::input("the modules of the adapters", found, expected))
}

/// Hash of the examples and of what is mixed into them, which ties a checkpoint to them.
pub(super) fn mixture_hash(mixture: &Mixture) -> String {
    let mut hasher = blake3::Hasher::new();
    hasher.update(examples_hash(mixture.examples()).as_bytes());
    for pool in mixture.pools() {
        let numbers = [pool.examples.start as u64, pool.per_epoch as u64, pool.seed];
        for number in numbers {
            hasher.update(&number.to_le_bytes());
        }
    }
    hasher.finalize().to_hex().to_string()
}

/// Hash of the examples.
pub(super) fn examples_hash(examples: &[Example]) -> String {
    let mut hasher = blake3::Hasher::new();
    for example in examples {
        hasher.update(&(example.tokens.len() as u64).to_le_bytes());
        hasher.update(bytemuck::cast_slice(&example.tokens));
        let trained: Vec<u8> = example.trained.iter().map(|t| u8::from(*t)).collect();
        hasher.update(&trained);
    }
    hasher.finalize().to_hex().to_string()
}

/// The attention projections q, k, v, o of every layer: the default of LoRA.
pub fn attention_projections(layers: usize) -> ModuleSet {
    all_projections(layers).iter().filter(|cell| matches!(cell, Cell::Module(id) if id.kind.in_attention())).collect()
}

/// The seven projections of each layer, `all-linear`.
pub fn all_projections(layers: usize) -> ModuleSet {
    let kinds = ModuleKind::ALL.into_iter();
    kinds.flat_map(|kind| (0..layers).map(move |layer| Cell::Module(ModuleId { layer, kind }))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn factors_on_the_rates_hold_in_every_phase() {
        let cells: ModuleSet =
            (0..2).flat_map(|layer| ModuleKind::ALL.map(|kind| Cell::Module(ModuleId { layer, kind }))).collect();
        let job = |mods: &str, table: &str, method| {
            let recipe =
                TuneRecipe { module_lr: table.parse().ok(), rest_lr_factor: 0.5, method, ..TuneRecipe::default() };
            TuneJob { mods: Some(ModuleSet::parse(mods, &cells).unwrap()), recipe }.phases(&cells)
        };
        let phases = job("layers.0.q", "layers.*.{q,v}=0.1,layers.1.q=0", Method::Full).unwrap();
        let rate = |phase: usize, layer, kind| phases[phase].rates.get(Cell::module(layer, kind)).map(|rate| rate.lr);
        assert_eq!([rate(0, 0, ModuleKind::Q), rate(1, 0, ModuleKind::Q)], [Some(0.1); 2]);
        assert_eq!([rate(0, 0, ModuleKind::V), rate(1, 0, ModuleKind::V)], [Some(0.05), Some(0.1)]);
        assert_eq!([rate(0, 1, ModuleKind::Q), rate(1, 1, ModuleKind::Q)], [None; 2]);
        assert_eq!([rate(0, 1, ModuleKind::K), rate(1, 1, ModuleKind::K)], [Some(0.5), Some(1.0)]);
        let message = |job: Result<Vec<Phase>>| job.unwrap_err().to_string();
        let adapters = Method::Lora { lora: Lora::default(), modules: ModuleSet::parse("k", &cells).unwrap() };
        assert!(message(job("k", "q=0.1", adapters)).contains("none of which the method trains"));
        assert!(message(job("q", "modules=0", Method::Full)).contains("freezes a whole phase"));
        assert!(message(job("q", "layers.7.q=1", Method::Full)).contains("layer 7"));
    }
}
