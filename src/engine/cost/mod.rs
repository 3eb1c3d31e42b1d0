//! Costs of a run that follow from the model's shape alone: the least time ([`minimum`]) and the memory ([`memory`]).

mod memory;
mod minimum;
mod ranks;

pub use memory::{Beside, Plan, Workload};
pub(super) use minimum::lowest_layer;
pub use minimum::{MinimumCost, roofline_seconds};
pub use ranks::{RankStep, Speeds};
