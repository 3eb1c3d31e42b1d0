//! What to try where a verdict is not held.

use super::{DEFAULT_RECIPES, Tried};
use crate::secure::check::Verdict;
use crate::secure::recipe::{Mix, Recipe};
use crate::secure::replay::{ReplayCounts, ReplaySummary};
use crate::secure::screen::ScreenCounts;

/// Fewer replayed answers of a kind than this come back too often: variety counts (docs/findings.md).
const FEW_ANSWERS: usize = 50;
/// Share of the data from which on what screening leaves out may be missed.
const MUCH_LEFT_OUT: f64 = 0.1;

/// What is known of a run whose verdict is not held.
pub(super) struct NotHeld<'a> {
    pub(super) verdict: &'a Verdict,
    /// The recipes of the run, whether they were needed or not.
    pub(super) recipes: &'a [Recipe],
    pub(super) tried: &'a [Tried],
    pub(super) replay: Option<ReplaySummary>,
    pub(super) screened: Option<ScreenCounts>,
    /// Selection prompts.
    pub(super) valid_prompts: usize,
}

impl NotHeld<'_> {
    /// What to try, what is likeliest to help first: a sentence each, without its full stop.
    pub(super) fn advice(&self) -> Vec<String> {
        let mut advice = Vec::new();
        if !self.verdict.unmeasured.is_empty() {
            advice.push(
                "ask prompts of which the original model refuses some, or leave out the limit that has no measure"
                    .into(),
            );
        }
        let gates = ["asr_rise", "j_drop", "auroc_drop", "guard_asr_rise"];
        let [unsafe_now, refuses_more] =
            [gates.iter().any(|gate| self.verdict.fails(gate)), self.verdict.fails("over_refusal_rise")];
        if unsafe_now || refuses_more {
            self.replay_more(unsafe_now, &mut advice);
        }
        if self.verdict.fails("task_drop") {
            advice.push("train longer (--epochs, --steps) or at a higher --lr: the task is not learned yet".into());
            if let Some(ScreenCounts { examples, left_out }) = self.screened
                && left_out as f64 >= MUCH_LEFT_OUT * examples as f64
            {
                advice.push(format!(
                    "read screened.jsonl in the working folder: screening left out {left_out} of {examples} conversations, \
                     which a recipe without screen keeps"
                ));
            }
        }
        let chosen = self.tried.iter().find(|tried| tried.chosen);
        if let Some(Tried { recipe, .. }) = chosen.filter(|tried| tried.excess <= 0.0) {
            advice.push(format!(
                "use more prompts, worded as the model will be asked: {recipe} was within half of each limit on the {} \
                 selection prompts, which are too few to rely on",
                self.valid_prompts
            ));
        }
        advice
    }

    /// Where the model refuses too little, or prompts that it should answer.
    fn replay_more(&self, unsafe_now: bool, advice: &mut Vec<String>) {
        let [first, .., last] = DEFAULT_RECIPES;
        let options = || self.recipes.iter().map(|recipe| &recipe.options);
        let replayed = options().any(|options| options.share_of(Mix::Replay).is_some());
        let probabilities = options().any(|options| options.distil.is_some());
        if !replayed {
            advice.push(format!("replay the model's own answers: --recipe {first}, or no --recipe"));
        } else {
            if !probabilities {
                advice.push(format!("replay more of them, and their probabilities: --recipe {last}"));
            }
            advice.push("train longer (--epochs, --steps): with replay the task takes more steps than without".into());
        }
        if unsafe_now && !options().any(|options| options.screen) && self.screened.is_none() {
            advice.push(
                "leave out of the data what the original model refuses: screen in the recipe, or --screen".into(),
            );
        }
        let Some(ReplaySummary { harmful, benign }) = self.replay else { return };
        let few = |counts: &ReplayCounts| counts.kept < FEW_ANSWERS && counts.not_needed == 0;
        if unsafe_now && few(&harmful) {
            advice.push(format!(
                "give more harmful prompts in the train split of --security: {} of {} gave a refusal to replay",
                harmful.kept, harmful.prompts
            ));
        }
        if !unsafe_now && few(&benign) {
            advice.push(format!(
                "give more benign prompts in the train split of --security, with short answers: {} of {} gave an answer to \
                 replay, and {} did not end",
                benign.kept, benign.prompts, benign.cut_off
            ));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::secure::check::Gate;
    use crate::secure::pipeline::SecureMeasures;

    fn verdict(failed: &str) -> Verdict {
        let gate = |name: &str| Gate {
            name: name.into(),
            limit: 2.0,
            value: 0.0,
            low: 0.0,
            high: 0.0,
            held: name != failed,
            certain: true,
        };
        Verdict {
            held: false,
            gates: ["asr_rise", "over_refusal_rise", "task_drop"].map(gate).to_vec(),
            unmeasured: Vec::new(),
        }
    }

    fn advice(failed: &str, recipes: &[&str], excess: f64) -> String {
        let recipes: Vec<Recipe> = recipes.iter().map(|text| text.parse().unwrap()).collect();
        let counts = |kept| ReplayCounts { prompts: 60, kept, cut_off: 20, ..ReplayCounts::default() };
        let tried = Tried {
            recipe: recipes[0].text.clone(),
            alpha: 1.0,
            excess,
            chosen: true,
            measures: SecureMeasures::default(),
        };
        let replays = recipes.iter().any(|recipe| recipe.options.share_of(Mix::Replay).is_some());
        let screens = recipes.iter().any(|recipe| recipe.options.screen);
        let run = NotHeld {
            verdict: &verdict(failed),
            recipes: &recipes,
            tried: &[tried],
            replay: replays.then(|| ReplaySummary { harmful: counts(60), benign: counts(32) }),
            screened: screens.then_some(ScreenCounts { examples: 500, left_out: 169 }),
            valid_prompts: 70,
        };
        run.advice().join("\n")
    }

    #[test]
    fn what_was_not_tried_comes_first() {
        let told = advice("asr_rise", &["plain"], 3.0);
        assert!(told.starts_with("replay the model's own answers: --recipe plain+replay=.15,screen"), "{told}");
        assert!(told.contains("leave out of the data") && !told.contains("train longer"), "{told}");
        let told = advice("asr_rise", &["plain+replay=.15,screen"], 3.0);
        assert!(told.starts_with("replay more of them, and their probabilities: --recipe plain+replay=.3"), "{told}");
        // All 60 harmful prompts gave a refusal: there are enough.
        assert!(
            told.contains("train longer") && !told.contains("more harmful") && !told.contains("leave out"),
            "{told}"
        );
        let told = advice("over_refusal_rise", &DEFAULT_RECIPES, 0.0);
        assert!(told.starts_with("train longer") && told.contains("32 of 60 gave an answer"), "{told}");
        assert!(
            told.contains("plain+replay=.15,screen was within half of each limit on the 70 selection prompts"),
            "{told}"
        );
        let told = advice("task_drop", &DEFAULT_RECIPES, 1.0);
        assert!(told.contains("higher --lr") && told.contains("169 of 500 conversations"), "{told}");
        assert!(!told.contains("replay"), "{told}");
    }
}
