//! The robustness map (paper, figure 3): the relative drop R of a security score when a single cell is perturbed;
//! smaller is more robust. It is made by noise, by the step that training would take ([`step`]), or from gradients
//! ([`conflict`]).
//!
//! Three controls tell a loss of security features from distribution shift: (a) a probe retrained on each copy, (b) R
//! per unit of output shift, and (c) a probe for a label unrelated to security.

pub(crate) mod conflict;
pub(crate) mod epsilon;
pub(crate) mod map;
pub(crate) mod mods;
pub(crate) mod noise;
pub(crate) mod part;
pub(crate) mod partial;
pub(crate) mod scorer;
pub(crate) mod search;
pub(crate) mod sets;
pub(crate) mod shard;
pub(crate) mod step;

use self::map::{CellRobustness, FORMAT, RobustnessMap, Stat};
use self::noise::Noise;
use self::part::Part;
use self::partial::{Done, Header, Partial};
use self::scorer::{Observation, PerturbationScorer};
use self::sets::cell_parameters;
use self::shard::Shard;
use self::step::StepScale;
use crate::backend::{Backend, Element};
use crate::engine::Member;
use crate::error::{Error, Result};
use crate::io::IfExists;
use crate::modules::{Cell, ModuleSet};
use crate::options::{above_zero, default_from_args, require};
use crate::progress::{Observer, Progress};
use crate::secure::eval::metrics::{ScoreKind, relative_drop};
use clap::Args;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::time::Instant;

/// Options of the robustness map.
#[derive(schemars::JsonSchema, Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize, Args)]
#[serde(default, deny_unknown_fields)]
pub struct RobustnessOptions {
    /// Relative norm of the perturbation; found by a sweep over random reference sets if not given
    #[arg(long, value_parser = above_zero::<f32>)]
    pub epsilon: Option<f32>,
    /// R of the reference sets at which the sweep of ε stops.
    #[arg(skip = 0.5)]
    pub epsilon_target: f64,
    /// Score of the ε sweep and of the heat map
    #[arg(long, value_enum, default_value_t = ScoreKind::Gap)]
    pub score: ScoreKind,
    /// Cells to map: all, modules, or a set such as layers.8-15.{q_proj,v_proj}
    #[arg(long, default_value = "all")]
    pub cells: String,
    /// How the map is made
    #[arg(long, value_enum, default_value_t)]
    #[serde(skip_serializing_if = "By::is_noise")]
    pub by: By,
}

default_from_args!(RobustnessOptions);

/// How a map is made.
#[derive(
    schemars::JsonSchema,
    Clone,
    Copy,
    Debug,
    Default,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    serde::Serialize,
    serde::Deserialize,
    clap::ValueEnum,
)]
#[serde(rename_all = "lowercase")]
pub enum By {
    /// Each cell is perturbed by --kind, and the scores are measured again
    #[default]
    Noise,
    /// What each cell's part of the planned training step costs the refusal log-odds, to first order: from gradients alone;
    /// needs --data
    Conflict,
    /// Each cell is moved by its part of the planned training step, and the scores are measured again; needs --data
    Update,
}

impl By {
    /// All, the default first.
    pub const ALL: [Self; 3] = [Self::Noise, Self::Conflict, Self::Update];

    /// `noise`, `conflict`, `update`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Noise => "noise",
            Self::Conflict => "conflict",
            Self::Update => "update",
        }
    }

    /// Whether it is the default, which files do not say.
    pub(crate) fn is_noise(&self) -> bool {
        *self == Self::Noise
    }
}

/// Most cells per save, about two layers: an interruption loses little, and the clean forward pass that each group
/// repeats stays a small part of the work.
const CELLS_PER_SAVE: usize = 16;

/// Computes the map. With `out` the map is saved there, and finished cells are kept beside it, from which an
/// interrupted map continues. Progress counts cells.
///
/// # Errors
/// [`crate::error::Error::Input`] names the option that is wrong; [`crate::error::Error::Io`]; a failing device.
pub fn robustness<B: Backend>(
    scorer: &PerturbationScorer<'_, B>,
    options: &RobustnessOptions,
    out: Option<&Path>,
    observer: Observer<'_>,
) -> Result<RobustnessMap> {
    let wanted = in_order(&options.check(&scorer.decoder.config.cells())?);
    let groups: Vec<&[Cell]> = wanted.chunks(cells_per_group(scorer)).collect();
    let partial = Partial::new(out);
    let run = run_hash(scorer, options)?;
    let known = partial.read(&run).filter(|(header, _)| header.part.is_none());
    let (header, done) = match known {
        Some(known) => known,
        None => (first_line(scorer, options, run)?, Vec::new()),
    };
    let mut done = map_cells(scorer, &groups, &partial, (&header, done), observer)?;
    let seconds = done.iter().map(|done| done.seconds).sum();
    done.sort_by_key(|done| place(done.cell.cell));
    let cells = done.into_iter().map(|done| done.cell).collect();
    let Header { epsilon, epsilon_sweep, .. } = header;
    let map = RobustnessMap { epsilon, epsilon_sweep, cells, seconds, ..empty_map(scorer)? };
    if let Some(out) = out {
        map.save(out)?;
    }
    partial.remove()?;
    Ok(map)
}

/// Computes the part of the map that belongs to a shard, into the file `out`, from which an interrupted part continues.
/// Returns how many cells it has. Progress counts them.
///
/// # Errors
/// [`Error::Exists`] where `out` is not of this shard and run, unless it may be replaced; as [`robustness`].
pub fn robustness_part<B: Backend>(
    scorer: &PerturbationScorer<'_, B>,
    options: &RobustnessOptions,
    shard: Shard,
    (out, if_exists): (&Path, IfExists),
    observer: Observer<'_>,
) -> Result<usize> {
    let device = scorer.decoder.backend.name();
    let part = Part {
        shard,
        version: part::VERSION.to_owned(),
        device: device.split(':').next().unwrap_or_default().to_owned(),
        precision: B::Float::NAME.to_owned(),
        group: cells_per_group(scorer),
        cells: in_order(&options.check(&scorer.decoder.config.cells())?),
        map: empty_map(scorer)?,
    };
    let partial = Partial::at(out);
    let run = run_hash(scorer, options)?;
    let known = partial.read(&run).filter(|(header, _)| header.part.as_deref() == Some(&part));
    if known.is_none() && out.exists() && if_exists == IfExists::Fail {
        return Err(Error::Exists { path: out.to_owned() });
    }
    let groups: Vec<&[Cell]> = part.groups().collect();
    let (header, done) = match known {
        Some(known) => known,
        None => {
            let header = first_line(scorer, options, run)?;
            (Header { part: Some(Box::new(part.clone())), ..header }, Vec::new())
        }
    };
    Ok(map_cells(scorer, &groups, &partial, (&header, done), observer)?.len())
}

/// Cells that are computed together, and saved after.
fn cells_per_group<B: Backend>(scorer: &PerturbationScorer<'_, B>) -> usize {
    (scorer.members_per_group() / copies_per_cell(scorer)).clamp(1, CELLS_PER_SAVE)
}

fn copies_per_cell<B: Backend>(scorer: &PerturbationScorer<'_, B>) -> usize {
    scorer.seeds().len() * scorer.members(&ModuleSet::default(), 0).len()
}

/// The first line of a new file, with ε given or chosen.
fn first_line<B: Backend>(
    scorer: &PerturbationScorer<'_, B>,
    options: &RobustnessOptions,
    run: String,
) -> Result<Header> {
    let (epsilon, epsilon_sweep) = match options.epsilon {
        Some(epsilon) => (epsilon, Vec::new()),
        None if scorer.options.kind == Noise::Zero => (1.0, Vec::new()),
        None if scorer.step.is_some() => (scorer.step.as_ref().map_or(0.0, StepScale::epsilon), Vec::new()),
        None => epsilon::choose(scorer, options.score, options.epsilon_target)?,
    };
    Ok(Header { run, epsilon, epsilon_sweep, part: None })
}

/// Computes the groups of cells that are not `done`, always a whole group: so that a cell's last bits do not depend on
/// interruptions.
fn map_cells<B: Backend>(
    scorer: &PerturbationScorer<'_, B>,
    groups: &[&[Cell]],
    partial: &Partial,
    (header, mut done): (&Header, Vec<Done>),
    observer: Observer<'_>,
) -> Result<Vec<Done>> {
    let known: BTreeSet<Cell> = done.iter().map(|done| done.cell.cell).collect();
    let (finished, left): (Vec<&[Cell]>, Vec<&[Cell]>) =
        groups.iter().partition(|group| group.iter().all(|cell| known.contains(cell)));
    let mut kept: BTreeSet<Cell> = finished.into_iter().flatten().copied().collect();
    done.retain(|done| kept.remove(&done.cell.cell));
    partial.begin(header, &done)?;
    let total = groups.iter().map(|group| group.len()).sum();
    observer(Progress::new("robustness map", done.len(), total));
    let parameters = cell_parameters(&scorer.decoder.config);
    for group in left {
        let start = Instant::now();
        let members: Vec<Member> = group.iter().flat_map(|cell| cell_members(scorer, *cell)).collect();
        let observations = scorer.observe(&members, header.epsilon)?;
        let seconds = start.elapsed().as_secs_f64() / group.len() as f64;
        let new: Vec<Done> = group
            .iter()
            .zip(observations.chunks_exact(copies_per_cell(scorer)))
            .map(|(cell, own)| {
                let parameters = parameters.get(cell).copied().unwrap_or(0);
                let task_gain = scorer.step.as_ref().and_then(|step| step.gain(*cell, header.epsilon));
                let cell = CellRobustness { task_gain, ..cell_result(scorer, *cell, parameters, own) };
                Done { cell, seconds }
            })
            .collect();
        partial.append(&new)?;
        done.extend(new);
        observer(Progress::new("robustness map", done.len(), total));
    }
    Ok(done)
}

impl RobustnessOptions {
    /// Checks the ranges; returns the cells to map, of a model with these cells.
    ///
    /// # Errors
    /// [`crate::error::Error::Input`] names the option.
    pub fn check(&self, cells: &ModuleSet) -> Result<ModuleSet> {
        let (epsilon, target) = (self.epsilon.unwrap_or(1.0), self.epsilon_target);
        let wanted = ModuleSet::parse(&self.cells, cells)?;
        require(!wanted.is_empty(), "robustness.cells", "no cell", "at least one")?;
        let usual = "a number above 0; 0.05 to 2 is usual";
        require(epsilon.is_finite() && epsilon > 0.0, "robustness.epsilon", epsilon, usual)?;
        let drop = "a relative drop above 0, up to 1";
        require(target > 0.0 && target <= 1.0, "robustness.epsilon_target", target, drop)?;
        Ok(wanted)
    }
}

/// Hash of everything that determines the results of a cell.
fn run_hash<B: Backend>(scorer: &PerturbationScorer<'_, B>, options: &RobustnessOptions) -> Result<String> {
    let about = serde_json::json!({
        "format": FORMAT,
        "model": scorer.model_hash,
        "probe": scorer.probe.hash()?,
        "prompts": scorer.prompts_hash,
        "kind": scorer.options.kind,
        "directions": scorer.directions_hash(),
        "seeds": scorer.seeds(),
        "retrain": scorer.options.retrain,
        "split": scorer.options.split,
        "epsilon": options.epsilon,
        "epsilon_target": options.epsilon_target,
        "score": options.score,
    });
    Ok(blake3::hash(about.to_string().as_bytes()).to_hex().to_string())
}

/// Embedding, then layer by layer, then final norm and head.
fn in_order(cells: &ModuleSet) -> Vec<Cell> {
    let mut ordered: Vec<Cell> = cells.iter().collect();
    ordered.sort_by_key(|cell| place(*cell));
    ordered
}

/// By which cells are ordered.
fn place(cell: Cell) -> (usize, Cell) {
    match cell {
        Cell::Embedding => (0, cell),
        Cell::FinalNorm | Cell::Head => (usize::MAX, cell),
        Cell::Norms(layer) => (layer + 1, cell),
        Cell::Module(module) => (module.layer + 1, cell),
    }
}

fn cell_members<B: Backend>(scorer: &PerturbationScorer<'_, B>, cell: Cell) -> Vec<Member> {
    let set: ModuleSet = [cell].into_iter().collect();
    scorer.seeds().into_iter().flat_map(|seed| scorer.members(&set, seed)).collect()
}

/// Statistics over draws; both signs of a draw are averaged first, as they are not independent.
fn cell_result<B: Backend>(
    scorer: &PerturbationScorer<'_, B>,
    cell: Cell,
    parameters: u64,
    observations: &[Observation],
) -> CellRobustness {
    let signs = (observations.len() / scorer.seeds().len()).max(1);
    let clean = scorer.clean;
    let by_seed = |value: &dyn Fn(&Observation) -> Option<f64>| -> Option<Vec<f64>> {
        let mean = |draw: &[Observation]| -> Option<f64> {
            let values: Option<Vec<f64>> = draw.iter().map(value).collect();
            values.map(|v| v.iter().sum::<f64>() / v.len() as f64)
        };
        observations.chunks(signs).map(mean).collect()
    };
    let stat = |values: &Option<Vec<f64>>| values.as_deref().and_then(Stat::of);
    let drops = |before: Option<f64>, after: Option<Vec<f64>>| -> Option<Vec<f64>> {
        after?.into_iter().map(|value| relative_drop(before?, value)).collect()
    };
    let mut scores = BTreeMap::new();
    let mut drop = BTreeMap::new();
    let mut drop_by_seed = BTreeMap::new();
    for kind in ScoreKind::ALL {
        let values = by_seed(&|o| o.scores.get(kind));
        if let Some(stat) = stat(&values) {
            scores.insert(kind, stat);
        }
        let lost = drops(clean.scores.get(kind), values);
        if let (Some(stat), Some(lost)) = (stat(&lost), lost) {
            drop.insert(kind, stat);
            drop_by_seed.insert(kind, lost);
        }
    }
    let shifts = by_seed(&|o| Some(o.shift));
    let gap = drop_by_seed.get(&ScoreKind::Gap).cloned();
    let control = drops(clean.control_gap, by_seed(&|o| o.control_gap));
    let pairs = |other: &Option<Vec<f64>>, of: &dyn Fn(f64, f64) -> f64| -> Option<Vec<f64>> {
        Some(gap.as_ref()?.iter().zip(other.as_ref()?).map(|(g, o)| of(*g, *o)).collect())
    };
    let moved = shifts.as_ref().is_some_and(|s| s.iter().all(|s| *s > 1e-9));
    CellRobustness {
        cell,
        parameters,
        scores,
        drop,
        shift: stat(&shifts).unwrap_or(Stat { mean: 0.0, error: None }),
        drop_per_shift: stat(&pairs(&shifts, &|g, s| g / s)).filter(|_| moved),
        beyond_control: stat(&pairs(&control, &|g, c| g - c)),
        control_drop: stat(&control),
        retrained_auroc: stat(&by_seed(&|o| o.retrained)),
        drop_by_seed,
        task_gain: None,
    }
}

/// The map without ε and cells.
fn empty_map<B: Backend>(scorer: &PerturbationScorer<'_, B>) -> Result<RobustnessMap> {
    Ok(RobustnessMap {
        made_from: scorer.made_from.clone(),
        format: FORMAT.to_owned(),
        model_hash: scorer.model_hash.clone(),
        probe_hash: scorer.probe.hash()?,
        prompts_hash: scorer.prompts_hash.clone(),
        layers: scorer.decoder.config.layers,
        metric_layer: scorer.probe.metadata.metric_layer,
        split: scorer.options.split,
        prompts: scorer.prompts(),
        kind: scorer.options.kind.clone(),
        epsilon: 0.0,
        epsilon_sweep: Vec::new(),
        seeds: scorer.seeds(),
        antithetic: scorer.options.kind.is_antithetic(),
        clean: scorer.clean.scores,
        clean_control_gap: scorer.clean.control_gap,
        clean_retrained_auroc: scorer.clean.retrained,
        cells: Vec::new(),
        seconds: 0.0,
        by: if scorer.step.is_some() { By::Update } else { By::Noise },
        step: scorer.step.as_ref().map(|step| step.record.clone()),
    })
}
