//! Names of modules that an adapter's settings select, as peft matches them.

use crate::error::{Error, Result};
use fancy_regex::{Regex, RegexBuilder};

/// Longest regular expression, in bytes.
const MAX_BYTES: usize = 1 << 14;
/// Steps of one match, far more than names of modules need.
const MAX_STEPS: usize = 100_000;

/// Names of modules: a list, a regular expression, or every linear layer but the head.
pub(super) enum Names {
    /// A module of one of these names, or whose path ends in one behind a dot.
    List(Vec<String>),
    /// A module whose whole path matches.
    Pattern(Pattern),
    /// `all-linear`.
    AllLinear,
}

impl Names {
    /// Whether they select the projection or other module at `path`.
    pub(super) fn select(&self, path: &str) -> Result<bool> {
        match self {
            Self::List(names) => Ok(names.iter().any(|name| {
                path.strip_suffix(name.as_str()).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
            })),
            Self::Pattern(pattern) => pattern.matches(path),
            Self::AllLinear => Ok(path.contains(".layers.")),
        }
    }
}

/// A regular expression of an untrusted file, with its field for errors.
pub(super) struct Pattern {
    regex: Regex,
    place: String,
}

impl Pattern {
    /// An expression that the whole name must match.
    pub(super) fn whole(text: &str, place: &str) -> Result<Self> {
        Self::new(text, &format!("\\A(?:{text})\\z"), place)
    }

    /// An expression that the end of a name must match, from its beginning or behind a dot: a key of `rank_pattern`.
    pub(super) fn end(text: &str, place: &str) -> Result<Self> {
        Self::new(text, &format!("\\A(?:.*\\.)?(?:{text})\\z"), place)
    }

    /// The name of a list of layers, followed by an index: `layers_pattern`.
    pub(super) fn layers(text: &str, place: &str) -> Result<Self> {
        Self::new(text, &format!("\\A(?:.*?\\.)?(?:{text})\\.\\d+\\."), place)
    }

    fn new(text: &str, anchored: &str, place: &str) -> Result<Self> {
        let shown: String = text.chars().take(80).flat_map(char::escape_debug).collect();
        let place = format!("{place}: `{shown}`");
        // By itself, so that brackets that only balance around it are found.
        let built = if text.len() > MAX_BYTES { None } else { Regex::new(text).ok() };
        let built = built.and_then(|_| RegexBuilder::new(anchored).backtrack_limit(MAX_STEPS).build().ok());
        match built {
            Some(regex) => Ok(Self { regex, place }),
            None => Err(Error::input(place, "no regular expression", "one of Python's syntax, of at most 16 KB")),
        }
    }

    /// Whether the name of a module matches.
    pub(super) fn matches(&self, path: &str) -> Result<bool> {
        let failed = |_| Error::input(&self.place, "an expression that takes too long", "a simpler one");
        self.regex.is_match(path).map_err(failed)
    }
}
