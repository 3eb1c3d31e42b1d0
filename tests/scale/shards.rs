//! A map in parts, by the tasks of a job array.

use super::{data, refused, succeeds, swat, text, tiny};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;
use swat::data::tiny::Counts;

/// Data and a probe of the tiny model.
pub struct World {
    dir: tempfile::TempDir,
    security: PathBuf,
}

impl World {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let security = data(dir.path(), Counts { pairs: 16, train: 4, tasks: 4 }).join("security.jsonl");
        let world = Self { dir, security };
        let probe = world.at("p.safetensors");
        succeeds(world.command(&["probe", "--out", text(&probe)]));
        world
    }

    pub fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn command(&self, args: &[&str]) -> Command {
        let model = tiny();
        let inputs = ["--device", "cpu", "--quiet", "--model", text(&model), "--security", text(&self.security)];
        swat(&[args, &inputs[..]].concat())
    }

    /// A map of 50 cells in four groups.
    pub fn map(&self, out: &str, more: &[&str]) -> Command {
        self.map_of("1", out, more)
    }

    /// With so many perturbed copies of a cell.
    pub fn map_of(&self, members: &str, out: &str, more: &[&str]) -> Command {
        let (probe, out) = (self.at("p.safetensors"), self.at(out));
        let args = ["robustness", "--probe", text(&probe), "--out", text(&out), "--members", members, "--no-retrain"];
        self.command(&[&args[..], more].concat())
    }

    fn merge(&self, parts: &[&str], out: &str) -> Command {
        let parts: Vec<PathBuf> = parts.iter().map(|part| self.at(part)).collect();
        let out = self.at(out);
        let parts: Vec<&str> = parts.iter().map(|part| text(part)).collect();
        swat(&[&["robustness", "--out", text(&out), "--force", "--merge"], &parts[..]].concat())
    }
}

/// The text of a map but for the seconds that it took.
pub fn timeless(path: &Path) -> String {
    let text = fs::read_to_string(path).unwrap();
    let lines: Vec<&str> = text.lines().filter(|line| !line.starts_with("  \"seconds\"")).collect();
    assert_eq!(lines.len() + 1, text.lines().count());
    lines.join("\n")
}

pub fn lines(path: &Path) -> usize {
    fs::read_to_string(path).map_or(0, |text| text.lines().count())
}

#[test]
fn parts_make_the_map_of_one_process() {
    let world = World::new();
    succeeds(world.map("whole.json", &[]));
    let parts = ["map.shard-0-of-3.jsonl", "map.shard-1-of-3.jsonl", "map.shard-2-of-3.jsonl"];

    // Shard 0, of two groups, is killed after the first, and the same command finishes it.
    let slurm = |task: &str| {
        let mut command = world.map("map.json", &["--shard", "auto"]);
        for (name, value) in [("ID", task), ("MIN", "4"), ("MAX", "6"), ("STEP", "1"), ("COUNT", "3")] {
            command.env(format!("SLURM_ARRAY_TASK_{name}"), value);
        }
        command
    };
    let first = world.at(parts[0]);
    let mut child = slurm("4").stdout(Stdio::null()).spawn().unwrap();
    while lines(&first) < 2 {
        assert!(child.try_wait().unwrap().is_none(), "it ended before it could be killed");
        std::thread::sleep(Duration::from_millis(1));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    let cut = fs::read(&first).unwrap();
    fs::write(&first, &cut[..cut.len() - 9]).unwrap();
    succeeds(slurm("4"));
    assert_eq!(lines(&first), 1 + 16 + 2);
    let finished = fs::read(&first).unwrap();
    succeeds(slurm("4"));
    assert!(fs::read(&first).unwrap() == finished, "a finished part stays as it is");

    let mut kubernetes = world.map("map.json", &["--shard", "auto", "--shard-count", "3", "--json"]);
    let said = succeeds({
        kubernetes.env("JOB_COMPLETION_INDEX", "1");
        kubernetes
    });
    let said: serde_json::Value = serde_json::from_slice(&said.stdout).unwrap();
    assert_eq!((&said["shard"], &said["cells"]), (&"1/3".into(), &16.into()));
    assert!(refused(world.merge(&parts[..2], "map.json")).contains("2 of 3 parts; expected the parts of --shard 2/3"));
    succeeds(world.map("map.json", &["--shard-index", "2", "--shard-count", "3"]));

    assert!(!world.at("map.json").exists(), "a part is no map");
    succeeds(world.merge(&[parts[2], parts[0], parts[1]], "map.json"));
    assert_eq!(timeless(&world.at("map.json")), timeless(&world.at("whole.json")));
    let drawing = |name: &str| fs::read_to_string(world.at(name)).unwrap();
    assert_eq!(drawing("map.svg"), drawing("whole.svg"));

    // Nothing that the scheduler says makes a part of a map that was not asked for.
    let mut unasked = world.map("unasked.json", &["--cells", "norm", "--epsilon", "1"]);
    unasked.envs([("SLURM_ARRAY_TASK_ID", "1"), ("JOB_COMPLETION_INDEX", "2")]);
    succeeds(unasked);
    assert!(world.at("unasked.json").is_file());
}

#[test]
fn parts_that_do_not_belong_together_are_refused_by_name() {
    let world = World::new();
    let shard = |out: &str, shard: &str, more: &[&str]| {
        let args = ["--shard", shard, "--cells", "layers.0 layers.1 layers.2", "--epsilon", "1"];
        world.map(out, &[&args[..], more].concat())
    };
    succeeds(shard("a.json", "0/2", &[]));
    succeeds(shard("a.json", "1/2", &[]));
    let (a0, a1) = ("a.shard-0-of-2.jsonl", "a.shard-1-of-2.jsonl");
    let merge = |parts: &[&str]| refused(world.merge(parts, "map.json"));

    fs::copy(world.at(a1), world.at("copy.jsonl")).unwrap();
    let message = merge(&[a0, a1, "copy.jsonl"]);
    assert!(
        message.contains("copy.jsonl") && message.contains("shard 1/2, which") && message.contains(a1),
        "{message}"
    );

    // Another seed; another number of shards; another version.
    succeeds(shard("b.json", "1/2", &["--seed", "7"]));
    let message = merge(&[a0, "b.shard-1-of-2.jsonl"]);
    assert!(
        message.contains("part.map.seeds.0 is 0 in a.shard-0-of-2.jsonl and 7 in b.shard-1-of-2.jsonl"),
        "{message}"
    );
    succeeds(shard("c.json", "1/3", &[]));
    let message = merge(&[a0, "c.shard-1-of-3.jsonl"]);
    assert!(message.contains("part.shards is 2 in"), "{message}");
    let text = fs::read_to_string(world.at(a1)).unwrap();
    let version = format!("\"version\":\"{}", env!("CARGO_PKG_VERSION"));
    assert!(text.contains(&version));
    fs::write(world.at("old.jsonl"), text.replace(&version, "\"version\":\"0.0.9")).unwrap();
    let message = merge(&[a0, "old.jsonl"]);
    assert!(message.contains("part.version is") && message.contains("0.0.9"), "{message}");

    // Unfinished, damaged, with a cell of another shard, and what is no part.
    let cut = &text[..text.trim_end().rfind('\n').unwrap() + 20];
    fs::write(world.at("cut.jsonl"), cut).unwrap();
    let message = merge(&[a0, "cut.jsonl"]);
    assert!(message.contains("cut.jsonl: found 7 of 8 cells") && message.contains("--shard 1/2"), "{message}");
    fs::write(world.at("broken.jsonl"), text.replacen("\"parameters\":", "\"parameters\":-", 1)).unwrap();
    assert!(merge(&[a0, "broken.jsonl"]).contains("broken.jsonl:2"));
    let mut other: Vec<&str> = text.lines().collect();
    let foreign = fs::read_to_string(world.at(a0)).unwrap();
    other[3] = foreign.lines().nth(1).unwrap();
    fs::write(world.at("other.jsonl"), other.join("\n") + "\n").unwrap();
    assert!(merge(&[a0, "other.jsonl"]).contains("other.jsonl:4: found the cell layers.0."));
    for (name, content) in [("empty.jsonl", ""), ("nonsense.jsonl", "{}\n")] {
        fs::write(world.at(name), content).unwrap();
        assert!(merge(&[a0, name]).contains(name));
    }
    assert!(merge(&["nowhere.jsonl"]).contains("nowhere.jsonl"));
    assert!(!world.at("map.json").exists());

    // A part of another run is not replaced unless that is asked for.
    let message = refused(shard("a.json", "1/2", &["--seed", "7"]));
    assert!(message.contains(a1) && message.contains("--force"), "{message}");
    succeeds(shard("a.json", "1/2", &["--seed", "7", "--force"]));
    fs::write(world.at(a1), "mine").unwrap();
    assert!(refused(shard("a.json", "1/2", &["--force"])).contains("a file that this command did not write"));

    for (args, words) in [
        (&["--shard", "2/2"][..], "index 2 of 2"),
        (&["--shard", "auto"], "none of SLURM_ARRAY_TASK_ID"),
        (&["--shard-count", "2"], "a count alone"),
        (&["--shard", "0/2", "--shard-count", "2"], "a count that --shard has already"),
    ] {
        assert!(refused(world.map("d.json", args)).contains(words), "{args:?}");
    }
}
