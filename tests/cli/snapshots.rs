//! Help and errors as users read them, word by word. After a change that is meant:
//! `TRYCMD=overwrite cargo test --test cli -- snapshots`, and read the difference.

use crate::common::hub_server::HubServer;
use std::path::{Path, PathBuf};
use std::process::Command;

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cli/snapshots")
}

/// The commands that `swat --help` lists.
fn commands() -> Vec<String> {
    let output = Command::new(env!("CARGO_BIN_EXE_swat")).arg("--help").output().expect("the binary runs");
    let help = String::from_utf8(output.stdout).expect("UTF-8");
    let list = help.split("Commands:\n").nth(1).and_then(|rest| rest.split("\n\n").next()).expect("commands");
    let first = list.lines().filter(|line| line.starts_with("  ") && !line.starts_with("   "));
    let names = first.filter_map(|line| line.split_whitespace().next());
    names.filter(|name| *name != "help").map(str::to_owned).collect()
}

#[test]
fn help_and_errors_are_as_they_were() {
    let hub = HubServer::start();
    hub.add("models/org/gated", "config.json", b"{}".to_vec());
    let overwrite = std::env::var("TRYCMD").is_ok_and(|mode| mode == "overwrite");
    for name in commands() {
        let page = folder().join(format!("help/{name}.md"));
        if overwrite && !page.exists() {
            std::fs::write(&page, format!("```console\n$ swat {name} --help\n```\n")).unwrap();
        }
        assert!(page.exists(), "no {}: TRYCMD=overwrite cargo test --test cli -- snapshots", page.display());
    }
    let cases = trycmd::TestCases::new();
    cases.register_bin("swat", Path::new(env!("CARGO_BIN_EXE_swat")));
    // Neither the terminal nor the settings of whoever runs the tests.
    cases.env("COLUMNS", "100").env("HF_HOME", "hf").env("HF_ENDPOINT", &hub.endpoint).env("HF_TOKEN", "");
    for name in ["HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_TOKEN_PATH", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"] {
        cases.env(name, "");
    }
    for name in ["http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "SOURCE_DATE_EPOCH"] {
        cases.env(name, "");
    }
    cases.insert_var("[ENDPOINT]", hub.endpoint.clone()).unwrap();
    cases.case("tests/cli/snapshots/*.md").case("tests/cli/snapshots/help/*.md");
}
