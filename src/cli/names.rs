//! Models and data by name on the Hugging Face hub, made paths before a command runs.

use super::common::{Common, say};
use super::progress::Bars;
use crate::error::Result;
use crate::hub::{Hub, HubName, data_name, model_name};
use std::path::PathBuf;

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
        let Some(name) = model_name(path) else { return Ok(None) };
        *path = self.with_hub(|hub, bars| hub.model(&name, &mut bars.observer()))?;
        Ok(Some(name))
    }

    /// As [`Names::model`], for a command that reads `config.json` alone.
    pub(super) fn configuration(&mut self, path: &mut PathBuf) -> Result<()> {
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
            match data_name(&path) {
                None => found.push(path),
                Some(name) => found.extend(self.with_hub(|hub, bars| fetch(hub, &name, bars))?),
            }
        }
        *paths = found;
        Ok(())
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
