//! Chat templates: Jinja with the functions and settings of transformers.

mod message;
mod percent;
mod prepare;
mod python;
mod python_json;

use super::Clock;
use crate::error::{Error, Result};
use crate::io::input::{guarded, printable};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Rest, Serde, Value, ValueKind};
use minijinja::{Environment, ErrorKind, Output, State, UndefinedBehavior, context};
use prepare::{CHECKED, MARKED, PERCENT, prepare};
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io;
use std::ops::Range;
use std::sync::OnceLock;

/// Budget of one rendering: 1 per instruction and per 64 bytes of data, which also bounds its memory by 320 MB. About
/// 100 times what a long conversation needs; under a second.
const FUEL: u64 = 5_000_000;
/// Maximum length of rendered text.
const MAX_OUTPUT_BYTES: usize = 1 << 25;
/// Maximum nesting of values in a namespace.
const MAX_DEPTH: usize = 32;
/// Stack of a rendering. Macro calls recurse on it; this is several times what the engine's recursion limit needs.
const STACK_BYTES: usize = 1 << 26;
/// Maximum length of a template's source; published ones have up to 30 kB.
const MAX_SOURCE_BYTES: usize = 1 << 20;
const NAME: &str = "chat_template";
/// Noncharacters around the text of a `{% generation %}` block, until the rendered text is complete.
const MARKS: [char; 2] = ['\u{fdd0}', '\u{fdd1}'];

use message::CallArguments;
pub use message::{Message, Training};

/// A compiled chat template.
///
/// Templates get the context of transformers: `messages`, `add_generation_prompt`, the special tokens, `tools` and
/// `documents` (none), `raise_exception`, `strftime_now` (in UTC), `tojson` as Python's `json.dumps`, Python's string
/// methods, `break` and `continue`, and `{% generation %}` blocks.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    source: String,
    place: String,
    special: BTreeMap<String, String>,
    uses_clock: bool,
    marks_answers: bool,
    /// Whether it writes arguments of tool calls that are JSON text as a quoted string; known once it is asked.
    quotes_arguments: OnceLock<bool>,
    /// The template of conversations with tools, where it is another.
    tool_use: Option<Box<Self>>,
}

/// What is behind the last message of a rendered conversation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// Nothing.
    Conversation,
    /// The generation prompt, such as the assistant's header.
    GenerationPrompt,
}

/// A rendered conversation.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rendered {
    /// The text.
    pub text: String,
    /// What the template marks as the assistant's by `{% generation %}`, in bytes of the text, in order.
    pub generated: Vec<Range<usize>>,
}

impl ChatTemplate {
    /// Compiles a template. `place` is shown in errors; `special` maps `bos_token` and the like to their text.
    ///
    /// # Errors
    /// [`Error::Input`] with the line that does not compile.
    pub fn new(source: &str, place: &str, special: BTreeMap<String, String>) -> Result<Self> {
        let mut environment = Environment::new();
        // `prepare` has dropped the last line end, as Jinja does.
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).keep_trailing_newline(true).build();
        environment.set_syntax(syntax.map_err(|e| Error::input(place, reason(&e), "a chat template in Jinja"))?);
        environment.set_undefined_behavior(UndefinedBehavior::Lenient);
        environment.set_fuel(Some(FUEL));
        environment.set_formatter(format_value);
        environment.set_unknown_method_callback(python::method);
        environment.add_filter("tojson", python_json::to_json);
        environment
            .add_filter(MARKED, |text: String| Value::from_safe_string(format!("{}{text}{}", MARKS[0], MARKS[1])));
        environment.add_function("raise_exception", |message: String| -> Result<Value, minijinja::Error> {
            Err(refused(message))
        });
        environment.add_filter("center", python::center);
        environment.add_filter("default", python::default);
        environment.add_filter("d", python::default);
        environment.add_filter("int", python::int);
        environment.add_filter("truncate", python::truncate);
        environment.add_filter("striptags", minijinja_contrib::filters::striptags);
        environment.add_function("cycler", |items: Rest<Value>| minijinja_contrib::globals::cycler(items.0));
        environment.add_function("joiner", minijinja_contrib::globals::joiner);
        environment.add_test("callable", python::is_callable);
        environment.add_test("iterable", python::is_iterable);
        environment.add_test("sequence", python::is_sequence);
        environment.add_function("dict", python::dict);
        environment.add_function(PERCENT, python::percent);
        environment.add_function(CHECKED, |value: Value| checked(value, 0));
        let uses_clock = source.contains("strftime_now");
        let too_long = source.len() > MAX_SOURCE_BYTES;
        let Some(prepared) = (!too_long).then(|| prepare(source)).flatten() else {
            let found = if too_long { "a template that is too long" } else { "a reserved name" };
            let expected = format!("at most {MAX_SOURCE_BYTES} bytes, without `{CHECKED}`, `{MARKED}` and `{PERCENT}`");
            return Err(Error::input(place, found, expected));
        };
        let marks_answers = prepared.contains(MARKED);
        guarded(place, "template parser", || environment.add_template_owned(NAME, prepared))?
            .map_err(|e| Error::input(place, reason(&e), "a chat template in Jinja"))?;
        let (place, source) = (place.to_owned(), source.to_owned());
        let (quotes_arguments, tool_use) = (OnceLock::new(), None);
        let mut template =
            Self { environment, source, place, special, uses_clock, marks_answers, quotes_arguments, tool_use };
        template.set_clock(Clock::now()?);
        Ok(template)
    }

    /// The same with another template for conversations with tools.
    ///
    /// # Errors
    /// As [`ChatTemplate::new`].
    pub fn with_tool_use(mut self, source: &str, place: &str) -> Result<Self> {
        self.tool_use = Some(Box::new(Self::new(source, place, self.special.clone())?));
        Ok(self)
    }

    /// The template of a conversation with these tools.
    pub fn of(&self, tools: &[serde_json::Value]) -> &Self {
        self.tool_use.as_deref().filter(|_| !tools.is_empty()).unwrap_or(self)
    }

    /// Whether the text may depend on the date.
    pub fn uses_clock(&self) -> bool {
        self.uses_clock || self.tool_use.as_ref().is_some_and(|other| other.uses_clock)
    }

    /// The time of `strftime_now`; until it is set, that of [`ChatTemplate::new`].
    pub fn set_clock(&mut self, clock: Clock) {
        self.tool_use.iter_mut().for_each(|other| other.set_clock(clock));
        self.environment.add_function("strftime_now", move |format: String| clock.format(&format).map_err(refused));
    }

    /// The source, as it was given.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// The source, and that of the template of conversations with tools.
    pub fn sources(&self) -> String {
        self.source.clone() + self.tool_use.as_ref().map_or("", |other| other.source.as_str())
    }

    /// The file, and the key in it, that errors show.
    pub fn place(&self) -> &str {
        &self.place
    }

    /// Whether the template marks by `{% generation %}` what the assistant writes.
    pub fn marks_answers(&self) -> bool {
        self.marks_answers
    }

    /// The text of a whole conversation without tools.
    ///
    /// # Errors
    /// As [`ChatTemplate::render_chat`].
    pub fn render(&self, messages: &[Message]) -> Result<String> {
        Ok(self.render_chat(messages, &[], Ending::Conversation)?.text)
    }

    /// The text of a conversation without tools, and the generation prompt.
    ///
    /// # Errors
    /// As [`ChatTemplate::render_chat`].
    pub fn render_prompt(&self, messages: &[Message]) -> Result<String> {
        Ok(self.render_chat(messages, &[], Ending::GenerationPrompt)?.text)
    }

    /// Renders a conversation; `tools` are declarations as JSON schemas, of which an empty list is none.
    ///
    /// # Errors
    /// [`Error::Input`] with line and reason where the template fails, or exceeds its budget of time, memory, recursion
    /// or output.
    pub fn render_chat(&self, messages: &[Message], tools: &[serde_json::Value], ending: Ending) -> Result<Rendered> {
        if let Some(other) = self.tool_use.as_ref().filter(|_| !tools.is_empty()) {
            return other.render_chat(messages, tools, ending);
        }
        if self.marks_answers && messages.iter().any(|message| MARKS.iter().any(|mark| message.holds(*mark))) {
            let found = "one of the noncharacters U+FDD0 and U+FDD1 in a message";
            return Err(Error::input(&self.place, found, "text without them, for a template with `{% generation %}`"));
        }
        let objects = messages.iter().any(Message::has_text_arguments) && self.quotes_arguments();
        let arguments = if objects { CallArguments::AsObjects } else { CallArguments::AsGiven };
        let text = self.render_text(messages, tools, ending, arguments)?;
        if !self.marks_answers {
            return Ok(Rendered { text, generated: Vec::new() });
        }
        let mut rendered = Rendered::default();
        let mut open = Vec::new();
        for c in text.chars() {
            if c == MARKS[0] {
                open.push(rendered.text.len());
            } else if c == MARKS[1] {
                rendered.generated.extend(open.pop().map(|start| start..rendered.text.len()));
            } else {
                rendered.text.push(c);
            }
        }
        Ok(rendered)
    }

    /// Whether arguments that are JSON text come out as a quoted string, as of a template that writes them by `tojson`. A
    /// model never sees that when it is served: vLLM makes objects of them.
    fn quotes_arguments(&self) -> bool {
        *self.quotes_arguments.get_or_init(|| {
            let function = serde_json::json!({ "name": "f", "arguments": "{\"x\": 1}" });
            let call = serde_json::json!([{ "id": "123456789", "type": "function", "function": function }]);
            let mut answer = Message::new("assistant", "");
            answer.fields.insert("tool_calls".into(), call);
            let messages = [Message::new("user", "?"), answer];
            let text = self.render_text(&messages, &[], Ending::Conversation, CallArguments::AsGiven);
            text.is_ok_and(|text| text.contains(r#""{\"x\": 1}""#))
        })
    }

    fn render_text(
        &self,
        messages: &[Message],
        tools: &[serde_json::Value],
        ending: Ending,
        arguments: CallArguments,
    ) -> Result<String> {
        let context = context! {
            messages => messages.iter().map(|message| message.to_template(arguments)).collect::<Vec<Value>>(),
            add_generation_prompt => ending == Ending::GenerationPrompt,
            tools => if tools.is_empty() { Value::from(()) } else { Value::from(Serde(tools)) },
            documents => Value::from(()),
            ..Value::from_pairs(self.special.clone())
        };
        let mut text = Bounded { bytes: Vec::new() };
        // On a stack of its own, unless so much of this one is free.
        let rendered = guarded(&self.place, "template engine", || {
            stacker::maybe_grow(STACK_BYTES, STACK_BYTES, || {
                let template = self.environment.get_template(NAME)?;
                template.render_captured_to(context, &mut text).map(|_| ())
            })
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

/// Formats booleans, none and floats as Python does: `True`, `False`, `None`, `1e+16`.
fn format_value(out: &mut Output<'_>, state: &mut State<'_, '_>, value: &Value) -> Result<(), minijinja::Error> {
    match value.kind() {
        ValueKind::Bool => Ok(out.write_str(if value.is_true() { "True" } else { "False" })?),
        ValueKind::None => Ok(out.write_str("None")?),
        ValueKind::Number if !value.is_integer() => match f64::try_from(value.clone()) {
            Ok(x) => Ok(out.write_str(&python::float_text(x))?),
            Err(_) => minijinja::escape_formatter(out, state, value),
        },
        _ => minijinja::escape_formatter(out, state, value),
    }
}

fn refused(why: impl Into<String>) -> minijinja::Error {
    minijinja::Error::new(ErrorKind::InvalidOperation, why.into())
}
