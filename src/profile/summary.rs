//! Aggregation of spans by kernel and by layer.

use super::Profile;
use crate::backend::Roofline;
use crate::backend::trace::{Span, SpanKind};
use crate::engine::roofline_seconds;
use serde::Serialize;
use std::collections::BTreeMap;

/// All spans of one kernel or operation, or of one layer in one phase.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Row {
    /// Kernel or operation; `forward, layer 3`.
    pub name: String,
    /// Calls in all recorded steps.
    pub calls: u64,
    /// Time in all recorded steps, in nanoseconds.
    pub ns: u64,
    /// Share of the steps' time, 0 to 1.
    pub share: f64,
    /// Bytes read and written, each tensor of a call counted once.
    pub bytes: u64,
    /// Floating-point operations.
    pub flops: u64,
    /// Time at the roofline over the measured time; `None` without a known cost.
    pub of_ceiling: Option<f64>,
    /// Time at the roofline, in nanoseconds.
    #[serde(skip)]
    roofline_ns: f64,
}

impl Row {
    fn add(&mut self, span: &Span, roofline: &Roofline) {
        self.calls += 1;
        self.ns += span.duration_ns;
        self.bytes += span.cost.bytes;
        self.flops += span.cost.flops;
        self.roofline_ns += roofline.seconds(span.cost) * 1e9;
    }

    fn finish(self, name: String, total_ns: u64) -> Self {
        let of_ceiling = (self.roofline_ns > 0.0).then(|| self.roofline_ns / self.ns.max(1) as f64);
        Self { name, share: self.ns as f64 / total_ns.max(1) as f64, of_ceiling, ..self }
    }
}

/// Summary of a profile.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Summary {
    /// Whether the rows are kernels timed on the GPU, else operations timed on the host.
    pub kernels: bool,
    /// Median step, in milliseconds.
    pub step_ms: f64,
    /// Tokens per second of the median step.
    pub tok_per_s: f64,
    /// By kernel or operation, longest first.
    pub rows: Vec<Row>,
    /// By phase and layer, in order.
    pub layers: Vec<Row>,
    /// Time of all steps outside of the rows, in nanoseconds: host work, and on a GPU launch overhead and idle time.
    pub between_ns: u64,
    /// Share of the steps' time inside of the rows, 0 to 1.
    pub explained: f64,
    /// Time of the minimum cost at the roofline over the steps' time (see [`crate::engine::MinimumCost`]).
    pub speed_of_light: f64,
    /// The measured roofline.
    #[serde(rename = "ceilings")]
    pub roofline: Roofline,
}

/// Summarizes a profile.
pub fn summarize(profile: &Profile) -> Summary {
    let kind = if profile.spans.iter().any(|s| s.kind == SpanKind::Kernel) { SpanKind::Kernel } else { SpanKind::Op };
    let total: u64 = profile.steps.iter().map(|(_, ns)| ns).sum();
    let mut rows: BTreeMap<&str, Row> = BTreeMap::new();
    let mut layers: BTreeMap<_, Row> = BTreeMap::new();
    for span in profile.spans.iter().filter(|s| s.kind == kind) {
        rows.entry(span.name).or_default().add(span, &profile.roofline);
        let place = match span.layer {
            Some(layer) => format!("{}, layer {layer}", span.phase),
            None if span.phase.is_empty() => "outside all phases".into(),
            None => format!("{}, outside the layers", span.phase),
        };
        // Phases in order of time; layers by number, then spans outside of all layers.
        let key = (first_start(profile, span.phase), span.layer.unwrap_or(usize::MAX), place);
        layers.entry(key).or_default().add(span, &profile.roofline);
    }
    let mut rows: Vec<Row> = rows.into_iter().map(|(name, row)| row.finish(name.to_string(), total)).collect();
    rows.sort_by_key(|row| std::cmp::Reverse(row.ns));
    let explained: u64 = rows.iter().map(|row| row.ns).sum();
    let light = profile.steps.len() as f64 * roofline_seconds(&profile.minimum_cost, &profile.roofline);
    let mut steps: Vec<u64> = profile.steps.iter().map(|(_, ns)| *ns).collect();
    steps.sort_unstable();
    let median = steps.get(steps.len() / 2).copied().unwrap_or(0).max(1);
    Summary {
        kernels: kind == SpanKind::Kernel,
        step_ms: median as f64 / 1e6,
        tok_per_s: profile.tokens as f64 / (median as f64 / 1e9),
        between_ns: total.saturating_sub(explained),
        explained: explained as f64 / total.max(1) as f64,
        speed_of_light: light * 1e9 / total.max(1) as f64,
        rows,
        layers: layers.into_iter().map(|((_, _, name), row)| row.finish(name, total)).collect(),
        roofline: profile.roofline,
    }
}

fn first_start(profile: &Profile, phase: &str) -> u64 {
    let spans = profile.spans.iter().filter(|s| s.kind == SpanKind::Phase && s.name == phase);
    spans.map(|s| s.start_ns).min().unwrap_or(u64::MAX)
}
