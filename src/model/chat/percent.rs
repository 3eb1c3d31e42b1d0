//! Rewrites `a % b` as a call, since the engine's own operator formats no strings.

use super::prepare::PERCENT;
use std::ops::Range;

/// Words that end an operand.
const WORDS: [&str; 22] = [
    "and",
    "or",
    "not",
    "in",
    "if",
    "elif",
    "else",
    "for",
    "set",
    "with",
    "do",
    "call",
    "filter",
    "macro",
    "print",
    "block",
    "recursive",
    "is",
    "import",
    "include",
    "from",
    "as",
];

/// Operators and brackets, the longer ones first.
const SIGNS: [&str; 27] = [
    "**", "//", "==", "!=", "<=", ">=", "(", ")", "[", "]", "{", "}", "*", "/", "%", "+", "-", "~", ",", ":", "=", "<",
    ">", "|", ".", ";", "!",
];

/// Deepest nesting of brackets that is looked into.
const MAX_DEPTH: usize = 64;

/// The rewritten content of a tag, without its delimiters.
pub(super) fn rewrite(source: &str) -> String {
    if !source.contains('%') {
        return source.to_owned();
    }
    let tokens = tokens(source);
    let mut out = String::with_capacity(source.len() + 32);
    Rewriter { source, tokens: &tokens }.expressions(0..tokens.len(), 0, &mut out);
    out
}

struct Rewriter<'a> {
    source: &'a str,
    /// Words, numbers, strings and signs, with the white space before each; the last takes that behind it too.
    tokens: &'a [Range<usize>],
}

impl Rewriter<'_> {
    fn raw(&self, token: usize) -> &str {
        self.tokens.get(token).and_then(|range| self.source.get(range.clone())).unwrap_or_default()
    }

    fn text(&self, token: usize) -> &str {
        self.raw(token).trim()
    }

    /// Writes tokens, of which each chain of products is rewritten.
    fn expressions(&self, tokens: Range<usize>, depth: usize, out: &mut String) {
        let mut at = tokens.start;
        let mut first = at;
        while at < tokens.end {
            let text = self.text(at);
            let sign = matches!(text, "+" | "-");
            // A sign in front of an operand belongs to it.
            let unary = sign && (at == first || matches!(self.text(at - 1), "*" | "/" | "//" | "%" | "**" | "+" | "-"));
            let ends =
                matches!(text, "~" | "," | ":" | "=" | "==" | "!=" | "<" | ">" | "<=" | ">=") || WORDS.contains(&text);
            let word_after_dot = at > tokens.start && matches!(self.text(at - 1), "." | "|");
            if (ends && !word_after_dot) || (sign && !unary) {
                self.product(first..at, depth, out);
                out.push_str(self.raw(at));
                first = at + 1;
            }
            at = self.after(at, tokens.end);
        }
        self.product(first..tokens.end, depth, out);
    }

    /// The token behind this one, or behind the bracket that it opens.
    fn after(&self, at: usize, end: usize) -> usize {
        let mut depth = 0usize;
        for i in at..end {
            match self.text(i) {
                "(" | "[" | "{" => depth += 1,
                ")" | "]" | "}" => depth = depth.saturating_sub(1),
                _ => {}
            }
            if depth == 0 {
                return i + 1;
            }
        }
        end
    }

    fn product(&self, tokens: Range<usize>, depth: usize, out: &mut String) {
        let mut operands = Vec::new();
        let mut operators = Vec::new();
        let (mut at, mut first) = (tokens.start, tokens.start);
        while at < tokens.end {
            if matches!(self.text(at), "*" | "/" | "//" | "%") {
                operands.push(self.operand(first..at, depth));
                operators.push(at);
                first = at + 1;
            }
            at = self.after(at, tokens.end);
        }
        operands.push(self.operand(first..tokens.end, depth));
        let percent = operators.iter().any(|&operator| self.text(operator) == "%");
        let mut operands = operands.into_iter();
        let mut whole = operands.next().unwrap_or_default();
        for (operator, operand) in operators.into_iter().zip(operands) {
            whole = match self.text(operator) {
                "%" => format!(" {PERCENT}(({whole}),({operand}))"),
                _ if percent => format!(" ({whole}){}({operand})", self.raw(operator)),
                _ => whole + self.raw(operator) + &operand,
            };
        }
        out.push_str(&whole);
    }

    fn operand(&self, tokens: Range<usize>, depth: usize) -> String {
        let mut out = String::new();
        let mut at = tokens.start;
        while at < tokens.end {
            let next = self.after(at, tokens.end);
            out.push_str(self.raw(at));
            if next > at + 1 {
                let last = next - 1;
                if depth < MAX_DEPTH {
                    self.expressions(at + 1..last, depth + 1, &mut out);
                } else {
                    (at + 1..last).for_each(|i| out.push_str(self.raw(i)));
                }
                out.push_str(self.raw(last));
            }
            at = next;
        }
        out
    }
}

fn tokens(source: &str) -> Vec<Range<usize>> {
    let mut tokens: Vec<Range<usize>> = Vec::new();
    let mut at = 0;
    while at < source.len() {
        let start = at;
        let rest = source.get(at..).unwrap_or_default();
        at += rest.len() - rest.trim_start().len();
        let rest = rest.trim_start();
        let Some(c) = rest.chars().next() else { break };
        at += match c {
            '\'' | '"' => string_len(rest, c),
            c if c.is_alphanumeric() || c == '_' => {
                rest.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(rest.len())
            }
            c => SIGNS.iter().find(|sign| rest.starts_with(**sign)).map_or(c.len_utf8(), |sign| sign.len()),
        };
        tokens.push(start..at);
    }
    if let Some(last) = tokens.last_mut() {
        last.end = source.len();
    }
    tokens
}

/// Length of the string literal at the start of `rest`, with its quotes.
fn string_len(rest: &str, quote: char) -> usize {
    let mut escaped = false;
    for (i, c) in rest.char_indices().skip(1) {
        if c == quote && !escaped {
            return i + 1;
        }
        escaped = c == '\\' && !escaped;
    }
    rest.len()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn products_with_a_percent_sign_become_calls() {
        for (source, expected) in [
            (" a + b ", " a + b "),
            (" '%d' + a*b ", " '%d' + a*b "),
            ("a % b", " __percent((a),( b))"),
            (" '%s' % x.y[0] | upper ", " __percent(( '%s'),( x.y[0] | upper ))"),
            ("if loop.index0 % 2 == 0", "if __percent(( loop.index0),( 2)) == 0"),
            ("a * b % c", " __percent(( (a) *( b)),( c))"),
            ("f(a % b, c)", "f( __percent((a),( b)), c)"),
            ("x = ('%s: %s' % (a, b)) ~ c", "x = ( __percent(('%s: %s'),( (a, b)))) ~ c"),
            ("a - b % c", "a - __percent(( b),( c))"),
            ("-a % b", " __percent((-a),( b))"),
            ("x not in y % z", "x not in __percent(( y),( z))"),
        ] {
            let found = rewrite(source);
            assert_eq!(found.split_whitespace().collect::<String>(), expected.split_whitespace().collect::<String>());
        }
        assert_eq!(rewrite("a.b('%') "), "a.b('%') ");
    }

    proptest! {
        #[test]
        fn any_text_without_the_operator_stays(source in "([a-z0-9 ()\\[\\]{}'.,|~+*/-]|'%s'| and |é){0,30}") {
            let source = source.replace('%', "");
            // Behind an odd quote the sign below is the operator.
            prop_assume!(source.matches('\'').count() % 2 == 0);
            prop_assert_eq!(rewrite(&format!("{source}'%'")).replace(' ', ""), format!("{source}'%'").replace(' ', ""));
        }

        #[test]
        fn any_text_is_rewritten(source in "([a-z0-9 ()\\[\\]{}'.,|~+*/%-]|é){0,60}") {
            rewrite(&source);
        }
    }
}
