//! Tokenised training examples and their loss mask.
//!
//! The trained tokens of an answer are those that the template renders after the generation prompt, up to and including
//! the end-of-turn token; what it renders behind that is not trained.

use super::Conversation;
use super::jsonl::JsonLines;
use crate::error::{Error, Result};
use crate::model::{ChatTemplate, Message, Tokenizer};
use rayon::prelude::*;
use std::collections::HashSet;
use std::path::Path;

/// More bytes than a token stands for on average in any text: what lies beyond this many for each token of the maximal
/// length is not encoded, so that a hostile line costs no more than a long one.
const MOST_BYTES_PER_TOKEN: usize = 256;

/// How a model writes conversations; [`Chat`] is that of a real one.
pub trait ChatText: Sync {
    /// The conversation as text; `generation_prompt` ends it with the assistant's header.
    fn render(&self, messages: &[Message], generation_prompt: bool) -> Result<String>;
    /// Tokens of rendered text, none added.
    fn encode(&self, text: &str) -> Result<Vec<u32>>;
    /// Whether an answer ends with this token.
    fn ends_turn(&self, token: u32) -> bool;
}

/// A model's chat template and tokenizer.
pub struct Chat<'a> {
    template: &'a ChatTemplate,
    tokenizer: &'a Tokenizer,
    ends: HashSet<u32>,
}

impl<'a> Chat<'a> {
    /// Answers end with a token of `eos` or with any special token of the tokenizer: a model whose `eos` is
    /// `<|endoftext|>` may still have a template that ends turns with `<|im_end|>`.
    pub fn new(template: &'a ChatTemplate, tokenizer: &'a Tokenizer, eos: &[u32]) -> Self {
        // Decoding skips special tokens and those alone; a space that a decoder strips at the front shows when doubled.
        let silent = |ids: &[u32]| tokenizer.decode(ids).is_ok_and(|text| text.is_empty());
        let special = (0..tokenizer.vocab() as u32).filter(|&id| silent(&[id]) && silent(&[id, id]));
        Self { template, tokenizer, ends: special.chain(eos.iter().copied()).collect() }
    }
}

impl ChatText for Chat<'_> {
    fn render(&self, messages: &[Message], generation_prompt: bool) -> Result<String> {
        self.template.render(messages, generation_prompt)
    }

    fn encode(&self, text: &str) -> Result<Vec<u32>> {
        self.tokenizer.encode(text, false)
    }

    fn ends_turn(&self, token: u32) -> bool {
        self.ends.contains(&token)
    }
}

/// Tokens of a conversation and which of them are to be learnt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Example {
    /// Token ids.
    pub tokens: Vec<u32>,
    /// Whether the loss counts for predicting this token, \[tokens\]; never the first.
    pub trained: Vec<bool>,
}

impl Example {
    /// Tokenises a conversation and marks its answers; what lies beyond `max_length` tokens is cut off. `None` where no
    /// trained token is left then. Every assistant turn is trained whose generation prompt is a prefix of the whole
    /// rendered text: not so a turn before which the template rewrites what was said (Qwen3 takes the thinking out of
    /// earlier turns). No such turn, or none with an end, is an error.
    ///
    /// The text is encoded as a whole where its tokens begin with those of the generation prompt alone. Where a token
    /// would straddle the boundary, prompt and rest are encoded apart: generation, too, continues the prompt's tokens.
    ///
    /// # Errors
    /// [`Error::Input`] where the template fails, or no assistant turn can be told apart in what it renders.
    pub fn from_conversation(
        conversation: &Conversation,
        chat: &impl ChatText,
        max_length: usize,
    ) -> Result<Option<Self>> {
        Ok(Marked::new(&conversation.messages, chat, max_length)?.fit(max_length).0)
    }

    /// Tokens that are to be learnt.
    pub fn trained_tokens(&self) -> usize {
        self.trained.iter().filter(|t| **t).count()
    }
}

/// A conversation's tokens before the cut.
struct Marked {
    example: Example,
    /// Text is left out, all of it beyond `max_length`.
    beyond: bool,
}

impl Marked {
    fn new(messages: &[Message], chat: &impl ChatText, max_length: usize) -> Result<Self> {
        let mut text = chat.render(messages, false)?;
        let most = max_length.saturating_mul(MOST_BYTES_PER_TOKEN);
        let mut beyond = text.len() > most;
        let truncated = beyond;
        if truncated {
            text.truncate((0..=most).rev().find(|end| text.is_char_boundary(*end)).unwrap_or(0));
        }
        let mut tokens = Vec::new();
        // The text from here on is `rest`, the text before it is in `tokens`.
        let mut piece = 0;
        let mut rest = chat.encode(&text)?;
        let mut starts = Vec::new();
        for (turn, _) in messages.iter().enumerate().filter(|(_, m)| m.role == "assistant") {
            let prompt = chat.render(messages.get(..turn).unwrap_or_default(), true)?;
            if truncated && prompt.len() >= text.len() {
                break;
            }
            let Some(head) = text.get(piece..prompt.len()).filter(|_| text.starts_with(&prompt)) else {
                continue;
            };
            let head = chat.encode(head)?;
            let start = tokens.len() + head.len();
            if start >= max_length {
                // A limit on the work too: no more prompts are rendered than there are tokens in `max_length`.
                beyond = true;
                break;
            }
            if !rest.starts_with(&head) {
                tokens.extend(head);
                piece = prompt.len();
                rest = chat.encode(text.get(piece..).unwrap_or_default())?;
            }
            starts.push(start);
        }
        tokens.extend(rest);

        let mut trained = vec![false; tokens.len()];
        let ends: Vec<usize> = starts.iter().skip(1).copied().chain([tokens.len()]).collect();
        for (&start, end) in starts.iter().zip(ends) {
            let region = tokens.get(start..end).unwrap_or_default();
            let length = match region.iter().position(|t| chat.ends_turn(*t)) {
                Some(last) => last + 1,
                None if truncated && end == tokens.len() => region.len(),
                None => 0,
            };
            trained.iter_mut().skip(start).take(length).for_each(|t| *t = true);
        }
        if let Some(first) = trained.first_mut() {
            *first = false;
        }
        if !beyond && starts.is_empty() {
            return Err(Error::input(
                "chat template",
                "no answer that begins where the generation prompt ends",
                "a template whose generation prompt is what it writes before an answer",
            ));
        }
        if !beyond && !trained.contains(&true) {
            return Err(Error::input(
                "chat template",
                "no special token or eos token at the end of an answer, so the model would never learn to stop",
                "a template that ends the assistant's turn with such a token",
            ));
        }
        Ok(Self { example: Example { tokens, trained }, beyond })
    }

    /// The example cut at `max_length`, and whether the cut took trained tokens.
    fn fit(self, max_length: usize) -> (Option<Example>, bool) {
        let Self { mut example, beyond } = self;
        let before = example.trained_tokens();
        example.tokens.truncate(max_length);
        example.trained.truncate(max_length);
        let after = example.trained_tokens();
        ((after > 0).then_some(example), beyond || after < before)
    }
}

/// The examples of a training file, in its order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Examples {
    /// Not empty; each at most as long as was asked for, each with a trained token.
    pub examples: Vec<Example>,
    /// How many of them lost a part of their answers to the maximal length.
    pub cut: usize,
    /// Conversations left out: already the first prompt is as long as the maximal length.
    pub dropped: usize,
}

impl Examples {
    /// Reads and tokenises a JSONL file of [`Conversation`]s. An error names the first wrong line; a file of which
    /// nothing is left is an error too.
    ///
    /// # Errors
    /// [`Error::Input`] names the first wrong line, or says that nothing is left of the file; [`Error::Io`].
    pub fn read(path: &Path, chat: &impl ChatText, max_length: usize) -> Result<Self> {
        let lines = JsonLines::open(path)?;
        let placed = lines.parse_all(|line| Ok((line.place.clone(), Conversation::from_line(line)?)))?;
        let marked = placed.par_iter().map(|(place, conversation)| {
            Marked::new(&conversation.messages, chat, max_length).map_err(|e| at_line(place, e))
        });
        Self::collect(&path.display().to_string(), marked, max_length)
    }

    /// The same for conversations that come from elsewhere.
    ///
    /// # Errors
    /// As [`Examples::read`], the conversations counted from 1.
    pub fn from_conversations(conversations: &[Conversation], chat: &impl ChatText, max_length: usize) -> Result<Self> {
        let marked = conversations.par_iter().map(|c| Marked::new(&c.messages, chat, max_length));
        Self::collect("training data", marked, max_length)
    }

    fn collect(
        place: &str,
        marked: impl IndexedParallelIterator<Item = Result<Marked>>,
        max_length: usize,
    ) -> Result<Self> {
        let fitted: Vec<_> = marked.map(|m| m.map(|m| m.fit(max_length))).collect();
        let mut all = Self { examples: Vec::new(), cut: 0, dropped: 0 };
        for fitted in fitted {
            match fitted? {
                (Some(example), cut) => {
                    all.examples.push(example);
                    all.cut += usize::from(cut);
                }
                (None, _) => all.dropped += 1,
            }
        }
        if all.examples.is_empty() {
            let found = format!("no conversation whose first prompt is shorter than {max_length} tokens");
            return Err(Error::input(place, found, "shorter prompts, or a larger --max-length"));
        }
        Ok(all)
    }
}

/// Puts the line before the place of an error about its content.
fn at_line(line: &str, error: Error) -> Error {
    match error {
        Error::Input { place, found, expected } => Error::input(format!("{line}: {place}"), found, expected),
        Error::Unsupported { place, what, help } => Error::unsupported(format!("{line}: {place}"), what, help),
        other => other,
    }
}

#[cfg(test)]
mod tests;
