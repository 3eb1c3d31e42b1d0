//! `swat generate`: answers of a model.

use super::open::{ModelArgs, OnDevice};
use super::{Common, print_json, print_line, progress};
use crate::backend::{Backend, Sampling};
use crate::data::JsonLines;
use crate::engine::GenerateOptions;
use crate::error::{Error, Result};
use crate::model::Message;
use clap::Args;
use serde_json::json;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Answers of a model: chat template, greedy or sampled, many prompts at once
#[derive(Args)]
#[command(after_help = "Examples:
  swat generate --model DIR --prompt 'Why is the sky blue?'
  swat generate --model DIR --chat questions.jsonl --max-new-tokens 128 --json > answers.jsonl

A line of the chat file is {\"messages\": [{\"role\": …, \"content\": …}, …]} or {\"prompt\": …}.")]
pub(super) struct Generate {
    #[command(flatten)]
    common: Common,
    #[command(flatten)]
    model: ModelArgs,
    /// What the user says; the chat template is put around it
    #[arg(long, required_unless_present = "chat", conflicts_with = "chat")]
    prompt: Option<String>,
    /// Conversations to continue, one a line
    #[arg(long, value_name = "FILE")]
    chat: Option<PathBuf>,
    /// Continue the prompt's text itself, without a chat template
    #[arg(long)]
    raw: bool,
    /// System message in front of each prompt
    #[arg(long)]
    system: Option<String>,
    /// Longest answer
    #[arg(long, default_value_t = 256)]
    max_new_tokens: usize,
    /// 0 = greedy
    #[arg(long, default_value_t = 0.0)]
    temperature: f32,
    /// Draw from the smallest set of tokens that has this probability
    #[arg(long, default_value_t = 1.0)]
    top_p: f32,
    /// Memory for keys and values, in MiB; decides how many prompts run at once
    #[arg(long, default_value_t = 1024)]
    cache_mib: u64,
}

impl OnDevice for Generate {
    fn common(&self) -> &Common {
        &self.common
    }

    fn run<B: Backend>(self, backend: B) -> Result<()> {
        if !(self.temperature >= 0.0 && self.temperature.is_finite()) {
            return Err(Error::input("--temperature", self.temperature.to_string(), "0 (greedy) or more"));
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return Err(Error::input("--top-p", self.top_p.to_string(), "more than 0, at most 1"));
        }
        let conversations: Vec<Vec<Message>> = match (&self.prompt, &self.chat) {
            (Some(text), _) => vec![vec![Message { role: "user".into(), content: text.clone() }]],
            (None, Some(path)) => read_prompts(path)?,
            (None, None) => Vec::new(),
        };
        let opened = self.model.open(backend)?;
        let template = if self.raw { None } else { Some(self.model.template(&opened.files)?) };
        let mut prompts = Vec::with_capacity(conversations.len());
        for mut messages in conversations {
            if let Some(system) = &self.system {
                messages.insert(0, Message { role: "system".into(), content: system.clone() });
            }
            prompts.push(match &template {
                Some(template) => opened.tokenizer.encode(&template.render(&messages, true)?, false)?,
                None => {
                    let text: Vec<&str> = messages.iter().map(|m| m.content.as_str()).collect();
                    opened.tokenizer.encode(&text.join("\n"), true)?
                }
            });
        }
        let options = GenerateOptions {
            max_new_tokens: self.max_new_tokens,
            sampling: Sampling { temperature: self.temperature, top_p: self.top_p },
            seed: self.common.seed,
            stop: opened.decoder.config.eos.clone(),
            cache_bytes: self.cache_mib << 20,
        };

        let stream = prompts.len() == 1 && !self.common.json;
        let mut text = opened.tokenizer.stream();
        let bar = progress::bar(&self.common, prompts.len() as u64, "generating", "answers");
        let mut left = vec![0usize; prompts.len()];
        let (started, mut drawn) = (Instant::now(), 0u64);
        let answers = opened.decoder.generate(&prompts, &options, &mut |prompt, token| {
            drawn += 1;
            left[prompt] += 1;
            if stream && !options.stop.contains(&token) {
                let mut out = std::io::stdout().lock();
                let piece = text.step(token).unwrap_or_default();
                let _ = out.write_all(piece.as_bytes()).and_then(|()| out.flush());
            } else if left[prompt] == 1 && !stream {
                bar.inc(1);
            }
        })?;
        bar.finish_and_clear();
        let rate = drawn as f64 / started.elapsed().as_secs_f64();
        if stream {
            return print_line(&text.finish()?);
        }
        for (prompt, answer) in prompts.iter().zip(answers) {
            let decoded = opened.tokenizer.decode(&answer.tokens)?;
            if self.common.json {
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

/// Conversations of a chat file, to be continued by the model.
fn read_prompts(path: &Path) -> Result<Vec<Vec<Message>>> {
    JsonLines::open(path)?.parse_all(|line| {
        if line.get("prompt").is_some() {
            return Ok(vec![Message { role: "user".into(), content: line.text("prompt")?.into() }]);
        }
        let expected = "\"messages\": a list of {\"role\", \"content\"} that ends with the user, or \"prompt\": text";
        let messages = line.get("messages").cloned().unwrap_or_default();
        let messages: Vec<Message> =
            serde_json::from_value(messages).map_err(|_| line.error("no such messages", expected))?;
        match messages.last() {
            Some(last) if last.role != "assistant" => Ok(messages),
            _ => Err(line.error("no question to answer", expected)),
        }
    })
}
