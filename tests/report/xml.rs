//! A checker of the subset of XML that drawings use.

use std::collections::HashSet;

/// Checks that a text is well-formed XML of that subset; returns the names of its elements.
pub fn check_xml(text: &str) -> Result<Vec<String>, String> {
    let mut open: Vec<String> = Vec::new();
    let mut names = Vec::new();
    let check_text = |text: &str| -> Result<(), String> {
        if let Some(c) = text.chars().find(|c| c.is_control() && !matches!(c, '\n' | '\t')) {
            return Err(format!("control character {c:?}"));
        }
        for part in text.split('&').skip(1) {
            let entity = part.split_once(';').map(|(name, _)| name);
            if !matches!(entity, Some("amp" | "lt" | "gt" | "quot" | "#39")) {
                return Err(format!("a bare & before {part:.20?}"));
            }
        }
        Ok(())
    };
    let mut rest = text;
    while let Some((before, after)) = rest.split_once('<') {
        check_text(before)?;
        let (tag, after) = after.split_once('>').ok_or("a tag without end")?;
        rest = after;
        if let Some(name) = tag.strip_prefix('/') {
            let opened = open.pop();
            if opened.as_deref() != Some(name) {
                return Err(format!("</{name}> closes {opened:?}"));
            }
            continue;
        }
        let (tag, closed) = tag.strip_suffix('/').map_or((tag, false), |t| (t, true));
        let (name, mut attributes) = tag.split_once(char::is_whitespace).unwrap_or((tag, ""));
        if name.is_empty() || !name.chars().all(|c| c.is_ascii_alphanumeric()) {
            return Err(format!("a tag named {name:?}"));
        }
        let mut seen = HashSet::new();
        while !attributes.trim().is_empty() {
            let (key, value) = attributes.trim_start().split_once("=\"").ok_or(format!("attributes {attributes:?}"))?;
            let (value, next) = value.split_once('"').ok_or("an attribute without end")?;
            if !key.chars().all(|c| c.is_ascii_alphanumeric() || c == '-') || !seen.insert(key) {
                return Err(format!("attribute {key:?} of {name}"));
            }
            check_text(value)?;
            if ["NaN", "inf"].iter().any(|bad| value.contains(bad)) {
                return Err(format!("{key}={value:?}"));
            }
            attributes = next;
        }
        names.push(name.to_owned());
        if !closed {
            open.push(name.to_owned());
        }
    }
    check_text(rest)?;
    if open.is_empty() && rest.trim().is_empty() { Ok(names) } else { Err(format!("left open: {open:?}")) }
}
