//! Sets of cells, parsed and printed.

use super::{Cell, ModuleKind};
use crate::error::{Error, Result};
use crate::options::one_of;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

/// A set of cells, printed as `layers.8-15.{q_proj,v_proj}`.
#[derive(schemars::JsonSchema, Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(transparent)]
pub struct ModuleSet {
    #[schemars(with = "Vec<String>")]
    cells: BTreeSet<Cell>,
}

impl ModuleSet {
    /// Whether the set contains the cell.
    pub fn contains(&self, cell: Cell) -> bool {
        self.cells.contains(&cell)
    }

    /// Adds a cell; returns false if it was present.
    pub fn insert(&mut self, cell: Cell) -> bool {
        self.cells.insert(cell)
    }

    /// Number of cells.
    pub fn len(&self) -> usize {
        self.cells.len()
    }

    /// Whether the set is empty.
    pub fn is_empty(&self) -> bool {
        self.cells.is_empty()
    }

    /// The cells in order.
    pub fn iter(&self) -> impl Iterator<Item = Cell> + '_ {
        self.cells.iter().copied()
    }

    /// The cells of this set that are not in `other`.
    pub fn difference(&self, other: &ModuleSet) -> Self {
        self.cells.difference(&other.cells).copied().collect()
    }

    /// The cells of this set or of `other`.
    pub fn union(&self, other: &ModuleSet) -> Self {
        self.cells.union(&other.cells).copied().collect()
    }

    /// Parses patterns, separated by commas or spaces, against the cells of a model:
    ///
    /// - `embed_tokens`, `norm`, `lm_head`; `all`; `modules` or `all-linear` (the seven projections of every layer);
    ///   a kind alone, such as `q_proj` (of every layer); `none`;
    /// - `layers.3` (everything in a layer), `layers.0-7`, `layers.*`, and with a kind, `layers.0-7.q_proj`,
    ///   `layers.*.{q,v}`, `layers.3.norms`, `layers.0-3.modules`.
    ///
    /// Kinds are `q_proj` … `down_proj` or short, `q k v o gate up down`.
    ///
    /// ```
    /// use swat::{model::ModelDir, modules::ModuleSet};
    ///
    /// let model = ModelDir::open("assets/tiny".as_ref())?;
    /// let set = ModuleSet::parse("layers.2-3.{q_proj,v_proj}", &model.config.cells())?;
    /// assert_eq!(set.len(), 4);
    /// # Ok::<(), swat::error::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Input`] for a pattern that is malformed, out of range, or names a cell that `all` lacks.
    pub fn parse(text: &str, all: &ModuleSet) -> Result<Self> {
        let mut set = Self::default();
        for pattern in split_patterns(text)? {
            set.cells.extend(parse_pattern(pattern, all)?);
        }
        Ok(set)
    }
}

impl FromIterator<Cell> for ModuleSet {
    fn from_iter<I: IntoIterator<Item = Cell>>(cells: I) -> Self {
        Self { cells: cells.into_iter().collect() }
    }
}

impl fmt::Display for ModuleSet {
    /// Canonical text that [`ModuleSet::parse`] reads back: adjacent layers with the same kinds share a pattern. The
    /// empty set is `none`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut layers: BTreeMap<usize, Vec<&str>> = BTreeMap::new();
        for cell in self.iter() {
            if let Some(layer) = cell.layer() {
                layers.entry(layer).or_default().push(cell.name());
            }
        }
        let outside_layers = |cell: Cell| self.contains(cell).then(|| cell.to_string());
        let mut patterns: Vec<String> = outside_layers(Cell::Embedding).into_iter().collect();
        let mut layers = layers.into_iter().peekable();
        while let Some((first, names)) = layers.next() {
            let mut last = first;
            while let Some((next, _)) = layers.next_if(|(layer, other)| *layer == last + 1 && *other == names) {
                last = next;
            }
            let range = if first == last { format!("layers.{first}") } else { format!("layers.{first}-{last}") };
            patterns.push(range + &names_text(&names));
        }
        patterns.extend([Cell::FinalNorm, Cell::Head].into_iter().filter_map(outside_layers));
        f.write_str(if patterns.is_empty() { "none".to_owned() } else { patterns.join(",") }.as_str())
    }
}

/// The suffix behind `layers.N` in a pattern, for the cells of a layer in their order: norms first.
fn names_text(names: &[&'static str]) -> String {
    let norms = names.first() == Some(&Cell::Norms(0).name());
    let (norms, modules) = names.split_at(usize::from(norms));
    let all = modules.len() == ModuleKind::ALL.len();
    match [if all { &["modules"][..] } else { modules }, norms].concat().as_slice() {
        [_, _] if all => String::new(),
        [one] => format!(".{one}"),
        many => format!(".{{{}}}", many.join(",")),
    }
}

/// Splits at commas and white space outside braces.
pub(super) fn split_patterns(text: &str) -> Result<Vec<&str>> {
    let mut patterns = Vec::new();
    let (mut start, mut in_braces) = (0, false);
    for (at, c) in text.char_indices() {
        match c {
            '{' if in_braces => {
                return Err(wrong(text, "a `{` inside braces", "braces that are closed before others open"));
            }
            '{' => in_braces = true,
            '}' if !in_braces => return Err(wrong(text, "a `}` without its `{`", "balanced braces")),
            '}' => in_braces = false,
            _ if !in_braces && (c == ',' || c.is_whitespace()) => {
                patterns.push(&text[start..at]);
                start = at + c.len_utf8();
            }
            _ => {}
        }
    }
    if in_braces {
        return Err(wrong(text, "a `{` without its `}`", "balanced braces"));
    }
    patterns.push(&text[start..]);
    patterns.retain(|p| !p.is_empty());
    if patterns.is_empty() {
        return Err(wrong(text, "no pattern", "patterns such as layers.8-15.{q_proj,v_proj}, or `none`"));
    }
    Ok(patterns)
}

fn parse_pattern(pattern: &str, all: &ModuleSet) -> Result<Vec<Cell>> {
    let single = |cell: Cell, why: &str| {
        if all.contains(cell) { Ok(vec![cell]) } else { Err(wrong(pattern, "a cell that this model lacks", why)) }
    };
    match pattern {
        "all" => return Ok(all.iter().collect()),
        "none" => return Ok(Vec::new()),
        "modules" | "all-linear" => return Ok(all.iter().filter(|c| matches!(c, Cell::Module(_))).collect()),
        "embed_tokens" => return single(Cell::Embedding, "a model with an embedding"),
        "norm" => return single(Cell::FinalNorm, "a model with a final norm"),
        "lm_head" => return single(Cell::Head, "embed_tokens: this model's head is tied to it"),
        _ => {}
    }
    if let Some(kind) = kind_of(pattern) {
        return Ok(all.iter().filter(|c| matches!(c, Cell::Module(m) if m.kind == kind)).collect());
    }
    let Some(rest) = pattern.strip_prefix("layers.") else {
        let word = pattern.split('.').next().unwrap_or(pattern);
        let known = ["embed_tokens", "norm", "lm_head", "all", "modules", "none", "layers"];
        let place = format!("module set `{pattern}`");
        return Err(Error::input(place, format!("`{word}`"), one_of(word, &known, "layers.RANGE.KIND")));
    };
    let (range, kinds) = match rest.split_once('.') {
        Some((range, kinds)) => (range, Some(kinds)),
        None => (rest, None),
    };
    let (first, last) = parse_range(pattern, range, all)?;
    let kinds = kinds.map(|text| parse_kinds(pattern, text)).transpose()?;
    let wanted = |cell: &Cell| kinds.as_ref().is_none_or(|kinds| kinds.contains(&cell.name()));
    let in_range = |cell: &Cell| cell.layer().is_some_and(|layer| (first..=last).contains(&layer));
    Ok(all.iter().filter(in_range).filter(wanted).collect())
}

/// First and last layer of `*`, `3`, `3-7`.
fn parse_range(pattern: &str, range: &str, all: &ModuleSet) -> Result<(usize, usize)> {
    let Some(deepest) = all.iter().filter_map(Cell::layer).max() else {
        return Err(wrong(pattern, "layers", "a model that has layers"));
    };
    if range == "*" {
        return Ok((0, deepest));
    }
    let number = |text: &str| {
        let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
        if !digits {
            return Err(wrong(pattern, format!("layers `{range}`"), "a layer, a range such as 8-15, or *"));
        }
        match text.parse::<usize>() {
            Ok(layer) if layer <= deepest => Ok(layer),
            _ => Err(wrong(pattern, format!("layer {text}"), format!("a layer from 0 to {deepest}"))),
        }
    };
    let (first, last) = match range.split_once('-') {
        Some((first, last)) => (number(first)?, number(last)?),
        None => (number(range)?, number(range)?),
    };
    if first > last {
        return Err(wrong(pattern, format!("layers {first}-{last}"), format!("the lower layer first: {last}-{first}")));
    }
    Ok((first, last))
}

/// The kind that a word names, in full or without `_proj`.
fn kind_of(word: &str) -> Option<ModuleKind> {
    ModuleKind::ALL.into_iter().find(|kind| kind.name() == word || kind.name().strip_suffix("_proj") == Some(word))
}

fn parse_kinds(pattern: &str, text: &str) -> Result<Vec<&'static str>> {
    let inner = text.strip_prefix('{').and_then(|t| t.strip_suffix('}'));
    let words: Vec<&str> = match inner {
        Some(inner) => inner.split(|c: char| c == ',' || c.is_whitespace()).filter(|w| !w.is_empty()).collect(),
        None => vec![text],
    };
    if words.is_empty() {
        return Err(wrong(pattern, "no kind", "kinds such as {q_proj,v_proj}"));
    }
    let mut kinds = Vec::new();
    for word in words {
        match (word, kind_of(word)) {
            (_, Some(kind)) => kinds.push(kind.name()),
            ("norms", None) => kinds.push("norms"),
            ("modules", None) => kinds.extend(ModuleKind::ALL.map(ModuleKind::name)),
            (unknown, None) => {
                let known: Vec<&str> = ModuleKind::ALL.iter().map(|k| k.name()).chain(["norms", "modules"]).collect();
                let place = format!("module set `{pattern}`");
                return Err(Error::input(place, format!("`{unknown}`"), one_of(unknown, &known, "a kind")));
            }
        }
    }
    Ok(kinds)
}

fn wrong(pattern: &str, found: impl Into<String>, expected: impl Into<String>) -> Error {
    Error::input(format!("module set `{pattern}`"), found, expected)
}
