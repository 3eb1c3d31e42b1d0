//! One tokenised training example.

/// Tokens of a conversation and which of them are to be learnt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Example {
    /// Token ids.
    pub tokens: Vec<u32>,
    /// Whether the loss counts for predicting this token, [tokens].
    pub trained: Vec<bool>,
}
