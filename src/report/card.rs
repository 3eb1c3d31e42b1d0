//! The model card of a tuned model: `README.md` as the hub reads it.

use super::check::{agreement_tables, check_tables};
use super::secure::{data_table, files_table, screened_line, sentence, tried_table, verdict_line};
use super::table::markdown_text;
use crate::secure::Check;
use crate::secure::pipeline::SecureOutcome;

/// The card: metadata in YAML, the verdict, the safety table with its gates, what was tried, and how it can be repeated.
pub fn model_card(outcome: &SecureOutcome, check: &Check) -> String {
    let [measures, gates, answers] = check_tables(check);
    let mut text = metadata(outcome);
    let mut push = |part: String| {
        text.push('\n');
        text.push_str(part.trim_end());
        text.push('\n');
    };
    push("# A tuned model, with its safety measured".into());
    push(format!("**{}**", verdict_line(outcome)));
    push(format!(
        "Tuned from {}{} by `swat secure`. \"base\" is the original model, \"tuned\" this one. Both were asked the same \
         prompts, which no step of tuning or choosing has seen.",
        code(&outcome.base.name),
        outcome.base.adapter.as_ref().map_or(String::new(), |adapter| format!(" with the adapter {}", code(adapter)))
    ));
    push(measures.markdown());
    push(gates.markdown());
    push(answers.markdown());
    agreement_tables(check).iter().for_each(|table| push(table.markdown()));
    if !outcome.advice.is_empty() {
        push("## What to try".into());
        push(outcome.advice.iter().map(|advice| format!("- {}\n", markdown_text(&sentence(advice)))).collect());
    }
    push("## What was tried".into());
    push(tried_table(outcome).markdown());
    push("## Data".into());
    screened_line(outcome).into_iter().for_each(&mut push);
    push(data_table(outcome).markdown());
    push(files_table(outcome).markdown());
    push("## How to reproduce it".into());
    push(format!("```\n{}\n```", outcome.command.replace("```", "'''")));
    push(format!(
        "Seed {}. swat {}. Base model {}, hash `{}`.",
        outcome.seed,
        markdown_text(&outcome.swat),
        code(&outcome.base.name),
        outcome.base.hash
    ));
    text
}

fn metadata(outcome: &SecureOutcome) -> String {
    // JSON's strings are YAML's, in double quotes.
    let quoted = |text: &str| serde_json::Value::from(text).to_string();
    // The hub's name for a licence that is not stated.
    let license = outcome.base.license.as_deref().map_or_else(|| "unknown".to_owned(), quoted);
    format!(
        "---\nbase_model: {}\nlicense: {license}\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n\
         - swat\n- safety\n---\n",
        quoted(&outcome.base.name)
    )
}

/// Text between backticks.
fn code(text: &str) -> String {
    let plain = |c: char| if c == '`' || c.is_control() { '\u{fffd}' } else { c };
    format!("`{}`", text.chars().map(plain).collect::<String>())
}
