//! What a study recommends, and whether it holds.

use super::claims::is_plain;
use super::outcome::SettingOutcome;
use crate::secure::check::{Limits, Measures, Verdict};
use crate::secure::eval::Evaluation;
use crate::secure::recipe::{Base, Mix, Recipe};
use std::cmp::Ordering;

/// Names of gates.
const ASR: &str = "asr_rise";
const OVER_REFUSAL: &str = "over_refusal_rise";

/// The recommended setting of a study and its verdict.
///
/// Among the settings on the data of plain tuning whose task score is not below the 95 % interval of plain tuning's, and
/// whose rise of over-refusal is held, the one whose attack success rises least; of equal ones, the one with the highest J.
/// Without tasks, the task score is left out.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Conclusion {
    /// Name of the setting; `None` where there is none.
    pub recommended: Option<String>,
    /// Why it is recommended, or why none is.
    pub reason: String,
    /// Its gates against the original model; without any where none is recommended.
    pub verdict: Verdict,
}

impl Conclusion {
    /// From all settings of a study.
    pub fn new(settings: &[SettingOutcome], limits: &Limits) -> Self {
        let none = |reason: String| Self { reason, ..Self::default() };
        let Some(given) = settings.iter().find(|setting| setting.setting.is_given()) else {
            return none("there is no setting `given` to compare with".into());
        };
        let Some(plain) = plain(settings) else {
            return none("there is no setting `plain` or `plain-equal` to compare with".into());
        };
        let attack = |setting: &SettingOutcome| setting.setting.options.share_of(Mix::Attack);
        let candidates: Vec<&SettingOutcome> =
            settings.iter().filter(|s| !s.setting.is_given() && attack(s) == attack(plain)).collect();
        let least = measures(plain).task.map(|task| task.low);
        let useful = |task: Option<f64>| least.is_none_or(|least| task.is_some_and(|task| task >= least));
        let mut found: Vec<(Key, &SettingOutcome, Verdict)> = Vec::new();
        for setting in &candidates {
            let (own, runs) = (measures(setting), evaluations(setting));
            let verdict = Verdict::over_seeds(&given.first.evaluation, &runs, limits);
            let Some(rise) = verdict.gate(ASR).map(|gate| gate.value) else { continue };
            if useful(own.task.map(|task| task.value)) && verdict.gate(OVER_REFUSAL).is_some_and(|gate| gate.held) {
                found.push((Key { rise, j: own.j.map(|j| j.value) }, setting, verdict));
            }
        }
        let task = match least {
            Some(least) => {
                format!("a task score of at least {:.1} % (the interval of `{}`)", 100.0 * least, plain.setting)
            }
            None => "no measured task score".into(),
        };
        let (total, among) = (candidates.len(), found.len());
        match found.into_iter().min_by(|(a, ..), (b, ..)| a.compare(b)) {
            Some((_, setting, verdict)) => Self {
                recommended: Some(setting.setting.to_string()),
                reason: format!(
                    "the lowest attack success among {among} of {total} settings: those with a held over-refusal and {task}"
                ),
                verdict,
            },
            None => none(format!("none of {total} settings has a held over-refusal and {task}")),
        }
    }
}

/// What settings are ordered by.
struct Key {
    /// Rise of attack success, in points.
    rise: f64,
    j: Option<f64>,
}

impl Key {
    fn compare(&self, other: &Self) -> Ordering {
        // Equal means of counts may differ by rounding.
        let rise = |key: &Self| (key.rise * 1e6).round();
        let j = |key: &Self| key.j.unwrap_or(f64::NEG_INFINITY);
        rise(self).total_cmp(&rise(other)).then(j(other).total_cmp(&j(self)))
    }
}

fn evaluations(setting: &SettingOutcome) -> Vec<&Evaluation> {
    setting.runs().map(|run| &run.evaluation).collect()
}

fn measures(setting: &SettingOutcome) -> Measures {
    Measures::over_seeds(&evaluations(setting))
}

/// Plain tuning: rather without an attack than with one, rather with no option than with a rate, a length or adapters, and rather
/// for the steps of phase 2 than for those of both.
fn plain(settings: &[SettingOutcome]) -> Option<&SettingOutcome> {
    let attacked = |recipe: &Recipe| recipe.options.share_of(Mix::Attack).is_some();
    let key = |recipe: &Recipe| (attacked(recipe), !recipe.is_bare(), recipe.base != Base::Plain);
    settings.iter().filter(|s| is_plain(&s.setting)).min_by_key(|s| key(&s.setting))
}
