//! The configuration file of a study.

use std::path::Path;
use swat::secure::study::RunConfig;

#[test]
fn a_file_with_overrides_resolves_its_paths() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("run.toml");
    let text = "model = 'm'\nout = '/tmp/o'\nsettings = ['given', 'swat']\n[data]\nsecurity = 's.jsonl'\ntrain = ['t.jsonl']\n[tune.all_phase]\nsteps = 3\n";
    std::fs::write(&path, text).unwrap();
    let set = ["tune.all_phase.lr=0.5".to_owned(), "perturb.kind=lowrank:4".to_owned()];
    let config = RunConfig::read(&path, &set).unwrap();
    assert_eq!(config.model, dir.path().join("m"));
    assert_eq!(config.out, Path::new("/tmp/o"));
    assert_eq!(config.tune.recipe.all_phase.lr, 0.5);
    assert_eq!(config.perturb.kind.to_string(), "lowrank:4");
    assert_eq!(config.data.train, [dir.path().join("t.jsonl")]);
}

#[test]
fn training_seeds_are_one_or_a_list() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("run.toml");
    std::fs::write(&path, "model = 'm'\nout = 'o'\n[data]\nsecurity = 's'\n[tune.shared]\nseed = 4\n").unwrap();
    let read = |overrides: &[&str]| {
        let overrides: Vec<String> = overrides.iter().map(|o| (*o).to_owned()).collect();
        RunConfig::read(&path, &overrides)
    };
    let one = read(&[]).unwrap();
    assert_eq!(one.training_seeds(), [4]);
    // Kept stages are found by a hash of this.
    assert!(!serde_json::to_string(&one.tune).unwrap().contains("seeds"));
    assert_eq!(read(&["tune.seeds=[3, 0, 4]"]).unwrap().training_seeds(), [3, 0, 4]);
    for (wrong, found) in [("[]", "an empty list"), ("[1, 2, 0, 2]", "2 more than once"), ("[-1]", "-1"), ("3", "3")] {
        let error = read(&[&format!("tune.seeds={wrong}")]).unwrap_err();
        assert!(error.to_string().contains(found), "{error}");
        assert_eq!(error.exit_code(), 2);
    }
}

#[test]
fn an_unknown_key_is_named_with_the_nearest_known_one() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("run.toml");
    std::fs::write(&path, "modle = 'm'\n").unwrap();
    let error = RunConfig::read(&path, &[]).unwrap_err();
    assert!(error.to_string().contains("`modle`") && error.to_string().contains("`model`"), "{error}");
    assert_eq!(error.exit_code(), 2);
}

#[test]
fn columns_are_a_table_a_list_or_the_text_of_the_command_line() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("run.toml");
    let read = |columns: &str, overrides: &[String]| {
        let text = format!("model = 'm'\nout = 'o'\n[data]\nsecurity = 's'\n{columns}\n");
        std::fs::write(&path, text).unwrap();
        RunConfig::read(&path, overrides)
    };
    let plain = read("", &[]).unwrap();
    assert!(plain.data.row_options().is_default());
    // Kept stages are found by a hash of this.
    let written = serde_json::to_string(&plain.data).unwrap();
    assert!(!["columns", "field", "skip_bad_rows"].iter().any(|key| written.contains(key)), "{written}");
    let expected: Vec<swat::data::Column> = ["answer=response", "prompt=question"].map(|c| c.parse().unwrap()).into();
    for columns in [
        "columns = { prompt = 'question', answer = 'response' }",
        "columns = ['answer=response', 'prompt=question']",
        "columns = 'answer=response,prompt=question'",
    ] {
        assert_eq!(read(columns, &[]).unwrap().data.columns, expected, "{columns}");
    }
    let set = ["data.columns=answer=response,prompt=question".to_owned(), "data.skip_bad_rows=true".to_owned()];
    let options = read("", &set).unwrap().data.row_options();
    assert!(options.columns == expected && options.skip_bad_rows);
    for wrong in ["columns = 3", "columns = ['prompt']"] {
        assert_eq!(read(wrong, &[]).unwrap_err().exit_code(), 2);
    }
    let error = read("", &["evaluate.answer_tokens=0".to_owned()]).unwrap_err();
    assert!(error.to_string().starts_with("answer_tokens"), "{error}");
}

#[test]
fn settings_are_recipes() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("run.toml");
    let read = |settings: &str, data: &str| {
        let text =
            format!("model = 'm'\nout = 'o'\nsettings = {settings}\n[data]\nsecurity = 's'\ntrain = ['t']\n{data}\n");
        std::fs::write(&path, text).unwrap();
        RunConfig::read(&path, &[])
    };
    // Every text of earlier versions.
    let all = "['given', 'plain', 'plain-equal', 'swat', 'reversed', 'mods-only', 'ml-lr:.1', 'warmup:complement', \
               'warmup:random:1', 'swat+refusals', 'plain-equal+attack']";
    let config = read(all, "refusals = 'r'\nattack = 'a'").unwrap();
    assert_eq!((config.settings.len(), config.settings[6].text.as_str()), (11, "ml-lr:.1"));
    // Kept stages are found by a hash of this.
    assert!(!serde_json::to_string(&config.data).unwrap().contains("replay"));
    assert!(!serde_json::to_string(&config.tune).unwrap().contains("screen"));
    let replay = read("['plain+replay=.1']", "replay = 'r.jsonl'").unwrap();
    assert_eq!(replay.data.replay, Some(dir.path().join("r.jsonl")));

    let error = |settings: &str| {
        let error = read(settings, "").unwrap_err();
        assert_eq!(error.exit_code(), 2);
        error.to_string()
    };
    let place = path.display().to_string();
    let unknown = error("['swat+emma=.9']");
    let start = format!("{place}: settings: recipe `swat+emma=.9`: found the key `emma`; expected a key: one of lr, ");
    assert!(unknown.starts_with(&start) && unknown.ends_with("(did you mean `ema`?)"), "{unknown}");
    let missing = error("['plain+refusals=.2']");
    assert!(missing.starts_with(&format!("{place}: data.refusals: found nothing")), "{missing}");
    // One name of files: of the same recipe in two spellings, or of two recipes.
    assert!(read("['plain+ema=.5,lr=1e-3', 'plain+ema=.5+lr=1e-3', 'plain+seeds=2', 'plain']", "").is_ok());
    let both = error("['warmup:layers.0,layers.1', 'warmup:layers.0;layers.1']");
    assert!(both.contains("whose files would have one name"), "{both}");
}
