//! Scores of a judge that are kept between runs: JSON lines of a hash and a score, without any prompt or answer.

use crate::error::{Error, FileOp, Result};
use crate::io::input::read_text;
use serde_json::{Value, json};
use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

/// Largest file that is read: millions of scores.
const MAX_BYTES: u64 = 1 << 28;
const KEY: &str = "judged";

/// The scores of a file, to which new ones are added.
#[derive(Debug)]
pub(super) struct JudgeCache {
    scores: Mutex<(HashMap<String, f64>, File)>,
}

impl JudgeCache {
    /// Opens a file, which is made if it is missing. A line that was cut off when a run ended is skipped.
    pub(super) fn open(path: &Path) -> Result<Self> {
        let text = if path.exists() { read_text(path, MAX_BYTES)? } else { String::new() };
        if !text.is_empty() && !text.starts_with(&format!("{{\"{KEY}\":")) {
            let expected = "a new file, or one that --judge-cache wrote";
            return Err(Error::input(path.display().to_string(), "no scores of a judge", expected));
        }
        let entry = |line: &str| {
            let value: Value = serde_json::from_str(line).ok()?;
            Some((value[KEY].as_str()?.to_owned(), value["score"].as_f64()?))
        };
        let scores = text.lines().filter_map(entry).collect();
        let file = OpenOptions::new().append(true).create(true).open(path);
        let mut file = file.map_err(Error::io(path, FileOp::Open))?;
        if !text.is_empty() && !text.ends_with('\n') {
            file.write_all(b"\n").map_err(Error::io(path, FileOp::Write))?;
        }
        Ok(Self { scores: Mutex::new((scores, file)) })
    }

    /// Key of a request.
    pub(super) fn key(request: &Value) -> String {
        blake3::hash(request.to_string().as_bytes()).to_hex()[..32].to_owned()
    }

    pub(super) fn get(&self, key: &str) -> Option<f64> {
        self.scores.lock().unwrap_or_else(PoisonError::into_inner).0.get(key).copied()
    }

    /// Keeps a score; one that cannot be written is lost with the run, and nothing else.
    pub(super) fn put(&self, key: String, score: f64) {
        let mut scores = self.scores.lock().unwrap_or_else(PoisonError::into_inner);
        let line = json!({ KEY: key, "score": score }).to_string() + "\n";
        let _ = scores.1.write_all(line.as_bytes());
        scores.0.insert(key, score);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scores_survive_and_foreign_files_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("judged.jsonl");
        let (one, two) = (JudgeCache::key(&json!([1])), JudgeCache::key(&json!([2])));
        let cache = JudgeCache::open(&path).unwrap();
        assert_eq!(cache.get(&one), None);
        cache.put(one.clone(), 4.0);
        drop(cache);
        // A run that was killed while it wrote.
        let whole = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, format!("{whole}{{\"judged\":\"ab")).unwrap();
        let cache = JudgeCache::open(&path).unwrap();
        assert_eq!((cache.get(&one), cache.get(&two)), (Some(4.0), None));
        cache.put(two.clone(), 0.5);
        drop(cache);
        let cache = JudgeCache::open(&path).unwrap();
        assert_eq!((cache.get(&one), cache.get(&two)), (Some(4.0), Some(0.5)));
        let foreign = dir.path().join("mine.jsonl");
        std::fs::write(&foreign, "{\"prompt\": \"a\"}\n").unwrap();
        assert!(JudgeCache::open(&foreign).unwrap_err().to_string().contains("mine.jsonl"));
        assert_eq!(std::fs::read_to_string(&foreign).unwrap(), "{\"prompt\": \"a\"}\n");
    }
}
