//! Outputs that appear whole.

use serde_json::Value;
use std::fs;
use std::path::Path;
use swat::error::Error;
use swat::io::{IfExists, OutputDir, write_atomic};
use tempfile::TempDir;

#[test]
fn outputs_appear_whole() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("deep/out");
    let names = || {
        let mut names: Vec<String> = fs::read_dir(dir.path().join("deep"))
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    };
    let output = OutputDir::create(&path, IfExists::Fail).unwrap();
    fs::write(output.dir().join("a"), "1").unwrap();
    assert!(!path.exists());
    let busy = OutputDir::create(&path, IfExists::Replace).unwrap_err();
    assert!(matches!(busy, Error::InUse { .. }) && busy.to_string().contains("another swat process"));
    output.commit().unwrap();
    assert_eq!(fs::read_to_string(path.join("a")).unwrap(), "1");
    assert_eq!(names(), ["out"]);

    assert!(matches!(OutputDir::create(&path, IfExists::Fail).unwrap_err(), Error::Exists { .. }));
    let dropped = OutputDir::create(&path, IfExists::Replace).unwrap();
    fs::write(dropped.dir().join("b"), "2").unwrap();
    drop(dropped);
    assert_eq!(names(), ["out"]);
    assert!(path.join("a").exists());

    let replaced = OutputDir::create(&path, IfExists::Replace).unwrap();
    fs::create_dir(replaced.dir().join("sub")).unwrap();
    fs::write(replaced.dir().join("sub/c"), "3").unwrap();
    replaced.commit().unwrap();
    assert!(!path.join("a").exists() && path.join("sub/c").exists());
    assert_eq!(names(), ["out"]);
}

#[test]
fn outputs_recover_from_a_kill() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("out");
    let write = |name: &str| {
        let output = OutputDir::create(&path, IfExists::Replace).unwrap();
        fs::write(output.dir().join(name), "").unwrap();
        output
    };
    write("kept").commit().unwrap();
    fs::rename(&path, dir.path().join(".out.old")).unwrap();
    let killed = write("junk");
    fs::rename(killed.dir(), dir.path().join("aside")).unwrap();
    drop(killed);
    fs::rename(dir.path().join("aside"), dir.path().join(".out.partial")).unwrap();
    fs::rename(&path, dir.path().join(".out.old")).unwrap_or(());
    assert!(matches!(OutputDir::create(&path, IfExists::Fail).unwrap_err(), Error::Exists { .. }), "put back");
    assert!(path.join("kept").exists());
    let output = OutputDir::create(&path, IfExists::Replace).unwrap();
    assert!(!output.dir().join("junk").exists(), "cleared");
}

/// The record of an output is the first file in it: its temporary name may be all that there is.
#[test]
fn a_kill_within_the_record_leaves_nothing_in_the_way() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("out");
    let partial = dir.path().join(".out.partial");
    fs::create_dir(&partial).unwrap();
    fs::write(partial.join("..swat.json.a1B2c3.partial"), "{").unwrap();
    let output = OutputDir::create(&path, IfExists::Fail).unwrap();
    fs::write(output.dir().join("a"), "1").unwrap();
    output.commit().unwrap();
    // Of a replacement in place it lies beside the files.
    fs::write(path.join("..swat.json.d4E5f6.partial"), "{").unwrap();
    OutputDir::create(&path, IfExists::Replace).unwrap().commit().unwrap();
    assert_eq!(fs::read_dir(&path).unwrap().count(), 1, "the record alone");
    // Other hidden files are none of ours.
    fs::write(path.join(".notes.partial"), "mine").unwrap();
    assert!(OutputDir::create(&path, IfExists::Replace).unwrap_err().to_string().contains(".notes.partial"));
}

#[test]
fn outputs_do_not_overwrite_what_appeared_meanwhile() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("out");
    let output = OutputDir::create(&path, IfExists::Fail).unwrap();
    fs::create_dir(&path).unwrap();
    fs::write(path.join("notes.txt"), "mine").unwrap();
    assert!(output.commit().unwrap_err().to_string().contains("notes.txt"));
    assert_eq!(fs::read(path.join("notes.txt")).unwrap(), b"mine");
    assert!(OutputDir::create(Path::new("/"), IfExists::Fail).is_err());
}

#[test]
fn files_are_replaced_whole() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("map.json");
    write_atomic(&path, b"one").unwrap();
    write_atomic(&path, b"two").unwrap();
    assert_eq!(fs::read(&path).unwrap(), b"two");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    let error = write_atomic(&dir.path().join("none/map.json"), b"").unwrap_err();
    assert!(matches!(&error, Error::Io { path, .. } if path.ends_with("none/map.json")), "{error}");
}

/// An output of these files.
fn output(path: &Path, if_exists: IfExists, files: &[(&str, &str)]) -> Result<(), Error> {
    let output = OutputDir::create(path, if_exists)?;
    for (name, text) in files {
        let file = output.dir().join(name);
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        fs::write(file, text).unwrap();
    }
    output.commit()
}

#[test]
fn only_what_swat_wrote_is_replaced() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("out");
    let files: &[(&str, &str)] = &[("config.json", "{}"), ("checkpoint/weights", "1")];
    let refused = |named: &str| {
        for if_exists in [IfExists::Fail, IfExists::Replace] {
            let error = output(&path, if_exists, files).unwrap_err();
            assert!(error.to_string().contains(named) && error.exit_code() == 2, "{named}: {error}");
        }
    };
    // An empty directory is no output.
    fs::create_dir(&path).unwrap();
    output(&path, IfExists::Fail, files).unwrap();
    output(&path, IfExists::Replace, files).unwrap();
    // Whatever else is in it is named and kept.
    fs::write(path.join("notes.txt"), "mine").unwrap();
    refused("notes.txt");
    fs::rename(path.join("notes.txt"), path.join("checkpoint/notes.txt")).unwrap();
    refused("checkpoint/notes.txt");
    fs::remove_file(path.join("checkpoint/notes.txt")).unwrap();
    fs::create_dir(path.join("folder")).unwrap();
    refused("folder");
    fs::remove_dir(path.join("folder")).unwrap();
    fs::write(path.join("config.json"), "{\"edited\": true}").unwrap();
    refused("config.json");
    fs::write(path.join("config.json"), "{}").unwrap();
    #[cfg(unix)]
    {
        std::os::unix::fs::symlink("/etc/hostname", path.join("link")).unwrap();
        refused("link");
        fs::remove_file(path.join("link")).unwrap();
    }
    output(&path, IfExists::Replace, &[("other", "")]).unwrap();
    assert!(!path.join("config.json").exists() && !path.join("checkpoint").exists() && path.join("other").exists());
    // A file in the place of the directory.
    let file = dir.path().join("file");
    fs::write(&file, "mine").unwrap();
    assert!(output(&file, IfExists::Replace, files).is_err());
    assert_eq!(fs::read(&file).unwrap(), b"mine");
}

/// An output's directory that somebody else made: what its record names outside of it is not removed.
#[test]
fn a_record_does_not_lead_out_of_its_directory() {
    let dir = TempDir::new().unwrap();
    let (path, victim) = (dir.path().join("out"), dir.path().join("victim"));
    fs::write(&victim, "mine").unwrap();
    for name in ["../victim", victim.to_str().unwrap(), "a/../../victim", "./../victim"] {
        fs::create_dir_all(&path).unwrap();
        fs::write(path.join("config.json"), "{}").unwrap();
        let record = serde_json::json!({ "format": "swat.output/1", "files": { "config.json": null, name: null } });
        fs::write(path.join(".swat.json"), record.to_string()).unwrap();
        let error = output(&path, IfExists::Replace, &[("new", "")]).unwrap_err();
        assert!(error.to_string().contains("config.json"), "{name}: {error}");
        assert_eq!(fs::read(&victim).unwrap(), b"mine", "{name}");
    }
}

/// `rm out/*` leaves the record, which is no output; what a run left that wrote in place is told before another one.
#[test]
fn a_directory_whose_files_are_gone_is_empty() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("out");
    output(&path, IfExists::Fail, &[("config.json", "{}")]).unwrap();
    fs::remove_file(path.join("config.json")).unwrap();
    assert!(path.join(".swat.json").exists());
    output(&path, IfExists::Fail, &[("config.json", "{}")]).unwrap();
    fs::remove_file(path.join("config.json")).unwrap();
    fs::create_dir(path.join(".swat.unfinished")).unwrap();
    let error = OutputDir::create(&path, IfExists::Replace).unwrap_err();
    assert!(error.to_string().contains("`.swat.unfinished`, left by a run that wrote in place"), "{error}");
    assert!(path.join(".swat.unfinished").exists());
}

/// A model that was trained further by something else has the size of the one that was recorded.
#[test]
fn a_large_file_of_the_same_size_is_not_the_same() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("out");
    let values = |first: u32| (first..first + 800_000).flat_map(|x| (x as f32).to_le_bytes()).collect::<Vec<u8>>();
    let write = |if_exists| {
        let out = OutputDir::create(&path, if_exists)?;
        fs::write(out.dir().join("model.safetensors"), values(1)).unwrap();
        out.commit()
    };
    write(IfExists::Fail).unwrap();
    write(IfExists::Replace).unwrap();
    fs::write(path.join("model.safetensors"), values(2)).unwrap();
    let error = write(IfExists::Replace).unwrap_err();
    assert!(error.to_string().contains("`model.safetensors`, which has changed since swat wrote it"), "{error}");
    assert_eq!(fs::read(path.join("model.safetensors")).unwrap(), values(2));
    // What an earlier version recorded of such a file: its size alone.
    let record = path.join(".swat.json");
    let mut marks: Value = serde_json::from_slice(&fs::read(&record).unwrap()).unwrap();
    let mark = marks["files"]["model.safetensors"].as_object_mut().unwrap();
    assert_eq!(mark["bytes"], 3_200_000);
    mark.remove("blake3").unwrap();
    fs::write(&record, marks.to_string()).unwrap();
    write(IfExists::Replace).unwrap();
}

#[test]
fn outputs_of_versions_without_a_record_are_recognised() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("out");
    fs::create_dir(&path).unwrap();
    fs::write(path.join("tune.json"), r#"{"config": {}, "job": {}, "summary": {}}"#).unwrap();
    for name in ["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "metrics.jsonl"] {
        fs::write(path.join(name), "").unwrap();
    }
    fs::write(path.join("model-mine.safetensors"), "").unwrap();
    let error = output(&path, IfExists::Replace, &[]).unwrap_err().to_string();
    assert!(error.contains("model-mine.safetensors") && !error.contains("metrics.jsonl"), "{error}");
    fs::remove_file(path.join("model-mine.safetensors")).unwrap();
    output(&path, IfExists::Replace, &[("new", "")]).unwrap();
    // Without its own record of a run, a model directory is somebody's.
    let model = dir.path().join("model");
    fs::create_dir(&model).unwrap();
    fs::write(model.join("config.json"), "").unwrap();
    assert!(output(&model, IfExists::Replace, &[]).unwrap_err().to_string().contains("config.json"));
}

#[test]
#[cfg(unix)]
fn an_output_named_by_a_link_is_written_where_it_leads() {
    let dir = TempDir::new().unwrap();
    let (real, link) = (dir.path().join("real"), dir.path().join("link"));
    fs::create_dir(&real).unwrap();
    std::os::unix::fs::symlink(&real, &link).unwrap();
    output(&link, IfExists::Fail, &[("a", "1")]).unwrap();
    assert_eq!(fs::read(real.join("a")).unwrap(), b"1");
    assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
    fs::remove_dir_all(&real).unwrap();
    assert!(output(&link, IfExists::Replace, &[]).unwrap_err().to_string().contains("leads nowhere"));
}

#[test]
#[cfg(unix)]
fn inputs_and_outputs_lie_apart_whatever_their_names() {
    use swat::io::{check_apart, check_not_in};
    let dir = TempDir::new().unwrap();
    let at = |name: &str| dir.path().join(name);
    fs::create_dir_all(at("outer/m")).unwrap();
    fs::write(at("outer/m/config.json"), "").unwrap();
    fs::write(at("data.jsonl"), "").unwrap();
    std::os::unix::fs::symlink(at("outer"), at("link")).unwrap();
    fs::create_dir(at("linked")).unwrap();
    std::os::unix::fs::symlink(at("outer/m/config.json"), at("linked/config.json")).unwrap();
    fs::hard_link(at("data.jsonl"), at("hard.jsonl")).unwrap();
    let check = |out: &str, input: &str| check_apart(&[("--out", &at(out))], &[("--model", &at(input))]);
    for (out, input, how) in [
        ("outer", "outer/m", "holds"),
        ("link", "outer/m", "holds"),
        ("linked/../outer", "link/m", "holds"),
        ("outer", "linked", "holds"),
        ("outer/m", "link/m", "is --model"),
        ("link/m/new/deep", "outer/m", "lies in"),
        ("hard.jsonl", "data.jsonl", "is --model"),
    ] {
        let error = check(out, input).unwrap_err();
        assert!(error.to_string().contains(how) && error.exit_code() == 2, "{out} {input}: {error}");
    }
    for (out, input) in [("new", "outer/m"), ("outer/new", "outer/m"), ("linked", "outer/m"), ("outer2", "outer")] {
        check(out, input).unwrap();
    }
    assert!(check_apart(&[("--a", &at("x")), ("--b", &at("linked/../x"))], &[]).is_err());
    // A study's directory may hold its model, and may not lie in it.
    check_not_in(&[("out", &at("outer"))], &[("model", &at("outer/m"))]).unwrap();
    assert!(check_not_in(&[("out", &at("link/m/s"))], &[("model", &at("outer/m"))]).is_err());
}
