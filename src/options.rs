//! Option structs that are command-line arguments and configuration tables at once.
//!
//! A field's default stands once, in its `arg` attribute: for the command line by clap, for configuration files by
//! `#[serde(default)]` over [`defaults`].

use crate::error::{Error, Result};
use clap::{Args, Command};
use std::str::FromStr;

/// The options of an empty command line.
///
/// # Panics
/// Where a field has neither a default nor an optional type, which is a bug.
pub fn defaults<T: Args>() -> T {
    let command = T::augment_args(Command::new("defaults").no_binary_name(true).disable_help_flag(true));
    let parsed = command.try_get_matches_from([""; 0]).and_then(|matches| T::from_arg_matches(&matches));
    parsed.expect("every option has a default")
}

/// Parses a size in MiB to bytes, as a value parser of clap.
///
/// # Errors
/// A message for text that is no whole number, 0, or too large.
pub fn mib(text: &str) -> Result<u64, String> {
    Some(mib_or_none(text)?).filter(|bytes| *bytes > 0).ok_or_else(|| "expected 1 or more".into())
}

/// [`mib`], or 0.
///
/// # Errors
/// A message for text that is no whole number, or too large.
pub fn mib_or_none(text: &str) -> Result<u64, String> {
    let size: u64 = text.parse().map_err(|e: std::num::ParseIntError| e.to_string())?;
    size.checked_mul(1 << 20).ok_or_else(|| "too large".into())
}

/// A number above 0 and not infinite, as a value parser of clap.
///
/// # Errors
/// A message for anything else, as of the parsers below.
pub fn above_zero<T: FromStr + Into<f64> + Copy>(text: &str) -> Result<T, String> {
    number(text, |x| x > 0.0, "a number above 0")
}

/// A number from 0 that is not infinite.
///
/// # Errors
/// A message for anything else.
pub fn from_zero<T: FromStr + Into<f64> + Copy>(text: &str) -> Result<T, String> {
    number(text, |x| x >= 0.0, "a number from 0")
}

/// A share from 0 to 1.
///
/// # Errors
/// A message for anything else.
pub fn share<T: FromStr + Into<f64> + Copy>(text: &str) -> Result<T, String> {
    number(text, |x| (0.0..=1.0).contains(&x), "a share from 0 to 1")
}

/// A share above 0, up to 1.
///
/// # Errors
/// A message for anything else.
pub fn positive_share<T: FromStr + Into<f64> + Copy>(text: &str) -> Result<T, String> {
    number(text, |x| x <= 1.0 && x > 0.0, "a share above 0, up to 1")
}

/// A number above 0 and below 1.
///
/// # Errors
/// A message for anything else.
pub fn inner_share<T: FromStr + Into<f64> + Copy>(text: &str) -> Result<T, String> {
    number(text, |x| x < 1.0 && x > 0.0, "a number above 0 and below 1")
}

fn number<T: FromStr + Into<f64> + Copy>(text: &str, valid: impl Fn(f64) -> bool, expected: &str) -> Result<T, String> {
    let parsed = text.trim().parse::<T>().ok().filter(|x| (*x).into().is_finite() && valid((*x).into()));
    parsed.ok_or_else(|| format!("expected {expected}"))
}

/// A whole number from 0.
///
/// # Errors
/// A message for anything else.
pub fn whole(text: &str) -> Result<u64, String> {
    text.trim().parse().map_err(|_| "expected a whole number from 0 to 18446744073709551615".into())
}

/// A number of epochs.
///
/// # Errors
/// A message for a part of one, and for anything else.
pub fn epochs(text: &str) -> Result<u64, String> {
    let parsed = text.trim().parse().ok();
    parsed.ok_or_else(|| "expected a whole number of epochs; steps may be part of one (--steps, --mods-steps)".into())
}

/// A count from 1 to 2³².
///
/// # Errors
/// A message for anything else.
pub fn count(text: &str) -> Result<usize, String> {
    let parsed = text.trim().parse().ok().filter(|n| (1..=1 << 32).contains(n));
    parsed.ok_or_else(|| "expected a whole number from 1 to 4294967296".into())
}

/// What was expected in the place of an unknown word: `a kind: one of a, b, c (did you mean `b`?)`.
pub(crate) fn one_of(word: &str, known: &[&str], what: &str) -> String {
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

/// Checks that an option is in range; `field` names it in the error.
pub(crate) fn require(valid: bool, field: &str, found: impl std::fmt::Display, expected: &str) -> Result<()> {
    if valid { Ok(()) } else { Err(Error::input(field, found.to_string(), expected)) }
}

/// Implements [`Default`] by [`defaults`], for `#[serde(default)]`.
macro_rules! default_from_args {
    ($($options:ty),+ $(,)?) => {$(
        impl Default for $options {
            fn default() -> Self {
                $crate::options::defaults()
            }
        }
    )+};
}

/// Serializes a type as the text that [`std::fmt::Display`] writes and [`std::str::FromStr`] reads.
macro_rules! serde_as_text {
    ($($kind:ty),+ $(,)?) => {$(
        impl serde::Serialize for $kind {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl schemars::JsonSchema for $kind {
            fn schema_name() -> std::borrow::Cow<'static, str> {
                stringify!($kind).into()
            }

            fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
                schemars::json_schema!({ "type": "string" })
            }
        }

        impl<'de> serde::Deserialize<'de> for $kind {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = <String as serde::Deserialize>::deserialize(deserializer)?;
                text.parse().map_err(serde::de::Error::custom)
            }
        }
    )+};
}

pub(crate) use {default_from_args, serde_as_text};
