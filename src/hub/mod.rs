//! Models and data by name: `org/name` on the Hugging Face hub, from the cache that other tools share, else downloaded
//! into it.
//!
//! The cache is laid out as `huggingface_hub` lays it out: `models--org--name/{refs,snapshots,blobs}`. Files of a
//! snapshot never change, so that those in the cache are not asked for again. Downloads that break are resumed.
//!
//! The crate `hf-hub` would do some of this: from 1.0 on it is asynchronous and brings reqwest and tokio along, before it
//! reads neither `HF_HUB_CACHE` nor `HF_HUB_OFFLINE`. The client is over ureq, which judges of answers need as well.

mod cache;
mod client;
mod data;
mod files;
mod names;

pub use names::HubName;

use crate::error::{Error, Result};
use crate::progress::Observer;
use cache::Repository;
use client::{Client, Fault};
use std::cell::RefCell;
use std::path::{Path, PathBuf};

/// Kind of a repository.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HubKind {
    /// A model, or an adapter.
    Model,
    /// A set of data.
    Dataset,
}

/// The hub and its cache, as the environment describes them.
pub struct Hub {
    client: Client,
    cache: PathBuf,
    offline: bool,
    notes: Vec<String>,
}

/// Files of a repository in the cache.
pub struct HubFiles {
    /// The directory of the snapshot.
    pub dir: PathBuf,
    /// Paths in it, with `/`.
    pub files: Vec<String>,
}

impl Hub {
    /// The endpoint is `HF_ENDPOINT`, or <https://huggingface.co>. The cache is `HF_HUB_CACHE`, else `hub` in `HF_HOME`,
    /// else in `XDG_CACHE_HOME/huggingface` or `~/.cache/huggingface`. The token is `HF_TOKEN`, or the one that
    /// `hf auth login` stored; it is sent to the endpoint alone. `HF_HUB_OFFLINE` works as `offline`.
    ///
    /// # Errors
    /// [`Error::Input`] where there is neither a variable nor a home directory, or the endpoint is no URL.
    pub fn from_env(offline: bool) -> Result<Self> {
        let env = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
        let home = env("HOME").map(PathBuf::from);
        let path = |text: String| match (text.strip_prefix("~/"), &home) {
            (Some(rest), Some(home)) => home.join(rest),
            _ => PathBuf::from(text),
        };
        let caches = env("XDG_CACHE_HOME").map(path).or_else(|| Some(home.as_ref()?.join(".cache")));
        let hf = env("HF_HOME").map(path).or_else(|| Some(caches?.join("huggingface")));
        let cache = env("HF_HUB_CACHE").or_else(|| env("HUGGINGFACE_HUB_CACHE")).map(path);
        let Some(cache) = cache.or_else(|| Some(hf.as_ref()?.join("hub"))) else {
            return Err(Error::input("HF_HOME", "nothing, and no HOME", "the directory of the cache of models"));
        };
        let on =
            |name: &str| env(name).is_some_and(|v| ["1", "on", "yes", "true"].contains(&v.to_lowercase().as_str()));
        let token = env("HF_TOKEN").or_else(|| env("HUGGING_FACE_HUB_TOKEN")).or_else(|| {
            let file = env("HF_TOKEN_PATH").map(path).or_else(|| Some(hf.as_ref()?.join("token")))?;
            std::fs::read_to_string(file).ok().filter(|text| text.len() < 1024)
        });
        let token = token.map(|token| token.trim().to_owned()).filter(|token| !token.is_empty());
        let endpoint = env("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".into());
        Ok(Self {
            client: Client::new(&endpoint, token)?,
            cache,
            offline: offline || on("HF_HUB_OFFLINE") || on("TRANSFORMERS_OFFLINE"),
            notes: Vec::new(),
        })
    }

    /// What the user should know, such as that the hub could not be reached.
    pub fn take_notes(&mut self) -> Vec<String> {
        std::mem::take(&mut self.notes)
    }

    /// The directory of a model's or an adapter's files: configuration, safetensors, tokenizer.
    ///
    /// # Errors
    /// [`Error::Input`] where there is no such repository, or no safetensors in it, or access is refused, or it is not
    /// in the cache and the hub must not be asked; [`Error::Failed`] where the hub cannot be reached; [`Error::Io`].
    pub fn model(&mut self, name: &HubName, observer: Observer<'_>) -> Result<PathBuf> {
        Ok(self.files(name, &|files, read| files::of_model(name, files, read), observer)?.dir)
    }

    /// The directory of a model's `config.json`, without its weights.
    ///
    /// # Errors
    /// As [`Hub::model`].
    pub fn configuration(&mut self, name: &HubName, observer: Observer<'_>) -> Result<PathBuf> {
        Ok(self.files(name, &|files, _| files::configuration(name, files), observer)?.dir)
    }

    /// Fetches the card of a model, `README.md`, beside its files; a repository may have none.
    ///
    /// # Errors
    /// As [`Hub::model`].
    pub fn card(&mut self, name: &HubName, observer: Observer<'_>) -> Result<()> {
        self.files(name, &|files, _| Ok(files::card(files)), observer).map(drop)
    }

    /// The files of a set of data: those of a configuration and a split, by their names.
    ///
    /// # Errors
    /// As [`Hub::model`]; [`Error::Input`] where no file, or more than one configuration, fits.
    pub fn data(&mut self, name: &HubName, observer: Observer<'_>) -> Result<Vec<PathBuf>> {
        let found = self.files(name, &|files, _| data::choose(name, files), observer)?;
        Ok(found.files.iter().map(|file| found.dir.join(file)).collect())
    }

    /// The files of a set of security prompts: those of harmful and of benign prompts, by their names, else as
    /// [`Hub::data`].
    ///
    /// # Errors
    /// As [`Hub::data`].
    pub fn security(&mut self, name: &HubName, observer: Observer<'_>) -> Result<Vec<PathBuf>> {
        let found = self.files(name, &|files, _| data::choose_security(name, files), observer)?;
        Ok(found.files.iter().map(|file| found.dir.join(file)).collect())
    }

    /// Selected files of a repository. `select` is given the names of all files, and a function that reads a small one.
    fn files(&mut self, name: &HubName, select: &Select<'_>, observer: Observer<'_>) -> Result<HubFiles> {
        let repository = Repository::new(&self.cache, name);
        if self.offline {
            return self.cached(name, &repository, select, "--offline or HF_HUB_OFFLINE is set");
        }
        let info = match self.client.info(name) {
            Ok(info) => info,
            Err(Fault::Unreachable(why)) => {
                let why = format!("{} cannot be reached: {why}", self.client.endpoint());
                let found = self.cached(name, &repository, select, &why)?;
                self.notes.push(format!("{}: {why}; the copy in the cache is used", name.text()));
                return Ok(found);
            }
            Err(fault) => return Err(self.error(name, fault)),
        };
        let dir = repository.snapshot(&info.commit);
        let observer = RefCell::new(observer);
        let fetch = |file: &str| -> Result<PathBuf> {
            let path = dir.join(file);
            if !path.exists() {
                let mut observer = observer.borrow_mut();
                let fetched = self.client.download(name, &repository, &info.commit, file, &mut **observer);
                fetched.map_err(|fault| self.error(name, fault))?;
            }
            Ok(path)
        };
        let files = select(&info.files, &fetch)?;
        files.iter().try_for_each(|file| fetch(file).map(drop))?;
        repository.write_ref(name.revision(), &info.commit)?;
        Ok(HubFiles { dir, files })
    }

    /// Selected files of the cached copy; `why` the hub is not asked.
    fn cached(&self, name: &HubName, repository: &Repository, select: &Select<'_>, why: &str) -> Result<HubFiles> {
        let text = name.text();
        let missing = |what: String| {
            let expected = format!(
                "a copy in the cache {}: fetch it where there is a network (`hf download {}`, or swat without --offline), \
                 and copy the cache; or name a directory",
                self.cache.display(),
                name.repo()
            );
            if self.offline {
                Error::input(&text, format!("{what}; {why}"), expected)
            } else {
                Error::failed(
                    format!("{text}: no such path; {why}; {what}"),
                    format!("to work offline, have {expected}"),
                )
            }
        };
        let Some(dir) = repository.cached(name.revision())? else {
            return Err(missing("a name that is not in the cache".into()));
        };
        let files = cache::list(&dir)?;
        let read = |file: &str| {
            let path = dir.join(file);
            if path.exists() { Ok(path) } else { Err(missing(format!("the cached copy lacks `{file}`"))) }
        };
        let chosen = select(&files, &read).map_err(|e| match e {
            Error::Input { found, .. } => missing(format!("the cached copy has {found}")),
            other => other,
        })?;
        chosen.iter().try_for_each(|file| read(file).map(drop))?;
        Ok(HubFiles { dir, files: chosen })
    }

    fn error(&self, name: &HubName, fault: Fault) -> Error {
        let (text, endpoint) = (name.text(), self.client.endpoint());
        let page = format!("{endpoint}/{}", name.page());
        match fault {
            Fault::Refused(status) => Error::input(
                format!("{text} on {endpoint}"),
                format!("status {status}: it is private, gated or does not exist"),
                format!(
                    "a name that exists, or access: accept the terms at {page} and set HF_TOKEN (or `hf auth login`)"
                ),
            ),
            Fault::NoRepository => Error::input(
                format!("{text} on {endpoint}"),
                "no such repository, and no path of that name here",
                "a directory, or the name of a repository; a private one needs HF_TOKEN",
            ),
            Fault::NoRevision => Error::input(
                format!("{text} on {endpoint}"),
                format!("no revision `{}`", name.revision()),
                "a branch, a tag or a commit behind @",
            ),
            Fault::NoFile(file) => {
                Error::input(format!("{text} on {endpoint}"), format!("no file `{file}`"), "a file that it lists")
            }
            Fault::Unreachable(why) => Error::failed(
                format!("{text}: {endpoint} cannot be reached: {why}"),
                "run the same command again: it continues where the download ended. To work offline, name a directory or \
                 use a cache that holds the model (HF_HUB_CACHE, --offline)",
            ),
            Fault::Malformed(what) => Error::failed(
                format!("{text}: {endpoint} answers with {what}"),
                "check HF_ENDPOINT; a proxy may answer in its place",
            ),
            Fault::Disk(error) => error,
        }
    }
}

/// Chooses among the files of a repository; may have small ones fetched to read them.
type Select<'a> = dyn Fn(&[String], &dyn Fn(&str) -> Result<PathBuf>) -> Result<Vec<String>> + 'a;

/// The name of a repository that `path` is, unless there is such a path.
pub fn model_name(path: &Path) -> Option<HubName> {
    if path.exists() { None } else { HubName::model(path.to_str()?) }
}

/// The name of a set of data that `path` is, unless there is such a path.
pub fn data_name(path: &Path) -> Option<HubName> {
    if path.exists() { None } else { HubName::data(path.to_str()?) }
}
