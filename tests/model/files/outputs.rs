//! Outputs that appear whole.

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
    fs::create_dir(dir.path().join(".out.partial")).unwrap();
    fs::write(dir.path().join(".out.partial/junk"), "").unwrap();
    fs::create_dir(dir.path().join(".out.old")).unwrap();
    fs::write(dir.path().join(".out.old/kept"), "").unwrap();
    assert!(matches!(OutputDir::create(&path, IfExists::Fail).unwrap_err(), Error::Exists { .. }), "put back");
    assert!(path.join("kept").exists());
    let output = OutputDir::create(&path, IfExists::Replace).unwrap();
    assert_eq!(fs::read_dir(output.dir()).unwrap().count(), 0, "cleared");
}

#[test]
fn outputs_do_not_overwrite_what_appeared_meanwhile() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("out");
    let output = OutputDir::create(&path, IfExists::Fail).unwrap();
    fs::create_dir(&path).unwrap();
    assert!(matches!(output.commit().unwrap_err(), Error::Exists { .. }));
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
