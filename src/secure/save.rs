//! What a LoRA run saves: merged weights, the adapter as peft writes it, or both.

use super::tune::Method;
use crate::backend::Backend;
use crate::engine::Decoder;
use crate::error::{Error, FileOp, Result};
use crate::model::adapter::{adapter_settings, write_adapter};
use crate::model::{AdapterShape, ChatFiles, ModelDir};
use crate::modules::{Cell, ParamId};
use clap::ValueEnum;
use std::path::Path;

/// Name of the adapter's directory in an output that holds merged weights as well.
const DIRECTORY: &str = "adapter";

/// What a LoRA run saves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum SaveAs {
    /// A model directory with the adapters merged into the weights
    #[default]
    Merged,
    /// A PEFT adapter: adapter_config.json, adapter_model.safetensors
    Adapter,
    /// The model, and the adapter in its folder `adapter`
    Both,
}

impl SaveAs {
    /// Checks that there will be an adapter where one is to be saved.
    ///
    /// # Errors
    /// [`Error::Input`] where the method trains none.
    pub(super) fn check(self, method: &Method) -> Result<()> {
        if self == Self::Merged || *method != Method::Full {
            return Ok(());
        }
        Err(Error::input("--save", "adapter of a run without adapters", "--method lora, or --adapter DIR, as well"))
    }

    /// Whether merged weights are saved.
    pub(super) fn merges(self) -> bool {
        self != Self::Adapter
    }

    /// Saves the adapters of a decoder, before they are merged, into the output `out`, with the files of tokenizer and
    /// chat beside them, by which the tuned model is used; `base` is the name or path of the model, and its revision.
    pub(super) fn adapter<B: Backend>(
        self,
        out: &Path,
        (files, chat): (&ModelDir, &ChatFiles),
        decoder: &Decoder<B>,
        method: &Method,
        base: (&str, Option<&str>),
    ) -> Result<()> {
        let dir = match self {
            Self::Merged => return Ok(()),
            Self::Adapter => out.to_owned(),
            Self::Both => out.join(DIRECTORY),
        };
        std::fs::create_dir_all(&dir).map_err(Error::io(&dir, FileOp::Create))?;
        let settings = match (files.adapter(), method) {
            (Some(adapter), _) => adapter.settings.clone(),
            (None, Method::Lora { lora, modules }) => {
                let module = |cell| if let Cell::Module(id) = cell { Some(id) } else { None };
                let shape = AdapterShape { rank: lora.rank, alpha: lora.alpha, rslora: lora.rslora };
                let modules = modules.iter().filter_map(module).collect();
                adapter_settings(&modules, shape, files.config.layers)
            }
            (None, _) => return Ok(()),
        };
        let saved = |id: ParamId| {
            matches!(id, ParamId::LoraA(_) | ParamId::LoraB(_))
                || files.adapter().is_some_and(|adapter| adapter.replaced.contains(&id))
        };
        let params = decoder.params().iter().filter(|param| saved(param.id));
        let params: Vec<_> = params.map(|param| (param.id, param.shape.clone())).collect();
        write_adapter(&dir, &settings, base, &params, |id| decoder.read(id))?;
        files.write_chat_files(&dir)?;
        chat.write(files, &dir)
    }
}
