//! Trains a tiny aligned model from scratch.

use crate::backend::Backend;
use crate::data::tiny::{Language, Mixture, is_tiny_model, write_initial_model};
use crate::data::{Chat, Conversation, Examples, Loader};
use crate::engine::Decoder;
use crate::error::{Error, FileOp, Result};
use crate::io::{IfExists, OutputDir};
use crate::model::ModelDir;
use crate::modules::LearningRates;
use crate::train::{Callbacks, Phase, PhaseOptions, Schedule, TuneOptions, Tuner};
use std::path::Path;

/// Seed of the embedded model's language and weights.
pub const DEMO_SEED: u64 = 1;

/// Maximum length of a conversation in tokens; longer than any of the language.
pub const DEMO_MAX_LENGTH: usize = 96;

/// One training stage of a tiny model.
#[derive(Clone, Debug, PartialEq)]
pub struct Stage {
    /// Name shown in progress reports.
    pub name: &'static str,
    /// Training data.
    pub mixture: Mixture,
    /// Steps of [`Stage::BATCH`] examples.
    pub steps: u64,
    /// Peak learning rate.
    pub lr: f64,
}

impl Stage {
    /// Examples per step.
    pub const BATCH: usize = 48;

    /// The stages of the embedded model: a helpful one that answers everything, then alignment.
    pub fn recipe() -> [Self; 2] {
        [
            Self { name: "helpful", mixture: Mixture::helpful(), steps: 900, lr: 3e-3 },
            Self { name: "aligned", mixture: Mixture::aligning(), steps: 900, lr: 1e-3 },
        ]
    }
}

/// Trains a tiny model through `stages` and writes it to `out`: the language of `language_seed`, weights and data of
/// `seed`. Deterministic on a given backend.
///
/// # Errors
/// [`Error::Exists`] where `out` exists and must not be replaced; [`Error::InUse`]; errors of training and of writing.
pub fn make_tiny_model<B: Backend>(
    backend: B,
    language_seed: u64,
    seed: u64,
    stages: &[Stage],
    out: &Path,
    if_exists: IfExists,
    callbacks: &mut dyn Callbacks<B>,
) -> Result<()> {
    let output = OutputDir::create_over(out, if_exists, is_tiny_model)?;
    let initial = tempfile::tempdir().map_err(Error::io(&std::env::temp_dir(), FileOp::Create))?;
    let language = Language::new(language_seed);
    write_initial_model(&language, seed, initial.path())?;
    let files = ModelDir::open(initial.path())?;
    let mut decoder = Decoder::new(backend, files.config.clone(), |id, shape| files.tensor(id, shape))?;
    let chat = Chat::new(files.chat_template(None)?, files.tokenizer()?, &files.config.eos);
    for (index, stage) in stages.iter().enumerate() {
        let count = stage.steps as usize * Stage::BATCH;
        let items = stage.mixture.items(&language, count.max(1), seed.wrapping_add(index as u64));
        let conversations: Vec<Conversation> = items.into_iter().map(Conversation::from).collect();
        let examples = Examples::from_conversations(&conversations, &chat, DEMO_MAX_LENGTH)?.examples;
        train(&mut decoder, examples, stage, seed, callbacks)?;
    }
    files.write(output.dir(), |id| decoder.read(id), u64::MAX)?;
    output.commit()
}

fn train<B: Backend>(
    decoder: &mut Decoder<B>,
    examples: Vec<crate::data::Example>,
    stage: &Stage,
    seed: u64,
    callbacks: &mut dyn Callbacks<B>,
) -> Result<()> {
    let options = TuneOptions {
        batch_size: Stage::BATCH,
        max_length: DEMO_MAX_LENGTH,
        seed,
        save_every: 0,
        ..TuneOptions::default()
    };
    let phase = Phase {
        name: stage.name.into(),
        rates: LearningRates::masked(&decoder.config.cells(), &decoder.config.cells(), 0.0),
        options: PhaseOptions {
            lr: stage.lr,
            schedule: Schedule::Cosine,
            lr_warmup_steps: stage.steps / 20,
            min_lr_ratio: 0.1,
            weight_decay: 0.01,
            // As the embedded model was made.
            decay_all: true,
            steps: Some(stage.steps),
            ..PhaseOptions::default()
        },
    };
    let mut loader = Loader::new(examples, options.loader())?;
    Tuner::new(decoder, &mut loader, options, vec![phase])?.run(callbacks)?;
    Ok(())
}
