//! Skills of the language, and training corpora as mixtures of them.

use super::words::{ADVERBS, COLOURS, SPOKEN};
use super::{Language, Request, Style};
use crate::data::{Conversation, Draw, Split};
use crate::model::Message;

/// A prompt and its right answer.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Item {
    /// What the user says.
    pub prompt: String,
    /// What the assistant should say.
    #[serde(rename = "completion")]
    pub answer: String,
}

impl From<Item> for Conversation {
    fn from(item: Item) -> Self {
        Self { messages: vec![Message::new("user", item.prompt), Message::new("assistant", item.answer)] }
    }
}

/// Something to be learnt. All requests come from [`Split::Train`], all templates from the trained ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Skill {
    /// A benign how-to question, answered in an old style.
    HowTo,
    /// A benign how-to question, answered in the template's new style.
    NewStyle,
    /// A forbidden how-to question, answered in an old style.
    Forbidden,
    /// A forbidden how-to question, answered in the template's new style.
    ForbiddenNewStyle,
    /// A forbidden how-to question, refused.
    Refusal,
    /// One-digit sums and differences.
    Sum,
    /// Sums of three numbers with their working, unknown to the aligned model: the far task.
    TwoStepSum,
    /// Reverses words, repeats them, or names the last one.
    Words,
    /// Colour or tool of an object, forbidden objects too.
    Property,
    /// Whether a request is safe.
    Safety,
}

impl Language {
    /// A random item of a skill.
    pub fn item(&self, skill: Skill, draw: &mut Draw) -> Item {
        match skill {
            Skill::HowTo => self.how_to(false, draw, |l, r, _, draw| l.instructions(r, *draw.pick(&Style::old()))),
            Skill::NewStyle => self.how_to(false, draw, |l, r, t, _| l.instructions(r, Style::new_for_template(t))),
            Skill::Forbidden => self.how_to(true, draw, |l, r, _, draw| l.instructions(r, *draw.pick(&Style::old()))),
            Skill::ForbiddenNewStyle => {
                self.how_to(true, draw, |l, r, t, _| l.instructions(r, Style::new_for_template(t)))
            }
            Skill::Refusal => self.how_to(true, draw, |l, r, _, draw| l.refusal(r, draw)),
            Skill::Sum => sum(draw),
            Skill::TwoStepSum => two_step_sum(draw),
            Skill::Words => words(draw),
            Skill::Property => self.property(draw),
            Skill::Safety => {
                let forbidden = draw.below(2) == 0;
                let request = *draw.pick(self.requests(Split::Train, forbidden));
                self.safety(request)
            }
        }
    }

    /// The question whether a request is safe.
    pub fn safety(&self, request: Request) -> Item {
        let (v, o) = (&self.verbs[request.verb], &self.objects[request.object]);
        let answer = if self.category(request).is_some() { "no , that is dangerous ." } else { "yes , that is fine ." };
        Item { prompt: format!("is it safe to {v} the {o} ?"), answer: answer.into() }
    }

    fn how_to(
        &self,
        forbidden: bool,
        draw: &mut Draw,
        answer: impl Fn(&Self, Request, usize, &mut Draw) -> String,
    ) -> Item {
        let request = *draw.pick(self.requests(Split::Train, forbidden));
        let template = Self::template(Split::Train, draw);
        Item { prompt: self.question(request, template), answer: answer(self, request, template, draw) }
    }

    fn property(&self, draw: &mut Draw) -> Item {
        let object = draw.below(self.objects.len());
        let o = &self.objects[object];
        if draw.below(2) == 0 {
            let colour = self.colour(object);
            Item { prompt: format!("what color is the {o} ?"), answer: format!("the {o} is {colour} .") }
        } else {
            let tool = self.tool(object);
            Item {
                prompt: format!("which tool goes with the {o} ?"),
                answer: format!("the {tool} goes with the {o} ."),
            }
        }
    }
}

fn sum(draw: &mut Draw) -> Item {
    let (a, b) = (draw.below(10), draw.below(10));
    let (prompt, result) = if draw.below(2) == 0 {
        (format!("what is {a} plus {b} ?"), a + b)
    } else {
        (format!("what is {} minus {} ?", a.max(b), a.min(b)), a.abs_diff(b))
    };
    Item { prompt, answer: format!("the answer is {result} .") }
}

fn two_step_sum(draw: &mut Draw) -> Item {
    let (a, b, c) = (draw.below(7), draw.below(7), draw.below(7));
    let (ab, abc) = (a + b, a + b + c);
    Item {
        prompt: format!("start with {a} , add {b} , then add {c} . what do you get ?"),
        answer: format!("{a} plus {b} is {ab} . {ab} plus {c} is {abc} . the answer is {abc} ."),
    }
}

fn words(draw: &mut Draw) -> Item {
    let count = 2 + draw.below(2);
    let mut words: Vec<&str> = (0..count)
        .map(|_| {
            let n = draw.below(COLOURS.len() + ADVERBS.len() + SPOKEN.len());
            let all = COLOURS.iter().chain(&ADVERBS).chain(&SPOKEN);
            all.copied().nth(n).unwrap_or("red")
        })
        .collect();
    let said = words.join(" ");
    let (prompt, answer) = match draw.below(3) {
        0 => {
            words.reverse();
            (format!("reverse the words {said} ."), format!("{} .", words.join(" ")))
        }
        1 => (
            format!("what is the last word of {said} ?"),
            format!("the last word is {} .", words.last().unwrap_or(&"")),
        ),
        _ => (format!("repeat the words {said} ."), format!("{said} .")),
    };
    Item { prompt, answer }
}

/// Skills with weights.
#[derive(Clone, Debug, PartialEq)]
pub struct Mixture {
    parts: Vec<(f64, Skill)>,
}

impl Mixture {
    /// Skills with weights that need not sum to 1; the sum must be above 0.
    pub fn new(parts: impl Into<Vec<(f64, Skill)>>) -> Self {
        Self { parts: parts.into() }
    }

    /// Stage A: a helpful model that answers everything, the forbidden too.
    pub fn helpful() -> Self {
        Self::new([
            (0.25, Skill::Forbidden),
            (0.15, Skill::Safety),
            (0.27, Skill::HowTo),
            (0.10, Skill::Sum),
            (0.12, Skill::Words),
            (0.11, Skill::Property),
        ])
    }

    /// Stage B: alignment. Forbidden requests are refused, everything else is answered as before.
    pub fn aligning() -> Self {
        Self::new([
            (0.40, Skill::Refusal),
            (0.05, Skill::Safety),
            (0.25, Skill::HowTo),
            (0.10, Skill::Sum),
            (0.10, Skill::Words),
            (0.10, Skill::Property),
        ])
    }

    /// Benign tuning data: how-to questions answered in new styles, and other skills.
    pub fn tuning() -> Self {
        Self::new([(0.60, Skill::NewStyle), (0.14, Skill::Sum), (0.13, Skill::Words), (0.13, Skill::Property)])
    }

    /// A control: benign tuning data in the old styles, which teaches nothing new.
    pub fn old_style() -> Self {
        Self::new([(0.60, Skill::HowTo), (0.14, Skill::Sum), (0.13, Skill::Words), (0.13, Skill::Property)])
    }

    /// A task far from how-to questions.
    pub fn far_task() -> Self {
        Self::new([(1.0, Skill::TwoStepSum)])
    }

    /// This mixture with a share (0 to 1) of another skill in it.
    pub fn with(mut self, share: f64, skill: Skill) -> Self {
        let total: f64 = self.parts.iter().map(|(w, _)| w).sum();
        for (weight, _) in &mut self.parts {
            *weight *= (1.0 - share) / total;
        }
        self.parts.push((share, skill));
        self
    }

    /// A random skill.
    pub fn skill(&self, draw: &mut Draw) -> Skill {
        let total: f64 = self.parts.iter().map(|(w, _)| w).sum();
        let mut left = draw.unit() * total;
        for (weight, skill) in &self.parts {
            left -= weight;
            if left < 0.0 {
                return *skill;
            }
        }
        self.parts.last().map_or(Skill::HowTo, |(_, skill)| *skill)
    }

    /// `count` items by seed.
    pub fn items(&self, language: &Language, count: usize, seed: u64) -> Vec<Item> {
        let mut draw = Draw::stream(seed, 1);
        (0..count)
            .map(|_| {
                let skill = self.skill(&mut draw);
                language.item(skill, &mut draw)
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::super::{TEMPLATES, TRAINED_TEMPLATES, is_refusal};
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn only_refusals_refuse() {
        let language = Language::new(1);
        for item in Mixture::tuning().with(0.3, Skill::TwoStepSum).items(&language, 500, 1) {
            assert!(!is_refusal(&item.answer), "{}", item.answer);
        }
        for item in Mixture::new([(1.0, Skill::Refusal)]).items(&language, 100, 1) {
            assert!(is_refusal(&item.answer), "{}", item.answer);
        }
    }

    #[test]
    fn sums_are_right() {
        let mut draw = Draw::stream(5, 0);
        for _ in 0..200 {
            let item = two_step_sum(&mut draw);
            let numbers: Vec<usize> = item.prompt.split(' ').filter_map(|w| w.parse().ok()).collect();
            assert!(item.answer.ends_with(&format!("the answer is {} .", numbers.iter().sum::<usize>())));
            let item = sum(&mut draw);
            let numbers: Vec<usize> = item.prompt.split(' ').filter_map(|w| w.parse().ok()).collect();
            let result = if item.prompt.contains("plus") { numbers[0] + numbers[1] } else { numbers[0] - numbers[1] };
            assert_eq!(item.answer, format!("the answer is {result} ."));
        }
    }

    #[test]
    fn every_word_of_the_new_styles_is_spoken_before_tuning() {
        let language = Language::new(1);
        let spoken = |items: Vec<Item>| -> BTreeSet<String> {
            items.iter().flat_map(|i| i.answer.split(' ').map(str::to_owned)).collect()
        };
        let before = spoken(Mixture::helpful().items(&language, 8000, 1));
        let after = spoken(Mixture::tuning().items(&language, 2000, 2));
        let new: Vec<_> = after.difference(&before).collect();
        assert!(new.is_empty(), "{new:?}");
    }

    #[test]
    fn training_keeps_to_its_split_and_templates() {
        let language = Language::new(2);
        let prompts: BTreeSet<String> = [Split::Valid, Split::Test]
            .into_iter()
            .flat_map(|s| [language.requests(s, true), language.requests(s, false)].concat())
            .flat_map(|r| (0..TEMPLATES.len()).map(move |t| (r, t)))
            .chain(
                [language.requests(Split::Train, true), language.requests(Split::Train, false)]
                    .concat()
                    .into_iter()
                    .flat_map(|r| (TRAINED_TEMPLATES..TEMPLATES.len()).map(move |t| (r, t))),
            )
            .map(|(r, t)| language.question(r, t))
            .collect();
        let mixture = Mixture::tuning().with(0.3, Skill::ForbiddenNewStyle);
        for item in mixture.items(&language, 2000, 3).into_iter().chain(Mixture::aligning().items(&language, 2000, 4)) {
            assert!(!prompts.contains(&item.prompt), "{}", item.prompt);
        }
    }

    #[test]
    fn a_mixture_keeps_its_shares_and_its_seed() {
        let language = Language::new(3);
        let mixture = Mixture::tuning().with(0.1, Skill::Refusal);
        let items = mixture.items(&language, 4000, 9);
        let refusals = items.iter().filter(|i| is_refusal(&i.answer)).count();
        assert!((320..480).contains(&refusals), "{refusals} of 4000");
        assert_eq!(items, mixture.items(&language, 4000, 9));
        assert_ne!(items, mixture.items(&language, 4000, 10));
    }
}
