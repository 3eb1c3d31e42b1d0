//! Parts of a map, each computed by one shard, and the map that they make up.
//!
//! Every shard computes whole groups of the cells that a single process would compute together, so that the map is the
//! same to the last bit.

use super::map::{CellRobustness, RobustnessMap};
use super::partial::{Done, Header, MAX_BYTES};
use super::shard::Shard;
use crate::error::{Error, Result};
use crate::io::input::{printable, read_text};
use crate::io::json::differences;
use crate::modules::Cell;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

/// Version of swat, and the commit it was built from where that is known.
pub(super) const VERSION: &str = concat!(env!("CARGO_PKG_VERSION"), env!("SWAT_COMMIT"));
/// Expected content, in errors.
const OURS: &str = "a part that `swat robustness --shard` wrote";
/// Most cells, shards or differences that an error names.
const NAMED: usize = 5;

/// What makes up the whole map, in the first line of each part.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Part {
    pub(crate) shard: Shard,
    /// Version of swat that computes the part.
    pub(crate) version: String,
    /// Device, `cpu` or `cuda`, and precision: they decide the last bits.
    pub(crate) device: String,
    pub(crate) precision: String,
    /// Cells that are computed together.
    pub(crate) group: usize,
    /// All cells of the map, in its order.
    pub(crate) cells: Vec<Cell>,
    /// The map without ε, which the header has, and cells.
    pub(crate) map: RobustnessMap,
}

impl Part {
    /// Groups of cells of this shard, in the order of the map.
    pub(super) fn groups(&self) -> impl Iterator<Item = &[Cell]> {
        let groups = self.cells.chunks(self.group.max(1)).enumerate();
        groups.filter(|(group, _)| self.shard.has(*group)).map(|(_, cells)| cells)
    }

    /// Cells of this shard.
    fn own(&self) -> BTreeSet<Cell> {
        self.groups().flatten().copied().collect()
    }
}

impl RobustnessMap {
    /// Whether a file is the part of a map that a shard wrote, of any version.
    pub fn is_part(path: &Path) -> bool {
        let Ok(file) = File::open(path) else { return false };
        let first = BufReader::new(file.take(MAX_BYTES)).lines().next().and_then(Result::ok);
        let value: Option<Value> = first.and_then(|line| serde_json::from_str(&line).ok());
        value.is_some_and(|value| value["part"]["shard"].is_string())
    }

    /// The map of all its parts, in any order: that of a single process but for `seconds`.
    ///
    /// # Errors
    /// [`Error::Input`] names the part that is damaged, unfinished, there twice or of another map, and the shards that
    /// are missing; [`Error::Io`].
    pub fn merge(parts: &[PathBuf]) -> Result<Self> {
        let mut found: BTreeMap<Shard, (&Path, Header, Vec<Done>)> = BTreeMap::new();
        for path in parts {
            let (header, part, done) = read(path)?;
            if let Some((_, (first, other, _))) = found.first_key_value() {
                check_same(other, first, &header, path)?;
            }
            if let Some((other, ..)) = found.get(&part.shard) {
                let text = format!("shard {}, which {} is as well", part.shard, other.display());
                return Err(Error::input(path.display().to_string(), text, "each shard once"));
            }
            check_finished(&part, &done, path)?;
            found.insert(part.shard, (path, header, done));
        }
        let Some((first, (path, header, _))) = found.first_key_value() else {
            return Err(Error::input("--merge", "no parts", "the files that `swat robustness --shard` wrote"));
        };
        let missing = (0..first.count()).filter(|index| found.keys().all(|shard| shard.index() != *index));
        let mut missing: Vec<String> = missing.map(|index| format!("{index}/{}", first.count())).collect();
        if !missing.is_empty() {
            let more = missing.len().saturating_sub(NAMED);
            missing.truncate(NAMED);
            let more = if more > 0 { format!(" and {more} more") } else { String::new() };
            let expected = format!("the parts of --shard {}{more} as well", missing.join(", "));
            return Err(Error::input("--merge", format!("{} of {} parts", found.len(), first.count()), expected));
        }
        let (place, Header { epsilon, epsilon_sweep, part, .. }) = (path.display().to_string(), header.clone());
        let Some(part) = part else { unreachable!("`read` returns parts alone") };
        let mut cells: BTreeMap<Cell, CellRobustness> = BTreeMap::new();
        let mut seconds = 0.0;
        for done in found.into_values().flat_map(|(_, _, done)| done) {
            seconds += done.seconds;
            cells.insert(done.cell.cell, done.cell);
        }
        let Part { cells: order, map, .. } = *part;
        let cells = order.iter().filter_map(|cell| cells.remove(cell)).collect();
        let map = Self { epsilon, epsilon_sweep, cells, seconds, ..map };
        map.check(&place)?;
        Ok(map)
    }
}

/// A part with its finished cells.
fn read(path: &Path) -> Result<(Header, Part, Vec<Done>)> {
    let text = read_text(path, MAX_BYTES)?;
    let place = |line: usize| format!("{}:{line}", path.display());
    let wrong = |line: usize, e: serde_json::Error| Error::input(place(line), printable(&e), OURS);
    // A line without an end was being written when the process ended.
    let mut lines = text.split_inclusive('\n').filter(|line| line.ends_with('\n')).enumerate();
    let Some((_, first)) = lines.next() else {
        return Err(Error::input(path.display().to_string(), "no whole line", OURS));
    };
    let header: Header = serde_json::from_str(first).map_err(|e| wrong(1, e))?;
    let Some(part) = header.part.clone() else {
        return Err(Error::input(place(1), "the checkpoint of a map that is not sharded", OURS));
    };
    let own = part.own();
    let (mut done, mut known) = (Vec::new(), BTreeSet::new());
    for (line, text) in lines {
        let cell: Done = serde_json::from_str(text).map_err(|e| wrong(line + 1, e))?;
        let name = cell.cell.cell;
        if !own.contains(&name) {
            let found = format!("the cell {name}, which is not of shard {}", part.shard);
            return Err(Error::input(place(line + 1), found, OURS));
        }
        if !known.insert(name) {
            return Err(Error::input(place(line + 1), format!("the cell {name} again"), OURS));
        }
        done.push(cell);
    }
    Ok((header, *part, done))
}

fn check_finished(part: &Part, done: &[Done], path: &Path) -> Result<()> {
    let own = part.own().len();
    if done.len() == own {
        return Ok(());
    }
    let expected = format!("`--shard {}` run to its end: the same command continues it", part.shard);
    Err(Error::input(path.display().to_string(), format!("{} of {own} cells", done.len()), expected))
}

/// Checks that two parts are of the same map; the error names what differs.
fn check_same(one: &Header, one_path: &Path, other: &Header, other_path: &Path) -> Result<()> {
    let names = |path: &Path| path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let mut found = differences(&comparable(one), &comparable(other), [&names(one_path), &names(other_path)]);
    if found.is_empty() {
        return Ok(());
    }
    found.truncate(NAMED);
    let expected = "parts of one map: the same model, probe, prompts, options, number of shards and version of swat; \
                    with --epsilon where machines differ";
    let found = format!("a part of another map than {}: {}", one_path.display(), found.join("; "));
    Err(Error::input(other_path.display().to_string(), found, expected))
}

/// What all parts of a map have in common, what a reader knows first. Paths may differ between machines.
fn comparable(header: &Header) -> Value {
    let part = header.part.as_ref().map(|part| {
        let Part { shard, version, device, precision, group, cells, map } = &**part;
        let map = RobustnessMap { made_from: None, ..map.clone() };
        json!({ "shards": shard.count(), "version": version, "device": device, "precision": precision, "map": map,
            "cells": cells, "group": group })
    });
    let Header { run, epsilon, epsilon_sweep, .. } = header;
    json!({ "part": part, "epsilon": epsilon, "epsilon_sweep": epsilon_sweep, "options": run })
}
