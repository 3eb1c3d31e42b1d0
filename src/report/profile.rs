//! Memory plans and profiles as tables, and a profile as a Chrome trace.

use super::format::{bytes, compact, fixed};
use super::trace::{Trace, Track};
use super::{Entry, Table};
use crate::backend::trace::{Span, SpanKind};
use crate::engine::Plan;
use crate::error::Result;
use crate::io::file::begins_with;
use crate::io::write_atomic;
use crate::profile::{Profile, Row, Summary};
use serde_json::{Map, json};
use std::path::Path;

/// Planned memory by category, one column per phase.
pub fn memory_table(plans: &[(String, Plan)]) -> Table {
    let mut table = Table::new("Memory, as planned").column("");
    for (phase, _) in plans {
        table = table.numbers(phase, "");
    }
    let mut row = |name: &str, of: &dyn Fn(&Plan) -> u64| {
        let sizes = plans.iter().map(|(_, plan)| Entry::number(of(plan) as f64, bytes(of(plan))));
        table.row([Entry::text(name)].into_iter().chain(sizes));
    };
    for (i, (name, _)) in Plan::default().categories().iter().enumerate() {
        // Most runs keep no copies.
        if *name != "copies" || plans.iter().any(|(_, plan)| plan.copies_bytes > 0) {
            row(name, &|plan| plan.categories()[i].1);
        }
    }
    row("total", &Plan::total_bytes);
    table
}

/// Time, bytes and FLOPs by kernel (by operation on the CPU), and by layer.
pub fn profile_tables(summary: &Summary) -> [Table; 2] {
    let what = if summary.kernels { "kernel" } else { "operation" };
    let mut tables =
        [table(format!("By {what}"), what, &summary.rows), table("By layer".into(), "phase", &summary.layers)];
    for table in &mut tables {
        let mut between = vec![Entry::missing(); table.columns.len()];
        between[0] = Entry::text(format!("between the {what}s"));
        between[2] = time(summary.between_ns);
        between[3] = Entry::percent(1.0 - summary.explained);
        table.row(between);
    }
    tables
}

fn time(ns: u64) -> Entry {
    Entry::number(ns as f64, fixed(ns as f64 / 1e6, 3))
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
            Entry::count(row.calls),
            time(row.ns),
            Entry::percent(row.share),
            Entry::number(row.bytes as f64, bytes(row.bytes)),
            per_s(row.bytes),
            Entry::number(row.flops as f64, compact(row.flops)),
            per_s(row.flops),
            Entry::percent(row.of_ceiling),
        ]);
    }
    table
}

/// The thread that runs the engine, and the GPU's stream.
const HOST: Track = Track { pid: 1, tid: 1 };
const GPU: Track = Track { pid: 2, tid: 1 };

/// Writes a profile's spans as a Chrome trace: steps, phases, layers and operations nested on a host track, kernels on
/// a GPU track. Returns the number of events.
///
/// # Errors
/// [`crate::error::Error::Io`] where the file cannot be written.
pub fn write_trace(profile: &Profile, device: &str, path: &Path) -> Result<usize> {
    let mut trace = Trace::default();
    trace.name_process(HOST.pid, "host");
    trace.name_track(HOST, "engine");
    if profile.spans.iter().any(|s| s.kind == SpanKind::Kernel) {
        trace.name_process(GPU.pid, device);
        trace.name_track(GPU, "kernels");
    }
    // Outer spans first: they begin no later, end no earlier, and have the outer kind where both are equal.
    let mut spans: Vec<&Span> = profile.spans.iter().collect();
    spans.sort_by_key(|s| (s.start_ns, std::cmp::Reverse(s.duration_ns), s.kind));
    let mut spans = spans.into_iter().peekable();
    for (i, step) in profile.steps.iter().enumerate() {
        while let Some(span) = spans.next_if(|span| span.start_ns < step.0) {
            add_span(&mut trace, span);
        }
        trace.complete(HOST, &format!("step {}", i + 1), "step", *step, Map::new());
    }
    spans.for_each(|span| add_span(&mut trace, span));
    write_atomic(path, trace.json().as_bytes())?;
    Ok(trace.events())
}

/// Whether a file is one that [`write_trace`] wrote.
pub fn is_trace(path: &Path) -> bool {
    begins_with(path, "{\"displayTimeUnit\":\"ms\",\"traceEvents\":[\n")
}

fn add_span(trace: &mut Trace, span: &Span) {
    let name = match span.layer.filter(|_| span.kind == SpanKind::Layer) {
        Some(layer) => format!("layer {layer}"),
        None => span.name.to_string(),
    };
    let (track, category) = match span.kind {
        SpanKind::Phase => (HOST, "phase"),
        SpanKind::Layer => (HOST, "layer"),
        SpanKind::Op => (HOST, "operation"),
        SpanKind::Kernel => (GPU, "kernel"),
    };
    let args = match span.kind {
        SpanKind::Phase | SpanKind::Layer => Map::new(),
        SpanKind::Op | SpanKind::Kernel => Map::from_iter([
            ("bytes".into(), json!(span.cost.bytes)),
            ("flops".into(), json!(span.cost.flops)),
            ("layer".into(), json!(span.layer)),
            ("phase".into(), json!(span.phase)),
        ]),
    };
    trace.complete(track, &name, category, (span.start_ns, span.duration_ns), args);
}
