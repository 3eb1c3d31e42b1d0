//! Stage cache: a stage runs again only if its inputs change. Of the processes that share a study one alone runs it.

use super::lease::{Lease, Leases};
use crate::error::{Error, FileOp, Result};
use crate::io::json;
use crate::model::Clock;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Directory of cached stages.
pub(in crate::secure) struct Stages {
    dir: PathBuf,
    /// Precision of weights and activations: an input of every stage, unless it is f32.
    float: &'static str,
    /// Date of the chat template, if it writes it: an input likewise.
    date: Option<Clock>,
    /// Hash of the chat template, by which every prompt is rendered.
    template: String,
    /// In a study that processes share.
    leases: Option<Leases>,
}

impl Stages {
    pub(in crate::secure) fn new(dir: &Path, float: &'static str, date: Option<Clock>, template: &str) -> Self {
        let template = hash_of(template.as_bytes());
        Self { dir: dir.to_owned(), float, date, template, leases: None }
    }

    /// Takes a stage only with its lease.
    pub(super) fn leased(self, leases: Leases) -> Self {
        Self { leases: Some(leases), ..self }
    }

    pub(super) fn leases(&self) -> Option<&Leases> {
        self.leases.as_ref()
    }

    /// Removes all leases, those that are being taken over too.
    pub(super) fn remove_leases(&self) {
        let is_lease = |path: &Path| path.file_name().is_some_and(|name| name.to_string_lossy().contains(".lease"));
        for dir in [self.dir.clone()].into_iter().chain(entries(&self.dir).filter(|path| path.is_dir())) {
            entries(&dir).filter(|path| is_lease(path)).for_each(|path| drop(std::fs::remove_file(path)));
        }
    }

    /// The result in `NAME.json` if it is of the same `inputs`, else the result of `work`, which is saved there;
    /// [`Error::InUse`] while another process works on it.
    pub(in crate::secure) fn run<T: Serialize + DeserializeOwned>(
        &self,
        name: &str,
        inputs: &Value,
        work: impl FnOnce() -> Result<T>,
    ) -> Result<T> {
        self.run_unless(name, inputs, |_| true, work)
    }

    /// [`Stages::run`], where a kept result counts only if it is `valid`: the files that it speaks of may be gone.
    pub(in crate::secure) fn run_unless<T: Serialize + DeserializeOwned>(
        &self,
        name: &str,
        inputs: &Value,
        valid: impl Fn(&T) -> bool,
        work: impl FnOnce() -> Result<T>,
    ) -> Result<T> {
        let path = self.dir.join(format!("{name}.json"));
        let mut inputs = inputs.clone();
        if let (Some(inputs), true) = (inputs.as_object_mut(), self.float != "f32") {
            inputs.insert("dtype".into(), self.float.into());
        }
        if let Some(inputs) = inputs.as_object_mut() {
            inputs.insert("template".into(), self.template.as_str().into());
            inputs.extend(self.date.map(|date| ("date".to_owned(), date.to_string().into())));
        }
        let hash = hash(&inputs);
        if let Some(kept) = read(&path, &hash).filter(&valid) {
            return Ok(kept);
        }
        let mut held = None;
        if let Some(leases) = &self.leases {
            let lease = self.dir.join(format!("{name}.lease"));
            held = Some(leases.take(&lease)?.ok_or(Error::InUse { path: lease })?);
            // Finished since it was looked at.
            if let Some(kept) = read(&path, &hash).filter(&valid) {
                return Ok(kept);
            }
        }
        let start = Instant::now();
        let result = work()?;
        // Of a process that stood still for so long that another has begun the stage, the other's result counts.
        held.as_ref().map_or(Ok(()), Lease::check)?;
        let value = json!({ "stage": name, "inputs_hash": hash, "inputs": inputs,
            "seconds": start.elapsed().as_secs_f64(), "result": result });
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent).map_err(Error::io(parent, FileOp::Create))?;
        }
        json::write(&path, &value)?;
        // As a later run reads it: a parser may round the last digit of a number, which must not change hashes.
        Ok(read(&path, &hash).unwrap_or(result))
    }
}

fn entries(dir: &Path) -> impl Iterator<Item = PathBuf> {
    std::fs::read_dir(dir).into_iter().flatten().filter_map(|entry| Some(entry.ok()?.path()))
}

/// Hash of a stage's inputs.
pub(in crate::secure) fn hash(inputs: &Value) -> String {
    hash_of(inputs.to_string().as_bytes())
}

fn hash_of(bytes: &[u8]) -> String {
    blake3::hash(bytes).to_hex()[..16].to_owned()
}

/// Hash of a file's bytes, for the inputs of a stage.
pub(in crate::secure) fn file_hash(path: &Path) -> Result<String> {
    let bytes = std::fs::read(path).map_err(Error::io(path, FileOp::Read))?;
    Ok(hash_of(&bytes))
}

/// A cached result; `None` if it is damaged or of other inputs.
fn read<T: DeserializeOwned>(path: &Path, hash: &str) -> Option<T> {
    let text = std::fs::read_to_string(path).ok()?;
    let mut value: Value = serde_json::from_str(&text).ok()?;
    if value["inputs_hash"] != *hash {
        return None;
    }
    serde_json::from_value(value["result"].take()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn leases_are_removed_and_results_stay() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("tune")).unwrap();
        let files = ["map.json", "map.lease", "tune/plain.json", "tune/plain.lease", "tune/swat.lease.0123abcd.dead"];
        files.iter().for_each(|name| std::fs::write(dir.path().join(name), "{}").unwrap());
        Stages::new(dir.path(), "f32", None, "").remove_leases();
        let left: Vec<&str> = files.into_iter().filter(|name| dir.path().join(name).exists()).collect();
        assert_eq!(left, ["map.json", "tune/plain.json"]);
    }

    #[test]
    fn a_stage_runs_once_for_the_same_inputs() {
        let dir = tempfile::tempdir().unwrap();
        let mut runs = 0;
        let mut run = |template: &str, inputs: &Value| {
            let stages = Stages::new(dir.path(), "f32", None, template);
            let work = || {
                runs += 1;
                Ok(runs)
            };
            stages.run::<u32>("a/b", inputs, work).unwrap()
        };
        assert_eq!(run("", &json!({"x": 1})), 1);
        assert_eq!(run("", &json!({"x": 1})), 1);
        assert_eq!(run("", &json!({"x": 2})), 2);
        std::fs::write(dir.path().join("a/b.json"), "{").unwrap();
        assert_eq!(run("", &json!({"x": 2})), 3);
        // The same file of a template, with other bytes.
        assert_eq!(run("{{ messages }}", &json!({"x": 2})), 4);
    }
}
