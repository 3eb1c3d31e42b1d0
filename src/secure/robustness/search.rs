//! The search for Mods_Rob (paper, figure 4): a set of modules whose joint perturbation leaves the security features alone.
//!
//! Windows (neighbouring layers of one kind) are walked from the most robust on; each joins the set if the set stays robust
//! **jointly**, since robust modules together can be sensitive, and if its share stays under the cap. Then one pass tries
//! windows that were left out in the place of those that cost the set most. One such search runs for every seed; a cell that most
//! of them chose is in Mods_Rob, and the majority is checked once more over all seeds.

use super::map::RobustnessMap;
use super::mods::{FORMAT, ModsRob, SearchStep};
use super::sets::share;
use crate::error::{Error, Result};
use crate::modules::{Cell, ModuleId, ModuleKind, ModuleSet};
use crate::progress::{Observer, Progress};
use crate::secure::eval::metrics::ScoreKind;
use std::collections::BTreeMap;
use std::time::Instant;

/// How Mods_Rob is searched.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SearchOptions {
    /// The score behind R.
    pub score: ScoreKind,
    /// Largest joint R of the set.
    pub tau: f64,
    /// Largest share of the projections' parameters.
    pub cap: f64,
    /// Smallest share; a search that ends below it fails.
    pub floor: f64,
    /// Layers a window; none = an eighth of the layers, at least 1. The number of joint runs falls with it.
    pub window: Option<usize>,
    /// Try windows that were left out in the place of accepted ones; about doubles the joint runs.
    pub swap: bool,
}

impl Default for SearchOptions {
    fn default() -> Self {
        Self { score: ScoreKind::Gap, tau: 0.05, cap: 0.5, floor: 0.1, window: None, swap: true }
    }
}

/// Of equally robust windows the first in this order is taken, after the deeper one.
const TIES: [ModuleKind; 7] =
    [ModuleKind::O, ModuleKind::V, ModuleKind::Down, ModuleKind::Up, ModuleKind::Gate, ModuleKind::K, ModuleKind::Q];

/// Scores a set jointly: R over the draws of these seeds.
pub type Joint<'a> = &'a mut dyn FnMut(&ModuleSet, &[u64]) -> Result<f64>;

struct Window {
    cells: ModuleSet,
    /// Mean R of its cells by themselves.
    single: f64,
}

/// One seed's search.
struct Walk<'s, 'j> {
    seed: u64,
    options: &'s SearchOptions,
    parameters: &'s BTreeMap<Cell, u64>,
    joint: Joint<'j>,
    set: ModuleSet,
    reached: f64,
    steps: &'s mut Vec<SearchStep>,
}

/// Finds Mods_Rob on a map. `joint` gives R of a set over the draws of some of the map's seeds (see
/// [`crate::secure::PerturbationScorer::joint`]); progress counts joint runs, of which there may be fewer.
///
/// Fails, with what was reached and what to change, where no set between floor and cap stays under τ.
///
/// # Errors
/// [`Error::Input`] names the option or the score that is missing; [`Error::Failed`] where no set is found.
pub fn search(
    map: &RobustnessMap,
    options: &SearchOptions,
    joint: Joint<'_>,
    observer: Observer<'_>,
) -> Result<ModsRob> {
    check(options)?;
    let start = Instant::now();
    let singles = single_drops(map, options.score)?;
    let parameters: BTreeMap<Cell, u64> =
        map.cells.iter().filter(|c| singles.contains_key(&c.cell)).map(|c| (c.cell, c.parameters)).collect();
    let width = options.window.unwrap_or((map.layers / 8).max(1));
    let windows_a_seed = windows(&singles, width, 0).len();
    let most = map.seeds.len() * windows_a_seed * (1 + usize::from(options.swap)) + windows_a_seed;
    let mut runs = 0;
    let mut counted = |set: &ModuleSet, seeds: &[u64]| {
        runs += 1;
        observer(Progress::new("search", runs, most.max(runs)));
        joint(set, seeds)
    };
    let mut steps = Vec::new();
    let mut votes: BTreeMap<Cell, usize> = BTreeMap::new();
    for (i, seed) in map.seeds.iter().enumerate() {
        let mut walk = Walk {
            seed: *seed,
            options,
            parameters: &parameters,
            joint: &mut counted,
            set: ModuleSet::default(),
            reached: 0.0,
            steps: &mut steps,
        };
        walk.run(&windows(&singles, width, i))?;
        for cell in walk.set.iter() {
            *votes.entry(cell).or_default() += 1;
        }
    }
    let majority: Vec<Cell> = votes.iter().filter(|(_, n)| 2 * **n > map.seeds.len()).map(|(c, _)| *c).collect();
    let mean = |cell: Cell| singles.get(&cell).map_or(0.0, |by_seed| mean_of(by_seed));
    let (set, reached) = settle(majority, &votes, &mean, map, options, &parameters, width, &mut counted, &mut steps)?;
    let share = share(&set, &parameters);
    if share < options.floor || set.is_empty() {
        return Err(too_small(share, options, &steps));
    }
    Ok(ModsRob {
        format: FORMAT.to_owned(),
        set: set.to_string(),
        found: set.to_string(),
        share,
        joint: reached,
        tau: options.tau,
        cap: options.cap,
        floor: options.floor,
        window: width,
        score: options.score,
        kind: map.kind.clone(),
        epsilon: map.epsilon,
        seeds: map.seeds.clone(),
        votes,
        single: singles.keys().map(|cell| (*cell, mean(*cell))).collect(),
        steps,
        model_hash: map.model_hash.clone(),
        map_hash: map.hash()?,
        seconds: start.elapsed().as_secs_f64(),
    })
}

fn check(options: &SearchOptions) -> Result<()> {
    let wrong =
        |field: &str, found: String, expected: &str| Err(Error::input(format!("search.{field}"), found, expected));
    if !options.tau.is_finite() || options.tau <= 0.0 {
        return wrong("tau", options.tau.to_string(), "a relative drop above 0");
    }
    if !(options.cap > 0.0 && options.cap <= 1.0) {
        return wrong("cap", options.cap.to_string(), "a share above 0, up to 1");
    }
    if !(0.0..=options.cap).contains(&options.floor) {
        return wrong("floor", options.floor.to_string(), "a share from 0 to the cap");
    }
    if options.window == Some(0) {
        return wrong("window", "0".into(), "at least one layer");
    }
    Ok(())
}

/// R of every projection by itself, a value a seed.
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

fn mean_of(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len().max(1) as f64
}

/// Windows of `width` neighbouring layers of one kind, most robust first by one seed's draws. They are laid from the
/// deepest layer up, so that a shorter one falls on layer 0, the most sensitive.
fn windows(singles: &BTreeMap<Cell, Vec<f64>>, width: usize, seed: usize) -> Vec<Window> {
    let mut ordered: Vec<(f64, usize, usize, Window)> = Vec::new();
    for (rank, kind) in TIES.into_iter().enumerate() {
        let mut layers: Vec<(usize, f64)> = singles
            .iter()
            .filter_map(|(cell, drops)| match cell {
                Cell::Module(ModuleId { layer, kind: k }) if *k == kind => Some((*layer, drops.get(seed)?.to_owned())),
                _ => None,
            })
            .collect();
        layers.sort_by_key(|(layer, _)| std::cmp::Reverse(*layer));
        for chunk in layers.chunks(width) {
            let single = chunk.iter().map(|(_, drop)| drop).sum::<f64>() / chunk.len() as f64;
            let cells = chunk.iter().map(|(layer, _)| Cell::module(*layer, kind)).collect();
            ordered.push((single, chunk[0].0, rank, Window { cells, single }));
        }
    }
    ordered.sort_by(|a, b| a.0.total_cmp(&b.0).then(b.1.cmp(&a.1)).then(a.2.cmp(&b.2)));
    ordered.into_iter().map(|(.., window)| window).collect()
}

impl Walk<'_, '_> {
    fn run(&mut self, windows: &[Window]) -> Result<()> {
        let (mut inside, mut outside) = (Vec::new(), Vec::new());
        for window in windows {
            let grown = self.set.union(&window.cells);
            let fits = share(&grown, self.parameters) <= self.options.cap;
            if fits && self.accepts(grown, window, None, self.options.tau)? {
                inside.push(window);
            } else {
                outside.push(window);
            }
        }
        if self.options.swap { self.swap(inside, outside) } else { Ok(()) }
    }

    /// Windows that cost the set most leave it for windows that were left out. What a window costs is what its absence
    /// saves: by itself it may look robust. Each window that was left out is tried once.
    fn swap(&mut self, inside: Vec<&Window>, outside: Vec<&Window>) -> Result<()> {
        let mut costs = Vec::with_capacity(inside.len());
        for window in inside {
            let joint = (self.joint)(&self.set.difference(&window.cells), &[self.seed])?;
            self.record(&ModuleSet::default(), Some(&window.cells), joint, false);
            costs.push((self.reached - joint, window));
        }
        costs.sort_by(|a, b| b.0.total_cmp(&a.0));
        let mut costly = costs.into_iter().map(|(_, window)| window).peekable();
        for window in outside {
            let Some(worst) = costly.peek() else { break };
            let swapped = self.set.difference(&worst.cells).union(&window.cells);
            let (size, current) = (share(&swapped, self.parameters), share(&self.set, self.parameters));
            // A swap must not shrink the set: a smaller one is always the more robust.
            if size > self.options.cap || size < current {
                continue;
            }
            if self.accepts(swapped, window, Some(&worst.cells), self.reached.min(self.options.tau))? {
                costly.next();
            }
        }
        Ok(())
    }

    /// Scores a changed set and keeps it if its joint R is at most `limit` (for a swap: below what was reached).
    fn accepts(&mut self, set: ModuleSet, window: &Window, out: Option<&ModuleSet>, limit: f64) -> Result<bool> {
        let joint = (self.joint)(&set, &[self.seed])?;
        let accepted = if out.is_some() { joint < limit } else { joint <= limit };
        self.record(&window.cells, out, joint, accepted);
        if accepted {
            self.set = set;
            self.reached = joint;
        }
        Ok(accepted)
    }

    fn record(&mut self, window: &ModuleSet, out: Option<&ModuleSet>, joint: f64, accepted: bool) {
        let (window, without) = (window.to_string(), out.map(ToString::to_string));
        self.steps.push(SearchStep { seed: Some(self.seed), window, without, joint, accepted });
    }
}

/// The majority, within the cap and jointly under τ over all seeds: while it is not, its least voted-for, then most
/// sensitive window leaves.
#[allow(clippy::too_many_arguments)]
fn settle(
    majority: Vec<Cell>,
    votes: &BTreeMap<Cell, usize>,
    single: &dyn Fn(Cell) -> f64,
    map: &RobustnessMap,
    options: &SearchOptions,
    parameters: &BTreeMap<Cell, u64>,
    width: usize,
    joint: Joint<'_>,
    steps: &mut Vec<SearchStep>,
) -> Result<(ModuleSet, f64)> {
    let chosen: BTreeMap<Cell, Vec<f64>> = majority.iter().map(|c| (*c, vec![single(*c)])).collect();
    let mut windows = windows(&chosen, width, 0);
    let support = |w: &Window| w.cells.iter().filter_map(|c| votes.get(&c)).copied().min().unwrap_or(0);
    windows.sort_by(|a, b| support(b).cmp(&support(a)).then(a.single.total_cmp(&b.single)));
    loop {
        let set: ModuleSet = windows.iter().flat_map(|w| w.cells.iter()).collect();
        if set.is_empty() {
            return Ok((set, 0.0));
        }
        if share(&set, parameters) <= options.cap {
            let reached = joint(&set, &map.seeds)?;
            let accepted = reached <= options.tau;
            steps.push(SearchStep { seed: None, window: set.to_string(), without: None, joint: reached, accepted });
            if accepted {
                return Ok((set, reached));
            }
        }
        windows.pop();
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
        true => format!("the least drop among the refused sets was {least:.3}: raise --tau above it, "),
        false => "raise --cap, ".to_owned(),
    };
    Error::failed(what, nearest + "or make a map with a smaller --epsilon, or lower --floor")
}
