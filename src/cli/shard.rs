//! The share of a job array's task.

use crate::error::{Error, Result};
use crate::options::count;
use crate::secure::Shard;
use clap::Args;

/// Which part of a map to compute.
#[derive(Args, Clone, Debug)]
pub(super) struct ShardArgs {
    /// Compute one part of the map, INDEX/COUNT with the index from 0, for --merge. auto: of this task of a job array, by
    /// the variables of Slurm, SGE or LSF; of Kubernetes and PBS with --shard-count
    #[arg(long, value_name = "INDEX/COUNT", conflicts_with = "shard_index")]
    shard: Option<String>,
    /// The index alone, where a scheduler gives it; with --shard-count
    #[arg(long, value_name = "INDEX", requires = "shard_count")]
    shard_index: Option<usize>,
    /// Number of parts
    #[arg(long, value_name = "COUNT", value_parser = count)]
    shard_count: Option<usize>,
}

impl ShardArgs {
    /// The part to compute; none = the whole map.
    pub(super) fn shard(&self) -> Result<Option<Shard>> {
        let at = |option: &'static str| move |e: Error| e.at(option);
        let beside =
            |found: &str| Err(Error::input("--shard-count", found, "--shard-index INDEX or --shard auto beside it"));
        match (self.shard.as_deref(), self.shard_index, self.shard_count) {
            (None, None, None) => Ok(None),
            (Some("auto"), _, count) => Shard::from_scheduler(|name| std::env::var(name).ok(), count).map(Some),
            (Some(_), _, Some(_)) => beside("a count that --shard has already"),
            (Some(text), _, None) => text.parse().map(Some).map_err(at("--shard")),
            (None, Some(index), Some(count)) => Shard::new(index, count).map(Some).map_err(at("--shard-index")),
            (None, _, _) => beside("a count alone"),
        }
    }
}
