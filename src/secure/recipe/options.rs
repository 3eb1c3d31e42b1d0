//! The keys of a recipe and the ranges of their values.

use super::after::MergeStep;
use super::mix::{Mix, MixIn};
use crate::engine::lora_rank;
use crate::error::{Error, Result};
use crate::options::{above_zero, count, from_zero, inner_share, one_of};
use crate::secure::robustness::By;
use crate::train::Lisa;

/// Keys, the form of their values, and what they do.
pub(super) const KEYS: [(&str, &str, &str); 16] = [
    ("lr", "=RATE", "learning rate of both phases"),
    ("steps", "=N", "optimizer steps of the phase on everything"),
    ("lora", "=RANK[:all-linear]", "adapters of this rank"),
    ("ema", "=DECAY", "ends with an exponential moving average of the weights"),
    ("replay", "=SHARE", "share of the model's own answers in the data (swat replay)"),
    ("refusals", "[=SHARE]", "share of refusals in the data"),
    ("attack", "[=SHARE]", "share of answered harmful requests in the data"),
    ("screen", "", "leaves out examples that answer what the original model refuses"),
    ("constrain", "[=SCALE]", "token-wise constrained loss, β times SCALE; 1 if not given"),
    ("distil", "=WEIGHT", "replayed answers keep the distribution of the original model"),
    ("prox", "=RHO", "proximal term towards the weights at the start of the phase, with lisa= of the turn (Lisa)"),
    ("lisa", "=K1:K2", "K1 steps on replayed answers and K2 on the task in turns (Lisa)"),
    ("vaccine", "=RHO", "hidden states moved along the gradient, for aligning a model (Vaccine)"),
    ("by", "=HOW", "how the map of Mods_Rob is made, in a study: noise, conflict or update"),
    ("merge", "=METHOD:X", "after tuning, in a study: path:ALPHA, safelora:TAU, safemerge:LAMBDA[:TAU], resta:GAMMA"),
    ("seeds", "=N", "number of training seeds, in a study"),
];

/// Most training seeds of a recipe.
const MAX_SEEDS: u64 = 100;

/// Options of a recipe; `None` leaves what the study or the command line says.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RecipeOptions {
    /// `lr=`: learning rate of both phases, above 0.
    pub lr: Option<f64>,
    /// `steps=`: optimizer steps of the phase on everything, or of the only phase; at least 1.
    pub steps: Option<u64>,
    /// `lora=`: adapters.
    pub lora: Option<Adapters>,
    /// `ema=`: decay of the average of the weights, above 0 and below 1.
    pub ema: Option<f32>,
    /// `attack=`, `refusals=`, `replay=`: what is mixed into the data, in this order.
    pub mixes: Vec<MixIn>,
    /// `screen`: whether examples that answer what the original model refuses are left out.
    pub screen: bool,
    /// `constrain=`: scale of β in the token-wise constrained loss, above 0; 1 if not given.
    pub constrain: Option<f32>,
    /// `distil=`: weight of the divergence from the original model on replayed answers, above 0.
    pub distil: Option<f32>,
    /// `prox=`: ρ of the proximal term, above 0.
    pub prox: Option<f32>,
    /// `lisa=`: steps on replayed answers and on the task, in turns.
    pub lisa: Option<Lisa>,
    /// `vaccine=`: ρ of the perturbation of hidden states, above 0.
    pub vaccine: Option<f32>,
    /// `by=`: how the map is made that Mods_Rob is searched on.
    pub by: Option<By>,
    /// `merge=`: a merge after tuning.
    pub merge: Option<MergeStep>,
    /// `seeds=`: number of training seeds, 1 to 100.
    pub seeds: Option<u64>,
}

/// Adapters of a recipe: `8`, or `8:all-linear`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Adapters {
    /// Their rank.
    pub rank: usize,
    /// Whether all seven projections of each layer have them, and not those that the study or the command line says.
    pub all_linear: bool,
}

impl std::str::FromStr for Adapters {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (rank, modules) = text.split_once(':').map_or((text, None), |(rank, modules)| (rank, Some(modules)));
        let all_linear = match modules {
            None => false,
            Some("all-linear") => true,
            Some(_) => return Err("RANK or RANK:all-linear; other projections by `--lora-modules`".into()),
        };
        Ok(Self { rank: lora_rank(rank)?, all_linear })
    }
}

/// The key of an option.
pub(super) fn key(option: &str) -> &str {
    option.split_once('=').map_or(option, |(key, _)| key)
}

impl RecipeOptions {
    /// Share of `what`: `None` where it is not mixed in, `Some(None)` where the share is that of the study.
    pub fn share_of(&self, what: Mix) -> Option<Option<f64>> {
        self.mixes.iter().find(|mix| mix.what == what).map(|mix| mix.share)
    }

    /// Adds `KEY` or `KEY=VALUE`.
    pub(super) fn set(&mut self, option: &str, place: &str) -> Result<()> {
        let (key, value) = option.split_once('=').map_or((option, None), |(key, value)| (key, Some(value)));
        let names = KEYS.map(|(name, ..)| name);
        let Some((name, form, _)) = KEYS.iter().find(|(name, ..)| *name == key) else {
            return Err(Error::input(place, format!("the key `{key}`"), one_of(key, &names, "a key")));
        };
        if value.is_none() && form.starts_with('=') {
            return Err(Error::input(place, format!("{key} without a value"), format!("{name}{form}")));
        }
        if value.is_some() && form.is_empty() {
            return Err(Error::input(place, option, format!("{name} without a value")));
        }
        let wrong = |expected: String| Error::input(place, option, expected.trim_start_matches("expected "));
        let valued = value.unwrap_or_default();
        let twice = match key {
            "lr" => self.lr.replace(above_zero(valued).map_err(wrong)?).is_some(),
            "steps" => self.steps.replace(count(valued).map_err(wrong)? as u64).is_some(),
            "lora" => self.lora.replace(valued.parse().map_err(wrong)?).is_some(),
            "ema" => self.ema.replace(inner_share(valued).map_err(wrong)?).is_some(),
            "replay" => self.mix(Mix::Replay, value).map_err(wrong)?,
            "refusals" => self.mix(Mix::Refusals, value).map_err(wrong)?,
            "attack" => self.mix(Mix::Attack, value).map_err(wrong)?,
            "screen" => std::mem::replace(&mut self.screen, true),
            "constrain" => self.constrain.replace(value.map_or(Ok(1.0), above_zero).map_err(wrong)?).is_some(),
            "distil" => self.distil.replace(above_zero(valued).map_err(wrong)?).is_some(),
            "prox" => self.prox.replace(above_zero(valued).map_err(wrong)?).is_some(),
            "lisa" => self.lisa.replace(valued.parse().map_err(wrong)?).is_some(),
            "vaccine" => self.vaccine.replace(above_zero(valued).map_err(wrong)?).is_some(),
            "by" => self.by.replace(by(valued).map_err(wrong)?).is_some(),
            "merge" => self.merge.replace(valued.parse().map_err(wrong)?).is_some(),
            _ => self.seeds.replace(seeds(valued).map_err(wrong)?).is_some(),
        };
        if twice { Err(Error::input(place, format!("{key} twice"), "each key once")) } else { Ok(()) }
    }

    /// Whether it was there.
    fn mix(&mut self, what: Mix, share: Option<&str>) -> Result<bool, String> {
        let share = share.map(mix_share).transpose()?;
        let twice = self.share_of(what).is_some();
        self.mixes.push(MixIn { what, share });
        self.mixes.sort_by_key(|mix| mix.what);
        Ok(twice)
    }
}

fn mix_share(text: &str) -> Result<f64, String> {
    from_zero(text).ok().filter(|share| *share <= 0.99).ok_or_else(|| "a share from 0 to 0.99".into())
}

fn by(text: &str) -> Result<By, String> {
    let found = By::ALL.into_iter().find(|by| by.name() == text);
    found.ok_or_else(|| one_of(text, &By::ALL.map(By::name), "a way to make the map"))
}

fn seeds(text: &str) -> Result<u64, String> {
    let number = count(text).ok().map(|n| n as u64).filter(|n| *n <= MAX_SEEDS);
    number.ok_or_else(|| format!("a whole number from 1 to {MAX_SEEDS}"))
}
