//! What training with several ranks adds to a step: bytes between the ranks, and the time that these take.

use super::memory::{Plan, Workload};
use super::minimum::tensors;
use crate::backend::Backend;
use crate::engine::{BUCKET_BYTES, buckets};
use crate::group::{Share, Traffic};
use crate::model::ModelConfig;
use crate::modules::ParamId;

/// What the machines of a run can do.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Speeds {
    /// Bytes a second that a rank sends while it receives as many.
    pub link_bytes_per_s: f64,
    /// FLOPs a second of one rank.
    pub flops_per_s: f64,
}

/// One micro-batch and the optimizer's step of one of several ranks.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct RankStep {
    /// Number of ranks.
    pub ranks: usize,
    /// What a rank sends.
    #[serde(flatten)]
    pub traffic: Traffic,
    /// Share of what it would send if everything trained, 0 to 1.
    pub share_of_full: f64,
    /// Time of what is sent.
    pub communication_seconds: f64,
    /// Part of it that the backward pass hides, at best: that of all gradients but those of the last bucket, and no more than
    /// the backward pass takes.
    pub hidden_seconds: f64,
    /// Time of forward and backward.
    pub compute_seconds: f64,
    /// Share of the step that is spent communicating and not hidden, 0 to 1.
    pub communication_share: f64,
}

impl RankStep {
    /// A step of the rank with the largest parts; `work` and `plan` are those of one rank.
    pub fn new<B: Backend>(
        config: &ModelConfig,
        (work, plan): (&Workload, &Plan),
        trains: impl Fn(ParamId) -> bool,
        ranks: usize,
        speeds: Speeds,
    ) -> Self {
        let share = Share { rank: 0, size: ranks };
        let adapter = |id: ParamId| matches!(id, ParamId::LoraA(_) | ParamId::LoraB(_));
        let all = tensors(config, work.lora);
        let traffic = |wanted: &dyn Fn(ParamId) -> bool| {
            let wanted = all.iter().filter(|(id, _)| wanted(*id));
            Traffic::of_step::<B>(wanted.map(|(_, len)| *len), share)
        };
        let (own, full) = (traffic(&|id| trains(id)), traffic(&|id| !adapter(id)));
        let gradients = all.iter().filter(|(id, _)| trains(*id)).map(|(id, len)| (*id, len * size_of::<B::Grad>()));
        let last = buckets(gradients, BUCKET_BYTES).pop().unwrap_or_default();
        let last = traffic(&|id| last.contains(&id)).reduce_scatter_bytes;

        let sent_seconds = |bytes: u64| bytes as f64 / speeds.link_bytes_per_s;
        let computed_seconds = |flops: f64| work.tokens as f64 * flops / speeds.flops_per_s;
        let communication_seconds = sent_seconds(own.total_bytes());
        let hidden_seconds = sent_seconds(own.reduce_scatter_bytes - last).min(computed_seconds(plan.backward_flops));
        let compute_seconds = computed_seconds(plan.forward_flops + plan.backward_flops);
        let shown_seconds = communication_seconds - hidden_seconds;
        Self {
            ranks,
            traffic: own,
            share_of_full: own.total_bytes() as f64 / full.total_bytes().max(1) as f64,
            communication_seconds,
            hidden_seconds,
            compute_seconds,
            communication_share: shown_seconds / (shown_seconds + compute_seconds).max(f64::MIN_POSITIVE),
        }
    }
}
