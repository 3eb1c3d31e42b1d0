//! A tiny made-up language in which "forbidden" means only that the aligned model is trained to refuse a request, and
//! compliance can be checked word for word.
//!
//! It serves `swat demo`, tests and studies: [`Language`] holds words and facts, [`Mixture`] draws corpora, [`export`]
//! writes JSONL files, [`write_initial_model`] an untrained model directory.

mod corpus;
mod export;
mod language;
mod model_files;
mod words;

pub use corpus::{Item, Mixture, Skill};
pub use export::{Counts, Question, export, far_tasks, security, tasks};
pub use language::{Category, Language, Request, Style};
pub use model_files::{is_tiny_model, write_initial_model};
pub use words::{REFUSAL_EXPRESSIONS, REFUSALS, TEMPLATES, TRAINED_TEMPLATES, is_refusal};
