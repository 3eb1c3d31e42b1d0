//! Chat templates: Jinja with the functions and settings of transformers.

mod message;
mod prepare;

use super::Clock;
use crate::error::{Error, Result};
use crate::io::input::{guarded, printable};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Value, ValueKind};
use minijinja::{Environment, ErrorKind, Output, State, UndefinedBehavior, context};
use prepare::{CHECKED, prepare};
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io;

/// Budget of one rendering: 1 per instruction and per 64 bytes of data, which also bounds its memory by 320 MB. About
/// 100 times what a long conversation needs; under a second.
const FUEL: u64 = 5_000_000;
/// Maximum length of rendered text.
const MAX_OUTPUT_BYTES: usize = 1 << 25;
/// Maximum nesting of values in a namespace.
const MAX_DEPTH: usize = 32;
/// Macro calls recurse on the stack; this is several times what the engine's recursion limit needs.
const STACK_BYTES: usize = 1 << 26;
/// Maximum length of a template's source; published ones have up to 30 kB.
const MAX_SOURCE_BYTES: usize = 1 << 20;
/// Maximum indentation of `tojson`, in columns.
const MAX_INDENT: usize = 64;
const NAME: &str = "chat_template";

pub use message::{Message, Training};

/// A compiled chat template.
///
/// Templates get the context of transformers: `messages`, `add_generation_prompt`, the special tokens, `tools` and
/// `documents` (none), `raise_exception`, `strftime_now` (in UTC), `tojson` as Python's `json.dumps`, Python's string
/// methods, `break` and `continue`, and `{% generation %}` blocks.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    place: String,
    special: BTreeMap<String, String>,
    uses_clock: bool,
}

impl ChatTemplate {
    /// Compiles a template. `place` is shown in errors; `special` maps `bos_token` and the like to their text.
    ///
    /// # Errors
    /// [`Error::Input`] with the line that does not compile.
    pub fn new(source: &str, place: &str, special: BTreeMap<String, String>) -> Result<Self> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(|e| Error::input(place, reason(&e), "a chat template in Jinja"))?);
        environment.set_undefined_behavior(UndefinedBehavior::Lenient);
        environment.set_fuel(Some(FUEL));
        environment.set_formatter(format_value);
        environment.set_unknown_method_callback(method);
        environment.add_filter("tojson", to_json);
        environment.add_function("raise_exception", |message: String| -> Result<Value, minijinja::Error> {
            Err(refused(message))
        });
        environment.add_function(CHECKED, |value: Value| checked(value, 0));
        let uses_clock = source.contains("strftime_now");
        let too_long = source.len() > MAX_SOURCE_BYTES;
        let Some(source) = prepare(source).filter(|_| !too_long) else {
            let found = if too_long { "a template that is too long" } else { "a reserved name" };
            return Err(Error::input(place, found, format!("at most {MAX_SOURCE_BYTES} bytes, without `{CHECKED}`")));
        };
        guarded(place, "template parser", || environment.add_template_owned(NAME, source))?
            .map_err(|e| Error::input(place, reason(&e), "a chat template in Jinja"))?;
        let mut template = Self { environment, place: place.to_owned(), special, uses_clock };
        template.set_clock(Clock::now()?);
        Ok(template)
    }

    /// Whether the text may depend on the date.
    pub fn uses_clock(&self) -> bool {
        self.uses_clock
    }

    /// The time of `strftime_now`; until it is set, that of [`ChatTemplate::new`].
    pub fn set_clock(&mut self, clock: Clock) {
        self.environment.add_function("strftime_now", move |format: String| clock.format(&format).map_err(refused));
    }

    /// Renders a whole conversation.
    ///
    /// # Errors
    /// [`Error::Input`] with line and reason where the template fails, or exceeds its budget of time, memory, recursion
    /// or output.
    pub fn render(&self, messages: &[Message]) -> Result<String> {
        self.render_with(messages, false)
    }

    /// Renders a conversation and the generation prompt, such as the assistant's header.
    ///
    /// # Errors
    /// [`Error::Input`] as [`ChatTemplate::render`].
    pub fn render_prompt(&self, messages: &[Message]) -> Result<String> {
        self.render_with(messages, true)
    }

    fn render_with(&self, messages: &[Message], generation_prompt: bool) -> Result<String> {
        let context = context! {
            messages => messages.iter().map(Message::to_template).collect::<Vec<Value>>(),
            add_generation_prompt => generation_prompt,
            tools => Value::from(()),
            documents => Value::from(()),
            ..Value::from_pairs(self.special.clone())
        };
        let mut text = Bounded { bytes: Vec::new() };
        let run = || {
            guarded(&self.place, "template engine", || {
                let template = self.environment.get_template(NAME)?;
                template.render_captured_to(context, &mut text).map(|_| ())
            })
        };
        // A separate thread has a stack of known size.
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

/// Cause and line of a template error, on one line.
fn reason(error: &minijinja::Error) -> String {
    let mut text = match (error.kind(), error.detail()) {
        (ErrorKind::OutOfFuel, _) => "a template that takes too much time or memory".to_owned(),
        (ErrorKind::WriteFailure, _) => format!("a template that writes more than {MAX_OUTPUT_BYTES} bytes"),
        (kind, Some(detail)) => format!("{kind}: {detail}"),
        (kind, None) => kind.to_string(),
    };
    if let Some(line) = error.line() {
        let _ = write!(text, " (line {line})");
    }
    printable(&text)
}

/// A buffer of at most [`MAX_OUTPUT_BYTES`].
struct Bounded {
    bytes: Vec<u8>,
}

impl io::Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.bytes.len() + bytes.len() > MAX_OUTPUT_BYTES {
            return Err(io::Error::other("too much output"));
        }
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Checks that a namespace may hold the value: strings, numbers, and lists and maps of them. Iterators become lists.
fn checked(value: Value, depth: usize) -> Result<Value, minijinja::Error> {
    if depth > MAX_DEPTH {
        return Err(refused(format!("a namespace that holds lists nested more than {MAX_DEPTH} deep")));
    }
    match value.kind() {
        ValueKind::Seq => value.try_iter()?.try_for_each(|item| checked(item, depth + 1).map(|_| ()))?,
        ValueKind::Iterable => {
            let items: Result<Vec<Value>, _> = value.try_iter()?.map(|item| checked(item, depth + 1)).collect();
            return items.map(Value::from);
        }
        ValueKind::Map if is_namespace(&value) => return Err(refused("a namespace that holds a namespace")),
        ValueKind::Map => {
            for key in value.try_iter()? {
                checked(value.get_item(&key)?, depth + 1)?;
                checked(key, depth + 1)?;
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

/// Formats booleans and none as Python does: `True`, `False`, `None`.
fn format_value(out: &mut Output<'_>, state: &mut State<'_, '_>, value: &Value) -> Result<(), minijinja::Error> {
    match value.kind() {
        ValueKind::Bool => Ok(out.write_str(if value.is_true() { "True" } else { "False" })?),
        ValueKind::None => Ok(out.write_str("None")?),
        _ => minijinja::escape_formatter(out, state, value),
    }
}

/// Methods of Python's strings, lists and dictionaries.
fn method(
    state: &mut State<'_, '_>,
    value: &Value,
    name: &str,
    arguments: &[Value],
) -> Result<Value, minijinja::Error> {
    match (name, value.as_str()) {
        // The engine does not bound the width that a format specification asks for.
        ("format", Some(text)) if text.contains(':') => Err(refused("format() with a format specification")),
        // The engine's own follows Jinja's filter, which splits words differently.
        ("title", Some(text)) if arguments.is_empty() => Ok(Value::from(title(text))),
        _ => minijinja_contrib::pycompat::unknown_method_callback(state, value, name, arguments),
    }
}

/// Python's `str.title`: upper-cases each letter that does not follow a letter, and lower-cases the others.
fn title(text: &str) -> String {
    let mut titled = String::with_capacity(text.len());
    let mut in_word = false;
    for c in text.chars() {
        if in_word {
            titled.extend(c.to_lowercase())
        } else {
            titled.extend(c.to_uppercase())
        }
        in_word = c.is_alphabetic();
    }
    titled
}

fn refused(why: impl Into<String>) -> minijinja::Error {
    minijinja::Error::new(ErrorKind::InvalidOperation, why.into())
}

/// `json.dumps(value, ensure_ascii=False, indent, separators, sort_keys)`; unlike Jinja's own filter it does not escape
/// HTML.
fn to_json(value: Value, keywords: Kwargs) -> Result<Value, minijinja::Error> {
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
