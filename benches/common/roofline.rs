//! Measurements against the device's roofline and against the peers.

use super::stats::{median, quantile};
use serde_json::{Value, json};
use std::time::Duration;
use swat::backend::Cost;
use swat::backend::Roofline;
use swat::report::format;
use swat::report::table::{Entry, Table};

/// One variant of an operation at one shape.
#[derive(Clone, Debug)]
pub struct Measured {
    pub family: &'static str,
    pub op: String,
    pub shape: String,
    pub variant: String,
    /// Another implementation, to compare with.
    pub peer: bool,
    /// Nanoseconds a call, one for each sample.
    pub samples: Vec<f64>,
    /// Bytes and FLOPs of the operation, the same for all variants.
    pub cost: Cost,
}

impl Measured {
    /// Median nanoseconds a call.
    pub fn ns(&self) -> f64 {
        median(&self.samples)
    }

    /// Gigabytes a second.
    pub fn gb_per_s(&self) -> f64 {
        self.cost.bytes as f64 / self.ns()
    }

    /// TFLOP/s.
    pub fn tflop_per_s(&self) -> f64 {
        self.cost.flops as f64 / self.ns() / 1e3
    }

    /// Roofline time over measured time.
    pub fn of_ceiling(&self, ceilings: &Roofline) -> f64 {
        let compute = self.cost.flops as f64 / ceilings.flops_per_s;
        let memory = self.cost.bytes as f64 / ceilings.bytes_per_s;
        compute.max(memory) * 1e9 / self.ns()
    }

    /// Speedup over the fastest peer of its ladder.
    pub fn of_best_peer(&self, all: &[Self]) -> Option<f64> {
        let ladder = |other: &&Self| [&other.op, &other.shape] == [&self.op, &self.shape];
        let peers = all.iter().filter(|other| other.peer).filter(ladder);
        peers.map(Self::ns).min_by(f64::total_cmp).map(|best| best / self.ns())
    }

    /// As a line of a record.
    pub fn json(&self, device: &str) -> Value {
        json!({
            "id": format!("{}/{}/{}/{}", self.family, self.op, self.shape, self.variant),
            "family": self.family, "op": self.op, "shape": self.shape, "variant": self.variant, "peer": self.peer,
            "ns": self.ns(), "low_ns": quantile(&self.samples, 0.1), "high_ns": quantile(&self.samples, 0.9),
            "samples": self.samples.len(), "bytes": self.cost.bytes, "flops": self.cost.flops, "device": device,
        })
    }
}

/// The table of a family's ladders.
pub fn table(all: &[Measured], device: &str, ceilings: &Roofline, whose_product: &str) -> Table {
    let Some(first) = all.first() else { return Table::default() };
    let Roofline { flops_per_s, bytes_per_s } = ceilings;
    let caption = format!(
        "{} on {device}. Ceilings measured now: {} TFLOP/s (a large product by {whose_product}), {} GB/s (a large copy)",
        first.family,
        format::significant(flops_per_s / 1e12, 3),
        format::significant(bytes_per_s / 1e9, 3),
    );
    let mut table = Table::new(caption)
        .column("operation, shape")
        .column("variant")
        .numbers("time", "median of a call")
        .numbers("GB/s", "bytes that must be moved")
        .numbers("TFLOP/s", "what must be computed")
        .numbers("% of ceiling", "the time that the ceilings allow over the measured time")
        .numbers("× best peer", "the best peer's time over this one's");
    let mut before = String::new();
    for m in all {
        let ladder = format!("{} {}", m.op, m.shape);
        let name = if m.peer { format!("{} (peer)", m.variant) } else { m.variant.clone() };
        let known = |work: u64, value: f64| if work > 0 { number(value) } else { Entry::missing() };
        table.row([
            Entry::text(if ladder == before { String::new() } else { ladder.clone() }),
            Entry::text(name),
            Entry::number(m.ns(), format::duration(Duration::from_secs_f64(m.ns().max(0.0) / 1e9))),
            known(m.cost.bytes, m.gb_per_s()),
            known(m.cost.flops, m.tflop_per_s()),
            known(m.cost.bytes + m.cost.flops, 100.0 * m.of_ceiling(ceilings)),
            if m.peer { Entry::missing() } else { number(m.of_best_peer(all).unwrap_or(f64::NAN)) },
        ]);
        before = ladder;
    }
    table
}

fn number(value: f64) -> Entry {
    Entry::number(value, format::significant(value, 3))
}
