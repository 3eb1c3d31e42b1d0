//! What a base model's card says.

use crate::io::json;
use serde_json::Value;
use std::io::Read;
use std::path::Path;

/// Longest beginning of a card that is read, in bytes.
const CARD_BYTES: u64 = 64 << 10;
/// Longest name of a licence.
const LONGEST: usize = 64;

/// `license` in the metadata of the card (`README.md`) in a model's directory, else `license` in its `config.json`; none where
/// neither has a plain name.
pub fn license_of(dir: &Path) -> Option<String> {
    let card = || {
        let mut text = Vec::new();
        std::fs::File::open(dir.join("README.md")).ok()?.take(CARD_BYTES).read_to_end(&mut text).ok()?;
        license(&String::from_utf8_lossy(&text))
    };
    let config = || {
        let config: Value = json::read(&dir.join("config.json"), CARD_BYTES, "JSON").ok()?;
        plain(config["license"].as_str()?)
    };
    card().or_else(config)
}

/// The value of `license:` in the block between the first two lines of `---`, or the first of a list.
fn license(card: &str) -> Option<String> {
    let block = card.trim_start_matches('\u{feff}').strip_prefix("---")?;
    let mut lines = block.lines().skip(1).take_while(|line| line.trim_end() != "---");
    let value = lines.find_map(|line| line.strip_prefix("license:"))?.trim();
    if !value.is_empty() {
        return plain(value);
    }
    plain(lines.next()?.trim_start().strip_prefix("- ")?)
}

/// The name, without quotes, if it is a plain one.
fn plain(value: &str) -> Option<String> {
    let value = value.trim().trim_matches(['"', '\'']);
    let valid = |c: char| c.is_ascii_alphanumeric() || "-._+ ".contains(c);
    (!value.is_empty() && value.len() <= LONGEST && value.chars().all(valid)).then(|| value.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_configuration_may_state_the_licence() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
        assert_eq!(license_of(dir.path()), None);
        write("config.json", "{\"license\": \"mit\"}");
        assert_eq!(license_of(dir.path()).as_deref(), Some("mit"));
        write("README.md", "---\nlicense: apache-2.0\n---\n");
        assert_eq!(license_of(dir.path()).as_deref(), Some("apache-2.0"));
    }

    #[test]
    fn the_licence_of_a_card() {
        let card = "---\nlanguage: en\nlicense: apache-2.0\ntags:\n- x\n---\n# Name\nlicense: mit\n";
        assert_eq!(license(card).as_deref(), Some("apache-2.0"));
        assert_eq!(license("---\r\nlicense: \"llama3.2\"\r\n---\r\n").as_deref(), Some("llama3.2"));
        assert_eq!(license("---\nlicense:\n- mit\n- other\n---").as_deref(), Some("mit"));
        for card in [
            "",
            "license: mit\n",
            "---\n---\nlicense: mit\n",
            "---\nlicense:\ntags:\n- mit\n---",
            "---\nlicense: a\u{202e}b\n---\n",
        ] {
            assert_eq!(license(card), None, "{card}");
        }
    }
}
