//! Tokenized training examples and their loss mask.
//!
//! The trained tokens of an answer are those that the template renders after the generation prompt, up to and including
//! the end-of-turn token.

use super::Conversation;
use super::jsonl::JsonLines;
use crate::error::{Error, Result};
use crate::model::{ChatTemplate, Message, Tokenizer};
use rayon::prelude::*;
use std::collections::HashSet;
use std::path::Path;

/// Upper bound on the average bytes of a token. Text beyond this many bytes for each token of the maximum length is not
/// encoded, which bounds the work on a hostile line.
const MAX_BYTES_PER_TOKEN: usize = 256;

/// Renders and tokenizes conversations; [`Chat`] does so for a model directory.
pub trait ChatText: Sync {
    /// Renders a whole conversation.
    ///
    /// # Errors
    /// [`Error::Input`] where the template rejects the messages.
    fn render(&self, messages: &[Message]) -> Result<String>;
    /// Renders a conversation and the generation prompt, such as the assistant's header.
    ///
    /// # Errors
    /// [`Error::Input`] where the template rejects the messages.
    fn render_prompt(&self, messages: &[Message]) -> Result<String>;
    /// Token ids of rendered text, without added special tokens.
    ///
    /// # Errors
    /// [`Error::Input`] where the tokenizer rejects the text.
    fn encode(&self, text: &str) -> Result<Vec<u32>>;
    /// Whether this token ends the assistant's turn.
    fn ends_turn(&self, token: u32) -> bool;
}

/// A model's chat template and tokenizer.
pub struct Chat<'a> {
    template: &'a ChatTemplate,
    tokenizer: &'a Tokenizer,
    ends: HashSet<u32>,
}

impl<'a> Chat<'a> {
    /// Every token of `eos` and every special token of the tokenizer ends a turn: a model whose `eos` is
    /// `<|endoftext|>` may still have a template that ends turns with `<|im_end|>`.
    pub fn new(template: &'a ChatTemplate, tokenizer: &'a Tokenizer, eos: &[u32]) -> Self {
        // Only special tokens decode to nothing; doubling the id reveals a space that the decoder strips at the front.
        let silent = |ids: &[u32]| tokenizer.decode(ids).is_ok_and(|text| text.is_empty());
        let special = (0..tokenizer.vocab() as u32).filter(|&id| silent(&[id]) && silent(&[id, id]));
        Self { template, tokenizer, ends: special.chain(eos.iter().copied()).collect() }
    }
}

impl ChatText for Chat<'_> {
    fn render(&self, messages: &[Message]) -> Result<String> {
        self.template.render(messages)
    }

    fn render_prompt(&self, messages: &[Message]) -> Result<String> {
        self.template.render_prompt(messages)
    }

    fn encode(&self, text: &str) -> Result<Vec<u32>> {
        self.tokenizer.encode(text)
    }

    fn ends_turn(&self, token: u32) -> bool {
        self.ends.contains(&token)
    }
}

/// A tokenized conversation and its loss mask.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Example {
    /// Token ids.
    pub tokens: Vec<u32>,
    /// Whether the prediction of this token counts in the loss, \[tokens\]; always false for the first.
    pub trained: Vec<bool>,
}

impl Example {
    /// Tokenizes a conversation, masks everything but its answers, and truncates to `max_length` tokens. `None` where
    /// no trained token remains. An assistant turn is trained where the text up to its generation prompt is a prefix of
    /// the rendered conversation; turns whose history the template rewrites (Qwen3 drops the thinking of earlier turns)
    /// are not.
    ///
    /// The text is encoded as a whole where the result begins with the tokens of the generation prompt. Where a token
    /// would straddle that boundary, prompt and rest are encoded separately, since generation continues the prompt's
    /// tokens too.
    ///
    /// # Errors
    /// [`Error::Input`] where the template fails, no answer begins where its generation prompt ends, or no answer ends
    /// with an end-of-turn token.
    pub fn from_conversation(
        conversation: &Conversation,
        chat: &impl ChatText,
        max_length: usize,
    ) -> Result<Option<Self>> {
        Ok(Marked::new(&conversation.messages, chat, max_length)?.fit(max_length).0)
    }

    /// Number of tokens that count in the loss.
    pub fn trained_tokens(&self) -> usize {
        self.trained.iter().filter(|t| **t).count()
    }
}

/// A conversation's tokens and mask before truncation.
struct Marked {
    example: Example,
    /// Whether text beyond `max_length` was not tokenized.
    beyond: bool,
}

impl Marked {
    fn new(messages: &[Message], chat: &impl ChatText, max_length: usize) -> Result<Self> {
        let mut text = chat.render(messages)?;
        let most = max_length.saturating_mul(MAX_BYTES_PER_TOKEN);
        let mut beyond = text.len() > most;
        let truncated = beyond;
        if truncated {
            text.truncate((0..=most).rev().find(|end| text.is_char_boundary(*end)).unwrap_or(0));
        }
        let mut tokens = Vec::new();
        // `rest` encodes the text from this byte on; the text before it is in `tokens`.
        let mut piece = 0;
        let mut rest = chat.encode(&text)?;
        let mut starts = Vec::new();
        for (turn, _) in messages.iter().enumerate().filter(|(_, m)| m.role == "assistant") {
            let prompt = chat.render_prompt(messages.get(..turn).unwrap_or_default())?;
            if truncated && prompt.len() >= text.len() {
                break;
            }
            let Some(head) = text.get(piece..prompt.len()).filter(|_| text.starts_with(&prompt)) else {
                continue;
            };
            let head = chat.encode(head)?;
            let start = tokens.len() + head.len();
            if start >= max_length {
                // This also bounds the number of prompts rendered by `max_length`.
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

    /// Truncates to `max_length`; also returns whether that dropped trained tokens.
    fn fit(self, max_length: usize) -> (Option<Example>, bool) {
        let Self { mut example, beyond } = self;
        let before = example.trained_tokens();
        example.tokens.truncate(max_length);
        example.trained.truncate(max_length);
        let after = example.trained_tokens();
        ((after > 0).then_some(example), beyond || after < before)
    }
}

/// The tokenized examples of a training file, in file order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Examples {
    /// At least one example, each with a trained token and at most the maximum length.
    pub examples: Vec<Example>,
    /// Number of examples that lost trained tokens to truncation.
    pub cut: usize,
    /// Number of conversations dropped because their first prompt fills the maximum length.
    pub dropped: usize,
}

impl Examples {
    /// Reads and tokenizes a JSONL file of [`Conversation`]s.
    ///
    /// # Errors
    /// [`Error::Input`] for the first malformed line, or where no example remains; [`Error::Io`].
    pub fn read(path: &Path, chat: &impl ChatText, max_length: usize) -> Result<Self> {
        let lines = JsonLines::open(path)?;
        let placed = lines.parse_all(|line| Ok((line.place.clone(), Conversation::from_line(line)?)))?;
        let marked = placed.par_iter().map(|(place, conversation)| {
            Marked::new(&conversation.messages, chat, max_length).map_err(|e| at_line(place, e))
        });
        Self::collect(&path.display().to_string(), marked, max_length)
    }

    /// Place and tokens of the first conversation of a file that has more than `limit` tokens; `None` where there is
    /// none.
    ///
    /// # Errors
    /// As [`Examples::read`].
    pub fn first_longer(path: &Path, chat: &impl ChatText, limit: usize) -> Result<Option<(String, usize)>> {
        let lines = JsonLines::open(path)?;
        let placed = lines.parse_all(|line| Ok((line.place.clone(), Conversation::from_line(line)?)))?;
        let longer = placed.par_iter().map(|(place, conversation)| {
            let tokens = chat.encode(&chat.render(&conversation.messages).map_err(|e| at_line(place, e))?)?.len();
            Ok((tokens > limit).then(|| (place.clone(), tokens)))
        });
        longer.find_first(|found| !matches!(found, Ok(None))).unwrap_or(Ok(None))
    }

    /// Tokenizes conversations.
    ///
    /// # Errors
    /// [`Error::Input`] as [`Examples::read`].
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

/// Prefixes an error about a line's content with the line's place.
fn at_line(line: &str, error: Error) -> Error {
    match error {
        Error::Input { place, found, expected } => Error::input(format!("{line}: {place}"), found, expected),
        Error::Unsupported { place, what, help } => Error::unsupported(format!("{line}: {place}"), what, help),
        other => other,
    }
}
