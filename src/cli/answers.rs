//! Lengths of answers, and the memory that they take, in commands that measure a model.

use crate::options::mib_or_none;
use crate::secure::EvaluateOptions;
use clap::Args;

/// How long the answers are that a model is measured by.
#[derive(Args, Clone, Copy, Debug)]
pub(super) struct AnswerLengths {
    /// Longest answer to a security prompt, in tokens: refusals show early
    #[arg(long, default_value_t = 48)]
    answer_tokens: usize,
    /// Longest answer to a task, in tokens
    #[arg(long, default_value_t = 64)]
    task_tokens: usize,
    /// Memory of the key-value cache, in MiB
    #[arg(long = "cache-mib", value_name = "CACHE_MIB", value_parser = mib_or_none, default_value = "1024")]
    cache_bytes: u64,
}

impl AnswerLengths {
    /// Measures with these lengths, of all prompts and tasks.
    pub(super) fn options(self) -> EvaluateOptions {
        let Self { answer_tokens, task_tokens, cache_bytes } = self;
        EvaluateOptions { answer_tokens, task_tokens, cache_bytes, ..EvaluateOptions::default() }
    }
}
