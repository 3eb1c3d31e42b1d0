//! A model directory opened without its weights: what can be known before they are read.

use super::loaded::LoadedModel;
use crate::backend::Backend;
use crate::data::{Chat, Examples, RowReader};
use crate::engine::Decoder;
use crate::error::{Error, Result};
use crate::model::{ChatFiles, Clock, Message, ModelDir, Tokenizer};
use crate::modules::ParamId;
use std::path::Path;

/// Files, tokenizer and chat template of a model directory.
pub struct ModelText {
    /// The directory; weights are checked, and not read.
    pub files: ModelDir,
    /// Its tokenizer.
    pub tokenizer: Tokenizer,
    chat: Option<Chat>,
    /// Whether the chat template is not the directory's own.
    named_template: bool,
}

impl ModelText {
    /// Opens a model directory for chat, with its own chat template or the one at `chat_template`.
    ///
    /// # Errors
    /// As [`ModelDir::open`]; [`Error::Input`] where there is no tokenizer or no chat template.
    pub fn open(dir: &Path, chat_template: Option<&Path>) -> Result<Self> {
        Self::of(ModelDir::open(dir)?, chat_template)
    }

    /// [`ModelText::open`] of a directory that is open.
    ///
    /// # Errors
    /// [`Error::Input`] where there is no tokenizer or no chat template.
    pub fn of(files: ModelDir, chat_template: Option<&Path>) -> Result<Self> {
        let (template, tokenizer) = (files.chat_template(chat_template)?, files.tokenizer()?);
        let chat = Chat::new(template, tokenizer.clone(), &files.config.eos);
        Ok(Self { files, tokenizer, chat: Some(chat), named_template: chat_template.is_some() })
    }

    /// A model directory for plain text: prompts cannot be rendered.
    ///
    /// # Errors
    /// [`Error::Input`] where there is no tokenizer.
    pub fn without_template(files: ModelDir) -> Result<Self> {
        Ok(Self { tokenizer: files.tokenizer()?, files, chat: None, named_template: false })
    }

    /// Reads the weights onto a device.
    ///
    /// # Errors
    /// [`Error::Memory`] where they do not fit the device; [`Error::Input`] for a value that is not finite.
    pub fn load<B: Backend>(self, backend: B) -> Result<LoadedModel<B>> {
        self.check_memory(&backend)?;
        let decoder = Decoder::from_files(backend, &self.files)?;
        Ok(LoadedModel { text: self, decoder })
    }

    /// [`ModelText::load`] with other values of the same shapes, in place of those of the directory and its adapter.
    ///
    /// # Errors
    /// As [`ModelText::load`]; those of `tensor`.
    pub(super) fn load_values<B: Backend>(
        self,
        backend: B,
        tensor: impl FnMut(ParamId, &[usize]) -> Result<Vec<f32>>,
    ) -> Result<LoadedModel<B>> {
        self.check_memory(&backend)?;
        let decoder = Decoder::new(backend, self.files.config.clone(), tensor)?;
        Ok(LoadedModel { text: self, decoder })
    }

    fn check_memory<B: Backend>(&self, backend: &B) -> Result<()> {
        let files = &self.files;
        // Buffers in the memory of the process: the system would end it rather than refuse them.
        if let (None, Some(free)) = (backend.device_peak_bytes(), backend.free_memory()) {
            let weights: usize = files.config.params().iter().map(|(_, shape)| shape.iter().product::<usize>()).sum();
            let planned_bytes = (weights * size_of::<B::Float>()) as u64;
            if planned_bytes > free.bytes {
                let help = format!("{} is the bound; --dtype bf16 halves the weights", free.bound);
                let what = format!("{}: the weights", files.dir().display());
                return Err(Error::Memory { what, planned_bytes, free_bytes: free.bytes, help });
            }
        }
        Ok(())
    }

    /// Sets the time of the chat template; returns it where the template uses it.
    pub fn set_clock(&mut self, clock: Clock) -> Option<Clock> {
        self.chat.as_mut()?.set_clock(clock)
    }

    /// The chat template and what it writes around an answer.
    ///
    /// # Errors
    /// [`Error::Failed`] where the directory was opened for plain text.
    pub fn chat(&self) -> Result<&Chat> {
        let missing =
            || Error::failed("the model was opened without its chat template", "this is a bug; please report it");
        self.chat.as_ref().ok_or_else(missing)
    }

    /// The tokens at which an answer ends: [`Chat::stop_tokens`], or the eos tokens of a model opened for plain text.
    pub fn stop_tokens(&self) -> Vec<u32> {
        self.chat.as_ref().map_or_else(|| self.files.config.eos.clone(), Chat::stop_tokens)
    }

    /// Chat files of a model tuned from this one.
    pub fn chat_files(&self) -> ChatFiles {
        let named = self.chat.as_ref().filter(|_| self.named_template);
        ChatFiles { template: named.map(|chat| chat.template().source().to_owned()), stop: self.stop_tokens() }
    }

    /// Reads and tokenizes training conversations.
    ///
    /// # Errors
    /// As [`Examples::read`].
    pub fn examples(&self, path: &Path, max_length: usize, rows: &mut RowReader) -> Result<Examples> {
        Examples::read_within(path, self.chat()?, max_length, self.files.config.max_positions, rows)
    }

    /// Checks that rendered prompts, each with the place that it is from, leave room for an answer in the model's context,
    /// so that none is found out late.
    ///
    /// # Errors
    /// [`Error::Input`] names the place of the first that is longer, or that the template refuses.
    pub fn check_prompts<'p>(&self, prompts: impl IntoIterator<Item = (&'p str, &'p str)>) -> Result<()> {
        let most = self.files.config.max_positions - 1;
        for (place, prompt) in prompts {
            let tokens = self.render(&[Message::new("user", prompt)]).map_err(|e| e.at(place))?.len();
            if tokens > most {
                let expected = format!("at most {most}, by the model's context");
                return Err(Error::input(place, format!("a prompt of {tokens} tokens"), expected));
            }
        }
        Ok(())
    }

    /// Token ids of a conversation by the chat template, with the header of the assistant's turn.
    ///
    /// # Errors
    /// [`Error::Input`] where the template refuses the conversation.
    pub fn render(&self, messages: &[Message]) -> Result<Vec<u32>> {
        self.tokenizer.encode(&self.chat()?.prompt(messages, &[])?)
    }

    /// Token ids of single-turn prompts: [`ModelText::render`].
    ///
    /// # Errors
    /// As [`ModelText::render`].
    pub fn render_prompts<'p>(&self, prompts: impl IntoIterator<Item = &'p str>) -> Result<Vec<Vec<u32>>> {
        prompts.into_iter().map(|prompt| self.render(&[Message::new("user", prompt)])).collect()
    }
}

/// Checks that what is planned fits the free memory of the device, or of the process; `otherwise` says what needs less.
pub(super) fn check_free<B: Backend>(backend: &B, what: &str, planned_bytes: u64, otherwise: &str) -> Result<()> {
    let Some(free) = backend.free_memory().filter(|free| planned_bytes > free.bytes) else { return Ok(()) };
    let help = format!("{} is the bound; {otherwise}, or a machine with more", free.bound);
    Err(Error::Memory { what: what.into(), planned_bytes, free_bytes: free.bytes, help })
}
