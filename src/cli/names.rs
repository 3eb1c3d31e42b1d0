//! Models and data by name on the Hugging Face hub, made paths before a command runs.

use super::common::{Common, say};
use super::progress::Bars;
use crate::error::{Error, Result};
use crate::hub::{Hub, HubName, data_name, model_name};
use std::path::{Path, PathBuf};

/// Makes paths of names, downloading what is not in the cache.
pub(super) struct Names<'a> {
    common: &'a Common,
    hub: Option<Hub>,
}

impl<'a> Names<'a> {
    pub(super) fn new(common: &'a Common) -> Self {
        Self { common, hub: None }
    }

    /// Replaces `org/name[@revision]` by the directory of its files; returns the name, if it was one. What exists as a
    /// path is left as it is.
    pub(super) fn model(&mut self, path: &mut PathBuf) -> Result<Option<HubName>> {
        check_path(path)?;
        let Some(name) = model_name(path) else { return Ok(None) };
        *path = self.with_hub(|hub, bars| hub.model(&name, &mut bars.observer()))?;
        Ok(Some(name))
    }

    /// Fetches the card of a model beside its files. Where that fails the licence stays unknown, and nothing else.
    pub(super) fn card(&mut self, name: &HubName) {
        let _ = self.with_hub(|hub, bars| hub.card(name, &mut bars.observer()));
    }

    /// As [`Names::model`], for a command that reads `config.json` alone.
    pub(super) fn configuration(&mut self, path: &mut PathBuf) -> Result<()> {
        check_path(path)?;
        let Some(name) = model_name(path) else { return Ok(()) };
        *path = self.with_hub(|hub, bars| hub.configuration(&name, &mut bars.observer()))?;
        Ok(())
    }

    /// Replaces each `org/name[/config][@revision][:split]` by its files.
    pub(super) fn data(&mut self, paths: &mut Vec<PathBuf>) -> Result<()> {
        self.files(paths, |hub, name, bars| hub.data(name, &mut bars.observer()))
    }

    /// As [`Names::data`], for sets of security prompts: files of harmful and of benign prompts are taken together.
    pub(super) fn security(&mut self, paths: &mut Vec<PathBuf>) -> Result<()> {
        self.files(paths, |hub, name, bars| hub.security(name, &mut bars.observer()))
    }

    fn files(
        &mut self,
        paths: &mut Vec<PathBuf>,
        fetch: impl Fn(&mut Hub, &HubName, &mut Bars) -> Result<Vec<PathBuf>>,
    ) -> Result<()> {
        let mut found = Vec::new();
        for path in std::mem::take(paths) {
            check_path(&path)?;
            match data_name(&path) {
                None => found.push(path),
                Some(name) => found.extend(self.with_hub(|hub, bars| fetch(hub, &name, bars))?),
            }
        }
        *paths = found;
        Ok(())
    }

    /// As [`Names::data`], for an option that takes one file.
    pub(super) fn file(&mut self, option: &str, path: &mut PathBuf) -> Result<()> {
        let name = path.display().to_string();
        let mut files = vec![path.clone()];
        self.data(&mut files)?;
        match <[PathBuf; 1]>::try_from(files) {
            Ok([file]) => *path = file,
            Err(several) => {
                let found = format!("{} files of {name}", several.len());
                return Err(Error::input(option, found, "one: name a split of one file, such as org/name:test"));
            }
        }
        Ok(())
    }

    /// As [`Names::file`], for an option that may be absent.
    pub(super) fn file_if_any(&mut self, option: &str, path: &mut Option<PathBuf>) -> Result<()> {
        path.iter_mut().try_for_each(|path| self.file(option, path))
    }

    fn with_hub<T>(&mut self, get: impl FnOnce(&mut Hub, &mut Bars) -> Result<T>) -> Result<T> {
        let hub = match &mut self.hub {
            Some(hub) => hub,
            none => none.insert(Hub::from_env(self.common.offline)?),
        };
        let mut bars = Bars::new(self.common);
        let found = get(hub, &mut bars);
        bars.finish();
        for note in hub.take_notes().into_iter().filter(|_| !self.common.quiet) {
            say(&format!("note: {note}\n"));
        }
        found
    }
}

/// Refuses what is neither a path nor a name, though it often is meant as one.
fn check_path(path: &Path) -> Result<()> {
    let text = path.display().to_string();
    if let Some((scheme, address)) = text.split_once("://").filter(|_| !path.exists()) {
        let page = address.strip_prefix("huggingface.co/").or_else(|| address.strip_prefix("hf.co/"));
        let page = page.or(Some(address).filter(|_| scheme == "hf"));
        let page = page.map(|page| page.strip_prefix("datasets/").unwrap_or(page));
        let parts: Vec<&str> = page.unwrap_or_default().split('/').filter(|part| !part.is_empty()).collect();
        let expected = match parts.as_slice() {
            [org, name, ..] => format!("the name on the hub: {org}/{name}"),
            _ => "a path of this machine, or a name on the hub: org/name".to_owned(),
        };
        return Err(Error::input(text, "an address", expected));
    }
    if text.contains('*') && !path.exists() {
        let expected = "names of files: a shell puts them in the place of * outside of quotes";
        return Err(Error::input(text, "a pattern", expected));
    }
    if text.starts_with("~/") && !path.exists() {
        let expected = "$HOME in its place: a shell expands ~ at the beginning of a word alone, not behind `=`";
        return Err(Error::input(text, "a path that begins with ~", expected));
    }
    Ok(())
}
