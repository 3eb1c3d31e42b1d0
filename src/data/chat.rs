//! Where a template lets an answer begin and end: which tokens are trained and where generation stops.

use crate::error::{Error, Result};
use crate::model::{Added, ChatTemplate, Clock, Ending, Message, Rendered, Tokenizer};
use serde_json::Value;
use std::ops::Range;

/// Characters that stand for the text of a message, of which one that occurs nowhere else is taken: noncharacters, which
/// no template treats as white space or as a word. The first two are those that [`ChatTemplate`] marks answers by.
const BLANKS: std::ops::RangeInclusive<char> = '\u{fdd2}'..='\u{fdef}';
/// Length of a blank; some templates look at the first or the last character alone.
const BLANK_LEN: usize = 3;

/// A model's chat template and tokenizer, and what the template writes around an answer.
pub struct Chat {
    template: ChatTemplate,
    tokenizer: Tokenizer,
    eos: Vec<u32>,
    /// What precedes every answer: the generation prompt, or, of a template that ignores `add_generation_prompt`, the
    /// text that it writes between the question and the answer.
    header: String,
    /// Whether `header` has to be added to a prompt that the template renders.
    adds_header: bool,
    /// What follows every answer, up to the end-of-turn token.
    end: String,
    /// The token at the end of `end`.
    end_token: Option<u32>,
}

/// An answer in a rendered conversation, in bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Answer {
    /// From where generation begins to where the text stops to depend on the message.
    pub text: Range<usize>,
    /// Where that ends which the template writes after the answer, whatever follows; at least `text.end`.
    pub tail_end: usize,
}

impl Chat {
    /// Learns from a short conversation what the template writes around an answer. `eos` are further tokens that end an
    /// answer.
    pub fn new(template: ChatTemplate, tokenizer: Tokenizer, eos: &[u32]) -> Self {
        let mut chat = Self {
            template,
            tokenizer,
            eos: eos.to_vec(),
            header: String::new(),
            adds_header: false,
            end: String::new(),
            end_token: None,
        };
        // A template that does not take these messages tells nothing; errors come with the conversations themselves.
        chat.learn_header();
        let _ = chat.learn_end();
        chat
    }

    fn learn_header(&mut self) {
        let question = [Message::new("user", "?")];
        let (Ok(plain), Ok(prompt)) = (self.template.render(&question), self.template.render_prompt(&question)) else {
            return;
        };
        if plain != prompt {
            self.header = prompt.strip_prefix(plain.as_str()).unwrap_or_default().to_owned();
            return;
        }
        let blank: String = [*BLANKS.start(); BLANK_LEN].iter().collect();
        let whole = self.template.render(&[question[0].clone(), Message::new("assistant", blank.as_str())]);
        let Ok(whole) = whole else { return };
        let before = whole.find(&blank).and_then(|at| whole.get(prompt.len()..at));
        // White space alone is part of the answer, as in ` answer` of the templates of Mistral and Llama 2.
        if let Some(header) = before.filter(|text| whole.starts_with(&prompt) && !text.trim().is_empty()) {
            (self.header, self.adds_header) = (header.to_owned(), true);
        }
    }

    fn learn_end(&mut self) -> Result<()> {
        let blank: String = [*BLANKS.start(); BLANK_LEN].iter().collect();
        let whole = self.template.render(&[Message::new("user", "?"), Message::new("assistant", blank.as_str())])?;
        let Some((_, tail)) = whole.rsplit_once(&blank) else { return Ok(()) };
        let tokens = self.tokenizer.encode_with_spans(tail)?;
        let added = |kind| tokens.iter().find(|(token, _)| self.tokenizer.added(*token) == Some(kind));
        let end = tokens.iter().find(|(token, _)| self.eos.contains(token) || self.is_special(*token));
        if let Some((token, span)) = end.or_else(|| added(Added::Plain)) {
            self.end_token = Some(*token);
            self.end = tail.get(..span.end).unwrap_or_default().to_owned();
        }
        Ok(())
    }

    fn is_special(&self, token: u32) -> bool {
        self.tokenizer.added(token) == Some(Added::Special)
    }

    /// The file and key of the template, for errors.
    pub fn place(&self) -> &str {
        self.template.place()
    }

    /// The template.
    pub fn template(&self) -> &ChatTemplate {
        &self.template
    }

    /// Sets the time of the template; returns it where the template uses it.
    pub fn set_clock(&mut self, clock: Clock) -> Option<Clock> {
        self.template.set_clock(clock);
        self.template.uses_clock().then_some(clock)
    }

    /// The tokenizer.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// The tokens at which an answer ends, in training and in generation: those given as `eos`, and the one that the
    /// template writes after an answer.
    pub fn stop_tokens(&self) -> Vec<u32> {
        let more = self.end_token.filter(|end| !self.eos.contains(end));
        self.eos.iter().copied().chain(more).collect()
    }

    /// The text that an answer is generated after: what the template renders with the generation prompt, and, where it
    /// ignores `add_generation_prompt`, what it writes before every answer.
    ///
    /// # Errors
    /// [`Error::Input`] where the template rejects the messages.
    pub fn prompt(&self, messages: &[Message], tools: &[Value]) -> Result<String> {
        let mut text = self.template.render_chat(messages, tools, Ending::GenerationPrompt)?.text;
        if self.adds_header {
            text.push_str(&self.header);
        }
        Ok(text)
    }

    /// Renders a whole conversation.
    pub(super) fn render(&self, messages: &[Message], tools: &[Value]) -> Result<Rendered> {
        self.template.render_chat(messages, tools, Ending::Conversation)
    }

    /// Which of `tokens`, what the template writes after an answer, ends the turn.
    pub(super) fn end_of_turn(&self, tokens: &[(u32, Range<usize>)]) -> Option<usize> {
        let stops = |token: u32| self.eos.contains(&token) || self.end_token == Some(token);
        let stop = tokens.iter().position(|(token, _)| stops(*token));
        stop.or_else(|| tokens.iter().position(|(token, _)| self.is_special(*token)))
    }

    /// Finds the answer `messages[turn]` in `text`, the rendered conversation, by rendering it once more with a blank in
    /// its place: what differs is the answer. It begins where its prompt ends, if that is a prefix of the text, else
    /// behind its header.
    ///
    /// # Errors
    /// [`Error::Input`] where that does not tell the answer.
    pub(super) fn locate(&self, text: &str, messages: &[Message], tools: &[Value], turn: usize) -> Result<Answer> {
        let blank = self.blank(text, messages)?;
        let Some(mut changed) = self.changed(text, messages, tools, turn, &blank)? else {
            return Err(self.unclear(format!("message {} not in the rendered conversation", turn + 1)));
        };
        let mut own_tail = None;
        if turn + 1 < messages.len() && calls_tools(messages, turn) {
            // Some templates write the name of the call once more beside its result: it ends where it does without that.
            let before = messages.get(..=turn).unwrap_or_default();
            let alone = self.render(before, tools).map(|rendered| rendered.text).unwrap_or_default();
            if let Some(own) = self.changed(&alone, before, tools, turn, &blank).unwrap_or_default() {
                if text.get(..own.end) == alone.get(..own.end) {
                    changed.end = own.end;
                }
                own_tail = alone.get(own.end..).map(str::to_owned);
            }
        }
        let prompt = self.prompt(messages.get(..turn).unwrap_or_default(), tools).unwrap_or_default();
        let begins = !prompt.is_empty() && text.starts_with(&prompt) && prompt.len() <= changed.end;
        let start = match begins {
            true => prompt.len(),
            false => self.start_in(text, messages, tools, turn, changed.start, &blank)?,
        };
        if start > changed.end {
            return Err(self.unclear(format!("no beginning of message {}", turn + 1)));
        }
        let rest = text.get(changed.end..).unwrap_or_default();
        let tail = if turn + 1 == messages.len() {
            rest.len()
        } else if !self.end.is_empty() && rest.starts_with(&self.end) {
            self.end.len()
        } else if let Some(own) = &own_tail {
            common_prefix(rest, own)
        } else {
            let mut shorter = messages.get(..turn).unwrap_or_default().to_vec();
            shorter.extend(messages.get(turn).map(|message| message.blanked(&blank)));
            let alone = self.render(&shorter, tools).map(|rendered| rendered.text).unwrap_or_default();
            common_prefix(rest, alone.rsplit_once(&blank).map_or("", |(_, tail)| tail))
        };
        Ok(Answer { text: start..changed.end, tail_end: changed.end + tail })
    }

    /// Where an answer begins whose prompt is not a prefix of the text, because the template writes earlier turns
    /// otherwise when later ones follow, or opens the thinking in the prompt alone.
    fn start_in(
        &self,
        text: &str,
        messages: &[Message],
        tools: &[Value],
        turn: usize,
        changed: usize,
        blank: &str,
    ) -> Result<usize> {
        let mut from = 0;
        for before in (0..turn).rev() {
            if let Some(range) = self.changed(text, messages, tools, before, blank)? {
                from = range.end;
                break;
            }
        }
        let between = text.get(from..changed);
        let between = between.ok_or_else(|| self.unclear(format!("no beginning of message {}", turn + 1)))?;
        // The longest beginning of the header, in whole tokens, that is there.
        let header = self.tokenizer.encode_with_spans(&self.header)?;
        let begun = header.iter().rev().filter_map(|(_, span)| self.header.get(..span.end));
        let found = begun.filter(|text| !text.trim().is_empty());
        let found = found.filter_map(|text| Some(between.rfind(text)? + text.len())).next();
        match found {
            Some(at) => Ok(from + at),
            None if calls_tools(messages, turn) => {
                Err(self.unclear(format!("no beginning of message {}, which calls tools", turn + 1)))
            }
            None => Ok(changed),
        }
    }

    /// The range of `text` that changes with a blank in place of a message; `None` where nothing does.
    fn changed(
        &self,
        text: &str,
        messages: &[Message],
        tools: &[Value],
        turn: usize,
        blank: &str,
    ) -> Result<Option<Range<usize>>> {
        let mut messages = messages.to_vec();
        if let Some(message) = messages.get_mut(turn) {
            *message = message.blanked(blank);
        }
        let other = self.render(&messages, tools)?.text;
        if other == text {
            return Ok(None);
        }
        let start = common_prefix(text, &other);
        let (rest, other_rest) = (text.get(start..).unwrap_or_default(), other.get(start..).unwrap_or_default());
        let end = text.len() - common_suffix(rest, other_rest);
        Ok(Some(start..end))
    }

    /// Text that occurs nowhere in the conversation.
    fn blank(&self, text: &str, messages: &[Message]) -> Result<String> {
        let free = |c: &char| !text.contains(*c) && !messages.iter().any(|message| message.holds(*c));
        let c = BLANKS.into_iter().find(free);
        let c =
            c.ok_or_else(|| self.unclear("every one of the noncharacters U+FDD2 to U+FDEF in the messages".into()))?;
        Ok([c; BLANK_LEN].iter().collect())
    }

    fn unclear(&self, found: String) -> Error {
        let expected = "a template that shows which text is the assistant's: put `{% generation %}` and \
                        `{% endgeneration %}` around it";
        Error::input(self.place(), found, expected)
    }
}

/// Whether a message calls tools.
fn calls_tools(messages: &[Message], turn: usize) -> bool {
    messages.get(turn).is_some_and(|message| message.fields.contains_key("tool_calls"))
}

/// Length of the longest common prefix, in bytes of whole characters.
fn common_prefix(a: &str, b: &str) -> usize {
    a.chars().zip(b.chars()).take_while(|(a, b)| a == b).map(|(c, _)| c.len_utf8()).sum()
}

/// Length of the longest common suffix, in bytes of whole characters.
fn common_suffix(a: &str, b: &str) -> usize {
    a.chars().rev().zip(b.chars().rev()).take_while(|(a, b)| a == b).map(|(c, _)| c.len_utf8()).sum()
}
