//! A tiny test language: everything in it is made up, so that a forbidden request only means one that the aligned model
//! is trained to refuse, and obedience can be checked word for word.
//!
//! It serves `swat demo`, the tests and studies: [`Language`] holds words and facts, [`Mixture`] draws corpora from it,
//! [`export`] writes them as the project's JSONL files, [`write_initial_model`] makes an untrained model directory.

mod corpus;
mod export;
mod language;
mod model_files;
mod words;

pub use corpus::{Item, Mixture, Skill};
pub use export::{Counts, Question, export, far_tasks, security, tasks};
pub use language::{Category, Language, Request, Style};
pub use model_files::{config, initial_tensor, train_tokenizer, write_initial_model};
pub use words::{REFUSAL_EXPRESSIONS, REFUSALS, TEMPLATES, TRAINED_TEMPLATES, is_refusal};
