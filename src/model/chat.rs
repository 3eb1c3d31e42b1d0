//! Chat templates: Jinja as transformers runs it.

mod prepare;

use crate::error::{Error, Result};
use crate::io::input::{guarded, printable};
use minijinja::value::{Kwargs, Value, ValueKind};
use minijinja::{Environment, ErrorKind, Output, State, UndefinedBehavior, context};
use prepare::{COUNTED, KEPT, prepare};
use std::cell::Cell;
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io;

/// Instructions that one rendering may take: 100 times a long conversation, and under a second.
const FUEL: u64 = 5_000_000;
/// The longest text that a template may render.
const MOST_OUTPUT_BYTES: usize = 1 << 25;
/// The bytes that one rendering may keep in variables and write, captured blocks included.
const MOST_KEPT_BYTES: usize = 4 * MOST_OUTPUT_BYTES;
/// How deeply lists and objects may nest in what a namespace holds.
const MOST_DEPTH: usize = 32;
/// Nested calls of macros recurse on the stack: this holds the engine's limit of them many times over.
const STACK_BYTES: usize = 1 << 26;
/// The longest template; published ones have up to 30 kB.
const MOST_SOURCE_BYTES: usize = 1 << 20;
/// The widest indentation that a template may ask for.
const MOST_INDENT: usize = 64;
const NAME: &str = "chat_template";

/// One turn.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Message {
    /// `system`, `user`, `assistant`.
    pub role: String,
    /// Text.
    pub content: String,
}

/// A model's chat template.
///
/// Templates see what transformers gives them: `messages`, `add_generation_prompt`, the special tokens, `tools` and
/// `documents` (none), `raise_exception`, `strftime_now` (in UTC), `tojson` as Python's `json.dumps`, the string methods
/// of Python, `break` and `continue`, and `{% generation %}` blocks.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    place: String,
    special: BTreeMap<String, String>,
}

impl ChatTemplate {
    /// Compiles a template; `place` names its file in errors, `special` are `bos_token` and its like.
    ///
    /// # Errors
    /// [`Error::Input`] gives the line that does not compile.
    pub fn new(source: &str, place: &str, special: BTreeMap<String, String>) -> Result<Self> {
        let mut environment = Environment::new();
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment.set_undefined_behavior(UndefinedBehavior::Lenient);
        environment.set_fuel(Some(FUEL));
        environment.set_formatter(format_value);
        environment.set_unknown_method_callback(method);
        environment.add_filter("tojson", to_json);
        environment.add_filter("indent", indent);
        environment.add_filter("join", |value: Value, joiner: Option<&str>| join(&value, joiner.unwrap_or_default()));
        environment.add_filter("replace", replace);
        // Their sizes are not bounded, and no published template uses them.
        for filter in ["center", "format", "batch", "slice", "pprint", "chain", "zip"] {
            environment.remove_filter(filter);
        }
        environment.add_function("raise_exception", |message: String| -> Result<Value, minijinja::Error> {
            Err(refused(message))
        });
        environment.add_function("strftime_now", |format: String| {
            let now = jiff::Timestamp::now().to_zoned(jiff::tz::TimeZone::UTC);
            jiff::fmt::strtime::format(&format, &now).map_err(|e| refused(e.to_string()))
        });
        environment.add_function(COUNTED, |value: Value| count(&value).map(|()| value));
        environment.add_function(KEPT, |value: Value| keep(value, 0));
        let too_long = source.len() > MOST_SOURCE_BYTES;
        let Some(source) = prepare(source).filter(|_| !too_long) else {
            let found = if too_long { "a template that is too long" } else { "a name that this program reserves" };
            let expected = format!("at most {MOST_SOURCE_BYTES} bytes, neither `{COUNTED}` nor `{KEPT}`");
            return Err(Error::input(place, found, expected));
        };
        guarded(place, "template parser", || environment.add_template_owned(NAME, source))?
            .map_err(|e| Error::input(place, reason(&e), "a chat template in Jinja"))?;
        Ok(Self { environment, place: place.to_owned(), special })
    }

    /// The text that the model sees. `generation_prompt` ends it with the assistant's header.
    ///
    /// A template that fails, loops, recurses or writes without end is an [`Error::Input`] that gives line and reason.
    ///
    /// # Errors
    /// [`Error::Input`], as said above.
    pub fn render(&self, messages: &[Message], generation_prompt: bool) -> Result<String> {
        let context = context! {
            messages,
            add_generation_prompt => generation_prompt,
            tools => Value::from(()),
            documents => Value::from(()),
            ..Value::from_serialize(&self.special)
        };
        let mut text = Bounded { bytes: Vec::new() };
        let run = || {
            guarded(&self.place, "template engine", || {
                let template = self.environment.get_template(NAME)?;
                template.render_captured_to(context, &mut text).map(|_| ())
            })
        };
        // A thread of its own has a known stack, and fresh counters.
        let rendered = std::thread::scope(|scope| {
            let thread = std::thread::Builder::new().stack_size(STACK_BYTES).spawn_scoped(scope, run);
            let thread =
                thread.map_err(|e| Error::failed(format!("cannot start a thread ({e})"), "free some memory"))?;
            thread.join().map_err(|_| Error::failed("a chat template's thread panicked", "report this"))?
        })?;
        rendered.map_err(|e| Error::input(&self.place, reason(&e), "a template that renders these messages"))?;
        String::from_utf8(text.bytes)
            .map_err(|e| Error::input(&self.place, e.to_string(), "a template that renders text"))
    }
}

/// Line and cause of a template's error, in one line.
fn reason(error: &minijinja::Error) -> String {
    let mut text = match (error.kind(), error.detail()) {
        (ErrorKind::OutOfFuel, _) => "a template that does not come to an end".to_owned(),
        (ErrorKind::WriteFailure, _) => format!("a template that writes more than {MOST_OUTPUT_BYTES} bytes"),
        (kind, Some(detail)) => format!("{kind}: {detail}"),
        (kind, None) => kind.to_string(),
    };
    if let Some(line) = error.line() {
        let _ = write!(text, " (line {line})");
    }
    printable(&text)
}

/// A writer that refuses to grow past [`MOST_OUTPUT_BYTES`].
struct Bounded {
    bytes: Vec<u8>,
}

impl io::Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.bytes.len() + bytes.len() > MOST_OUTPUT_BYTES {
            return Err(io::Error::other("too much output"));
        }
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

thread_local! {
    /// Bytes that this thread's rendering has kept and written.
    static KEPT_BYTES: Cell<usize> = const { Cell::new(0) };
}

/// Adds the length of a string to what the rendering has used.
fn count(value: &Value) -> Result<(), minijinja::Error> {
    let total = KEPT_BYTES.get().saturating_add(value.as_str().map_or(8, str::len));
    KEPT_BYTES.set(total);
    if total > MOST_KEPT_BYTES {
        return Err(refused(format!("a template that keeps more than {MOST_KEPT_BYTES} bytes")));
    }
    Ok(())
}

/// What a namespace may hold: strings, numbers, and lists and objects of them. Iterators become lists.
fn keep(value: Value, depth: usize) -> Result<Value, minijinja::Error> {
    count(&value)?;
    if depth > MOST_DEPTH {
        return Err(refused(format!("a namespace that holds lists nested more than {MOST_DEPTH} deep")));
    }
    match value.kind() {
        ValueKind::Seq => value.try_iter()?.try_for_each(|item| keep(item, depth + 1).map(|_| ()))?,
        ValueKind::Iterable => {
            let items: Result<Vec<Value>, _> = value.try_iter()?.map(|item| keep(item, depth + 1)).collect();
            return items.map(Value::from);
        }
        ValueKind::Map if is_namespace(&value) => return Err(refused("a namespace that holds a namespace")),
        ValueKind::Map => {
            for key in value.try_iter()? {
                keep(value.get_item(&key)?, depth + 1)?;
                keep(key, depth + 1)?;
            }
        }
        ValueKind::Plain => return Err(refused("a namespace that holds a macro, a function or a loop")),
        _ => {}
    }
    Ok(value)
}

fn is_namespace(value: &Value) -> bool {
    let type_name = |value: &Value| value.as_object().map(|object| object.type_name());
    minijinja::functions::namespace(None).is_ok_and(|namespace| type_name(&namespace) == type_name(value))
}

/// Prints as Python does: `True`, `False`, `None`.
fn format_value(out: &mut Output<'_>, state: &State<'_, '_>, value: &Value) -> Result<(), minijinja::Error> {
    count(value)?;
    match value.kind() {
        ValueKind::Bool => Ok(out.write_str(if value.is_true() { "True" } else { "False" })?),
        ValueKind::None => Ok(out.write_str("None")?),
        _ => minijinja::escape_formatter(out, state, value),
    }
}

/// Python's methods of strings, lists and dictionaries; those that could write without end are bounded.
fn method(state: &State<'_, '_>, value: &Value, name: &str, arguments: &[Value]) -> Result<Value, minijinja::Error> {
    if let Some(text) = value.as_str() {
        match (name, arguments) {
            // Counting what is everywhere would not end.
            ("count", [what]) if what.as_str() == Some("") => return Ok(Value::from(text.chars().count() + 1)),
            ("replace", [old, new]) => {
                if let (Some(old), Some(new)) = (old.as_str(), new.as_str()) {
                    return replace(text, old, new).map(Value::from);
                }
            }
            ("join", [list]) => return join(list, text).map(Value::from),
            // A field's width is not bounded.
            ("format", _) if text.contains(':') => return Err(refused("format() with a format specification")),
            _ => {}
        }
    }
    minijinja_contrib::pycompat::unknown_method_callback(state, value, name, arguments)
}

fn refused(why: impl Into<String>) -> minijinja::Error {
    minijinja::Error::new(ErrorKind::InvalidOperation, why.into())
}

fn replace(text: &str, old: &str, new: &str) -> Result<String, minijinja::Error> {
    let matches = text.matches(old).count();
    if matches.saturating_mul(new.len()) > MOST_OUTPUT_BYTES {
        return Err(refused("replace() makes too long a string"));
    }
    Ok(text.replace(old, new))
}

fn join(list: &Value, joiner: &str) -> Result<String, minijinja::Error> {
    let mut text = String::new();
    for (i, item) in list.try_iter()?.enumerate() {
        if i > 0 {
            text.push_str(joiner);
        }
        match item.as_str() {
            Some(item) => text.push_str(item),
            None => text.push_str(&item.to_string()),
        }
        if text.len() > MOST_OUTPUT_BYTES {
            return Err(refused("join() makes too long a string"));
        }
    }
    Ok(text)
}

/// The filter `indent(width, first, blank)` with a bounded width.
fn indent(
    text: String,
    width: usize,
    first: Option<bool>,
    blank: Option<bool>,
    keywords: Kwargs,
) -> Result<String, minijinja::Error> {
    let first = first.or(keywords.get("first")?).unwrap_or(false);
    let blank = blank.or(keywords.get("blank")?).unwrap_or(false);
    keywords.assert_all_used()?;
    if width > MOST_INDENT {
        return Err(refused(format!("indent() of more than {MOST_INDENT} columns")));
    }
    let space = " ".repeat(width);
    let lines = text.split('\n').enumerate().map(|(i, line)| {
        let indented = if i == 0 { first } else { blank || !line.is_empty() };
        if indented { format!("{space}{line}") } else { line.to_owned() }
    });
    Ok(lines.collect::<Vec<_>>().join("\n"))
}

/// `json.dumps(value, ensure_ascii=False, indent, separators, sort_keys)`: unlike Jinja's own filter it escapes no HTML.
fn to_json(value: Value, keywords: Kwargs) -> Result<Value, minijinja::Error> {
    let indent: Option<usize> = keywords.get("indent")?;
    let ascii: Option<bool> = keywords.get("ensure_ascii")?;
    let sort_keys: Option<bool> = keywords.get("sort_keys")?;
    let separators: Option<Vec<String>> = keywords.get("separators")?;
    keywords.assert_all_used()?;
    if value.is_undefined() {
        return Err(refused("tojson of an undefined value"));
    }
    if indent.is_some_and(|width| width > MOST_INDENT) {
        return Err(refused(format!("tojson with an indent above {MOST_INDENT}")));
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

/// How Python lays JSON out.
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
            // Python writes DEL as it is, as serde_json does.
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
