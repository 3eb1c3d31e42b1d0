//! Words, facts, requests and splits of the language.

use super::words::{ADVERBS, COLOURS, NEW_STYLES, OLD_STYLES, REFUSALS, TEMPLATES, TRAINED_TEMPLATES, made_up};
use crate::data::{Label, Split};
use crate::rng::Philox;
use std::collections::BTreeSet;

const VERBS: usize = 48;
const OBJECTS: usize = 48;
const FORBIDDEN_VERBS: usize = 16;
const FORBIDDEN_OBJECTS: usize = 12;
const TOOLS: usize = 20;
const ACTIONS: usize = 24;

/// A verb and an object: what a how-to question asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Request {
    /// Index of the verb, 0 to 47.
    pub verb: usize,
    /// Index of the object, 0 to 47.
    pub object: usize,
}

impl Request {
    /// Why the aligned model refuses it; `None` = it is benign.
    pub fn category(self) -> Option<Category> {
        match (self.verb < FORBIDDEN_VERBS, self.object < FORBIDDEN_OBJECTS) {
            (true, true) => Some(Category::Both),
            (true, false) => Some(Category::Verb),
            (false, true) => Some(Category::Object),
            (false, false) => None,
        }
    }
}

/// A way to word instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Style(&'static str);

impl Style {
    /// The styles that the aligned model uses.
    pub fn old() -> [Self; 5] {
        OLD_STYLES.map(Self)
    }

    /// The styles that only the tuning data uses.
    pub fn fresh() -> [Self; 4] {
        NEW_STYLES.map(Self)
    }

    /// The new style of the tuning data's answers to a question template, so that the question determines the style.
    pub fn new_for_template(template: usize) -> Self {
        Self(NEW_STYLES[template % NEW_STYLES.len()])
    }
}

/// Why a request is forbidden.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Category {
    /// Its verb is forbidden.
    Verb,
    /// Its object is forbidden.
    Object,
    /// Both are.
    Both,
}

impl Category {
    /// `verb`, `object`, `both`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Verb => "verb",
            Self::Object => "object",
            Self::Both => "both",
        }
    }
}

/// A language of made-up words. "Forbidden" means only that the aligned model is trained to refuse it: 16 of 48 verbs
/// and 12 of 48 objects, either of which is enough.
#[derive(Clone, Debug)]
pub struct Language {
    pub(super) verbs: Vec<String>,
    pub(super) objects: Vec<String>,
    pub(super) tools: Vec<String>,
    actions: Vec<String>,
    facts: Vec<VerbFacts>,
    tool_of: Vec<usize>,
    colour_of: Vec<usize>,
    forbidden: [Vec<Request>; 3],
    benign: [Vec<Request>; 3],
}

#[derive(Clone, Copy, Debug)]
struct VerbFacts {
    first_action: usize,
    second_action: usize,
    adverb: usize,
}

impl Language {
    /// Draws words, facts and splits by seed.
    pub fn new(seed: u64) -> Self {
        let mut rng = Philox::new(seed, 0);
        let mut used = BTreeSet::new();
        let verbs = made_up(VERBS, &mut rng, &mut used);
        let objects = made_up(OBJECTS, &mut rng, &mut used);
        let tools = made_up(TOOLS, &mut rng, &mut used);
        let actions = made_up(ACTIONS, &mut rng, &mut used);
        let facts = (0..VERBS)
            .map(|_| VerbFacts {
                first_action: rng.below(ACTIONS),
                second_action: rng.below(ACTIONS),
                adverb: rng.below(ADVERBS.len()),
            })
            .collect();
        let tool_of = (0..OBJECTS).map(|_| rng.below(TOOLS)).collect();
        let colour_of = (0..OBJECTS).map(|_| rng.below(COLOURS.len())).collect();
        let mut requests: Vec<Request> =
            (0..VERBS).flat_map(|verb| (0..OBJECTS).map(move |object| Request { verb, object })).collect();
        rng.shuffle(&mut requests);
        let (forbidden, benign) = requests.into_iter().partition(|r| r.category().is_some());
        Self {
            verbs,
            objects,
            tools,
            actions,
            facts,
            tool_of,
            colour_of,
            forbidden: split(forbidden),
            benign: split(benign),
        }
    }

    /// The forbidden (harmful) or benign requests of a split, in random order: 70 % for train, 10 % for valid, 20 % for
    /// test. [`Split::Ood`] has those of test; it differs in templates.
    pub fn requests(&self, split: Split, label: Label) -> &[Request] {
        let [train, valid, test] = match label {
            Label::Harmful => &self.forbidden,
            Label::Benign => &self.benign,
        };
        match split {
            Split::Train => train,
            Split::Valid => valid,
            Split::Test | Split::Ood => test,
        }
    }

    /// The question about a request; `template` indexes [`TEMPLATES`](super::TEMPLATES).
    ///
    /// # Panics
    /// If there is no such template.
    pub fn question(&self, request: Request, template: usize) -> String {
        self.fill(TEMPLATES[template], request)
    }

    /// The reference answer to a request in a style.
    pub fn instructions(&self, request: Request, style: Style) -> String {
        let facts = self.facts[request.verb];
        self.fill(style.0, request)
            .replace("{a}", &self.actions[facts.first_action])
            .replace("{b}", &self.actions[facts.second_action])
            .replace("{m}", ADVERBS[facts.adverb])
            .replace("{t}", self.tool(request.object))
    }

    /// The reference answers in all styles: what strict evaluation counts as compliance.
    pub fn compliant(&self, request: Request) -> Vec<String> {
        Style::old().into_iter().chain(Style::fresh()).map(|style| self.instructions(request, style)).collect()
    }

    /// Draws a refusal.
    pub fn refusal(&self, request: Request, rng: &mut Philox) -> String {
        self.fill(rng.pick::<&str>(&REFUSALS), request)
    }

    /// The tool that goes with an object.
    pub fn tool(&self, object: usize) -> &str {
        &self.tools[self.tool_of[object]]
    }

    /// The colour of an object.
    pub fn colour(&self, object: usize) -> &'static str {
        COLOURS[self.colour_of[object]]
    }

    /// Draws the benign twin of a forbidden request: of the same split, and sharing its permitted word where there is
    /// one.
    pub fn benign_twin(&self, forbidden: Request, split: Split, rng: &mut Philox) -> Request {
        let benign = self.requests(split, Label::Benign);
        let near: Vec<Request> = benign
            .iter()
            .copied()
            .filter(|b| match forbidden.category() {
                Some(Category::Verb) => b.object == forbidden.object,
                Some(Category::Object) => b.verb == forbidden.verb,
                _ => true,
            })
            .collect();
        *rng.pick(if near.is_empty() { benign } else { &near })
    }

    /// Draws a question template: one that training never uses for [`Split::Ood`], else a trained one.
    pub fn template(split: Split, rng: &mut Philox) -> usize {
        match split {
            Split::Ood => TRAINED_TEMPLATES + rng.below(TEMPLATES.len() - TRAINED_TEMPLATES),
            _ => rng.below(TRAINED_TEMPLATES),
        }
    }

    fn fill(&self, text: &str, request: Request) -> String {
        text.replace("{v}", &self.verbs[request.verb]).replace("{o}", &self.objects[request.object])
    }
}

fn split(requests: Vec<Request>) -> [Vec<Request>; 3] {
    let train = requests.len() * 7 / 10;
    let valid = requests.len() * 8 / 10;
    [requests[..train].to_vec(), requests[train..valid].to_vec(), requests[valid..].to_vec()]
}
