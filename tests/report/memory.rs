//! The table of planned memory.

use swat::engine::Plan;
use swat::report::memory_table;

#[test]
fn a_plan_has_a_column_a_phase_and_a_total() {
    let plan = |weights_bytes| Plan { weights_bytes, moments_bytes: 1 << 10, ..Plan::default() };
    let text = memory_table(&[("mods".into(), plan(1 << 20)), ("all".into(), plan(2 << 20))]).text();
    let words = |line: &str| line.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
    let lines: Vec<Vec<String>> = text.lines().map(words).collect();
    assert_eq!(lines[1], ["mods", "all"], "{text}");
    assert!(lines.contains(&words("weights 1.00 MiB 2.00 MiB")) && lines.contains(&words("total 1.00 MiB 2.00 MiB")));
}
