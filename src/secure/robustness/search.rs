//! The search for Mods_Rob (paper, figure 4): a set of modules whose joint perturbation keeps the security features.
//!
//! Windows (adjacent layers of one module kind) are visited from the most robust on. A window joins the set if the set
//! stays robust **jointly**, as modules that are robust one by one can be sensitive together, and if its share of
//! parameters stays under the cap. A swap pass then tries rejected windows in place of the accepted ones that cost the
//! set most. One such search runs per seed; Mods_Rob holds the cells that a majority of them chose, verified jointly
//! over all seeds.
//!
//! On a map of the planned step (`--by conflict` or `update`) the order is that of R per gain of the task: the modules that
//! teach most for what they cost come first.

use super::map::RobustnessMap;
use super::mods::{FORMAT, ModsRob, SearchStep};
use super::sets::share;
use crate::error::{Error, Result};
use crate::modules::{Cell, ModuleId, ModuleKind, ModuleSet};
use crate::options::{above_zero, count, default_from_args, positive_share, require, share as share_of};
use crate::progress::{Observer, Progress};
use crate::secure::eval::metrics::ScoreKind;
use clap::{ArgAction, Args};
use std::collections::BTreeMap;
use std::time::Instant;

/// Options of the search.
#[derive(schemars::JsonSchema, Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize, Args)]
#[serde(default, deny_unknown_fields)]
pub struct SearchOptions {
    /// Security score
    #[arg(long, value_enum, default_value_t = ScoreKind::Gap)]
    pub score: ScoreKind,
    /// Largest joint relative drop of the score
    #[arg(long, value_parser = above_zero::<f64>, default_value_t = 0.05)]
    pub tau: f64,
    /// Largest share of the projections' parameters
    #[arg(long, value_parser = positive_share::<f64>, default_value_t = 0.5)]
    pub cap: f64,
    /// Smallest share of the projections' parameters; below it the search fails
    #[arg(long, value_parser = share_of::<f64>, default_value_t = 0.1)]
    pub floor: f64,
    /// Adjacent layers per window; an eighth of the layers if not given. Wider windows need fewer joint runs
    #[arg(long, value_parser = count)]
    pub window: Option<usize>,
    /// Skip the swap pass: about half of the joint runs
    #[arg(long = "no-swap", action = ArgAction::SetFalse)]
    pub swap: bool,
}

default_from_args!(SearchOptions);

/// Order in which equally robust windows of equal depth are visited.
const TIE_ORDER: [ModuleKind; 7] =
    [ModuleKind::O, ModuleKind::V, ModuleKind::Down, ModuleKind::Up, ModuleKind::Gate, ModuleKind::K, ModuleKind::Q];

/// Scores a set jointly: R over the draws of these seeds.
pub type Joint<'a> = &'a mut dyn FnMut(&ModuleSet, &[u64]) -> Result<f64>;

/// What each cell's part of the planned step gains; empty on a noise map.
type Gains = BTreeMap<Cell, f64>;

/// Adjacent layers of one module kind.
struct Window {
    cells: ModuleSet,
    /// Mean R of its cells, each perturbed alone; of the planned step, R per gain.
    single: f64,
}

/// The state of a search.
struct Search<'a> {
    options: &'a SearchOptions,
    parameters: BTreeMap<Cell, u64>,
    joint: Joint<'a>,
    steps: Vec<SearchStep>,
}

/// A set that grows during the search of one seed.
#[derive(Default)]
struct Candidate {
    set: ModuleSet,
    /// Its joint R.
    joint: f64,
}

/// Searches Mods_Rob on a map. `joint` gives R of a set over the draws of some of the map's seeds (see
/// [`super::scorer::PerturbationScorer::joint`]); progress counts joint runs, up to the most there can be.
///
/// # Errors
/// [`Error::Input`] names the option that is out of range or the score that the map lacks; [`Error::Failed`] where no
/// set between floor and cap stays under τ.
pub fn search(
    map: &RobustnessMap,
    options: &SearchOptions,
    joint: Joint<'_>,
    observer: Observer<'_>,
) -> Result<ModsRob> {
    options.check()?;
    let start = Instant::now();
    let score = map.score(options.score);
    let singles = single_drops(map, score)?;
    let gains: Gains = map.cells.iter().filter_map(|c| Some((c.cell, c.task_gain?))).collect();
    let width = options.window.unwrap_or((map.layers / 8).max(1));
    let windows_per_seed = windows(&singles, &gains, width, 0).len();
    let most = map.seeds.len() * windows_per_seed * (1 + usize::from(options.swap)) + windows_per_seed;
    let mut runs = 0;
    let mut counted = |set: &ModuleSet, seeds: &[u64]| {
        runs += 1;
        observer(Progress::new("search", runs, most.max(runs)));
        joint(set, seeds)
    };
    let in_map = map.cells.iter().filter(|c| singles.contains_key(&c.cell));
    let parameters = in_map.map(|c| (c.cell, c.parameters)).collect();
    let mut search = Search { options, parameters, joint: &mut counted, steps: Vec::new() };
    let mut votes: BTreeMap<Cell, usize> = BTreeMap::new();
    for (i, seed) in map.seeds.iter().enumerate() {
        for cell in search.run(*seed, &windows(&singles, &gains, width, i))?.iter() {
            *votes.entry(cell).or_default() += 1;
        }
    }
    let single: BTreeMap<Cell, f64> = singles.iter().map(|(cell, by_seed)| (*cell, mean(by_seed))).collect();
    let majority = votes.iter().filter(|(_, n)| 2 * **n > map.seeds.len());
    let majority = majority.map(|(cell, _)| (*cell, vec![single.get(cell).copied().unwrap_or(0.0)])).collect();
    let found = search.settle(windows(&majority, &gains, width, 0), &votes, &map.seeds)?;
    let share = share(&found.set, &search.parameters);
    let steps = search.steps;
    if share < options.floor || found.set.is_empty() {
        return Err(too_small(share, options, &steps));
    }
    Ok(ModsRob {
        format: FORMAT.to_owned(),
        set: found.set.to_string(),
        found: found.set.to_string(),
        share,
        joint: found.joint,
        tau: options.tau,
        cap: options.cap,
        floor: options.floor,
        window: width,
        score,
        kind: map.kind.clone(),
        epsilon: map.epsilon,
        seeds: map.seeds.clone(),
        votes,
        single,
        steps,
        model_hash: map.model_hash.clone(),
        map_hash: map.hash()?,
        seconds: start.elapsed().as_secs_f64(),
        by: map.by,
    })
}

impl SearchOptions {
    /// Checks the ranges.
    ///
    /// # Errors
    /// [`Error::Input`] names the option.
    pub fn check(&self) -> Result<()> {
        let Self { tau, cap, floor, window, .. } = *self;
        require(tau.is_finite() && tau > 0.0, "search.tau", tau, "a relative drop above 0")?;
        require(cap > 0.0 && cap <= 1.0, "search.cap", cap, "a share above 0, up to 1")?;
        require((0.0..=cap).contains(&floor), "search.floor", floor, "a share from 0 to the cap")?;
        require(window != Some(0), "search.window", 0, "at least one layer")
    }
}

/// R of every projection perturbed alone, by seed.
fn single_drops(map: &RobustnessMap, score: ScoreKind) -> Result<BTreeMap<Cell, Vec<f64>>> {
    let mut drops = BTreeMap::new();
    for cell in map.cells.iter().filter(|c| matches!(c.cell, Cell::Module(_))) {
        let Some(by_seed) = cell.drop_by_seed.get(&score).filter(|d| !d.is_empty()) else {
            let place = format!("robustness map: {}", cell.cell);
            return Err(Error::input(place, format!("no drop of `{score}`"), "a map whose clean score is above 0"));
        };
        drops.insert(cell.cell, by_seed.clone());
    }
    if drops.is_empty() {
        return Err(Error::input("robustness map", "no projection", "cells such as layers.0.q_proj"));
    }
    Ok(drops)
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len().max(1) as f64
}

/// Cost per gain; without a gain, last in the order.
fn per_gain(cost: f64, gain: f64) -> f64 {
    if gain > 0.0 { cost / gain } else { f64::INFINITY }
}

/// Windows of `width` adjacent layers of one kind, most robust first by the draws of the `seed`-th seed. They are
/// aligned at the deepest layer, so that a shorter one falls on layer 0, the most sensitive.
fn windows(singles: &BTreeMap<Cell, Vec<f64>>, gains: &Gains, width: usize, seed: usize) -> Vec<Window> {
    let mut ordered: Vec<(f64, usize, usize, Window)> = Vec::new();
    for (rank, kind) in TIE_ORDER.into_iter().enumerate() {
        let mut layers: Vec<(usize, f64)> = singles
            .iter()
            .filter_map(|(cell, drops)| match cell {
                Cell::Module(ModuleId { layer, kind: k }) if *k == kind => Some((*layer, drops.get(seed)?.to_owned())),
                _ => None,
            })
            .collect();
        layers.sort_by_key(|(layer, _)| std::cmp::Reverse(*layer));
        for chunk in layers.chunks(width) {
            let cells: ModuleSet = chunk.iter().map(|(layer, _)| Cell::module(*layer, kind)).collect();
            let cost = chunk.iter().map(|(_, drop)| drop).sum::<f64>();
            let single = match gains.is_empty() {
                true => cost / chunk.len() as f64,
                false => per_gain(cost, cells.iter().filter_map(|cell| gains.get(&cell)).sum()),
            };
            ordered.push((single, chunk[0].0, rank, Window { cells, single }));
        }
    }
    ordered.sort_by(|a, b| a.0.total_cmp(&b.0).then(b.1.cmp(&a.1)).then(a.2.cmp(&b.2)));
    ordered.into_iter().map(|(.., window)| window).collect()
}

impl Search<'_> {
    /// The set that the draws of one seed choose.
    fn run(&mut self, seed: u64, windows: &[Window]) -> Result<ModuleSet> {
        let mut found = Candidate::default();
        let (mut accepted, mut rejected) = (Vec::new(), Vec::new());
        for window in windows {
            let grown = found.set.union(&window.cells);
            let mut fits = share(&grown, &self.parameters) <= self.options.cap;
            if fits {
                let joint = (self.joint)(&grown, &[seed])?;
                fits = joint <= self.options.tau;
                self.steps.push(SearchStep { accepted: fits, ..SearchStep::of(seed, &window.cells, None, joint) });
                if fits {
                    found = Candidate { set: grown, joint };
                }
            }
            if fits { accepted.push(window) } else { rejected.push(window) }
        }
        if self.options.swap {
            self.swap(seed, &mut found, accepted, rejected)?;
        }
        Ok(found.set)
    }

    /// Replaces the accepted windows that cost the set most by rejected ones, each tried once. The cost of a window is
    /// how much R its removal saves, as alone it may look robust.
    fn swap(&mut self, seed: u64, found: &mut Candidate, accepted: Vec<&Window>, rejected: Vec<&Window>) -> Result<()> {
        let mut costs = Vec::with_capacity(accepted.len());
        for window in accepted {
            let joint = (self.joint)(&found.set.difference(&window.cells), &[seed])?;
            self.steps.push(SearchStep::of(seed, &ModuleSet::default(), Some(&window.cells), joint));
            costs.push((found.joint - joint, window));
        }
        costs.sort_by(|a, b| b.0.total_cmp(&a.0));
        let mut costly = costs.into_iter().map(|(_, window)| window).peekable();
        for window in rejected {
            let Some(worst) = costly.peek() else { break };
            let swapped = found.set.difference(&worst.cells).union(&window.cells);
            let (size, current) = (share(&swapped, &self.parameters), share(&found.set, &self.parameters));
            // A swap must not shrink the set: a smaller one is always more robust.
            if size > self.options.cap || size < current {
                continue;
            }
            let joint = (self.joint)(&swapped, &[seed])?;
            let accepted = joint < found.joint.min(self.options.tau);
            self.steps.push(SearchStep { accepted, ..SearchStep::of(seed, &window.cells, Some(&worst.cells), joint) });
            if accepted {
                *found = Candidate { set: swapped, joint };
                costly.next();
            }
        }
        Ok(())
    }

    /// The union of the majority's windows, within the cap and jointly under τ over all seeds; until it is, the window
    /// with the fewest votes, of those the most sensitive, is removed.
    fn settle(&mut self, mut windows: Vec<Window>, votes: &BTreeMap<Cell, usize>, seeds: &[u64]) -> Result<Candidate> {
        let support = |w: &Window| w.cells.iter().filter_map(|c| votes.get(&c)).copied().min().unwrap_or(0);
        windows.sort_by(|a, b| support(b).cmp(&support(a)).then(a.single.total_cmp(&b.single)));
        loop {
            let set: ModuleSet = windows.iter().flat_map(|w| w.cells.iter()).collect();
            if set.is_empty() {
                return Ok(Candidate::default());
            }
            if share(&set, &self.parameters) <= self.options.cap {
                let joint = (self.joint)(&set, seeds)?;
                let accepted = joint <= self.options.tau;
                self.steps.push(SearchStep { seed: None, window: set.to_string(), without: None, joint, accepted });
                if accepted {
                    return Ok(Candidate { set, joint });
                }
            }
            windows.pop();
        }
    }
}

fn too_small(share: f64, options: &SearchOptions, steps: &[SearchStep]) -> Error {
    let least = steps.iter().filter(|s| !s.accepted).map(|s| s.joint).fold(f64::INFINITY, f64::min);
    let what = format!(
        "the search for Mods_Rob ended at {:.1} % of the projections' parameters, below the floor of {:.1} %, with a joint \
         drop of `{}` of at most {}",
        100.0 * share,
        100.0 * options.floor,
        options.score,
        options.tau
    );
    let nearest = match least.is_finite() {
        true => format!("the smallest joint drop of a rejected set was {least:.3}: raise --tau above it, "),
        false => "raise --cap, ".to_owned(),
    };
    Error::failed(what, nearest + "or make a map with a smaller --epsilon, or lower --floor")
}
