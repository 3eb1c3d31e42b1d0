//! `swat tune --gpus 2 --device cuda`: the whole way from the command line to NCCL.

use crate::common::standin::{self, BUILD, ChildDriver};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use swat::data::tiny::{Counts, Language, export};

struct World {
    dir: tempfile::TempDir,
    driver: ChildDriver,
    nccl: PathBuf,
}

fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

impl World {
    /// `None` without a stand-in.
    fn new() -> Option<Self> {
        let (driver, nccl) = (standin::for_children()?, BUILD.nccl_for_children()?);
        let dir = tempfile::tempdir().unwrap();
        export(&Language::new(1), dir.path(), Counts { pairs: 2, train: 12, tasks: 2 }, 1).unwrap();
        Some(Self { dir, driver, nccl })
    }

    /// Two steps on Mods_Rob by two ranks, with libraries from `folders`.
    fn tune(&self, out: &str, folders: &[&Path]) -> Output {
        let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/tiny");
        let (data, out) = (self.dir.path().join("train.jsonl"), self.dir.path().join(out));
        let mut command = Command::new(env!("CARGO_BIN_EXE_swat"));
        command.args(["tune", "--model", text(&model), "--data", text(&data), "--out", text(&out)]);
        command.args(["--gpus=2", "--device=cuda", "--mods=layers.*.o_proj", "--mods-steps=2", "--steps=0"]);
        command.args(["--batch-size=3", "--max-length=48", "--save-every=1"]);
        let folders: Vec<&str> = folders.iter().map(|folder| text(folder)).collect();
        command.env("LD_LIBRARY_PATH", folders.join(":")).env("STANDIN_KERNELS", &self.driver.kernels);
        command.output().expect("the binary runs")
    }

    fn weights(&self, out: &str) -> Vec<u8> {
        std::fs::read(self.dir.path().join(out).join("model.safetensors")).unwrap()
    }
}

#[test]
fn each_rank_has_a_gpu() {
    let Some(world) = World::new() else { return };
    for out in ["first", "second"] {
        let output = world.tune(out, &[&world.driver.folder, &world.nccl]);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && said.contains("training with 2 ranks"), "{said}");
        assert!(said.contains("checkpoints: each rank writes its own moments"), "{said}");
    }
    assert!(world.weights("first") == world.weights("second"), "the same bytes each time");

    let output = world.tune("none", &[&world.driver.folder]);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.code() == Some(2) && said.contains("libnccl.so.2"), "{:?}: {said}", output.status);
    assert!(!world.dir.path().join("none").join("model.safetensors").exists());
}
