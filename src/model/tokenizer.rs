//! Text to tokens and back.

use crate::error::{Error, Result};
use crate::io::input::{guarded, printable, read_bytes};
use std::path::Path;
use std::sync::Arc;

/// Several times the largest `tokenizer.json` in use.
const MOST_BYTES: u64 = 1 << 26;
/// Tokens after which a stream gives up waiting for a character to become whole.
const MOST_PENDING: usize = 64;

/// A `tokenizer.json`. Clones share it.
#[derive(Clone)]
pub struct Tokenizer {
    inner: Arc<tokenizers::Tokenizer>,
    vocab: usize,
    place: String,
}

impl Tokenizer {
    /// Reads a file of at most 64 MB; a malformed one is an [`Error::Input`] that says why. Truncation and padding that
    /// a file asks for are ignored, as in transformers.
    ///
    /// # Errors
    /// [`Error::Input`], as said above; [`Error::Io`].
    pub fn open(path: &Path) -> Result<Self> {
        let place = path.display().to_string();
        let bytes = read_bytes(path, MOST_BYTES)?;
        let read = guarded(&place, "tokenizer", || tokenizers::Tokenizer::from_bytes(&bytes))?;
        let mut inner = read.map_err(|e| {
            Error::input(&place, format!("a malformed tokenizer ({})", printable(&e)), "a tokenizer.json")
        })?;
        inner.with_padding(None);
        inner.with_truncation(None).map_err(|e| Error::input(&place, printable(&e), "a tokenizer.json"))?;
        let vocab = inner.get_vocab(true).values().max().map_or(0, |most| *most as usize + 1);
        if vocab == 0 {
            return Err(Error::input(place, "no tokens", "a tokenizer with a vocabulary"));
        }
        Ok(Self { inner: Arc::new(inner), vocab, place })
    }

    /// Token ids; `special` lets the post-processor add its tokens (never for text that a chat template rendered).
    ///
    /// # Errors
    /// [`Error::Input`] where the tokenizer refuses the text.
    pub fn encode(&self, text: &str, special: bool) -> Result<Vec<u32>> {
        let encoding = guarded(&self.place, "tokenizer", || self.inner.encode_fast(text, special))?;
        let encoding = encoding.map_err(|e| Error::input(&self.place, printable(&e), "a tokenizer for this text"))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Text, special tokens skipped. Ids that the tokenizer does not know give no text.
    ///
    /// # Errors
    /// [`Error::Input`] where the tokenizer refuses the ids.
    pub fn decode(&self, tokens: &[u32]) -> Result<String> {
        let text = guarded(&self.place, "tokenizer", || self.inner.decode(tokens, true))?;
        text.map_err(|e| Error::input(&self.place, printable(&e), "a tokenizer that decodes its tokens"))
    }

    /// Ids from 0 to this, exclusive.
    pub fn vocab(&self) -> usize {
        self.vocab
    }

    /// The id of a token, spelt as in the vocabulary.
    pub fn id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The vocabulary's spelling of an id.
    pub fn token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// Decodes an answer as it grows.
    pub fn stream(&self) -> DecodeStream<'_> {
        DecodeStream { tokenizer: self, tokens: Vec::new(), boundary: 0, given: 0 }
    }
}

/// Decoding token by token; whole characters only.
pub struct DecodeStream<'a> {
    tokenizer: &'a Tokenizer,
    /// The last tokens whose text is out, for context, then those that came since.
    tokens: Vec<u32>,
    /// How many of `tokens` are context.
    boundary: usize,
    /// How many bytes of the text of `tokens` are out.
    given: usize,
}

impl DecodeStream<'_> {
    /// The text that this token completes; empty while a character is incomplete.
    ///
    /// # Errors
    /// As [`Tokenizer::decode`].
    pub fn step(&mut self, token: u32) -> Result<String> {
        self.tokens.push(token);
        let text = self.tokenizer.decode(&self.tokens)?;
        // An incomplete character decodes to U+FFFD; a genuine one comes out with what follows it, or at the end.
        let whole = text.trim_end_matches('\u{FFFD}').len();
        let forced = self.tokens.len() - self.boundary > MOST_PENDING;
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

    /// What was held back: the replacement characters of an answer that ends inside a character.
    ///
    /// # Errors
    /// As [`Tokenizer::decode`].
    pub fn finish(self) -> Result<String> {
        let text = self.tokenizer.decode(&self.tokens)?;
        Ok(text.get(self.given..).unwrap_or_default().to_owned())
    }
}
