//! `swat generate`: answers of a model.

use super::common::{Common, print_json, print_line};
use super::names::Names;
use super::open::{ModelArgs, OnDevice};
use super::progress::Bars;
use crate::backend::Backend;
use crate::data::{RowOptions, RowReader, chat_prompt};
use crate::engine::GenerateOptions;
use crate::error::{Error, Result};
use crate::model::Message;
use clap::Args;
use serde_json::json;
use std::io::Write;
use std::path::PathBuf;
use std::time::Instant;

/// Answers of a model: chat template, greedy or sampled, many prompts at once
#[derive(Args)]
#[command(after_help = "Examples:
  swat generate --model DIR --prompt 'Why is the sky blue?'
  swat generate --model DIR --chat questions.jsonl --max-new-tokens 128 --json > answers.jsonl

A line of the chat file is {\"messages\": [{\"role\": …, \"content\": …}, …]} or {\"prompt\": …}.")]
pub(super) struct Generate {
    #[command(flatten)]
    model: ModelArgs,
    /// The user's message, rendered by the chat template
    #[arg(long, required_unless_present = "chat", conflicts_with = "chat")]
    prompt: Option<String>,
    /// Conversations to continue, one per line
    #[arg(long, value_name = "FILE")]
    chat: Option<PathBuf>,
    #[command(flatten)]
    rows: RowOptions,
    /// Continue the prompt's text itself, without a chat template
    #[arg(long)]
    raw: bool,
    /// System message in front of each prompt
    #[arg(long)]
    system: Option<String>,
    #[command(flatten)]
    options: GenerateOptions,
}

impl OnDevice for Generate {
    fn model(&self) -> Option<PathBuf> {
        Some(self.model.model.clone())
    }

    fn resolve(&mut self, names: &mut Names<'_>) -> Result<()> {
        self.model.resolve(names)
    }

    fn run<B: Backend>(self, common: &Common, backend: B) -> Result<()> {
        let mut rows = RowReader::new(&self.rows);
        let conversations: Vec<(String, Vec<Message>)> = match (&self.prompt, &self.chat) {
            (Some(text), _) => vec![("--prompt".into(), vec![Message::new("user", text)])],
            (None, Some(path)) => rows.read(path, |row| Ok((row.place.clone(), chat_prompt(row)?)))?,
            (None, None) => Vec::new(),
        };
        common.end_reading(&rows)?;
        let text = match self.raw {
            true => self.model.open_plain_text()?,
            false => self.model.open_text()?,
        };
        let most = text.files.config.max_positions - 1;
        let mut prompts = Vec::with_capacity(conversations.len());
        for (place, mut messages) in conversations {
            if let Some(system) = &self.system {
                if messages.first().is_some_and(|message| message.role == "system") {
                    return Err(Error::input(place, "a system message beside --system", "one of them"));
                }
                messages.insert(0, Message::new("system", system));
            }
            let prompt = if self.raw {
                let lines: Vec<&str> = messages.iter().map(|m| m.content.as_str()).collect();
                text.tokenizer.encode_with_special_tokens(&lines.join("\n"))?
            } else {
                text.render(&messages).map_err(|e| e.at(&place))?
            };
            if prompt.is_empty() || prompt.len() > most {
                let expected = format!("1 to {most}, by the model's context");
                return Err(Error::input(place, format!("a prompt of {} tokens", prompt.len()), expected));
            }
            prompts.push(prompt);
        }
        let stop = text.stop_tokens();
        let model = text.load(backend)?;
        let options = GenerateOptions { seed: common.seed, stop, ..self.options };

        let stream = prompts.len() == 1 && !common.json;
        let mut text = model.text.tokenizer.stream();
        let mut bars = Bars::new(common);
        let mut left = vec![0usize; prompts.len()];
        let (started, mut drawn, mut begun, total) = (Instant::now(), 0u64, 0, prompts.len() as u64);
        let answers = model.decoder.generate(&prompts, &options, &mut |prompt, token| {
            drawn += 1;
            left[prompt] += 1;
            if stream && !options.stop.contains(&token) {
                let mut out = std::io::stdout().lock();
                let piece = text.step(token).unwrap_or_default();
                let _ = out.write_all(piece.as_bytes()).and_then(|()| out.flush());
            } else if left[prompt] == 1 && !stream {
                begun += 1;
                bars.report("generating", "answers", (begun, total), String::new);
            }
        })?;
        bars.finish();
        let rate = drawn as f64 / started.elapsed().as_secs_f64();
        if stream {
            return print_line(&text.finish()?);
        }
        for (prompt, answer) in prompts.iter().zip(answers) {
            let decoded = model.text.tokenizer.decode(&answer.tokens)?;
            if common.json {
                print_json(&json!({
                    "text": decoded, "tokens": answer.tokens, "finish": answer.finish, "tok_per_s": rate,
                    "prompt_tokens": prompt.len(),
                }))?;
            } else {
                print_line(&decoded)?;
            }
        }
        Ok(())
    }
}
