//! Sets of cells, as text and back.

use super::{Cell, ModuleKind};
use crate::error::{Error, Result};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

/// A set of cells, printed as `layers.8-15.{q_proj,v_proj}`.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(transparent)]
pub struct ModuleSet {
    cells: BTreeSet<Cell>,
}

impl ModuleSet {
    /// Whether the cell is in it.
    pub fn contains(&self, cell: Cell) -> bool {
        self.cells.contains(&cell)
    }

    /// Adds a cell; false if it was there.
    pub fn insert(&mut self, cell: Cell) -> bool {
        self.cells.insert(cell)
    }

    /// Removes a cell; false if it was not there.
    pub fn remove(&mut self, cell: Cell) -> bool {
        self.cells.remove(&cell)
    }

    /// How many cells.
    pub fn len(&self) -> usize {
        self.cells.len()
    }

    /// Whether it holds none.
    pub fn is_empty(&self) -> bool {
        self.cells.is_empty()
    }

    /// The cells in order.
    pub fn iter(&self) -> impl Iterator<Item = Cell> + '_ {
        self.cells.iter().copied()
    }

    /// The cells of `all` that are not in it.
    pub fn complement(&self, all: &ModuleSet) -> Self {
        all.difference(self)
    }

    /// The cells that are not in `other`.
    pub fn difference(&self, other: &ModuleSet) -> Self {
        self.cells.difference(&other.cells).copied().collect()
    }

    /// The cells of either.
    pub fn union(&self, other: &ModuleSet) -> Self {
        self.cells.union(&other.cells).copied().collect()
    }

    /// Reads patterns that commas or spaces separate, of the cells in `all`:
    ///
    /// - `embed_tokens`, `norm`, `lm_head`; `all`; `modules` (the seven projections of every layer); `none`;
    /// - `layers.3` (everything in a layer), `layers.0-7`, `layers.*`, and with a kind, `layers.0-7.q_proj`,
    ///   `layers.*.{q,v}`, `layers.3.norms`, `layers.0-3.modules`.
    ///
    /// Kinds are `q_proj` … `down_proj` or short, `q k v o gate up down`. What is unknown, out of range, or not in
    /// `all` is an [`Error::Input`] that names it.
    ///
    /// # Errors
    /// [`Error::Input`] names the pattern that is wrong, and what is known.
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
    /// Canonical text that [`ModuleSet::parse`] reads back: neighbouring layers that hold the same kinds share one
    /// pattern. The empty set is `none`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut patterns = Vec::new();
        if self.contains(Cell::Embedding) {
            patterns.push("embed_tokens".to_owned());
        }
        let mut layers: BTreeMap<usize, BTreeSet<LayerCell>> = BTreeMap::new();
        for cell in self.iter() {
            match cell {
                Cell::Norms(layer) => layers.entry(layer).or_default().insert(LayerCell::Norms),
                Cell::Module(m) => layers.entry(m.layer).or_default().insert(LayerCell::Module(m.kind)),
                Cell::Embedding | Cell::FinalNorm | Cell::Head => continue,
            };
        }
        let mut layers = layers.into_iter().peekable();
        while let Some((first, cells)) = layers.next() {
            let mut last = first;
            while let Some((next, _)) = layers.next_if(|(layer, other)| *layer == last + 1 && *other == cells) {
                last = next;
            }
            let range = if first == last { format!("layers.{first}") } else { format!("layers.{first}-{last}") };
            patterns.push(range + &kinds_text(&cells));
        }
        if self.contains(Cell::FinalNorm) {
            patterns.push("norm".to_owned());
        }
        if self.contains(Cell::Head) {
            patterns.push("lm_head".to_owned());
        }
        if patterns.is_empty() {
            patterns.push("none".to_owned());
        }
        f.write_str(&patterns.join(","))
    }
}

/// A cell without its layer.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum LayerCell {
    Module(ModuleKind),
    Norms,
}

/// What follows `layers.N` in a pattern.
fn kinds_text(cells: &BTreeSet<LayerCell>) -> String {
    let modules = cells.iter().filter(|c| matches!(c, LayerCell::Module(_))).count();
    let norms = cells.contains(&LayerCell::Norms);
    let mut names: Vec<&str> = match (modules == ModuleKind::ALL.len(), norms) {
        (true, true) => return String::new(),
        (true, false) => vec!["modules"],
        (false, _) => cells
            .iter()
            .filter_map(|c| match c {
                LayerCell::Module(kind) => Some(kind.name()),
                LayerCell::Norms => None,
            })
            .collect(),
    };
    if norms {
        names.push("norms");
    }
    match names.as_slice() {
        [one] => format!(".{one}"),
        many => format!(".{{{}}}", many.join(",")),
    }
}

/// Splits at commas and white space outside braces.
fn split_patterns(text: &str) -> Result<Vec<&str>> {
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
        "modules" => return Ok(all.iter().filter(|c| matches!(c, Cell::Module(_))).collect()),
        "embed_tokens" => return single(Cell::Embedding, "a model with an embedding"),
        "norm" => return single(Cell::FinalNorm, "a model with a final norm"),
        "lm_head" => return single(Cell::Head, "embed_tokens: this model's head is tied to it"),
        _ => {}
    }
    let Some(rest) = pattern.strip_prefix("layers.") else {
        let word = pattern.split('.').next().unwrap_or(pattern);
        let known = ["embed_tokens", "norm", "lm_head", "all", "modules", "none", "layers"];
        let place = format!("module set `{pattern}`");
        return Err(Error::input(place, format!("`{word}`"), suggestion(word, &known, "layers.RANGE.KIND")));
    };
    let (range, kinds) = match rest.split_once('.') {
        Some((range, kinds)) => (range, Some(kinds)),
        None => (rest, None),
    };
    let (first, last) = parse_range(pattern, range, all)?;
    let kinds = kinds.map(|text| parse_kinds(pattern, text)).transpose()?;
    let wanted = |cell: &Cell| match (cell, &kinds) {
        (_, None) => true,
        (Cell::Module(m), Some(kinds)) => kinds.contains(&LayerCell::Module(m.kind)),
        (Cell::Norms(_), Some(kinds)) => kinds.contains(&LayerCell::Norms),
        _ => false,
    };
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

fn parse_kinds(pattern: &str, text: &str) -> Result<BTreeSet<LayerCell>> {
    let inner = text.strip_prefix('{').and_then(|t| t.strip_suffix('}'));
    let words: Vec<&str> = match inner {
        Some(inner) => inner.split(|c: char| c == ',' || c.is_whitespace()).filter(|w| !w.is_empty()).collect(),
        None => vec![text],
    };
    if words.is_empty() {
        return Err(wrong(pattern, "no kind", "kinds such as {q_proj,v_proj}"));
    }
    let mut kinds = BTreeSet::new();
    for word in words {
        let short = ModuleKind::ALL.into_iter().find(|k| k.name().strip_suffix("_proj") == Some(word));
        match (word, short.or_else(|| ModuleKind::from_name(word))) {
            (_, Some(kind)) => {
                kinds.insert(LayerCell::Module(kind));
            }
            ("norms", None) => {
                kinds.insert(LayerCell::Norms);
            }
            ("modules", None) => kinds.extend(ModuleKind::ALL.map(LayerCell::Module)),
            (unknown, None) => {
                let known: Vec<&str> = ModuleKind::ALL.iter().map(|k| k.name()).chain(["norms", "modules"]).collect();
                let place = format!("module set `{pattern}`");
                return Err(Error::input(place, format!("`{unknown}`"), suggestion(unknown, &known, "a kind")));
            }
        }
    }
    Ok(kinds)
}

/// `one of a, b, c (did you mean b?)`.
fn suggestion(word: &str, known: &[&str], what: &str) -> String {
    let near = known
        .iter()
        .map(|k| (strsim::jaro_winkler(word, k), k))
        .filter(|(score, _)| *score > 0.6)
        .max_by(|a, b| a.0.total_cmp(&b.0));
    let list = known.join(", ");
    match near {
        Some((_, near)) => format!("{what}: one of {list} (did you mean `{near}`?)"),
        None => format!("{what}: one of {list}"),
    }
}

fn wrong(pattern: &str, found: impl Into<String>, expected: impl Into<String>) -> Error {
    Error::input(format!("module set `{pattern}`"), found, expected)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn all(layers: usize, tied: bool) -> ModuleSet {
        let mut set = ModuleSet::from_iter([Cell::Embedding, Cell::FinalNorm]);
        for layer in 0..layers {
            set.insert(Cell::Norms(layer));
            for kind in ModuleKind::ALL {
                set.insert(Cell::module(layer, kind));
            }
        }
        if !tied {
            set.insert(Cell::Head);
        }
        set
    }

    fn parse(text: &str) -> ModuleSet {
        ModuleSet::parse(text, &all(32, false)).unwrap()
    }

    fn error(text: &str) -> String {
        ModuleSet::parse(text, &all(32, true)).unwrap_err().to_string()
    }

    #[test]
    fn patterns() {
        assert_eq!(parse("all"), all(32, false));
        assert_eq!(parse("none"), ModuleSet::default());
        assert_eq!(parse("modules").len(), 7 * 32);
        assert_eq!(parse("layers.8-15.{q_proj,v_proj}").len(), 16);
        assert_eq!(parse("layers.8-15.{q, v}"), parse("layers.8-15.q layers.8-15.v_proj"));
        assert_eq!(parse("layers.*.o_proj").len(), 32);
        assert_eq!(parse("layers.3").len(), 8);
        assert_eq!(parse("layers.0-3.norms,embed_tokens norm, lm_head").len(), 7);
        assert_eq!(parse("layers.0-3.modules").len(), 28);
        assert_eq!(parse("modules").complement(&all(32, false)).len(), 35);
        assert_eq!(parse("norm").union(&parse("lm_head")).len(), 2);
        assert_eq!(parse("all").difference(&parse("layers.*")), parse("embed_tokens norm lm_head"));
    }

    #[test]
    fn canonical_text() {
        for (text, canonical) in [
            ("layers.8.q layers.9.q,layers.10.q", "layers.8-10.q_proj"),
            ("layers.0-3.v layers.2-4.q", "layers.0-1.v_proj,layers.2-3.{q_proj,v_proj},layers.4.q_proj"),
            ("norm layers.31 embed_tokens", "embed_tokens,layers.31,norm"),
            ("layers.0-1.modules", "layers.0-1.modules"),
            ("layers.5.{norms,down}", "layers.5.{down_proj,norms}"),
            ("none", "none"),
        ] {
            assert_eq!(parse(text).to_string(), canonical);
        }
    }

    #[test]
    fn errors_name_the_offender() {
        assert!(error("layers.3.q_porj").contains("`q_porj`") && error("layers.3.q_porj").contains("`q_proj`?"));
        assert!(error("layers.40.q").contains("layer 40; expected a layer from 0 to 31"));
        assert!(error("layers.0-99999999999999999999999.q").contains("layer 99999999999999999999999"));
        assert!(error("layers.7-3").contains("3-7"));
        assert!(error("lm_head").contains("tied"));
        assert!(error("embed_token").contains("`embed_tokens`?"));
        assert!(error("").contains("no pattern"));
        for text in ["layers.", "layers.a", "layers.-1", "layers.1-", "layers.1.", "layers.1.{}", "layers.+1"] {
            error(text);
        }
        for text in ["layers.1.{q", "layers.1.q}", "layers.1.{{q}}", "layers.1.{q}x"] {
            error(text);
        }
    }

    proptest! {
        #[test]
        fn text_reads_back(bits in proptest::collection::vec(any::<bool>(), 51), tied: bool) {
            let all = all(6, tied);
            let set: ModuleSet = all.iter().zip(bits).filter(|(_, bit)| *bit).map(|(cell, _)| cell).collect();
            prop_assert_eq!(ModuleSet::parse(&set.to_string(), &all).unwrap(), set);
        }

        #[test]
        fn any_text_is_read_or_refused(text in "[a-z_.{},*0-9 -]{0,40}|.{0,20}") {
            let _ = ModuleSet::parse(&text, &all(3, false));
        }
    }
}
