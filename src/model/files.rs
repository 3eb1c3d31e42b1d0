//! Reads and writes Hugging Face model directories.

mod chat;
mod weights;

use super::tokenizer::TokenizerConfig;
use super::{Adapter, AdapterShape, ModelConfig, StoredAs, Tokenizer, adapter};
use crate::error::{Error, FileOp, Result};
use crate::io::input::{file_in, read_bytes};
use crate::io::json;
use crate::io::names::{GENERATION, INDEX, SIDE_FILES, SINGLE, TEMPLATES, TOKENIZER, TOOL_USE};
use crate::io::safetensors::{Dtype, Safetensors, TensorSpec, float_bytes, write_weights};
use crate::modules::{ModuleId, ParamId};
use rayon::prelude::*;
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use weights::{find_tensors, open_shards};

pub(super) use weights::{check_tensor, list, plain_name};

const MAX_CONFIG_BYTES: u64 = 1 << 22;

/// A validated Hugging Face model directory; tensors are read on demand.
pub struct ModelDir {
    /// Configuration from `config.json`, plus the end-of-turn tokens of `generation_config.json`.
    ///
    /// As in transformers, a model marked as tied whose stored head differs from its embedding is untied, and one that
    /// stores only the head uses it as its embedding.
    pub config: ModelConfig,
    dir: PathBuf,
    /// Where tokenizer and chat template are: the directory, or that of the adapter.
    text_dir: PathBuf,
    shards: Vec<Safetensors>,
    /// Shard, and name in the shard, of each tensor of [`ModelConfig::params`] and of the adapter.
    sources: BTreeMap<ParamId, (usize, String)>,
    tokenizer: Option<Tokenizer>,
    adapter: Option<Adapter>,
    hash: OnceLock<String>,
}

impl ModelDir {
    /// Opens the directory and validates everything but the values: names, shapes, dtypes and offsets.
    ///
    /// A tensor may carry the prefixes that wrappers of training frameworks add to its name, or lack `model.`. The
    /// tokenizer may have more tokens than the embedding has rows: they are refused where a text uses one.
    ///
    /// # Errors
    /// [`Error::Input`] with the file and field at fault, and for an adapter beside the weights, as it is not clear
    /// which of the two is meant; [`Error::Unsupported`] for features that the engine lacks; [`Error::Io`].
    pub fn open(dir: &Path) -> Result<Self> {
        let files = Self::open_weights(dir)?;
        if let Some(file) = adapter::FILES.into_iter().find(|file| dir.join(file).exists()) {
            let found = format!("weights and a LoRA adapter ({file})");
            let expected = format!("one of them: --adapter '{0}' attaches it, else move it away", dir.display());
            return Err(Error::input(dir.display().to_string(), found, expected));
        }
        Ok(files)
    }

    /// Opens the directory with a LoRA adapter of peft: tensors that it replaces take the place of the model's, and its
    /// own are read as [`ParamId::LoraA`] and [`ParamId::LoraB`].
    ///
    /// A head that is tied to an embedding is untied where the adapter replaces either, as peft trains a copy, unless
    /// `ensure_weight_tying` is set. Tokenizer and chat template are the adapter's where it has a `tokenizer.json`, as
    /// trainers save those that they used beside it.
    ///
    /// # Errors
    /// As [`ModelDir::open`]; [`Error::Input`] where the adapter is of another model; [`Error::Unsupported`] for
    /// adapters that are not plain LoRA.
    pub fn open_with_adapter(dir: &Path, adapter: &Path) -> Result<Self> {
        let mut files = Self::open_weights(dir)?;
        let (adapter, file, mut sources) = Adapter::open(adapter, &files.config)?;
        let ends = [ParamId::Embedding, ParamId::Head];
        if files.config.tied && ends.iter().any(|id| sources.contains_key(id)) {
            if adapter.ties {
                let head = sources.remove(&ParamId::Head);
                if let (Some(head), false) = (head, sources.contains_key(&ParamId::Embedding)) {
                    sources.insert(ParamId::Embedding, head);
                }
            } else {
                files.config.tied = false;
                let base = files.sources.get(&ParamId::Embedding).cloned();
                files.sources.extend(base.map(|base| (ParamId::Head, base)));
            }
        }
        let shard = files.shards.len();
        files.shards.push(file);
        files.sources.extend(sources.into_iter().map(|(id, name)| (id, (shard, name))));
        if file_in(adapter.dir(), TOKENIZER)?.is_some() {
            files.read_text(adapter.dir())?;
        }
        files.adapter = Some(adapter);
        Ok(files)
    }

    /// The adapter that it was opened with.
    pub fn adapter(&self) -> Option<&Adapter> {
        self.adapter.as_ref()
    }

    /// A and B of each adapted projection, [rank, inputs] and [outputs, rank].
    pub fn adapter_params(&self) -> impl Iterator<Item = (ModuleId, AdapterShape, [(ParamId, Vec<usize>); 2])> + '_ {
        self.adapter.iter().flat_map(|adapter| &adapter.modules).map(|(&id, &shape)| {
            let (outputs, inputs) = self.config.module_shape(id.kind);
            let tensors =
                [(ParamId::LoraA(id), vec![shape.rank, inputs]), (ParamId::LoraB(id), vec![outputs, shape.rank])];
            (id, shape, tensors)
        })
    }

    fn open_weights(dir: &Path) -> Result<Self> {
        let place = dir.display().to_string();
        check_exists(dir)?;
        if !fs::metadata(dir).map_err(Error::io(dir, FileOp::Open))?.is_dir() {
            let other = ("something that is not a directory", "a Hugging Face model directory");
            let (found, help) = of_other_format(dir).unwrap_or(other);
            return Err(Error::input(place, found, help));
        }
        let Some(config_path) = file_in(dir, "config.json")? else {
            return Err(no_config(dir));
        };
        let value: Value = json::read(&config_path, MAX_CONFIG_BYTES, "JSON")?;
        let mut config = ModelConfig::from_json(&value, &config_path.display().to_string())?;
        let shards = open_shards(dir)?;
        let sources = find_tensors(&mut config, &shards, &place)?;
        let (dir, text_dir) = (dir.to_owned(), dir.to_owned());
        let (tokenizer, adapter, hash) = (None, None, OnceLock::new());
        let mut files = Self { config, dir, text_dir, shards, sources, tokenizer, adapter, hash };
        let dir = files.dir.clone();
        files.read_text(&dir)?;
        Ok(files)
    }

    /// Takes tokenizer and chat template from `dir`, and adds the end-of-turn tokens that it names.
    fn read_text(&mut self, dir: &Path) -> Result<()> {
        let config = &mut self.config;
        if let Some(path) = file_in(dir, GENERATION)? {
            let value: Value = json::read(&path, MAX_CONFIG_BYTES, "JSON")?;
            config.add_generation_config(&value, &path.display().to_string())?;
        }
        let tokenizer_config = TokenizerConfig::read(dir)?;
        self.tokenizer = match file_in(dir, TOKENIZER)? {
            Some(path) => Some(Tokenizer::open_with(&path, &tokenizer_config)?.with_rows(config.vocab)),
            None => None,
        };
        let eos = |tokenizer: &Tokenizer| tokenizer.token(tokenizer_config.special.get("eos_token")?);
        if let Some(eos) = self.tokenizer.as_ref().and_then(eos)
            && (eos as usize) < config.vocab
            && !config.eos.contains(&eos)
        {
            config.eos.push(eos);
        }
        dir.clone_into(&mut self.text_dir);
        Ok(())
    }

    /// Reads `config.json` alone, of a directory or by its own path. Whether the head is tied is as the file says.
    ///
    /// # Errors
    /// [`Error::Input`] names the field; [`Error::Unsupported`]; [`Error::Io`].
    pub fn read_config(path: &Path) -> Result<ModelConfig> {
        check_exists(path)?;
        if let Some((found, help)) = of_other_format(path).filter(|_| path.is_file()) {
            return Err(Error::input(path.display().to_string(), found, help));
        }
        let path = match path.is_dir() {
            false => path.to_owned(),
            true => file_in(path, "config.json")?.ok_or_else(|| no_config(path))?,
        };
        let value: Value = json::read(&path, MAX_CONFIG_BYTES, "JSON")?;
        ModelConfig::from_json(&value, &path.display().to_string())
    }

    /// Whether `config.json`, of a directory or by its own path, says that the weights are stored in bf16.
    ///
    /// # Errors
    /// [`Error::Input`], [`Error::Io`] where it cannot be read.
    pub fn declares_bf16(path: &Path) -> Result<bool> {
        let path = if path.is_file() { path.to_owned() } else { path.join("config.json") };
        let value: Value = json::read(&path, MAX_CONFIG_BYTES, "JSON")?;
        Ok(["dtype", "torch_dtype"].iter().any(|key| value[*key] == "bfloat16"))
    }

    /// Whether all weights of a model directory are stored in bf16.
    ///
    /// # Errors
    /// [`Error::Input`] names the file that is missing or wrong.
    pub fn stores_bf16(dir: &Path) -> Result<bool> {
        Ok(open_shards(dir)?.iter().all(|shard| shard.tensors().all(|(_, dtype, _)| dtype == Dtype::BF16)))
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Bytes of all weights in these dtypes.
    ///
    /// # Errors
    /// [`Error::Input`] where a tensor is missing.
    pub fn stored_bytes(&self, stored: StoredAs) -> Result<u64> {
        let size = |(id, shape): (ParamId, Vec<usize>)| {
            let width = float_bytes(self.dtype_of(id, stored)?).unwrap_or(4);
            Ok(shape.iter().product::<usize>() as u64 * width as u64)
        };
        self.config.params().into_iter().map(size).sum()
    }

    /// The dtype in which [`ModelDir::write_as`] writes a tensor.
    ///
    /// # Errors
    /// [`Error::Input`] where there is no such tensor.
    pub fn dtype_of(&self, id: ParamId, stored: StoredAs) -> Result<Dtype> {
        let (file, name) = self.source(id)?;
        Ok(stored.dtype().unwrap_or(file.info(name)?.0))
    }

    /// Reads one tensor as f32.
    ///
    /// # Errors
    /// [`Error::Input`] with the position of a value that is not finite, or for another shape; [`Error::Io`].
    pub fn tensor(&self, id: ParamId, shape: &[usize]) -> Result<Vec<f32>> {
        let (file, name) = self.source(id)?;
        let (_, stored) = file.info(name)?;
        if stored != shape {
            let place = format!("{}: tensor `{name}`", file.path().display());
            return Err(Error::input(place, format!("shape {stored:?}"), format!("shape {shape:?}")));
        }
        file.values(name)
    }

    /// BLAKE3 hash of config, weights and adapter, as 64 hexadecimal digits; identifies the model of a probe, map or module set.
    /// Independent of sharding. Computed once, by reading all weights.
    ///
    /// # Errors
    /// [`Error::Io`] where a file cannot be read.
    pub fn hash(&self) -> Result<&str> {
        if let Some(hash) = self.hash.get() {
            return Ok(hash);
        }
        let mut hasher = blake3::Hasher::new();
        hasher.update(&read_bytes(&self.dir.join("config.json"), MAX_CONFIG_BYTES)?);
        let mut params = self.config.params();
        for (id, shape, tensors) in self.adapter_params() {
            hasher.update(format!("\nadapter of {id}: {shape:?}").as_bytes());
            params.extend(tensors);
        }
        for (id, shape) in params {
            let (file, name) = self.source(id)?;
            let (dtype, _) = file.info(name)?;
            hasher.update(format!("\n{id} {dtype} {shape:?}").as_bytes());
            let pieces: Vec<blake3::Hash> = file.bytes(name)?.par_chunks(1 << 22).map(blake3::hash).collect();
            for piece in pieces {
                hasher.update(piece.as_bytes());
            }
            file.release(name)?;
        }
        Ok(self.hash.get_or_init(|| hasher.finalize().to_hex().to_string()))
    }

    /// The tokenizer.
    ///
    /// # Errors
    /// [`Error::Input`] where the directory has no `tokenizer.json`.
    pub fn tokenizer(&self) -> Result<Tokenizer> {
        self.tokenizer.clone().ok_or_else(|| {
            let found = if self.dir.join("tokenizer.model").exists() {
                "a SentencePiece tokenizer.model and no tokenizer.json"
            } else {
                "no tokenizer.json"
            };
            let expected = "tokenizer.json; transformers' AutoTokenizer writes one with save_pretrained";
            Error::input(self.dir.display().to_string(), found, expected)
        })
    }

    /// Writes a model directory with the values of `tensor` into `out`, usually an [`OutputDir`](crate::io::OutputDir):
    /// shards of at most `max_shard_bytes` in the stored dtypes, with config and tokenizer copied. Holds one tensor in
    /// memory at a time.
    ///
    /// # Errors
    /// [`Error::Failed`] with the position of a value that is not finite; errors of `tensor`; [`Error::Io`].
    pub fn write(
        &self,
        out: &Path,
        tensor: impl FnMut(ParamId) -> Result<Vec<f32>>,
        max_shard_bytes: u64,
    ) -> Result<()> {
        self.write_as(out, StoredAs::AsStored, tensor, max_shard_bytes)
    }

    /// As [`ModelDir::write`], in these dtypes.
    ///
    /// # Errors
    /// As [`ModelDir::write`].
    pub fn write_as(
        &self,
        out: &Path,
        stored: StoredAs,
        mut tensor: impl FnMut(ParamId) -> Result<Vec<f32>>,
        max_shard_bytes: u64,
    ) -> Result<()> {
        fs::create_dir_all(out).map_err(Error::io(out, FileOp::Create))?;
        let shards = self.plan_shards(stored, max_shard_bytes)?;
        let count = shards.len();
        let mut weight_map = serde_json::Map::new();
        let mut total_bytes = 0;
        for (i, (ids, specs)) in shards.into_iter().enumerate() {
            let name = match count {
                1 => SINGLE.to_owned(),
                _ => format!("model-{:05}-of-{count:05}.safetensors", i + 1),
            };
            write_weights(&out.join(&name), &specs, |i| tensor(ids[i]))?;
            for spec in specs {
                total_bytes += spec.bytes();
                weight_map.insert(spec.name, Value::String(name.clone()));
            }
        }
        if count > 1 {
            let index = serde_json::json!({"metadata": {"total_size": total_bytes}, "weight_map": weight_map});
            json::write(&out.join(INDEX), &index)?;
        }
        self.write_side_files(out, stored)
    }

    /// Tensors of each shard in the engine's order; within a shard wider dtypes come first, which keeps all aligned.
    fn plan_shards(&self, stored: StoredAs, max_shard_bytes: u64) -> Result<Vec<(Vec<ParamId>, Vec<TensorSpec>)>> {
        let mut shards: Vec<Vec<(ParamId, TensorSpec)>> = Vec::new();
        let mut filled = 0;
        for (id, shape) in self.config.params() {
            let spec = TensorSpec { name: id.to_string(), dtype: self.dtype_of(id, stored)?, shape };
            let bytes = spec.bytes();
            match shards.last_mut() {
                Some(shard) if filled + bytes <= max_shard_bytes => shard.push((id, spec)),
                _ => {
                    shards.push(vec![(id, spec)]);
                    filled = 0;
                }
            }
            filled += bytes;
        }
        for shard in &mut shards {
            shard.sort_by_key(|(_, spec)| std::cmp::Reverse(float_bytes(spec.dtype)));
        }
        Ok(shards.into_iter().map(|shard| shard.into_iter().unzip()).collect())
    }

    /// `config.json` as it is.
    pub(super) fn config_json(&self) -> Result<Value> {
        json::read(&self.dir.join("config.json"), MAX_CONFIG_BYTES, "JSON")
    }

    fn write_side_files(&self, out: &Path, stored: StoredAs) -> Result<()> {
        let source = self.dir.join("config.json");
        let mut config = self.config_json()?;
        let untied = config["tie_word_embeddings"].as_bool().unwrap_or(false) != self.config.tied;
        if untied {
            config["tie_word_embeddings"] = Value::Bool(self.config.tied);
        }
        if let Some(name) = stored.config_name() {
            // Newer versions of transformers write the key without `torch_`.
            let key = if config.get("dtype").is_some() { "dtype" } else { "torch_dtype" };
            config[key] = name.into();
        }
        if untied || stored.config_name().is_some() {
            json::write(&out.join("config.json"), &config)?;
        } else {
            copy(&source, &out.join("config.json"))?;
        }
        self.write_chat_files(out)
    }

    /// Copies the files of tokenizer, chat template and generation into `out`.
    ///
    /// # Errors
    /// [`Error::Io`] where a file cannot be copied; [`Error::Input`] for a link that may not be followed.
    pub fn write_chat_files(&self, out: &Path) -> Result<()> {
        for name in SIDE_FILES {
            // Beside an adapter, trainers save the tokenizer alone.
            let base = if name == GENERATION { file_in(&self.dir, name)? } else { None };
            if let Some(path) = file_in(&self.text_dir, name)?.or(base) {
                copy(&path, &out.join(name))?;
            }
        }
        if let Some(path) = self.tool_use_file()? {
            let folder = out.join(TEMPLATES);
            fs::create_dir_all(&folder).map_err(Error::io(&folder, FileOp::Create))?;
            copy(&path, &folder.join(TOOL_USE))?;
        }
        Ok(())
    }

    fn source(&self, id: ParamId) -> Result<(&Safetensors, &str)> {
        let source = self.sources.get(&id).and_then(|(shard, name)| Some((self.shards.get(*shard)?, name.as_str())));
        source.ok_or_else(|| {
            Error::input(self.dir.display().to_string(), format!("no tensor `{id}`"), "a tensor of this model")
        })
    }
}

/// What a file of a model in another format is, and what to do.
fn of_other_format(path: &Path) -> Option<(&'static str, &'static str)> {
    let name = path.file_name()?.to_string_lossy().to_lowercase();
    if name.ends_with(".gguf") {
        let help = "the Hugging Face model that it was converted from (config.json, model.safetensors)";
        return Some(("a GGUF file", help));
    }
    let meta = name == "params.json" || name.starts_with("consolidated.") && name.ends_with(".pth");
    let help = "the repository in Hugging Face's format (config.json, model.safetensors)";
    meta.then_some(("weights in the format of their publisher (params.json, consolidated.*)", help))
}

/// Tells a name that is neither a path nor one of the hub from a directory that cannot be read.
fn check_exists(path: &Path) -> Result<()> {
    match fs::symlink_metadata(path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            let expected = "a model directory, or a name on the hub: org/name, or org/name@revision";
            Err(Error::input(path.display().to_string(), "no such path", expected))
        }
        _ => Ok(()),
    }
}

/// The error for a directory without `config.json`.
fn no_config(dir: &Path) -> Error {
    let place = dir.display().to_string();
    if let Ok(snapshots) = fs::read_dir(dir.join("snapshots")) {
        let mut names: Vec<String> = snapshots.flatten().map(|e| e.path().display().to_string()).collect();
        names.sort();
        let expected = match names.first() {
            Some(first) => format!("the directory of a snapshot, such as {first}"),
            None => "the directory of a snapshot".to_owned(),
        };
        return Error::input(place, "the cache of a whole repository", expected);
    }
    if dir.join(adapter::CONFIG).exists() {
        let base = adapter::base_name(dir).unwrap_or_else(|| "BASE".to_owned());
        let expected = format!("a model, and the adapter beside it: --model '{base}' --adapter '{place}'");
        return Error::input(place, "a LoRA adapter without the model", expected);
    }
    if let Some((found, help)) =
        fs::read_dir(dir).into_iter().flatten().flatten().find_map(|e| of_other_format(&e.path()))
    {
        return Error::input(place, format!("no config.json, but {found}"), help);
    }
    let expected = match inner_folder(dir, "config.json") {
        Some(inner) => format!("a Hugging Face model directory, such as {}", inner.display()),
        None => "a Hugging Face model directory (config.json, model.safetensors)".to_owned(),
    };
    Error::input(place, "no config.json", expected)
}

/// The last folder in `dir` that has this file, as the outputs of trainers have their checkpoints: the one with the
/// largest number at the end of its name, else the last by name.
pub(super) fn inner_folder(dir: &Path, file: &str) -> Option<PathBuf> {
    let folders = fs::read_dir(dir).ok()?.flatten().map(|entry| entry.path()).filter(|path| path.join(file).is_file());
    let number = |path: &PathBuf| {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let digits = name.len() - name.trim_end_matches(|c: char| c.is_ascii_digit()).len();
        (name[name.len() - digits..].parse::<u64>().ok(), name)
    };
    folders.max_by_key(number)
}

/// Copies contents but not permissions, so that a read-only input yields a writable output.
fn copy(from: &Path, to: &Path) -> Result<()> {
    let mut source = fs::File::open(from).map_err(Error::io(from, FileOp::Open))?;
    let mut target = fs::File::create(to).map_err(Error::io(to, FileOp::Create))?;
    std::io::copy(&mut source, &mut target).map(|_| ()).map_err(Error::io(to, FileOp::Write))
}
