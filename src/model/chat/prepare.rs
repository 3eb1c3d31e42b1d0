//! Rewrites a template's source for the engine.
//!
//! - Line ends become `\n`, and one at the end of the source is dropped, as Jinja does before it reads a template.
//! - `{% generation %}`, which marks assistant text, becomes a scope whose text goes through the filter [`MARKED`].
//! - `a % b` becomes a call of [`PERCENT`], which formats strings too.
//! - `{% set ns.x = e %}` becomes `{% set ns.x = __checked((e)) %}`: a namespace that contains itself could not be
//!   printed.

use super::percent;

/// Name of the function that checks values assigned to a namespace.
pub(super) const CHECKED: &str = "__checked";

/// Name of the function that computes `a % b`.
pub(super) const PERCENT: &str = "__percent";
/// Name of the filter that marks the text of a `{% generation %}` block.
pub(super) const MARKED: &str = "__marked";

/// The rewritten source; `None` if it uses [`CHECKED`], [`MARKED`] or [`PERCENT`].
pub(super) fn prepare(source: &str) -> Option<String> {
    if [CHECKED, MARKED, PERCENT].iter().any(|name| source.contains(name)) {
        return None;
    }
    let source = source.replace("\r\n", "\n").replace('\r', "\n");
    let source = source.strip_suffix('\n').unwrap_or(&source);
    let mut out = String::with_capacity(source.len() + source.len() / 8);
    let mut rest = source;
    while let Some(at) = rest.find('{') {
        let (text, from) = rest.split_at(at);
        out.push_str(text);
        let piece = match from.as_bytes().get(1) {
            Some(b'#') => from.find("#}").map_or(from, |end| &from[..end + 2]),
            Some(b'{') => &from[..tag_end(from, "}}")],
            Some(b'%') => {
                let tag = &from[..tag_end(from, "%}")];
                if word(tag) == "raw" { raw_block(from) } else { tag }
            }
            _ => "{",
        };
        match piece.strip_prefix("{%") {
            Some(_) if word(piece) == "raw" => out.push_str(piece),
            Some(_) if piece.ends_with("%}") => out.push_str(&prepare_tag(&operators(piece))),
            None if piece.starts_with("{{") && piece.ends_with("}}") => out.push_str(&operators(piece)),
            _ => out.push_str(piece),
        }
        rest = &from[piece.len()..];
    }
    out.push_str(rest);
    Some(out)
}

/// Length of the tag at the start of `from`, up to the first `end` outside strings.
fn tag_end(from: &str, end: &str) -> usize {
    outside_strings(from).find(|(i, ..)| *i >= 2 && from[*i..].starts_with(end)).map_or(from.len(), |(i, ..)| i + 2)
}

/// The text from `{% raw %}` to its `{% endraw %}`.
fn raw_block(from: &str) -> &str {
    let mut searched = 2;
    while let Some(at) = from[searched..].find("{%") {
        searched += at;
        let tag = &from[searched..];
        if word(tag) == "endraw" {
            return &from[..searched + tag_end(tag, "%}")];
        }
        searched += 2;
    }
    from
}

/// The first word of a `{%` tag.
fn word(tag: &str) -> &str {
    let inside = tag[2..].trim_start_matches(['-', '+']).trim_start();
    let end = inside.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(inside.len());
    &inside[..end]
}

/// Characters outside string literals, with byte offset and bracket depth.
fn outside_strings(text: &str) -> impl Iterator<Item = (usize, char, i32)> {
    let (mut quote, mut escaped, mut depth) = (None, false, 0);
    text.char_indices().filter_map(move |(i, c)| {
        match quote {
            Some(q) => {
                if c == q && !escaped {
                    quote = None;
                }
                escaped = c == '\\' && !escaped;
                return None;
            }
            None if c == '\'' || c == '"' => {
                quote = Some(c);
                return None;
            }
            None => {}
        }
        match c {
            '(' | '[' | '{' => depth += 1,
            ')' | ']' | '}' => depth -= 1,
            _ => {}
        }
        Some((i, c, depth))
    })
}

/// Rewrites the `%` operators in a tag.
fn operators(tag: &str) -> String {
    let inside = tag.get(2..tag.len().max(4) - 2).unwrap_or_default();
    let open = inside.len() - inside.strip_prefix(['-', '+']).unwrap_or(inside).len();
    let (open, inside) = inside.split_at(open);
    let close = inside.len() - inside.strip_suffix(['-', '+']).unwrap_or(inside).len();
    let (inside, close) = inside.split_at(inside.len() - close);
    match inside.contains('%') {
        true => format!("{}{open}{}{close}{}", &tag[..2], percent::rewrite(inside), &tag[tag.len() - 2..]),
        false => tag.to_owned(),
    }
}

/// Rewrites one tag, `{%` and `%}` included.
fn prepare_tag(tag: &str) -> String {
    let word = word(tag);
    let replaced = |with: &str| tag.replacen(word, with, 1);
    match word {
        "generation" => replaced(&format!("with %}}{{% filter {MARKED}")),
        "endgeneration" => replaced("endfilter %}{% endwith"),
        // Depth 1 is the tag's own brace.
        "set" => match outside_strings(tag).find(|(_, c, depth)| *c == '=' && *depth == 1) {
            Some((equals, ..)) if tag[..equals].contains('.') => {
                let (target, value) = (&tag[..equals], &tag[equals + 1..tag.len() - 2]);
                let sign = value.len() - value.strip_suffix(['-', '+']).unwrap_or(value).len();
                let (value, sign) = value.split_at(value.len() - sign);
                format!("{target}= {CHECKED}(({value})) {sign}%}}")
            }
            _ => tag.to_owned(),
        },
        _ => tag.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn tags_are_rewritten() {
        for (source, expected) in [
            ("a {b} c", "a {b} c"),
            ("{%- set n.x = 1 -%}", "{%- set n.x = __checked(( 1 )) -%}"),
            ("{% set ns.x = ns.x + 'a %} = b' %}", "{% set ns.x = __checked(( ns.x + 'a %} = b' )) %}"),
            ("{% set a, b = 1, 2 %}", "{% set a, b = 1, 2 %}"),
            ("{% set x %}y{% endset %}", "{% set x %}y{% endset %}"),
            ("{% set x | replace('a', b='=') %}y{% endset %}", "{% set x | replace('a', b='=') %}y{% endset %}"),
            (
                "{% generation %}y{%- endgeneration -%}",
                "{% with %}{% filter __marked %}y{%- endfilter %}{% endwith -%}",
            ),
            ("a\r\n{{ 'b\rc' }}\r\r\n", "a\n{{ 'b\nc' }}\n"),
            ("{# {% set x = 1 %} #}{{ '{% set x = 1 %}' }}", "{# {% set x = 1 %} #}{{ '{% set x = 1 %}' }}"),
            (
                "{% raw %}{% set x = 1 %}{% endraw %}{% set n.y='\\'' %}",
                "{% raw %}{% set x = 1 %}{% endraw %}{% set n.y= __checked(('\\'' )) %}",
            ),
            ("{% set x = 1", "{% set x = 1"),
            ("{{ 'a", "{{ 'a"),
            ("{% raw %}", "{% raw %}"),
            ("{%", "{%"),
        ] {
            assert_eq!(prepare(source).as_deref(), Some(expected));
        }
        assert_eq!(prepare("{{ __checked(1) }}"), None);
    }

    proptest! {
        #[test]
        fn any_text_is_prepared(source in "([{}%#'\"= é\\\\+-]|set|raw|endraw|generation|\\.x){0,30}") {
            prop_assert!(prepare(&source).is_some());
        }
    }
}
