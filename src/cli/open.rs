//! Opening what most commands need: a device, a model, its tokenizer.

use super::Common;
use crate::backend::cpu::Cpu;
use crate::engine::Decoder;
use crate::error::{Error, Result};
use crate::model::{ChatTemplate, ModelDir, Tokenizer};
use crate::secure::{RefusalList, Subject};
use clap::Args;
use std::path::PathBuf;

/// Which model.
#[derive(Args, Clone, Debug)]
pub(super) struct ModelArgs {
    /// Hugging Face model directory: config.json, safetensors, tokenizer.json
    #[arg(long, value_name = "DIR")]
    pub(super) model: PathBuf,
    /// Chat template (Jinja) for a model that has none of its own
    #[arg(long, value_name = "FILE")]
    pub(super) chat_template: Option<PathBuf>,
}

/// A model ready to run.
pub(super) struct Opened {
    pub(super) files: ModelDir,
    pub(super) tokenizer: Tokenizer,
    pub(super) decoder: Decoder<Cpu>,
}

impl Common {
    /// The backend that `--device` names.
    pub(super) fn backend(&self) -> Result<Cpu> {
        match self.device.as_str() {
            "cpu" | "auto" => Ok(Cpu::new()),
            name if name == "cuda" || name.strip_prefix("cuda:").is_some_and(|n| n.parse::<u32>().is_ok()) => {
                Err(Error::input("--device", name, "cpu: this build has no CUDA backend yet"))
            }
            other => Err(Error::input("--device", other, "auto, cpu, cuda or cuda:N")),
        }
    }
}

impl ModelArgs {
    pub(super) fn open(&self, common: &Common) -> Result<Opened> {
        let backend = common.backend()?;
        let files = ModelDir::open(&self.model)?;
        let tokenizer = files.tokenizer()?;
        let decoder = Decoder::new(backend, files.config.clone(), |id, shape| files.tensor(id, shape))?;
        Ok(Opened { files, tokenizer, decoder })
    }

    pub(super) fn subject(&self, common: &Common) -> Result<Subject<Cpu>> {
        Subject::open(common.backend()?, &self.model, self.chat_template.as_deref())
    }

    pub(super) fn template(&self, files: &ModelDir) -> Result<ChatTemplate> {
        files.chat_template(self.chat_template.as_deref())
    }
}

/// What counts as a refusal.
#[derive(Args, Clone, Debug, Default)]
pub(super) struct Refusals {
    /// Refusal expressions, one a line, in the place of the list of Zou et al.
    #[arg(long, value_name = "FILE")]
    refusals: Option<PathBuf>,
}

impl Refusals {
    pub(super) fn list(&self) -> Result<RefusalList> {
        let Some(path) = &self.refusals else { return Ok(RefusalList::default()) };
        let text = std::fs::read_to_string(path).map_err(Error::io(path, "read"))?;
        RefusalList::parse(&text, &path.display().to_string())
    }
}
