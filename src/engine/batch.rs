//! Packed tokens.

use crate::backend::IGNORE;
use crate::data::Example;

/// Documents one after another, without padding.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Batch {
    /// Token ids.
    pub tokens: Vec<u32>,
    /// Position of each token in its document.
    pub positions: Vec<u32>,
    /// documents + 1 entries: the rows where documents begin, then the number of tokens.
    pub starts: Vec<u32>,
    /// The token each row must predict, or [`IGNORE`]; empty where there is no loss.
    pub targets: Vec<u32>,
    /// Terms of the loss beside the cross-entropy.
    pub terms: Option<TokenTerms>,
}

/// [`crate::backend::LossTerms`] of a batch's trained tokens, in their order.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TokenTerms {
    /// −log π₀ of each, in nats.
    pub reference: Vec<f32>,
    /// β of each; 0 = not constrained.
    pub beta: Vec<f32>,
    /// Token ids of the teacher, the same number for each.
    pub ids: Vec<u32>,
    /// Their probabilities.
    pub probs: Vec<f32>,
    /// Weight of the divergence from the teacher.
    pub distil: f32,
}

impl Batch {
    /// Packs prompts: positions from 0, no targets.
    pub fn from_prompts<'a>(prompts: impl IntoIterator<Item = &'a [u32]>) -> Self {
        let mut batch = Self { starts: vec![0], ..Self::default() };
        for prompt in prompts {
            batch.tokens.extend_from_slice(prompt);
            batch.positions.extend(0..prompt.len() as u32);
            batch.starts.push(batch.tokens.len() as u32);
        }
        batch
    }

    /// Packs training examples: each is a document, and a row's target is the token behind it where that is trained.
    pub fn from_examples<'a>(examples: impl IntoIterator<Item = &'a Example>) -> Self {
        let documents: Vec<&Example> = examples.into_iter().filter(|example| !example.tokens.is_empty()).collect();
        let mut batch = Self::from_prompts(documents.iter().map(|example| example.tokens.as_slice()));
        for example in documents {
            let next = example.tokens.iter().zip(&example.trained).skip(1);
            batch.targets.extend(next.map(|(token, trained)| if *trained { *token } else { IGNORE }));
            batch.targets.push(IGNORE);
        }
        batch
    }

    /// Number of documents.
    pub fn documents(&self) -> usize {
        self.starts.len().saturating_sub(1)
    }

    /// Rows of the last token of each document.
    pub fn last_rows(&self) -> Vec<u32> {
        self.starts.windows(2).map(|w| w[1] - 1).collect()
    }

    /// Positions with a loss.
    pub fn trained_tokens(&self) -> usize {
        self.targets.iter().filter(|t| **t != IGNORE).count()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_are_the_trained_tokens_behind_each_row() {
        let example = |tokens: &[u32], trained: &[bool]| Example {
            tokens: tokens.into(),
            trained: trained.into(),
            replayed: false,
        };
        let examples = [
            example(&[5, 6, 7], &[true, false, true]),
            example(&[], &[]),
            example(&[8], &[true]),
            example(&[9, 10], &[false, true]),
        ];
        let batch = Batch::from_examples(&examples);
        assert_eq!(batch.tokens, [5, 6, 7, 8, 9, 10]);
        assert_eq!(batch.positions, [0, 1, 2, 0, 0, 1]);
        assert_eq!(batch.starts, [0, 3, 4, 6]);
        assert_eq!(batch.targets, [IGNORE, 7, IGNORE, IGNORE, 10, IGNORE]);
        assert_eq!(batch.trained_tokens(), 2);
    }
}
