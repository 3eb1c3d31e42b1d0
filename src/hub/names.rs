//! Names on the hub.

use super::HubKind;

/// Longest part of a name, by the hub's rule.
const MAX_PART: usize = 96;
/// Ends of names that are files, and no repositories.
const FILES: [&str; 12] =
    [".jsonl", ".json", ".csv", ".tsv", ".parquet", ".gz", ".zst", ".txt", ".toml", ".safetensors", ".gguf", ".bin"];

/// A repository on the hub: `org/name@revision`, and for data `org/name/config@revision:split`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HubName {
    kind: HubKind,
    repo: String,
    revision: Option<String>,
    config: Option<String>,
    split: Option<String>,
}

impl HubName {
    /// Parses `org/name[@revision]`, also with the slash that completion adds; `None` for what is no such name.
    pub fn model(text: &str) -> Option<Self> {
        let (path, revision) = revised(text.strip_suffix('/').unwrap_or(text))?;
        let repo = repository(path).filter(|repo| repo.len() == path.len())?.to_owned();
        Some(Self { kind: HubKind::Model, repo, revision, config: None, split: None })
    }

    /// Parses `org/name[/config][@revision][:split]`; `None` for what is no such name.
    pub fn data(text: &str) -> Option<Self> {
        let (text, split) = match text.split_once(':') {
            Some((text, split)) => (text, Some(split).filter(|split| is_part(split))?.to_owned().into()),
            None => (text, None),
        };
        let (path, revision) = revised(text)?;
        let repo = repository(path)?;
        let config = match path[repo.len()..].strip_prefix('/') {
            Some(config) => Some(config).filter(|config| is_part(config))?.to_owned().into(),
            None => None,
        };
        Some(Self { kind: HubKind::Dataset, repo: repo.to_owned(), revision, config, split })
    }

    /// Kind of the repository.
    pub fn kind(&self) -> HubKind {
        self.kind
    }

    /// `org/name`.
    pub fn repo(&self) -> &str {
        &self.repo
    }

    /// Branch, tag or commit: `main` if not given.
    pub fn revision(&self) -> &str {
        self.revision.as_deref().unwrap_or("main")
    }

    /// Branch, tag or commit, if given.
    pub fn given_revision(&self) -> Option<&str> {
        self.revision.as_deref()
    }

    /// Configuration of a set of data.
    pub(super) fn config(&self) -> Option<&str> {
        self.config.as_deref()
    }

    /// Split of a set of data.
    pub(super) fn split(&self) -> Option<&str> {
        self.split.as_deref()
    }

    /// The name as it is written.
    pub fn text(&self) -> String {
        let part =
            |mark: &str, part: &Option<String>| part.as_ref().map(|part| format!("{mark}{part}")).unwrap_or_default();
        let (config, revision) = (part("/", &self.config), part("@", &self.revision));
        format!("{}{config}{revision}{}", self.repo, part(":", &self.split))
    }

    /// Path of its page below the endpoint, and of its files.
    pub(super) fn page(&self) -> String {
        match self.kind {
            HubKind::Model => self.repo.clone(),
            HubKind::Dataset => format!("datasets/{}", self.repo),
        }
    }

    /// `models` or `datasets`: in the interface and in the cache.
    pub(super) fn plural(&self) -> &'static str {
        match self.kind {
            HubKind::Model => "models",
            HubKind::Dataset => "datasets",
        }
    }
}

/// Splits at `@`.
fn revised(text: &str) -> Option<(&str, Option<String>)> {
    match text.split_once('@') {
        None => Some((text, None)),
        Some((path, revision)) => {
            let valid = revision.len() <= 255 && revision.split('/').all(is_part);
            valid.then(|| (path, Some(revision.to_owned())))
        }
    }
}

/// `org/name` at the beginning of a path of parts.
fn repository(path: &str) -> Option<&str> {
    if FILES.iter().any(|end| path.to_lowercase().ends_with(end)) {
        return None;
    }
    let mut parts = path.splitn(3, '/');
    let (org, name) = (parts.next()?, parts.next()?);
    (is_part(org) && is_part(name)).then(|| &path[..org.len() + 1 + name.len()])
}

/// Whether this can be a part of a name: it is safe as the name of a file, too.
pub(super) fn is_part(text: &str) -> bool {
    let known = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    !text.is_empty()
        && text.len() <= MAX_PART
        && text.chars().all(known)
        && !text.starts_with(['.', '-'])
        && !text.contains("..")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_paths_are_told_apart() {
        let name = HubName::model("Qwen/Qwen3-0.6B@refs/pr/1").unwrap();
        assert_eq!((name.repo(), name.revision()), ("Qwen/Qwen3-0.6B", "refs/pr/1"));
        assert_eq!(HubName::model("org/name").unwrap().revision(), "main");
        assert_eq!(HubName::model("org/name/"), HubName::model("org/name"));
        let data = HubName::data("openai/gsm8k/main@v2:test").unwrap();
        assert_eq!(
            (data.repo(), data.config(), data.revision(), data.split()),
            ("openai/gsm8k", Some("main"), "v2", Some("test"))
        );
        assert_eq!(data.text(), "openai/gsm8k/main@v2:test");
        for text in [
            "/org/name",
            "./org/name",
            "../name",
            "name",
            "org/name/more",
            "org/",
            "org//",
            "/name",
            "org//name",
            "~/name",
            "org/name@",
            "org/na me",
            "org/..",
            "org/name@../x",
            "org/name@a/../b",
            "C:\\a\\b",
            "org/model.gguf",
            "",
        ] {
            assert_eq!(HubName::model(text), None, "{text}");
        }
        for text in ["data/train.jsonl", "data/x.jsonl.gz", "a/b/c/d", "a/b:", "a/b:../c", "a/b/:x"] {
            assert_eq!(HubName::data(text), None, "{text}");
        }
    }
}
