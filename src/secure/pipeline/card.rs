//! What a base model's card says.

use std::io::Read;
use std::path::Path;

/// Longest beginning of a card that is read, in bytes.
const CARD_BYTES: u64 = 64 << 10;
/// Longest name of a licence.
const LONGEST: usize = 64;

/// `license` in the metadata of the card (`README.md`) in a model's directory; none where there is no card or no plain
/// name in it.
pub fn license_of(dir: &Path) -> Option<String> {
    let mut text = Vec::new();
    std::fs::File::open(dir.join("README.md")).ok()?.take(CARD_BYTES).read_to_end(&mut text).ok()?;
    license(&String::from_utf8_lossy(&text))
}

/// The value of `license:` in the block between the first two lines of `---`.
fn license(card: &str) -> Option<String> {
    let block = card.trim_start_matches('\u{feff}').strip_prefix("---")?;
    let lines = block.lines().skip(1).take_while(|line| line.trim_end() != "---");
    let value = lines.into_iter().find_map(|line| line.strip_prefix("license:"))?.trim().trim_matches(['"', '\'']);
    let plain = |c: char| c.is_ascii_alphanumeric() || "-._+ ".contains(c);
    (!value.is_empty() && value.len() <= LONGEST && value.chars().all(plain)).then(|| value.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_licence_of_a_card() {
        let card = "---\nlanguage: en\nlicense: apache-2.0\ntags:\n- x\n---\n# Name\nlicense: mit\n";
        assert_eq!(license(card).as_deref(), Some("apache-2.0"));
        assert_eq!(license("---\r\nlicense: \"llama3.2\"\r\n---\r\n").as_deref(), Some("llama3.2"));
        for card in [
            "",
            "license: mit\n",
            "---\n---\nlicense: mit\n",
            "---\nlicense:\n- mit\n---",
            "---\nlicense: a\u{202e}b\n---\n",
        ] {
            assert_eq!(license(card), None, "{card}");
        }
    }
}
