//! Methods of Python's strings, lists and dictionaries, and its `%` operator, that the engine lacks.

use super::refused;
use minijinja::value::{Kwargs, Rest, Tuple, Value, ValueKind, from_args};
use minijinja::{Error, ErrorKind, State};

type Result<T> = std::result::Result<T, Error>;

/// Most digits of a width or precision in a format specification, whose output the engine does not bound.
const MAX_FORMAT_DIGITS: usize = 3;
/// Widest padding of `ljust`, `rjust`, `center`, `zfill` and `expandtabs`, in characters.
const MAX_WIDTH: usize = 1 << 12;

/// A method that the engine does not know.
pub(super) fn method(state: &mut State<'_, '_>, value: &Value, name: &str, arguments: &[Value]) -> Result<Value> {
    let found = match (value.as_str(), value.kind()) {
        (Some(text), _) => string_method(state, text, name, arguments)?,
        (None, ValueKind::Seq) => list_method(value, name, arguments)?,
        (None, ValueKind::Map) if name == "copy" && arguments.is_empty() => Some(value.clone()),
        _ => None,
    };
    match found {
        Some(value) => Ok(value),
        None => minijinja_contrib::pycompat::unknown_method_callback(state, value, name, arguments),
    }
}

fn list_method(list: &Value, name: &str, arguments: &[Value]) -> Result<Option<Value>> {
    match name {
        "copy" if arguments.is_empty() => Ok(Some(list.clone())),
        "index" => {
            let (wanted,): (&Value,) = from_args(arguments)?;
            let at = list.try_iter()?.position(|item| item == *wanted);
            at.map(|at| Some(Value::from(at))).ok_or_else(|| refused("index() of a value that is not in the list"))
        }
        _ => Ok(None),
    }
}

fn string_method(state: &State<'_, '_>, text: &str, name: &str, arguments: &[Value]) -> Result<Option<Value>> {
    let value = match name {
        "strip" | "lstrip" | "rstrip" => {
            let (chars,): (Option<&str>,) = from_args(arguments)?;
            let strips = |c: char| chars.map_or_else(|| is_space(c), |chars| chars.contains(c));
            let text = if name == "rstrip" { text } else { text.trim_start_matches(strips) };
            Value::from(if name == "lstrip" { text } else { text.trim_end_matches(strips) })
        }
        "split" | "rsplit" => split(text, name == "rsplit", arguments)?,
        "splitlines" => {
            let (keep, keywords): (Option<bool>, Kwargs) = from_args(arguments)?;
            let keep = keep.or(keywords.get("keepends")?).unwrap_or(false);
            keywords.assert_all_used()?;
            lines(text).map(|(line, end)| if keep { format!("{line}{end}") } else { line.to_owned() }).collect()
        }
        "partition" | "rpartition" => {
            let (separator,): (&str,) = from_args(arguments)?;
            let at = if name == "partition" { text.split_once(separator) } else { text.rsplit_once(separator) };
            let parts = match at {
                _ if separator.is_empty() => return Err(refused(format!("{name}() with an empty separator"))),
                Some((before, after)) => [before, separator, after],
                None if name == "partition" => [text, "", ""],
                None => ["", "", text],
            };
            Value::from(Tuple::from(parts.map(Value::from)))
        }
        "removeprefix" | "removesuffix" => {
            let (end,): (&str,) = from_args(arguments)?;
            let rest = if name == "removeprefix" { text.strip_prefix(end) } else { text.strip_suffix(end) };
            Value::from(rest.unwrap_or(text))
        }
        "find" | "rfind" | "index" | "rindex" | "count" => {
            let (wanted, start, end): (&str, Option<i64>, Option<i64>) = from_args(arguments)?;
            let (from, part) = part(text, start, end);
            if name == "count" {
                return Ok(Some(Value::from(part.map_or(0, |part| part.matches(wanted).count()))));
            }
            let at = part.and_then(|part| {
                let at = if name.starts_with('r') { part.rfind(wanted) } else { part.find(wanted) };
                at.and_then(|at| part.get(..at)).map(|before| from + before.chars().count())
            });
            match at {
                Some(at) => Value::from(at),
                None if name.ends_with("find") => Value::from(-1),
                None => return Err(refused(format!("{name}() of text that does not occur"))),
            }
        }
        "startswith" | "endswith" if arguments.len() > 1 => {
            let (wanted, start, end): (&Value, Option<i64>, Option<i64>) = from_args(arguments)?;
            let Some(part) = part(text, start, end).1 else { return Ok(Some(Value::from(false))) };
            return string_method(state, part, name, std::slice::from_ref(wanted));
        }
        "startswith" | "endswith" => {
            let (wanted,): (&Value,) = from_args(arguments)?;
            let is = |end: &str| if name == "startswith" { text.starts_with(end) } else { text.ends_with(end) };
            match wanted.as_str() {
                Some(end) => Value::from(is(end)),
                None => return Ok(None),
            }
        }
        "ljust" | "rjust" | "center" => {
            let (width, fill): (usize, Option<char>) = from_args(arguments)?;
            let missing = padding(state, name, text, width)?;
            // As CPython rounds the left half.
            let left = match name {
                "ljust" => 0,
                "rjust" => missing,
                _ => missing / 2 + (missing & width & 1),
            };
            let fill = |count| std::iter::repeat_n(fill.unwrap_or(' '), count);
            Value::from(fill(left).chain(text.chars()).chain(fill(missing - left)).collect::<String>())
        }
        "zfill" => {
            let (width,): (usize,) = from_args(arguments)?;
            let missing = padding(state, name, text, width)?;
            let digits = text.trim_start_matches(['+', '-']);
            let sign_len = (text.len() - digits.len()).min(1);
            let (sign, digits) = text.split_at(sign_len);
            Value::from(format!("{sign}{}{digits}", "0".repeat(missing)))
        }
        "expandtabs" => {
            let (size,): (Option<usize>,) = from_args(arguments)?;
            let size = size.unwrap_or(8);
            padding(state, name, "", size.saturating_mul(text.matches('\t').count().min(MAX_WIDTH)))?;
            Value::from(expand_tabs(text, size))
        }
        "swapcase" if arguments.is_empty() => {
            let swap = |c: char| -> String {
                if c.is_uppercase() { c.to_lowercase().collect() } else { c.to_uppercase().collect() }
            };
            Value::from(text.chars().map(swap).collect::<String>())
        }
        "casefold" if arguments.is_empty() => Value::from(text.to_lowercase().replace('ß', "ss").replace('ς', "σ")),
        "title" if arguments.is_empty() => Value::from(title(text)),
        "istitle" if arguments.is_empty() => Value::from(text.chars().any(char::is_alphabetic) && title(text) == text),
        "isspace" if arguments.is_empty() => Value::from(!text.is_empty() && text.chars().all(is_space)),
        "isdecimal" if arguments.is_empty() => {
            Value::from(!text.is_empty() && text.chars().all(|c| c.is_numeric() && !c.is_alphabetic()))
        }
        "isidentifier" if arguments.is_empty() => {
            let starts = text.starts_with(|c: char| c.is_alphabetic() || c == '_');
            Value::from(starts && text.chars().all(|c| c.is_alphanumeric() || c == '_'))
        }
        "isprintable" if arguments.is_empty() => {
            Value::from(text.chars().all(|c| c == ' ' || !(c.is_control() || c.is_whitespace())))
        }
        "format" => {
            let digits = text.split(|c: char| !c.is_ascii_digit()).map(str::len).max().unwrap_or(0);
            let computed = text.split(':').skip(1).any(|spec| spec.split('}').next().is_some_and(|s| s.contains('{')));
            if text.contains(':') && (digits > MAX_FORMAT_DIGITS || computed) {
                return Err(refused("format() with a width that is computed or above 999"));
            }
            return Ok(None);
        }
        _ => return Ok(None),
    };
    Ok(Some(value))
}

/// White space of Python's `str.isspace`.
fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c)
}

/// `str.split` and `str.rsplit`.
fn split(text: &str, from_right: bool, arguments: &[Value]) -> Result<Value> {
    let (separator, most, keywords): (Option<Value>, Option<i64>, Kwargs) = from_args(arguments)?;
    let separator = separator.or(keywords.get("sep")?).filter(|value| !value.is_none());
    let most = most.or(keywords.get("maxsplit")?).unwrap_or(-1);
    keywords.assert_all_used()?;
    let most = usize::try_from(most).unwrap_or(usize::MAX);
    let mut parts: Vec<&str> = Vec::new();
    match &separator {
        None => {
            // White space at the far end is kept beyond the last split.
            let mut rest = if from_right { text.trim_end_matches(is_space) } else { text.trim_start_matches(is_space) };
            while !rest.is_empty() {
                let at = if from_right { rest.rfind(is_space) } else { rest.find(is_space) };
                let Some(at) = at.filter(|_| parts.len() < most) else { break };
                let (before, after) = rest.split_at(at);
                if from_right {
                    parts.push(after.trim_start_matches(is_space));
                    rest = before.trim_end_matches(is_space);
                } else {
                    parts.push(before);
                    rest = after.trim_start_matches(is_space);
                }
            }
            parts.extend((!rest.is_empty()).then_some(rest));
        }
        Some(separator) => {
            let separator = separator.as_str().filter(|s| !s.is_empty());
            let separator = separator.ok_or_else(|| refused("split() with a separator that is empty or no string"))?;
            let most = most.saturating_add(1);
            if from_right {
                parts.extend(text.rsplitn(most, separator))
            } else {
                parts.extend(text.splitn(most, separator))
            }
        }
    }
    if from_right {
        parts.reverse();
    }
    Ok(parts.into_iter().map(Value::from).collect())
}

/// Lines of `str.splitlines` with their line ends.
fn lines(text: &str) -> impl Iterator<Item = (&str, &str)> {
    let ends =
        |c: char| matches!(c, '\n' | '\r' | '\x0b' | '\x0c' | '\x1c'..='\x1e' | '\u{85}' | '\u{2028}' | '\u{2029}');
    let mut rest = text;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let (line, behind) = rest.split_at(rest.find(ends).unwrap_or(rest.len()));
        let len = if behind.starts_with("\r\n") { 2 } else { behind.chars().next().map_or(0, char::len_utf8) };
        let (end, after) = behind.split_at(len);
        rest = after;
        Some((line, end))
    })
}

/// Number of characters before the slice `start:end` of a text, and the slice; `None` where it begins behind the text.
fn part(text: &str, start: Option<i64>, end: Option<i64>) -> (usize, Option<&str>) {
    if start.is_none() && end.is_none() {
        return (0, Some(text));
    }
    let len = text.chars().count();
    let index = |i: i64| usize::try_from(if i < 0 { i.saturating_add(len as i64) } else { i }).unwrap_or(0);
    let (start, end) = (start.map_or(0, index), end.map_or(len, index).min(len));
    let byte = |i: usize| text.char_indices().nth(i).map_or(text.len(), |(at, _)| at);
    (start, (start <= end).then(|| text.get(byte(start)..byte(end))).flatten())
}

/// Characters that a text lacks of a width; their bytes are paid for.
fn padding(state: &State<'_, '_>, name: &str, text: &str, width: usize) -> Result<usize> {
    if width > MAX_WIDTH {
        return Err(refused(format!("{name}() to more than {MAX_WIDTH} characters")));
    }
    let missing = width.saturating_sub(text.chars().count());
    state.consume_fuel(missing as u64 / 16)?;
    Ok(missing)
}

fn expand_tabs(text: &str, size: usize) -> String {
    let (mut out, mut column) = (String::with_capacity(text.len()), 0);
    for c in text.chars() {
        match c {
            '\t' if size == 0 => {}
            '\t' => {
                let count = size - column % size;
                out.extend(std::iter::repeat_n(' ', count));
                column += count;
            }
            _ => {
                out.push(c);
                column = if matches!(c, '\n' | '\r') { 0 } else { column + 1 };
            }
        }
    }
    out
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

/// Python's `left % right`: the remainder of numbers with the divisor's sign, or printf-style formatting of a string.
pub(super) fn percent(state: &mut State<'_, '_>, left: Value, right: Value) -> Result<Value> {
    if left.as_str().is_some() {
        let mut arguments = vec![left];
        match right.downcast_object_ref::<Tuple>() {
            Some(_) => arguments.extend(right.try_iter()?),
            None => arguments.push(right),
        }
        return state.apply_filter("format", &arguments);
    }
    let unsupported =
        || Error::new(ErrorKind::InvalidOperation, format!("`%` of {} and {}", left.kind(), right.kind()));
    if left.is_integer() && right.is_integer() {
        let (a, b) = (i128::try_from(left.clone())?, i128::try_from(right.clone())?);
        let rest = a.checked_rem(b).ok_or_else(|| refused("`%` by zero"))?;
        return Ok(Value::from(if rest != 0 && (rest < 0) != (b < 0) { rest + b } else { rest }));
    }
    let number = |value: &Value| f64::try_from(value.clone()).map_err(|_| unsupported());
    let (a, b) = (number(&left)?, number(&right)?);
    if b == 0.0 {
        return Err(refused("`%` by zero"));
    }
    let rest = a % b;
    Ok(Value::from(if rest != 0.0 && (rest < 0.0) != (b < 0.0) { rest + b } else { rest }))
}

/// Jinja's filter `center`: 80 columns by default.
pub(super) fn center(state: &mut State<'_, '_>, text: &str, width: Option<usize>) -> Result<Value> {
    let centered = string_method(state, text, "center", &[Value::from(width.unwrap_or(80))])?;
    Ok(centered.unwrap_or_default())
}

/// Jinja's filter `truncate(length=255, killwords=False, end='...', leeway=5)`: text that is longer than length and leeway
/// is cut, with `end`, to `length` characters, at a blank unless `killwords`.
pub(super) fn truncate(text: &str, arguments: Rest<Value>, keywords: Kwargs) -> Result<String> {
    let names = ["length", "killwords", "end", "leeway"];
    let mut values: [Option<Value>; 4] = Default::default();
    for (i, (value, name)) in values.iter_mut().zip(names).enumerate() {
        *value = arguments.get(i).cloned().or(keywords.get(name)?).filter(|value| !value.is_none());
    }
    keywords.assert_all_used()?;
    let [length, killwords, end, leeway] = &values;
    let number = |value: &Option<Value>, default: usize| value.clone().map_or(Ok(default), usize::try_from);
    let (length, leeway) = (number(length, 255)?, number(leeway, 5)?);
    let end = end
        .as_ref()
        .map_or(Some("..."), Value::as_str)
        .ok_or_else(|| refused("truncate() with an end that is no text"))?;
    let kept = length.checked_sub(end.chars().count());
    let kept = kept.ok_or_else(|| refused(format!("truncate() to {length} characters, fewer than its end has")))?;
    if text.chars().count() <= length.saturating_add(leeway) {
        return Ok(text.to_owned());
    }
    let cut: String = text.chars().take(kept).collect();
    let whole = killwords.as_ref().is_some_and(Value::is_true);
    let cut = cut.rsplit_once(' ').filter(|_| !whole).map_or(cut.as_str(), |(words, _)| words);
    Ok(format!("{cut}{end}"))
}

/// Jinja's test `callable`: functions, macros and other objects, not data.
pub(super) fn is_callable(value: &Value) -> bool {
    value.kind() == ValueKind::Plain
}

/// Jinja's filter `default`; with `boolean`, of every value that is false.
pub(super) fn default(value: &Value, other: Option<Value>, boolean: Option<bool>, keywords: Kwargs) -> Result<Value> {
    let other = other.or(keywords.get("default_value")?).unwrap_or_else(|| Value::from(""));
    let boolean = boolean.or(keywords.get("boolean")?).unwrap_or(false);
    keywords.assert_all_used()?;
    Ok(if value.is_undefined() || (boolean && !value.is_true()) { other } else { value.clone() })
}

/// Jinja's filter `int`: `default`, 0 if not given, for what is no number.
pub(super) fn int(value: &Value, default: Option<Value>, base: Option<u32>, keywords: Kwargs) -> Result<Value> {
    let default = default.or(keywords.get("default")?).unwrap_or_else(|| Value::from(0));
    let base = base.or(keywords.get("base")?).unwrap_or(10);
    keywords.assert_all_used()?;
    let truncated = |x: f64| x.is_finite().then(|| Value::from(x as i64));
    let Some(text) = value.as_str() else {
        return Ok(match value.kind() {
            ValueKind::Bool => Value::from(i64::from(value.is_true())),
            _ if value.is_integer() => value.clone(),
            _ => f64::try_from(value.clone()).ok().and_then(truncated).unwrap_or(default),
        });
    };
    if !(2..=36).contains(&base) {
        return Err(refused("int() with a base that is not 2 to 36"));
    }
    let text = text.trim_matches(is_space).replace('_', "").to_lowercase();
    let prefix = match base {
        16 => "0x",
        8 => "0o",
        2 => "0b",
        _ => "",
    };
    let whole = i64::from_str_radix(text.strip_prefix(prefix).unwrap_or(&text), base).ok();
    let truncated = || text.parse::<f64>().ok().and_then(truncated);
    Ok(whole.map(Value::from).or_else(truncated).unwrap_or(default))
}

/// Python's `repr` of a float.
pub(super) fn float_text(x: f64) -> String {
    if x.is_nan() || x.is_infinite() {
        return if x.is_nan() { "nan".into() } else { format!("{x}") };
    }
    let scientific = format!("{x:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if x == 0.0 || (-4..16).contains(&exponent) {
        let text = x.to_string();
        return if text.contains('.') { text } else { text + ".0" };
    }
    format!("{digits}e{}{:02}", if exponent < 0 { '-' } else { '+' }, exponent.abs())
}

/// Jinja's test `sequence`: what has a length and items, strings and mappings among it.
pub(super) fn is_sequence(value: &Value) -> bool {
    matches!(value.kind(), ValueKind::Seq | ValueKind::String | ValueKind::Map)
}

/// Jinja's test `iterable`: what Python iterates over, and an undefined value; not none.
pub(super) fn is_iterable(value: &Value) -> bool {
    !value.is_none() && value.try_iter().is_ok()
}

/// Python's `dict(mapping, **keywords)`.
pub(super) fn dict(arguments: Rest<Value>, keywords: Kwargs) -> Result<Value> {
    let mut pairs: Vec<(Value, Value)> = Vec::new();
    for argument in arguments.iter() {
        for item in argument.try_iter()? {
            match argument.kind() {
                ValueKind::Map => pairs.push((item.clone(), argument.get_item(&item)?)),
                _ => pairs.push((item.get_item(&Value::from(0))?, item.get_item(&Value::from(1))?)),
            }
        }
    }
    for name in keywords.args() {
        pairs.push((Value::from(name), keywords.get(name)?));
    }
    Ok(Value::from_pairs(pairs))
}
