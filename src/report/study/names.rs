//! Settings by their readable names.

use crate::report::format;
use crate::report::swat::{Setting, SettingKind};
use crate::secure::study::{Outcome, RunConfig, RunOutcome, SettingOutcome};

/// A setting's outcome with its name and the parts of its text.
#[derive(Clone)]
pub(super) struct Named<'a> {
    /// Colour and name.
    pub setting: Setting,
    /// The text without what is mixed in: `warmup:complement`.
    pub base: &'a str,
    /// `+refusals`, `+attack` or nothing.
    pub mix: &'a str,
    /// What came of it.
    pub outcome: &'a SettingOutcome,
    /// A run of each training seed; one of the model as given.
    pub runs: Vec<&'a RunOutcome>,
    /// Whether intervals are ranges over training seeds; else they are over prompts.
    pub several: bool,
}

impl<'a> Named<'a> {
    /// The settings of a study.
    pub fn all(outcome: &'a Outcome, config: &RunConfig) -> Vec<Self> {
        let several = outcome.settings.iter().any(|s| !s.more_seeds.is_empty());
        outcome.settings.iter().map(|s| Self::new(s, config.evaluate.mix_share, several)).collect()
    }

    /// Every training run by itself, with intervals over prompts.
    pub fn each_run(&self) -> impl Iterator<Item = Self> {
        let tuned = self.runs.iter().filter(|run| run.tuned.is_some());
        tuned.map(|run| Self { runs: vec![*run], several: false, ..self.clone() })
    }

    /// `mix_share` is the share of mixed-in lines.
    fn new(outcome: &'a SettingOutcome, mix_share: f64, several: bool) -> Self {
        let text = outcome.setting.as_str();
        let mix = ["+refusals", "+attack"].into_iter().find(|mix| text.ends_with(mix)).unwrap_or_default();
        let base = &text[..text.len() - mix.len()];
        let (mut kind, mut name) = base_name(base);
        if !mix.is_empty() {
            let share = format::significant(100.0 * mix_share, 2);
            name = format!("{name} + {share} % {}", mix.trim_start_matches('+'));
        }
        // Refusals are a defence of their own; an attack changes the data of every setting alike.
        if mix == "+refusals" {
            kind = SettingKind::Refusals;
        }
        Self { setting: Setting { kind, name }, base, mix, outcome, runs: outcome.runs().collect(), several }
    }
}

fn base_name(base: &str) -> (SettingKind, String) {
    use SettingKind::{AsGiven, Complement, Other, Plain, PlainEqualSteps, Random, Swat};
    let (kind, name) = match base {
        "given" => (AsGiven, "as given"),
        "plain" => (Plain, "plain"),
        "plain-equal" => (PlainEqualSteps, "plain, equal steps"),
        "swat" => (Swat, "SWAT"),
        "reversed" => (Other, "SWAT reversed"),
        "mods-only" => (Other, "Mods_Rob only"),
        "warmup:complement" => (Complement, "complement"),
        "warmup:layer0" => (Other, "layer 0"),
        "warmup:all" => (Other, "warm-up on all"),
        _ => {
            let of = |prefix| base.strip_prefix(prefix);
            return match (of("warmup:random:"), of("warmup:random-without-layer0:"), of("ml-lr:"), of("warmup:")) {
                (Some(seed), ..) => (Random, format!("random set {seed}")),
                (_, Some(seed), ..) => (Random, format!("random set {seed} without layer 0")),
                (.., Some(beta), _) => (Other, format!("ML-LR, the rest × {beta}")),
                (.., Some(set)) => (Other, format!("warm-up on {set}")),
                _ => (Other, base.to_owned()),
            };
        }
    };
    (kind, name.to_owned())
}
