//! The filter `tojson` as Python's `json.dumps`.

use super::refused;
use minijinja::value::{Kwargs, Value};
use std::fmt::Write as _;

/// Maximum indentation of `tojson`, in columns.
const MAX_INDENT: usize = 64;

/// `json.dumps(value, ensure_ascii=False, indent, separators, sort_keys)`; unlike Jinja's own filter it does not escape
/// HTML.
pub(super) fn to_json(value: Value, keywords: Kwargs) -> Result<Value, minijinja::Error> {
    let indent: Option<usize> = keywords.get("indent")?;
    let ascii: Option<bool> = keywords.get("ensure_ascii")?;
    let sort_keys: Option<bool> = keywords.get("sort_keys")?;
    let separators: Option<Vec<String>> = keywords.get("separators")?;
    keywords.assert_all_used()?;
    if value.is_undefined() {
        return Err(refused("tojson of an undefined value"));
    }
    if indent.is_some_and(|width| width > MAX_INDENT) {
        return Err(refused(format!("tojson with an indent above {MAX_INDENT}")));
    }
    let value = serde_json::to_value(&value).map_err(|e| refused(e.to_string()))?;
    let (item, key) = match separators.as_deref() {
        Some([item, key]) => (item.clone(), key.clone()),
        Some(_) => return Err(refused("tojson with other than two separators")),
        None => ((if indent.is_some() { "," } else { ", " }).to_owned(), ": ".to_owned()),
    };
    let style = JsonStyle { indent, ascii: ascii.unwrap_or(false), sort_keys: sort_keys.unwrap_or(false), item, key };
    let mut text = String::new();
    style.write(&value, 0, &mut text);
    Ok(Value::from_safe_string(text))
}

/// Options of Python's `json.dumps`.
struct JsonStyle {
    indent: Option<usize>,
    ascii: bool,
    sort_keys: bool,
    item: String,
    key: String,
}

impl JsonStyle {
    fn write(&self, value: &serde_json::Value, depth: usize, out: &mut String) {
        match value {
            serde_json::Value::String(text) => self.write_text(text, out),
            serde_json::Value::Array(list) if !list.is_empty() => {
                out.push('[');
                for (i, value) in list.iter().enumerate() {
                    self.separate(i, depth + 1, out);
                    self.write(value, depth + 1, out);
                }
                self.new_line(depth, out);
                out.push(']');
            }
            serde_json::Value::Object(map) if !map.is_empty() => {
                let mut entries: Vec<_> = map.iter().collect();
                if self.sort_keys {
                    entries.sort_by_key(|(name, _)| *name);
                }
                out.push('{');
                for (i, (name, value)) in entries.into_iter().enumerate() {
                    self.separate(i, depth + 1, out);
                    self.write_text(name, out);
                    out.push_str(&self.key);
                    self.write(value, depth + 1, out);
                }
                self.new_line(depth, out);
                out.push('}');
            }
            serde_json::Value::Number(x) if x.is_f64() => {
                out.push_str(&x.as_f64().map_or_else(|| x.to_string(), super::python::float_text));
            }
            other => out.push_str(&other.to_string()),
        }
    }

    fn separate(&self, i: usize, depth: usize, out: &mut String) {
        if i > 0 {
            out.push_str(&self.item);
        }
        self.new_line(depth, out);
    }

    fn new_line(&self, depth: usize, out: &mut String) {
        if let Some(width) = self.indent {
            out.push('\n');
            out.push_str(&" ".repeat(width * depth));
        }
    }

    fn write_text(&self, text: &str, out: &mut String) {
        let quoted = serde_json::Value::from(text).to_string();
        if !self.ascii {
            // Like Python, serde_json does not escape DEL.
            return out.push_str(&quoted);
        }
        let mut units = [0; 2];
        for c in quoted.chars() {
            if c.is_ascii() {
                out.push(c);
            } else {
                for unit in c.encode_utf16(&mut units) {
                    let _ = write!(out, "\\u{unit:04x}");
                }
            }
        }
    }
}
