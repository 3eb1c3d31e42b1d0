//! LoRA adapters as peft stores them: `adapter_config.json` and `adapter_model.safetensors`.

mod patterns;
mod settings;
mod write;

pub use settings::AdapterShape;
pub use write::{adapter_settings, write_adapter};

use super::config::ModelConfig;
use super::files::{list, plain_name};
use crate::error::{Error, FileOp, Result};
use crate::io::input::file_in;
use crate::io::json;
use crate::io::safetensors::{Safetensors, float_bytes};
use crate::modules::{Cell, ModuleId, ModuleSet, ParamId};
use serde_json::Value;
use settings::Settings;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// The file that makes a directory an adapter.
pub(super) const CONFIG: &str = "adapter_config.json";
const WEIGHTS: &str = "adapter_model.safetensors";
const PICKLED: &str = "adapter_model.bin";
/// Files of an adapter, one of which makes a directory of weights ambiguous.
pub(super) const FILES: [&str; 3] = [CONFIG, WEIGHTS, PICKLED];
const MAX_CONFIG_BYTES: u64 = 1 << 22;
/// Parts of tensor names that peft adds inside of a module.
const INSERTED: [&str; 3] = ["default", "base_layer", "modules_to_save"];

/// A LoRA adapter of a model, validated against its configuration.
#[derive(Clone, Debug)]
pub struct Adapter {
    /// `adapter_config.json` as it was read.
    pub settings: Value,
    /// The projections with an adapter: rank, alpha and scale.
    pub modules: BTreeMap<ModuleId, AdapterShape>,
    /// Tensors of the model that the adapter replaces as a whole: `modules_to_save`, biases, embeddings.
    pub replaced: BTreeSet<ParamId>,
    /// The tensors among [`Adapter::replaced`] that train with the adapter.
    pub trained: BTreeSet<ParamId>,
    /// Whether the head stays tied to an embedding that the adapter replaces.
    pub(super) ties: bool,
    dir: PathBuf,
}

impl Adapter {
    /// Opens an adapter of a model with this configuration; returns it with its tensors by parameter, in the file.
    ///
    /// # Errors
    /// [`Error::Input`] names the field or tensor at fault; [`Error::Unsupported`] for what is not plain LoRA;
    /// [`Error::Io`].
    pub(super) fn open(dir: &Path, config: &ModelConfig) -> Result<(Self, Safetensors, BTreeMap<ParamId, String>)> {
        let place = dir.display().to_string();
        let (value, settings) = read_settings(dir)?;
        let Some(weights) = file_in(dir, WEIGHTS)? else {
            if dir.join(PICKLED).exists() {
                let what = format!("the pickled adapter `{PICKLED}`, which can run code when it is read,");
                return Err(Error::unsupported(place, what, "save it again with peft's save_pretrained"));
            }
            return Err(Error::input(place, format!("no {WEIGHTS}"), "an adapter with its weights"));
        };
        let file = Safetensors::open(&weights)?;
        let sources = find_tensors(&file, config)?;
        let modules = adapted(&settings, &file, &sources, config)?;
        let whole = |id: &&ParamId| !matches!(id, ParamId::LoraA(_) | ParamId::LoraB(_));
        let replaced: BTreeSet<ParamId> = sources.keys().filter(whole).copied().collect();
        let trains = |id: &&ParamId| settings.trains_whole(**id, &modules);
        let trained = replaced.iter().filter(trains).copied().collect();
        for (id, _) in config.params() {
            let tied = id == ParamId::Embedding && config.tied && replaced.contains(&ParamId::Head);
            if settings.trains_whole(id, &modules) && !replaced.contains(&id) && !tied {
                let expected = format!("it: {CONFIG} says that it was trained");
                return Err(Error::input(file.path().display().to_string(), format!("no tensor for `{id}`"), expected));
            }
        }
        let ties = settings.ties;
        let adapter = Self { settings: value, modules, replaced, trained, ties, dir: dir.to_owned() };
        Ok((adapter, file, sources))
    }

    /// Opens an adapter as far as its settings tell, without its weights, for a plan; unties the head of `config` where
    /// training does.
    ///
    /// # Errors
    /// [`Error::Input`] names the field at fault; [`Error::Unsupported`] for what is not plain LoRA; [`Error::Io`].
    pub fn open_settings(dir: &Path, config: &mut ModelConfig) -> Result<Self> {
        let (value, settings) = read_settings(dir)?;
        let mut modules = BTreeMap::new();
        for cell in config.cells().iter() {
            if let Cell::Module(id) = cell {
                modules.extend(settings.shape(id)?.map(|shape| (id, shape)));
            }
        }
        if modules.is_empty() {
            return Err(no_adapter(dir.join(CONFIG).display().to_string()));
        }
        let trained = |config: &ModelConfig| -> BTreeSet<ParamId> {
            let all = config.params().into_iter().map(|(id, _)| id).chain([ParamId::Head]);
            all.filter(|id| settings.trains_whole(*id, &modules)).collect()
        };
        let ends = [ParamId::Embedding, ParamId::Head];
        if config.tied && !settings.ties && ends.iter().any(|id| trained(config).contains(id)) {
            config.tied = false;
        }
        let (trained, ties) = (trained(config), settings.ties);
        Ok(Self { settings: value, modules, replaced: trained.clone(), trained, ties, dir: dir.to_owned() })
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Whether a tensor trains when the adapter is trained.
    pub fn trains(&self, id: ParamId) -> bool {
        match id {
            ParamId::LoraA(module) | ParamId::LoraB(module) => self.modules.contains_key(&module),
            _ => self.trained.contains(&id),
        }
    }

    /// Cells that train when the adapter is trained.
    pub fn cells(&self) -> ModuleSet {
        let modules = self.modules.keys().map(|id| Cell::Module(*id));
        modules.chain(self.trained.iter().map(|id| id.cell())).collect()
    }

    /// `lora_dropout`, which is for training alone: 0 if absent.
    pub fn dropout(&self) -> f64 {
        self.settings["lora_dropout"].as_f64().unwrap_or(0.0)
    }
}

/// `adapter_config.json`, as JSON and as settings.
fn read_settings(dir: &Path) -> Result<(Value, Settings)> {
    let Some(path) = file_in(dir, CONFIG)? else {
        fs::metadata(dir).map_err(Error::io(dir, FileOp::Open))?;
        let place = dir.display().to_string();
        let expected = match super::files::inner_folder(dir, CONFIG) {
            Some(inner) => format!("a LoRA adapter as peft saves it, such as {}", inner.display()),
            None => "a LoRA adapter as peft saves it".to_owned(),
        };
        return Err(Error::input(place, format!("no {CONFIG}"), expected));
    };
    let value: Value = json::read(&path, MAX_CONFIG_BYTES, "JSON")?;
    let settings = Settings::read(&value, &path.display().to_string())?;
    Ok((value, settings))
}

fn no_adapter(place: String) -> Error {
    let expected = format!("adapters of this model's projections, as target_modules of {CONFIG} names them");
    Error::input(place, "no adapter", expected)
}

/// The model that an adapter's settings name, if they can be read.
pub(super) fn base_name(dir: &Path) -> Option<String> {
    let value: Value = json::read(&file_in(dir, CONFIG).ok()??, MAX_CONFIG_BYTES, "JSON").ok()?;
    Some(value["base_model_name_or_path"].as_str()?.escape_debug().to_string()).filter(|name| !name.is_empty())
}

/// Which parameter, or which adapter of a projection, each tensor of the file is.
fn find_tensors(file: &Safetensors, config: &ModelConfig) -> Result<BTreeMap<ParamId, String>> {
    let mut known: BTreeMap<String, ParamId> = BTreeMap::new();
    let mut params: Vec<ParamId> = config.params().into_iter().map(|(id, _)| id).chain([ParamId::Head]).collect();
    for cell in config.cells().iter() {
        if let Cell::Module(id) = cell {
            params.extend([ParamId::LoraA(id), ParamId::LoraB(id)]);
        }
    }
    for id in params {
        known.insert(plain_name(&id.to_string()), id);
    }
    let place = || file.path().display().to_string();
    let mut sources: BTreeMap<ParamId, String> = BTreeMap::new();
    let mut unknown = Vec::new();
    for (name, dtype, _) in file.tensors() {
        let plain = plain_name(name);
        let plain: Vec<&str> = plain.split('.').filter(|part| !INSERTED.contains(part)).collect();
        let Some(id) = known.get(&plain.join(".")) else {
            unknown.push(name.to_owned());
            continue;
        };
        if float_bytes(dtype).is_none() {
            return Err(file.not_float(name, dtype));
        }
        if let Some(other) = sources.insert(*id, name.to_owned()) {
            let found = format!("tensors `{other}` and `{name}`, which are the same one");
            return Err(Error::input(place(), found, "each tensor once"));
        }
    }
    for (part, what) in [
        ("lora_magnitude_vector", "DoRA"),
        ("lora_embedding_", "LoRA on an embedding"),
        ("lm_head.lora_", "LoRA on the head"),
        ("lora_B.bias", "a bias of LoRA's B"),
    ] {
        if let Some(name) = unknown.iter().find(|name| name.contains(part)) {
            let what = format!("{what} (tensor `{}`)", name.escape_debug());
            return Err(Error::unsupported(place(), what, settings::MERGE));
        }
    }
    if unknown.is_empty() {
        return Ok(sources);
    }
    Err(Error::input(place(), list(&unknown), "tensors of an adapter of this model; was it trained on another one?"))
}

/// Adapters of the projections, whose tensors must be those that the settings say.
fn adapted(
    settings: &Settings,
    file: &Safetensors,
    sources: &BTreeMap<ParamId, String>,
    config: &ModelConfig,
) -> Result<BTreeMap<ModuleId, AdapterShape>> {
    let mut modules = BTreeMap::new();
    let place = file.path().display().to_string();
    for cell in config.cells().iter() {
        let Cell::Module(id) = cell else { continue };
        let shape = settings.shape(id)?;
        let tensors = [ParamId::LoraA(id), ParamId::LoraB(id)].map(|param| sources.get(&param));
        let (shape, [Some(a), Some(b)]) = (match (shape, tensors) {
            (None, [None, None]) => continue,
            (Some(shape), tensors) => (shape, tensors),
            (None, _) => {
                let found = format!("an adapter of {id}");
                return Err(Error::input(place, found, format!("none: target_modules of {CONFIG} leaves it out")));
            }
        }) else {
            let found = format!("no complete adapter of {id}");
            return Err(Error::input(place, found, format!("lora_A and lora_B: target_modules of {CONFIG} names it")));
        };
        let (outputs, inputs) = config.module_shape(id.kind);
        for (name, wanted) in [(a, [shape.rank, inputs]), (b, [outputs, shape.rank])] {
            let (_, found) = file.info(name)?;
            if found != wanted {
                let place = format!("{place}: tensor `{name}`");
                let expected =
                    format!("shape {wanted:?}: rank {} by {CONFIG}, {inputs} inputs and {outputs} outputs", shape.rank);
                return Err(Error::input(place, format!("shape {found:?}"), expected));
            }
        }
        modules.insert(id, shape);
    }
    if modules.is_empty() {
        return Err(no_adapter(place));
    }
    for (id, shape) in config.params() {
        if let Some(name) = sources.get(&id) {
            super::files::check_tensor(file, name, &shape)?;
        }
    }
    if let Some(name) = sources.get(&ParamId::Head) {
        super::files::check_tensor(file, name, &[config.vocab, config.hidden])?;
    }
    Ok(modules)
}
