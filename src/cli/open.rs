//! Opening what most commands need: a device and a model.

use super::common::{Common, Device};
use crate::backend::cpu::Cpu;
use crate::backend::cuda::{self, Bf16State, Cuda, F32State, Precision};
use crate::backend::{Backend, trace};
use crate::error::{Error, FileOp, Result};
use crate::secure::{LoadedModel, RefusalList};
use clap::{Args, ValueEnum};
use std::path::PathBuf;

/// The model of a command.
#[derive(Args, Clone, Debug)]
pub(super) struct ModelArgs {
    /// Hugging Face model directory: config.json, safetensors, tokenizer.json
    #[arg(long, value_name = "DIR")]
    pub(super) model: PathBuf,
    /// Chat template (Jinja), for a model without its own
    #[arg(long, value_name = "FILE")]
    pub(super) chat_template: Option<PathBuf>,
}

impl ModelArgs {
    pub(super) fn open<B: Backend>(&self, backend: B) -> Result<LoadedModel<B>> {
        LoadedModel::open(backend, &self.model, self.chat_template.as_deref())
    }

    pub(super) fn open_without_template<B: Backend>(&self, backend: B) -> Result<LoadedModel<B>> {
        LoadedModel::open_without_template(backend, &self.model)
    }
}

/// A command that computes, generic over the backend.
pub(super) trait OnDevice: Sized {
    /// Precision of gradients and moments.
    fn state(&self) -> State {
        State::F32
    }

    /// The whole command.
    fn run<B: Backend>(self, common: &Common, backend: B) -> Result<()>;

    /// The command on the device that `--device` names.
    fn start(self, common: &Common) -> Result<()> {
        if common.nvtx {
            trace::annotate()?;
        }
        match (common.gpu(), self.state()) {
            (None, _) => self.run(common, Cpu::new()),
            (Some(ordinal), State::F32) => self.run(common, common.open::<F32State>(ordinal)?),
            (Some(ordinal), State::Bf16) => self.run(common, common.open::<Bf16State>(ordinal)?),
        }
    }
}

/// Precision of gradients and moments on a GPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum State {
    /// 12 bytes per trained parameter
    F32,
    /// 6 bytes per trained parameter, rounded stochastically
    Bf16,
}

impl Common {
    /// Ordinal of the GPU to use; `None` = the CPU.
    pub(super) fn gpu(&self) -> Option<u32> {
        match self.device {
            Device::Auto => self.detect(),
            Device::Cpu => None,
            Device::Cuda(ordinal) => Some(ordinal),
        }
    }

    /// Detects a usable GPU; a GPU that is present but unusable is reported on stderr.
    fn detect(&self) -> Option<u32> {
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

/// How refusals are recognised.
#[derive(Args, Clone, Debug, Default)]
pub(super) struct Refusals {
    /// Refusal expressions, one per line, in place of the list of Zou et al.
    #[arg(long, value_name = "FILE")]
    refusals: Option<PathBuf>,
}

impl Refusals {
    pub(super) fn list(&self) -> Result<RefusalList> {
        let Some(path) = &self.refusals else { return Ok(RefusalList::default()) };
        let text = std::fs::read_to_string(path).map_err(Error::io(path, FileOp::Read))?;
        RefusalList::parse(&text, &path.display().to_string())
    }
}
