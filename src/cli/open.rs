//! Opening what most commands need: a device and a model.

use super::common::{Common, Device, say};
use super::names::Names;
use crate::backend::cpu::Cpu;
use crate::backend::cuda::{self, Bf16State, Cuda, F32State, Precision};
use crate::backend::{Backend, DtypeChoice, trace};
use crate::data::SecurityPrompt;
use crate::error::{Error, Result};
use crate::hub::HubName;
use crate::model::{Clock, ModelDir};
use crate::secure::{GuardOptions, ModelText, RefusalLanguage, RefusalList};
use clap::{Args, ValueEnum};
use std::path::{Path, PathBuf};

/// The model of a command.
#[derive(Args, Clone, Debug)]
pub(super) struct ModelArgs {
    /// Hugging Face model directory (config.json, safetensors, tokenizer.json), or its name on the hub:
    /// org/name[@revision]
    #[arg(long, value_name = "DIR_OR_NAME")]
    pub(super) model: PathBuf,
    /// Chat template (Jinja), for a model without its own
    #[arg(long, value_name = "FILE")]
    pub(super) chat_template: Option<PathBuf>,
    /// Date for a chat template that writes it (strftime_now): 2025-07-01, 2025-07-01T12:30:00Z or seconds since 1970.
    /// If not given, the one that an unfinished run or a probe file recorded, else SOURCE_DATE_EPOCH, else now
    #[arg(long, value_name = "DATE")]
    pub(super) date: Option<Clock>,
    /// LoRA adapter of the model, as peft saves it (adapter_config.json, adapter_model.safetensors), or its name on the
    /// hub
    #[arg(long, value_name = "DIR_OR_NAME")]
    pub(super) adapter: Option<PathBuf>,
    /// The model's name on the hub, if it was given by name.
    #[arg(skip)]
    pub(super) name: Option<HubName>,
}

impl ModelArgs {
    /// Makes paths of names on the hub.
    pub(super) fn resolve(&mut self, names: &mut Names<'_>) -> Result<()> {
        self.name = names.model(&mut self.model)?;
        self.adapter.iter_mut().try_for_each(|adapter| names.model(adapter).map(drop))
    }

    /// The model as it was named.
    pub(super) fn shown(&self) -> String {
        self.name.as_ref().map_or_else(|| self.model.display().to_string(), HubName::text)
    }

    /// Opens the model for chat, without its weights.
    pub(super) fn open_text(&self) -> Result<ModelText> {
        self.open_dated(None).map(|(text, _)| text)
    }

    /// As [`ModelArgs::open_text`], at `--date`, else at the `recorded` time; also returns the time if the template uses
    /// it.
    pub(super) fn open_dated(&self, recorded: Option<Clock>) -> Result<(ModelText, Option<Clock>)> {
        let mut text = ModelText::of(self.files()?, self.chat_template.as_deref())?;
        let clock = self.date.or(recorded).map_or_else(Clock::now, Ok)?;
        let used = text.set_clock(clock);
        Ok((text, used))
    }

    /// Opens the model for plain text, without its weights.
    pub(super) fn open_plain_text(&self) -> Result<ModelText> {
        ModelText::without_template(self.files()?)
    }

    /// Opens the model's directory, with its adapter.
    pub(super) fn files(&self) -> Result<ModelDir> {
        match &self.adapter {
            None => ModelDir::open(&self.model),
            Some(adapter) => ModelDir::open_with_adapter(&self.model, adapter),
        }
    }

    /// The same model without its adapter.
    pub(super) fn without_adapter(&self) -> Self {
        Self { adapter: None, ..self.clone() }
    }

    /// What is read, with its option.
    pub(super) fn inputs(&self) -> Vec<(&str, &Path)> {
        let template = self.chat_template.iter().map(|path| ("--chat-template", path.as_path()));
        let adapter = self.adapter.iter().map(|path| ("--adapter", path.as_path()));
        std::iter::once(("--model", self.model.as_path())).chain(template).chain(adapter).collect()
    }
}

/// A command that computes, generic over the backend.
pub(super) trait OnDevice: Sized {
    /// Precision of gradients and moments.
    fn state(&self) -> State {
        State::F32
    }

    /// The model that the command loads, by whose dtype `--dtype auto` goes; `None` = f32 on a CPU.
    fn model(&self) -> Option<PathBuf>;

    /// `--dtype`, or what the command's configuration says instead.
    fn dtype(&self, common: &Common) -> Result<DtypeChoice> {
        Ok(common.dtype)
    }

    /// Makes paths of names on the hub.
    fn resolve(&mut self, _names: &mut Names<'_>) -> Result<()> {
        Ok(())
    }

    /// The whole command.
    fn run<B: Backend>(self, common: &Common, backend: B) -> Result<()>;

    /// The command on the device that `--device` names.
    fn start(mut self, common: &Common) -> Result<()> {
        self.resolve(&mut Names::new(common))?;
        self.start_resolved(common)
    }

    /// [`OnDevice::start`] where no name of the hub is left.
    fn start_resolved(self, common: &Common) -> Result<()> {
        if common.nvtx {
            trace::annotate()?;
        }
        let (device, state) = (common.gpu(), self.state());
        let dtype = common.float(device, self.dtype(common)?, self.model().as_deref())?;
        check_state(dtype, state)?;
        match (device, dtype, state) {
            (None, Float::F32, _) => self.run(common, Cpu::new()),
            (None, Float::Bf16, State::F32) => self.run(common, Cpu::<F32State>::default()),
            (None, Float::Bf16, State::Bf16) => self.run(common, Cpu::<Bf16State>::default()),
            (Some(ordinal), _, State::F32) => self.run(common, common.open::<F32State>(ordinal)?),
            (Some(ordinal), _, State::Bf16) => self.run(common, common.open::<Bf16State>(ordinal)?),
        }
    }
}

/// Refuses `--state bf16` where it would have no effect.
pub(super) fn check_state(float: Float, state: State) -> Result<()> {
    if (float, state) == (Float::F32, State::Bf16) {
        let found = "bf16 beside weights in f32, where it has no effect";
        return Err(Error::input("--state", found, "--dtype bf16 as well, or --state f32"));
    }
    Ok(())
}

/// Precision of weights and activations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Float {
    F32,
    Bf16,
}

/// Precision of gradients and moments beside bf16 weights.
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

    /// The precision in which a command computes; what `auto` chose on a CPU, and why, goes to stderr.
    pub(super) fn float(&self, device: Option<u32>, asked: DtypeChoice, model: Option<&Path>) -> Result<Float> {
        match (device, asked) {
            (Some(ordinal), DtypeChoice::F32) => {
                let found = format!("f32 on cuda:{ordinal}");
                Err(Error::input("--dtype", found, "auto or bf16 on a GPU, whose kernels compute in bf16"))
            }
            (Some(_), DtypeChoice::Auto | DtypeChoice::Bf16) | (None, DtypeChoice::Bf16) => Ok(Float::Bf16),
            (None, DtypeChoice::F32) => Ok(Float::F32),
            (None, DtypeChoice::Auto) => {
                // A directory that cannot be read is an error of the command, when it loads the model.
                let stored = model.is_some_and(|dir| {
                    ModelDir::stores_bf16(dir).or_else(|_| ModelDir::declares_bf16(dir)).unwrap_or(false)
                });
                let (float, chosen) = match (stored, Cpu::bf16_products()) {
                    (false, _) => return Ok(Float::F32),
                    (true, true) => (Float::Bf16, "in bf16, as the model is stored: this processor multiplies bf16"),
                    (true, false) => (Float::F32, "in f32: this processor has no instructions for products of bf16"),
                };
                if !self.quiet {
                    say(&format!("on the CPU {chosen}\n"));
                }
                Ok(float)
            }
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
            say(&format!("on the CPU: {why}\n"));
        }
        found.is_ok().then_some(0)
    }

    fn open<P: Precision>(&self, ordinal: u32) -> Result<Cuda<P>> {
        let backend = Cuda::open(ordinal)?;
        if !self.quiet {
            say(&format!("on cuda:{ordinal}, {}\n", backend.product()?));
        }
        Ok(backend)
    }
}

/// How refusals are recognised.
#[derive(Args, Clone, Debug, Default)]
pub(super) struct Refusals {
    /// File of refusal expressions (not of conversations), one per line, in place of the list of Zou et al.
    #[arg(long, value_name = "FILE", conflicts_with = "refusal_languages")]
    refusals: Option<PathBuf>,
    /// Languages of the built-in refusal expressions, such as en,de,fr, or all; en is the list of Zou et al., by which
    /// published rates were measured
    #[arg(long, value_enum, value_delimiter = ',', value_name = "LANGUAGE", default_value = "en")]
    refusal_languages: Vec<RefusalLanguage>,
}

impl Refusals {
    /// What is read, with its option.
    pub(super) fn inputs(&self) -> Vec<(&str, &Path)> {
        self.refusals.iter().map(|path| ("--refusals", path.as_path())).collect()
    }

    pub(super) fn list(&self) -> Result<RefusalList> {
        match (&self.refusals, self.refusal_languages.as_slice()) {
            (Some(path), _) => RefusalList::read(path),
            (None, []) => Ok(RefusalList::default()),
            (None, languages) => Ok(RefusalList::of_languages(languages)),
        }
    }
}

/// A guard model that judges answers.
#[derive(Args, Clone, Debug)]
pub(super) struct GuardArgs {
    /// Guard model that judges the answers to harmful prompts on this machine, in memory beside the model: its directory, or
    /// its name on the hub
    #[arg(long = "judge-model", id = "judge_model", value_name = "DIR_OR_NAME")]
    model: Option<PathBuf>,
    #[command(flatten)]
    options: GuardOptions,
}

impl GuardArgs {
    /// Makes a path of a name on the hub.
    pub(super) fn resolve(&mut self, names: &mut Names<'_>) -> Result<()> {
        self.model.iter_mut().try_for_each(|model| names.model(model).map(drop))
    }

    /// What is read, with its option.
    pub(super) fn inputs(&self) -> Vec<(&str, &Path)> {
        self.model.iter().map(|path| ("--judge-model", path.as_path())).collect()
    }

    /// The guard model, if there is one.
    pub(super) fn options(&self) -> Option<GuardOptions> {
        self.model.clone().map(|model| GuardOptions { model, ..self.options.clone() })
    }
}

/// Checks, before the weights are read, that every prompt of a security file fits the model's context.
pub(super) fn check_security(text: &ModelText, prompts: &[SecurityPrompt]) -> Result<()> {
    text.check_prompts(prompts.iter().map(|p| (p.place.as_str(), p.prompt.as_str())))
}
