//! Tokenizer and streaming decoder.

mod side_files;

use crate::error::{Error, Result};
use crate::io::input::{guarded, printable, read_bytes};
pub use side_files::TokenizerConfig;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

/// Maximum size of `tokenizer.json`; several times the largest in use.
const MAX_BYTES: u64 = 1 << 26;
/// Pending tokens after which a stream emits an incomplete character as U+FFFD.
const MAX_PENDING: usize = 64;

/// A tokenizer read from `tokenizer.json`. Clones are cheap.
#[derive(Clone)]
pub struct Tokenizer {
    inner: Arc<tokenizers::Tokenizer>,
    vocab: usize,
    /// Rows of the model's embedding.
    rows: usize,
    place: String,
}

impl Tokenizer {
    /// Reads a `tokenizer.json` of at most 64 MB. Its truncation and padding are ignored, as in transformers.
    ///
    /// # Errors
    /// [`Error::Input`] where it is malformed or has no tokens; [`Error::Io`].
    pub fn open(path: &Path) -> Result<Self> {
        Self::open_with(path, &TokenizerConfig::default())
    }

    /// Reads a `tokenizer.json` and adds the tokens of the files beside it that it lacks: under the id of its
    /// vocabulary if they are in it, else under the next free one.
    ///
    /// # Errors
    /// As [`Tokenizer::open`].
    pub fn open_with(path: &Path, config: &TokenizerConfig) -> Result<Self> {
        let place = path.display().to_string();
        let bytes = read_bytes(path, MAX_BYTES)?;
        let read = guarded(&place, "tokenizer", || tokenizers::Tokenizer::from_bytes(&bytes))?;
        let mut inner = read.map_err(|e| {
            Error::input(&place, format!("a malformed tokenizer ({})", printable(&e)), "a tokenizer.json")
        })?;
        inner.with_padding(None);
        inner.with_truncation(None).map_err(|e| Error::input(&place, printable(&e), "a tokenizer.json"))?;
        let missing = config.missing(inner.get_added_vocabulary());
        if !missing.is_empty() {
            let added = guarded(&place, "tokenizer", || inner.add_tokens(missing))?;
            added.map_err(|e| Error::input(&place, printable(&e), "a tokenizer that takes the tokens beside it"))?;
        }
        let vocab = inner.get_vocab(true).values().max().map_or(0, |most| *most as usize + 1);
        if vocab == 0 {
            return Err(Error::input(place, "no tokens", "a tokenizer with a vocabulary"));
        }
        Ok(Self { inner: Arc::new(inner), vocab, rows: usize::MAX, place })
    }

    /// The tokenizer of a model whose embedding has `rows` rows: a text with a token beyond them is refused.
    pub(crate) fn with_rows(self, rows: usize) -> Self {
        Self { rows, ..self }
    }

    /// Encodes text without adding special tokens, as text that a chat template rendered needs it.
    ///
    /// # Errors
    /// [`Error::Input`] where the tokenizer rejects the text, or a token of it has no row in the model's embedding.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        self.encode_fast(text, false)
    }

    /// As [`Tokenizer::encode`], with the bytes of the text that each token stands for. Some tokenizers leave white
    /// space around a token out of its bytes.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_with_spans(&self, text: &str) -> Result<Vec<(u32, Range<usize>)>> {
        let encoding = guarded(&self.place, "tokenizer", || self.inner.encode(text, false))?;
        let encoding = encoding.map_err(|e| Error::input(&self.place, printable(&e), "a tokenizer for this text"))?;
        self.check_rows(encoding.get_ids())?;
        let spans = encoding.get_offsets().iter().map(|(start, end)| *start..*end);
        Ok(encoding.get_ids().iter().copied().zip(spans).collect())
    }

    /// The id of a token by its text.
    pub fn token(&self, text: &str) -> Option<u32> {
        self.inner.token_to_id(text)
    }

    /// Whether this is a token that text is split at before anything else, and if so, whether it is special: left out
    /// of decoded text.
    pub fn added(&self, token: u32) -> Option<Added> {
        let found = self.inner.get_added_vocabulary().get_added_tokens_decoder().get(&token)?;
        Some(if found.special { Added::Special } else { Added::Plain })
    }

    /// Texts of the special tokens, at which text is split before anything else.
    pub fn special_texts(&self) -> Vec<String> {
        let added = self.inner.get_added_vocabulary().get_added_tokens_decoder().values();
        added.filter(|token| token.special).map(|token| token.content.clone()).collect()
    }

    /// Encodes text and adds the post-processor's special tokens, such as the beginning of text.
    ///
    /// # Errors
    /// [`Error::Input`] where the tokenizer rejects the text, or a token of it has no row in the model's embedding.
    pub fn encode_with_special_tokens(&self, text: &str) -> Result<Vec<u32>> {
        self.encode_fast(text, true)
    }

    fn encode_fast(&self, text: &str, special: bool) -> Result<Vec<u32>> {
        let encoding = guarded(&self.place, "tokenizer", || self.inner.encode_fast(text, special))?;
        let encoding = encoding.map_err(|e| Error::input(&self.place, printable(&e), "a tokenizer for this text"))?;
        self.check_rows(encoding.get_ids())?;
        Ok(encoding.get_ids().to_vec())
    }

    fn check_rows(&self, tokens: &[u32]) -> Result<()> {
        let Some(token) = tokens.iter().find(|token| **token as usize >= self.rows) else { return Ok(()) };
        let name = self.inner.id_to_token(*token).unwrap_or_default();
        let found = format!("token {token}, `{}`, in a text", name.escape_debug());
        let expected = format!(
            "tokens below {}, the rows of the model's embedding; leave it out of the text and the chat template",
            self.rows
        );
        Err(Error::input(&self.place, found, expected))
    }

    /// Decodes ids, skipping special tokens and ids that the tokenizer does not know.
    ///
    /// # Errors
    /// [`Error::Input`] where the tokenizer rejects the ids.
    pub fn decode(&self, tokens: &[u32]) -> Result<String> {
        let text = guarded(&self.place, "tokenizer", || self.inner.decode(tokens, true))?;
        text.map_err(|e| Error::input(&self.place, printable(&e), "a tokenizer that decodes its tokens"))
    }

    /// Decodes ids, special tokens too.
    ///
    /// # Errors
    /// [`Error::Input`] where the tokenizer rejects the ids.
    pub fn decode_all(&self, tokens: &[u32]) -> Result<String> {
        let text = guarded(&self.place, "tokenizer", || self.inner.decode(tokens, false))?;
        text.map_err(|e| Error::input(&self.place, printable(&e), "a tokenizer that decodes its tokens"))
    }

    /// The largest token id plus 1.
    pub fn vocab(&self) -> usize {
        self.vocab
    }

    /// A decoder for tokens that arrive one by one.
    pub fn stream(&self) -> DecodeStream<'_> {
        DecodeStream { tokenizer: self, tokens: Vec::new(), boundary: 0, given: 0 }
    }
}

/// Kind of a token that was added to the vocabulary.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Added {
    /// Left out of decoded text, such as the end of a turn.
    Special,
    /// Part of decoded text.
    Plain,
}

/// Decodes token by token; emits complete characters only.
pub struct DecodeStream<'a> {
    tokenizer: &'a Tokenizer,
    /// Tokens already emitted, kept as context, then pending ones.
    tokens: Vec<u32>,
    /// Number of context tokens.
    boundary: usize,
    /// Bytes of the decoded `tokens` already emitted.
    given: usize,
}

impl DecodeStream<'_> {
    /// Adds a token; returns newly completed text, which is empty inside a multi-token character.
    ///
    /// # Errors
    /// [`Error::Input`] as [`Tokenizer::decode`].
    pub fn step(&mut self, token: u32) -> Result<String> {
        self.tokens.push(token);
        let text = self.tokenizer.decode(&self.tokens)?;
        // An incomplete character decodes to U+FFFD; a genuine U+FFFD is emitted with the text after it, or at the end.
        let whole = text.trim_end_matches('\u{FFFD}').len();
        let forced = self.tokens.len() - self.boundary > MAX_PENDING;
        let end = if forced { text.len() } else { whole };
        let new = text.get(self.given..end).unwrap_or_default().to_owned();
        self.given = self.given.max(end);
        if forced || (whole == text.len() && !new.is_empty()) {
            self.tokens.drain(..self.boundary);
            self.boundary = self.tokens.len();
            self.given = self.tokenizer.decode(&self.tokens)?.len();
        }
        Ok(new)
    }

    /// Flushes pending text: U+FFFD for an incomplete character.
    ///
    /// # Errors
    /// [`Error::Input`] as [`Tokenizer::decode`].
    pub fn finish(self) -> Result<String> {
        let text = self.tokenizer.decode(&self.tokens)?;
        Ok(text.get(self.given..).unwrap_or_default().to_owned())
    }
}
