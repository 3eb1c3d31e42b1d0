//! The rules of the Chrome trace-event format.

use serde_json::Value;
use std::collections::{BTreeSet, HashMap, HashSet};

/// Asserts the rules: names, tracks, times; events of a track nest or follow each other.
pub fn check(events: &[Value]) {
    walk(events, |_| {});
}

/// The path of every event of the first process: `step 1/forward/layer 0/attention`.
pub fn paths(events: &[Value]) -> BTreeSet<String> {
    let mut paths = BTreeSet::new();
    walk(events, |stack| {
        let names: Vec<&str> = stack.iter().filter_map(|event| event["name"].as_str()).collect();
        if stack.last().is_some_and(|event| event["pid"] == 1) {
            paths.insert(names.join("/"));
        }
    });
    paths
}

/// Calls `visit` with each complete event, preceded by those that enclose it.
fn walk<'e>(events: &'e [Value], mut visit: impl FnMut(&[&'e Value])) {
    let mut named = HashSet::new();
    let mut open: HashMap<(u64, u64), Vec<&Value>> = HashMap::new();
    // Times are decimals of nanoseconds in microseconds.
    let ns = |event: &Value, field: &str| (event[field].as_f64().expect("a number") * 1e3).round();
    let end = |event: &Value| ns(event, "ts") + ns(event, "dur");
    for event in events {
        let track = (event["pid"].as_u64().expect("a pid"), event["tid"].as_u64().expect("a tid"));
        assert!(!event["name"].as_str().expect("a name").is_empty());
        match event["ph"].as_str().expect("a phase") {
            "M" => {
                if event["name"] == "thread_name" {
                    assert!(event["args"]["name"].is_string());
                    named.insert(track);
                }
            }
            "X" => {
                assert!(ns(event, "ts") >= 0.0 && ns(event, "dur") >= 0.0 && event["cat"].is_string());
                assert!(named.contains(&track), "an event on a track without a name");
                let stack = open.entry(track).or_default();
                while stack.last().is_some_and(|outer| end(outer) <= ns(event, "ts")) {
                    stack.pop();
                }
                assert!(stack.last().is_none_or(|outer| end(event) <= end(outer)), "{event} reaches out of {stack:?}");
                stack.push(event);
                visit(stack);
            }
            "C" => assert!(event["args"]["value"].is_u64()),
            other => panic!("phase {other}"),
        }
    }
}
