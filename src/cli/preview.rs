//! `swat tune --preview`: what a run would learn, before any weights are read.

use super::common::{Common, print_json, print_line};
use super::open::ModelArgs;
use crate::data::{DataSize, RowOptions, RowReader};
use crate::error::Result;
use crate::report::format::percent;
use serde_json::json;
use std::path::PathBuf;

/// Brackets around trained text.
const TRAINED: [&str; 2] = ["\u{27e6}", "\u{27e7}"];

/// What is said of conversations of whose answers the template leaves out a part.
pub(super) const LEFT_OUT: &str =
    "lose a part of an answer, such as thinking: the chat template leaves it out, and it is not trained";

/// Prints the first example of `data` with its loss mask, and how many tokens of all examples are trained.
pub(super) fn preview(
    common: &Common,
    model: &ModelArgs,
    data: &[PathBuf],
    rows: &RowOptions,
    max_length: usize,
) -> Result<()> {
    let text = model.open_text()?;
    let chat = text.chat()?;
    let (mut examples, mut rows, mut left_out) = (Vec::new(), RowReader::new(rows), 0);
    for path in data {
        let read = text.examples(path, max_length, &mut rows)?;
        examples.extend(read.examples);
        left_out += read.left_out;
    }
    common.end_reading(&rows)?;
    let all = DataSize::of(&examples);
    let Some(first) = examples.first() else { return Ok(()) };
    let (parts, size) = (first.parts(chat.tokenizer())?, DataSize::of(&examples[..1]));
    let stop = chat.stop_tokens();
    let ends = stop.iter().map(|token| chat.tokenizer().decode_all(&[*token])).collect::<Result<Vec<_>>>()?;
    if common.json {
        return print_json(&json!({ "first": { "parts": parts, "tokens": first.tokens, "trained": first.trained,
            "trained_share": size.trained_share }, "data": all, "left_out": left_out, "stop_tokens": stop,
            "stop": ends }));
    }
    let shown = |part: &str| -> String {
        let plain = |c: char| c == '\n' || c == '\t' || !c.is_control();
        part.chars().flat_map(|c| if plain(c) { vec![c] } else { c.escape_default().collect() }).collect()
    };
    let parts = parts.iter().map(|part| match part.trained {
        true => format!("{}{}{}", TRAINED[0], shown(&part.text), TRAINED[1]),
        false => shown(&part.text),
    });
    let marks = format!("{}{}", TRAINED[0], TRAINED[1]);
    print_line(&format!("the first of {} examples; what is trained is in {marks}\n", all.examples))?;
    print_line(parts.collect::<String>().trim_end_matches('\n'))?;
    let share = |size: &DataSize| {
        format!("{} of {} tokens ({})", size.trained_tokens, size.tokens, percent(size.trained_share, 1))
    };
    print_line(&format!("\ntrained: {} of this example, {} of all", share(&size), share(&all)))?;
    if left_out > 0 {
        print_line(&format!("{left_out} of {} examples {LEFT_OUT}", all.examples))?;
    }
    print_line(&format!("answers end at {}", ends.join(" or ").escape_debug()))
}
