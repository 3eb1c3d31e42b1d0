//! Tokenized training examples and their loss mask.
//!
//! The trained tokens of a conversation are those that the template marks by `{% generation %}`, as transformers'
//! `return_assistant_tokens_mask`. Of a template without such marks they are, for each answer, those from where its
//! generation begins up to and including the end-of-turn token.

use super::Conversation;
use super::chat::{Answer, Chat};
use super::rows::RowReader;
use crate::error::{Error, Result};
use crate::model::{Message, Rendered, Tokenizer, Training};
use rayon::prelude::*;
use std::ops::Range;
use std::path::Path;

/// Upper bound on the average bytes of a token. Text beyond this many bytes for each token of the maximum length is not
/// encoded, which bounds the work on a hostile line.
const MAX_BYTES_PER_TOKEN: usize = 256;

/// A tokenized conversation and its loss mask.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Example {
    /// Token ids.
    pub tokens: Vec<u32>,
    /// Whether the prediction of this token counts in the loss, \[tokens\]; always false for the first.
    pub trained: Vec<bool>,
    /// Whether its answers are the model's own from before tuning, mixed into the training data: what `--distil` distils.
    pub replayed: bool,
}

impl Example {
    /// Tokenizes a conversation, masks everything but its answers, and truncates to `max_length` tokens. `None` where
    /// no trained token remains.
    ///
    /// The text is encoded as a whole where the result begins with the tokens of each answer's prompt. Where a token
    /// would straddle that boundary, prompt and rest are encoded separately, since generation continues the prompt's
    /// tokens too. A template's own marks split nothing, as in transformers.
    ///
    /// # Errors
    /// [`Error::Input`] where the template fails, does not show which text is an answer, or ends no answer with an
    /// end-of-turn token.
    pub fn from_conversation(conversation: &Conversation, chat: &Chat, max_length: usize) -> Result<Option<Self>> {
        Ok(Marked::new(conversation, chat, max_length)?.fit(max_length).0)
    }

    /// Number of tokens that count in the loss.
    pub fn trained_tokens(&self) -> usize {
        self.trained.iter().filter(|t| **t).count()
    }
}

impl Example {
    /// The text in parts that are trained and parts that are not, in turn.
    ///
    /// # Errors
    /// [`Error::Input`] where the tokenizer rejects the tokens.
    pub fn parts(&self, tokenizer: &Tokenizer) -> Result<Vec<Part>> {
        let mut parts = Vec::new();
        let (mut start, mut given) = (0, 0);
        for run in self.trained.chunk_by(|a, b| a == b) {
            start += run.len();
            // Of all tokens so far, since some decoders strip white space at the front of a text.
            let text = tokenizer.decode_all(self.tokens.get(..start).unwrap_or_default())?;
            let part = text.get(given..).unwrap_or_default().to_owned();
            given = text.len();
            parts.push(Part { text: part, trained: run.first() == Some(&true) });
        }
        Ok(parts)
    }
}

/// A part of an example's text.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Part {
    /// Decoded text, special tokens among it.
    pub text: String,
    /// Whether its tokens count in the loss.
    pub trained: bool,
}

/// Size of a set of examples.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct DataSize {
    /// Examples.
    pub examples: usize,
    /// Their tokens.
    pub tokens: usize,
    /// Tokens that count in the loss.
    pub trained_tokens: usize,
    /// trained_tokens / tokens; 0 without tokens.
    pub trained_share: f64,
}

impl DataSize {
    /// Counts examples.
    pub fn of(examples: &[Example]) -> Self {
        let tokens = examples.iter().map(|example| example.tokens.len()).sum();
        let trained_tokens = examples.iter().map(Example::trained_tokens).sum();
        let trained_share = trained_tokens as f64 / (tokens as f64).max(1.0);
        Self { examples: examples.len(), tokens, trained_tokens, trained_share }
    }
}

/// A conversation's tokens and mask before truncation.
struct Marked {
    example: Example,
    /// Whether text beyond `max_length` was not tokenized.
    beyond: bool,
    /// Whether the data say of every answer that it is not trained.
    context: bool,
    /// Whether the template leaves out a part of an answer that is trained.
    left_out: bool,
}

impl Marked {
    fn new(conversation: &Conversation, chat: &Chat, max_length: usize) -> Result<Self> {
        let Conversation { messages, tools } = conversation;
        let template = chat.template().of(tools);
        if !tools.is_empty() && !template.source().contains("tools") {
            let expected =
                "a template that tells the model of its tools, or rows without them (--columns unused=tools)";
            return Err(Error::input(template.place(), "no `tools`, which the row has", expected));
        }
        let Rendered { text, generated } = chat.render(messages, tools)?;
        let most = max_length.saturating_mul(MAX_BYTES_PER_TOKEN);
        let end = if text.len() > most { floor_boundary(&text, most) } else { text.len() };
        let mut pieces = Pieces::new(chat, &text, end)?;
        let answers = messages.iter().filter(|message| message.role == "assistant");
        let context = answers.clone().all(|message| message.training == Training::Context);
        let mut beyond = end < text.len();
        if context {
            // Nothing to mark.
        } else if template.marks_answers() {
            pieces.mark(&marks_of(chat, messages, generated)?);
        } else {
            let mut located = Vec::new();
            for (turn, message) in messages.iter().enumerate() {
                if message.role != "assistant" || message.training == Training::Context {
                    continue;
                }
                let answer = chat.locate(&text, messages, tools, turn)?;
                if answer.text.start >= end {
                    break;
                }
                if pieces.begin(answer.text.start)? >= max_length {
                    // This also bounds the number of answers located by `max_length`.
                    beyond = true;
                    break;
                }
                located.push(answer);
            }
            let ended = located.iter().filter(|answer| pieces.train(answer)).count();
            if !beyond && ended == 0 {
                return Err(Error::input(
                    chat.place(),
                    "no special token or eos token at the end of an answer, so the model would never learn to stop",
                    "a template that ends the assistant's turn with such a token",
                ));
            }
        }
        let (mut example, tokens) =
            (Example { tokens: Vec::new(), trained: pieces.trained, replayed: false }, pieces.tokens);
        example.tokens.extend(tokens.into_iter().map(|(token, _)| token));
        if let Some(first) = example.trained.first_mut() {
            *first = false;
        }
        Ok(Self { example, beyond, context, left_out: leaves_out(&text, messages) })
    }

    /// Truncates to `max_length`; also returns whether that dropped trained tokens.
    fn fit(self, max_length: usize) -> (Option<Example>, bool) {
        let Self { mut example, beyond, .. } = self;
        let before = example.trained_tokens();
        example.tokens.truncate(max_length);
        example.trained.truncate(max_length);
        let after = example.trained_tokens();
        ((after > 0).then_some(example), beyond || after < before)
    }
}

/// Checks that no conversation has more than `context` tokens; names the first that has.
fn check_lengths(placed: &[(String, Conversation)], chat: &Chat, context: usize) -> Result<()> {
    let checked = placed.par_iter().map(|(place, conversation)| {
        let text = chat.render(&conversation.messages, &conversation.tools).map_err(|e| e.at(place))?.text;
        let tokens = chat.tokenizer().encode(&text)?.len();
        if tokens <= context {
            return Ok(());
        }
        let expected = format!("at most {context}, the model's context; --max-length {context} truncates longer rows");
        Err(Error::input(place, format!("{tokens} tokens"), expected))
    });
    checked.find_first(Result::is_err).unwrap_or(Ok(()))
}

/// Whether the rendered text lacks a part of a trained answer, white space aside.
fn leaves_out(text: &str, messages: &[Message]) -> bool {
    let dense = |text: &str| text.chars().filter(|c| !c.is_whitespace()).collect::<String>();
    let text = dense(text);
    let mut rest = text.as_str();
    for message in messages.iter().filter(|m| m.role == "assistant" && m.training == Training::Trained) {
        let mut behind = rest;
        for part in message.texts().map(dense) {
            let Some(at) = rest.find(&part) else { return true };
            let end = rest.get(at + part.len()..).unwrap_or_default();
            behind = if end.len() < behind.len() { end } else { behind };
        }
        rest = behind;
    }
    false
}

/// The template's marks, without those of answers that are not trained.
fn marks_of(chat: &Chat, messages: &[Message], mut marks: Vec<Range<usize>>) -> Result<Vec<Range<usize>>> {
    marks.sort_by_key(|mark| mark.start);
    marks.retain(|mark| !mark.is_empty());
    let answers: Vec<&Message> = messages.iter().filter(|message| message.role == "assistant").collect();
    let unclear = |expected| {
        let found = format!("{} texts in `{{% generation %}}` for {} answers", marks.len(), answers.len());
        Error::input(chat.place(), found, expected)
    };
    if marks.is_empty() {
        return Err(unclear("`{% generation %}` around every answer"));
    }
    if answers.iter().all(|answer| answer.training == Training::Trained) {
        return Ok(marks);
    }
    if marks.len() != answers.len() {
        return Err(unclear("one for each answer, since the data leave out some answers"));
    }
    let trained = marks.into_iter().zip(answers).filter(|(_, answer)| answer.training == Training::Trained);
    Ok(trained.map(|(mark, _)| mark).collect())
}

/// Text that is encoded in as few pieces as the beginnings of its answers allow.
struct Pieces<'a> {
    chat: &'a Chat,
    text: &'a str,
    /// Tokens and their bytes of the text.
    tokens: Vec<(u32, Range<usize>)>,
    trained: Vec<bool>,
    /// First token of the last piece, and its first byte.
    last: (usize, usize),
}

impl<'a> Pieces<'a> {
    /// Encodes the first `end` bytes of a text.
    fn new(chat: &'a Chat, text: &'a str, end: usize) -> Result<Self> {
        let text = text.get(..end).unwrap_or_default();
        let tokens = chat.tokenizer().encode_with_spans(text)?;
        let trained = vec![false; tokens.len()];
        Ok(Self { chat, text, tokens, trained, last: (0, 0) })
    }

    /// Index of the token that begins at byte `start`, which is behind every earlier one; splits the text there if no
    /// token does.
    fn begin(&mut self, start: usize) -> Result<usize> {
        let (first, byte) = self.last;
        let head = self.encode(byte..start)?;
        let index = first + head.len();
        let rest = self.tokens.get(first..).unwrap_or_default();
        if rest.len() >= head.len() && rest.iter().zip(&head).all(|(a, b)| a.0 == b.0) {
            return Ok(index);
        }
        self.tokens.truncate(first);
        self.tokens.extend(head);
        self.tokens.extend(self.encode(start..self.text.len())?);
        self.trained = vec![false; self.tokens.len()];
        self.last = (index, start);
        Ok(index)
    }

    fn encode(&self, bytes: Range<usize>) -> Result<Vec<(u32, Range<usize>)>> {
        let at = bytes.start;
        let tokens = self.chat.tokenizer().encode_with_spans(self.text.get(bytes).unwrap_or_default())?;
        Ok(tokens.into_iter().map(|(token, span)| (token, span.start + at..span.end + at)).collect())
    }

    /// Marks an answer and the end of its turn as trained, once the text is in its pieces; returns whether there is such
    /// an end.
    fn train(&mut self, answer: &Answer) -> bool {
        let start = self.tokens.partition_point(|(_, span)| span.end <= answer.text.start);
        let behind = self.tokens.get(start..).unwrap_or_default();
        // Spans may leave out white space, so that one in the answer can end where the answer ends.
        let inside = |span: &Range<usize>| span.start < answer.text.end || span.end <= answer.text.end;
        let written = behind.iter().position(|(_, span)| span.end > answer.text.end).unwrap_or(behind.len());
        let tail = behind.get(written..).unwrap_or_default();
        let tail_len = tail.iter().take_while(|(_, span)| span.start < answer.tail_end).count();
        let end = self.chat.end_of_turn(tail.get(..tail_len).unwrap_or_default());
        let length = match end {
            Some(end) => written + end + 1,
            None => behind.iter().take_while(|(_, span)| inside(span)).count(),
        };
        self.trained.iter_mut().skip(start).take(length).for_each(|trained| *trained = true);
        end.is_some()
    }

    /// Marks the tokens that share a byte with one of the ranges as trained.
    fn mark(&mut self, ranges: &[Range<usize>]) {
        for range in ranges {
            let shares = |(_, span): &(u32, Range<usize>)| span.start < range.end && span.end > range.start;
            let first = self.tokens.iter().position(shares);
            let last = self.tokens.iter().rposition(shares);
            if let Some((first, last)) = first.zip(last) {
                self.trained.iter_mut().take(last + 1).skip(first).for_each(|trained| *trained = true);
            }
        }
    }
}

/// The last character boundary of `text` at or before `at`.
fn floor_boundary(text: &str, at: usize) -> usize {
    (0..=at).rev().find(|end| text.is_char_boundary(*end)).unwrap_or(0)
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
    /// Number of conversations dropped because the data say of every answer that it is not trained.
    pub context: usize,
    /// Number of conversations of whose trained answers the template leaves out a part, such as the thinking of earlier
    /// turns: it is not trained.
    pub left_out: usize,
}

impl Examples {
    /// Reads and tokenizes a file of [`Conversation`]s, once: it may be a pipe.
    ///
    /// # Errors
    /// As [`RowReader::read`]; [`Error::Input`] where no example remains.
    pub fn read(path: &Path, chat: &Chat, max_length: usize, rows: &mut RowReader) -> Result<Self> {
        Self::read_within(path, chat, max_length, usize::MAX, rows)
    }

    /// As [`Examples::read`], of a model with a context of `context` tokens: where examples may be longer than that, none
    /// is.
    ///
    /// # Errors
    /// As [`Examples::read`]; [`Error::Input`] names the first conversation that is longer.
    pub fn read_within(
        path: &Path,
        chat: &Chat,
        max_length: usize,
        context: usize,
        rows: &mut RowReader,
    ) -> Result<Self> {
        let placed = rows.read(path, |row| Ok((row.place.clone(), Conversation::from_row(row)?)))?;
        if max_length > context {
            check_lengths(&placed, chat, context)?;
        }
        let marked = placed
            .par_iter()
            .map(|(place, conversation)| Marked::new(conversation, chat, max_length).map_err(|e| e.at(place)));
        let marked: Vec<Result<Marked>> = marked.collect();
        let file = path.display().to_string();
        Self::collect(&file, rows.keep(&file, marked)?, max_length)
    }

    /// Tokenizes conversations.
    ///
    /// # Errors
    /// [`Error::Input`] as [`Examples::read`].
    pub fn from_conversations(conversations: &[Conversation], chat: &Chat, max_length: usize) -> Result<Self> {
        let marked = conversations.par_iter().map(|c| Marked::new(c, chat, max_length));
        Self::collect("training data", marked.collect::<Result<_>>()?, max_length)
    }

    fn collect(place: &str, marked: Vec<Marked>, max_length: usize) -> Result<Self> {
        let left_out = marked.iter().filter(|marked| marked.left_out).count();
        let fitted: Vec<_> = marked.into_par_iter().map(|m| (m.context, m.fit(max_length))).collect();
        let mut all = Self { examples: Vec::new(), cut: 0, dropped: 0, context: 0, left_out };
        for fitted in fitted {
            match fitted {
                (_, (Some(example), cut)) => {
                    all.examples.push(example);
                    all.cut += usize::from(cut);
                }
                (true, _) => all.context += 1,
                (false, _) => all.dropped += 1,
            }
        }
        if all.examples.is_empty() && all.dropped == 0 {
            let found = format!("{} conversations, none with an answer to train", all.context);
            return Err(Error::input(place, found, "an answer whose weight is not 0"));
        }
        if all.examples.is_empty() {
            let found = format!("no conversation whose first prompt is shorter than {max_length} tokens");
            return Err(Error::input(place, found, "shorter prompts, or a larger --max-length"));
        }
        Ok(all)
    }
}
