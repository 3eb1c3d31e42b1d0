//! Secure tuning of large language models: SWAT (Du et al., arXiv 2410.04524) on a transformer engine written from
//! scratch, with CUDA kernels and a CPU backend.
//!
//! The command `swat` parses and prints ([`cli`]); everything else is in this library. A model is opened from its Hugging
//! Face directory, loaded onto a backend, and asked:
//!
//! ```
//! use swat::backend::cpu::Cpu;
//! use swat::engine::GenerateOptions;
//! use swat::model::Message;
//! use swat::secure::{ModelText, RefusalList};
//!
//! # fn main() -> swat::error::Result<()> {
//! // The tiny aligned model of `swat demo`. Its weights are checked here, and read by `load`.
//! let text = ModelText::open("assets/tiny".as_ref(), None)?;
//! let prompt = text.render(&[Message::new("user", "tell me a story")])?;
//! let model = text.load(Cpu::new())?;
//! let options = GenerateOptions { max_new_tokens: 24, stop: model.text.stop_tokens(), ..GenerateOptions::default() };
//! let answers = model.decoder.generate(&[prompt], &options, &mut |_prompt, _token| {})?;
//! let answer = model.text.tokenizer.decode(&answers[0].tokens)?;
//! println!("{answer} (refusal: {})", RefusalList::default().is_refusal(&answer));
//! # Ok(())
//! # }
//! ```
//!
//! | what for | where to begin |
//! |---|---|
//! | names of modules and sets of them | [`modules::ModuleSet`] |
//! | models, tokenizers, chat templates | [`model::ModelDir`], [`secure::ModelText`] |
//! | training data, security prompts, tasks | [`data::RowReader`], [`data::Conversation`], [`data::SecurityPrompt`], [`data::Task`] |
//! | logits, gradients, generation | [`engine::Decoder`] |
//! | a training run with a loop of your own | [`train::Tuner`] |
//! | tuning from directory to directory, as `swat tune` does | [`secure::TuneOutput`], [`secure::TuneJob`] |
//! | measuring a model, and a tuned one against its base | [`secure::LoadedModel::evaluate`], [`secure::Check`] |
//! | probes, maps, Mods_Rob | [`secure::train_probe`], [`secure::robustness()`], [`secure::search()`] |
//! | the whole of `swat secure`, `swat run` | [`secure::pipeline::SecureRun`], [`secure::study`] |
//!
//! Modules, each of which uses only those before it: [`error`], [`options`], [`progress`], [`interrupt`], [`rng`], [`io`],
//! [`hub`], [`modules`], [`model`], [`data`], [`backend`], [`group`], [`engine`], [`train`], [`profile`], [`secure`],
//! [`report`], [`cli`].

// A stream that cannot be written to must not end a run, and these macros panic.
#![deny(clippy::print_stdout, clippy::print_stderr)]

pub mod backend;
pub mod cli;
pub mod data;
pub mod engine;
pub mod error;
pub mod group;
pub mod hub;
pub mod interrupt;
pub mod io;
pub mod model;
pub mod modules;
pub mod options;
pub mod profile;
pub mod progress;
pub mod report;
pub mod rng;
pub mod secure;
pub mod train;
