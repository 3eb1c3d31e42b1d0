//! Links in model directories.

use super::*;

#[cfg(unix)]
#[test]
fn links_may_lead_to_weights_and_to_files_of_the_same_name() {
    use std::os::unix::fs::symlink;
    let outside = TempDir::new().unwrap();
    let target = outside.path().join("tuned-yesterday.safetensors");
    let dir = sharded(|_| {});
    fs::rename(dir.path().join("b.safetensors"), &target).unwrap();
    symlink(&target, dir.path().join("b.safetensors")).unwrap();
    ModelDir::open(dir.path()).unwrap();

    // A directory made of links, one for each file of another; the other may be one of links itself.
    let linked = TempDir::new().unwrap();
    for entry in fs::read_dir(dir.path()).unwrap() {
        let path = entry.unwrap().path();
        symlink(&path, linked.path().join(path.file_name().unwrap())).unwrap();
    }
    ModelDir::open(linked.path()).unwrap();

    // What an archive of somebody else may hold: copied into an output, it would give a private file away.
    let secret = outside.path().join("id_ed25519");
    fs::write(&secret, "{}").unwrap();
    for name in ["special_tokens_map.json", "merges.txt", "chat_template.jinja", "tokenizer.json"] {
        symlink(&secret, linked.path().join(name)).unwrap();
        let out = TempDir::new().unwrap();
        let written = ModelDir::open(linked.path()).and_then(|model| {
            model.chat_template(None).ok();
            model.write(out.path(), |id| model.tensor(id, &shape_of(&model, id)), u64::MAX)
        });
        let error = written.unwrap_err().to_string();
        assert!(error.contains("of another name; expected the file itself: cp --remove-destination"), "{error}");
        assert!(!out.path().join(name).exists());
        fs::remove_file(linked.path().join(name)).unwrap();
    }
    // Other contents than tensors are no weights, wherever the link leads.
    fs::remove_file(dir.path().join("b.safetensors")).unwrap();
    symlink(&secret, dir.path().join("b.safetensors")).unwrap();
    assert!(error(&dir).contains("found 2 bytes"), "{}", error(&dir));
    fs::remove_file(&secret).unwrap();
    assert!(error(&dir).contains("where there is no file; expected the file, or a link to it: `cp -L`"));
}

#[cfg(unix)]
#[test]
fn snapshots_of_the_hub_cache_open() {
    use std::os::unix::fs::symlink;
    let cache = TempDir::new().unwrap();
    let repository = cache.path().join("models--org--name");
    let (snapshot, blobs) = (repository.join("snapshots/0123"), repository.join("blobs"));
    fs::create_dir_all(&snapshot).unwrap();
    fs::create_dir_all(&blobs).unwrap();
    fs::write(blobs.join("c"), config().to_string()).unwrap();
    fs::write(blobs.join("w"), safetensors(&tensors())).unwrap();
    symlink("../../blobs/c", snapshot.join("config.json")).unwrap();
    symlink("../../blobs/w", snapshot.join("model.safetensors")).unwrap();
    ModelDir::open(&snapshot).unwrap();
    // By a link to the snapshot, and by links to its files.
    symlink(&snapshot, cache.path().join("current")).unwrap();
    ModelDir::open(&cache.path().join("current")).unwrap();
    let linked = TempDir::new().unwrap();
    for name in ["config.json", "model.safetensors"] {
        symlink(snapshot.join(name), linked.path().join(name)).unwrap();
    }
    ModelDir::open(linked.path()).unwrap();
    // The folder above is no model; a copy without the blobs has nothing in it.
    let above = ModelDir::open(&repository).err().unwrap().to_string();
    assert!(above.contains("the directory of a snapshot, such as") && above.contains("0123"), "{above}");
    fs::rename(&blobs, cache.path().join("elsewhere")).unwrap();
    let broken = ModelDir::open(&snapshot).err().unwrap().to_string();
    assert!(broken.contains("config.json: found a link to ../../blobs/c, where there is no file"), "{broken}");
}
