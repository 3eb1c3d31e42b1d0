//! Opening what most commands need: a device, a model, its tokenizer.

use super::Common;
use crate::backend::cpu::Cpu;
use crate::backend::cuda::{self, Bf16State, Cuda, F32State, Precision};
use crate::backend::{Backend, trace};
use crate::engine::Decoder;
use crate::error::{Error, Result};
use crate::model::{ChatTemplate, ModelDir, Tokenizer};
use crate::secure::{RefusalList, Subject};
use clap::{Args, ValueEnum};
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
pub(super) struct Opened<B: Backend> {
    pub(super) files: ModelDir,
    pub(super) tokenizer: Tokenizer,
    pub(super) decoder: Decoder<B>,
}

/// A command that computes, written once for every backend.
pub(super) trait OnDevice: Sized {
    fn common(&self) -> &Common;

    /// The whole command.
    fn run<B: Backend>(self, backend: B) -> Result<()>;

    /// The command on the device that `--device` names.
    fn start(self) -> Result<()> {
        self.common().annotate()?;
        match self.common().device()? {
            None => self.run(Cpu::new()),
            Some(ordinal) => {
                let backend = self.common().open::<F32State>(ordinal)?;
                self.run(backend)
            }
        }
    }

    /// A command that trains, with gradients and moments of the dtype that `--state` names where it runs on a GPU.
    fn start_training(self, state: State) -> Result<()> {
        self.common().annotate()?;
        match state {
            State::F32 => self.start(),
            State::Bf16 => match self.common().device()? {
                None => self.run(Cpu::new()),
                Some(ordinal) => {
                    let backend = self.common().open::<Bf16State>(ordinal)?;
                    self.run(backend)
                }
            },
        }
    }
}

/// What gradients and moments are kept in on a GPU.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(super) enum State {
    /// 12 bytes a trained parameter
    F32,
    /// 6 bytes a trained parameter, rounded stochastically
    Bf16,
}

impl Common {
    fn annotate(&self) -> Result<()> {
        if self.nvtx { trace::annotate() } else { Ok(()) }
    }

    /// The ordinal of the GPU that `--device` names; `None` = the CPU. `auto` takes the first GPU where it can be opened,
    /// and says so.
    pub(super) fn device(&self) -> Result<Option<u32>> {
        match self.device.as_str() {
            "cpu" => Ok(None),
            "auto" => Ok(self.find()),
            "cuda" => Ok(Some(0)),
            other => match other.strip_prefix("cuda:").and_then(|ordinal| ordinal.parse().ok()) {
                Some(ordinal) => Ok(Some(ordinal)),
                None => Err(Error::input("--device", other, "auto, cpu, cuda or cuda:N")),
            },
        }
    }

    /// Looks for a GPU. Where one is there but cannot be used, that is said.
    fn find(&self) -> Option<u32> {
        let survey = cuda::survey();
        if survey.images.is_empty() || !survey.driver {
            return None;
        }
        let found = match survey.devices {
            Ok(0) => return None,
            Ok(_) => Cuda::<F32State>::open(0).map(drop).map_err(|e| e.to_string()),
            Err(why) => Err(why),
        };
        if let (Err(why), false) = (&found, self.quiet) {
            eprintln!("on the CPU: {why}");
        }
        found.is_ok().then_some(0)
    }

    fn open<P: Precision>(&self, ordinal: u32) -> Result<Cuda<P>> {
        let backend = Cuda::open(ordinal)?;
        if !self.quiet {
            eprintln!("on cuda:{ordinal}, {}", backend.product()?);
        }
        Ok(backend)
    }
}

impl ModelArgs {
    pub(super) fn open<B: Backend>(&self, backend: B) -> Result<Opened<B>> {
        let files = ModelDir::open(&self.model)?;
        let tokenizer = files.tokenizer()?;
        let decoder = Decoder::new(backend, files.config.clone(), |id, shape| files.tensor(id, shape))?;
        Ok(Opened { files, tokenizer, decoder })
    }

    pub(super) fn subject<B: Backend>(&self, backend: B) -> Result<Subject<B>> {
        Subject::open(backend, &self.model, self.chat_template.as_deref())
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
