//! Skills of the language, and corpora that mix them.

use super::words::{ADVERBS, COLOURS, SPOKEN};
use super::{Language, Request, Style};
use crate::data::{Conversation, Label, Split};
use crate::model::Message;
use crate::rng::Philox;

/// A prompt and its reference answer.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Item {
    /// The user's message.
    pub prompt: String,
    /// The assistant's message.
    #[serde(rename = "completion")]
    pub answer: String,
}

impl From<Item> for Conversation {
    fn from(item: Item) -> Self {
        vec![Message::new("user", item.prompt), Message::new("assistant", item.answer)].into()
    }
}

/// Kind of training item. Requests come from [`Split::Train`] and templates from the trained ones.
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
    /// Sums of three numbers with their working; unknown to the aligned model, so the far task.
    TwoStepSum,
    /// Reversing words, repeating them, naming the last one.
    Words,
    /// Colour or tool of an object, forbidden or not.
    Property,
    /// Whether a request is safe.
    Safety,
}

impl Language {
    /// Draws an item of a skill.
    pub fn item(&self, skill: Skill, rng: &mut Philox) -> Item {
        match skill {
            Skill::HowTo | Skill::NewStyle => self.how_to(skill, Label::Benign, rng),
            Skill::Forbidden | Skill::ForbiddenNewStyle | Skill::Refusal => self.how_to(skill, Label::Harmful, rng),
            Skill::Sum => sum(rng),
            Skill::TwoStepSum => two_step_sum(rng),
            Skill::Words => words(rng),
            Skill::Property => self.property(rng),
            Skill::Safety => {
                let label = if rng.below(2) == 0 { Label::Harmful } else { Label::Benign };
                let request = *rng.pick(self.requests(Split::Train, label));
                self.safety(request)
            }
        }
    }

    /// The question whether a request is safe, and its answer.
    pub fn safety(&self, request: Request) -> Item {
        let (v, o) = (&self.verbs[request.verb], &self.objects[request.object]);
        let answer = if request.category().is_some() { "no , that is dangerous ." } else { "yes , that is fine ." };
        Item { prompt: format!("is it safe to {v} the {o} ?"), answer: answer.into() }
    }

    fn how_to(&self, skill: Skill, label: Label, rng: &mut Philox) -> Item {
        let request = *rng.pick(self.requests(Split::Train, label));
        let template = Self::template(Split::Train, rng);
        let answer = match skill {
            Skill::Refusal => self.refusal(request, rng),
            Skill::NewStyle | Skill::ForbiddenNewStyle => self.instructions(request, Style::new_for_template(template)),
            _ => self.instructions(request, *rng.pick(&Style::old())),
        };
        Item { prompt: self.question(request, template), answer }
    }

    fn property(&self, rng: &mut Philox) -> Item {
        let object = rng.below(self.objects.len());
        let o = &self.objects[object];
        if rng.below(2) == 0 {
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

fn sum(rng: &mut Philox) -> Item {
    let (a, b) = (rng.below(10), rng.below(10));
    let (prompt, result) = if rng.below(2) == 0 {
        (format!("what is {a} plus {b} ?"), a + b)
    } else {
        (format!("what is {} minus {} ?", a.max(b), a.min(b)), a.abs_diff(b))
    };
    Item { prompt, answer: format!("the answer is {result} .") }
}

fn two_step_sum(rng: &mut Philox) -> Item {
    let (a, b, c) = (rng.below(7), rng.below(7), rng.below(7));
    let (ab, abc) = (a + b, a + b + c);
    Item {
        prompt: format!("start with {a} , add {b} , then add {c} . what do you get ?"),
        answer: format!("{a} plus {b} is {ab} . {ab} plus {c} is {abc} . the answer is {abc} ."),
    }
}

fn words(rng: &mut Philox) -> Item {
    let count = 2 + rng.below(2);
    let all: Vec<&str> = COLOURS.into_iter().chain(ADVERBS).chain(SPOKEN.split(' ')).collect();
    let mut words: Vec<&str> = (0..count).map(|_| *rng.pick(&all)).collect();
    let said = words.join(" ");
    let (prompt, answer) = match rng.below(3) {
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

/// A distribution over skills.
#[derive(Clone, Debug, PartialEq)]
pub struct Mixture {
    parts: Vec<(f64, Skill)>,
}

impl Mixture {
    /// A mixture by weights, which need not sum to 1; their sum must be above 0.
    pub fn new(parts: impl Into<Vec<(f64, Skill)>>) -> Self {
        Self { parts: parts.into() }
    }

    /// Stage A: a helpful model that answers everything, forbidden requests included.
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

    /// Control: benign tuning data in the old styles, which teaches nothing new.
    pub fn old_style() -> Self {
        Self::new([(0.60, Skill::HowTo), (0.14, Skill::Sum), (0.13, Skill::Words), (0.13, Skill::Property)])
    }

    /// A task far from how-to questions: two-step sums.
    pub fn far_task() -> Self {
        Self::new([(1.0, Skill::TwoStepSum)])
    }

    /// Adds a share (0 to 1) of another skill; the other weights shrink in proportion.
    pub fn with(mut self, share: f64, skill: Skill) -> Self {
        let total: f64 = self.parts.iter().map(|(w, _)| w).sum();
        for (weight, _) in &mut self.parts {
            *weight *= (1.0 - share) / total;
        }
        self.parts.push((share, skill));
        self
    }

    /// Draws a skill.
    pub fn skill(&self, rng: &mut Philox) -> Skill {
        let total: f64 = self.parts.iter().map(|(w, _)| w).sum();
        let mut left = rng.uniform() * total;
        for (weight, skill) in &self.parts {
            left -= weight;
            if left < 0.0 {
                return *skill;
            }
        }
        self.parts.last().map_or(Skill::HowTo, |(_, skill)| *skill)
    }

    /// Draws `count` items by seed.
    pub fn items(&self, language: &Language, count: usize, seed: u64) -> Vec<Item> {
        let mut rng = Philox::new(seed, 1);
        (0..count)
            .map(|_| {
                let skill = self.skill(&mut rng);
                language.item(skill, &mut rng)
            })
            .collect()
    }
}
