//! A profile as tables, and as a Chrome trace.

use super::format::{bytes, compact, fixed, percent};
use super::trace::{TraceWriter, Track};
use super::{Entry, Table};
use crate::backend::trace::{Lane, Span};
use crate::error::Result;
use crate::profile::{Profile, Row, Summary};
use serde_json::{Map, json};
use std::path::Path;

/// By kernel (or operation), and by layer.
pub fn profile_tables(summary: &Summary) -> [Table; 2] {
    let what = if summary.kernels { "kernel" } else { "operation" };
    let by_kernel = table(format!("By {what}"), what, &summary.rows);
    [by_kernel, table("By layer".into(), "phase", &summary.layers)]
}

fn table(caption: String, what: &str, rows: &[Row]) -> Table {
    let mut table = Table::new(caption).column(what);
    for name in ["calls", "time, ms", "share", "bytes", "GB/s", "FLOPs", "GFLOP/s", "of ceiling"] {
        table = table.numbers(name, "");
    }
    for row in rows {
        let per_s = |amount: u64| match amount {
            0 => Entry::missing(),
            _ => Entry::number(amount as f64, fixed(amount as f64 / row.ns.max(1) as f64, 1)),
        };
        table.row([
            Entry::text(&row.name),
            Entry::number(row.calls as f64, row.calls.to_string()),
            Entry::number(row.ns as f64, fixed(row.ns as f64 / 1e6, 3)),
            Entry::number(row.share, percent(row.share, 1)),
            Entry::number(row.bytes as f64, bytes(row.bytes)),
            per_s(row.bytes),
            Entry::number(row.flops as f64, compact(row.flops)),
            per_s(row.flops),
            row.of_ceiling.map_or(Entry::missing(), |share| Entry::number(share, percent(share, 1))),
        ]);
    }
    table
}

/// Process of the host's tracks, and of the GPU's.
const HOST: u32 = 1;
const GPU: u32 = 2;

/// Writes all spans: steps, phases, layers and operations on tracks of the host, kernels on one of the GPU.
///
/// # Errors
/// [`crate::Error::Io`] where the file cannot be written.
pub fn write_trace(profile: &Profile, device: &str, path: &Path) -> Result<u64> {
    let mut trace = TraceWriter::create(path)?;
    trace.name_process(HOST, "host")?;
    let step = Track { pid: HOST, tid: 1 };
    trace.name_track(step, "steps")?;
    for (lane, name) in [(Lane::Phase, "phases"), (Lane::Layer, "layers"), (Lane::Op, "operations")] {
        trace.name_track(track(lane), name)?;
    }
    if profile.spans.iter().any(|s| s.lane == Lane::Kernel) {
        trace.name_process(GPU, device)?;
        trace.name_track(track(Lane::Kernel), "kernels")?;
    }
    for (i, (start_ns, ns)) in profile.steps.iter().enumerate() {
        trace.complete(step, &format!("step {}", i + 1), "step", *start_ns, *ns, Map::new())?;
    }
    let mut spans: Vec<&Span> = profile.spans.iter().collect();
    // Within a track the outer span first.
    spans.sort_by_key(|s| (s.lane, s.start_ns, std::cmp::Reverse(s.duration_ns)));
    for span in spans {
        let name = match span.layer.filter(|_| span.lane == Lane::Layer) {
            Some(layer) => format!("layer {layer}"),
            None => span.name.to_string(),
        };
        let mut args = Map::new();
        if matches!(span.lane, Lane::Op | Lane::Kernel) {
            args.insert("bytes".into(), json!(span.cost.bytes));
            args.insert("flops".into(), json!(span.cost.flops));
            args.insert("layer".into(), json!(span.layer));
            args.insert("phase".into(), json!(span.phase));
        }
        let category = match span.lane {
            Lane::Phase => "phase",
            Lane::Layer => "layer",
            Lane::Op => "operation",
            Lane::Kernel => "kernel",
        };
        trace.complete(track(span.lane), &name, category, span.start_ns, span.duration_ns, args)?;
    }
    trace.finish()
}

fn track(lane: Lane) -> Track {
    match lane {
        Lane::Phase => Track { pid: HOST, tid: 2 },
        Lane::Layer => Track { pid: HOST, tid: 3 },
        Lane::Op => Track { pid: HOST, tid: 4 },
        Lane::Kernel => Track { pid: GPU, tid: 1 },
    }
}
