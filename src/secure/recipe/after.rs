//! Merges after tuning: [`crate::secure::merge`] has their formulas and sources.

use crate::model::StoredAs;
use crate::options::{from_zero, one_of, share};
use crate::secure::merge::{Alpha, MergeMethod, MergeOptions};
use std::fmt;
use std::str::FromStr;

/// `METHOD:X`, X being the weight α, λ or γ of the method, or τ of SafeLoRA; `safemerge:LAMBDA:TAU`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MergeStep {
    /// The method.
    pub by: MergeMethod,
    /// Weight or threshold: 0 to 1; of RESTA from 0.
    pub value: f64,
    /// τ of SafeMERGE, 0 to 1; that of `swat merge` if not given.
    pub tau: Option<f64>,
}

/// Methods by name.
const METHODS: [(&str, MergeMethod); 4] = [
    ("path", MergeMethod::Path),
    ("safelora", MergeMethod::SafeLora),
    ("safemerge", MergeMethod::SafeMerge),
    ("resta", MergeMethod::Resta),
];

impl FromStr for MergeStep {
    /// What was expected.
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, value) = text.split_once(':').unwrap_or((text, ""));
        let expected = |expected: String| format!("{name}:X, X {}", expected.trim_start_matches("expected "));
        let names = METHODS.map(|(name, _)| name);
        let found = METHODS.iter().find(|(known, _)| *known == name);
        let (_, by) = found.ok_or_else(|| one_of(name, &names, "a method"))?;
        let (value, tau) = match value.split_once(':') {
            Some((value, tau)) if *by == MergeMethod::SafeMerge => (value, Some(share(tau).map_err(expected)?)),
            _ => (value, None),
        };
        let parse = if *by == MergeMethod::Resta { from_zero::<f64> } else { share::<f64> };
        Ok(Self { by: *by, value: parse(value).map_err(expected)?, tau })
    }
}

impl fmt::Display for MergeStep {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = METHODS.iter().find(|(_, by)| *by == self.by).map_or("", |(name, _)| name);
        write!(f, "{name}:{}", self.value)?;
        self.tau.map_or(Ok(()), |tau| write!(f, ":{tau}"))
    }
}

impl MergeStep {
    /// The merge's options; shards and dtypes as of the tuned model.
    pub fn options(&self) -> MergeOptions {
        const DEFAULT: f64 = 0.5;
        let (alpha, tau) = match self.by {
            MergeMethod::SafeLora => (DEFAULT, self.value),
            _ => (self.value, self.tau.unwrap_or(DEFAULT)),
        };
        MergeOptions {
            by: self.by,
            alpha: Alpha::At(alpha),
            tau,
            save_dtype: StoredAs::AsStored,
            max_shard_bytes: 4 << 30,
            points: Vec::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_value_is_the_weight_or_the_threshold() {
        let options = |text: &str| {
            let step: MergeStep = text.parse().unwrap();
            assert_eq!(step.to_string(), text);
            let options = step.options();
            (options.by, options.alpha, options.tau)
        };
        assert_eq!(options("path:0.7"), (MergeMethod::Path, Alpha::At(0.7), 0.5));
        assert_eq!(options("safelora:0.3"), (MergeMethod::SafeLora, Alpha::At(0.5), 0.3));
        assert_eq!(options("resta:2"), (MergeMethod::Resta, Alpha::At(2.0), 0.5));
        assert_eq!(options("safemerge:0.8"), (MergeMethod::SafeMerge, Alpha::At(0.8), 0.5));
        assert_eq!(options("safemerge:0.8:0.7"), (MergeMethod::SafeMerge, Alpha::At(0.8), 0.7));
        for wrong in
            ["safemerge:2", "safemerge:0.8:2", "safemerge:0.8:0.7:0.6", "path", "path:0.5:0.5", "safelora:0.5:0.5"]
        {
            assert!(wrong.parse::<MergeStep>().is_err(), "{wrong}");
        }
    }
}
