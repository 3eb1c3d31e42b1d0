//! From spans to a table.

use super::Profile;
use crate::backend::Roofline;
use crate::backend::trace::{Lane, Span};
use crate::engine::light_seconds;
use serde::Serialize;
use std::collections::BTreeMap;

/// All spans of one kernel, or of one layer in one phase.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Row {
    /// Kernel or operation; `forward, layer 3`.
    pub name: String,
    /// How often it ran in all recorded steps.
    pub calls: u64,
    /// Its time in all of them.
    pub ns: u64,
    /// Its share of the steps' time.
    pub share: f64,
    /// What it had to read and write.
    pub bytes: u64,
    /// What it had to compute.
    pub flops: u64,
    /// The time at the roofline over the measured time; `None` where no cost is known.
    pub of_ceiling: Option<f64>,
}

/// A profile in numbers.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Summary {
    /// Whether the rows are kernels by the GPU's clock; else operations by the host's.
    pub kernels: bool,
    /// Median step, in milliseconds.
    pub step_ms: f64,
    /// Tokens a second at the median.
    pub tok_per_s: f64,
    /// By kernel or operation, the longest first.
    pub rows: Vec<Row>,
    /// By phase and layer, in their order.
    pub layers: Vec<Row>,
    /// Time between the rows, of all steps: what the host does beside operations, and on a GPU launching and waiting.
    pub between_ns: u64,
    /// The rows' share of the steps' time.
    pub explained: f64,
    /// The time that the least of computing and moving would take at the roofline, over the steps' time: see
    /// [`crate::engine::Floor`] for what is counted.
    pub speed_of_light: f64,
    /// What it is measured by.
    #[serde(rename = "ceilings")]
    pub roofline: Roofline,
}

/// Adds up a profile.
pub fn summarize(profile: &Profile) -> Summary {
    let lane = if profile.spans.iter().any(|s| s.lane == Lane::Kernel) { Lane::Kernel } else { Lane::Op };
    let total: u64 = profile.steps.iter().map(|(_, ns)| ns).sum();
    let (mut rows, mut layers) = (BTreeMap::new(), BTreeMap::new());
    for span in profile.spans.iter().filter(|s| s.lane == lane) {
        add(rows.entry(span.name.to_string()).or_default(), span, &profile.roofline);
        let place = match span.layer {
            Some(layer) => format!("{}, layer {layer}", span.phase),
            None if span.phase.is_empty() => "outside all phases".into(),
            None => format!("{}, outside the layers", span.phase),
        };
        // Phases in the order of a step; layers by number, behind them what is in none.
        let key = (first_start(profile, span.phase), span.layer.unwrap_or(usize::MAX), place.clone());
        add(layers.entry(key).or_default(), span, &profile.roofline);
    }
    let finish = |(name, sum): (String, Sum)| Row {
        name,
        calls: sum.calls,
        ns: sum.ns,
        share: sum.ns as f64 / total.max(1) as f64,
        bytes: sum.bytes,
        flops: sum.flops,
        of_ceiling: (sum.ideal_ns > 0.0).then(|| sum.ideal_ns / sum.ns.max(1) as f64),
    };
    let mut rows: Vec<Row> = rows.into_iter().map(finish).collect();
    rows.sort_by_key(|row| std::cmp::Reverse(row.ns));
    let explained: u64 = rows.iter().map(|row| row.ns).sum();
    let light = profile.steps.len() as f64 * light_seconds(&profile.floor, &profile.roofline);
    let mut steps: Vec<u64> = profile.steps.iter().map(|(_, ns)| *ns).collect();
    steps.sort_unstable();
    let median = steps.get(steps.len() / 2).copied().unwrap_or(0).max(1);
    Summary {
        kernels: lane == Lane::Kernel,
        step_ms: median as f64 / 1e6,
        tok_per_s: profile.tokens as f64 / (median as f64 / 1e9),
        between_ns: total.saturating_sub(explained),
        explained: explained as f64 / total.max(1) as f64,
        speed_of_light: light * 1e9 / total.max(1) as f64,
        rows,
        layers: layers.into_iter().map(|((_, _, name), sum)| finish((name, sum))).collect(),
        roofline: profile.roofline,
    }
}

#[derive(Default)]
struct Sum {
    calls: u64,
    ns: u64,
    bytes: u64,
    flops: u64,
    ideal_ns: f64,
}

fn add(sum: &mut Sum, span: &Span, roofline: &Roofline) {
    sum.calls += 1;
    sum.ns += span.duration_ns;
    sum.bytes += span.cost.bytes;
    sum.flops += span.cost.flops;
    sum.ideal_ns += roofline.seconds(span.cost) * 1e9;
}

fn first_start(profile: &Profile, phase: &str) -> u64 {
    let spans = profile.spans.iter().filter(|s| s.lane == Lane::Phase && s.name == phase);
    spans.map(|s| s.start_ns).min().unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::Cost;

    #[test]
    fn rows_add_up_to_the_steps() {
        let span = |lane, name, phase, layer, start_ns, duration_ns, flops| Span {
            lane,
            name,
            phase,
            layer,
            start_ns,
            duration_ns,
            cost: Cost { bytes: 10, flops },
        };
        let spans = vec![
            span(Lane::Op, "linear", "forward", Some(0), 0, 300, 100),
            span(Lane::Op, "linear", "forward", Some(1), 300, 500, 100),
            span(Lane::Op, "rmsnorm", "forward", None, 800, 100, 0),
            span(Lane::Phase, "forward", "forward", None, 0, 950, 0),
        ];
        let roofline = Roofline { flops_per_s: 1e9, bytes_per_s: 1e9 };
        let floor = vec![Cost { bytes: 20, flops: 150 }, Cost { bytes: 50, flops: 1 }];
        let profile = Profile { steps: vec![(0, 1000)], tokens: 5, spans, floor, roofline };
        let summary = summarize(&profile);
        assert!(!summary.kernels);
        assert!((summary.explained - 0.9).abs() < 1e-9 && summary.between_ns == 100);
        // 150 ns of computation, then 50 of moving.
        assert!((summary.speed_of_light - 0.2).abs() < 1e-9);
        assert_eq!((summary.rows[0].name.as_str(), summary.rows[0].calls, summary.rows[0].ns), ("linear", 2, 800));
        assert_eq!(summary.rows[0].of_ceiling, Some(0.25));
        let layers: Vec<&str> = summary.layers.iter().map(|row| row.name.as_str()).collect();
        assert_eq!(layers, ["forward, layer 0", "forward, layer 1", "forward, outside the layers"]);
        assert!((summary.tok_per_s - 5e6).abs() < 1.0);
    }

    #[test]
    fn kernels_take_the_place_of_operations() {
        let span = |lane, ns| Span {
            lane,
            name: "gemm",
            phase: "",
            layer: None,
            start_ns: 0,
            duration_ns: ns,
            cost: Cost::default(),
        };
        let profile = Profile {
            steps: vec![(0, 100)],
            tokens: 1,
            spans: vec![span(Lane::Op, 90), span(Lane::Kernel, 40)],
            floor: Vec::new(),
            roofline: Roofline { flops_per_s: 1.0, bytes_per_s: 1.0 },
        };
        let summary = summarize(&profile);
        assert!(summary.kernels && summary.rows.len() == 1 && summary.rows[0].ns == 40);
        assert_eq!(summary.rows[0].of_ceiling, None);
    }
}
