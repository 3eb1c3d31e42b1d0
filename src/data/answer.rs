//! Extracts final answers, numbers and choices from free text.

/// Phrases that announce a final answer, lower case.
const ANNOUNCEMENTS: [&str; 2] = ["answer is", "answer:"];
/// Punctuation and markup that is stripped from both ends of an answer.
const WRAPPING: [char; 14] = ['.', ',', ';', ':', '!', '?', '"', '\'', '`', '*', '_', '“', '”', '。'];
/// Letters that count as choices (A to J) where the question lists no options.
pub(super) const UNLISTED_CHOICES: usize = 10;

/// Lower-cases, collapses white space, and strips punctuation and quotes from both ends unless nothing else is left.
pub(super) fn normalise(text: &str) -> String {
    let words: Vec<&str> = text.split_whitespace().collect();
    let joined = words.join(" ").to_lowercase();
    let bare = joined.trim_matches(|c: char| WRAPPING.contains(&c) || c.is_whitespace());
    if bare.is_empty() { joined } else { bare.to_string() }
}

/// Candidates for the final answer of a text, normalised: the whole text; its last line that is not blank; the text
/// after the last "answer is" or "answer:", to the end of the line and to the end of the sentence.
pub(super) fn final_answers(text: &str) -> Vec<String> {
    let mut answers = vec![normalise(text)];
    answers.extend(text.lines().rev().find(|l| !l.trim().is_empty()).map(normalise));
    if let Some(line) = announced(text).and_then(first_line) {
        answers.push(normalise(line));
        answers.push(normalise(first_sentence(line)));
    }
    answers
}

/// The text after the last "answer is" or "answer:".
fn announced(text: &str) -> Option<&str> {
    // Only ASCII is lower-cased, so byte offsets are the same in both strings.
    let lower = text.to_ascii_lowercase();
    let end = ANNOUNCEMENTS.iter().filter_map(|phrase| lower.rfind(phrase).map(|at| at + phrase.len())).max()?;
    text.get(end..)
}

fn first_line(text: &str) -> Option<&str> {
    text.lines().find(|line| line.chars().any(char::is_alphanumeric))
}

/// The text before the first `.`, `!` or `?` that ends the line or precedes white space.
fn first_sentence(line: &str) -> &str {
    let mut chars = line.char_indices().peekable();
    while let Some((at, c)) = chars.next() {
        if matches!(c, '.' | '!' | '?') && chars.peek().is_none_or(|(_, next)| next.is_whitespace()) {
            return line.get(..at).unwrap_or(line);
        }
    }
    line
}

/// The last number of a text: digits, optionally with commas between groups of three, decimals, an exponent or a
/// fraction such as `3/4`. A `-` or `−` before the number (or before its `$`, `€`, `£`, `¥`) negates it unless it
/// follows a word or a number. Digits inside a word such as `H2O` do not count.
pub(super) fn last_number(text: &str) -> Option<f64> {
    let chars: Vec<char> = text.chars().collect();
    let at = |i: usize| chars.get(i).copied().unwrap_or(' ');
    let before = |i: usize| i.checked_sub(1).map_or(' ', at);
    let mut last = None;
    let mut i = 0;
    while i < chars.len() {
        let starts = at(i).is_ascii_digit() || (at(i) == '.' && at(i + 1).is_ascii_digit());
        if !starts || before(i).is_ascii_alphanumeric() || before(i) == '_' {
            i += 1;
            continue;
        }
        let mut sign = i;
        if matches!(before(sign), '$' | '€' | '£' | '¥') {
            sign -= 1;
        }
        let negative = matches!(before(sign), '-' | '−') && {
            let joined = before(sign - 1);
            !joined.is_alphanumeric() && joined != ')'
        };
        let (mut value, mut end) = unsigned(&at, i);
        if at(end) == '/' && at(end + 1).is_ascii_digit() {
            let (divisor, after) = unsigned(&at, end + 1);
            if divisor != 0.0 {
                (value, end) = (value / divisor, after);
            }
        }
        if value.is_finite() {
            last = Some(if negative { -value } else { value });
        }
        i = end;
    }
    last
}

/// The unsigned number that begins at `start`, and the index behind it.
fn unsigned(at: &impl Fn(usize) -> char, start: usize) -> (f64, usize) {
    let digits = |from: usize| (from..).take_while(|i| at(*i).is_ascii_digit()).count();
    let mut end = start + digits(start);
    if (1..=3).contains(&(end - start)) {
        while at(end) == ',' && digits(end + 1) == 3 {
            end += 4;
        }
    }
    if at(end) == '.' {
        let decimals = digits(end + 1);
        end += if decimals > 0 { decimals + 1 } else { 0 };
    }
    if matches!(at(end), 'e' | 'E') {
        let signed = usize::from(matches!(at(end + 1), '+' | '-'));
        let exponent = digits(end + 1 + signed);
        end += if exponent > 0 { 1 + signed + exponent } else { 0 };
    }
    let text: String = (start..end).map(at).filter(|c| *c != ',').collect();
    (text.parse().unwrap_or(f64::NAN), end)
}

/// The normalised option texts that a question lists, one a line, as `A) …`, `A. …`, `A: …` or `(A) …`, from A on
/// without gaps. The last list wins; a list of one option is ignored.
pub(super) fn options(question: &str) -> Vec<String> {
    let mut options: Vec<String> = Vec::new();
    for line in question.lines() {
        let line = line.trim_start_matches(|c: char| c.is_whitespace() || matches!(c, '(' | '-' | '*'));
        let mut chars = line.chars();
        let (Some(letter), Some(')' | '.' | ':')) = (chars.next(), chars.next()) else {
            continue;
        };
        let text = chars.as_str();
        if !text.starts_with(char::is_whitespace) || text.trim().is_empty() {
            continue;
        }
        match index(letter) {
            Some(0) => options = vec![normalise(text)],
            Some(i) if i == options.len() => options.push(normalise(text)),
            _ => {}
        }
    }
    if options.len() > 1 { options } else { Vec::new() }
}

/// 0 for A and a, 25 for Z and z.
fn index(letter: char) -> Option<usize> {
    letter.is_ascii_alphabetic().then(|| (letter.to_ascii_uppercase() as usize) - ('A' as usize))
}

/// Index of the option that an expected answer names, by letter (`B`, `b`, `(B)`, `B.`) or by text.
pub(super) fn named_option(answer: &str, options: &[String]) -> Option<usize> {
    let normal = normalise(answer);
    let by_letter = normal.trim_matches(['(', ')']);
    let mut chars = by_letter.chars();
    match (chars.next().and_then(index), chars.next()) {
        (Some(letter), None) => Some(letter).filter(|i| options.is_empty() || *i < options.len()),
        _ => options.iter().position(|o| *o == normal),
    }
}

/// Index of the option that a text chooses: the first letter on its own, else the first option text in whole words (the
/// longest of those that begin at the same place). The text after the last "answer is" or "answer:" is searched first,
/// then the whole text.
///
/// Upper-case letters count on their own; lower-case ones as `(b)`, `b)` or as the whole answer. `A` and `I` before a
/// lower-case word are an article and a pronoun, unless that word is is, because, since or as.
pub(super) fn choice(text: &str, options: &[String]) -> Option<usize> {
    let letters = if options.is_empty() { UNLISTED_CHOICES } else { options.len() };
    let regions = || announced(text).into_iter().chain([text]);
    let by_letter = regions().find_map(|region| {
        let first = first_line(region).and_then(|line| named_option(first_sentence(line), &[]));
        first.or_else(|| first_letter(region, letters)).filter(|i| *i < letters)
    });
    by_letter.or_else(|| regions().find_map(|region| first_option(&normalise(region), options)))
}

fn first_letter(text: &str, letters: usize) -> Option<usize> {
    let chars: Vec<char> = text.chars().collect();
    let at = |i: usize| chars.get(i).copied().unwrap_or(' ');
    let apart = |c: char| !c.is_alphanumeric() && !matches!(c, '\'' | '’' | '-');
    chars.iter().enumerate().find_map(|(i, &c)| {
        let letter = index(c).filter(|l| *l < letters)?;
        let alone = apart(i.checked_sub(1).map_or(' ', at)) && apart(at(i + 1));
        let clear = if c.is_ascii_lowercase() { at(i + 1) == ')' } else { !begins_phrase(c, chars.get(i + 1..)?) };
        (alone && clear).then_some(letter)
    })
}

/// Whether `A` or `I`, followed by `rest`, is an article or a pronoun.
fn begins_phrase(letter: char, rest: &[char]) -> bool {
    let next: String = match rest.split_first() {
        Some((space, rest)) if space.is_whitespace() => rest.iter().take_while(|c| c.is_alphanumeric()).collect(),
        _ => return false,
    };
    matches!(letter, 'A' | 'I')
        && next.starts_with(char::is_lowercase)
        && !["is", "because", "since", "as"].contains(&next.as_str())
}

fn first_option(text: &str, options: &[String]) -> Option<usize> {
    let word = |c: Option<char>| c.is_some_and(char::is_alphanumeric);
    let place = |option: &String| {
        text.match_indices(option.as_str()).map(|(at, _)| at).find(|at| {
            let before = text.get(..*at).and_then(|t| t.chars().next_back());
            let after = text.get(at + option.len()..).and_then(|t| t.chars().next());
            !word(before) && !word(after)
        })
    };
    let found = options.iter().enumerate().filter_map(|(i, option)| Some((place(option)?, option.len(), i)));
    found.min_by_key(|(at, length, _)| (*at, std::cmp::Reverse(*length))).map(|(_, _, i)| i)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn numbers_are_read_in_the_forms_in_use() {
        let cases = [
            ("The answer is 42.", 42.0),
            ("12 - 5 = 7", 7.0),
            ("-3", -3.0),
            ("is −3.50", -3.5),
            ("-$1,234,567.25 in all", -1234567.25),
            ("$-5", -5.0),
            ("pages 3-5", 5.0),
            ("x=-2", -2.0),
            ("(4)-3", 3.0),
            ("3/4", 0.75),
            ("-1/8", -0.125),
            ("7/0", 0.0),
            ("12,34", 34.0),
            ("1,2345", 2345.0),
            (".5", 0.5),
            ("6.02e23 molecules", 6.02e23),
            ("1e-3", 0.001),
            ("5 of H2O", 5.0),
            ("42km", 42.0),
            ("50%", 50.0),
            ("答案是42。", 42.0),
            ("**18**", 18.0),
            ("9 1e999", 9.0),
        ];
        for (text, value) in cases {
            assert_eq!(last_number(text), Some(value), "{text}");
        }
        assert_eq!(last_number("no number: H2O, x_1, -, ."), None);
    }

    #[test]
    fn options_are_read_from_the_question() {
        let question = "Which?\nA) red wine\n(B) Beer.\nC. water\n D: tea\nnot Z) this";
        assert_eq!(options(question), ["red wine", "beer", "water", "tea"]);
        assert_eq!(options("A) x\nB) y\n\nA) one\nB) two\nC) three"), ["one", "two", "three"]);
        assert!(options("A. Smith went out.\nWhy?").is_empty());
        assert!(options("A) x\nC) y").is_empty());
    }

    #[test]
    fn the_choice_is_the_first_letter_alone_or_option_text() {
        let drinks = options("?\nA) wine\nB) red wine\nC) water\nD) tea");
        let cases = [
            ("B", Some(1)),
            ("b", Some(1)),
            ("(c)", Some(2)),
            ("d) tea", Some(3)),
            ("**C**", Some(2)),
            ("C. Because it is wet.", Some(2)),
            ("A is right", Some(0)),
            ("A good choice is D.", Some(3)),
            ("Of A and B, the answer is B: wine is red.", Some(1)),
            ("Answer: c", Some(2)),
            ("I'd say the D-day drink is C", Some(2)),
            ("That would be red wine, or wine.", Some(1)),
            ("The best answer is **Water**.", Some(2)),
            ("Teapots hold nothing", None),
            ("E", None),
            ("", None),
        ];
        for (text, expected) in cases {
            assert_eq!(choice(text, &drinks), expected, "{text}");
        }
        assert_eq!(choice("I think it is I, or J", &[]), Some(8));
        assert_eq!(choice("I think it is J", &[]), Some(9));
    }

    proptest! {
        #[test]
        fn no_text_is_too_strange(
            text in "(\\PC|[-−$.,/e0-9AaBI()'\n ]|answer is|answer:|İ){0,40}",
            question in "(\n|[A-Da-d(][).:] ?|\\PC){0,20}",
        ) {
            let listed = options(&question);
            if let Some(chosen) = choice(&text, &listed) {
                let most = if listed.is_empty() { UNLISTED_CHOICES } else { listed.len() };
                prop_assert!(chosen < most);
            }
            named_option(&text, &listed);
            prop_assert!(last_number(&text).is_none_or(f64::is_finite));
            prop_assert!(final_answers(&text).contains(&normalise(&text)));
        }

        #[test]
        fn printed_numbers_are_read_back(value in -1e12f64..1e12, places in 0usize..6) {
            let printed = format!("so it is {value:.places$}.");
            let expected: f64 = format!("{value:.places$}").parse().unwrap();
            prop_assert_eq!(last_number(&printed), Some(expected));
        }
    }
}
