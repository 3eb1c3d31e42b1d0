//! Network namespaces in the place of machines: two of them, joined by a cable, with two ranks in each.

use crate::ranks::Run;
use crate::training::of_four;
use std::path::Path;
use std::process::Command;

#[test]
fn two_machines_train_as_one() {
    let Some(run) = Run::new(4) else { return };
    let unshare = |command: &mut Command| {
        command.args(["--user", "--map-root-user", "--net"]);
    };
    let mut trial = Command::new("unshare");
    unshare(&mut trial);
    trial.args(["sh", "-c", "ip link add a type veth peer name b"]);
    let trial = trial.output();
    if !trial.as_ref().is_ok_and(|output| output.status.success()) {
        eprintln!("skipped: two machines (no network namespaces here, or no `ip`: {trial:?})");
        return;
    }
    let run = run.with("MASTER_ADDR", "10.0.0.1").with("MASTER_PORT", "29500").with("NCCL_SOCKET_IFNAME", "wire");
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/nccl/two_machines.sh");
    let (program, arguments, environment) = run.program();
    let mut command = Command::new("timeout");
    command.args(["240", "unshare"]);
    unshare(&mut command);
    command.arg("sh").arg(script).arg("2").arg(program).args(arguments).envs(environment.iter().cloned());
    let output = command.output().expect("it starts");
    let story = run.read();
    let said = String::from_utf8_lossy(&output.stderr);
    for (rank, (found, expected)) in story.done.iter().zip(of_four().expect("there is a stand-in")).enumerate() {
        let found = found.as_ref().unwrap_or_else(|error| panic!("rank {rank}: {error}\n{said}"));
        assert!(found == expected, "rank {rank} differs from that on one machine");
    }
}
